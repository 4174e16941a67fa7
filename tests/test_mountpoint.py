"""mountpoint: what is refused to mount on, read from the kernel's table, and taking a mount away."""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from typing import Callable, Iterator, List, Optional, Tuple

import pytest

from sftpmount import mountpoint
from sftpmount.errors import MountpointError
from sftpmount.mountpoint import Mounted

TABLE = r"""22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
36 22 0:40 / /mnt/with\040space rw shared:7 master:1 - fuse.sftpmount user@host:a\040b rw,user_id=0
37 22 0:41 / /mnt/twice rw - ext4 /dev/sdb rw
38 37 0:42 / /mnt/twice rw - fuse.sshfs host: rw
39 22 0:43 / /mnt/auto rw - autofs systemd-1 rw,fd=33
"""


@pytest.fixture
def table(tmp_path: Path) -> str:
    path = tmp_path / "mountinfo"
    path.write_text(TABLE)
    return str(path)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/mnt/with space", Mounted(36, "fuse.sftpmount", "user@host:a b", "0:40", 0)),
        ("/mnt/twice", Mounted(38, "fuse.sshfs", "host:", "0:42")),
        ("/mnt", None),
        ("/", Mounted(22, "ext4", "/dev/sda1", "8:1")),
    ],
)
def test_the_topmost_mount_is_found(path: str, expected: Optional[Mounted], table: str) -> None:
    assert mountpoint.mounted_at(path, table) == expected


def test_the_kernels_own_table_is_understood() -> None:
    proc = mountpoint.mounted_at("/proc")
    assert proc is not None and proc.kind == "proc" and proc.mount_id > 0
    assert mountpoint.mounted_at("/proc/self") is None


def test_an_empty_directory_is_accepted(tmp_path: Path) -> None:
    assert mountpoint.check(str(tmp_path), nonempty=False) == tmp_path.stat().st_dev


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".hidden").touch()
    for name, sentence in [
        ("absent", "does not exist: create it with mkdir"),
        ("file", "is not a directory"),
        ("file/x", "is not a directory"),
        ("full", "is not empty, and may hold a backup made while nothing was mounted there"),
        ("x" * 300, "cannot be used (File name too long)"),
    ]:
        with pytest.raises(MountpointError) as caught:
            mountpoint.check(str(tmp_path / name), nonempty=False)
        assert sentence in str(caught.value) and caught.value.exit_status == 3
    assert mountpoint.check(str(tmp_path / "full"), nonempty=True) == tmp_path.stat().st_dev


def test_a_mountpoint_in_use_is_refused() -> None:
    with pytest.raises(MountpointError, match=r"/proc is in use as the mountpoint of .* \(proc\)"):
        mountpoint.check("/proc", nonempty=False)


@pytest.mark.parametrize(
    ("present", "nonempty", "accepted"),
    [
        (Mounted(1, "autofs", "systemd-1"), False, True),
        (Mounted(1, "fuse.sshfs", "h:"), False, False),
        (Mounted(1, "fuse.sshfs", "h:"), True, True),
        (Mounted(1, "fuse.sftpmount", "h:\x1b[m"), True, False),
    ],
)
def test_mounts_that_are_there_already(
    present: Mounted, nonempty: bool, accepted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mountpoint, "mounted_at", lambda path: present)
    if present.kind == "autofs":  # looking into it would wait for the very mount that is being made
        monkeypatch.setattr(os, "listdir", lambda path: pytest.fail("looked into an automount point"))
    if accepted:
        assert mountpoint.check(str(tmp_path), nonempty=nonempty)
        return
    with pytest.raises(MountpointError) as caught:
        mountpoint.check(str(tmp_path), nonempty=nonempty)
    assert f"run fusermount3 -u {tmp_path} first." in str(caught.value) and "\x1b" not in str(caught.value)


def test_a_dead_mount_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead(path: str) -> os.stat_result:
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    monkeypatch.setattr(os, "stat", dead)
    monkeypatch.setattr(os, "statvfs", dead)
    assert mountpoint.is_stale(str(tmp_path))
    with pytest.raises(MountpointError, match=r"run fusermount3 -uz .* first"):
        mountpoint.check(str(tmp_path), nonempty=False)


@pytest.mark.parametrize(
    ("uid", "mode", "owner", "writable", "accepted"),
    [
        (0, 0o755, 1, False, True),
        (1000, 0o755, 1000, True, True),
        (1000, 0o755, 0, False, False),
        (1000, 0o777, 0, True, True),
        (1000, 0o1777, 0, True, False),
        (1000, 0o1777, 1000, True, True),
    ],
)
def test_whose_directory_may_be_mounted_on(
    uid: int,
    mode: int,
    owner: int,
    writable: bool,
    accepted: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = tmp_path.stat().st_dev
    found = os.stat_result((0o40000 | mode, 1, device, 2, owner, owner, 0, 0, 0, 0))
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(os, "stat", lambda path: found)
    monkeypatch.setattr(os, "access", lambda path, how: writable)
    if accepted:
        assert mountpoint.check(str(tmp_path), nonempty=False) == device
    else:
        with pytest.raises(MountpointError, match="is not yours to mount on"):
            mountpoint.check(str(tmp_path), nonempty=False)


@pytest.fixture
def fusermount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a shell script in fusermount3's place; its arguments are written to the file returned."""

    def install(script: str) -> Path:
        program = tmp_path / "bin" / "fusermount3"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        return tmp_path / "calls"

    return install


MINE = Mounted(7, "fuse.sftpmount", "h:", "0:7")


@pytest.mark.parametrize(
    ("present", "script", "in_use", "calls"),
    [
        (MINE, "rm table", False, ["-u -- /m"]),
        (MINE, '[ "$1" = -uz ] && rm table', True, ["-u -- /m", "-uz -- /m"]),
        (MINE, "exit 1", False, ["-u -- /m", "-uz -- /m"]),
        (MINE._replace(mount_id=8), "exit 0", False, []),  # a copy
        (
            MINE._replace(device="0:8"),
            "exit 0",
            True,
            [],
        ),  # has got the number of ours, which is out of sight
        (None, "exit 0", True, []),
    ],
)
def test_unmount_takes_away_only_its_own_mount(
    present: Optional[Mounted],
    script: str,
    in_use: bool,
    calls: List[str],
    fusermount: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = fusermount(f"cd {tmp_path}; {script}")
    (tmp_path / "table").touch()
    tables: Iterator[Optional[Mounted]] = itertools.chain([MINE], itertools.repeat(present))

    def every_mount(table: str = "") -> Iterator[Tuple[str, Mounted]]:
        seen = next(tables) if (tmp_path / "table").exists() else None
        yield from [("/m", seen)] if seen else []

    monkeypatch.setattr(mountpoint, "_every_mount", every_mount)
    assert mountpoint.OwnMount("/m").unmount() is in_use
    assert (record.read_text().splitlines() if record.exists() else []) == calls
