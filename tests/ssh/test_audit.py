"""The look from outside: what is found of host keys and profiles, and what it leaves alone."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Dict, List, Tuple

import pytest

from sftpmount.errors import AuthenticationError, UsageError
from sftpmount.options import SshOptions
from sftpmount.ssh import audit
from sftpmount.ssh.audit import HostKey, SshFindings, for_a_look, survey
from sftpmount.ssh.hardened import HardenedTransport
from sftpmount.ssh.userauth import Reply, UserAuth
from support.process import program
from support.sshd import Sshd, keygen, public_key


class Nobody:
    """A prompt that must not be used."""

    def secret(self, text: str) -> str:
        raise AuthenticationError("nobody is asked")

    def notice(self, text: str) -> None:
        raise AssertionError(text)


def look(sshd: Sshd, known_hosts: str = "", **changes: object) -> SshFindings:
    """A survey of a server; ``known_hosts`` is the text of the file, or that of the server's own where ""."""
    file = sshd.dir / "known_hosts_here"
    file.write_text(known_hosts or sshd.known_hosts.read_text())
    options = SshOptions(
        "127.0.0.1",
        user=sshd.user,
        port=sshd.port,
        config_file="none",
        known_hosts_files=(str(file),),
        connect_timeout_s=20.0,
        ssh_options=(("globalknownhostsfile", "none"), ("identityagent", "none")),
    )
    found = survey(replace(options, **changes), Nobody())  # type: ignore[arg-type]
    assert file.read_text() == (known_hosts or sshd.known_hosts.read_text())
    return found


def entry(sshd: Sshd, kind: str) -> str:
    return f"[127.0.0.1]:{sshd.port} {public_key(sshd.host_keys[kind])}\n"


def by_kind(found: SshFindings) -> Dict[str, HostKey]:
    return {key.kind: key for key in found.host_keys}


def standings(found: SshFindings) -> Dict[str, Tuple[str, bool]]:
    return {key.kind: (key.standing, key.is_used) for key in found.host_keys}


def test_a_key_beside_the_known_one_is_unknown_and_not_changed(sshd: Sshd) -> None:
    found = look(sshd, entry(sshd, "rsa"))
    assert standings(found) == {"ssh-rsa": ("known", True), "ssh-ed25519": ("unknown", False)}
    assert by_kind(found)["ssh-ed25519"].detail.endswith("known_hosts_here:1 has its ssh-rsa key")
    assert (found.refusals, found.remarks, found.obstacle) == ((), (), "")


@pytest.mark.parametrize(
    ("marker", "standing", "words"), [("", "changed", "CHANGED"), ("@revoked ", "revoked", "REVOKED")]
)
def test_a_false_key_beside_the_one_in_use_is_a_remark(
    marker: str, standing: str, words: str, sshd: Sshd, tmp_path: Path
) -> None:
    mine = public_key(sshd.host_keys["rsa"])
    other = mine if marker else public_key(keygen(tmp_path / "other", "rsa"))
    found = look(sshd, entry(sshd, "ed25519") + f"{marker}[127.0.0.1]:{sshd.port} {other}\n")
    assert standings(found) == {"ssh-rsa": (standing, False), "ssh-ed25519": ("known", True)}
    assert found.refusals == () and words in found.remarks[0].problem


def test_host_certificates_are_shown_too(tmp_path: Path) -> None:
    sshd = Sshd(
        tmp_path, f"HostCertificate {tmp_path}/sshd/host_ed25519-cert.pub", host_key_types=("ed25519",)
    )
    keygen(tmp_path / "ca", "ed25519")
    command = [
        program("ssh-keygen", "openssh-client"),
        "-q",
        "-s",
        str(tmp_path / "ca"),
        "-I",
        "x",
        "-h",
        "-n",
        "127.0.0.1",
    ]
    subprocess.run([*command, f"{sshd.host_keys['ed25519']}.pub"], check=True)
    with sshd:
        found = look(sshd, f"@cert-authority [127.0.0.1]:* {public_key(tmp_path / 'ca')}\n")
        assert standings(found) == {
            "ssh-ed25519-cert-v01@openssh.com": ("certified", True),
            "ssh-ed25519": ("unknown", False),
        }
        plain = look(sshd, entry(sshd, "ed25519"))
        assert standings(plain)["ssh-ed25519"] == ("known", True)
        assert plain.refusals == ()


def test_no_credential_and_no_more_connections_than_needed(own_sshd: Sshd) -> None:
    before = own_sshd.log_text().count("Connection from")  # of those who waited for its start
    found = look(own_sshd, identity_files=(str(own_sshd.user_key),))
    assert found.methods == ("publickey",)
    log = own_sshd.log_text()
    assert log.count("Connection from") - before == len(found.host_keys) == 2
    assert "publickey" not in log


def test_a_server_that_asks_for_nothing_is_a_remark(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UserAuth, "none", lambda self: Reply(True))
    found = look(sshd)
    assert found.methods == ("none",)
    assert any("without any key or password" in remark.problem for remark in found.remarks)


def test_a_library_without_ml_kem_is_told_and_the_offer_shown(
    sshd: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {name: kex for name, kex in HardenedTransport._kex_info.items() if "mlkem" not in name}
    monkeypatch.setattr(HardenedTransport, "_kex_info", known)
    found = look(sshd, security="pq")
    (refusal,) = found.refusals
    assert "install cryptography" in refusal.problem and refusal.server_lines == ()
    assert found.software.startswith("SSH-2.0-OpenSSH") and len(found.host_keys) == 2
    assert {each.standings["pq"][0] for each in found.algorithms} == {"refused"}
    assert [each.agreement is None for each in found.profiles] == [False, False, True]


def test_lists_of_ones_own_that_leave_nothing_are_a_usage_error(sshd: Sshd) -> None:
    with pytest.raises(UsageError, match="leaves nothing"):
        look(sshd, security="pq", ciphers="aes256-ctr")


def test_long_lists_are_cut(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "NAMES_MAX", 2)
    found = look(sshd)
    categories: List[str] = [each.category for each in found.algorithms]
    assert {category: categories.count(category) for category in audit.CATEGORIES} == dict.fromkeys(
        audit.CATEGORIES, 2
    )


def test_host_keys_are_asked_for_up_to_a_limit(sshd: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "LOOKS_MAX", 1)
    assert by_kind(look(sshd))["ssh-rsa"].detail == "1 were looked at"


def test_a_look_asks_nobody_and_adds_nothing() -> None:
    options = for_a_look(SshOptions("host", strict_host_key_checking="accept-new", identity_files=("key",)))
    assert (options.batch_mode, options.strict_host_key_checking) == (True, "yes")
    assert options.identity_files == ("key",)
