"""The threads that take requests: one reads, whoever waits lets another, and at the end all is worked off.

A pair of sockets that keep messages apart stands for /dev/fuse.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import threading
import time
from typing import Callable, Dict, Iterator, List

import pytest

from sftpmount import waiting
from sftpmount.fs import loop as module
from sftpmount.fs.loop import Loop
from support.process import wait_until

WAIT_S = 20.0


class Kernel:
    """Sends requests to a loop, whose threads do what ``does`` has under their text, and keeps who did what."""

    def __init__(self) -> None:
        self.does: Dict[bytes, Callable[[], object]] = {}
        self.done: List[bytes] = []
        self.threads: Dict[bytes, str] = {}
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.loop = Loop(self._theirs.fileno(), 4096, self._work, on_thread=self._on_thread)
        self.errors: List[OSError] = []
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.loop.run()
        except OSError as error:
            self.errors.append(error)

    def _on_thread(self) -> None:
        waiting.serve(lambda: False, step_aside=self.loop.step_aside, others=self.loop.others)

    def _work(self, address: int, length: int) -> None:
        text = ctypes.string_at(address, length)
        self.threads[text] = threading.current_thread().name
        self.does.get(text, lambda: None)()
        self.done.append(text)

    def ask(self, text: bytes, does: Callable[[], object] = lambda: None) -> None:
        self.does[text] = does
        self._ours.send(text)

    def expect(self, *texts: bytes) -> None:
        wait_until(lambda: set(texts) <= set(self.done), WAIT_S, f"{texts} (have {self.done})")

    def end(self) -> None:
        self._ours.close()

    def close(self) -> None:
        self.end()
        self.thread.join(WAIT_S)
        assert not self.thread.is_alive()
        self._theirs.close()


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    yield kernel
    kernel.close()


def test_one_thread_serves_who_asks_one_thing_after_the_other(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STUCK_S", 1000.0)
    texts = [b"%d" % number for number in range(300)]
    for text in texts:
        kernel.ask(text)
        kernel.expect(text)
    assert kernel.done == texts
    assert len(set(kernel.threads.values())) == 1


def test_who_waits_lets_another_read_at_once(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STUCK_S", 1000.0)
    lock = threading.Lock()
    lock.acquire()
    kernel.ask(b"waits", lambda: waiting.acquire(lock))
    kernel.ask(b"meanwhile")
    kernel.expect(b"meanwhile")
    assert b"waits" not in kernel.done
    lock.release()
    kernel.expect(b"waits")


def test_who_waits_for_input_lets_another_read_when_there_is_something(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STUCK_S", 1000.0)
    reader, writer = os.pipe()
    found: List[bool] = []
    kernel.ask(b"waits", lambda: found.append(waiting.for_input(reader, WAIT_S)))
    wait_until(lambda: b"waits" in kernel.threads, WAIT_S, "the first request")
    kernel.ask(b"meanwhile")
    kernel.expect(b"meanwhile")
    assert not found and kernel.threads[b"meanwhile"] != kernel.threads[b"waits"]
    os.write(writer, b"x")
    kernel.expect(b"waits")
    assert found == [True]
    os.close(reader)
    os.close(writer)


def test_who_looks_out_for_something_lets_others_read(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_STUCK_S", 1000.0)
    is_over = threading.Event()

    def look_out() -> None:
        while not is_over.is_set():
            waiting.let_others()

    kernel.ask(b"looks out", look_out)
    kernel.ask(b"meanwhile")
    kernel.expect(b"meanwhile")
    is_over.set()
    kernel.expect(b"looks out")


def test_input_that_does_not_come(kernel: Kernel) -> None:
    reader, writer = os.pipe()
    assert not waiting.for_input(reader, 0.01)
    os.close(reader)
    os.close(writer)


def test_a_thread_that_stands_without_a_word_is_relieved(kernel: Kernel) -> None:
    event = threading.Event()
    kernel.ask(b"stands", lambda: event.wait(WAIT_S))
    kernel.ask(b"meanwhile")
    kernel.expect(b"meanwhile")
    assert b"stands" not in kernel.done
    event.set()
    kernel.expect(b"stands")


def test_that_also_after_a_long_quiet(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WATCH_S", 0.02)
    kernel.ask(b"first")
    kernel.expect(b"first")
    wait_until(lambda: not kernel.loop._watched.is_set(), WAIT_S, "nobody watches")
    test_a_thread_that_stands_without_a_word_is_relieved(kernel)


def test_a_crowd_is_served_and_most_of_its_threads_go(kernel: Kernel) -> None:
    locks = [threading.Lock() for _ in range(40)]
    for number, lock in enumerate(locks):
        lock.acquire()
        kernel.ask(b"%d" % number, lambda lock=lock: waiting.acquire(lock))  # type: ignore[misc]
    wait_until(lambda: len(kernel.threads) == len(locks), WAIT_S, "all are being served")
    assert len(set(kernel.threads.values())) == len(locks)
    for lock in locks:
        lock.release()
    kernel.expect(*(b"%d" % number for number in range(len(locks))))
    wait_until(lambda: len(kernel.loop._threads) <= module._PARKED_MAX + 1, WAIT_S, "the others have gone")
    kernel.ask(b"afterwards")
    kernel.expect(b"afterwards")


def test_the_end_waits_for_what_is_under_way(kernel: Kernel) -> None:
    lock = threading.Lock()
    lock.acquire()
    kernel.ask(b"waits", lambda: waiting.acquire(lock))
    wait_until(lambda: b"waits" in kernel.threads, WAIT_S, "the request")
    kernel.end()
    kernel.thread.join(0.2)
    assert kernel.thread.is_alive()
    lock.release()
    kernel.thread.join(WAIT_S)
    assert not kernel.thread.is_alive() and kernel.done == [b"waits"] and not kernel.errors
    assert not kernel.loop._threads


def test_a_device_that_fails() -> None:
    spare = os.open(os.devnull, os.O_WRONLY)  # may not be read: EBADF
    with pytest.raises(OSError):
        Loop(spare, 4096, lambda address, length: None).run()
    os.close(spare)


def test_without_another_thread_who_waits_is_waited_for(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = threading.Lock()
    lock.acquire()
    kernel.ask(b"first")
    kernel.expect(b"first")
    with monkeypatch.context() as patched:

        def start(server: module._Server) -> None:
            raise RuntimeError("can't start new thread")

        patched.setattr(module._Server, "start", start)
        kernel.ask(b"waits", lambda: waiting.acquire(lock))
        kernel.ask(b"behind")
        wait_until(lambda: b"waits" in kernel.threads, WAIT_S, "the first request")
        lock.release()
        kernel.expect(b"waits", b"behind")
    assert kernel.threads[b"waits"] == kernel.threads[b"behind"]


def test_who_was_done_before_it_turned_out_that_no_other_can_be_had_reads_on(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.ask(b"first")
    kernel.expect(b"first")
    leader = kernel.loop._leader
    may_end = threading.Event()

    def start(server: module._Server) -> None:
        may_end.set()
        wait_until(lambda: leader in kernel.loop._parked, WAIT_S, "the end of what was stuck")
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(module._Server, "start", start)
        kernel.ask(b"stuck", lambda: may_end.wait(WAIT_S))
        kernel.expect(b"stuck")
    kernel.ask(b"behind")
    kernel.expect(b"behind")
    assert kernel.threads[b"stuck"] == kernel.threads[b"behind"]


def test_a_fault_of_ours_ends_the_mount(kernel: Kernel) -> None:
    def fail() -> None:
        raise ValueError("a fault of ours")

    kernel.ask(b"fails", fail)
    kernel.thread.join(WAIT_S)
    assert not kernel.thread.is_alive()
    assert [error.errno for error in kernel.errors] == [errno.EIO]


def test_two_that_read_at_once_for_a_moment(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is relieved the moment it is done reads once more."""
    monkeypatch.setattr(module, "_STUCK_S", 1000.0)
    kernel.ask(b"first")
    kernel.expect(b"first")
    leader = kernel.loop._leader
    assert leader is not None
    kernel.loop._relieve(leader)  # while it sleeps in its poll
    for number in range(20):
        kernel.ask(b"%d" % number)
        kernel.expect(b"%d" % number)
    assert not kernel.errors and kernel.loop._leader is not leader


def test_an_idle_loop_sleeps(kernel: Kernel) -> None:
    kernel.ask(b"first")
    kernel.expect(b"first")
    before_s = time.process_time()
    time.sleep(1.0)  # what is measured is that nothing happens
    assert time.process_time() - before_s < 0.5
