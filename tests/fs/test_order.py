"""In which order a program goes through a directory, guessed from its last steps."""

from __future__ import annotations

import stat
from typing import List, Tuple

import pytest

from sftpmount.cache.node import Node
from sftpmount.fs.order import ORDERS, Plan, after, guess
from sftpmount.sftp.wire import Attrs

LISTED = [b"m", b"c", b"x", b"a", b"k", b"q", b"b", b"z"]
INOS = [5, 3, 8, 1, 7, 2, 6, 4]


def entries_of(names: List[bytes], inos: List[int]) -> List[Tuple[bytes, Node]]:
    return [(name, Node(ino, Attrs(mode=stat.S_IFREG), 0.0)) for name, ino in zip(names, inos)]


ENTRIES = entries_of(LISTED, INOS)
BY_INODE = [b"a", b"q", b"c", b"z", b"m", b"b", b"k", b"x"]


def test_the_orders() -> None:
    assert [order(ENTRIES) for order in ORDERS] == [LISTED, BY_INODE, sorted(LISTED)]


@pytest.mark.parametrize("which", range(3))
def test_three_steps_tell(which: int) -> None:
    ordered = ORDERS[which](ENTRIES)
    for at in range(len(ordered) - 2):
        recent = ordered[at : at + 3]
        for first in range(3):
            found = guess(ENTRIES, recent, first)
            assert found is not None
            places = [ORDERS[found](ENTRIES).index(name) for name in recent]
            assert places == sorted(places)
        assert guess(ENTRIES, recent, which) == which


def test_what_was_passed_over_does_not_matter() -> None:
    assert guess(ENTRIES, [b"m", b"x", b"z"]) == 0
    many = entries_of([b"%03d" % each for each in range(100)], list(range(100)))
    assert guess(many, [b"000", b"008", b"016"]) == 0
    assert guess(many, [b"000", b"009"]) is None, "that is no order, or another directory's"


@pytest.mark.parametrize("recent", [[b"z", b"m"], [b"gone"], [], [b"m", b"m"]])
def test_none_fits(recent: List[bytes]) -> None:
    found = guess(ENTRIES, recent)
    assert found is None or (recent == [b"z", b"m"] and found == 1)


def test_names_that_are_gone_do_not_count() -> None:
    assert guess(ENTRIES, [b"m", b"gone", b"c"]) == 0


def test_what_comes_next() -> None:
    assert after(LISTED, b"k") == [b"q", b"b", b"z", b"m", b"c", b"x", b"a"]
    assert after(LISTED, b"z") == LISTED[:-1]
    assert after(LISTED, b"m") == LISTED[1:]
    assert after(LISTED, b"unknown") == LISTED
    assert after([], b"x") == []


@pytest.mark.parametrize("recent", [[b"m", b"c"], [b"a", b"q"], [b"z", b"a", b"m"]])
def test_a_plan_says_the_same(recent: List[bytes]) -> None:
    plan = Plan(ENTRIES, recent)
    which = guess(ENTRIES, recent)
    assert plan.is_guessed == (which is not None)
    for name in [*LISTED, b"unknown"]:
        expected = after(ORDERS[which or 0](ENTRIES), name)
        assert plan.after(name, 100) == expected
        assert plan.after(name, 2) == expected[:2]


def test_a_plan_holds_while_the_program_follows_it() -> None:
    plan = Plan(ENTRIES, [b"a", b"b", b"c"])
    assert plan.holds([b"b", b"c", b"k"])
    assert not plan.holds([b"c", b"k", b"b"])
    assert not plan.holds([b"b", b"c", b"new"]), "it is not in it"
    assert Plan([], []).after(b"x", 5) == []
