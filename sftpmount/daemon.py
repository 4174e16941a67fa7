"""The mount's process: into the background when it is usable, and orderly to its end.

``in_background`` forks before any thread exists. The child keeps the terminal while it connects, so that it can ask for a
password, and leaves it when the mount is usable; only then does the parent end, with 0. Whatever goes wrong before is
told by the parent, in the child's words and with its exit status.

``supervise`` runs the file system in a thread and keeps the main thread for signals, since Python delivers them only there.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import select
import signal
import sys
import threading
from types import FrameType, MappingProxyType
from typing import Callable, Deque, Dict, Iterator, List, Mapping, NoReturn, Optional, Tuple, Union

from .errors import SftpMountError
from .logs import printable

log = logging.getLogger(__name__)

INTERRUPTED = 130  # the shell's 128 + SIGINT
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SENT_AGAIN_S = 0.05
LOOK_S = 1.0
_READY = b"\0"


class ChildFailed(SftpMountError):
    """The background process ended, or was ended, before the mount was usable; the text and status are its own."""

    def __init__(self, text: str, exit_status: int) -> None:
        super().__init__(text)
        self.exit_status = exit_status


class Abandoned(Exception):
    """A second signal, or umount -f, ended the wait; ``unstored`` names what is lost ("path: reason")."""

    def __init__(self, unstored: List[str]) -> None:
        super().__init__("interrupted while storing")
        self.unstored = unstored


# -- into the background -------------------------------------------------------------------------------------------------


def in_background(work: Callable[[Callable[[], None]], int], check_usable: Callable[[], None]) -> None:
    """Run ``work(ready)`` in a child, and return once it has called ``ready`` and ``check_usable()`` does not raise.

    ``work`` returns an exit status. Raises ChildFailed, or what check_usable raised; the child has then ended.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until both can handle them
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run_child(writer, work)
    os.close(writer)
    interrupted: List[int] = []

    def pass_on(number: int, frame: Optional[FrameType]) -> None:
        interrupted.append(number)
        try:
            os.kill(child, signal.SIGTERM)
        except ProcessLookupError:
            pass  # it has ended by itself

    previous = _handle(pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        told = _read_all(reader)
        if told != _READY:
            raise _failure(told, os.waitpid(child, 0)[1], bool(interrupted))
        try:
            check_usable()
        except BaseException:
            os.kill(child, signal.SIGTERM)
            wait_status = os.waitpid(child, 0)[1]
            if interrupted:
                raise _failure(told, wait_status, True) from None
            raise
    finally:
        _restore(previous)


def _run_child(channel: int, work: Callable[[Callable[[], None]], int]) -> NoReturn:
    is_ready = False

    def ready() -> None:
        nonlocal is_ready
        os.setsid()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(null)
        os.write(channel, _READY)
        os.close(channel)
        is_ready = True

    status, sentence = 1, ""
    try:
        die_of_stop_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        status = work(ready)
        sentence = "interrupted."  # for a parent that waits still: a signal came before the mount did
        status = status if is_ready or status else INTERRUPTED
    except SftpMountError as error:
        status, sentence = error.exit_status, str(error)
        if is_ready:
            log.error("%s", sentence)
    except KeyboardInterrupt:
        status, sentence = INTERRUPTED, "interrupted."
    except BaseException as error:
        log.error("unexpected error", exc_info=True)
        sentence = f"unexpected {type(error).__name__}: {error}"
    finally:
        if not is_ready:
            os.write(channel, f"{status} {sentence}".encode("utf-8", "surrogateescape"))
        leave(status)


def leave(status: int) -> NoReturn:
    """End the process at once. Taking the interpreter down in order keeps umount waiting for a tenth of a second more."""
    sys.stderr.flush()
    logging.shutdown()
    os._exit(status)


def _read_all(descriptor: int) -> bytes:
    parts: List[bytes] = []
    while True:
        # Python runs the handler of a signal that comes just before a wait after that wait: so it is a short one.
        while not select.select([descriptor], [], [], 0.5)[0]:
            pass
        part = os.read(descriptor, 65536)
        if not part:
            os.close(descriptor)
            return b"".join(parts)
        parts.append(part)


def _failure(told: bytes, wait_status: int, was_interrupted: bool) -> ChildFailed:
    if was_interrupted:
        return ChildFailed("interrupted.", INTERRUPTED)
    status, _, sentence = told.decode("utf-8", "surrogateescape").partition(" ")
    if sentence:
        return ChildFailed(sentence, int(status))
    how = f"signal {os.WTERMSIG(wait_status)}" if os.WIFSIGNALED(wait_status) else "without a word"
    return ChildFailed(f"the mount's process ended early ({how}): run sftpmount with -d to see why.", 1)


# -- to the end ----------------------------------------------------------------------------------------------------------


def supervise(
    serve: Callable[[Callable[[], None], Callable[[], None]], None],
    *,
    ready: Callable[[Callable[[], None]], None],
    unmount: Callable[[], bool],
    is_elsewhere: Callable[[], bool],
    store: Callable[[], List[str]],
    unstored: Callable[[], List[str]],
    on_signals: Mapping[int, Callable[[], None]] = MappingProxyType({}),
) -> List[str]:
    """Run ``serve(on_ready, on_forced)`` in a thread until it ends, then ``store()``; return what that could not store.

    ready         called here, in the main thread, once ``serve`` has called its on_ready; on_forced is as good as two signals.
                  It is given a function that does what the first signal does, to be called from any thread; a signal that
                  comes then is still the first
    unmount       called for the first signal; True where programs still use the mount, which then ends with the last of
                  them: called again every ``LOOK_S`` as long as they do
    is_elsewhere  called when ``unmount`` returned False; True where ``serve`` would go on all the same, for others
    store         stores all that is held; may take long; also called when one of these two returned True
    unstored      what is held just now, at once: what Abandoned names when a second signal comes
    on_signals    what else is done for a signal, each time in a thread of its own: it may wait

    Raises Abandoned, and what ``serve`` raised.
    """
    # One byte for each event: a signal's number, written by Python's own handler in whichever thread it came to, or 0
    # for what ``work`` has to tell. A queue would not do: a signal can come just before the wait for its lock begins,
    # and does not end it then.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    told: Deque[Tuple[str, object]] = collections.deque()

    lock = threading.Lock()  # guards what follows
    is_over = False

    def tell(event: str, value: object = None) -> None:
        with lock:
            if not is_over:
                told.append((event, value))
                os.write(writer, b"\0")

    def work() -> None:
        try:
            try:
                serve(lambda: tell("ready"), lambda: tell("forced"))
            finally:
                lost = store()
            tell("ended", lost)
        except BaseException as error:
            tell("failed", error)

    def store_now() -> None:
        for each in store():
            log.warning("not stored yet: %s", each)

    def store_and_end() -> None:
        try:
            tell("ended", store())
        except BaseException as error:
            tell("failed", error)

    previous = _handle(lambda number, frame: None)
    # libfuse 2 takes Python's "ignored" for its own, and undoes it at its end; then a connection that breaks would end us.
    for each in (signal.SIGPIPE, *on_signals):
        previous[signal.Signals(each)] = signal.signal(each, lambda number, frame: None)
    previous_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=work, name="serve", daemon=True)
    try:
        thread.start()
        is_ready, is_ending, has_unmounted, is_in_use, signals = False, False, False, False, 0
        while True:
            if is_in_use and not select.select([reader], [], [], LOOK_S)[0]:
                event, value, number = "look", None, 0
            else:
                (number,) = os.read(reader, 1)
                event, value = ("signal", number) if number else told.popleft()
            if event == "ended":
                assert isinstance(value, list)
                return value
            if event == "failed":
                assert isinstance(value, BaseException)
                raise value
            if event == "forced":
                raise Abandoned(unstored())
            if event == "ready":
                is_ready = True
                if not is_ending:
                    ready(lambda: tell("end"))
            elif event == "end":
                is_ending = True
            elif number in STOP_SIGNALS:
                is_ending = True
                signals += 1
                log.info("signal %d: unmounting", number)
            elif number in on_signals:
                threading.Thread(target=on_signals[number], name="signal", daemon=True).start()
            if signals > 1:
                raise Abandoned(unstored())
            if is_ready and is_ending and (event == "look" or not has_unmounted):
                is_in_use = unmount()
                if not is_in_use and is_elsewhere():
                    log.warning("still mounted in another mount namespace: it ends there, too")
                    threading.Thread(target=store_and_end, name="store", daemon=True).start()
                elif is_in_use and not has_unmounted:
                    log.warning("it is in use: the mount ends when the last program has closed its files")
                    threading.Thread(target=store_now, name="store", daemon=True).start()
                has_unmounted = True
    finally:
        signal.set_wakeup_fd(previous_wakeup)
        _restore(previous)
        with lock:  # the threads may still have something to tell
            is_over = True
        os.close(reader)
        os.close(writer)


class Noise:
    """Keeps from the terminal what libfuse and fusermount write to descriptor 2, until ``end()``."""

    def __init__(self) -> None:
        self._terminal: Optional[int] = os.dup(2)
        self._kept = os.memfd_create("stderr")
        os.dup2(self._kept, 2)

    def end(self) -> str:
        """Give descriptor 2 back; returns what was kept as one line, "" the second time."""
        if self._terminal is None:
            return ""
        os.dup2(self._terminal, 2)
        os.close(self._terminal)
        self._terminal = None
        text = os.pread(self._kept, 4096, 0).decode("utf-8", "replace")
        os.close(self._kept)
        return "; ".join(line.strip() for line in text.splitlines() if line.strip())


@contextlib.contextmanager
def harmless_stderr() -> Iterator[None]:
    """Within, what is written to descriptor 2 arrives there as ``printable`` has it, line by line: when libfuse debugs, it
    repeats names as a server made them."""
    terminal = os.dup(2)
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(writer)

    def carry() -> None:
        with os.fdopen(reader, "rb") as lines, os.fdopen(terminal, "wb", buffering=0) as shown:
            for line in lines:
                shown.write(os.fsencode(printable(os.fsdecode(line).rstrip("\n").expandtabs())) + b"\n")

    thread = threading.Thread(target=carry, name="stderr", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        thread.join(1.0)  # a ProxyCommand may hold the other end for longer


# -- signals -------------------------------------------------------------------------------------------------------------


def die_of_stop_signals() -> None:
    """Let the stop signals end this process at once, which is right while nothing is mounted.

    A KeyboardInterrupt instead would come late where the signal comes just before a long wait.
    """
    _handle(signal.SIG_DFL)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within, stop signals raise KeyboardInterrupt: for a prompt that must give the terminal its echo back."""
    interrupted = threading.Event()

    def interrupt(number: int, frame: Optional[FrameType]) -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN)  # one is enough: the next would hit what cleans up
        interrupted.set()  # not before: it takes a lock, which a second signal would wait for
        raise KeyboardInterrupt

    previous = _handle(interrupt)
    try:
        with _sent_until(interrupted):
            yield
    finally:
        if not interrupted.is_set():
            _restore(previous)


@contextlib.contextmanager
def _sent_until(handled: threading.Event) -> Iterator[None]:
    """Within, a stop signal is sent again until it is ``handled``: one that comes just before this thread begins to read
    does not end the read, and its handler would have to wait for the answer."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    waiting = threading.get_ident()

    def send() -> None:
        while came := os.read(reader, 1):
            while came[0] in STOP_SIGNALS and not handled.wait(SENT_AGAIN_S):
                signal.pthread_kill(waiting, came[0])
        os.close(reader)

    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=send, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)
        thread.join()


_Handler = Union[Callable[[int, Optional[FrameType]], object], signal.Handlers]


def _handle(handler: _Handler) -> Dict[signal.Signals, object]:
    """Set the handler of the stop signals, but of none that is ignored (nohup); returns the previous ones."""
    wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


def _restore(previous: Dict[signal.Signals, object]) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler)  # type: ignore[arg-type]
