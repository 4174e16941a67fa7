"""The connection that operations run on: dialled, kept, dialled again when it is lost.

Above this module a lost connection is no event: operations wait for the next session, at most ``retry_timeout_s`` from
when they first found the connection gone, and then fail with ETIMEDOUT. Where one has waited so long in vain, others that
programs ask for within as long again fail at once: to them one call is often several of ours, and an ``ls`` hundreds.
"""

from __future__ import annotations

import collections
import errno
import gc
import logging
import random
import threading
import time
from typing import Any, Callable, Deque, Dict, Optional, TypeVar

from .. import waiting
from ..errors import ChannelRefused, ConnectionLost, FsError, NotSent, SftpMountError, StatusError
from .lane import ByteConnection
from .session import Session

log = logging.getLogger(__name__)

T = TypeVar("T")

BACKOFF_FIRST_S = 0.25
BACKOFF_MAX_S = 15.0
STEADY_S = 10.0  # a session that lived this long was a good one
# The server's process of the lost session may still have requests before it that we know nothing of: it is given this time
# from when the server is there again, so that none of them comes behind what the next session does. A server that was
# given up because it was silent (its disk hung, or all of it was suspended) is given more.
SETTLE_S = 0.5
SILENT_FACTOR = 10
OUTAGES_KEPT = 20


class Redo(Exception):
    """Raised by a recheck: the operation did not happen, it may be sent again."""


class Outage:
    """From the loss of a session to the next one. Times in seconds since 1970; ``ended_s`` is None while it lasts."""

    __slots__ = ("began_s", "ended_s", "why")

    def __init__(self, began_s: float, why: str) -> None:
        self.began_s = began_s
        self.ended_s: Optional[float] = None
        self.why = why  # the loss, then the last attempt's failure


class Reconnecting:
    """A session with one server, and its successors. All methods may be called from any thread; each may wait for the network."""

    def __init__(
        self,
        dial: Callable[[], ByteConnection],
        *,
        retry_timeout_s: Optional[float] = 300.0,
        alive_interval_s: float = 15.0,
        alive_count_max: int = 3,
        request_deadline_s: float = 300.0,
        lanes: int = 3,
        settle_s: float = SETTLE_S,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._dial = dial
        self._retry_timeout_s = retry_timeout_s
        self._alive_interval_s = alive_interval_s
        self._alive_count_max = alive_count_max
        self._request_deadline_s = request_deadline_s
        self._lanes = lanes
        self._settle_s = settle_s
        self._unsettled_s = 0.0  # what the session of before leaves us to wait
        self._clock = clock
        self._wall = wall
        self._changed = (
            threading.Condition()
        )  # guards _session, _closing, _outages, _facts; no lock is taken under it
        self._session: Optional[Session] = None
        self._closing = threading.Event()
        self._connected_s = self._lost_s = clock()
        self._extensions: Dict[bytes, bytes] = {}
        self._sessions = 0
        self._outages: Deque[Outage] = collections.deque(maxlen=OUTAGES_KEPT)
        self._connected_wall_s = wall()
        self._facts: Dict[str, Any] = {}  # what the last session that was looked at had agreed
        self._received_before_bytes = 0  # on the sessions that have ended
        self._backoff_s = 0.0
        self._vain_until_s = clock()  # programs that ask before this fail at once
        self._random = random.Random()
        self.on_lost: Callable[[], None] = lambda: None
        self.on_connected: Callable[[Session], None] = lambda session: None

    # -- the connection ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """The first connection; whatever is wrong with it passes through (SftpMountError, ConnectionLost)."""
        session = self._new_session()
        if not self._install(session):
            raise session.lost or ConnectionLost("closed")

    def _install(self, session: Session) -> bool:
        """Make ``session`` the one that operations use; False where it has ended, or nobody wants one any more."""
        with self._changed:
            if session.lost is None and not self._closing.is_set():
                self._session = session
                self._extensions = session.extensions
                self._sessions += 1
                self._connected_s = self._vain_until_s = self._clock()
                self._connected_wall_s = self._wall()
                self._facts = session.state()
                if self._outages:
                    self._outages[-1].ended_s = self._connected_wall_s
                self._changed.notify_all()
                return True
        session.close()
        return False

    def close(self) -> None:
        """End the connection in order. Nothing may be in flight."""
        self._closing.set()
        with self._changed:
            session, self._session = self._session, None
            self._changed.notify_all()
        if session is not None:
            session.close()

    @property
    def reconnects(self) -> int:
        """How often the connection was dialled again."""
        return max(0, self._sessions - 1)

    @property
    def connected(self) -> bool:
        """True while there is a session."""
        return self.session_now() is not None

    @property
    def received_bytes(self) -> int:
        """What came from the server since the start: data, listings, attributes."""
        with self._changed:
            session = self._session
            return self._received_before_bytes + (session.received_bytes if session is not None else 0)

    def state(self) -> Dict[str, Any]:
        """The connection for status, at once; what was agreed is the last session's while there is none. Times since 1970."""
        with self._changed:
            session, facts = self._session, self._facts
            outages = [(outage.began_s, outage.ended_s, outage.why) for outage in self._outages]
            since_s = self._connected_wall_s if session is not None else outages[-1][0] if outages else None
        return {
            **facts,
            **(
                {"lanes": 0, "requests_in_flight": 0, "heard_s": None} if session is None else session.state()
            ),
            "connected": session is not None,
            "since_s": since_s,
            "why": outages[-1][2] if session is None and outages else None,
            "retry_timeout_s": self._retry_timeout_s,
            "reconnects": self.reconnects,
            "outages": outages,
        }

    def session_now(self) -> Optional[Session]:
        """The session, without waiting for one. One that is lost may be ending still, and is none."""
        session = self._session
        return session if session is not None and session.lost is None else None

    def session(self) -> Session:
        """The session of now, waiting for one as operations do; raises FsError (ETIMEDOUT)."""
        return self._current(None)

    def has(self, extension: bytes) -> bool:
        """True where the server offers ``extension``, or did when it was last there: this does not wait."""
        return extension in self._extensions

    def _new_session(self) -> Session:
        connection = self._dial()
        return Session(
            connection,
            lanes=self._lanes,
            alive_interval_s=self._alive_interval_s,
            alive_count_max=self._alive_count_max,
            request_deadline_s=self._request_deadline_s,
            on_lost=self._session_lost,
        )

    def _session_lost(self, session: Session) -> None:
        with self._changed:
            if self._session is not session:
                return
            self._session = None
            # Not now: its end takes time, and operations have waited for the next one since the loss.
            self._lost_s = self._clock() - (session.clock() - session.lost_s)
            self._received_before_bytes += session.received_bytes
            self._outages.append(Outage(self._wall(), str(session.lost)))
        factor = SILENT_FACTOR if session.fell_silent else 1
        self._unsettled_s = self._settle_s * factor if session.in_doubt else 0.0
        log.warning("connection lost: %s; reconnecting", session.lost)
        self.on_lost()
        threading.Thread(target=self._reconnect, name="sftp-reconnect", daemon=True).start()

    def _reconnect(self) -> None:
        gc.collect()  # the lost session is a ring of objects with megabytes of buffers, and nothing else waits just now
        if self._clock() - self._connected_s > STEADY_S:
            self._backoff_s = 0.0  # a session that ends as soon as it begins is no reason to be quick
        complaint = ""
        while not self._closing.wait(self._backoff_s * self._random.uniform(0.5, 1.0)):
            self._backoff_s = min(max(BACKOFF_FIRST_S, self._backoff_s * 2), BACKOFF_MAX_S)
            try:
                session = self._new_session()
                try:
                    self.on_connected(session)
                    self._closing.wait(self._unsettled_s)
                except BaseException:
                    session.abort(ConnectionLost("the directory that was mounted is not there"))
                    raise
            except (SftpMountError, ChannelRefused, ConnectionLost, StatusError, FsError, OSError) as error:
                if str(error) != complaint:  # an outage of hours is one line, not thousands
                    complaint = str(error)
                    with self._changed:
                        self._outages[-1].why = complaint
                    log.warning("no connection yet: %s", complaint)
                continue
            except Exception:
                log.exception("reconnecting failed in a way that is not foreseen; trying again")
                continue
            if not self._install(session):
                continue
            log.warning("connected again (reconnect %d)", self.reconnects)
            return

    def _current(self, deadline_s: Optional[float]) -> Session:
        """The session, waiting until ``deadline_s`` (from now: the retry timeout where None)."""
        session = self.session_now()
        if session is not None:
            return session
        with self._changed:
            while (session := self.session_now()) is None:
                if self._closing.is_set():
                    raise FsError(errno.EIO, "the mount is closing")
                if self._retry_timeout_s is not None:
                    if deadline_s is None:
                        deadline_s = self._clock() + self._retry_timeout_s
                    remaining_s = deadline_s - self._clock()
                    if remaining_s <= 0 or (
                        waiting.is_for_a_program() and self._clock() < self._vain_until_s
                    ):
                        if remaining_s <= 0 and self._clock() - self._lost_s >= self._retry_timeout_s:
                            self._vain_until_s = deadline_s + self._retry_timeout_s
                        raise FsError(errno.ETIMEDOUT, "the server cannot be reached")
                waiting.wait(self._changed)
            return session

    def deadline(self) -> Optional[float]:
        """Until when an operation that finds the connection gone now may wait; None = for ever."""
        return None if self._retry_timeout_s is None else self._clock() + self._retry_timeout_s

    def run(self, attempt: Callable[[Session], T], recheck: Optional[Callable[[Session], T]] = None) -> T:
        """``attempt`` on the session of now, again on the next one where it was lost.

        With ``recheck`` an attempt of unknown outcome is first looked at: recheck returns the result where it did
        happen, or raises Redo.
        """
        deadline_s: Optional[float] = None
        unsure = False
        while True:
            session = self._current(deadline_s)
            began_s = session.clock()
            try:
                if unsure and recheck is not None:
                    try:
                        return recheck(session)
                    except Redo:
                        unsure = False
                return attempt(session)
            except NotSent as error:
                session.abort(error)
            except ConnectionLost as error:
                session.abort(error)
                unsure = True
            if session.heard_s - began_s > STEADY_S and not session.left_one_out:
                deadline_s = None  # it had gone well for long: this is another outage
            if deadline_s is None:
                deadline_s = self.deadline()
            elif self._clock() >= deadline_s:
                raise FsError(
                    errno.ETIMEDOUT, "the server leaves it unanswered, or breaks the connection every time"
                )
