"""An SFTP server in Python (asyncssh), for machines without sshd and as a second, different server.

The same algorithms as the hardened sshd of support.sshd, and the same attributes as far as a mount needs them. It runs in
a process of its own, which ends with its standard input; this module is also that process's program.
"""

from __future__ import annotations

import asyncio
import getpass
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

from support.process import free_port
from support.sshd import HARDENED_CONFIG, keygen, public_key, write_known_hosts


class AsyncsshServer:
    """One server; see support.sshd.Sshd for the attributes."""

    def __init__(self, tmp_dir: Path, kex: Optional[str] = None) -> None:
        """``kex``: the only key exchange, in place of the hardened sshd's."""
        self.dir = Path(tmp_dir) / "asyncssh"
        self.dir.mkdir(mode=0o700, parents=True)
        self.tree = self.dir / "tree"
        self.tree.mkdir()
        self.user = getpass.getuser()
        self.known_hosts = self.dir / "known_hosts"
        self.user_key = keygen(self.dir / "id_ed25519", "ed25519")
        self.host_keys = {kind: keygen(self.dir / f"host_{kind}", kind) for kind in ("ed25519", "rsa")}
        self.log = self.dir / "server.log"
        self.port = free_port()
        self._kex = kex
        self._ports: List[int] = []
        self._process: Optional[subprocess.Popen[bytes]] = None

    def __enter__(self) -> AsyncsshServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server; it takes connections when this returns. Raises RuntimeError with its log's end."""
        settings = {
            "port": self.port,
            "server_host_keys": [str(path) for path in self.host_keys.values()],
            "authorized_client_keys": f"{self.user_key}.pub",
            "kex": self._kex,
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "support.asyncssh_server", json.dumps(settings)],
                cwd=Path(__file__).resolve().parents[1],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            self.stop()
            raise RuntimeError(f"the asyncssh server did not start:\n{self.log.read_text()[-2000:]}")
        self.trust(self.port)

    def stop(self) -> None:
        """End the server and its connections. Does nothing when it is down."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            try:
                process.wait(timeout=5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()

    def trust(self, port: int) -> None:
        """Name the host keys in ``known_hosts`` for another port of 127.0.0.1."""
        if port not in self._ports:
            self._ports.append(port)
            write_known_hosts(self.known_hosts, self._ports, map(public_key, self.host_keys.values()))


# ---- the server's process ----


async def _serve(settings: Dict[str, Any]) -> None:
    import asyncssh  # an extra: only this process needs it

    offers = dict(line.split(" ", 1) for line in HARDENED_CONFIG.splitlines())
    listener = await asyncssh.listen(
        "127.0.0.1",
        settings["port"],
        server_host_keys=settings["server_host_keys"],
        authorized_client_keys=settings["authorized_client_keys"],
        sftp_factory=True,
        allow_scp=False,
        # Without the group exchange, whose moduli asyncssh would generate.
        kex_algs=[settings["kex"]]
        if settings["kex"]
        else [name for name in offers["KexAlgorithms"].split(",") if "group-exchange" not in name],
        encryption_algs=offers["Ciphers"].split(","),
        mac_algs=offers["MACs"].split(","),
    )
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    listener.close()


if __name__ == "__main__":
    asyncio.run(_serve(json.loads(sys.argv[1])))
