"""daemon: a parent that tells the truth about its child, and a child that ends in order."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Callable, List, Optional

import pytest

from sftpmount import daemon
from sftpmount.daemon import Abandoned, supervise
from sftpmount.errors import MountpointError
from support.process import wait_until

# Forks in a process of its own: pytest's has threads.
_PARENT = """
import os, signal, sys, time
from sftpmount import daemon
from sftpmount.errors import HostKeyError, SftpMountError, MountpointError
def work(ready):
    print(os.getpid(), flush=True)
{work}
def usable():
{usable}
try:
    daemon.in_background(work, usable)
    print("usable")
except SftpMountError as error:
    print("failed", error.exit_status, error)
"""


class Parent:
    """A process that runs ``work`` in the background; ``child`` is the pid of the one that does."""

    def __init__(self, work: str, usable: str = "pass") -> None:
        code = _PARENT.format(work=_indented(work), usable=_indented(usable))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            bufsize=0,  # a buffer would keep from communicate() what came with the first line
            cwd=Path(__file__).parents[1],
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.child = int(self.process.stdout.readline())

    def says(self) -> str:
        """What it printed after the child's pid, once it has ended."""
        return self.process.communicate(timeout=20)[0].decode().strip()


def _indented(code: str) -> str:
    return "\n".join("    " + line for line in code.splitlines())


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_the_parent_returns_when_the_mount_is_usable_and_the_child_lives_on_without_the_terminal() -> None:
    parent = Parent("ready()\ntime.sleep(60)\nreturn 0", "time.sleep(0.3)")
    assert parent.says() == "usable"
    try:
        assert os.getsid(parent.child) == parent.child
        assert os.readlink(f"/proc/{parent.child}/cwd") == "/"
        links = {os.readlink(f"/proc/{parent.child}/fd/{number}") for number in (0, 1, 2)}
        assert links == {"/dev/null"}
    finally:
        os.kill(parent.child, signal.SIGKILL)


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ("raise HostKeyError('the key is new: look.')", "failed 6 the key is new: look."),
        ("raise ValueError('odd')", "failed 1 unexpected ValueError: odd"),
        ("raise KeyboardInterrupt", "failed 130 interrupted."),
        ("return 0", "failed 130 interrupted."),
        (
            "os._exit(0)",
            "failed 1 the mount's process ended early (without a word): run sftpmount with -d to see why.",
        ),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "failed 1 the mount's process ended early (signal 9): run sftpmount",
        ),
    ],
)
def test_what_goes_wrong_in_the_child_is_told_by_the_parent(work: str, said: str) -> None:
    parent = Parent(work)
    assert parent.says().startswith(said)
    assert is_gone(parent.child)


def test_a_mount_that_is_not_usable_is_ended() -> None:
    parent = Parent("ready()\ntime.sleep(60)\nreturn 0", "raise MountpointError('it does not show.')")
    assert parent.says() == "failed 3 it does not show."
    assert is_gone(parent.child)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("whole_group", [True, False], ids=["group", "parent"])
def test_an_interrupt_while_connecting_ends_both(number: signal.Signals, whole_group: bool) -> None:
    parent = Parent("while True: time.sleep(0.05)")  # a signal just before a sleep would not end it
    (os.killpg if whole_group else os.kill)(parent.process.pid, number)
    assert parent.says() == "failed 130 interrupted."
    assert is_gone(parent.child)


# -- supervise -------------------------------------------------------------------------------------------------------------


class Mount:
    """A file system that serves until it is unmounted and nobody uses it, and stores when told that it may."""

    def __init__(
        self, lost: Optional[List[str]] = None, *, in_use: bool = False, elsewhere: bool = False
    ) -> None:
        self.calls: List[str] = []
        self._lost = lost or []
        self.in_use = in_use
        self.elsewhere = elsewhere
        self.unmounted = threading.Event()
        self.may_store = threading.Event()
        self.may_store.set()
        self.failure: Optional[Exception] = None

    def serve(self, on_ready: Callable[[], None], on_forced: Callable[[], None]) -> None:
        if self.failure is not None:
            raise self.failure
        on_ready()
        assert self.unmounted.wait(20)

    def unmount(self) -> bool:
        self.calls.append("unmount")
        if not self.in_use and not self.elsewhere:
            self.unmounted.set()
        return self.in_use

    def is_elsewhere(self) -> bool:
        return self.elsewhere

    def store(self) -> List[str]:
        assert self.may_store.wait(20)
        self.calls.append("store")
        return self._lost

    def run(self, ready: Callable[[], None]) -> List[str]:
        return self.run_with(lambda end: ready())

    def run_with(self, ready: Callable[[Callable[[], None]], None]) -> List[str]:
        return supervise(
            self.serve,
            ready=ready,
            unmount=self.unmount,
            is_elsewhere=self.is_elsewhere,
            store=self.store,
            unstored=lambda: ["/a: interrupted"],
        )


def signal_self(*numbers: signal.Signals) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def test_an_unmount_from_outside_stores_and_ends() -> None:
    mount = Mount(["/a: No space left on device"])
    assert mount.run(mount.unmounted.set) == ["/a: No space left on device"]
    assert mount.calls == ["store"]


@pytest.mark.parametrize("number", daemon.STOP_SIGNALS)
def test_a_signal_unmounts_then_stores(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    mount = Mount()
    assert mount.run(lambda: signal_self(number)) == []
    assert mount.calls == ["unmount", "store"]
    assert signal.getsignal(number) is before


def test_a_signal_that_comes_before_the_mount_waits_for_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    mount = Mount()
    told: List[str] = []

    def serve(on_ready: Callable[[], None], on_forced: Callable[[], None]) -> None:
        signal_self(signal.SIGTERM)
        wait_until(lambda: "unmounting" in caplog.text, 20, "the signal's event, which is to come first")
        mount.serve(on_ready, on_forced)

    lost = supervise(
        serve,
        ready=lambda end: told.append("ready"),
        unmount=mount.unmount,
        is_elsewhere=mount.is_elsewhere,
        store=mount.store,
        unstored=list,
    )
    assert lost == [] and mount.calls == ["unmount", "store"] and told == []


def test_a_mount_in_use_is_stored_at_once_and_ends_with_its_last_user() -> None:
    mount = Mount(in_use=True)

    def last_user() -> None:
        wait_until(lambda: mount.calls == ["unmount", "store"], 20, "stored while in use")
        mount.unmounted.set()

    user = threading.Thread(target=last_user)
    user.start()
    assert mount.run(lambda: signal_self(signal.SIGTERM)) == []
    user.join()
    assert mount.calls == ["unmount", "store", "store"]


def test_a_mount_that_others_go_on_to_see_is_stored_and_ended() -> None:
    mount = Mount(["/a: No space left on device"], elsewhere=True)
    assert mount.run(lambda: signal_self(signal.SIGTERM)) == ["/a: No space left on device"]
    assert mount.calls == ["unmount", "store"]
    mount.unmounted.set()


def test_a_mount_in_use_that_others_go_on_to_see_ends_with_its_last_user_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(daemon, "LOOK_S", 0.01)
    mount = Mount(in_use=True)

    def last_user() -> None:
        wait_until(lambda: mount.calls.count("unmount") > 2, 20, "another look")
        mount.elsewhere, mount.in_use = True, False

    user = threading.Thread(target=last_user)
    user.start()
    assert mount.run(lambda: signal_self(signal.SIGTERM)) == []
    user.join()
    assert mount.calls.count("store") == 2
    mount.unmounted.set()


def test_an_end_that_was_asked_for_is_no_signal() -> None:
    """As often as it is asked for: the signal behind it is the first, and gives up nothing."""
    mount = Mount()
    mount.may_store.clear()

    def ready(end: Callable[[], None]) -> None:
        end()
        end()
        threading.Thread(target=signal_while_it_stores, args=(end,)).start()

    def signal_while_it_stores(end: Callable[[], None]) -> None:
        assert mount.unmounted.wait(20)
        signal_self(signal.SIGTERM)
        end()
        mount.may_store.set()

    assert mount.run_with(ready) == []
    assert mount.calls == ["unmount", "store"]


def test_who_asks_for_the_end_behind_it_is_not_heard() -> None:
    mount = Mount()
    asking: List[Callable[[], None]] = []

    def ready(end: Callable[[], None]) -> None:
        asking.append(end)
        end()

    assert mount.run_with(ready) == []
    asking[0]()
    assert mount.calls == ["unmount", "store"]


def test_a_second_signal_ends_at_once_and_names_what_is_lost() -> None:
    mount = Mount()
    mount.may_store.clear()

    def second() -> None:
        assert mount.unmounted.wait(20)
        signal_self(signal.SIGTERM)

    thread = threading.Thread(target=second)
    thread.start()
    with pytest.raises(Abandoned) as caught:
        mount.run(lambda: signal_self(signal.SIGINT))
    thread.join()
    assert caught.value.unstored == ["/a: interrupted"] and mount.calls == ["unmount"]
    mount.may_store.set()


def test_an_unmount_by_force_ends_at_once_and_names_what_is_lost() -> None:
    mount = Mount()

    def serve(on_ready: Callable[[], None], on_forced: Callable[[], None]) -> None:
        on_forced()
        mount.serve(on_ready, on_forced)

    with pytest.raises(Abandoned) as caught:
        supervise(
            serve,
            ready=lambda end: None,
            unmount=mount.unmount,
            is_elsewhere=mount.is_elsewhere,
            store=mount.store,
            unstored=lambda: ["/a: interrupted"],
        )
    assert caught.value.unstored == ["/a: interrupted"] and mount.calls == []
    mount.unmounted.set()


def test_what_serve_raises_is_raised() -> None:
    mount = Mount()
    mount.failure = MountpointError("busy.")
    with pytest.raises(MountpointError, match="busy"):
        mount.run(lambda: pytest.fail("never ready"))


def test_an_ignored_signal_stays_ignored() -> None:
    """nohup sftpmount -f: closing the terminal must not end the mount."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        mount = Mount()

        def ready() -> None:
            signal_self(signal.SIGHUP, signal.SIGTERM)

        assert mount.run(ready) == []
        assert mount.calls == ["unmount", "store"]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_stderr_of_others_is_harmless_and_given_back(capfd: pytest.CaptureFixture[str]) -> None:
    with daemon.harmless_stderr():
        os.write(2, b"LOOKUP /\x1b]0;evil\x07\n\tgetattr \xff")
    os.write(2, b"seen\n")
    assert capfd.readouterr().err == "LOOKUP /\\x1b]0;evil\\x07\n        getattr \\udcff\nseen\n"


def test_noise_is_kept_and_given_back(capfd: pytest.CaptureFixture[str]) -> None:
    noise = daemon.Noise()
    os.write(2, b"fuse: bad option\n  fusermount: no \xff\n")
    assert noise.end() == "fuse: bad option; fusermount: no \ufffd"
    assert noise.end() == ""
    os.write(2, b"seen")
    assert capfd.readouterr().err == "seen"
