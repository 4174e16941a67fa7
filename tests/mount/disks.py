"""Servers whose disk is small, whose rights are few, or whose files may not grow: for root and for an ordinary user."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Optional

from support.namespace import Namespace
from support.process import program, sftp_server_program


class SmallDisk:
    """A tmpfs on ``directory``; ``options`` are tmpfs's, e.g. "size=16m,nr_inodes=50".

    root mounts it. Anyone else gets it in a namespace of his own, which ``sftp_server`` (for Sshd) enters and ``seen``
    (the directory for the test's own looks) passes through /proc.
    """

    def __init__(self, directory: Path, options: str) -> None:
        self.directory = directory
        self.directory.mkdir()
        self._namespace: Optional[Namespace] = None
        mount = ["mount", "-t", "tmpfs", "-o", f"{options},mode=0755", "tmpfs", str(directory)]
        if os.geteuid() == 0:
            subprocess.run(mount, check=True)
            self.sftp_server = "internal-sftp"
        else:
            self._namespace = Namespace(shlex.join(mount))
            self.sftp_server = shlex.join(self._namespace.entering(str(sftp_server_program())))
        self.seen = self.server_path(directory)

    def __enter__(self) -> SmallDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def administer(self, *command: str) -> bool:
        """Run a command such as mount where the disk is; True where it ended well."""
        words = command if self._namespace is None else self._namespace.entering(*command)
        return subprocess.run(words).returncode == 0

    def server_path(self, path: Path) -> Path:
        """What the server has at ``path``, for the test's own looks."""
        return path if self._namespace is None else Path(f"{self._namespace.root}{path}")

    def close(self) -> None:
        if self._namespace is not None:
            self._namespace.close()
        else:
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
