"""What is in files: opened, read, written, stored. Paths and names are ``filesystem``'s.

``close()`` of a descriptor is the point of truth (``flush``); the release of the last one comes when nobody waits any more.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import threading
import weakref
from collections import OrderedDict
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional

from ..cache.blocks import CleanBlocks, FileCache
from ..cache.fetch import Fetcher
from ..cache.namespace import Namespace
from ..cache.node import Node
from ..cache.readahead import Pattern
from ..cache.writeback import WriteBack
from ..errors import FsError
from ..sftp.remote import FSYNC, Remote
from ..sftp.remote_file import RemoteFile
from ..sftp.wire import Attrs
from .handles import Handle
from .owed import OwedAttrs
from .removed import RemovedFiles

log = logging.getLogger(__name__)

# Two seconds: SFTP v3 times are whole seconds, so what was written within the second of a look cannot be told from it.
RACY_S = 2
REOPEN_LOOKS_MAX = 3
# What is known of a file that nobody has open takes five kilobytes, however small the file is.
IDLE_FILES_MAX = 8192


@contextlib.contextmanager
def held_still(nodes: Iterable[Node]) -> Iterator[None]:
    """While names of these files change: none of their handles is opened again by a name that is not its own any more."""
    files = [node.file for node in nodes]
    remotes = {handle.remote for file in files if file is not None for handle in list(file.handles)}
    with contextlib.ExitStack() as stack:
        for remote in sorted(remotes, key=id):
            stack.enter_context(remote.reopening)
        yield


class Files:
    """The open files of a mount. Thread-safe."""

    def __init__(
        self,
        remote: Remote,
        names: Namespace,
        removed: RemovedFiles,
        owed: OwedAttrs,
        *,
        commit_on_close: bool,
        cache_bytes_max: int,
        dirty_bytes_max: int,
        read_ahead_bytes_max: int,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._remote = remote
        self._ns = names
        self._removed = removed
        self._owed = owed
        self._commit_on_close = commit_on_close
        self._read_ahead_bytes_max = min(read_ahead_bytes_max, cache_bytes_max // 4)
        self._wall = wall
        self._clean = CleanBlocks(cache_bytes_max)
        self._fetcher = Fetcher(remote, self._clean)
        self._writeback = WriteBack(remote, dirty_bytes_max=dirty_bytes_max, clock=clock)
        self._file_ids = itertools.count(1)
        self._releasing = threading.Lock()  # guards _release_threads
        self._release_threads: List[threading.Thread] = []
        # Closed last comes last; guarded by _releasing. What is removed goes by itself.
        self._idle: OrderedDict[weakref.ref[Node], None] = OrderedDict()
        self._not_stored: List[str] = []  # "path: reason" of what nobody could be told about
        remote.on_lost = self._writeback.lost

    @property
    def held_bytes(self) -> int:
        """Bytes of memory held for data that is not safe yet."""
        return self._writeback.held_bytes

    def close(self) -> None:
        """Stop the background work. What was not drained is given up."""
        self._writeback.close()

    def unstored(self) -> List[bytes]:
        """The server's paths of files that hold bytes which are not safe yet."""
        return [
            file.writers[0].path if file.writers else b"a closed file" for file in self._writeback.files()
        ]

    @contextlib.contextmanager
    def truncating(self, node: Node, size: int) -> Iterator[None]:
        """While the server is told to: what it says of the size meanwhile can be either."""
        file: Optional[FileCache] = node.file
        if file is not None:
            file.truncating_to = size
        try:
            yield
        except BaseException:
            if file is not None:  # it may be done all the same
                with file.lock:
                    file.distrust()
                    file.sends += 1
            self._ns.distrust(node)
            raise
        finally:
            if file is not None:
                file.truncating_to = None

    @property
    def losses(self) -> int:
        """How many sessions have ended so far."""
        return self._writeback.losses

    def changed_size(self, node: Node, size: int, losses: int) -> None:
        """The server has truncated it; ``losses`` is what it was before it was asked to."""
        file: Optional[FileCache] = node.file
        if file is not None:
            can_commit = self._remote.has(FSYNC)
            with file.lock:
                file.truncate(size)
                if not can_commit or not file.writers:
                    file.forget_cut()
                file.is_now(None)
                file.sends += 1
                # An open that truncates is told of a time that may be forgotten with it.
                file.times_set = True
                file.mtime = None
                # A loss from here on makes the cut again, one before did not.
                self._writeback.account(file)
                if self.losses != losses:
                    file.recut = file.cut_to is not None
        self._ns.set_attrs(node, Attrs(size=size, mtime=int(self._wall())))
        if file is None or not file.writers:
            self._ns.distrust(node)  # the mtime is the server's to tell

    def times_will_be_set(self, node: Node) -> None:
        """From now on, until it is flushed again, the server's mtime may be another than the one we know."""
        node.times_set = True
        file: Optional[FileCache] = node.file
        if file is not None:
            with file.lock:
                file.times_set = True
                file.sends += 1

    def times_are_set(self, node: Node, mtime: Optional[int]) -> None:
        """The file has this mtime now."""
        file: Optional[FileCache] = node.file
        if file is not None:
            with file.lock:
                file.times_set = True  # a flush between may have been told of the old ones
                file.sends += 1
                if file.validator is not None:
                    file.is_now((file.validator[0], mtime))

    def store(self, node: Node, *, commit: Optional[bool] = None) -> None:
        """Send what is unsent of a node, and wait for it; with ``commit``, by default as close would, commit it.

        What is committed is never sent again, so the attributes that are set next stay as they are set.
        """
        file: Optional[FileCache] = node.file
        if file is not None and file.unsafe:
            self._flush_node(node, file, commit=self._commit_on_close if commit is None else commit)

    def _flush_node(self, node: Node, file: FileCache, *, commit: bool) -> bool:
        """Flush, and show what the server says of the file then; False where there was nothing to do."""
        attrs = self._writeback.flush(file, commit=commit)
        if attrs is not None:
            self._ns.set_attrs(node, Attrs(size=attrs.size, mtime=attrs.mtime))
        return attrs is not None

    def attach(
        self, node: Node, remote: RemoteFile, attrs: Attrs, writable: bool, *, unopened: bool = False
    ) -> Handle:
        """The handle of a file that was just opened; where that fails, what was opened is closed. Raises FsError."""
        self._ns.pin(node)
        try:
            with node.operation:
                if not unopened:
                    self._owed.settle(
                        node
                    )  # what came meanwhile: of what is open on the server nothing is owed
                return self._new_handle(node, remote, attrs, writable, unopened)
        except BaseException:
            self._ns.unpin(node)
            self._remote.close_file(remote)
            raise

    def is_held(self, node: Node) -> bool:
        """True where all bytes of a small file are at hand, as far as we know."""
        file: Optional[FileCache] = node.file
        return file is not None and file.is_held

    def is_fresh(self, node: Node, since_s: float) -> bool:
        """The same, where they were asked for after ``since_s``, a time of the clock, and would be believed at an open."""
        file: Optional[FileCache] = node.file
        if file is None:
            return False
        with file.lock:
            return file.ahead_s >= since_s and file.is_held and self._is_true(node, file)

    def keep(self, node: Node, attrs: Attrs, data: bytes, asked_s: float) -> None:
        """All bytes of a small file, and the attributes that they came with; asked for ahead of a program.

        Not where they were not taken in as the node's, or are not any more: size and mtime do not tell what was written here
        within the same second.
        """
        with node.operation:
            if node.attrs is not attrs:
                return
            file = self._cache_of(node, attrs)
            self.revalidate(node)
            with file.lock:
                is_theirs = not file.authoritative and not file.unsafe
                if is_theirs and file.validator == (attrs.size, attrs.mtime) and file.size == len(data):
                    if data:
                        self._clean.put(file.file_id, 0, data)
                    file.ahead_s = asked_s
            if not node.pins:
                self._now_idle(node)

    def attach_unopened(
        self, node: Node, far_path: bytes, pflags: int, *, is_at_hand: bool = False
    ) -> Handle:
        """The handle, for reading, of a file that this mount has just made: the server is asked when it is read.

        Programs open what they have made to change its attributes (rsync), or to sync it. What ``is_at_hand`` is read without
        asking, as long as the bytes are held.
        """
        remote = RemoteFile(far_path, pflags)
        handle = self.attach(node, remote, node.attrs, writable=False, unopened=not is_at_hand)
        handle.trusted = False
        return handle

    def _open_late(self, handle: Handle) -> None:
        node, file = handle.node, handle.file
        with node.operation, handle.remote.reopening:
            if not handle.unopened:
                return
            self._owed.settle(node)
            mark, size, path = self._ns.mark(), file.size, self._ns.path_of(node)
            try:
                remote, attrs = self._remote.open(handle.remote.path, handle.remote.pflags)
            except FsError as error:
                raise FsError(errno.ESTALE) if error.errno == errno.ENOENT else error from None
            if path is None:  # we have removed its name
                with file.lock:
                    is_it = file.may_be(attrs.size, attrs.mtime)
            else:
                is_it = self._ns.told(path, attrs, mark) is node
                if is_it:
                    self.revalidate(node)
            if not is_it or file.size != size:
                self._remote.close_file(remote)
                raise FsError(errno.ESTALE, "another client has changed it since it was opened here")
            self._follow(file, remote)
            remote.reopening = handle.remote.reopening  # who waits to rename it holds this one still
            handle.remote, handle.unopened = remote, False

    def _follow(self, file: FileCache, remote: RemoteFile) -> None:
        """``remote`` is open on ``file``, at its present version."""
        remote.verify = lambda ask: self._verify_reopened(file, ask)
        with file.lock:
            remote.seen = file.validator

    def _new_handle(
        self, node: Node, remote: RemoteFile, attrs: Attrs, writable: bool, unopened: bool
    ) -> Handle:
        file = self._cache_of(node, attrs)
        trusted = self.revalidate(node)
        handle = Handle(node, file, remote, writable, Pattern(self._read_ahead_bytes_max))
        # The kernel caches each name of a hard link by itself: what was written through another is not in it.
        handle.trusted = trusted and not node.aliased
        handle.unopened = unopened
        self._follow(file, remote)
        with file.lock:
            file.handles.append(handle)
            if writable:
                file.writers.append(remote)
        return handle

    def _cache_of(self, node: Node, attrs: Attrs) -> FileCache:
        """For who holds ``node.operation``."""
        if node.file is None:
            node.file = FileCache(next(self._file_ids), attrs.size or 0, self._clean)
            node.file.times_set = node.times_set
        file: FileCache = node.file
        return file

    def _is_true(self, node: Node, file: FileCache) -> bool:
        """The clean bytes belong to the node's attributes, and those are old enough to tell. For who holds ``file.lock``."""
        attrs = node.attrs
        is_told = not file.is_young and not self._is_young(attrs)
        return is_told and file.validator == (attrs.size, attrs.mtime)

    def _is_young(self, attrs: Attrs) -> bool:
        return (attrs.mtime or 0) >= self._wall() - RACY_S

    def revalidate(self, node: Node) -> bool:
        """The node's attributes are new: are the bytes we hold of it still true? Drops them where they may not be."""
        file: Optional[FileCache] = node.file
        attrs = node.attrs  # not the reply's: the namespace has sorted out which is newer
        if file is None:
            return False
        with file.lock:
            if file.authoritative or file.unsafe:
                return True  # ours are the newest
            trusted = self._is_true(node, file)
            if not trusted:
                file.distrust()
                file.size = attrs.size or 0
                file.believe((attrs.size, attrs.mtime), is_young=self._is_young(attrs))
                file.committed_mtime = attrs.mtime or 0
            return trusted

    @staticmethod
    def _verify_reopened(file: FileCache, ask: Callable[[], Attrs]) -> None:
        """After a reconnect: the same file, as far as SFTP can tell."""
        for _ in range(REOPEN_LOOKS_MAX):
            with file.lock:
                sends, was_settled = file.sends, not file.unsafe
            now = ask()
            with file.lock:
                if file.may_be(now.size, now.mtime):
                    return
                if was_settled and sends == file.sends:
                    break
            # What another thread sent meanwhile was stored before we came to compare: the answer is older. Once more.
        log.warning(
            "reopened, but another file: size %s and mtime %s do not fit %s", now.size, now.mtime, file
        )
        raise FsError(errno.ESTALE, "another file has taken its name")

    def read(self, handle: Handle, size: int, offset: int) -> bytes:
        """At most ``size`` bytes at ``offset``, fewer only at the end of the file."""
        if handle.unopened:
            self._open_late(handle)
        return self._fetcher.read(handle.file, handle.remote, handle.pattern, offset, size)

    def write(self, handle: Handle, data: bytes, offset: int) -> int:
        """Take ``data`` in; it is stored by close() or fsync() at the latest. Returns its length."""
        self._writeback.write(handle.file, handle, offset, data)
        handle.file.mtime = int(self._wall())
        return len(data)

    def try_write(self, handle: Handle, data: bytes, offset: int) -> bool:
        """``write`` where that takes no more than memory; else False."""
        if not self._writeback.try_write(handle.file, handle, offset, data):
            return False
        handle.file.mtime = int(self._wall())
        return True

    def append(self, handle: Handle, data: bytes) -> int:
        """Take ``data`` in at the end of the file, as this mount knows it."""
        with handle.node.operation:
            return self.write(handle, data, handle.file.size)

    def flush(self, handle: Handle) -> None:
        """close(2) of one descriptor: the point of truth, see ``WriteBack.flush``."""
        if handle.writable:
            self._flush(handle, commit=self._commit_on_close, is_closed=True)

    def fsync(self, handle: Handle) -> None:
        """Everything written to this file, through whatever handle, is on the server's disk when this returns."""
        self._owed.settle(handle.node)
        self._flush(handle, commit=True, is_closed=False)

    def _flush(self, handle: Handle, *, commit: bool, is_closed: bool) -> None:
        node, file = handle.node, handle.file
        with node.operation:
            try:
                has_flushed = self._flush_node(node, file, commit=commit)
            except FsError:
                handle.owed = None  # told by this
                self._ns.distrust(node)
                raise
            if handle.writable and not self._remote.has(FSYNC):
                # Such servers may commit on CLOSE, and only then say that it failed (Go's, before object stores): an empty
                # file as well, and not where its attributes change meanwhile (rclone).
                if has_flushed or handle.remote.makes_a_file:
                    self._remote.commit_by_close(handle.remote, is_closed=is_closed)
            self._writeback.tell(file, handle)

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
        node = handle.node
        try:
            # Also where others have it open: two that go at once would each leave it to the other.
            self._flush_node(node, handle.file, commit=True)
        except FsError as error:
            path = self._ns.path_of(node)
            if path is not None:  # what was removed meanwhile is no loss
                self._not_stored.append(f"{path.decode('utf-8', 'backslashreplace')}: {error.strerror}")
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
        self._writeback.account(file)
        self._remote.close_file(handle.remote)
        self._ns.unpin(node)
        if not node.pins:
            if not node.links:
                with file.lock:
                    file.distrust()  # nobody can ask for its bytes again
            self._removed.released(node)
            self._now_idle(node)

    def _now_idle(self, node: Node) -> None:
        """Nobody has it open: what is known of it may go once it is known of many such."""
        known = weakref.ref(node)
        with self._releasing:
            self._idle[known] = None
            self._idle.move_to_end(known)
            if len(self._idle) <= IDLE_FILES_MAX:
                return
            known, _ = self._idle.popitem(last=False)
        oldest = known()
        if oldest is not None and not self._forget(oldest):
            with self._releasing:
                self._idle[known] = None

    @staticmethod
    def _forget(node: Node) -> bool:
        """Know no more of its bytes than at the start; False where another operation on it is under way."""
        if not node.operation.try_enter():
            return False
        try:
            file: Optional[FileCache] = node.file
            if file is None or node.pins:  # its release comes here again
                return True
            with file.lock:
                if file.handles or file.unsafe or file.failure is not None or file.fetches or file.commits:
                    return False
                file.distrust()
                node.times_set = node.times_set or file.times_set
                node.file = None
            return True
        finally:
            node.operation.leave()

    @property
    def acknowledged_bytes(self) -> int:
        """Bytes of files that the server has taken since the start."""
        return self._writeback.acknowledged_bytes

    def state(self) -> Dict[str, Any]:
        """For status: what is not stored, what was lost without a program to tell, the cache. Waits for nothing."""
        return {
            "unstored": self._writeback.state(),
            "lost": list(self._not_stored),
            "commit": "close" if self._commit_on_close else "fsync",
            "blocks": self._clean.state(),
            "names": self._ns.state(),
        }

    def drain(self) -> List[str]:
        """``sync`` at the end of the mount: also says in the log what an outage holds up."""
        waiting = self.unstored()
        if waiting and not self._remote.connected:
            log.warning(
                "the server cannot be reached, and %d files are not stored yet: %s; waiting for it (SIGTERM twice gives up)",
                len(waiting),
                ", ".join(path.decode("utf-8", "backslashreplace") for path in waiting[:20]),
            )
        return self.sync()

    def sync(self) -> List[str]:
        """Store, and commit, what is held now. Returns "path: reason" for each file that is not stored.

        Among them are those that nobody could be told about, whenever that was.
        """
        with self._releasing:
            releasing = list(self._release_threads)
        for thread in releasing:
            thread.join()
        unstored = []
        for node in self._ns.open_nodes():
            try:
                self.store(node, commit=True)
            except FsError as error:
                path = self._ns.path_of(node) or b"(removed)"
                unstored.append(f"{path.decode('utf-8', 'backslashreplace')}: {error.strerror}")
        return [*self._not_stored, *unstored]
