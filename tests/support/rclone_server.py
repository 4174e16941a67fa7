"""``rclone serve sftp`` on 127.0.0.1: Go's SSH and SFTP above rclone's own file system layer, which most people who run it use.

It serves the whole file system, as the others do. What is written goes through its cache of whole files, without which it
refuses to open files for more than one pass of writing; names are looked up anew each time, since its cache of listings would
not see what the tests do behind its back.
"""

from __future__ import annotations

from pathlib import Path

from support.process import program
from support.server_files import ServerProcess


class RcloneServer(ServerProcess):
    """One server; see support.sshd.Sshd for the attributes."""

    def __init__(self, tmp_dir: Path) -> None:
        super().__init__(tmp_dir, "rclone", ("ed25519",))
        self.command = [
            *[program("rclone", "rclone"), "serve", "sftp", "/", "--addr", f"127.0.0.1:{self.port}"],
            *["--config", "", "--cache-dir", str(self.dir / "cache"), "--log-level", "INFO"],
            *["--key", str(self.host_keys["ed25519"]), "--authorized-keys", f"{self.user_key}.pub"],
            *["--vfs-cache-mode", "writes", "--vfs-write-back", "0s", "--dir-cache-time", "0s"],
        ]
