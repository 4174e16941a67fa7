"""The threads that take the kernel's requests from /dev/fuse and have libfuse work them off.

libfuse's own loop keeps up to ten threads asleep in read(2); the kernel wakes one for each request, and to wake a thread that
sleeps on another processor takes longer than most of what is then done: on a virtual machine a hundred microseconds, where a
look at a name that is known takes twenty. So here:

1. One thread reads at a time, the *leader*. It works its request off itself, and reads the next: a program that does one thing
   after the other is served by one thread, which is awake.
2. Before a leader waits for something, it makes another thread leader (``step_aside``, which ``waiting`` calls). One that has
   stood for ``_STUCK_S`` is relieved in any case, so a wait that says nothing only makes the others late.
3. Where the last request came within ``SPIN_S``, the leader looks for the next one for as long before it sleeps.
4. Threads that are not needed are kept, at most ``_PARKED_MAX``. ``run`` returns when the kernel has ended the mount and
   every request is worked off.

``_lock`` guards who leads, and is a leaf.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import select
import threading
from _thread import allocate_lock
from typing import Callable, List, Optional

from ..waiting import Spin

log = logging.getLogger(__name__)

_PARKED_MAX = 10
_STUCK_S = 0.01
_WATCH_S = 1.0  # without requests for so long, nobody looks whether the leader is stuck


class _Server(threading.Thread):
    """A thread of the loop; a raw lock is its bed."""

    def __init__(self, loop: Loop, number: int) -> None:
        super().__init__(name=f"fuse-{number}", daemon=True)
        self.buffer = mmap.mmap(-1, loop.buffer_bytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        self.poll = select.poll()  # its own: for a moment two may read
        self.poll.register(loop.device, select.POLLIN)
        self.bed = allocate_lock()
        self.bed.acquire()
        self.requests = 0  # taken so far
        self.is_working = False
        self._loop = loop

    def run(self) -> None:
        self._loop.serve(self)


class Loop:
    """Serves the requests of one mount.

    device         the descriptor of /dev/fuse, which is made non-blocking
    buffer_bytes   of the longest request
    work           called with the address and the length of each, in a thread of the loop; it answers the kernel
    at_once        called before, with the buffer and the length: True where it has done all there is to do, without waiting
    on_thread      called in each new thread of the loop, at its start
    """

    def __init__(
        self,
        device: int,
        buffer_bytes: int,
        work: Callable[[int, int], None],
        *,
        at_once: Callable[[mmap.mmap, int], bool] = lambda buffer, length: False,
        on_thread: Callable[[], None] = lambda: None,
    ) -> None:
        self.buffer_bytes = buffer_bytes
        self.device = device
        self._work = work
        self._at_once = at_once
        self._on_thread = on_thread
        self._lock = threading.Lock()
        self._threads: List[_Server] = []
        self._parked: List[_Server] = []
        self._leader: Optional[_Server] = None
        self._made = 0
        self._ended = threading.Event()
        self._error: Optional[OSError] = None
        self._spin = Spin()
        self._watched = threading.Event()  # somebody looks whether the leader is stuck

    def run(self) -> None:
        """Serve until the kernel has ended the mount. Raises OSError."""
        os.set_blocking(self.device, False)
        with self._lock:
            first = self._leader = self._new_server()
        first.start()
        self._watch()
        while True:
            with self._lock:
                threads = list(self._threads)
                for each in self._parked:
                    each.bed.release()
                self._parked.clear()
            if not threads:
                break
            for each in threads:
                each.join()
        if self._error is not None:
            raise self._error

    def step_aside(self) -> None:
        """The calling thread is about to wait: another one reads from now on. Nothing where it does not lead."""
        leader = self._leader
        if leader is threading.current_thread():
            self._relieve(leader)

    def others(self) -> int:
        """The descriptor on which a request would come that waits for the calling thread; -1 where another one reads."""
        return self.device if self._leader is threading.current_thread() else -1

    # -- the threads ----------------------------------------------------------------------------------------------------

    def _new_server(self) -> _Server:
        self._made += 1
        server = _Server(self, self._made)
        self._threads.append(server)
        return server

    def _relieve(self, leader: _Server) -> None:
        with self._lock:
            if self._leader is not leader or self._ended.is_set():
                return
            is_new = not self._parked
            successor = self._new_server() if is_new else self._parked.pop()
            self._leader = successor
        if not is_new:
            successor.bed.release()
            return
        try:
            successor.start()
        except RuntimeError as error:  # no more threads: others wait until this one is done
            with self._lock:
                self._threads.remove(successor)
                self._leader = leader
                if leader in self._parked:  # done meanwhile
                    self._parked.remove(leader)
                    leader.bed.release()
            log.warning("no thread for the kernel's next request: %s", error)

    def serve(self, me: _Server) -> None:
        """The life of a thread: it leads, and is parked when another does, until too many are."""
        try:
            self._on_thread()
            while self._lead(me):
                with self._lock:
                    if self._ended.is_set() or len(self._parked) >= _PARKED_MAX:
                        return
                    self._parked.append(me)
                me.bed.acquire()
                if self._ended.is_set():
                    return
        except Exception as error:  # better no mount than one that nobody serves
            log.exception("a thread that serves the kernel ended in a way that is not foreseen")
            self._end(OSError(errno.EIO, str(error)))
        finally:
            with self._lock:
                self._threads.remove(me)

    def _lead(self, me: _Server) -> bool:
        """Take and work off requests while it leads; False at the end of the mount."""
        may_spin = False  # who is made leader while the one before waits has time
        while self._leader is me:
            size = self._receive(me, may_spin)
            may_spin = True
            if not size:
                return False
            me.requests += 1
            me.is_working = True
            if not self._watched.is_set():
                self._watched.set()
            if not self._at_once(me.buffer, size):
                self._work(me.address, size)
            me.is_working = False
        return True

    def _end(self, error: Optional[OSError] = None) -> None:
        self._error = self._error or error
        self._ended.set()
        self._watched.set()

    def _receive(self, me: _Server, may_spin: bool) -> int:
        """The next request, and its length; 0 at the end of the mount."""
        self._spin.begin(may_spin)
        while True:
            try:
                size = os.readv(self.device, [me.buffer])
            except BlockingIOError:
                if not self._spin.again():
                    me.poll.poll()
                continue
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):  # ENOENT: it was taken back before it was read
                    continue
                self._end(None if error.errno == errno.ENODEV else error)
                return 0
            self._spin.end()
            if not size:
                self._end()
            return size

    # -- who is stuck -----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Until the end: relieve a leader that does not come back to read."""
        quiet_s, before = 0.0, (self._leader, 0)
        while not self._ended.wait(_STUCK_S):
            leader = self._leader
            assert leader is not None
            now = (leader, leader.requests)
            if now != before:
                quiet_s, before = 0.0, now
            elif leader.is_working:
                self._relieve(leader)
            else:
                quiet_s += _STUCK_S
                if quiet_s >= _WATCH_S:
                    self._watched.clear()
                    if not leader.is_working and self._leader is leader:
                        self._watched.wait()
                    self._watched.set()
                    quiet_s = 0.0
