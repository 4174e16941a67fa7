"""Many files of one directory that are removed one after the other: their removals leave without waiting for each reply.

rm -r and the pruning of a backup take away a round trip's worth of patience with each file, and the kernel lets nobody else
change that directory meanwhile. After ``ROW`` removals in a row that the server has confirmed, the next ones in that
directory are sent, at most ``IN_FLIGHT_MAX`` at once, and answered. That can only err by leaving a file that was to go:

1. Only for a name that a fresh listing shows, with one link, closed and clean, in a directory that is not sticky: there the
   server's answer to one file is its answer to the next. The last name of a directory is waited for.
2. Whoever asks the server for anything in that directory, or changes it or a directory above, waits first, and ends the row
   (``asked``). So does who takes away a name elsewhere: programs remove what refers to a thing before the thing.
3. What was refused, or lost with its connection, is tried again as any removal is. If it fails for good, the name is there
   again; the next removal in that directory, or its rmdir, tells; if none comes, the log, status and the unmount.
   A file that is gone already, whoever removed it, is no failure, but the end of the row.

``_changed`` guards all, and is a leaf.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Dict, List, Optional, Set

from .. import waiting
from ..cache.blocks import FileCache
from ..cache.namespace import Namespace
from ..cache.node import Node
from ..cache.tree import join, split
from ..errors import ConnectionLost, FsError, StatusError
from ..sftp.lane import Pending
from ..sftp.remote import Remote

log = logging.getLogger(__name__)

ROW = 3
ROW_S = 1.0  # so long after the last one, the next begins another row
IN_FLIGHT_MAX = 128
_ROWS_MAX = 16


class _Row:
    """Removals in one directory."""

    __slots__ = ("confirmed", "last_s")

    def __init__(self) -> None:
        self.confirmed = 0
        self.last_s = float("-inf")


class Removals:
    """Those of one mount that nobody waits for. Thread-safe."""

    def __init__(
        self, remote: Remote, names: Namespace, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._remote = remote
        self._ns = names
        self._clock = clock
        self._changed = threading.Condition()
        self._rows: OrderedDict[bytes, _Row] = OrderedDict()
        self._under_way: Dict[bytes, Set[bytes]] = {}  # directory -> the paths in it
        self._failed: Dict[bytes, Dict[bytes, FsError]] = {}  # directory -> path -> what nobody was told yet
        self._again = ThreadPoolExecutor(1, "removals")
        self._vain_s = float("-inf")  # when one was last waited for in vain

    def close(self) -> None:
        """Try nothing again."""
        self._again.shutdown(wait=False, cancel_futures=True)

    def confirmed(self, path: bytes) -> None:
        """One that was waited for is done."""
        directory = split(path)[0]
        with self._changed:
            row = self._rows.get(directory)
            if row is None or self._clock() - row.last_s > ROW_S:
                row = self._rows[directory] = _Row()
                if len(self._rows) > _ROWS_MAX:
                    self._rows.popitem(last=False)
            self._rows.move_to_end(directory)
            row.confirmed += 1
            row.last_s = self._clock()

    def send(self, path: bytes, node: Optional[Node], far_path: bytes) -> bool:
        """Remove ``path`` without waiting; False where it is to be waited for. Raises FsError as ``finish`` does."""
        directory = split(path)[0]
        self.finish_elsewhere(directory)
        self._tell(directory)
        session = self._remote.session_now()
        if session is None or node is None or not self._is_next(directory, path, node):
            return False
        with self._changed:
            while sum(map(len, self._under_way.values())) >= IN_FLIGHT_MAX:
                waiting.wait(self._changed)
            self._under_way.setdefault(directory, set()).add(path)
        self._ns.removed(path)  # before any failure can say that it is there
        try:
            self._remote.unlink_soon(
                session, far_path, lambda pending: self._answered(path, far_path, pending)
            )
        except (ConnectionLost, FsError) as error:  # it was not sent
            self._ns.distrust_path(path)
            self._ended(path)
            if isinstance(error, ConnectionLost):
                return False
            raise
        return True

    def _is_next(self, directory: bytes, path: bytes, node: Node) -> bool:
        with self._changed:
            row = self._rows.get(directory)
            if row is None or row.confirmed < ROW or self._clock() - row.last_s > ROW_S:
                return False
            row.last_s = self._clock()
        file: Optional[FileCache] = node.file
        is_held = bool(node.pins) or node.owed is not None or (file is not None and file.unsafe)
        return not node.is_dir and not node.aliased and not is_held and self._ns.is_one_of_many(path)

    def asked(self, path: bytes) -> None:
        """The server is to be asked about ``path``, or to change it: wait for those beside, in and below it.

        Raises FsError (EINTR).
        """
        beside = split(path)[0]
        if self._rows:
            with self._changed:
                self._rows.pop(path, None)
                self._rows.pop(beside, None)
        if self._under_way:
            below = join(path, b"")
            self._settle(lambda each: each in (path, beside) or each.startswith(below))

    def _settle(self, concerns: Callable[[bytes], bool]) -> Set[bytes]:
        """Wait for those under way in such directories, and return their paths. Raises FsError (EINTR)."""
        with self._changed:
            awaited = {
                path for directory, paths in self._under_way.items() if concerns(directory) for path in paths
            }
            # Not for those that come meanwhile: they have no end while somebody removes a large tree.
            while any(path in self._under_way.get(split(path)[0], ()) for path in awaited):
                waiting.wait(self._changed)
        return awaited

    def finish(self, directory: bytes) -> None:
        """Wait for those under way; raises the FsError of one that failed, once if it was in this directory."""
        self.finish_elsewhere(directory)
        if self._under_way:
            self._settle(lambda each: each == directory)
        self._tell(directory)

    def finish_elsewhere(self, directory: Optional[bytes] = None) -> None:
        """Wait for those in other directories; raises the FsError of one that failed, which is told there all the same."""
        if self._under_way:
            awaited = self._settle(lambda each: each != directory)
            with self._changed:
                for errors in self._failed.values():
                    for path in awaited & errors.keys():
                        raise errors[path]

    def _tell(self, directory: bytes) -> None:
        if self._failed:
            with self._changed:
                errors = self._failed.pop(directory, None)
            if errors:
                raise next(iter(errors.values()))

    def drain(self) -> List[str]:
        """Wait for all. Returns "path: reason" for what is still there though its removal was answered, and nobody was told."""
        self._settle(lambda each: True)
        return self.untold()

    def untold(self) -> List[str]:
        """The same, without waiting."""
        with self._changed:
            failed = [each for errors in self._failed.values() for each in errors.items()]
        return [
            f"{path.decode('utf-8', 'backslashreplace')}: not removed: {error.strerror}"
            for path, error in failed
        ]

    def paths(self) -> List[bytes]:
        """Those under way."""
        with self._changed:
            return [path for paths in self._under_way.values() for path in paths]

    # -- the reply ----------------------------------------------------------------------------------------------------------

    def _answered(self, path: bytes, far_path: bytes, pending: Pending) -> None:
        """In the thread that reads."""
        try:
            pending.expect_ok()
        except (StatusError, ConnectionLost):
            try:
                self._again.submit(self._once_more, path, far_path, self._clock())
            except RuntimeError:  # closed
                self._ended(path, FsError(errno.EIO))
        else:
            self._ended(path)

    def _once_more(self, path: bytes, far_path: bytes, since_s: float) -> None:
        """In a thread of our own: with all the patience of a removal that is waited for, and the right errno."""
        failure: Optional[FsError] = None
        try:
            if since_s <= self._vain_s and not self._remote.connected:
                raise FsError(errno.ETIMEDOUT, "the server cannot be reached")  # it has had its time
            self._remote.unlink(far_path)
        except FsError as error:
            failure = error if error.errno != errno.ENOENT else None
            if error.errno == errno.ETIMEDOUT:
                self._vain_s = self._clock()
        except Exception as error:
            log.exception("removing %r failed in a way that is not foreseen", path)
            failure = FsError(errno.EIO, str(error))
        if failure is not None:
            log.warning("%r could not be removed: %s", path, failure.strerror)
            self._ns.distrust_path(path)
        self._ended(path, failure, is_odd=True)

    def _ended(self, path: bytes, failure: Optional[FsError] = None, *, is_odd: bool = False) -> None:
        directory = split(path)[0]
        with self._changed:
            paths = self._under_way[directory]
            paths.discard(path)
            if not paths:
                del self._under_way[directory]
            if is_odd:
                self._rows.pop(directory, None)
            if failure is not None:
                self._failed.setdefault(directory, {})[path] = failure
            self._changed.notify_all()
