"""Waits that end with EINTR once the program on whose behalf we wait is being ended.

A local disk never fails with EINTR, so only signals that end a program count, and only fs/fuse.py knows whom a thread
serves: it says so once for each of its threads. In our own threads these waits are plain ones.

The wait that begins here and ends in EINTR leaves everything as it is: a request that was sent goes on, and what it
acknowledges is taken in as ever.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from time import monotonic
from typing import Callable, Iterator, Optional, Protocol, TypeVar

from .errors import FsError

T = TypeVar("T")

POLL_S = 0.25  # Ctrl-C is to free a program within a second

# To wake a thread that sleeps takes up to 0.1 ms (a virtual machine's processor has to be given back by its host first), which
# is as long as a server on the same network needs to answer. What comes that soon is worth looking out for.
SPIN_S = 0.0002 if len(os.sched_getaffinity(0)) > 1 else 0.0
_SOON_S = 2 * SPIN_S  # what took no longer, with the time to be woken, may have been there within SPIN_S


class _Lock(Protocol):
    def acquire(self, blocking: bool = ..., timeout: float = ...) -> bool: ...  # pragma: no cover

    def release(self) -> None: ...  # pragma: no cover


class _Thread(threading.local):
    is_interrupted: Optional[Callable[[], bool]] = None
    end_of_operation: Optional[Callable[[], Callable[[], bool]]] = None
    step_aside: Optional[Callable[[], None]] = None
    others: Optional[Callable[[], int]] = None


_thread = _Thread()


def serve(
    is_interrupted: Callable[[], bool],
    end_of_operation: Optional[Callable[[], Callable[[], bool]]] = None,
    step_aside: Optional[Callable[[], None]] = None,
    others: Optional[Callable[[], int]] = None,
) -> None:
    """This thread serves programs from now on; ``is_interrupted()`` tells whether the present one is being ended.

    ``end_of_operation()`` gives a function that tells any thread, later, whether what this one does now is over for libfuse.
    ``step_aside()`` is called before the thread sleeps in a wait of this module: others may want it. ``others()`` is the
    descriptor on which it would be seen that they do, or -1 where they need not wait for this thread.
    """
    _thread.is_interrupted = is_interrupted
    _thread.end_of_operation = end_of_operation
    _thread.step_aside = step_aside
    _thread.others = others


def step_aside() -> None:
    """This thread is about to sleep."""
    if _thread.step_aside is not None:
        _thread.step_aside()


def let_others() -> None:
    """This thread does not sleep, but only looks out for something: ``step_aside`` where others are waiting."""
    if _thread.others is not None:
        others = _thread.others()
        if others >= 0 and _is_readable(others):
            step_aside()


def _is_readable(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def for_input(descriptor: int, timeout_s: float) -> bool:
    """Wait until there is something to read, at most for so long; True where there is. Others are let go first once they come."""
    others = -1 if _thread.others is None else _thread.others()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if others >= 0:
        poll.register(others, select.POLLIN)
    ready = dict(poll.poll(timeout_s * 1000))
    if others in ready:
        step_aside()
        poll.unregister(others)
        ready = dict(poll.poll(timeout_s * 1000))
    return descriptor in ready


def end_of_operation() -> Callable[[], bool]:
    """Tells from now on whether this thread's operation is over, where that can be known; else it is always False."""
    return _thread.end_of_operation() if _thread.end_of_operation is not None else lambda: False


def is_for_a_program() -> bool:
    """True where this thread serves a program, which can be told of an error."""
    return _thread.is_interrupted is not None


@contextlib.contextmanager
def patiently() -> Iterator[None]:
    """Within, this thread waits as one of our own: what it does must be done."""
    is_interrupted, _thread.is_interrupted = _thread.is_interrupted, None
    try:
        yield
    finally:
        _thread.is_interrupted = is_interrupted


def interrupted() -> bool:
    """True where this thread's program is being ended."""
    is_interrupted = _thread.is_interrupted
    return is_interrupted is not None and is_interrupted()


def check() -> None:
    """Raise FsError (EINTR) where this thread's program is being ended."""
    if interrupted():
        raise FsError(errno.EINTR)


def acquire(lock: _Lock) -> None:
    """``lock.acquire()``; raises FsError (EINTR)."""
    if lock.acquire(False):
        return
    step_aside()
    while not lock.acquire(True, POLL_S):
        check()


def wait(condition: threading.Condition) -> None:
    """``condition.wait()``, and now and then for nothing; raises FsError (EINTR). Does not wait longer than ``POLL_S``."""
    step_aside()
    if not condition.wait(POLL_S):
        check()


def result(future: Future[T]) -> T:
    """``future.result()``; raises FsError (EINTR)."""
    if not future.done():
        step_aside()
    while True:
        try:
            return future.result(POLL_S)
        except NotYet:
            check()


class Spin:
    """How a thread looks out for what may come soon: ``begin``, and ``again`` each time that it is not there, then ``end``.

    ``again`` is True, and lets other threads of this processor go first, for ``SPIN_S`` where it came soon the last time: so
    what takes long costs nothing.
    """

    __slots__ = ("_began_s", "_last_s", "_until_s")

    def __init__(self) -> None:
        self._last_s = self._began_s = self._until_s = 0.0

    def begin(self, may_spin: bool = True) -> None:
        """It is waited for from now on."""
        self._began_s = monotonic()
        self._until_s = self._began_s + SPIN_S if may_spin and self._last_s < _SOON_S else 0.0

    def again(self) -> bool:
        """Look again at once? Else it is time to sleep."""
        if monotonic() >= self._until_s:
            return False
        os.sched_yield()
        return True

    def end(self) -> None:
        """It has come."""
        self._last_s = monotonic() - self._began_s


class RLock:
    """``threading.RLock`` whose ``with`` raises FsError (EINTR)."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        acquire(self._lock)

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()

    def try_enter(self) -> bool:
        """Enter where that needs no waiting, to ``leave`` later; else False."""
        return self._lock.acquire(blocking=False)

    def leave(self) -> None:
        """The other half of ``try_enter``."""
        self._lock.release()
