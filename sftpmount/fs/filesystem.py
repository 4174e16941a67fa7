"""The semantics of a local folder over a remote: every file operation, no FUSE in it.

Paths are bytes that begin with a slash, the mount's root being b"/". Every method raises FsError and nothing else.

Close-to-open: an open asks the server for the file's attributes in the same flight, and clean bytes are kept only where
size and mtime are those they came with. Attributes and listings may be ``dir_cache_timeout_s`` old otherwise; O_EXCL, mkdir,
rename and unlink always go to the server. What this mount writes it sees at once, through every name and handle.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
import threading
import time
from typing import Callable, Dict, List, Optional, Tuple

from ..cache.blocks import CleanBlocks, FileCache
from ..cache.fetch import Fetcher
from ..cache.namespace import Absent, Namespace, Node
from ..cache.readahead import Pattern
from ..cache.writeback import WriteBack
from ..errors import FsError, RemoteDirectoryError
from ..sftp import wire
from ..sftp.remote import FSYNC, HARDLINK, POSIX_RENAME, STATVFS, Remote
from ..sftp.remote_file import RemoteFile
from ..sftp.wire import Attrs
from .handles import Handle, Stat, pflags_of
from .removed import RemovedFiles, is_libfuse_name

log = logging.getLogger(__name__)

# Two seconds: SFTP v3 times are whole seconds, so what was written within the second of a look cannot be told from it.
RACY_S = 2

# What libfuse shows for an inode number that nobody asked for; 0 would make readdir(3) skip the name.
UNKNOWN_INO = 0xFFFFFFFF


class Filesystem:
    """One mounted directory. Thread-safe."""

    def __init__(
        self,
        remote: Remote,
        root: bytes,
        *,
        commit: str = "close",
        dir_cache_timeout_s: float = 20.0,
        entries_max: int = 200_000,
        cache_bytes_max: int = 64 << 20,
        dirty_bytes_max: int = 64 << 20,
        read_ahead_bytes_max: int = 8 << 20,
        idmap_user: bool = False,
        local_uid: Optional[int] = None,
        local_gid: Optional[int] = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._remote = remote
        self._root = root
        self._commit_on_close = commit == "close"
        self.lifetime_s = dir_cache_timeout_s
        self._entries_max = entries_max
        self._read_ahead_bytes_max = min(read_ahead_bytes_max, cache_bytes_max // 4)
        self._idmap_user = idmap_user
        self._local = (
            os.getuid() if local_uid is None else local_uid,
            os.getgid() if local_gid is None else local_gid,
        )
        self._far: Tuple[Optional[int], Optional[int]] = (None, None)
        self._clock = clock
        self._wall = wall
        self._clean = CleanBlocks(cache_bytes_max)
        self._fetcher = Fetcher(remote, self._clean)
        self.writeback = WriteBack(remote, dirty_bytes_max=dirty_bytes_max, clock=clock)
        self._file_ids = itertools.count(1)
        self._names: Optional[Namespace] = None
        self._releasing = threading.Lock()  # guards _release_threads
        self._release_threads: List[threading.Thread] = []
        self.not_stored: List[str] = []  # "path: reason" of what nobody could be told about
        self._removed = RemovedFiles(remote, root)
        remote.on_lost = self.writeback.lost

    # -- life -----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Find the remote directory; raises RemoteDirectoryError with a sentence."""
        shown = (
            os.fsdecode(self._root or b"~")
            .encode("unicode_escape", "surrogateescape")
            .decode("ascii", "replace")
        )
        try:
            self._root = self._remote.realpath(self._root or b".")
            attrs = self._remote.stat(self._root)
            if not stat.S_ISDIR(attrs.mode or stat.S_IFDIR):
                raise RemoteDirectoryError(
                    f"{shown} on the server is not a directory; name a directory to mount."
                )
            if self._idmap_user:
                home = self._remote.stat(b".")
                self._far = (home.uid, home.gid)
        except FsError as error:
            raise RemoteDirectoryError(
                f"The directory {shown} cannot be mounted: the server says {error.strerror!r}; "
                "create it there, or check its name and permissions."
            ) from None
        self._removed = RemovedFiles(self._remote, self._root)
        if attrs.mode is None:
            attrs = attrs._replace(mode=stat.S_IFDIR | 0o755)
        self._names = Namespace(
            attrs,
            lifetime_s=self.lifetime_s,
            entries_max=self._entries_max,
            clock=self._clock,
            wall=self._wall,
        )
        if not self._remote.has(FSYNC):
            log.warning(
                "this server has no fsync@openssh.com: stored means received by the server, not written to its disk"
            )

    def describe(self) -> Dict[str, object]:
        """Facts for the log and for status: the directory, durability, and what the server lacks."""
        extensions = self._remote.session().extensions
        return {
            "directory": self._root.decode("utf-8", "replace"),
            "fsync": FSYNC in extensions,
            "missing": [
                name.decode() for name in (FSYNC, POSIX_RENAME, HARDLINK, STATVFS) if name not in extensions
            ],
        }

    def drain(self) -> List[str]:
        """Store everything still held. Returns "path: reason" for each file that could not be stored."""
        while True:
            with self._releasing:
                thread = self._release_threads[0] if self._release_threads else None
            if thread is None:
                break
            thread.join()
        lost = list(self.not_stored)
        for node in self._ns.open_nodes():
            if node.file is None or not node.file.unsafe:
                continue
            try:
                self.writeback.flush(node.file, commit=True)
            except FsError as error:
                path = self._ns.path_of(node) or b"(removed)"
                lost.append(f"{path.decode('utf-8', 'backslashreplace')}: {error.strerror}")
        return lost

    def close(self) -> None:
        """Stop the background work. What was not drained is given up."""
        self.writeback.close()

    @property
    def _ns(self) -> Namespace:
        assert self._names is not None, "start() comes first"
        return self._names

    def _far_path(self, path: bytes) -> bytes:
        if path == b"/":
            return self._root
        place = self._removed.place_of(path)
        if place is not None:
            return place
        return (b"" if self._root == b"/" else self._root) + path

    # -- looking ------------------------------------------------------------------------------------------------------

    def getattr(self, path: Optional[bytes], handle: Optional[Handle] = None) -> Stat:
        """Attributes of ``path``, or of an open handle (whose name may be gone)."""
        if handle is not None:
            path = self._ns.path_of(handle.node)
            if path is None:
                return self.stat_of(handle.node)
        assert path is not None
        if self._removed.node_at(path) is not None:
            # libfuse takes one off the link count of what it has hidden, being used to a name that is still there.
            shown = self.stat_of(self._look_up(path))
            return shown._replace(nlink=shown.nlink + 1)
        return self.stat_of(self._look_up(path))

    def _look_up(self, path: bytes) -> Node:
        removed = self._removed.node_at(path)
        if removed is not None:
            return removed
        while True:
            asked_s = self._removed.now_s()
            try:
                return self._known_or_asked(path)
            except FsError as error:
                if error.errno != errno.ENOENT or not self._removed.may_be_replaced(path, asked_s):
                    raise

    def _known_or_asked(self, path: bytes) -> Node:
        try:
            node = self._ns.fresh(path)
        except Absent:
            raise FsError(errno.ENOENT) from None
        return node if node is not None else self._ask(path)

    def _ask(self, path: bytes) -> Node:
        mark = self._ns.mark()
        try:
            attrs = self._remote.lstat(self._far_path(path))
        except FsError as error:
            if error.errno == errno.ENOENT and path != b"/":
                self._ns.told_absent(path, mark)
            raise
        node = self._ns.told(path, attrs, mark)
        self._revalidate(node)
        return node

    def stat_of(self, node: Node) -> Stat:
        """The attributes to show: ours while they are right and the server's are not."""
        attrs = node.attrs
        size, mtime = attrs.size or 0, attrs.mtime or 0
        file: Optional[FileCache] = node.file
        if file is not None and file.authoritative:
            size = file.size
            mtime = mtime if file.mtime is None else file.mtime
        uid, gid = attrs.uid or 0, attrs.gid or 0
        if self._idmap_user:
            uid = self._local[0] if uid == self._far[0] else uid
            gid = self._local[1] if gid == self._far[1] else gid
        return Stat(
            node.ino,
            node.mode,
            self._ns.link_count(node),
            uid,
            gid,
            size,
            mtime if attrs.atime is None else attrs.atime,
            mtime,
        )

    def readdir(self, path: bytes) -> List[Tuple[bytes, int, int]]:
        """Every name of a directory as ``(name, ino, mode)``; mode 0 where the server did not tell the type.

        Always asks the server: programs look for each other's lock files this way, and a listing of some seconds ago would
        hide one. What it brings is what answers for the single names until it is too old.
        """
        for _ in range(3):  # we changed something in it while the server was listing it: once more
            mark = self._ns.mark()
            entries = self._remote.listdir(self._far_path(path))
            if self._ns.told_listing(path, entries, mark):
                break
        listing = self._ns.listing(path)
        if listing is None:
            found = [(entry.name, UNKNOWN_INO, entry.attrs.mode or 0) for entry in entries]
        else:
            found = [(name, node.ino, node.mode) for name, node in listing]
        gone = self._removed.names_in_root() if path == b"/" else ()
        return [entry for entry in found if entry[0] not in gone] if gone else found

    def readlink(self, path: bytes) -> bytes:
        """The target of a symbolic link, as it stands on the server."""
        node = self._look_up(path)
        if node.target is None:
            target = self._remote.readlink(self._far_path(path))
            if b"\0" in target:
                raise FsError(errno.EIO, "the server gave an impossible link target")
            node.target = target
        return node.target

    def access(self, path: bytes, mode: int) -> None:
        """Only what attributes can tell: nobody may execute a file that has no x bit. The rest is the server's to judge."""
        if mode & os.X_OK:
            node = self._look_up(path)
            if stat.S_ISREG(node.mode) and not node.mode & 0o111:
                raise FsError(errno.EACCES)

    def statfs(self) -> wire.StatVfs:
        """Space and inodes of the remote directory's file system; ENOSYS where the server cannot tell."""
        try:
            return self._remote.statvfs(self._root)
        except FsError as error:
            raise FsError(
                errno.ENOSYS if error.errno == errno.ENOTSUP else error.errno or errno.EIO
            ) from None

    # -- changing the namespace ---------------------------------------------------------------------------------------

    def mkdir(self, path: bytes, mode: int) -> None:
        """Create a directory."""
        self._fresh_on_error(path, lambda: self._remote.mkdir(self._far_path(path), mode))
        self._ns.created(path, self._remote.lstat(self._far_path(path)), complete=True)

    def mknod(self, path: bytes, mode: int) -> None:
        """Create a regular file; other types have no place in SFTP (EPERM, as where a file system lacks them)."""
        if not stat.S_ISREG(mode) and stat.S_IFMT(mode):
            raise FsError(errno.EPERM)
        self.release(self.create(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))

    def unlink(self, path: bytes) -> Optional[Node]:
        """Remove a file's or a symlink's name; returns the node where it may have other names still."""
        if self._removed.forget(path):
            return None
        node = self._ns.get(path)
        self._fresh_on_error(path, lambda: self._remote.unlink(self._far_path(path)))
        self._ns.removed(path)
        if node is not None:
            self._ns.distrust(node)  # its link count has changed, if it has others
            self._rename_open(node)
            if not node.pins and not node.links and node.file is not None:
                with node.file.lock:
                    node.file.distrust()
        return node

    def rmdir(self, path: bytes) -> None:
        """Remove an empty directory."""
        self._fresh_on_error(path, lambda: self._remote.rmdir(self._far_path(path)))
        self._ns.removed(path)

    def rename(self, old: bytes, new: bytes) -> None:
        """Rename, replacing what is there as POSIX says: a file by a file, an empty directory by a directory."""
        if old == new:
            self._look_up(old)
            return
        moving = self._ns.get(old)
        if is_libfuse_name(new) and moving is not None and not moving.is_dir:
            self._removed.remove(self._ns, moving, self._far_path(old), old, self._far_path(new), new)
            return
        if self._removed.is_replacing_itself(new, moving):
            self.link(old, new)
            return
        self._removed.rename_begins(new)
        try:
            self._remote.rename(self._far_path(old), self._far_path(new), moving.attrs if moving else None)
            replaced = self._ns.get(new)
            self._ns.renamed(old, new)
        except FsError:
            self._ns.distrust_path(old)
            self._ns.distrust_path(new)
            raise
        finally:
            self._removed.rename_ends(new)
        if replaced is not None and replaced.file is not None and not replaced.links:
            with replaced.file.lock:
                replaced.file.distrust()
                for handle in replaced.file.handles:
                    handle.remote.path = b""  # the name leads to another file now
        self._removed.directory_renamed(old, new)
        for node in self._ns.open_nodes(new):
            self._rename_open(node)

    def _rename_open(self, node: Node) -> None:
        path = self._ns.path_of(node)
        if path is not None and node.file is not None:
            with node.file.lock:
                for handle in node.file.handles:
                    handle.remote.path = self._far_path(path)

    def link(self, old: bytes, new: bytes) -> Node:
        """Create a hard link: both names are one file here, with one inode number and one link count."""
        node = self._look_up(old)
        self._fresh_on_error(new, lambda: self._remote.link(self._far_path(old), self._far_path(new)))
        self._ns.linked(node, new)
        return node

    def symlink(self, target: bytes, path: bytes) -> None:
        """Create a symbolic link at ``path``; the target is stored as given."""
        self._fresh_on_error(path, lambda: self._remote.symlink(target, self._far_path(path)))
        node = self._ns.created(path, self._remote.lstat(self._far_path(path)))
        node.target = target

    def _fresh_on_error(self, path: bytes, act: Callable[[], None]) -> None:
        try:
            act()
        except FsError:
            self._ns.distrust_path(path)
            raise

    # -- attributes ---------------------------------------------------------------------------------------------------

    def chmod(self, path: bytes, mode: int) -> Node:
        """Change permission bits."""
        node = self._look_up(path)
        self._set_attrs(path, node, Attrs(mode=stat.S_IMODE(mode)))
        self._ns.set_attrs(node, Attrs(mode=stat.S_IFMT(node.mode) | stat.S_IMODE(mode)))
        if node.file is not None:
            with node.file.lock:
                for handle in node.file.handles:
                    handle.remote.mode = stat.S_IMODE(mode)
        return node

    def chown(self, path: bytes, uid: int, gid: int) -> Node:
        """Change owner and group; -1 leaves one as it is. SFTP carries only the pair."""
        node = self._look_up(path)
        if self._idmap_user:
            uid = self._far[0] if uid == self._local[0] and self._far[0] is not None else uid
            gid = self._far[1] if gid == self._local[1] and self._far[1] is not None else gid
        attrs = Attrs(
            uid=node.attrs.uid if uid == -1 else uid,
            gid=node.attrs.gid if gid == -1 else gid,
        )
        if attrs.uid is None or attrs.gid is None:
            raise FsError(errno.EPERM)
        self._set_attrs(path, node, attrs)
        self._ns.set_attrs(node, attrs)
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
            if known.mtime is None or (node.file is not None and node.file.authoritative):
                self._store(node)
                known = self._remote.lstat(self._far_path(path))
            atime = known.atime if atime is None else atime
            mtime = known.mtime if mtime is None else mtime
        attrs = Attrs(atime=atime, mtime=mtime)
        node.times_set = True
        self._set_attrs(path, node, attrs)
        self._ns.set_attrs(node, attrs)
        if node.file is not None:
            with node.file.lock:
                if node.file.validator is not None:
                    node.file.is_now((node.file.validator[0], mtime))
                node.file.committed_mtime = 0  # it may be set to the past
        return node

    def _set_attrs(self, path: bytes, node: Node, attrs: Attrs) -> None:
        with node.operation:
            # A write that arrives after a chmod may be refused, one after a utimens changes the time again.
            self._store(node)
            self._remote.setstat(self._far_path(path), attrs, is_symlink=node.is_symlink)

    def truncate(self, path: Optional[bytes], size: int, handle: Optional[Handle] = None) -> Node:
        """Cut a file, or extend it with a hole, by path or by a handle that may write."""
        if handle is not None:
            node = handle.node
        else:
            assert path is not None
            node = self._look_up(path)
            if node.is_dir:
                raise FsError(errno.EISDIR)
        with node.operation:
            self._store(node)
            if node.file is not None:
                node.file.growing_to = size
            if handle is not None:
                self._remote.fsetstat(handle.remote, Attrs(size=size))
            else:
                assert path is not None
                self._remote.setstat(self._far_path(path), Attrs(size=size))
            self._changed_size(node, size)
        return node

    def _changed_size(self, node: Node, size: int) -> None:
        if node.file is not None:
            can_commit = self._remote.has(FSYNC)
            with node.file.lock:
                node.file.truncate(size)
                node.file.growing_to = 0
                if not can_commit or not node.file.writers:
                    node.file.forget_cut()
                node.file.is_now(None)
                node.file.sent = True
                node.file.mtime = None
            self.writeback.account(node.file)
        self._ns.set_attrs(node, Attrs(size=size, mtime=int(self._wall())))
        if node.file is None or not node.file.writers:
            self._ns.distrust(node)  # the mtime is the server's to tell

    def _store(self, node: Node) -> None:
        """Send what is unsent of a node, and wait for it; where close would commit it, commit it.

        What is committed is never sent again, so the attributes that are set next stay as they are set.
        """
        if node.file is not None and node.file.unsafe:
            attrs = self.writeback.flush(node.file, commit=self._commit_on_close)
            if attrs is not None:
                self._stored(node, attrs)

    # -- files --------------------------------------------------------------------------------------------------------

    def open(self, path: bytes, flags: int) -> Handle:
        """Open an existing file. O_TRUNC empties it in the same request."""
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        pflags = pflags_of(flags)
        node = self._ns.get(path)
        if not pflags & wire.FXF_TRUNC:
            handle = self._open(path, pflags, writable)
        elif node is None:
            handle = self._open(path, pflags, writable)
            self._changed_size(handle.node, 0)
        else:
            with node.operation:
                self._store(node)
                handle = self._open(path, pflags, writable)
                self._changed_size(handle.node, 0)
        handle.appends = bool(flags & os.O_APPEND)
        return handle

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
        node = self._removed.node_at(path) or self._ns.told(path, attrs, mark)
        return self._attach(node, remote, attrs, writable)

    def create(self, path: bytes, flags: int, mode: int) -> Handle:
        """Create and open a file; with O_EXCL it fails with EEXIST where the name is taken."""
        pflags = pflags_of(flags) | wire.FXF_CREAT | (wire.FXF_EXCL if flags & os.O_EXCL else 0)
        try:
            remote, attrs = self._remote.open(self._far_path(path), pflags, Attrs(mode=stat.S_IMODE(mode)))
        except FsError:
            self._ns.distrust_path(path)
            raise
        node = self._ns.created(path, attrs)
        handle = self._attach(node, remote, attrs, flags & os.O_ACCMODE != os.O_RDONLY)
        if pflags & wire.FXF_TRUNC and not pflags & wire.FXF_EXCL:
            self._changed_size(node, 0)  # it may have been there after all
        remote.mode = None if attrs.mode is None else stat.S_IMODE(attrs.mode)
        handle.appends = bool(flags & os.O_APPEND)
        return handle

    def _attach(self, node: Node, remote: RemoteFile, attrs: Attrs, writable: bool) -> Handle:
        self._ns.pin(node)
        with node.operation:
            if node.file is None:
                node.file = FileCache(next(self._file_ids), attrs.size or 0, self._clean)
            file: FileCache = node.file
            trusted = self._revalidate(node)
            handle = Handle(node, file, remote, writable, Pattern(self._read_ahead_bytes_max))
            # The kernel caches each name of a hard link by itself: what was written through another is not in it.
            handle.trusted = trusted and not node.aliased
            with file.lock:
                remote.seen = file.validator
                file.handles.append(handle)
                if writable:
                    file.writers.append(remote)
        remote.verify = lambda now: self._verify_reopened(file, now)
        return handle

    def _revalidate(self, node: Node) -> bool:
        """The node's attributes are new: are the bytes we hold of it still true? Drops them where they may not be."""
        file: Optional[FileCache] = node.file
        attrs = node.attrs  # not the reply's: the namespace has sorted out which is newer
        if file is None:
            return False
        with file.lock:
            if file.authoritative or file.unsafe:
                return True  # ours are the newest
            now = (attrs.size, attrs.mtime)
            trusted = file.validator == now and (attrs.mtime or 0) < self._wall() - RACY_S
            if not trusted:
                file.distrust()
                file.size = attrs.size or 0
                file.validator = now
                file.sent = False
                file.committed_mtime = 0 if node.times_set else attrs.mtime or 0
            return trusted

    @staticmethod
    def _verify_reopened(file: FileCache, now: Attrs) -> None:
        """After a reconnect: the same file, as far as SFTP can tell."""
        with file.lock:
            if not file.may_be(now.size, now.mtime):
                raise FsError(errno.ESTALE, "another file has taken its name")

    def read(self, handle: Handle, size: int, offset: int) -> bytes:
        """At most ``size`` bytes at ``offset``, fewer only at the end of the file."""
        return self._fetcher.read(handle.file, handle.remote, handle.pattern, offset, size)

    def write(self, handle: Handle, data: bytes, offset: int) -> int:
        """Take ``data`` in; it is stored by close() or fsync() at the latest. Returns its length."""
        self.writeback.write(handle.file, handle, offset, data)
        handle.file.mtime = int(self._wall())
        return len(data)

    def append(self, handle: Handle, data: bytes) -> int:
        """Take ``data`` in at the end of the file, as this mount knows it."""
        with handle.node.operation:
            return self.write(handle, data, handle.file.size)

    def flush(self, handle: Handle) -> None:
        """close(2) of one descriptor: the point of truth, see ``WriteBack.flush``."""
        if handle.writable:
            self._flush(handle, commit=self._commit_on_close)

    def fsync(self, handle: Handle) -> None:
        """Everything written to this file, through whatever handle, is on the server's disk when this returns."""
        self._flush(handle, commit=True)

    def _flush(self, handle: Handle, *, commit: bool) -> None:
        node, file = handle.node, handle.file
        with node.operation:
            try:
                attrs = self.writeback.flush(file, commit=commit)
            except FsError:
                handle.owed = None  # told by this
                self._ns.distrust(node)
                raise
            if attrs is not None:
                self._stored(node, attrs)
            if attrs is not None and handle.writable and not self._remote.has(FSYNC):
                # Such servers may commit on CLOSE, and only then say that it failed (Go's, before object stores).
                self._remote.commit_by_close(handle.remote)
            self.writeback.tell(file, handle)

    def _stored(self, node: Node, attrs: Attrs) -> None:
        """The server has what we had: its size and mtime are the file's."""
        file: FileCache = node.file
        with file.lock:
            if file.unsent:
                return
            short = attrs.size is not None and attrs.size < file.size
            file.is_now((attrs.size, attrs.mtime))
            if not file.unsafe:
                file.committed_mtime = attrs.mtime or 0
                node.times_set = False
            file.mtime = None
        self._ns.set_attrs(node, Attrs(size=attrs.size, mtime=attrs.mtime))
        if short:
            log.error(
                "the server acknowledged %d bytes of %r and has %d",
                file.size,
                self._ns.path_of(node),
                attrs.size,
            )
            raise FsError(errno.EIO, "the server has less than it acknowledged")

    def release(self, handle: Handle) -> None:
        """The last descriptor of this open is gone. Nobody waits for this, so it must be quick."""
        if handle.writable and handle.file.unsafe and handle.file.failure is None and handle.node.links:
            # Written through a mapping after close(), or commit=fsync: not on the kernel's time.
            thread = threading.Thread(target=self._release_last, args=(handle,), name="release", daemon=True)
            with self._releasing:
                self._release_threads.append(thread)
            thread.start()
        else:
            self._release(handle)

    def _release_last(self, handle: Handle) -> None:
        node, file = handle.node, handle.file
        try:
            # Also where others have it open: two that go at once would each leave it to the other.
            attrs = self.writeback.flush(file, commit=True)
            if attrs is not None:
                self._stored(node, attrs)
        except FsError as error:
            path = self._ns.path_of(node)
            if path is not None:  # what was removed meanwhile is no loss
                self.not_stored.append(f"{path.decode('utf-8', 'backslashreplace')}: {error.strerror}")
                log.error("not stored: %r: %s", path, error.strerror)
        finally:
            self._release(handle)
            with self._releasing:
                self._release_threads.remove(threading.current_thread())

    def _release(self, handle: Handle) -> None:
        node, file = handle.node, handle.file
        with file.lock:
            if handle.writable:
                file.writers.remove(handle.remote)
                if not file.writers and (file.unsafe or file.failure is not None):
                    file.discard()  # whoever wrote it was told
            file.handles.remove(handle)
        if handle.writable and file.validator is None:
            self._ns.distrust(node)
        self.writeback.account(file)
        self._remote.close_file(handle.remote)
        self._ns.unpin(node)
        if not node.pins:
            if not node.links:
                with file.lock:
                    file.distrust()  # nobody can ask for its bytes again
            self._removed.released(node)

    def fsyncdir(self, path: bytes) -> None:
        """What is pending below a directory is stored; SFTP has no fsync of the directory itself."""
        for node in self._ns.open_nodes(path):
            if node.file is not None and node.file.unsafe:
                attrs = self.writeback.flush(node.file, commit=True)
                if attrs is not None:
                    self._stored(node, attrs)
