"""Small files, read ahead of a program that reads one whole file after the other: tar, cp, rsync, a restore.

Over distance such a program waits for each of them twice, at the open and at the first read. When it has read some small
files from start to end, those that come next in their directory are opened, read and closed, many at once. An open within
``AHEAD_S`` of that is answered without the server; a later one still finds the bytes, if the server says that they are true.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable, Deque, Dict, List, Optional, Set

from .. import waiting
from ..cache.blocks import BLOCK_BYTES
from ..cache.namespace import Absent, Namespace
from ..cache.node import Node
from ..cache.tree import split
from ..errors import ConnectionLost, FsError
from ..sftp.remote import Remote
from . import order
from .files import Files

SMALL_BYTES = BLOCK_BYTES
AHEAD_S = 1.0
# So many must have been read whole, one after the other, before any is read ahead.
STREAK = 2
# So long after its last open such a program is not thought of any more when somebody lists a directory.
STREAK_S = 5.0
_WINDOW_FIRST = 4
_WINDOW_MAX = 48
_BATCH_MAX = 16
_THREADS = 16
_TRAILS_MAX = 100
_RECENT = 3


class _Trail:
    """A program's way through one directory."""

    __slots__ = ("asked", "misses", "recent", "upcoming")

    def __init__(self) -> None:
        self.recent: Deque[bytes] = deque(maxlen=_RECENT)  # the names opened last
        self.upcoming: Deque[bytes] = deque()  # what will be opened next, as far as can be guessed
        self.asked: Set[bytes] = set()  # fetched ahead, and not opened yet
        self.misses = 0


class FilesAhead:
    """What is read ahead in a mount. Thread-safe."""

    def __init__(
        self,
        remote: Remote,
        names: Namespace,
        files: Files,
        far_path: Callable[[bytes], bytes],
        *,
        cache_bytes_max: int,
        clock: Callable[[], float],
    ) -> None:
        self._remote = remote
        self._ns = names
        self._files = files
        self._far_path = far_path
        self._clock = clock
        self._lock = threading.Lock()  # guards what follows
        self._last: Optional[Node] = None
        self._streak = 0
        self._opened_s = clock()
        # What is read ahead must still be there when it is opened.
        self._window_max = max(1, min(_WINDOW_MAX, cache_bytes_max // (2 * SMALL_BYTES)))
        self._window = min(_WINDOW_FIRST, self._window_max)
        self._order = 0  # in which the last program that was recognised goes
        self._trails: OrderedDict[bytes, _Trail] = OrderedDict()
        self._running: Dict[bytes, Future[None]] = {}
        self._threads = ThreadPoolExecutor(_THREADS, "read-ahead")

    def close(self) -> None:
        """Read nothing more ahead."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def is_at_hand(self, path: bytes, node: Node) -> bool:
        """A program opens ``path`` for reading: True where what the server would say has just been heard. Raises FsError (EINTR).

        What will be opened next is read ahead meanwhile.
        """
        if not _is_small(node):
            return False
        directory, name = split(path)
        next_ones: List[bytes] = []
        with self._lock:
            if self._last is not node:
                whole = self._last is not None and self._files.is_held(self._last)
                self._streak = self._streak + 1 if whole else 0
                self._last = node
            self._opened_s = self._clock()
            trail = self._trail(directory)
            trail.recent.append(name)
            if self._streak >= STREAK:
                next_ones = self._follow(directory, trail, name)
            running = self._running.get(path)
        self._fetch_soon(directory, next_ones)
        if running is not None:
            waiting.result(running)
        try:
            is_there = self._ns.fresh(path) is node
        except Absent:
            return False
        return is_there and node.owed is None and self._files.is_fresh(node, self._clock() - AHEAD_S)

    def listed(self, directory: bytes) -> None:
        """A program has listed it: if it is one that reads whole files, those in there are next."""
        with self._lock:
            is_over = self._clock() - self._opened_s > STREAK_S
            if self._streak < STREAK or is_over or directory in self._trails:
                return
            trail = self._trail(directory)
            trail.upcoming = self._upcoming(directory, self._order)
            next_ones = self._next_ones(trail)
        self._fetch_soon(directory, next_ones)

    def _trail(self, directory: bytes) -> _Trail:
        trail = self._trails.get(directory) or _Trail()
        self._trails[directory] = trail
        self._trails.move_to_end(directory)
        if len(self._trails) > _TRAILS_MAX:
            self._trails.popitem(last=False)
        return trail

    def _upcoming(self, directory: bytes, which: int, name: bytes = b"") -> Deque[bytes]:
        entries = [entry for entry in self._ns.children(directory) if _is_small(entry[1])]
        return deque(order.after(order.ORDERS[which](entries), name))

    def _follow(self, directory: bytes, trail: _Trail, name: bytes) -> List[bytes]:
        if name in trail.asked:
            trail.asked.discard(name)
            self._window = min(self._window * 2, self._window_max)
            trail.misses = 0
        else:
            trail.misses += 1
            if (
                trail.misses & (trail.misses - 1) == 0
            ):  # the guess was wrong; a guess costs a look at all names
                which = order.guess(self._ns.children(directory), trail.recent, self._order)
                if which is not None:
                    self._order = which
                    trail.upcoming = self._upcoming(directory, which, name)
                    trail.asked.clear()
        return self._next_ones(trail)

    def _next_ones(self, trail: _Trail) -> List[bytes]:
        next_ones: List[bytes] = []
        if len(trail.asked) > self._window // 2:
            return next_ones  # together with the next ones they cost less
        while trail.upcoming and len(trail.asked) < self._window:
            each = trail.upcoming.popleft()
            trail.asked.add(each)
            next_ones.append(each)
        return next_ones

    def _fetch_soon(self, directory: bytes, names: List[bytes]) -> None:
        """Several at once, as long as the first of them need not wait long for the last."""
        prefix = b"/" if directory == b"/" else directory + b"/"
        batch: List[bytes] = []
        size = 0
        for path in [prefix + name for name in names]:
            node = self._wanted(path)
            if node is not None:
                batch.append(path)
                size += node.attrs.size or 0
                if len(batch) == _BATCH_MAX or size >= SMALL_BYTES:
                    self._submit(batch)
                    batch, size = [], 0
        if batch:
            self._submit(batch)

    def _submit(self, paths: List[bytes]) -> None:
        with self._lock:
            paths = [path for path in paths if path not in self._running]
            try:
                running = self._threads.submit(self._fetch, paths)
            except RuntimeError:  # closed
                return
            self._running.update((path, running) for path in paths)

    def _fetch(self, paths: List[bytes]) -> None:
        """In a thread of our own. What fails is nobody's error yet: whoever opens the file asks for it."""
        session = self._remote.session_now()
        try:
            nodes = [(path, node) for path, node in zip(paths, map(self._wanted, paths)) if node is not None]
            if session is None or not nodes:
                return
            mark, asked_s = self._ns.mark(), self._clock()
            far_paths = [self._far_path(path) for path, _ in nodes]
            answers = self._remote.read_whole_on(session, far_paths, SMALL_BYTES)
            for (path, node), brought in zip(nodes, answers):
                # Not of a file that was removed meanwhile: its directory's listing would be in doubt.
                if brought is not None and self._known(path) is node:
                    attrs, data = brought
                    if self._ns.told(path, attrs, mark) is node:
                        self._files.keep(node, attrs, data, asked_s)
        except FsError:
            pass
        except ConnectionLost as error:  # or a reply that makes no sense: its handles may be open still
            assert session is not None
            session.abort(error)
        finally:
            with self._lock:
                for path in paths:
                    self._running.pop(path, None)

    def _wanted(self, path: bytes) -> Optional[Node]:
        node = self._known(path)
        if node is None or not _is_small(node) or node.owed is not None or self._files.is_held(node):
            return None
        return node

    def _known(self, path: bytes) -> Optional[Node]:
        try:
            return self._ns.fresh(path)
        except Absent:
            return None


def _is_small(node: Node) -> bool:
    return node.is_file and (node.attrs.size or 0) <= SMALL_BYTES
