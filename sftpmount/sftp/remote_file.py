"""An open file on the server that survives its session."""

from __future__ import annotations

import errno
import logging
import stat
import threading
from typing import Callable, Optional, Tuple

from .. import waiting
from ..errors import FX_NO_SUCH_FILE, FX_PERMISSION_DENIED, ConnectionLost, FsError, StatusError
from . import diagnose, wire
from .dialect import must_keep
from .lane import Lane, Pending
from .session import Session
from .wire import Attrs

log = logging.getLogger(__name__)


class RemoteFile:
    """An open file: reopened by ``path`` when the session has changed.

    ``path`` is kept current by the owner when the file is renamed, who holds ``reopening`` from before the server is told: for
    a moment the file has another name than ``path``. ``verify(ask)`` is called after a reopen, with a
    function that asks for the file's attributes, and raises FsError (ESTALE) where it is not the file it was.

    Who sends something about it borrows it (``with file:``), so that no CLOSE overtakes the request.
    """

    __slots__ = (
        "_close",
        "_idle",
        "_users",
        "_using",
        "closed",
        "handle",
        "is_committed",
        "lane",
        "mode",
        "path",
        "pflags",
        "reopening",
        "seen",
        "session",
        "verify",
    )

    def __init__(self, path: bytes, pflags: int) -> None:
        self.path = path
        self.pflags = pflags
        self.verify: Callable[[Callable[[], Attrs]], None] = lambda ask: None
        self.seen: Optional[Tuple[Optional[int], Optional[int]]] = (
            None  # the owner's: (size, mtime) it was opened at
        )
        self.mode: Optional[int] = None  # the owner's: permission bits that we gave the file
        self.session: Optional[Session] = None
        self.lane: Optional[Lane] = None
        self.handle = b""
        self.closed = False
        self.is_committed = False  # by a CLOSE: what it holds cannot be sent again
        self.reopening = waiting.RLock()  # held while it is opened again, and by who renames it
        self._using = threading.Lock()  # guards _users, _close; nothing is sent under it
        self._idle = threading.Condition(self._using)
        self._users = 0
        self._close: Optional[Callable[[], None]] = None

    @property
    def makes_a_file(self) -> bool:
        """It was opened to make a file, or to empty one, and no CLOSE has committed that."""
        return bool(self.pflags & (wire.FXF_CREAT | wire.FXF_TRUNC)) and not self.is_committed

    # -- who uses it --------------------------------------------------------------------------------------------------

    def borrow(self) -> RemoteFile:
        """Keep it open until ``give_back``."""
        with self._using:
            self._users += 1
        return self

    __enter__ = borrow

    def __exit__(self, *exc_info: object) -> None:
        self.give_back()

    def give_back(self) -> None:
        """The other half of ``borrow``."""
        with self._using:
            self._users -= 1
            if self._users:
                return
            close, self._close = self._close, None
            self._idle.notify_all()
        if close is not None:
            close()

    def when_idle(self, close: Callable[[], None]) -> None:
        """Call ``close`` now or, while others use the file, in the thread of the last of them."""
        with self._using:
            if self._users:
                self._close = close
                return
        close()

    def detach(self) -> Tuple[Optional[Session], Optional[Lane], bytes]:
        """Take the handle away once nobody uses it: who comes next opens the file again. The caller closes the handle."""
        with self._using:
            while self._users:
                waiting.wait(self._idle)
            detached = self.session, self.lane, self.handle
            self.session = self.lane = None
            return detached

    # -- its handle ---------------------------------------------------------------------------------------------------

    def opened(self, session: Session, lane: Lane, handle: bytes) -> None:
        """The server has opened it."""
        self.session, self.lane, self.handle = session, lane, handle

    def attach(self, session: Session) -> Tuple[Lane, bytes]:
        """Its lane and handle on ``session``, reopened and verified where they were another session's. For who has borrowed it."""
        if self.session is session and self.lane is not None:
            return self.lane, self.handle
        with self.reopening:
            if self.session is session and self.lane is not None:
                return self.lane, self.handle
            if self.closed:
                raise FsError(errno.EBADF)
            if not self.path:
                raise FsError(errno.ESTALE, "another file has taken its name")
            lane = lane_for(session, self.pflags)
            try:
                handle = self._reopen(session, lane)
                try:
                    self.verify(lambda: lane.request(wire.FSTAT, wire.string(handle)).wait().attrs())
                except FsError:
                    close_handle(lane, handle)
                    raise
            except StatusError as status:
                gone = status.code == FX_NO_SUCH_FILE
                code = errno.ESTALE if gone else diagnose.errno_for(session, "open", status, (self.path,))
                raise FsError(code) from None
            self.opened(session, lane, handle)
            return lane, handle

    def _reopen(self, session: Session, lane: Lane) -> bytes:
        pflags = self.pflags & ~(wire.FXF_CREAT | wire.FXF_EXCL | wire.FXF_TRUNC)
        opening = wire.open_body(self.path, pflags)
        if self.is_committed:
            must_keep(session, self.path)
        try:
            return handle_of(lane, lane.request(wire.OPEN, opening))
        except StatusError as status:
            mode = self.mode
            if (
                status.code != FX_PERMISSION_DENIED
                or not pflags & wire.FXF_WRITE
                or mode is None
                or mode & 0o200
            ):
                raise
        # Made read-only by us after it was opened (git and restic do so): let it be opened as it was, and no longer.
        now = lane.request(wire.LSTAT, wire.string(self.path)).wait().attrs()
        if not stat.S_ISREG(now.mode or 0) or stat.S_IMODE(now.mode or 0) != mode:
            raise FsError(errno.EACCES)
        body = wire.string(self.path)
        lane.request(wire.SETSTAT, body + wire.attrs(Attrs(mode=mode | 0o200))).wait().expect_ok()
        try:
            return handle_of(lane, lane.request(wire.OPEN, opening))
        finally:
            with waiting.patiently():
                lane.request(wire.SETSTAT, body + wire.attrs(Attrs(mode=mode))).wait().expect_ok()


def handle_of(lane: Lane, opening: Pending) -> bytes:
    """The handle that an OPEN or OPENDIR brings; where nobody waits for it any more (EINTR), it is closed when it comes."""
    try:
        return opening.wait().handle()
    except FsError:

        def close() -> None:
            try:
                close_handle(lane, opening.wait().handle())
            except (StatusError, ConnectionLost):
                pass  # it never was

        threading.Thread(target=close, name="unwanted", daemon=True).start()
        raise


def close_handle(lane: Lane, handle: bytes) -> None:
    """Send CLOSE. The server's answer is logged, nothing depends on it, nor on the program that is ended meanwhile."""

    def close() -> None:
        try:
            lane.request(wire.CLOSE, wire.string(handle), callback=log_close_error, is_awaited=False)
        except ConnectionLost:
            pass  # closed with it

    try:
        close()
    except FsError:
        threading.Thread(target=close, name="unwanted", daemon=True).start()


def log_close_error(pending: Pending) -> None:
    """A CLOSE is answered."""
    try:
        pending.expect_ok()
    except StatusError as status:
        log.warning("closing a file on the server: %s", status)
    except ConnectionLost:
        pass  # nothing depended on it


def lane_for(session: Session, pflags: int) -> Lane:
    """The lane that a file opened with ``pflags`` is used on."""
    return session.lane_to_write() if pflags & wire.FXF_WRITE else session.read_lane
