"""Several handles of one file on several lanes: a server keeps the order of each lane only."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Tuple

import pytest

from fs.test_filesystem import WAIT_S, Mount, noise, put
from sftp.fake_server import FakeServer, Fault, named
from sftpmount.cache.blocks import BLOCK_BYTES
from sftpmount.fs.filesystem import Filesystem
from sftpmount.fs.handles import Handle
from sftpmount.sftp import wire
from sftpmount.sftp.session import BUSY
from support.process import wait_until

NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL
OLD_BYTES = 3 * BLOCK_BYTES
MORE = noise(2 * BLOCK_BYTES)


@pytest.fixture
def fs(server: FakeServer, mount: Mount) -> Filesystem:
    fs = mount(server, lanes=6)
    session = fs._remote.session()
    wait_until(lambda: session.read_lane is not session.write_lane, WAIT_S, "the first three lanes")
    put(fs, b"/f", noise(OLD_BYTES))
    return fs


def two_handles(server: FakeServer, fs: Filesystem) -> Tuple[Handle, Handle, Fault]:
    """The first one's lane is busy, the second has another."""
    first = fs.open(b"/f", os.O_RDWR)
    lane = first.remote.lane
    assert lane is not None
    fault = server.arm(Fault("hold before", named("FSTAT")))
    for _ in range(BUSY):
        lane.request(wire.FSTAT, wire.string(b"none"))
    assert fault.fired.wait(WAIT_S)
    session = fs._remote.session()
    assert session.lane_to_write() is lane
    wait_until(lambda: session.write_lane is not lane, WAIT_S, "another lane")
    second = fs.open(b"/f", os.O_RDWR)
    assert second.remote.lane is not lane
    return first, second, fault


@pytest.mark.parametrize("offset", [0, OLD_BYTES])
def test_what_went_by_the_one_is_stored_before_the_other_says_so(
    server: FakeServer, fs: Filesystem, offset: int
) -> None:
    first, second, fault = two_handles(server, fs)
    fs.write(second, MORE[:BLOCK_BYTES], offset)
    fs.write(second, MORE[BLOCK_BYTES:], offset + BLOCK_BYTES)
    assert second.file.in_flight and second.file.lanes[first.remote.lane]
    fs.files._release(first)  # it was not the last, and nobody waits for it
    before = len(server.log)
    with ThreadPoolExecutor(1) as pool:
        flushing = pool.submit(fs.flush, second)
        try:
            wait_until(lambda: bool(second.file.request_ended._waiters), WAIT_S, "the flush")  # type: ignore[attr-defined]
            assert not any(request.name in ("fsync", "FSTAT") for request in server.log[before:])
        finally:
            fault.release()
        flushing.result(WAIT_S)
    assert server.disk(b"/home/f")[offset : offset + len(MORE)] == MORE
    assert fs.getattr(b"/f").size == max(OLD_BYTES, offset + len(MORE))
    fs.release(second)


def test_each_goes_on_by_its_own(server: FakeServer, fs: Filesystem) -> None:
    first, second, fault = two_handles(server, fs)
    fs.write(second, MORE[:1000], 0)
    with ThreadPoolExecutor(1) as pool:
        flushing = pool.submit(fs.flush, second)
        wait_until(lambda: bool(second.file.lanes), WAIT_S, "the write")
        fault.release()
        flushing.result(WAIT_S)
    fs.write(first, MORE[1000:2000], 1000)
    fs.release(second)
    fs.flush(first)
    fs.release(first)
    assert server.disk(b"/home/f")[:2000] == MORE[:2000] and not first.file.lanes


def test_who_waits_for_another_lane_keeps_no_others_from_their_own(
    server: FakeServer, fs: Filesystem
) -> None:
    first, second, fault = two_handles(server, fs)
    fs.write(second, MORE[:BLOCK_BYTES], 0)
    fs.write(second, MORE[BLOCK_BYTES:], BLOCK_BYTES)
    assert second.file.lanes[first.remote.lane]
    fs.files._release(first)
    fs.write(second, b"abc", 0)  # small, and what it is written over is on its way still
    lane = second.remote.lane
    assert lane is not None
    with ThreadPoolExecutor(2) as pool:
        flushing = pool.submit(fs.flush, second)
        try:
            wait_until(lambda: bool(second.file.request_ended._waiters), WAIT_S, "the flush")  # type: ignore[attr-defined]
            assert pool.submit(lambda: lane.request(wire.FSTAT, wire.string(b"none"))).result(WAIT_S).wait()
            assert not flushing.done()
        finally:
            fault.release()
        flushing.result(WAIT_S)
    assert server.disk(b"/home/f")[: len(MORE)] == b"abc" + MORE[3:]
    fs.release(second)
