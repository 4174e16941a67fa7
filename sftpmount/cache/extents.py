"""Sorted, disjoint byte ranges. Pure: no I/O, no lock, no clock.

An ``Extents`` is a set of byte offsets kept as half-open ranges ``[start, end)``. Invariants, checked by
``check_invariants``: 1. starts ascend; 2. no range is empty; 3. neighbours neither overlap nor touch (they are joined);
4. ``total`` is the sum of the lengths. A file written from front to back is one range, so every operation is a bisect and
a splice of few elements.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Iterable, Iterator, List, Optional, Tuple

Range = Tuple[int, int]


class Extents:
    """A set of bytes as ranges ``(start, end)``, ``end`` excluded; offsets are in bytes from the start of the file."""

    __slots__ = ("_ends", "_starts", "total")

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._starts: List[int] = []
        self._ends: List[int] = []
        self.total = 0
        for start, end in ranges:
            self.add(start, end)

    def __iter__(self) -> Iterator[Range]:
        return iter(list(zip(self._starts, self._ends)))

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __len__(self) -> int:
        return len(self._starts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Extents) and self._starts == other._starts and self._ends == other._ends

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Extents({list(self)})"

    @property
    def end(self) -> int:
        """The offset behind the last byte of the set; 0 where it is empty."""
        return self._ends[-1] if self._ends else 0

    def add(self, start: int, end: int) -> None:
        """Include ``[start, end)``; joins what overlaps or touches."""
        if start >= end:
            return
        low = bisect_left(self._ends, start)
        high = bisect_right(self._starts, end)
        if low < high:
            start = min(start, self._starts[low])
            end = max(end, self._ends[high - 1])
            for i in range(low, high):
                self.total -= self._ends[i] - self._starts[i]
        self._starts[low:high] = [start]
        self._ends[low:high] = [end]
        self.total += end - start

    def remove(self, start: int, end: int) -> None:
        """Exclude ``[start, end)``; a range that reaches beyond either side keeps the rest."""
        if start >= end:
            return
        low = bisect_right(self._ends, start)
        high = bisect_left(self._starts, end)
        if low >= high:
            return
        keep = []
        if self._starts[low] < start:
            keep.append((self._starts[low], start))
        if self._ends[high - 1] > end:
            keep.append((end, self._ends[high - 1]))
        for i in range(low, high):
            self.total -= self._ends[i] - self._starts[i]
        self._starts[low:high] = [s for s, _ in keep]
        self._ends[low:high] = [e for _, e in keep]
        self.total += sum(e - s for s, e in keep)

    def update(self, other: Extents) -> None:
        """Include every range of ``other``."""
        for start, end in zip(other._starts, other._ends):
            self.add(start, end)

    def clear(self) -> None:
        """Empty the set."""
        self._starts.clear()
        self._ends.clear()
        self.total = 0

    def covers(self, start: int, end: int) -> bool:
        """True where every byte of ``[start, end)`` is in the set."""
        if start >= end:
            return True
        i = bisect_right(self._starts, start) - 1
        return i >= 0 and self._ends[i] >= end

    def overlaps(self, start: int, end: int) -> bool:
        """True where any byte of ``[start, end)`` is in the set."""
        i = bisect_right(self._ends, start)
        return start < end and i < len(self._starts) and self._starts[i] < end

    def within(self, start: int, end: int) -> List[Range]:
        """The ranges of the set, cut to ``[start, end)``, in order."""
        found: List[Range] = []
        if start >= end:
            return found
        i = bisect_right(self._ends, start)
        while i < len(self._starts) and self._starts[i] < end:
            found.append((max(start, self._starts[i]), min(end, self._ends[i])))
            i += 1
        return found

    def gaps(self, start: int, end: int) -> List[Range]:
        """The ranges of ``[start, end)`` that are not in the set, in order."""
        missing = []
        position = start
        for low, high in self.within(start, end):
            if position < low:
                missing.append((position, low))
            position = high
        if position < end:
            missing.append((position, end))
        return missing

    def range_at(self, position: int) -> Optional[Range]:
        """The range that holds ``position``; None where none does."""
        i = bisect_right(self._starts, position) - 1
        return (self._starts[i], self._ends[i]) if i >= 0 and position < self._ends[i] else None

    def first(self, without: Optional[Extents] = None, *, start: int = 0) -> Optional[Range]:
        """The first range at or after ``start`` that is in the set and not in ``without``; None where there is none."""
        i = bisect_right(self._ends, start)
        while i < len(self._starts):
            low, high = max(start, self._starts[i]), self._ends[i]
            if without is None:
                return (low, high)
            free = without.gaps(low, high)
            if free:
                return free[0]
            i += 1
        return None

    def check_invariants(self) -> None:
        """Raise AssertionError where one of the module's invariants does not hold."""
        assert len(self._starts) == len(self._ends)
        previous_end = None
        for start, end in zip(self._starts, self._ends):
            assert start < end, self
            assert previous_end is None or previous_end < start, self
            previous_end = end
        assert self.total == sum(e - s for s, e in zip(self._starts, self._ends)), self
