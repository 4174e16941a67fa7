"""What to fetch next: plans from the access pattern of one handle. Pure: no I/O, no clock, no lock.

Sequential means: at most ``SLACK_BYTES`` away from where the last reads ended, either side, since the kernel's own
read-ahead comes in parallel requests that overtake each other. The window doubles with each sequential read and is gone
with the first jump, so that random access fetches what it asks for and no more.
"""

from __future__ import annotations

from typing import Tuple

# Two of the kernel's 128 KiB read-ahead requests.
SLACK_BYTES = 262144
WINDOW_FIRST_BYTES = 262144


class Pattern:
    """The access pattern of one handle; offsets and sizes in bytes."""

    __slots__ = ("_ahead_to", "_bytes_max", "_next", "_window")

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._next = 0
        self._window = 0
        self._ahead_to = 0

    @property
    def sequential(self) -> bool:
        """True while the reads follow each other."""
        return self._window > 0

    def note(self, start: int, end: int) -> Tuple[int, int]:
        """A read of ``[start, end)`` comes: returns the range to fetch ahead, empty as ``(n, n)``.

        Asks again only when half of the window is used up, so that fetches leave in batches.
        """
        if abs(start - self._next) > SLACK_BYTES:
            self._next = end
            self._window = 0
            self._ahead_to = 0
            return (end, end)
        self._next = max(end, self._next if start < self._next else end)
        if self._bytes_max <= 0:
            return (end, end)
        self._window = min(max(self._window * 2, WINDOW_FIRST_BYTES), self._bytes_max)
        begin = max(self._ahead_to, end)
        target = self._next + self._window
        if self._ahead_to - self._next > self._window // 2:
            return (begin, begin)
        self._ahead_to = max(target, begin)
        return (begin, self._ahead_to)
