"""What servers other than sshd have in common with it: keys, known_hosts and a directory to serve; and one way to configure all.

The algorithms of a server are said in sshd_config's words, whatever the server: "KexAlgorithms a,b", "Ciphers", "MACs" and
"HostKeyAlgorithms", one to a line.
"""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
from pathlib import Path
from typing import Dict, List, Optional, Sequence, TypeVar

from support.process import free_port, wait_until
from support.sshd import keygen, public_key, write_known_hosts

_START_TIMEOUT_S = 20.0
_Self = TypeVar("_Self", bound="ServerProcess")


class ServerFiles:
    """The files of one server in ``tmp_dir``/``name``; see support.sshd.Sshd for the attributes."""

    def __init__(self, tmp_dir: Path, name: str, host_key_types: Sequence[str]) -> None:
        self.dir = Path(tmp_dir) / name
        self.dir.mkdir(mode=0o700, parents=True)
        self.tree = self.dir / "tree"
        self.tree.mkdir()
        self.user = getpass.getuser()
        self.known_hosts = self.dir / "known_hosts"
        self.user_key = keygen(self.dir / "id_ed25519", "ed25519")
        self.host_keys: Dict[str, Path] = {
            kind: keygen(self.dir / f"host_{kind}", kind) for kind in host_key_types
        }
        self.log = self.dir / "server.log"
        self.port = free_port()
        self._ports: List[int] = []

    def trust(self, port: int) -> None:
        """Name the host keys in ``known_hosts`` for another port of 127.0.0.1."""
        if port not in self._ports:
            self._ports.append(port)
            write_known_hosts(self.known_hosts, self._ports, self.public_host_keys())

    def public_host_keys(self) -> List[str]:
        """As known_hosts and authorized_keys hold them."""
        return [public_key(path) for path in self.host_keys.values()]

    def log_text(self) -> str:
        """What the server has logged so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class ServerProcess(ServerFiles):
    """One that is a program in the foreground, ``command``, whose port and files are those of this object.

    What it says goes to ``output``. Its sessions end when it is told to end."""

    def __init__(self, tmp_dir: Path, name: str, host_key_types: Sequence[str]) -> None:
        super().__init__(tmp_dir, name, host_key_types)
        self.command: List[str] = []
        self.output = self.log
        self._process: Optional[subprocess.Popen[bytes]] = None

    def __enter__(self: _Self) -> _Self:
        with self.output.open("ab") as output:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "HOME": str(self.dir)},
                start_new_session=True,
            )
        process = self._process
        try:
            wait_until(
                lambda: process.poll() is not None or answers(self.port),
                _START_TIMEOUT_S,
                f"the greeting of {self.command[0]}",
            )
            if process.poll() is not None:
                raise RuntimeError(
                    f"{self.command[0]} did not start:\n{self.output.read_text(errors='replace')[-2000:]}"
                )
        except BaseException:
            self.__exit__()
            raise
        self.trust(self.port)
        return self

    def __exit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def algorithm_lists(config: str) -> Dict[str, List[str]]:
    """Keyword -> names, of sshd_config's lines."""
    words = (line.partition(" ") for line in config.splitlines() if line)
    return {keyword: [name for name in names.split(",") if name] for keyword, _, names in words}


def answers(port: int) -> bool:
    """Whether something sends an SSH greeting there."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as probe:
            return probe.recv(4) == b"SSH-"
    except OSError:
        return False
