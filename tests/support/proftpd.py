"""ProFTPD's mod_sftp on 127.0.0.1: a third implementation of the SSH protocol, and of SFTP.

It runs in the foreground with users, keys and logs of its own, as whoever runs the tests.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Sequence

from support.process import Missing, program
from support.server_files import ServerProcess, algorithm_lists

_DIRECTIVES = {"KexAlgorithms": "SFTPKeyExchanges", "Ciphers": "SFTPCiphers", "MACs": "SFTPDigests"}


class ProftpdServer(ServerProcess):
    """One server; see support.sshd.Sshd for the attributes, and server_files for ``config``."""

    def __init__(
        self, tmp_dir: Path, config: str = "", *, host_key_types: Sequence[str] = ("ed25519",)
    ) -> None:
        super().__init__(tmp_dir, "proftpd", host_key_types)
        binary = program("proftpd", "proftpd-core")
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
        self.command = [binary, "-n", "-c", str(self.dir / "proftpd.conf")]
        self.output = self.dir / "output"


def _modules() -> Path:
    """The directory of ProFTPD's modules, where the distributions put it."""
    for pattern in ("lib*/proftpd/mod_sftp.so", "lib*/*/proftpd/mod_sftp.so"):
        for module in Path("/usr").glob(pattern):
            return module.parent
    raise Missing("The tests need ProFTPD's mod_sftp: apt-get install proftpd-mod-crypto.")
