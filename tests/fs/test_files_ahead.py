"""Small files read ahead of a program that reads one after the other: how many requests that takes, and never false bytes."""

from __future__ import annotations

import errno
import os
import threading
from typing import List

import pytest

from fs.conftest import START_S, Clock
from fs.test_filesystem import CUTS, WAIT_S, Mount, get, noise, put, refused
from fs.test_listings import ORDERS
from fs.test_owed import make
from sftp.fake_server import FakeServer, Fault, Request, string
from sftpmount.cache.blocks import BLOCK_BYTES
from sftpmount.fs.files_ahead import AHEAD_S, STREAK, STREAK_S
from sftpmount.fs.filesystem import Filesystem
from support.process import wait_until

OLD = int(START_S) - 1000


@pytest.fixture
def files(server: FakeServer) -> List[bytes]:
    """Twenty files of a directory, in the order in which the server lists them: not that of their names."""
    server.make_dir(b"/home/d")
    paths = [b"/d/%02d" % (each * 7 % 20) for each in range(20)]
    for path in paths:
        server.make(b"/home" + path, path * 100, mtime=OLD)
    return paths


def is_right(fs: Filesystem, path: bytes) -> bool:
    return get(fs, path) == path * 100


def quiet(fs: Filesystem) -> None:
    """Nothing is being read ahead."""
    wait_until(lambda: not fs._files_ahead._running, WAIT_S, "the end of what is read ahead")


def begin(fs: Filesystem, paths: List[bytes]) -> None:
    """The program that is recognised: it lists, and reads the first."""
    fs.readdir(b"/d")
    for path in paths[: STREAK + 1]:
        assert is_right(fs, path)
    quiet(fs)


def times_asked(server: FakeServer, path: bytes, name: str = "OPEN") -> int:
    return sum(1 for request in server.log if request.name == name and request.path == b"/home" + path)


class TestAhead:
    @pytest.mark.parametrize("name", ORDERS)
    def test_each_file_is_asked_for_once(
        self, server: FakeServer, fs: Filesystem, files: List[bytes], name: str
    ) -> None:
        fs.readdir(b"/d")
        paths = ORDERS[name](fs, files)
        looks = server.count("LSTAT")
        for position, path in enumerate(paths):
            if position > STREAK:
                quiet(fs)
                assert times_asked(server, path) == 1, "it is there before it is opened"
            assert is_right(fs, path)
        quiet(fs)
        assert server.count("OPEN") == server.count("LSTAT") - looks == len(paths)
        assert all(times_asked(server, path, "READ") == 1 for path in paths[STREAK + 1 :])

    def test_an_open_is_answered_without_the_server(
        self, server: FakeServer, fs: Filesystem, files: List[bytes]
    ) -> None:
        begin(fs, files)
        server.down = True
        server.cut()
        assert is_right(fs, files[STREAK + 1])

    def test_the_server_is_asked_after_a_while(
        self, server: FakeServer, fs: Filesystem, files: List[bytes], clock: Clock
    ) -> None:
        begin(fs, files)
        path = files[STREAK + 1]
        clock.s += AHEAD_S + 0.1
        assert is_right(fs, path)
        assert (times_asked(server, path), times_asked(server, path, "READ")) == (2, 1)

    def test_the_next_directory_that_is_listed(
        self, server: FakeServer, fs: Filesystem, files: List[bytes]
    ) -> None:
        server.make_dir(b"/home/e")
        for name in (b"/e/a", b"/e/b"):
            server.make(b"/home" + name, name * 100, mtime=OLD)
        begin(fs, files)
        fs.readdir(b"/e")
        quiet(fs)
        assert times_asked(server, b"/e/a") == times_asked(server, b"/e/b") == 1
        assert is_right(fs, b"/e/a") and is_right(fs, b"/e/b")
        assert times_asked(server, b"/e/a") == times_asked(server, b"/e/b") == 1

    def test_not_when_that_program_is_long_gone(
        self, server: FakeServer, fs: Filesystem, files: List[bytes], clock: Clock
    ) -> None:
        server.make_dir(b"/home/e")
        server.make(b"/home/e/a", b"x", mtime=OLD)
        begin(fs, files)
        clock.s += STREAK_S + 1
        fs.readdir(b"/e")
        quiet(fs)
        assert times_asked(server, b"/e/a") == 0

    def test_how_far(self, server: FakeServer, fs: Filesystem) -> None:
        server.make_dir(b"/home/d")
        paths = [b"/d/%03d" % each for each in range(300)]
        for path in paths:
            server.make(b"/home" + path, path * 100, mtime=OLD)
        begin(fs, paths)
        assert server.count("OPEN") <= STREAK + 1 + 4
        for opened, path in enumerate(paths[STREAK + 1 : 200], STREAK + 2):
            assert is_right(fs, path)
            quiet(fs)
            assert server.count("OPEN") - opened <= 48

    def test_a_small_cache_is_not_asked_for_more_than_it_holds(
        self, server: FakeServer, mount: Mount
    ) -> None:
        blocks = 8
        fs = mount(server, cache_bytes_max=blocks * BLOCK_BYTES)
        server.make_dir(b"/home/d")
        data = {b"/d/%02d" % each: noise(BLOCK_BYTES - 1000) for each in range(40)}
        for path, each in data.items():
            server.make(b"/home" + path, each, mtime=OLD)
        fs.readdir(b"/d")
        for path, each in data.items():
            assert get(fs, path) == each
            quiet(fs)
            assert fs.files._clean.held_bytes <= blocks * BLOCK_BYTES
        # The program may come back to those that it read before it was recognised.
        assert server.count("OPEN") <= len(data) + STREAK, "none was forgotten before it was read"


class TestNothingAhead:
    def test_every_open_asks_where_nothing_is_to_be_cached(
        self, server: FakeServer, mount: Mount, files: List[bytes]
    ) -> None:
        """Who wants what another client stored a moment ago (README, "Limits")."""
        fs = mount(server, dir_cache_timeout_s=0.0)
        begin(fs, files)
        for path in files[STREAK + 1 :]:
            quiet(fs)
            server.make(b"/home" + path, b"theirs", mtime=OLD + 1)
            assert get(fs, path) == b"theirs"

    def test_files_that_are_not_read(self, server: FakeServer, fs: Filesystem, files: List[bytes]) -> None:
        fs.readdir(b"/d")
        for path in files[:8]:
            fs.release(fs.open(path, os.O_RDONLY))
        quiet(fs)
        assert server.count("OPEN") == 8

    def test_large_files(self, server: FakeServer, fs: Filesystem) -> None:
        server.make_dir(b"/home/d")
        for each in range(10):
            server.make(b"/home/d/%d" % each, noise(BLOCK_BYTES + 1), mtime=OLD)
        fs.readdir(b"/d")
        for each in range(6):
            assert len(get(fs, b"/d/%d" % each)) == BLOCK_BYTES + 1
        quiet(fs)
        assert server.count("OPEN") == 6

    def test_random_reads(self, server: FakeServer, fs: Filesystem, files: List[bytes]) -> None:
        for each in range(10):
            server.make(b"/home/d/big%d" % each, noise(5 * BLOCK_BYTES), mtime=OLD)
        fs.readdir(b"/d")
        for each in (3, 1, 8, 5, 2, 9):
            handle = fs.open(b"/d/big%d" % each, os.O_RDONLY)
            assert len(fs.read(handle, 4096, 3 * BLOCK_BYTES)) == 4096
            fs.release(handle)
        quiet(fs)
        assert server.count("OPEN") == 6

    def test_when_it_is_closed(self, server: FakeServer, fs: Filesystem, files: List[bytes]) -> None:
        begin(fs, files)
        fs.close()
        before = server.count("OPEN")
        assert is_right(fs, files[STREAK + 1])
        assert is_right(fs, files[-1])
        assert server.count("OPEN") == before + 1


class TestTrue:
    """What is read ahead is a copy that ages."""

    @pytest.fixture
    def ahead(self, fs: Filesystem, files: List[bytes]) -> bytes:
        """A file that was read ahead and not opened yet."""
        begin(fs, files)
        return files[STREAK + 1]

    @pytest.mark.parametrize("data", [b"x" * 500, b"other", b""])
    def test_another_client_changes_it(
        self, server: FakeServer, fs: Filesystem, ahead: bytes, clock: Clock, data: bytes
    ) -> None:
        server.make(b"/home" + ahead, data, mtime=OLD + 1)
        clock.s += AHEAD_S + 0.01
        assert get(fs, ahead) == data

    def test_another_client_removes_it(
        self, server: FakeServer, fs: Filesystem, ahead: bytes, clock: Clock
    ) -> None:
        del server.at(b"/home/d").children[ahead[3:]]
        clock.s += AHEAD_S + 0.01
        assert refused(lambda: get(fs, ahead)) == errno.ENOENT

    def test_we_change_it(self, server: FakeServer, fs: Filesystem, ahead: bytes) -> None:
        handle = fs.open(ahead, os.O_RDWR)
        fs.write(handle, b"ours", 2)
        expected = ahead[:2] + b"ours" + (ahead * 100)[6:]
        assert get(fs, ahead) == expected
        fs.flush(handle)
        fs.release(handle)
        assert get(fs, ahead) == expected

    def test_we_cut_it(self, fs: Filesystem, ahead: bytes) -> None:
        fs.truncate(ahead, 3)
        assert get(fs, ahead) == ahead[:3]

    def test_we_replace_it(self, fs: Filesystem, ahead: bytes) -> None:
        make(fs, b"/new", b"ours")
        fs.rename(b"/new", ahead)
        assert get(fs, ahead) == b"ours"

    def test_we_remove_it(self, server: FakeServer, fs: Filesystem, ahead: bytes) -> None:
        fs.unlink(ahead)
        assert refused(lambda: get(fs, ahead)) == errno.ENOENT
        put(fs, ahead, b"ours")
        assert get(fs, ahead) == b"ours"

    def test_we_change_it_while_it_is_read_ahead(
        self, server: FakeServer, fs: Filesystem, files: List[bytes]
    ) -> None:
        path = files[STREAK + 1]
        fault = server.arm(Fault("hold", lambda r: r.name == "READ" and r.path == b"/home" + path))
        reader = threading.Thread(target=begin, args=(fs, files), daemon=True)
        reader.start()
        assert fault.fired.wait(WAIT_S)
        put(fs, path, b"ours")
        fault.release()
        reader.join(WAIT_S)
        assert get(fs, path) == b"ours"
        assert server.content(b"/home" + path) == b"ours"

    def test_what_was_written_a_moment_ago_may_change_unseen(
        self, server: FakeServer, fs: Filesystem, files: List[bytes]
    ) -> None:
        for path in files:
            server.at(b"/home" + path).mtime = int(START_S)
        begin(fs, files)
        for path in files[STREAK + 1 :]:
            server.at(b"/home" + path).data[:1] = b"X"  # size and second are the same
            assert get(fs, path) == b"X" + (path * 100)[1:]

    def test_owed_attributes(self, server: FakeServer, fs: Filesystem, clock: Clock) -> None:
        fs.mkdir(b"/d", 0o755)
        paths = [b"/d/%02d" % each for each in range(10)]
        for path in paths:
            make(fs, path, path * 100)
            fs.utimens(path, OLD, OLD)
        for path in paths:
            assert is_right(fs, path)
            assert fs.getattr(path).mtime == OLD
        assert fs.drain() == []
        for path in paths:
            assert server.at(b"/home" + path).mtime == OLD


class TestFails:
    """What fails ahead is nobody's error."""

    @pytest.mark.parametrize("act", [*CUTS, "status"])
    @pytest.mark.parametrize("name", ["OPEN", "LSTAT", "READ", "FSTAT", "CLOSE"])
    def test_a_request(
        self, server: FakeServer, fs: Filesystem, files: List[bytes], act: str, name: str
    ) -> None:
        failing = files[STREAK + 2]
        fs.readdir(b"/d")
        server.arm(Fault(act, lambda r: r.name == name and r.path == b"/home" + failing))
        for path in files:
            assert is_right(fs, path)

    @pytest.mark.parametrize("name", ["OPEN", "LSTAT", "READ", "FSTAT"])
    def test_those_that_were_asked_for_with_it_are_there(
        self, server: FakeServer, fs: Filesystem, files: List[bytes], name: str
    ) -> None:
        failing = files[STREAK + 2]
        fault = server.arm(Fault("status", lambda r: r.name == name and r.path == b"/home" + failing))
        fs.readdir(b"/d")
        for path in files:
            assert is_right(fs, path)
            quiet(fs)
        assert fault.fired.is_set()
        assert all(times_asked(server, path) == 1 for path in files if path != failing)

    def test_a_reply_that_makes_no_sense_leaves_nothing_open(
        self, server: FakeServer, fs: Filesystem, files: List[bytes]
    ) -> None:
        fs.readdir(b"/d")
        connection = server.connections[-1]
        server.arm(Fault("wrong type", lambda r: r.name == "LSTAT" and r.path == b"/home" + files[3]))
        fs._files_ahead._fetch(files[:6])
        assert not connection.is_alive
        assert all(is_right(fs, path) for path in files)

    @pytest.mark.parametrize("body", [string(b"short"), string(b"x" * 4000)])
    def test_a_read_of_another_length(
        self, server: FakeServer, fs: Filesystem, files: List[bytes], body: bytes
    ) -> None:
        lying = files[STREAK + 2]

        def lies(request: Request) -> bool:
            return request.name == "READ" and request.path == b"/home" + lying

        fault = server.arm(Fault("replace", lies, code=103, body=body))
        fs.readdir(b"/d")
        for path in files:
            assert is_right(fs, path)
        assert fault.fired.is_set()

    @pytest.mark.parametrize("data", [b"longer" * 500, b"shorter"])
    def test_another_client_changes_it_meanwhile(
        self, server: FakeServer, fs: Filesystem, files: List[bytes], data: bytes
    ) -> None:
        changing = files[STREAK + 2]

        def change() -> None:
            inode = server.at(b"/home" + changing)
            inode.data[:], inode.mtime = data, OLD + 1

        server.arm(
            Fault("hold", lambda r: r.name == "READ" and r.path == b"/home" + changing, then=change)
        ).release()
        fs.readdir(b"/d")
        for path in files:
            assert get(fs, path) == (data if path == changing else path * 100)
