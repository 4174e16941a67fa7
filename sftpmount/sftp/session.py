"""One SFTP session: several channels ("lanes") of one SSH connection, and liveness.

A lane is one server process (OpenSSH starts an sftp-server for each channel): it answers in its own time, has its own
2 MiB window and its own handles. Metadata has a lane of its own, so that a look at a directory does not queue behind
megabytes of writes. Where many files are written at once, further lanes are opened for them: a server's process does one thing
at a time, and an fsync is long. Servers that allow one channel get one, and all lanes are that one.

1. The first lane to end takes the whole session with it: the connection is aborted, ``on_lost`` is called once.
2. With requests waiting, or idle, a peer that leaves ``alive_count_max`` heartbeats unanswered is dead. A lane whose oldest
   request has been that for ``request_deadline_s`` is dead too, however alive the rest: no reply at all, one that is left
   out, or one that comes byte by byte. The greeting of a lane (VERSION) counts as one.
"""

from __future__ import annotations

import logging
import threading
import time
from _thread import allocate_lock
from typing import Any, Callable, Dict, List, Optional, Sequence

from ..errors import ConnectionLost
from . import wire
from .lane import ByteConnection, Lane

log = logging.getLogger(__name__)

# Without limits@openssh.com: what the draft obliges every server to take (34000 bytes a packet, 32 KiB of data).
DEFAULT_LIMITS = wire.Limits(34000, 32768, 32768, 0)
# OpenSSH's 256 KiB packet less its own 1 KiB of headers; also what a limit of 0 ("none") is taken as.
DATA_BYTES_MAX = 261120
DATA_BYTES_MIN = 4096
# So many requests before a lane for writes, and another one is opened.
BUSY = 4


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
        self.lost_s = 0.0  # once lost: the clock of that
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
        """Of the lanes for writes that with the least to do."""
        return min(self._write_lanes, key=lambda each: each.in_flight, default=self.meta)

    def lane_to_write(self) -> Lane:
        """The lane for the next file that is written; another one is opened where all are busy."""
        lane = self.write_lane
        if lane.in_flight >= BUSY and len(self._lanes) < self._lanes_max:
            self._open_soon(f"write {len(self._write_lanes) + 1}")
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
            self.lost_s = self.clock()
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
                self._lanes_max = len(self._lanes)  # nobody tries again
                break
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
