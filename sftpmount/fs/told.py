"""What the kernel was told of files, and for how long it may believe that.

An open, and whoever changes a file that has several names, wait until the kernel believes nothing else any more: it would
cut reads at the size it knows.
"""

from __future__ import annotations

import threading
import time
from typing import Callable, Dict, NamedTuple, Optional

ATTR_TIMEOUT_S = 0.01
_TICK_S = 0.01  # the kernel counts in ticks of up to so long
_TOLD_MAX = 4096


class _Sizes(NamedTuple):
    size: Optional[int]  # None: one or another
    heard_s: float  # until then the kernel has heard of it
    until_s: float


class Told:
    """The sizes of the files of a mount, by inode number. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards _sizes; a leaf
        self._sizes: Dict[int, _Sizes] = {}

    def tell(self, ino: int, size: int, late_s: float = 0.0) -> None:
        """The kernel is about to hear of this size, in ``late_s`` at the latest."""
        now_s = self._clock()
        heard_s = now_s + late_s
        until_s = heard_s + ATTR_TIMEOUT_S + _TICK_S
        told = _Sizes(size, heard_s, until_s)
        with self._lock:
            before = self._sizes.get(ino)
            # Of two answers under way either may come last. Where none is late, it is this one.
            if before is not None and before.until_s > now_s and (late_s or before.heard_s > now_s):
                told = _Sizes(
                    size if before.size == size else None,
                    max(heard_s, before.heard_s),
                    max(until_s, before.until_s),
                )
            self._sizes[ino] = told
            if len(self._sizes) > _TOLD_MAX:
                for each in [ino for ino, sizes in self._sizes.items() if sizes.until_s <= now_s]:
                    del self._sizes[each]

    def believed_s(self, ino: int, but: Optional[int] = None) -> float:
        """For how long, in seconds, the kernel may believe what it was told of a file, but for this size; 0.0 where it does not."""
        with self._lock:
            told = self._sizes.get(ino)
        if told is None or (but is not None and told.size == but):
            return 0.0
        return max(0.0, told.until_s - self._clock())
