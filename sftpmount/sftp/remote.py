"""The server as an object: every operation of SFTP v3 and OpenSSH's extensions, with reconnect, retry and verification.

Above this module a lost connection is no event: operations wait for the next session, at most ``retry_timeout_s`` from
when they first found the connection gone, and then fail with ETIMEDOUT. What may be repeated is (everything that reads,
SETSTAT, open without O_EXCL, WRITE at an offset). What may not is looked at on the server first: see ``_recheck_*``. An
exclusive create whose reply was lost is answered EEXIST where the file is there: it may be another's.

Errors are ``FsError`` with the errno that a local file system would give; a bare SSH_FX_FAILURE is explained by looking at
the server (``diagnose``). Paths are absolute bytes as the server names them.
"""

from __future__ import annotations

import errno
import logging
import random
import stat
import threading
import time
from typing import Callable, Dict, List, Optional, Tuple, TypeVar

from ..errors import (
    FX_NO_SUCH_FILE,
    FX_PERMISSION_DENIED,
    ConnectionLost,
    FsError,
    NotSent,
    SftpMountError,
    StatusError,
)
from . import diagnose, wire
from .session import ByteConnection, Lane, Pending, Session
from .wire import Attrs

log = logging.getLogger(__name__)

T = TypeVar("T")

BACKOFF_FIRST_S = 0.25
BACKOFF_MAX_S = 15.0
STEADY_S = 10.0  # a session that lived this long was a good one
# READDIRs in flight: OpenSSH puts 100 names into each reply, so a long listing is otherwise one round trip per 100 names.
READDIR_WINDOW = 16

POSIX_RENAME = b"posix-rename@openssh.com"
FSYNC = b"fsync@openssh.com"
HARDLINK = b"hardlink@openssh.com"
STATVFS = b"statvfs@openssh.com"
LSETSTAT = b"lsetstat@openssh.com"


class _Redo(Exception):
    """Raised by a recheck: the operation did not happen, it may be sent again."""


class RemoteFile:
    """An open file on the server that survives its session: reopened by ``path`` when the session has changed.

    ``path`` is kept current by the owner when the file is renamed. ``verify(attrs)`` is called with the file's attributes
    after a reopen and raises FsError (ESTALE) where it is not the file it was.
    """

    __slots__ = ("closed", "handle", "lane", "lock", "mode", "path", "pflags", "seen", "session", "verify")

    def __init__(self, path: bytes, pflags: int) -> None:
        self.path = path
        self.pflags = pflags
        self.verify: Callable[[Attrs], None] = lambda attrs: None
        self.seen: Optional[Tuple[Optional[int], Optional[int]]] = (
            None  # the owner's: (size, mtime) it was opened at
        )
        self.mode: Optional[int] = None  # the owner's: permission bits that we gave the file
        self.session: Optional[Session] = None
        self.lane: Optional[Lane] = None
        self.handle = b""
        self.closed = False
        self.lock = threading.Lock()


class Remote:
    """One server. All methods may be called from any thread; each may wait for the network."""

    def __init__(
        self,
        dial: Callable[[], ByteConnection],
        *,
        retry_timeout_s: Optional[float] = 300.0,
        alive_interval_s: float = 15.0,
        alive_count_max: int = 3,
        request_deadline_s: float = 300.0,
        lanes: int = 3,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._dial = dial
        self._retry_timeout_s = retry_timeout_s
        self._alive_interval_s = alive_interval_s
        self._alive_count_max = alive_count_max
        self._request_deadline_s = request_deadline_s
        self._lanes = lanes
        self._clock = clock
        self._changed = threading.Condition()  # guards _session, _closing; no lock is taken under it
        self._session: Optional[Session] = None
        self._closing = threading.Event()
        self._connected_s = clock()
        self._backoff_s = 0.0
        self._random = random.Random()
        self.reconnects = 0
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
                self._connected_s = self._clock()
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
    def connected(self) -> bool:
        """True while there is a session."""
        return self._session is not None

    def session_now(self) -> Optional[Session]:
        """The session, without waiting for one."""
        return self._session

    def session(self) -> Session:
        """The session of now, waiting for one as operations do; raises FsError (ETIMEDOUT)."""
        return self._current(None)

    def has(self, extension: bytes) -> bool:
        """True where the server offers ``extension``."""
        return extension in self._current(None).extensions

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
        log.warning("connection lost: %s; reconnecting", session.lost)
        self.on_lost()
        threading.Thread(target=self._reconnect, name="sftp-reconnect", daemon=True).start()

    def _reconnect(self) -> None:
        if self._clock() - self._connected_s > STEADY_S:
            self._backoff_s = 0.0  # a session that ends as soon as it begins is no reason to be quick
        complaint = ""
        while not self._closing.wait(self._backoff_s * self._random.uniform(0.5, 1.0)):
            self._backoff_s = min(max(BACKOFF_FIRST_S, self._backoff_s * 2), BACKOFF_MAX_S)
            try:
                session = self._new_session()
                try:
                    self.on_connected(session)
                except BaseException:
                    session.abort(ConnectionLost("not the directory that was mounted"))
                    raise
            except (SftpMountError, ConnectionLost, FsError, OSError) as error:
                if str(error) != complaint:  # an outage of hours is one line, not thousands
                    complaint = str(error)
                    log.warning("no connection yet: %s", complaint)
                continue
            except Exception:
                log.exception("reconnecting failed in a way that is not foreseen; trying again")
                continue
            if not self._install(session):
                continue
            self.reconnects += 1
            log.warning("connected again (reconnect %d)", self.reconnects)
            return

    def _current(self, deadline_s: Optional[float]) -> Session:
        """The session, waiting until ``deadline_s`` (from now: the retry timeout where None)."""
        session = self._session
        if session is not None:
            return session
        with self._changed:
            while self._session is None:
                if self._closing.is_set():
                    raise FsError(errno.EIO, "the mount is closing")
                if self._retry_timeout_s is not None:
                    if deadline_s is None:
                        deadline_s = self._clock() + self._retry_timeout_s
                    remaining_s = deadline_s - self._clock()
                    if remaining_s <= 0:
                        raise FsError(errno.ETIMEDOUT, "the server cannot be reached")
                    self._changed.wait(remaining_s)
                else:
                    self._changed.wait()
            return self._session

    def deadline(self) -> Optional[float]:
        """Until when an operation that finds the connection gone now may wait; None = for ever."""
        return None if self._retry_timeout_s is None else self._clock() + self._retry_timeout_s

    def run(self, attempt: Callable[[Session], T], recheck: Optional[Callable[[Session], T]] = None) -> T:
        """``attempt`` on the session of now, again on the next one where it was lost.

        With ``recheck`` an attempt of unknown outcome is first looked at: recheck returns the result where it did
        happen, or raises _Redo.
        """
        deadline_s: Optional[float] = None
        unsure = False
        while True:
            session = self._current(deadline_s)
            try:
                if unsure and recheck is not None:
                    try:
                        return recheck(session)
                    except _Redo:
                        unsure = False
                return attempt(session)
            except NotSent as error:
                session.abort(error)
            except ConnectionLost as error:
                session.abort(error)
                unsure = True
            if deadline_s is None:
                deadline_s = self.deadline()

    def _meta(
        self,
        what: str,
        kind: int,
        body: bytes,
        decode: Callable[[Pending], T],
        paths: Tuple[bytes, ...],
        recheck: Optional[Callable[[Session], T]] = None,
    ) -> T:
        """One metadata request with retry, its StatusError turned into the right FsError."""

        def attempt(session: Session) -> T:
            return decode(session.meta.request(kind, body).wait())

        try:
            return self.run(attempt, recheck)
        except StatusError as status:
            raise self.explain(what, status, *paths) from None

    def explain(self, what: str, status: StatusError, *paths: bytes) -> FsError:
        """The FsError for ``status``; where the server said only "failure" it is asked what stands in the way."""
        code = self.run(lambda session: diagnose.errno_for(session, what, status, paths))
        return FsError(code)

    # -- looking --------------------------------------------------------------------------------------------------

    def realpath(self, path: bytes) -> bytes:
        """The server's absolute name of ``path`` (b"." is where a login starts)."""
        names = self._meta("realpath", wire.REALPATH, wire.string(path), Pending.names, (path,))
        if not names:
            raise FsError(errno.ENOENT)
        return names[0].name

    def lstat(self, path: bytes) -> Attrs:
        """Attributes of ``path`` itself."""
        return self._meta("lstat", wire.LSTAT, wire.string(path), Pending.attrs, (path,))

    def stat(self, path: bytes) -> Attrs:
        """Attributes of what ``path`` leads to."""
        return self._meta("stat", wire.STAT, wire.string(path), Pending.attrs, (path,))

    def readlink(self, path: bytes) -> bytes:
        """The target of a symbolic link."""
        names = self._meta("readlink", wire.READLINK, wire.string(path), Pending.names, (path,))
        if not names:
            raise FsError(errno.EIO)
        return names[0].name

    def statvfs(self, path: bytes) -> wire.StatVfs:
        """Space and inodes; ENOTSUP where the server cannot tell."""
        if not self.has(STATVFS):
            raise FsError(errno.ENOTSUP)
        return self._meta(
            "statvfs", wire.EXTENDED, wire.extended_body(STATVFS, wire.string(path)), Pending.statvfs, (path,)
        )

    def listdir(self, path: bytes, *, entries_max: int = 1_000_000) -> List[wire.Entry]:
        """The whole directory without . and .. ; names that no local directory could hold are left out and logged."""
        try:
            return self.run(lambda session: self._list(session, path, entries_max))
        except StatusError as status:
            raise self.explain("listdir", status, path) from None

    def _list(self, session: Session, path: bytes, entries_max: int) -> List[wire.Entry]:
        lane = session.meta
        handle = lane.request(wire.OPENDIR, wire.string(path)).wait().handle()
        body = wire.string(handle)
        entries: Dict[bytes, wire.Entry] = {}
        in_flight: List[Pending] = []
        # The second request goes out with the first: most directories fit one reply, and its end shows at once.
        window, ended, told = 2, False, 0
        try:
            while in_flight or not ended:
                while not ended and len(in_flight) < window:
                    in_flight.append(lane.request(wire.READDIR, body))
                names = in_flight.pop(0).wait().names()
                if not names:
                    ended = True  # the others in flight are read to their end too: a server may answer out of order
                window = min(window * 2, READDIR_WINDOW)
                told += len(names)
                for entry in names:
                    if wire.is_plain_name(entry.name):
                        entries[entry.name] = entry
                    elif entry.name not in (b".", b".."):
                        log.warning(
                            "a name in %r is left out, no local name can be %r", path, entry.name[:300]
                        )
                if told > entries_max:
                    raise FsError(errno.EFBIG, "the listing does not end")
        finally:
            try:
                lane.request(wire.CLOSE, body)  # its reply carries nothing that anyone waits for
            except ConnectionLost:
                pass
        return list(entries.values())

    # -- changing the namespace -----------------------------------------------------------------------------------

    def mkdir(self, path: bytes, mode: int) -> None:
        """Create a directory; fails with EEXIST where anything has the name."""

        def recheck(session: Session) -> None:
            # Ours or another's? Directories serve as locks, so one whose reply was lost is not claimed.
            if _lstat_or_none(session, path) is not None:
                raise FsError(errno.EEXIST)
            raise _Redo

        body = wire.string(path) + wire.attrs(Attrs(mode=mode & 0o7777))
        self._meta("mkdir", wire.MKDIR, body, Pending.expect_ok, (path,), recheck)

    def rmdir(self, path: bytes) -> None:
        """Remove an empty directory."""
        self._meta(
            "rmdir", wire.RMDIR, wire.string(path), Pending.expect_ok, (path,), self._recheck_gone(path)
        )

    def unlink(self, path: bytes) -> None:
        """Remove a name that is no directory."""
        self._meta(
            "unlink", wire.REMOVE, wire.string(path), Pending.expect_ok, (path,), self._recheck_gone(path)
        )

    @staticmethod
    def _recheck_gone(path: bytes) -> Callable[[Session], None]:
        def recheck(session: Session) -> None:
            if _lstat_or_none(session, path) is not None:
                raise _Redo

        return recheck

    def rename(self, old: bytes, new: bytes, known: Optional[Attrs] = None) -> None:
        """POSIX rename, atomically over an existing target where the server can; ``old == new`` does nothing.

        ``known``: attributes of ``old`` as last seen. After a lost reply they tell whether what stands at ``new`` is it.
        """
        if known is None:
            known = self.lstat(old)
        if old == new:  # Windows' OpenSSH deletes a file that is renamed to itself
            self.lstat(old)
            return

        def recheck(session: Session) -> None:
            if _lstat_or_none(session, old) is not None:
                raise _Redo
            moved = _lstat_or_none(session, new)
            if moved is None:
                raise FsError(errno.ENOENT)
            if stat.S_IFMT(known.mode or 0) != stat.S_IFMT(moved.mode or 0):
                raise FsError(
                    errno.EIO, "the connection was lost, and it cannot be told whether this was done"
                )

        names = wire.string(old) + wire.string(new)
        if self.has(POSIX_RENAME):
            body = wire.string(POSIX_RENAME) + names
            self._meta("rename", wire.EXTENDED, body, Pending.expect_ok, (old, new), recheck)
            return
        # Plain RENAME: some servers refuse an existing target, others overwrite it; a directory must not merge.
        try:
            target = self.lstat(new)
        except FsError as error:
            if error.errno != errno.ENOENT:
                raise
        else:
            self._clear_rename_target(old, new, target)
        self._meta("rename", wire.RENAME, names, Pending.expect_ok, (old, new), recheck)

    def _clear_rename_target(self, old: bytes, new: bytes, target: Attrs) -> None:
        """Where rename cannot replace: an empty directory is removed first, a file too (not atomic, and said so once)."""
        source_is_dir = stat.S_ISDIR(self.lstat(old).mode or 0)
        target_is_dir = stat.S_ISDIR(target.mode or 0)
        if target_is_dir and not source_is_dir:
            raise FsError(errno.EISDIR)
        if source_is_dir and not target_is_dir:
            raise FsError(errno.ENOTDIR)
        if target_is_dir:
            self.rmdir(new)
        else:
            self.unlink(new)

    def symlink(self, target: bytes, path: bytes) -> None:
        """Create a symbolic link at ``path``."""

        def recheck(session: Session) -> None:
            try:
                names = session.meta.request(wire.READLINK, wire.string(path)).wait().names()
            except StatusError as status:
                if status.code == FX_NO_SUCH_FILE:
                    raise _Redo from None
                raise FsError(errno.EEXIST) from None
            if not names or names[0].name != target:
                raise FsError(errno.EEXIST)

        body = wire.symlink_body(target, path)
        self._meta("symlink", wire.SYMLINK, body, Pending.expect_ok, (path,), recheck)

    def link(self, old: bytes, new: bytes) -> None:
        """Create a hard link; EPERM where the server has none, as file systems without hard links say."""
        if not self.has(HARDLINK):
            raise FsError(errno.EPERM)

        def recheck(session: Session) -> None:
            # As with mkdir: a link may be a lock, and attributes do not tell ours from another's.
            if _lstat_or_none(session, new) is not None:
                raise FsError(errno.EEXIST)
            raise _Redo

        body = wire.extended_body(HARDLINK, wire.string(old), wire.string(new))
        self._meta("link", wire.EXTENDED, body, Pending.expect_ok, (old, new), recheck)

    def setstat(self, path: bytes, attrs: Attrs, *, is_symlink: bool = False) -> None:
        """Change attributes by path; of a symlink itself only where the server has lsetstat@openssh.com (else ENOTSUP)."""
        if is_symlink:
            if not self.has(LSETSTAT):
                raise FsError(errno.ENOTSUP)
            body = wire.extended_body(LSETSTAT, wire.string(path), wire.attrs(attrs))
            self._meta("setstat", wire.EXTENDED, body, Pending.expect_ok, (path,))
        else:
            body = wire.string(path) + wire.attrs(attrs)
            what = "setstat" if attrs.size is None else "truncate"
            self._meta(what, wire.SETSTAT, body, Pending.expect_ok, (path,))

    # -- files ------------------------------------------------------------------------------------------------------

    def open(self, path: bytes, pflags: int, attrs: Attrs = Attrs()) -> Tuple[RemoteFile, Attrs]:  # noqa: B008
        """Open ``path``; returns the file and its attributes as they are behind the open, in one flight."""
        file = RemoteFile(path, pflags)
        body = wire.open_body(path, pflags, attrs)

        def attempt(session: Session) -> Tuple[RemoteFile, Attrs]:
            lane = self._lane_for(session, pflags)
            opening = lane.request(wire.OPEN, body)
            looking = lane.request(wire.LSTAT, wire.string(path))
            handle = opening.wait().handle()
            file.session, file.lane, file.handle = session, lane, handle
            try:
                return file, looking.wait().attrs()
            except StatusError:
                # The name is gone already, the handle is not: ask through it.
                return file, lane.request(wire.FSTAT, wire.string(handle)).wait().attrs()

        def recheck(session: Session) -> Tuple[RemoteFile, Attrs]:
            if _lstat_or_none(session, path) is not None:
                raise FsError(errno.EEXIST)
            raise _Redo

        try:
            return self.run(attempt, recheck if pflags & wire.FXF_EXCL else None)
        except StatusError as status:
            what = (
                "create exclusively"
                if pflags & wire.FXF_EXCL
                else "create"
                if pflags & wire.FXF_CREAT
                else "open"
            )
            raise self.explain(what, status, path) from None

    @staticmethod
    def _lane_for(session: Session, pflags: int) -> Lane:
        return session.write_lane if pflags & wire.FXF_WRITE else session.read_lane

    def attach(self, file: RemoteFile, session: Session) -> Tuple[Lane, bytes]:
        """The lane and handle of ``file`` on ``session``, reopened and verified where they were another session's."""
        if file.session is session and file.lane is not None:
            return file.lane, file.handle
        with file.lock:
            if file.session is session and file.lane is not None:
                return file.lane, file.handle
            if file.closed:
                raise FsError(errno.EBADF)
            if not file.path:
                raise FsError(errno.ESTALE, "another file has taken its name")
            lane = self._lane_for(session, file.pflags)
            pflags = file.pflags & ~(wire.FXF_CREAT | wire.FXF_EXCL | wire.FXF_TRUNC)
            try:
                handle = self._reopen(lane, file, pflags)
                attrs = lane.request(wire.FSTAT, wire.string(handle)).wait().attrs()
            except StatusError as status:
                code = errno.ESTALE if status.code == FX_NO_SUCH_FILE else status.errno
                raise FsError(code) from None
            try:
                file.verify(attrs)
            except FsError:
                lane.request(wire.CLOSE, wire.string(handle))
                raise
            file.session, file.lane, file.handle = session, lane, handle
            return lane, handle

    @staticmethod
    def _reopen(lane: Lane, file: RemoteFile, pflags: int) -> bytes:
        opening = wire.open_body(file.path, pflags)
        try:
            return lane.request(wire.OPEN, opening).wait().handle()
        except StatusError as status:
            mode = file.mode
            if (
                status.code != FX_PERMISSION_DENIED
                or not pflags & wire.FXF_WRITE
                or mode is None
                or mode & 0o200
            ):
                raise
        # Made read-only by us after it was opened (git and restic do so): let it be opened as it was, and no longer.
        now = lane.request(wire.LSTAT, wire.string(file.path)).wait().attrs()
        if not stat.S_ISREG(now.mode or 0) or stat.S_IMODE(now.mode or 0) != mode:
            raise FsError(errno.EACCES)
        body = wire.string(file.path)
        lane.request(wire.SETSTAT, body + wire.attrs(Attrs(mode=mode | 0o200))).wait().expect_ok()
        try:
            return lane.request(wire.OPEN, opening).wait().handle()
        finally:
            lane.request(wire.SETSTAT, body + wire.attrs(Attrs(mode=mode))).wait().expect_ok()

    def read_soon(
        self,
        file: RemoteFile,
        session: Session,
        offset: int,
        length: int,
        callback: Callable[[Pending], None],
    ) -> None:
        """Send one READ on ``session``; ``callback(pending)`` comes in the transport's thread. Raises ConnectionLost."""
        lane, handle = self.attach(file, session)
        lane.request(wire.READ, wire.read_body(handle, offset, length), callback=callback)

    def write_soon(
        self,
        file: RemoteFile,
        session: Session,
        offset: int,
        data: memoryview,
        callback: Callable[[Pending], None],
    ) -> None:
        """Send one WRITE of at most ``limits.write_bytes``; as ``read_soon``."""
        lane, handle = self.attach(file, session)
        lane.request(wire.WRITE, wire.write_head(handle, offset, len(data)), data, callback=callback)

    def fsync_soon(self, file: RemoteFile, session: Session, callback: Callable[[Pending], None]) -> None:
        """Send fsync@openssh.com: it covers every WRITE of this file sent before. Only where ``has(FSYNC)``."""
        lane, handle = self.attach(file, session)
        lane.request(wire.EXTENDED, wire.extended_body(FSYNC, wire.string(handle)), callback=callback)

    def fstat_soon(self, file: RemoteFile, session: Session) -> Pending:
        """Send FSTAT behind what was sent on the file's lane before; the caller waits and decodes."""
        lane, handle = self.attach(file, session)
        return lane.request(wire.FSTAT, wire.string(handle))

    def fsetstat_now(self, file: RemoteFile, session: Session, attrs: Attrs) -> None:
        """Change attributes through the handle on ``session``; raises StatusError, ConnectionLost."""
        lane, handle = self.attach(file, session)
        lane.request(wire.FSETSTAT, wire.string(handle) + wire.attrs(attrs)).wait().expect_ok()

    def read(self, file: RemoteFile, offset: int, length: int) -> bytes:
        """``read_with_attrs`` without the attributes."""
        return self.read_with_attrs(file, offset, length)[0]

    def read_with_attrs(self, file: RemoteFile, offset: int, length: int) -> Tuple[bytes, Attrs]:
        """At most ``length`` bytes at ``offset``, fewer only at the end of the file, and the attributes behind them.

        Loops over short replies; the attributes are asked for in the same flight.
        """

        def attempt(session: Session) -> Tuple[bytes, Attrs]:
            parts: List[bytes] = []
            position, end = offset, offset + length
            looking: Optional[Pending] = None
            while position < end:
                lane, handle = self.attach(file, session)
                count = min(end - position, session.limits.read_bytes)
                reading = lane.request(wire.READ, wire.read_body(handle, position, count))
                if position + count >= end:
                    looking = lane.request(wire.FSTAT, wire.string(handle))
                data = reading.wait().data()
                if not data:
                    break
                if len(data) > count:
                    raise ConnectionLost("the server sent more bytes than were asked for")
                parts.append(data)
                position += len(data)
            looking = looking or self.fstat_soon(file, session)
            return b"".join(parts), looking.wait().attrs()

        try:
            return self.run(attempt)
        except StatusError as status:
            raise self.explain("read", status, file.path) from None

    def fsetstat(self, file: RemoteFile, attrs: Attrs) -> None:
        """Change attributes through the handle; repeatable."""

        try:
            self.run(lambda session: self.fsetstat_now(file, session, attrs))
        except StatusError as status:
            raise self.explain("setstat" if attrs.size is None else "truncate", status, file.path) from None

    def commit_by_close(self, file: RemoteFile) -> None:
        """CLOSE, and await the verdict; the next use of ``file`` opens it again. For servers that have no fsync."""
        with file.lock:
            session, lane, handle = file.session, file.lane, file.handle
            file.session = file.lane = None
        if session is None or lane is None:
            return
        try:
            lane.request(wire.CLOSE, wire.string(handle)).wait().expect_ok()
        except StatusError as status:
            raise self.explain("write", status, file.path) from None
        except ConnectionLost as error:
            # Nothing tells whether it was committed, and what was sent is no longer held: say that it failed.
            raise FsError(errno.EIO, "the connection was lost while the server closed the file") from error

    def close_file(self, file: RemoteFile, *, wait: bool) -> None:
        """Give the handle back. With ``wait`` the server's verdict is awaited (some servers commit only here)."""
        with file.lock:
            file.closed = True
            session, lane, handle = file.session, file.lane, file.handle
            file.session = file.lane = None
        if session is None or lane is None or session.lost is not None:
            return  # the server closed it with the connection
        try:
            pending = lane.request(
                wire.CLOSE, wire.string(handle), callback=None if wait else _log_close_error
            )
            if wait:
                pending.wait().expect_ok()
        except StatusError as status:
            raise self.explain("close", status, file.path) from None


def _log_close_error(pending: Pending) -> None:
    try:
        pending.expect_ok()
    except StatusError as status:
        log.warning("closing a file on the server: %s", status)
    except ConnectionLost:
        pass  # nothing depended on it


def _lstat_or_none(session: Session, path: bytes) -> Optional[Attrs]:
    try:
        return session.meta.request(wire.LSTAT, wire.string(path)).wait().attrs()
    except StatusError as status:
        if status.code == FX_NO_SUCH_FILE:
            return None
        raise
