"""An SFTP server in Python (asyncssh), for machines without sshd and as a second, different server.

Unless told otherwise it has the algorithms of support.sshd's hardened sshd, and the same attributes as far as a mount needs
them. It runs in a process of its own, which ends with its standard input; this module is also that process's program.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from support.server_files import ServerFiles, algorithm_lists
from support.sshd import HARDENED_CONFIG

_KEYWORDS = {
    "KexAlgorithms": "kex_algs",
    "Ciphers": "encryption_algs",
    "MACs": "mac_algs",
    "HostKeyAlgorithms": "signature_algs",
}


class AsyncsshServer(ServerFiles):
    """One server; see support.sshd.Sshd for the attributes, and server_files for ``config``.

    ``strict_kex=False`` makes it one of before 2.14.2, which knew no countermeasure against the Terrapin attack."""

    def __init__(
        self,
        tmp_dir: Path,
        config: str = HARDENED_CONFIG,
        *,
        host_key_types: Sequence[str] = ("ed25519", "rsa"),
        strict_kex: bool = True,
    ) -> None:
        super().__init__(tmp_dir, "asyncssh", host_key_types)
        self._lists = algorithm_lists(config)
        self._strict_kex = strict_kex
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
            "strict_kex": self._strict_kex,
            **{_KEYWORDS[keyword]: names for keyword, names in self._lists.items()},
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


# ---- the server's process ----


async def _serve(settings: Dict[str, Any]) -> None:
    import asyncssh  # an extra: only this process needs it

    if not settings.pop("strict_kex"):
        server = asyncssh.SSHServerConnection
        server._get_extra_kex_algs = lambda self: [b"ext-info-s"]  # type: ignore[method-assign]
        server._strict_kex = property(lambda self: False, lambda self, value: None)  # type: ignore[assignment]
    if "kex_algs" in settings:  # without the group exchange, whose moduli asyncssh would generate
        settings["kex_algs"] = [name for name in settings["kex_algs"] if "group-exchange" not in name]
    listener = await asyncssh.listen("127.0.0.1", sftp_factory=True, allow_scp=False, **settings)
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    listener.close()


if __name__ == "__main__":
    asyncio.run(_serve(json.loads(sys.argv[1])))
