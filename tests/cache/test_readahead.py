"""Read-ahead plans for the access patterns that programs and the kernel produce."""

from __future__ import annotations

import random
from typing import List, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftpmount.cache.readahead import SLACK_BYTES, WINDOW_FIRST_BYTES, Pattern

KIB = 1024
MIB = 1 << 20
KERNEL_READ = 128 * KIB


def fetched(pattern: Pattern, reads: List[Tuple[int, int]]) -> int:
    """Bytes planned ahead over these (start, end) reads."""
    total = 0
    for start, end in reads:
        low, high = pattern.note(start, end)
        assert low <= high
        total += high - low
    return total


def blocks(start: int, count: int, step: int = KERNEL_READ) -> List[Tuple[int, int]]:
    return [(start + i * step, start + (i + 1) * step) for i in range(count)]


def test_sequential_reads_are_read_ahead_once_each_and_without_gaps() -> None:
    pattern = Pattern(8 * MIB)
    position = 0
    for start, end in blocks(0, 400):
        low, high = pattern.note(start, end)
        if high > low:
            assert low == max(position, end), "what was planned before is neither skipped nor planned twice"
            position = high
    assert pattern.sequential
    assert position > 400 * KERNEL_READ


def test_the_window_grows_to_its_limit_and_no_further() -> None:
    pattern = Pattern(8 * MIB)
    reach = []
    ahead_to = 0
    for _, end in blocks(0, 300):
        ahead_to = max(ahead_to, pattern.note(end - KERNEL_READ, end)[1])
        reach.append(ahead_to - end)
    assert reach[0] <= WINDOW_FIRST_BYTES
    assert max(reach) <= 8 * MIB
    assert min(reach[100:]) >= 4 * MIB - KERNEL_READ, "half a window is always on its way"


def test_a_limit_of_zero_reads_nothing_ahead() -> None:
    assert fetched(Pattern(0), blocks(0, 50)) == 0


def test_random_reads_fetch_what_they_ask_for() -> None:
    rng = random.Random(5)
    pattern = Pattern(8 * MIB)
    pattern.note(0, 4096)
    reads = [(offset, offset + 4096) for offset in (rng.randrange(1 << 20, 1 << 40) for _ in range(300))]
    assert fetched(pattern, reads) == 0
    assert not pattern.sequential


def test_a_jump_ends_read_ahead_and_a_new_run_begins_it_again() -> None:
    pattern = Pattern(8 * MIB)
    assert fetched(pattern, blocks(0, 20)) > 0
    assert fetched(pattern, [(1 << 30, (1 << 30) + KERNEL_READ)]) == 0
    assert not pattern.sequential
    assert fetched(pattern, blocks((1 << 30) + KERNEL_READ, 3)) > 0


def test_reverse_reads_of_large_steps_are_not_sequential() -> None:
    pattern = Pattern(8 * MIB)
    pattern.note(0, 1)
    reads = [(start, start + KERNEL_READ) for start in range(400 * MIB, 100 * MIB, -MIB)]
    assert fetched(pattern, reads) == 0


def test_reverse_reads_of_small_steps_plan_nothing_far_from_what_was_read() -> None:
    """Within the slack reverse looks like parallel reads; the plans then lie among the blocks that were just read."""
    pattern = Pattern(MIB)
    for start in range(64 * MIB, 60 * MIB, -4 * KIB):
        low, high = pattern.note(start, start + 4 * KIB)
        assert low == high or start < low < high <= start + 4 * KIB + SLACK_BYTES + MIB


@pytest.mark.parametrize("seed", range(5))
def test_parallel_reads_that_overtake_each_other_are_sequential(seed: int) -> None:
    """The kernel keeps two 128 KiB read-ahead requests on their way, and they arrive in any order."""
    rng = random.Random(seed)
    reads = blocks(0, 64)
    for i in range(0, 64, 2):
        if rng.random() < 0.5:
            reads[i], reads[i + 1] = reads[i + 1], reads[i]
    pattern = Pattern(4 * MIB)
    covered = 0
    for start, end in reads:
        low, high = pattern.note(start, end)
        if high > low:
            assert low >= covered, "nothing is planned twice"
            covered = high
        assert pattern.sequential
    assert covered >= 64 * KERNEL_READ


@given(
    st.integers(0, 16 * MIB),
    st.lists(st.tuples(st.integers(0, 4 * MIB), st.integers(1, 300_000)), max_size=60),
)
def test_whatever_the_pattern_a_plan_is_ahead_and_bounded(limit: int, reads: List[Tuple[int, int]]) -> None:
    pattern = Pattern(limit)
    for start, length in reads:
        end = start + length
        low, high = pattern.note(start, end)
        assert low <= high
        assert low >= end
        assert high == low or high <= end + limit + SLACK_BYTES + 300_000
