"""READDIRPLUS out of READDIR and LOOKUPs: what the kernel reads of it, and that the counts of look-ups stay even."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from typing import Dict, Iterator, List, NamedTuple, Tuple

import pytest

from sftpmount.fs import readdirplus as module
from sftpmount.fs.readdirplus import ReadDirPlus

LOOKUP, FORGET, READDIR, READDIRPLUS = 1, 2, 28, 44
DIRECTORY, UNIQUE, CALLER = 77, 4242, (1000, 1001, 4711)
IN_HEADER, OUT_HEADER, DIRENT = struct.Struct("=IIQQIIII"), struct.Struct("=IiQ"), struct.Struct("=QQII")
ENTRY = struct.Struct("=QQQQII88s")  # node, generation, valid for s (entry, attributes) and ns; attributes


class Told(NamedTuple):
    """One entry of a reply."""

    name: bytes
    node: int
    attr_ns: int
    next_at: int


class Libfuse:
    """Answers READDIR and LOOKUP; nodes of names are numbers from 100."""

    def __init__(self, *names: bytes) -> None:
        self.names = [b".", b"..", *names]
        self.unknown: List[bytes] = []
        self.counts: Dict[int, int] = {}
        self.requests: List[Tuple[int, bytes]] = []
        self.error = 0
        self.is_known_only = False

    @contextlib.contextmanager
    def known_only(self) -> Iterator[None]:
        self.is_known_only = True
        yield
        self.is_known_only = False

    def ask(self, request: bytes) -> bytes:
        length, opcode, unique, node, uid, gid, pid, _ = IN_HEADER.unpack_from(request)
        body = request[IN_HEADER.size :]
        assert length == len(request)
        assert (unique, uid, gid, pid) == (UNIQUE, *CALLER)
        self.requests.append((opcode, body))
        if opcode == FORGET:
            self.counts[node] -= struct.unpack("=Q", body)[0]
            return b""
        assert node == DIRECTORY
        if opcode == READDIR:
            assert not self.is_known_only
            return self._reply(self._readdir(*struct.unpack_from("=8xQI", body)))
        assert opcode == LOOKUP
        assert self.is_known_only
        name = body.rstrip(b"\0")
        if name in self.unknown:
            return OUT_HEADER.pack(OUT_HEADER.size, -errno.EAGAIN, UNIQUE)
        number = 100 + self.names.index(name)
        self.counts[number] = self.counts.get(number, 0) + 1
        return self._reply(ENTRY.pack(number, 0, 1, 0, 0, 10_000_000, b"a" * 88))

    def _reply(self, body: bytes) -> bytes:
        return OUT_HEADER.pack(OUT_HEADER.size + len(body), -self.error, UNIQUE) + body

    def _readdir(self, offset: int, size: int) -> bytes:
        """As libfuse: a slice, which may cut a name."""
        if self.error:
            return b""
        whole = b""
        for name in self.names:
            length = (DIRENT.size + len(name) + 7) // 8 * 8
            whole += (DIRENT.pack(5, len(whole) + length, len(name), 8) + name).ljust(length, b"\0")
        return whole[offset : offset + size]


class Kernel:
    """Reads what is answered from a pipe."""

    def __init__(self, libfuse: Libfuse) -> None:
        self._read, self._write = os.pipe()
        self.plus = ReadDirPlus(self._write, libfuse.ask, libfuse.known_only)

    def send(self, opcode: int, body: bytes) -> bool:
        request = IN_HEADER.pack(IN_HEADER.size + len(body), opcode, UNIQUE, DIRECTORY, *CALLER, 0) + body
        buffer = ctypes.create_string_buffer(request, len(request))
        return self.plus(ctypes.addressof(buffer), len(request))

    def read(self, size: int = 4096, offset: int = 0) -> List[Told]:
        assert self.send(READDIRPLUS, struct.pack("=QQIIQII", 1, offset, size, 0, 0, 0, 0))
        return list(self._entries(size))

    def reply(self) -> Tuple[int, bytes]:
        reply = os.read(self._read, 1 << 16)
        length, error, unique = OUT_HEADER.unpack_from(reply)
        assert (length, unique) == (len(reply), UNIQUE)
        return -error, reply[OUT_HEADER.size :]

    def _entries(self, size: int) -> Iterator[Told]:
        error, body = self.reply()
        assert error == 0
        assert len(body) <= size
        at = 0
        while at < len(body):
            node, _, _, _, _, attr_ns, _ = ENTRY.unpack_from(body, at)
            _, next_at, length, _ = DIRENT.unpack_from(body, at + ENTRY.size)
            begin = at + ENTRY.size + DIRENT.size
            yield Told(body[begin : begin + length], node, attr_ns, next_at)
            at = (begin + length + 7) // 8 * 8

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


@pytest.fixture
def libfuse() -> Libfuse:
    return Libfuse(b"one", b"two", b"a name of many bytes, and \xff")


@pytest.fixture
def kernel(libfuse: Libfuse, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    for patience in ("_LOOKING_S", "LATE_S"):
        monkeypatch.setattr(module, patience, 1000.0)
    kernel = Kernel(libfuse)
    yield kernel
    kernel.close()


def test_all_else_is_left_to_libfuse(kernel: Kernel, libfuse: Libfuse) -> None:
    assert not kernel.send(READDIR, bytes(40))
    assert not kernel.send(LOOKUP, b"one\0")
    assert libfuse.requests == []


def test_names_come_with_their_nodes(kernel: Kernel, libfuse: Libfuse) -> None:
    told = kernel.read()
    assert [(each.name, each.node) for each in told] == [
        (b".", 0),  # the kernel does not count these two
        (b"..", 0),
        (b"one", 102),
        (b"two", 103),
        (b"a name of many bytes, and \xff", 104),
    ]
    assert libfuse.counts == {102: 1, 103: 1, 104: 1}
    assert kernel.read(offset=told[-1].next_at) == []


def test_of_what_is_not_known_the_name_is_told(kernel: Kernel, libfuse: Libfuse) -> None:
    libfuse.unknown = [b"one"]
    assert [each.node for each in kernel.read()] == [0, 0, 0, 103, 104]


def test_only_what_has_room_is_looked_up(kernel: Kernel, libfuse: Libfuse) -> None:
    libfuse.names += [b"%d" % number * (1 + number % 40) for number in range(300)]
    told: List[Told] = []
    offset = 0
    while found := kernel.read(700, offset):
        told += found
        offset = found[-1].next_at
    assert [each.name for each in told] == libfuse.names
    assert set(libfuse.counts.values()) == {1}


def test_an_error_of_the_listing(kernel: Kernel, libfuse: Libfuse) -> None:
    libfuse.error = errno.ETIMEDOUT
    assert kernel.send(READDIRPLUS, bytes(40))
    assert kernel.reply() == (errno.ETIMEDOUT, b"")


def test_what_is_not_foreseen_is_an_error_of_one_listing(
    kernel: Kernel, libfuse: Libfuse, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(libfuse, "_readdir", lambda offset, size: None)
    assert kernel.send(READDIRPLUS, bytes(40))
    assert kernel.reply() == (errno.EIO, b"")
    assert "READDIRPLUS failed" in caplog.text


def test_where_looking_takes_long_the_kernel_hears_of_what_there_is(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOOKING_S", -1.0)
    found = kernel.read()
    assert [each.name for each in found] == [b"."]
    assert [each.name for each in kernel.read(offset=found[-1].next_at)] == [b".."]


def test_attributes_that_come_late_are_not_believed(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {each.attr_ns for each in kernel.read() if each.node} == {10_000_000}
    monkeypatch.setattr(module, "LATE_S", -1.0)
    late = kernel.read()
    assert [each.node for each in late] == [0, 0, 102, 103, 104]
    assert {each.attr_ns for each in late} == {0}


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENODEV, errno.EINVAL])
def test_what_the_kernel_did_not_take_is_forgotten(
    kernel: Kernel,
    libfuse: Libfuse,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
) -> None:
    def refuse(device: int, data: bytes) -> int:
        raise OSError(code, os.strerror(code))

    libfuse.unknown = [b"two"]
    monkeypatch.setattr(module.os, "write", refuse)
    assert kernel.send(READDIRPLUS, struct.pack("=QQIIQII", 1, 0, 4096, 0, 0, 0, 0))
    assert libfuse.counts == {102: 0, 104: 0}
    assert ("answering READDIRPLUS" in caplog.text) == (code == errno.EINVAL)


def test_others_are_let_go_first(libfuse: Libfuse, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every so many names, where requests of other programs are waiting."""
    asked: List[int] = []
    monkeypatch.setattr(module.waiting, "let_others", lambda: asked.append(len(libfuse.requests)))
    libfuse.names += [b"%d" % number for number in range(100)]
    assert len(kernel.read(1 << 16)) == len(libfuse.names)
    assert max(after - before for before, after in zip(asked, asked[1:])) <= 16
    assert len(asked) >= len(libfuse.names) // 16
