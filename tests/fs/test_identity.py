"""After a reconnect: the directory that was mounted, or none (promise 3: an unreachable server is never an empty one)."""

from __future__ import annotations

import errno
import stat
from typing import Callable, List

import pytest

from fs.conftest import START_S, Clock
from sftp.fake_server import FakeServer, Fault, Inode, named
from sftpmount.errors import FsError
from sftpmount.fs.filesystem import Filesystem
from support.process import wait_until

WAIT_S = 20.0
Mount = Callable[..., Filesystem]


def names(fs: Filesystem, path: bytes = b"/") -> List[bytes]:
    return sorted(name for name, _, _ in fs.readdir(path))


class Disk:
    """The server's file system at /home, which can be unmounted: an empty directory on another one is in its place then."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.contents = server.root.children[b"home"]
        self.fsid = server.fsid

    def unmount(self) -> None:
        self.server.root.children[b"home"] = Inode(stat.S_IFDIR | 0o755, int(START_S))
        self.server.fsid = self.fsid + 1

    def mount(self, *, fsid: int = 0) -> None:
        self.server.root.children[b"home"] = self.contents
        self.server.fsid = fsid or self.fsid


@pytest.fixture
def disk(server: FakeServer) -> Disk:
    server.make(b"/home/backup", b"the last copy")
    return Disk(server)


@pytest.mark.parametrize("without", [(), (b"statvfs@openssh.com",)])
def test_another_directory_is_waited_out(
    make_server: Callable[..., FakeServer], mount: Mount, without: List[bytes]
) -> None:
    server = make_server(without=without)
    server.make(b"/home/backup", b"the last copy")
    disk, fs = Disk(server), mount(server, retry_timeout_s=1.0)
    assert names(fs) == [b"backup"]
    disk.unmount()
    server.cut()
    with pytest.raises(FsError) as raised:
        fs.readdir(b"/")
    assert raised.value.errno == errno.ETIMEDOUT
    disk.mount()
    wait_until(lambda: fs._remote.connected, WAIT_S, "the reconnect")
    assert names(fs) == [b"backup"]


def test_an_absent_directory_is_waited_out(server: FakeServer, disk: Disk, mount: Mount) -> None:
    fs = mount(server, retry_timeout_s=1.0)
    del server.root.children[b"home"]
    server.cut()
    with pytest.raises(FsError) as raised:
        fs.getattr(b"/backup")
    assert raised.value.errno == errno.ETIMEDOUT
    disk.mount()
    wait_until(lambda: fs._remote.connected, WAIT_S, "the reconnect")
    assert fs.getattr(b"/backup").size == 13


def test_a_file_in_its_place_is_waited_out(server: FakeServer, disk: Disk, mount: Mount) -> None:
    fs = mount(server, retry_timeout_s=1.0)
    server.root.children[b"home"] = Inode(stat.S_IFREG | 0o644, int(START_S))
    server.cut()
    with pytest.raises(FsError) as raised:
        fs.getattr(b"/backup")
    assert raised.value.errno == errno.ETIMEDOUT


def test_an_id_that_changed_with_a_reboot_is_no_other_directory(server: FakeServer, mount: Mount) -> None:
    for number in range(40):
        server.make(b"/home/%d" % number)
    disk, fs = Disk(server), mount(server)
    before = names(fs)
    for name in before[:5]:
        fs.getattr(b"/" + name)
    server.cut()
    disk.mount(fsid=77)
    assert names(fs) == before
    server.cut()
    disk.mount(fsid=77)
    assert names(fs) == before


def test_what_others_removed_meanwhile_is_no_other_directory(
    server: FakeServer, disk: Disk, mount: Mount
) -> None:
    fs = mount(server)
    assert names(fs) == [b"backup"]
    disk.contents.children.clear()
    server.cut()
    assert names(fs) == []


def test_an_empty_directory_elsewhere_is_another_one(server: FakeServer, mount: Mount) -> None:
    """Nothing was in it yet, and the first backup must not go beside its disk."""
    disk, fs = Disk(server), mount(server, retry_timeout_s=1.0)
    disk.unmount()
    server.cut()
    with pytest.raises(FsError) as raised:
        fs.mkdir(b"/new", 0o755)
    assert raised.value.errno == errno.ETIMEDOUT
    assert server.root.children[b"home"].children == {}


@pytest.mark.parametrize("look", [lambda fs: names(fs), lambda fs: fs.getattr(b"/backup").size])
def test_a_disk_that_is_unmounted_under_a_living_session_is_waited_for(
    server: FakeServer, disk: Disk, mount: Mount, clock: Clock, look: Callable[[Filesystem], object]
) -> None:
    fs = mount(server, retry_timeout_s=1.0)
    before = look(fs)
    clock.s += 60
    disk.unmount()
    with pytest.raises(FsError) as raised:
        look(fs)
    assert raised.value.errno == errno.ETIMEDOUT
    disk.mount()
    wait_until(lambda: fs._remote.connected, WAIT_S, "the reconnect")
    assert look(fs) == before


def test_what_others_removed_is_removed(server: FakeServer, disk: Disk, mount: Mount, clock: Clock) -> None:
    fs = mount(server)
    assert names(fs) == [b"backup"]
    clock.s += 60
    disk.contents.children.clear()
    with pytest.raises(FsError) as raised:
        fs.getattr(b"/backup")
    assert raised.value.errno == errno.ENOENT
    assert names(fs) == []
    assert fs._remote.reconnects == 0


STATVFS = b"statvfs@openssh.com"


@pytest.mark.parametrize("without", [(), (STATVFS,)])
def test_one_known_name_is_proof_enough(
    make_server: Callable[..., FakeServer], mount: Mount, clock: Clock, without: List[bytes]
) -> None:
    """Another client has removed the others."""
    server = make_server(without=without)
    for number in range(5):
        server.make(b"/home/%d" % number)
    fs = mount(server)
    assert len(names(fs)) == 5
    for number in range(4):
        del server.root.children[b"home"].children[b"%d" % number]
    clock.s += 60
    with pytest.raises(FsError) as raised:
        fs.getattr(b"/0")
    assert raised.value.errno == errno.ENOENT
    assert fs._remote.reconnects == 0
    server.fsid += 1
    server.cut()
    assert names(fs) == [b"4"]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("change", ["posix-rename", "REMOVE", "RMDIR"])
@pytest.mark.parametrize("id_changes", [False, True])
def test_a_name_that_is_being_changed_proves_nothing(
    make_server: Callable[..., FakeServer], mount: Mount, count: int, change: str, id_changes: bool
) -> None:
    """Its request was the last that the lost session carried out."""
    server = make_server(without=() if id_changes else (STATVFS,))
    for number in range(count):
        server.make(b"/home/%d" % number)
    fs = mount(server, retry_timeout_s=5.0)
    if change == "RMDIR":
        fs.mkdir(b"/d", 0o755)
    names(fs)

    def another_id() -> None:
        server.fsid += id_changes

    server.arm(Fault("cut after", named(change), then=another_id))
    if change == "posix-rename":
        fs.rename(b"/0", b"/other")
    elif change == "REMOVE":
        fs.unlink(b"/0")
    else:
        fs.rmdir(b"/d")
    assert fs._remote.reconnects == 1


def test_a_server_that_cannot_tell_the_id_once_is_asked_again(server: FakeServer, mount: Mount) -> None:
    fs = mount(server, retry_timeout_s=1.0)
    disk = Disk(server)
    server.arm(Fault("status", named("statvfs")))
    server.cut()
    wait_until(lambda: fs._remote.reconnects == 1 and fs._remote.connected, WAIT_S, "the reconnect")
    assert names(fs) == []
    disk.unmount()
    server.cut()
    with pytest.raises(FsError) as raised:
        fs.mkdir(b"/new", 0o755)
    assert raised.value.errno == errno.ETIMEDOUT


def test_a_disk_is_missed_where_something_else_lies_below_it(
    server: FakeServer, disk: Disk, mount: Mount
) -> None:
    fs = mount(server, retry_timeout_s=1.0)
    assert names(fs) == [b"backup"]
    disk.unmount()
    server.make(b"/home/NOT-MOUNTED")
    with pytest.raises(FsError) as raised:
        names(fs)
    assert raised.value.errno == errno.ETIMEDOUT
