"""ProFTPD's mod_sftp on 127.0.0.1: a third implementation of the SSH protocol, and of SFTP.

It runs in the foreground with users, keys and logs of its own, as whoever runs the tests.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Optional, Sequence

from support.process import Missing, program, wait_until
from support.server_files import ServerFiles, algorithm_lists, answers

_DIRECTIVES = {"KexAlgorithms": "SFTPKeyExchanges", "Ciphers": "SFTPCiphers", "MACs": "SFTPDigests"}
_START_TIMEOUT_S = 20.0


class ProftpdServer(ServerFiles):
    """One server; see support.sshd.Sshd for the attributes, and server_files for ``config``."""

    def __init__(
        self, tmp_dir: Path, config: str = "", *, host_key_types: Sequence[str] = ("ed25519",)
    ) -> None:
        super().__init__(tmp_dir, "proftpd", host_key_types)
        self._binary = program("proftpd", "proftpd-core")
        uid, gid = os.getuid(), os.getgid()
        (self.dir / "passwd").write_text(f"{self.user}:x:{uid}:{gid}::{self.dir}:/bin/sh\n")
        (self.dir / "group").write_text(f"{self.user}:x:{gid}:\n")
        for name in ("passwd", "group"):
            (self.dir / name).chmod(0o600)
        rfc4716 = ["ssh-keygen", "-e", "-m", "RFC4716", "-f", f"{self.user_key}.pub"]
        (self.dir / "authorized_keys").write_bytes(
            subprocess.run(rfc4716, check=True, capture_output=True).stdout
        )
        lines = [
            *(f"ModulePath {_modules()}", "LoadModule mod_sftp.c"),
            *("ServerType standalone", "ServerName test", f"User {self.user}", f"Group {self.user}"),
            *("DefaultAddress 127.0.0.1", "SocketBindTight on", "UseIPv6 off", f"Port {self.port}"),
            *(f"AuthUserFile {self.dir}/passwd", f"AuthGroupFile {self.dir}/group"),
            *("AuthOrder mod_auth_file.c", "RootLogin on", "UseFtpUsers off", "RequireValidShell off"),
            *("WtmpLog off", "DelayEngine off", "UseReverseDNS off", "TransferLog none", "AllowOverwrite on"),
            *(
                f"PidFile {self.dir}/pid",
                f"ScoreboardFile {self.dir}/score",
                f"SystemLog {self.dir}/system.log",
            ),
            *("SFTPEngine on", f"SFTPLog {self.log}", "SFTPAuthMethods publickey"),
            *(f"SFTPHostKey {path}" for path in self.host_keys.values()),
            f"SFTPAuthorizedUserKeys file:{self.dir}/authorized_keys",
            *(
                f"{_DIRECTIVES[keyword]} {' '.join(names)}"
                for keyword, names in algorithm_lists(config).items()
            ),
        ]
        (self.dir / "proftpd.conf").write_text("\n".join(lines) + "\n")
        self._process: Optional[subprocess.Popen[bytes]] = None

    def __enter__(self) -> ProftpdServer:
        with (self.dir / "output").open("wb") as output:
            self._process = subprocess.Popen(
                [self._binary, "-n", "-c", str(self.dir / "proftpd.conf")],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        process = self._process
        try:
            wait_until(
                lambda: process.poll() is not None or answers(self.port),
                _START_TIMEOUT_S,
                "proftpd's greeting",
            )
            if process.poll() is not None:
                raise RuntimeError(f"proftpd did not start:\n{(self.dir / 'output').read_text()[-2000:]}")
        except BaseException:
            self.__exit__()
            raise
        self.trust(self.port)
        return self

    def __exit__(self, *_: object) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()  # it ends its sessions too
        try:
            process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _modules() -> Path:
    """The directory of ProFTPD's modules, where the distributions put it."""
    for pattern in ("lib*/proftpd/mod_sftp.so", "lib*/*/proftpd/mod_sftp.so"):
        for module in Path("/usr").glob(pattern):
            return module.parent
    raise Missing("The tests need ProFTPD's mod_sftp: apt-get install proftpd-mod-crypto.")
