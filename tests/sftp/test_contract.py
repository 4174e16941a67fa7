"""One contract for every server: ``Remote`` on the fake server and on OpenSSH's. What the fake gets wrong shows here.

The errnos are those of a local file system: the comparison test carries each refused operation out on a local directory too.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path
from typing import Callable, Iterator, List

import pytest

from sftp.fake_server import FakeServer
from sftp.places import Place, at_fake, at_server
from sftpmount.errors import FsError
from sftpmount.sftp import wire
from sftpmount.sftp.lane import Pending
from sftpmount.sftp.remote import FSYNC, Remote
from sftpmount.sftp.remote_file import RemoteFile
from sftpmount.sftp.wire import Attrs
from support.sshd import Sshd

R, W, CREAT, TRUNC, EXCL = wire.FXF_READ, wire.FXF_WRITE, wire.FXF_CREAT, wire.FXF_TRUNC, wire.FXF_EXCL


class Both:
    """Opens remotes, one for each place that a module asks for."""

    def __init__(self, sshd: Sshd) -> None:
        self.sshd = sshd
        self.server = FakeServer()
        self.fake = at_fake(self.server)
        self._remotes: List[Remote] = []
        self._real: List[Remote] = []

    def start(self, place: Place) -> Remote:
        remote = Remote(place.dial, retry_timeout_s=20.0)
        remote.start()
        self._remotes.append(remote)
        return remote

    def close(self) -> None:
        for remote in self._remotes:
            remote.close()
        self.server.close()


@pytest.fixture(scope="module")
def both(sshd: Sshd) -> Iterator[Both]:
    opened = Both(sshd)
    yield opened
    opened.close()


@pytest.fixture(scope="module", params=["fake", "sshd"])
def shared(
    request: pytest.FixtureRequest, both: Both, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Place, Remote]:
    place = (
        both.fake if request.param == "fake" else at_server(both.sshd, tmp_path_factory.mktemp("contract"))
    )
    return place, both.start(place)


@pytest.fixture
def remote(shared: tuple[Place, Remote]) -> Remote:
    return shared[1]


@pytest.fixture
def place(shared: tuple[Place, Remote], request: pytest.FixtureRequest) -> Place:
    """A fresh directory for one test."""
    above, remote = shared
    name = above / request.node.name.encode().replace(b"/", b"-")[:200]
    remote.mkdir(name, 0o755)
    return Place(above.kind, above.dial, name, above.fake)


def close(remote: Remote, file: RemoteFile) -> None:
    """Close it, with the server's verdict."""
    remote.commit_by_close(file)
    remote.close_file(file)


def write(remote: Remote, file: RemoteFile, offset: int, data: bytes) -> None:
    ended = threading.Event()
    failures: List[BaseException] = []

    def done(pending: Pending) -> None:
        try:
            pending.expect_ok()
        except Exception as error:
            failures.append(error)
        ended.set()

    remote.write_soon(file, remote.session(), offset, [memoryview(data)], done)
    assert ended.wait(20.0)
    if failures:
        raise failures[0]


def put(remote: Remote, path: bytes, data: bytes = b"", mode: int = 0o644) -> None:
    file, _ = remote.open(path, W | CREAT | TRUNC, Attrs(mode=mode))
    for start in range(0, len(data), 32768):
        write(remote, file, start, data[start : start + 32768])
    close(remote, file)


def get(remote: Remote, path: bytes) -> bytes:
    file, attrs = remote.open(path, R)
    data = remote.read(file, 0, (attrs.size or 0) + 10)
    close(remote, file)
    return data


def names(remote: Remote, path: bytes) -> List[bytes]:
    return sorted(entry.name for entry in remote.listdir(path))


def refusal(act: Callable[[], object]) -> int:
    """The errno that ``act`` is refused with."""
    with pytest.raises(FsError) as caught:
        act()
    assert caught.value.errno is not None
    return caught.value.errno


class TestFiles:
    @pytest.mark.parametrize("size", [0, 1, 32768, 261120, 300_001])
    def test_what_was_written_is_read(self, remote: Remote, place: Place, size: int) -> None:
        data = os.urandom(size)
        put(remote, place / b"f", data)
        assert get(remote, place / b"f") == data == place.content(b"f")

    def test_reads_stop_at_the_end(self, remote: Remote, place: Place) -> None:
        put(remote, place / b"f", b"0123456789")
        file, attrs = remote.open(place / b"f", R)
        assert attrs.size == 10
        assert remote.read(file, 8, 100) == b"89"
        assert remote.read(file, 10, 1) == remote.read(file, 1 << 40, 100) == b""
        assert remote.read(file, 3, 0) == b""
        close(remote, file)

    def test_writes_behind_the_end_leave_a_hole(self, remote: Remote, place: Place) -> None:
        file, _ = remote.open(place / b"f", R | W | CREAT)
        write(remote, file, 5, b"x")
        assert remote.read(file, 0, 100) == b"\0\0\0\0\0x"
        close(remote, file)

    def test_open_modes(self, remote: Remote, place: Place) -> None:
        put(remote, place / b"f", b"old")
        file, attrs = remote.open(place / b"f", W | CREAT)
        assert attrs.size == 3
        close(remote, file)
        file, attrs = remote.open(place / b"f", W | TRUNC)
        assert attrs.size == 0
        close(remote, file)
        assert refusal(lambda: remote.open(place / b"f", W | CREAT | EXCL)) == errno.EEXIST
        assert refusal(lambda: remote.open(place / b"none", W)) == errno.ENOENT
        file, attrs = remote.open(place / b"new", W | CREAT | EXCL, Attrs(mode=0o600))
        assert stat.S_IMODE(attrs.mode or 0) == 0o600
        close(remote, file)

    def test_fstat_and_fsync_behind_the_writes(self, remote: Remote, place: Place) -> None:
        assert remote.has(FSYNC)
        file, _ = remote.open(place / b"f", W | CREAT)
        session = remote.session()
        ended = threading.Semaphore(0)
        for i in range(20):
            remote.write_soon(
                file, session, i * 1000, [memoryview(bytes(1000))], lambda pending: ended.release()
            )
        synced: List[Pending] = []
        remote.fsync_soon(file, session, lambda pending: (synced.append(pending), ended.release()))  # type: ignore[func-returns-value]
        assert remote.fstat_soon(file, session).wait().attrs().size == 20_000
        for _ in range(21):
            assert ended.acquire(timeout=20.0)
        synced[0].expect_ok()
        close(remote, file)

    def test_a_handle_outlives_the_name(self, remote: Remote, place: Place) -> None:
        put(remote, place / b"f", b"abc")
        file, _ = remote.open(place / b"f", R)
        remote.unlink(place / b"f")
        assert remote.read(file, 0, 10) == b"abc"
        close(remote, file)
        assert refusal(lambda: remote.lstat(place / b"f")) == errno.ENOENT

    def test_a_closed_handle_is_closed(self, remote: Remote, place: Place) -> None:
        put(remote, place / b"f", b"abc")
        file, _ = remote.open(place / b"f", R)
        close(remote, file)
        close(remote, file)
        assert refusal(lambda: remote.read(file, 0, 1)) == errno.EBADF

    def test_commit_by_close_leaves_a_file_that_can_be_used(self, remote: Remote, place: Place) -> None:
        file, _ = remote.open(place / b"f", R | W | CREAT | TRUNC)
        write(remote, file, 0, b"abc")
        remote.commit_by_close(file)
        write(remote, file, 3, b"def")
        assert remote.read(file, 0, 10) == b"abcdef"
        close(remote, file)


class TestAttributes:
    def test_of_each_kind(self, remote: Remote, place: Place) -> None:
        put(remote, place / b"f", b"abc", 0o640)
        remote.mkdir(place / b"d", 0o750)
        remote.symlink(b"f", place / b"l")
        f, d, link = (remote.lstat(place / name) for name in (b"f", b"d", b"l"))
        assert (f.size, f.mode) == (3, stat.S_IFREG | 0o640)
        assert d.mode == stat.S_IFDIR | 0o750
        assert stat.S_ISLNK(link.mode or 0)
        assert stat.S_ISREG(remote.stat(place / b"l").mode or 0)
        assert (f.uid, f.gid) == (os.getuid(), os.getgid())

    def test_mode_times_and_size_by_path(self, remote: Remote, place: Place) -> None:
        put(remote, place / b"f", b"0123456789")
        remote.setstat(place / b"f", Attrs(size=4))
        remote.setstat(
            place / b"f", Attrs(mode=0o4711)
        )  # last: a truncation by an ordinary user takes set-id bits away
        remote.setstat(place / b"f", Attrs(atime=11, mtime=0xFFFFFFFF))
        attrs = remote.lstat(place / b"f")
        assert (attrs.mode, attrs.size, attrs.atime, attrs.mtime) == (0o104711, 4, 11, 0xFFFFFFFF)
        assert get(remote, place / b"f") == b"0123"

    def test_through_a_handle(self, remote: Remote, place: Place) -> None:
        file, _ = remote.open(place / b"f", W | CREAT)
        remote.fsetstat(file, Attrs(size=7))
        remote.fsetstat(file, Attrs(mode=0o400))
        remote.fsetstat(file, Attrs(atime=1, mtime=2))
        close(remote, file)
        attrs = remote.lstat(place / b"f")
        assert (attrs.size, attrs.mode, attrs.mtime) == (7, 0o100400, 2)
        assert place.content(b"f") == bytes(7)

    def test_of_a_link_itself(self, remote: Remote, place: Place) -> None:
        put(remote, place / b"f")
        remote.setstat(place / b"f", Attrs(atime=5, mtime=5))
        remote.symlink(b"f", place / b"l")
        remote.setstat(place / b"l", Attrs(atime=9, mtime=9), is_symlink=True)
        assert remote.lstat(place / b"l").mtime == 9
        assert remote.lstat(place / b"f").mtime == 5

    def test_statvfs(self, remote: Remote, place: Place) -> None:
        disk = remote.statvfs(place.root)
        assert disk.bavail > 0
        assert disk.namemax == 255


class TestNames:
    def test_a_listing_has_every_name_and_its_attributes(self, remote: Remote, place: Place) -> None:
        wanted = {b"f%03d" % i: i for i in range(250)}
        for name, size in wanted.items():
            place.put(name, bytes(size))
        entries = remote.listdir(place.root)
        assert {entry.name: entry.attrs.size for entry in entries} == wanted
        assert all(stat.S_ISREG(entry.attrs.mode or 0) for entry in entries)

    def test_an_empty_directory_has_no_names(self, remote: Remote, place: Place) -> None:
        assert remote.listdir(place.root) == []

    @pytest.mark.parametrize(
        "name", [b"\xff\xfe", b" ", b"a\nb", b"-rf", "ä€😀".encode(), b"x" * 255, b"..."]
    )
    def test_names_of_any_bytes(self, remote: Remote, place: Place, name: bytes) -> None:
        put(remote, place / name, name)
        assert names(remote, place.root) == [name]
        remote.rename(place / name, place / b"other")
        remote.rename(place / b"other", place / name)
        assert get(remote, place / name) == name
        remote.unlink(place / name)
        assert names(remote, place.root) == []

    def test_mkdir_and_rmdir(self, remote: Remote, place: Place) -> None:
        remote.mkdir(place / b"d", 0o700)
        assert names(remote, place.root) == [b"d"]
        remote.rmdir(place / b"d")
        assert names(remote, place.root) == []

    def test_rename_replaces_a_file(self, remote: Remote, place: Place) -> None:
        put(remote, place / b"a", b"new")
        put(remote, place / b"b", b"old")
        remote.rename(place / b"a", place / b"b")
        assert names(remote, place.root) == [b"b"]
        assert get(remote, place / b"b") == b"new"

    def test_rename_replaces_an_empty_directory(self, remote: Remote, place: Place) -> None:
        remote.mkdir(place / b"a", 0o755)
        put(remote, place / b"a/f", b"x")
        remote.mkdir(place / b"b", 0o755)
        remote.rename(place / b"a", place / b"b")
        assert names(remote, place.root) == [b"b"]
        assert names(remote, place / b"b") == [b"f"]

    def test_rename_to_itself_does_nothing(self, remote: Remote, place: Place) -> None:
        put(remote, place / b"a", b"x")
        remote.rename(place / b"a", place / b"a")
        assert get(remote, place / b"a") == b"x"

    def test_symlinks_keep_their_target_as_it_is(self, remote: Remote, place: Place) -> None:
        for number, target in enumerate([b"f", b"../..//x", b"/no/where", b"\xff", b"a" * 1000]):
            remote.symlink(target, place / b"l%d" % number)
            assert remote.readlink(place / b"l%d" % number) == target

    def test_a_hard_link_is_the_same_file(self, remote: Remote, place: Place) -> None:
        put(remote, place / b"a", b"x")
        remote.link(place / b"a", place / b"b")
        remote.setstat(place / b"a", Attrs(size=5))
        assert remote.lstat(place / b"b").size == 5
        remote.unlink(place / b"a")
        assert get(remote, place / b"b") == b"x\0\0\0\0"

    def test_realpath(self, remote: Remote, place: Place) -> None:
        remote.mkdir(place / b"x", 0o755)
        assert remote.realpath(place.root + b"/.//x/../.") == place.root
        assert remote.realpath(b".").startswith(b"/")


class Local:
    """The same operations on a local directory, which say what errno is right."""

    def __init__(self, root: bytes) -> None:
        self.root = root

    def __truediv__(self, name: bytes) -> bytes:
        return self.root + b"/" + name

    mkdir = staticmethod(os.mkdir)
    rmdir = staticmethod(os.rmdir)
    unlink = staticmethod(os.unlink)
    rename = staticmethod(os.rename)
    symlink = staticmethod(os.symlink)
    link = staticmethod(os.link)
    readlink = staticmethod(os.readlink)
    listdir = staticmethod(os.listdir)
    lstat = staticmethod(os.lstat)

    @staticmethod
    def open(path: bytes, pflags: int) -> None:
        flags = {R: os.O_RDONLY, W: os.O_WRONLY, R | W: os.O_RDWR}[pflags & (R | W)]
        flags |= (
            os.O_CREAT * bool(pflags & CREAT)
            | os.O_TRUNC * bool(pflags & TRUNC)
            | os.O_EXCL * bool(pflags & EXCL)
        )
        os.close(os.open(path, flags))


# The kernel itself answers some of these (it knows what is a directory), but a stale dentry lets any of them through.
REFUSED = {
    "mkdir over a file": lambda r, p: r.mkdir(p / b"file", 0o755),
    "mkdir over a directory": lambda r, p: r.mkdir(p / b"full", 0o755),
    "mkdir in nothing": lambda r, p: r.mkdir(p / b"none/x", 0o755),
    "rmdir of nothing": lambda r, p: r.rmdir(p / b"none"),
    "rmdir of a full directory": lambda r, p: r.rmdir(p / b"full"),
    "rmdir of a file": lambda r, p: r.rmdir(p / b"file"),
    "rmdir of a link": lambda r, p: r.rmdir(p / b"link"),
    "unlink of nothing": lambda r, p: r.unlink(p / b"none"),
    "unlink of a directory": lambda r, p: r.unlink(p / b"empty"),
    "rename of nothing": lambda r, p: r.rename(p / b"none", p / b"x"),
    "rename of nothing onto a file": lambda r, p: r.rename(p / b"none", p / b"file"),
    "rename into nothing": lambda r, p: r.rename(p / b"file", p / b"none/x"),
    "rename of a file onto a directory": lambda r, p: r.rename(p / b"file", p / b"empty"),
    "rename of a directory onto a file": lambda r, p: r.rename(p / b"empty", p / b"file"),
    "rename of a directory onto a full one": lambda r, p: r.rename(p / b"empty", p / b"full"),
    "rename of a directory into itself": lambda r, p: r.rename(p / b"full", p / b"full/x"),
    "symlink over a file": lambda r, p: r.symlink(b"t", p / b"file"),
    "symlink in nothing": lambda r, p: r.symlink(b"t", p / b"none/x"),
    "link over a file": lambda r, p: r.link(p / b"file", p / b"full"),
    "link of nothing": lambda r, p: r.link(p / b"none", p / b"x"),
    "link of a directory": lambda r, p: r.link(p / b"empty", p / b"x"),
    "readlink of a file": lambda r, p: r.readlink(p / b"file"),
    "readlink of nothing": lambda r, p: r.readlink(p / b"none"),
    "listing of nothing": lambda r, p: r.listdir(p / b"none"),
    "listing of a file": lambda r, p: r.listdir(p / b"file"),
    "opening nothing": lambda r, p: r.open(p / b"none", R),
    "opening a directory for writing": lambda r, p: r.open(p / b"empty", W),
    "creating over a directory": lambda r, p: r.open(p / b"empty", W | CREAT),
    "creating exclusively over a directory": lambda r, p: r.open(p / b"empty", W | CREAT | EXCL),
    "creating exclusively over a link to nothing": lambda r, p: r.open(p / b"link", W | CREAT | EXCL),
    "creating in nothing": lambda r, p: r.open(p / b"none/x", W | CREAT),
    "a look through a file": lambda r, p: r.lstat(p / b"file/x"),
    "a name too long": lambda r, p: r.mkdir(p / (b"x" * 256), 0o755),
    "a look at a name too long": lambda r, p: r.lstat(p / (b"x" * 256)),
    "a path too long": lambda r, p: r.lstat(p / (b"x/" * 3000)),
}  # type: ignore[var-annotated]


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_have_the_errno_of_a_local_file_system(
    remote: Remote, place: Place, tmp_path: Path, what: str
) -> None:
    local = Local(bytes(tmp_path))
    for root, maker in ((local, os.mkdir), (place, lambda path: remote.mkdir(path, 0o755))):
        maker(root / b"empty")
        maker(root / b"full")
        maker(root / b"full/x")
    (tmp_path / "file").touch()
    os.symlink(b"nowhere", local / b"link")
    put(remote, place / b"file")
    remote.symlink(b"nowhere", place / b"link")
    with pytest.raises(OSError) as right:
        REFUSED[what](local, local)
    got = refusal(lambda: REFUSED[what](remote, place))
    if what == "a look through a file" and got == errno.ENOENT:
        return  # the server says the same of both, and to ask after every ENOENT would cost a round trip
    assert errno.errorcode[got] == errno.errorcode[right.value.errno or 0]
    assert names(remote, place.root) == [b"empty", b"file", b"full", b"link"], "nothing was changed by it"
