"""Which credentials to offer, in what order, until the server lets us in.

Servers count attempts (OpenSSH's MaxAuthTries is 6, hardened ones have 3), so the most likely come first: identities that
were named, then the agent's keys, then the usual files. A key is offered before it is unlocked: a passphrase is asked for
only where the server would take the key.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Callable, Dict, Iterable, List, Optional, Protocol, Sequence, Set, Tuple

from sftpmount.errors import AuthenticationError, Unreachable
from sftpmount.ssh import keys
from sftpmount.ssh.agent import Agent, AgentError
from sftpmount.ssh.policy import printable
from sftpmount.ssh.userauth import Question, Reply, UserAuth

KEY_FILE_BYTES_MAX = 1024 * 1024
PASSPHRASE_TRIES = 3
_ONE_TIME = r"one.?time|\b[ht]?otp\b|code|token|challenge"
STEPS_MAX = 8  # partial successes in a row


class Prompt(Protocol):
    """How to reach the person. ``secret`` raises AuthenticationError where there is nobody to ask."""

    def secret(self, text: str) -> str: ...

    def notice(self, text: str) -> None: ...


class AuthUser(Protocol):
    """Who logs in, and with what: the part of config.Target that is read here."""

    @property
    def user(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def identity_files(self) -> Tuple[str, ...]: ...
    @property
    def default_identity_files(self) -> Tuple[str, ...]: ...
    @property
    def certificate_files(self) -> Tuple[str, ...]: ...
    @property
    def agent_path(self) -> Optional[str]: ...
    @property
    def identities_only(self) -> bool: ...
    @property
    def methods(self) -> Tuple[str, ...]: ...
    @property
    def password_prompts(self) -> int: ...


@dataclass
class Memory:
    """What was learnt while connecting and is needed again to reconnect without a person. Secrets: never shown."""

    answers: Dict[str, str] = field(default_factory=dict, repr=False)  # question -> the answer that worked
    unlocked: Dict[str, keys.PrivateKey] = field(default_factory=dict, repr=False)  # by file
    host_keys: Dict[Tuple[str, int], bytes] = field(default_factory=dict)  # by host and port


@dataclass(frozen=True)
class Candidate:
    """A key or certificate to offer. ``sign`` gets data and algorithm, and may ask for the passphrase."""

    label: str
    blob: bytes
    sign: Callable[[bytes, str], bytes]


class Authenticator:
    """One attempt to log in over ``conversation``; ``run()`` returns once the server agreed."""

    def __init__(
        self,
        conversation: UserAuth,
        target: AuthUser,
        prompt: Prompt,
        memory: Memory,
        *,
        algorithms: Sequence[str],
        rsa_bits_min: int,
        batch_mode: bool = False,
        password: Optional[str] = None,
    ) -> None:
        """``password``: the only one to try, for password and keyboard-interactive alike; nobody is asked then.

        ``batch_mode``: nobody is asked for anything; what ``memory`` holds is still used.
        """
        self._conversation = conversation
        self._target = target
        self._prompt = prompt
        self._memory = memory
        self._algorithms = tuple(algorithms)
        self._rsa_bits_min = rsa_bits_min
        self._batch_mode = batch_mode
        self._given_password = password
        self._tried: List[str] = []  # for the message: what was offered and refused
        self._passed_over: List[str] = []  # for the message: what was not offered, and why
        self._accepted: Tuple[str, ...] = ()
        self._used: Set[Tuple[str, bytes]] = set()
        self._passwords_left = target.password_prompts

    def run(self) -> None:
        """Raises AuthenticationError (nothing was accepted), Unreachable (the connection broke)."""
        self._conversation.start()
        reply = self._conversation.none()
        with _AgentKeys(self._target.agent_path, self._passed_over) as agent:
            try:
                for _ in range(STEPS_MAX):
                    if reply.success:
                        return
                    self._accepted = reply.methods
                    step = self._step(reply.methods, agent)
                    if step is None:
                        raise self._refused("")
                    reply = step
            except Unreachable:
                # Servers hang up after too many attempts; that is a matter of credentials, not of the network.
                if not self._tried:
                    raise
                raise self._refused("The server closed the connection. ") from None
        raise self._refused("The server asks for one method after another. ")

    def _step(self, methods: Sequence[str], agent: _AgentKeys) -> Optional[Reply]:
        """Try each usable method until one brings success or partial success; None when all are used up."""
        for method in self._target.methods:
            if method not in methods:
                continue
            if method == "publickey":
                reply = self._public_keys(agent)
            elif method == "password":
                reply = self._passwords(self._try_password, "password")
            else:
                reply = self._passwords(self._try_interactive, "keyboard-interactive")
            if reply is not None:
                return reply
        return None

    # Keys.

    def _public_keys(self, agent: _AgentKeys) -> Optional[Reply]:
        for candidate in self._candidates(agent):
            if ("publickey", candidate.blob) in self._used:
                continue
            self._used.add(("publickey", candidate.blob))
            algorithm = self._algorithm(candidate)
            if algorithm is None:
                continue
            reply = self._conversation.query(algorithm, candidate.blob)
            if reply.wanted:
                try:
                    reply = self._sign(candidate, algorithm)
                except AgentError as error:
                    self._passed_over.append(f"{candidate.label}: {error}")
                    continue
                except _Locked as error:
                    self._passed_over.append(f"{candidate.label}: {error}")
                    continue
            if reply.success or reply.partial:
                if algorithm.startswith("sk-") and not self._batch_mode:
                    self._prompt.notice(
                        f"A reconnect needs {candidate.label} again: where that wants a touch or a PIN and nobody is there, "
                        "the mount cannot reconnect by itself."
                    )
                return reply
            self._tried.append(candidate.label)
        return None

    def _sign(self, candidate: Candidate, algorithm: str) -> Reply:
        plain = keys.plain_type(algorithm)
        return self._conversation.public_key(
            algorithm, candidate.blob, lambda data: candidate.sign(data, plain)
        )

    def _algorithm(self, candidate: Candidate) -> Optional[str]:
        """The signature algorithm for this key under policy and server, or None (noting why it is passed over)."""
        type_name = keys.key_type(candidate.blob)
        plain = keys.plain_type(type_name)
        bits = keys.rsa_bits(candidate.blob)
        if bits is not None and bits < self._rsa_bits_min:
            self._passed_over.append(
                f"{candidate.label}: an RSA key of {bits} bits, {self._rsa_bits_min} needed"
            )
            return None
        choices = keys.RSA_ALGORITHMS if plain == "ssh-rsa" else (plain,)
        mine = [name for name in choices if name in self._algorithms or name.startswith("sk-")]
        if not mine:
            self._passed_over.append(f"{candidate.label}: {plain} keys are not accepted")
            return None
        server = self._conversation.signature_algorithms()
        # Only RSA leaves a choice; a server that does not list a type may still take it, so other types are just offered.
        if plain == "ssh-rsa" and server is not None:
            mine = [name for name in mine if name in server]
            if not mine:
                self._passed_over.append(f"{candidate.label}: the server takes no RSA signature but SHA-1")
                return None
        return keys.certificate_type(mine[0]) if keys.is_certificate(type_name) else mine[0]

    def _candidates(self, agent: _AgentKeys) -> Iterable[Candidate]:
        """In the order to be offered; a certificate before its bare key. Files are read as they come up."""
        target = self._target
        named = list(self._from_files(target.identity_files, agent, is_named=True))
        extra = [self._read_certificate(path, is_named=True) for path in target.certificate_files]
        certificates = [blob for blob in extra if blob is not None]
        yield from self._with_certificates(named, certificates)
        if not target.identities_only:
            held = [
                Candidate(f"agent key {keys.fingerprint(blob)}{label}", blob, agent.signer(blob))
                for blob, label in agent.held
            ]
            yield from self._with_certificates(held, certificates)
        if not target.identity_files:
            defaults = self._from_files(target.default_identity_files, agent, is_named=False)
            yield from self._with_certificates(defaults, certificates)

    def _with_certificates(
        self, found: Iterable[Candidate], certificates: Sequence[bytes]
    ) -> Iterable[Candidate]:
        for candidate in found:
            for certificate in certificates:
                if keys.plain_key(certificate) == candidate.blob:
                    yield Candidate(f"certificate for {candidate.label}", certificate, candidate.sign)
            yield candidate

    def _from_files(self, paths: Sequence[str], agent: _AgentKeys, *, is_named: bool) -> Iterable[Candidate]:
        for path in paths:
            data = self._read(path, is_named=is_named)
            public = self._public_half(path, data)
            if public is None:
                if data is not None:
                    self._passed_over.append(f"{path}: not a private key that can be used")
                continue
            if agent.holds(public):  # unlocked there already, or on a token
                sign = agent.signer(public)
            elif data is not None and not path.endswith(".pub"):
                sign = self._file_signer(path, data, public)
            else:
                self._passed_over.append(f"{path}: no private key for it, here or in the agent")
                continue
            certificate = self._read_certificate(_stem(path) + "-cert.pub", is_named=False)
            if certificate is not None and keys.plain_key(certificate) == public:
                yield Candidate(f"certificate of {path}", certificate, sign)
            yield Candidate(f"key {path}", public, sign)

    def _public_half(self, path: str, data: Optional[bytes]) -> Optional[bytes]:
        """The public key of an identity: from the file itself where it shows it, else from the ``.pub`` beside it."""
        for text in (data, self._read(_stem(path) + ".pub", is_named=False)):
            if text is None:
                continue
            try:
                return keys.public_of_private(text) or keys.decode_public(text)[0]
            except keys.MalformedKey:
                pass
            try:
                return keys.load_private_key(text).blob  # PEM, not encrypted
            except (keys.MalformedKey, keys.PassphraseNeeded):
                pass
        if data is None or b"ENCRYPTED" not in data:
            return None
        try:
            return self._unlock(
                path, data
            ).blob  # PEM, encrypted: nothing of it can be read without the passphrase
        except _Locked:
            return None

    def _file_signer(self, path: str, data: bytes, public: bytes) -> Callable[[bytes, str], bytes]:
        def sign(message: bytes, algorithm: str) -> bytes:
            key = self._unlock(path, data)
            if key.blob != public:
                raise _Locked("its public and private halves do not belong together")
            return key.sign(message, algorithm)

        return sign

    def _unlock(self, path: str, data: bytes) -> keys.PrivateKey:
        """The private key in a file, its passphrase asked for once and for all. Raises _Locked."""
        if path not in self._memory.unlocked:
            _refuse_what_others_may_read(path)
            try:
                self._memory.unlocked[path] = self._open(path, data)
            except keys.MalformedKey as error:
                raise _Locked(str(error)) from None
        return self._memory.unlocked[path]

    def _open(self, path: str, data: bytes) -> keys.PrivateKey:
        try:
            return keys.load_private_key(data)
        except keys.PassphraseNeeded:
            if self._batch_mode:
                reason = "it has a passphrase, which batch mode may not ask for; load it into ssh-agent"
                raise _Locked(reason) from None
        text = f"Passphrase for key {path}: "
        for _ in range(PASSPHRASE_TRIES):
            try:
                passphrase = self._prompt.secret(text)
            except AuthenticationError as error:
                raise _Locked(f"it has a passphrase, and {_clause(error)}") from None
            try:
                return keys.load_private_key(data, passphrase)
            except keys.PassphraseNeeded:
                text = f"That did not open it. Passphrase for key {path}: "
        raise _Locked("its passphrase was not given")

    def _read(self, path: str, *, is_named: bool) -> Optional[bytes]:
        try:
            with open(path, "rb") as file:
                return file.read(KEY_FILE_BYTES_MAX)
        except OSError as error:
            if is_named and not os.path.exists(_stem(path) + ".pub"):
                self._passed_over.append(f"{path}: {error.strerror}")
            return None

    def _read_certificate(self, path: str, *, is_named: bool) -> Optional[bytes]:
        data = self._read(path, is_named=is_named)
        if data is None:
            return None
        try:
            blob, _ = keys.decode_public(data)
            if keys.plain_key(blob) != blob:
                return blob
            problem = "not a certificate"
        except keys.MalformedKey as error:
            problem = str(error)
        self._passed_over.append(f"{path}: {problem}")
        return None

    # Passwords.

    def _passwords(self, attempt: Callable[[bool], Optional[Reply]], method: str) -> Optional[Reply]:
        """Attempts with a password until one succeeds or none may be made; the first may use a remembered answer."""
        is_first = True
        while self._passwords_left > 0:
            reply = attempt(is_first)
            if reply is None:
                return None
            if reply.success or reply.partial:
                return reply
            self._passwords_left -= 1
            self._tried.append(method)
            is_first = False
            if method not in reply.methods and reply.methods:
                return None
        return None

    def _try_password(self, is_first: bool) -> Optional[Reply]:
        text = f"{self._target.user}@{self._target.host}'s password: "
        password = self._password(text, is_first, "password")
        if password is None:
            return None
        reply = self._conversation.password(password)
        if reply.success or reply.partial:
            self._memory.answers[text] = password
        return reply

    def _try_interactive(self, is_first: bool) -> Optional[Reply]:
        given: Dict[str, str] = {}
        missing: List[str] = []

        def answer(shown: str, questions: Sequence[Question]) -> List[str]:
            if shown and not self._is_unattended:
                self._prompt.notice(shown)
            return [one(question) for question in questions]

        def one(question: Question) -> str:
            text = f"({self._target.user}@{self._target.host}) {question.text} "
            value = self._password(text, is_first, "keyboard-interactive")
            if value is None:
                missing.append(question.text)
                return ""  # RFC 4256 wants an answer to every question, then refuses
            given[text] = value
            return value

        if ("keyboard-interactive", b"") in self._used and self._is_unattended:
            return None
        self._used.add(("keyboard-interactive", b""))
        reply = self._conversation.keyboard_interactive(answer)
        if reply.success or reply.partial:
            if not self._is_unattended and not all(map(_asks_for_a_password, given)):
                self._prompt.notice(
                    "A reconnect can only repeat these answers: if one was a one-time code, the mount cannot reconnect by itself."
                )
            self._memory.answers.update(given)
        return None if missing and not (reply.success or reply.partial) else reply

    @property
    def _is_unattended(self) -> bool:
        return self._batch_mode or self._given_password is not None

    def _password(self, text: str, is_first: bool, method: str) -> Optional[str]:
        """The answer to ``text``: remembered, from password_stdin, or asked for. None where there is none to be had."""
        if self._given_password is not None:
            return self._given_password if is_first else None
        if is_first and text in self._memory.answers:
            return self._memory.answers[text]
        if self._batch_mode:
            if is_first:
                self._passed_over.append(f"{method}: batch mode may not ask")
            return None
        try:
            return self._prompt.secret(text)
        except AuthenticationError as error:
            self._passed_over.append(f"{method}: {_clause(error)}")
            return None

    def _refused(self, beginning: str) -> AuthenticationError:
        target = self._target
        accepts = ", ".join(self._accepted) or "nothing that we can offer"
        tried = "; ".join(self._tried) or "nothing"
        others = f" Not tried: {'; '.join(dict.fromkeys(self._passed_over))}." if self._passed_over else ""
        return AuthenticationError(
            f"{beginning}{target.host} does not let {printable(target.user)} in. "
            f"The server accepts: {accepts}. Tried: {tried}.{others}"
        )


class _Locked(Exception):
    """A private key that cannot be used now; ``str(e)`` is a clause that says why."""


class _AgentKeys:
    """The agent's keys, fetched once. An agent that does not answer holds none, and ``notes`` says so."""

    def __init__(self, path: Optional[str], notes: List[str]) -> None:
        self._agent: Optional[Agent] = None
        self.held: List[Tuple[bytes, str]] = []  # key or certificate, and its comment ready to be shown
        if path is None:
            return
        try:
            self._agent = Agent(path)
            for blob, comment in self._agent.list_keys():
                if _is_readable(blob):
                    self.held.append((blob, f" ({printable(comment)})" if comment else ""))
        except AgentError as error:
            notes.append(f"agent: {error}")

    def __enter__(self) -> _AgentKeys:
        return self

    def __exit__(self, *details: object) -> None:
        if self._agent is not None:
            self._agent.close()

    def holds(self, blob: bytes) -> bool:
        return any(held == blob for held, _ in self.held)

    def signer(self, blob: bytes) -> Callable[[bytes, str], bytes]:
        agent = self._agent
        if agent is None:
            raise AgentError("there is no agent")
        return lambda data, algorithm: agent.sign(blob, data, algorithm)


def _is_readable(blob: bytes) -> bool:
    try:
        keys.rsa_bits(blob)
    except keys.MalformedKey:
        return False
    return True


def _refuse_what_others_may_read(path: str) -> None:
    """As ssh does, which looks at a private key only where it is the user's own. Raises _Locked."""
    try:
        status = os.stat(path)
    except OSError:
        return  # it was read a moment ago, and is gone
    if status.st_uid == os.getuid() and status.st_mode & 0o077:
        raise _Locked(f"others may read it (mode {status.st_mode & 0o777:04o}): chmod 600 {path}")


def _asks_for_a_password(question: str) -> bool:
    """Whether the same answer is likely to be right the next time."""
    return "password" in question.lower() and not re.search(_ONE_TIME, question, re.IGNORECASE)


def _clause(error: AuthenticationError) -> str:
    return str(error).rstrip(".")


def _stem(path: str) -> str:
    """An identity may be named by its private or its public file."""
    return path[: -len(".pub")] if path.endswith(".pub") else path
