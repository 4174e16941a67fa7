"""A program is ended while it waits: it is freed, and nothing of that shows to others or later.

What was asked for may be done or not; no handle stays open, no request stays unanswered, no other program hears of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from typing import Any, Callable, Iterator, List, Optional, Tuple

import pytest

from fs.conftest import Clock
from sftp.fake_server import FakeServer, Fault, named
from sftpmount import waiting
from sftpmount.cache.blocks import BLOCK_BYTES
from sftpmount.errors import FsError
from sftpmount.fs.filesystem import Filesystem
from sftpmount.sftp import wire
from sftpmount.sftp.lane import Lane
from support.process import wait_until

WAIT_S = 20.0
RW = os.O_RDWR
Mount = Callable[..., Filesystem]


class Program:
    """Does ``act`` in a thread that serves a program; ``end()`` ends the program, and tells what it was told."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.is_ending = threading.Event()
        self._told: List[object] = []
        self._thread = threading.Thread(target=self._run, args=(act,), daemon=True)
        self._thread.start()

    def _run(self, act: Callable[[], object]) -> None:
        waiting.serve(self.is_ending.is_set)
        try:
            self._told.append(act())
        except FsError as error:
            self._told.append(error.errno)

    def end(self) -> object:
        self.is_ending.set()
        self._thread.join(WAIT_S)
        assert self._told, "still waiting"
        return self._told[0]

    def waits(self) -> bool:
        self._thread.join(0.3)
        return self._thread.is_alive()


class Congested:
    """A channel that takes nothing in before ``lock`` is released."""

    def __init__(self, channel: Any) -> None:
        self.lock = threading.Lock()
        self.lock.acquire()
        self._channel = channel
        self._held_up: Optional[List[bytes]] = None

    def send(self, *parts: bytes) -> None:
        if self._held_up is not None:
            self._held_up.extend(parts)
            return
        waiting.acquire(self.lock)
        self.lock.release()
        self._channel.send(*parts)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        self._held_up = []
        yield
        held_up, self._held_up = self._held_up, None
        self.send(*held_up)

    def close(self) -> None:
        self._channel.close()


@pytest.mark.parametrize("step", ["OPEN", "LSTAT"])
def test_an_open_leaves_no_handle(server: FakeServer, fs: Filesystem, step: str) -> None:
    server.make(b"/home/f")
    held = server.arm(Fault("hold", named(step)))
    program = Program(lambda: fs.open(b"/f", RW))
    assert held.fired.wait(WAIT_S)
    assert program.end() == errno.EINTR
    held.release()
    wait_until(
        lambda: not any(channel.handles for channel in server.connections[-1].channels), WAIT_S, "its CLOSE"
    )


def congest(monkeypatch: pytest.MonkeyPatch, *kinds: int) -> None:
    """Requests of these types find no room, and their programs do not wait for it once they are ended."""
    request = Lane.request

    def congested(lane: Lane, kind: int, *parts: Any, **keywords: Any) -> Any:
        if kind in kinds:
            waiting.check()
        return request(lane, kind, *parts, **keywords)

    monkeypatch.setattr(Lane, "request", congested)


def test_a_mode_that_was_changed_to_open_a_file_again_is_restored(
    make_server: Callable[..., FakeServer], mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was made read-only, after a reconnect, and its program is ended in the middle."""
    server = make_server(root_user=False)
    fs = mount(server)
    handle = fs.create(b"/f", RW | os.O_CREAT | os.O_EXCL, 0o444)
    fs.write(handle, b"abc", 0)
    congest(monkeypatch, wire.SETSTAT)
    held = server.arm(Fault("hold", named("OPEN"), first=2))  # the first one is refused
    server.cut()
    program = Program(lambda: fs.flush(handle))
    assert held.fired.wait(WAIT_S)
    assert stat.S_IMODE(server.at(b"/home/f").mode) == 0o644
    program.is_ending.set()
    held.release()
    program.end()
    assert stat.S_IMODE(server.at(b"/home/f").mode) == 0o444


@pytest.mark.parametrize("full_for", [(), (wire.CLOSE,)], ids=["", "the line is full"])
@pytest.mark.parametrize("step", ["OPENDIR", "READDIR"])
def test_a_listing_leaves_no_handle(
    server: FakeServer, fs: Filesystem, monkeypatch: pytest.MonkeyPatch, step: str, full_for: Tuple[int, ...]
) -> None:
    congest(monkeypatch, *full_for)
    held = server.arm(Fault("hold", named(step)))
    program = Program(lambda: fs.readdir(b"/"))
    assert held.fired.wait(WAIT_S)
    assert program.end() == errno.EINTR
    held.release()
    wait_until(
        lambda: not any(channel.handles for channel in server.connections[-1].channels), WAIT_S, "its CLOSE"
    )


def test_a_request_that_never_left_is_not_waited_for(server: FakeServer, fs: Filesystem) -> None:
    lane = fs._remote.session().meta
    congested = Congested(lane._channel)
    lane._channel = congested
    program = Program(lambda: fs.statfs())
    wait_until(lambda: lane.in_flight == 1, WAIT_S, "the request")
    assert program.end() == errno.EINTR
    assert lane.in_flight == 0 and not lane.is_awaited
    congested.lock.release()
    assert fs.statfs().bsize


def test_a_write_that_never_left_is_sent_again_once(server: FakeServer, fs: Filesystem) -> None:
    server.make(b"/home/f")
    handle = fs.open(b"/f", RW)
    lane = fs._remote.session().write_lane
    congested = Congested(lane._channel)
    lane._channel = congested
    fs.write(handle, b"abc", 0)
    program = Program(lambda: fs.flush(handle))
    wait_until(lambda: handle.file.requests_in_flight == 1, WAIT_S, "the request")
    assert program.end() == errno.EINTR
    assert handle.file.requests_in_flight == 0
    congested.lock.release()
    fs.flush(handle)
    server.cut()
    wait_until(lambda: fs._remote.reconnects == 1, WAIT_S, "the reconnect")
    assert handle.file.requests_in_flight == 0
    assert server.disk(b"/home/f") == b"abc"
    fs.release(handle)


def test_an_fsync_that_never_left_has_nothing_sent_again(server: FakeServer, fs: Filesystem) -> None:
    handle = fs.create(b"/f", RW, 0o644)
    fs.write(handle, bytes(BLOCK_BYTES), 0)
    fs.files._writeback.flush(handle.file, commit=False)
    lane = handle.remote.lane
    assert lane is not None and handle.file.written and not handle.file.dirty
    before = server.count("WRITE")
    congested = Congested(lane._channel)
    lane._channel = congested
    program = Program(lambda: fs.fsync(handle))
    wait_until(lambda: lane.in_flight == 2, WAIT_S, "the questions")
    assert program.end() == errno.EINTR
    assert handle.file.written and not handle.file.commits
    congested.lock.release()
    fs.fsync(handle)
    assert server.count("WRITE") == before and not handle.file.unsafe
    fs.release(handle)


def test_who_closes_a_file_for_another(
    server: FakeServer, fs: Filesystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was used when its own program let it go. What is closed is closed, and what was sent has left."""
    server.make(b"/home/f")
    owner, other = fs.open(b"/f", RW), fs.open(b"/f", RW)
    lane = owner.remote.lane
    assert lane is not None and lane is other.remote.lane
    send, request, me = fs._remote.write_soon, lane.request, threading.current_thread()

    def released_meanwhile(*arguments: Any) -> None:
        send(*arguments)
        if owner.remote in owner.file.writers:
            fs.files._release(owner)

    def interrupted(kind: int, *parts: Any, **keywords: Any) -> Any:
        if kind == wire.CLOSE and threading.current_thread() is me:
            raise FsError(errno.EINTR)
        return request(kind, *parts, **keywords)

    monkeypatch.setattr(fs._remote, "write_soon", released_meanwhile)
    monkeypatch.setattr(lane, "request", interrupted)
    fs.write(other, bytes(4 * BLOCK_BYTES), 0)
    assert owner.remote.closed and not other.file.leaving
    fs.fsync(other)
    channels = server.connections[-1].channels
    wait_until(lambda: sum(len(channel.handles) for channel in channels) == 1, WAIT_S, "the CLOSE")
    monkeypatch.undo()
    fs.release(other)


def test_another_writer_of_the_file_is_told_nothing(server: FakeServer, fs: Filesystem) -> None:
    server.make(b"/home/f")
    one, other = fs.open(b"/f", RW), fs.open(b"/f", RW)
    fs.write(one, b"one", 0)
    fs.write(other, b"other", 3)
    held = server.arm(Fault("hold", named("OPEN")))
    server.cut()
    program = Program(lambda: fs.flush(one))
    assert held.fired.wait(WAIT_S)
    assert program.end() == errno.EINTR
    held.release()
    fs.flush(other)
    assert server.disk(b"/home/f") == b"oneother"
    fs.release(one)
    fs.release(other)


def test_who_makes_room_is_not_told_of_it_and_the_other_file_neither(
    server: FakeServer, mount: Mount
) -> None:
    """A write that was taken in has happened: a program that goes on after a signal would repeat it."""
    fs = mount(server, dirty_bytes_max=4 * BLOCK_BYTES)
    server.make(b"/home/a")
    server.make(b"/home/b")
    a, b = fs.open(b"/a", RW), fs.open(b"/b", RW)
    held = server.arm(Fault("hold", named("OPEN")))
    server.down = True
    server.cut()
    for number in range(4):
        fs.write(b, b"b" * BLOCK_BYTES, number * BLOCK_BYTES)
    program = Program(lambda: fs.write(a, b"a" * BLOCK_BYTES, 0))
    assert program.waits()
    server.down = False
    assert held.fired.wait(WAIT_S)
    assert program.end() == BLOCK_BYTES
    held.release()
    fs.flush(b)
    fs.flush(a)
    assert server.disk(b"/home/a") == b"a" * BLOCK_BYTES
    assert server.disk(b"/home/b") == b"b" * 4 * BLOCK_BYTES
    fs.release(a)
    fs.release(b)


def test_a_truncation_that_may_be_done_is_asked_for(server: FakeServer, fs: Filesystem, clock: Clock) -> None:
    """Bytes of before it must not be taken for the file's, once something is written behind them."""
    server.make(b"/home/f", b"old" * 1000, mtime=int(clock.s) - 100)
    handle = fs.open(b"/f", RW)
    assert fs.read(handle, 3, 0) == b"old"
    held = server.arm(Fault("hold", named("FSETSTAT")))
    program = Program(lambda: fs.truncate(None, 0, handle))
    assert held.fired.wait(WAIT_S)
    assert program.end() == errno.EINTR
    held.release()
    wait_until(lambda: server.content(b"/home/f") == b"", WAIT_S, "the truncation")
    fs.write(handle, b"new", 3000)
    fs.flush(handle)
    fs.release(handle)
    clock.s += 60
    handle = fs.open(b"/f", os.O_RDONLY)
    assert fs.read(handle, 4000, 0) == bytes(3000) + b"new"
    fs.release(handle)


def test_a_replacement_is_not_left_half_done(server: FakeServer, fs: Filesystem) -> None:
    """libfuse takes an open target's name away first: whoever could be interrupted there would leave no file of that name."""
    server.make(b"/home/config", b"old")
    server.make(b"/home/new", b"new")
    handle = fs.open(b"/config", os.O_RDONLY)
    held = server.arm(Fault("hold", named("posix-rename")))

    def replace() -> None:
        fs.rename(b"/config", b"/.fuse_hidden0001")
        fs.rename(b"/new", b"/config")

    program = Program(replace)
    assert held.fired.wait(WAIT_S)
    ending = threading.Timer(0.5, held.release)
    ending.start()
    assert program.end() is None
    assert server.content(b"/home/config") == b"new"
    assert stat.S_ISREG(fs.getattr(b"/config").mode)
    assert fs.read(handle, 10, 0) == b"old"
    fs.release(handle)
