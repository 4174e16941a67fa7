"""Every server that a hardening guide makes, and every algorithm alone: a real server, a real mount, a file that is stored."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Tuple

import pytest

from servers.cases import ACCEPTED, ALONE, TINYSSHD, Accepted
from servers.start import certify, is_strict, known_ca, make_server
from sftpmount.ssh.policy import make_policy
from support.mount import Mount, MountFailed


class AnyStrictness(Mount):
    """The command, but for its demand of strict key exchange."""

    changes = "from sftpmount.ssh import policy; policy._open_to_terrapin = lambda *_: None"


def marked(case: Accepted) -> object:
    return pytest.param(
        case, id=f"{case.name}, {case.profile}", marks=() if case.quick else (pytest.mark.long,)
    )


@pytest.mark.parametrize("case", [marked(case) for case in ACCEPTED])
def test_it_is_mounted_and_stores(case: Accepted, tmp_path: Path) -> None:
    data = os.urandom(300_001)
    server = make_server(case, tmp_path)
    if case.certified:
        certify(server, tmp_path / "ca")
    with server:
        if case.certified:
            server.known_hosts.write_text(known_ca(tmp_path / "ca", server.port))
        command, options = Mount, ("-o", f"security={case.profile}", *case.options)
        if case.server == TINYSSHD and not is_strict(server.port):
            with pytest.raises(MountFailed, match="no strict key exchange") as refused:
                Mount(server, tmp_path, *options)
            assert refused.value.exit_status == 7
            command = AnyStrictness  # what a newer one will be, but for that
        with command(server, tmp_path, *options) as mount:
            (mount.path / "file").write_bytes(data)
            assert (server.tree / "file").read_bytes() == data
            assert (mount.path / "file").read_bytes() == data
            assert agreed_on(mount.log_text()) == case.agreed
            assert mount.unmount() == 0


def agreed_on(log: str) -> Tuple[str, ...]:
    """Key exchange, host key type and cipher, as the mount says them when it has connected."""
    said = re.search(
        r"connected to 127\.0\.0\.1 port \d+: (\S+)(?: \(strict\))?, (\S+) SHA256:\S+, (.+), SSH-2\.0-", log
    )
    assert said is not None, log
    return said.groups()


def test_each_algorithm_that_is_accepted_is_there_alone() -> None:
    policy = make_policy("compatible", kex_algorithms="*")
    accepted = (policy.kex, policy.ciphers, policy.macs, policy.host_keys)
    for names, cases in zip(accepted, ALONE.values()):
        assert {case.name for case in cases} == set(names)
