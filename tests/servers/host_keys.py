"""What the host key of a server, and what known_hosts says of it, can become, so that nobody should connect."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Dict, Tuple

from servers.start import certify, known_ca
from support.sshd import Sshd, keygen, public_key

Options = Tuple[str, ...]


def unknown(sshd: Sshd, tmp_path: Path) -> Options:
    sshd.known_hosts.write_text("")
    return ()


def changed(sshd: Sshd, tmp_path: Path, kind: str = "ed25519") -> Options:
    sshd.known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {public_key(keygen(tmp_path / 'other', kind))}\n")
    return ()


def another_type(sshd: Sshd, tmp_path: Path) -> Options:
    return changed(sshd, tmp_path, "ecdsa")


def revoked(sshd: Sshd, tmp_path: Path) -> Options:
    with sshd.known_hosts.open("a") as file:
        file.write(f"@revoked * {sshd.public_host_keys()[0]}\n")
    return ()


def listed_as_revoked(sshd: Sshd, tmp_path: Path) -> Options:
    (tmp_path / "list").write_text(sshd.public_host_keys()[0])
    return ("-o", f"RevokedHostKeys={tmp_path / 'list'}")


def certificate(ca: str, *arguments: str) -> Callable[[Sshd, Path], Options]:
    def prepare(sshd: Sshd, tmp_path: Path) -> Options:
        sshd.stop()
        certify(sshd, tmp_path / "ca", *arguments)
        keygen(tmp_path / "wrong_ca", "ed25519")
        sshd.start()
        sshd.known_hosts.write_text(known_ca(tmp_path / ca, sshd.port))
        return ()

    return prepare


def unknown_jump_host(sshd: Sshd, tmp_path: Path) -> Options:
    """The server itself is known, and jumps to itself under a name that is not."""
    return ("-o", f"ProxyJump={sshd.user}@localhost:{sshd.port}")


HOST_KEYS: Dict[str, Callable[[Sshd, Path], Options]] = {
    "": lambda sshd, tmp_path: (),
    "unknown": unknown,
    "changed": changed,
    "another type": another_type,
    "revoked": revoked,
    "listed as revoked": listed_as_revoked,
    "expired certificate": certificate("ca", "-n", "127.0.0.1", "-V", "20200101000000Z:20210101000000Z"),
    "certificate of another host": certificate("ca", "-n", "elsewhere"),
    "certificate of another CA": certificate("wrong_ca"),
    "unknown jump host": unknown_jump_host,
}
# Those that StrictHostKeyChecking=accept-new is there to accept; under a CA no host is new.
IS_NEW = ("unknown", "unknown jump host")
