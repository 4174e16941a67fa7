"""ssh_config: as ssh -G says, and as the fallback without ssh reads it; both must agree."""

from __future__ import annotations

import itertools
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Callable, Dict, List

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftpmount.errors import UsageError
from sftpmount.options import SshOptions
from sftpmount.ssh import config
from sftpmount.ssh.config import Local, Target, aes_in_hardware, parse_hop, resolve
from sftpmount.ssh.policy import make_policy
from support.process import program

Resolve = Callable[..., Target]


@pytest.fixture
def local(tmp_path: Path) -> Local:
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    return Local(str(home), "somebody", "here.example", None, program("ssh", "openssh-client"))


@pytest.fixture(params=["ssh -G", "fallback"])
def evaluate(request: pytest.FixtureRequest, local: Local, tmp_path: Path) -> Resolve:
    """Evaluate a configuration's text for options, with and without the ssh program."""
    here = local if request.param == "ssh -G" else replace(local, ssh_program=None)
    numbers = itertools.count()

    def run(text: str, host: str = "box", **options: object) -> Target:
        file = tmp_path / f"config{next(numbers)}"
        file.write_text(text)
        return resolve(SshOptions(host, config_file=str(file), **options), here)  # type: ignore[arg-type]

    return run


def test_what_nobody_said_has_our_defaults(evaluate: Resolve, local: Local) -> None:
    target = evaluate("", user="me")
    assert (target.host, target.port, target.user) == ("box", 22, "me")
    assert target.identity_files == ()
    names = ("id_ed25519", "id_ecdsa", "id_rsa")
    assert target.default_identity_files == tuple(f"{local.home}/.ssh/{name}" for name in names)
    assert target.known_hosts_files == tuple(
        f"{local.home}/.ssh/{name}" for name in ("known_hosts", "known_hosts2")
    )
    assert target.global_known_hosts_files[0] == "/etc/ssh/ssh_known_hosts"
    assert target.methods == ("publickey", "keyboard-interactive", "password")
    assert not target.accept_new
    assert not target.identities_only
    assert target.proxy_jump == ()
    assert target.proxy_command is None
    assert target.agent_path is None
    assert target.policy.kex[0] == "mlkem768x25519-sha256"  # which the ssh installed need not know
    assert target.address_family == socket.AF_UNSPEC
    assert target.policy.rsa_bits_min == 3072


FILE = """
Host box
  HostName real.example.org
  User backup
  Port 2222
  IdentityFile ~/.ssh/%n-%r
  IdentityFile "/keys/with space"
  CertificateFile /keys/cert.pub
  IdentitiesOnly yes
  HostKeyAlias The-Box
  UserKnownHostsFile /one /two
  StrictHostKeyChecking accept-new
  PreferredAuthentications publickey,password
  ConnectTimeout 7
  ProxyJump first,me@second:22
  Ciphers aes256-gcm@openssh.com
  IdentityAgent /agents/%p
  RequiredRSASize 4096
  NumberOfPasswordPrompts 1
  AddressFamily inet6
Host *
  User nobody
  Port 1
"""


def test_a_file_that_says_all(evaluate: Resolve, local: Local) -> None:
    target = evaluate(FILE)
    assert (target.alias, target.host, target.port, target.user) == (
        "box",
        "real.example.org",
        2222,
        "backup",
    )
    assert target.identity_files == (f"{local.home}/.ssh/box-backup", "/keys/with space")
    assert target.certificate_files == ("/keys/cert.pub",)
    assert target.identities_only
    assert (target.host_key_alias or "").lower() == "the-box"
    assert target.known_hosts_files == ("/one", "/two")
    assert target.accept_new
    assert target.methods == ("publickey", "password")
    assert target.connect_timeout_s == 7.0
    assert target.proxy_jump == ("first", "me@second:22")
    assert target.policy.ciphers == ("aes256-gcm@openssh.com",)
    assert target.agent_path == "/agents/2222"
    assert target.policy.rsa_bits_min == 4096
    assert target.password_prompts == 1
    assert target.address_family == socket.AF_INET6


def test_the_command_line_wins(evaluate: Resolve) -> None:
    target = evaluate(
        FILE,
        user="me",
        port=2200,
        identity_files=("/mine",),
        known_hosts_files=("/three",),
        strict_host_key_checking="yes",
        ciphers="aes128-gcm@openssh.com",
        ssh_options=(("hostkeyalias", "other"), ("proxyjump", "none"), ("identityagent", "none")),
    )
    assert (target.host, target.port, target.user) == ("real.example.org", 2200, "me")
    assert target.identity_files[0] == "/mine"
    assert target.known_hosts_files == ("/three",)
    assert not target.accept_new
    assert target.policy.ciphers == ("aes128-gcm@openssh.com",)
    assert target.host_key_alias == "other"
    assert target.proxy_jump == ()
    assert target.agent_path is None


@pytest.mark.parametrize("value", ["no", "off", "ask", "yes"])
def test_host_key_checking_is_never_switched_off(value: str, evaluate: Resolve) -> None:
    assert not evaluate(f"StrictHostKeyChecking {value}\n").accept_new


def test_lists_narrow_and_never_widen(evaluate: Resolve) -> None:
    target = evaluate("Ciphers aes256-cbc,aes256-ctr\nMACs hmac-sha1,hmac-sha2-256-etm@openssh.com\n")
    assert target.policy.ciphers == ("aes256-ctr",)
    assert target.policy.macs == ("hmac-sha2-256-etm@openssh.com",)
    assert evaluate("CASignatureAlgorithms -ecdsa*\n").ca_algorithms == (
        "ssh-ed25519",
        "rsa-sha2-512",
        "rsa-sha2-256",
    )
    assert evaluate("PubkeyAcceptedAlgorithms ssh-rsa,ssh-ed25519\n").user_key_algorithms == ("ssh-ed25519",)
    with pytest.raises(UsageError):
        evaluate("Ciphers aes256-cbc\n")


def test_lists_that_only_add_or_reorder_start_from_ours_and_not_from_ssh_s(evaluate: Resolve) -> None:
    """An older ssh knows no ML-KEM, and each has NIST curves among its own."""
    ours = make_policy(fast_aes=aes_in_hardware())
    assert evaluate("").policy == ours
    for line in (
        "KexAlgorithms +diffie-hellman-group14-sha1",
        "HostKeyAlgorithms +ssh-rsa",
        "Ciphers +aes128-cbc",
        "MACs ^hmac-sha1",
        "KexAlgorithms ^diffie-hellman-group14-sha1",
    ):
        assert evaluate(f"{line}\n").policy == ours, line
    assert evaluate("KexAlgorithms +diffie-hellman-group14-sha1\n", security="pq").policy == make_policy(
        "pq", fast_aes=aes_in_hardware()
    )
    curves = evaluate("KexAlgorithms ^ecdh-sha2-nistp521,curve25519-sha256\n").policy.kex
    assert curves == ("ecdh-sha2-nistp521", "curve25519-sha256", *(n for n in ours.kex if n != curves[1]))


def test_identity_file_none_leaves_the_usual_files_out(evaluate: Resolve, local: Local) -> None:
    target = evaluate("IdentityFile none\n")
    assert (target.identity_files, target.default_identity_files) == ((), ())


def test_tokens_of_a_proxy_command(evaluate: Resolve) -> None:
    target = evaluate("Host box\n HostName real\n ProxyCommand nc %h %p %n %r 100%%\n", user="dom\\me")
    assert target.proxy_command == "nc real 22 box 'dom\\me' 100%"
    with pytest.raises(UsageError, match="token %X"):
        evaluate("IdentityFile /keys/%X\n")


def test_match_by_host_and_user(evaluate: Resolve) -> None:
    by_user = "Match user me\n Port 3333\n"
    assert evaluate(by_user, user="me").port == 3333
    assert evaluate(by_user, user="you").port == 22
    text = "Match host box\n Port 1111\nMatch all\n HostKeyAlias everyone\n"
    assert evaluate(text).port == 1111
    assert evaluate(text, "fox").port == 22
    assert evaluate(text, "fox").host_key_alias == "everyone"


@pytest.mark.parametrize("is_own", [True, False])
def test_a_file_that_others_may_write_is_refused(is_own: bool, local: Local) -> None:
    file = Path(local.home) / ".ssh" / "config"
    file.write_text("Port 5\n")
    without_ssh = replace(local, ssh_program=None)
    assert resolve(SshOptions("box"), without_ssh).port == 5
    if is_own or os.getuid() != 0:
        file.chmod(0o620)
    else:
        os.chown(file, 65534, 65534)
    with pytest.raises(UsageError, match="may be written by them"):
        resolve(SshOptions("box"), without_ssh)


@pytest.mark.parametrize(
    "text",
    [
        'Match exec "true"\n Port 1\n',
        'Match host box exec "true"\n Port 1\n',
        "Match localnetwork 10.0.0.0/8\n Port 1\n",
        "Match canonical\n Port 1\n",
        "Include {directory}/included\n",
        "include = {directory}/incl*\n",
    ],
)
def test_what_the_fallback_cannot_decide_it_refuses(text: str, local: Local, tmp_path: Path) -> None:
    (tmp_path / "included").write_text("Port 1\n")
    file = tmp_path / "config"
    file.write_text(text.replace("{directory}", str(tmp_path)))
    with pytest.raises(UsageError, match="only the ssh program"):
        resolve(SshOptions("box", config_file=str(file)), replace(local, ssh_program=None))


def test_includes_are_followed_where_ssh_is_installed(local: Local, tmp_path: Path) -> None:
    (tmp_path / "included").write_text("Port 1234\n")
    (tmp_path / "config").write_text(f"Include {tmp_path}/included\n")
    assert resolve(SshOptions("box", config_file=str(tmp_path / "config")), local).port == 1234


def test_an_include_that_matches_nothing_is_nothing(evaluate: Resolve) -> None:
    assert evaluate("Include /nowhere/*.conf\nPort 5\n").port == 5


def test_errors_in_the_configuration_are_usage_errors(local: Local, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("NoSuchKeyword x\n")
    with pytest.raises(UsageError, match=r"(?i)nosuchkeyword"):
        resolve(SshOptions("box", config_file=str(tmp_path / "config")), local)
    for ssh_program in (local.ssh_program, None):
        with pytest.raises(UsageError, match="absent"):
            resolve(
                SshOptions("box", config_file=str(tmp_path / "absent")),
                replace(local, ssh_program=ssh_program),
            )


def test_the_users_own_file_is_read_without_ssh(local: Local) -> None:
    Path(local.home, ".ssh", "config").write_text("Host box\n Port 77\nHost *\n Port 78\n")
    assert resolve(SshOptions("box"), replace(local, ssh_program=None)).port == 77
    assert resolve(SshOptions("box", config_file="none"), replace(local, ssh_program=None)).port == 22


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", (None, None)),
        ("RekeyLimit default none", (None, None)),
        ("RekeyLimit 64M", (64 * 2**20, None)),
        ("RekeyLimit 1000000 none", (1_000_000, None)),
        ("RekeyLimit 2G 1m30s", (2 * 2**30, 90.0)),
        ("RekeyLimit default 1h", (None, 3600.0)),
    ],
)
def test_rekey_limit(evaluate: Resolve, line: str, expected: object) -> None:
    target = evaluate(line + "\n")
    assert (target.rekey_bytes_max, target.rekey_interval_s) == expected
    # The command line says it in the same words, and wins.
    target = evaluate("RekeyLimit 1K 1\n", ssh_options=(("rekeylimit", "3K 2"),))
    assert (target.rekey_bytes_max, target.rekey_interval_s) == (3072, 2.0)


@pytest.mark.parametrize("value", ["much", "64MM", "-1", "1M soon", "1M 1s 1s", '"1M'])
def test_what_is_no_rekey_limit_is_a_usage_error(evaluate: Resolve, value: str) -> None:
    with pytest.raises(UsageError):
        evaluate(f"RekeyLimit {value}\n")


HOPS: Dict[str, object] = {
    "box": (None, "box", None),
    "me@box": ("me", "box", None),
    "me@box:2222": ("me", "box", 2222),
    "[2001:db8::1]:2222": (None, "2001:db8::1", 2222),
    "me@[::1]": ("me", "::1", None),
    "ssh://me@box:22": ("me", "box", 22),
    "ssh://box/": (None, "box", None),
}


@pytest.mark.parametrize("hop", HOPS)
def test_hops(hop: str) -> None:
    assert parse_hop(hop) == HOPS[hop]


@pytest.mark.parametrize("line", ["NumberOfPasswordPrompts many", "RequiredRSASize -1", "RequiredRSASize 4k"])
def test_what_is_no_number_is_a_usage_error(evaluate: Resolve, line: str) -> None:
    with pytest.raises(UsageError):
        evaluate(line + "\n")


@pytest.mark.parametrize(
    "hop", ["", "@box", "-x", "me@-x", "a:b", "a:0", "a:65536", "::1", "a b", "$(x)@box", "[a"]
)
def test_bad_hops(hop: str) -> None:
    with pytest.raises(UsageError):
        parse_hop(hop)


@given(st.text(max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_name_or_a_usage_error(text: str) -> None:
    for parse in (parse_hop, config.check_host, config.check_user):
        try:
            parse(text)
        except UsageError as error:
            assert str(error).isprintable()


@given(st.lists(st.sampled_from(["%h", "%p", "%%", "%", "%z", "a b", "'"]), max_size=6).map("".join))
def test_any_proxy_command_expands_or_is_a_usage_error(text: str) -> None:
    tokens = dict.fromkeys("hnpr", "value")
    found: List[str] = []
    try:
        found.append(config.expand_shell(text, {**tokens, "%": "%"}))
    except UsageError:
        assert "%z" in text or "%" in text.replace("%%", "")
    assert all("%h" not in each.replace("%%", "") or "%%h" in text for each in found)
