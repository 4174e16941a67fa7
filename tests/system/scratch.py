"""A mount namespace in which sftpmount is installed and /etc/fstab is the test's; the machine itself is left alone.

root gets a mount namespace; anyone else one in a user namespace in which he is root.
"""

from __future__ import annotations

import json
import os
import pwd
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Optional, Union

from support.mount import CHECKOUT
from support.namespace import DROP_COPIES, Namespace
from support.process import is_running, wait_until
from support.sshd import Server

WAIT_S = 30.0
INSTALL = CHECKOUT / "contrib" / "install"

_SETUP = """
mount -t tmpfs -o mode=0755 tmpfs {stage}
mkdir -p {stage}/upper/ssh {stage}/work
touch {stage}/upper/fstab {stage}/upper/ssh/ssh_config {stage}/upper/ssh/known
mount -t overlay -o lowerdir={root}/sbin:/usr/sbin overlay /usr/sbin
mount -t overlay -o lowerdir={root}/usr/local:/usr/local overlay /usr/local
mount -t overlay -o lowerdir=/etc,upperdir={stage}/upper,workdir={stage}/work overlay /etc
{for_others}
"""
# For other users: the interpreter, where it lies in a directory that is closed to them, shown through an open one.
_OPEN = """
mkdir -m 0755 {stage}/open{number} {stage}/work{number}
mount -t overlay -o lowerdir={closed},upperdir={stage}/open{number},workdir={stage}/work{number} overlay {closed}
"""
# /dev/fuse as Debian's rules make it: open to everybody. A user namespace cannot make devices, and has no other users.
_FUSE_FOR_ALL = """
mknod -m 0666 {stage}/fuse c 10 229
mount --bind {stage}/fuse /dev/fuse
echo user_allow_other >>/etc/fuse.conf
"""


class Scratch:
    """The namespace; ``root`` is what contrib/install has put into it, ``mnt`` an empty directory for everybody."""

    def __init__(self, tmp_path: Path) -> None:
        self.root = tmp_path / "root"
        self.mnt = tmp_path / "mnt"
        self.mnt.mkdir(parents=True)
        open_to_others(self.mnt)
        self.command = write_command(tmp_path / "sftpmount")
        install(self.root, self.command)
        bin_dir = self.root / "usr" / "local" / "bin"
        bin_dir.mkdir(parents=True)
        (bin_dir / "sftpmount").symlink_to(self.command)
        stage = tmp_path / "stage"
        stage.mkdir()
        is_root = os.geteuid() == 0
        names = {"stage": shlex.quote(str(stage)), "root": shlex.quote(str(self.root))}
        for_others = [_FUSE_FOR_ALL.format(**names)]
        for number, closed in enumerate(_closed_above(sys.executable, sys.base_prefix, CHECKOUT)):
            for_others.append(_OPEN.format(number=number, closed=shlex.quote(str(closed)), **names))
        script = DROP_COPIES + _SETUP.format(for_others="".join(for_others) if is_root else "", **names)
        self._namespace = Namespace(script)

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self.unmount_all()
        self._namespace.close()

    def unmount_all(self) -> None:
        """Take every mount of sftpmount away and wait for the end of its process."""
        pids = self.mount_pids()
        for path in reversed(self.fuse_mountpoints()):
            self.run("umount", "-l", "-i", path)
        for pid in pids:
            wait_until(lambda pid=pid: not is_running(pid), WAIT_S, "the end of a mount")  # type: ignore[misc]

    def run(
        self, *words: str, user: Optional[str] = None, env: Optional[Dict[str, str]] = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the namespace, as ``user`` (only root can), with no more of an environment than init gives."""
        return subprocess.run(
            self.entering(*words, user=user),
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60.0,
        )

    def entering(self, *words: str, user: Optional[str] = None) -> List[str]:
        """The command line that runs ``words`` in the namespace."""
        as_user = (
            ["setpriv", f"--reuid={user}", f"--regid={pwd.getpwnam(user).pw_gid}", "--init-groups"]
            if user
            else []
        )
        return self._namespace.entering(*as_user, *words)

    def fstab(self, *lines: str) -> None:
        """Let /etc/fstab be these lines."""
        self.write("/etc/fstab", "".join(line + "\n" for line in lines))

    def write(self, path: str, text: str) -> None:
        """Let ``path``, a file below /etc that the namespace has a copy of, hold ``text``."""
        self._inside(path).write_text(text)

    def findmnt(self, path: Path) -> Dict[str, str]:
        """target, source, fstype and options of what is mounted on ``path``; {} for nothing."""
        shown = self.run("findmnt", "--json", "--mountpoint", str(path))
        found: List[Dict[str, str]] = json.loads(shown.stdout)["filesystems"] if shown.stdout else []
        return found[0] if found else {}

    def fuse_mountpoints(self) -> List[str]:
        """Of the test's own mounts; an ordinary user cannot drop the copies of others."""
        shown = self.run(
            "findmnt", "--list", "--noheadings", "--types", "fuse.sftpmount", "--output", "TARGET"
        )
        return [path for path in shown.stdout.split() if path.startswith(f"{self.mnt.parent}/")]

    def mount_pids(self) -> List[int]:
        """The processes in the namespace that are mounts."""
        own = os.readlink(f"/proc/{self._namespace.pid}/ns/mnt")
        return [
            int(entry)
            for entry in os.listdir("/proc")
            if entry.isdigit() and _namespace(int(entry)) == own and b"sftpmount" in _command_line(int(entry))
        ]

    def _inside(self, path: str) -> Path:
        return Path(f"{self._namespace.root}{path}")


def write_command(path: Path) -> Path:
    """A program ``path`` that is the checkout's command, for users whose environment has no PYTHONPATH."""
    path.write_text(
        f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(CHECKOUT))} exec {shlex.quote(sys.executable)} -m sftpmount "$@"\n'
    )
    path.chmod(0o755)
    return path


def install(root: Path, command: Path, *more: str) -> List[str]:
    """Run contrib/install into ``root``; returns what it printed, by lines."""
    done = subprocess.run(
        [str(INSTALL), f"--command={command}", *more],
        env={**os.environ, "DESTDIR": str(root)},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.splitlines()


def key_of(user: str, server: Server, directory: Path) -> Path:
    """A copy of the server's user key in ``directory`` that is ``user``'s own."""
    key = directory / f"key-of-{user}"
    key.write_bytes(server.user_key.read_bytes())
    key.chmod(0o600)
    os.chown(key, pwd.getpwnam(user).pw_uid, -1)
    open_to_others(directory)
    return key


def open_to_others(path: Path) -> None:
    """Let everybody reach ``path``, though pytest closes its directories to others."""
    for each in [path, *path.parents]:
        status = each.stat()
        if status.st_uid == os.getuid() and status.st_mode & 0o055 != 0o055 and each != Path("/"):
            each.chmod(status.st_mode | 0o055)


def _closed_above(*paths: Union[str, Path]) -> List[Path]:
    """The directories above ``paths`` that only their owner may pass."""
    above = {parent for path in paths for parent in Path(path).parents}
    return sorted(each for each in above if not each.stat().st_mode & 0o001)


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except OSError:
        return ""


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def words_of(shown: subprocess.CompletedProcess[str]) -> str:
    """Everything that a command said, for messages of failed assertions."""
    return f"status {shown.returncode}: {shown.stdout}{shown.stderr}"
