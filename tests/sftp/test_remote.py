"""``Remote`` through every loss: each operation is cut at its k-th request, for k = 1, 2, ... until it passes uncut."""

from __future__ import annotations

import errno
import functools
import gc
import itertools
import logging
import stat
import threading
import time
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import pytest

from mount.helpers import refused
from sftp.fake_server import FakeServer, Fault, named
from sftpmount import waiting
from sftpmount.errors import ConnectionLost, FsError, Unreachable
from sftpmount.sftp import reconnect, wire
from sftpmount.sftp.lane import Pending
from sftpmount.sftp.remote import FSYNC, POSIX_RENAME, Remote
from sftpmount.sftp.remote_file import RemoteFile
from sftpmount.sftp.session import Session
from sftpmount.sftp.wire import Attrs
from support.process import wait_until

WAIT_S = 20.0
CUTS = ["cut before", "cut after"]
R, W, CREAT, TRUNC, EXCL = wire.FXF_READ, wire.FXF_WRITE, wire.FXF_CREAT, wire.FXF_TRUNC, wire.FXF_EXCL
Tree = Dict[bytes, Any]


def create(remote: Remote, path: bytes) -> None:
    file, _ = remote.open(path, W | CREAT | EXCL, Attrs(mode=0o600))
    remote.close_file(file)


def put(remote: Remote, path: bytes, data: bytes, flags: int = W | CREAT | TRUNC) -> None:
    file, _ = remote.open(path, flags)
    write(remote, file, 0, data)
    remote.close_file(file)


def write(remote: Remote, file: RemoteFile, offset: int, data: bytes) -> None:
    """One WRITE, again after a loss, as write-back does it."""

    def attempt(session: Session) -> None:
        answered: List[Pending] = []
        event = threading.Event()
        remote.write_soon(
            file, session, offset, [memoryview(data)], lambda p: (answered.append(p), event.set())
        )  # type: ignore[func-returns-value]
        assert event.wait(WAIT_S)
        answered[0].expect_ok()

    remote.run(attempt)


def on_link(remote: Remote) -> None:
    remote.setstat(b"/home/link", Attrs(atime=7, mtime=7), is_symlink=True)


class Scenario(NamedTuple):
    """``act`` turns the tree of ``prepared`` into ``after``; ``may`` are errnos that may tell of an unknown outcome."""

    act: Callable[[Remote], Any]
    after: Optional[Tree]  # None: as before
    may: Tuple[int, ...] = ()
    check: Callable[[FakeServer, Any], None] = lambda server, result: None


BEFORE: Tree = {b"f": b"content", b"g": b"other", b"full": {b"x": b""}, b"empty": {}, b"link": "f"}


def prepare(server: FakeServer) -> None:
    server.make(b"/home/f", b"content")
    server.make(b"/home/g", b"other")
    server.make_dir(b"/home/full")
    server.make(b"/home/full/x")
    server.make_dir(b"/home/empty")
    link = server.make(b"/home/link")
    link.mode, link.target = stat.S_IFLNK | 0o777, b"f"
    server.make_dir(b"/crowd")
    for i in range(40):
        server.make(b"/crowd/%d" % i)
    assert server.tree() == BEFORE


def changed(*gone: bytes, **new: Any) -> Tree:
    tree = {**BEFORE, **{name.encode(): value for name, value in new.items()}}
    return {name: value for name, value in tree.items() if name not in gone}


def mode_is(path: bytes, mode: int) -> Callable[[FakeServer, Any], None]:
    def check(server: FakeServer, result: Any) -> None:
        assert stat.S_IMODE(server.at(path).mode) == mode

    return check


def result_is(value: Any) -> Callable[[FakeServer, Any], None]:
    def check(server: FakeServer, result: Any) -> None:
        assert result == value

    return check


SCENARIOS: Dict[str, Scenario] = {
    "mkdir": Scenario(
        lambda r: r.mkdir(b"/home/d", 0o700), changed(d={}), (errno.EEXIST,), mode_is(b"/home/empty", 0o755)
    ),
    "create exclusively": Scenario(lambda r: create(r, b"/home/n"), changed(n=b""), (errno.EEXIST,)),
    "write a new file": Scenario(lambda r: put(r, b"/home/n", b"123"), changed(n=b"123")),
    "write over a file": Scenario(lambda r: put(r, b"/home/f", b"123"), changed(f=b"123")),
    "write into a file": Scenario(lambda r: put(r, b"/home/f", b"123", R | W), changed(f=b"123tent")),
    "rename": Scenario(lambda r: r.rename(b"/home/f", b"/home/n"), changed(b"f", n=b"content")),
    "rename over a file": Scenario(lambda r: r.rename(b"/home/f", b"/home/g"), changed(b"f", g=b"content")),
    "rename over a directory": Scenario(
        lambda r: r.rename(b"/home/full", b"/home/empty"), changed(b"full", empty={b"x": b""})
    ),
    "link": Scenario(lambda r: r.link(b"/home/f", b"/home/n"), changed(n=b"content"), (errno.EEXIST,)),
    "symlink": Scenario(lambda r: r.symlink(b"to", b"/home/n"), changed(n="to")),
    "unlink": Scenario(lambda r: r.unlink(b"/home/f"), changed(b"f")),
    "unlink a link": Scenario(lambda r: r.unlink(b"/home/link"), changed(b"link")),
    "rmdir": Scenario(lambda r: r.rmdir(b"/home/empty"), changed(b"empty")),
    "chmod": Scenario(
        lambda r: r.setstat(b"/home/f", Attrs(mode=0o400)),
        None,
        (),
        lambda s, _: mode_is(b"/home/f", 0o400)(s, None),
    ),
    "chmod, times of a link": Scenario(on_link, None),
    "truncate": Scenario(lambda r: r.setstat(b"/home/f", Attrs(size=3)), changed(f=b"con")),
    "extend": Scenario(lambda r: r.setstat(b"/home/f", Attrs(size=9)), changed(f=b"content\0\0")),
    "truncate a handle": Scenario(
        lambda r: r.fsetstat(r.open(b"/home/f", R | W)[0], Attrs(size=3)), changed(f=b"con")
    ),
    "list": Scenario(
        lambda r: sorted(e.name for e in r.listdir(b"/home")), None, (), result_is(sorted(BEFORE))
    ),
    "list nothing": Scenario(lambda r: r.listdir(b"/home/empty"), None, (), result_is([])),
    "read": Scenario(lambda r: r.read(r.open(b"/home/f", R)[0], 0, 100), None, (), result_is(b"content")),
    "look": Scenario(lambda r: r.lstat(b"/home/f").size, None, (), result_is(7)),
    "follow": Scenario(lambda r: r.stat(b"/home/link").size, None, (), result_is(7)),
    "readlink": Scenario(lambda r: r.readlink(b"/home/link"), None, (), result_is(b"f")),
    "realpath": Scenario(lambda r: r.realpath(b"."), None, (), result_is(b"/home")),
    "statvfs": Scenario(lambda r: r.statvfs(b"/home").namemax, None, (), result_is(255)),
}


def uncut_at_last(
    make_server: Callable[..., FakeServer],
    make_remote: Callable[..., Remote],
    cut: str,
    act: Callable[[Remote], Any],
    **settings: Any,
) -> Iterator[Tuple[FakeServer, Fault, Any, Optional[FsError]]]:
    """(server, fault, result, error) of ``act`` cut at its first, second, ... request; the last time it is not cut."""
    for k in range(1, 60):
        server = make_server(**settings)
        prepare(server)
        remote = make_remote(server)
        fault = server.arm(Fault(cut, first=k))
        result: Any = None
        error: Optional[FsError] = None
        try:
            result = act(remote)
        except FsError as refused:
            error = refused
        yield server, fault, result, error
        if not fault.fired.is_set():
            assert k > 1
            return
    raise AssertionError("the scenario never passes uncut")


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_cut_at_every_request(
    make_server: Callable[..., FakeServer], make_remote: Callable[..., Remote], name: str, cut: str
) -> None:
    scenario = SCENARIOS[name]
    after = BEFORE if scenario.after is None else scenario.after
    for server, fault, result, error in uncut_at_last(make_server, make_remote, cut, scenario.act):
        if error is None:
            assert server.tree() == after
            scenario.check(server, result)
        else:
            assert fault.fired.is_set()
            assert error.errno in scenario.may, f"cut at request {fault.first}: {error}"
            assert server.tree() in (BEFORE, after)


@pytest.mark.long
@pytest.mark.parametrize("second", CUTS)
@pytest.mark.parametrize("first", CUTS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_cut_at_every_pair_of_requests(
    make_server: Callable[..., FakeServer],
    make_remote: Callable[..., Remote],
    name: str,
    first: str,
    second: str,
) -> None:
    scenario = SCENARIOS[name]
    after = BEFORE if scenario.after is None else scenario.after
    for gap in range(1, 7):
        for server, _, result, error in uncut_at_last(
            make_server,
            make_remote,
            first,
            lambda remote, gap=gap: _cut_again(remote, second, gap, scenario.act),
        ):
            if error is None:
                assert server.tree() == after
                scenario.check(server, result)
            else:
                assert error.errno in scenario.may
                assert server.tree() in (BEFORE, after)


def _cut_again(remote: Remote, cut: str, gap: int, act: Callable[[Remote], Any]) -> Any:
    server: FakeServer = remote.session().connection.server  # type: ignore[attr-defined]
    first = server.faults[0]
    server.arm(Fault(cut, lambda request: first.fired.is_set(), first=gap))
    return act(remote)


RENAMES = [name for name in SCENARIOS if name.startswith("rename")]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", RENAMES)
def test_cut_at_every_request_of_a_rename_without_posix_rename(
    make_server: Callable[..., FakeServer], make_remote: Callable[..., Remote], name: str, cut: str
) -> None:
    scenario = SCENARIOS[name]
    for server, _, _, error in uncut_at_last(
        make_server, make_remote, cut, scenario.act, without=(POSIX_RENAME,)
    ):
        assert error is None
        assert server.tree() == scenario.after


class Refusal(NamedTuple):
    """An operation that the server refuses, and must stay refused when its reply is lost."""

    act: Callable[[Remote], Any]
    codes: Tuple[int, ...]


REFUSALS: Dict[str, Refusal] = {
    "mkdir over an empty directory": Refusal(lambda r: r.mkdir(b"/home/empty", 0o755), (errno.EEXIST,)),
    "mkdir over a full directory": Refusal(lambda r: r.mkdir(b"/home/full", 0o755), (errno.EEXIST,)),
    "mkdir over a file": Refusal(lambda r: r.mkdir(b"/home/f", 0o755), (errno.EEXIST,)),
    "mkdir over a crowded directory": Refusal(lambda r: r.mkdir(b"/crowd", 0o755), (errno.EEXIST,)),
    "create over a file": Refusal(lambda r: create(r, b"/home/f"), (errno.EEXIST,)),
    "create over a directory": Refusal(lambda r: create(r, b"/home/empty"), (errno.EEXIST,)),
    "create over a link to a file": Refusal(lambda r: create(r, b"/home/link"), (errno.EEXIST,)),
    "rename of nothing": Refusal(lambda r: r.rename(b"/home/none", b"/home/n"), (errno.ENOENT,)),
    "rename of nothing onto a file": Refusal(lambda r: r.rename(b"/home/none", b"/home/f"), (errno.ENOENT,)),
    "rename onto a full directory": Refusal(
        lambda r: r.rename(b"/home/empty", b"/home/full"), (errno.ENOTEMPTY, errno.EEXIST)
    ),
    "rmdir of a full directory": Refusal(lambda r: r.rmdir(b"/home/full"), (errno.ENOTEMPTY,)),
    "unlink of a directory": Refusal(lambda r: r.unlink(b"/home/empty"), (errno.EISDIR,)),
    "link over a file": Refusal(lambda r: r.link(b"/home/f", b"/home/g"), (errno.EEXIST,)),
    "symlink over a file": Refusal(lambda r: r.symlink(b"to", b"/home/f"), (errno.EEXIST,)),
    "symlink over another": Refusal(lambda r: r.symlink(b"to", b"/home/link"), (errno.EEXIST,)),
    "look at nothing": Refusal(lambda r: r.lstat(b"/home/none"), (errno.ENOENT,)),
    "listing of nothing": Refusal(lambda r: r.listdir(b"/home/none"), (errno.ENOENT,)),
    "opening nothing": Refusal(lambda r: r.open(b"/home/none", R), (errno.ENOENT,)),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_whose_reply_was_lost_is_a_refusal(
    make_server: Callable[..., FakeServer], make_remote: Callable[..., Remote], name: str, cut: str
) -> None:
    refusal = REFUSALS[name]
    for server, fault, _, error in uncut_at_last(make_server, make_remote, cut, refusal.act):
        assert error is not None, f"claimed to be done when cut at request {fault.first}"
        assert error.errno in refusal.codes, error
        assert server.tree() == BEFORE


class TestAnothersIsNeverClaimed:
    """The connection ends with our request, and another client takes the name before we are back."""

    @pytest.mark.parametrize("cut", CUTS)
    def test_exclusive_create(self, server: FakeServer, make_remote: Callable[..., Remote], cut: str) -> None:
        remote = make_remote(server)
        server.arm(Fault(cut, named("OPEN"), then=lambda: server.make(b"/home/lock") and None))
        with pytest.raises(FsError) as caught:
            create(remote, b"/home/lock")
        assert caught.value.errno == errno.EEXIST

    @pytest.mark.parametrize("cut", CUTS)
    def test_our_own_exclusive_create_is_not_claimed_either(
        self, server: FakeServer, make_remote: Callable[..., Remote], cut: str
    ) -> None:
        remote = make_remote(server)
        server.arm(Fault(cut, named("OPEN")))
        try:
            create(remote, b"/home/lock")
        except FsError as error:
            assert error.errno == errno.EEXIST
            assert cut == "cut after"
        else:
            assert cut == "cut before", "it cannot be told from another's"
        assert server.has(b"/home/lock")

    def test_a_lock_directory(self, server: FakeServer, make_remote: Callable[..., Remote]) -> None:
        remote = make_remote(server)
        server.arm(Fault("cut before", named("MKDIR"), then=lambda: server.make_dir(b"/home/lock") and None))
        with pytest.raises(FsError) as caught:
            remote.mkdir(b"/home/lock", 0o755)
        assert caught.value.errno == errno.EEXIST

    @pytest.mark.parametrize("entries", [1, 16, 17, 40])
    def test_a_directory_with_something_in_it(
        self, server: FakeServer, make_remote: Callable[..., Remote], entries: int
    ) -> None:
        remote = make_remote(server)

        def anothers() -> None:
            server.make_dir(b"/home/d")
            for i in range(entries):
                server.make(b"/home/d/%d" % i)

        server.arm(Fault("cut before", named("MKDIR"), then=anothers))
        with pytest.raises(FsError) as caught:
            remote.mkdir(b"/home/d", 0o755)
        assert caught.value.errno == errno.EEXIST

    def test_a_directory_that_we_may_not_list(
        self, server: FakeServer, make_remote: Callable[..., Remote]
    ) -> None:
        remote = make_remote(server)
        server.arm(Fault("cut before", named("MKDIR"), then=lambda: server.make_dir(b"/home/d") and None))
        server.arm(Fault("status", named("OPENDIR"), code=3, message="Permission denied"))
        with pytest.raises(FsError) as caught:
            remote.mkdir(b"/home/d", 0o755)
        assert caught.value.errno == errno.EEXIST

    def test_a_lock_made_by_link(self, server: FakeServer, make_remote: Callable[..., Remote]) -> None:
        """link(2) onto a name is the lock that works on NFS; lock files of two clients look alike."""
        remote = make_remote(server)
        server.make(b"/home/ours", b"1234", mtime=1000)
        server.arm(
            Fault(
                "cut before",
                named("hardlink"),
                then=lambda: server.make(b"/home/lock", b"5678", mtime=1000) and None,
            )
        )
        with pytest.raises(FsError) as caught:
            remote.link(b"/home/ours", b"/home/lock")
        assert caught.value.errno == errno.EEXIST

    def test_a_symlink(self, server: FakeServer, make_remote: Callable[..., Remote]) -> None:
        remote = make_remote(server)

        def anothers() -> None:
            inode = server.make(b"/home/l")
            inode.mode, inode.target = stat.S_IFLNK | 0o777, b"theirs"

        server.arm(Fault("cut before", named("SYMLINK"), then=anothers))
        with pytest.raises(FsError) as caught:
            remote.symlink(b"ours", b"/home/l")
        assert caught.value.errno == errno.EEXIST

    def test_a_file_that_took_the_place_of_our_directory(
        self, server: FakeServer, make_remote: Callable[..., Remote]
    ) -> None:
        remote = make_remote(server)
        server.arm(Fault("cut before", named("MKDIR"), then=lambda: server.make(b"/home/d") and None))
        with pytest.raises(FsError) as caught:
            remote.mkdir(b"/home/d", 0o755)
        assert caught.value.errno == errno.EEXIST


class TestReopenedHandles:
    def test_reads_go_on(self, server: FakeServer, make_remote: Callable[..., Remote]) -> None:
        server.make(b"/home/f", b"0123456789")
        remote = make_remote(server)
        file, _ = remote.open(b"/home/f", R)
        server.cut()
        assert remote.read(file, 5, 100) == b"56789"
        assert remote.reconnects == 1

    def test_a_reopen_neither_creates_nor_truncates_nor_excludes(
        self, server: FakeServer, make_remote: Callable[..., Remote]
    ) -> None:
        remote = make_remote(server)
        file, _ = remote.open(b"/home/f", R | W | CREAT | EXCL | TRUNC)
        write(remote, file, 0, b"abc")
        server.cut()
        write(remote, file, 3, b"def")
        assert server.content(b"/home/f") == b"abcdef"

    def test_a_file_that_is_gone_is_stale_and_not_made_anew(
        self, server: FakeServer, make_remote: Callable[..., Remote]
    ) -> None:
        remote = make_remote(server)
        file, _ = remote.open(b"/home/f", R | W | CREAT)
        server.cut()
        del server.at(b"/home").children[b"f"]
        with pytest.raises(FsError) as caught:
            remote.read(file, 0, 1)
        assert caught.value.errno == errno.ESTALE
        assert not server.has(b"/home/f")

    def test_an_exclusive_create_that_was_answered_is_ours(
        self, server: FakeServer, make_remote: Callable[..., Remote]
    ) -> None:
        """Only the answer to the question behind it is lost."""
        remote = make_remote(server)
        lost = server.arm(Fault("cut before", named("LSTAT")))
        file, attrs = remote.open(b"/home/f", W | CREAT | EXCL)
        assert lost.fired.is_set() and attrs.size == 0
        remote.close_file(file)

    def test_the_owner_verifies_what_was_reopened(
        self, server: FakeServer, make_remote: Callable[..., Remote]
    ) -> None:
        server.make(b"/home/f", b"abc")
        remote = make_remote(server)
        file, _ = remote.open(b"/home/f", R)
        seen: List[Optional[int]] = []

        def verify(ask: Callable[[], Attrs]) -> None:
            seen.append(ask().size)
            if seen[-1] != 3:
                raise FsError(errno.ESTALE)

        file.verify = verify
        server.cut()
        assert remote.read(file, 0, 3) == b"abc"
        server.make(b"/home/f", b"longer")
        server.cut()
        with pytest.raises(FsError) as caught:
            remote.read(file, 0, 3)
        assert caught.value.errno == errno.ESTALE
        assert seen == [3, 6]
        wait_until(
            lambda: not server.connections[-1].channels[0].handles, WAIT_S, "the refused handle's CLOSE"
        )

    def test_it_is_reopened_under_its_new_name(
        self, server: FakeServer, make_remote: Callable[..., Remote]
    ) -> None:
        server.make(b"/home/f", b"abc")
        remote = make_remote(server)
        file, _ = remote.open(b"/home/f", R)
        remote.rename(b"/home/f", b"/home/g")
        file.path = b"/home/g"
        server.cut()
        assert remote.read(file, 0, 3) == b"abc"

    def test_many_readers_reopen_once(self, server: FakeServer, make_remote: Callable[..., Remote]) -> None:
        server.make(b"/home/f", b"abc")
        remote = make_remote(server)
        file, _ = remote.open(b"/home/f", R)
        server.cut()
        got: List[bytes] = []
        threads = [threading.Thread(target=lambda: got.append(remote.read(file, 0, 3))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert got == [b"abc"] * 8
        assert server.count("OPEN") == 2

    def test_handles_are_given_back(self, server: FakeServer, make_remote: Callable[..., Remote]) -> None:
        prepare(server)
        remote = make_remote(server)
        for scenario in SCENARIOS.values():
            try:
                scenario.act(remote)
            except FsError:
                pass
        leaked = {b"/home/f"}  # two scenarios leave it open
        channel = server.connections[0].channels[0]
        wait_until(
            lambda: {opened.path for opened in list(channel.handles.values())} <= leaked,
            WAIT_S,
            "the last CLOSE",
        )


class TestReading:
    @pytest.mark.parametrize("read_bytes_max", [1, 1000, 32768])
    def test_short_replies_are_asked_for_again(
        self, make_server: Callable[..., FakeServer], make_remote: Callable[..., Remote], read_bytes_max: int
    ) -> None:
        server = make_server(read_bytes_max=read_bytes_max)
        data = bytes(range(256)) * (2 if read_bytes_max == 1 else 500)
        server.make(b"/home/f", data)
        remote = make_remote(server)
        file, _ = remote.open(b"/home/f", R)
        assert remote.read(file, 0, len(data) + 5) == data

    @pytest.mark.parametrize("act", ["wrong id", "wrong type", "huge length", "truncated"])
    def test_one_lie_costs_one_connection(
        self, server: FakeServer, make_remote: Callable[..., Remote], act: str
    ) -> None:
        server.make(b"/home/f", b"abc")
        remote = make_remote(server)
        file, _ = remote.open(b"/home/f", R)
        server.arm(Fault(act, named("READ")))
        assert remote.read(file, 0, 10) == b"abc"
        assert remote.reconnects == 1

    def test_more_than_was_asked_for_is_not_taken(
        self, server: FakeServer, make_remote: Callable[..., Remote]
    ) -> None:
        server.make(b"/home/f", b"abc")
        remote = make_remote(server)
        file, _ = remote.open(b"/home/f", R)
        server.arm(Fault("replace", named("READ"), code=103, body=b"\0\0\0\x04abcd"))
        assert remote.read(file, 0, 3) == b"abc"

    @pytest.mark.parametrize("act", ["wrong id", "wrong type"])
    def test_a_server_that_always_lies_ends_in_an_error_and_not_in_a_storm(
        self, server: FakeServer, make_remote: Callable[..., Remote], act: str
    ) -> None:
        server.make(b"/home/f", b"abc")
        remote = make_remote(server, retry_timeout_s=1.0)
        server.arm(Fault(act, named("LSTAT"), times=1_000_000))
        with pytest.raises(FsError) as caught:
            remote.lstat(b"/home/f")
        assert caught.value.errno in (errno.ETIMEDOUT, errno.EIO)
        assert server.dials < 20, f"{server.dials} connections within a second"


class TestListing:
    def test_names_that_lead_out_of_the_directory_are_left_out(
        self, server: FakeServer, make_remote: Callable[..., Remote], caplog: pytest.LogCaptureFixture
    ) -> None:
        home = server.at(b"/home")
        for name in (b"../../etc/passwd", b"a/b", b"x\0y", b"", b"z" * 256, b"fine"):
            home.children[name] = server.make(b"/home/fine")
        assert [entry.name for entry in make_remote(server).listdir(b"/home")] == [b"fine"]
        assert "passwd" in caplog.text

    def test_a_listing_that_never_ends_is_an_error(
        self, server: FakeServer, make_remote: Callable[..., Remote]
    ) -> None:
        """New names, or the same again and again: either way it must end."""
        remote = make_remote(server)
        one = b"\0\0\0\1" + b"\0\0\0\1a" + b"\0\0\0\0" + b"\0\0\0\0"
        server.arm(Fault("replace", named("READDIR"), code=104, body=one, times=1 << 40))
        ended: List[object] = []

        def look() -> None:
            try:
                ended.append(remote.listdir(b"/home", entries_max=1000))
            except FsError as error:
                ended.append(error)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            wait_until(
                lambda: bool(ended) or server.count("READDIR") > 20_000, WAIT_S, "the end of the listing"
            )
        finally:
            server.disarm()
            thread.join(WAIT_S)
        assert isinstance(ended[0], FsError)

    def test_more_names_than_the_limit_are_an_error(
        self, server: FakeServer, make_remote: Callable[..., Remote]
    ) -> None:
        for i in range(300):
            server.make(b"/home/%d" % i)
        remote = make_remote(server)
        assert len(remote.listdir(b"/home", entries_max=310)) == 300
        with pytest.raises(FsError):
            remote.listdir(b"/home", entries_max=150)

    def test_a_large_listing_is_pipelined(
        self, server: FakeServer, make_remote: Callable[..., Remote]
    ) -> None:
        for i in range(5000):
            server.make(b"/home/%d" % i)
        assert len(make_remote(server).listdir(b"/home")) == 5000
        assert server.count("READDIR") <= 51 + 16

    def test_an_error_in_the_middle_is_no_short_listing(
        self, server: FakeServer, make_remote: Callable[..., Remote]
    ) -> None:
        for i in range(300):
            server.make(b"/home/%d" % i)
        remote = make_remote(server)
        server.arm(Fault("status", named("READDIR"), first=2, code=4, message="Failure"))
        with pytest.raises(FsError) as caught:
            remote.listdir(b"/home")
        assert caught.value.errno == errno.EIO


def begin_the_end(session: Session, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """It is lost; the event lets it end."""
    abort, may_end = session.connection.abort, threading.Event()

    def abort_later() -> None:
        assert may_end.wait(WAIT_S)
        abort()

    monkeypatch.setattr(session.connection, "abort", abort_later)
    threading.Thread(target=session.abort, args=(ConnectionLost("on purpose"),), daemon=True).start()
    wait_until(lambda: session.lost is not None, WAIT_S, "the loss")
    return may_end


class TestOutage:
    def test_operations_wait_for_the_server(
        self, server: FakeServer, make_remote: Callable[..., Remote]
    ) -> None:
        prepare(server)
        remote = make_remote(server)
        server.down = True
        server.cut()
        got: List[object] = []
        threads = [
            threading.Thread(target=lambda: got.append(remote.lstat(b"/home/f").size)),
            threading.Thread(
                target=lambda: got.append(stat.S_IFMT(remote.mkdir(b"/home/new", 0o755).mode or 0))
            ),
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.dials >= 2, WAIT_S, "an attempt to reconnect")
        assert not got
        server.down = False
        for thread in threads:
            thread.join(WAIT_S)
        assert sorted(got) == [7, stat.S_IFDIR]
        assert server.has(b"/home/new")

    @pytest.mark.parametrize("timeout_s", [0.0, 0.3])
    def test_and_fail_when_the_time_is_over(
        self, server: FakeServer, make_remote: Callable[..., Remote], timeout_s: float
    ) -> None:
        remote = make_remote(server, retry_timeout_s=timeout_s)
        server.down = True
        server.cut()
        for act in (
            lambda: remote.lstat(b"/home"),
            lambda: remote.listdir(b"/home"),
            lambda: remote.mkdir(b"/home/x", 0o755),
            lambda: remote.open(b"/home/x", W | CREAT | EXCL),
        ):
            started = time.monotonic()
            with pytest.raises(FsError) as caught:
                act()
            assert caught.value.errno in (errno.ETIMEDOUT, errno.EIO)
            assert timeout_s - 0.05 <= time.monotonic() - started < timeout_s + 5.0
        server.down = False
        wait_until(lambda: remote.connected, WAIT_S, "the reconnect")
        assert remote.lstat(b"/home").mode

    def test_hard_means_for_ever(self, server: FakeServer, make_remote: Callable[..., Remote]) -> None:
        clock = [0.0]
        remote = make_remote(server, retry_timeout_s=None, clock=lambda: clock[0])
        server.down = True
        server.cut()
        got: List[object] = []
        thread = threading.Thread(target=lambda: got.append(remote.lstat(b"/home").mode))
        thread.start()
        clock[0] = 1e9
        wait_until(lambda: server.dials >= 3, WAIT_S, "attempts to reconnect")
        assert not got
        server.down = False
        thread.join(WAIT_S)
        assert got

    def test_attempts_to_reconnect_space_out(
        self, server: FakeServer, make_remote: Callable[..., Remote]
    ) -> None:
        make_remote(server, retry_timeout_s=0)
        server.down = True
        server.cut()
        until_s = time.monotonic() + 1.5
        wait_until(lambda: server.dials >= 2, WAIT_S, "an attempt")
        time.sleep(max(0.0, until_s - time.monotonic()))  # what is tested is how little happens meanwhile
        assert server.dials <= 8

    @pytest.mark.parametrize("is_in_doubt", [True, False])
    def test_a_request_that_the_lost_session_left_behind_does_not_come_last(
        self, server: FakeServer, make_remote: Callable[..., Remote], is_in_doubt: bool
    ) -> None:
        """The server's process goes on with what it had received, while the next session is at work."""
        server.make(b"/home/f", b"....")
        remote = make_remote(server, settle_s=4.0)
        file, _ = remote.open(b"/home/f", R | W)
        late = server.arm(Fault("hold before", named("WRITE" if is_in_doubt else "READ")))
        session = remote.session()
        if is_in_doubt:
            remote.write_soon(file, session, 0, [memoryview(b"old!")], lambda pending: None)
        else:
            remote.read_soon(file, session, 0, 4, lambda pending: None)
        assert late.fired.wait(WAIT_S)
        started = time.monotonic()
        server.cut()
        timer = threading.Timer(0.5, late.release)
        timer.start()

        def again(session: Session) -> None:
            written: List[Pending] = []
            remote.write_soon(file, session, 0, [memoryview(b"new!")], written.append)
            remote.fstat_soon(file, session).wait()
            written[0].expect_ok()

        remote.lstat(b"/home/f")  # notices the loss
        remote.run(again)
        took_s = time.monotonic() - started
        timer.join()
        assert took_s > 4.0 if is_in_doubt else took_s < 4.0
        assert server.content(b"/home/f") == b"new!"

    @pytest.mark.parametrize("is_answered", [True, False])
    def test_a_second_outage_within_one_long_operation_is_another_one(
        self,
        server: FakeServer,
        make_remote: Callable[..., Remote],
        monkeypatch: pytest.MonkeyPatch,
        is_answered: bool,
    ) -> None:
        """To send a large file takes hours, and the line is lost now and then; to wait for hours is not to send."""

        class Hours:
            now_s = 0.0

            def __call__(self) -> float:
                return self.now_s

        clock = Hours()
        monkeypatch.setattr(reconnect, "Session", functools.partial(Session, clock=clock))
        remote = make_remote(server, retry_timeout_s=300.0, clock=clock)
        attempts = itertools.count(1)

        def ask(session: Session) -> None:
            session.meta.request(wire.STAT, wire.string(b"/home")).wait()

        def send(session: Session) -> int:
            attempt = next(attempts)
            if attempt < 4:
                ask(session)
                clock.now_s += 290.0
                if is_answered:
                    ask(session)
                server.cut()
                ask(session)
            return attempt

        if is_answered:
            assert remote.run(send) == 4
        else:
            with refused(errno.ETIMEDOUT):
                remote.run(send)
            assert next(attempts) == 4  # two of 290 s fit, and a third that began in time

    def test_a_request_that_is_left_out_while_others_are_answered_ends_too(
        self, server: FakeServer, make_remote: Callable[..., Remote]
    ) -> None:
        server.make(b"/home/lost")
        left_out = server.arm(Fault("no reply", lambda request: request.path == b"/home/lost", times=1000))
        remote = make_remote(server, request_deadline_s=1.5, retry_timeout_s=2.0)
        ended = threading.Event()

        def others() -> None:
            while not ended.wait(0.05):
                remote.lstat(b"/home")

        thread = threading.Thread(target=others)
        thread.start()
        started = time.monotonic()
        try:
            with refused(errno.ETIMEDOUT):
                remote.lstat(b"/home/lost")
        finally:
            ended.set()
            thread.join(WAIT_S)
        assert left_out.seen > 1
        assert time.monotonic() - started < WAIT_S

    @pytest.mark.parametrize("end_s", [0.0, 0.5])
    def test_once_a_program_has_waited_in_vain_the_next_call_fails_at_once(
        self,
        server: FakeServer,
        make_remote: Callable[..., Remote],
        monkeypatch: pytest.MonkeyPatch,
        end_s: float,
    ) -> None:
        """One call of a program is often several of ours: the kernel looks a name up again where a first look failed."""
        remote = make_remote(server, retry_timeout_s=2.0)
        server.down = True
        threading.Timer(end_s, begin_the_end(remote.session(), monkeypatch).set).start()
        waits: List[float] = []

        def program() -> None:
            waiting.serve(lambda: False)
            for _ in range(5):
                started = time.monotonic()
                with pytest.raises(FsError):
                    remote.lstat(b"/home")
                waits.append(time.monotonic() - started)

        thread = threading.Thread(target=program)
        thread.start()
        thread.join(WAIT_S)
        assert waits[0] > 1.9 and max(waits[1:]) < 1.0, waits
        started = time.monotonic()
        with pytest.raises(FsError):
            remote.lstat(b"/home")  # our own threads store what nobody can be told about: they always wait
        assert time.monotonic() - started > 1.9
        server.down = False
        wait_until(lambda: remote.connected, WAIT_S, "the reconnect")
        assert remote.lstat(b"/home").mode

    def test_sessions_that_die_young_space_out_too(
        self, server: FakeServer, make_remote: Callable[..., Remote]
    ) -> None:
        remote = make_remote(server, retry_timeout_s=1.0)
        server.arm(Fault("cut before", named("LSTAT"), times=1_000_000))
        with pytest.raises(FsError):
            remote.lstat(b"/home")
        assert server.dials < 20, f"{server.dials} connections within a second"

    def test_a_server_that_opens_no_channel_is_an_outage_too(
        self, server: FakeServer, make_remote: Callable[..., Remote], caplog: pytest.LogCaptureFixture
    ) -> None:
        """sshd is there, but its sftp-server does not start, or its MaxSessions are used up: that may be for hours."""
        remote = make_remote(server)
        server.channels_max = 0
        server.cut()
        wait_until(lambda: server.dials >= 4, WAIT_S, "attempts to reconnect")
        assert remote.state()["why"] == "the fake server opens no more channels"
        server.channels_max = 10
        assert remote.lstat(b"/home").mode
        attempts = [record for record in caplog.records if "connection yet" in record.message]
        assert len(attempts) == 1 and not any(record.exc_info for record in caplog.records)

    def test_a_loss_is_told_once_and_before_the_next_session(
        self, server: FakeServer, make_remote: Callable[..., Remote]
    ) -> None:
        remote = make_remote(server)
        events: List[str] = []
        remote.on_lost = lambda: events.append("lost")
        remote.on_connected = lambda session: events.append("connected")
        for _ in range(3):
            server.cut()
            remote.lstat(b"/home")
        wait_until(lambda: len(events) >= 6, WAIT_S, "three reconnects")
        assert events == ["lost", "connected"] * 3

    def test_lost_sessions_are_not_kept(self, server: FakeServer, make_remote: Callable[..., Remote]) -> None:
        """Each is a ring of objects with megabytes of buffers, which the collector may come for in hours."""
        remote = make_remote(server)
        logging.disable()  # pytest keeps what is logged, and with a loss its traceback
        gc.collect()
        before = sum(isinstance(each, Session) for each in gc.get_objects())
        gc.disable()
        try:
            for number in range(1, 6):
                server.cut()
                remote.lstat(b"/home")
                wait_until(lambda: remote.reconnects == number, WAIT_S, "the reconnect")  # noqa: B023
                for connection in server.connections[:-1]:  # the fake's own references
                    for channel in connection.channels:
                        channel.thread.join(WAIT_S)
                del connection, channel, server.connections[:-1]
            after = sum(isinstance(each, Session) for each in gc.get_objects())
        finally:
            gc.enable()
            logging.disable(logging.NOTSET)
        assert after - before <= 2, "those that were lost last may be there still"

    def test_the_first_connection_fails_at_once(self, make_server: Callable[..., FakeServer]) -> None:
        server = make_server()
        server.down = True
        with pytest.raises(Unreachable):
            Remote(server.dial).start()
        assert server.dials == 1

    @pytest.mark.parametrize("cut", CUTS)
    def test_the_first_connection_ends_as_it_begins(self, server: FakeServer, cut: str) -> None:
        server.arm(Fault(cut, named("limits")))
        remote = Remote(server.dial)
        with pytest.raises(ConnectionLost):
            remote.start()
        remote.close()

    def test_the_first_session_is_lost_before_anyone_uses_it(self, server: FakeServer) -> None:
        """It ends between the end of its handshake and start()'s return: then it is replaced like any other."""
        remote = Remote(server.dial, retry_timeout_s=5.0, lanes=1, alive_interval_s=0.0)
        make_session = remote._new_session

        def and_lose_it() -> Session:
            session = make_session()
            if server.dials == 1:
                session.abort(ConnectionLost("on purpose"))
            return session

        remote._new_session = and_lose_it  # type: ignore[method-assign]
        got: List[object] = []

        def use() -> None:
            try:
                remote.start()
                got.append(remote.lstat(b"/home").mode)
            except (ConnectionLost, FsError) as error:
                got.append(error)

        thread = threading.Thread(target=use, daemon=True)
        thread.start()
        thread.join(WAIT_S)
        alive = thread.is_alive()
        remote._session = None  # lets a spinning thread end
        remote.close()
        assert not alive, "an operation spins on a dead session"
        assert got

    def test_nobody_asks_a_session_that_is_ending(
        self, server: FakeServer, make_remote: Callable[..., Remote], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its end can take long, and every request on it fails at once meanwhile."""
        remote = make_remote(server)
        session = remote.session()
        attempts: List[Session] = []

        def attempt(on: Session) -> bytes:
            attempts.append(on)
            if on is session:
                raise ConnectionLost("as every request on it")
            return b"done"

        may_end = begin_the_end(session, monkeypatch)
        was_connected = remote.connected
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(remote.run, attempt)
            futures.wait([asked], 0.2)  # what is tested is how little happens meanwhile
            may_end.set()
            assert asked.result(WAIT_S) == b"done"
        assert not was_connected
        assert attempts == [remote.session()]

    def test_closing_frees_who_waits(self, server: FakeServer, make_remote: Callable[..., Remote]) -> None:
        remote = make_remote(server)
        server.down = True
        server.cut()
        errors: List[FsError] = []

        def look() -> None:
            try:
                remote.lstat(b"/home")
            except FsError as error:
                errors.append(error)

        thread = threading.Thread(target=look)
        thread.start()
        wait_until(lambda: server.dials >= 2, WAIT_S, "an attempt to reconnect")
        remote.close()
        thread.join(WAIT_S)
        assert [error.errno for error in errors] == [errno.EIO]

    def test_closing_while_a_connection_is_being_made_leaves_none_open(self, server: FakeServer) -> None:
        may_dial, dialling = threading.Event(), threading.Event()
        may_dial.set()

        def dial() -> Any:
            dialling.set()
            assert may_dial.wait(WAIT_S)
            return server.dial()

        remote = Remote(dial, lanes=1, alive_interval_s=0.0)
        remote.start()
        may_dial.clear()
        dialling.clear()
        server.cut()
        assert dialling.wait(WAIT_S)
        remote.close()
        may_dial.set()
        wait_until(lambda: len(server.connections) == 2, WAIT_S, "the late connection")
        wait_until(lambda: not server.connections[1].is_alive, 5.0, "the end of the late connection")


class TestErrnos:
    @pytest.mark.parametrize(
        ("code", "message", "expected"),
        [
            (4, "No space left on device", errno.ENOSPC),
            (4, "write: Disk quota exceeded", errno.EDQUOT),
            (4, "Failure", errno.EIO),
            (4, "", errno.EIO),
            (3, "Permission denied", errno.EACCES),
            (8, "not here", errno.ENOTSUP),
            (14, "", errno.ENOSPC),
            (12, "", errno.EROFS),
            (4711, "?", errno.EIO),
        ],
    )
    def test_of_a_status(
        self, server: FakeServer, make_remote: Callable[..., Remote], code: int, message: str, expected: int
    ) -> None:
        remote = make_remote(server)
        server.arm(Fault("status", named("READLINK"), code=code, message=message))
        with pytest.raises(FsError) as caught:
            remote.readlink(b"/home")
        assert caught.value.errno == expected

    def test_status_11_is_eexist(self, server: FakeServer, make_remote: Callable[..., Remote]) -> None:
        remote = make_remote(server)
        server.arm(Fault("status", named("MKDIR"), code=11, message="file already exists"))
        with pytest.raises(FsError) as caught:
            remote.mkdir(b"/home/d", 0o755)
        assert caught.value.errno == errno.EEXIST

    def test_a_bare_failure_on_a_full_disk(
        self, server: FakeServer, make_remote: Callable[..., Remote]
    ) -> None:
        remote = make_remote(server)
        server.free_bytes = 0
        server.arm(Fault("status", named("MKDIR")))
        with pytest.raises(FsError) as caught:
            remote.mkdir(b"/home/d", 0o755)
        assert caught.value.errno == errno.ENOSPC

    def test_a_bare_failure_on_a_read_only_one(
        self, server: FakeServer, make_remote: Callable[..., Remote]
    ) -> None:
        prepare(server)
        remote = make_remote(server)
        server.read_only = True
        for act in (
            lambda: remote.mkdir(b"/home/d", 0o755),
            lambda: remote.unlink(b"/home/f"),
            lambda: remote.rename(b"/home/f", b"/home/n"),
            lambda: remote.setstat(b"/home/f", Attrs(mode=0o600)),
            lambda: remote.open(b"/home/n", W | CREAT),
        ):
            with pytest.raises(FsError) as caught:
                act()
            assert caught.value.errno == errno.EROFS

    def test_a_failure_on_a_server_that_cannot_tell_more(
        self, make_server: Callable[..., FakeServer], make_remote: Callable[..., Remote]
    ) -> None:
        server = make_server(without=(b"statvfs@openssh.com",))
        remote = make_remote(server)
        server.arm(Fault("status", named("MKDIR")))
        with pytest.raises(FsError) as caught:
            remote.mkdir(b"/home/d", 0o755)
        assert caught.value.errno == errno.EIO

    @pytest.mark.parametrize("cut", CUTS)
    def test_looking_for_the_cause_survives_a_loss(
        self, server: FakeServer, make_remote: Callable[..., Remote], cut: str
    ) -> None:
        prepare(server)
        remote = make_remote(server)
        server.arm(Fault(cut, named("LSTAT")))
        with pytest.raises(FsError) as caught:
            remote.rmdir(b"/home/full")
        assert caught.value.errno == errno.ENOTEMPTY

    @pytest.mark.parametrize(
        ("lacks", "act", "expected"),
        [
            (b"hardlink@openssh.com", lambda r: r.link(b"/home/f", b"/home/n"), errno.EPERM),
            (b"statvfs@openssh.com", lambda r: r.statvfs(b"/home"), errno.ENOTSUP),
            (b"lsetstat@openssh.com", on_link, errno.ENOSYS),  # which rsync and cp pass over
        ],
    )
    def test_what_the_server_lacks(
        self,
        make_server: Callable[..., FakeServer],
        make_remote: Callable[..., Remote],
        lacks: bytes,
        act: Callable[[Remote], Any],
        expected: int,
    ) -> None:
        server = make_server(without=(lacks,))
        prepare(server)
        with pytest.raises(FsError) as caught:
            act(make_remote(server))
        assert caught.value.errno == expected
        assert server.tree() == BEFORE


class TestCommitByClose:
    def test_the_verdict_of_close_is_heard(
        self, make_server: Callable[..., FakeServer], make_remote: Callable[..., Remote]
    ) -> None:
        server = make_server(without=(FSYNC,))
        remote = make_remote(server)
        file, _ = remote.open(b"/home/f", W | CREAT)
        write(remote, file, 0, b"abc")
        server.arm(Fault("status", named("CLOSE"), message="No space left on device"))
        with pytest.raises(FsError) as caught:
            remote.commit_by_close(file)
        assert caught.value.errno == errno.ENOSPC

    @pytest.mark.parametrize("cut", CUTS)
    def test_a_verdict_that_never_came_is_an_error(
        self, make_server: Callable[..., FakeServer], make_remote: Callable[..., Remote], cut: str
    ) -> None:
        server = make_server(without=(FSYNC,))
        remote = make_remote(server)
        file, _ = remote.open(b"/home/f", W | CREAT)
        write(remote, file, 0, b"abc")
        server.arm(Fault(cut, named("CLOSE")))
        with pytest.raises(FsError):
            remote.commit_by_close(file)
        write(remote, file, 3, b"def")
        assert server.content(b"/home/f") == b"abcdef"


class TestDialects:
    """What servers read differently, and what some say they do and do not: see sftp/dialect.py."""

    @pytest.mark.parametrize("link_path_first", [False, True])
    def test_a_link_points_where_it_should_in_either_order(
        self,
        make_server: Callable[..., FakeServer],
        make_remote: Callable[..., Remote],
        link_path_first: bool,
    ) -> None:
        server = make_server(link_path_first=link_path_first)
        remote = make_remote(server)
        for name in (b"/home/one", b"/home/two"):
            remote.symlink(b"target", name)
            assert server.at(name).target == b"target"
        assert sorted(server.tree(b"/home")) == [b"one", b"two"]
        assert server.count("SYMLINK") == 4, "the order is asked for once"

    def test_the_order_is_asked_for_anew_after_a_reconnect(
        self, make_server: Callable[..., FakeServer], make_remote: Callable[..., Remote]
    ) -> None:
        server = make_server(link_path_first=True)
        remote = make_remote(server)
        remote.symlink(b"target", b"/home/one")
        server.link_path_first = False  # another program serves it now
        server.cut()
        remote.symlink(b"target", b"/home/two")
        assert server.at(b"/home/two").target == b"target"

    def test_a_link_is_shown_as_one_by_a_server_that_follows_it(
        self, make_server: Callable[..., FakeServer], make_remote: Callable[..., Remote]
    ) -> None:
        server = make_server(follows_links=True, without=(b"lsetstat@openssh.com",))
        remote = make_remote(server)
        server.make_dir(b"/home/precious")
        attrs = remote.symlink(b"precious", b"/home/link")
        for seen in (attrs, remote.lstat(b"/home/link")):
            assert stat.S_ISLNK(seen.mode or 0)
            assert seen.size == len(b"precious")
        assert stat.S_ISDIR(remote.lstat(b"/home/precious").mode or 0)

    @pytest.mark.parametrize("lacks", [(), (b"posix-rename@openssh.com",)], ids=["posix", "plain"])
    def test_links_are_renamed_and_not_what_they_lead_to(
        self,
        make_server: Callable[..., FakeServer],
        make_remote: Callable[..., Remote],
        lacks: Tuple[bytes, ...],
    ) -> None:
        server = make_server(follows_links=True, without=(b"lsetstat@openssh.com", *lacks))
        remote = make_remote(server)
        server.make_dir(b"/home/full")
        server.make(b"/home/full/f")
        server.make_dir(b"/home/empty")
        for name, data in ((b"file", b"precious"), (b"replaced", b"old"), (b"new", b"new")):
            server.make(b"/home/" + name, data)
        for name, target in ((b"one", b"full"), (b"two", b"empty"), (b"three", b"file"), (b"four", b"file")):
            remote.symlink(target, b"/home/" + name)
        for old, new in ((b"one", b"moved"), (b"two", b"moved"), (b"three", b"replaced"), (b"new", b"four")):
            remote.rename(b"/home/" + old, b"/home/" + new)
        assert server.at(b"/home/moved").target == b"empty"
        assert server.at(b"/home/replaced").target == b"file"
        assert server.content(b"/home/four") == b"new"
        assert server.content(b"/home/file") == b"precious"
        assert server.has(b"/home/full/f") and server.has(b"/home/empty")
        assert not any(server.has(b"/home/" + name) for name in (b"one", b"two", b"three", b"new"))

    def test_a_link_that_cannot_be_read_stays_where_it_is(
        self, make_server: Callable[..., FakeServer], make_remote: Callable[..., Remote]
    ) -> None:
        server = make_server(follows_links=True, without=(b"lsetstat@openssh.com",))
        remote = make_remote(server)
        server.make(b"/home/file")
        remote.symlink(b"file", b"/home/link")
        server.arm(Fault("status", named("READLINK"), first=4, code=3))
        with pytest.raises(FsError):
            remote.rename(b"/home/link", b"/home/moved")
        assert server.has(b"/home/link") and server.has(b"/home/file") and not server.has(b"/home/moved")

    def test_no_hard_link_of_what_a_link_leads_to(
        self, make_server: Callable[..., FakeServer], make_remote: Callable[..., Remote]
    ) -> None:
        server = make_server(follows_links=True, without=(b"lsetstat@openssh.com",))
        remote = make_remote(server)
        server.make(b"/home/file")
        remote.symlink(b"file", b"/home/link")
        with pytest.raises(FsError) as refused:
            remote.link(b"/home/link", b"/home/other")
        assert refused.value.errno == errno.EPERM
        assert server.at(b"/home/file").nlink == 1

    def test_who_tells_links_is_not_asked_twice(
        self, make_server: Callable[..., FakeServer], make_remote: Callable[..., Remote]
    ) -> None:
        server = make_server(without=(b"lsetstat@openssh.com",))
        remote = make_remote(server)
        server.make(b"/home/file")
        remote.symlink(b"file", b"/home/link")
        wait_until(lambda: remote.session().tells_links, 10.0, "the proof")
        asked = server.count("READLINK")
        remote.lstat(b"/home/file")
        assert server.count("READLINK") == asked

    def test_a_hard_link_that_was_not_made_is_refused(
        self, server: FakeServer, make_remote: Callable[..., Remote]
    ) -> None:
        remote = make_remote(server)
        server.make(b"/home/file")
        server.arm(Fault("not done", lambda request: request.name == "hardlink"))
        with pytest.raises(FsError) as refused:
            remote.link(b"/home/file", b"/home/other")
        assert refused.value.errno == errno.EPERM
        assert not server.has(b"/home/other")

    def test_a_file_that_was_not_cut_is_an_error(
        self, server: FakeServer, make_remote: Callable[..., Remote]
    ) -> None:
        remote = make_remote(server)
        server.make(b"/home/file", b"0123456789")
        file, _ = remote.open(b"/home/file", W)
        server.arm(Fault("not done", named("FSETSTAT")))
        with pytest.raises(FsError) as refused:
            remote.fsetstat(file, Attrs(size=4))
        assert refused.value.errno == errno.ENOTSUP
        remote.fsetstat(file, Attrs(size=4))
        assert server.content(b"/home/file") == b"0123"

    @pytest.mark.parametrize("empties", [False, True])
    def test_a_file_is_not_opened_where_that_would_empty_it(
        self, make_server: Callable[..., FakeServer], make_remote: Callable[..., Remote], empties: bool
    ) -> None:
        server = make_server(without=(FSYNC,), empties_opened=empties)
        remote = make_remote(server)
        server.make(b"/home/file", b"precious")
        server.make(b"/home/empty")
        remote.open(b"/home/empty", W)
        assert server.count("WRITE") == 0, "it was tried where there was nothing to lose"
        if empties:
            with pytest.raises(FsError) as refused:
                remote.open(b"/home/file", W)
            assert refused.value.errno == errno.ENOTSUP
        else:
            remote.open(b"/home/file", W)
        assert server.tree() == {b"file": b"precious", b"empty": b""}

    def test_what_a_close_committed_is_not_emptied_by_the_next_write(
        self, make_server: Callable[..., FakeServer], make_remote: Callable[..., Remote]
    ) -> None:
        server = make_server(without=(FSYNC,), empties_opened=True)
        remote = make_remote(server)
        file, _ = remote.open(b"/home/file", W | CREAT | TRUNC)
        server.at(b"/home/file").data[:] = b"written"
        remote.commit_by_close(file)
        with pytest.raises(FsError) as refused:
            remote.fsetstat(file, Attrs(mtime=1, atime=1))
        assert refused.value.errno == errno.ENOTSUP
        assert server.content(b"/home/file") == b"written"

    @pytest.mark.parametrize("empties", [False, True])
    def test_a_file_that_is_synced_is_written_on(
        self, make_server: Callable[..., FakeServer], make_remote: Callable[..., Remote], empties: bool
    ) -> None:
        server = make_server(without=(FSYNC,), empties_opened=empties)
        remote = make_remote(server)
        file, _ = remote.open(b"/home/file", W | CREAT | TRUNC)
        write(remote, file, 0, b"abc")
        remote.commit_by_close(file, is_closed=False)
        assert server.tree() == {b"file": b"abc"}, "what was made to try it is gone"
        write(remote, file, 3, b"def")
        remote.commit_by_close(file)
        assert server.content(b"/home/file") == b"abcdef"
        assert sum(r.name == "CLOSE" and r.path == b"/home/file" for r in server.log) == 2 - empties

    @pytest.mark.parametrize("ignores", [False, True])
    def test_another_s_file_is_not_created_over_where_excl_is_ignored(
        self, make_server: Callable[..., FakeServer], make_remote: Callable[..., Remote], ignores: bool
    ) -> None:
        server = make_server(without=(FSYNC,), ignores_excl=ignores, empties_opened=ignores)
        remote = make_remote(server)
        server.make(b"/home/lock", b"theirs")
        for _ in range(2):
            with pytest.raises(FsError) as refused:
                remote.open(b"/home/lock", W | CREAT | EXCL)
            assert refused.value.errno == errno.EEXIST
            remote.open(b"/home/mine-%d" % server.count("OPEN"), W | CREAT | EXCL)
            assert remote.session().is_exclusive is not ignores
        assert server.content(b"/home/lock") == b"theirs"
