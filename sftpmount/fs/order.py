"""The order in which a program goes through a directory, guessed from its last steps."""

from __future__ import annotations

from typing import Callable, List, Optional, Sequence, Tuple

from ..cache.namespace import Node

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
        places = {name: place for place, name in enumerate(ORDERS[which](entries))}
        passed = [places[name] for name in recent if name in places]
        steps = [later - earlier for earlier, later in zip(passed, passed[1:])]
        if passed and all(0 < step <= _GAP_MAX for step in steps):
            return which
    return None


def after(ordered: Sequence[bytes], name: bytes) -> List[bytes]:
    """What follows ``name``, and then what is before it."""
    at = ordered.index(name) + 1 if name in ordered else 0
    return [*ordered[at:], *ordered[: max(at - 1, 0)]]
