"""The server as an object: every operation of SFTP v3 and OpenSSH's extensions, with reconnect, retry and verification.

After a lost connection (``reconnect``) what may be repeated is: everything that reads, SETSTAT, open without O_EXCL, WRITE
at an offset. What may not is looked at on the server first: the ``recheck`` functions. An exclusive create whose reply was
lost is answered EEXIST where the file is there: it may be another's.

Errors are ``FsError`` with the errno that a local file system would give; a bare SSH_FX_FAILURE is explained by looking at
the server (``diagnose``). Paths are absolute bytes as the server names them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import stat
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple, TypeVar

from .. import waiting
from ..errors import (
    FX_NO_SUCH_FILE,
    ConnectionLost,
    FsError,
    NotSent,
    StatusError,
)
from . import diagnose, wire
from .dialect import FSYNC as FSYNC
from .dialect import (
    LSETSTAT,
    Look,
    followed,
    keeps_opened,
    made_exclusively,
    must_be_absent,
    must_keep,
    symlink_body,
)
from .reconnect import Reconnecting, Redo
from .remote_file import RemoteFile, handle_of, lane_for
from .session import Lane, Pending, Session
from .wire import Attrs

log = logging.getLogger(__name__)

T = TypeVar("T")

# READDIRs in flight: OpenSSH puts 100 names into each reply, so a long listing is otherwise one round trip per 100 names.
READDIR_WINDOW = 16

# Replies to one read beyond those that whole ones would take. Servers cut at 32 KiB, some at 4 KiB, and a block has 128 KiB.
SHORT_READS_MAX = 1024

POSIX_RENAME = b"posix-rename@openssh.com"
HARDLINK = b"hardlink@openssh.com"
STATVFS = b"statvfs@openssh.com"


class Remote(Reconnecting):
    """One server. All methods may be called from any thread; each may wait for the network."""

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
        try:
            return _with_size(self.run(lambda session: Look(session, path).attrs()))
        except StatusError as status:
            raise self.explain("lstat", status, path) from None

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
            return self.run(lambda session: self.list_on(session, path, entries_max))
        except StatusError as status:
            raise self.explain("listdir", status, path) from None

    def list_on(self, session: Session, path: bytes, entries_max: int) -> List[wire.Entry]:
        """``listdir`` once, on this session. Raises StatusError, ConnectionLost, FsError (EFBIG beyond ``entries_max``)."""
        lane = session.meta
        handle = handle_of(lane, lane.request(wire.OPENDIR, wire.string(path)))
        body = wire.string(handle)
        entries: Dict[bytes, wire.Entry] = {}
        in_flight: List[Pending] = []
        # The second request goes out with the first: most directories fit one reply, and its end shows at once. No third
        # before it is known not to: its reply would have to be waited for.
        window, ended, told, replies = 2, False, 0, 0
        left_out, example = 0, b""
        try:
            while in_flight or not ended:
                with lane.together():
                    while not ended and len(in_flight) < window and replies != 1:
                        in_flight.append(lane.request(wire.READDIR, body))
                names = in_flight.pop(0).wait().names()
                replies += 1
                if not names:
                    ended = True  # the others in flight are read to their end too: a server may answer out of order
                window = min(window * 2, READDIR_WINDOW)
                told += len(names)
                for name, _, attrs in names:
                    if wire.is_plain_name(name):
                        entries[name] = wire.Entry(name, b"", attrs)  # a longname may be as long as its reply
                    elif name not in (b".", b".."):
                        left_out, example = left_out + 1, example or name[:300]
                if told > entries_max:
                    raise FsError(errno.EFBIG, "the listing does not end")
        finally:
            try:
                lane.request(wire.CLOSE, body)  # its reply carries nothing that anyone waits for
            except ConnectionLost:
                pass
            if left_out:  # in one line: a server that lies could fill the log
                log.warning("%d names in %r are left out, no local name can be %r", left_out, path, example)
        return list(entries.values())

    # -- changing the namespace -----------------------------------------------------------------------------------

    def _make(
        self,
        what: str,
        kind: int,
        body_for: Callable[[Session], bytes],
        paths: Tuple[bytes, ...],
        recheck: Callable[[Session], None],
    ) -> Attrs:
        """One request that makes the last of ``paths``, and a look at it in the same flight."""
        is_made = False
        path = paths[-1]

        def look(session: Session) -> Attrs:
            return _with_size(Look(session, path).attrs())

        def attempt(session: Session) -> Attrs:
            nonlocal is_made
            body = body_for(session)
            with session.meta.together():
                making = session.meta.request(kind, body)
                looking = _look_behind(lambda: Look(session, path))
            making.wait().expect_ok()
            is_made = True
            with _behind_another():
                if looking is not None:
                    try:
                        return _with_size(looking.attrs())
                    except StatusError:
                        pass  # a server that does not keep the order
                return look(session)

        def recheck_and_look(session: Session) -> Attrs:
            if not is_made:
                recheck(session)
            return look(session)

        try:
            return self.run(attempt, recheck_and_look)
        except StatusError as status:
            if not is_made:
                raise self.explain(what, status, *paths) from None
            if what == "link" and status.code == FX_NO_SUCH_FILE:
                # rclone's server names the extension, says OK, and makes nothing.
                raise FsError(errno.EPERM, "the server makes no hard links, though it says so") from None
            raise self.explain("lstat", status, path) from None

    def mkdir(self, path: bytes, mode: int) -> Attrs:
        """Create a directory; fails with EEXIST where anything has the name. Returns its attributes."""

        def recheck(session: Session) -> None:
            # Ours or another's? Directories serve as locks, so one whose reply was lost is not claimed.
            if _lstat_or_none(session, path) is not None:
                raise FsError(errno.EEXIST)
            raise Redo

        body = wire.string(path) + wire.attrs(Attrs(mode=mode & 0o7777))
        return self._make("mkdir", wire.MKDIR, lambda _: body, (path,), recheck)

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

    def unlink_soon(self, session: Session, path: bytes, answered: Callable[[Pending], None]) -> None:
        """Send the request on ``session`` and do not wait; ``answered`` is called in the thread that reads.

        Raises NotSent, FsError (EINTR); nothing was sent then.
        """
        session.meta.request(wire.REMOVE, wire.string(path), callback=answered, is_awaited=False)

    @staticmethod
    def _recheck_gone(path: bytes) -> Callable[[Session], None]:
        def recheck(session: Session) -> None:
            if _lstat_or_none(session, path) is not None:
                raise Redo

        return recheck

    def rename(
        self,
        old: bytes,
        new: bytes,
        known: Optional[Attrs] = None,
        link_target: Optional[bytes] = None,
    ) -> None:
        """POSIX rename, atomically over an existing target where the server can; ``old == new`` does nothing.

        ``known``: attributes of ``old`` as last seen. After a lost reply they tell whether what stands at ``new`` is it.
        ``link_target``: where ``old`` leads, where it is known to be a symbolic link.
        """
        if known is None:
            known = self.lstat(old)
        if old == new:  # Windows' OpenSSH deletes a file that is renamed to itself
            self.lstat(old)
            return
        is_link, is_over_link = self.run(lambda session: followed(session, old, new))
        if is_over_link:
            self.unlink(new)
        if is_link:
            self._move_link(old, new, link_target)
            return

        def recheck(session: Session) -> None:
            if _lstat_or_none(session, old) is not None:
                raise Redo
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
        self._clear_rename_target(old, new)
        self._meta("rename", wire.RENAME, names, Pending.expect_ok, (old, new), recheck)

    def _move_link(self, old: bytes, new: bytes, target: Optional[bytes]) -> None:
        """Rename a symbolic link on a server that would rename what it leads to. Not atomic: for a moment both are there."""
        if target is None:
            target = self.readlink(old)
        self._clear_rename_target(old, new)
        self.symlink(target, new)
        self.unlink(old)

    def _clear_rename_target(self, old: bytes, new: bytes) -> None:
        """Where rename cannot replace: an empty directory is removed first, a file too: not atomic."""
        try:
            target = self.lstat(new)
        except FsError as error:
            if error.errno != errno.ENOENT:
                raise
            return
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

    def symlink(self, target: bytes, path: bytes) -> Attrs:
        """Create a symbolic link at ``path``. Returns its attributes."""

        def recheck(session: Session) -> None:
            try:
                names = session.meta.request(wire.READLINK, wire.string(path)).wait().names()
            except StatusError as status:
                if status.code == FX_NO_SUCH_FILE:
                    raise Redo from None
                raise FsError(errno.EEXIST) from None
            if not names or names[0].name != target:
                raise FsError(errno.EEXIST)

        return self._make(
            "symlink",
            wire.SYMLINK,
            lambda session: symlink_body(session, target, path),
            (path,),
            recheck,
        )

    def link(self, old: bytes, new: bytes) -> None:
        """Create a hard link; EPERM where the server has none, as file systems without hard links say."""
        if not self.has(HARDLINK):
            raise FsError(errno.EPERM)

        if self.run(lambda session: followed(session, old))[0]:
            raise FsError(errno.EPERM, "the server makes hard links of what a symbolic link leads to")

        def recheck(session: Session) -> None:
            # As with mkdir: a link may be a lock, and attributes do not tell ours from another's.
            if _lstat_or_none(session, new) is not None:
                raise FsError(errno.EEXIST)
            raise Redo

        body = wire.extended_body(HARDLINK, wire.string(old), wire.string(new))
        self._make("link", wire.EXTENDED, lambda _: body, (old, new), recheck)

    def setstat(self, path: bytes, attrs: Attrs, *, is_symlink: bool = False) -> None:
        """Change attributes by path; of a symlink itself only where the server has lsetstat@openssh.com.

        Else ENOSYS for its times, which rsync and cp take for "does without" and pass over, ENOTSUP for its owner.
        """
        if is_symlink:
            if not self.has(LSETSTAT):
                raise FsError(errno.ENOTSUP if attrs.mtime is None else errno.ENOSYS)
            body = wire.extended_body(LSETSTAT, wire.string(path), wire.attrs(attrs))
            self._meta("setstat", wire.EXTENDED, body, Pending.expect_ok, (path,))
        else:
            body = wire.string(path) + wire.attrs(attrs)
            what = "setstat" if attrs.size is None else "truncate"
            self._meta(what, wire.SETSTAT, body, Pending.expect_ok, (path,))

    def setstat_soon(self, session: Session, path: bytes, attrs: Attrs) -> Pending:
        """Send SETSTAT on ``session``, ahead of the metadata requests that follow. Raises ConnectionLost."""
        return session.meta.request(wire.SETSTAT, wire.string(path) + wire.attrs(attrs))

    # -- files ------------------------------------------------------------------------------------------------------

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
                looking = _look_behind(lambda: lane.request(wire.LSTAT, wire.string(path)))
            handle = handle_of(lane, opening)
            file.opened(session, lane, handle)
            try:
                with _behind_another():
                    if pflags & wire.FXF_EXCL:
                        made_exclusively(session, path)
                    if looking is not None:
                        try:
                            return file, _with_size(looking.wait().attrs())
                        except StatusError:
                            pass  # the name is gone already, the handle is not: ask through it
                    return file, _with_size(lane.request(wire.FSTAT, wire.string(handle)).wait().attrs())
            except FsError:
                self.close_file(file)
                raise

        def recheck(session: Session) -> Tuple[RemoteFile, Attrs]:
            if file.session is not None:  # the OPEN was answered, only the attributes were lost: it is ours
                lane, handle = file.attach(session)
                return file, _with_size(lane.request(wire.FSTAT, wire.string(handle)).wait().attrs())
            if _lstat_or_none(session, path) is not None:
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
    def together(self, file: RemoteFile, session: Session) -> Iterator[None]:
        """What is sent for ``file`` on ``session`` within leaves in one packet, if it fits, at the end of the block.

        Raises ConnectionLost, FsError. Within, wait for nothing.
        """
        with file:
            lane, _ = file.attach(session)  # which may have to open it again, and wait for that
            with lane.together():
                yield

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
            return _with_size(self.run(lambda session: self.fstat_soon(file, session).wait().attrs()))
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
        session, lane, handle = file.detach()
        if session is None or lane is None or session.lost is not None:
            return  # the server closed it with the connection
        try:
            lane.request(wire.CLOSE, wire.string(handle), callback=_log_close_error, is_awaited=False)
        except ConnectionLost:
            pass


def _with_size(attrs: Attrs) -> Attrs:
    """``attrs``, unless they are a file's and lack its size: it would be taken for empty."""
    if attrs.size is None and stat.S_IFMT(attrs.mode or stat.S_IFREG) == stat.S_IFREG:
        raise FsError(errno.EIO, "the server does not tell the size of a file")
    return attrs


def _look_behind(look: Callable[[], T]) -> Optional[T]:
    """A look in one flight with the request before it; None where the line broke between them: the first may be answered."""
    try:
        return look()
    except ConnectionLost:
        return None


@contextlib.contextmanager
def _behind_another() -> Iterator[None]:
    """A request that cannot be sent in here is not the first of its attempt: that was, so the whole may not just be repeated."""
    try:
        yield
    except NotSent as error:
        raise ConnectionLost(str(error)) from None


def _size_or_none(looking: Pending) -> Optional[int]:
    """None where the server does not tell."""
    try:
        return looking.wait().attrs().size
    except StatusError:
        return None


def _log_close_error(pending: Pending) -> None:
    try:
        pending.expect_ok()
    except StatusError as status:
        log.warning("closing a file on the server: %s", status)
    except ConnectionLost:
        pass  # nothing depended on it


def _lstat_or_none(session: Session, path: bytes) -> Optional[Attrs]:
    try:
        return Look(session, path).attrs()
    except StatusError as status:
        if status.code == FX_NO_SUCH_FILE:
            return None
        raise


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
    lane.request(wire.CLOSE, body, callback=_log_close_error, is_awaited=False)
    return asked


def _whole(attrs: Attrs, reads: List[Pending], looking: Pending) -> Optional[Tuple[Attrs, bytes]]:
    data = b"".join([part.wait().data() for part in reads])
    now = looking.wait().attrs()
    is_whole = len(data) == attrs.size and (now.size, now.mtime) == (attrs.size, attrs.mtime)
    return (attrs, data) if is_whole else None
