"""The server is away for longer than the mount waits, or a person is not willing to wait.

Every operation then fails with ETIMEDOUT or EIO in time, none makes up an answer, and when the server is back the same mount
goes on. Ctrl-C frees a program at once; signals that a program handles do not disturb it. An unmount says what is not stored.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple

import pytest

from mount.helpers import noise, opened
from mount.test_errors import KEYS, MIB
from support.mount import Mount
from support.process import is_running, send_signal, wait_until
from support.relay import Relay
from support.sshd import Sshd

RETRY_S = 3.0
# A peer that says nothing is given up after 2 heartbeats of a second each, looked at twice a second.
ALIVE = "ServerAliveInterval=1,ServerAliveCountMax=2,ConnectTimeout=2"
DETECTION_S = 3.0
SLACK_S = 15.0
WINDOW_BYTES = 2 * MIB  # OpenSSH's, of a channel
NAMES = [f"entry-{count}" for count in range(300)]

# argv: operation, path. Says "ready", waits for a line, and says what came of it and how long it took as JSON. The calls are
# libc's own: Python's repeat what a signal has interrupted. SIGALRM, SIGUSR1 and SIGURG are handled, with and without SA_RESTART.
PROGRAM = r"""
import ctypes, errno, json, os, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.opendir.restype = ctypes.c_void_p
libc.readdir64.restype = ctypes.c_void_p
libc.readdir64.argtypes = [ctypes.c_void_p]
operation, path = sys.argv[1], os.fsencode(sys.argv[2])
for number, restarts in ((signal.SIGALRM, True), (signal.SIGUSR1, False), (signal.SIGURG, True)):
    signal.signal(number, lambda number, frame: None)
    signal.siginterrupt(number, not restarts)
buffer = ctypes.create_string_buffer(1 << 20)
offset = ctypes.c_int64

def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result

def names():
    directory = libc.opendir(path)
    if directory is None:
        raise OSError(ctypes.get_errno(), "")
    count = 0
    while True:
        ctypes.set_errno(0)
        if libc.readdir64(directory) is None:
            if ctypes.get_errno():
                raise OSError(ctypes.get_errno(), "")
            return count - 2
        count += 1

flags = {"read": os.O_RDONLY, "write": os.O_WRONLY, "close": os.O_WRONLY, "fsync": os.O_WRONLY, "map": os.O_RDWR}
fd = os.open(path, flags[operation]) if operation in flags else -1
if operation == "map":  # nothing of it is open but the mapping, and all of it is in memory
    length = ctypes.c_size_t(os.fstat(fd).st_size)
    libc.mmap.restype = ctypes.c_void_p
    mapped = ctypes.c_void_p(libc.mmap(None, length, 3, 1, fd, offset(0)))
    assert ctypes.string_at(mapped, length.value) == bytes(length.value)
    os.close(fd)
print("ready", flush=True)
sys.stdin.readline()
if operation in ("close", "fsync"):
    os.pwrite(fd, b"x" * 1000, 0)

def write():
    for _ in range(200):
        checked(libc.write(fd, buffer, len(buffer)))

calls = {
    "ls": names,
    "stat": lambda: checked(libc.stat(path, buffer)),
    "statvfs": lambda: checked(libc.statvfs(path, buffer)),
    "open": lambda: checked(libc.open(path, os.O_RDONLY)),
    "create": lambda: checked(libc.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)),
    "read": lambda: checked(libc.pread(fd, buffer, ctypes.c_size_t(1000), offset(2 << 20))),
    "write": write,
    "fsync": lambda: checked(libc.fsync(fd)),
    "close": lambda: checked(libc.close(fd)),
    "map": lambda: (ctypes.memset(mapped, ord("m"), length), libc.munmap(mapped, length)),
    "rename": lambda: checked(libc.rename(path, path + b"-renamed")),
    "unlink": lambda: checked(libc.unlink(path)),
    "mkdir": lambda: checked(libc.mkdir(path, 0o755)),
    "chmod": lambda: checked(libc.chmod(path, 0o600)),
    "truncate": lambda: checked(libc.truncate(path, offset(10))),
}
began = time.monotonic()
try:
    result, value = "OK", calls[operation]()
except OSError as error:
    result, value = errno.errorcode[error.errno], None
print(json.dumps([result, value, time.monotonic() - began]), flush=True)
os._exit(0)
"""
NEW = ("create", "mkdir")  # the others find a file of their own name
OPERATIONS = (
    ["ls", "stat", "statvfs", "open", "create", "read", "write", "fsync", "close", "rename", "unlink"]
    + ["mkdir", "chmod", "truncate"]
)  # fmt: skip


class Answer(NamedTuple):
    result: str  # "OK" or an errno's name
    value: object
    took_s: float


class Caller:
    """A process that does one operation when told to."""

    def __init__(self, operation: str, path: str) -> None:
        self.operation = operation
        command = [sys.executable, "-IS", "-c", PROGRAM, operation, os.path.basename(path)]
        # In its directory: the kernel looks up one name at a time in a directory, and here nobody shall wait for another.
        self._process = subprocess.Popen(
            command,
            cwd=os.path.dirname(path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", self._process.stdout.read()

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def answer(self, timeout_s: float) -> Answer:
        out, _ = self._process.communicate(timeout=timeout_s)
        return Answer(*json.loads(out))

    def wait_until_stuck(self) -> None:
        wait_until(lambda: waits(self.pid), 10.0, f"{self.operation} waits for the server")

    def close(self) -> None:
        self._process.kill()
        self._process.wait(timeout=10.0)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


class Away:
    """A mount through a relay, what its operations work on, and ways to lose the server."""

    def __init__(self, sshd: Sshd, relay: Relay, mount: Mount) -> None:
        self.sshd, self.relay, self.mount = sshd, relay, mount
        self.path, self.served = mount.path, mount.served
        self._callers: List[Caller] = []

    def place(self, operation: str) -> str:
        """The file of its own that ``operation`` works on, in a directory of its own."""
        if operation == "ls":
            return f"{self.path}/directory/."
        return f"{self.path}/{operation}/file"

    def callers(self, operations: List[str]) -> List[Caller]:
        return [self.caller(operation, self.place(operation)) for operation in operations]

    def caller(self, operation: str, path: str) -> Caller:
        self._callers.append(Caller(operation, path))
        return self._callers[-1]

    def lose(self, how: str) -> None:
        if how == "stalled":
            self.relay.stall()
        elif how == "refused":
            self.relay.refuse()
            self.relay.reset()
        elif how == "full":
            self.sshd.configure(["MaxSessions 0"])
            self.sshd.kill()
            self.sshd.start()
        else:
            self.sshd.kill()

    def regain(self, how: str) -> None:
        if how == "stalled":
            self.relay.flow()
        elif how == "refused":
            self.relay.refuse(False)
        elif how == "full":
            self.sshd.configure(["MaxSessions 10"])
            self.sshd.restart()
        else:
            self.sshd.start()

    def check_usable(self) -> None:
        """What a person would try. Waits as operations do, for as long as the mount does not give up."""
        assert sorted(os.listdir(self.path / "directory")) == sorted(NAMES)
        (self.path / "after").write_bytes(noise(MIB, 5))
        assert (self.served / "after").read_bytes() == (self.path / "after").read_bytes() == noise(MIB, 5)
        os.unlink(self.path / "after")

    def close(self) -> None:
        self.mount.close()
        for caller in self._callers:
            caller.close()


@pytest.fixture
def sshd_without_rsa(tmp_path: Path) -> Iterator[Sshd]:
    with Sshd(tmp_path, host_key_types=KEYS) as sshd:
        yield sshd


@pytest.fixture
def away(tmp_path: Path, sshd_without_rsa: Sshd) -> Iterator[Callable[..., Away]]:
    """A function that mounts with the given options, as often as a test likes."""
    made: List[Away] = []
    sshd, served = sshd_without_rsa, sshd_without_rsa.tree
    (served / "directory").mkdir()
    for name in NAMES:
        (served / "directory" / name).touch()
    for operation in OPERATIONS:
        (served / operation).mkdir()
        if operation not in NEW:
            (served / operation / "file").write_bytes(noise(3 * MIB))
    with Relay(sshd.port) as relay:

        def mount(*options: str) -> Away:
            each = Mount(sshd, tmp_path, "-o", ALIVE, *options, port=relay.port, life_s=100.0)
            made.append(Away(sshd, relay, each))
            return made[-1]

        yield mount
        for each in made:
            each.close()


HOW = ["stalled", "refused", "killed", "full"]  # full: it takes connections, and opens no channel on them


def short(*names: str, of: Iterable[str]) -> List[object]:
    """Parameters of which only ``names`` run without --long."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.long) for name in of]


class TestLongOutage:
    @pytest.mark.parametrize("how", short("stalled", "full", of=HOW))
    def test_every_operation_fails_in_time_and_the_mount_recovers(
        self, away: Callable[..., Away], how: str
    ) -> None:
        mounted = away("-o", f"retry_timeout={RETRY_S:g}")
        callers = mounted.callers(OPERATIONS)
        mounted.lose(how)
        for caller in callers:
            caller.go()
        answers = {caller.operation: caller.answer(60.0) for caller in callers}
        for operation, answer in answers.items():
            assert answer.result in ("ETIMEDOUT", "EIO"), f"{operation}: {answer}"
            assert answer.took_s < RETRY_S + SLACK_S, f"{operation}: {answer}"
        mounted.regain(how)
        # Waits out the reconnect's backoff; what it may not do meanwhile is to answer wrongly.
        wait_until(lambda: listing(mounted.path / "directory") == sorted(NAMES), 20.0, "the mount is back")
        mounted.check_usable()
        for operation in OPERATIONS:  # the answer was "unknown", which either state of the server agrees with
            path, served = mounted.path / operation, mounted.served / operation
            assert os.listdir(path) == os.listdir(served)
            if (served / "file").is_file():
                assert (path / "file").read_bytes() == (served / "file").read_bytes()

    @pytest.mark.parametrize("how", short("refused", of=HOW))
    def test_without_retries_it_fails_at_once(self, away: Callable[..., Away], how: str) -> None:
        mounted = away("-o", "retry_timeout=0")
        callers = mounted.callers(OPERATIONS)
        mounted.lose(how)
        for caller in callers:
            caller.go()
        for caller in callers:
            answer = caller.answer(60.0)
            assert answer.result in ("ETIMEDOUT", "EIO"), f"{caller.operation}: {answer}"
            limit_s = 10.0 + (DETECTION_S if how == "stalled" else 0.0)
            assert answer.took_s < limit_s, f"{caller.operation}: {answer}"
        mounted.regain(how)
        wait_until(lambda: listing(mounted.path / "directory") == sorted(NAMES), 20.0, "the mount is back")
        mounted.check_usable()

    @pytest.mark.long
    @pytest.mark.parametrize("how", HOW)
    def test_a_hard_mount_waits_and_then_succeeds(self, away: Callable[..., Away], how: str) -> None:
        mounted = away("-o", "retry_timeout=hard")
        callers = mounted.callers(OPERATIONS)
        mounted.lose(how)
        for caller in callers:
            caller.go()
        time.sleep(20.0)  # nothing to wait for: nothing is to happen
        assert all(is_running(caller.pid) for caller in callers)
        mounted.regain(how)
        for caller in callers:
            answer = caller.answer(60.0)
            assert answer.result == "OK", f"{caller.operation}: {answer}"
            assert caller.operation != "ls" or answer.value == len(NAMES)
        mounted.check_usable()


def test_programs_in_one_directory_do_not_wait_in_turn(away: Callable[..., Away]) -> None:
    """The kernel looks up one name at a time in a directory: the limit must hold for who comes last as well."""
    mounted = away("-o", f"retry_timeout={RETRY_S:g}")
    callers = [mounted.caller("stat", f"{mounted.path}/directory/{name}") for name in NAMES[:6]]
    mounted.lose("refused")
    for caller in callers:
        caller.go()
    took_s = [caller.answer(60.0).took_s for caller in callers]
    assert max(took_s) < RETRY_S + SLACK_S
    mounted.regain("refused")
    wait_until(lambda: listing(mounted.path / "directory") == sorted(NAMES), 20.0, "the mount is back")
    mounted.check_usable()


def listing(path: Path) -> List[str]:
    """Sorted names, or the errno's; an empty or short listing fails here."""
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        return [os.strerror(error.errno or 0)]
    assert names == sorted(NAMES), f"{len(names)} of {len(NAMES)} names"
    return names


@pytest.mark.parametrize("how", short("refused", of=HOW))
def test_no_listing_is_empty_or_short(away: Callable[..., Away], how: str) -> None:
    """Looked at without pause while the server goes and comes back."""
    mounted = away("-o", "retry_timeout=1,dcache_timeout=0")
    seen: List[List[str]] = []
    errors: List[AssertionError] = []
    ended = threading.Event()

    def look() -> None:
        try:
            while not ended.is_set():
                seen.append(listing(mounted.path / "directory"))
                try:
                    os.stat(mounted.path / "directory" / NAMES[7])
                except FileNotFoundError:
                    raise AssertionError("a file that is there was called missing") from None
                except OSError:
                    pass  # as it should be while the server is away
        except AssertionError as error:
            errors.append(error)

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    try:
        mounted.lose(how)
        enough = len(seen) + 6
        wait_until(partial(lambda enough: len(seen) > enough or errors != [], enough), 30.0, "looks")
        mounted.regain(how)
        wait_until(lambda: seen[-1] == sorted(NAMES) or errors != [], 30.0, "listings that succeed")
    finally:
        ended.set()
        for looker in lookers:
            looker.join()
    assert errors == []
    assert any(len(names) == 1 for names in seen)


def test_what_was_just_read_can_be_read_on(away: Callable[..., Away]) -> None:
    mounted = away("-o", "retry_timeout=300")
    with opened(mounted.path / "read" / "file", os.O_RDONLY) as fd:
        assert os.pread(fd, MIB, 0) == noise(3 * MIB)[:MIB]
        mounted.lose("stalled")
        for _ in range(3):
            # While the line is stalled, nobody but the mount can answer.
            assert os.pread(fd, 100_000, 5000) == noise(3 * MIB)[5000:105_000]
        mounted.regain("stalled")
        assert os.pread(fd, MIB, 2 * MIB) == noise(3 * MIB)[2 * MIB :]


# -- signals -------------------------------------------------------------------------------------------------------------

INTERRUPTS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGKILL": signal.SIGKILL}


def waits(pid: int) -> bool:
    """Whether the process waits for a FUSE file system, as the kernel names the place where it sleeps: a read waits for pages."""
    try:
        place = Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        return False
    return any(word in place for word in ("fuse", "request_wait", "folio"))


def is_sftp_server(pid: int) -> bool:
    """Whether the process of an sshd serves files, and not the connection."""
    return b"sftp" in Path(f"/proc/{pid}/cmdline").read_bytes()


class TestInterruption:
    """A server that says nothing for longer than anyone here has patience."""

    @pytest.mark.parametrize("name", short("SIGINT", of=INTERRUPTS))
    def test_an_operation(self, away: Callable[..., Away], name: str) -> None:
        mounted = away("-o", "retry_timeout=300")
        callers = mounted.callers(OPERATIONS)
        mounted.lose("stalled")
        for caller in callers:
            caller.go()
        late: Dict[str, float] = {}
        for caller in callers:
            caller.wait_until_stuck()
            os.kill(caller.pid, INTERRUPTS[name])
            late[caller.operation] = self.seconds_to_end(caller.pid)
        # Within a second, on an idle machine.
        assert {operation: took_s for operation, took_s in late.items() if took_s >= 10.0} == {}
        mounted.regain("stalled")
        mounted.check_usable()
        assert mounted.mount.is_running

    @pytest.mark.long
    @pytest.mark.parametrize("name", INTERRUPTS)
    @pytest.mark.parametrize(
        "command",
        [
            ["ls", "-l", "{path}/directory"],
            ["cat", "{path}/read/file"],
            ["dd", "if=/dev/zero", "of={path}/write/file", "bs=1M", "count=200"],
            ["cp", "{path}/read/file", "/dev/null"],
            ["df", "{path}"],
            ["find", "{path}"],
        ],
        ids=lambda command: str(command[0]),
    )
    def test_a_program(self, away: Callable[..., Away], command: List[str], name: str) -> None:
        mounted = away("-o", "retry_timeout=300")
        mounted.lose("stalled")
        words = [word.format(path=mounted.path) for word in command]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as program:
            try:
                wait_until(lambda: waits(program.pid), 10.0, f"{command[0]} waits")
                program.send_signal(INTERRUPTS[name])
                assert self.seconds_to_end(program.pid) < 1.0
                assert program.wait() == -INTERRUPTS[name]
            finally:
                mounted.regain("stalled")
        mounted.check_usable()

    def test_a_program_that_writes_to_a_disk_that_hangs(self, away: Callable[..., Away]) -> None:
        """The server answers heartbeats, and takes nothing more in."""
        mounted = away("-o", "retry_timeout=300")
        (caller,) = mounted.callers(["write"])
        before = mounted.relay.stats()["up"]
        servers = [pid for pid in mounted.sshd.sessions() if is_sftp_server(pid)]
        assert servers
        send_signal(servers, signal.SIGSTOP)
        try:
            caller.go()
            wait_until(
                lambda: mounted.relay.stats()["up"] - before > WINDOW_BYTES - MIB // 4, 10.0, "a full window"
            )
            caller.wait_until_stuck()
            assert mounted.relay.stats()["up"] - before < 200 * MIB  # of which it writes
            os.kill(caller.pid, signal.SIGTERM)
            assert self.seconds_to_end(caller.pid) < 10.0
        finally:
            send_signal(servers, signal.SIGCONT)
        mounted.check_usable()

    @staticmethod
    def seconds_to_end(pid: int) -> float:
        """How long until it has ended; not longer than fifteen seconds."""
        began = time.monotonic()
        try:
            wait_until(lambda: not is_running(pid), 15.0, "the end")
        except TimeoutError:
            pass
        return time.monotonic() - began

    @pytest.mark.parametrize(
        "numbers",
        [
            pytest.param([signal.SIGALRM, signal.SIGUSR1, signal.SIGURG], id="handled"),
            pytest.param([signal.SIGSTOP, signal.SIGCONT], id="stopped", marks=pytest.mark.long),
        ],
    )
    def test_a_signal_that_ends_nothing_disturbs_nothing(
        self, away: Callable[..., Away], numbers: List[signal.Signals]
    ) -> None:
        """Go's runtime sends SIGURG to its own threads all the time."""
        mounted = away("-o", "retry_timeout=300")
        callers = mounted.callers(OPERATIONS)
        mounted.lose("stalled")
        for caller in callers:
            caller.go()
        for caller in callers:
            caller.wait_until_stuck()
        for _ in range(20):
            for number in numbers:
                for caller in callers:
                    if is_running(caller.pid):
                        os.kill(caller.pid, number)
                time.sleep(0.05)  # so that each comes by itself
        mounted.regain("stalled")
        for caller in callers:
            answer = caller.answer(60.0)
            assert answer.result == "OK", f"{caller.operation}: {answer}"
            assert caller.operation != "ls" or answer.value == len(NAMES)
        assert (mounted.served / "close" / "file").read_bytes() == b"x" * 1000 + noise(3 * MIB)[1000:]
        mounted.check_usable()


# -- the end -------------------------------------------------------------------------------------------------------------


class TestUnmount:
    """Bytes that nobody waits for any more, written through a mapping after close(), and no server to take them."""

    HELD = b"m" * 200_000

    def hold(self, mounted: Away) -> None:
        (mounted.path / "held").touch()
        os.truncate(mounted.path / "held", len(self.HELD))
        caller = mounted.caller("map", f"{mounted.path}/held")
        mounted.lose("refused")
        caller.go()
        assert caller.answer(20.0).result == "OK"

    def test_a_server_that_comes_back_gets_all_of_it(self, away: Callable[..., Away]) -> None:
        mounted = away("-o", "retry_timeout=60")
        self.hold(mounted)
        subprocess.run(["fusermount3", "-u", mounted.path], check=True)
        wait_until(lambda: named(mounted.mount), 20.0, "the log says what is not stored")
        assert mounted.mount.is_running
        mounted.regain("refused")
        assert mounted.mount.wait(30.0) == 0
        assert (mounted.served / "held").read_bytes() == self.HELD

    def test_what_is_given_up_is_listed(self, away: Callable[..., Away]) -> None:
        mounted = away("-o", f"retry_timeout={RETRY_S:g}")
        self.hold(mounted)
        began = time.monotonic()
        subprocess.run(["fusermount3", "-u", mounted.path], check=True)
        assert mounted.mount.wait(30.0) == 1
        assert time.monotonic() - began < RETRY_S + SLACK_S
        assert named(mounted.mount)
        assert (mounted.served / "held").read_bytes() != self.HELD

    def test_a_second_signal_gives_up_at_once(self, away: Callable[..., Away]) -> None:
        mounted = away("-o", "retry_timeout=300")
        self.hold(mounted)
        mounted.mount.terminate()
        wait_until(lambda: not mounted.mount.is_mounted, 10.0, "unmounted")
        assert mounted.mount.is_running
        began = time.monotonic()
        mounted.mount.terminate()
        assert mounted.mount.wait(30.0) == 1
        assert time.monotonic() - began < 10.0
        assert named(mounted.mount)

    def test_a_signal_after_the_unmount_gives_up_too(self, away: Callable[..., Away]) -> None:
        """umount began the storing; one signal then asks for no more of it, a second ends it whatever it does."""
        mounted = away("-o", "retry_timeout=300")
        self.hold(mounted)
        subprocess.run(["fusermount3", "-u", mounted.path], check=True)
        wait_until(lambda: named(mounted.mount), 20.0, "the log says what is not stored")
        mounted.mount.terminate()
        wait_until(lambda: "signal 15" in mounted.mount.log_text(), 20.0, "the first signal is seen")
        mounted.mount.terminate()
        assert mounted.mount.wait(20.0) == 1
        assert "in use" not in mounted.mount.log_text()

    def test_by_force_while_a_program_waits(self, away: Callable[..., Away]) -> None:
        """``umount -f`` is for root, and gives up; to anybody else it is refused, and nothing is lost."""
        mounted = away("-o", "retry_timeout=300")
        reader = mounted.caller("read", mounted.place("read"))
        self.hold(mounted)
        reader.go()
        reader.wait_until_stuck()
        (mounted.path / "held").stat()  # answered without the server, and behind the read
        forced = subprocess.run(["umount", "-f", mounted.path], capture_output=True, text=True)
        if os.geteuid() == 0:
            assert mounted.mount.wait(20.0) == 1
            assert named(mounted.mount)
            assert reader.answer(5.0).result in ("ECONNABORTED", "ENOTCONN")
        else:
            assert forced.returncode != 0
            mounted.regain("refused")
            assert reader.answer(40.0).result == "OK"
            assert mounted.mount.unmount() == 0
            assert (mounted.served / "held").read_bytes() == self.HELD


def named(mount: Mount) -> bool:
    """Whether the log names the file that is not stored."""
    return any("not stored" in line and "held" in line for line in mount.log_text().splitlines())
