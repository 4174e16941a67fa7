"""Attributes as they are shown, and as programs change them."""

from __future__ import annotations

import errno
import stat
from typing import Callable, NamedTuple, Optional, Tuple

from ..cache.blocks import FileCache
from ..cache.namespace import Namespace
from ..cache.node import Node
from ..errors import FsError
from ..sftp.remote import Remote
from ..sftp.wire import Attrs
from .files import Files
from .handles import Stat
from .owed import OwedAttrs, may_wait

Ids = Tuple[int, int]  # of a user and a group


class Owners(NamedTuple):
    """Whose id on the server is shown as whose on this machine (idmap=user); the others are the same here and there."""

    local: Ids = (-1, -1)
    far: Tuple[Optional[int], Optional[int]] = (None, None)

    def to_local(self, uid: int, gid: int) -> Ids:
        """The server's ids as they are shown."""
        return (
            self.local[0] if uid == self.far[0] else uid,
            self.local[1] if gid == self.far[1] else gid,
        )

    def to_far(self, uid: int, gid: int) -> Ids:
        """A program's ids as the server has them; -1, which leaves one as it is, stays."""
        far_uid, far_gid = self.far
        return (
            far_uid if uid == self.local[0] and far_uid is not None else uid,
            far_gid if gid == self.local[1] and far_gid is not None else gid,
        )


class Attributes:
    """The attributes of a mount's files. Thread-safe. Every method raises FsError and nothing else."""

    def __init__(
        self,
        remote: Remote,
        names: Namespace,
        files: Files,
        owed: OwedAttrs,
        *,
        look_up: Callable[[bytes], Node],
        far_path: Callable[[bytes], bytes],
    ) -> None:
        self._remote = remote
        self._ns = names
        self._files = files
        self._owed = owed
        self._look_up = look_up
        self._far_path = far_path
        self.owners = Owners()

    def shown(self, node: Node) -> Stat:
        """The attributes to show: ours while they are right and the server's are not."""
        attrs = node.attrs
        size, mtime = attrs.size or 0, attrs.mtime or 0
        file: Optional[FileCache] = node.file
        if file is not None and file.authoritative:
            size = file.size
            mtime = mtime if file.mtime is None else file.mtime
        return Stat(
            node.ino,
            node.mode,
            self._ns.link_count(node),
            *self.owners.to_local(attrs.uid or 0, attrs.gid or 0),
            size,
            mtime if attrs.atime is None else attrs.atime,
            mtime,
        )

    def chmod(self, path: bytes, mode: int) -> Node:
        """Change permission bits."""
        node = self._look_up(path)
        if stat.S_IMODE(node.mode) == stat.S_IMODE(mode) and self._ns.is_ours(node):
            return node
        self._set_attrs(path, node, Attrs(mode=stat.S_IMODE(mode)))
        file: Optional[FileCache] = node.file
        if file is not None:
            with file.lock:
                for handle in file.handles:
                    handle.remote.mode = stat.S_IMODE(mode)
        return node

    def chown(self, path: bytes, uid: int, gid: int) -> Node:
        """Change owner and group; -1 leaves one as it is. SFTP carries only the pair."""
        node = self._look_up(path)
        uid, gid = self.owners.to_far(uid, gid)
        attrs = Attrs(
            uid=node.attrs.uid if uid == -1 else uid,
            gid=node.attrs.gid if gid == -1 else gid,
        )
        if attrs.uid is None or attrs.gid is None:
            raise FsError(errno.EPERM)
        has_special_bits = bool(node.mode & (stat.S_ISUID | stat.S_ISGID))
        if attrs == Attrs(uid=node.attrs.uid, gid=node.attrs.gid) and not has_special_bits:
            if self._ns.is_ours(node) or node.is_symlink:  # whose owner some servers cannot change
                return node
        self._owed.settle(node)  # before it is another's
        self._set_attrs(path, node, attrs)
        node.ours = False
        if not node.is_symlink:
            self._ns.distrust(node)  # the server may have cleared set-id bits
        return node

    def utimens(self, path: bytes, atime: Optional[int], mtime: Optional[int]) -> Node:
        """Set times in whole seconds, as SFTP v3 carries them; None leaves one as it is."""
        node = self._look_up(path)
        if atime is None and mtime is None:
            return node
        if atime is None or mtime is None:
            known = node.attrs
            file: Optional[FileCache] = node.file
            if known.mtime is None or (file is not None and file.authoritative):
                self._files.store(node)
                known = self._remote.lstat(self._far_path(path))
            atime = known.atime if atime is None else atime
            mtime = known.mtime if mtime is None else mtime
        attrs = Attrs(atime=atime, mtime=mtime)
        with node.operation:
            self._set_attrs(path, node, attrs)
            self._files.times_are_set(node, mtime)
        return node

    def _set_attrs(self, path: bytes, node: Node, attrs: Attrs) -> None:
        if node.is_dir and (attrs.uid is not None or not may_wait(node, attrs)):
            self._owed.pay(*self._owed.below(path))  # before it may be forbidden
        with node.operation:
            # A write that arrives after a chmod may be refused, one after a utimens changes the time again.
            self._files.store(node)
            if attrs.mtime is not None:
                self._files.times_will_be_set(node)
            if attrs.uid is not None or not self._owed.take(node, attrs):
                self._owed.settle(node)
                self._remote.setstat(self._far_path(path), attrs, is_symlink=node.is_symlink)
            if attrs.mode is not None:
                attrs = attrs._replace(mode=stat.S_IFMT(node.mode) | attrs.mode)
            self._ns.set_attrs(node, attrs)
