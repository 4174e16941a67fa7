"""The semantics of a local folder over a remote: every file operation, no FUSE in it.

Paths are bytes that begin with a slash, the mount's root being b"/". Every method raises FsError and nothing else.

Close-to-open: an open asks the server for the file's attributes in the same flight, and clean bytes are kept only where
size and mtime are those they came with. Attributes and listings may be ``dir_cache_timeout_s`` old otherwise; O_EXCL, mkdir,
rename and unlink always go to the server (``removals`` tells which of the last is not waited for). What this mount writes it
sees at once, through every name and handle.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, TypeVar

from .. import waiting
from ..cache.blocks import FileCache
from ..cache.namespace import Absent, Namespace
from ..cache.node import Node
from ..cache.tree import split
from ..errors import ConnectionLost, FsError, RemoteDirectoryError
from ..sftp import wire
from ..sftp.remote import FSYNC, HARDLINK, POSIX_RENAME, STATVFS, Remote
from ..sftp.session import Session
from ..sftp.wire import Attrs
from .attributes import Attributes, Owners
from .files import Files, held_still
from .files_ahead import FilesAhead
from .handles import Handle, Stat
from .identity import MountedDirectory
from .links import Links
from .listings import Listings
from .opening import LOOKS_AGAIN, Opening
from .owed import OwedAttrs
from .removals import Removals
from .removed import RemovedFiles, is_libfuse_name

log = logging.getLogger(__name__)

T = TypeVar("T")

# What libfuse shows for an inode number that nobody asked for; 0 would make readdir(3) skip the name.
UNKNOWN_INO = 0xFFFFFFFF


@contextlib.contextmanager
def _operating(*nodes: Optional[Node]) -> Iterator[None]:
    """No other operation on these files meanwhile."""
    with contextlib.ExitStack() as stack:
        for node in sorted({node for node in nodes if node is not None}, key=id):
            stack.enter_context(node.operation)
        yield


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
        contain_symlinks: bool = False,
        transform_symlinks: bool = False,
        local_uid: Optional[int] = None,
        local_gid: Optional[int] = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._remote = remote
        self._root = root
        self.lifetime_s = dir_cache_timeout_s
        self._idmap_user = idmap_user
        self._local = (
            os.getuid() if local_uid is None else local_uid,
            os.getgid() if local_gid is None else local_gid,
        )
        self._ns = Namespace(
            Attrs(mode=stat.S_IFDIR | 0o755),
            lifetime_s=dir_cache_timeout_s,
            entries_max=entries_max,
            clock=clock,
            wall=wall,
        )
        self._removed = RemovedFiles(remote)
        self._removals = Removals(remote, self._ns, clock=clock)
        self._owed = OwedAttrs(remote, self._ns, self._far_path, clock=clock)
        self.files = Files(
            remote,
            self._ns,
            self._removed,
            self._owed,
            commit_on_close=commit == "close",
            cache_bytes_max=cache_bytes_max,
            dirty_bytes_max=dirty_bytes_max,
            read_ahead_bytes_max=read_ahead_bytes_max,
            clock=clock,
            wall=wall,
        )
        self._attributes = Attributes(
            remote, self._ns, self.files, self._owed, look_up=self._look_up, far_path=self._far_path
        )
        self._links = Links(
            remote,
            look_up=self._look_up,
            far_path=self._far_path,
            contain=contain_symlinks,
            transform=transform_symlinks,
        )
        self._listings = Listings(
            remote,
            self._ns,
            far_path=self._far_path,
            was_another_directory=self._was_another_directory,
            lifetime_s=dir_cache_timeout_s,
            clock=clock,
        )
        self._files_ahead = FilesAhead(
            remote, self._ns, self.files, self._far_path, cache_bytes_max=cache_bytes_max, clock=clock
        )
        self._opening = Opening(
            remote,
            self._ns,
            self.files,
            self._files_ahead,
            self._owed,
            self._removed,
            look_up=self._look_up,
            far_path=self._far_path,
        )
        self._mounted = MountedDirectory(self._ns)
        remote.on_connected = self._mounted.check
        # How files are opened, what happens in them, to attributes and with links is theirs alone.
        self.read, self.write, self.append = self.files.read, self.files.write, self.files.append
        self.flush, self.fsync, self.release = self.files.flush, self.files.fsync, self.files.release
        self.open, self.create, self.truncate = (
            self._opening.open,
            self._opening.create,
            self._opening.truncate,
        )
        self.stat_of, self.chmod = self._attributes.shown, self._attributes.chmod
        self.chown, self.utimens = self._attributes.chown, self._attributes.utimens
        self.readlink = self._links.readlink

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
                self._attributes.owners = Owners(self._local, (home.uid, home.gid))
        except FsError as error:
            raise RemoteDirectoryError(
                f"The directory {shown} cannot be mounted: the server says {error.strerror!r}; "
                "create it there, or check its name and permissions."
            ) from None
        try:
            fsid = self._remote.statvfs(self._root).fsid
        except FsError:
            fsid = None
        self._mounted.remember(self._root, fsid)
        self._removed.root = self._links.root = self._root
        self._ns.told(b"/", attrs, self._ns.mark())
        if not self._remote.has(FSYNC):
            log.warning(
                "this server has no fsync@openssh.com: stored means received by the server, not written to its disk"
            )

    def describe(self) -> Dict[str, object]:
        """Facts for the log and for status: the directory, durability, and what the server lacks."""
        return {
            "directory": self._root.decode("utf-8", "replace"),
            "fsync": self._remote.has(FSYNC),
            "missing": [
                name.decode()
                for name in (FSYNC, POSIX_RENAME, HARDLINK, STATVFS)
                if not self._remote.has(name)
            ],
        }

    def state(self) -> Dict[str, Any]:
        """``describe`` and what is held, for status; paths as the mount has them. Waits for nothing."""
        state = {**self.describe(), **self.files.state()}
        state["lost"] += self._removals.untold()
        for each in state["unstored"]["files"]:
            each["path"] = self._near_path(each["path"]).decode("utf-8", "backslashreplace")
        return state

    def _near_path(self, far_path: Optional[bytes]) -> bytes:
        if not far_path:
            return b"(removed)"
        base = b"" if self._root == b"/" else self._root
        return far_path[len(base) :] if far_path.startswith(base + b"/") else far_path

    def unstored(self) -> List[bytes]:
        """The files whose bytes, attributes or removal the server may not have just now. Waits for nothing."""
        bytes_of = map(self._near_path, self.files.unstored())
        return sorted({*bytes_of, *self._owed.paths(), *self._removals.paths()})

    def drain(self) -> List[str]:
        """Store everything still held. Returns "path: reason" for each file that could not be stored."""
        return self.files.drain() + self._owed.drain() + self._removals.drain()

    def sync(self) -> List[str]:
        """``drain`` for who asks while the mount goes on."""
        return self.files.sync() + self._owed.drain() + self._removals.drain()

    def close(self) -> None:
        """Stop the background work. What was not drained is given up."""
        self._owed.close()
        self._removals.close()
        self._listings.close()
        self._files_ahead.close()
        self.files.close()

    def _far_path(self, path: bytes) -> bytes:
        """The server's path, for a question or a change: what is being removed there is gone when this returns."""
        self._removals.asked(path)
        return self._place(path)

    def _place(self, path: bytes) -> bytes:
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

    def known(self, path: bytes) -> Optional[Stat]:
        """Attributes of ``path``, None where the server would have to be asked or there is more to say than that."""
        node = None if self._removed.node_at(path) is not None else self._ns.known(path)
        return None if node is None else self.stat_of(node)

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
        if node is not None:
            return node
        self._listings.asked(path)
        return self._ask(path)

    def _ask(self, path: bytes, again: int = LOOKS_AGAIN) -> Node:
        mark = self._ns.mark()
        try:
            attrs = self._remote.lstat(self._far_path(path))
            if path == b"/" and not stat.S_ISDIR(attrs.mode or stat.S_IFDIR):
                # Shown to the kernel, even for a moment, it would spoil the mount for good.
                raise FsError(errno.EIO, "the server does not show the mounted directory as one")
        except FsError as error:
            if error.errno == errno.ENOENT and path != b"/":
                if self._ns.get(path) is not None and self._was_another_directory():
                    if not again:
                        raise FsError(
                            errno.EIO, "the server shows another directory time and again"
                        ) from None
                    return self._ask(path, again - 1)
                self._ns.told_absent(path, mark)
            raise
        node = self._ns.told(path, attrs, mark)
        if again and not self._ns.is_as_of(node, mark):  # we changed something meanwhile
            return self._ask(path, again - 1)
        self.files.revalidate(node)
        return node

    def _was_another_directory(self) -> bool:
        """What we know is not there any more: true where the directory was not the mounted one, and is again now.

        A server whose backup disk is unmounted under a living session shows what lies below it. That is an outage.
        """

        def check(session: Session) -> None:
            try:
                self._mounted.check(session, is_new=False)
            except RemoteDirectoryError as error:
                raise ConnectionLost(str(error)) from None

        before = self._remote.reconnects
        self._remote.run(check)
        return self._remote.reconnects != before

    def readdir(self, path: bytes) -> List[Tuple[bytes, int, int]]:
        """Every name of a directory as ``(name, ino, mode)``; mode 0 where the server did not tell the type."""
        listing, entries = self._listings.read(path)
        self._files_ahead.listed(path)
        if listing is None:
            found = [(entry.name, UNKNOWN_INO, entry.attrs.mode or 0) for entry in entries]
        else:
            found = [(name, node.ino, node.mode) for name, node in listing]
        gone = self._removed.names_in_root() if path == b"/" else ()
        return [entry for entry in found if entry[0] not in gone] if gone else found

    def access(self, path: bytes, mode: int) -> None:
        """Only what attributes can tell: nobody may execute a file that has no x bit. The rest is the server's to judge."""
        if mode & os.X_OK:
            node = self._look_up(path)
            if stat.S_ISREG(node.mode) and not node.mode & 0o111:
                raise FsError(errno.EACCES)

    def statfs(self) -> wire.StatVfs:
        """Space and inodes of the remote directory's file system; ENOSYS where the server cannot tell."""
        try:
            disk = self._remote.statvfs(self._far_path(b"/"))
        except FsError as error:
            raise FsError(
                errno.ENOSYS if error.errno == errno.ENOTSUP else error.errno or errno.EIO
            ) from None
        # Programs divide by the first two, and make buffers of the last; the kernel has 32 bits for each of them.
        bsize, frsize = (
            (size if 512 <= size < 1 << 32 else 4096) for size in (disk.bsize, disk.frsize or disk.bsize)
        )
        return disk._replace(
            bsize=bsize, frsize=frsize, namemax=disk.namemax if 1 <= disk.namemax <= 255 else 255
        )

    # -- changing the namespace ---------------------------------------------------------------------------------------

    def mkdir(self, path: bytes, mode: int) -> None:
        """Create a directory."""
        self._owed.pay(self._directory_of(path))
        attrs = self._fresh_on_error(path, lambda: self._remote.mkdir(self._far_path(path), mode))
        self._ns.created(path, attrs, complete=True).ours = True

    def mknod(self, path: bytes, mode: int) -> None:
        """Create a regular file; other types have no place in SFTP (EPERM, as where a file system lacks them)."""
        if not stat.S_ISREG(mode) and stat.S_IFMT(mode):
            raise FsError(errno.EPERM)
        self.release(self.create(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))

    def unlink(self, path: bytes) -> Optional[Node]:
        """Remove a file's or a symlink's name; returns the node where it may have other names still."""
        if self._removed.forget(path):
            return None
        self._owed.pay(self._directory_of(path))
        node = self._ns.get(path)
        with _operating(node), held_still([node] if node is not None else []):
            with self._mounted.changing(path):
                # What libfuse itself removes has no program to be told of others' failures, or of an early answer.
                is_libfuses = is_libfuse_name(path)
                if is_libfuses or not self._removals.send(path, node, self._place(path)):
                    if not is_libfuses:
                        self._removals.finish(split(path)[0])
                    self._fresh_on_error(path, lambda: self._remote.unlink(self._place(path)))
                    self._removals.confirmed(path)
                    self._ns.removed(path)
            if node is not None:
                self._rename_open(node)
        if node is not None:
            self._ns.distrust(node)  # its link count has changed, if it has others
            file: Optional[FileCache] = node.file
            if not node.pins and not node.links and file is not None:
                with file.lock:
                    file.distrust()
        return node

    def rmdir(self, path: bytes) -> None:
        """Remove an empty directory."""
        self._owed.pay(self._directory_of(path))
        with _operating(self._ns.get(path)):
            with self._mounted.changing(path):
                self._removals.finish(path)
                self._fresh_on_error(path, lambda: self._remote.rmdir(self._far_path(path)))
            self._ns.removed(path)

    def rename(self, old: bytes, new: bytes) -> None:
        """Rename, replacing what is there as POSIX says: a file by a file, an empty directory by a directory."""
        if old == new:
            self._look_up(old)
            return
        moving = self._ns.get(old)
        self._removals.finish_elsewhere()
        self._owed.pay(self._directory_of(old), self._directory_of(new))
        if is_libfuse_name(new) and moving is not None and not moving.is_dir:
            # One Ctrl-C between the steps, and the name would be gone that was only to be replaced.
            self._owed.settle(moving)
            with waiting.patiently(), held_still([moving]), self._mounted.changing(old):
                self._removed.remove(self._ns, moving, self._far_path(old), old, self._far_path(new), new)
                self._rename_open(moving)
            return
        if moving is not None and self._removed.is_replacing_itself(new, moving):
            try:
                self.link(old, new)
            except FsError as error:
                if error.errno != errno.EEXIST:
                    raise
                # The reply was lost: we have just taken the name away, so that it is there is our doing.
                self._ns.linked(moving, new)
            return
        patience = waiting.patiently() if self._removed.was_removed(new) else contextlib.nullcontext()
        below = self._owed.below(old) if moving is not None and moving.is_dir else []
        with patience, contextlib.ExitStack() as stack:
            # What is owed of the file that is replaced must not come to the one that takes its name.
            stack.enter_context(_operating(moving, self._ns.get(new), *below))
            self._owed.pay(*below)
            stack.enter_context(held_still([*self._ns.open_nodes(old), *self._ns.open_nodes(new)]))
            stack.enter_context(self._mounted.changing(old, new))
            ride = self._owed.send(moving)
            self._rename(old, new, moving)
            self._owed.arrived(moving, ride)

    def _rename(self, old: bytes, new: bytes, moving: Optional[Node]) -> None:
        self._removed.rename_begins(new)
        try:
            with self._ns.renaming(old):
                self._remote.rename(
                    self._far_path(old),
                    self._far_path(new),
                    moving.attrs if moving else None,
                    moving.target if moving else None,
                )
                replaced = self._ns.get(new)
                self._ns.renamed(old, new)
        except FsError:
            self._ns.distrust_path(old)
            self._ns.distrust_path(new)
            raise
        finally:
            self._removed.rename_ends(new)
        if replaced is not None:
            self._rename_open(replaced)
            file: Optional[FileCache] = replaced.file
            if file is not None and not replaced.links:
                with file.lock:
                    file.distrust()
        self._removed.directory_renamed(old, new)
        for node in self._ns.open_nodes(new):
            self._rename_open(node)

    def _rename_open(self, node: Node) -> None:
        """Its handles are opened again, after a reconnect, by a name that it has, and never by one that it had."""
        file: Optional[FileCache] = node.file
        if file is not None:
            path = self._ns.path_of(node)
            far = self._removed.place(node) if path is None else self._place(path)
            with file.lock:
                for handle in file.handles:
                    handle.remote.path = far

    def link(self, old: bytes, new: bytes) -> Node:
        """Create a hard link: both names are one file here, with one inode number and one link count."""
        node = self._look_up(old)
        self._owed.settle(node)
        self._owed.pay(self._directory_of(new))
        self._fresh_on_error(new, lambda: self._remote.link(self._far_path(old), self._far_path(new)))
        self._ns.linked(node, new)
        return node

    def symlink(self, target: bytes, path: bytes) -> None:
        """Create a symbolic link at ``path``; the target is stored as given."""
        self._owed.pay(self._directory_of(path))
        attrs = self._fresh_on_error(path, lambda: self._remote.symlink(target, self._far_path(path)))
        node = self._ns.created(path, attrs)
        node.target = target

    def _directory_of(self, path: bytes) -> Optional[Node]:
        return self._ns.get(split(path)[0])

    def _fresh_on_error(self, path: bytes, act: Callable[[], T]) -> T:
        try:
            return act()
        except FsError:
            self._ns.distrust_path(path)
            raise

    def fsyncdir(self, path: bytes) -> None:
        """What is pending below a directory is stored; SFTP has no fsync of the directory itself."""
        self._removals.finish(path)
        self._owed.settle(self._ns.get(path))
        self._owed.pay(*self._owed.below(path))
        for node in self._ns.open_nodes(path):
            self.files.store(node, commit=True)
