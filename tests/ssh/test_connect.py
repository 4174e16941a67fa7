"""Connecting to real servers: host keys, jump hosts, proxy commands, dialling, and what is said when it fails."""

from __future__ import annotations

import shlex
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Iterator, List, Tuple

import pytest

from sftpmount.errors import AuthenticationError, HostKeyError, PolicyError, Unreachable, UsageError
from sftpmount.options import SshOptions
from sftpmount.ssh import keys
from sftpmount.ssh.config import Local, resolve
from sftpmount.ssh.connect import Dialer, connect
from sftpmount.ssh.dial import dial_command, dial_tcp
from sftpmount.ssh.transport import Connection
from support.kexinit import Edit, ManInTheMiddle
from support.process import free_port, is_running, program, wait_until
from support.sshd import Sshd, keygen, public_key


class Recorder:
    """A Prompt: remembers what it was asked and told, and answers from a list."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.questions: List[str] = []
        self.notices: List[str] = []

    def secret(self, text: str) -> str:
        self.questions.append(text)
        if not self.answers:
            raise AuthenticationError("There is no terminal to ask at.")
        return self.answers.pop(0)

    def notice(self, text: str) -> None:
        self.notices.append(text)


def options_for(sshd: Sshd, **changes: object) -> SshOptions:
    options = SshOptions(
        "127.0.0.1",
        user=sshd.user,
        port=sshd.port,
        config_file="none",
        identity_files=(str(sshd.user_key),),
        known_hosts_files=(str(sshd.known_hosts),),
        connect_timeout_s=10.0,
        ssh_options=(("globalknownhostsfile", "none"), ("identityagent", "none")),
    )
    return replace(options, **changes)  # type: ignore[arg-type]


@pytest.fixture
def local(tmp_path: Path) -> Local:
    """A machine whose home directory is empty."""
    home = tmp_path / "home"
    home.mkdir()
    return Local(str(home), "somebody", "here", None, program("ssh", "openssh-client"))


def works(connection: Connection) -> bool:
    """Whether an SFTP server answers INIT over this connection; closes it."""
    answer = threading.Event()
    try:
        channel = connection.open_subsystem("sftp", lambda data: answer.set(), lambda error: None)
        channel.send(b"\0\0\0\5\1\0\0\0\3")
        return answer.wait(10.0)
    finally:
        connection.close()


def entry(sshd: Sshd, kind: str = "ed25519", name: str = "") -> str:
    return f"{name or f'[127.0.0.1]:{sshd.port}'} {public_key(sshd.host_keys[kind])}\n"


# Host keys.


def test_a_known_host_is_connected_to(sshd: Sshd) -> None:
    prompt = Recorder()
    connection = connect(options_for(sshd), prompt)
    assert connection.is_alive
    assert keys.key_type(connection.host_key) == "ssh-ed25519"
    assert connection.negotiated.host_key_fingerprint == keys.fingerprint(connection.host_key)
    assert works(connection)
    assert not connection.is_alive
    assert (prompt.questions, prompt.notices) == ([], [])


def test_what_only_compatible_accepts_is_said_once(tmp_path: Path) -> None:
    config = "KexAlgorithms diffie-hellman-group14-sha256\nCiphers aes256-ctr\nMACs hmac-sha2-256\n"
    prompt = Recorder()
    with Sshd(tmp_path, config, hardened=False, host_key_types=("rsa-2048",)) as sshd:
        dialer = Dialer(options_for(sshd, security="compatible"), prompt)
        assert works(dialer()) and works(dialer())
    (said,) = prompt.notices
    assert "security=compatible accepts MACs that are not encrypt-then-MAC" in said
    assert "uses diffie-hellman-group14-sha256 and hmac-sha2-256 and an RSA host key of 2048 bits;" in said


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
def test_the_known_key_type_is_asked_for(kind: str, sshd: Sshd, tmp_path: Path) -> None:
    known_hosts = tmp_path / "known_hosts"
    known_hosts.write_text(entry(sshd, kind))
    connection = connect(options_for(sshd, known_hosts_files=(str(known_hosts),)), Recorder())
    assert keys.key_type(connection.host_key) == f"ssh-{kind}"
    assert works(connection)


def test_an_unknown_host_is_refused_before_any_credential_is_sent(own_sshd: Sshd, tmp_path: Path) -> None:
    known_hosts = tmp_path / "known_hosts"
    known_hosts.write_text("")
    with pytest.raises(HostKeyError) as caught:
        connect(options_for(own_sshd, known_hosts_files=(str(known_hosts),)), Recorder())
    shown = keys.fingerprint(keys.decode_public(public_key(own_sshd.host_keys["ed25519"]).encode())[0])
    for part in ("unknown", "ssh-ed25519", shown, f"ssh-keyscan -p {own_sshd.port} 127.0.0.1", "accept-new"):
        assert part in str(caught.value)
    assert caught.value.exit_status == 6
    assert known_hosts.read_text() == ""
    assert "publickey" not in own_sshd.log_text()


def test_a_changed_host_key_names_both_keys_and_the_line(sshd: Sshd, tmp_path: Path) -> None:
    known_hosts = tmp_path / "known_hosts"
    other = public_key(keygen(tmp_path / "other", "ed25519"))
    known_hosts.write_text(f"# mine\n[127.0.0.1]:{sshd.port} {other}\n")
    for strict in ("yes", "accept-new"):
        options = options_for(sshd, known_hosts_files=(str(known_hosts),), strict_host_key_checking=strict)
        with pytest.raises(HostKeyError) as caught:
            connect(options, Recorder())
        for line in (other, public_key(sshd.host_keys["ed25519"])):
            assert keys.fingerprint(keys.decode_public(line.encode())[0]) in str(caught.value)
        assert f"{known_hosts}:2" in str(caught.value)
    assert known_hosts.read_text().count("\n") == 2


def test_a_signature_that_does_not_fit_is_about_the_host_key(own_sshd: Sshd) -> None:
    """Somebody in between took the better key exchanges out of what both sides said."""
    edit = Edit(sides=("client", "server"), without=("curve25519*",))
    with ManInTheMiddle(own_sshd.port, edit) as between:
        own_sshd.trust(between.port)
        with pytest.raises(
            HostKeyError, match=f"127.0.0.1 port {between.port}: The signature .* does not fit"
        ):
            connect(options_for(own_sshd, port=between.port), Recorder())
    assert "publickey" not in own_sshd.log_text()


def test_accept_new_records_the_key_and_then_insists_on_it(sshd: Sshd, tmp_path: Path) -> None:
    known_hosts = tmp_path / "new" / "known_hosts"
    options = options_for(sshd, known_hosts_files=(str(known_hosts),), strict_host_key_checking="accept-new")
    prompt = Recorder()
    assert works(connect(options, prompt))
    assert known_hosts.read_text() == entry(sshd)
    assert len(prompt.notices) == 1
    assert str(known_hosts) in prompt.notices[0]
    assert works(connect(replace(options, strict_host_key_checking="yes"), prompt))
    assert len(prompt.notices) == 1


def test_accept_new_needs_a_file(sshd: Sshd) -> None:
    options = options_for(sshd, known_hosts_files=("/dev/null",), strict_host_key_checking="accept-new")
    with pytest.raises(HostKeyError, match="needs a known_hosts file"):
        connect(options, Recorder())


def test_host_key_alias(sshd: Sshd, tmp_path: Path) -> None:
    known_hosts = tmp_path / "known_hosts"
    known_hosts.write_text(entry(sshd, name="the-box"))
    alias = (*options_for(sshd).ssh_options, ("hostkeyalias", "the-box"))
    options = options_for(sshd, known_hosts_files=(str(known_hosts),), ssh_options=alias)
    assert works(connect(options, Recorder()))


def test_a_reconnect_insists_on_the_first_host_key(own_sshd: Sshd) -> None:
    dialer = Dialer(options_for(own_sshd), Recorder())
    first = dialer()
    assert works(first)
    assert works(dialer())
    pinned = keys.decode_public(public_key(own_sshd.host_keys["rsa"]).encode())[0]
    with pytest.raises(HostKeyError, match="CHANGED since"):
        connect(replace(options_for(own_sshd), host_key_algorithms="ssh-ed25519"), Recorder(), pinned)
    assert works(connect(options_for(own_sshd), Recorder(), first.host_key))
    # The server gets a new key, and the person's known_hosts names it: the running mount still refuses.
    own_sshd.stop()
    for kind in ("ed25519", "rsa"):
        path = own_sshd.host_keys[kind]
        for old in (path, Path(f"{path}.pub")):
            old.unlink()
        keygen(path, kind)
    own_sshd.known_hosts.write_text(entry(own_sshd) + entry(own_sshd, "rsa"))
    own_sshd.start()
    with pytest.raises(HostKeyError, match="CHANGED since"):
        dialer()


# Jump hosts.


@pytest.fixture
def two_servers(tmp_path: Path) -> Iterator[Tuple[Sshd, Sshd]]:
    """(jump host, server), with the jump host's key allowed on the server too."""
    with (
        Sshd(tmp_path / "jump", "AllowTcpForwarding yes", sftp_only=False) as jump,
        Sshd(tmp_path / "target") as target,
    ):
        with (target.dir / "authorized_keys").open("a") as file:
            file.write(public_key(jump.user_key) + "\n")
        yield jump, target


def through(jump: Sshd, target: Sshd, *hops: str, known: str = "") -> SshOptions:
    """Options for ``target`` by way of ``jump`` (as often as ``hops`` say), with a known_hosts file that names both."""
    file = target.dir / "known_both"
    file.write_text(known or jump.known_hosts.read_text() + target.known_hosts.read_text())
    hop = f"{jump.user}@127.0.0.1:{jump.port}"
    return options_for(
        target,
        identity_files=(str(jump.user_key),),
        known_hosts_files=(str(file),),
        ssh_options=(*options_for(target).ssh_options, ("proxyjump", ",".join(hops or (hop,)))),
    )


def test_a_jump_host(two_servers: Tuple[Sshd, Sshd]) -> None:
    jump, target = two_servers
    connection = connect(through(jump, target), Recorder())
    assert works(connection)
    assert "Accepted publickey" in jump.log_text()
    assert "Accepted publickey" in target.log_text()


def test_a_jump_host_jumped_through_twice(two_servers: Tuple[Sshd, Sshd]) -> None:
    jump, target = two_servers
    first, second = (f"ssh://{jump.user}@{host}:{jump.port}" for host in ("localhost", "127.0.0.1"))
    known = jump.known_hosts.read_text() + entry(jump, name=f"[localhost]:{jump.port}") + entry(target)
    assert works(connect(through(jump, target, first, second, known=known), Recorder()))
    assert jump.log_text().count("Accepted publickey") == 2


def test_ending_a_connection_through_a_jump_host_ends_both(two_servers: Tuple[Sshd, Sshd]) -> None:
    jump, target = two_servers
    connection = connect(through(jump, target), Recorder())
    jump.kill_sessions()
    ended = threading.Event()
    try:
        connection.open_subsystem("sftp", lambda data: None, lambda error: ended.set())
    except Exception:
        ended.set()
    assert ended.wait(10.0)
    connection.close()
    assert not connection.is_alive


def test_an_unknown_server_behind_a_known_jump_host_is_refused(two_servers: Tuple[Sshd, Sshd]) -> None:
    jump, target = two_servers
    options = through(jump, target, known=jump.known_hosts.read_text())
    with pytest.raises(HostKeyError, match=rf"\[127.0.0.1\]:{target.port} is unknown"):
        connect(options, Recorder())
    assert "publickey" not in target.log_text()


def test_an_unknown_second_jump_host_is_refused(two_servers: Tuple[Sshd, Sshd]) -> None:
    jump, target = two_servers
    first, second = (f"ssh://{jump.user}@{host}:{jump.port}" for host in ("127.0.0.1", "localhost"))
    options = through(jump, target, first, second, known=jump.known_hosts.read_text() + entry(target))
    with pytest.raises(HostKeyError, match=rf"\[localhost\]:{jump.port} is unknown"):
        connect(options, Recorder())
    assert jump.log_text().count("Accepted publickey") == 1
    assert "publickey" not in target.log_text()


def test_a_jump_host_that_cannot_reach_the_server(two_servers: Tuple[Sshd, Sshd]) -> None:
    jump, target = two_servers
    target.stop()
    with pytest.raises(Unreachable, match=f"jump host does not connect us to 127.0.0.1 port {target.port}"):
        connect(through(jump, target), Recorder())


def test_a_loop_of_jump_hosts_ends(two_servers: Tuple[Sshd, Sshd], tmp_path: Path) -> None:
    jump, target = two_servers
    config = tmp_path / "config"
    config.write_text(f"Host *\n  ProxyJump {jump.user}@127.0.0.1:{jump.port}\n  GlobalKnownHostsFile none\n")
    options = replace(through(jump, target), config_file=str(config), ssh_options=())
    with pytest.raises(UsageError, match="loop"):
        connect(options, Recorder())
    with pytest.raises(UsageError, match="more than 8 hosts; is it a loop"):
        Dialer(options, Recorder(), local=replace(Local.current(), ssh_program=None))()


# Proxy commands.

NETCAT = (
    "import os, socket, sys, threading\n"
    "sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n"
    "def pump():\n"
    "    while True:\n"
    "        data = sock.recv(65536)\n"
    "        if not data: os._exit(0)\n"
    "        os.write(1, data)\n"
    "threading.Thread(target=pump, daemon=True).start()\n"
    "while True:\n"
    "    data = os.read(0, 65536)\n"
    "    if not data: os._exit(0)\n"
    "    sock.sendall(data)\n"
)


def test_a_proxy_command(sshd: Sshd, tmp_path: Path) -> None:
    script = tmp_path / "nc.py"
    script.write_text(NETCAT)
    words = (*options_for(sshd).ssh_options, ("proxycommand", f"{sys.executable} {script} %h %p"))
    assert works(connect(options_for(sshd, ssh_options=words), Recorder()))


def test_a_proxy_command_that_ends_is_noticed(sshd: Sshd) -> None:
    words = (*options_for(sshd).ssh_options, ("proxycommand", "true %h"))
    with pytest.raises(Unreachable, match=f"127.0.0.1 port {sshd.port}"):
        connect(options_for(sshd, ssh_options=words), Recorder())


def test_a_proxy_command_that_takes_no_hint_ends_with_the_connection() -> None:
    """It neither reads nor writes any more, and ignores SIGHUP."""
    text = (
        "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "os.write(1, b'%d.' % os.getpid()); signal.pause()"
    )
    sock = dial_command(f"{sys.executable} -c {shlex.quote(text)}", "host")
    sock.settimeout(10.0)
    said = b""
    while not said.endswith(b"."):
        said += sock.recv(16)
    sock.shutdown(socket.SHUT_RDWR)
    sock.close()
    wait_until(lambda: not is_running(int(said[:-1])), 20.0, "the end of the proxy command")


# Dialling.


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(8)
        yield sock


def test_the_socket_is_set_up_for_small_requests_and_dead_peers(listener: socket.socket) -> None:
    with dial_tcp("127.0.0.1", listener.getsockname()[1], 5.0) as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) > 0


def test_every_address_is_tried(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    port = listener.getsockname()[1]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.9", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: found)
    with dial_tcp("two.example", port, 5.0) as sock:
        assert sock.getpeername()[0] == "127.0.0.1"


def test_no_other_interface_is_used_than_the_one_named(sshd: Sshd) -> None:
    ours = options_for(sshd).ssh_options
    connect(options_for(sshd, ssh_options=(*ours, ("bindinterface", "lo"))), Recorder()).close()
    with pytest.raises(Unreachable, match="No such device"):
        connect(options_for(sshd, ssh_options=(*ours, ("bindinterface", "nowhere0"))), Recorder())


def test_a_closed_port() -> None:
    port = free_port()
    with pytest.raises(Unreachable) as caught:
        dial_tcp("127.0.0.1", port, 5.0)
    for part in ("127.0.0.1", str(port), "Connection refused"):
        assert part in str(caught.value)


def test_a_name_that_does_not_exist() -> None:
    with pytest.raises(Unreachable, match=r"host name nowhere\.invalid cannot be resolved"):
        dial_tcp("nowhere.invalid", 22, 10.0)


def test_a_name_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments: release.wait(30) and [])
    try:
        with pytest.raises(Unreachable, match=r"not resolved within 0\.1 s"):
            dial_tcp("slow.example", 22, 0.1)
    finally:
        release.set()


def test_a_server_that_says_nothing(listener: socket.socket, sshd: Sshd) -> None:
    options = options_for(sshd, port=listener.getsockname()[1], connect_timeout_s=3.0)
    with pytest.raises(Unreachable, match=r"within 3 s"):
        connect(options, Recorder())


def test_something_that_is_no_ssh_server(listener: socket.socket, sshd: Sshd) -> None:
    def answer() -> None:
        peer, _ = listener.accept()
        peer.sendall(b"HTTP/1.1 400 \x1b[31mBad Request\r\n\r\n" * 200)
        peer.close()

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(Unreachable) as caught:
        connect(options_for(sshd, port=listener.getsockname()[1]), Recorder())
    thread.join()
    assert str(caught.value).isprintable()


def test_no_common_algorithm_names_the_server(tmp_path: Path) -> None:
    with Sshd(tmp_path, "Ciphers aes256-cbc", hardened=False, host_key_types=("ed25519",)) as sshd:
        with pytest.raises(PolicyError, match="aes256-cbc") as caught:
            connect(options_for(sshd), Recorder())
        assert f"127.0.0.1 port {sshd.port}" in str(caught.value)


def test_a_short_rsa_host_key_is_refused(tmp_path: Path) -> None:
    sshd = Sshd(tmp_path, host_key_types=("rsa",))
    path = sshd.host_keys["rsa"]
    for old in (path, Path(f"{path}.pub")):
        old.unlink()
    keygen(path, "rsa", 2048)
    with sshd:
        with pytest.raises(PolicyError, match="2048"):
            connect(options_for(sshd), Recorder())
        assert works(connect(options_for(sshd, security="compatible"), Recorder()))


def test_required_rsa_size_counts_for_host_keys(sshd: Sshd, tmp_path: Path) -> None:
    known_hosts = tmp_path / "known_hosts"
    known_hosts.write_text(entry(sshd, "rsa"))
    options = options_for(sshd, known_hosts_files=(str(known_hosts),))
    longer = (*options.ssh_options, ("requiredrsasize", "3073"))
    with pytest.raises(PolicyError, match="3072 bits, and RequiredRSASize accepts 3073 and more"):
        connect(replace(options, ssh_options=longer), Recorder())


@pytest.mark.parametrize("security", ["hardened", "compatible"])
def test_only_compatible_says_so_where_it_is_not_needed(security: str, sshd: Sshd) -> None:
    prompt = Recorder()
    connect(options_for(sshd, security=security), prompt).close()
    assert len(prompt.notices) == (security == "compatible")
    assert not any(" uses " in notice for notice in prompt.notices)


# What never becomes an option or a shell word.


@pytest.mark.parametrize(
    "host",
    ["-oProxyCommand=touch x", "a b", "a;b", "$(a)", "`a`", "a|b", "a\nb", "", "a'b", "a\x1bb", "a/b", "a@b"],
)
def test_a_host_that_is_no_host_is_a_usage_error(host: str, local: Local) -> None:
    with pytest.raises(UsageError, match="not a host name"):
        Dialer(SshOptions(host, config_file="none"), Recorder(), local=local)()


@pytest.mark.parametrize("user", ["-l", "a b", "a;b", "$(a)", "a\nb", "a`b", "a'b", "a\\", "a/b"])
def test_a_user_that_is_no_user_is_a_usage_error(user: str, local: Local) -> None:
    with pytest.raises(UsageError, match="not a user name"):
        Dialer(SshOptions("127.0.0.1", user=user, config_file="none"), Recorder(), local=local)()


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("hostname", "$(touch${IFS}canary)"),
        ("hostname", "%h;touch${IFS}canary"),
        ("hostkeyalias", "`touch${IFS}canary`"),
        ("proxyjump", "good,x|touch${IFS}canary"),
        ("proxyjump", "$(touch${IFS}canary)@good"),
    ],
)
def test_names_in_options_do_not_reach_the_shell_of_a_match_exec(
    keyword: str, value: str, local: Local, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config"
    config.write_text('Match exec "echo %h %k > evaluated"\n  Port 1\n')
    resolve(SshOptions("box", config_file=str(config), ssh_options=((keyword, "good"),)), local)
    assert (tmp_path / "evaluated").exists()
    with pytest.raises(UsageError):
        resolve(SshOptions("box", config_file=str(config), ssh_options=((keyword, value),)), local)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "line", ["HostName -oProxyCommand=x", "User $(touch_x)", "HostKeyAlias a;b", "ProxyJump -x"]
)
def test_names_from_the_configuration_are_checked_too(line: str, local: Local, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(f"Host box\n  {line}\n")
    for ssh_program in (local.ssh_program, None):
        dialer = Dialer(
            SshOptions("box", config_file=str(config)),
            Recorder(),
            local=replace(local, ssh_program=ssh_program),
        )
        with pytest.raises(UsageError):
            dialer()
