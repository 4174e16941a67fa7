"""Is it the directory that was mounted? Asked after each reconnect, before anything is allowed on the new session.

A server that has restarted without its backup disk shows an empty directory in its place, and what runs on a mount would
take that for an empty backup. SFTP v3 has no inode numbers, so this goes by the file system's id (statvfs@openssh.com)
and, where that is missing or has changed (some file systems take theirs from the order in which disks are found), by the
names that we know in the directory.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import stat
import threading
from typing import Counter, Iterator, Optional

from ..cache.namespace import Namespace
from ..errors import RemoteDirectoryError, StatusError
from ..sftp import wire
from ..sftp.dialect import Look
from ..sftp.remote import STATVFS
from ..sftp.session import Session

log = logging.getLogger(__name__)

NAMES_MAX = 16


class MountedDirectory:
    """What is known of the mounted directory. ``check`` runs in the thread that reconnects."""

    def __init__(self, names: Namespace) -> None:
        self._ns = names
        self._path = b""
        self._fsid: Optional[int] = None
        self._lock = threading.Lock()
        self._in_doubt: Counter[bytes] = collections.Counter()  # names that are being changed

    def remember(self, path: bytes, fsid: Optional[int]) -> None:
        """It is mounted: its path on the server and the id of its file system, None where the server has no statvfs."""
        self._path = path
        self._fsid = fsid

    @contextlib.contextmanager
    def changing(self, *paths: bytes) -> Iterator[None]:
        """While the server is told to: these names may be there or not, and prove nothing."""
        names = [path[1:] for path in paths if path.rfind(b"/") == 0]
        with self._lock:
            self._in_doubt.update(names)
        try:
            yield
        finally:
            with self._lock:
                self._in_doubt.subtract(names)

    def check(self, session: Session, *, is_new: bool = True) -> None:
        """Raise RemoteDirectoryError where the directory is not there, or is another; also ConnectionLost.

        In a session that is not new, only a file system of another id counts.
        """
        if not self._path:
            return
        shown = os.fsdecode(self._path).encode("unicode_escape", "surrogateescape").decode("ascii")
        looking = session.meta.request(wire.STAT, wire.string(self._path))
        fsid = self._ask_fsid(session)
        try:
            mode = looking.wait().attrs().mode
        except StatusError as status:
            if not is_new:
                return  # what was asked for is not there either
            raise RemoteDirectoryError(
                f"the server does not show {shown} ({status}); is its disk mounted?"
            ) from None
        if not stat.S_ISDIR(mode or stat.S_IFDIR):
            raise RemoteDirectoryError(f"{shown} on the server is no directory any more")
        comparable = fsid is not None and self._fsid is not None
        if fsid == self._fsid if comparable else not is_new:
            return
        is_known = self._shows_known_names(session)
        if is_known is None:
            is_known = not comparable
        if not is_known:
            raise RemoteDirectoryError(
                f"{shown} on the server is not the directory that was mounted; is its disk mounted? "
                "(If it is meant to be another one now: unmount, and mount again.)"
            )
        if comparable:
            log.info("the id of the server's file system is another now; its names are those we know")
            self._fsid = fsid

    def _ask_fsid(self, session: Session) -> Optional[int]:
        if STATVFS not in session.extensions:
            return None
        try:
            return session.meta.request(
                wire.EXTENDED, wire.extended_body(STATVFS, wire.string(self._path))
            ).wait().statvfs().fsid  # fmt: skip
        except StatusError:
            return None

    def _shows_known_names(self, session: Session) -> Optional[bool]:
        """True where one of the names that we know is there, with its type; None where we know of none.

        One is enough: others may be gone by another client's doing, and below a disk that is not mounted there is none.
        """
        base = b"" if self._path == b"/" else self._path
        with self._lock:
            in_doubt = {name for name, count in self._in_doubt.items() if count > 0}
        children = self._ns.children(b"/")
        known = [(name, node) for name, node in children if name not in in_doubt and not node.is_guess]
        known = known[:NAMES_MAX]
        if not known:
            return True if in_doubt else None
        asked = [(node.mode, Look(session, base + b"/" + name)) for name, node in known]
        there = 0
        for mode, looking in asked:
            try:
                there += stat.S_IFMT(looking.attrs().mode or mode) == stat.S_IFMT(mode)
            except StatusError:
                pass
        return there > 0
