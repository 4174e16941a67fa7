"""A file that this mount has just made, opened for reading: the server is asked when it is read."""

from __future__ import annotations

import errno
import os
import threading
from typing import Callable, Dict, List

import pytest

from fs.conftest import START_S, Clock
from fs.test_filesystem import CUTS, WAIT_S, get, read_all, refused
from fs.test_owed import make
from sftp.fake_server import FakeServer, Fault, named
from sftpmount.fs.filesystem import Filesystem
from sftpmount.fs.handles import Handle

DATA = b"0123456789"
OLD = int(START_S) - 1000
HIDDEN = b"/.fuse_hidden0000000100000001"


@pytest.fixture
def opened(fs: Filesystem) -> Handle:
    """/f, made here and open for reading."""
    make(fs, b"/f", DATA)
    return fs.open(b"/f", os.O_RDONLY)


def test_what_reads_nothing_asks_nothing(server: FakeServer, fs: Filesystem) -> None:
    make(fs, b"/f", DATA)
    before = server.count() - server.count("CLOSE")  # nobody waits for that
    handle = fs.open(b"/f", os.O_RDONLY)
    assert fs.getattr(b"/f", handle).size == len(DATA)
    fs.chmod(b"/f", 0o644)
    assert fs.getattr(None, handle).mode & 0o777 == 0o644
    fs.flush(handle)
    fs.release(handle)
    assert server.count() - server.count("CLOSE") == before
    assert fs.drain() == []
    assert server.at(b"/home/f").mode & 0o777 == 0o644


def test_a_read_opens_it_once(server: FakeServer, fs: Filesystem, opened: Handle) -> None:
    before = server.count("OPEN")
    got: List[bytes] = []
    readers = [
        threading.Thread(target=lambda: got.append(fs.read(opened, 100, 0)), daemon=True) for _ in range(4)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(WAIT_S)
    assert got == [DATA] * 4
    assert server.count("OPEN") == before + 1
    fs.release(opened)
    assert server.count("OPEN") == before + 1


def test_another_client_wrote_as_much(server: FakeServer, fs: Filesystem, opened: Handle) -> None:
    for mtime in (OLD, int(START_S)):
        server.make(b"/home/f", b"abcdefghij", mtime=mtime)
        assert read_all(fs, opened) == b"abcdefghij", "never what we have written"
        fs.release(opened)
        fs.unlink(b"/f")
        make(fs, b"/f", DATA)
        opened = fs.open(b"/f", os.O_RDONLY)


def test_another_client_wrote_more(server: FakeServer, fs: Filesystem, opened: Handle) -> None:
    server.make(b"/home/f", b"more than it was")
    assert refused(lambda: fs.read(opened, 100, 0)) == errno.ESTALE
    assert get(fs, b"/f") == b"more than it was"


def test_another_client_removed_it(server: FakeServer, fs: Filesystem, opened: Handle) -> None:
    del server.at(b"/home").children[b"f"]
    assert refused(lambda: fs.read(opened, 100, 0)) == errno.ESTALE
    fs.release(opened)


def test_another_client_put_a_directory_there(server: FakeServer, fs: Filesystem, opened: Handle) -> None:
    server.make_dir(b"/home/f")
    assert refused(lambda: fs.read(opened, 100, 0)) in (errno.ESTALE, errno.EISDIR)
    fs.release(opened)


def rename(server: FakeServer, fs: Filesystem) -> None:
    fs.rename(b"/f", b"/g")


def rename_and_another_takes_its_name(server: FakeServer, fs: Filesystem) -> None:
    fs.rename(b"/f", b"/g")
    make(fs, b"/f", b"another's.")


def remove(server: FakeServer, fs: Filesystem) -> None:
    fs.rename(b"/f", HIDDEN)


def replace(server: FakeServer, fs: Filesystem) -> None:
    make(fs, b"/g", b"another's.")
    fs.rename(b"/f", HIDDEN)
    fs.rename(b"/g", b"/f")


def remove_one_of_two(server: FakeServer, fs: Filesystem) -> None:
    fs.link(b"/f", b"/g")
    fs.rename(b"/f", HIDDEN)


def set_attributes(server: FakeServer, fs: Filesystem) -> None:
    fs.chmod(b"/f", 0o400)
    fs.utimens(b"/f", OLD, OLD)


CHANGES = [rename, rename_and_another_takes_its_name, remove, replace, remove_one_of_two, set_attributes]


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_we_do_to_it(
    server: FakeServer,
    fs: Filesystem,
    opened: Handle,
    change: Callable[[FakeServer, Filesystem], None],
    lost: bool,
) -> None:
    change(server, fs)
    if lost:
        server.cut()
    assert read_all(fs, opened) == DATA
    fs.release(opened)
    assert fs.drain() == []


def test_its_directory_is_renamed(server: FakeServer, fs: Filesystem) -> None:
    fs.mkdir(b"/d", 0o755)
    make(fs, b"/d/f", DATA)
    handle = fs.open(b"/d/f", os.O_RDONLY)
    fs.rename(b"/d", b"/e")
    assert read_all(fs, handle) == DATA


def test_a_writer_makes_it_longer(server: FakeServer, fs: Filesystem, opened: Handle) -> None:
    writer = fs.open(b"/f", os.O_RDWR)
    fs.write(writer, b"more", len(DATA))
    assert read_all(fs, opened) == DATA + b"more"
    fs.flush(writer)
    fs.release(writer)
    assert read_all(fs, opened) == DATA + b"more"


def test_it_is_cut_here(fs: Filesystem, opened: Handle) -> None:
    fs.truncate(b"/f", 3)
    assert read_all(fs, opened) == DATA[:3]


@pytest.mark.parametrize("act", CUTS)
@pytest.mark.parametrize("request_name", ["OPEN", "LSTAT", "READ"])
def test_the_connection_breaks(
    server: FakeServer, fs: Filesystem, clock: Clock, act: str, request_name: str
) -> None:
    make(fs, b"/f", DATA)
    clock.s += 5
    handle = fs.open(b"/f", os.O_RDONLY)
    handle.file.distrust()
    server.arm(Fault(act, named(request_name)))
    assert read_all(fs, handle) == DATA
    fs.release(handle)


def test_the_server_lets_nobody_read_it(
    make_server: Callable[..., FakeServer], mount: Callable[..., Filesystem]
) -> None:
    server = make_server(root_user=False)
    fs = mount(server)
    make(fs, b"/f", DATA)
    handle = fs.open(b"/f", os.O_RDONLY)
    server.at(b"/home/f").mode &= ~0o400
    for _ in range(2):
        assert refused(lambda: fs.read(handle, 10, 0)) == errno.EACCES
    server.at(b"/home/f").mode |= 0o400
    assert read_all(fs, handle) == DATA
    fs.release(handle)


def test_what_we_may_not_read_is_refused_at_the_open(
    make_server: Callable[..., FakeServer], mount: Callable[..., Filesystem]
) -> None:
    server = make_server(root_user=False)
    fs = mount(server)
    make(fs, b"/f", DATA)
    fs.chmod(b"/f", 0o200)
    assert refused(lambda: fs.open(b"/f", os.O_RDONLY)) == errno.EACCES


def test_other_opens_ask_the_server(server: FakeServer, fs: Filesystem, clock: Clock) -> None:
    cases: Dict[str, int] = {"write": os.O_WRONLY, "both": os.O_RDWR, "empty": os.O_RDONLY | os.O_TRUNC}
    for flags in cases.values():
        make(fs, b"/f", DATA)
        before = server.count("OPEN")
        fs.release(fs.open(b"/f", flags))
        assert server.count("OPEN") == before + 1
        fs.unlink(b"/f")
    make(fs, b"/f", DATA)
    clock.s += fs.lifetime_s + 1
    server.make(b"/home/f", b"longer than that")
    handle = fs.open(b"/f", os.O_RDONLY)
    assert fs.getattr(b"/f", handle).size == 16, "close-to-open"
    assert read_all(fs, handle) == b"longer than that"
