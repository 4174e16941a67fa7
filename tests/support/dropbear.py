"""dropbear on 127.0.0.1, the server of routers and small NAS boxes, with OpenSSH's sftp-server behind it as they have it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import List

from support.own_home import in_own_home
from support.process import program, sftp_server_program
from support.server_files import ServerProcess


class DropbearServer(ServerProcess):
    """One server; see support.sshd.Sshd for the attributes. It has one key, of type ed25519, and no algorithms to choose."""

    def __init__(self, tmp_dir: Path) -> None:
        super().__init__(tmp_dir, "dropbear", ())
        key = self.dir / "key"
        made = subprocess.run(
            [program("dropbearkey", "dropbear-bin"), "-t", "ed25519", "-f", str(key)],
            check=True,
            capture_output=True,
            text=True,
        )
        (line,) = (line for line in made.stdout.splitlines() if line.startswith("ssh-ed25519 "))
        self._public = " ".join(line.split()[:2])
        self.command = [
            *in_own_home(self.dir, self.user_key.with_suffix(".pub")),
            *[program("dropbear", "dropbear-bin"), "-F", "-E", "-m", "-s", "-j", "-k"],
            *["-r", str(key), "-p", f"127.0.0.1:{self.port}", "-P", str(self.dir / "pid")],
            *["-c", str(sftp_server_program())],  # where it was built to look for one differs
        ]

    def public_host_keys(self) -> List[str]:
        return [self._public]
