"""Start the server that a case describes, and certify its host key."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, Union

from servers.cases import ASYNCSSH, OPENSSH, PROFTPD, TINYSSHD, Accepted, Refused
from support.asyncssh_server import AsyncsshServer
from support.kexinit import read_server_kexinit
from support.process import program
from support.proftpd import ProftpdServer
from support.sshd import Sshd, keygen, public_key
from support.tinysshd import TinySshd


def make_server(case: Union[Accepted, Refused], tmp_path: Path) -> Any:
    """The case's server, not yet started: a context manager, and a support.sshd.Server."""
    if case.server == TINYSSHD:
        return TinySshd(tmp_path)
    if case.server == OPENSSH:
        return Sshd(tmp_path, case.config, hardened=False, host_key_types=case.host_key_types)
    if case.server == PROFTPD:
        return ProftpdServer(tmp_path, case.config, host_key_types=case.host_key_types)
    assert case.server == ASYNCSSH
    strict_kex = isinstance(case, Accepted) or case.strict_kex
    return AsyncsshServer(tmp_path, case.config, host_key_types=case.host_key_types, strict_kex=strict_kex)


def is_strict(port: int) -> bool:
    """Whether the server on this port of 127.0.0.1 has strict key exchange."""
    return "kex-strict-s-v00@openssh.com" in read_server_kexinit(port).lists["kex"]


def certify(sshd: Sshd, ca: Path, *arguments: str) -> None:
    """Give the server (before its start) a certificate of its first host key, signed by a new CA."""
    keygen(ca, "ed25519")
    private = next(iter(sshd.host_keys.values()))
    command = [program("ssh-keygen", "openssh-client"), "-q", "-h", "-s", str(ca), "-I", "test"]
    subprocess.run([*command, *(arguments or ("-n", "127.0.0.1")), f"{private}.pub"], check=True)
    sshd.configure([f"HostCertificate {private}-cert.pub"])


def known_ca(ca: Path, port: int) -> str:
    """The line of known_hosts that trusts it for this port of 127.0.0.1."""
    return f"@cert-authority [127.0.0.1]:{port} {public_key(ca)}\n"
