"""Directories listed ahead of programs that walk a tree: what that saves, and that nobody is told what was not so."""

from __future__ import annotations

import errno
import os
import random
import threading
from typing import Callable, Dict, List

import pytest

from fs.conftest import Clock
from fs.test_filesystem import WAIT_S, Mount, names, refused
from fs.test_owed import create, make
from sftp.fake_server import FakeServer, Fault, Request
from sftpmount.fs import listings, order
from sftpmount.fs.filesystem import Filesystem
from sftpmount.fs.listings import AGAIN_MAX_S, AHEAD_S, WALK_S
from sftpmount.sftp.wire import Entry
from support.process import wait_until

COUNT = 20


@pytest.fixture
def dirs(server: FakeServer) -> List[bytes]:
    """Twenty directories, each with three files, in the order of the listing: not that of their names."""
    paths = [b"/d%02d" % each for each in range(COUNT)]
    random.Random(5).shuffle(paths)
    for path in paths:
        server.make_dir(b"/home" + path)
        for name in (b"/a", b"/b", b"/c"):
            server.make(b"/home" + path + name, path)
    return paths


def quiet(fs: Filesystem) -> None:
    """Nothing is being listed ahead."""
    wait_until(lambda: not fs._listings._running, WAIT_S, "the end of what is listed ahead")


def begin(fs: Filesystem, paths: List[bytes], steps: int = 2) -> None:
    """The program that is recognised: it lists the directory above, and the first."""
    fs.readdir(b"/")
    for path in paths[:steps]:
        fs.readdir(path)
    quiet(fs)


def times_asked(server: FakeServer, path: bytes, name: str = "OPENDIR") -> int:
    return sum(1 for request in server.log if request.name == name and request.path == b"/home" + path)


def of(path: bytes, name: str) -> Callable[[Request], bool]:
    return lambda request: request.name == name and request.path == b"/home" + path


ORDERS: Dict[str, Callable[[Filesystem, List[bytes]], List[bytes]]] = {
    "as listed": lambda fs, paths: paths,
    "by inode": lambda fs, paths: sorted(paths, key=lambda path: fs.getattr(path).ino),
    "by name": lambda fs, paths: sorted(paths),
}


CHANGES: Dict[str, Callable[[Filesystem, bytes], object]] = {
    "create": lambda fs, path: make(fs, path + b"/ours"),
    "mkdir": lambda fs, path: fs.mkdir(path + b"/ours", 0o755),
    "symlink": lambda fs, path: fs.symlink(b"x", path + b"/ours"),
    "rename in": lambda fs, path: fs.rename(b"/d00/a", path + b"/ours"),
    "rename": lambda fs, path: fs.rename(path + b"/a", path + b"/ours"),
    "link": lambda fs, path: fs.link(b"/d00/a", path + b"/ours"),
}


class TestAhead:
    @pytest.mark.parametrize("name", ORDERS)
    def test_a_walk(self, server: FakeServer, fs: Filesystem, dirs: List[bytes], name: str) -> None:
        fs.readdir(b"/")
        looks = server.count("LSTAT")
        waited_for = 0
        paths = ORDERS[name](fs, dirs)
        for path in paths:
            quiet(fs)
            waited_for += times_asked(server, path) == 0
            assert names(fs, path) == [b"a", b"b", b"c"]
            for each in (b"/a", b"/b", b"/c"):
                fs.getattr(path + each)
        quiet(fs)
        assert all(times_asked(server, path) == 1 for path in paths)
        assert server.count("LSTAT") == looks
        assert waited_for <= COUNT // 3, "those before its order is seen"

    def test_a_walk_that_asks_for_single_names(
        self, server: FakeServer, fs: Filesystem, dirs: List[bytes]
    ) -> None:
        """As rsync does: it lists nothing where it copies to."""
        fs.readdir(b"/")
        for path in dirs:
            for each in (b"/a", b"/b", b"/c"):
                fs.getattr(path + each)
            quiet(fs)
        assert server.count("LSTAT") <= COUNT

    def test_to_one_program_once(self, server: FakeServer, fs: Filesystem, dirs: List[bytes]) -> None:
        begin(fs, dirs)
        for asked in (1, 2, 3):
            assert len(fs.readdir(dirs[2])) == 3
            assert times_asked(server, dirs[2]) == asked

    def test_not_when_it_is_old(
        self, server: FakeServer, fs: Filesystem, dirs: List[bytes], clock: Clock
    ) -> None:
        begin(fs, dirs)
        clock.s += AHEAD_S + 0.01
        server.make(b"/home" + dirs[2] + b"/new")
        assert b"new" in names(fs, dirs[2])

    @pytest.mark.parametrize("name", CHANGES)
    def test_not_after_our_own_change(
        self, server: FakeServer, fs: Filesystem, dirs: List[bytes], name: str
    ) -> None:
        """A lock file, and then a look for another's: what the look finds was there after it."""
        dirs.remove(b"/d00")
        begin(fs, dirs)
        fs.getattr(b"/d00/a")
        server.make(b"/home" + dirs[2] + b"/theirs")
        CHANGES[name](fs, dirs[2])
        assert {b"ours", b"theirs"} <= set(names(fs, dirs[2]))

    def test_not_where_our_change_comes_while_it_is_listed(
        self, server: FakeServer, fs: Filesystem, dirs: List[bytes]
    ) -> None:
        fault = server.arm(Fault("hold", of(dirs[2], "READDIR")))
        walk = threading.Thread(target=lambda: begin(fs, dirs), daemon=True)
        walk.start()
        assert fault.fired.wait(WAIT_S)
        server.make(b"/home" + dirs[2] + b"/theirs")
        making = threading.Thread(target=lambda: create(fs, dirs[2] + b"/ours"), daemon=True)
        making.start()
        wait_until(lambda: server.has(b"/home" + dirs[2] + b"/ours"), WAIT_S, "our lock")
        making.join(WAIT_S)
        looking: List[List[bytes]] = []
        look = threading.Thread(target=lambda: looking.append(names(fs, dirs[2])), daemon=True)
        look.start()
        fault.release()
        look.join(WAIT_S)
        walk.join(WAIT_S)
        assert looking == [[b"a", b"b", b"c", b"ours", b"theirs"]]

    def test_when_it_is_closed(self, server: FakeServer, fs: Filesystem, dirs: List[bytes]) -> None:
        begin(fs, dirs)
        fs.close()
        before = server.count("OPENDIR")
        fs.readdir(dirs[2])
        fs.readdir(dirs[10])
        assert server.count("OPENDIR") == before + 1

    def test_not_where_nothing_is_to_be_cached(
        self, server: FakeServer, mount: Mount, dirs: List[bytes]
    ) -> None:
        fs = mount(server, dir_cache_timeout_s=0.0)
        begin(fs, dirs, COUNT)
        fs.readdir(dirs[0])
        assert server.count("OPENDIR") == 1 + COUNT + 1

    def test_how_far(self, server: FakeServer, fs: Filesystem) -> None:
        paths = [b"/%03d" % each for each in range(200)]
        for path in paths:
            server.make_dir(b"/home" + path)
        fs.readdir(b"/")
        for walked, path in enumerate(paths[:100], 1):
            fs.readdir(path)
            quiet(fs)
            assert server.count("OPENDIR") <= 1 + walked + 32

    def test_the_order_of_many_is_looked_for_seldom(
        self, server: FakeServer, fs: Filesystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each guess costs a look at all names: one for each step, and a walk would take their square."""
        guesses: List[int] = []
        guess = order.guess
        monkeypatch.setattr(order, "guess", lambda *args: guesses.append(1) or guess(*args))
        paths = [b"/%03d" % (each * 7 % 200) for each in range(200)]
        for path in paths:
            server.make_dir(b"/home" + path)
        fs.readdir(b"/")
        for path in paths:
            fs.readdir(path)
        assert len(guesses) < 20


class TestAgain:
    """rm -r and borg list each directory twice in a row."""

    TOOK_S = 0.04

    @pytest.fixture
    def far(self, server: FakeServer, clock: Clock, fs: Filesystem, dirs: List[bytes]) -> Filesystem:
        """Its listings take their time."""
        listdir = fs._remote.listdir

        def slowly(path: bytes) -> List[Entry]:
            clock.s += self.TOOK_S
            return listdir(path)

        fs._remote.listdir = slowly  # type: ignore[method-assign, assignment]
        return fs

    def test_it_is_given_again_for_as_long_as_it_took(
        self, server: FakeServer, far: Filesystem, dirs: List[bytes], clock: Clock
    ) -> None:
        first = far.readdir(dirs[0])
        clock.s += self.TOOK_S * 0.9
        assert far.readdir(dirs[0]) == first
        assert times_asked(server, dirs[0]) == 1
        server.make(b"/home" + dirs[0] + b"/theirs")
        clock.s += self.TOOK_S * 0.2
        assert b"theirs" in names(far, dirs[0])

    def test_an_empty_one(self, server: FakeServer, far: Filesystem, dirs: List[bytes]) -> None:
        server.make_dir(b"/home/empty")
        assert names(far, b"/empty") == names(far, b"/empty") == []
        assert times_asked(server, b"/empty") == 1

    def test_one_that_came_ahead(self, server: FakeServer, far: Filesystem, dirs: List[bytes]) -> None:
        begin(far, dirs)
        assert far.readdir(dirs[2]) == far.readdir(dirs[2])
        assert times_asked(server, dirs[2]) == 1

    @pytest.mark.parametrize("name", CHANGES)
    def test_not_after_our_own_change(
        self, server: FakeServer, far: Filesystem, dirs: List[bytes], name: str
    ) -> None:
        dirs.remove(b"/d00")
        far.getattr(b"/d00/a")
        far.readdir(dirs[0])
        server.make(b"/home" + dirs[0] + b"/theirs")
        CHANGES[name](far, dirs[0])
        assert {b"ours", b"theirs"} <= set(names(far, dirs[0]))

    def test_never_for_long(
        self,
        server: FakeServer,
        far: Filesystem,
        dirs: List[bytes],
        clock: Clock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """restic makes its lock, waits for 0.2 s and looks for others'."""
        monkeypatch.setattr(self, "TOOK_S", 5.0)
        far.readdir(dirs[0])
        server.make(b"/home" + dirs[0] + b"/theirs")
        clock.s += AGAIN_MAX_S
        assert AGAIN_MAX_S < 0.2 and b"theirs" in names(far, dirs[0])


class TestThere:
    """A program that goes the same way down again, as borg does."""

    WAY = (b"/r", b"/r/data", b"/r/data/0")

    @pytest.fixture
    def way(self, server: FakeServer, fs: Filesystem) -> List[bytes]:
        for path in self.WAY:
            server.make_dir(b"/home" + path)
        for path in self.WAY:
            fs.readdir(path)
        return list(self.WAY)

    def asked(self, server: FakeServer) -> List[int]:
        return [times_asked(server, path) for path in self.WAY]

    def test_all_of_it_is_listed_at_once(
        self, server: FakeServer, fs: Filesystem, way: List[bytes], clock: Clock
    ) -> None:
        clock.s += AGAIN_MAX_S
        fs.readdir(way[0])
        quiet(fs)
        assert self.asked(server) == [2, 2, 2]
        server.make(b"/home/r/data/0/5")
        assert names(fs, way[1]) == [b"0"] and names(fs, way[2]) == []
        quiet(fs)
        assert self.asked(server) == [2, 2, 2], "by its program, once"

    @pytest.mark.parametrize("when", ["too old", "changed by us", "given before"])
    def test_who_lists_it_then_is_told_what_is_there(
        self, server: FakeServer, fs: Filesystem, way: List[bytes], clock: Clock, when: str
    ) -> None:
        clock.s += AGAIN_MAX_S
        fs.readdir(way[0])
        quiet(fs)
        server.make(b"/home/r/data/0/theirs")
        if when == "too old":
            clock.s += AHEAD_S + 0.01
        elif when == "changed by us":
            create(fs, b"/r/data/0/ours")
        else:
            fs.readdir(way[2])
            clock.s += AGAIN_MAX_S
        assert b"theirs" in names(fs, way[2])

    def test_not_long_after(self, server: FakeServer, fs: Filesystem, way: List[bytes], clock: Clock) -> None:
        clock.s += WALK_S + 1
        fs.readdir(way[0])
        quiet(fs)
        assert self.asked(server) == [2, 1, 1]


class TestAbsent:
    def test_names_that_another_client_made_meanwhile(
        self, server: FakeServer, fs: Filesystem, dirs: List[bytes]
    ) -> None:
        begin(fs, dirs)
        assert times_asked(server, dirs[2]) == 1
        assert refused(lambda: fs.getattr(dirs[2] + b"/other")) == errno.ENOENT
        server.make(b"/home" + dirs[2] + b"/new")
        assert fs.getattr(dirs[2] + b"/new").size == 0

    def test_a_lease_is_renewed(
        self, server: FakeServer, fs: Filesystem, dirs: List[bytes], clock: Clock
    ) -> None:
        fs.readdir(dirs[0])
        clock.s += fs.lifetime_s + 1
        for each in range(10):
            assert refused(lambda each=each: fs.getattr(dirs[0] + b"/%d" % each)) == errno.ENOENT
            quiet(fs)
        assert times_asked(server, dirs[0]) == 2
        assert server.count("LSTAT") <= 2

    def test_attributes_are_believed_for_seconds_only(
        self, server: FakeServer, fs: Filesystem, dirs: List[bytes], clock: Clock
    ) -> None:
        begin(fs, dirs)
        server.at(b"/home" + dirs[2] + b"/a").data[:] = b"longer than it was"
        clock.s += 6
        assert fs.getattr(dirs[2] + b"/a").size == 18


class TestBig:
    @pytest.fixture
    def long(self, server: FakeServer) -> List[bytes]:
        """A directory of more names than are kept."""
        server.make_dir(b"/home/long")
        paths = [b"/long/%04d" % number for number in range(3000)]
        for path in paths:
            server.make(b"/home" + path)
        return paths

    @pytest.mark.parametrize("is_listed", [True, False], ids=["listed", "not listed"])
    def test_one_that_is_longer_than_what_is_kept_is_kept_piece_by_piece(
        self, server: FakeServer, mount: Mount, long: List[bytes], is_listed: bool
    ) -> None:
        fs = mount(server, entries_max=1000)
        if is_listed:
            fs.readdir(b"/long")
        for path in long:
            fs.getattr(path)
            quiet(fs)
        assert server.count("LSTAT") < len(long) / 10
        assert len(fs._ns) <= 1000

    def test_it_is_so_time_and_again(
        self, server: FakeServer, mount: Mount, long: List[bytes], clock: Clock
    ) -> None:
        fs = mount(server, entries_max=1000)
        for _ in range(3):
            clock.s += fs.lifetime_s + 1
            before = server.count("LSTAT")
            fs.readdir(b"/long")
            for path in long:
                fs.getattr(path)
                quiet(fs)
            assert server.count("LSTAT") - before < len(long) / 10

    def test_it_is_listed_no_more_often_where_names_come_in_another_order(
        self, server: FakeServer, mount: Mount, long: List[bytes]
    ) -> None:
        fs = mount(server, entries_max=1000)
        for path in random.Random(1).sample(long, 1000):
            assert fs.getattr(path).size == 0
            quiet(fs)
        assert times_asked(server, b"/long") <= 10
        assert len(fs._ns) <= 1000

    def test_no_more_of_it_than_a_program_would_be_given(
        self, server: FakeServer, mount: Mount, long: List[bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(listings, "LISTING_ENTRIES_MAX", 500)
        fs = mount(server, entries_max=1000)
        for path in long[:300]:
            fs.getattr(path)
            quiet(fs)
        assert times_asked(server, b"/long") > 5
        assert server.count("LSTAT") >= 300 and len(fs._ns) <= 310, "all were given up"

    def test_a_name_that_is_not_there_moves_nothing(
        self, server: FakeServer, mount: Mount, long: List[bytes]
    ) -> None:
        fs = mount(server, entries_max=1000)
        fs.readdir(b"/long")
        for number in range(64):
            assert refused(lambda number=number: fs.getattr(b"/long/no%d" % number)) == errno.ENOENT
            quiet(fs)
        before = server.count("LSTAT")
        for path in long[:900]:
            fs.getattr(path)
        assert server.count("LSTAT") == before

    def test_it_is_not_listed_for_two_names(self, server: FakeServer, fs: Filesystem) -> None:
        server.make_dir(b"/home/big")
        for each in range(5000):
            server.make(b"/home/big/%d" % each)
        for each in range(3):
            fs.getattr(b"/big/%d" % each)
        quiet(fs)
        assert server.count("READDIR") <= 25, "it is given up when it is seen to be long"
        assert server.count("LSTAT") - 3 <= 0
        for each in range(3, 40):
            fs.getattr(b"/big/%d" % each)
            quiet(fs)
        before = server.count("LSTAT")
        for each in range(40, 5000):
            fs.getattr(b"/big/%d" % each)
        assert server.count("LSTAT") == before, "it was worth it for so many"


class TestFails:
    """What fails ahead is nobody's error."""

    @pytest.mark.parametrize("act", ["cut before", "cut after", "status"])
    @pytest.mark.parametrize("name", ["OPENDIR", "READDIR", "CLOSE"])
    def test_a_request(
        self, server: FakeServer, fs: Filesystem, dirs: List[bytes], act: str, name: str
    ) -> None:
        fs.readdir(b"/")
        server.arm(Fault(act, of(dirs[3], name), code=4))
        for path in dirs:
            assert names(fs, path) == [b"a", b"b", b"c"]

    def test_one_that_we_may_not_list(self, server: FakeServer, fs: Filesystem, dirs: List[bytes]) -> None:
        server.arm(Fault("status", of(dirs[3], "OPENDIR"), code=3, times=100))
        fs.readdir(b"/")
        for path in dirs:
            if path == dirs[3]:
                assert refused(lambda path=path: fs.readdir(path)) == errno.EACCES
            else:
                assert names(fs, path) == [b"a", b"b", b"c"]

    def test_one_that_is_gone(self, server: FakeServer, fs: Filesystem, dirs: List[bytes]) -> None:
        fs.readdir(b"/")
        del server.at(b"/home").children[dirs[3][1:]]
        for path in dirs[:3]:
            fs.readdir(path)
        quiet(fs)
        assert refused(lambda: fs.readdir(dirs[3])) == errno.ENOENT

    def test_the_servers_disk_is_unmounted(
        self, server: FakeServer, fs: Filesystem, dirs: List[bytes], clock: Clock
    ) -> None:
        """The directory below is empty: that is taken in only where a program asks, and the disk is looked for."""
        fs.readdir(b"/")
        for path in dirs[2:5]:
            fs.readdir(path)
        clock.s += fs.lifetime_s + 1
        for path in dirs[2:5]:
            server.at(b"/home" + path).children.clear()
        begin(fs, dirs)
        assert times_asked(server, dirs[2]) == 2
        assert {name for name, _ in fs._ns.children(dirs[2])} == {b"a", b"b", b"c"}
        assert fs.readdir(dirs[2]) == []


class TestTogether:
    def test_walks_and_changes(self, server: FakeServer, fs: Filesystem, dirs: List[bytes]) -> None:
        """Each sees its own changes at once, whatever the others make us list ahead."""
        failed: List[BaseException] = []

        def work(number: int) -> None:
            try:
                for path in dirs if number % 2 else reversed(dirs):
                    own = path + b"/own%d" % number
                    fs.readdir(b"/")
                    make(fs, own)
                    assert own.rpartition(b"/")[2] in names(fs, path)
                    assert fs.getattr(own).size > 0
                    fs.unlink(own)
                    assert own.rpartition(b"/")[2] not in names(fs, path)
                    assert refused(lambda own=own: fs.open(own, os.O_RDONLY)) == errno.ENOENT
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
            assert not thread.is_alive()
        assert not failed, failed
        assert all(names(fs, path) == [b"a", b"b", b"c"] for path in dirs)
        fs._ns.check_invariants()
