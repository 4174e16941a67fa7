"""One SFTP session: several channels ("lanes") of one SSH connection, requests in flight matched by id, and liveness.

A lane is one server process (OpenSSH starts an sftp-server for each channel): it answers in its own time, has its own
2 MiB window and its own handles. Metadata has a lane of its own, so that a look at a directory does not queue behind
megabytes of writes. Where many files are written at once, further lanes are opened for them: a server's process does one thing
at a time, and an fsync is long. Servers that allow one channel get one, and all lanes are that one.

Rules:
1. Requests are sent by the thread that needs them; replies are parsed where they arrive, in the thread that reads: the
   transport's, or the one that waits for the next reply (``ssh.packetizer``). A callback runs there too: it must be short, must
   not send and must not wait.
2. A request ends exactly once: with its reply, or with ConnectionLost when its lane ends.
3. The first lane to end takes the whole session with it: the connection is aborted, ``on_lost`` is called once.
4. A server that breaks the protocol (unknown id, wrong type, impossible length) is cut off: ProtocolViolation.
5. With requests waiting, or idle, a peer that leaves ``alive_count_max`` heartbeats unanswered is dead. A lane whose oldest
   request has been that for ``request_deadline_s`` is dead too, however alive the rest: no reply at all, one that is left
   out, or one that comes byte by byte. The greeting of a lane (VERSION) counts as one.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from _thread import LockType, allocate_lock, get_ident
from typing import Any, Callable, Dict, Iterator, List, Optional, Protocol, Sequence, Set, TypeVar

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

# Without limits@openssh.com: what the draft obliges every server to take (34000 bytes a packet, 32 KiB of data).
DEFAULT_LIMITS = wire.Limits(34000, 32768, 32768, 0)
# OpenSSH's 256 KiB packet less its own 1 KiB of headers; also what a limit of 0 ("none") is taken as.
DATA_BYTES_MAX = 261120
DATA_BYTES_MIN = 4096
# So many requests before a lane for writes, and another one is opened.
BUSY = 4
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
            self._take_back(request_id)
            raise
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


class Session:
    """The lanes of one connection. ``lost`` is None while it lives; ``on_lost(session)`` is called once, from any thread."""

    def __init__(
        self,
        connection: ByteConnection,
        *,
        lanes: int,
        alive_interval_s: float,
        alive_count_max: int,
        request_deadline_s: float,
        on_lost: Callable[[Session], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.connection = connection
        self.lost: Optional[ConnectionLost] = None
        self.fell_silent = False  # once lost: by our own verdict, the server has not ended the connection
        self.left_one_out = False  # once lost: while one request waited in vain, others were answered
        self.limits = DEFAULT_LIMITS
        self.link_path_first: Optional[bool] = None  # see dialect
        self.tells_links = False
        self.keeps_opened: Optional[bool] = None
        self.is_exclusive: Optional[bool] = None
        self._alive_interval_s = alive_interval_s
        self._alive_count_max = max(1, alive_count_max)
        self._request_deadline_s = request_deadline_s
        self._on_lost = on_lost
        self.clock = clock
        self._ended = threading.Event()
        self._lost_lock = allocate_lock()
        self.meta = Lane("metadata", self._lane_closed, clock)
        self.read_lane = self.meta
        self._write_lanes: List[Lane] = []
        self._lanes = [self.meta]
        self._lanes_max = lanes
        self._opening = allocate_lock()  # held by who opens lanes
        threading.Thread(target=self._watch, name="sftp-liveness", daemon=True).start()
        try:
            self.meta.open(connection)
            if b"limits@openssh.com" in self.meta.extensions:
                self.limits = self._ask_limits()
        except BaseException:
            self.abort(ConnectionLost("the session could not be started"))
            raise
        connection.be_lazy_when(lambda: not any(lane.is_awaited for lane in self._lanes))
        if lanes > 1:
            self._open_soon("write", "read")

    @property
    def write_lane(self) -> Lane:
        """The lane for the next file that is written: that with the least to do."""
        lanes = self._write_lanes
        if not lanes:
            return self.meta
        lane = min(lanes, key=lambda each: each.in_flight)
        if lane.in_flight >= BUSY and len(self._lanes) < self._lanes_max:
            self._open_soon(f"write {len(lanes) + 1}")
        return lane

    @property
    def extensions(self) -> Dict[bytes, bytes]:
        """The server's extensions and their versions."""
        return self.meta.extensions

    @property
    def in_doubt(self) -> bool:
        """Once lost: True where a request that changes something was unanswered."""
        return any(lane.in_doubt for lane in self._lanes)

    @property
    def heard_s(self) -> float:
        """The clock of the last bytes that came on any lane."""
        return max(lane.heard_s for lane in list(self._lanes))

    @property
    def received_bytes(self) -> int:
        """What came on all lanes: data, listings, attributes."""
        return sum(lane.received_bytes for lane in list(self._lanes))

    def state(self) -> Dict[str, Any]:
        """What was agreed with the server, and how it goes, for status."""
        lanes = list(self._lanes)
        return {
            **self.connection.state(),
            "heard_s": max(0.0, self.clock() - self.connection.last_heard_s()),
            "lanes": len(lanes),
            "requests_in_flight": sum(lane.in_flight for lane in lanes),
        }

    def abort(self, error: ConnectionLost) -> None:
        """End the session at once; every request in flight ends with ``error``."""
        with self._lost_lock:
            if self.lost is not None:
                return
            self.lost = error
        self._ended.set()
        for lane in list(self._lanes):
            lane.ends(error)  # before the connection says only that it has ended
        self.connection.abort()
        for lane in list(self._lanes):
            lane._on_closed(error)
        self._on_lost(self)

    def close(self) -> None:
        """An orderly end: nothing is in flight any more."""
        with self._lost_lock:
            if self.lost is not None:
                return
            self.lost = ConnectionLost("closed")
        self._ended.set()
        self.connection.close()

    def _ask_limits(self) -> wire.Limits:
        reply = self.meta.request(wire.EXTENDED, wire.extended_body(b"limits@openssh.com")).wait()
        packet, read, write, handles = reply.limits()
        # A limit of 0 is "none"; one above OpenSSH's own brings nothing but larger bursts; one that is absurdly small would
        # make a request, and memory for it, of every byte.
        return wire.Limits(
            packet,
            min(max(read or DATA_BYTES_MAX, DATA_BYTES_MIN), DATA_BYTES_MAX),
            min(max(write or DATA_BYTES_MAX, DATA_BYTES_MIN), DATA_BYTES_MAX),
            handles,
        )

    def _open_soon(self, *names: str) -> None:
        """In a thread of its own, unless one is at it."""
        if self._opening.acquire(False):
            try:
                threading.Thread(
                    target=self._open_more, args=(names,), name="sftp-lanes", daemon=True
                ).start()
            except RuntimeError as error:  # no more threads
                log.info("no further lane: %s", error)
                self._opening.release()

    def _open_more(self, names: Sequence[str]) -> None:
        """Metadata has its lane already; then one for writes, and one for reads. What is refused is shared."""
        for name in names[: self._lanes_max - len(self._lanes)]:
            lane = Lane(name, self._lane_closed, self.clock)
            try:
                lane.open(self.connection)
            except Exception as error:
                if self.lost is None:
                    log.info("no further channel for a %s lane (%s); it shares the others", name, error)
                return  # and nobody tries again: the lock is kept
            self._lanes.append(lane)
            if name == "read":
                self.read_lane = lane
            else:
                self._write_lanes.append(lane)
                if self.read_lane is self.meta:
                    self.read_lane = lane
        self._opening.release()

    def _lane_closed(self, lane: Lane, error: ConnectionLost) -> None:
        if lane in self._lanes:  # a lane that never came to be takes nothing with it
            self.abort(error)

    def _watch(self) -> None:
        """Liveness: heartbeats when nothing was heard for an interval, death after ``alive_count_max`` of them."""
        tick_s = min(1.0, self._alive_interval_s / 2) if self._alive_interval_s else 1.0
        asked_s = self.clock()
        while not self._ended.wait(tick_s):
            now = self.clock()
            quiet_s = now - self.connection.last_heard_s()
            stuck, lane_name = max(
                ((lane.waiting_s(), lane.name) for lane in list(self._lanes)), default=(0.0, "")
            )
            if self._alive_interval_s and quiet_s >= self._alive_interval_s * self._alive_count_max:
                self.fell_silent = True
                self.abort(ConnectionLost(f"nothing heard from the server for {quiet_s:.0f} s"))
            elif stuck > self._request_deadline_s:
                self.fell_silent = True
                self.left_one_out = now - self.heard_s < self._request_deadline_s
                self.abort(
                    ConnectionLost(f"a request got no reply on the {lane_name} lane for {stuck:.0f} s")
                )
            elif self._alive_interval_s and min(quiet_s, now - asked_s) >= self._alive_interval_s:
                asked_s = now
                try:
                    self.connection.heartbeat()
                except ConnectionLost as error:
                    self.abort(error)
