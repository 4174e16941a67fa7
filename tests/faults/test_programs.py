"""Real programs on a mount whose connection is cut, stalled or silently dead, or whose server is killed or stopped.

In each case the program must succeed as if nothing had happened, and the server must hold the right bytes. The faults are
placed by the bytes that have passed, and each test asserts that they did happen while the program ran.
"""

from __future__ import annotations

import filecmp
import os
import signal
import time
from pathlib import Path
from typing import Any, Callable, List

import pytest

from contrib.lib.recipes import BORG, RESTIC, Recipe
from faults.conftest import QUICK, Line, in_background
from mount.helpers import fsync_directory, noise, opened
from support.process import is_running, send_signal, wait_until
from tools.practice import Practice
from tools.trees import make_tree, metadata, run, same_contents

MiB = 1 << 20
PROGRAM_TIMEOUT_S = 240.0


def dd(source: Path, target: Path, *more: str) -> None:
    run("dd", f"if={source}", f"of={target}", "bs=1M", "status=none", *more)


def write_64_mebibytes(source: Path, line: Line) -> None:
    dd(source, line.mount.path / "file", "conv=fsync")


def assert_stored(line: Line, source: Path, name: str = "file") -> None:
    assert filecmp.cmp(line.mount.served / name, source, shallow=False)
    assert filecmp.cmp(line.mount.path / name, source, shallow=False)


def assert_cut(line: Line, times: int) -> None:
    assert line.relay.stats()["resets"] == times
    assert line.reconnects >= times, line.mount.log_text()


# ---- a connection that is reset ----


def test_write_with_three_resets(line: Line, megabytes_64: Path) -> None:
    line.relay.reset_after(15 * MiB, times=3)
    write_64_mebibytes(megabytes_64, line)
    assert_cut(line, 3)
    assert_stored(line, megabytes_64)
    line.unmount()


def test_cold_read_with_two_resets(line: Line, megabytes_64: Path, tmp_path: Path) -> None:
    run("cp", megabytes_64, line.mount.served / "file")
    line.relay.reset_after(20 * MiB, "down", times=2)
    dd(line.mount.path / "file", tmp_path / "back")
    assert_cut(line, 2)
    assert filecmp.cmp(tmp_path / "back", megabytes_64, shallow=False)


CUTS = {
    "close": ("written",),
    "fsync": ("written",),
    "close after fsync": ("fsynced",),
    "rename": ("closed",),
    "all": ("opened", "written", "fsynced", "closed", "renamed"),
}


@pytest.mark.parametrize("noticed", [False, True], ids=["at once", "when noticed"])
@pytest.mark.parametrize("before", CUTS)
def test_replacing_a_file_with_resets_between_its_steps(line: Line, before: str, noticed: bool) -> None:
    """As restic, borg and editors do: a new file under a temporary name, fsync, close, rename onto the old one.

    "When noticed": the next step comes when the mount has seen that the connection is gone; else it may find it out itself.
    """
    data = noise(2 * MiB + 5, seed=7)
    (line.mount.served / "final").write_bytes(b"old")
    cuts = CUTS[before]
    made: List[str] = []

    def after(step: str) -> None:
        if step in cuts:
            wait_until(lambda: line.reconnects == len(made), 20, "the connection")
            line.relay.reset()
            made.append(step)
            if noticed:
                wait_until(lambda: line.losses == len(made), 20, "the loss")

    with opened(line.mount.path / "temporary", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600) as fd:
        after("opened")
        for start in range(0, len(data), 100_000):
            assert os.write(fd, data[start : start + 100_000]) == len(data[start : start + 100_000])
        after("written")
        if before != "close":
            os.fsync(fd)
            assert (line.mount.served / "temporary").read_bytes() == data
        after("fsynced")
    assert (line.mount.served / "temporary").read_bytes() == data
    after("closed")
    os.rename(line.mount.path / "temporary", line.mount.path / "final")
    assert (line.mount.served / "final").read_bytes() == data
    assert os.listdir(line.mount.served) == ["final"]
    after("renamed")
    assert (line.mount.path / "final").read_bytes() == data
    assert os.listdir(line.mount.path) == ["final"]
    wait_until(lambda: line.reconnects >= len(cuts), 20, "the last reconnect")
    assert_cut(line, len(cuts))


def rsync(line: Line, source: Path) -> None:
    run("rsync", "-a", f"{source}/", f"{line.mount.path}/copy/")


def assert_rsynced(line: Line, source: Path) -> None:
    copy = line.mount.served / "copy"
    same_contents(source, copy)
    fsync_directory(line.mount.path / "copy")
    assert metadata(source) == metadata(copy)
    assert run("rsync", "-ainc", "--delete", f"{source}/", f"{line.mount.path}/copy/") == ""


def test_rsync_of_500_files_with_six_resets(line: Line, tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source", files=500)
    line.relay.reset_after(2 * MiB, times=6)
    rsync(line, source)
    assert_cut(line, 6)
    assert_rsynced(line, source)
    line.unmount()


@pytest.mark.long
def test_rsync_out_with_six_resets(line: Line, tmp_path: Path) -> None:
    source = make_tree(line.mount.served / "source", files=500)
    line.relay.reset_after(2 * MiB, "down", times=6)
    run("rsync", "-a", f"{line.mount.path}/source/", f"{tmp_path}/copy/")
    assert_cut(line, 6)
    same_contents(source, tmp_path / "copy")
    assert metadata(source) == metadata(tmp_path / "copy")


def repository(recipe: Recipe, line: Line, tmp_path: Path) -> Practice:
    practice = Practice(recipe, line.mount.path, tmp_path, 40 * MiB)
    practice.init()
    return practice


def assert_whole(practice: Practice, line: Line) -> None:
    """The tool says so, here and on the server, and what comes back is the source. A lock left over would be in its way."""
    practice.verify()
    practice.restore()
    line.unmount()
    practice.look_at(line.mount.served)
    practice.verify()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("recipe", "resets"),
    [
        # Each reconnect within ten seconds of the last waits twice as long: eight take half a minute.
        pytest.param(RESTIC, 4, id="restic-4"),
        pytest.param(RESTIC, 8, id="restic-8", marks=pytest.mark.long),
        pytest.param(BORG, 8, id="borg-8", marks=pytest.mark.long),
    ],
)
def test_backup_with_resets(line: Line, tmp_path: Path, recipe: Recipe, resets: int) -> None:
    practice = repository(recipe, line, tmp_path)
    line.relay.reset_after(36 * MiB // resets, times=resets)
    practice.backup()
    assert_cut(line, resets)
    assert_whole(practice, line)


# ---- a connection on which nothing moves ----


def start_write(line: Line, source: Path, at_byte: int = 16 * MiB) -> Any:
    """dd on a line of 200 Mbit/s, so slow that what comes next falls into its middle."""
    line.relay.set_line(up_bps=200e6)
    writing = in_background(write_64_mebibytes, source, line)
    line.wait_for_bytes(at_byte)
    return writing


def black_hole(line: Line, seconds: float, running: Any) -> None:
    """Let nothing pass for so long, while ``running`` is."""
    line.relay.stall()
    passed = sum(line.relay.stats()[way] for way in ("up", "down"))
    time.sleep(seconds)
    assert not running.done()
    assert sum(line.relay.stats()[way] for way in ("up", "down")) - passed < MiB
    line.relay.flow()


@pytest.mark.long
@pytest.mark.parametrize("options", [(), QUICK], ids=["sat out", "reconnected"])
@pytest.mark.parametrize("seconds", [10, 60])
@pytest.mark.timeout(300)
def test_write_into_a_black_hole(
    make_line: Callable[..., Line], megabytes_64: Path, options: Any, seconds: int
) -> None:
    """With the defaults ten seconds of silence are waited for; a minute is a lost connection."""
    line = make_line(*options)
    writing = start_write(line, megabytes_64)
    black_hole(line, seconds, writing)
    writing.result(PROGRAM_TIMEOUT_S)
    assert (line.reconnects > 0) == (options == QUICK or seconds == 60), line.mount.log_text()
    assert_stored(line, megabytes_64)
    line.unmount()


@pytest.mark.long
def test_write_on_a_connection_that_died_silently(line: Line, megabytes_64: Path) -> None:
    """As after a changed address: the old connection is a black hole, a new one works."""
    writing = start_write(line, megabytes_64)
    line.relay.stall(new_connections=False)
    writing.result(PROGRAM_TIMEOUT_S)
    assert line.reconnects == 1
    assert_stored(line, megabytes_64)
    line.unmount()


@pytest.mark.long
def test_cold_read_on_a_connection_that_died_silently(line: Line, megabytes_64: Path, tmp_path: Path) -> None:
    run("cp", megabytes_64, line.mount.served / "file")
    line.relay.set_line(down_bps=200e6)
    reading = in_background(dd, line.mount.path / "file", tmp_path / "back")
    line.wait_for_bytes(16 * MiB, "down")
    line.relay.stall(new_connections=False)
    reading.result(PROGRAM_TIMEOUT_S)
    assert line.reconnects == 1
    assert filecmp.cmp(tmp_path / "back", megabytes_64, shallow=False)


# ---- a server that is killed, or stands still ----


def crash(line: Line, running: Any) -> None:
    """Kill the server and all its sessions; start it again five seconds later."""
    assert line.sshd.sessions()
    line.sshd.kill()
    time.sleep(5.0)
    assert not running.done()
    line.sshd.start()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_write_while_the_server_is_killed(line: Line, megabytes_64: Path) -> None:
    writing = start_write(line, megabytes_64)
    crash(line, writing)
    writing.result(PROGRAM_TIMEOUT_S)
    assert line.reconnects >= 1
    assert_stored(line, megabytes_64)
    line.unmount()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_rsync_while_the_server_is_killed(line: Line, tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source", files=500)
    copying = in_background(rsync, line, source)
    line.wait_for_bytes(4 * MiB)
    crash(line, copying)
    copying.result(PROGRAM_TIMEOUT_S)
    assert line.reconnects >= 1
    assert_rsynced(line, source)
    line.unmount()


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("recipe", [RESTIC, BORG], ids=lambda recipe: recipe.name)
def test_backup_while_the_server_is_killed(line: Line, tmp_path: Path, recipe: Recipe) -> None:
    practice = repository(recipe, line, tmp_path)
    backup = in_background(practice.backup)
    line.wait_for_bytes(12 * MiB)
    crash(line, backup)
    backup.result(PROGRAM_TIMEOUT_S)
    assert line.reconnects >= 1
    assert_whole(practice, line)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("options", [(), QUICK], ids=["sat out", "reconnected"])
def test_write_while_the_session_stands_still(
    make_line: Callable[..., Line], megabytes_64: Path, options: Any
) -> None:
    """The sessions on the server stand still for twenty seconds, then go on with what they had been sent."""
    line = make_line(*options)
    writing = start_write(line, megabytes_64)
    sessions = line.sshd.sessions()
    assert sessions
    send_signal(sessions, signal.SIGSTOP)
    time.sleep(20.0)
    assert writing.done() == (options == QUICK)
    send_signal(sessions, signal.SIGCONT)
    writing.result(PROGRAM_TIMEOUT_S)
    assert line.reconnects == (options == QUICK)
    if options == QUICK:
        wait_until(lambda: not any(map(is_running, sessions)), 30, "the end of the old sessions")
    assert_stored(line, megabytes_64)
    line.unmount()


# What was sent to a session before it was given up may still be carried out by it, when the server is there again. It must
# not come behind what we do then.


def while_the_server_sleeps(line: Line, change: Callable[[], object]) -> None:
    """``change()`` begins while the sessions stand still; they wake up, and do what they had been sent, as we dial again."""
    sessions = line.sshd.sessions()
    send_signal(sessions, signal.SIGSTOP)
    changing = in_background(change)
    wait_until(lambda: bool(set(line.sshd.sessions()) - set(sessions)), 30, "the next session")
    send_signal(sessions, signal.SIGCONT)
    changing.result(PROGRAM_TIMEOUT_S)
    wait_until(lambda: line.reconnects >= 1, 30, "the log, which is written behind the event")
    assert line.reconnects == 1
    wait_until(lambda: not any(map(is_running, sessions)), 30, "the end of the old sessions")


@pytest.mark.parametrize("size", [4096, pytest.param(300_000, marks=pytest.mark.long)])
def test_a_session_that_wakes_up_writes_nothing_old(line: Line, size: int) -> None:
    with opened(line.mount.path / "file", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, bytes(size), 0)
        os.fsync(fd)

        def write_twice() -> None:
            for content in (b"1", b"2"):  # the first is sent to both sessions
                os.pwrite(fd, content * size, 0)
                os.fsync(fd)

        while_the_server_sleeps(line, write_twice)
    assert (line.mount.served / "file").read_bytes() == b"2" * size


@pytest.mark.long
def test_a_session_that_wakes_up_cuts_nothing_off(line: Line) -> None:
    with opened(line.mount.path / "file", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"old", 0)
        os.fsync(fd)

        def cut_and_write() -> None:
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"new", 0)
            os.fsync(fd)

        while_the_server_sleeps(line, cut_and_write)
    assert (line.mount.served / "file").read_bytes() == b"new"


@pytest.mark.long
def test_a_session_that_wakes_up_removes_no_new_file(line: Line) -> None:
    lock = line.mount.path / "lock"
    lock.write_bytes(b"old")

    def replace() -> None:
        lock.unlink()
        lock.write_bytes(b"new")

    while_the_server_sleeps(line, replace)
    assert os.listdir(line.mount.served) == ["lock"]
    assert (line.mount.served / "lock").read_bytes() == b"new"


@pytest.mark.long
def test_a_session_that_wakes_up_renames_no_new_file(line: Line) -> None:
    temporary, final = line.mount.path / "temporary", line.mount.path / "final"
    final.write_bytes(b"before")
    temporary.write_bytes(b"old")

    def rename_and_begin_again() -> None:
        temporary.rename(final)
        temporary.write_bytes(b"half of the ne")

    while_the_server_sleeps(line, rename_and_begin_again)
    assert (line.mount.served / "final").read_bytes() == b"old"
    assert (line.mount.served / "temporary").read_bytes() == b"half of the ne"
