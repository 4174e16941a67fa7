"""Mode and times that the server is told of later: shown at once, in time, in order, and never to another file."""

from __future__ import annotations

import errno
import logging
import os
import random
import stat
import threading
from typing import Callable, Dict, Iterator, List

import pytest

from fs.conftest import START_S, Clock
from fs.test_filesystem import WAIT_S, Mount, get, refused
from sftp.fake_server import FakeServer, Fault, named
from sftpmount.errors import FsError
from sftpmount.fs.filesystem import Filesystem
from sftpmount.fs.owed import OWED_S
from support.process import wait_until

NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL
OLD = int(START_S) - 1000
DATA = b"0123456789"
Act = Callable[[Filesystem], object]


def create(fs: Filesystem, path: bytes, data: bytes = DATA) -> None:
    handle = fs.create(path, NEW, 0o600)
    fs.write(handle, data, 0)
    fs.flush(handle)
    fs.release(handle)


def make(fs: Filesystem, path: bytes, data: bytes = DATA) -> None:
    """``create``, and nothing of it is still on its way."""
    create(fs, path, data)
    session = fs._remote.session()
    lanes = {session.meta, session.read_lane, session.write_lane}
    wait_until(
        lambda: not any(lane.in_flight for lane in lanes),
        WAIT_S,
        "the CLOSE, which release does not wait for",
    )


def owe(fs: Filesystem, path: bytes, mtime: int = OLD) -> None:
    fs.utimens(path, mtime, mtime)


def overwrite(fs: Filesystem, path: bytes) -> None:
    handle = fs.open(path, os.O_WRONLY)
    fs.write(handle, b"x", 0)
    fs.flush(handle)
    fs.release(handle)


def order(server: FakeServer, *requests: str) -> List[str]:
    """The requests of these types, in the order in which they came."""
    return [request.name for request in server.log if request.name in requests]


def sent(server: FakeServer) -> bool:
    """True where a request waits behind the one that the server is busy with."""
    return any(not channel.inbox.empty() for channel in server.connections[-1].channels)


def time_comes_meanwhile(
    server: FakeServer, clock: Clock, request: str, later: Later, act: Callable[[], object]
) -> None:
    """``act``; the time of what is owed comes while the server is busy with its ``request``."""
    fault = server.arm(Fault("hold", named(request)))
    acting = later(act)
    assert fault.fired.wait(WAIT_S)
    clock.s += OWED_S
    wait_until(lambda: sent(server), WAIT_S, "the others' attributes")
    fault.release()
    acting.join(WAIT_S)


@pytest.fixture
def later(clock: Clock) -> Iterator[Callable[[Callable[[], object]], threading.Thread]]:
    """Runs something in a thread, whose end the test waits for."""
    threads: List[threading.Thread] = []

    def start(act: Callable[[], object]) -> threading.Thread:
        threads.append(threading.Thread(target=act, daemon=True))
        threads[-1].start()
        return threads[-1]

    yield start
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()


Later = Callable[[Callable[[], object]], threading.Thread]


class TestShown:
    def test_at_once_and_the_server_is_not_asked(self, server: FakeServer, fs: Filesystem) -> None:
        make(fs, b"/f")
        fs.mkdir(b"/d", 0o700)
        before = server.count()
        for path, kind in [(b"/f", stat.S_IFREG), (b"/d", stat.S_IFDIR)]:
            fs.utimens(path, OLD + 1, OLD)
            fs.chmod(path, 0o755)
            shown = fs.getattr(path)
            assert (shown.mode, shown.atime, shown.mtime) == (kind | 0o755, OLD + 1, OLD)
        assert server.count() == before
        fs.readdir(b"/")
        assert fs.getattr(b"/f").mtime == OLD, "a listing of before"
        assert server.at(b"/home/f").mtime == START_S

    def test_the_server_is_told_in_time(self, server: FakeServer, fs: Filesystem, clock: Clock) -> None:
        for path in (b"/f", b"/g"):
            make(fs, path)
            owe(fs, path)
            fs.chmod(path, 0o640)
        clock.s += OWED_S
        wait_until(lambda: server.count("SETSTAT") == 2, WAIT_S, "one request for each")
        assert fs.drain() == []
        for name in (b"/home/f", b"/home/g"):
            assert (server.at(name).mtime, server.at(name).mode & 0o777) == (OLD, 0o640)
        before = server.count()
        assert fs.getattr(b"/f").mtime == OLD
        assert server.count() == before

    def test_not_before_its_time(self, server: FakeServer, fs: Filesystem, clock: Clock) -> None:
        make(fs, b"/f")
        make(fs, b"/g")
        owe(fs, b"/f")
        clock.s += OWED_S / 2
        owe(fs, b"/g")
        clock.s += OWED_S / 2
        wait_until(lambda: server.at(b"/home/f").mtime == OLD, WAIT_S, "the first")
        assert server.count("SETSTAT") == 1

    def test_a_second_change_does_not_put_it_off(
        self, server: FakeServer, fs: Filesystem, clock: Clock
    ) -> None:
        make(fs, b"/f")
        owe(fs, b"/f")
        clock.s += OWED_S / 2
        owe(fs, b"/f", OLD + 5)
        clock.s += OWED_S / 2
        wait_until(lambda: server.at(b"/home/f").mtime == OLD + 5, WAIT_S, "both")

    def test_the_same_mode_again_is_no_change(self, server: FakeServer, fs: Filesystem) -> None:
        make(fs, b"/f")
        fs.chmod(b"/f", 0o600)
        fs.drain()
        assert server.count("SETSTAT") == 0

    def test_it_is_not_forgotten_with_its_directory(
        self, server: FakeServer, mount: Mount, clock: Clock
    ) -> None:
        fs = mount(server, entries_max=20)
        fs.mkdir(b"/d", 0o755)
        fs.mkdir(b"/d/e", 0o755)
        make(fs, b"/d/e/f")
        owe(fs, b"/d/e/f")
        for each in range(5):
            server.make_dir(b"/home/other%d" % each)
            for name in range(20):
                server.make(b"/home/other%d/%d" % (each, name))
            fs.readdir(b"/other%d" % each)
        assert fs.getattr(b"/d/e/f").mtime == OLD
        assert fs.drain() == []
        assert server.at(b"/home/d/e/f").mtime == OLD


class TestWithRename:
    def test_in_one_flight(self, server: FakeServer, fs: Filesystem, later: Later) -> None:
        make(fs, b"/f")
        owe(fs, b"/f")
        fs.chmod(b"/f", 0o644)
        fault = server.arm(Fault("hold before", named("SETSTAT")))
        before = server.count()
        later(lambda: fs.rename(b"/f", b"/g"))
        wait_until(lambda: fault.fired.is_set() and sent(server), WAIT_S, "the rename, behind the attributes")
        fault.release()
        wait_until(lambda: server.has(b"/home/g"), WAIT_S, "the rename")
        assert (server.at(b"/home/g").mtime, server.at(b"/home/g").mode & 0o777) == (OLD, 0o644)
        assert server.count() == before + 2
        assert fs.drain() == []
        assert server.count("SETSTAT") == 1

    @pytest.mark.parametrize("act", ["cut before", "cut after"])
    @pytest.mark.parametrize("request_name", ["SETSTAT", "posix-rename"])
    def test_the_connection_breaks(
        self, server: FakeServer, fs: Filesystem, act: str, request_name: str
    ) -> None:
        make(fs, b"/f")
        owe(fs, b"/f")
        server.arm(Fault(act, named(request_name)))
        fs.rename(b"/f", b"/g")
        assert not server.has(b"/home/f")
        assert server.at(b"/home/g").mtime == fs.getattr(b"/g").mtime == OLD
        assert fs.drain() == []

    @pytest.mark.parametrize("code", [3, 4])
    def test_it_tells_what_is_refused(self, server: FakeServer, fs: Filesystem, code: int) -> None:
        make(fs, b"/f")
        owe(fs, b"/f")
        server.arm(Fault("status", named("SETSTAT"), code=code, times=2))
        assert refused(lambda: fs.rename(b"/f", b"/g")) in (errno.EPERM, errno.EACCES, errno.EIO)
        assert server.has(b"/home/g") and not server.has(b"/home/f")
        assert fs.getattr(b"/g").mtime == START_S, "what the server has"
        assert refused(lambda: fs.getattr(b"/f")) == errno.ENOENT
        assert fs.drain() == [], "told once"

    def test_the_rename_may_overtake_it(self, server: FakeServer, fs: Filesystem) -> None:
        make(fs, b"/f")
        owe(fs, b"/f")
        server.arm(Fault("status", named("SETSTAT"), code=2))
        fs.rename(b"/f", b"/g")
        assert server.at(b"/home/g").mtime == OLD

    def test_a_refused_rename_leaves_it_owed(self, server: FakeServer, fs: Filesystem) -> None:
        make(fs, b"/f")
        server.make_dir(b"/home/d")
        owe(fs, b"/f")
        assert refused(lambda: fs.rename(b"/f", b"/d")) == errno.EISDIR
        assert fs.drain() == []
        assert server.at(b"/home/f").mtime == OLD

    def test_servers_without_posix_rename(self, mount: Mount, make_server: Callable[..., FakeServer]) -> None:
        server = make_server(without=(b"posix-rename@openssh.com",))
        fs = mount(server)
        server.make(b"/home/g", b"old")
        make(fs, b"/f")
        owe(fs, b"/f")
        fs.rename(b"/f", b"/g")
        assert server.at(b"/home/g").mtime == OLD
        assert server.content(b"/home/g") == DATA

    def test_what_the_replaced_file_is_owed_is_not_the_new_ones(
        self, server: FakeServer, fs: Filesystem, clock: Clock, later: Later
    ) -> None:
        """Its time comes while the rename is on its way."""
        for path, mtime in [(b"/f", 111), (b"/new", 222), (b"/last", 333)]:
            make(fs, path)
            owe(fs, path, mtime)
        time_comes_meanwhile(server, clock, "posix-rename", later, lambda: fs.rename(b"/new", b"/f"))
        assert fs.drain() == []
        assert server.at(b"/home/f").mtime == 222
        assert server.at(b"/home/last").mtime == 333


class TestOrder:
    """What depends on it comes after it."""

    AHEAD: Dict[str, Act] = {
        "link": lambda fs: fs.link(b"/d/f", b"/g"),
        "chown": lambda fs: fs.chown(b"/d/f", 5, 5),
        "fsync": lambda fs: fs.fsync(fs.open(b"/d/f", os.O_RDONLY)),
        "fsyncdir": lambda fs: fs.fsyncdir(b"/d"),
        "fsyncdir above": lambda fs: fs.fsyncdir(b"/"),
        "drain": lambda fs: fs.drain(),
        "read": lambda fs: get(fs, b"/d/f"),
        "open to write": lambda fs: fs.release(fs.open(b"/d/f", os.O_WRONLY)),
        "forbid": lambda fs: fs.chmod(b"/d", 0),
        "give away": lambda fs: fs.chown(b"/d", 5, 5),
    }

    @pytest.mark.parametrize("name", AHEAD)
    def test_it_is_sent_first(self, server: FakeServer, fs: Filesystem, name: str) -> None:
        fs.mkdir(b"/d", 0o755)
        make(fs, b"/d/f")
        owe(fs, b"/d/f")
        fs.chmod(b"/d/f", 0o640)
        at = server.count()
        self.AHEAD[name](fs)
        sent_first = server.log[at]
        assert (sent_first.name, sent_first.path) == ("SETSTAT", b"/home/d/f")
        assert (server.at(b"/home/d/f").mtime, server.at(b"/home/d/f").mode & 0o777) == (OLD, 0o640)
        assert fs.drain() == []

    CHANGING: Dict[str, Act] = {
        "truncate": lambda fs: fs.truncate(b"/f", 3),
        "open to empty": lambda fs: fs.release(fs.open(b"/f", os.O_WRONLY | os.O_TRUNC)),
        "open to empty and read": lambda fs: fs.release(fs.open(b"/f", os.O_RDONLY | os.O_TRUNC)),
        "create again": lambda fs: fs.release(fs.create(b"/f", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)),
        "write": lambda fs: overwrite(fs, b"/f"),
    }

    @pytest.mark.parametrize("name", CHANGING)
    def test_a_change_of_the_bytes_is_younger(
        self, server: FakeServer, fs: Filesystem, clock: Clock, name: str
    ) -> None:
        make(fs, b"/f")
        owe(fs, b"/f")
        clock.s += 5
        self.CHANGING[name](fs)
        assert fs.drain() == []
        assert server.at(b"/home/f").mtime == START_S + 5
        assert fs.getattr(b"/f").mtime == START_S + 5

    ENTRIES: Dict[str, Act] = {
        "create": lambda fs: make(fs, b"/d/new"),
        "mkdir": lambda fs: fs.mkdir(b"/d/new", 0o755),
        "symlink": lambda fs: fs.symlink(b"x", b"/d/new"),
        "link": lambda fs: fs.link(b"/d/f", b"/d/new"),
        "unlink": lambda fs: fs.unlink(b"/d/f"),
        "rmdir": lambda fs: fs.rmdir(b"/d/e"),
        "rename within": lambda fs: fs.rename(b"/d/f", b"/d/new"),
        "rename out": lambda fs: fs.rename(b"/d/f", b"/new"),
        "rename in": lambda fs: fs.rename(b"/g", b"/d/new"),
    }

    @pytest.mark.parametrize("name", ENTRIES)
    def test_a_change_in_a_directory_is_younger_than_its_times(
        self, server: FakeServer, fs: Filesystem, clock: Clock, name: str
    ) -> None:
        fs.mkdir(b"/d", 0o755)
        fs.mkdir(b"/d/e", 0o755)
        make(fs, b"/d/f")
        make(fs, b"/g")
        owe(fs, b"/d")
        assert fs.getattr(b"/d").mtime == OLD
        clock.s += 5
        self.ENTRIES[name](fs)
        assert fs.drain() == []
        assert server.at(b"/home/d").mtime == START_S + 5
        assert fs.getattr(b"/d").mtime == START_S + 5

    @pytest.mark.parametrize("name", [*ENTRIES, "rename of the directory"])
    def test_what_is_refused_of_the_directory_is_not_said_of_its_entry(
        self, server: FakeServer, fs: Filesystem, name: str
    ) -> None:
        fs.mkdir(b"/d", 0o755)
        fs.mkdir(b"/d/e", 0o755)
        make(fs, b"/d/f")
        make(fs, b"/g")
        owe(fs, b"/d")
        act = self.ENTRIES.get(name)
        if act is None:
            owe(fs, b"/d/f")
        first = b"/home/d" if act is not None else b"/home/d/f"
        server.arm(Fault("status", lambda r: r.name == "SETSTAT" and r.path == first, code=3))
        if act is None:
            fs.rename(b"/d", b"/z")
            assert server.at(b"/home/z").mtime == OLD
        else:
            act(fs)
        (told,) = fs.drain()
        assert "mode or times" in told

    def test_rename_of_a_parent(self, server: FakeServer, fs: Filesystem, clock: Clock) -> None:
        fs.mkdir(b"/d", 0o755)
        fs.mkdir(b"/d/e", 0o755)
        make(fs, b"/d/e/f")
        for path, mtime in [(b"/d/e/f", 1), (b"/d/e", 2), (b"/d", 3)]:
            owe(fs, path, mtime)
        fs.rename(b"/d", b"/z")
        clock.s += OWED_S
        assert fs.drain() == []
        for path, mtime in [(b"/z/e/f", 1), (b"/z/e", 2), (b"/z", 3)]:
            assert server.at(b"/home" + path).mtime == fs.getattr(path).mtime == mtime

    def test_a_directory_is_usable_as_soon_as_its_mode_says_so(
        self, server: FakeServer, fs: Filesystem
    ) -> None:
        fs.mkdir(b"/d", 0o755)
        for mode in (0, 0o755, 0o555, 0o700):
            fs.chmod(b"/d", mode)
            assert server.at(b"/home/d").mode & 0o777 == mode, (
                "names below it are asked for by what it allows"
            )
        fs.chmod(b"/d", 0o755)
        assert server.at(b"/home/d").mode & 0o777 == 0o700, "what others gain can wait"
        assert fs.drain() == []
        assert server.at(b"/home/d").mode & 0o777 == 0o755


class TestRemoved:
    def test_nothing_is_sent(self, server: FakeServer, fs: Filesystem, clock: Clock) -> None:
        make(fs, b"/f")
        fs.mkdir(b"/d", 0o755)
        owe(fs, b"/f")
        owe(fs, b"/d")
        fs.unlink(b"/f")
        fs.rmdir(b"/d")
        make(fs, b"/f")
        clock.s += OWED_S
        assert fs.drain() == []
        assert server.count("SETSTAT") == 0
        assert server.at(b"/home/f").mtime == START_S, "the file of before was owed it"

    @pytest.mark.parametrize("request_name", ["REMOVE", "RMDIR"])
    def test_it_is_due_while_the_name_is_being_removed(
        self, server: FakeServer, fs: Filesystem, clock: Clock, later: Later, request_name: str
    ) -> None:
        remove = fs.unlink if request_name == "REMOVE" else fs.rmdir
        if request_name == "REMOVE":
            make(fs, b"/f")
        else:
            fs.mkdir(b"/f", 0o755)
        owe(fs, b"/f")
        make(fs, b"/last")
        owe(fs, b"/last")
        time_comes_meanwhile(server, clock, request_name, later, lambda: remove(b"/f"))
        assert fs.drain() == []

    def test_a_file_that_libfuse_hides(self, server: FakeServer, fs: Filesystem) -> None:
        make(fs, b"/f")
        owe(fs, b"/f")
        handle = fs.open(b"/f", os.O_RDONLY)
        fs.rename(b"/f", b"/.fuse_hidden0001")
        fs.chmod(b"/.fuse_hidden0001", 0o640)
        assert fs.getattr(None, handle).mode & 0o777 == 0o640
        fs.release(handle)
        assert fs.drain() == []
        assert server.tree() == {}

    def test_another_client_removed_it(self, server: FakeServer, fs: Filesystem) -> None:
        make(fs, b"/f")
        owe(fs, b"/f")
        del server.at(b"/home").children[b"f"]
        assert len(fs.drain()) == 1
        assert refused(lambda: fs.getattr(b"/f")) == errno.ENOENT

    def test_another_client_replaced_it(self, server: FakeServer, fs: Filesystem, clock: Clock) -> None:
        """Its file is not ours, once we have seen it: what is changed of it is changed at once."""
        make(fs, b"/f")
        server.make(b"/home/f", b"another's", mtime=OLD)
        fs.readdir(b"/")
        fs.utimens(b"/f", 5, 5)
        assert server.at(b"/home/f").mtime == 5


class TestRefused:
    def test_the_log_and_the_unmount_tell(
        self, server: FakeServer, fs: Filesystem, clock: Clock, caplog: pytest.LogCaptureFixture
    ) -> None:
        make(fs, b"/f\xff")
        owe(fs, b"/f\xff")
        server.arm(Fault("status", named("SETSTAT"), code=3))
        with caplog.at_level(logging.ERROR):
            clock.s += OWED_S
            wait_until(lambda: bool(caplog.records), WAIT_S, "a line in the log")
        (told,) = fs.drain()
        assert told.startswith("/f\\xff: mode or times: ")
        assert fs.getattr(b"/f\xff").mtime == START_S, "what the server has"

    def test_an_open_to_write_tells(self, server: FakeServer, fs: Filesystem) -> None:
        make(fs, b"/f")
        owe(fs, b"/f")
        server.arm(Fault("status", named("SETSTAT"), code=3))
        assert refused(lambda: fs.open(b"/f", os.O_WRONLY)) == errno.EPERM
        overwrite(fs, b"/f")
        assert fs.drain() == []

    @pytest.mark.parametrize("act", ["cut before", "cut after"])
    def test_the_connection_breaks(self, server: FakeServer, fs: Filesystem, clock: Clock, act: str) -> None:
        for path in (b"/f", b"/g"):
            make(fs, path)
            owe(fs, path)
        server.arm(Fault(act, named("SETSTAT")))
        clock.s += OWED_S
        for path in (b"/home/f", b"/home/g"):
            wait_until(lambda path=path: server.at(path).mtime == OLD, WAIT_S, "sent again")
        assert fs.drain() == []

    def test_an_outage_puts_it_off(self, server: FakeServer, mount: Mount, clock: Clock) -> None:
        fs = mount(server, retry_timeout_s=0.2)
        make(fs, b"/f")
        owe(fs, b"/f")
        server.down = True
        server.cut()
        clock.s += OWED_S
        assert refused(lambda: fs.readdir(b"/")) == errno.ETIMEDOUT
        server.down = False
        clock.s += OWED_S

        def is_told() -> bool:
            clock.s += OWED_S
            return server.at(b"/home/f").mtime == OLD

        wait_until(is_told, WAIT_S, "the connection")
        assert fs.drain() == []


class TestNotOwed:
    """What is not surely ours alone is changed at once."""

    def hard_link(self, server: FakeServer, fs: Filesystem) -> None:
        make(fs, b"/f")
        fs.link(b"/f", b"/g")

    def another_clients(self, server: FakeServer, fs: Filesystem) -> None:
        server.make(b"/home/f", DATA)

    def perhaps_another_clients(self, server: FakeServer, fs: Filesystem) -> None:
        fs.release(fs.create(b"/f", os.O_WRONLY | os.O_CREAT, 0o600))

    def given_away(self, server: FakeServer, fs: Filesystem) -> None:
        make(fs, b"/f")
        fs.chown(b"/f", 5, 5)

    def open_to_write(self, server: FakeServer, fs: Filesystem) -> None:
        fs.create(b"/f", NEW, 0o600)

    def being_read(self, server: FakeServer, fs: Filesystem) -> None:
        make(fs, b"/f")
        fs.read(fs.open(b"/f", os.O_RDONLY), 1, 0)

    CASES = (hard_link, another_clients, perhaps_another_clients, given_away, open_to_write, being_read)

    @pytest.mark.parametrize("prepare", CASES)
    def test_it_is_changed_at_once(
        self, server: FakeServer, fs: Filesystem, prepare: Callable[..., None]
    ) -> None:
        prepare(self, server, fs)
        owe(fs, b"/f")
        assert server.at(b"/home/f").mtime == OLD

    def test_symlinks(self, server: FakeServer, fs: Filesystem) -> None:
        fs.symlink(b"x", b"/f")
        owe(fs, b"/f")
        assert server.at(b"/home/f").mtime == OLD

    def test_after_the_lease(self, server: FakeServer, fs: Filesystem, clock: Clock) -> None:
        make(fs, b"/f")
        server.at(b"/home/f").uid = 77
        server.at(b"/home/f").mtime = 7
        clock.s += fs.lifetime_s + 1
        owe(fs, b"/f")
        assert server.at(b"/home/f").mtime == OLD

    def test_without_a_cache_of_names(self, server: FakeServer, mount: Mount) -> None:
        fs = mount(server, dir_cache_timeout_s=0.0)
        make(fs, b"/f")
        owe(fs, b"/f")
        assert server.at(b"/home/f").mtime == OLD

    def test_a_reader_goes_on_after_the_times_are_set(self, server: FakeServer, fs: Filesystem) -> None:
        data = os.urandom(400_000)
        make(fs, b"/f", data)
        handle = fs.open(b"/f", os.O_RDONLY)
        assert fs.read(handle, 10, 0) == data[:10]
        with handle.file.lock:
            handle.file._clean.drop(handle.file.file_id)
        owe(fs, b"/f")
        assert fs.read(handle, 10, 300_000) == data[300_000:300_010]
        server.cut()
        assert fs.read(handle, 10, 200_000) == data[200_000:200_010]
        fs.release(handle)


class TestTogether:
    def run(self, workers: List[Callable[[], object]]) -> None:
        failed: List[BaseException] = []

        def guarded(work: Callable[[], object]) -> None:
            try:
                work()
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
            assert not thread.is_alive(), "a deadlock"
        assert not failed, failed

    @pytest.mark.parametrize("seed", range(3))
    def test_each_its_own_files(self, server: FakeServer, mount: Mount, clock: Clock, seed: int) -> None:
        fs = mount(server, leaps=True)
        fs.mkdir(b"/d", 0o755)
        fs.mkdir(b"/e", 0o755)
        models: List[Dict[bytes, List[int]]] = []

        def work(number: int) -> None:
            chance = random.Random(seed * 100 + number)
            model: Dict[bytes, List[int]] = {}
            models.append(model)
            paths = [b"/%s/%d-%d" % (base, number, each) for base in (b"d", b"e") for each in range(3)]
            for _ in range(80):
                clock.s += 0.02
                path, other = chance.choice(paths), chance.choice(paths)
                if path not in model:
                    try:
                        make(fs, path)
                    except (
                        FsError
                    ) as error:  # another's cut took the reply: an exclusive create is never claimed then
                        assert error.errno == errno.EEXIST
                        fs.unlink(path)
                        continue
                    model[path] = [0o600, -1]
                act = chance.randrange(6)
                if act < 2:
                    model[path][0] = chance.randrange(0o400, 0o1000)
                    fs.chmod(path, model[path][0])
                elif act < 4:
                    model[path][1] = chance.randrange(1_000_000)
                    owe(fs, path, model[path][1])
                elif act == 4:
                    fs.rename(path, other)
                    model[other] = model.pop(path)
                else:
                    fs.unlink(path)
                    del model[path]
                if number == 0 and chance.randrange(20) == 0:
                    server.cut()

        self.run([lambda number=number: work(number) for number in range(4)])  # type: ignore[misc]
        assert fs.drain() == []
        seen = {
            b"/" + base + b"/" + name: [node.mode & 0o777, node.mtime]
            for base in (b"d", b"e")
            for name, node in server.at(b"/home/" + base).children.items()
        }
        expected = {path: each for model in models for path, each in model.items()}
        assert seen.keys() == expected.keys()
        for path, (mode, mtime) in expected.items():
            assert seen[path][0] == mode
            assert mtime in (-1, seen[path][1])
            shown = fs.getattr(path)
            assert [shown.mode & 0o777, shown.mtime] == seen[path]

    # ENOTEMPTY: what a server refuses without a reason is looked at, and by then a directory may be there again.
    EXPECTED = (errno.ENOENT, errno.EEXIST, errno.ESTALE, errno.EIO, errno.ENOTEMPTY)

    @pytest.mark.parametrize("seed", range(3))
    def test_the_same_files(self, server: FakeServer, fs: Filesystem, clock: Clock, seed: int) -> None:
        """Whoever wins: in the end we show what the server has."""
        paths = [b"/a", b"/b", b"/d/a", b"/d/b"]
        fs.mkdir(b"/d", 0o755)

        def work(number: int) -> None:
            chance = random.Random(seed * 100 + number)
            acts: List[Callable[[bytes, bytes], object]] = [
                lambda path, other: fs.chmod(path, chance.randrange(0o400, 0o1000)),
                lambda path, other: owe(fs, path, chance.randrange(1_000_000)),
                lambda path, other: fs.rename(path, other),
                lambda path, other: fs.unlink(path),
                lambda path, other: make(fs, path),
                lambda path, other: get(fs, path),
                lambda path, other: fs.rename(b"/d", b"/z"),
                lambda path, other: fs.rename(b"/z", b"/d"),
            ]
            for _ in range(80):
                clock.s += 0.02
                try:
                    chance.choice(acts)(chance.choice(paths), chance.choice(paths))
                except FsError as error:
                    assert error.errno in self.EXPECTED, error

        self.run([lambda number=number: work(number) for number in range(4)])  # type: ignore[misc]
        fs.drain()
        for directory in (b"", b"/d", b"/z"):
            if not server.has(b"/home" + directory):
                continue
            for name, inode in server.at(b"/home" + directory).children.items():
                if not inode.is_dir:
                    shown = fs.getattr(directory + b"/" + name)
                    assert (shown.mode, shown.mtime) == (inode.mode, inode.mtime)
        fs._ns.check_invariants()
