"""What servers of the same protocol read differently, found out by asking, with requests that change nothing.

- SYMLINK: the draft has the link's path first, OpenSSH's server and most others the target. The wrong order would make a link
  wherever the target points to. Both orders are asked to make a link where there can be none: at ``/``, which is there, and
  below a directory that is not. The server says "no such file" to the one that it reads as the second.
- LSTAT: some servers follow a link that leads somewhere, and a program that removes trees would go on behind it. READLINK in
  the same flight tells, until the server has shown that it can tell a link from its target. Until then it is not asked to
  rename a link, or something to the name of one, or to make a hard link of one: it might do so with what the link leads to.
- OPEN for writing: some servers empty a file that is there although TRUNC is not asked for, and what was in it is lost. One
  that has no fsync@openssh.com, as those that stand before something else than files, is tried with a file of our own.
"""

from __future__ import annotations

import errno
import os
import stat
import uuid
from typing import List

from ..errors import FX_NO_SUCH_FILE, ConnectionLost, FsError, StatusError
from . import wire
from .lane import Pending
from .session import Session
from .wire import Attrs

LSETSTAT = b"lsetstat@openssh.com"
FSYNC = b"fsync@openssh.com"
_THERE = b"/"
_NOWHERE = b"/.sftpmount-asks-for-what-is-not-there/nor-this"


def symlink_body(session: Session, target: bytes, path: bytes) -> bytes:
    """SYMLINK's arguments in the order that this server reads. May ask it, once; raises ConnectionLost."""
    if session.link_path_first is None:
        target_first = session.meta.request(wire.SYMLINK, wire.symlink_body(_THERE, _NOWHERE))
        path_first = session.meta.request(wire.SYMLINK, wire.symlink_body(_NOWHERE, _THERE))
        refused = (_is_no_such_file(target_first), _is_no_such_file(path_first))
        if refused[0] == refused[1]:  # it makes no links at all, or nobody can tell: as most do
            return wire.symlink_body(target, path)
        session.link_path_first = refused[1]
    return wire.symlink_body(path, target) if session.link_path_first else wire.symlink_body(target, path)


def _is_no_such_file(asked: Pending) -> bool:
    try:
        asked.wait().expect_ok()
    except StatusError as status:
        return status.code == FX_NO_SUCH_FILE
    return False


def _may_follow(session: Session) -> bool:
    return not session.tells_links and LSETSTAT not in session.extensions


class Look:
    """LSTAT of a path, sent when this is made, and believed once it is known that the server tells links.

    ``is_followed``, behind ``attrs()``: it is a link, and LSTAT showed what it leads to.
    """

    def __init__(self, session: Session, path: bytes) -> None:
        self._session = session
        self._path = wire.string(path)
        self.is_followed = False
        self._looking = session.meta.request(wire.LSTAT, self._path)
        self._reading = session.meta.request(wire.READLINK, self._path) if _may_follow(session) else None

    def attrs(self) -> Attrs:
        """Wait for them. Raises StatusError, ConnectionLost."""
        attrs = self._looking.wait().attrs()
        if self._reading is None:
            return attrs
        if stat.S_ISLNK(attrs.mode or 0):
            self._is_it_known_to_lead_somewhere()
            return attrs
        try:
            names = self._reading.wait().names()
        except StatusError:
            return attrs
        if not names:
            return attrs
        self.is_followed = True
        return attrs._replace(mode=stat.S_IFLNK | 0o777, size=len(names[0].name))

    def _is_it_known_to_lead_somewhere(self) -> None:
        """If so, the server does not follow links."""

        def found(pending: Pending) -> None:
            try:
                pending.attrs()
            except (StatusError, ConnectionLost):
                return
            self._session.tells_links = True

        self._session.meta.request(wire.STAT, self._path, callback=found, is_awaited=False)


def followed(session: Session, *paths: bytes) -> List[bool]:
    """Of each path whether it is a symbolic link, and the server follows it where it should not. Raises ConnectionLost."""
    if not _may_follow(session):
        return [False] * len(paths)
    return [_is_followed(look) for look in [Look(session, path) for path in paths]]


def _is_followed(look: Look) -> bool:
    try:
        look.attrs()
    except StatusError:
        return False
    return look.is_followed


def must_keep(session: Session, path: bytes) -> None:
    """Raise FsError (ENOTSUP) where opening ``path`` for writing would empty it. Raises StatusError, ConnectionLost."""
    if session.keeps_opened or FSYNC in session.extensions:
        return
    try:
        if not session.meta.request(wire.LSTAT, wire.string(path)).wait().attrs().size:
            return  # nothing to lose
    except StatusError:
        return  # nothing there, or the server says to the OPEN what there is to say
    if not keeps_opened(session, path):
        raise FsError(errno.ENOTSUP, "the server empties a file that is opened for writing")


def keeps_opened(session: Session, path: bytes) -> bool:
    """True where opening a file for writing leaves what is in it; tried beside ``path``, once. Raises as ``must_keep``."""
    if session.keeps_opened is None:
        session.keeps_opened = _keeps_opened(session, os.path.dirname(path))
    return session.keeps_opened


def _keeps_opened(session: Session, directory: bytes) -> bool:
    lane = session.meta
    path = os.path.join(directory, b".sftpmount-%s" % uuid.uuid4().hex.encode())
    pflags = wire.FXF_READ | wire.FXF_WRITE
    first = wire.open_body(path, pflags | wire.FXF_CREAT | wire.FXF_TRUNC | wire.FXF_EXCL, Attrs(mode=0o600))
    handle = wire.string(lane.request(wire.OPEN, first).wait().handle())
    try:
        lane.request(wire.WRITE, handle + bytes(8) + wire.string(b"x")).wait().expect_ok()
        # Such a server writes files behind the CLOSE, and while it does it would seem to keep this one. But neither can it read
        # through a handle for both.
        reads = _reads(lane.request(wire.READ, handle + bytes(8) + (1).to_bytes(4, "big")))
        lane.request(wire.CLOSE, handle).wait().expect_ok()
        handle = wire.string(lane.request(wire.OPEN, wire.open_body(path, wire.FXF_WRITE)).wait().handle())
        kept = lane.request(wire.FSTAT, handle).wait().attrs().size == 1
        lane.request(wire.CLOSE, handle).wait()
        return kept and reads
    finally:
        lane.request(wire.REMOVE, wire.string(path)).wait()


def _reads(reading: Pending) -> bool:
    try:
        return reading.wait().data() == b"x"
    except StatusError:
        return False


def must_be_absent(session: Session, path: bytes) -> None:
    """Raise FsError (EEXIST) where the name is taken and EXCL may be ignored. Raises ConnectionLost."""
    if session.is_exclusive or FSYNC in session.extensions:
        return
    try:
        session.meta.request(wire.LSTAT, wire.string(path)).wait().attrs()
    except StatusError:
        return
    raise FsError(errno.EEXIST)


def made_exclusively(session: Session, path: bytes) -> None:
    """``path`` was made with EXCL just now, and is empty: is it refused to make it again? Raises ConnectionLost."""
    if session.is_exclusive is not None or FSYNC in session.extensions:
        return
    lane = session.meta
    again = wire.open_body(path, wire.FXF_WRITE | wire.FXF_CREAT | wire.FXF_EXCL)
    try:
        handle = lane.request(wire.OPEN, again).wait().handle()
    except StatusError:
        session.is_exclusive = True
        return
    session.is_exclusive = False
    lane.request(wire.CLOSE, wire.string(handle)).wait()
