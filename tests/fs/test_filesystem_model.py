"""Random work on two files over a server that is cut off and crashes, against a model of plain bytearrays.

Whatever happens: each read through any handle is what was last written here, and what a close or fsync said is stored is on
the server's disk.
"""

from __future__ import annotations

import os
from typing import Dict, List

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fs.conftest import START_S, Clock, Mounted
from sftp.fake_server import FakeServer, Fault, named
from sftpmount.cache.blocks import BLOCK_BYTES
from sftpmount.errors import FsError
from sftpmount.fs.filesystem import Handle
from support.process import wait_until

OFFSETS = [0, 1, 4096, BLOCK_BYTES - 3, BLOCK_BYTES, 2 * BLOCK_BYTES - 1, 300_000, 3 * BLOCK_BYTES]
SIZES = [1, 100, 4096, 70_000, BLOCK_BYTES, BLOCK_BYTES + 1, 290_000]
LENGTHS = [0, 1, 5000, BLOCK_BYTES, BLOCK_BYTES + 5, 300_000, 500_000]
NAMES = [b"/a", b"/b"]

names = st.sampled_from(NAMES)
handles = st.integers(0, 5)


class File:
    """What the program thinks is in a file; ``stored`` is what the last fsync or close promised."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)


class Opened:
    def __init__(self, handle: Handle, file: File, writable: bool) -> None:
        self.handle = handle
        self.file = file
        self.writable = writable


class Work(RuleBasedStateMachine):
    """``far`` and ``near`` are settings of the server and of the mount."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.files: Dict[bytes, File] = {}
        self.opened: List[Opened] = []
        self.mounted: List[Mounted] = []
        self.servers: List[FakeServer] = []

    @initialize(
        small=st.booleans(),
        cache_blocks=st.sampled_from([4, 500]),
        commit=st.sampled_from(["close", "fsync"]),
        length=st.sampled_from(LENGTHS),
        lanes=st.sampled_from([1, 3]),
    )
    def start(self, small: bool, cache_blocks: int, commit: str, length: int, lanes: int) -> None:
        limits = (40_000, 20_000, 30_000, 0) if small else (262144, 261120, 261120, 0)
        self.clock = Clock()
        self.may_have_forgotten = False
        self.server = FakeServer(now=self.clock, limits=limits)
        self.servers.append(self.server)
        content = self.data(length)
        self.server.make(b"/home/a", content, mtime=int(START_S) - 100)
        self.files[b"/a"] = File(content)
        self.mounted.append(
            Mounted(
                self.server,
                b"",
                self.clock,
                leaps=True,
                lanes=lanes,
                commit=commit,
                cache_bytes_max=cache_blocks * BLOCK_BYTES,
                dirty_bytes_max=6 * BLOCK_BYTES,
            )
        )
        self.fs = self.mounted[0].fs

    def teardown(self) -> None:
        try:
            if self.mounted:
                self.close_everything()
        finally:
            for mounted in self.mounted:
                mounted.close()
            for server in self.servers:
                server.close()

    def data(self, size: int) -> bytes:
        """Bytes that tell which write they are from, and where in it."""
        self.number += 1
        unit = b"%07d;" % self.number
        return (unit * (size // len(unit) + 1))[:size]

    def one(self, which: int) -> Opened:
        return self.opened[which % len(self.opened)]

    # -- the program ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.opened) < 4)
    @rule(name=names, flags=st.sampled_from([os.O_RDONLY, os.O_RDWR, os.O_RDWR, os.O_RDWR | os.O_TRUNC]))
    def open(self, name: bytes, flags: int) -> None:
        file = self.files.get(name)
        if file is None:
            handle = self.fs.create(name, os.O_RDWR | os.O_CREAT, 0o644)
            file = self.files[name] = File(b"")
            flags = os.O_RDWR
        else:
            handle = self.fs.open(name, flags)
            if flags & os.O_TRUNC:
                file.content.clear()
        self.opened.append(Opened(handle, file, flags & os.O_ACCMODE != os.O_RDONLY))

    @precondition(lambda self: self.opened)
    @rule(which=handles, offset=st.sampled_from(OFFSETS), size=st.sampled_from(SIZES))
    def write(self, which: int, offset: int, size: int) -> None:
        opened = self.one(which)
        if not opened.writable:
            return
        data = self.data(size)
        for start in range(0, size, BLOCK_BYTES):  # as the kernel cuts it
            self.fs.write(opened.handle, data[start : start + BLOCK_BYTES], offset + start)
        content = opened.file.content
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + size] = data

    @precondition(lambda self: self.opened)
    @rule(which=handles, count=st.integers(2, 6))
    def append(self, which: int, count: int) -> None:
        opened = self.one(which)
        if opened.writable:
            for _ in range(count):
                data = self.data(10_240)
                self.fs.write(opened.handle, data, len(opened.file.content))
                opened.file.content += data

    @precondition(lambda self: self.opened)
    @rule(which=handles, offset=st.sampled_from(OFFSETS), size=st.sampled_from([1, 5000, BLOCK_BYTES]))
    def read(self, which: int, offset: int, size: int) -> None:
        opened = self.one(which)
        assert self.fs.read(opened.handle, size, offset) == opened.file.content[offset : offset + size]

    @precondition(lambda self: self.opened)
    @rule(which=handles)
    def read_all(self, which: int) -> None:
        opened = self.one(which)
        position = 0
        while True:
            piece = self.fs.read(opened.handle, BLOCK_BYTES, position)
            assert piece == opened.file.content[position : position + BLOCK_BYTES], f"at {position}"
            if not piece:
                return
            position += len(piece)

    @precondition(lambda self: self.opened)
    @rule(which=handles, length=st.sampled_from(LENGTHS), by_handle=st.booleans())
    def truncate(self, which: int, length: int, by_handle: bool) -> None:
        opened = self.one(which)
        if by_handle and opened.writable:
            self.fs.truncate(None, length, opened.handle)
        elif any(other.writable and other.file is opened.file for other in self.opened):
            self.fs.truncate(self.path_of(opened.file), length)
        else:
            return  # truncate(2) alone promises nothing about the disk
        content = opened.file.content
        del content[length:]
        content.extend(bytes(length - len(content)))

    def path_of(self, file: File) -> bytes:
        return next(name for name, each in self.files.items() if each is file)

    @precondition(lambda self: self.opened)
    @rule(which=handles)
    def fsync(self, which: int) -> None:
        opened = self.one(which)
        self.fs.fsync(opened.handle)
        assert self.server.disk(b"/home" + self.path_of(opened.file)) == opened.file.content

    @precondition(lambda self: self.opened)
    @rule(which=handles)
    def close(self, which: int) -> None:
        opened = self.opened.pop(which % len(self.opened))
        self.fs.flush(opened.handle)
        if opened.writable:
            path = b"/home" + self.path_of(opened.file)
            if self.fs.files._commit_on_close:
                assert self.server.disk(path) == opened.file.content
            # What was not committed may have been forgotten without our knowing it yet: it is held, and is sent again.
            if self.fs.files._commit_on_close or not self.may_have_forgotten:
                assert self.server.content(path) == opened.file.content
        self.fs.release(opened.handle)

    @rule(name=names)
    def look(self, name: bytes) -> None:
        file = self.files.get(name)
        try:
            size = self.fs.getattr(name).size
        except FsError:
            assert file is None
        else:
            assert file is not None
            assert size == len(file.content)

    @rule()
    def list(self) -> None:
        assert {b"/" + name for name, _, _ in self.fs.readdir(b"/")} == set(self.files)

    @rule(old=names)
    def rename(self, old: bytes) -> None:
        """Onto the other name; libfuse sees to it that what is replaced is not open."""
        new = NAMES[1 - NAMES.index(old)]
        if old in self.files and not any(opened.file is self.files.get(new) for opened in self.opened):
            self.fs.getattr(old)  # the kernel looks names up before it changes them
            self.fs.rename(old, new)
            self.files[new] = self.files.pop(old)

    @rule(name=names)
    def unlink(self, name: bytes) -> None:
        if name in self.files and not any(opened.file is self.files[name] for opened in self.opened):
            self.fs.unlink(name)
            del self.files[name]

    @rule(name=names, mtime=st.integers(1000, 2000))
    def utimens(self, name: bytes, mtime: int) -> None:
        if name in self.files:
            self.fs.utimens(name, mtime, mtime)
            # Data that is sent again, because it was not committed, changes the time again.
            if self.fs.files._commit_on_close or not self.may_have_forgotten:
                assert self.fs.getattr(name).mtime == mtime

    # -- the world -------------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([1, 5, 30]))
    def wait(self, seconds: int) -> None:
        self.clock.s += seconds

    @rule(reconnected=st.booleans())
    def cut(self, reconnected: bool) -> None:
        self.lose(self.server.cut, reconnected)

    @rule(reconnected=st.booleans())
    def crash(self, reconnected: bool) -> None:
        self.may_have_forgotten = True
        self.lose(self.server.crash, reconnected)

    def lose(self, how: object, reconnected: bool) -> None:
        before = self.mounted[0].remote.reconnects
        how()  # type: ignore[operator]
        if reconnected:
            # Connections that a crash ends as they begin space out, up to 15 s.
            wait_until(lambda: self.mounted[0].remote.reconnects > before, 60.0, "the reconnect")

    @rule(
        act=st.sampled_from(["cut before", "cut after"]),
        kind=st.sampled_from(["WRITE", "READ", "fsync", "FSTAT", "FSETSTAT", "SETSTAT", "OPEN"]),
        first=st.integers(1, 3),
        forgets=st.booleans(),
    )
    def lose_later(self, act: str, kind: str, first: int, forgets: bool) -> None:
        if not self.server.faults or all(fault.fired.is_set() for fault in self.server.faults):
            then = self.server.forget if forgets else None
            self.may_have_forgotten |= forgets
            self.server.arm(Fault(act, named(kind), first=first, then=then))

    @invariant()
    def caches_are_sound(self) -> None:
        if not self.mounted:
            return
        self.fs._ns.check_invariants()
        for opened in self.opened:
            file = opened.handle.file
            with file.lock:
                file.check_invariants()
        assert self.fs.files.held_bytes <= 12 * BLOCK_BYTES

    def close_everything(self) -> None:
        self.server.disarm()
        while self.opened:
            self.close(0)
        assert self.fs.drain() == []
        wait_until(lambda: self.fs.files.held_bytes == 0, 20.0, "everything to be committed")
        for name, file in self.files.items():
            assert self.server.content(b"/home" + name) == file.content
            if self.fs.files._commit_on_close:
                assert self.server.disk(b"/home" + name) == file.content
            handle = self.fs.open(name, os.O_RDONLY)
            self.opened.append(Opened(handle, file, False))
            self.read_all(len(self.opened) - 1)
            self.fs.release(self.opened.pop().handle)


# Real threads and waits are at work: to shrink a failure takes longer than to read it.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)

TestWork = Work.TestCase
TestWork.settings = settings(max_examples=40, stateful_step_count=25, deadline=None, phases=PHASES)


@pytest.mark.long
@pytest.mark.timeout(3600)
class TestWorkForLong(Work.TestCase):  # type: ignore[misc, name-defined]
    settings = settings(max_examples=2000, stateful_step_count=50, deadline=None, phases=PHASES)
