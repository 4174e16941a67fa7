"""Writes that are answered at once: only those that cannot fail or wait, and none is lost or half taken in."""

from __future__ import annotations

import errno
import mmap
import os
import socket
import struct
import threading
from typing import Any, Dict, Iterator, List, Tuple

import pytest

from fs.conftest import Clock
from fs.test_filesystem import WAIT_S, Mount, get, noise, refused
from sftp.fake_server import FakeServer, Fault, named
from sftpmount.cache.blocks import BLOCK_BYTES
from sftpmount.fs.filesystem import Filesystem
from sftpmount.fs.handles import Handle
from sftpmount.fs.small_writes import SmallWrites
from support.process import wait_until

NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL
NUMBER, FH = 77, 5
DATA = b"0123456789"


def request(
    data: bytes = DATA, offset: int = 0, *, kind: int = 16, fh: int = FH, flags: int = 0
) -> Tuple[mmap.mmap, int]:
    """As the kernel sends it: fuse_in_header, fuse_write_in, the bytes."""
    body = struct.pack("=QQIIQII", fh, offset, len(data), flags, 1, 0, 0) + data
    whole = struct.pack("=IIQQIIII", 40 + len(body), kind, NUMBER, 9, 0, 0, os.getpid(), 0) + body
    buffer = mmap.mmap(-1, 2 * BLOCK_BYTES)
    buffer[: len(whole)] = whole
    return buffer, len(whole)


@pytest.fixture
def handle(fs: Filesystem) -> Handle:
    return fs.create(b"/f", NEW, 0o644)


class Kernel:
    """Hears what is answered."""

    def __init__(self, fs: Filesystem, handles: Dict[int, Any]) -> None:
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self.at_once = SmallWrites(self._theirs.fileno(), handles, fs.files.try_write)

    def answers(self) -> List[bytes]:
        found = []
        while True:
            try:
                found.append(self._ours.recv(1000))
            except BlockingIOError:
                return found

    def hang_up(self) -> None:
        self._ours.close()
        self._theirs.close()


@pytest.fixture
def kernel(fs: Filesystem, handle: Handle) -> Iterator[Kernel]:
    kernel = Kernel(fs, {FH: handle, FH + 1: object()})
    yield kernel
    kernel.hang_up()


def written(size: int) -> bytes:
    return struct.pack("=IiQII", 24, 0, NUMBER, size, 0)


class TestRequest:
    @pytest.mark.parametrize("offset", [0, 5, BLOCK_BYTES - len(DATA), 3 * BLOCK_BYTES])
    def test_it_is_answered_and_there(
        self, server: FakeServer, fs: Filesystem, handle: Handle, kernel: Kernel, offset: int
    ) -> None:
        assert kernel.at_once(*request(offset=offset))
        assert kernel.answers() == [written(len(DATA))]
        assert fs.read(handle, 100, offset) == DATA and fs.getattr(b"/f").size == offset + len(DATA)
        assert server.count("WRITE") == 0
        fs.flush(handle)
        assert server.disk(b"/home/f") == bytes(offset) + DATA

    OTHERS: Dict[str, Dict[str, Any]] = {
        "another request": {"kind": 15},
        "from a mapping": {"flags": 1},
        "across two blocks": {"offset": BLOCK_BYTES - len(DATA) + 1},
        "more than a block": {"data": bytes(BLOCK_BYTES + 1)},
        "enough to be sent": {"data": bytes(BLOCK_BYTES)},
        "another file": {"fh": 6000},
        "a directory": {"fh": FH + 1},
    }

    @pytest.mark.parametrize("name", OTHERS)
    def test_others_are_left_alone(
        self, fs: Filesystem, handle: Handle, kernel: Kernel, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sftpmount.cache.writeback._request_bytes", lambda session: BLOCK_BYTES)
        assert not kernel.at_once(*request(**self.OTHERS[name]))
        assert kernel.answers() == [] and fs.getattr(b"/f").size == 0

    @pytest.mark.parametrize("length", [0, 40, 80, 85])
    def test_one_that_is_cut_short(self, kernel: Kernel, length: int) -> None:
        assert not kernel.at_once(request()[0], length)
        assert kernel.answers() == []

    def test_nobody_waits_any_more(
        self, fs: Filesystem, handle: Handle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def gone(*_: object) -> int:
            raise OSError(errno.ENOENT, "no such request")

        monkeypatch.setattr("sftpmount.fs.small_writes.os.write", gone)
        assert SmallWrites(-1, {FH: handle}, fs.files.try_write)(*request())
        assert fs.read(handle, 100, 0) == DATA

    def test_it_cannot_be_answered(
        self, fs: Filesystem, handle: Handle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert not SmallWrites(-1, {FH: handle}, fs.files.try_write)(*request()), "libfuse may tell"

    def test_what_fails_is_left_to_libfuse(
        self, fs: Filesystem, handle: Handle, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise MemoryError("no room")

        monkeypatch.setattr(type(handle.file), "store", fail)
        assert not kernel.at_once(*request())
        assert kernel.answers() == []


class TestNotAtOnce:
    """What may wait, fail, or has another order."""

    def appends(self, server: FakeServer, fs: Filesystem, handle: Handle) -> None:
        handle.appends = True

    def of_two_names(self, server: FakeServer, fs: Filesystem, handle: Handle) -> None:
        fs.link(b"/f", b"/g")

    def failed(self, server: FakeServer, fs: Filesystem, handle: Handle) -> None:
        server.arm(Fault("status", named("WRITE")))
        fs.write(handle, b"x", 0)
        refused(lambda: fs.flush(handle))
        assert handle.file.failure is not None

    def owes_an_error(self, server: FakeServer, fs: Filesystem, handle: Handle) -> None:
        other = fs.open(b"/f", os.O_RDWR)
        server.arm(Fault("status", named("WRITE")))
        fs.write(other, b"x", 0)
        refused(lambda: fs.flush(other))
        fs.flush(other)
        assert handle.owed is not None and handle.file.failure is None

    def away(self, server: FakeServer, fs: Filesystem, handle: Handle) -> None:
        server.down = True
        server.cut()
        wait_until(lambda: not fs._remote.connected, WAIT_S, "the outage")

    def much_is_not_committed(self, server: FakeServer, fs: Filesystem, handle: Handle) -> None:
        fs.files._writeback._bytes_max = 1

    @pytest.mark.parametrize(
        "case", ["appends", "of_two_names", "failed", "owes_an_error", "away", "much_is_not_committed"]
    )
    def test_it_is_libfuses(
        self, server: FakeServer, fs: Filesystem, handle: Handle, kernel: Kernel, case: str
    ) -> None:
        getattr(self, case)(server, fs, handle)
        assert not kernel.at_once(*request())
        assert kernel.answers() == []
        server.down = False

    def test_another_thread_has_the_file(self, handle: Handle, kernel: Kernel) -> None:
        with handle.file.lock:
            told: List[bool] = []
            thread = threading.Thread(target=lambda: told.append(kernel.at_once(*request())))
            thread.start()
            thread.join(WAIT_S)
        assert told == [False] and kernel.answers() == []


def test_many_of_them_are_the_file(
    server: FakeServer, fs: Filesystem, handle: Handle, kernel: Kernel, clock: Clock
) -> None:
    """As tar writes: what fills a request goes the other way, and is sent."""
    data = noise(40 * 10240)
    at_once = 0
    for offset in range(0, len(data), 10240):
        piece = data[offset : offset + 10240]
        if kernel.at_once(*request(piece, offset)):
            at_once += 1
        else:
            fs.write(handle, piece, offset)
    assert at_once >= 30
    wait_until(lambda: server.count("WRITE") >= 1, WAIT_S, "the first full request")
    fs.flush(handle)
    fs.release(handle)
    assert server.disk(b"/home/f") == data == get(fs, b"/f")


def test_without_room(server: FakeServer, mount: Mount) -> None:
    fs = mount(server, dirty_bytes_max=4 * BLOCK_BYTES)
    handle = fs.create(b"/f", NEW, 0o644)
    taken = 0
    while fs.files.try_write(handle, b"x", taken * BLOCK_BYTES):
        taken += 1
    assert taken and 2 * BLOCK_BYTES <= fs.files.held_bytes + 2 * BLOCK_BYTES <= 4 * BLOCK_BYTES + 1
