"""Which errno hides behind a status: OpenSSH says "failure" for ENOSPC, EDQUOT, EEXIST, ENOTEMPTY, EXDEV, EROFS and EIO.

The server is asked what stands in the way, as a person would: is the target there, is it a directory, is anything in it,
is the disk full or read-only? The answer can be a moment late, so it only ever chooses among errnos, never turns a failure
into a success. The idea of asking statvfs is restic's.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Optional, Sequence

from ..errors import (
    FX_BAD_MESSAGE,
    FX_FAILURE,
    FX_NO_SUCH_FILE,
    FX_OP_UNSUPPORTED,
    FX_PERMISSION_DENIED,
    StatusError,
)
from . import wire
from .session import Session

# What a full file system leaves to be written by nobody: less than one block.
_NAME_BYTES_MAX = 255
_PATH_BYTES_MAX = 4095


def errno_for(session: Session, what: str, status: StatusError, paths: Sequence[bytes]) -> int:
    """The errno for ``status`` of operation ``what`` on ``paths``; may ask the server; raises ConnectionLost only."""
    if status.code in (FX_BAD_MESSAGE, FX_FAILURE) and any(_too_long(path) for path in paths):
        return errno.ENAMETOOLONG
    if status.code == FX_PERMISSION_DENIED and what == "setstat":
        return errno.EPERM  # what a local chmod, chown or utimes by someone else gets
    if status.code == FX_PERMISSION_DENIED and what == "link" and stat.S_ISDIR(_mode(session, paths[0]) or 0):
        return errno.EPERM
    if status.code == FX_OP_UNSUPPORTED and what == "setstat":
        return errno.EPERM
    if (
        status.code == FX_NO_SUCH_FILE
        and what in ("rmdir", "listdir")
        and _mode(session, paths[-1]) is not None
    ):
        return errno.ENOTDIR  # OpenSSH says NO_SUCH_FILE for both
    if status.code == FX_OP_UNSUPPORTED and what == "rename":  # ProFTPD's word for EINVAL
        return _rename_failure(session, paths[0], paths[-1], _mode(session, paths[-1])) or errno.ENOTSUP
    if status.code == FX_NO_SUCH_FILE and what == "rename":
        return _rename_failure(session, paths[0], paths[-1], _mode(session, paths[-1])) or errno.ENOENT
    if not status.is_bare_failure:
        return status.errno
    return _named_failure(session, what, paths) or _disk_failure(session, paths) or errno.EIO


def _too_long(path: bytes) -> bool:
    return len(path) > _PATH_BYTES_MAX or any(len(name) > _NAME_BYTES_MAX for name in path.split(b"/"))


def _named_failure(session: Session, what: str, paths: Sequence[bytes]) -> Optional[int]:
    """What the names themselves say."""
    mode = _mode(session, paths[-1])
    if what in ("mkdir", "create exclusively", "symlink", "link") and mode is not None:
        return errno.EEXIST
    if what in ("open", "create") and mode is not None and stat.S_ISDIR(mode):
        return errno.EISDIR
    if what == "unlink" and mode is not None and stat.S_ISDIR(mode):
        return errno.EISDIR
    if what == "rmdir" and mode is not None and not stat.S_ISDIR(mode):
        return errno.ENOTDIR
    if what == "rmdir" and mode is not None:
        # An empty one on a read-only disk is refused with the same word.
        return errno.EROFS if _is_read_only(_statvfs(session, paths[-1])) else errno.ENOTEMPTY
    if what == "rename":
        return _rename_failure(session, paths[0], paths[-1], mode)
    return None


def _rename_failure(session: Session, old: bytes, new: bytes, target: Optional[int]) -> Optional[int]:
    source = _mode(session, old)
    if source is None:
        return errno.ENOENT
    if stat.S_ISDIR(source) and (new + b"/").startswith(old + b"/"):
        return errno.EINVAL
    if target is not None:
        if stat.S_ISDIR(target):
            return errno.ENOTEMPTY if stat.S_ISDIR(source) else errno.EISDIR
        if stat.S_ISDIR(source):
            return errno.ENOTDIR
    there, here = _statvfs(session, os.path.dirname(new)), _statvfs(session, os.path.dirname(old))
    if there is not None and here is not None and there.fsid != here.fsid:
        return errno.EXDEV
    return None


def _disk_failure(session: Session, paths: Sequence[bytes]) -> Optional[int]:
    """What the file system says: read-only, full of bytes, full of inodes."""
    for path in (paths[-1], os.path.dirname(paths[-1])):
        disk = _statvfs(session, path)
        if disk is None:
            continue
        if _is_read_only(disk):
            return errno.EROFS
        # Where another writer frees a little meanwhile the file system is still full to everyone who writes blocks.
        if disk.bavail * max(disk.frsize, 1) < 1 << 20 or (disk.files and not disk.favail):
            return errno.ENOSPC
        return None
    return None


def _is_read_only(disk: Optional[wire.StatVfs]) -> bool:
    return disk is not None and bool(disk.flag & wire.STATVFS_READ_ONLY)


def _mode(session: Session, path: bytes) -> Optional[int]:
    try:
        return session.meta.request(wire.LSTAT, wire.string(path)).wait().attrs().mode
    except StatusError:
        return None


def _statvfs(session: Session, path: bytes) -> Optional[wire.StatVfs]:
    name = b"statvfs@openssh.com"
    if name not in session.extensions:
        return None
    try:
        return (
            session.meta.request(wire.EXTENDED, wire.extended_body(name, wire.string(path))).wait().statvfs()
        )
    except StatusError:
        return None
