"""The server as an object: its names (``remote_names``), and files that are opened, read, written and stored there.

After a lost connection open without O_EXCL and WRITE at an offset are repeated on the next one. An exclusive create whose
reply was lost is answered EEXIST where the file is there: it may be another's.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import stat
from typing import Callable, Iterator, List, Optional, Sequence, Tuple, TypeVar

from .. import waiting
from ..errors import ConnectionLost, FsError, StatusError
from . import wire
from .dialect import FSYNC as FSYNC
from .dialect import keeps_opened, made_exclusively, must_be_absent, must_keep
from .lane import Lane, Pending
from .reconnect import Redo
from .remote_file import RemoteFile, close_handle, handle_of, lane_for, log_close_error
from .remote_names import HARDLINK as HARDLINK
from .remote_names import POSIX_RENAME as POSIX_RENAME
from .remote_names import STATVFS as STATVFS
from .remote_names import RemoteNames, behind_another, look_behind, lstat_or_none, with_size
from .session import Session
from .wire import Attrs

log = logging.getLogger(__name__)

T = TypeVar("T")

# Replies to one read beyond those that whole ones would take. Servers cut at 32 KiB, some at 4 KiB, and a block has 128 KiB.
SHORT_READS_MAX = 1024


class Remote(RemoteNames):
    """One server. All methods may be called from any thread; each may wait for the network."""

    def open(self, path: bytes, pflags: int, attrs: Attrs = Attrs()) -> Tuple[RemoteFile, Attrs]:  # noqa: B008
        """Open ``path``; returns the file and its attributes as they are behind the open, in one flight."""
        file = RemoteFile(path, pflags)
        body = wire.open_body(path, pflags, attrs)

        def attempt(session: Session) -> Tuple[RemoteFile, Attrs]:
            if pflags & wire.FXF_WRITE and not pflags & (wire.FXF_TRUNC | wire.FXF_EXCL):
                must_keep(session, path)
            if pflags & wire.FXF_EXCL:
                must_be_absent(session, path)
            lane = lane_for(session, pflags)
            with lane.together():
                opening = lane.request(wire.OPEN, body)
                looking = look_behind(lambda: lane.request(wire.LSTAT, wire.string(path)))
            handle = handle_of(lane, opening)
            file.opened(session, lane, handle)
            try:
                with behind_another():
                    if pflags & wire.FXF_EXCL:
                        made_exclusively(session, path)
                    if looking is not None:
                        try:
                            return file, with_size(looking.wait().attrs())
                        except StatusError:
                            pass  # the name is gone already, the handle is not: ask through it
                    return file, with_size(lane.request(wire.FSTAT, wire.string(handle)).wait().attrs())
            except FsError:
                self.close_file(file)
                raise

        def recheck(session: Session) -> Tuple[RemoteFile, Attrs]:
            if file.session is not None:  # the OPEN was answered, only the attributes were lost: it is ours
                lane, handle = file.attach(session)
                return file, with_size(lane.request(wire.FSTAT, wire.string(handle)).wait().attrs())
            if lstat_or_none(session, path) is not None:
                raise FsError(errno.EEXIST)
            raise Redo

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

    def read_whole_on(
        self, session: Session, paths: Sequence[bytes], bytes_max: int
    ) -> List[Optional[Tuple[Attrs, bytes]]]:
        """Small files' attributes and bytes, opened and closed for that, in two round trips for all, once, on this session.

        None for what cannot be read, is longer than ``bytes_max``, or was changed meanwhile. Raises ConnectionLost.
        """
        lane = session.read_lane
        with lane.together():
            asked = [
                (
                    lane.request(wire.OPEN, wire.open_body(path, wire.FXF_READ)),
                    lane.request(wire.LSTAT, wire.string(path)),
                )
                for path in paths
            ]
        opened = [
            (_or_none(lambda: handle_of(lane, opening)), _or_none(lambda: looking.wait().attrs()))  # noqa: B023
            for opening, looking in asked
        ]
        with lane.together():
            reading = [_read_whole_soon(session, lane, *each, bytes_max) for each in opened]
        return [
            None if parts is None or attrs is None else _or_none(lambda: _whole(attrs, *parts))  # noqa: B023
            for (_, attrs), parts in zip(opened, reading)
        ]

    @contextlib.contextmanager
    def together(self, file: RemoteFile, session: Session) -> Iterator[Lane]:
        """What is sent for ``file`` on ``session`` within leaves in one packet, if it fits, at the end of the block.

        Gives the lane that it leaves by. Raises ConnectionLost, FsError. Within, wait for nothing.
        """
        with file:
            lane, _ = file.attach(session)  # which may have to open it again, and wait for that
            with lane.together():
                yield lane

    def read_soon(
        self,
        file: RemoteFile,
        session: Session,
        offset: int,
        length: int,
        callback: Callable[[Pending], None],
    ) -> None:
        """Send one READ on ``session``; ``callback(pending)`` comes in the thread that reads. Raises ConnectionLost."""
        with file:
            lane, handle = file.attach(session)
            lane.request(wire.READ, wire.read_body(handle, offset, length), callback=callback)

    def write_soon(
        self,
        file: RemoteFile,
        session: Session,
        offset: int,
        parts: Sequence[memoryview],
        callback: Callable[[Pending], None],
    ) -> None:
        """Send one WRITE of ``parts``, at most ``limits.write_bytes`` together; as ``read_soon``."""
        with file:
            lane, handle = file.attach(session)
            head = wire.write_head(handle, offset, sum(map(len, parts)))
            lane.request(wire.WRITE, head, *parts, callback=callback, is_awaited=False)

    def fsync_soon(self, file: RemoteFile, session: Session, callback: Callable[[Pending], None]) -> None:
        """Send fsync@openssh.com: it covers every WRITE of this file sent before. Only where ``has(FSYNC)``.

        Who needs to know asks something else behind it, and waits for that.
        """
        with file:
            lane, handle = file.attach(session)
            body = wire.extended_body(FSYNC, wire.string(handle))
            lane.request(wire.EXTENDED, body, callback=callback, is_awaited=False)

    def fstat_soon(self, file: RemoteFile, session: Session) -> Pending:
        """Send FSTAT behind what was sent on the file's lane before; the caller waits and decodes."""
        with file:
            lane, handle = file.attach(session)
            return lane.request(wire.FSTAT, wire.string(handle))

    def fstat(self, file: RemoteFile) -> Attrs:
        """The attributes of an open file."""
        try:
            return with_size(self.run(lambda session: self.fstat_soon(file, session).wait().attrs()))
        except StatusError as status:
            raise self.explain("fstat", status, file.path) from None

    def fsetstat_now(self, file: RemoteFile, session: Session, attrs: Attrs) -> None:
        """Change attributes through the handle on ``session``; raises StatusError, ConnectionLost.

        A size is looked at in the same flight: FsError (ENOTSUP) where the server says OK and leaves it as it was.
        """
        with file:
            lane, handle = file.attach(session)
            with lane.together():
                pending = lane.request(wire.FSETSTAT, wire.string(handle) + wire.attrs(attrs))
                looking = lane.request(wire.FSTAT, wire.string(handle)) if attrs.size is not None else None
        pending.wait().expect_ok()
        if looking is not None and _size_or_none(looking) not in (attrs.size, None):
            # Another client may have changed it since, and a server need not keep the order: but not twice.
            if _size_or_none(self.fstat_soon(file, session)) not in (attrs.size, None):
                raise FsError(errno.ENOTSUP, "the server does not cut or extend files, though it says so")

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
            parts_max = SHORT_READS_MAX + length // session.limits.read_bytes
            looking: Optional[Pending] = None
            while position < end:
                count = min(end - position, session.limits.read_bytes)
                with file:
                    lane, handle = file.attach(session)
                    with lane.together():
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
                if len(parts) > parts_max:
                    raise FsError(errno.EIO, "the server sends a file in crumbs")
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

    def commit_by_close(self, file: RemoteFile, *, is_closed: bool = True) -> None:
        """CLOSE, and await the verdict; the next use of ``file`` opens it again. For servers that have no fsync.

        Unless ``is_closed``, as far as the program goes, nothing is done where the server would not let it write on.
        """
        if not is_closed and not self._may_be_opened_again(file):
            return
        session, lane, handle = file.detach()
        if session is None or lane is None:
            return
        try:
            with waiting.patiently():  # the verdict must reach somebody
                lane.request(wire.CLOSE, wire.string(handle)).wait().expect_ok()
            file.is_committed = True
        except StatusError as status:
            raise self.explain("write", status, file.path) from None
        except ConnectionLost as error:
            # Nothing tells whether it was committed, and what was sent is no longer held: say that it failed.
            raise FsError(errno.EIO, "the connection was lost while the server closed the file") from error

    def _may_be_opened_again(self, file: RemoteFile) -> bool:
        try:
            return self.run(lambda session: keeps_opened(session, file.path))
        except StatusError:
            return False

    def close_file(self, file: RemoteFile) -> None:
        """Give the handle back when its last user has; the server's answer is logged, nothing depends on it."""
        file.when_idle(lambda: self._close_file(file))

    def _close_file(self, file: RemoteFile) -> None:
        file.closed = True
        with waiting.patiently():  # for who is sending something about it
            session, lane, handle = file.detach()
        if session is None or lane is None or session.lost is not None:
            return  # the server closed it with the connection
        close_handle(lane, handle)


def _size_or_none(looking: Pending) -> Optional[int]:
    """None where the server does not tell."""
    try:
        return looking.wait().attrs().size
    except StatusError:
        return None


def _or_none(ask: Callable[[], Optional[T]]) -> Optional[T]:
    """None where the server refuses it."""
    try:
        return ask()
    except StatusError:
        return None


def _read_whole_soon(
    session: Session, lane: Lane, handle: Optional[bytes], attrs: Optional[Attrs], bytes_max: int
) -> Optional[Tuple[List[Pending], Pending]]:
    """Ask for the whole of an open file, and its attributes behind that, if it is a small one; close it in any case."""
    if handle is None:
        return None
    asked = None
    body, step = wire.string(handle), session.limits.read_bytes
    size = attrs.size if attrs is not None and stat.S_ISREG(attrs.mode or 0) else None
    if size is not None and size <= bytes_max:
        reads = [
            lane.request(wire.READ, wire.read_body(handle, at, min(step, size - at)))
            for at in range(0, size, step)
        ]
        asked = reads, lane.request(wire.FSTAT, body)
    lane.request(wire.CLOSE, body, callback=log_close_error, is_awaited=False)
    return asked


def _whole(attrs: Attrs, reads: List[Pending], looking: Pending) -> Optional[Tuple[Attrs, bytes]]:
    data = b"".join([part.wait().data() for part in reads])
    now = looking.wait().attrs()
    is_whole = len(data) == attrs.size and (now.size, now.mtime) == (attrs.size, attrs.mtime)
    return (attrs, data) if is_whole else None
