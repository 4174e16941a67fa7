"""``sftpmount audit`` as a person meets it: what it says of real servers, how it ends, and that what it advises is true."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import pytest

from sftpmount.errors import UsageError
from sftpmount.options import parse, split, understand_audit
from support.asyncssh_server import AsyncsshServer
from support.listener import Listener
from support.mount import CHECKOUT
from support.process import free_port, program
from support.sshd import Server, Sshd, keygen, public_key, write_known_hosts

WAIT_S = 60.0


class Result:
    """A finished ``sftpmount audit``."""

    def __init__(self, words: Sequence[str], env: Optional[Dict[str, str]] = None) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SSH_")}
        run = subprocess.run(
            [sys.executable, "-m", "sftpmount", "audit", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=WAIT_S,
            cwd=CHECKOUT,
            env={**environment, "PYTHONPATH": str(CHECKOUT), **(env or {})},
            start_new_session=True,
        )
        self.status, self.bytes = run.returncode, run.stdout + run.stderr
        self.out, self.err = run.stdout.decode(), run.stderr.decode()

    @property
    def json(self) -> Dict[str, Any]:
        found: Dict[str, Any] = json.loads(self.out)
        assert found["exit_status"] == self.status
        return found

    @property
    def flat(self) -> str:
        """The text without its line breaks."""
        return " ".join(self.out.split())


def words_for(server: Server, *more: str, place: str = "", **options: object) -> List[str]:
    """The arguments for a server; ``options`` replace those that it needs, and one that is None is left out."""
    said: Dict[str, object] = {
        "Port": server.port,
        "UserKnownHostsFile": server.known_hosts,
        "GlobalKnownHostsFile": "/dev/null",
        "IdentityFile": server.user_key,
        "IdentitiesOnly": "yes",
        **options,
    }
    text = ",".join(f"{name}={value}" for name, value in said.items() if value is not None)
    return ["-F", "none", "-o", text, *more, place or f"{server.user}@127.0.0.1:{server.tree}"]


def audit(server: Server, *more: str, **options: Any) -> Result:
    return Result(words_for(server, *more, **options))


def verdicts(found: Dict[str, Any], category: str) -> Dict[str, List[str]]:
    """name -> the verdicts under hardened, compatible and pq."""
    profiles = ("hardened", "compatible", "pq")
    return {
        each["name"]: [each[profile]["verdict"] for profile in profiles] for each in found["offer"][category]
    }


def fingerprint(key: Path) -> str:
    """As ssh-keygen has it, which is not ours."""
    command = [program("ssh-keygen", "openssh-client"), "-l", "-f", f"{key}.pub"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[1]


# -- a server that is fit ----------------------------------------------------------------------------------------------


def test_a_hardened_server_is_fit_and_the_json_says_all(sshd: Sshd) -> None:
    result = audit(sshd, "--json")
    assert (result.status, result.err) == (0, "")
    found = result.json
    assert set(found) == {
        "format", "result", "exit_status", "refusals", "remarks", "server", "profile", "profiles", "offer", "strict_kex",
        "host_keys", "authentication", "sftp", "durability",
    }  # fmt: skip
    assert (found["format"], found["result"], found["profile"]) == (1, "fit", "hardened")
    assert (found["refusals"], found["remarks"]) == ([], [])
    assert found["server"] == {
        "host": "127.0.0.1",
        "port": sshd.port,
        "user": sshd.user,
        "software": found["server"]["software"],
    }
    assert found["server"]["software"].startswith("SSH-2.0-OpenSSH_")
    assert found["strict_kex"] is True
    assert found["authentication"] == ["publickey"]
    assert set(found["offer"]) == {"kex", "host_key", "cipher", "mac", "compression"}
    assert verdicts(found, "kex") == {
        "curve25519-sha256@libssh.org": ["used", "used", "refused"],
        "diffie-hellman-group-exchange-sha256": ["accepted", "accepted", "refused"],
    }
    assert verdicts(found, "host_key")["ssh-ed25519"] == ["used", "used", "accepted"]
    assert verdicts(found, "cipher")["aes128-ctr"] == ["accepted", "accepted", "refused"]
    assert verdicts(found, "mac")["hmac-sha2-256"] == ["refused", "accepted", "refused"]
    assert verdicts(found, "mac")["umac-128-etm@openssh.com"] == ["refused"] * 3
    assert verdicts(found, "compression")["none"] == ["used", "used", "accepted"]
    for category in found["offer"].values():
        for each in category:
            assert set(each) == {"name", "directions", "hardened", "compatible", "pq"}
            for profile in ("hardened", "compatible", "pq"):
                assert each[profile]["verdict"] != "refused" or each[profile]["why"]
    for profile in ("hardened", "compatible"):
        agreed = found["profiles"][profile]["agreed"]
        assert agreed["kex"] == "curve25519-sha256@libssh.org" and agreed["host_key"] == "ssh-ed25519"
        assert "gcm" in agreed["cipher_out"] or "chacha20" in agreed["cipher_out"]  # as the processor is
        assert found["profiles"][profile]["refusals"] == []
    assert found["profiles"]["pq"]["agreed"] is None
    (refusal,) = found["profiles"]["pq"]["refusals"]
    assert refusal["sshd_config"][0].startswith("KexAlgorithms mlkem768x25519-sha256,")
    assert "OpenSSH 9.9" in refusal["problem"]
    assert found["sftp"]["reached"] is True and found["sftp"]["directory"] == str(sshd.tree)
    assert found["sftp"]["extensions"]["posix-rename@openssh.com"] == "1"
    assert found["sftp"]["limits"]["write_bytes"] >= 32768
    assert found["durability"]["fsync"] is True


def test_the_text_says_the_same(sshd: Sshd) -> None:
    result = audit(sshd)
    assert (result.status, result.err) == (0, "")
    lines = result.out.splitlines()
    assert re.match(rf"{sshd.user}@127\.0\.0\.1 port {sshd.port}: SSH-2\.0-OpenSSH_", lines[0])
    (head,) = [line for line in lines if line.startswith("Offered")]
    assert head.split() == ["Offered", "hardened*", "compatible", "pq"]
    (row,) = [line for line in lines if line.startswith("  hmac-sha2-512 ")]
    assert row.split()[:4] == ["hmac-sha2-512", "refused", "accepted", "refused"]
    assert "not encrypt-then-MAC" in row
    assert row.index("refused") == head.index("hardened*")
    for part in (
        "pq: not post-quantum",
        "Strict key exchange (against the Terrapin attack): offered",
        f"{fingerprint(sshd.host_keys['ed25519'])}, the one a mount uses known: {sshd.known_hosts}:1",
        f"ssh-rsa (3072 bits) {fingerprint(sshd.host_keys['rsa'])} known: {sshd.known_hosts}:2",
        "Login methods: publickey",
        f"SFTP, in {sshd.tree}",
        "fsync@openssh.com",
        "Durability: The server has fsync@openssh.com.",
    ):
        assert part in result.flat, part
    assert lines[-1] == "Fit under security=hardened."
    assert max(map(len, lines)) < 140


def test_a_post_quantum_server(tmp_path: Path) -> None:
    with AsyncsshServer(tmp_path, "KexAlgorithms mlkem768x25519-sha256") as server:
        result = audit(server, "--json", security="pq")
        found = result.json
        assert found["profiles"]["pq"]["agreed"]["kex"] == "mlkem768x25519-sha256"
        assert verdicts(found, "kex") == {"mlkem768x25519-sha256": ["used"] * 3}
        assert found["refusals"] == [] and found["sftp"]["reached"] is True
        assert found["server"]["software"].startswith("SSH-2.0-AsyncSSH")


# -- before there are credentials ----------------------------------------------------------------------------------------


def test_before_any_credential_exists_the_outside_is_shown(own_sshd: Sshd, tmp_path: Path) -> None:
    absent = tmp_path / "ssh" / "known_hosts"
    for options in ({}, {"StrictHostKeyChecking": "yes"}):
        result = audit(own_sshd, "--json", UserKnownHostsFile=absent, IdentityFile=absent, **options)
        assert (result.status, result.err) == (1, "")
        found = result.json
        assert found["result"] == "fit with remarks" and found["refusals"] == []
        assert {key["kind"]: (key["fingerprint"], key["standing"]) for key in found["host_keys"]} == {
            f"ssh-{kind}": (fingerprint(own_sshd.host_keys[kind]), "unknown") for kind in ("ed25519", "rsa")
        }
        assert found["authentication"] == ["publickey"]
        assert found["sftp"]["reached"] is False and "host key is unknown" in found["sftp"]["why"]
        assert found["durability"]["fsync"] is None
        (remark,) = found["remarks"]
        assert "is unknown" in remark["problem"] and "ssh-keyscan" in remark["problem"]
        assert not absent.parent.exists()
    assert "publickey" not in own_sshd.log_text()
    text = audit(own_sshd, UserKnownHostsFile=absent, IdentityFile=absent)
    assert text.status == 1 and "SFTP: not reached, since the host key is unknown" in text.flat
    assert "Durability: Not found out" in text.flat


def test_without_a_key_that_will_do_the_login_is_a_remark(sshd: Sshd, tmp_path: Path) -> None:
    other = keygen(tmp_path / "other", "ed25519")
    found = audit(sshd, "--json", IdentityFile=other).json
    assert found["exit_status"] == 1 and found["sftp"]["reached"] is False
    (remark,) = found["remarks"]
    assert "does not let" in remark["problem"] and str(other) in remark["problem"]


def test_nobody_is_asked_for_a_passphrase(sshd: Sshd, tmp_path: Path) -> None:
    locked, asked = keygen(tmp_path / "locked", "ed25519", passphrase="secret"), tmp_path / "asked"
    with (sshd.dir / "authorized_keys").open("a") as file:
        file.write(public_key(locked) + "\n")
    askpass = tmp_path / "askpass"
    askpass.write_text(f"#!/bin/sh\ntouch {asked}\necho secret\n")
    askpass.chmod(0o700)
    environment = {"SSH_ASKPASS": str(askpass), "SSH_ASKPASS_REQUIRE": "force"}
    result = Result(words_for(sshd, "--json", IdentityFile=locked), environment)
    assert result.status == 1 and "passphrase" in result.json["remarks"][0]["problem"]
    assert not asked.exists()


def test_accept_new_logs_in_and_adds_nothing(sshd: Sshd, tmp_path: Path) -> None:
    absent = tmp_path / "known_hosts"
    found = audit(sshd, "--json", UserKnownHostsFile=absent, StrictHostKeyChecking="accept-new").json
    assert found["exit_status"] == 1 and found["sftp"]["reached"] is True
    assert ["accept-new" in remark["problem"] for remark in found["remarks"]] == [True]
    assert not absent.exists()


# -- host keys -----------------------------------------------------------------------------------------------------------


def test_a_changed_or_revoked_host_key_refuses(own_sshd: Sshd, tmp_path: Path) -> None:
    known_hosts, name = tmp_path / "known_hosts", f"[127.0.0.1]:{own_sshd.port}"
    mine = public_key(own_sshd.host_keys["ed25519"])
    other = public_key(keygen(tmp_path / "other", "ed25519"))
    for text, standing, sentence in (
        (f"{name} {other}\n", "changed", "has CHANGED"),
        (f"{name} {mine}\n@revoked * {mine}\n", "revoked", "is REVOKED"),
    ):
        known_hosts.write_text(text)
        result = audit(own_sshd, "--json", UserKnownHostsFile=known_hosts)
        found = result.json
        assert found["exit_status"] == 2 and found["result"] == "refused"
        (used,) = [key for key in found["host_keys"] if key["is_used"]]
        assert (used["kind"], used["standing"]) == ("ssh-ed25519", standing)
        assert sentence in found["refusals"][0]["problem"]
        assert found["authentication"] is None  # not even a user name for whoever that is
        assert found["sftp"]["reached"] is False
        assert known_hosts.read_text() == text
    assert own_sshd.user not in re.sub(r"/\S+", "", own_sshd.log_text())


# -- refusals, and the lines that cure them ------------------------------------------------------------------------------

# (what sshd_config has, the server's host keys, the keywords of the lines that cure it)
WEAK = [
    ("KexAlgorithms diffie-hellman-group14-sha1", ("ed25519",), ["KexAlgorithms"]),
    ("Ciphers aes256-cbc,aes128-cbc", ("ed25519",), ["Ciphers"]),
    ("Ciphers aes256-ctr\nMACs hmac-sha1,umac-64@openssh.com", ("ed25519",), ["MACs"]),
    (
        "KexAlgorithms diffie-hellman-group1-sha1\nCiphers 3des-cbc\nMACs hmac-sha1\nHostKeyAlgorithms ssh-rsa",
        ("rsa",),
        ["KexAlgorithms", "HostKey", "HostKeyAlgorithms", "Ciphers"],
    ),
    ("HostKeyAlgorithms ssh-rsa", ("rsa",), ["HostKey", "HostKeyAlgorithms"]),
]  # fmt: skip


def cure(sshd: Sshd, lines: Sequence[str], tmp_path: Path) -> None:
    """Do what the report says; the path of the host key is this server's, which ssh-keygen -A makes elsewhere."""
    path = tmp_path / "ssh_host_ed25519_key"
    if not path.exists() and "ed25519" not in sshd.host_keys:
        sshd.host_keys["ed25519"] = keygen(path, "ed25519")
        write_known_hosts(sshd.known_hosts, [sshd.port], map(public_key, sshd.host_keys.values()))
    sshd.configure(line.replace("/etc/ssh/ssh_host_ed25519_key", str(path)) for line in lines)
    sshd.restart()


@pytest.mark.parametrize(
    ("config", "kinds", "keywords"), WEAK, ids=["kex", "cipher", "mac", "all", "host-key"]
)
def test_what_is_refused_is_cured_by_the_named_lines(
    config: str, kinds: Sequence[str], keywords: List[str], tmp_path: Path
) -> None:
    with Sshd(tmp_path, config, hardened=False, host_key_types=kinds) as sshd:
        result = audit(sshd, "--json")
        found = result.json
        assert result.status == 2 and found["result"] == "refused"
        assert found["sftp"]["reached"] is False and found["profiles"]["hardened"]["agreed"] is None
        assert found["authentication"] is None  # where no profile can get so far
        lines = [line for refusal in found["refusals"] for line in refusal["sshd_config"]]
        assert [line.split()[0] for line in lines] == keywords
        text = audit(sshd)
        assert text.status == 2 and all(f"\n      {line}\n" in text.out for line in lines)
        assert text.out.endswith("Refused under security=hardened.\n")
        cure(sshd, lines, tmp_path)
        cured = audit(sshd, "--json")
        assert cured.status == 0, cured.out


def test_a_short_host_key_is_shown_refused_and_cured(tmp_path: Path) -> None:
    sshd = Sshd(tmp_path, host_key_types=("rsa",))
    path = sshd.host_keys["rsa"]
    for old in (path, Path(f"{path}.pub")):
        old.unlink()
    keygen(path, "rsa", 2048)
    with sshd:
        found = audit(sshd, "--json").json
        assert found["exit_status"] == 2 and "2048 bits" in found["refusals"][0]["problem"]
        (key,) = found["host_keys"]
        assert (key["bits"], key["fingerprint"], key["standing"]) == (2048, fingerprint(path), "known")
        assert found["profiles"]["compatible"]["agreed"] is not None
        assert found["authentication"] == ["publickey"]
        lenient = audit(sshd, "--json", security="compatible").json
        assert (
            lenient["exit_status"] == 1
            and "Only security=compatible will do" in lenient["remarks"][0]["problem"]
        )
        cure(sshd, found["refusals"][0]["sshd_config"], tmp_path)
        sshd.known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {public_key(path)}\n")
        found = audit(sshd, "--json").json  # the server is cured, known_hosts not yet
        assert "verify its fingerprint" in found["refusals"][0]["problem"]
        assert found["refusals"][0]["sshd_config"] == []
        sshd.known_hosts.write_text(f"[127.0.0.1]:{sshd.port} {public_key(sshd.host_keys['ed25519'])}\n")
        found = audit(sshd, "--json").json
        assert found["exit_status"] == 0, found
        assert {key["kind"]: key["standing"] for key in found["host_keys"]} == {
            "ssh-ed25519": "known",
            "ssh-rsa": "unknown",
        }


def test_what_only_compatible_takes_is_a_remark_with_its_cure(tmp_path: Path) -> None:
    with Sshd(tmp_path, "Ciphers aes256-ctr\nMACs hmac-sha2-256", hardened=False) as sshd:
        found = audit(sshd, "--json", security="compatible").json
        assert found["exit_status"] == 1 and found["sftp"]["reached"] is True
        assert found["profiles"]["compatible"]["agreed"]["mac_out"] == "hmac-sha2-256"
        (remark,) = found["remarks"]
        cure(sshd, remark["sshd_config"], tmp_path)
        assert audit(sshd, "--json", security="compatible").status == 0


def test_no_subsystem_is_refused_and_cured(tmp_path: Path) -> None:
    sshd = Sshd(tmp_path, sftp_only=False)
    sshd.configure(["Subsystem other /bin/false"])
    with sshd:
        found = audit(sshd, "--json").json
        assert found["exit_status"] == 2 and "offers no SFTP" in found["refusals"][0]["problem"]
        cure(sshd, found["refusals"][0]["sshd_config"], tmp_path)
        assert audit(sshd).status == 0


def test_an_sftp_server_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    with Sshd(
        tmp_path, sftp_server="/bin/cat >/dev/null", sftp_only=False
    ) as sshd:  # which ends with its input
        result = audit(sshd, "--json", ConnectTimeout=2)
        assert result.status == 2 and "no reply on the metadata lane" in result.json["refusals"][0]["problem"]
        assert result.json["sftp"]["reached"] is False


def test_no_fsync_is_a_remark_in_plain_words_with_its_cure(tmp_path: Path) -> None:
    with Sshd(tmp_path, sftp_server="internal-sftp -P fsync,posix-rename", sftp_only=False) as sshd:
        found = audit(sshd, "--json").json
        assert found["exit_status"] == 1 and found["durability"]["fsync"] is False
        assert "power failure" in found["durability"]["meaning"]
        assert "fsync@openssh.com" not in found["sftp"]["extensions"]
        assert "received may be lost" in found["remarks"][0]["problem"]
        assert "posix-rename" in found["remarks"][1]["problem"]
        assert "Durability: The server has no fsync@openssh.com" in audit(sshd).flat
        cure(sshd, found["remarks"][0]["sshd_config"], tmp_path)
        assert audit(sshd).status == 0


def test_the_readme_shows_what_is_printed(tmp_path: Path) -> None:
    text = (CHECKOUT / "README.md").read_text()
    shown = text.split("backup@nas port 22", 1)[1].split("```")[0].splitlines()[1:]
    config = "KexAlgorithms curve25519-sha256,diffie-hellman-group14-sha1\nCiphers aes256-ctr,aes256-cbc\nMACs hmac-sha2-256"
    with Sshd(tmp_path, config, hardened=False, host_key_types=("ed25519",)) as sshd:
        printed = audit(sshd).out.splitlines()
    assert len(shown) > 15
    assert [line for line in shown if line != "..." and line not in printed] == []


def test_a_missing_directory_is_refused(sshd: Sshd) -> None:
    result = audit(sshd, "--json", place=f"{sshd.user}@127.0.0.1:/no/such/dir")
    found = result.json
    assert result.status == 2 and "/no/such/dir" in found["refusals"][0]["problem"]
    assert found["sftp"]["reached"] is True and found["durability"]["fsync"] is True


def test_ones_own_lists_are_part_of_the_verdict(sshd: Sshd) -> None:
    found = audit(sshd, "--json", Ciphers="aes256-ctr").json
    assert found["exit_status"] == 0
    assert found["profiles"]["hardened"]["agreed"]["cipher_out"] == "aes256-ctr"
    (gcm,) = [each for each in found["offer"]["cipher"] if each["name"] == "aes256-gcm@openssh.com"]
    assert gcm["hardened"] == {"verdict": "refused", "why": "left out by your own list"}
    assert "leaves nothing" in found["profiles"]["pq"]["refusals"][0]["problem"]


# -- the way there -------------------------------------------------------------------------------------------------------


def test_ssh_config_is_honoured(sshd: Sshd, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(
        f"Host box\n  HostName 127.0.0.1\n  Port {sshd.port}\n  User {sshd.user}\n  IdentityFile {sshd.user_key}\n"
        f"  UserKnownHostsFile {sshd.known_hosts}\n  GlobalKnownHostsFile /dev/null\n  IdentityAgent none\n"
    )
    result = Result(["-F", str(config), "box", "--json"])
    assert result.status == 0, result.err
    assert result.json["server"]["port"] == sshd.port
    assert result.json["sftp"]["reached"] is True


def test_by_way_of_a_jump_host(tmp_path: Path) -> None:
    with (
        Sshd(tmp_path / "jump", "AllowTcpForwarding yes", sftp_only=False) as jump,
        Sshd(tmp_path / "target") as target,
    ):
        with (target.dir / "authorized_keys").open("a") as file:
            file.write(public_key(jump.user_key) + "\n")
        known = tmp_path / "known_hosts"
        known.write_text(jump.known_hosts.read_text() + target.known_hosts.read_text())
        options = {
            "ProxyJump": f"{jump.user}@127.0.0.1:{jump.port}",
            "IdentityFile": jump.user_key,
            "UserKnownHostsFile": known,
        }
        found = audit(target, "--json", **options).json
        assert found["exit_status"] == 0 and len(found["host_keys"]) == 2
        assert "Accepted publickey" in jump.log_text()
        result = audit(target, **{**options, "UserKnownHostsFile": target.known_hosts})
        assert (result.status, result.out) == (6, "")
        assert f"[127.0.0.1]:{jump.port} is unknown" in result.err


def test_a_server_that_takes_few_connections_is_a_remark(sshd: Sshd, tmp_path: Path) -> None:
    with listening(forward(sshd.port, times=1)) as port:
        absent = tmp_path / "known_hosts"
        found = audit(sshd, "--json", Port=port, UserKnownHostsFile=absent).json
    assert found["exit_status"] == 1
    assert sorted(key["standing"] for key in found["host_keys"]) == ["not shown", "unknown"]
    assert any("Not every host key was shown" in remark["problem"] for remark in found["remarks"])


# -- what is no server for us --------------------------------------------------------------------------------------------

Answer = Callable[[socket.socket], None]


@contextmanager
def listening(answer: Answer) -> Iterator[int]:
    """A port at which each connection is handed to ``answer`` in turn, and then closed."""
    held: List[socket.socket] = []

    def serve(peer: socket.socket) -> None:
        held.append(peer)
        try:
            answer(peer)
        except OSError:
            pass

    try:
        with Listener(serve) as listener:
            yield listener.port
    finally:
        for peer in held:
            peer.close()


def say(text: bytes) -> Answer:
    def answer(peer: socket.socket) -> None:
        peer.sendall(text)
        peer.shutdown(socket.SHUT_WR)
        while peer.recv(65536):  # until the client has read it all: closing earlier could discard it
            pass

    return answer


def mute(peer: socket.socket) -> None:
    pass


def drop(peer: socket.socket) -> None:
    peer.close()


def forward(port: int, times: int) -> Answer:
    """Connect the first ``times`` connections with the server at ``port``, drop all others."""
    left = [times]

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def answer(peer: socket.socket) -> None:
        if left[0] == 0:
            peer.close()
            return
        left[0] -= 1
        with socket.create_connection(("127.0.0.1", port)) as server:
            out = threading.Thread(target=pump, args=(peer, server), daemon=True)
            out.start()
            pump(server, peer)
            out.join(WAIT_S)

    return answer


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (mute, "within 3 s"),
        (say(b"HTTP/1.1 400 \x1b[31mBad Request\r\n\r\n" * 200), "SSH"),
        (drop, "SSH"),
        (say(b"SSH-2.0-x\r\n"), "closed the connection"),
    ],
    ids=["mute", "http", "drop", "half"],
)
def test_what_is_no_ssh_server_gets_one_sentence(answer: Answer, sentence: str) -> None:
    with listening(answer) as port:
        words = ["-F", "none", "-p", str(port), "-o", "ConnectTimeout=3", "nobody@127.0.0.1"]
        result = Result(words)
        assert (result.status, result.out) == (2, "")
        assert one_sentence(result.err) and f"127.0.0.1 port {port}" in result.err and sentence in result.err
        assert b"\x1b" not in result.bytes
        as_json = Result([*words, "--json"])
        assert one_sentence(as_json.err) and as_json.json["result"] == "failed"
        assert sentence in as_json.json["refusals"][0]["problem"]


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_an_unreachable_server_has_the_exit_status_of_the_mount(host: str) -> None:
    result = Result(["-F", "none", "-p", str(free_port()), f"nobody@{host}:"])
    assert (result.status, result.out) == (5, "")
    assert one_sentence(result.err) and host in result.err


def one_sentence(error: str) -> bool:
    return error.startswith("sftpmount: ") and error.count("\n") == 1 and error.rstrip().endswith(".")


def kexinit(*lists: Sequence[str]) -> bytes:
    """A greeting with an escape sequence, and the packet of a KEXINIT with these ten name-lists (RFC 4253 section 7.1)."""
    names = (",".join(each).encode() for each in lists)
    payload = b"\x14" + bytes(16) + b"".join(len(each).to_bytes(4, "big") + each for each in names) + bytes(5)
    padding = 4 + -(5 + len(payload) + 4) % 8
    packet = bytes([padding]) + payload + bytes(padding)
    return b"SSH-2.0-old\x1b]0;owned\x07\r\n" + len(packet).to_bytes(4, "big") + packet


def test_no_escape_sequence_of_the_server_reaches_the_terminal_and_terrapin_is_told() -> None:
    evil = "x\x1b[2J\x9b1m\u202e"
    cipher = ["chacha20-poly1305@openssh.com", evil]
    hello = kexinit(
        ["curve25519-sha256", evil], ["ssh-ed25519", evil], cipher, cipher, ["hmac-sha1", evil], [evil], ["none"], [evil], [], []
    )  # fmt: skip
    with listening(say(hello)) as port:
        words = ["-F", "none", "-p", str(port), "-o", "UserKnownHostsFile=/dev/null", "nobody@127.0.0.1:"]
        for result in (Result(words), Result([*words, "--json"])):
            assert result.status == 2
            text = result.out + result.err
            assert all(char.isprintable() or char == "\n" for char in text)
            assert "owned" in text and "[2J" in text
        found = result.json
    assert found["strict_kex"] is False
    (refusal,) = found["profiles"]["hardened"]["refusals"]
    assert "Terrapin" in refusal["problem"]
    assert refusal["sshd_config"] == ["Ciphers aes256-gcm@openssh.com,aes128-gcm@openssh.com"]
    assert {key["standing"] for key in found["host_keys"]} == {"not shown"}
    directions = {each["name"]: each["directions"] for each in found["offer"]["mac"]}
    assert directions["hmac-sha1"] == "out"


# -- words ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "host", "user", "directory"),
    [
        (["box"], "box", None, b""),
        (["me@box"], "box", "me", b""),
        (["me@box:dir"], "box", "me", b"dir"),
        (["[::1]"], "::1", None, b""),
        (["me@[::1]:/dir"], "::1", "me", b"/dir"),
        (["sftp://me@box:22/dir"], "box", "me", b"/dir"),
        (["--json", "box", "-o", "Port=22"], "box", None, b""),
    ],
)
def test_the_place_is_the_mounts_and_a_host_alone_will_do(
    words: List[str], host: str, user: Optional[str], directory: bytes
) -> None:
    found = understand_audit(split(words, further=["json"]))
    assert (found.ssh.host, found.ssh.user, found.directory) == (host, user, directory)
    assert found.ssh.connect_timeout_s == 10.0
    patient = understand_audit(split([*words, "-o", "ConnectTimeout=60"], further=["json"]))
    assert patient.ssh.connect_timeout_s == 60.0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "nothing to audit"),
        (["box:", "/mnt"], "'/mnt' is a word too many"),
        (["-x"], "cannot be the name"),
        (["box", "-o", "reconect"], "the nearest is reconnect"),
    ],
)
def test_usage_errors(words: List[str], sentence: str) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)):
        understand_audit(split(["--", *words] if words == ["-x"] else words, further=["json"]))


def test_a_mount_knows_no_json() -> None:
    with pytest.raises(UsageError, match="--json"):
        parse(["box:", "/mnt", "--json"])


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    from sftpmount import cli

    assert cli.main(["audit", "--help"]) == 0
    assert "sftpmount audit" in capsys.readouterr().out
