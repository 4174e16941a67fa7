"""The fusepy adapter: bytes in, errno out. A thin wrapper; what the operations mean is in ``filesystem``.

fusepy's own methods decode every path, copy every read twice and die of an exception without an errno, so each is replaced
here by one that speaks to the filesystem directly, behind one errno boundary (``_wrapper``). ``nopath`` spares libfuse the
path of every read and write, and the lock that goes with it.

Kernel caches: entries for a second, attributes for ``ATTR_TIMEOUT_S``. That is enough for the LOOKUP and GETATTR of one
stat(2) to be one question, and short enough that an open can wait it out where the size it learned is not the one the
kernel was told a moment ago (close-to-open: the kernel would cut reads at the old size).
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import errno
import itertools
import logging
import os
import shutil
import stat
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

from .. import waiting
from ..cache.blocks import BLOCK_BYTES
from ..cache.node import Node
from ..errors import FsError, FuseUnavailable, MountpointError
from .callers import Callers
from .filesystem import UNKNOWN_INO, Filesystem
from .handles import Handle, Stat
from .libfuse import Ask, Work, declare, own_main
from .loop import Loop
from .readdirplus import LATE_S, ReadDirPlus
from .removed import is_libfuse_name
from .small_writes import SmallWrites
from .told import ATTR_TIMEOUT_S, Told

log = logging.getLogger(__name__)

ENTRY_TIMEOUT_S = 1.0
MAX_READ_BYTES = 131072
MAX_WRITE_BYTES = 1048576
# utimensat(2): nanoseconds that stand for "now" and "leave".
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2

try:
    import fuse
except OSError as _error:  # fusepy looks for libfuse when it is imported
    fuse = None
    _IMPORT_ERROR = str(_error)


def check_available() -> None:
    """Raise FuseUnavailable, with what to install or change, where this machine cannot mount."""
    if fuse is None:
        raise FuseUnavailable(
            f"libfuse 2 is missing ({_IMPORT_ERROR}); on Debian and Ubuntu: apt install libfuse2 fuse3"
        )
    try:
        declare(fuse._libfuse)
    except AttributeError as error:
        raise FuseUnavailable(
            f"this is no libfuse 2 ({error}); on Debian and Ubuntu: apt install libfuse2"
        ) from error
    if not os.path.exists("/dev/fuse"):
        raise FuseUnavailable(
            "/dev/fuse is missing; load the kernel module (modprobe fuse) or allow it in the container."
        )
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise FuseUnavailable(
            "/dev/fuse may not be opened by this user; it is mode 0666 where udev sets it up."
        )
    if os.geteuid() != 0 and shutil.which("fusermount") is None:
        raise FuseUnavailable("fusermount is missing; on Debian and Ubuntu: apt install fuse3")


class _Operations:
    """Tells fusepy which operations there are; it never calls them here, ``_Adapter`` overrides the callers.

    getxattr and its kin are left out on purpose: the kernel then answers ENOTSUP by itself and stops asking.
    So are lock and flock: the kernel keeps them locally.
    """

    flag_nullpath_ok = 1
    flag_nopath = 1
    flag_utime_omit_ok = 1
    use_ns = True


for _name in (
    "getattr", "readlink", "mknod", "mkdir", "unlink", "rmdir", "symlink", "rename", "link", "chmod", "chown", "truncate",
    "open", "read", "write", "statfs", "flush", "release", "fsync", "opendir", "readdir", "releasedir", "fsyncdir", "init",
    "access", "create", "utimens",
):  # fmt: skip
    setattr(_Operations, _name, True)

_Base: Any = fuse.FUSE if fuse is not None else object


class _Adapter(_Base):  # type: ignore[misc]
    """One mount. The constructor blocks until it is unmounted."""

    def __init__(
        self,
        filesystem: Filesystem,
        mountpoint: str,
        options: Dict[str, Union[str, bool]],
        on_ready: Callable[[], None],
        on_forced: Callable[[], None],
    ) -> None:
        self._fs = filesystem
        self._on_ready = on_ready
        self._callers = Callers(on_forced, _interrupted_program)
        self._handles: Dict[int, Any] = {}
        self._numbers = itertools.count(1)
        self._told = Told()
        self._thread = _Thread()
        encoded = {
            name: _latin1(value) if isinstance(value, str) else value for name, value in options.items()
        }
        fuse._libfuse.fuse_main_real = own_main(fuse._libfuse, MAX_WRITE_BYTES, self._serve)
        super().__init__(_Operations(), _latin1(mountpoint), raw_fi=True, encoding="latin-1", **encoded)

    def _serve(self, device: int, buffer_bytes: int, work: Work, ask: Ask) -> None:
        """Until the mount ends."""
        readdirplus = ReadDirPlus(device, ask, self._thread.only_what_is_known)

        def work_off(address: int, length: int) -> None:
            if not readdirplus(address, length):
                work(address, length)
            self._callers.request_ended()

        small_writes = SmallWrites(device, self._handles, self._fs.files.try_write)
        loop = Loop(
            device, buffer_bytes, work_off, at_once=small_writes, on_thread=lambda: self._callers.serve(loop)
        )
        loop.run()

    def _wrapper(self, func: Callable[..., Any], *args: Any) -> int:
        """The errno boundary: whatever happens, libfuse gets an int."""
        try:
            self._callers.begin()
            return func(*args) or 0
        except OSError as error:
            return -(error.errno or errno.EIO)
        except BaseException:
            log.exception("%s failed in a way that is not foreseen", getattr(func, "__name__", func))
            return -errno.EIO
        finally:
            self._callers.end()

    def _new_handle(self, value: Any) -> int:
        number = next(self._numbers)
        self._handles[number] = value
        return number

    def _fill_stat(self, st: Any, value: Stat) -> None:
        st.st_ino = value.ino
        st.st_mode = value.mode
        st.st_nlink = value.nlink
        st.st_uid = value.uid
        st.st_gid = value.gid
        st.st_size = value.size
        st.st_blocks = (value.size + 511) >> 9
        st.st_blksize = 131072
        st.st_atimespec.tv_sec = value.atime
        st.st_mtimespec.tv_sec = value.mtime
        st.st_ctimespec.tv_sec = value.mtime  # SFTP v3 has no ctime
        if not stat.S_ISDIR(value.mode):
            # What is told of a whole directory comes to the kernel a while later.
            late_s = LATE_S if self._thread.asks_nobody else 0.0
            self._told.tell(value.ino, value.size, late_s, has_several_names=value.nlink > 1)

    # -- looking --------------------------------------------------------------------------------------------------------

    def init(self, conn: Any) -> int:
        self._callers.watch()
        self._on_ready()
        return 0

    def getattr(self, path: Optional[bytes], buf: Any) -> int:
        ctypes.memset(buf, 0, ctypes.sizeof(fuse.c_stat))
        shown = self._fs.known(path) if self._thread.asks_nobody and path else self._fs.getattr(path)
        if shown is None:
            return -errno.EAGAIN
        self._fill_stat(buf.contents, shown)
        return 0

    def fgetattr(self, path: Optional[bytes], buf: Any, fip: Any) -> int:
        ctypes.memset(buf, 0, ctypes.sizeof(fuse.c_stat))
        handle = self._handles[fip.contents.fh] if fip else None
        self._fill_stat(buf.contents, self._fs.getattr(path, handle if isinstance(handle, Handle) else None))
        return 0

    def readlink(self, path: bytes, buf: Any, bufsize: int) -> int:
        target = self._fs.readlink(path)[: bufsize - 1] + b"\0"
        ctypes.memmove(buf, target, len(target))
        return 0

    def opendir(self, path: bytes, fip: Any) -> int:
        fip.contents.fh = self._new_handle(_Directory(path))
        return 0

    def readdir(self, path: Optional[bytes], buf: Any, filler: Any, offset: int, fip: Any) -> int:
        directory = self._handles[fip.contents.fh]
        # libfuse keeps what the filler takes until the handle is rewound (offset 0), so one pass is one listing.
        st = fuse.c_stat()
        for name, ino, mode in self._entries(directory.path):
            st.st_ino, st.st_mode = ino, mode
            if filler(buf, name, st, 0) != 0:
                break
        return 0

    def _entries(self, path: bytes) -> Iterator[Tuple[bytes, int, int]]:
        listing: List[Tuple[bytes, int, int]] = self._fs.readdir(path)
        yield b".", UNKNOWN_INO, stat.S_IFDIR
        yield b"..", UNKNOWN_INO, stat.S_IFDIR
        yield from listing

    def releasedir(self, path: Optional[bytes], fip: Any) -> int:
        self._handles.pop(fip.contents.fh, None)
        return 0

    def fsyncdir(self, path: Optional[bytes], datasync: int, fip: Any) -> int:
        self._fs.fsyncdir(self._handles[fip.contents.fh].path)
        return 0

    def access(self, path: bytes, mode: int) -> int:
        self._fs.access(path, mode)
        return 0

    def statfs(self, path: bytes, buf: Any) -> int:
        disk = self._fs.statfs()
        st = buf.contents
        st.f_bsize, st.f_frsize = disk.bsize, disk.frsize
        st.f_blocks, st.f_bfree, st.f_bavail = disk.blocks, disk.bfree, disk.bavail
        st.f_files, st.f_ffree, st.f_favail = disk.files, disk.ffree, disk.favail
        st.f_flag, st.f_namemax = disk.flag, disk.namemax
        return 0

    # -- changing the namespace -------------------------------------------------------------------------------------------

    def mknod(self, path: bytes, mode: int, dev: int) -> int:
        self._fs.mknod(path, mode)
        return 0

    def mkdir(self, path: bytes, mode: int) -> int:
        self._fs.mkdir(path, mode)
        return 0

    def unlink(self, path: bytes) -> int:
        if is_libfuse_name(path):  # its own, after the last release
            with self._callers.for_nobody():
                self._fs.unlink(path)
            return 0
        node = self._fs.unlink(path)
        if node is not None:
            self._show_to_other_links(node)
        return 0

    def rmdir(self, path: bytes) -> int:
        self._fs.rmdir(path)
        return 0

    def symlink(self, source: bytes, target: bytes) -> int:
        self._fs.symlink(source, target)
        return 0

    def rename(self, old: bytes, new: bytes) -> int:
        self._fs.rename(old, new)
        return 0

    def link(self, source: bytes, target: bytes) -> int:
        # link(2) and then a look at the link count is how programs lock over networks.
        self._show_to_other_links(self._fs.link(source, target))
        return 0

    # -- attributes -----------------------------------------------------------------------------------------------------

    def chmod(self, path: bytes, mode: int) -> int:
        self._show_to_other_links(self._fs.chmod(path, mode))
        return 0

    def chown(self, path: bytes, uid: int, gid: int) -> int:
        self._show_to_other_links(
            self._fs.chown(path, -1 if uid == 0xFFFFFFFF else uid, -1 if gid == 0xFFFFFFFF else gid)
        )
        return 0

    def utimens(self, path: bytes, buf: Any) -> int:
        if buf:
            times = (_seconds(buf.contents.actime), _seconds(buf.contents.modtime))
        else:
            times = (int(time.time()),) * 2
        self._show_to_other_links(self._fs.utimens(path, *times))
        return 0

    def truncate(self, path: bytes, length: int) -> int:
        self._show_to_other_links(self._fs.truncate(path, length))
        return 0

    def ftruncate(self, path: Optional[bytes], length: int, fip: Any) -> int:
        self._show_to_other_links(self._fs.truncate(path, length, self._handles[fip.contents.fh]))
        return 0

    # -- files ----------------------------------------------------------------------------------------------------------

    def open(self, path: bytes, fip: Any) -> int:
        fi = fip.contents
        try:
            handle = self._fs.open(path, fi.flags)
        except FsError as error:
            # The kernel looked the name up a moment ago: ESTALE makes it look again, so that O_CREAT still creates.
            raise FsError(errno.ESTALE) if error.errno == errno.ENOENT else error from None
        # Another client may have changed it: the old size would cut our reads.
        _wait(self._told.believed_s(handle.node.ino, handle.file.size))
        fi.keep_cache = 1 if handle.trusted else 0
        # Each name of a hard link has pages of its own in the kernel: only without them do all see the same bytes.
        fi.direct_io = 1 if handle.node.aliased else 0
        fi.fh = self._new_handle(handle)
        return 0

    def _show_to_other_links(self, node: Node, size: Optional[int] = None) -> None:
        """The kernel holds each name of a hard link apart: what we changed through one must show through the others."""
        if node.aliased:
            _wait(self._told.shown_s(node.ino, size))

    def create(self, path: bytes, mode: int, fip: Any) -> int:
        fi = fip.contents
        fi.fh = self._new_handle(self._fs.create(path, fi.flags, mode))
        return 0

    def read(self, path: Optional[bytes], buf: Any, size: int, offset: int, fip: Any) -> int:
        data = self._fs.read(self._handles[fip.contents.fh], size, offset)
        ctypes.memmove(buf, data, len(data))
        return len(data)

    def write(self, path: Optional[bytes], buf: Any, size: int, offset: int, fip: Any) -> int:
        fi = fip.contents
        handle = self._handles[fi.fh]
        if handle.appends and not fi.writepage:
            # The kernel appends at the size it last heard of, which another client's append has moved on.
            taken = self._fs.append(handle, ctypes.string_at(buf, size))
        else:
            taken = self._write_blocks(handle, ctypes.addressof(buf.contents), size, offset)
        self._show_to_other_links(handle.node, handle.file.size)
        return taken

    def _write_blocks(self, handle: Handle, address: int, size: int, offset: int) -> int:
        """Copied a block at a time, each is kept as it is. Returns how much was taken in before a signal came."""
        taken, began_s = 0, time.monotonic()
        while taken < size:
            count = min(size - taken, BLOCK_BYTES - (offset + taken) % BLOCK_BYTES)
            try:
                self._fs.write(handle, ctypes.string_at(address + taken, count), offset + taken)
            except FsError as error:
                if taken and error.errno == errno.EINTR:
                    break
                raise
            taken += count
            if time.monotonic() - began_s > waiting.POLL_S and waiting.interrupted():
                break  # it has waited for this block, and would for each
        return taken

    def flush(self, path: Optional[bytes], fip: Any) -> int:
        self._fs.flush(self._handles[fip.contents.fh])
        return 0

    def fsync(self, path: Optional[bytes], datasync: int, fip: Any) -> int:
        self._fs.fsync(self._handles[fip.contents.fh])
        return 0

    def release(self, path: Optional[bytes], fip: Any) -> int:
        handle = self._handles.pop(fip.contents.fh, None)
        if handle is not None:
            with self._callers.for_nobody():
                self._fs.release(handle)
        return 0


def _interrupted_program() -> Optional[int]:
    if not fuse._libfuse.fuse_interrupted():
        return None
    pid: int = fuse.fuse_get_context()[2]
    return pid


class _Thread(threading.local):
    """What is to be known of the thread that asks."""

    asks_nobody = False

    @contextlib.contextmanager
    def only_what_is_known(self) -> Iterator[None]:
        """Within it, the server is not asked for attributes."""
        self.asks_nobody = True
        try:
            yield
        finally:
            self.asks_nobody = False


class _Directory:
    """An open directory."""

    __slots__ = ("path",)

    def __init__(self, path: bytes) -> None:
        self.path = path


def _wait(seconds: float) -> None:
    if seconds > 0.0:
        waiting.step_aside()
        time.sleep(seconds)


def _latin1(text: str) -> str:
    """fusepy encodes its arguments with the mount's encoding: hand the file system's bytes through it unchanged."""
    return os.fsencode(text).decode("latin-1")


def _seconds(ts: Any) -> Optional[int]:
    if ts.tv_nsec == UTIME_OMIT:
        return None
    if ts.tv_nsec == UTIME_NOW:
        return int(time.time())
    return int(ts.tv_sec)


def serve(
    filesystem: Filesystem,
    mountpoint: str,
    *,
    fuse_options: Dict[str, Union[str, bool]],
    on_ready: Callable[[], None],
    on_forced: Callable[[], None],
) -> None:
    """Mount and serve until unmounted. ``fuse_options`` are libfuse's own (allow_other, ro, umask, fsname...).

    ``on_ready`` is called once, in a thread of libfuse, when the kernel accepts operations; ``on_forced`` where it was
    unmounted by force (umount -f) while programs waited, whose operations end now. Raises FuseUnavailable before
    anything is mounted, MountpointError where libfuse refuses (it prints its reason to stderr itself).
    """
    check_available()
    cached = filesystem.lifetime_s > 0
    options: Dict[str, Union[str, bool]] = {
        "use_ino": True,
        "big_writes": True,
        "max_write": str(MAX_WRITE_BYTES),
        "max_read": str(MAX_READ_BYTES),
        "atomic_o_trunc": True,
        "sync_read": True,
        "entry_timeout": str(ENTRY_TIMEOUT_S if cached else 0.0),
        "attr_timeout": str(ATTR_TIMEOUT_S if cached else 0.0),
        **fuse_options,
    }
    try:
        _Adapter(filesystem, mountpoint, {"foreground": True, **options}, on_ready, on_forced)
    except RuntimeError as error:
        raise MountpointError(
            f"FUSE could not mount on {mountpoint}; is it a directory of yours, and are the options allowed? "
            "(allow_other needs user_allow_other in /etc/fuse.conf)"
        ) from error
    except FsError as error:
        raise MountpointError(str(error)) from error
