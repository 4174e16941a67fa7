"""Logging in: every kind of credential against a real sshd and a real ssh-agent, and against a server made to measure."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, cast

import paramiko
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from paramiko.common import (
    AUTH_FAILED,
    AUTH_PARTIALLY_SUCCESSFUL,
    AUTH_SUCCESSFUL,
    cMSG_USERAUTH_BANNER,
    cMSG_USERAUTH_FAILURE,
)

from sftpmount.errors import AuthenticationError, Unreachable
from sftpmount.options import SshOptions
from sftpmount.ssh import keys
from sftpmount.ssh.agent import Agent, AgentError
from sftpmount.ssh.config import Local
from sftpmount.ssh.connect import Dialer
from sftpmount.ssh.transport import Connection
from sftpmount.ssh.userauth import UserAuth
from support.listener import Listener
from support.process import program, wait_until
from support.sshd import Sshd, keygen, public_key

SECRET = "correct horse \u00e9"


MakeKey = Callable[..., Path]


class Recorder:
    """A Prompt: remembers what it was asked and told, and answers from a list."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.questions: List[str] = []
        self.notices: List[str] = []

    def secret(self, text: str) -> str:
        self.questions.append(text)
        if not self.answers:
            raise AuthenticationError("there is no terminal to ask at.")
        return self.answers.pop(0)

    def notice(self, text: str) -> None:
        self.notices.append(text)


class Login:
    """Log in to ``server`` as often as called; each keyword sets an ssh_config keyword."""

    def __init__(self, server: Sshd, home: Path, agent: Optional[str] = None) -> None:
        self.prompt = Recorder()
        self.local = Local(str(home), server.user, "here", agent, program("ssh", "openssh-client"))
        self.options = SshOptions(
            "127.0.0.1",
            user=server.user,
            port=server.port,
            config_file="none",
            known_hosts_files=(str(server.known_hosts),),
            connect_timeout_s=10.0,
            ssh_options=(("globalknownhostsfile", "none"),),
        )

    def dialer(self, *identities: Path, answers: Sequence[str] = (), **keywords: str) -> Dialer:
        self.prompt = Recorder(*answers)
        options = replace(
            self.options,
            identity_files=tuple(map(str, identities)),
            ssh_options=(*self.options.ssh_options, *keywords.items()),
        )
        return Dialer(options, self.prompt, local=self.local)

    def __call__(self, *identities: Path, answers: Sequence[str] = (), **keywords: str) -> None:
        self.dialer(*identities, answers=answers, **keywords)().close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty home directory with its .ssh."""
    (tmp_path / "home" / ".ssh").mkdir(parents=True, mode=0o700)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """A hardened server of this module's own, since the tests change who may log in."""
    with Sshd(tmp_path_factory.mktemp("auth")) as each:
        yield each


@pytest.fixture
def own_sshd(server: Sshd) -> Sshd:
    """``server`` with an empty log and its usual key allowed."""
    os.truncate(server.log, 0)
    allow(server, server.user_key)
    return server


@pytest.fixture
def login(own_sshd: Sshd, home: Path) -> Login:
    return Login(own_sshd, home)


@pytest.fixture(scope="module")
def made_keys(tmp_path_factory: pytest.TempPathFactory) -> MakeKey:
    """Makes key pairs; the same arguments give copies of the same pair, since an RSA key takes its time."""
    store = tmp_path_factory.mktemp("keys")
    made: Dict[Tuple[str, Optional[int], str], Path] = {}

    def make(path: Path, kind: str, bits: Optional[int] = None, passphrase: str = "") -> Path:
        if kind == "ed25519":  # takes none, and tests want different ones
            return keygen(path, kind, passphrase=passphrase)
        key = (kind, bits, passphrase)
        if key not in made:
            made[key] = keygen(store / f"key{len(made)}", kind, bits, passphrase)
        shutil.copy(made[key], path)
        shutil.copy(f"{made[key]}.pub", f"{path}.pub")
        return path

    return make


def allow(server: Sshd, *private: Path) -> None:
    """Let exactly these keys in."""
    (server.dir / "authorized_keys").write_text("".join(public_key(path) + "\n" for path in private))


def attempts(server: Sshd) -> int:
    return len(re.findall(r"^Failed publickey", server.log_text(), re.MULTILINE))


# Key files.


@pytest.mark.parametrize(
    ("kind", "bits"), [("ed25519", None), ("ecdsa", 256), ("ecdsa", 384), ("ecdsa", 521), ("rsa", 3072)]
)
@pytest.mark.parametrize("passphrase", ["", SECRET])
def test_key_files(
    kind: str,
    bits: Optional[int],
    passphrase: str,
    login: Login,
    own_sshd: Sshd,
    tmp_path: Path,
    made_keys: MakeKey,
) -> None:
    key = made_keys(tmp_path / "key", kind, bits, passphrase)
    allow(own_sshd, key)
    login(key, answers=[passphrase] if passphrase else [])
    assert len(login.prompt.questions) == (1 if passphrase else 0)


@pytest.mark.parametrize("passphrase", ["", SECRET])
def test_keys_in_the_old_pem_format(passphrase: str, login: Login, own_sshd: Sshd, tmp_path: Path) -> None:
    key = keygen(tmp_path / "key", "ecdsa")
    command = [
        program("ssh-keygen", "openssh-client"),
        "-q",
        "-p",
        "-m",
        "PEM",
        "-N",
        passphrase,
        "-f",
        str(key),
    ]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    assert b"OPENSSH" not in key.read_bytes()
    allow(own_sshd, key)
    for has_public_half in (True, False):
        if not has_public_half:
            Path(f"{key}.pub").unlink()
        login(key, answers=[passphrase] if passphrase else [])


def test_a_passphrase_is_asked_for_only_where_the_key_is_wanted(
    login: Login, own_sshd: Sshd, tmp_path: Path
) -> None:
    locked, unwanted = (
        keygen(tmp_path / name, "ed25519", passphrase=SECRET) for name in ("locked", "unwanted")
    )
    allow(own_sshd, locked)
    login(unwanted, locked, answers=[SECRET])
    assert [str(locked) in question for question in login.prompt.questions] == [True]


def test_a_wrong_passphrase_is_asked_for_again_three_times(
    login: Login, own_sshd: Sshd, tmp_path: Path
) -> None:
    key = keygen(tmp_path / "key", "ed25519", passphrase=SECRET)
    allow(own_sshd, key)
    login(key, answers=["zebra", SECRET])
    assert len(login.prompt.questions) == 2
    with pytest.raises(AuthenticationError) as caught:
        login(key, answers=["zebra", "zebra 2", "zebra 3", SECRET])
    assert len(login.prompt.questions) == 3
    assert "zebra" not in str(caught.value)


def test_a_reconnect_asks_for_nothing(login: Login, own_sshd: Sshd, tmp_path: Path) -> None:
    key = keygen(tmp_path / "key", "ed25519", passphrase=SECRET)
    allow(own_sshd, key)
    dialer = login.dialer(key, answers=[SECRET])
    for _ in range(3):
        dialer().close()
    assert len(login.prompt.questions) == 1
    assert SECRET not in repr(vars(dialer))


def test_a_key_that_others_may_read_is_passed_over(login: Login, own_sshd: Sshd, tmp_path: Path) -> None:
    key = keygen(tmp_path / "key", "ed25519")
    key.chmod(0o640)
    allow(own_sshd, key)
    with pytest.raises(AuthenticationError, match=rf"others may read it \(mode 0640\): chmod 600 {key}"):
        login(key)
    key.chmod(0o400)
    login(key)


def test_a_passphrase_may_be_in_any_encoding(login: Login, own_sshd: Sshd, tmp_path: Path) -> None:
    key = keygen(tmp_path / "key", "ed25519", passphrase="gr\udcfcn")  # Latin-1
    allow(own_sshd, key)
    login(key, answers=["gr\udcfcn"])


def test_a_key_that_cannot_be_unlocked_does_not_keep_the_next_one_out(
    login: Login, own_sshd: Sshd, tmp_path: Path
) -> None:
    locked = keygen(tmp_path / "locked", "ed25519", passphrase=SECRET)
    allow(own_sshd, locked, own_sshd.user_key)
    login(locked, own_sshd.user_key)
    assert len(login.prompt.questions) == 1
    allow(own_sshd, locked)
    with pytest.raises(
        AuthenticationError, match=rf"{locked}: it has a passphrase, and there is no terminal"
    ):
        login(locked)


def test_batch_mode_never_asks(login: Login, own_sshd: Sshd, tmp_path: Path) -> None:
    key = keygen(tmp_path / "key", "ed25519", passphrase=SECRET)
    allow(own_sshd, key)
    login.options = replace(login.options, batch_mode=True)
    with pytest.raises(AuthenticationError, match="passphrase, which batch mode may not ask for"):
        login(key, answers=[SECRET])
    assert login.prompt.questions == []


def test_default_identities(login: Login, own_sshd: Sshd, home: Path, made_keys: MakeKey) -> None:
    key = made_keys(home / ".ssh" / "id_ecdsa", "ecdsa")
    made_keys(home / ".ssh" / "id_rsa", "rsa")
    allow(own_sshd, key)
    login()
    with pytest.raises(AuthenticationError):  # a named identity takes the place of the usual ones
        login(home / ".ssh" / "id_rsa")


@pytest.mark.parametrize(
    "content",
    [b"", b"not a key", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n"],
)
def test_a_file_that_is_no_key_is_passed_over(
    content: bytes, login: Login, own_sshd: Sshd, tmp_path: Path
) -> None:
    (tmp_path / "bad").write_bytes(content)
    login(tmp_path / "bad", own_sshd.user_key)
    with pytest.raises(AuthenticationError, match=rf"Not tried: .*{tmp_path}/bad: not a private key"):
        login(tmp_path / "bad")
    with pytest.raises(AuthenticationError, match=rf"{tmp_path}/absent: No such file"):
        login(tmp_path / "absent")


def test_short_rsa_keys_are_refused(login: Login, own_sshd: Sshd, tmp_path: Path, made_keys: MakeKey) -> None:
    key = made_keys(tmp_path / "key", "rsa", 2048)
    allow(own_sshd, key)
    with pytest.raises(AuthenticationError, match="an RSA key of 2048 bits, 3072 needed"):
        login(key)
    login.options = replace(login.options, security="compatible")
    login(key)


def test_a_refusal_names_what_was_tried_and_what_is_accepted(
    login: Login, own_sshd: Sshd, tmp_path: Path
) -> None:
    key = keygen(tmp_path / "key", "ed25519")
    with pytest.raises(AuthenticationError) as caught:
        login(key)
    for part in ("127.0.0.1", own_sshd.user, str(key), "The server accepts: publickey"):
        assert part in str(caught.value)
    assert caught.value.exit_status == 8


# Certificates.


def certify(tmp_path: Path, key: Path, *options: str) -> Path:
    """Sign ``key`` by a user CA (tmp_path/ca); returns the CA's private key. The certificate is ``key``-cert.pub."""
    ca = tmp_path / "ca"
    if not ca.exists():
        keygen(ca, "ed25519")
    command = [
        program("ssh-keygen", "openssh-client"),
        "-q",
        "-s",
        str(ca),
        "-I",
        "me",
        *options,
        f"{key}.pub",
    ]
    subprocess.run(command, check=True)
    return ca


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
@pytest.mark.parametrize("is_named", [False, True])
def test_certificates(
    kind: str, is_named: bool, login: Login, own_sshd: Sshd, tmp_path: Path, made_keys: MakeKey
) -> None:
    key = made_keys(tmp_path / "key", kind)
    ca = certify(tmp_path, key, "-n", own_sshd.user)
    (own_sshd.dir / "authorized_keys").write_text(f"cert-authority {public_key(ca)}\n")
    if is_named:
        certificate = tmp_path / "elsewhere.pub"
        Path(f"{key}-cert.pub").rename(certificate)
        login(key, certificatefile=str(certificate))
    else:
        login(key)
    wait_until(lambda: "-CERT" in own_sshd.log_text(), 20, "sshd's line, which it writes behind its answer")


# The agent.


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[str]:
    """The socket of a real ssh-agent that holds nothing."""
    path = tmp_path / "agent.sock"
    process = subprocess.Popen(
        [program("ssh-agent", "openssh-client"), "-D", "-a", str(path)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()  # printed once it listens
    yield str(path)
    process.send_signal(signal.SIGTERM)
    process.stdout.close()
    process.wait()


def add(agent: str, key: Path, *options: str) -> None:
    environment = {**os.environ, "SSH_AUTH_SOCK": agent}
    command = [program("ssh-add", "openssh-client"), "-q", *options, str(key)]
    subprocess.run(command, check=True, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
@pytest.mark.parametrize("by_option", [False, True])
def test_a_key_in_the_agent(
    kind: str, by_option: bool, agent: str, own_sshd: Sshd, home: Path, tmp_path: Path, made_keys: MakeKey
) -> None:
    key = made_keys(tmp_path / "key", kind)
    allow(own_sshd, key)
    add(agent, key)
    key.unlink()
    if by_option:
        Login(own_sshd, home)(identityagent=agent)
    else:
        Login(own_sshd, home, agent)()
    with pytest.raises(AuthenticationError):
        Login(own_sshd, home, agent)(identityagent="none")


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
def test_a_certificate_in_the_agent(
    kind: str, agent: str, own_sshd: Sshd, home: Path, tmp_path: Path, made_keys: MakeKey
) -> None:
    key = made_keys(tmp_path / "key", kind)
    ca = certify(tmp_path, key, "-n", own_sshd.user)
    (own_sshd.dir / "authorized_keys").write_text(f"cert-authority {public_key(ca)}\n")
    add(agent, key)  # takes key-cert.pub along
    for path in (key, Path(f"{key}-cert.pub")):
        path.unlink()
    Login(own_sshd, home, agent)()


def test_a_named_key_is_offered_first_and_signed_by_the_agent(
    agent: str, own_sshd: Sshd, home: Path, tmp_path: Path
) -> None:
    """A server that allows few attempts must not be asked about the agent's other keys first; no passphrase is needed."""
    key = keygen(tmp_path / "key", "ed25519")
    for number in range(7):  # more than MaxAuthTries
        add(agent, keygen(tmp_path / f"other{number}", "ed25519"))
    add(agent, key)
    subprocess.run(
        [program("ssh-keygen", "openssh-client"), "-q", "-p", "-N", SECRET, "-f", str(key)],
        check=True,
        stdin=subprocess.DEVNULL,
    )
    allow(own_sshd, key)
    for identity in (key, Path(f"{key}.pub")):
        login = Login(own_sshd, home, agent)
        login(identity)
        assert login.prompt.questions == []
    assert attempts(own_sshd) == 0


def test_identities_only_leaves_the_agents_other_keys_out(
    agent: str, own_sshd: Sshd, home: Path, tmp_path: Path
) -> None:
    key = keygen(tmp_path / "key", "ed25519")
    other = keygen(tmp_path / "other", "ed25519")
    add(agent, key)
    allow(own_sshd, key)
    Login(own_sshd, home, agent)(other)
    with pytest.raises(AuthenticationError):
        Login(own_sshd, home, agent)(other, identitiesonly="yes")


def test_too_many_keys_end_in_an_authentication_error(
    agent: str, own_sshd: Sshd, home: Path, tmp_path: Path
) -> None:
    for number in range(8):
        add(agent, keygen(tmp_path / f"key{number}", "ed25519"))
    with pytest.raises(AuthenticationError, match="closed the connection"):
        Login(own_sshd, home, agent)()


def test_an_agent_that_is_gone_or_refuses_is_named(own_sshd: Sshd, home: Path, tmp_path: Path) -> None:
    with pytest.raises(AuthenticationError, match=f"no agent answers at {tmp_path}/gone"):
        Login(own_sshd, home, str(tmp_path / "gone"))()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0\0\0\0",
        b"\xff\xff\xff\xff",
        b"\0\0\0\1\x05",
        b"\0\0\0\5\x0c\0\0\0\1",
        b"\0\0\0\5\x0c\xff\xff\xff\xff",
        b"\0\0\0\1\x0c",
    ],
)
def test_an_agent_that_talks_nonsense_is_an_error(answer: bytes, tmp_path: Path) -> None:
    path = str(tmp_path / "agent")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(100)
                peer.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with Agent(path) as agent, pytest.raises(AgentError):
            agent.list_keys()
        thread.join()


def software_agent(path: Path, blob: bytes, sign: Callable[[bytes, int], bytes]) -> Listener:
    """An ssh-agent on ``path`` that holds one key; ``sign`` gets data and flags and returns the signature on the wire."""

    def serve(peer: socket.socket) -> None:
        with peer, peer.makefile("rb") as stream:
            while head := stream.read(4):
                reader = keys.Reader(stream.read(int.from_bytes(head, "big")))
                answer = b"\x0c\0\0\0\1" + keys.string(blob) + keys.string(b"token")
                if reader.take(1) == b"\x0d":
                    assert reader.string() == blob
                    answer = b"\x0e" + keys.string(sign(reader.string(), reader.u32()))
                peer.sendall(keys.string(answer))

    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return Listener(serve, sock)


def test_a_security_key_in_the_agent_and_what_is_said_of_a_reconnect(
    own_sshd: Sshd, home: Path, tmp_path: Path
) -> None:
    """OpenSSH's PROTOCOL.u2f: the signature is over hash(application), flags, counter and hash(data)."""
    name = b"sk-ssh-ed25519@openssh.com"
    private = Ed25519PrivateKey.generate()
    public = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    blob = keys.string(name) + keys.string(public) + keys.string(b"ssh:")

    def sign(data: bytes, flags: int) -> bytes:
        touched_once = b"\x01" + (1).to_bytes(4, "big")
        signed = hashlib.sha256(b"ssh:").digest() + touched_once + hashlib.sha256(data).digest()
        return keys.string(name) + keys.string(private.sign(signed)) + touched_once

    line = f"{name.decode()} {base64.b64encode(blob).decode()}\n"
    (own_sshd.dir / "authorized_keys").write_text(line)
    (tmp_path / "token.pub").write_text(line)
    with software_agent(tmp_path / "agent", blob, sign):
        for identities in ([], [tmp_path / "token.pub"]):
            login = Login(own_sshd, home, str(tmp_path / "agent"))
            dialer = login.dialer(*identities)
            finish(dialer)
            assert [("wants a touch" in text, text.isprintable()) for text in login.prompt.notices] == [
                (True, True)
            ]
            finish(dialer)
            assert len(login.prompt.notices) == 1


def test_an_agent_that_signs_with_sha_1_is_not_used(
    own_sshd: Sshd, home: Path, tmp_path: Path, made_keys: MakeKey
) -> None:
    path = made_keys(tmp_path / "key", "rsa")
    allow(own_sshd, path)
    blob = keys.decode_public(Path(f"{path}.pub").read_bytes())[0]
    with software_agent(
        tmp_path / "agent", blob, lambda data, flags: keys.string(b"ssh-rsa") + keys.string(b"?")
    ):
        with pytest.raises(AuthenticationError, match="the agent cannot sign with rsa-sha2-512"):
            Login(own_sshd, home, str(tmp_path / "agent"))()


# Several steps on a real server.


def test_two_keys_one_after_the_other(home: Path, tmp_path: Path) -> None:
    first, second = (keygen(tmp_path / name, "ed25519") for name in ("first", "second"))
    with Sshd(tmp_path, "AuthenticationMethods publickey,publickey") as sshd:
        allow(sshd, first, second)
        Login(sshd, home)(first, second)
        with pytest.raises(AuthenticationError):
            Login(sshd, home)(first)


# A server made to measure: what a sshd without accounts and PAM cannot ask.


class Server(paramiko.ServerInterface):
    """One method after the other, as ``steps`` says; takes the password SECRET and the answers in ``answers``."""

    def __init__(self, steps: Sequence[str], answers: Dict[str, str]) -> None:
        self.steps = list(steps)
        self.answers = answers
        self.seen: List[str] = []
        self.queries = 0

    def _done(self, method: str, is_right: bool) -> int:
        self.seen.append(method)
        if not is_right or not self.steps or method not in self.steps[0].split("|"):
            return AUTH_FAILED
        self.steps.pop(0)
        return AUTH_PARTIALLY_SUCCESSFUL if self.steps else AUTH_SUCCESSFUL

    def get_allowed_auths(self, username: str) -> str:
        return self.steps[0].replace("|", ",") if self.steps else ""

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        self.queries += 1  # each key comes twice: to be asked about, and with a signature
        return AUTH_SUCCESSFUL if self.queries % 2 else self._done("publickey", True)

    def check_auth_password(self, username: str, password: str) -> int:
        return self._done("password", password == SECRET)

    def check_auth_interactive(self, username: str, submethods: str) -> int | paramiko.InteractiveQuery:
        query = paramiko.InteractiveQuery("Login\x1b[2J", "Please\a answer")
        for text in self.answers:
            query.add_prompt(text, False)
        return query

    def check_auth_interactive_response(self, responses: List[str]) -> int:
        return self._done("keyboard-interactive", responses == list(self.answers.values()))


class Custom:
    """Serves each connection with a Server of its own; quacks like Sshd as far as Login needs."""

    def __init__(self, tmp_path: Path, *steps: str, answers: Optional[Dict[str, str]] = None) -> None:
        self.user = "somebody"
        self.steps = steps
        self.answers = answers or {"Password: ": SECRET}
        self.servers: List[Server] = []
        self.on_start: Callable[[paramiko.Transport], None] = lambda transport: None
        self._host_key = paramiko.Ed25519Key.from_private_key_file(str(keygen(tmp_path / "host", "ed25519")))
        self._transports: List[paramiko.Transport] = []
        self._listener = Listener(self._serve)
        self.port = self._listener.port
        self.known_hosts = tmp_path / "known_custom"
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {public_key(tmp_path / 'host')}\n")

    def _serve(self, sock: socket.socket) -> None:
        transport = paramiko.Transport(sock)
        transport.add_server_key(self._host_key)
        self._transports.append(transport)
        self.servers.append(Server(self.steps, self.answers))
        self.on_start(transport)
        transport.start_server(server=self.servers[-1], event=threading.Event())

    def __enter__(self) -> Custom:
        return self

    def __exit__(self, *details: object) -> None:
        self._listener.close()
        for transport in self._transports:
            transport.close()


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """paramiko logs what it is given: nothing of ours may be in it (test_no_secret_is_logged)."""
    caplog.set_level(logging.DEBUG)


def log_in(server: Custom, home: Path, *answers: str, **changes: object) -> Tuple[Recorder, Dialer]:
    login = Login(server, home)  # type: ignore[arg-type]
    login.options = replace(login.options, **changes)  # type: ignore[arg-type]
    dialer = login.dialer(answers=answers)
    return login.prompt, dialer


def finish(dialer: Dialer) -> None:
    connection: Connection = dialer()
    connection.close()


def test_a_password(home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Custom(tmp_path, "password|publickey") as server:
        prompt, dialer = log_in(server, home, SECRET)
        finish(dialer)
        assert prompt.questions == ["somebody@127.0.0.1's password: "]
        finish(dialer)  # a reconnect asks nobody
        assert len(prompt.questions) == 1
    assert SECRET not in caplog.text
    assert "horse" not in caplog.text


def test_a_wrong_password_is_asked_for_again_and_then_given_up(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Custom(tmp_path, "password") as server:
        prompt, dialer = log_in(server, home, "wrong", SECRET)
        finish(dialer)
        assert len(prompt.questions) == 2
        prompt, dialer = log_in(server, home, "bad one", "bad two", "bad three", SECRET)
        with pytest.raises(AuthenticationError) as caught:
            finish(dialer)
        assert len(prompt.questions) == 3
        assert server.servers[-1].seen == ["password"] * 3
    assert "bad" not in str(caught.value)
    assert "bad one" not in caplog.text


@pytest.mark.parametrize("method", ["password", "keyboard-interactive"])
def test_password_stdin_takes_one_line_and_asks_nobody(method: str, home: Path, tmp_path: Path) -> None:
    with Custom(tmp_path, method) as server:
        login = Login(server, home)  # type: ignore[arg-type]
        options, prompt = replace(login.options, password_stdin=True), Recorder()
        dialer = Dialer(
            options, prompt, local=login.local, stdin=io.BytesIO(f"{SECRET}\r\nsecond line\n".encode())
        )
        finish(dialer)
        finish(dialer)
        with pytest.raises(AuthenticationError):
            finish(Dialer(options, prompt, local=login.local, stdin=io.BytesIO(b"wrong\n")))
        assert server.servers[-1].seen == [method]  # a wrong one is not tried again
        with pytest.raises(AuthenticationError, match="holds no password"):
            finish(Dialer(options, prompt, local=login.local, stdin=io.BytesIO()))
    assert prompt.questions == []


def test_keyboard_interactive_questions_are_cleaned_and_answered(home: Path, tmp_path: Path) -> None:
    questions = {"Password: ": SECRET, "Code\x1b]0;x\a: ": "123456"}
    with Custom(tmp_path, "keyboard-interactive", answers=questions) as server:
        prompt, dialer = log_in(server, home, SECRET, "123456")
        finish(dialer)
        assert [text.isprintable() for text in prompt.questions + prompt.notices] == [True] * 4
        assert "one-time code" in prompt.notices[1]
        assert "(somebody@127.0.0.1) Password:" in prompt.questions[0]
        finish(dialer)
        assert len(prompt.questions) == 2


@pytest.mark.parametrize(
    ("question", "warned"),
    [
        ("Password: ", False),
        ("Password for somebody@server:", False),
        ("One-time password (OATH) for `somebody': ", True),
        ("Verification code: ", True),
        ("OTP Password: ", True),
        ("Password & token: ", True),
    ],
)
def test_what_a_reconnect_cannot_repeat_is_said_at_mount(
    question: str, warned: bool, home: Path, tmp_path: Path
) -> None:
    with Custom(tmp_path, "keyboard-interactive", answers={question: SECRET}) as server:
        prompt, dialer = log_in(server, home, SECRET)
        finish(dialer)
        assert ["reconnect" in notice for notice in prompt.notices if "one-time" in notice] == [True] * warned


def test_an_answer_may_be_in_any_encoding() -> None:
    conversation = UserAuth(cast(Any, None), "somebody", 1.0, lambda banner: None)
    question = keys.string(b"") * 3 + b"\0\0\0\1" + keys.string(b"Password:") + b"\0"
    answer = conversation._answers(question, lambda shown, questions: ["gr\udcfcn"])
    assert answer == b"\0\0\0\1" + keys.string(b"gr\xfcn")


def test_a_key_and_then_a_password(home: Path, tmp_path: Path) -> None:
    keygen(home / ".ssh" / "id_ed25519", "ed25519")
    with Custom(tmp_path, "publickey", "password") as server:
        prompt, dialer = log_in(server, home, SECRET)
        finish(dialer)
        assert len(prompt.questions) == 1
        finish(dialer)
        assert server.servers[-1].seen[-1] == "password"


def test_preferred_authentications_and_methods_switched_off(home: Path, tmp_path: Path) -> None:
    with Custom(tmp_path, "password|keyboard-interactive") as server:
        for words, expected in (
            ({"preferredauthentications": "password,keyboard-interactive"}, "password"),
            ({"preferredauthentications": "keyboard-interactive,password"}, "keyboard-interactive"),
            ({"kbdinteractiveauthentication": "no"}, "password"),
            ({"passwordauthentication": "no"}, "keyboard-interactive"),
        ):
            login = Login(server, home)  # type: ignore[arg-type]
            login(answers=[SECRET], **words)
            assert server.servers[-1].seen == [expected]
        login = Login(server, home)  # type: ignore[arg-type]
        with pytest.raises(AuthenticationError, match="The server accepts: password, keyboard-interactive"):
            login(answers=[SECRET], preferredauthentications="publickey")


def test_nobody_to_ask_is_an_authentication_error(home: Path, tmp_path: Path) -> None:
    with Custom(tmp_path, "password") as server:
        _, dialer = log_in(server, home)
        with pytest.raises(AuthenticationError, match="Not tried: password: there is no terminal to ask at"):
            finish(dialer)


def send(transport: paramiko.Transport, number: bytes, *strings: str, tail: bytes = b"") -> None:
    message = paramiko.Message()
    message.add_byte(number)
    for text in strings:
        message.add_string(text)
    message.add_bytes(tail)
    transport._send_message(message)  # type: ignore[attr-defined]


def test_a_banner_reaches_the_person_without_escape_sequences(home: Path, tmp_path: Path) -> None:
    class Talkative(Server):
        def get_banner(self) -> Tuple[str, str]:
            return "Keep\tout\x1b[2J\x9b31m\r\nsecond \u202eline\n", "en"

    with Custom(tmp_path, "password") as server:
        server.on_start = lambda transport: server.servers.__setitem__(
            -1, Talkative(server.steps, server.answers)
        )
        prompt, dialer = log_in(server, home, SECRET)
        finish(dialer)
    assert len(prompt.notices) == 1
    shown = prompt.notices[0]
    assert shown.startswith("Keep")
    assert "second" in shown
    assert all(line.isprintable() for line in shown.split("\n"))


@pytest.mark.parametrize("number", [cMSG_USERAUTH_BANNER, cMSG_USERAUTH_FAILURE])
def test_a_flood_of_messages_ends_the_connection(number: bytes, home: Path, tmp_path: Path) -> None:
    class Flooding(Server):
        transport: paramiko.Transport

        def get_allowed_auths(self, username: str) -> str:
            for _ in range(1000):
                send(self.transport, number, "password", "en", tail=b"\0")
            return "password"

    with Custom(tmp_path, "password") as server:

        def start(transport: paramiko.Transport) -> None:
            flooding = Flooding(server.steps, server.answers)
            flooding.transport = transport
            server.servers[-1] = flooding

        server.on_start = start
        _, dialer = log_in(server, home, "wrong", "wrong", "wrong")
        with pytest.raises((Unreachable, AuthenticationError)):
            finish(dialer)


def test_a_server_that_never_answers_is_given_up(home: Path, tmp_path: Path) -> None:
    class Silent(Server):
        release = threading.Event()

        def check_auth_none(self, username: str) -> int:
            self.release.wait(20.0)
            return AUTH_FAILED

    with Custom(tmp_path, "password") as server:
        server.on_start = lambda transport: server.servers.__setitem__(
            -1, Silent(server.steps, server.answers)
        )
        _, dialer = log_in(server, home, SECRET, connect_timeout_s=3.0)
        try:
            with pytest.raises(Unreachable, match="did not answer for 3 s while authenticating"):
                finish(dialer)
        finally:
            Silent.release.set()


# Keys by themselves.


def test_a_key_that_is_unlocked_signs_as_openssh_verifies(tmp_path: Path, made_keys: MakeKey) -> None:
    for kind in ("ed25519", "ecdsa", "rsa"):
        path = made_keys(tmp_path / kind, kind, passphrase=SECRET)
        data = path.read_bytes()
        assert keys.public_of_private(data) == keys.decode_public(public_key(path).encode())[0]
        for wrong in (None, "wrong"):
            with pytest.raises(keys.PassphraseNeeded):
                keys.load_private_key(data, wrong)
        key = keys.load_private_key(data, SECRET)
        signature = key.sign(b"data", "rsa-sha2-256")
        verifier = paramiko.PKey.from_type_string(keys.key_type(key.blob), key.blob)
        assert verifier.verify_ssh_sig(b"data", paramiko.Message(signature))
