"""Whom an operation is for: the threads of libfuse, and the programs that wait for them or are being ended.

A program that is ended while it waits for the server gets EINTR; umount -f ends the wait of all. What nobody waits for, such
as the release of a file, is done all the same. ``waiting`` is told here, once for each thread, how to find that out.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import os
import select
import signal
import threading
import time
from typing import Callable, Iterator, Optional

from .. import waiting

log = logging.getLogger(__name__)

FORCED_S = 1.0  # what an operation that does not wait for the server needs to end
# Python makes, and unmakes, its record of a thread with every call that comes from a thread of libfuse; with a page of stack
# each time that is a tenth of a write. A record that is asked for once more stays until the process ends, so only a number
# of threads gets one: libfuse keeps ten, those that a burst brings come and go.
_KEPT_THREADS_MAX = 64


class Callers:
    """The threads of one mount, and what they do.

    on_forced            called where it was unmounted by force while programs waited
    interrupted_program  the process that this thread's operation is for, where the kernel says that a signal came for it
    """

    def __init__(
        self, on_forced: Callable[[], None], interrupted_program: Callable[[], Optional[int]]
    ) -> None:
        self._on_forced = on_forced
        self._interrupted_program = interrupted_program
        self._is_forced = False
        # Operations that somebody waits for. Counted twice, since only next() is one step to all threads.
        self._begun, self._ended = itertools.count(), itertools.count()
        self._threads = itertools.count()
        self._thread = threading.local()  # caller: set with the first operation
        self._device: Optional[int] = None  # the descriptor of /dev/fuse

    def watch(self) -> None:
        """The kernel has begun to send requests: from now on it is known when it has ended."""
        self._device = _fuse_device()
        if self._device is not None:
            threading.Thread(
                target=self._watch_for_force, args=(os.dup(self._device),), name="force", daemon=True
            ).start()

    def begin(self) -> None:
        """This thread of libfuse begins an operation."""
        next(self._begun)
        try:
            self._thread.caller.operations += 1
        except AttributeError:
            self._new_thread()

    def end(self) -> None:
        """Its operation has ended."""
        next(self._ended)

    @contextlib.contextmanager
    def for_nobody(self) -> Iterator[None]:
        """No program waits for what is done within: it must be done, and an orderly unmount may come before it is."""
        next(self._ended)
        try:
            with waiting.patiently():
                yield
        finally:
            next(self._begun)

    def _new_thread(self) -> None:
        caller = self._thread.caller = _Caller()
        waiting.serve(self._is_given_up, lambda: self._end_of_operation(caller))
        if next(self._threads) < _KEPT_THREADS_MAX:
            ctypes.pythonapi.PyGILState_Ensure()

    def _end_of_operation(self, caller: _Caller) -> Callable[[], bool]:
        after = caller.operations + 1  # may be the second step of this one, a rename, unless it is what asks

        def is_over() -> bool:
            return (
                caller.operations > after or caller is self._thread.caller or caller.is_reading(self._device)
            )

        return is_over

    def _is_given_up(self) -> bool:
        pid = self._interrupted_program()
        return self._is_forced or (pid is not None and _is_being_ended(pid))

    def _in_progress(self) -> int:
        # A count shows what it would give next. Ended first, so that what begins between the two only makes it more.
        ended, begun = (int(repr(count)[len("count(") : -1]) for count in (self._ended, self._begun))
        return begun - ended

    def _watch_for_force(self, device: int) -> None:
        """umount -f ends the kernel's side while programs wait; an orderly unmount is refused then."""
        poll = select.poll()
        poll.register(device, 0)  # an error is told whatever is asked for
        poll.poll()
        os.close(device)
        time.sleep(FORCED_S)
        if self._in_progress() and self._in_progress():  # one look can meet a release between the two counts
            log.warning("unmounted by force, while programs waited for the server")
            self._is_forced = True
            self._on_forced()


class _Caller:
    """A thread of libfuse."""

    __slots__ = ("operations", "thread_id")

    def __init__(self) -> None:
        self.thread_id = threading.get_native_id()
        self.operations = 0

    def is_reading(self, device: Optional[int]) -> bool:
        """True where it waits for the kernel's next request."""
        try:
            with open(f"/proc/self/task/{self.thread_id}/syscall", encoding="ascii") as file:
                fields = file.read().split()  # number, arguments; or "running"
            return len(fields) > 1 and int(fields[1], 16) == device
        except (OSError, ValueError):
            return False


# What a local disk's programs can be ended by while they wait for it; also those that a program may want to clean up after.
_ENDING_SIGNALS = sum(
    1 << (number - 1)
    for number in (
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGQUIT,
        signal.SIGKILL,
        signal.SIGTERM,
        signal.SIGXCPU,
    )
)


def _is_being_ended(pid: int) -> bool:
    """True where a program has a signal to end it.

    The kernel also interrupts for signals that a program handles and goes on after: Go's runtime sends itself SIGURG all the
    time (golang/go issue 38836). To those EINTR from a file would be an error.
    """
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            fields = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
        pending = int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)
        return bool(pending & _ENDING_SIGNALS & ~int(fields["SigIgn"], 16) & ~int(fields["SigBlk"], 16))
    except FileNotFoundError:
        return True  # it has ended
    except (OSError, KeyError, ValueError):
        return False


def is_connected() -> bool:
    """True while the kernel has requests for this process's mount, from whichever mount namespace."""
    device = _fuse_device()
    if device is None:
        return False
    poll = select.poll()
    poll.register(device, 0)
    return not poll.poll(0)


def _fuse_device() -> Optional[int]:
    """The descriptor on which the kernel talks to libfuse."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                return int(name)
        except OSError:
            pass
    return None
