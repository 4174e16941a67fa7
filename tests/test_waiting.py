"""Waits end with EINTR for who serves a program that is being ended, and for nobody else."""

from __future__ import annotations

import errno
import threading
from typing import Callable, List, Optional

import pytest

from sftpmount import waiting
from sftpmount.errors import FsError

WAIT_S = 20.0


def outcome(
    act: Callable[[], object], is_interrupted: Optional[Callable[[], bool]], timeout_s: float = WAIT_S
) -> List[Optional[int]]:
    """What ``act`` ended with in a thread of its own, its errno or None; [] where it goes on after that time."""
    ended: List[Optional[int]] = []

    def run() -> None:
        if is_interrupted is not None:
            waiting.serve(is_interrupted)
        try:
            act()
        except FsError as error:
            ended.append(error.errno)
        else:
            ended.append(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return ended


class Waits:
    """One thing to wait for of each kind, which does not come before ``end``."""

    def __init__(self) -> None:
        self.lock, self.rlock, self.condition = threading.Lock(), waiting.RLock(), threading.Condition()
        self.lock.acquire()
        self.is_over = False
        self.holds, self.go_on = threading.Event(), threading.Event()
        self.holder = threading.Thread(target=self._hold)
        self.holder.start()
        assert self.holds.wait(WAIT_S)

    def _hold(self) -> None:
        with self.rlock:
            self.holds.set()
            self.go_on.wait(WAIT_S)

    def end(self) -> None:
        self.lock.release()
        self.go_on.set()
        self.holder.join(WAIT_S)
        with self.condition:
            self.is_over = True
            self.condition.notify_all()

    def for_lock(self) -> None:
        waiting.acquire(self.lock)

    def for_rlock(self) -> None:
        with self.rlock, self.rlock:
            pass

    def for_condition(self) -> None:
        with self.condition:
            while not self.is_over:
                waiting.wait(self.condition)


KINDS = ["for_lock", "for_rlock", "for_condition"]


@pytest.mark.parametrize("kind", KINDS)
def test_who_serves_a_program_that_is_being_ended_stops_waiting(kind: str) -> None:
    waits = Waits()
    assert outcome(getattr(waits, kind), lambda: True) == [errno.EINTR]
    waits.end()
    assert outcome(getattr(waits, kind), lambda: True) == [None], "nothing to wait for, nothing to end"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_interrupted", [None, lambda: False])
def test_others_wait_on(kind: str, is_interrupted: Optional[Callable[[], bool]]) -> None:
    waits = Waits()
    assert outcome(getattr(waits, kind), is_interrupted, 1.0) == []
    waits.end()


def test_each_thread_is_asked_for_itself() -> None:
    assert outcome(waiting.check, lambda: True) == [errno.EINTR]
    assert outcome(waiting.check, None) == [None]
    assert not waiting.interrupted()
