"""Whole directories: as programs list them, and ahead of programs that walk a tree.

find, rsync, tar and rm -r come to one directory after the other, and would wait two round trips for each; rsync and others
ask for name after name without listing anything. What is recognised as such is listed ahead, in threads of our own, and
taken from there: for the attributes of names that are there, for some seconds (see ``cache.namespace``); for a program
that lists the directory for ``AHEAD_S``, once, and only where this mount has changed nothing in it since. So whoever made a lock
file and then looks for another's sees what was there after its own.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable, Deque, Dict, List, Optional, Set, Tuple

from .. import waiting
from ..cache.namespace import Namespace
from ..cache.node import Node
from ..cache.tree import join, split
from ..errors import ConnectionLost, FsError, StatusError
from ..sftp.remote import Remote
from ..sftp.remote_names import LISTING_ENTRIES_MAX
from ..sftp.wire import Entry
from . import order

# So old may a listing be that a program is given: the kernel itself keeps a name for twice as long.
AHEAD_S = 0.5
# rm -r, borg and others list a directory twice. The second time they are given the first answer for as long as such an answer
# takes to come, at most for this long: restic looks for others' locks again after 0.2 s.
AGAIN_MAX_S = 0.1
_READ_MAX = 16
# A walk is over when its program has not come to the next directory for so long.
WALK_S = 10.0
AHEAD_MAX = 32
_AHEAD_FIRST = 2
_RECENT = 3
_WAY_MAX = 3  # directories one below the other
_THREADS = 8
_WALKS_MAX = 500
# A listing that nobody has asked for may cost this much for each single name that was: a round trip is worth some kilobytes.
_ENTRIES_PER_ASK = 200
_LISTINGS_AGAIN = 3
# So often is the order of a walk looked for at every step, and then at the 16th, the 32nd...: each costs a look at all names.
_STEPS_GUESSED = 8


class _Walk:
    """What programs did in one directory lately."""

    __slots__ = ("asks", "last_s", "plan", "recent", "steps", "tried", "window")

    def __init__(self) -> None:
        self.last_s = 0.0
        self.asks = 0  # single names that the server was asked for
        self.steps = -1  # directories in it that were come to; -1 where it was not walked itself
        self.recent: Deque[bytes] = deque(maxlen=_RECENT)  # the last of them
        self.tried: Set[bytes] = set()  # directories in it that were listed ahead, and not come to yet
        self.window = _AHEAD_FIRST
        self.plan: Optional[order.Plan] = None


class Listings:
    """The directories of a mount. Thread-safe."""

    def __init__(
        self,
        remote: Remote,
        names: Namespace,
        *,
        far_path: Callable[[bytes], bytes],
        was_another_directory: Callable[[], bool],
        lifetime_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._remote = remote
        self._ns = names
        self._far_path = far_path
        self._was_another_directory = was_another_directory
        self._ahead_s = min(AHEAD_S, lifetime_s)  # who wants nothing cached wants nothing from ahead
        self._clock = clock
        self._lock = threading.Lock()  # guards _walks, _running, _read
        self._walks: OrderedDict[bytes, _Walk] = OrderedDict()
        self._running: Dict[bytes, Future[None]] = {}
        # Directories read last -> the mark of the question, until when the answer is given again.
        self._read: OrderedDict[bytes, Tuple[int, float]] = OrderedDict()
        self._took_s = 0.0  # to list the last one
        self._threads = ThreadPoolExecutor(_THREADS, "list-ahead")

    def close(self) -> None:
        """List nothing more ahead."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def read(self, path: bytes) -> Tuple[Optional[List[Tuple[bytes, Node]]], List[Entry]]:
        """The directory as a program that lists it is to see it: the nodes, or None and the server's entries.

        Raises FsError.
        """
        for each in self._came_to_last(path):
            self._list_ahead(each, 2 * self._ns.count(each) + _ENTRIES_PER_ASK, is_again=True)
        self._walked(path)
        with self._lock:
            running = self._running.get(path)
        if running is not None:
            waiting.result(running)
        mark, asked_s = self._ns.mark(), self._clock()
        listing = self._just_read(path)
        if listing is not None:
            return listing, []
        listing = self._ns.take_listing_ahead(path, asked_s - self._ahead_s)
        entries: List[Entry] = []
        for _ in range(_LISTINGS_AGAIN if listing is None else 0):
            # Again where we changed something in it while the server was listing it.
            mark, asked_s = self._ns.mark(), self._clock()
            entries = self._remote.listdir(self._far_path(path))
            if self._is_strange(path, entries) and self._was_another_directory():
                continue
            if self._ns.told_listing(path, entries, mark):
                listing = self._ns.listing(path)
                self._took_s = self._clock() - asked_s
                break
        if listing is not None:
            self._is_read(path, mark)
        return listing, entries

    def _is_read(self, path: bytes, mark: int) -> None:
        with self._lock:
            self._read[path] = (mark, self._clock() + min(self._took_s, AGAIN_MAX_S))
            self._read.move_to_end(path)
            if len(self._read) > _READ_MAX:
                self._read.popitem(last=False)

    def _just_read(self, path: bytes) -> Optional[List[Tuple[bytes, Node]]]:
        """What was read a moment ago, and where nothing was changed by us since."""
        with self._lock:
            mark, until_s = self._read.get(path, (0, 0.0))
        return self._ns.listing(path, unchanged_since=mark) if self._clock() < until_s else None

    def asked(self, path: bytes) -> None:
        """The server is asked for this single name."""
        directory, name = split(path)
        with self._lock:
            walk = self._walk(directory)
            walk.asks += 1
            asks = walk.asks
            above = self._walks.get(split(directory)[0])
            is_walk = above is not None and above.steps > 0
        if asks & (asks - 1) == 0 and (asks > 1 or is_walk):  # after the second, the fourth, the eighth...
            self._list_ahead(directory, asks * _ENTRIES_PER_ASK, name)
            self._walked(directory)

    # -- who walks where ------------------------------------------------------------------------------------------------

    def _walk(self, path: bytes) -> _Walk:
        now_s = self._clock()
        walk = self._walks.get(path)
        if walk is None or now_s - walk.last_s > WALK_S:
            walk = self._walks[path] = _Walk()
            if len(self._walks) > _WALKS_MAX:
                self._walks.popitem(last=False)
        self._walks.move_to_end(path)
        walk.last_s = now_s
        return walk

    def _walked(self, path: bytes) -> None:
        """A program has come to this directory: those beside it may be next, in whatever order, the more the longer it walks."""
        parent, name = split(path)
        with self._lock:
            here = self._walk(path)
            here.steps = max(here.steps, 0)
            above = self._walks.get(parent)
            if not name or above is None or above.steps < 0:
                return
            above = self._walk(parent)
            above.steps += 1
            above.recent.append(name)
            if name in above.tried:
                above.tried.discard(name)
                is_in_time = self._ns.is_listed(path, self._clock() - self._ahead_s)
                above.window = min(above.window * 2, AHEAD_MAX) if is_in_time else max(above.window // 2, 1)
            window, recent, steps, plan = above.window, list(above.recent), above.steps, above.plan
        is_time = steps <= _STEPS_GUESSED or steps & (steps - 1) == 0
        if plan is None or not plan.holds(recent) or (not plan.is_guessed and is_time):
            entries = [entry for entry in self._ns.children(parent) if entry[1].is_dir]
            plan = order.Plan(entries, recent)
        if not plan.is_guessed:  # then any of them, and sooner
            window = min(AHEAD_MAX, 4 ** min(steps, 4))
        next_ones = plan.after(name, 2 * AHEAD_MAX)
        with self._lock:
            if plan is not above.plan:
                above.tried.clear()  # the guess was wrong
            above.plan = plan
            above.tried.intersection_update(next_ones[:AHEAD_MAX])  # the others were passed over
            next_ones = [each for each in next_ones if each not in above.tried][
                : max(0, window - len(above.tried))
            ]
            above.tried.update(next_ones)
        for each in next_ones:
            self._list_ahead(join(parent, each), _ENTRIES_PER_ASK * window)

    def _came_to_last(self, path: bytes) -> List[bytes]:
        """The directories below ``path`` that a program went on to a while ago, one below the other.

        borg looks through data and data/0 time and again.
        """
        found: List[bytes] = []
        with self._lock:
            here = self._walks.get(path)
            while here is not None and here.recent and len(found) < _WAY_MAX:
                path = join(path, here.recent[-1])
                here = self._walks.get(path)
                if here is None or self._clock() - here.last_s > WALK_S:
                    break
                found.append(path)
        return found

    # -- ahead ------------------------------------------------------------------------------------------------------------

    def _list_ahead(
        self,
        path: bytes,
        entries_max: int,
        beginning_with: Optional[bytes] = None,
        *,
        is_again: bool = False,
    ) -> None:
        """``is_again``: for a program that lists it again, to which a lease says nothing."""
        since_s = self._clock() - self._ahead_s
        if not self._ahead_s or self._ns.is_listed(path, since_s, is_lease_enough=not is_again):
            return
        with self._lock:
            if path in self._running:
                return
            try:
                self._running[path] = self._threads.submit(self._list, path, entries_max, beginning_with)
            except RuntimeError:  # closed
                return

    def _list(self, path: bytes, entries_max: int, beginning_with: Optional[bytes] = None) -> None:
        """In a thread of our own. What fails is nobody's error yet: whoever needs it asks for it."""
        try:
            session = self._remote.session_now()
            if session is None:
                return
            mark, asked_s = self._ns.mark(), self._clock()
            entries = self._remote.list_on(
                session, self._far_path(path), min(entries_max, LISTING_ENTRIES_MAX)
            )
            if not self._is_strange(path, entries):
                self._ns.told_listing(path, entries, mark, ahead_s=asked_s, beginning_with=beginning_with)
        except (FsError, StatusError, ConnectionLost):
            pass
        finally:
            with self._lock:
                self._running.pop(path, None)

    def _is_strange(self, path: bytes, entries: List[Entry]) -> bool:
        """True where nothing is there of what we know to be."""
        known = {name for name, _ in self._ns.children(path)}
        return bool(known) and not any(entry.name in known for entry in entries)
