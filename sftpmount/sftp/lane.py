"""One channel that speaks SFTP: requests in flight, matched to their replies by id.

1. Requests are sent by the thread that needs them; replies are parsed where they arrive, in the thread that reads: the
   transport's, or the one that waits for the next reply (``ssh.packetizer``). A callback runs there too: it must be short, must
   not send and must not wait.
2. A request ends exactly once: with its reply, or with ConnectionLost when its lane ends.
3. A server that breaks the protocol (unknown id, wrong type, impossible length) is cut off: ProtocolViolation.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from _thread import LockType, allocate_lock, get_ident
from typing import Any, Callable, Dict, Iterator, List, Optional, Protocol, Set, TypeVar

from .. import waiting
from ..errors import (
    FX_EOF,
    FX_FAILURE,
    ConnectionLost,
    FsError,
    NotSent,
    ProtocolViolation,
    RemoteDirectoryError,
    StatusError,
)
from . import wire

log = logging.getLogger(__name__)

T = TypeVar("T")

# Requests that change nothing on the server.
_LOOKS = frozenset(
    (
        wire.INIT,
        wire.CLOSE,
        wire.READ,
        wire.LSTAT,
        wire.FSTAT,
        wire.OPENDIR,
        wire.READDIR,
        wire.REALPATH,
        wire.STAT,
        wire.READLINK,
    )
)


class ByteChannel(Protocol):
    """What a lane needs of ``ssh.transport.Channel``."""

    def send(self, *parts: wire.Buffer) -> None: ...  # pragma: no cover

    def together(self) -> contextlib.AbstractContextManager[None]: ...  # pragma: no cover

    def close(self) -> None: ...  # pragma: no cover


class ByteConnection(Protocol):
    """What a session needs of ``ssh.transport.Connection``."""

    def open_subsystem(
        self, name: str, on_data: Callable[[bytes], None], on_closed: Callable[[Exception], None]
    ) -> ByteChannel: ...  # pragma: no cover

    def be_lazy_when(self, nobody_waits: Callable[[], bool]) -> None: ...  # pragma: no cover

    def wait_for(self, lock: LockType) -> None: ...  # pragma: no cover

    def attend(self) -> None: ...  # pragma: no cover

    def heartbeat(self) -> None: ...  # pragma: no cover

    def last_heard_s(self) -> float: ...  # pragma: no cover

    def state(self) -> Dict[str, Any]: ...  # pragma: no cover

    def abort(self) -> None: ...  # pragma: no cover

    def close(self) -> None: ...  # pragma: no cover


ReplyCallback = Callable[["Pending"], None]


class Pending:
    """A request in flight. A raw lock is the event: concurrent.futures.Future costs ten times as much per request."""

    __slots__ = (
        "_callback",
        "_lock",
        "_wait_for",
        "ahead_of",
        "asked",
        "body",
        "error",
        "kind",
        "request_id",
    )

    def __init__(
        self,
        callback: Optional[ReplyCallback] = None,
        asked: int = wire.INIT,
        wait_for: Callable[[LockType], None] = waiting.acquire,
    ) -> None:
        self.asked = asked  # the request's type
        self.kind = 0
        self.request_id = 0  # set for VERSION alone, which has the version number in this place
        self.body = b""
        self.error: Optional[ConnectionLost] = None
        self.ahead_of: Optional[Pending] = None  # the last one that was asked for together with it
        self._callback = callback
        self._wait_for = wait_for
        self._lock = allocate_lock()
        self._lock.acquire()

    def complete(self, kind: int, body: bytes, error: Optional[ConnectionLost] = None) -> None:
        """Called once, by the lane."""
        self.kind, self.body, self.error = kind, body, error
        self._lock.release()
        if self._callback is not None:
            try:
                self._callback(self)
            except Exception:
                log.exception("a reply's callback failed")

    @property
    def is_waited_for(self) -> bool:
        """True where there is nothing to be called."""
        return self._callback is None

    def wait(self) -> Pending:
        """Wait for the reply (the session's liveness bounds the wait); raises ConnectionLost where there will be none.

        Raises FsError (EINTR) where nobody waits for it any more.
        """
        if self.ahead_of is not None and self._lock.locked():
            self.ahead_of._arrive()  # in one wait for all
        self._arrive()
        if self.error is not None:
            raise self.error
        return self

    def _arrive(self) -> None:
        self._wait_for(self._lock)
        self._lock.release()

    # Decoders: each raises StatusError where the server says so, ProtocolViolation where the reply makes no sense.

    def expect_ok(self) -> None:
        """A STATUS of OK."""
        if self.error is not None:
            raise self.error
        if self.kind != wire.STATUS:
            raise ProtocolViolation(
                f"the server answered with packet type {self.kind} where it owes a status"
            )
        status = self._status()
        if status is not None:
            raise status

    def handle(self) -> bytes:
        """A HANDLE."""
        return self._decode(wire.HANDLE, wire.parse_handle)

    def data(self) -> bytes:
        """DATA; an end-of-file STATUS is b"". One of OK is a failure: rclone's server says so of a READ through a handle that
        is open for writing too, and to reconnect, and ask again, would bring the same answer."""
        if self.kind == wire.DATA and self.error is None:
            return self.body
        if self.kind == wire.STATUS and self.error is None and self._status() is None:
            raise StatusError(FX_FAILURE, "the server answered OK where it owes a result")
        return self._decode(wire.DATA, bytes, at_eof=b"")

    def names(self) -> List[wire.Entry]:
        """NAME; an end-of-file STATUS is an empty list."""
        return self._decode(wire.NAME, wire.parse_names, at_eof=[])

    def attrs(self) -> wire.Attrs:
        """ATTRS."""
        return self._decode(wire.ATTRS, wire.parse_attrs)

    def limits(self) -> wire.Limits:
        """EXTENDED_REPLY for limits@openssh.com."""
        return self._decode(wire.EXTENDED_REPLY, wire.parse_limits)

    def statvfs(self) -> wire.StatVfs:
        """EXTENDED_REPLY for statvfs@openssh.com."""
        return self._decode(wire.EXTENDED_REPLY, wire.parse_statvfs)

    def _status(self) -> Optional[StatusError]:
        try:
            return wire.parse_status(self.body)
        except wire.WireError as error:
            raise ProtocolViolation(f"the server's status cannot be read: {error}") from error

    def _decode(self, kind: int, parse: Callable[[bytes], T], at_eof: Optional[T] = None) -> T:
        if self.error is not None:
            raise self.error
        if self.kind == wire.STATUS:
            status = self._status()
            if status is None:
                raise ProtocolViolation("the server answered OK where it owes a result")
            if status.code == FX_EOF and at_eof is not None:
                return at_eof
            raise status
        if self.kind != kind:
            raise ProtocolViolation(f"the server answered with packet type {self.kind} where it owes {kind}")
        try:
            return parse(self.body)
        except wire.WireError as error:
            raise ProtocolViolation(f"the server's reply cannot be read: {error}") from error


class Lane:
    """One channel that speaks SFTP. ``request`` may be called from any thread but the transport's."""

    def __init__(
        self, name: str, on_closed: Callable[[Lane, ConnectionLost], None], clock: Callable[[], float]
    ) -> None:
        self.name = name
        self.extensions: Dict[bytes, bytes] = {}
        self._clock = clock
        self._channel: Optional[ByteChannel] = None
        self._connection: Optional[ByteConnection] = None
        self._ids = itertools.count(1)
        self._pending: Dict[int, Pending] = {}
        self._awaited: Set[int] = set()  # ids of the requests in flight whose replies someone waits for
        self._reader = wire.ReplyReader()
        # Each thread in ``together`` -> what it has requested there, by id.
        self._gathered: Dict[int, Dict[int, Pending]] = {}
        self._version = Pending()
        self._version_known = False
        self._lost: Optional[ConnectionLost] = None
        self._closed = on_closed
        self.heard_s = clock()
        self.received_bytes = 0  # counted by the thread that reads alone
        self._oldest = -1  # id of the oldest request when it was last looked at, and since when it is
        self._oldest_s = clock()
        self._doubt = False

    def open(self, connection: ByteConnection) -> None:
        """Start the subsystem and agree on version 3."""
        self._connection = connection
        self._channel = connection.open_subsystem("sftp", self._on_data, self._on_closed)
        self._channel.send(wire.init())
        reply = self._version.wait()
        if reply.kind != wire.VERSION:
            raise RemoteDirectoryError(
                "The server's sftp subsystem does not answer as SFTP; ask its operator."
            )
        if reply.request_id != 3:
            raise RemoteDirectoryError(
                f"The server answers with SFTP version {reply.request_id}, not 3; ask its operator."
            )
        try:
            self.extensions = wire.parse_extensions(reply.body)
        except wire.WireError as error:
            raise ProtocolViolation(f"the server's VERSION cannot be read: {error}") from error

    def request(
        self,
        kind: int,
        *parts: wire.Buffer,
        callback: Optional[ReplyCallback] = None,
        is_awaited: bool = True,
    ) -> Pending:
        """Send one request; blocks only for flow control. Raises ConnectionLost, or NotSent where nothing left.

        A reply that is not ``is_awaited`` may be left lying for about a millisecond, so that several are read at once.
        """
        if self._lost is not None or self._channel is None or self._connection is None:
            raise NotSent(str(self._lost))
        pending = Pending(callback, kind, self._connection.wait_for)
        request_id = next(self._ids) & 0xFFFFFFFF
        self._pending[request_id] = pending
        if self._gathered and get_ident() in self._gathered:
            self._gathered[get_ident()][request_id] = pending
        if is_awaited:
            self._awaited.add(request_id)
        try:
            self._channel.send(wire.header(kind, request_id, sum(map(len, parts))), *parts)
        except ConnectionLost:
            self._on_closed(ConnectionLost(f"lane {self.name}: sending failed"))
        except FsError:  # who asks has gone, before any of it was sent
            if self._take_back(request_id) is not None:
                raise
            # It has ended with its lane meanwhile, and whoever is called at its end was.
        if callback is not None and is_awaited:
            self._connection.attend()
        # Whoever set _lost may have swept the table before this request was in it.
        if self._lost is not None and self._pending.pop(request_id, None) is not None:
            self._doubt = self._doubt or kind not in _LOOKS
            pending.complete(0, b"", self._lost)
        return pending

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What this thread requests here within leaves in one packet, if it fits, at the end of the block.

        The end raises FsError (EINTR) where nothing of it was sent and nobody waits any more. Within, wait for nothing.
        """
        if self._channel is None:
            raise NotSent(str(self._lost))
        me = get_ident()
        if me in self._gathered:
            yield
            return
        gathered: Dict[int, Pending] = {}
        is_done = False
        try:
            with self._channel.together():
                self._gathered[me] = gathered
                try:
                    yield
                    is_done = True
                finally:
                    del self._gathered[me]
                waited_for = [each for each in gathered.values() if each.is_waited_for]
                for each in waited_for[:-1]:
                    each.ahead_of = waited_for[-1]
        except ConnectionLost:
            if not is_done:
                raise
            self._on_closed(ConnectionLost(f"lane {self.name}: sending failed"))
        except FsError as error:
            if is_done:
                for pending in filter(None, map(self._take_back, gathered)):
                    pending.complete(0, b"", NotSent(str(error)))
            raise

    def _take_back(self, request_id: int) -> Optional[Pending]:
        self._awaited.discard(request_id)
        return self._pending.pop(request_id, None)

    @property
    def in_flight(self) -> int:
        """Requests that wait for their reply."""
        return len(self._pending)

    @property
    def in_doubt(self) -> bool:
        """True where a request that changes something is unanswered, or was at the lane's end."""
        return self._doubt or any(pending.asked not in _LOOKS for pending in list(self._pending.values()))

    @property
    def is_awaited(self) -> bool:
        """True while someone waits for a reply."""
        return bool(self._awaited)

    def waiting_s(self) -> float:
        """Seconds for which the oldest request is known to be that, 0 where nothing is waited for. For ``Session._watch``."""
        now = self._clock()
        greeting = self._channel is not None and not self._version_known
        oldest = 0 if greeting else next(iter(list(self._pending)), -1)
        if oldest != self._oldest:
            self._oldest, self._oldest_s = oldest, now
        return now - self._oldest_s if oldest >= 0 else 0.0

    def ends(self, error: ConnectionLost) -> None:
        """The session has ended for this reason; what is in flight is told of it when the channel closes."""
        self._lost = self._lost or error

    def _on_data(self, data: bytes) -> None:
        try:
            self.heard_s = self._clock()
            self.received_bytes += len(data)
            for kind, request_id, body in self._reader.feed(data):
                pending = self._pending.pop(request_id, None)
                self._awaited.discard(request_id)
                if not self._version_known:
                    self._version_known = True
                    self._version.request_id = request_id
                    self._version.complete(kind, body)
                elif pending is not None:
                    pending.complete(kind, body)
                else:
                    raise wire.WireError(f"a reply of type {kind} to no request")
        except wire.WireError as error:
            self._on_closed(ProtocolViolation(f"the server broke the SFTP protocol: {error}"))

    def _on_closed(self, error: Exception) -> None:
        self._doubt = self.in_doubt  # before any thread that comes here sweeps the table
        if self._lost is None:
            self._lost = (
                error
                if isinstance(error, ConnectionLost)
                else ConnectionLost(str(error) or "connection lost")
            )
            self._closed(self, self._lost)
        lost = self._lost
        if not self._version_known:
            self._version_known = True
            self._version.complete(0, b"", lost)
        while self._pending:  # in the order in which they were sent
            try:
                pending = self._pending.pop(next(iter(self._pending)))
            except (KeyError, StopIteration, RuntimeError):  # another thread takes from it, or adds to it
                continue
            pending.complete(0, b"", lost)
