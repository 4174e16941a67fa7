"""Whom an operation is for: the threads that serve, and the programs that wait for them or are being ended.

A program that is ended while it waits for the server gets EINTR; umount -f ends the wait of all. What nobody waits for, such
as the release of a file, is done all the same. ``waiting`` is told here, once for each thread, how to find that out.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import select
import signal
import threading
import time
from typing import Callable, Iterator, Optional

from .. import waiting
from .loop import Loop

log = logging.getLogger(__name__)

FORCED_S = 1.0  # what an operation that does not wait for the server needs to end


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
        self._thread = threading.local()  # caller: in the threads of the loop
        self._device: Optional[int] = None  # the descriptor of /dev/fuse

    def watch(self) -> None:
        """The kernel has begun to send requests: from now on it is known when it has ended."""
        self._device = _fuse_device()
        if self._device is not None:
            threading.Thread(
                target=self._watch_for_force, args=(os.dup(self._device),), name="force", daemon=True
            ).start()

    def serve(self, loop: Loop) -> None:
        """This thread is one of ``loop``."""
        caller = self._thread.caller = _Caller()
        waiting.serve(self._is_given_up, lambda: self._end_of_operation(caller), loop.step_aside, loop.others)

    def request_ended(self) -> None:
        """libfuse is done with the request that this thread had taken."""
        self._thread.caller.requests += 1

    def begin(self) -> None:
        """An operation begins in this thread."""
        next(self._begun)

    def end(self) -> None:
        """It has ended."""
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

    def _end_of_operation(self, caller: _Caller) -> Callable[[], bool]:
        now = caller.requests

        def is_over() -> bool:
            return caller.requests != now or caller is getattr(self._thread, "caller", None)

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
    """A thread of the loop."""

    __slots__ = ("requests",)

    def __init__(self) -> None:
        self.requests = 0  # that it has worked off


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
