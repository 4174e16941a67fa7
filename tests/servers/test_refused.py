"""Every weak or false server, as the person at the command meets it: the exit status, one sentence, and nothing mounted."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Callable, Dict, Iterator, Tuple

import pytest

from servers.cases import REFUSED, Refused
from servers.start import certify, known_ca, make_server
from support.kexinit import Edit, ManInTheMiddle
from support.mount import Mount, MountFailed
from support.sshd import Sshd, keygen, public_key

Options = Tuple[str, ...]
ACCEPT_NEW = ("-o", "StrictHostKeyChecking=accept-new")


def unknown(sshd: Sshd, tmp_path: Path) -> Options:
    sshd.known_hosts.write_text("")
    return ()


def changed(sshd: Sshd, tmp_path: Path, kind: str = "ed25519") -> Options:
    sshd.known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {public_key(keygen(tmp_path / 'other', kind))}\n")
    return ACCEPT_NEW


def another_type(sshd: Sshd, tmp_path: Path) -> Options:
    return changed(sshd, tmp_path, "ecdsa")


def revoked(sshd: Sshd, tmp_path: Path) -> Options:
    with sshd.known_hosts.open("a") as file:
        file.write(f"@revoked * {sshd.public_host_keys()[0]}\n")
    return ACCEPT_NEW


def listed_as_revoked(sshd: Sshd, tmp_path: Path) -> Options:
    (tmp_path / "list").write_text(sshd.public_host_keys()[0])
    return ("-o", f"RevokedHostKeys={tmp_path / 'list'}", *ACCEPT_NEW)


def certificate(ca: str, *arguments: str) -> Callable[[Sshd, Path], Options]:
    def prepare(sshd: Sshd, tmp_path: Path) -> Options:
        sshd.stop()
        certify(sshd, tmp_path / "ca", *arguments)
        keygen(tmp_path / "wrong_ca", "ed25519")
        sshd.start()
        sshd.known_hosts.write_text(known_ca(tmp_path / ca))
        return ACCEPT_NEW  # a host under a CA is never a new one

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


def each_profile() -> Iterator[object]:
    """(case, profile): in every run the first profile of the quick ones."""
    for case in (case for cases in REFUSED.values() for case in cases):
        for profile in case.profiles:
            quick = case.quick and profile == case.profiles[0]
            yield pytest.param(
                case, profile, id=f"{case.name}, {profile}", marks=() if quick else (pytest.mark.long,)
            )


@pytest.mark.parametrize(("case", "profile"), list(each_profile()))
def test_it_is_refused_in_a_sentence(case: Refused, profile: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(make_server(case, tmp_path))
        options = HOST_KEYS[case.host_key](server, tmp_path)
        port = server.port
        if case.between is not None:
            port = stack.enter_context(ManInTheMiddle(server.port, case.between)).port
        with pytest.raises(MountFailed) as refused:
            Mount(server, tmp_path, "-o", f"security={profile}", *options, port=port)
        assert refused.value.exit_status == case.status, refused.value
        sentence = str(refused.value).partition(": ")[2]
        for words in case.says:
            assert words in sentence
        assert sentence.startswith("sftpmount: ") and sentence.endswith(".") and "\n" not in sentence
        assert "publickey" not in server.log_text()


def test_the_man_in_the_middle_is_let_through_where_he_changes_nothing(tmp_path: Path, sshd: Sshd) -> None:
    """What is refused above is not refused for being relayed."""
    between = ManInTheMiddle(sshd.port, Edit())
    with between, Mount(sshd, tmp_path, port=between.port) as mount:
        (mount.path / "relayed").write_bytes(b"x" * 100_000)
        assert (sshd.tree / "relayed").read_bytes() == b"x" * 100_000
        assert sorted(between.seen[:2]) == ["client", "server"]
