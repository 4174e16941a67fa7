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
    assert told.believed_s(INO, but=1) == 0.0
    assert told.shown_s(INO) == 0.0


def test_until_its_time_is_over(told: Told, clock: Clock) -> None:
    told.tell(INO, 100)
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


def test_what_is_still_believed_is_kept(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TOLD_MAX", 10)
    told = Told(clock)
    told.tell(INO, 100, late_s=1.0)
    for ino in range(100, 200):
        clock.now_s += 0.005
        told.tell(ino, 1)
        assert told.believed_s(ino, but=2) > 0.0
    assert told.believed_s(INO, but=2) > 0.0
    assert told.believed_s(100, but=2) == 0.0
    assert len(told._sizes) <= 21, "looked through when there are twice as many"


class TestShown:
    """What was changed through one of several names is to show through the others."""

    def test_from_the_change_on_however_late_the_kernel_heard(self, told: Told, clock: Clock) -> None:
        told.tell(INO, 100, has_several_names=True)
        clock.now_s += 0.3
        assert told.shown_s(INO, but=101) == pytest.approx(BELIEVED_S)

    def test_once(self, told: Told, clock: Clock) -> None:
        """A program that writes without looking waits for the first write alone."""
        told.tell(INO, 100, has_several_names=True)
        clock.now_s += told.shown_s(INO, but=200) + 0.001
        assert told.shown_s(INO, but=300) == 0.0
        told.tell(INO, 300, has_several_names=True)
        assert told.shown_s(INO, but=400) == pytest.approx(BELIEVED_S)

    def test_not_where_it_knows_this_size(self, told: Told) -> None:
        told.tell(INO, 100, has_several_names=True)
        assert told.shown_s(INO, but=100) == 0.0
        assert told.shown_s(INO) == pytest.approx(BELIEVED_S)

    def test_not_after_long(self, told: Told, clock: Clock) -> None:
        told.tell(INO, 100, has_several_names=True)
        clock.now_s += 2.0
        assert told.shown_s(INO) == 0.0

    def test_of_one_name_it_is_remembered_while_it_is_believed(self, told: Told, clock: Clock) -> None:
        told.tell(INO, 100)
        clock.now_s += BELIEVED_S / 2
        assert told.shown_s(INO) == pytest.approx(BELIEVED_S)
        clock.now_s += 2 * BELIEVED_S
        assert told.shown_s(INO) == 0.0

    def test_a_listing_under_way_is_heard_later(self, told: Told) -> None:
        told.tell(INO, 100, late_s=0.05, has_several_names=True)
        assert told.shown_s(INO) == pytest.approx(0.05 + BELIEVED_S)

    def test_an_open_does_not_wait_for_so_long(self, told: Told, clock: Clock) -> None:
        told.tell(INO, 100, has_several_names=True)
        clock.now_s += 0.3
        assert told.believed_s(INO, but=200) == 0.0
