"""Files as they come to be open: opened, created, cut. What happens in them then is ``files``'.

An open asks the server for the file's attributes in the same flight; not where this mount has just made the file, or read it
ahead of the program.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Callable, Optional, Tuple

from ..cache.namespace import Absent, Namespace
from ..cache.node import Node
from ..cache.tree import split
from ..errors import FsError
from ..sftp import wire
from ..sftp.remote import Remote
from ..sftp.remote_file import RemoteFile
from ..sftp.wire import Attrs
from .files import Files
from .files_ahead import FilesAhead
from .handles import Handle, pflags_of
from .owed import OwedAttrs
from .removed import RemovedFiles

# So often is asked again what was overtaken by a change of ours.
LOOKS_AGAIN = 3


class Opening:
    """Opens files of one mount. Thread-safe; every method raises FsError."""

    def __init__(
        self,
        remote: Remote,
        names: Namespace,
        files: Files,
        files_ahead: FilesAhead,
        owed: OwedAttrs,
        removed: RemovedFiles,
        *,
        look_up: Callable[[bytes], Node],
        far_path: Callable[[bytes], bytes],
    ) -> None:
        self._remote = remote
        self._ns = names
        self._files = files
        self._files_ahead = files_ahead
        self._owed = owed
        self._removed = removed
        self._look_up = look_up
        self._far_path = far_path

    def truncate(self, path: Optional[bytes], size: int, handle: Optional[Handle] = None) -> Node:
        """Cut a file, or extend it with a hole, by path or by a handle that may write."""
        if handle is None:
            assert path is not None
            if self._look_up(path).is_dir:
                raise FsError(errno.EISDIR)
            # Through a handle, which keeps the cut until it is committed: a server that forgets it is told again.
            handle = self.open(path, os.O_WRONLY)
            try:
                node = self.truncate(None, size, handle)
                self._files.flush(handle)
            finally:
                self._files.release(handle)
            return node
        node = handle.node
        with node.operation:
            self._files.store(node)
            with self._files.truncating(node, size):
                losses = self._files.losses
                self._remote.fsetstat(handle.remote, Attrs(size=size))
                self._files.changed_size(node, size, losses)
        return node

    def open(self, path: bytes, flags: int) -> Handle:
        """Open an existing file. O_TRUNC empties it in the same request."""
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        pflags = pflags_of(flags)
        node = self._ns.get(path)
        losses = self._files.losses
        is_read = not writable and not pflags & wire.FXF_TRUNC
        if is_read and node is not None and self._removed.node_at(path) is None:
            if self._is_surely_ours(path, node):
                return self._files.attach_unopened(node, self._far_path(path), pflags)
            if self._files_ahead.is_at_hand(path, node):
                return self._files.attach_unopened(node, self._far_path(path), pflags, is_at_hand=True)
        self._owed.settle(node)
        if not pflags & wire.FXF_TRUNC:
            handle = self._open(path, pflags, writable)
        elif node is None:
            handle = self._open(path, pflags, writable)
            self._files.changed_size(handle.node, 0, losses)
        else:
            with node.operation:
                self._owed.settle(node)
                self._files.store(node)
                with self._files.truncating(node, 0):
                    handle = self._open(path, pflags, writable)
                    self._files.changed_size(handle.node, 0, losses)
        handle.appends = bool(flags & os.O_APPEND)
        return handle

    def _is_surely_ours(self, path: bytes, node: Node) -> bool:
        """True for a file that we made and may read, whose name the server need not be asked for just now."""
        try:
            is_there = self._ns.fresh(path) is node
        except Absent:
            return False
        return is_there and node.is_file and bool(node.mode & 0o400) and self._ns.is_ours(node)

    def _open(self, path: bytes, pflags: int, writable: bool) -> Handle:
        while True:
            mark, asked_s = self._ns.mark(), self._removed.now_s()
            try:
                remote, attrs = self._remote.open(self._far_path(path), pflags)
                break
            except FsError as error:
                if error.errno in (errno.ENOENT, errno.EACCES):
                    self._ns.distrust_path(path)
                if error.errno != errno.ENOENT or not self._removed.may_be_replaced(path, asked_s):
                    raise
        node = self._removed.node_at(path)
        if node is None:
            node, attrs = self._told_by_open(path, remote, attrs, mark)
        return self._files.attach(node, remote, attrs, writable)

    def _told_by_open(self, path: bytes, remote: RemoteFile, attrs: Attrs, mark: int) -> Tuple[Node, Attrs]:
        """The node of what was just opened, and what the server says of it: again where we changed something meanwhile."""
        node = self._ns.told(path, attrs, mark)
        for _ in range(LOOKS_AGAIN):
            if self._ns.is_as_of(node, mark):
                break
            mark = self._ns.mark()
            try:
                attrs = self._remote.fstat(remote)
            except BaseException:
                self._remote.close_file(remote)
                raise
            node = self._ns.told(path, attrs, mark)
        return node, attrs

    def create(self, path: bytes, flags: int, mode: int) -> Handle:
        """Create and open a file; with O_EXCL it fails with EEXIST where the name is taken."""
        pflags = pflags_of(flags) | wire.FXF_CREAT | (wire.FXF_EXCL if flags & os.O_EXCL else 0)
        self._owed.pay(self._ns.get(split(path)[0]))
        self._owed.settle(self._ns.get(path))
        losses = self._files.losses
        try:
            remote, attrs = self._remote.open(self._far_path(path), pflags, Attrs(mode=stat.S_IMODE(mode)))
        except FsError:
            self._ns.distrust_path(path)
            raise
        node = self._ns.created(path, attrs)
        node.ours = bool(pflags & wire.FXF_EXCL)
        handle = self._files.attach(node, remote, attrs, flags & os.O_ACCMODE != os.O_RDONLY)
        if pflags & wire.FXF_TRUNC and not pflags & wire.FXF_EXCL:
            self._files.changed_size(node, 0, losses)  # it may have been there after all
        remote.mode = None if attrs.mode is None else stat.S_IMODE(attrs.mode)
        handle.appends = bool(flags & os.O_APPEND)
        return handle
