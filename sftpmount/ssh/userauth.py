"""The SSH user authentication protocol (RFC 4252, RFC 4256, RFC 8308) over a transport: one request, one reply.

It takes the place of paramiko's AuthHandler, which signs before it asks whether a key is wanted (so a passphrase or a touch
is asked for in vain), runs prompts in the transport's thread, and does not say which methods a server takes.

The transport's thread only puts messages into a bounded queue; all else happens in the caller's thread, each wait bounded
by ``timeout_s`` from the last thing said.
"""

from __future__ import annotations

import queue
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import paramiko
from paramiko.common import (
    MSG_SERVICE_ACCEPT,
    MSG_USERAUTH_BANNER,
    MSG_USERAUTH_FAILURE,
    MSG_USERAUTH_INFO_REQUEST,
    MSG_USERAUTH_SUCCESS,
    cMSG_SERVICE_REQUEST,
    cMSG_USERAUTH_INFO_RESPONSE,
    cMSG_USERAUTH_REQUEST,
)

from sftpmount.errors import ConnectionLost, Unreachable
from sftpmount.ssh.keys import MalformedKey, Reader, string
from sftpmount.ssh.policy import printable
from sftpmount.ssh.transport import HardenedTransport

MESSAGES_MAX = 64
BANNER_CHARS_MAX = 4096
QUESTIONS_MAX = 32
ROUNDS_MAX = 16
# Number 60 is PK_OK, PASSWD_CHANGEREQ or INFO_REQUEST, as the method in progress has it.
_METHOD_SPECIFIC = MSG_USERAUTH_INFO_REQUEST


class Reply(NamedTuple):
    """The end of one request. ``methods`` can continue; ``partial``: this one succeeded, and another must follow."""

    success: bool
    partial: bool = False
    methods: Tuple[str, ...] = ()
    wanted: bool = False  # of a query: the server would take this key


class Question(NamedTuple):
    text: str
    echo: bool


Answer = Callable[[str, Sequence[Question]], List[str]]


class UserAuth:
    """A conversation about ``user`` on a transport whose host key is verified. Raises Unreachable where it breaks off."""

    def __init__(
        self,
        transport: HardenedTransport,
        user: str,
        timeout_s: float,
        on_banner: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport: Any = transport  # its stubs leave out what an auth_handler needs of it
        self._clock = clock
        self._user = user.encode("utf-8", "surrogateescape")
        self._timeout_s = timeout_s
        self._on_banner = on_banner
        self._inbox: queue.Queue[Optional[Tuple[int, bytes]]] = queue.Queue(MESSAGES_MAX)
        self._authenticated = False
        self.banner: Optional[str] = None  # asked for by paramiko's Transport.get_banner
        self._handler_table: Dict[int, Callable[[paramiko.Message], None]] = {
            number: self._receiver(number)
            for number in (
                MSG_SERVICE_ACCEPT,
                MSG_USERAUTH_SUCCESS,
                MSG_USERAUTH_FAILURE,
                MSG_USERAUTH_BANNER,
                _METHOD_SPECIFIC,
            )
        }

    # What paramiko's Transport asks of its auth_handler.

    def is_authenticated(self) -> bool:
        return self._authenticated

    def get_username(self) -> str:
        return self._user.decode("utf-8", "replace")

    def abort(self) -> None:
        try:
            self._inbox.put_nowait(None)
        except queue.Full:
            pass  # whoever waits sees the messages, then that the transport is dead

    def _receiver(self, number: int) -> Callable[[paramiko.Message], None]:
        def receive(message: paramiko.Message) -> None:
            if number == MSG_USERAUTH_SUCCESS and not self._authenticated:
                # Here and not in the caller's thread: the next message may already be one of an open connection.
                self._authenticated = True
                self._transport._auth_trigger()
            try:
                self._inbox.put_nowait((number, message.get_remainder()))
            except queue.Full:
                raise paramiko.SSHException("the server floods the authentication with messages") from None

        return receive

    # The conversation.

    def start(self) -> None:
        """Ask for the service; must come first."""
        self._transport.auth_handler = self
        self._send(cMSG_SERVICE_REQUEST, string(b"ssh-userauth"))
        number, _ = self._next()
        if number != MSG_SERVICE_ACCEPT:
            raise self._nonsense()

    def none(self) -> Reply:
        """Ask without credentials: lets in where nothing is needed, and tells the methods where something is."""
        return self._request(b"none", b"")

    def query(self, algorithm: str, blob: bytes) -> Reply:
        """Ask whether the server would take this key or certificate; ``wanted`` in the reply says so."""
        return self._request(
            b"publickey", b"\0" + string(algorithm.encode("ascii")) + string(blob), is_query=True
        )

    def public_key(self, algorithm: str, blob: bytes, sign: Callable[[bytes], bytes]) -> Reply:
        """Authenticate with a key; ``sign`` gets the bytes to be signed."""
        fields = b"\1" + string(algorithm.encode("ascii")) + string(blob)
        request = cMSG_USERAUTH_REQUEST + self._head(b"publickey") + fields
        signature = sign(string(self._transport.session_id) + request)
        return self._request(b"publickey", fields + string(signature))

    def password(self, password: str) -> Reply:
        """A server that wants the password changed counts as one that refuses it."""
        return self._request(b"password", b"\0" + string(password.encode("utf-8", "surrogateescape")))

    def keyboard_interactive(self, answer: Answer) -> Reply:
        """``answer`` gets the instruction and the questions of a round, and returns as many answers."""
        return self._request(b"keyboard-interactive", string(b"") + string(b""), answer=answer)

    def signature_algorithms(self) -> Optional[Tuple[str, ...]]:
        """What the server says it takes for user keys (RFC 8308 server-sig-algs); None where it says nothing."""
        value = self._transport.server_extensions.get("server-sig-algs")
        if not value:
            return None
        text = value if isinstance(value, str) else bytes(value).decode("ascii", "replace")
        return tuple(text.split(","))

    def _head(self, method: bytes) -> bytes:
        return string(self._user) + string(b"ssh-connection") + string(method)

    def _request(
        self, method: bytes, fields: bytes, *, is_query: bool = False, answer: Optional[Answer] = None
    ) -> Reply:
        self._send(cMSG_USERAUTH_REQUEST, self._head(method) + fields)
        for _ in range(ROUNDS_MAX):
            number, body = self._next()
            if number == MSG_USERAUTH_SUCCESS:
                return Reply(True)
            if number == MSG_USERAUTH_FAILURE:
                return self._failure(body)
            if number != _METHOD_SPECIFIC:
                raise self._nonsense()
            if is_query:
                return Reply(False, wanted=True)
            if answer is None:  # PASSWD_CHANGEREQ
                return Reply(False)
            self._send(cMSG_USERAUTH_INFO_RESPONSE, self._answers(body, answer))
        raise Unreachable("The server asks question after question; authentication was given up.")

    def _failure(self, body: bytes) -> Reply:
        reader = Reader(body)
        try:
            methods = reader.string().decode("ascii", "replace")
            partial = reader.take(1) != b"\0"
        except MalformedKey:
            raise self._nonsense() from None
        return Reply(False, partial, tuple(printable(name) for name in methods.split(",") if name))

    def _answers(self, body: bytes, answer: Answer) -> bytes:
        reader = Reader(body)
        try:
            name, instruction, _ = (reader.string().decode("utf-8", "replace") for _ in range(3))
            count = reader.u32()
            if count > QUESTIONS_MAX:
                raise MalformedKey("too many questions")
            questions = [
                Question(
                    printable(reader.string().decode("utf-8", "replace").strip()), reader.take(1) != b"\0"
                )
                for _ in range(count)
            ]
        except MalformedKey:
            raise self._nonsense() from None
        shown = " ".join(printable(text) for text in (name, instruction) if text.strip())
        answers = answer(shown, questions) if questions or shown else []
        return len(answers).to_bytes(4, "big") + b"".join(
            string(text.encode("utf-8", "surrogateescape")) for text in answers
        )

    def _nonsense(self) -> Unreachable:
        return Unreachable("The server does not follow the SSH authentication protocol.")

    def _send(self, number: bytes, body: bytes) -> None:
        try:
            self._transport.send_payload(number + body)
        except ConnectionLost:
            raise self._gone() from None

    def _next(self) -> Tuple[int, bytes]:
        """The next message that is no banner."""
        for _ in range(MESSAGES_MAX):
            item = self._take()
            if item is None:
                raise self._gone()
            number, body = item
            if number != MSG_USERAUTH_BANNER:
                return number, body
            try:
                text = Reader(body).string().decode("utf-8", "replace")[:BANNER_CHARS_MAX]
            except MalformedKey:
                raise self._nonsense() from None
            lines = (printable(line) for line in text.expandtabs().splitlines())
            self.banner = "\n".join(lines).strip()
            if self.banner:
                self._on_banner(self.banner)
        raise self._nonsense()

    def _take(self) -> Optional[Tuple[int, bytes]]:
        deadline = self._clock() + self._timeout_s
        while True:
            try:
                return self._inbox.get(timeout=0.25)
            except queue.Empty:
                if not self._transport.is_active():  # it may have died before abort() could reach us
                    return None
                if self._clock() >= deadline:
                    raise Unreachable(
                        f"The server did not answer for {self._timeout_s:g} s while authenticating."
                    ) from None

    def _gone(self) -> Unreachable:
        return Unreachable("The server closed the connection while authenticating.")
