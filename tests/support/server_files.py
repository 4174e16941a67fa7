"""What servers other than sshd have in common with it: keys, known_hosts and a directory to serve; and one way to configure all.

The algorithms of a server are said in sshd_config's words, whatever the server: "KexAlgorithms a,b", "Ciphers", "MACs" and
"HostKeyAlgorithms", one to a line.
"""

from __future__ import annotations

import getpass
import socket
from pathlib import Path
from typing import Dict, List, Sequence

from support.process import free_port
from support.sshd import keygen, public_key, write_known_hosts


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
