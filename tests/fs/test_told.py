"""For how long the kernel may believe what it was told: the longest of all answers under way, whichever comes first."""

from __future__ import annotations

import pytest

from sftpmount.fs import told as module
from sftpmount.fs.told import ATTR_TIMEOUT_S, Told

INO = 7
BELIEVED_S = ATTR_TIMEOUT_S + 0.01


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def told(clock: Clock) -> Told:
    return Told(clock)


def test_nothing_was_told(told: Told) -> None:
    assert told.believed_s(INO) == 0.0


def test_until_its_time_is_over(told: Told, clock: Clock) -> None:
    told.tell(INO, 100)
    assert told.believed_s(INO) == pytest.approx(BELIEVED_S)
    assert told.believed_s(INO, but=99) == pytest.approx(BELIEVED_S)
    assert told.believed_s(INO, but=100) == 0.0
    clock.now_s += BELIEVED_S + 0.001
    assert told.believed_s(INO, but=99) == 0.0


def test_what_is_told_again_is_believed_for_longer(told: Told, clock: Clock) -> None:
    told.tell(INO, 100)
    clock.now_s += 0.015
    told.tell(INO, 100)
    assert told.believed_s(INO, but=99) == pytest.approx(BELIEVED_S)
    assert told.believed_s(INO, but=100) == 0.0


def test_the_size_that_was_told_last(told: Told, clock: Clock) -> None:
    """As while a program writes the file, and looks at it."""
    for size in (0, 100, 200):
        told.tell(INO, size)
        assert told.believed_s(INO, but=size) == 0.0
        clock.now_s += 0.001
    assert told.believed_s(INO, but=100) > 0.0


def test_until_a_listing_is_heard_of_what_was_told_before_counts(told: Told, clock: Clock) -> None:
    told.tell(INO, 100)
    clock.now_s += 0.001
    told.tell(INO, 200, late_s=0.05)
    assert told.believed_s(INO, but=200) == pytest.approx(0.05 + BELIEVED_S)
    clock.now_s += 0.051
    told.tell(INO, 300)
    assert told.believed_s(INO, but=300) == 0.0


def test_an_answer_under_way_may_come_last(told: Told, clock: Clock) -> None:
    told.tell(INO, 100, late_s=0.05)
    clock.now_s += 0.001
    told.tell(INO, 200)
    for size in (100, 200):
        assert told.believed_s(INO, but=size) == pytest.approx(0.049 + BELIEVED_S)
    clock.now_s += 0.05 + BELIEVED_S
    told.tell(INO, 300)
    assert told.believed_s(INO, but=300) == 0.0


def test_what_is_still_believed_is_kept(told: Told, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TOLD_MAX", 10)
    told.tell(INO, 100, late_s=1.0)
    for ino in range(100, 200):
        clock.now_s += 0.005
        told.tell(ino, 1)
        assert told.believed_s(ino) > 0.0
    assert told.believed_s(INO) > 0.0
    assert told.believed_s(100) == 0.0
    assert len(told._sizes) <= 11
