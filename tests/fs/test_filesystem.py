"""What the mount promises (README, "Promises"), without FUSE: the file operations over a server that can fail in every way."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional

import pytest

from fs.conftest import START_S, Clock
from sftp.fake_server import FakeServer, Fault, named
from sftpmount.cache.blocks import BLOCK_BYTES
from sftpmount.cache.writeback import PASSES_MAX, REQUESTS_MAX
from sftpmount.control.state import Reporter
from sftpmount.errors import ConnectionLost, FsError, RemoteDirectoryError
from sftpmount.fs.filesystem import Filesystem, Handle
from sftpmount.sftp.remote import FSYNC
from support.process import wait_until

WAIT_S = 20.0
RW = os.O_RDWR
NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL
CUTS = ["cut before", "cut after"]
Mount = Callable[..., Filesystem]
MakeServer = Callable[..., FakeServer]


def noise(size: int) -> bytes:
    return os.urandom(size)


def put(fs: Filesystem, path: bytes, data: bytes) -> None:
    """A whole file, as a program writes it: create, write in pieces, close."""
    handle = fs.create(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for start in range(0, len(data), BLOCK_BYTES):
        fs.write(handle, data[start : start + BLOCK_BYTES], start)
    fs.flush(handle)
    fs.release(handle)


def get(fs: Filesystem, path: bytes) -> bytes:
    handle = fs.open(path, os.O_RDONLY)
    try:
        return read_all(fs, handle)
    finally:
        fs.release(handle)


def read_all(fs: Filesystem, handle: Handle) -> bytes:
    data = b""
    while True:
        piece = fs.read(handle, BLOCK_BYTES, len(data))
        if not piece:
            return data
        data += piece


def refused(act: Callable[[], object]) -> int:
    with pytest.raises(FsError) as caught:
        act()
    assert caught.value.errno is not None
    return caught.value.errno


def names(fs: Filesystem, path: bytes = b"/") -> List[bytes]:
    return sorted(name for name, _, _ in fs.readdir(path))


MAKING: Dict[str, Callable[[Filesystem], object]] = {
    "mkdir": lambda fs: fs.mkdir(b"/new", 0o755),
    "symlink": lambda fs: fs.symlink(b"target", b"/new"),
    "create": lambda fs: fs.release(fs.create(b"/new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)),
}


@pytest.mark.parametrize("name", MAKING)
def test_a_line_that_breaks_behind_the_answer_and_before_the_look(
    server: FakeServer, fs: Filesystem, name: str
) -> None:
    """What was answered is done: to do it again would say that the name is taken."""
    session = fs._remote.session()
    server.arm(Fault("cut before", named("LSTAT")))
    MAKING[name](fs)
    assert session.lost is not None and fs.getattr(b"/new").mode == server.at(b"/home/new").mode
    making = {
        "mkdir": ("MKDIR", 1),
        "symlink": ("SYMLINK", 1 + 2),  # in which order it wants to be asked comes first
        "create": ("OPEN", 2),
    }  # what is open is opened again
    assert server.count(making[name][0]) == making[name][1]


class TestIdleFiles:
    def test_little_is_known_of_many_that_are_closed(
        self, fs: Filesystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sftpmount.fs.files.IDLE_FILES_MAX", 3)
        paths = [b"/f%d" % number for number in range(8)]
        for path in paths:
            put(fs, path, path * 100)
        opened = fs.open(paths[0], os.O_RDONLY)
        for _ in range(2):
            for path in paths:
                assert get(fs, path) == path * 100
        known = [path for path in paths if fs._ns.get(path).file is not None]  # type: ignore[union-attr]
        assert known == [paths[0], *paths[-3:]]
        assert read_all(fs, opened) == paths[0] * 100
        fs.release(opened)


class TestReadAndWrite:
    @pytest.mark.parametrize(
        "size", [0, 1, 4095, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3 * BLOCK_BYTES, 1_000_001]
    )
    def test_what_was_written_is_there(self, server: FakeServer, fs: Filesystem, size: int) -> None:
        data = noise(size)
        put(fs, b"/f", data)
        assert server.disk(b"/home/f") == data
        assert get(fs, b"/f") == data
        assert fs.getattr(b"/f").size == size

    @pytest.mark.parametrize("size", [1, BLOCK_BYTES, 1_000_001])
    def test_what_another_wrote_is_read(self, server: FakeServer, fs: Filesystem, size: int) -> None:
        data = noise(size)
        server.make(b"/home/f", data)
        assert get(fs, b"/f") == data

    @pytest.mark.parametrize("limits", [(34000, 32768, 32768, 0), (4096, 1000, 1000, 0), (0, 0, 0, 0)])
    def test_servers_with_small_limits(self, make_server: MakeServer, mount: Mount, limits: Any) -> None:
        server = make_server(limits=limits, read_bytes_max=limits[1] or 32768)
        fs = mount(server)
        data = noise(300_001)
        put(fs, b"/f", data)
        assert server.disk(b"/home/f") == data
        server.make(b"/home/g", data)
        assert get(fs, b"/g") == data

    def test_reads_past_the_end(self, server: FakeServer, fs: Filesystem) -> None:
        server.make(b"/home/f", b"0123456789")
        handle = fs.open(b"/f", os.O_RDONLY)
        assert fs.read(handle, 100, 8) == b"89"
        assert fs.read(handle, 100, 10) == b""
        assert fs.read(handle, 1, 1 << 40) == b""
        assert fs.read(handle, 0, 0) == b""
        fs.release(handle)

    def test_holes_read_as_zeros(self, server: FakeServer, fs: Filesystem) -> None:
        handle = fs.create(b"/f", NEW, 0o644)
        fs.write(handle, b"tail", 3 * BLOCK_BYTES + 5)
        expected = bytes(3 * BLOCK_BYTES + 5) + b"tail"
        assert read_all(fs, handle) == expected
        fs.write(handle, b"mid", BLOCK_BYTES - 1)
        expected = expected[: BLOCK_BYTES - 1] + b"mid" + expected[BLOCK_BYTES + 2 :]
        assert read_all(fs, handle) == expected
        fs.flush(handle)
        assert read_all(fs, handle) == expected
        assert server.disk(b"/home/f") == expected
        fs.release(handle)

    def test_a_hole_behind_a_short_last_block(self, server: FakeServer, fs: Filesystem) -> None:
        server.make(b"/home/f", b"abc", mtime=int(START_S) - 100)
        handle = fs.open(b"/f", RW)
        assert read_all(fs, handle) == b"abc"
        fs.write(handle, b"x", 10)
        assert read_all(fs, handle) == b"abc" + bytes(7) + b"x"
        fs.write(handle, b"y", 2 * BLOCK_BYTES)
        assert fs.read(handle, 100, 0) == b"abc" + bytes(7) + b"x" + bytes(89)
        fs.flush(handle)
        assert fs.read(handle, 100, 0) == b"abc" + bytes(7) + b"x" + bytes(89)
        fs.release(handle)

    def test_overwriting_in_the_middle_keeps_the_rest(self, server: FakeServer, fs: Filesystem) -> None:
        data = bytearray(noise(500_000))
        server.make(b"/home/f", bytes(data))
        handle = fs.open(b"/f", RW)
        for offset, size in [(0, 10), (BLOCK_BYTES - 5, 10), (300_000, BLOCK_BYTES), (499_999, 1)]:
            piece = noise(size)
            fs.write(handle, piece, offset)
            data[offset : offset + size] = piece
            assert fs.read(handle, 4096, max(0, offset - 100)) == bytes(data[max(0, offset - 100) :][:4096])
        fs.flush(handle)
        assert server.disk(b"/home/f") == bytes(data)
        assert read_all(fs, handle) == bytes(data)
        fs.release(handle)

    def test_more_pieces_than_may_be_in_flight(self, server: FakeServer, fs: Filesystem) -> None:
        """A small file leaves in one packet, and for that nothing is waited for that has not left."""
        data = bytearray(6 * REQUESTS_MAX)
        handle = fs.create(b"/f", NEW, 0o644)
        for offset in range(0, len(data), 2):
            fs.write(handle, b"x", offset)
            data[offset] = ord("x")
        with ThreadPoolExecutor(1) as pool:
            flushing = pool.submit(fs.flush, handle)
            try:
                flushing.result(WAIT_S)
            finally:
                # Who waits for what never leaves is freed by the end of the session alone.
                if not flushing.done():
                    fs._remote.close()
        assert server.disk(b"/home/f") == bytes(data[:-1]) and not handle.file.unsafe
        fs.release(handle)

    def test_ten_kilobyte_writes_leave_in_large_requests(self, server: FakeServer, fs: Filesystem) -> None:
        """tar's block size: what is not whole yet waits, so that requests do not shrink to what the program writes."""
        data = noise(1 << 20)
        handle = fs.create(b"/f", NEW, 0o644)
        for start in range(0, len(data), 10240):
            fs.write(handle, data[start : start + 10240], start)
        fs.flush(handle)
        assert server.disk(b"/home/f") == data
        assert server.count("WRITE") <= 2 * (len(data) // BLOCK_BYTES)
        fs.release(handle)

    def test_a_second_reading_asks_for_nothing(self, server: FakeServer, fs: Filesystem) -> None:
        server.make(b"/home/f", noise(300_000), mtime=int(START_S) - 100)
        first = get(fs, b"/f")
        before = server.count("READ")
        assert get(fs, b"/f") == first
        assert server.count("READ") == before

    def test_a_small_cache_forgets_but_never_lies(self, server: FakeServer, mount: Mount) -> None:
        data = noise(20 * BLOCK_BYTES)
        server.make(b"/home/f", data, mtime=int(START_S) - 100)
        fs = mount(server, cache_bytes_max=4 * BLOCK_BYTES)
        handle = fs.open(b"/f", os.O_RDONLY)
        for _ in range(3):
            assert read_all(fs, handle) == data
        fs.release(handle)

    def test_parallel_readers_and_one_writer(self, server: FakeServer, fs: Filesystem) -> None:
        """Each block holds one byte value: a reader may see the old or the new block, never a mixture of one write."""
        blocks = 12
        server.make(b"/home/f", bytes(blocks * BLOCK_BYTES))
        wrong: List[object] = []
        done = threading.Event()

        def look(seed: int) -> None:
            handle = fs.open(b"/f", os.O_RDONLY)
            index = seed
            while not done.is_set():
                index = (index * 5 + 3) % blocks
                piece = fs.read(handle, BLOCK_BYTES, index * BLOCK_BYTES)
                if len(piece) != BLOCK_BYTES or len(set(piece[:: BLOCK_BYTES // 8])) > 1:
                    wrong.append((index, len(piece), set(piece)))
            fs.release(handle)

        threads = [threading.Thread(daemon=True, target=look, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        handle = fs.open(b"/f", RW)
        for value in range(1, 8):
            for index in range(blocks):
                fs.write(handle, bytes([value]) * BLOCK_BYTES, index * BLOCK_BYTES)
                last = fs.read(handle, 1, index * BLOCK_BYTES)
                assert last == bytes([value]), "our own last write is what we read"
            fs.fsync(handle)
        done.set()
        for thread in threads:
            thread.join(WAIT_S)
        fs.flush(handle)
        fs.release(handle)
        assert not wrong
        assert server.disk(b"/home/f") == bytes([7]) * blocks * BLOCK_BYTES


class TestOwnView:
    def test_dirty_bytes_show_through_every_handle(self, server: FakeServer, fs: Filesystem) -> None:
        server.make(b"/home/f", b"0123456789")
        writer, reader = fs.open(b"/f", RW), fs.open(b"/f", os.O_RDONLY)
        fs.write(writer, b"ab", 4)
        assert read_all(fs, reader) == b"0123ab6789"
        assert server.content(b"/home/f") == b"0123456789", "nothing needed to be sent yet"
        late = fs.open(b"/f", os.O_RDONLY)
        assert read_all(fs, late) == b"0123ab6789"
        fs.flush(writer)
        assert read_all(fs, reader) == read_all(fs, late) == b"0123ab6789"
        for handle in (writer, reader, late):
            fs.release(handle)

    def test_the_size_while_open_is_ours(self, server: FakeServer, fs: Filesystem) -> None:
        handle = fs.create(b"/f", NEW, 0o644)
        fs.write(handle, b"x" * 1000, 500)
        assert fs.getattr(b"/f").size == fs.getattr(None, handle).size == 1500
        assert {name: mode for name, _, mode in fs.readdir(b"/")}[b"f"]
        assert fs.getattr(b"/f").size == 1500, "a listing brought the server's size, ours is newer"
        fs.flush(handle)
        assert fs.getattr(b"/f").size == 1500
        fs.release(handle)
        assert fs.getattr(b"/f").size == 1500

    def test_random_reads_bring_little_more_than_they_ask_for(
        self, server: FakeServer, fs: Filesystem
    ) -> None:
        data = noise(64 * BLOCK_BYTES)
        server.make(b"/home/f", data, mtime=int(START_S) - 100)
        handle = fs.open(b"/f", os.O_RDONLY)
        fs.read(handle, 1, 40 * BLOCK_BYTES)  # a jump
        before = fs._remote.received_bytes
        places = [block * BLOCK_BYTES + 5000 for block in (60, 20, 50, 9, 33, 57, 1, 29, 12, 46)]
        for place in places:
            assert fs.read(handle, 4096, place) == data[place : place + 4096]
        assert fs._remote.received_bytes - before < len(places) * (4096 + 200)
        fs.release(handle)

    def test_a_late_answer_is_older_than_our_write(self, server: FakeServer, fs: Filesystem) -> None:
        """The server reads the block, we write, commit and let go of it, and only then does the old block arrive."""
        server.make(b"/home/f", b"o" * BLOCK_BYTES, mtime=int(START_S) - 100)
        handle = fs.open(b"/f", RW)
        fs.write(handle, b"n" * 10, 0)
        hold = server.arm(Fault("hold", named("READ")))
        got: List[bytes] = []
        looker = fs.open(b"/f", os.O_RDONLY)  # its READs have a lane of their own
        reader = threading.Thread(daemon=True, target=lambda: got.append(fs.read(looker, BLOCK_BYTES, 0)))
        reader.start()
        assert hold.fired.wait(WAIT_S)
        fs.fsync(handle)
        assert server.disk(b"/home/f")[:12] == b"n" * 10 + b"oo"
        hold.release()
        reader.join(WAIT_S)
        expected = b"n" * 10 + b"o" * (BLOCK_BYTES - 10)
        assert got == [expected], "the reader"
        assert fs.read(handle, BLOCK_BYTES, 0) == expected, "and who reads after it"
        fs.release(handle)
        fs.release(looker)

    def test_a_late_answer_to_a_small_read(self, server: FakeServer, fs: Filesystem) -> None:
        server.make(b"/home/f", b"o" * 40 * BLOCK_BYTES, mtime=int(START_S) - 100)
        handle = fs.open(b"/f", RW)
        at = 30 * BLOCK_BYTES
        fs.write(handle, b"n" * 10, at)
        hold = server.arm(Fault("hold", named("READ")))
        got: List[bytes] = []
        looker = fs.open(b"/f", os.O_RDONLY)  # its READs have a lane of their own
        reader = threading.Thread(daemon=True, target=lambda: got.append(fs.read(looker, 20, at)))
        reader.start()
        assert hold.fired.wait(WAIT_S)
        fs.fsync(handle)
        hold.release()
        reader.join(WAIT_S)
        assert got == [b"n" * 10 + b"o" * 10]
        assert fs.read(handle, 20, at) == b"n" * 10 + b"o" * 10
        fs.release(handle)
        fs.release(looker)

    def test_a_late_answer_after_a_truncation(self, server: FakeServer, fs: Filesystem) -> None:
        server.make(b"/home/f", b"o" * BLOCK_BYTES, mtime=int(START_S) - 100)
        handle = fs.open(b"/f", RW)
        hold = server.arm(Fault("hold", named("READ")))
        got: List[bytes] = []
        looker = fs.open(b"/f", os.O_RDONLY)  # its READs have a lane of their own
        reader = threading.Thread(daemon=True, target=lambda: got.append(fs.read(looker, BLOCK_BYTES, 0)))
        reader.start()
        assert hold.fired.wait(WAIT_S)
        fs.truncate(b"/f", 5, handle)
        fs.truncate(b"/f", 20, handle)
        hold.release()
        reader.join(WAIT_S)
        assert got[0] in (b"o" * BLOCK_BYTES, b"ooooo" + bytes(15))
        assert read_all(fs, handle) == b"ooooo" + bytes(15)
        fs.release(handle)
        fs.release(looker)

    def test_o_trunc_while_another_handle_is_dirty(self, server: FakeServer, fs: Filesystem) -> None:
        server.make(b"/home/f", b"old content")
        first = fs.open(b"/f", RW)
        fs.write(first, b"dirty", 0)
        second = fs.open(b"/f", RW | os.O_TRUNC)
        assert fs.getattr(b"/f").size == 0
        assert read_all(fs, first) == b""
        fs.write(second, b"new", 0)
        assert read_all(fs, first) == b"new"
        for handle in (first, second):
            fs.flush(handle)
            fs.release(handle)
        assert server.disk(b"/home/f") == b"new"

    def test_create_with_o_trunc_over_a_file_that_is_open_here(
        self, server: FakeServer, fs: Filesystem
    ) -> None:
        server.make(b"/home/f", b"old content")
        first = fs.open(b"/f", RW)
        assert read_all(fs, first) == b"old content"
        second = fs.create(b"/f", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        assert read_all(fs, first) == b""
        fs.write(second, b"new", 0)
        for handle in (first, second):
            fs.flush(handle)
            fs.release(handle)
        assert server.disk(b"/home/f") == b"new"
        assert get(fs, b"/f") == b"new"

    @pytest.mark.parametrize("size", [0, 1, 7, BLOCK_BYTES, BLOCK_BYTES + 7, 3 * BLOCK_BYTES])
    @pytest.mark.parametrize("by_handle", [True, False])
    def test_truncation_while_dirty(
        self, server: FakeServer, fs: Filesystem, size: int, by_handle: bool
    ) -> None:
        old = noise(2 * BLOCK_BYTES)
        server.make(b"/home/f", old)
        handle = fs.open(b"/f", RW)
        read_all(fs, handle)
        fs.write(handle, b"dirty", BLOCK_BYTES - 2)
        expected = old[: BLOCK_BYTES - 2] + b"dirty" + old[BLOCK_BYTES + 3 :]
        expected = expected[:size].ljust(size, b"\0")
        fs.truncate(b"/f", size, handle if by_handle else None)
        assert fs.getattr(b"/f").size == size
        assert read_all(fs, handle) == expected
        fs.truncate(b"/f", 3 * BLOCK_BYTES, handle)
        expected += bytes(3 * BLOCK_BYTES - size)
        assert read_all(fs, handle) == expected
        fs.flush(handle)
        fs.release(handle)
        assert server.content(b"/home/f") == expected
        assert get(fs, b"/f") == expected

    def test_hard_links_share_what_is_dirty(self, server: FakeServer, fs: Filesystem) -> None:
        put(fs, b"/a", b"content")
        fs.link(b"/a", b"/b")
        handle = fs.open(b"/a", RW)
        fs.write(handle, b"CON", 0)
        assert get(fs, b"/b") == b"CONtent"
        a, b = fs.getattr(b"/a"), fs.getattr(b"/b")
        assert a.ino == b.ino
        assert a.nlink == b.nlink == 2
        fs.flush(handle)
        fs.release(handle)
        fs.unlink(b"/a")
        assert fs.getattr(b"/b").nlink == 1
        assert get(fs, b"/b") == b"CONtent"


class TestCloseToOpen:
    """Promise 6: what another client stored before our open is what we read."""

    def change(self, server: FakeServer, data: bytes, at_s: float) -> None:
        inode = server.at(b"/home/f")
        inode.data[:] = data
        inode.disk = data
        inode.mtime = int(at_s)

    @pytest.mark.parametrize("data", [b"two", b"longer", b""])
    def test_the_next_open_sees_it(
        self, server: FakeServer, fs: Filesystem, clock: Clock, data: bytes
    ) -> None:
        server.make(b"/home/f", b"one", mtime=int(START_S) - 100)
        assert get(fs, b"/f") == b"one"
        clock.s += 1
        self.change(server, data, clock.s)
        assert get(fs, b"/f") == data
        assert fs.getattr(b"/f").size == len(data)

    def test_two_changes_within_one_second(self, server: FakeServer, fs: Filesystem, clock: Clock) -> None:
        """Times are whole seconds: what was read in the very second of its change is not believed at the next open."""
        server.make(b"/home/f", b"one", mtime=int(clock.s))
        assert get(fs, b"/f") == b"one"
        self.change(server, b"two", clock.s)
        assert get(fs, b"/f") == b"two"

    def test_a_replaced_file(self, server: FakeServer, fs: Filesystem, clock: Clock) -> None:
        server.make(b"/home/f", b"one", mtime=int(START_S) - 100)
        assert get(fs, b"/f") == b"one"
        server.make(b"/home/f", b"two", mtime=int(START_S) - 50)
        assert get(fs, b"/f") == b"two"

    def test_what_we_wrote_and_another_changed(
        self, server: FakeServer, fs: Filesystem, clock: Clock
    ) -> None:
        put(fs, b"/f", b"ours")
        clock.s += 10
        self.change(server, b"them", clock.s)
        assert get(fs, b"/f") == b"them"

    def test_a_change_under_an_open_handle_is_stale_and_never_a_mixture(
        self, server: FakeServer, fs: Filesystem, clock: Clock
    ) -> None:
        server.make(b"/home/f", b"1" * 100 * BLOCK_BYTES, mtime=int(START_S) - 100)
        handle = fs.open(b"/f", os.O_RDONLY)
        assert fs.read(handle, 10, 0) == b"1" * 10
        clock.s += 100
        self.change(server, b"2" * 100 * BLOCK_BYTES, clock.s)
        try:
            seen = fs.read(handle, 10, 90 * BLOCK_BYTES)
        except FsError as error:
            assert error.errno == errno.ESTALE
        else:
            assert seen == b"1" * 10
        fs.release(handle)

    def test_nor_when_it_is_opened_anew_meanwhile(
        self, server: FakeServer, fs: Filesystem, clock: Clock
    ) -> None:
        server.make(b"/home/f", b"1" * 100 * BLOCK_BYTES, mtime=int(START_S) - 100)
        handle = fs.open(b"/f", os.O_RDONLY)
        assert fs.read(handle, 10, 0) == b"1" * 10
        clock.s += 100
        self.change(server, b"2" * 100 * BLOCK_BYTES, clock.s)
        fresh = fs.open(b"/f", os.O_RDONLY)
        assert fs.read(fresh, 10, 0) == b"2" * 10
        try:
            seen = fs.read(handle, 10, 90 * BLOCK_BYTES)
        except FsError as error:
            assert error.errno == errno.ESTALE
        else:
            assert seen == b"1" * 10
        fs.release(handle)
        fs.release(fresh)

    def test_a_file_cut_short_under_an_open_handle(
        self, server: FakeServer, fs: Filesystem, clock: Clock
    ) -> None:
        server.make(b"/home/f", b"1" * 100 * BLOCK_BYTES, mtime=int(START_S) - 100)
        handle = fs.open(b"/f", os.O_RDONLY)
        clock.s += 100
        self.change(server, b"22", clock.s)
        assert refused(lambda: fs.read(handle, 10, 0)) == errno.ESTALE
        fs.release(handle)

    def test_attributes_live_as_long_as_the_lease(
        self, server: FakeServer, fs: Filesystem, clock: Clock
    ) -> None:
        server.make(b"/home/f", b"one", mtime=1000)
        assert fs.getattr(b"/f").mtime == 1000
        self.change(server, b"longer", 2000)
        clock.s += 19
        assert fs.getattr(b"/f").mtime == 1000
        clock.s += 2
        assert (fs.getattr(b"/f").mtime, fs.getattr(b"/f").size) == (2000, 6)

    def test_without_leases_everything_is_asked(self, server: FakeServer, mount: Mount) -> None:
        fs = mount(server, dir_cache_timeout_s=0)
        server.make(b"/home/f", b"one", mtime=1000)
        assert fs.getattr(b"/f").mtime == 1000
        assert names(fs) == [b"f"]
        server.make(b"/home/f", b"two", mtime=2000)
        server.make(b"/home/g")
        assert fs.getattr(b"/f").mtime == 2000
        assert names(fs) == [b"f", b"g"]
        assert fs.getattr(b"/g").size == 0

    def test_locks_are_never_answered_from_a_lease(self, server: FakeServer, fs: Filesystem) -> None:
        assert names(fs) == []
        server.make(b"/home/lock")
        server.make_dir(b"/home/dir")
        assert refused(lambda: fs.create(b"/lock", NEW, 0o644)) == errno.EEXIST
        assert refused(lambda: fs.mkdir(b"/dir", 0o755)) == errno.EEXIST
        assert fs.getattr(b"/lock").size == 0, "what was refused is looked at anew"
        assert names(fs) == [b"dir", b"lock"]

    def test_a_file_of_another_opens_though_the_lease_says_it_is_not_there(
        self, server: FakeServer, fs: Filesystem
    ) -> None:
        assert names(fs) == []
        server.make(b"/home/f", b"theirs")
        assert get(fs, b"/f") == b"theirs"


class TestStickyErrors:
    """Promise 2: errors are told where they belong, to every handle, and a file whose write failed never passes for whole."""

    def full(self, server: FakeServer, times: int = 1_000_000) -> Fault:
        return server.arm(Fault("status", named("WRITE"), message="No space left on device", times=times))

    @pytest.mark.parametrize("message", ["No space left on device", "Failure"])
    @pytest.mark.parametrize("tell", ["flush", "fsync"])
    def test_no_space(self, server: FakeServer, fs: Filesystem, message: str, tell: str) -> None:
        handle = fs.create(b"/f", NEW, 0o644)
        server.arm(Fault("status", named("WRITE"), message=message, times=1_000_000))
        if message == "Failure":
            server.free_bytes = 0
        fs.write(handle, b"abc", 0)
        assert refused(lambda: getattr(fs, tell)(handle)) == errno.ENOSPC
        assert fs.getattr(b"/f").size == 0, "the server's size"
        fs.release(handle)
        assert fs.getattr(b"/f").size == 0
        assert fs.files.held_bytes == 0
        assert get(fs, b"/f") == b""

    def test_the_write_after_it_is_told(self, server: FakeServer, fs: Filesystem) -> None:
        handle = fs.create(b"/f", NEW, 0o644)
        fault = self.full(server)
        fs.write(handle, bytes(2 * BLOCK_BYTES), 0)  # enough for a full request leaves at once
        assert fault.fired.wait(WAIT_S)
        wait_until(lambda: handle.file.failure is not None, WAIT_S, "the refusal")
        assert refused(lambda: fs.write(handle, b"x", 2 * BLOCK_BYTES)) == errno.ENOSPC
        fs.release(handle)

    def test_the_close_tells_it_again_while_it_lasts(self, server: FakeServer, fs: Filesystem) -> None:
        handle = fs.create(b"/f", NEW, 0o644)
        self.full(server)
        fs.write(handle, b"abc", 0)
        assert refused(lambda: fs.fsync(handle)) == errno.ENOSPC
        assert refused(lambda: fs.fsync(handle)) == errno.ENOSPC
        assert refused(lambda: fs.flush(handle)) == errno.ENOSPC
        fs.release(handle)

    def test_it_recovers_when_there_is_room_again(self, server: FakeServer, fs: Filesystem) -> None:
        handle = fs.create(b"/f", NEW, 0o644)
        self.full(server)
        data = noise(3 * BLOCK_BYTES + 100)
        fs.write(handle, data[:100], 0)
        assert refused(lambda: fs.fsync(handle)) == errno.ENOSPC
        server.disarm()
        fs.write(handle, data[100:], 100)
        assert read_all(fs, handle) == data
        fs.flush(handle)
        assert server.disk(b"/home/f") == data
        assert fs.getattr(b"/f").size == len(data)
        fs.release(handle)

    def test_one_bad_write_in_the_middle(self, server: FakeServer, fs: Filesystem) -> None:
        """The bytes behind it are stored, the file has a hole: that must not pass for whole."""
        handle = fs.create(b"/f", NEW, 0o644)
        self.full(server, times=1)
        data = noise(5 * BLOCK_BYTES)
        told = []
        for start in range(0, len(data), BLOCK_BYTES):
            try:
                fs.write(handle, data[start : start + BLOCK_BYTES], start)
            except FsError as error:
                told.append(error.errno)
        try:
            fs.flush(handle)
        except FsError as error:
            told.append(error.errno)
        assert told == [errno.ENOSPC]
        fs.fsync(handle)  # the retry: now there is room
        stored = server.disk(b"/home/f")
        assert stored[:BLOCK_BYTES] == data[:BLOCK_BYTES]
        fs.release(handle)

    def test_every_handle_hears_of_it_once(self, server: FakeServer, fs: Filesystem) -> None:
        first = fs.create(b"/f", NEW, 0o644)
        second = fs.open(b"/f", RW)
        self.full(server)
        fs.write(first, b"abc", 0)
        assert refused(lambda: fs.fsync(first)) == errno.ENOSPC
        server.disarm()
        fs.fsync(first)
        assert server.disk(b"/home/f") == b"abc"
        assert refused(lambda: fs.flush(second)) == errno.ENOSPC, "it was open when it happened"
        fs.flush(second)
        third = fs.open(b"/f", RW)
        fs.flush(third)
        for handle in (first, second, third):
            fs.release(handle)

    def test_a_failed_fsync_means_that_nothing_is_known(self, server: FakeServer, fs: Filesystem) -> None:
        handle = fs.create(b"/f", NEW, 0o644)
        server.arm(Fault("status", named("fsync"), message="Input/output error"))
        data = noise(2 * BLOCK_BYTES)
        fs.write(handle, data, 0)
        assert refused(lambda: fs.fsync(handle)) == errno.EIO
        server.crash()
        fs.fsync(handle)
        assert server.disk(b"/home/f") == data, "sent again, not believed to be there"
        fs.release(handle)

    def test_the_file_given_up_is_the_servers(self, server: FakeServer, fs: Filesystem) -> None:
        server.make(b"/home/f", b"old content", mtime=int(START_S) - 100)
        handle = fs.open(b"/f", RW)
        read_all(fs, handle)
        self.full(server)
        fs.write(handle, b"NEW", 0)
        assert refused(lambda: fs.flush(handle)) == errno.ENOSPC
        fs.release(handle)
        server.disarm()
        assert get(fs, b"/f") == b"old content"
        assert fs.getattr(b"/f").size == 11
        assert fs.drain() == []

    def test_another_file_is_not_concerned(self, server: FakeServer, fs: Filesystem) -> None:
        bad = fs.create(b"/bad", NEW, 0o644)
        server.arm(Fault("status", lambda r: r.name == "WRITE" and r.path == b"/home/bad", times=100))
        fs.write(bad, bytes(BLOCK_BYTES), 0)
        put(fs, b"/good", b"content")
        assert server.disk(b"/home/good") == b"content"
        assert refused(lambda: fs.flush(bad))
        fs.release(bad)

    def test_drain_tells_what_could_not_be_stored(self, server: FakeServer, fs: Filesystem) -> None:
        good, bad = fs.create(b"/good", NEW, 0o644), fs.create(b"/bad", NEW, 0o644)
        server.arm(
            Fault(
                "status",
                lambda r: r.name == "WRITE" and r.path == b"/home/bad",
                message="Disk quota exceeded",
                times=100,
            )
        )
        fs.write(good, b"abc", 0)
        fs.write(bad, b"abc", 0)
        (line,) = fs.drain()
        assert line.startswith("/bad: ")
        assert "quota" in line.lower()
        assert server.disk(b"/home/good") == b"abc"
        fs.release(good)
        fs.release(bad)

    def test_status_names_the_file_and_why_until_it_is_stored(
        self, server: FakeServer, fs: Filesystem
    ) -> None:
        bad = fs.create(b"/bad", NEW, 0o644)
        server.arm(Fault("status", lambda r: r.name == "WRITE", message="Disk quota exceeded", times=100))
        fs.write(bad, b"abc", 0)
        assert refused(lambda: fs.flush(bad)) == errno.EDQUOT
        unstored = fs.state()["unstored"]
        (file,) = unstored["files"]
        assert (file["path"], file["error"]) == ("/bad", "Disk quota exceeded")
        assert file["dirty_bytes"] == unstored["unstored_bytes"] == 3
        report = Reporter({"mountpoint": "/mnt"}, fs._remote, fs).state()
        assert report["problems"] == ["/bad is not stored: Disk quota exceeded"] and not report["healthy"]
        server.disarm()
        assert fs.sync() == [] and fs.state()["unstored"]["files"] == []
        assert fs.files.acknowledged_bytes == 3
        fs.release(bad)


class TestUnreachable:
    def test_what_a_close_could_not_store_is_told_and_then_forgotten(
        self, server: FakeServer, mount: Mount
    ) -> None:
        """After ETIMEDOUT and the last close nothing is ours any more: the file is as the server has it, and no memory leaks."""
        fs = mount(server, retry_timeout_s=0.2)
        server.make(b"/home/f", b"old content", mtime=int(START_S) - 100)
        handle = fs.open(b"/f", RW)
        server.down = True
        server.cut()
        fs.write(handle, b"NEW", 0)
        assert refused(lambda: fs.flush(handle)) in (errno.ETIMEDOUT, errno.EIO)
        fs.release(handle)
        wait_until(lambda: handle.node.pins == 0, WAIT_S, "the release")
        server.down = False
        wait_until(lambda: fs._remote.connected, WAIT_S, "the reconnect")
        assert fs.files.held_bytes == 0
        assert fs.getattr(b"/f").size == 11
        assert get(fs, b"/f") == b"old content"
        again = fs.open(b"/f", RW)
        fs.write(again, b"x", 10)
        fs.flush(again)
        fs.release(again)
        assert server.disk(b"/home/f") == b"old contenx"

    def test_while_it_is_open_the_bytes_are_kept(self, server: FakeServer, mount: Mount) -> None:
        fs = mount(server, retry_timeout_s=0.2)
        handle = fs.create(b"/f", NEW, 0o644)
        server.down = True
        server.cut()
        fs.write(handle, b"abc", 0)
        assert refused(lambda: fs.fsync(handle)) in (errno.ETIMEDOUT, errno.EIO)
        server.down = False
        wait_until(lambda: fs._remote.connected, WAIT_S, "the reconnect")
        fs.fsync(handle)
        assert server.disk(b"/home/f") == b"abc"
        fs.release(handle)

    def test_it_is_never_an_empty_or_missing_one(
        self, server: FakeServer, mount: Mount, clock: Clock
    ) -> None:
        fs = mount(server, retry_timeout_s=0.1)
        server.make(b"/home/f", b"abc")
        assert names(fs) == [b"f"]
        server.down = True
        server.cut()
        clock.s += 1000
        timed_out = (errno.ETIMEDOUT, errno.EIO)
        for act in (
            lambda: fs.readdir(b"/"),
            lambda: fs.getattr(b"/f"),
            lambda: fs.getattr(b"/none"),
            lambda: fs.open(b"/f", os.O_RDONLY),
            lambda: fs.create(b"/g", NEW, 0o644),
            lambda: fs.unlink(b"/f"),
            lambda: fs.statfs(),
        ):
            assert refused(act) in timed_out
        server.down = False
        wait_until(lambda: fs._remote.connected, WAIT_S, "the reconnect")
        assert names(fs) == [b"f"]

    def test_programs_wait_and_go_on(self, server: FakeServer, fs: Filesystem) -> None:
        data = noise(10 * BLOCK_BYTES)
        server.down = True
        server.cut()
        writer = threading.Thread(daemon=True, target=put, args=(fs, b"/f", data))
        writer.start()
        wait_until(lambda: server.dials >= 3, WAIT_S, "attempts to reconnect")
        server.down = False
        writer.join(WAIT_S)
        assert server.disk(b"/home/f") == data

    def test_dirty_bytes_are_bounded_while_nobody_answers(self, server: FakeServer, mount: Mount) -> None:
        fs = mount(server, retry_timeout_s=0.2, dirty_bytes_max=1 << 20)
        handle = fs.create(b"/f", NEW, 0o644)
        server.down = True
        server.cut()
        codes = set()
        for index in range(24):
            try:
                fs.write(handle, bytes(BLOCK_BYTES), index * BLOCK_BYTES)
            except FsError as error:
                codes.add(error.errno)
                break
            assert fs.files.held_bytes <= (1 << 20) + BLOCK_BYTES
        assert codes <= {errno.ETIMEDOUT, errno.EIO}
        assert codes, "the writer was never told"
        fs.release(handle)
        wait_until(lambda: handle.node.pins == 0, WAIT_S, "the release")


# A program's work on one file, and what the file then holds.
OLD = bytes(range(256)) * 600  # 153,600 bytes: more than a block
FRESH = bytes(reversed(range(256))) * 1100


def _create(fs: Filesystem) -> None:
    put(fs, b"/new", FRESH)


def _rewrite(fs: Filesystem) -> None:
    handle = fs.open(b"/f", os.O_WRONLY | os.O_TRUNC)
    fs.write(handle, FRESH[:1000], 0)
    fs.flush(handle)
    fs.release(handle)


def _patch(fs: Filesystem) -> None:
    handle = fs.open(b"/f", RW)
    fs.write(handle, b"patch", 100_000)
    assert fs.read(handle, 5, 100_000) == b"patch"
    fs.fsync(handle)
    fs.write(handle, b"again", 99_998)
    fs.flush(handle)
    fs.release(handle)


def _append(fs: Filesystem) -> None:
    handle = fs.open(b"/f", os.O_WRONLY)
    for i in range(5):
        fs.write(handle, b"line\n", len(OLD) + 5 * i)
    fs.flush(handle)
    fs.release(handle)


def _shorten(fs: Filesystem) -> None:
    handle = fs.open(b"/f", RW)
    fs.truncate(b"/f", 10, handle)
    fs.write(handle, b"x", 20)
    fs.flush(handle)
    fs.release(handle)


def _shorten_only(fs: Filesystem) -> None:
    handle = fs.open(b"/f", RW)
    fs.truncate(b"/f", 10, handle)
    fs.flush(handle)
    fs.release(handle)


def _empty(fs: Filesystem) -> None:
    handle = fs.open(b"/f", os.O_WRONLY | os.O_TRUNC)
    fs.flush(handle)
    fs.release(handle)


def _extend(fs: Filesystem) -> None:
    handle = fs.open(b"/f", RW)
    fs.truncate(b"/f", len(OLD) + 1000, handle)
    fs.write(handle, b"x", 0)
    fs.flush(handle)
    fs.release(handle)


def _rename_open(fs: Filesystem) -> None:
    handle = fs.create(b"/tmp", NEW, 0o644)
    fs.write(handle, FRESH, 0)
    fs.rename(b"/tmp", b"/f")
    fs.write(handle, b"more", len(FRESH))
    fs.flush(handle)
    fs.release(handle)


def _replace(fs: Filesystem) -> None:
    put(fs, b"/tmp", FRESH)
    fs.rename(b"/tmp", b"/f")


def _known(work: Callable[[Filesystem], None]) -> Callable[[Filesystem], None]:
    def looked_up(fs: Filesystem) -> None:
        assert fs.getattr(b"/f").size == len(OLD)
        work(fs)

    return looked_up


WORK: Dict[str, Any] = {
    "create": (_create, {b"f": OLD, b"new": FRESH}),
    "rewrite": (_rewrite, {b"f": FRESH[:1000]}),
    "patch": (_patch, {b"f": OLD[:99_998] + b"again" + b"ch" + OLD[100_005:]}),
    "append": (_append, {b"f": OLD + b"line\n" * 5}),
    "shorten and write": (_shorten, {b"f": OLD[:10] + bytes(10) + b"x"}),
    "shorten": (_shorten_only, {b"f": OLD[:10]}),
    "empty": (_empty, {b"f": b""}),
    "rewrite, looked up before": (_known(_rewrite), {b"f": FRESH[:1000]}),
    "empty, looked up before": (_known(_empty), {b"f": b""}),
    "extend": (_extend, {b"f": b"x" + OLD[1:] + bytes(1000)}),
    "rename while open": (_rename_open, {b"f": FRESH + b"more"}),
    "replace": (_replace, {b"f": FRESH}),
}


class Interrupted:
    """A filesystem to which something happens before its k-th call."""

    def __init__(self, fs: Filesystem, k: int, happens: Callable[[], None]) -> None:
        self._fs = fs
        self.left = k
        self._happens = happens

    def __getattr__(self, name: str) -> Any:
        self.left -= 1
        if self.left == 0:
            self._happens()
        return getattr(self._fs, name)


class TestLoss:
    """Promises 1 and 4: through a cut at any request, with or without a reboot that forgets, close() means stored."""

    @pytest.mark.parametrize("forgets", [False, True], ids=["keeps", "forgets"])
    @pytest.mark.parametrize("cut", CUTS)
    @pytest.mark.parametrize("name", WORK)
    def test_cut_at_every_request(
        self, make_server: MakeServer, mount: Mount, name: str, cut: str, forgets: bool
    ) -> None:
        work, expected = WORK[name]
        for k in range(1, 60):
            server = make_server()
            server.make(b"/home/f", OLD, mtime=int(START_S) - 100)
            fs = mount(server, lanes=1)
            fault = server.arm(Fault(cut, first=k, then=server.forget if forgets else None))
            error: Optional[FsError] = None
            try:
                work(fs)
            except FsError as refusal:
                error = refusal
            disks = {path: server.disk(b"/home/" + path) for path in server.tree()}
            if error is not None:
                # Only an exclusive create may say that it does not know.
                assert error.errno == errno.EEXIST, f"cut at request {k}: {error}"
                assert name == "rename while open"
            else:
                assert {path: len(data) for path, data in disks.items()} == {
                    path: len(data) for path, data in expected.items()
                }, f"cut at request {k}"
                assert disks == expected, f"cut at request {k}"
                assert server.tree() == expected
            if not fault.fired.is_set():
                assert k > 2
                return
        raise AssertionError("never passes uncut")

    @pytest.mark.parametrize("name", WORK)
    def test_crash_behind_every_request(self, make_server: MakeServer, mount: Mount, name: str) -> None:
        """The request is carried out, answered, and then the power fails."""
        work, expected = WORK[name]
        for k in range(1, 60):
            server = make_server()
            server.make(b"/home/f", OLD, mtime=int(START_S) - 100)
            fs = mount(server, lanes=1)
            # It strikes when the next request comes, before that is carried out: then k - 1 replies were heard.
            fault = server.arm(Fault("cut before", first=k, then=server.forget))
            try:
                work(fs)
            except FsError as error:
                assert (name, error.errno) == (
                    "rename while open",
                    errno.EEXIST,
                )  # an exclusive create may not know
                continue
            disks = {path: server.disk(b"/home/" + path) for path in server.tree()}
            assert {path: len(data) for path, data in disks.items()} == {
                path: len(data) for path, data in expected.items()
            }, f"crashed at request {k}"
            assert disks == expected, f"crashed at request {k}"
            if not fault.fired.is_set():
                return
        raise AssertionError("never passes uncut")

    @pytest.mark.parametrize("reconnected", [False, True])
    @pytest.mark.parametrize("how", ["cut", "crash"])
    @pytest.mark.parametrize("name", WORK)
    def test_loss_between_any_two_calls(
        self, make_server: MakeServer, mount: Mount, name: str, how: str, reconnected: bool
    ) -> None:
        """Nothing is in flight when the connection ends: that must be noticed all the same."""
        work, expected = WORK[name]
        for k in range(1, 30):
            server = make_server()
            server.make(b"/home/f", OLD, mtime=int(START_S) - 100)
            fs = mount(server)

            def happens(server: FakeServer = server, fs: Filesystem = fs) -> None:
                getattr(server, how)()
                if reconnected:
                    wait_until(lambda: fs._remote.reconnects == 1, WAIT_S, "the reconnect")

            calls = Interrupted(fs, k, happens)
            work(calls)
            disks = {path: server.disk(b"/home/" + path) for path in server.tree()}
            assert {path: len(data) for path, data in disks.items()} == {
                path: len(data) for path, data in expected.items()
            }, f"lost before call {k}"
            assert disks == expected, f"lost before call {k}"
            assert server.tree() == expected
            if calls.left > 0:
                return
        raise AssertionError("never passes uninterrupted")

    @pytest.mark.parametrize("commit", ["close", "fsync"])
    def test_what_was_not_committed_is_sent_again(
        self, server: FakeServer, mount: Mount, commit: str
    ) -> None:
        fs = mount(server, commit=commit)
        handle = fs.create(b"/f", NEW, 0o644)
        data = noise(4 * BLOCK_BYTES)
        fs.write(handle, data, 0)
        wait_until(lambda: len(server.content(b"/home/f")) > BLOCK_BYTES, WAIT_S, "bytes at the server")
        wait_until(lambda: not handle.file.in_flight, WAIT_S, "the acknowledgements")
        server.crash()
        assert server.content(b"/home/f") == b""
        fs.fsync(handle)
        assert server.disk(b"/home/f") == data
        fs.release(handle)

    def test_an_fsync_that_could_not_be_sent_is_forgotten(self, server: FakeServer, fs: Filesystem) -> None:
        """The connection ends between the last look at it and the request."""
        handle = fs.create(b"/f", NEW, 0o644)
        fs.write(handle, b"abc", 0)
        original = fs._remote.fsync_soon

        def fails_once(file: Any, session: Any, callback: Any) -> None:
            fs._remote.fsync_soon = original  # type: ignore[method-assign]
            session.abort(ConnectionLost("reset"))
            raise ConnectionLost("reset")

        fs._remote.fsync_soon = fails_once  # type: ignore[method-assign]
        fs.fsync(handle)
        assert server.disk(b"/home/f") == b"abc" and fs._remote.reconnects == 1
        assert not handle.file.commits
        fs.release(handle)

    def test_commit_fsync_leaves_close_quick_and_commits_behind_it(
        self, server: FakeServer, mount: Mount
    ) -> None:
        fs = mount(server, commit="fsync")
        handle = fs.create(b"/f", NEW, 0o644)
        fs.write(handle, b"abc", 0)
        hold = server.arm(Fault("hold", named("fsync")))
        fs.flush(handle)
        assert server.content(b"/home/f") == b"abc", "close still means received"
        fs.release(handle)
        assert hold.fired.wait(WAIT_S), "the last close commits in the background"
        hold.release()
        wait_until(lambda: handle.node.pins == 0, WAIT_S, "the release")
        assert server.disk(b"/home/f") == b"abc"

    def test_fsync_covers_what_other_handles_wrote(self, server: FakeServer, fs: Filesystem) -> None:
        writer, reader = fs.create(b"/f", NEW, 0o644), fs.open(b"/f", os.O_RDONLY)
        fs.write(writer, b"abc", 0)
        fs.fsync(reader)
        assert server.disk(b"/home/f") == b"abc"
        fs.release(writer)
        fs.release(reader)

    def test_fsync_of_a_directory_covers_the_files_in_it(self, server: FakeServer, fs: Filesystem) -> None:
        fs.mkdir(b"/d", 0o755)
        handle = fs.create(b"/d/f", NEW, 0o644)
        fs.write(handle, b"abc", 0)
        fs.fsyncdir(b"/d")
        assert server.disk(b"/home/d/f") == b"abc"
        fs.release(handle)

    @pytest.mark.parametrize("commit", ["close", "fsync"])
    def test_a_server_that_forgot_a_cut_does_not_fill_our_holes(
        self, server: FakeServer, mount: Mount, commit: str
    ) -> None:
        """Until the cut is made again, the old bytes stand where the program left a hole."""
        server.make(b"/home/f", OLD, mtime=int(START_S) - 100)
        fs = mount(server, commit=commit)
        handle = fs.open(b"/f", RW | os.O_TRUNC)
        fs.write(handle, b"x", 50_000)
        server.crash()
        wait_until(lambda: fs._remote.reconnects == 1, WAIT_S, "the reconnect")
        expected = bytes(50_000) + b"x"
        assert read_all(fs, handle) == expected
        fs.fsync(handle)
        assert read_all(fs, handle) == expected
        assert server.disk(b"/home/f") == expected
        fs.release(handle)
        assert get(fs, b"/f") == expected

    @pytest.mark.parametrize("step", ["write_soon", "fsync_soon", "fstat_soon"])
    def test_another_handle_is_released_while_its_file_is_stored(
        self, server: FakeServer, fs: Filesystem, step: str
    ) -> None:
        """A release comes when it likes. Write-back borrows any handle of the file: a borrowed one that goes is no failure."""
        first = fs.create(b"/f", NEW, 0o644)
        second = fs.open(b"/f", RW)
        fs.write(second, b"abc", 0)
        original = getattr(fs._remote, step)
        borrowed: List[Any] = []

        def overtaken(file: Any, *arguments: Any) -> Any:
            if not borrowed:
                borrowed.append(file)
                fs.files._release(first)
            return original(file, *arguments)

        setattr(fs._remote, step, overtaken)
        fs.flush(second)
        assert borrowed
        assert server.disk(b"/home/f") == b"abc"
        fs.fsync(second)
        fs.release(second)

    def test_an_fsync_that_overtakes_a_write_does_not_vouch_for_it(
        self, server: FakeServer, fs: Filesystem
    ) -> None:
        """Another thread has taken the request, and is stopped before it sends it."""
        handle = fs.create(b"/f", NEW, 0o644)
        fs.write(handle, b"abc", 0)
        taken, go_on = threading.Event(), threading.Event()
        original = fs._remote.write_soon

        def slow(*arguments: Any) -> None:
            taken.set()
            assert go_on.wait(WAIT_S)
            original(*arguments)

        fs._remote.write_soon = slow  # type: ignore[method-assign]
        sender = threading.Thread(target=fs.files._writeback._send_on, args=(handle.file,))
        sender.start()
        assert taken.wait(WAIT_S)
        fsync = threading.Thread(target=fs.fsync, args=(handle,))
        fsync.start()
        fsync.join(0.3)
        assert fsync.is_alive() and server.count("fsync") == 0, "it waits for the write to leave"
        go_on.set()
        sender.join(WAIT_S)
        fsync.join(WAIT_S)
        assert server.disk(b"/home/f") == b"abc"
        fs.release(handle)

    def test_an_fsync_does_not_succeed_because_the_writer_gave_up(
        self, server: FakeServer, mount: Mount
    ) -> None:
        """A reader waits in fsync while the only writer goes, and its bytes with it."""
        fs = mount(server, commit="fsync")
        writer, reader = fs.create(b"/f", NEW, 0o644), fs.open(b"/f", os.O_RDONLY)
        fs.write(writer, b"abc", 0)
        original = fs.files._writeback._flush_on

        def overtaken(*arguments: Any) -> Any:
            if writer.remote in writer.file.writers:
                fs.files._release(writer)
            return original(*arguments)

        fs.files._writeback._flush_on = overtaken  # type: ignore[method-assign]
        assert refused(lambda: fs.fsync(reader)) == errno.EIO
        fs.release(reader)

    def test_a_flush_ends_though_its_bytes_are_written_again_and_again(
        self, server: FakeServer, fs: Filesystem
    ) -> None:
        handle = fs.create(b"/f", NEW, 0o644)
        fs.write(handle, b"0" * 8, 0)
        original = fs._remote.fstat_soon
        turns = itertools.count(1)

        def written_again(*arguments: Any) -> Any:
            fs.write(handle, b"%d" % (next(turns) % 10) * 8, 0)
            return original(*arguments)

        fs._remote.fstat_soon = written_again  # type: ignore[method-assign]
        fs.fsync(handle)
        assert server.disk(b"/home/f") in [b"%d" % n * 8 for n in range(10)]
        fs._remote.fstat_soon = original  # type: ignore[method-assign]
        fs.release(handle)

    @pytest.mark.parametrize("name", ["WRITE", "fsync"])
    def test_a_server_whose_replies_make_no_sense(
        self, server: FakeServer, fs: Filesystem, name: str
    ) -> None:
        """It is cut off each time: to ask again and again on the same session would end in a success that is none."""
        handle = fs.create(b"/f", NEW, 0o644)
        server.arm(Fault("wrong type", named(name), times=3))
        fs.write(handle, b"abc", 0)
        fs.fsync(handle)
        assert not handle.file.unsafe and fs._remote.reconnects == 3
        assert server.disk(b"/home/f") == b"abc"
        fs.release(handle)

    def test_setbacks_do_not_count_as_passes(
        self, server: FakeServer, fs: Filesystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was acknowledged is dirty again, since an fsync of another handle was refused: it is sent until it is stored."""
        handle = fs.create(b"/f", NEW, 0o644)
        fs.write(handle, b"abc", 0)
        ask, turns = fs._remote.fstat_soon, itertools.count(1)

        def asked(*arguments: Any) -> Any:
            looking = ask(*arguments)

            def wait() -> None:
                looking.wait()
                if next(turns) <= 2 * PASSES_MAX:
                    with handle.file.lock:
                        handle.file.resend()

            return SimpleNamespace(wait=wait, attrs=looking.attrs)

        monkeypatch.setattr(fs._remote, "fstat_soon", asked)
        fs.files._writeback.flush(handle.file, commit=False)
        assert not handle.file.dirty and server.count("WRITE") == 2 * PASSES_MAX + 1
        fs.release(handle)

    def test_two_handles_that_go_at_once_do_not_leave_the_bytes_to_each_other(
        self, server: FakeServer, mount: Mount
    ) -> None:
        fs = mount(server, commit="fsync")
        first, second = fs.create(b"/f", NEW, 0o644), fs.open(b"/f", RW)
        fs.write(first, b"abc", 0)
        together = threading.Barrier(2)
        original = fs.files._release_last

        def at_once(handle: Handle) -> None:
            together.wait(WAIT_S)
            original(handle)

        release, both_flushed = fs.files._release, threading.Barrier(2)

        def after_both(handle: Handle) -> None:
            both_flushed.wait(WAIT_S)
            release(handle)

        fs.files._release_last = at_once  # type: ignore[method-assign]
        fs.files._release = after_both  # type: ignore[method-assign]
        fs.release(first)
        fs.release(second)
        assert fs.drain() == []
        assert server.disk(b"/home/f") == b"abc"

    def test_an_older_answer_is_not_taken_for_the_last_one(self, server: FakeServer, fs: Filesystem) -> None:
        """A slow flush is overtaken by a write and a whole other one: what the server told it of the size is past."""
        handle = fs.create(b"/f", NEW, 0o644)
        fs.write(handle, b"abc", 0)
        original = fs._remote.fstat_soon

        class Slow:
            def __init__(self, *arguments: Any) -> None:
                fs._remote.fstat_soon = original  # type: ignore[method-assign]
                self._pending = original(*arguments)
                self.attrs = self._pending.attrs

            def wait(self) -> None:
                self._pending.wait()
                fs.write(handle, b"defg", 3)
                fs.fsync(handle)

        fs._remote.fstat_soon = Slow  # type: ignore[method-assign, assignment]
        fs.files.store(handle.node)  # as a release does, beside the program's operations
        assert server.disk(b"/home/f") == b"abcdefg"
        assert handle.file.validator == (7, int(START_S))
        fs.release(handle)

    def test_a_file_is_not_opened_again_by_the_name_that_it_is_losing(
        self, server: FakeServer, fs: Filesystem
    ) -> None:
        handle = fs.create(b"/f", NEW, 0o644)
        fs.write(handle, b"abc", 0)
        server.cut()
        wait_until(lambda: fs._remote.reconnects == 1, WAIT_S, "the reconnect")
        renamed = server.arm(Fault("hold", named("posix-rename")))
        rename = threading.Thread(target=fs.rename, args=(b"/f", b"/g"))
        rename.start()
        assert renamed.fired.wait(WAIT_S)
        failed: List[FsError] = []

        def store() -> None:
            try:
                fs.fsync(handle)
            except FsError as error:
                failed.append(error)

        thread = threading.Thread(target=store)
        thread.start()
        thread.join(0.5)  # long enough to open it by its old name, which is no name any more
        renamed.release()
        rename.join(WAIT_S)
        thread.join(WAIT_S)
        assert failed == []
        assert server.disk(b"/home/g") == b"abc"
        fs.release(handle)

    @pytest.mark.parametrize("moves", ["the file", "its directory"])
    @pytest.mark.parametrize("asks", ["the listing", "the old name", "a name below", "the new name"])
    def test_the_server_shows_a_rename_before_it_has_answered_it(
        self, server: FakeServer, fs: Filesystem, clock: Clock, moves: str, asks: str
    ) -> None:
        fs.mkdir(b"/d", 0o755)
        handle = fs.create(b"/d/f", NEW, 0o644)
        fs.write(handle, b"abc", 0)
        old, new = (b"/d/f", b"/d/g") if moves == "the file" else (b"/d", b"/e")
        ask = {
            "the listing": lambda: fs.readdir(old.rpartition(b"/")[0] or b"/"),
            "the old name": lambda: fs.getattr(old),
            "a name below": lambda: fs.getattr(b"/d/f"),
            "the new name": lambda: fs.getattr(new),
        }[asks]
        rename = fs._remote.rename

        def answered_late(*arguments: Any) -> None:
            rename(*arguments)
            clock.s += fs.lifetime_s + 1  # nothing is believed: the server is asked
            with contextlib.suppress(FsError):
                ask()

        fs._remote.rename = answered_late  # type: ignore[method-assign]
        fs.rename(old, new)
        at = new if moves == "the file" else b"/e/f"
        assert fs._ns.path_of(handle.node) == at
        server.cut()
        fs.fsync(handle)
        assert server.disk(b"/home" + at) == b"abc"
        assert fs.getattr(at).ino == handle.node.ino
        assert refused(lambda: fs.getattr(b"/d/f")) == errno.ENOENT
        fs._ns.check_invariants()
        fs.release(handle)

    def test_a_reopened_file_is_not_compared_with_what_came_after_the_look(
        self, server: FakeServer, fs: Filesystem, clock: Clock
    ) -> None:
        """The server forgot; another thread has sent all of it again between the reader's FSTAT and its verdict."""
        writer = fs.create(b"/f", NEW, 0o644)
        fs.write(writer, b"abc", 0)
        fs.flush(writer)
        reader = fs.open(b"/f", os.O_RDONLY)
        verify = reader.remote.verify
        asked: List[Optional[int]] = []

        def late(ask: Callable[[], Any]) -> None:
            def ask_and_wait() -> Any:
                attrs = ask()
                asked.append(attrs.size)
                if len(asked) == 1:
                    clock.s += 5
                    fs.write(writer, b"defg", 3)
                    fs.fsync(writer)
                return attrs

            verify(ask_and_wait)

        reader.remote.verify = late
        fs.write(writer, b"d", 3)
        server.crash()
        assert fs.files._fetcher._remote.read(reader.remote, 0, 10) == b"abcdefg"
        assert len(asked) == 2
        fs.flush(writer)
        fs.release(writer)
        fs.release(reader)

    def test_an_open_file_that_loses_one_of_its_names_is_opened_again_by_the_other(
        self, server: FakeServer, fs: Filesystem
    ) -> None:
        handle = fs.create(b"/f", NEW, 0o644)
        fs.link(b"/f", b"/g")
        fs.rename(b"/f", b"/.fuse_hidden0001")  # what libfuse makes of an unlink
        server.cut()
        fs.write(handle, b"abc", 0)
        fs.flush(handle)
        assert server.disk(b"/home/g") == b"abc"
        fs.release(handle)

    def test_two_threads_do_not_both_make_a_forgotten_cut_again(
        self, server: FakeServer, fs: Filesystem
    ) -> None:
        """The second would come behind the bytes that were sent after the first, and take them away."""
        server.make(b"/home/f", b"old" * 1000)
        handle = fs.open(b"/f", RW)
        fs.truncate(None, 0, handle)
        fs.write(handle, b"new", 0)
        server.crash()
        wait_until(lambda: handle.file.recut, WAIT_S, "the loss to be known")
        original = fs._remote.fsetstat_now
        first_is_slow, go_on = threading.Event(), threading.Event()

        def slow(*arguments: Any) -> None:
            if not first_is_slow.is_set():
                first_is_slow.set()
                go_on.wait(0.5)  # long enough for the other to cut, write and commit
            original(*arguments)

        fs._remote.fsetstat_now = slow  # type: ignore[method-assign]
        flush = threading.Thread(target=fs.files.store, args=(handle.node,))
        flush.start()
        assert first_is_slow.wait(WAIT_S)
        fs.fsync(handle)
        go_on.set()
        flush.join(WAIT_S)
        assert server.disk(b"/home/f") == b"new"
        assert server.content(b"/home/f") == b"new"
        fs.release(handle)

    @pytest.mark.parametrize("by_path", [False, True])
    def test_a_cut_that_is_forgotten_before_we_hear_of_it_is_made_again(
        self, server: FakeServer, fs: Filesystem, by_path: bool
    ) -> None:
        """The server answers the truncation, and loses it, before the answer is taken in."""
        server.make(b"/home/f", b"old" * 1000)
        handle = fs.open(b"/f", RW)
        original = fs._remote.fsetstat

        def and_crash(*arguments: Any) -> None:
            original(*arguments)
            fs._remote.fsetstat = original  # type: ignore[method-assign]
            server.crash()
            wait_until(lambda: fs._remote.reconnects == 1, WAIT_S, "the reconnect")

        fs._remote.fsetstat = and_crash  # type: ignore[method-assign]
        if by_path:
            fs.truncate(b"/f", 0)
        else:
            fs.truncate(None, 0, handle)
        fs.write(handle, b"new", 0)
        fs.flush(handle)
        assert server.disk(b"/home/f") == b"new"
        fs.release(handle)

    def test_a_truncation_by_name_is_committed(self, server: FakeServer, fs: Filesystem) -> None:
        server.make(b"/home/f", b"old" * 1000)
        fs.truncate(b"/f", 3)
        assert server.disk(b"/home/f") == b"old"

    @pytest.mark.parametrize("cut", CUTS)
    def test_a_rename_of_one_name_of_an_open_file_to_the_other_changes_nothing(
        self, server: FakeServer, fs: Filesystem, cut: str
    ) -> None:
        """libfuse takes the other name away first, since the file is open, so that it must be made again."""
        handle = fs.create(b"/f", NEW, 0o644)
        fs.link(b"/f", b"/g")
        fs.rename(b"/g", b"/.fuse_hidden0001")
        lost = server.arm(Fault(cut, named("hardlink")))
        fs.rename(b"/f", b"/g")
        assert lost.fired.is_set()
        assert server.has(b"/home/f") and server.has(b"/home/g")
        assert fs.getattr(b"/g").ino == fs.getattr(b"/f").ino
        fs.release(handle)

    def test_bytes_of_a_removed_file_do_not_reach_its_successor(
        self, server: FakeServer, mount: Mount
    ) -> None:
        """Its release, in the background, is overtaken by an unlink, a new file of the name, and a loss."""
        fs = mount(server, commit="fsync")
        old = fs.create(b"/f", NEW, 0o644)
        fs.write(old, b"late" * 3, 0)
        fs.flush(old)
        fs.unlink(b"/f")
        new = fs.create(b"/f", NEW, 0o644)
        fs.write(new, b"new data", 0)
        fs.fsync(new)
        server.crash()
        assert refused(lambda: fs.fsync(old)) == errno.ESTALE
        fs.release(old)
        assert fs.drain() == []
        assert server.disk(b"/home/f") == b"new data"
        fs.release(new)

    def test_times_set_before_close_survive_a_loss(self, server: FakeServer, fs: Filesystem) -> None:
        """tar sets the times of a file that is still open."""
        handle = fs.create(b"/f", NEW, 0o644)
        fs.write(handle, b"abc", 0)
        fs.utimens(b"/f", 1111, 2222)
        server.cut()
        fs.flush(handle)
        fs.release(handle)
        assert server.at(b"/home/f").mtime == 2222
        assert fs.getattr(b"/f").mtime == 2222
        assert server.disk(b"/home/f") == b"abc"

    def test_times_set_after_writing_are_not_overwritten(self, server: FakeServer, fs: Filesystem) -> None:
        handle = fs.create(b"/f", NEW, 0o644)
        fs.write(handle, noise(2 * BLOCK_BYTES + 5), 0)
        fs.utimens(b"/f", 1111, 2222)
        fs.flush(handle)
        fs.release(handle)
        assert server.at(b"/home/f").mtime == fs.getattr(b"/f").mtime == 2222

    @pytest.mark.parametrize("mode", [0o444, 0o200, 0o000])
    def test_a_file_made_read_only_before_close_survives_a_loss(
        self, make_server: MakeServer, mount: Mount, mode: int
    ) -> None:
        """As an ordinary user cannot open it for writing a second time: git makes its objects like this."""
        server = make_server(root_user=False)
        fs = mount(server)
        handle = fs.create(b"/f", os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        fs.write(handle, b"abc", 0)
        server.cut()
        fs.write(handle, b"def", 3)
        fs.flush(handle)
        fs.release(handle)
        assert server.disk(b"/home/f") == b"abcdef"
        assert stat.S_IMODE(server.at(b"/home/f").mode) == mode

    def test_a_name_that_the_crash_forgot_is_an_error(self, server: FakeServer, fs: Filesystem) -> None:
        handle = fs.create(b"/f", NEW, 0o644)
        fs.write(handle, b"abc", 0)
        server.crash()
        del server.at(b"/home").children[b"f"]
        code = refused(lambda: fs.flush(handle))
        assert code in (errno.ESTALE, errno.EIO, errno.ENOENT)
        fs.release(handle)

    def test_bytes_never_go_into_a_file_that_took_the_name(self, server: FakeServer, fs: Filesystem) -> None:
        """Another client renames its file over ours while we are away: ours is gone, theirs must not be touched."""
        server.make(b"/home/f", b"our old file", mtime=int(START_S) - 100)
        handle = fs.open(b"/f", RW)
        fs.write(handle, b"OUR", 0)
        fs.fsync(handle)
        server.cut()
        server.make(b"/home/f", b"their new file, which is longer", mtime=int(START_S) - 50)
        fs.write(handle, b"XXX", 4)
        assert refused(lambda: fs.fsync(handle)) in (errno.ESTALE, errno.EIO)
        assert server.content(b"/home/f") == b"their new file, which is longer"
        fs.release(handle)

    def test_nor_into_the_one_that_we_renamed_over_it(self, server: FakeServer, fs: Filesystem) -> None:
        put(fs, b"/a", b"aaaaaaaa")
        put(fs, b"/b", b"bbbb")
        handle = fs.open(b"/a", RW)
        fs.write(handle, b"XX", 0)
        fs.rename(b"/b", b"/a")
        server.cut()
        try:
            fs.flush(handle)
        except FsError as error:
            assert error.errno in (errno.ESTALE, errno.EIO, errno.ENOENT)
        assert server.content(b"/home/a") == b"bbbb"
        fs.release(handle)
        assert get(fs, b"/a") == b"bbbb"

    def test_a_reader_goes_on(self, server: FakeServer, fs: Filesystem) -> None:
        data = noise(30 * BLOCK_BYTES)
        server.make(b"/home/f", data, mtime=int(START_S) - 100)
        handle = fs.open(b"/f", os.O_RDONLY)
        server.arm(Fault("cut before", named("READ"), first=3))
        server.arm(Fault("cut after", named("READ"), first=9))
        assert read_all(fs, handle) == data
        fs.release(handle)

    def test_a_reader_of_a_replaced_file_is_stale_after_a_loss(
        self, server: FakeServer, fs: Filesystem
    ) -> None:
        server.make(b"/home/f", b"1" * 50 * BLOCK_BYTES, mtime=int(START_S) - 100)
        handle = fs.open(b"/f", os.O_RDONLY)
        fs.read(handle, 10, 0)
        server.make(b"/home/f", b"2" * 50 * BLOCK_BYTES, mtime=int(START_S) - 50)
        server.cut()
        assert refused(lambda: fs.read(handle, 10, 40 * BLOCK_BYTES)) == errno.ESTALE
        fs.release(handle)

    def test_a_link_that_remains_serves_the_handle(self, server: FakeServer, fs: Filesystem) -> None:
        put(fs, b"/a", b"content")
        fs.link(b"/a", b"/b")
        handle = fs.open(b"/b", RW)
        fs.unlink(b"/b")
        server.cut()
        fs.write(handle, b"CON", 0)
        fs.flush(handle)
        fs.release(handle)
        assert server.disk(b"/home/a") == b"CONtent"

    def test_a_server_that_lies_about_writes_is_found_out_by_size(
        self, server: FakeServer, fs: Filesystem
    ) -> None:
        """Acknowledged, and not there: the size behind the writes tells."""
        handle = fs.create(b"/f", NEW, 0o644)
        server.arm(Fault("not done", named("WRITE"), times=1000))
        fs.write(handle, b"abc", 0)
        assert refused(lambda: fs.flush(handle)) == errno.EIO
        fs.release(handle)


class TestWithoutFsync:
    def test_close_awaits_the_servers_close(self, make_server: MakeServer, mount: Mount) -> None:
        server = make_server(without=(FSYNC,))
        fs = mount(server)
        put(fs, b"/f", b"abc")
        assert server.content(b"/home/f") == b"abc"
        handle = fs.open(b"/f", RW)
        fs.write(handle, b"X", 0)
        server.arm(Fault("status", named("CLOSE"), message="No space left on device"))
        assert refused(lambda: fs.flush(handle)) == errno.ENOSPC
        fs.release(handle)

    def test_close_awaits_it_for_an_empty_file_too(self, make_server: MakeServer, mount: Mount) -> None:
        server = make_server(without=(FSYNC,))
        fs = mount(server)
        handle = fs.create(b"/f", os.O_WRONLY | os.O_EXCL, 0o644)
        server.arm(Fault("status", named("CLOSE"), message="No space left on device"))
        assert refused(lambda: fs.flush(handle)) == errno.ENOSPC
        fs.release(handle)

    def test_it_says_so(
        self, make_server: MakeServer, mount: Mount, caplog: pytest.LogCaptureFixture
    ) -> None:
        fs = mount(make_server(without=(FSYNC,)))
        assert "fsync@openssh.com" in caplog.text
        assert fs.describe()["fsync"] is False
        assert fs.describe()["missing"] == ["fsync@openssh.com"]

    @pytest.mark.parametrize("cut", CUTS)
    def test_cut_at_every_request(self, make_server: MakeServer, mount: Mount, cut: str) -> None:
        """What is acknowledged may be kept nowhere else: the close then either stored the file, or says that it failed."""
        for k in range(1, 60):
            server = make_server(without=(FSYNC,))
            fs = mount(server, lanes=1)
            fault = server.arm(Fault(cut, first=k))
            try:
                put(fs, b"/f", FRESH)
            except FsError as error:
                assert error.errno in (errno.EIO, errno.EEXIST)
            else:
                assert server.content(b"/home/f") == FRESH
            if not fault.fired.is_set():
                return
        raise AssertionError("never passes uncut")


class TestNames:
    def test_a_listing_answers_for_what_is_and_is_not_in_it(self, server: FakeServer, fs: Filesystem) -> None:
        for i in range(150):
            server.make(b"/home/%d" % i, bytes(i))
        assert len(names(fs)) == 150
        wait_until(
            lambda: server.count("CLOSE") == 1, WAIT_S, "the end of the listing, for which nobody waits"
        )
        before = server.count()
        assert [fs.getattr(b"/%d" % i).size for i in range(150)] == list(range(150))
        assert refused(lambda: fs.getattr(b"/none")) == errno.ENOENT
        assert server.count() == before

    def test_a_listing_is_always_the_servers(self, server: FakeServer, fs: Filesystem) -> None:
        """Programs look for each other's lock files this way."""
        assert names(fs) == []
        server.make(b"/home/lock")
        assert names(fs) == [b"lock"]

    def test_a_directory_of_ours_is_known_from_birth(self, server: FakeServer, fs: Filesystem) -> None:
        fs.mkdir(b"/d", 0o750)
        before = server.count()
        assert refused(lambda: fs.getattr(b"/d/x")) == errno.ENOENT
        assert stat.S_IMODE(fs.getattr(b"/d").mode) == 0o750
        assert server.count() == before
        put(fs, b"/d/x", b"abc")
        assert names(fs, b"/d") == [b"x"]

    def test_an_absent_name_is_asked_for_once(self, server: FakeServer, fs: Filesystem, clock: Clock) -> None:
        for _ in range(3):
            assert refused(lambda: fs.getattr(b"/none")) == errno.ENOENT
        assert server.count("LSTAT") == 1
        server.make(b"/home/none")
        clock.s += 21
        assert fs.getattr(b"/none").size == 0

    def test_our_own_changes_show_at_once_in_what_was_listed(
        self, server: FakeServer, fs: Filesystem
    ) -> None:
        server.make(b"/home/a", b"1")
        server.make_dir(b"/home/d")
        assert names(fs) == [b"a", b"d"]
        put(fs, b"/b", b"22")
        fs.rename(b"/a", b"/c")
        fs.symlink(b"c", b"/l")
        fs.link(b"/c", b"/k")
        fs.mkdir(b"/e", 0o755)
        fs.rmdir(b"/d")
        assert names(fs) == [b"b", b"c", b"e", b"k", b"l"]
        assert refused(lambda: fs.getattr(b"/a")) == errno.ENOENT
        fs.unlink(b"/b")
        assert names(fs) == [b"c", b"e", b"k", b"l"]
        assert sorted(server.tree()) == [b"c", b"e", b"k", b"l"]

    def test_a_tree_renamed_keeps_what_is_known_of_it(self, server: FakeServer, fs: Filesystem) -> None:
        fs.mkdir(b"/d", 0o755)
        fs.mkdir(b"/d/e", 0o755)
        put(fs, b"/d/e/f", b"abc")
        ino = fs.getattr(b"/d/e/f").ino
        fs.rename(b"/d", b"/n")
        assert fs.getattr(b"/n/e/f").ino == ino
        assert get(fs, b"/n/e/f") == b"abc"
        assert refused(lambda: fs.getattr(b"/d/e/f")) == errno.ENOENT
        assert names(fs, b"/n/e") == [b"f"]

    def test_open_files_follow_a_renamed_directory(self, server: FakeServer, fs: Filesystem) -> None:
        fs.mkdir(b"/d", 0o755)
        handle = fs.create(b"/d/f", NEW, 0o644)
        fs.write(handle, b"abc", 0)
        fs.rename(b"/d", b"/n")
        server.cut()
        fs.write(handle, b"def", 3)
        fs.flush(handle)
        fs.release(handle)
        assert server.disk(b"/home/n/f") == b"abcdef"
        assert fs.getattr(b"/n/f").size == 6

    def test_rename_over_another_file(self, server: FakeServer, fs: Filesystem) -> None:
        put(fs, b"/old", b"old")
        put(fs, b"/new", b"new!")
        reader = fs.open(b"/old", os.O_RDONLY)
        fs.rename(b"/new", b"/old")
        assert get(fs, b"/old") == b"new!"
        assert fs.getattr(b"/old").size == 4
        assert read_all(fs, reader) == b"old", "a handle keeps the file it was opened on"
        fs.release(reader)

    def test_rename_of_a_dirty_file(self, server: FakeServer, fs: Filesystem) -> None:
        handle = fs.create(b"/a", NEW, 0o644)
        fs.write(handle, b"abc", 0)
        fs.rename(b"/a", b"/b")
        assert fs.getattr(b"/b").size == 3
        assert get(fs, b"/b") == b"abc"
        fs.flush(handle)
        fs.release(handle)
        assert server.disk(b"/home/b") == b"abc"

    def test_an_unlinked_file_lives_with_its_handle(self, server: FakeServer, fs: Filesystem) -> None:
        handle = fs.create(b"/f", NEW, 0o644)
        fs.write(handle, b"abc", 0)
        fs.unlink(b"/f")
        assert refused(lambda: fs.getattr(b"/f")) == errno.ENOENT
        assert fs.getattr(None, handle).size == 3
        fs.write(handle, b"def", 3)
        assert read_all(fs, handle) == b"abcdef"
        fs.fsync(handle)
        put(fs, b"/f", b"another")
        assert read_all(fs, handle) == b"abcdef"
        assert fs.getattr(None, handle).size == 6
        fs.flush(handle)
        fs.release(handle)
        assert server.disk(b"/home/f") == b"another"

    def test_refusals(self, server: FakeServer, fs: Filesystem) -> None:
        fs.mkdir(b"/d", 0o755)
        put(fs, b"/d/f", b"")
        put(fs, b"/f", b"")
        assert refused(lambda: fs.rmdir(b"/d")) == errno.ENOTEMPTY
        assert refused(lambda: fs.mkdir(b"/d", 0o755)) == errno.EEXIST
        assert refused(lambda: fs.unlink(b"/none")) == errno.ENOENT
        assert refused(lambda: fs.rename(b"/d", b"/d/x")) == errno.EINVAL
        assert refused(lambda: fs.truncate(b"/d", 0)) == errno.EISDIR
        assert refused(lambda: fs.mknod(b"/fifo", stat.S_IFIFO | 0o644)) == errno.EPERM
        assert refused(lambda: fs.link(b"/f", b"/d/f")) == errno.EEXIST
        assert refused(lambda: fs.symlink(b"x", b"/f")) == errno.EEXIST
        assert refused(lambda: fs.create(b"/f", NEW, 0o644)) == errno.EEXIST
        assert names(fs) == [b"d", b"f"]

    def test_mknod_makes_a_file(self, server: FakeServer, fs: Filesystem) -> None:
        fs.mknod(b"/f", stat.S_IFREG | 0o640)
        assert stat.S_IMODE(server.at(b"/home/f").mode) == 0o640
        assert refused(lambda: fs.mknod(b"/f", stat.S_IFREG | 0o640)) == errno.EEXIST

    def test_symlinks(self, server: FakeServer, fs: Filesystem) -> None:
        fs.symlink(b"\xff/../x", b"/l")
        assert fs.readlink(b"/l") == b"\xff/../x"
        assert stat.S_ISLNK(fs.getattr(b"/l").mode)
        server.at(b"/home/l").target = b"with\0nul"
        other = server.make(b"/home/m")
        other.mode, other.target = stat.S_IFLNK | 0o777, b"with\0nul"
        assert refused(lambda: fs.readlink(b"/m")) == errno.EIO

    def test_a_link_changed_by_another(self, server: FakeServer, fs: Filesystem, clock: Clock) -> None:
        link = server.make(b"/home/l")
        link.mode, link.target = stat.S_IFLNK | 0o777, b"one"
        assert fs.readlink(b"/l") == b"one"
        clock.s += 100
        link.target = b"two"
        link.mtime = int(clock.s)
        assert fs.readlink(b"/l") == b"two"

    def test_more_names_than_the_cache_may_keep(self, server: FakeServer, mount: Mount) -> None:
        fs = mount(server, entries_max=20)
        for i in range(10):
            server.make_dir(b"/home/%d" % i)
            for j in range(10):
                server.make(b"/home/%d/%d" % (i, j), bytes(j))
        for _ in range(2):
            for i in range(10):
                assert len(names(fs, b"/%d" % i)) == 10
                assert fs.getattr(b"/%d/7" % i).size == 7
        assert len(fs._ns) <= 20 + 11
        fs._ns.check_invariants()

    def test_a_listing_without_attributes_does_not_lose_open_files(
        self, server: FakeServer, fs: Filesystem
    ) -> None:
        """Version 3 lets a server leave the attributes of a listing out."""
        handle = fs.create(b"/f", NEW, 0o644)
        fs.write(handle, b"abc", 0)
        body = b"\0\0\0\1" + b"\0\0\0\1f" + b"\0\0\0\0" + b"\0\0\0\0"
        server.arm(Fault("replace", named("READDIR"), code=104, body=body))
        assert names(fs) == [b"f"]
        assert fs.getattr(b"/f").size == 3
        assert get(fs, b"/f") == b"abc"
        fs.flush(handle)
        fs.release(handle)


class TestAttributes:
    def test_chmod_chown_utimens(self, server: FakeServer, fs: Filesystem) -> None:
        put(fs, b"/f", b"abc")
        fs.chmod(b"/f", 0o4755)
        fs.utimens(b"/f", 100, 200)
        fs.chown(b"/f", 1, -1)
        inode = server.at(b"/home/f")
        assert (stat.S_IMODE(inode.mode), inode.atime, inode.mtime, inode.uid, inode.gid) == (
            0o4755,
            100,
            200,
            1,
            os.getgid(),
        )
        seen = fs.getattr(b"/f")
        assert (stat.S_IMODE(seen.mode), seen.atime, seen.mtime, seen.uid, seen.gid) == (
            0o4755,
            100,
            200,
            1,
            os.getgid(),
        )
        fs.utimens(b"/f", None, 300)
        assert (inode.atime, inode.mtime) == (100, 300)
        fs.utimens(b"/f", None, None)
        assert (inode.atime, inode.mtime) == (100, 300)

    def test_a_link_whose_owner_the_server_cannot_change(self, make_server: MakeServer, mount: Mount) -> None:
        fs = mount(make_server(without=(b"lsetstat@openssh.com",)))
        fs.symlink(b"anywhere", b"/link")
        seen = fs.getattr(b"/link")
        fs.chown(b"/link", seen.uid, seen.gid)
        fs.chown(b"/link", -1, seen.gid)
        assert refused(lambda: fs.chown(b"/link", seen.uid + 1, -1)) == errno.ENOTSUP
        assert refused(lambda: fs.utimens(b"/link", 1, 2)) == errno.ENOSYS

    def test_a_later_write_changes_the_time_again(
        self, server: FakeServer, fs: Filesystem, clock: Clock
    ) -> None:
        handle = fs.create(b"/f", NEW, 0o644)
        fs.utimens(b"/f", 100, 100)
        clock.s += 5
        fs.write(handle, b"x", 0)
        fs.flush(handle)
        fs.release(handle)
        assert fs.getattr(b"/f").mtime == server.at(b"/home/f").mtime == int(clock.s)

    def test_a_server_that_refuses_setstat(self, server: FakeServer, fs: Filesystem) -> None:
        put(fs, b"/f", b"abc")
        before = fs.getattr(b"/f")
        server.arm(Fault("status", named("SETSTAT"), code=8, message="unsupported", times=100))
        assert refused(lambda: fs.chmod(b"/f", 0o600)) == errno.EPERM
        assert refused(lambda: fs.utimens(b"/f", 1, 1)) == errno.EPERM
        assert fs.getattr(b"/f") == before

    def test_access(self, server: FakeServer, fs: Filesystem) -> None:
        put(fs, b"/f", b"")
        fs.access(b"/f", os.R_OK | os.W_OK)
        assert refused(lambda: fs.access(b"/f", os.X_OK)) == errno.EACCES
        fs.chmod(b"/f", 0o755)
        fs.access(b"/f", os.X_OK)
        fs.access(b"/", os.X_OK)

    def test_idmap(self, server: FakeServer, mount: Mount) -> None:
        server.at(b"/home").uid = server.at(b"/home").gid = 1000
        fs = mount(server, idmap_user=True, local_uid=77, local_gid=88)
        put(fs, b"/f", b"")
        server.at(b"/home/f").uid = server.at(b"/home/f").gid = 1000
        other = server.make(b"/home/g")
        other.uid, other.gid = 5, 6
        fs.chown(b"/f", 77, 88)
        assert (server.at(b"/home/f").uid, server.at(b"/home/f").gid) == (1000, 1000)
        seen = {name: fs.getattr(b"/" + name) for name in (b"f", b"g")}
        assert (seen[b"f"].uid, seen[b"f"].gid) == (77, 88)
        assert (seen[b"g"].uid, seen[b"g"].gid) == (5, 6)

    def test_statfs(self, make_server: MakeServer, mount: Mount) -> None:
        server = make_server()
        server.free_bytes = 4096 * 1234
        assert mount(server).statfs().bavail == 1234
        assert refused(mount(make_server(without=(b"statvfs@openssh.com",))).statfs) == errno.ENOSYS

    def test_inode_numbers_are_stable(self, server: FakeServer, mount: Mount) -> None:
        put(mount(server), b"/f", b"")
        first = mount(server).getattr(b"/f").ino
        assert first == mount(server).getattr(b"/f").ino
        assert first > 1


class TestStart:
    @pytest.mark.parametrize("root", [b"", b".", b"/home", b"sub/.."])
    def test_the_directory_is_found(self, server: FakeServer, mount: Mount, root: bytes) -> None:
        server.make_dir(b"/home/sub")
        server.make(b"/home/f", b"abc")
        assert get(mount(server, root), b"/f") == b"abc"

    def test_the_servers_root(self, server: FakeServer, mount: Mount) -> None:
        server.make(b"/f", b"abc")
        fs = mount(server, b"/")
        assert get(fs, b"/f") == b"abc"
        put(fs, b"/g", b"x")
        assert server.content(b"/g") == b"x"

    @pytest.mark.parametrize("root", [b"/none", b"/none/deeper", b"/home/file", b"\xff"])
    def test_what_cannot_be_mounted_is_told_in_a_sentence(
        self, server: FakeServer, mount: Mount, root: bytes
    ) -> None:
        server.make(b"/home/file")
        with pytest.raises(RemoteDirectoryError) as caught:
            mount(server, root)
        assert str(caught.value).endswith(".")


class TestBounds:
    def test_dirty_and_uncommitted_bytes_have_a_budget(self, server: FakeServer, mount: Mount) -> None:
        fs = mount(server, dirty_bytes_max=1 << 20)
        handle = fs.create(b"/f", NEW, 0o644)
        data = noise(8 << 20)
        most = 0
        for start in range(0, len(data), BLOCK_BYTES):
            fs.write(handle, data[start : start + BLOCK_BYTES], start)
            most = max(most, fs.files.held_bytes)
        assert most <= (1 << 20) + BLOCK_BYTES
        fs.flush(handle)
        assert server.disk(b"/home/f") == data
        fs.release(handle)
        assert fs.files.held_bytes == 0

    def test_many_files_share_the_budget(self, server: FakeServer, mount: Mount) -> None:
        fs = mount(server, dirty_bytes_max=1 << 20)
        handles = [fs.create(b"/%d" % i, NEW, 0o644) for i in range(24)]
        for handle in handles:
            fs.write(handle, b"x" * 100, 0)
            fs.write(handle, b"y" * 100_000, 1000)
            assert fs.files.held_bytes <= (1 << 20) + BLOCK_BYTES
        for handle in handles:
            fs.flush(handle)
            fs.release(handle)
        assert all(len(server.disk(b"/home/%d" % i)) == 101_000 for i in range(24))
        assert fs.files.held_bytes == 0

    def test_handles_are_given_back_to_the_server(self, server: FakeServer, fs: Filesystem) -> None:
        for i in range(20):
            put(fs, b"/%d" % i, b"abc")
            get(fs, b"/%d" % i)
        names(fs)
        channels = server.connections[0].channels
        wait_until(lambda: not any(channel.handles for channel in channels), WAIT_S, "the CLOSEs")

    def test_what_lies_dirty_for_a_while_is_sent(
        self, server: FakeServer, fs: Filesystem, clock: Clock
    ) -> None:
        handle = fs.create(b"/f", NEW, 0o644)
        fs.write(handle, b"abc", 0)
        clock.s += 60
        wait_until(lambda: server.content(b"/home/f") == b"abc", WAIT_S, "write-back by age")
        fs.release(handle)
