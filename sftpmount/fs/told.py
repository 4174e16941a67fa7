"""What the kernel was told of files, and for how long it may believe that.

An open waits until the kernel believes no other size any more: it would cut reads there. So does whoever changes a file that has
several names, each of which is another file to the kernel.
"""

from __future__ import annotations

import threading
import time
from typing import Callable, Dict, NamedTuple, Optional

ATTR_TIMEOUT_S = 0.01
_BELIEVED_S = ATTR_TIMEOUT_S + 0.01  # the kernel counts in ticks of up to 10 ms
_TOLD_MAX = 4096
# On a busy machine the kernel may take so long to hear of what it was told, and begins to believe it then.
_BUSY_S = 1.0


class _Sizes(NamedTuple):
    """Times are of the clock."""

    size: Optional[int]  # None: one or another
    heard_s: float  # then the kernel has heard of it
    until_s: float  # then it does not believe it any more, having heard in time
    kept_s: float  # then even a busy machine's does not


class Told:
    """The sizes of the files of a mount, by inode number. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards _sizes; a leaf
        self._sizes: Dict[int, _Sizes] = {}
        self._sizes_max = _TOLD_MAX

    def tell(self, ino: int, size: int, late_s: float = 0.0, *, has_several_names: bool = False) -> None:
        """The kernel is about to hear of this size, in ``late_s`` at the latest."""
        now_s = self._clock()
        heard_s = now_s + late_s
        until_s = heard_s + _BELIEVED_S
        told = _Sizes(size, heard_s, until_s, until_s + _BUSY_S if has_several_names else until_s)
        with self._lock:
            before = self._sizes.get(ino)
            # Of two answers under way either may come last. Where none is late, it is this one.
            if before is not None and before.until_s > now_s and (late_s or before.heard_s > now_s):
                told = _Sizes(
                    size if before.size == size else None,
                    max(heard_s, before.heard_s),
                    max(until_s, before.until_s),
                    max(told.kept_s, before.kept_s),
                )
            self._sizes[ino] = told
            if len(self._sizes) > self._sizes_max:
                self._sizes = {each: sizes for each, sizes in self._sizes.items() if sizes.kept_s > now_s}
                self._sizes_max = max(_TOLD_MAX, 2 * len(self._sizes))

    def believed_s(self, ino: int, but: int) -> float:
        """For how long, in seconds, the kernel may believe another size than this one; 0.0 where it does not."""
        with self._lock:
            told = self._sizes.get(ino)
        return 0.0 if told is None or told.size == but else max(0.0, told.until_s - self._clock())

    def shown_s(self, ino: int, but: Optional[int] = None) -> float:
        """In how many seconds from now the kernel believes nothing that it had heard before now, but for this size.

        That is as long as it may believe anything, where it was told of the file lately and nobody has asked this since: who does
        one thing after the other had its answer before it changed the file, however late that was.
        """
        with self._lock:
            told = self._sizes.get(ino)
            now_s = self._clock()
            if told is None or (but is not None and told.size == but) or told.kept_s <= now_s:
                return 0.0
            until_s = max(told.heard_s, now_s) + _BELIEVED_S
            self._sizes[ino] = told._replace(until_s=until_s, kept_s=until_s)
            return until_s - now_s
