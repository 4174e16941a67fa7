"""Removals that nobody waits for: what that saves, what is waited for all the same, and that no failure is lost."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, Dict, Iterator, List

import pytest

from fs.conftest import Clock
from fs.test_filesystem import WAIT_S, Mount, get, names, refused
from fs.test_interrupted import Program
from fs.test_listings import quiet
from fs.test_owed import owe
from sftp.fake_server import FakeServer, Fault, Request, named
from sftpmount.errors import FsError
from sftpmount.fs import removals
from sftpmount.fs.filesystem import Filesystem
from sftpmount.fs.removals import IN_FLIGHT_MAX, ROW, ROW_S
from support.process import wait_until

COUNT = ROW + 7
FILES = [b"/d/%02d" % number for number in range(COUNT)]
Later = Callable[[Callable[[], object]], "Future[Any]"]
PERMISSION_DENIED, NO_SUCH_FILE = 3, 2


@pytest.fixture(autouse=True)
def directory(server: FakeServer, fs: Filesystem) -> None:
    """A directory of many files, listed; another beside it."""
    for path in (b"/home/d", b"/home/e"):
        server.make_dir(path)
    for path in FILES:
        server.make(b"/home" + path, path)
    server.make(b"/home/e/f", b"")
    fs.readdir(b"/")
    fs.readdir(b"/d")
    quiet(fs)


@pytest.fixture
def later() -> Iterator[Later]:
    """Begins something in another thread."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit


def remove(fs: Filesystem, paths: List[bytes] = FILES) -> None:
    for path in paths:
        fs.unlink(path)


def begin(fs: Filesystem) -> None:
    """The removals that are waited for, after which the next ones are not."""
    remove(fs, FILES[:ROW])


def held(server: FakeServer, act: str = "hold") -> Fault:
    """The next removal's reply, or the removal itself (``hold before``), comes when the test says so."""
    return server.arm(Fault(act, named("REMOVE")))


def of(path: bytes) -> Callable[[Request], bool]:
    return lambda request: request.name == "REMOVE" and request.path == b"/home" + path


def refused_later(server: FakeServer) -> Fault:
    """The removal of ``FILES[ROW]`` is refused for good, when the test says so."""
    refusal = Fault("status", of(FILES[ROW]), times=2, code=PERMISSION_DENIED)
    refusal.then = refusal.wait_released
    return server.arm(refusal)


def settled(fs: Filesystem) -> None:
    wait_until(lambda: not fs._removals.paths(), WAIT_S, "the end of the removals")


def waits(fs: Filesystem) -> None:
    wait_until(lambda: bool(fs._removals._changed._waiters), WAIT_S, "somebody who waits for removals")  # type: ignore[attr-defined]


def left(server: FakeServer) -> List[bytes]:
    return sorted(path for path in FILES if server.has(b"/home" + path))


class TestInARow:
    def test_the_next_ones_are_not_waited_for(self, server: FakeServer, fs: Filesystem) -> None:
        begin(fs)
        fault = held(server)
        remove(fs, FILES[ROW:-1])
        assert fault.fired.wait(WAIT_S) and len(fs._removals.paths()) == COUNT - ROW - 1
        fault.release()
        settled(fs)
        assert left(server) == FILES[-1:]

    def test_at_once_to_whoever_looks(self, server: FakeServer, fs: Filesystem) -> None:
        begin(fs)
        fault = held(server, "hold before")
        fs.unlink(FILES[ROW])
        assert refused(lambda: fs.getattr(FILES[ROW])) == errno.ENOENT
        assert FILES[ROW] in fs.unstored()
        fault.release()

    @pytest.mark.parametrize("number", range(ROW))
    def test_the_first_ones_are_waited_for(self, server: FakeServer, fs: Filesystem, number: int) -> None:
        remove(fs, FILES[:number])
        server.arm(Fault("status", named("REMOVE"), code=PERMISSION_DENIED))
        assert refused(lambda: fs.unlink(FILES[number])) == errno.EACCES

    def test_the_last_name_of_a_directory_is_waited_for(
        self, server: FakeServer, fs: Filesystem, later: Later
    ) -> None:
        begin(fs)
        fault = held(server)
        remove(fs, FILES[ROW:-1])
        last = later(lambda: fs.unlink(FILES[-1]))
        waits(fs)
        assert left(server)
        fault.release()
        last.result(WAIT_S)
        assert left(server) == []

    def test_so_many_at_once(
        self, server: FakeServer, fs: Filesystem, later: Later, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(removals, "IN_FLIGHT_MAX", 3)
        assert IN_FLIGHT_MAX >= 64
        begin(fs)
        fault = held(server)
        remove(fs, FILES[ROW : ROW + 3])
        one_more = later(lambda: fs.unlink(FILES[ROW + 3]))
        waits(fs)
        assert len(fs._removals.paths()) == 3
        fault.release()
        one_more.result(WAIT_S)


BETWEEN: Dict[str, Callable[[Filesystem], object]] = {
    "create": lambda fs: fs.release(fs.create(b"/d/new", os.O_WRONLY | os.O_EXCL, 0o644)),
    "look": lambda fs: (
        fs._ns.distrust_path(b"/d/new"),
        refused(lambda: fs.getattr(b"/d/new")),
        fs.readdir(b"/d"),
    ),
    "list": lambda fs: fs.readdir(b"/d"),
    "rename": lambda fs: (fs.rename(FILES[-1], b"/d/new"), fs.readdir(b"/d")),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_a_row_has_nothing_else_in_it(server: FakeServer, fs: Filesystem, name: str) -> None:
    """Who makes a file in the place of each old one waits for each removal, and finds the space free."""
    begin(fs)
    BETWEEN[name](fs)
    server.arm(Fault("status", named("REMOVE"), code=PERMISSION_DENIED))
    assert refused(lambda: fs.unlink(FILES[ROW])) == errno.EACCES


class TestWaitedFor:
    """Where one answer says nothing of the next."""

    def slow(self, fs: Filesystem, clock: Clock) -> bytes:
        clock.s += ROW_S + 0.1
        return FILES[ROW]

    def elsewhere(self, fs: Filesystem, clock: Clock) -> bytes:
        fs.readdir(b"/e")
        return b"/e/f"

    def sticky(self, fs: Filesystem, clock: Clock) -> bytes:
        fs.chmod(b"/d", 0o1755)
        return FILES[ROW]

    def opened(self, fs: Filesystem, clock: Clock) -> bytes:
        fs.open(FILES[ROW], os.O_RDONLY)
        return FILES[ROW]

    def of_two_names(self, fs: Filesystem, clock: Clock) -> bytes:
        fs.link(FILES[ROW], b"/e/link")
        return FILES[ROW]

    def owed(self, fs: Filesystem, clock: Clock) -> bytes:
        fs.release(fs.create(b"/d/ours", os.O_WRONLY | os.O_EXCL, 0o600))
        settled(fs)
        owe(fs, b"/d/ours")
        assert fs._owed.paths()
        return b"/d/ours"

    def not_listed(self, fs: Filesystem, clock: Clock) -> bytes:
        fs._ns.distrust_path(FILES[ROW])
        return FILES[ROW]

    @pytest.mark.parametrize(
        "case", ["slow", "elsewhere", "sticky", "opened", "of_two_names", "owed", "not_listed"]
    )
    def test_alone(self, server: FakeServer, fs: Filesystem, clock: Clock, case: str) -> None:
        begin(fs)
        path = getattr(self, case)(fs, clock)
        server.arm(Fault("status", named("REMOVE"), code=PERMISSION_DENIED))
        assert refused(lambda: fs.unlink(path)) == errno.EACCES

    def test_without_a_cache_of_names(self, server: FakeServer, mount: Mount) -> None:
        fs = mount(server, dir_cache_timeout_s=0.0)
        fs.readdir(b"/d")
        begin(fs)
        server.arm(Fault("status", named("REMOVE"), code=PERMISSION_DENIED))
        assert refused(lambda: fs.unlink(FILES[ROW])) == errno.EACCES


THEN: Dict[str, Callable[[Filesystem], object]] = {
    "create": lambda fs: fs.release(fs.create(FILES[ROW], os.O_WRONLY | os.O_EXCL, 0o644)),
    "mkdir": lambda fs: fs.mkdir(FILES[ROW], 0o755),
    "symlink": lambda fs: fs.symlink(b"x", FILES[ROW]),
    "rename to it": lambda fs: fs.rename(b"/e/f", FILES[ROW]),
    "rename beside it": lambda fs: fs.rename(FILES[-1], b"/e/g"),
    "rename the directory": lambda fs: fs.rename(b"/d", b"/e/d"),
    "link": lambda fs: fs.link(b"/e/f", FILES[ROW]),
    "list": lambda fs: fs.readdir(b"/d"),
    "open beside it": lambda fs: fs.release(fs.open(FILES[-1], os.O_RDONLY)),
    "chmod beside it": lambda fs: fs.chmod(FILES[-1], 0o600),
    "look for a name that was not listed": lambda fs: (
        fs._ns.distrust_path(b"/d/new"),
        refused(lambda: fs.getattr(b"/d/new")),
    ),
    "ask for the space": lambda fs: fs.statfs(),
    "fsync of the directory": lambda fs: fs.fsyncdir(b"/d"),
    "drain": lambda fs: fs.drain(),
}


class TestBehind:
    def test_not_behind_those_that_come_later(self, server: FakeServer, fs: Filesystem, later: Later) -> None:
        """rm -r of a large tree has no end for a long time."""
        begin(fs)
        first, second = (held(server) for _ in range(2))
        fs.unlink(FILES[ROW])
        assert first.fired.wait(WAIT_S)
        draining = later(fs.drain)
        waits(fs)
        fs.unlink(FILES[ROW + 1])
        first.release()
        assert draining.result(WAIT_S) == []
        assert fs._removals.paths() == [FILES[ROW + 1]]
        second.release()

    @pytest.mark.parametrize("name", THEN)
    def test_it_is_asked_for_when_the_file_is_gone(
        self, server: FakeServer, fs: Filesystem, later: Later, name: str
    ) -> None:
        """Servers may serve several requests at once: only what is answered is over."""
        begin(fs)
        fault = held(server, "hold before")
        fs.unlink(FILES[ROW])
        assert fault.fired.wait(WAIT_S)
        before = len(server.log)
        then = later(lambda: THEN[name](fs))
        waits(fs)
        session = fs._remote.session()
        assert len(server.log) == before and session.meta.in_flight == 1
        fault.release()
        then.result(WAIT_S)

    def test_others_go_on(self, server: FakeServer, fs: Filesystem) -> None:
        """The server's one process for metadata is held: what is known, and files, are not."""
        fs.readdir(b"/e")
        begin(fs)
        fault = held(server, "hold before")
        fs.unlink(FILES[ROW])
        assert fault.fired.wait(WAIT_S)
        assert fs.getattr(b"/e/f").size == 0 and get(fs, b"/e/f") == b""
        assert fs.getattr(FILES[-1]).size == len(FILES[-1])
        fault.release()

    def test_a_program_that_is_ended_does_not_wait(self, server: FakeServer, fs: Filesystem) -> None:
        begin(fs)
        fault = held(server)
        fs.unlink(FILES[ROW])
        program = Program(lambda: fs.readdir(b"/d"))
        waits(fs)
        assert program.end() == errno.EINTR
        fault.release()
        settled(fs)
        assert FILES[ROW] not in left(server)


@pytest.fixture
def one_refused(server: FakeServer, fs: Filesystem) -> None:
    """The removal of ``FILES[ROW]`` was answered, and is refused for good."""
    begin(fs)
    server.arm(Fault("status", named("REMOVE"), times=2, code=PERMISSION_DENIED))
    fs.unlink(FILES[ROW])
    settled(fs)


class TestRefused:
    def test_it_is_there_again(self, one_refused: None, fs: Filesystem) -> None:
        assert stat.S_ISREG(fs.getattr(FILES[ROW]).mode)
        assert FILES[ROW][3:] in names(fs, b"/d")

    def test_the_next_removal_tells_and_leaves_its_file(
        self, one_refused: None, server: FakeServer, fs: Filesystem
    ) -> None:
        assert refused(lambda: fs.unlink(FILES[-1])) == errno.EACCES
        assert left(server) == FILES[ROW:]
        remove(fs, FILES[ROW:])
        assert left(server) == [] and fs.drain() == []

    @pytest.mark.parametrize("act", ["rmdir", "fsyncdir"])
    def test_the_directory_tells(self, one_refused: None, fs: Filesystem, act: str) -> None:
        assert refused(lambda: getattr(fs, act)(b"/d")) == errno.EACCES
        assert fs.drain() == []

    def test_if_nobody_asks_the_log_status_and_unmount_tell(
        self, one_refused: None, fs: Filesystem, caplog: pytest.LogCaptureFixture
    ) -> None:
        said = [record for record in caplog.get_records("setup") if record.levelno == logging.WARNING]
        assert any(FILES[ROW].decode() in record.getMessage() for record in said)
        told = [FILES[ROW].decode() + ": not removed: Permission denied"]
        assert fs.state()["lost"] == told and fs.sync() == told and fs.drain() == told

    def test_one_try_is_not_for_good(self, server: FakeServer, fs: Filesystem) -> None:
        begin(fs)
        server.arm(Fault("status", named("REMOVE")))
        remove(fs, FILES[ROW:])
        assert left(server) == [] and fs.drain() == []

    def test_while_the_file_is_held_by_who_waits(
        self, server: FakeServer, fs: Filesystem, later: Later
    ) -> None:
        """An operation that came to the file before it was removed."""
        begin(fs)
        node = fs._ns.get(FILES[ROW])
        assert node is not None
        refusal = refused_later(server)
        fs.unlink(FILES[ROW])

        def hold() -> None:
            with node.operation:
                fs._far_path(FILES[ROW])

        holding = later(hold)
        waits(fs)
        refusal.release()
        holding.result(WAIT_S)
        assert refused(lambda: fs.fsyncdir(b"/d")) == errno.EACCES

    def test_it_could_not_be_sent(
        self, server: FakeServer, fs: Filesystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begin(fs)

        def interrupted(*_: object) -> None:
            raise FsError(errno.EINTR)

        with monkeypatch.context() as patch:
            patch.setattr(fs._remote, "unlink_soon", interrupted)
            assert refused(lambda: fs.unlink(FILES[ROW])) == errno.EINTR
        assert stat.S_ISREG(fs.getattr(FILES[ROW]).mode) and fs.drain() == []

    def test_while_its_sender_is_late(
        self, server: FakeServer, fs: Filesystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begin(fs)
        server.arm(Fault("status", named("REMOVE"), times=2, code=PERMISSION_DENIED))
        send = fs._removals.send

        def late(*arguments: Any) -> bool:
            is_sent = send(*arguments)
            settled(fs)
            return is_sent

        monkeypatch.setattr(fs._removals, "send", late)
        fs.unlink(FILES[ROW])
        assert stat.S_ISREG(fs.getattr(FILES[ROW]).mode)

    def test_libfuse_is_not_told(self, server: FakeServer, fs: Filesystem) -> None:
        """It removes what it has hidden, and nobody hears how that ends."""
        handle = fs.open(FILES[-1], os.O_RDONLY)
        fs.rename(FILES[-1], b"/d/.fuse_hidden0001")
        fs.readdir(b"/d")
        begin(fs)
        server.arm(Fault("status", of(FILES[ROW]), times=2, code=PERMISSION_DENIED))
        fs.unlink(FILES[ROW])
        settled(fs)
        fs.release(handle)
        with contextlib.suppress(FsError):
            fs.unlink(b"/d/.fuse_hidden0001")
        assert refused(lambda: fs.rmdir(b"/d")) == errno.EACCES


ELSEWHERE: Dict[str, Callable[[Filesystem], object]] = {
    "unlink": lambda fs: fs.unlink(b"/e/f"),
    "rmdir": lambda fs: fs.rmdir(b"/empty"),
    "rename": lambda fs: fs.rename(b"/e/f", b"/g"),
}


@pytest.mark.parametrize("name", ELSEWHERE)
class TestElsewhere:
    """Programs take away what refers to a thing, and then the thing."""

    @pytest.fixture(autouse=True)
    def empty(self, fs: Filesystem) -> None:
        fs.mkdir(b"/empty", 0o755)
        begin(fs)

    def test_it_comes_behind(self, server: FakeServer, fs: Filesystem, later: Later, name: str) -> None:
        fault = held(server, "hold before")
        fs.unlink(FILES[ROW])
        assert fault.fired.wait(WAIT_S)
        before = len(server.log)
        then = later(lambda: ELSEWHERE[name](fs))
        waits(fs)
        assert len(server.log) == before
        fault.release()
        then.result(WAIT_S)

    def test_it_is_not_done_where_that_failed(
        self, server: FakeServer, fs: Filesystem, later: Later, name: str
    ) -> None:
        refusal = refused_later(server)
        fs.unlink(FILES[ROW])
        then = later(lambda: refused(lambda: ELSEWHERE[name](fs)))
        waits(fs)
        refusal.release()
        assert then.result(WAIT_S) == errno.EACCES
        assert server.has(b"/home/e/f") and server.has(b"/home/empty")
        assert refused(lambda: fs.rmdir(b"/d")) == errno.EACCES, "there it is told, too"
        ELSEWHERE[name](fs)


class TestGone:
    def test_another_client_was_first(self, server: FakeServer, fs: Filesystem) -> None:
        """rm -f takes ENOENT for done: said of the next file, it would stay."""
        begin(fs)
        server.arm(Fault("status", named("REMOVE"), times=2, code=NO_SUCH_FILE))
        fs.unlink(FILES[ROW])
        settled(fs)
        remove(fs, FILES[ROW + 1 :])
        assert left(server) == FILES[ROW : ROW + 1] and fs.drain() == []

    def test_and_the_row_ends(self, server: FakeServer, fs: Filesystem) -> None:
        begin(fs)
        server.arm(Fault("status", named("REMOVE"), times=3, code=NO_SUCH_FILE))
        fs.unlink(FILES[ROW])
        settled(fs)
        assert refused(lambda: fs.unlink(FILES[ROW + 1])) == errno.ENOENT


class TestConnectionLost:
    @pytest.mark.parametrize("act", ["cut before", "cut after"])
    @pytest.mark.parametrize("first", range(1, COUNT + 1))
    def test_all_are_removed(self, server: FakeServer, fs: Filesystem, act: str, first: int) -> None:
        server.arm(Fault(act, named("REMOVE"), first=first))
        remove(fs)
        fs.rmdir(b"/d")
        assert not server.has(b"/home/d") and fs._remote.reconnects == 1 and fs.drain() == []

    def test_for_good(self, server: FakeServer, mount: Mount) -> None:
        fs = mount(server, retry_timeout_s=0.3)
        fs.readdir(b"/d")
        begin(fs)
        fault = held(server, "hold before")
        fs.unlink(FILES[ROW])
        assert fault.fired.wait(WAIT_S)
        server.down = True
        server.cut()
        fault.release()
        settled(fs)
        assert fs.drain() == [FILES[ROW].decode() + ": not removed: the server cannot be reached"]
        assert refused(lambda: fs.unlink(FILES[ROW + 1])) == errno.ETIMEDOUT
        assert fs.drain() == []

    def test_the_outage_is_waited_for_once(
        self, server: FakeServer, mount: Mount, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fs = mount(server, retry_timeout_s=0.3)
        fs.readdir(b"/d")
        begin(fs)
        fault = held(server, "hold before")
        remove(fs, FILES[ROW:-1])
        assert fault.fired.wait(WAIT_S)
        tried: List[bytes] = []
        unlink = fs._remote.unlink
        monkeypatch.setattr(fs._remote, "unlink", lambda path: (tried.append(path), unlink(path)))
        server.down = True
        server.cut()
        fault.release()
        settled(fs)
        assert tried == [b"/home" + FILES[ROW]]
        assert len(fs.drain()) == COUNT - ROW - 1
        server.down = False

    def test_they_are_sent_again_in_their_order(self, server: FakeServer, fs: Filesystem) -> None:
        begin(fs)
        fault = held(server, "hold before")
        remove(fs, FILES[ROW:-1])
        assert fault.fired.wait(WAIT_S)
        before = len(server.log)
        server.cut()
        fault.release()
        settled(fs)
        again = [request.path for request in server.log[before:] if request.name == "REMOVE"]
        assert again == sorted(again) and len(again) >= COUNT - ROW - 2

    def test_between(self, server: FakeServer, fs: Filesystem) -> None:
        begin(fs)
        server.cut()
        remove(fs, FILES[ROW:])
        fs.rmdir(b"/d")
        assert not server.has(b"/home/d")
