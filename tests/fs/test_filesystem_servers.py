"""The same filesystem over the fake server and over OpenSSH's: what the fake tests prove must hold of the real thing."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Iterator

import pytest

from fs.conftest import Mounted
from fs.test_filesystem import OLD, WORK, get, names, noise, put, read_all, refused
from sftp.fake_server import FakeServer
from sftp.places import Place, at_fake, at_server
from sftpmount.cache.blocks import BLOCK_BYTES
from sftpmount.errors import ConnectionLost
from sftpmount.fs.filesystem import Filesystem
from support.process import wait_until
from support.sshd import Sshd

WAIT_S = 20.0


@pytest.fixture(params=["fake", "sshd"])
def place(request: pytest.FixtureRequest, sshd: Sshd, tmp_path: Path) -> Iterator[Place]:
    server = FakeServer()  # by the real clock
    yield at_fake(server) if request.param == "fake" else at_server(sshd, tmp_path)
    server.close()


@pytest.fixture
def mounted(place: Place) -> Iterator[Mounted]:
    opened = Mounted(place, place.root, time.time)
    yield opened
    opened.close()


@pytest.fixture
def fs(mounted: Mounted) -> Filesystem:
    return mounted.fs


def cut(mounted: Mounted) -> None:
    mounted.remote.session().abort(ConnectionLost("on purpose"))


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES + 1, 5_000_001])
def test_round_trip(place: Place, fs: Filesystem, size: int) -> None:
    data = noise(size)
    put(fs, b"/f", data)
    assert place.content(b"f") == data
    assert get(fs, b"/f") == data
    assert fs.getattr(b"/f").size == size


def test_close_to_open(place: Place, fs: Filesystem) -> None:
    for data in (b"one", b"two", b"three", b""):
        place.put(b"f", data)
        assert get(fs, b"/f") == data


def test_our_own_view(place: Place, fs: Filesystem) -> None:
    place.put(b"f", OLD)
    writer, reader = fs.open(b"/f", os.O_RDWR), fs.open(b"/f", os.O_RDONLY)
    fs.write(writer, b"patch", 100_000)
    fs.truncate(None, 120_000, writer)
    fs.write(writer, b"end", 130_000)
    expected = OLD[:100_000] + b"patch" + OLD[100_005:120_000] + bytes(10_000) + b"end"
    assert read_all(fs, reader) == expected
    assert fs.getattr(b"/f").size == len(expected)
    fs.flush(writer)
    assert place.content(b"f") == expected
    assert read_all(fs, reader) == expected
    fs.release(writer)
    fs.release(reader)


@pytest.mark.parametrize("reconnected", [False, True])
@pytest.mark.parametrize("name", WORK)
def test_work_over_a_connection_that_is_cut_once(
    place: Place, mounted: Mounted, name: str, reconnected: bool
) -> None:
    work, expected = WORK[name]
    place.put(b"f", OLD)
    work(_CutOnce(mounted, reconnected, 3))
    for path, data in expected.items():
        assert place.content(path) == data
    assert names(mounted.fs) == sorted(expected)


class _CutOnce:
    """A filesystem whose connection is cut before its k-th call."""

    def __init__(self, mounted: Mounted, reconnected: bool, k: int) -> None:
        self._mounted = mounted
        self._reconnected = reconnected
        self._left = k

    def __getattr__(self, name: str) -> object:
        self._left -= 1
        if self._left == 0:
            cut(self._mounted)
            if self._reconnected:
                wait_until(lambda: self._mounted.remote.reconnects == 1, WAIT_S, "the reconnect")
        return getattr(self._mounted.fs, name)


def test_a_long_write_over_a_connection_that_keeps_ending(place: Place, mounted: Mounted) -> None:
    data = noise(12 << 20)
    writer = threading.Thread(target=put, args=(mounted.fs, b"/f", data), daemon=True)
    writer.start()
    for _ in range(3):
        time.sleep(0.05)  # anywhere in the middle is right
        cut(mounted)
    writer.join(60.0)
    assert not writer.is_alive()
    assert place.content(b"f") == data
    assert get(mounted.fs, b"/f") == data


def test_names(place: Place, fs: Filesystem) -> None:
    fs.mkdir(b"/d", 0o755)
    put(fs, b"/d/\xff\xfe", b"abc")
    fs.link(b"/d/\xff\xfe", b"/k")
    fs.symlink(b"../elsewhere", b"/l")
    fs.rename(b"/d", b"/e")
    assert names(fs) == [b"e", b"k", b"l"]
    assert names(fs, b"/e") == [b"\xff\xfe"]
    assert fs.readlink(b"/l") == b"../elsewhere"
    assert fs.getattr(b"/k").ino == fs.getattr(b"/e/\xff\xfe").ino
    assert refused(lambda: fs.rmdir(b"/e"))
    fs.unlink(b"/e/\xff\xfe")
    fs.rmdir(b"/e")
    assert get(fs, b"/k") == b"abc"
    assert names(fs) == [b"k", b"l"]


def test_attributes(place: Place, fs: Filesystem) -> None:
    put(fs, b"/f", b"abc")
    fs.utimens(b"/f", 1000, 2000)
    fs.chmod(b"/f", 0o640)
    seen = fs.getattr(b"/f")
    assert (seen.atime, seen.mtime, seen.mode & 0o7777) == (1000, 2000, 0o640)
    assert fs.statfs().bavail > 0
