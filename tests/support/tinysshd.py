"""tinysshd on 127.0.0.1, which has chacha20-poly1305 and nothing else; it expects an inetd to take connections, which is here."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path
from typing import List, Optional

from support.listener import Listener
from support.own_home import in_own_home
from support.process import program, sftp_server_program
from support.server_files import ServerFiles


class TinySshd(ServerFiles):
    """One server; see support.sshd.Sshd for the attributes. It has one key, of type ed25519, and no algorithms to choose."""

    def __init__(self, tmp_dir: Path) -> None:
        super().__init__(tmp_dir, "tinysshd", ())
        keys = self.dir / "keys"
        subprocess.run([program("tinysshd-makekey", "tinysshd"), "-q", str(keys)], check=True)
        printed = subprocess.run(
            [program("tinysshd-printkey", "tinysshd"), str(keys)], check=True, capture_output=True, text=True
        )
        self._public = printed.stdout.strip()
        self._command = [
            *in_own_home(self.dir, self.user_key.with_suffix(".pub")),
            *[program("tinysshd", "tinysshd"), "-v", "-x", f"sftp={sftp_server_program()}", str(keys)],
        ]
        self._listener: Optional[Listener] = None
        self._processes: List[subprocess.Popen[bytes]] = []

    def public_host_keys(self) -> List[str]:
        return [self._public]

    def __enter__(self) -> TinySshd:
        self._listener = Listener(self._serve, socket.create_server(("127.0.0.1", self.port)))
        self.trust(self.port)
        return self

    def _serve(self, connection: socket.socket) -> None:
        with connection, self.log.open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    self._command, stdin=connection.fileno(), stdout=connection.fileno(), stderr=log
                )
            )

    def __exit__(self, *_: object) -> None:
        if self._listener is not None:
            self._listener.close()
        for process in self._processes:
            process.terminate()
            try:
                process.wait(timeout=5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
