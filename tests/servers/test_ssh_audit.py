"""What ssh-audit (https://github.com/jtesta/ssh-audit), run as a server, says of what the command offers to one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Set, Tuple

import pytest

from sftpmount.ssh.policy import make_policy
from support.mount import Mount, MountFailed
from support.process import Missing, free_port, wait_until
from support.server_files import ServerFiles

WAIT_S = 30.0

# The program as it is, but that it listens on every address of the machine, and here on loopback's only.
ON_LOOPBACK = """\
import runpy, socket
class Loopback(socket.socket):
    def bind(self, address):
        super().bind(("::1" if self.family == socket.AF_INET6 else "127.0.0.1", address[1]))
socket.socket = Loopback
runpy.run_module("ssh_audit", run_name="__main__")
"""

CLASSICAL = ("kex", "does not provide protection against post-quantum attacks")
WARNINGS: Dict[str, Set[Tuple[str, str]]] = {
    "hardened": {CLASSICAL},
    "compatible": {
        CLASSICAL,
        ("kex", "2048-bit modulus only provides 112-bits of symmetric strength"),
        ("mac", "using encrypt-and-MAC mode"),
    },
    "pq": set(),
}


def audit(tmp_path: Path, *options: str) -> Dict[str, Any]:
    """ssh-audit's report of a client that is the command with these options, which knows nothing of the server."""
    if importlib.util.find_spec("ssh_audit") is None:
        raise Missing("The tests need ssh-audit: pip install ssh-audit.")
    server = ServerFiles(tmp_path, "audit", ())
    server.port = free_port()
    arguments = ["-j", "-c", "-p", str(server.port), "-t", str(int(WAIT_S))]
    with subprocess.Popen(
        [sys.executable, "-c", ON_LOOPBACK, *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            wait_until(lambda: is_listened_on(server.port) or process.poll() is not None, WAIT_S, "ssh-audit")
            with pytest.raises(MountFailed) as refused:
                Mount(server, tmp_path, *options)
            assert refused.value.exit_status in (5, 7)  # it hangs up; or has no ML-KEM
            report: Dict[str, Any] = json.loads(process.communicate(timeout=WAIT_S)[0])
        finally:
            process.kill()
    return report


def is_listened_on(port: int) -> bool:
    """By anybody, without connecting: ssh-audit takes one connection only."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in lines)


def notes(report: Dict[str, Any], kind: str) -> Set[Tuple[str, str]]:
    return {
        (category, text)
        for category in ("kex", "key", "enc", "mac")
        for each in report[category]
        for text in each["notes"].get(kind, ())
    }


@pytest.mark.parametrize("profile", list(WARNINGS))
def test_it_finds_no_failure_and_no_warning_but_these(profile: str, tmp_path: Path) -> None:
    report = audit(tmp_path, "-o", f"security={profile}")
    policy = make_policy(profile)
    for category, names in (("enc", policy.ciphers), ("mac", policy.macs), ("key", policy.host_keys_offered)):
        assert {each["algorithm"] for each in report[category]} == set(names)
    assert {each["algorithm"] for each in report["kex"]} >= {*policy.kex, "kex-strict-c-v00@openssh.com"}
    assert notes(report, "fail") == set()
    assert notes(report, "warn") <= WARNINGS[profile]


def test_it_would_find_a_failure(tmp_path: Path) -> None:
    report = audit(tmp_path, "-o", "KexAlgorithms=+ecdh-sha2-nistp256")
    assert [category for category, _ in notes(report, "fail")] == ["kex"]
