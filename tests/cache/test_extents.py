"""Extents against the plainest model there is: a set of ints."""

from __future__ import annotations

from typing import List, Set, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftpmount.cache.extents import Extents

TOP = 40  # small, so that ranges often touch and overlap

ranges = st.tuples(st.integers(0, TOP), st.integers(0, TOP))
steps = st.lists(st.tuples(st.sampled_from(["add", "remove"]), ranges), max_size=30)


def points(pieces: object) -> Set[int]:
    return {i for start, end in pieces for i in range(start, end)}  # type: ignore[attr-defined]


def runs(numbers: Set[int]) -> List[Tuple[int, int]]:
    """The maximal ranges of a set of numbers."""
    found: List[Tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


def build(script: List[Tuple[str, Tuple[int, int]]]) -> Tuple[Extents, Set[int]]:
    extents, model = Extents(), set()
    for act, (start, end) in script:
        if act == "add":
            extents.add(start, end)
            model |= set(range(start, end))
        else:
            extents.remove(start, end)
            model -= set(range(start, end))
        extents.check_invariants()
        assert list(extents) == runs(model)
    return extents, model


@given(steps)
def test_add_and_remove_do_what_a_set_does(script: List[Tuple[str, Tuple[int, int]]]) -> None:
    extents, model = build(script)
    assert extents.total == len(model)
    assert len(extents) == len(runs(model))
    assert bool(extents) == bool(model)
    assert extents.end == max(model, default=-1) + 1


@given(steps, ranges)
def test_questions_about_a_range(script: List[Tuple[str, Tuple[int, int]]], asked: Tuple[int, int]) -> None:
    extents, model = build(script)
    start, end = asked
    wanted = set(range(start, end))
    assert extents.covers(start, end) == (wanted <= model)
    assert extents.overlaps(start, end) == bool(wanted & model)
    if start <= end:
        assert extents.within(start, end) == runs(wanted & model)
        assert extents.gaps(start, end) == runs(wanted - model)
    extents.check_invariants()
    assert points(extents) == model


@given(steps, steps, st.integers(0, TOP))
def test_first_skips_what_is_excluded(
    script: List[Tuple[str, Tuple[int, int]]], other: List[Tuple[str, Tuple[int, int]]], start: int
) -> None:
    extents, model = build(script)
    without, excluded = build(other)
    left = {i for i in model - excluded if i >= start}
    found = extents.first(without, start=start)
    if not left:
        assert found is None
    else:
        assert found is not None
        assert found[0] == min(left)
        assert set(range(*found)) <= left
    assert (extents.first(start=start) or (None,))[0] == min((i for i in model if i >= start), default=None)


@given(steps, steps)
def test_update_copy_and_equality(
    script: List[Tuple[str, Tuple[int, int]]], other: List[Tuple[str, Tuple[int, int]]]
) -> None:
    (extents, model), (second, others) = build(script), build(other)
    copy = Extents(extents)
    assert copy == extents
    copy.update(second)
    copy.check_invariants()
    assert points(copy) == model | others
    assert points(extents) == model, "the copy shares nothing with its source"
    assert (extents == second) == (model == others)
    copy.clear()
    copy.check_invariants()
    assert not copy
    assert copy.end == copy.total == 0


def test_iteration_stands_changes() -> None:
    extents = Extents([(0, 2), (4, 6), (8, 10)])
    for start, end in extents:
        extents.remove(start, end)
    assert not extents


def test_an_extents_is_no_key_and_equals_no_list() -> None:
    with pytest.raises(TypeError):
        hash(Extents())
    assert Extents([(0, 1)]) != [(0, 1)]


def test_offsets_of_huge_files() -> None:
    top = (1 << 63) - 1
    extents = Extents([(0, 1), (top - 1, top)])
    extents.check_invariants()
    assert extents.end == top
    assert extents.gaps(0, top) == [(1, top - 1)]
