"""The order in which a program goes through a directory, guessed from its last steps."""

from __future__ import annotations

from typing import Callable, Dict, List, Optional, Sequence, Tuple

from ..cache.node import Node

Entry = Tuple[bytes, Node]

# Names passed over between two steps of a program that goes in order: those that it has no interest in.
_GAP_MAX = 8

# As listed (find, rm), by inode (tar and cp, which think of a disk), by name (rsync).
ORDERS: Tuple[Callable[[Sequence[Entry]], List[bytes]], ...] = (
    lambda entries: [name for name, _ in entries],
    lambda entries: [name for name, _ in sorted(entries, key=lambda entry: entry[1].ino)],
    lambda entries: sorted(name for name, _ in entries),
)


def guess(entries: Sequence[Entry], recent: Sequence[bytes], first: int = 0) -> Optional[int]:
    """The index in ORDERS of one that fits the names that were come to last, ``first`` being tried first; None where none does."""
    for which in sorted(range(len(ORDERS)), key=lambda each: each != first):
        if _fits(_places(ORDERS[which](entries)), recent):
            return which
    return None


def _places(names: Sequence[bytes]) -> Dict[bytes, int]:
    return {name: place for place, name in enumerate(names)}


def _fits(places: Dict[bytes, int], recent: Sequence[bytes]) -> bool:
    passed = [places[name] for name in recent if name in places]
    steps = [later - earlier for earlier, later in zip(passed, passed[1:])]
    return bool(passed) and all(0 < step <= _GAP_MAX for step in steps)


class Plan:
    """A directory's names in the order that a program seems to go: made once, since that costs a look at all of them."""

    def __init__(self, entries: Sequence[Entry], recent: Sequence[bytes]) -> None:
        which = guess(entries, recent)
        self.is_guessed = which is not None
        self._names = ORDERS[which or 0](entries)
        self._places = _places(self._names)

    def holds(self, recent: Sequence[bytes]) -> bool:
        """True where the program still goes so."""
        return recent[-1] in self._places and (not self.is_guessed or _fits(self._places, recent))

    def after(self, name: bytes, count: int) -> List[bytes]:
        """The ``count`` names that follow ``name``, from the first again behind the last."""
        at = self._places.get(name, -1) + 1
        others = len(self._names) - (at > 0)
        return [self._names[(at + step) % len(self._names)] for step in range(min(count, others))]


def after(ordered: Sequence[bytes], name: bytes) -> List[bytes]:
    """What follows ``name``, and then what is before it."""
    at = ordered.index(name) + 1 if name in ordered else 0
    return [*ordered[at:], *ordered[: max(at - 1, 0)]]
