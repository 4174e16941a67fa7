"""The server's disk is there no more, or not as it was: rights taken away, read-only, removed, unmounted, another in its place.

Each is told with its own errno, harms no other file, and is over for the mount when it is over on the server. After a
reconnect nothing but the directory that was mounted is served: an empty one of the same name is no empty backup.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from pathlib import Path
from typing import Callable, Iterator

import pytest

from faults.test_outage import Caller
from mount.disks import SmallDisk, ordinary_sftp_server
from mount.helpers import Here, noise, opened, refused
from mount.test_errors import KEYS, MIB, write_file
from support.mount import Mount
from support.process import wait_until
from support.sshd import Sshd

RETRY_S = 1.0
SLACK_S = 5.0
PATIENT = ["-o", "retry_timeout=60,dcache_timeout=0"]
QUICK = ["-o", f"retry_timeout={RETRY_S:g},dcache_timeout=0"]


class TestRightsTakenAway:
    """An sftp-server that is held to modes; what it has open stays open to it, as POSIX says."""

    @pytest.fixture
    def sshd(self, tmp_path: Path) -> Iterator[Sshd]:
        with Sshd(tmp_path, sftp_server=ordinary_sftp_server(), host_key_types=KEYS) as sshd:
            (sshd.tree / "d").mkdir()
            (sshd.tree / "d" / "f").write_bytes(noise(MIB))
            (sshd.tree / "d" / "g").write_bytes(b"g")
            (sshd.tree / "kept").write_bytes(noise(MIB, 2))
            yield sshd
            (sshd.tree / "d").chmod(0o755)

    @pytest.fixture
    def here(self, sshd: Sshd, make_mount: Callable[..., Mount]) -> Here:
        return Here(make_mount(sshd, *PATIENT).path, sshd.tree)

    def test_a_directory_with_a_file_open_in_it(self, here: Here) -> None:
        with opened(here.path / "d" / "f", os.O_RDWR) as fd:
            os.chmod(here.served / "d", 0o000)
            for call in (
                lambda: os.listdir(here.path / "d"),
                lambda: os.open(here.path / "d" / "f", os.O_RDONLY),
                lambda: os.open(here.path / "d" / "new", os.O_CREAT | os.O_WRONLY),
                lambda: os.mkdir(here.path / "d" / "new"),
                lambda: os.unlink(here.path / "d" / "g"),  # libfuse hides an open one, and then says EBUSY
            ):
                with refused(errno.EACCES):
                    call()
            os.pwrite(fd, b"still open", 0)
            os.fsync(fd)
            assert os.pread(fd, 10, 0) == b"still open"
            assert (here.path / "kept").read_bytes() == noise(MIB, 2)
            assert write_file(here.path / "other", MIB, fsync=True).stage is None
        os.chmod(here.served / "d", 0o755)
        assert sorted(os.listdir(here.path / "d")) == ["f", "g"]
        assert (here.path / "d" / "f").read_bytes() == (here.served / "d" / "f").read_bytes()
        assert (here.served / "d" / "f").read_bytes() == b"still open" + noise(MIB)[10:]
        assert (here.served / "other").read_bytes() == noise(MIB)

    @pytest.mark.parametrize("what", ["d", "d/f"])
    def test_a_reconnect_that_may_not_open_the_file_again(self, sshd: Sshd, here: Here, what: str) -> None:
        fd = os.open(here.path / "d" / "f", os.O_RDWR)
        os.pwrite(fd, noise(1000, 3), 0)
        os.chmod(here.served / what, 0o000)
        sshd.kill_sessions()
        with refused(errno.EACCES):
            os.fsync(fd)
        with refused(errno.EACCES):
            os.open(here.path / "d" / "f", os.O_RDONLY)
        assert (here.path / "kept").read_bytes() == noise(MIB, 2)
        os.chmod(here.served / what, 0o755)
        os.pwrite(fd, noise(1000, 3), 0)
        os.fsync(fd)
        os.close(fd)
        assert (here.served / "d" / "f").read_bytes() == noise(1000, 3) + noise(MIB)[1000:]
        assert (here.path / "d" / "f").read_bytes() == (here.served / "d" / "f").read_bytes()


class TestReadOnly:
    def test_everything_that_changes_anything_is_erofs(self, tmp_path: Path) -> None:
        disk = SmallDisk(tmp_path / "disk", "size=16m")
        with (
            disk,
            served_by(tmp_path, disk) as sshd,
            Mount(sshd, tmp_path, directory=str(disk.directory)) as mount,
        ):
            seen = disk.seen
            (seen / "d").mkdir()
            (seen / "f").write_bytes(noise(MIB))
            os.symlink("f", seen / "l")
            path = mount.path
            calls = (
                lambda: os.open(path / "new", os.O_CREAT | os.O_WRONLY),
                lambda: os.open(path / "new", os.O_CREAT | os.O_EXCL | os.O_WRONLY),
                lambda: os.open(path / "f", os.O_WRONLY),
                lambda: os.open(path / "f", os.O_RDWR | os.O_TRUNC),
                lambda: os.mkdir(path / "new"),
                lambda: os.rmdir(path / "d"),
                lambda: os.unlink(path / "f"),
                lambda: os.unlink(path / "l"),
                lambda: os.rename(path / "f", path / "g"),
                lambda: os.rename(path / "d", path / "e"),
                lambda: os.symlink("f", path / "m"),
                lambda: os.link(path / "f", path / "g"),
                lambda: os.chmod(path / "f", 0o600),
                lambda: os.utime(path / "f", (1, 1)),
                lambda: os.truncate(path / "f", 10),
            )
            with opened(path / "f", os.O_RDONLY) as fd:
                self.remount(disk, "ro")
                for call in calls:
                    with refused(errno.EROFS):
                        call()
                assert os.pread(fd, MIB, 0) == noise(MIB)
            assert sorted(os.listdir(path)) == sorted(os.listdir(seen)) == ["d", "f", "l"]
            assert (path / "f").read_bytes() == (seen / "f").read_bytes() == noise(MIB)
            self.remount(disk, "rw")
            assert write_file(path / "f", 2 * MIB, fsync=True).stage is None
            assert (seen / "f").read_bytes() == noise(MIB) * 2
            for call in calls[4:6]:
                call()
            os.rename(path / "f", path / "g")
            assert sorted(os.listdir(seen)) == ["g", "l", "new"]

    def test_bytes_on_their_way_when_the_server_comes_back_read_only(self, tmp_path: Path) -> None:
        """As after a crash with a damaged disk: what fsync and close say of a file that is still open."""
        with SmallDisk(tmp_path / "disk", "size=16m") as disk, served_by(tmp_path, disk) as sshd:
            with Mount(sshd, tmp_path, *PATIENT, directory=str(disk.directory)) as mount:
                (mount.path / "kept").write_bytes(noise(MIB, 2))
                (mount.path / "f").write_bytes(noise(2000))
                caller = Caller("fsync", f"{mount.path}/f")
                sshd.kill()
                self.remount(disk, "ro")
                sshd.start()
                caller.go()
                assert caller.answer(60.0).result == "EROFS"
                caller.close()
                assert (mount.path / "kept").read_bytes() == noise(MIB, 2)
                self.remount(disk, "rw")
                assert (disk.seen / "f").read_bytes() == (mount.path / "f").read_bytes() == noise(2000)
                assert write_file(mount.path / "f", MIB, fsync=True).stage is None
                assert (disk.seen / "f").read_bytes() == (mount.path / "f").read_bytes() == noise(MIB)

    @staticmethod
    def remount(disk: SmallDisk, how: str) -> None:
        """Waits for the server to have closed what it had open for writing."""
        command = ("mount", "-o", f"remount,bind,{how}", str(disk.directory))
        wait_until(lambda: disk.administer(*command), 10.0, f"remounted {how}", 0.1)


@contextlib.contextmanager
def served_by(tmp_path: Path, disk: SmallDisk) -> Iterator[Sshd]:
    with Sshd(tmp_path, sftp_server=disk.sftp_server, host_key_types=KEYS) as sshd:
        yield sshd


class Place:
    """A directory on the server on which disks are mounted and unmounted, as an administrator, or a reboot, does."""

    def __init__(self, tmp_path: Path, disk: SmallDisk) -> None:
        self.directory = tmp_path / "place"
        self.directory.mkdir()
        self._disk = disk  # where it is for an ordinary user, the place must be, too

    def attach(self, disk: SmallDisk) -> None:
        assert self._disk.administer("mount", "--bind", str(disk.directory), str(self.directory))

    def detach(self) -> None:
        assert self._disk.administer("umount", "-l", str(self.directory))


def never_answers(call: Callable[[], object]) -> None:
    """Waits as in an outage, and then fails as in one: neither an answer nor "not found"."""
    began = time.monotonic()
    with refused(errno.ETIMEDOUT, errno.EIO):
        call()
    assert time.monotonic() - began < RETRY_S + SLACK_S


class TestUnmountedDisk:
    """``inside`` is the mounted directory's place on the disk: its root, or deeper."""

    @pytest.mark.parametrize(
        ("inside", "instead"),
        [
            ("", "nothing"),
            pytest.param("backups", "nothing", marks=pytest.mark.long),
            pytest.param("", "another disk", marks=pytest.mark.long),
            pytest.param("backups", "another disk", marks=pytest.mark.long),
        ],
    )
    def test_a_reconnect_to_another_directory_waits_for_the_right_one(
        self, tmp_path: Path, inside: str, instead: str
    ) -> None:
        with contextlib.ExitStack() as stack:
            disk = stack.enter_context(SmallDisk(tmp_path / "disk", "size=16m"))
            place = Place(tmp_path, disk)
            other = stack.enter_context(SmallDisk(tmp_path / "other", "size=16m"))
            for each in (disk.seen, other.seen, place.directory):
                (each / inside).mkdir(exist_ok=True)
            place.attach(disk)
            stack.callback(place.detach)
            sshd = stack.enter_context(served_by(tmp_path, disk))
            directory = str(place.directory / inside)
            mount = stack.enter_context(Mount(sshd, tmp_path, *QUICK, directory=directory))
            for count in range(5):
                (mount.path / f"f{count}").write_bytes(noise(1000, count))
            # Not this process: each program that it starts would close its copy, and wait with that for the server.
            caller = Caller("fsync", f"{mount.path}/f4")
            stack.callback(caller.close)

            sshd.stop()
            place.detach()
            if instead == "another disk":
                place.attach(other)
            sshd.start()
            never_answers(lambda: os.listdir(mount.path))
            never_answers(lambda: os.stat(mount.path / "f0"))
            never_answers(lambda: (mount.path / "f0").read_bytes())
            never_answers(lambda: (mount.path / "new").write_bytes(b"into the void"))
            caller.go()
            answer = caller.answer(60.0)
            assert answer.result in ("ETIMEDOUT", "EIO") and answer.took_s < RETRY_S + SLACK_S
            assert (
                os.listdir(disk.server_path(place.directory / inside)) == []
            )  # nothing was written beside the disk

            if instead == "another disk":
                place.detach()
            place.attach(disk)
            names = [f"f{count}" for count in range(5)]
            wait_until(lambda: _names_or_error(mount.path) == names, 30.0, "the disk is back")
            for count in range(4):
                assert (mount.path / f"f{count}").read_bytes() == noise(1000, count)
            # Its writer was told "unknown": the server may have taken it at the end of that process, or not.
            last = (disk.seen / inside / "f4").read_bytes()
            assert last in (noise(1000, 4), b"x" * 1000)
            assert (mount.path / "f4").read_bytes() == last
            assert write_file(mount.path / "new", MIB, fsync=True).stage is None
            assert (disk.seen / inside / "new").read_bytes() == noise(MIB)

    def test_a_wait_ends_when_the_disk_is_mounted_in_time(self, tmp_path: Path) -> None:
        with contextlib.ExitStack() as stack:
            disk = stack.enter_context(SmallDisk(tmp_path / "disk", "size=16m"))
            place = Place(tmp_path, disk)
            place.attach(disk)
            stack.callback(place.detach)
            sshd = stack.enter_context(served_by(tmp_path, disk))
            options = ["-o", "retry_timeout=60"]
            mount = stack.enter_context(Mount(sshd, tmp_path, *options, directory=str(place.directory)))
            (mount.path / "f").write_bytes(noise(1000))
            place.detach()
            sshd.kill_sessions()
            wait_until(
                lambda: "no connection yet" in mount.log_text(), 20.0, "the wrong directory is noticed"
            )
            place.attach(disk)
            assert os.listdir(mount.path) == ["f"]
            assert (mount.path / "f").read_bytes() == noise(1000)


def _names_or_error(path: Path) -> object:
    """Sorted names; an empty listing fails here."""
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        assert error.errno in (errno.ETIMEDOUT, errno.EIO)
        return None
    assert names != []
    return names


class TestRemovedDirectory:
    @pytest.mark.parametrize("reconnects", [False, True])
    def test_it_is_an_error_until_it_is_there_again(
        self, own_sshd: Sshd, make_mount: Callable[..., Mount], reconnects: bool
    ) -> None:
        served, aside = own_sshd.tree / "served", own_sshd.tree / "aside"
        served.mkdir()
        mount = make_mount(own_sshd, *QUICK, directory=str(served))
        (mount.path / "f").write_bytes(noise(1000))
        served.rename(aside)
        if reconnects:
            own_sshd.kill_sessions()
        gone = (errno.ENOENT, errno.ETIMEDOUT, errno.EIO)
        with refused(*gone):
            os.listdir(mount.path)
        with refused(*gone):
            (mount.path / "new").write_bytes(b"x")
        aside.rename(served)
        if reconnects:
            wait_until(lambda: _names_or_error(mount.path) == ["f"], 30.0, "the directory is back")
        assert os.listdir(mount.path) == ["f"]
        assert (mount.path / "f").read_bytes() == noise(1000)
        assert write_file(mount.path / "new", MIB, fsync=True).stage is None
        assert (served / "new").read_bytes() == noise(MIB)

    def test_a_new_one_of_the_same_name_is_shown_as_it_is(
        self, own_sshd: Sshd, make_mount: Callable[..., Mount]
    ) -> None:
        served = own_sshd.tree / "served"
        served.mkdir()
        mount = make_mount(own_sshd, *QUICK, directory=str(served))
        (mount.path / "old").write_bytes(noise(1000))
        fd = os.open(mount.path / "old", os.O_RDWR)
        shutil.rmtree(served)
        with refused(errno.ENOENT):
            os.listdir(mount.path)
        served.mkdir()
        (served / "other").write_bytes(noise(10))
        assert os.listdir(mount.path) == ["other"]
        os.pwrite(fd, b"x", 0)
        os.close(fd)  # the removed file is open still, as on a local disk
        assert write_file(mount.path / "new", MIB, fsync=True).stage is None
        assert (served / "new").read_bytes() == noise(MIB)
        assert sorted(os.listdir(served)) == ["new", "other"]
