"""Servers whose disk is small, whose rights are few, or whose files may not grow: for root and for an ordinary user."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import List, Optional

from support.process import Missing, program

_SFTP_SERVERS = (
    "/usr/lib/openssh/sftp-server",
    "/usr/libexec/openssh/sftp-server",
    "/usr/lib/ssh/sftp-server",
)


def sftp_server_program() -> str:
    """OpenSSH's sftp-server as a program of its own. Raises Missing."""
    for path in _SFTP_SERVERS:
        if os.access(path, os.X_OK):
            return path
    raise Missing("The tests need OpenSSH's sftp-server: apt-get install openssh-sftp-server.")


class SmallDisk:
    """A tmpfs on ``directory``; ``options`` are tmpfs's, e.g. "size=16m,nr_inodes=50".

    root mounts it. Anyone else gets it in a namespace of his own, which ``sftp_server`` (for Sshd) enters and ``seen``
    (the directory for the test's own looks) passes through /proc.
    """

    def __init__(self, directory: Path, options: str, *, in_namespace: Optional[bool] = None) -> None:
        self.directory = directory
        self.directory.mkdir()
        self._in_namespace = os.geteuid() != 0 if in_namespace is None else in_namespace
        self._holder: Optional[subprocess.Popen[str]] = None
        mount = ["mount", "-t", "tmpfs", "-o", f"{options},mode=0755", "tmpfs", str(directory)]
        if not self._in_namespace:
            subprocess.run(mount, check=True)
            self.seen = directory
            self.sftp_server = "internal-sftp"
            return
        unshare = [program("unshare", "util-linux"), "--user", "--map-root-user", "--mount"]
        # Lives until its stdin ends, and says when the disk is there.
        script = f"{shlex.join(mount)} && echo mounted && exec cat"
        self._holder = subprocess.Popen(
            [*unshare, "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "mounted\n":
            self.close()
            raise Missing(
                "The tests of full disks need root, or user namespaces: sysctl kernel.unprivileged_userns_clone=1."
            )
        pid = self._holder.pid
        self.seen = Path(f"/proc/{pid}/root{directory}")
        enter = f"{program('nsenter', 'util-linux')} --target {pid} --user --mount --preserve-credentials"
        self.sftp_server = f"{enter} {sftp_server_program()}"

    def __enter__(self) -> SmallDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def administer(self, *command: str) -> bool:
        """Run a command such as mount where the disk is; True where it ended well."""
        enter: List[str] = []
        if self._holder is not None:
            enter = [program("nsenter", "util-linux"), "--target", str(self._holder.pid), "--user", "--mount"]
            enter.append("--preserve-credentials")
        return subprocess.run([*enter, *command]).returncode == 0

    def server_path(self, path: Path) -> Path:
        """What the server has at ``path``, for the test's own looks."""
        return path if self._holder is None else Path(f"/proc/{self._holder.pid}/root{path}")

    def close(self) -> None:
        if self._holder is not None:
            assert self._holder.stdin is not None and self._holder.stdout is not None
            self._holder.stdin.close()
            self._holder.wait(timeout=10.0)
            self._holder.stdout.close()
            self._holder = None
        elif not self._in_namespace:
            # Lazily: an sftp-server that is about to end may still be in it.
            subprocess.run(["umount", "-l", str(self.directory)], check=True)


def ordinary_sftp_server() -> str:
    """An sftp-server that is held to the modes of files, as any is that does not run as root."""
    if os.geteuid() != 0:
        return "internal-sftp"
    capabilities = "-dac_override,-dac_read_search,-fowner,-chown"
    return f"{program('setpriv', 'util-linux')} --bounding-set={capabilities} {sftp_server_program()}"


def growth_limited_sftp_server(directory: Path, blocks: int) -> str:
    """An sftp-server whose files cannot grow past ``blocks`` of 512 bytes: write gives EFBIG, which SFTP calls "failure"."""
    script = directory / "limited-sftp-server"
    script.write_text(f"#!/bin/dash\ntrap '' XFSZ\nulimit -f {blocks}\nexec {sftp_server_program()}\n")
    script.chmod(0o755)
    return str(script)
