"""Is it the directory that was mounted? Asked after each reconnect, before anything is allowed on the new session.

A server that has restarted without its backup disk shows an empty directory in its place, and what runs on a mount would
take that for an empty backup. SFTP v3 has no inode numbers, so this goes by the file system's id (statvfs@openssh.com)
and, where that is missing or has changed (some file systems take theirs from the order in which disks are found), by the
names that we know in the directory.
"""

from __future__ import annotations

import itertools
import logging
import os
import stat
from typing import Optional

from ..cache.namespace import Namespace
from ..errors import RemoteDirectoryError, StatusError
from ..sftp import wire
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

    def remember(self, path: bytes, fsid: Optional[int]) -> None:
        """It is mounted: its path on the server and the id of its file system, None where the server has no statvfs."""
        self._path = path
        self._fsid = fsid

    def check(self, session: Session) -> None:
        """Raise RemoteDirectoryError where the directory is not there, or is another; also StatusError, ConnectionLost."""
        if not self._path:
            return
        shown = os.fsdecode(self._path).encode("unicode_escape", "surrogateescape").decode("ascii")
        looking = session.meta.request(wire.STAT, wire.string(self._path))
        fsid = self._ask_fsid(session)
        try:
            mode = looking.wait().attrs().mode
        except StatusError as status:
            raise RemoteDirectoryError(
                f"the server does not show {shown} ({status}); is its disk mounted?"
            ) from None
        if not stat.S_ISDIR(mode or stat.S_IFDIR):
            raise RemoteDirectoryError(f"{shown} on the server is no directory any more")
        if fsid is not None and fsid == self._fsid:
            return
        is_known = self._shows_known_names(session)
        if is_known is None:
            is_known = fsid is None or self._fsid is None
        if not is_known:
            raise RemoteDirectoryError(
                f"{shown} on the server is not the directory that was mounted; is its disk mounted? "
                "(If it is meant to be another one now: unmount, and mount again.)"
            )
        if fsid != self._fsid:
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
        """True where most names that we know are there, with their types; None where we know of none."""
        base = b"" if self._path == b"/" else self._path
        known = list(itertools.islice(self._ns.children(b"/"), NAMES_MAX))
        asked = [
            (node.mode, session.meta.request(wire.LSTAT, wire.string(base + b"/" + name)))
            for name, node in known
        ]
        there = 0
        for mode, looking in asked:
            try:
                there += stat.S_IFMT(looking.wait().attrs().mode or mode) == stat.S_IFMT(mode)
            except StatusError:
                pass
        return 2 * there > len(known) if known else None
