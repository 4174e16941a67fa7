"""Options that change what is shown and who may do what."""

from __future__ import annotations

import errno
import os
import pwd
import stat
import subprocess
from pathlib import Path
from typing import Callable

import pytest

from mount.helpers import is_root, refused
from support.mount import Mount, MountFailed, fuse_mounts
from support.sshd import Sshd


@pytest.fixture
def mounted(sshd: Sshd, make_mount: Callable[..., Mount], tmp_path: Path) -> Callable[..., Mount]:
    """A function of options that mounts a directory with a file ``f`` (0640), a directory ``d`` and a link ``l``."""
    served = sshd.tree / f"options-{tmp_path.name}"
    (served / "d").mkdir(parents=True)
    (served / "f").write_bytes(b"data")
    (served / "f").chmod(0o640)
    (served / "l").symlink_to("f")

    def mount(*options: str) -> Mount:
        words = [word for option in options for word in ("-o", option)]
        return make_mount(sshd, *words, directory=str(served))

    return mount


def nobody() -> pwd.struct_passwd:
    return pwd.getpwnam("nobody")


def as_nobody(*command: object) -> subprocess.CompletedProcess[str]:
    """Run a command as another user; only root can."""
    user = nobody()
    prefix = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    return subprocess.run([*prefix, *map(str, command)], capture_output=True, text=True)


def open_parents(path: Path) -> None:
    """Let other users reach ``path``: pytest's directories are closed to them."""
    for parent in path.parents:
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH)


class TestShownOwners:
    def test_by_default_the_servers(self, mounted: Callable[..., Mount]) -> None:
        mount = mounted()
        if is_root():
            os.chown(mount.served / "f", 12345, 23456)
        for name in ("f", "d", "l"):
            ours, theirs = os.lstat(mount.path / name), os.lstat(mount.served / name)
            assert (ours.st_uid, ours.st_gid, ours.st_mode) == (theirs.st_uid, theirs.st_gid, theirs.st_mode)

    def test_uid_and_gid(self, mounted: Callable[..., Mount]) -> None:
        mount = mounted("uid=4321,gid=5432")
        for name in ("", "f", "d", "l"):
            attributes = os.lstat(mount.path / name)
            assert (attributes.st_uid, attributes.st_gid) == (4321, 5432)
        (mount.path / "new").write_bytes(b"")
        assert (mount.path / "new").stat().st_uid == 4321
        assert (mount.served / "new").stat().st_uid == os.getuid()

    def test_umask(self, mounted: Callable[..., Mount]) -> None:
        mount = mounted("umask=077")
        for name in ("f", "d"):
            assert stat.S_IMODE((mount.path / name).stat().st_mode) & 0o077 == 0
        assert stat.S_ISDIR((mount.path / "d").stat().st_mode)
        assert stat.S_ISREG((mount.path / "f").stat().st_mode)

    def test_idmap_user(self, mounted: Callable[..., Mount]) -> None:
        """The remote user's files are shown as ours; those of others as they are."""
        mount = mounted("idmap=user")
        assert (mount.path / "f").stat().st_uid == os.getuid()
        if is_root():
            os.chown(mount.served / "d", 12345, 0)
            assert (mount.path / "d").stat().st_uid == 12345
        os.chown(mount.path / "f", os.getuid(), -1)
        assert (mount.served / "f").stat().st_uid == os.getuid()


class TestReadOnly:
    def test_nothing_can_be_changed(self, mounted: Callable[..., Mount]) -> None:
        mount = mounted("ro")
        path = mount.path
        assert (path / "f").read_bytes() == b"data"
        assert sorted(os.listdir(path)) == ["d", "f", "l"]
        for call in (
            lambda: os.open(path / "f", os.O_WRONLY),
            lambda: os.open(path / "new", os.O_WRONLY | os.O_CREAT),
            lambda: os.open(path / "f", os.O_RDONLY | os.O_TRUNC),
            lambda: os.truncate(path / "f", 0),
            lambda: os.mkdir(path / "new"),
            lambda: os.rmdir(path / "d"),
            lambda: os.unlink(path / "f"),
            lambda: os.rename(path / "f", path / "g"),
            lambda: os.link(path / "f", path / "g"),
            lambda: os.symlink("f", path / "g"),
            lambda: os.chmod(path / "f", 0o600),
            lambda: os.chown(path / "f", os.getuid(), -1),
            lambda: os.utime(path / "f", (1, 1)),
        ):
            with refused(errno.EROFS):
                call()
        assert sorted(os.listdir(mount.served)) == ["d", "f", "l"]
        assert (mount.served / "f").read_bytes() == b"data"


class TestOtherUsers:
    """root can become another user and look; an ordinary one is told whether fuse.conf lets him invite others."""

    def test_are_kept_out_by_default(self, mounted: Callable[..., Mount]) -> None:
        mount = mounted()
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
            (line,) = [line for line in table if f" {mount.path} " in line]
        assert "allow_other" not in line
        if is_root():
            open_parents(mount.path)
            assert "Permission denied" in as_nobody("ls", mount.path).stderr

    def test_allow_other(self, mounted: Callable[..., Mount]) -> None:
        try:
            mount = mounted("allow_other")
        except MountFailed as failure:
            assert not is_root()
            assert "user_allow_other" in str(failure)
            return
        assert (mount.path / "f").read_bytes() == b"data"
        if is_root():
            open_parents(mount.path)
            assert as_nobody("cat", mount.path / "f").stdout == "data"

    def test_default_permissions(self, mounted: Callable[..., Mount]) -> None:
        """With it, the kernel holds everyone to the modes shown."""
        if is_root():
            mount = mounted("allow_other,default_permissions")
            open_parents(mount.path)
            assert "Permission denied" in as_nobody("cat", mount.path / "f").stderr
            os.chmod(mount.path / "f", 0o644)
            assert as_nobody("cat", mount.path / "f").stdout == "data"
            assert "Permission denied" in as_nobody("rm", "-f", mount.path / "f").stderr
        else:
            mount = mounted("default_permissions")
            os.chmod(mount.path / "f", 0o000)
            with refused(errno.EACCES):
                os.open(mount.path / "f", os.O_RDONLY)


class TestKernelsTable:
    def test_type_source_and_flags(self, mounted: Callable[..., Mount]) -> None:
        mount = mounted()
        assert (str(mount.path), Mount.fstype) in fuse_mounts()
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
            (line,) = [line for line in table if f" {mount.path} " in line]
        assert "nosuid" in line and "nodev" in line

    def test_fsname(self, mounted: Callable[..., Mount]) -> None:
        mount = mounted("fsname=backup-of-mine")
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
            (line,) = [line for line in table if f" {mount.path} " in line]
        assert " backup-of-mine " in line
