"""The names on the server: every operation of SFTP v3 and OpenSSH's extensions by path, with retry and verification.

After a lost connection (``reconnect``) what may be repeated is: everything that reads, and SETSTAT. What may not is looked at
on the server first: the ``recheck`` functions.

Errors are ``FsError`` with the errno that a local file system would give; a bare SSH_FX_FAILURE is explained by looking at
the server (``diagnose``). Paths are absolute bytes as the server names them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import stat
from typing import Callable, Dict, Iterator, List, Optional, Tuple, TypeVar

from ..errors import (
    FX_NO_SUCH_FILE,
    ConnectionLost,
    FsError,
    NotSent,
    StatusError,
)
from . import diagnose, wire
from .dialect import LSETSTAT, Look, followed, symlink_body
from .lane import Pending
from .reconnect import Reconnecting, Redo
from .remote_file import close_handle, handle_of
from .session import Session
from .wire import Attrs

log = logging.getLogger(__name__)

T = TypeVar("T")

# READDIRs in flight: OpenSSH puts 100 names into each reply, so a long listing is otherwise one round trip per 100 names.
READDIR_WINDOW = 16
# A directory that has more is not listed: a server may go on for ever.
LISTING_ENTRIES_MAX = 1_000_000

POSIX_RENAME = b"posix-rename@openssh.com"
HARDLINK = b"hardlink@openssh.com"
STATVFS = b"statvfs@openssh.com"


class RemoteNames(Reconnecting):
    """One server's names. All methods may be called from any thread; each may wait for the network."""

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
            return with_size(self.run(lambda session: Look(session, path).attrs()))
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

    def listdir(self, path: bytes, *, entries_max: int = LISTING_ENTRIES_MAX) -> List[wire.Entry]:
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
            close_handle(lane, handle)
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
            return with_size(Look(session, path).attrs())

        def attempt(session: Session) -> Attrs:
            nonlocal is_made
            body = body_for(session)
            with session.meta.together():
                making = session.meta.request(kind, body)
                looking = look_behind(lambda: Look(session, path))
            making.wait().expect_ok()
            is_made = True
            with behind_another():
                if looking is not None:
                    try:
                        return with_size(looking.attrs())
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
            if lstat_or_none(session, path) is not None:
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
            if lstat_or_none(session, path) is not None:
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
            if lstat_or_none(session, old) is not None:
                raise Redo
            moved = lstat_or_none(session, new)
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
            if lstat_or_none(session, new) is not None:
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


def with_size(attrs: Attrs) -> Attrs:
    """``attrs``, unless they are a file's and lack its size: it would be taken for empty."""
    if attrs.size is None and stat.S_IFMT(attrs.mode or stat.S_IFREG) == stat.S_IFREG:
        raise FsError(errno.EIO, "the server does not tell the size of a file")
    return attrs


def look_behind(look: Callable[[], T]) -> Optional[T]:
    """A look in one flight with the request before it; None where the line broke between them: the first may be answered."""
    try:
        return look()
    except ConnectionLost:
        return None


@contextlib.contextmanager
def behind_another() -> Iterator[None]:
    """A request that cannot be sent in here is not the first of its attempt: that was, so the whole may not just be repeated."""
    try:
        yield
    except NotSent as error:
        raise ConnectionLost(str(error)) from None


def lstat_or_none(session: Session, path: bytes) -> Optional[Attrs]:
    try:
        return Look(session, path).attrs()
    except StatusError as status:
        if status.code == FX_NO_SUCH_FILE:
            return None
        raise
