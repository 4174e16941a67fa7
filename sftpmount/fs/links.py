"""Symbolic links, and where those of the server lead on this machine.

The kernel follows a link from where it stands on the mount, an absolute one from this machine's root. A server can so lead
whoever reads or writes through the mount to any file here; only what is left inside the mount is its own.
"""

from __future__ import annotations

import errno
import logging
from typing import Callable, Optional, Set, Tuple

from ..cache.node import Node
from ..errors import FsError
from ..sftp.remote import Remote

log = logging.getLogger(__name__)

LINKS_TOLD_MAX = 100
TARGET_BYTES_MAX = 4095  # PATH_MAX less the NUL


class Links:
    """The symbolic links of a mount. ``root``, the mounted directory on the server, is set once it is known."""

    def __init__(
        self,
        remote: Remote,
        *,
        look_up: Callable[[bytes], Node],
        far_path: Callable[[bytes], bytes],
        contain: bool,
        transform: bool,
    ) -> None:
        self._remote = remote
        self._look_up = look_up
        self._far_path = far_path
        self._contain = contain
        self._transform = transform
        self._told: Set[Tuple[bytes, bytes]] = set()
        self.root = b""

    def readlink(self, path: bytes) -> bytes:
        """The target of a symbolic link: as it stands on the server, or as the options say."""
        target = self._target_of(path)
        if self._transform and target.startswith(b"/"):
            target = as_relative(self.root, path, target) or target
        if self._contain and leads_out(path, target):
            raise FsError(errno.EPERM)
        return target

    def _target_of(self, path: bytes) -> bytes:
        node = self._look_up(path)
        if node.target is None:
            target = self._remote.readlink(self._far_path(path))
            if not target or b"\0" in target:
                raise FsError(errno.EIO, "the server gave an impossible link target")
            if len(target) > TARGET_BYTES_MAX:
                raise FsError(errno.ENAMETOOLONG)  # cut, it would lead elsewhere
            node.target = target
            self._tell_of_link(path, target)
        return node.target

    def _tell_of_link(self, path: bytes, target: bytes) -> None:
        """The log names the links of the server's (not those that were made here) that lead somewhere else."""
        told, told_max = self._told, LINKS_TOLD_MAX
        if not leads_out(path, target) or len(told) >= told_max or (path, target) in told:
            return
        told.add((path, target))
        log.warning(
            "the link %r leads out of the mount, to %r on this machine (contain_symlinks refuses such)%s",
            path,
            target,
            "; further ones are not named" if len(told) == told_max else "",
        )


def leads_out(path: bytes, target: bytes) -> bool:
    """True unless a link at ``path`` of the mount to ``target`` is sure to stay on the mount.

    Only leading ``..`` can be counted: what comes before a later one may be a link itself.
    """
    if target.startswith(b"/"):
        return True
    names = [name for name in target.split(b"/") if name not in (b"", b".")]
    ups = 0
    while ups < len(names) and names[ups] == b"..":
        ups += 1
    return ups > _depth(path) or b".." in names[ups:]


def as_relative(root: bytes, path: bytes, target: bytes) -> Optional[bytes]:
    """The relative target by which a link at ``path`` leads to what ``target``, absolute on the server, means there.

    None where that is not below ``root``, the mounted directory.
    """
    inside = root.rstrip(b"/") + b"/"
    if not (target + b"/").startswith(inside) or b".." in target.split(b"/"):
        return None
    return (b"../" * _depth(path) + target[len(inside) :].lstrip(b"/")).rstrip(b"/") or b"."


def _depth(path: bytes) -> int:
    """How many directories a link at ``path`` is below the mount's root."""
    return path.count(b"/") - 1
