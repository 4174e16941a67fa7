"""``status``, ``sync`` and ``umount`` of real mounts: during a slow upload, in an outage, and where there is no mount of ours."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, Iterator, List, NamedTuple, Optional

import jsonschema
import pytest

from mount.helpers import in_another_process, is_root, noise
from sftpmount import mountpoint
from sftpmount.control import client, commands, directory, metrics, server
from sftpmount.control.progress import Bar
from sftpmount.control.server import Control
from sftpmount.errors import MountpointError, UsageError
from support.mount import CHECKOUT, Mount
from support.namespace import Namespace
from support.process import is_running, wait_until
from support.relay import Relay
from support.sshd import Sshd

WAIT_S = 30.0
MIB = 1 << 20
SLOW_BPS = 6e6
# A server that is silent is noticed soon.
IMPATIENT = "ServerAliveInterval=5,ServerAliveCountMax=3,ConnectTimeout=5,retry_timeout="
SCHEMA = json.loads((CHECKOUT / "sftpmount/control/status.schema.json").read_text())


def environment(tmp_path: Path) -> Dict[str, str]:
    """Where ``Mount`` puts its control sockets."""
    return {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": str(CHECKOUT)}


class Command:
    """``sftpmount WORDS`` while it runs, and what became of it. With ``on_terminal`` its stderr is one, and ``drawn`` is on it."""

    def __init__(
        self, tmp_path: Path, *words: object, on_terminal: bool = False, within: Optional[Namespace] = None
    ) -> None:
        ours, theirs = pty.openpty() if on_terminal else (-1, subprocess.PIPE)
        command = [sys.executable, "-m", "sftpmount", *map(str, words)]
        self.process = subprocess.Popen(
            command if within is None else within.entering(*command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=theirs,
            text=True,
            env=environment(tmp_path),
            start_new_session=True,
        )
        self.drawn = ""
        self._reader: Optional[threading.Thread] = None
        if on_terminal:
            os.close(theirs)
            self._reader = threading.Thread(target=self._read, args=(ours,))
            self._reader.start()

    def _read(self, terminal: int) -> None:
        try:
            while True:
                self.drawn += os.read(terminal, 65536).decode()
        except OSError:  # how Linux tells that the other side is closed
            os.close(terminal)

    def end(self, timeout_s: float = WAIT_S) -> Command:
        """Wait for its end."""
        self.out, self.err = self.process.communicate(timeout=timeout_s)
        if self._reader is not None:
            self._reader.join(WAIT_S)
        self.status = self.process.returncode
        return self

    def interrupt(self) -> Command:
        self.process.send_signal(signal.SIGINT)
        return self.end()

    def await_drawn(self, pattern: str) -> None:
        wait_until(lambda: re.search(pattern, self.drawn) is not None, WAIT_S, f"{pattern!r} on the terminal")

    @property
    def is_waiting(self) -> bool:
        return self.process.poll() is None


class Writer:
    """Another program that has a file open. Not ours: each program that we start closes what it inherits, and waits for that."""

    _CODE = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
for size in iter(sys.stdin.buffer.readline, b""):
    data = sys.stdin.buffer.read(int(size))
    print(flush=True)
    os.write(fd, data)
    print(flush=True)
os.close(fd)
"""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self._CODE, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate(timeout=WAIT_S)

    def write(self, data: bytes, *, wait: bool = True) -> None:
        """Returns once the call has returned or, where we do not ``wait`` for that, begins."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(b"%d\n" % len(data) + data)
        self.process.stdin.flush()
        for _ in range(2 if wait else 1):
            assert self.process.stdout.readline() == b"\n"

    def close(self) -> int:
        """Close the file; the program's exit status."""
        self.process.communicate(timeout=WAIT_S)
        return self.process.returncode


def run(tmp_path: Path, *words: object) -> Command:
    return Command(tmp_path, *words).end()


def states(tmp_path: Path, *words: object) -> List[Dict[str, Any]]:
    """What ``status --json`` tells."""
    return checked(json.loads(run(tmp_path, "status", "--json", *words).out))


def checked(told: Dict[str, Any]) -> List[Dict[str, Any]]:
    """The mounts of what ``status --json`` told, once the schema is satisfied."""
    jsonschema.Draft202012Validator(SCHEMA).validate(told)
    found: List[Dict[str, Any]] = told["mounts"]
    return found


def state_of(mount: Mount) -> Dict[str, Any]:
    """The same from the socket itself, without the time that a new process takes."""
    place = mount.path.parent / "sftpmount"
    socket_of(mount, place)
    found = client.find(str(mount.path), [str(place)])
    found.peer.close()
    return checked({"format": 1, "mounts": [found.state]})[0]


def socket_of(mount: Mount, place: Path) -> Path:
    """Its control socket, which comes right behind the mount."""
    pattern = f"{mount.pid}-*.sock"
    wait_until(lambda: any(place.glob(pattern)), WAIT_S, "the socket")
    (path,) = place.glob(pattern)
    return path


def time_of(mount: Mount) -> datetime:
    return datetime.fromisoformat(state_of(mount)["time"])


def serves(pid: int) -> bool:
    """Whether the process has FUSE's device open."""
    opened = os.listdir(f"/proc/{pid}/fd")
    with contextlib.suppress(FileNotFoundError):  # closed meanwhile: look again
        return any(os.readlink(f"/proc/{pid}/fd/{number}") == "/dev/fuse" for number in opened)
    return True


def is_ended_by(pid: int, number: signal.Signals) -> bool:
    """Whether the process neither ignores nor handles the signal."""
    masks = re.findall(r"^Sig(?:Ign|Cgt):\s+(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return not any(int(mask, 16) & 1 << (number - 1) for mask in masks)


@pytest.fixture
def slow(sshd: Sshd, relay: Relay, make_mount: Callable[..., Mount], served: Path) -> Mount:
    """A mount behind a line of 0.75 MB/s."""
    mount = make_mount(sshd, port=relay.port, directory=str(served))
    relay.set_line(up_bps=SLOW_BPS)
    return mount


@pytest.fixture
def served(sshd: Sshd, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh directory on the server."""
    path = sshd.tree / tmp_path_factory.mktemp("served").name
    path.mkdir()
    return path


@contextlib.contextmanager
def away(relay: Relay, mount: Mount) -> Iterator[None]:
    """The server is away, and the mount knows."""
    relay.refuse()
    relay.reset()
    wait_until(lambda: not state_of(mount)["connection"]["connected"], WAIT_S, "the outage")
    try:
        yield
    finally:
        relay.refuse(False)


class Left(NamedTuple):
    """A mount with a file that a program has written to, and has open."""

    mount: Mount
    writer: Writer


Leaving = Callable[[int], ContextManager[Left]]


@pytest.fixture
def left(sshd: Sshd, relay: Relay, make_mount: Callable[..., Mount], served: Path) -> Iterator[Leaving]:
    """Called with ``retry_timeout``: within, the server is away, which has not got "content", written to ``served / "file"``."""
    with contextlib.ExitStack() as stack:

        @contextlib.contextmanager
        def leaving(patience_s: int) -> Iterator[Left]:
            mount = make_mount(sshd, "-o", f"{IMPATIENT}{patience_s}", port=relay.port, directory=str(served))
            writer = stack.enter_context(Writer(mount.path / "file"))
            writer.write(b"")
            with away(relay, mount):
                writer.write(b"content")
                yield Left(mount, writer)

        yield leaving


# -- what is told -----------------------------------------------------------------------------------------------------------


def test_two_mounts_and_what_is_left_of_a_third(
    sshd: Sshd, tmp_path: Path, make_mount: Callable[..., Mount]
) -> None:
    killed = make_mount(sshd)
    stale = socket_of(killed, tmp_path / "sftpmount")
    killed.kill()
    first = make_mount(sshd, "-o", "commit=fsync,ro,fsname=first")
    socket_of(first, tmp_path / "sftpmount")
    assert not stale.exists()
    second = make_mount(sshd)
    socket_of(second, tmp_path / "sftpmount")
    stale.parent.joinpath("1-0.sock").write_bytes(b"")  # nor does what is no socket confuse anybody
    found = {state["mountpoint"]: state for state in states(tmp_path)}
    assert {str(first.path), str(second.path)} <= set(found) and str(killed.path) not in found
    mine = found[str(first.path)]
    assert (mine["source"], mine["read_only"], mine["pid"]) == ("first", True, first.pid)
    assert mine["durability"] == {"commit": "fsync", "fsync": True, "close_means": "received by the server"}
    assert mine["healthy"] and mine["connection"]["connected"] and mine["connection"]["lanes"] >= 1
    assert found[str(second.path)]["directory"] == str(sshd.tree)
    assert found[str(second.path)]["durability"]["close_means"] == "on the server's disk"
    assert state_of(second)["pid"] == second.pid
    shown = run(tmp_path, "status").out
    assert f"{first.path}: first" in shown and f"{second.path}: " in shown
    assert mine["connection"]["cipher_out"] in shown and "SSH-2.0-OpenSSH" in shown


def test_a_mount_is_found_by_a_symlink_and_by_a_relative_name(
    mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(mount.path)
    monkeypatch.chdir(mount.path)
    for name in (str(tmp_path / "link"), f"{mount.path}/", "."):
        assert mountpoint.located(name) == str(mount.path)
    monkeypatch.chdir(tmp_path)
    (state,) = states(tmp_path, mount.path.name)
    assert state["pid"] == mount.pid


def test_traffic_caches_and_names_are_counted(mount: Mount) -> None:
    data = noise(3 * MIB)
    (mount.path / "file").write_bytes(data)
    assert (mount.path / "file").read_bytes() == data
    (mount.served / "other").write_bytes(data)
    assert (mount.path / "other").read_bytes() == data
    state = state_of(mount)
    assert state["traffic"]["written_bytes"] == len(data)
    assert len(data) <= state["traffic"]["received_bytes"] <= 3 * len(data)
    assert state["traffic"]["written_bytes_per_s"] > 0
    assert state["cache"]["blocks"]["bytes"] >= len(data)
    assert state["cache"]["blocks"]["misses"] > 0 and state["cache"]["names"]["entries"] >= 3
    assert state["unstored"]["unstored_bytes"] == 0 and state["unstored"]["lag_s"] == 0


def test_watching_ends_with_the_mount(mount: Mount, tmp_path: Path) -> None:
    watch = Command(tmp_path, "status", "--json", "--watch", mount.path)
    assert watch.process.stdout is not None
    for _ in range(2):
        told = json.loads(watch.process.stdout.readline())
        assert told["mounts"][0]["pid"] == mount.pid
    mount.unmount()
    assert watch.end().status == 3 and "nothing is mounted" in watch.err


def test_a_signal_puts_the_state_into_the_log_whatever_its_level(
    sshd: Sshd, make_mount: Callable[..., Mount]
) -> None:
    mount = make_mount(sshd, "-o", "log_level=error")
    assert mount.log_text() == ""
    os.kill(mount.pid, signal.SIGUSR1)
    wait_until(lambda: "  cache " in mount.log_text(), WAIT_S, "the state in the log")
    assert f"{mount.path}: " in mount.log_text() and "  to store    nothing" in mount.log_text()
    assert mount.unmount() == 0


# -- a slow upload ------------------------------------------------------------------------------------------------------------


def test_sync_during_a_slow_upload(slow: Mount, tmp_path: Path) -> None:
    data = noise(2 * MIB)
    with Writer(slow.path / "file") as writer:
        writer.write(data)
        sync = Command(tmp_path, "sync", slow.path)
        state = state_of(slow)
        assert 0 < state["unstored"]["unstored_bytes"] <= len(data) and state["unstored"]["lag_s"] > 0
        assert [each["path"] for each in state["unstored"]["listed"]] == ["/file"]
        assert state["healthy"]
        sync.end()
        assert (sync.status, sync.out, sync.err) == (0, "", "")
        assert (slow.served / "file").read_bytes() == data  # though nobody has closed it
        assert state_of(slow)["unstored"]["files"] == 0


def test_umount_waits_for_a_slow_upload_and_the_end_of_the_process(slow: Mount, tmp_path: Path) -> None:
    data = noise(2 * MIB, seed=2)
    source = tmp_path / "source"
    source.write_bytes(data)
    with subprocess.Popen(["cp", source, slow.path / "file"]) as upload:
        wait_until(lambda: state_of(slow)["unstored"]["unstored_bytes"] > 0, WAIT_S, "the upload")
        umount = run(tmp_path, "umount", slow.path)
        assert not is_running(slow.pid)
        assert (umount.status, umount.out, umount.err) == (0, "", "")  # no progress but on a terminal
    assert upload.returncode == 0 and (slow.served / "file").read_bytes() == data
    assert slow.wait() == 0 and not slow.is_mounted
    assert not any((tmp_path / "sftpmount").iterdir())


def test_a_mount_that_is_only_in_use_is_not_waited_for(mount: Mount, tmp_path: Path) -> None:
    with Writer(mount.path / "file") as writer:
        writer.write(b"content")
        umount = run(tmp_path, "umount", mount.path)
        assert umount.status == 1
        assert re.search(
            rf"{mount.path} stays mounted: .*busy; it is in use by python\S* \({writer.process.pid}\)",
            umount.err,
        )
        assert (mount.served / "file").read_bytes() == b"content"
    assert mount.is_mounted and run(tmp_path, "umount", mount.path).status == 0
    assert mount.wait() == 0


# -- the server is away --------------------------------------------------------------------------------------------------------


def test_an_outage(
    sshd: Sshd, relay: Relay, make_mount: Callable[..., Mount], served: Path, tmp_path: Path
) -> None:
    mount = make_mount(sshd, "-o", IMPATIENT + "30", port=relay.port, directory=str(served))
    data = noise(MIB, seed=3)
    with Writer(mount.path / "file") as writer:
        writer.write(b"")
        with away(relay, mount):
            writer.write(data)
            status = run(tmp_path, "status", mount.path)
            assert status.status == 1 and "PROBLEM     the server is away since 20" in status.out
            assert re.search(r"1\.0 MiB, \d+ s  /file", status.out)
            state = state_of(mount)
            outage = state["connection"]["outages"][-1]
            assert outage == {"lost": state["connection"]["since"], "back": None, "why": outage["why"]}
            assert state["connection"]["server_version"].startswith("SSH-2.0-OpenSSH")
            sync = Command(tmp_path, "sync", mount.path, on_terminal=True)
            umount = Command(tmp_path, "umount", mount.path, on_terminal=True)
            left = Command(tmp_path, "sync", mount.path, on_terminal=True)
            sync.await_drawn(r"\]   0 %  1.0 MiB wait; the server is away for \d+ s")
            for command in (left, umount):
                command.await_drawn("is away for")
                assert command.interrupt().status == 130
                assert "interrupted; the mount is as it was" in command.drawn
            assert sync.is_waiting and mount.is_mounted and mount.is_running
            relay.set_line(up_bps=SLOW_BPS)
        assert sync.end().status == 0 and (served / "file").read_bytes() == data
    shown = [int(each) for each in re.findall(r"\] +(\d+) %", sync.drawn)]
    assert shown[0] == 0 and len(set(shown)) > 3 and shown == sorted(shown) and shown[-1] == 100
    assert re.search(r"\] +\d+ %  \S+ [KM]iB of 1\.0 MiB, \S+ [KM]iB/s", sync.drawn)
    assert sync.drawn.rstrip().endswith("sftpmount: everything is stored.")
    state = state_of(mount)
    assert state["healthy"] and state["connection"]["reconnects"] == 1
    assert state["connection"]["outages"][-1]["back"] >= state["connection"]["outages"][-1]["lost"]
    assert "1 reconnect, the last at 20" in run(tmp_path, "status", mount.path).out
    with away(relay, mount):  # with nothing to store there is nothing to wait for
        assert run(tmp_path, "umount", mount.path).status == 0
    assert mount.wait() == 0


def test_an_outage_that_outlasts_the_patience(
    left: Leaving, served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with left(1) as (mount, writer):
        for command in ("sync", "umount"):
            assert commands.run([command, str(mount.path)], [str(tmp_path / "sftpmount")]) == 1
            said = capsys.readouterr().err
            assert "sftpmount: not stored: /file: the server cannot be reached" in said
        assert f"{mount.path} stays mounted" in said
        assert mount.is_mounted and mount.is_running
    wait_until(lambda: state_of(mount)["connection"]["connected"], WAIT_S, "the server to be back")
    assert writer.close() == 0
    assert commands.run(["sync", str(mount.path)], [str(tmp_path / "sftpmount")]) == 0
    assert (served / "file").read_bytes() == b"content"


def test_what_is_lost_at_the_end_is_told(left: Leaving, tmp_path: Path) -> None:
    with left(30) as (mount, writer):
        mount.terminate()  # out of sight, and ends with its last user
        wait_until(lambda: not mount.is_mounted, WAIT_S, "the unmount")
        assert state_of(mount)["phase"] == "storing"
        umount = Command(tmp_path, "umount", mount.path, on_terminal=True)
        umount.await_drawn("is away")
        mount.terminate()
        assert umount.end().status == 1 and "not stored: " in umount.drawn and "/file" in umount.drawn
        assert writer.close() == 1
        assert mount.wait() == 1


@pytest.mark.parametrize("by", ["a signal", "fusermount3 -uz"])
def test_a_mount_that_is_out_of_sight_is_found_and_ends_with_the_program_that_writes(
    mount: Mount, tmp_path: Path, by: str
) -> None:
    with Writer(mount.path / "file") as writer:
        writer.write(b"first")
        if by == "a signal":
            mount.terminate()
            wait_until(lambda: not mount.is_mounted, WAIT_S, "the unmount")
        else:
            subprocess.run([*by.split(), mount.path], check=True)
        assert state_of(mount)["phase"] == "storing"
        with client.find(str(mount.path), [str(tmp_path / "sftpmount")]).peer as peer:
            answers = peer.ask("unmount")
            assert any("unmounted" in answer for answer in answers)
            assert "progress" in next(answers)  # and it goes on
            writer.write(b", second")
            assert writer.close() == 0
            assert list(answers)[-1] == {"end": {"unstored": [], "why": ""}}
    assert mount.wait() == 0
    assert (mount.served / "file").read_bytes() == b"first, second"


def test_a_mount_that_goes_out_of_sight_while_it_is_looked_for_is_found(
    mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = client.Peer.state

    def state(peer: client.Peer) -> Dict[str, Any]:
        if mount.is_mounted:
            subprocess.run(["fusermount3", "-uz", mount.path], check=True)
        return asked(peer)

    assert state_of(mount)["phase"] == "mounted"
    monkeypatch.setattr(client.Peer, "state", state)
    with Writer(mount.path / "file") as writer:
        writer.write(b"content")
        found = client.find(str(mount.path), [str(tmp_path / "sftpmount")])
        found.peer.close()
        assert found.state["phase"] == "storing"


@pytest.mark.parametrize("here", ["mounted", "unmounted", "in use"])
def test_umount_ends_a_mount_that_another_namespace_has_a_copy_of(
    mount: Mount, tmp_path: Path, here: str
) -> None:
    """With the last program that uses it here."""
    assert state_of(mount)["phase"] == "mounted"
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(Namespace())
        writer = stack.enter_context(Writer(mount.path / "file")) if here == "in use" else None
        if writer is not None:
            writer.write(b"")
        if here != "mounted":
            subprocess.run(["fusermount3", "-uz", mount.path], check=True)
        Path(f"{other.root}{mount.path}", "copy").write_bytes(b"content")
        umount = Command(tmp_path, "umount", mount.path, on_terminal=True)
        if writer is not None:
            umount.await_drawn("sent")
            writer.write(b"content")
            assert umount.is_waiting and writer.close() == 0
            assert (mount.served / "file").read_bytes() == b"content"
        assert umount.end().status == 0
        assert mount.wait() == 0 and "still mounted in another mount namespace" in mount.log_text()
    assert (mount.served / "copy").read_bytes() == b"content"


def test_who_still_sees_a_mount_may_ask_it(mount: Mount, tmp_path: Path) -> None:
    """Though it was unmounted where its process is."""
    assert state_of(mount)["phase"] == "mounted"
    with Namespace() as other:
        subprocess.run(["fusermount3", "-u", mount.path], check=True)
        status = Command(tmp_path, "status", "--json", mount.path, within=other).end()
        (state,) = checked(json.loads(status.out))
        assert state["mountpoint"] == str(mount.path) and state["phase"] == "storing"
        assert Command(tmp_path, "umount", mount.path, within=other).end().status == 0
        assert mount.wait() == 0


def test_what_is_left_is_stored_though_nobody_waits_for_it_any_more(
    left: Leaving, served: Path, tmp_path: Path
) -> None:
    """libfuse 2, at its end, lets SIGPIPE end the process that writes to who has left."""
    with left(60) as (mount, writer):
        mount.terminate()
        wait_until(lambda: not mount.is_mounted, WAIT_S, "the unmount")
        umount = Command(tmp_path, "umount", mount.path, on_terminal=True)
        umount.await_drawn("is away")
        writer.process.kill()
        wait_until(lambda: not serves(mount.pid), WAIT_S, "libfuse's end")
        assert not is_ended_by(mount.pid, signal.SIGPIPE)
        assert umount.interrupt().status == 130
        left_at = datetime.now(timezone.utc) + timedelta(seconds=5 * server.PROGRESS_S)
        wait_until(lambda: time_of(mount) > left_at, WAIT_S, "more progress to tell")
    assert mount.wait() == 0
    assert (served / "file").read_bytes() == b"content"


def test_what_cannot_be_stored_of_a_mount_out_of_sight_is_named_at_once(
    left: Leaving, served: Path, tmp_path: Path
) -> None:
    with left(1) as (mount, writer):
        subprocess.run(["fusermount3", "-uz", mount.path], check=True)
        umount = run(tmp_path, "umount", mount.path)
        assert umount.status == 1 and "sftpmount: not stored: /file: " in umount.err
        assert f"it is unmounted, and process {mount.pid} goes on with what is left." in umount.err
    wait_until(lambda: state_of(mount)["connection"]["connected"], WAIT_S, "the server to be back")
    assert writer.close() == 0
    assert mount.wait() == 0 and (served / "file").read_bytes() == b"content"


@pytest.mark.long
def test_a_connection_that_breaks_in_the_middle_of_a_slow_upload(
    slow: Mount, relay: Relay, tmp_path: Path
) -> None:
    data = noise(12 * MIB, seed=4)
    source = tmp_path / "source"
    source.write_bytes(data)
    relay.reset_after(2 * MIB, "up", times=3)
    with subprocess.Popen(["cp", source, slow.path / "file"]) as upload:
        wait_until(lambda: state_of(slow)["unstored"]["unstored_bytes"] > 0, WAIT_S, "the upload")
        sync = Command(tmp_path, "sync", slow.path, on_terminal=True)
        umount = Command(tmp_path, "umount", slow.path, on_terminal=True)
        assert sync.end().status == 0 and umount.end(timeout_s=90.0).status == 0
        assert not is_running(slow.pid)
    assert upload.returncode == 0 and (slow.served / "file").read_bytes() == data
    assert relay.stats()["resets"] >= 3 and slow.wait() == 0
    assert len(set(re.findall(r"\] +(\d+) %", umount.drawn))) > 3


# -- no mount of ours ----------------------------------------------------------------------------------------------------------


def test_where_nothing_is_mounted_or_something_else(mount: Mount, tmp_path: Path) -> None:
    for path, sentence in (
        (tmp_path, f"nothing is mounted on {tmp_path}: sftpmount status lists your mounts."),
        (f"{mount.path}/sub", f"nothing is mounted on {mount.path}/sub (it lies in {mount.path})"),
        ("/proc", "/proc is the mountpoint of proc (proc), which is no mount of sftpmount."),
    ):
        for command in commands.COMMANDS:
            with pytest.raises(MountpointError, match=re.escape(sentence)):
                commands.run([command, str(path)], [str(tmp_path / "sftpmount")])
    ended = run(tmp_path, "status", "--json", "/proc")
    assert ended.status == 3 and checked(json.loads(ended.out)) == [] and sentence in ended.err


def test_without_any_mount(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run(["status"], [str(tmp_path / "absent"), str(tmp_path)]) == 3
    assert capsys.readouterr() == ("", "sftpmount: nothing is mounted, or by another user.\n")
    assert commands.run(["status", "--json"], []) == 3
    assert json.loads(capsys.readouterr().out) == {"format": 1, "mounts": []}


def test_a_mount_whose_process_was_killed(mount: Mount, tmp_path: Path) -> None:
    os.kill(mount.pid, signal.SIGKILL)
    mount.wait()
    for command in commands.COMMANDS:
        with pytest.raises(MountpointError, match="is left over from a mount whose process has ended"):
            commands.run([command, str(mount.path)], [str(tmp_path / "sftpmount")])


def test_a_stopped_process_is_not_waited_for(
    mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [str(tmp_path / "sftpmount")]
    socket_of(mount, tmp_path / "sftpmount")
    monkeypatch.setattr(client, "STATE_S", 0.2)
    os.kill(mount.pid, signal.SIGSTOP)
    try:
        assert commands.run(["status"], places) == 1
        assert f"process {mount.pid} does not answer within 0.2 s" in capsys.readouterr().err
        monkeypatch.setattr(client, "STALE_S", 0.1)
        with pytest.raises(client.Silent, match="does not answer"):
            client.find(str(mount.path), places)
    finally:
        os.kill(mount.pid, signal.SIGCONT)
    monkeypatch.undo()
    assert commands.run(["status"], places) == 0


def test_a_mount_of_somebody_else(mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = mountpoint.mounted_at(str(mount.path))
    assert owner is not None and owner.uid == os.getuid()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(MountpointError, match=r"is a mount of the user \w+: only \w+ may ask it"):
        client.find(str(mount.path), [str(tmp_path / "sftpmount")])


ANOTHER_USER = {"error": "this mount belongs to another user"}
ASK_AS_NOBODY = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
asker = socket.socket(socket.AF_UNIX)
try:
    asker.connect(sys.argv[1])
    print(asker.recv(1000).decode())
except PermissionError as error:
    print(error.strerror)
"""


# -- the socket -------------------------------------------------------------------------------------------------------------------


class Reports:
    """What a mount would tell."""

    def __init__(self, **progress: object) -> None:
        self._progress = {"written_bytes": 0, "unsent_bytes": 0, "uncommitted_bytes": 0, **progress}

    def sample(self) -> None:
        pass

    def state(self) -> Dict[str, Any]:
        return {"mountpoint": "/mnt"}

    def progress(self) -> Dict[str, Any]:
        return dict(self._progress)


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Control]:
    control = Control([str(tmp_path / "s")], Reports(), list, check_s=0.01)
    control.start(lambda: "busy")
    yield control
    control.close([])


def only_socket(place: Path) -> str:
    (path,) = place.glob("*.sock")
    return str(path)


@contextlib.contextmanager
def connected(place: Path) -> Iterator[socket.socket]:
    """A connection to the one socket in ``place``, however long its name is."""
    descriptor = directory.open_private(str(place))
    try:
        with socket.socket(socket.AF_UNIX) as asker:
            asker.settimeout(WAIT_S)
            (address,) = directory.sockets(descriptor)
            asker.connect(address)
            yield asker
    finally:
        os.close(descriptor)


def test_only_the_owner_may_enter(sshd: Sshd, make_mount: Callable[..., Mount]) -> None:
    # A short path that others may enter, unlike pytest's.
    place = Path(in_another_process("import tempfile; print(tempfile.mkdtemp(prefix='sftpmount'))"))
    place.chmod(0o755)
    try:
        mount = make_mount(sshd, env={"XDG_RUNTIME_DIR": str(place)})
        path = socket_of(mount, place / "sftpmount")
        assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
        if is_root():  # and can be somebody else
            assert in_another_process(ASK_AS_NOBODY, path) == "Permission denied"
            path.parent.chmod(0o755)
            path.chmod(0o666)
            assert json.loads(in_another_process(ASK_AS_NOBODY, path)) == ANOTHER_USER
        mount.unmount()
    finally:
        subprocess.run(["rm", "-r", place], check=True)


@pytest.mark.usefixtures("listening")
def test_another_user_is_not_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who got in all the same."""
    monkeypatch.setattr(server, "peer_of", lambda connection: (1, os.geteuid() + 1, 0))
    with connected(tmp_path / "s") as asker:
        assert json.loads(asker.makefile("rb").readline()) == ANOTHER_USER


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (b'{"request": "status"}\n', {"state": {"mountpoint": "/mnt"}}),
        (b'{"request": "format"}\n', {"error": "no request that is known here: 'format'"}),
        (b"[1]\n", {"error": "no request that is known here: ''"}),
        (b"\xff\n", {"error": "no request that is known here: ''"}),
        (b"[" * server.REQUEST_BYTES_MAX, {"error": "no request that is known here: ''"}),
        (
            b'{"request": "unmount"}\n',
            {"progress": {"written_bytes": 0, "unsent_bytes": 0, "uncommitted_bytes": 0}},
        ),
    ],
)
def test_requests(said: bytes, answer: Dict[str, Any], tmp_path: Path) -> None:
    with connected(tmp_path / "s") as asker:
        asker.sendall(said)
        assert json.loads(asker.makefile().readline()) == answer


@pytest.mark.usefixtures("listening")
def test_a_socket_that_is_taken_away_is_made_again(tmp_path: Path) -> None:
    subprocess.run(["rm", "-r", tmp_path / "s"], check=True)
    wait_until(lambda: any((tmp_path / "s").glob("*.sock")), WAIT_S, "another socket")
    with connected(tmp_path / "s") as asker:
        asker.sendall(b'{"request": "status"}\n')
        assert json.loads(asker.recv(1000))["state"] == {"mountpoint": "/mnt"}


def test_who_asks_while_something_is_stored_waits_for_what_he_wrote(tmp_path: Path) -> None:
    began: List[threading.Event] = []
    may_end = threading.Event()

    def sync() -> List[str]:
        began.append(threading.Event())
        assert may_end.wait(WAIT_S)
        return [f"/{len(began)}: too late"]

    storing = server._Storing(sync)
    first = storing.ask()
    wait_until(lambda: len(began) == 1, WAIT_S, "the first round")
    second, third = storing.ask(), storing.ask()
    may_end.set()
    assert first.done.wait(WAIT_S) and second.done.wait(WAIT_S) and second is third
    assert (first.unstored, second.unstored) == (["/1: too late"], ["/2: too late"]) and len(began) == 2


def test_directories_that_others_can_enter_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_to_all, link, file, good = (tmp_path / name for name in ("open", "link", "file", "good"))
    open_to_all.mkdir(mode=0o755)
    (tmp_path / "real").mkdir(mode=0o700)
    link.symlink_to(tmp_path / "real")
    file.touch()
    bad = [str(path) for path in (open_to_all, link, file, tmp_path / "absent" / "deeper")]
    for path in [*bad, "/usr"]:  # not this user's, or entered by all
        with pytest.raises(OSError):
            directory.open_private(path)
    control = Control([*bad, str(good)], Reports(), list)
    control.start(lambda: "")
    assert os.path.basename(only_socket(good)).startswith(f"{os.getpid()}-")
    control.close([])
    assert not list(good.iterdir()) and not caplog.records
    control = Control(bad, Reports(), list)
    control.start(lambda: "")
    control.close([])
    assert "no control socket" in caplog.text and "others may enter it" in caplog.text


@pytest.mark.parametrize(
    ("runtime", "uid", "expected"),
    [
        ("/run/user/7", 7, ("/run/user/7/sftpmount", "/tmp/sftpmount-7")),
        ("", 7, ("/run/user/7/sftpmount", "/tmp/sftpmount-7")),
        ("not/absolute", 0, ("/run/sftpmount", "/tmp/sftpmount-0")),
        ("/run/user/0", 0, ("/run/user/0/sftpmount", "/run/sftpmount", "/tmp/sftpmount-0")),
    ],
)
def test_places(runtime: str, uid: int, expected: object) -> None:
    assert directory.places({"XDG_RUNTIME_DIR": runtime}, uid) == expected


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sync"], "no mountpoint: write sftpmount sync mountpoint."),
        (["umount", "a", "b"], "'b' is a word too many"),
        (["sync", "a", "--json"], "option --json not recognized"),
    ],
)
def test_refused_words(words: List[str], sentence: str) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)):
        commands.run(words, [])


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_help_says_what_the_statuses_mean(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run([command, "--help"], []) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: sftpmount {command} ") and "Exit status: 0 " in shown
    assert max(map(len, shown.splitlines())) <= 120


# -- metrics -------------------------------------------------------------------------------------------------------------------

# prometheus.io/docs/instrumenting/exposition_formats, what is used of it.
SAMPLE = re.compile(r'([a-z_]+)\{((?:[a-z]+="(?:[^"\\\n]|\\[\\"n])*",?)+)\} (\S+)')


def samples(text: str) -> Dict[str, Dict[str, float]]:
    """name -> labels -> value of a file in the text format; every family has its HELP and TYPE just before its samples."""
    found: Dict[str, Dict[str, float]] = {}
    for family in re.split(r"^(?=# HELP )", text, flags=re.MULTILINE)[1:]:
        help_line, type_line, *lines = family.splitlines()
        name = help_line.split()[2]
        assert type_line in (f"# TYPE {name} gauge", f"# TYPE {name} counter") and name not in found
        assert name.endswith("_total") == type_line.endswith("counter")
        found[name] = {}
        for line in lines:
            match = SAMPLE.fullmatch(line)
            assert match is not None and match[1] == name, line
            assert match[2] not in found[name]
            found[name][match[2]] = float(match[3])
    return found


def test_metrics_are_kept_and_removed_with_the_mount(
    sshd: Sshd, make_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    path = tmp_path / "sftpmount.prom"
    mount = make_mount(sshd, "-o", f"metrics={path}")
    wait_until(path.exists, WAIT_S, "the file, which comes right behind the mount")
    found = samples(path.read_text())
    label = f'mountpoint="{mount.path}"'
    assert found["sftpmount_healthy"] == found["sftpmount_connected"] == {label: 1.0}
    assert found["sftpmount_unstored_bytes"] == {
        f'{label},state="{kind}"': 0.0 for kind in ("dirty", "in_flight", "uncommitted")
    }
    assert len(found) > 12 and path.stat().st_mode & 0o777 == 0o644
    assert mount.unmount() == 0 and not path.exists()


def test_metrics_are_never_seen_by_half(mount: Mount, tmp_path: Path) -> None:
    state = state_of(mount)
    state["mountpoint"] = 'a "b"\\\n'
    path = tmp_path / "dir" / "m.prom"
    path.parent.mkdir()
    path.write_text("before")
    kept = metrics.MetricsFile(str(path), lambda: state, interval_s=0.001)
    kept.start()
    seen = {samples(path.read_text())["sftpmount_healthy"][r'mountpoint="a \"b\"\\\n"'] for _ in range(300)}
    kept.close()
    assert seen == {1.0} and not list(path.parent.iterdir())


def test_metrics_that_cannot_be_written_are_told_once(
    mount: Mount, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_of(mount)
    kept = metrics.MetricsFile(str(tmp_path / "absent" / "m.prom"), lambda: state)
    kept.write()
    kept.write()
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [
        "the metrics cannot be written"
    ]
    (tmp_path / "absent").mkdir()
    kept.write()
    assert samples((tmp_path / "absent" / "m.prom").read_text())


def test_nothing_is_drawn_but_on_a_terminal(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+") as stream:
        bar = Bar(stream)
        bar.show({"written_bytes": 0})
        bar.clear()
        assert stream.tell() == 0
