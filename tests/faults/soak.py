"""A soak: four processes at work on one mount, and the faults that strike it meanwhile.

The four, each with its own sequence of choices drawn from the seed:

writer      files of 1 B to 20 MiB in odd pieces, some synchronised, some replaced by rename, old ones removed. It keeps a
            record of what it is about to do and what it has done, which is what the reader and the end go by.
reader      reads what the writer has completed, whole and in ranges, and lists it: every byte is one version's, a name
            is absent only where the record says that it was removed, and no listing lacks one.
rsync       rsync -a --delete of a local tree that changes a little each time.
namespace   the random operations of ``exercise.namespace``, each at once repeated on a local directory: same outcome.

No operation may fail. One answer is true though it is an error: after a lost reply the mount does not claim an exclusive
create, a mkdir or a link, and says EEXIST; the namespace worker accepts that where its local twin succeeded, and the test
holds the number of such answers against that of the faults.

``Load`` starts and ends the four, ``Faults`` makes the faults. This module is also the program of the four.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Type

from exercise.namespace import Worker, compare, snapshot
from mount.helpers import opened
from support.process import send_signal, wait_until
from support.relay import DIRECTIONS, Relay
from support.sshd import Sshd
from tools.trees import contents, make_tree, metadata, run

SIZE_MAX = 20 * 2**20
PIECES = (1, 511, 4095, 4097, 65_537, 131_071, 1_000_003)
LIVE_FILES_MAX = 250  # more than two READDIR replies of OpenSSH hold
LIVE_BYTES_MAX = 200 * 2**20
REPLACED_WITHIN_S = 60.0  # a fault may come in the middle

_TESTS = Path(__file__).resolve().parents[1]
_END_TIMEOUT_S = 180.0


# ---- the four ----


class Role:
    """One process: ``turn`` again and again under ``place`` (on the mount) until the file ``stop`` appears in ``local``."""

    def __init__(self, place: Path, local: Path, seed: int) -> None:
        self.place = place
        self.local = local
        self.seed = seed
        self.rng = random.Random(f"{seed} {type(self).__name__}")
        self.figures: Dict[str, Any] = {"steps": 0, "longest_s": 0.0, "longest": ""}
        self._doing = os.open(f"{local}/{type(self).__name__}.doing", os.O_CREAT | os.O_WRONLY, 0o644)

    def run(self) -> Dict[str, Any]:
        while not (self.local / "stop").exists():
            self.turn()
        self.end()
        return self.figures

    def turn(self) -> None:
        raise NotImplementedError

    def end(self) -> None:
        """Let go of everything that is open."""

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """One thing asked of the mount; its text is in a file while it lasts, since who waits in a mount cannot be asked."""
        os.pwrite(self._doing, f"{time.strftime('%H:%M:%S')} {what}".ljust(200).encode(), 0)
        begun = time.monotonic()
        yield
        took_s = time.monotonic() - begun
        self.figures["steps"] += 1
        if took_s > self.figures["longest_s"]:
            self.figures["longest_s"], self.figures["longest"] = round(took_s, 1), what


class Version(NamedTuple):
    """What a file of the writer holds: ``content(number, size)``."""

    number: int
    size: int
    sha256: str


def content(number: int, size: int) -> bytes:
    """Bytes without pattern that two processes can make alike."""
    return random.Random(number).randbytes(size)


class Record:
    """The writer's record: a line before a version gets its name (intends), after it has it (has), before a name goes (drops).

    Names are never used again once dropped.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.versions: Dict[str, List[Version]] = {}
        self.live: Dict[str, int] = {}  # name -> index in versions of the one that it is known to have

    def read(self) -> None:
        """Take in what was added since."""
        with self._path.open("ab+") as file:
            file.seek(self._offset)
            lines = file.read().split(b"\n")
        self._offset += sum(len(line) + 1 for line in lines[:-1])
        for line in lines[:-1]:
            verb, name, *values = line.decode().split()
            if verb == "intends":
                self.versions.setdefault(name, []).append(Version(int(values[0]), int(values[1]), values[2]))
            elif verb == "has":
                self.live[name] = len(self.versions[name]) - 1
            else:
                del self.live[name]


class Writer(Role):
    """See the module's docstring."""

    def __init__(self, place: Path, local: Path, seed: int) -> None:
        super().__init__(place / "files", local, seed)
        self._record = os.open(local / "record", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
        self._live: Dict[str, int] = {}  # name -> size, oldest first
        self._count = 0
        self.figures["bytes"] = 0

    def turn(self) -> None:
        self._count += 1
        size = min(SIZE_MAX, int(math.exp(self.rng.uniform(0, math.log(SIZE_MAX + 1)))))
        replaces = bool(self._live) and self.rng.random() < 0.2
        name = self.rng.choice(list(self._live)) if replaces else f"{self._count:06}"
        by_rename = replaces or self.rng.random() < 0.3
        number = self.seed * 10_000_000 + self._count
        data = content(number, size)
        path = self.place / (f".{name}.tmp" if by_rename else name)
        with self.step(f"write {path.name}, {size} bytes"):
            self._write(path, data)
        self._note("intends", name, number, size, hashlib.sha256(data).hexdigest())
        if by_rename:
            with self.step(f"rename to {name}"):
                os.rename(path, self.place / name)
        self._note("has", name)
        self._live[name] = size
        self.figures["bytes"] += size
        while len(self._live) > LIVE_FILES_MAX or sum(self._live.values()) > LIVE_BYTES_MAX:
            oldest = next(iter(self._live))
            del self._live[oldest]
            self._note("drops", oldest)
            with self.step(f"unlink {oldest}"):
                os.unlink(self.place / oldest)

    def _write(self, path: Path, data: bytes) -> None:
        piece = self.rng.choice([each for each in PIECES if each * 4000 >= len(data)])
        starts = list(range(0, len(data), piece))
        if self.rng.random() < 0.2:
            self.rng.shuffle(starts)
        synchronised_at = self.rng.choice(starts) if self.rng.random() < 0.1 else -1
        with opened(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY) as fd:
            if self.rng.random() < 0.2:
                os.pwrite(fd, b"\0" * (len(data) // 2), len(data) // 4)  # soon written over
            for start in starts:
                part = data[start : start + piece]
                assert os.pwrite(fd, part, start) == len(part), "a short write"
                if start == synchronised_at:
                    os.fsync(fd)
            if self.rng.random() < 0.3:
                os.fsync(fd)

    def _note(self, *words: object) -> None:
        os.write(self._record, (" ".join(map(str, words)) + "\n").encode())


class Reader(Role):
    """See the module's docstring."""

    def __init__(self, place: Path, local: Path, seed: int) -> None:
        super().__init__(place / "files", local, seed)
        self._record = Record(local / "record")
        self.figures["looked_again"] = 0

    def turn(self) -> None:
        self._record.read()
        if not self._record.live:
            time.sleep(0.02)
        elif self.rng.random() < 0.15:
            self._list()
        else:
            name, whole = self.rng.choice(list(self._record.live)), self.rng.random() < 0.5
            wait_until(lambda: self._has_read(name, whole), REPLACED_WITHIN_S, f"{name} is found again")

    def _has_read(self, name: str, whole: bool) -> bool:
        """Read and check the file; False where its replacement kept us from it."""
        since = self._record.live[name]
        try:
            with self.step(f"read {name}"), opened(self.place / name, os.O_RDONLY) as fd:
                check = self._read_whole(fd) if whole else self._read_ranges(fd)
        except FileNotFoundError:
            self._record.read()
            if name not in self._record.live:
                return True
            # libfuse 2 answers an open by itself, with ENOENT, when the file that the kernel had found under the name
            # is replaced while the request is on its way. Another look, once the rename is through, finds the new one.
            assert len(self._record.versions[name]) > since + 1, f"{name}: not found, nor replaced"
            self.figures["looked_again"] += 1
            return False
        self._record.read()
        versions = self._record.versions[name][since:]
        assert any(check(version) for version in versions), f"{name}: what was read is none of {versions}"
        return True

    def _read_whole(self, fd: int) -> Callable[[Version], bool]:
        pieces: List[bytes] = []
        size = os.fstat(fd).st_size
        chunk = self.rng.choice([4096, 65_536, 100_003, 2**20])
        while pieces == [] or pieces[-1] != b"":
            pieces.append(os.read(fd, chunk))
        data = b"".join(pieces)
        digest = hashlib.sha256(data).hexdigest()
        assert size == len(data), f"fstat says {size}, and {len(data)} bytes were read"
        return lambda version: version.sha256 == digest

    def _read_ranges(self, fd: int) -> Callable[[Version], bool]:
        size = os.fstat(fd).st_size
        ranges: List[Tuple[int, int, bytes]] = []
        for _ in range(self.rng.randrange(1, 12)):
            start = self.rng.randrange(size)
            length = self.rng.choice([1, 4096, 70_000, 300_000])
            ranges.append((start, length, os.pread(fd, length, start)))

        def is_of(version: Version) -> bool:
            data = content(version.number, version.size)
            return size == version.size and all(got == data[at : at + length] for at, length, got in ranges)

        return is_of

    def _list(self) -> None:
        before = set(self._record.live)
        with self.step("list the writer's directory"):
            names = set(os.listdir(self.place))
        self._record.read()
        missing = (before & set(self._record.live)) - names
        assert not missing, f"a listing of {len(names)} names lacks {sorted(missing)}"


class Rsync(Role):
    """See the module's docstring."""

    def __init__(self, place: Path, local: Path, seed: int) -> None:
        super().__init__(place / "rsync", local, seed)
        self._source = make_tree(local / "source", seed, files=60)
        self._round = 0

    def turn(self) -> None:
        self._round += 1
        if self._round > 1:
            self._change()
        with self.step(f"rsync {self._round}"):
            run("rsync", "-a", "--delete", f"{self._source}/", f"{self.place}/")

    def _change(self) -> None:
        """Some files written anew, added, removed, renamed; each change shows in size or time."""
        when = 1_600_000_000 + 2 * self._round
        for _ in range(self.rng.randrange(1, 6)):
            files = sorted(path for path in self._source.rglob("*") if path.is_file())
            path = self.rng.choice(files)
            choice = self.rng.random()
            if choice < 0.15 and len(files) > 40:
                path.unlink()
                continue
            if choice < 0.3:
                path = path.rename(path.with_name(f"renamed-{self._round}"))
            elif choice < 0.4:
                path.chmod(self.rng.choice([0o600, 0o644, 0o755]))
            elif choice < 0.7:
                path = path.parent / f"new-{self._round}"
                path.write_bytes(self.rng.randbytes(self.rng.choice([0, 10, 5000, 200_000])))
            else:
                path.chmod(path.stat().st_mode | 0o200)
                path.write_bytes(self.rng.randbytes(self.rng.choice([1, 4096, 70_001, 1_500_000])))
            if not path.is_symlink():
                os.utime(path, (when, when))


class NamespaceRole(Role):
    """See the module's docstring."""

    def __init__(self, place: Path, local: Path, seed: int) -> None:
        super().__init__(place / "namespace", local, seed)
        (local / "model").mkdir()
        self._worker, self._twin = Worker(self.place, seed), Worker(local / "model", seed)
        self._history: List[str] = []
        self.figures["unclaimed"] = []
        self.figures["late"] = []

    def turn(self) -> None:
        expected = self._twin.step()
        with self.step(" ".join(expected)):
            got = self._worker.step()
        self._history = [*self._history[-30:], f"{time.strftime('%H:%M:%S')} {expected[0]} -> {got[1]}"]
        if got == expected:
            return
        operation, *paths = expected[0].split(" ")
        if operation in ("link", "stat", "lstat") and self._is_late(paths, expected[1]):
            self.figures["late"].append(self._history[-1])
            return
        before = "\n  ".join(self._history)
        assert got == (expected[0], "EEXIST") and operation in ("create_exclusive", "mkdir", "link"), (
            f"{expected[0]}: {got[1]} on the mount, {expected[1]} on a local directory; before it\n  {before}"
        )
        self.figures["unclaimed"].append(self._history[-1])
        if operation == "link":  # a link that the mount does not know of is counted by nobody: do without it
            os.unlink(self.place / paths[1])
            os.unlink(self.local / "model" / paths[1])

    def _is_late(self, paths: List[str], expected: str) -> bool:
        """Whether another look finds what was expected: each name of a hard link has attributes of its own in the kernel, for
        ten milliseconds, or longer where the machine is busy."""

        def looks() -> str:
            found = [os.lstat(self.place / path) for path in paths]
            if len(found) == 2:
                return f"links {found[0].st_nlink} {found[1].st_nlink}"
            return f"{stat.filemode(found[0].st_mode)} {found[0].st_size} links {found[0].st_nlink}"

        try:
            wait_until(lambda: looks() == expected, 2.0, expected, 0.05)
        except (TimeoutError, OSError):
            return False
        return True

    def end(self) -> None:
        self._worker.release()
        self._twin.release()


ROLES: Dict[str, Type[Role]] = {
    "writer": Writer,
    "reader": Reader,
    "rsync": Rsync,
    "namespace": NamespaceRole,
}


# ---- the test's side ----


class Load:
    """The four at work in ``place``, a fresh directory on the mount; what they know is kept in ``local``."""

    def __init__(self, place: Path, local: Path, seed: int) -> None:
        self._local = local
        local.mkdir()
        place.mkdir()
        for name in ("files", "rsync", "namespace"):
            (place / name).mkdir()
        environment = {**os.environ, "PYTHONPATH": str(_TESTS)}
        self._processes: Dict[str, subprocess.Popen[bytes]] = {}
        for role in ROLES:
            with (local / f"{role}.out").open("wb") as out, (local / f"{role}.err").open("wb") as errors:
                self._processes[role] = subprocess.Popen(
                    [sys.executable, "-m", "faults.soak", role, str(place), str(local), str(seed)],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=errors,
                    env=environment,
                )

    def run(self, seconds: float) -> Dict[str, Dict[str, Any]]:
        """Let them work for so long, or until one fails; returns their figures. Raises AssertionError with its errors."""
        try:
            wait_until(self._has_failed, seconds, "a failure", 0.2)
        except TimeoutError:
            pass
        except BaseException:
            self.kill()
            raise
        return self.stop()

    def stop(self) -> Dict[str, Dict[str, Any]]:
        """Let each end what it is about."""
        (self._local / "stop").touch()
        try:
            wait_until(self._have_ended, _END_TIMEOUT_S, "the end of the four", 0.05)
        except TimeoutError:
            doing = "".join(f"\n  {path.name}: {path.read_text()}" for path in self._local.glob("*.doing"))
            raise AssertionError(f"after {_END_TIMEOUT_S:g} s they are still about{doing}") from None
        finally:
            self.kill()
        failed = [role for role, process in self._processes.items() if process.returncode != 0]
        texts = [
            f"{role}: {(self._local / f'{role}.err').read_text(errors='replace')[-6000:]}" for role in failed
        ]
        assert not failed, "\n".join(texts)
        return {role: json.loads((self._local / f"{role}.out").read_text()) for role in ROLES}

    def kill(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):  # who waits in a dead mount ends with it
                process.wait(10.0)

    def _has_failed(self) -> bool:
        return any(process.poll() not in (None, 0) for process in self._processes.values())

    def _have_ended(self) -> bool:
        return all(process.poll() is not None for process in self._processes.values())


def check_server(served: Path, local: Path) -> int:
    """All bytes, names, modes and links in ``served``, on the server's side, are what the four say; returns the bytes."""
    record = Record(local / "record")
    record.read()
    names = sorted(os.listdir(served / "files"))
    assert names == sorted(record.live), (
        f"missing {sorted(set(record.live) - set(names))}, too many {sorted(set(names) - set(record.live))}"
    )
    total = 0
    for name, index in record.live.items():
        data = (served / "files" / name).read_bytes()
        version = record.versions[name][index]
        assert hashlib.sha256(data).hexdigest() == version.sha256, (
            f"{name} ({len(data)} bytes) is not {version}"
        )
        total += len(data)
    total += _check_rsync(served / "rsync", local / "source")
    compare(snapshot(served / "namespace"), snapshot(local / "model"), "the namespace on the server's side")
    return total


def _check_rsync(copy: Path, source: Path) -> int:
    """rsync tries another name where the reply to the exclusive create of its temporary file is lost; that file stays."""
    got, expected = contents(copy), contents(source)
    for name in [each for each in got if _is_temporary(each) and each not in expected]:
        del got[name]
    odd = sorted(got.keys() ^ expected.keys())
    assert not odd, f"only on one side of rsync: {odd}"
    differing = [name for name, entry in expected.items() if got[name] != entry]
    assert not differing, f"differ from what rsync copied: {differing}"
    expected_metadata = metadata(source)

    def wrong() -> List[Tuple[str, Tuple[int, int], Tuple[int, int]]]:
        got_metadata = metadata(copy)
        return [
            (name, got_metadata[name], each)
            for name, each in expected_metadata.items()
            if got_metadata[name] != each
        ]

    # What rsync set last, the times of directories, may go half a second later.
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: not wrong(), 5.0, "the last attributes")
    assert not wrong(), f"(mode, time) of the copies and of their sources: {wrong()}"
    return sum(len(data) for _, data in got.values())


def _is_temporary(name: str) -> bool:
    base = os.path.basename(name)
    return base.startswith(".") and base[-7:-6] == "."


class Faults:
    """A fault every ``mean_s`` on average, of all kinds in turn, in an order and with values from the seed.

    What is done, and when, is added to ``told``. The mount has to notice a silent death within ``_NOTICED_S``.
    """

    _NOTICED_S = 60.0

    def __init__(self, sshd: Sshd, relay: Relay, seed: int, mean_s: float, told: List[str]) -> None:
        self._sshd = sshd
        self._relay = relay
        self._rng = random.Random(f"{seed} faults")
        self._mean_s = mean_s
        self._told = told
        self._stopping = threading.Event()
        self._error: Optional[BaseException] = None
        self._thread = threading.Thread(target=self._work, name="faults", daemon=True)
        self.count = 0

    def __enter__(self) -> Faults:
        self._thread.start()
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], *_: object) -> None:
        self.stop()
        if kind is None and self._error is not None:
            raise self._error

    def stop(self) -> None:
        """No fault from here on: the server is there and the line is clean."""
        self._stopping.set()
        self._thread.join()
        for direction in DIRECTIONS:
            self._relay.reset_after(2**60, direction)
        self._relay.set_line()

    def _work(self) -> None:
        kinds = (
            self._reset,
            self._reset_after,
            self._stall,
            self._end_direction,
            self._silence_direction,
            self._kill_sessions,
            self._kill_daemon,
            self._pause_sessions,
            self._change_delay,
        )
        deck: List[Callable[[], None]] = []
        next_s = time.monotonic()
        try:
            while True:
                next_s += self._mean_s * self._rng.uniform(0.3, 1.7)
                if self._stopping.wait(max(0.0, next_s - time.monotonic())):
                    return
                if not deck:
                    deck = self._rng.sample(kinds, len(kinds))
                self.count += 1
                deck.pop()()
                next_s = max(next_s, time.monotonic())
        except BaseException as error:
            self._error = error

    def _tell(self, what: str) -> None:
        self._told.append(f"{time.strftime('%H:%M:%S')} {what}")

    def _direction(self) -> str:
        return self._rng.choice(DIRECTIONS)

    def _reset(self) -> None:
        self._tell("reset")
        self._relay.reset()

    def _reset_after(self) -> None:
        count, direction = int(math.exp(self._rng.uniform(0, math.log(3e6)))), self._direction()
        self._tell(f"reset after {count} more bytes {direction}")
        self._relay.reset_after(count, direction)

    def _stall(self) -> None:
        seconds, direction = self._rng.uniform(1, 8), self._rng.choice([*DIRECTIONS, "both"])
        self._tell(f"stall {direction} for {seconds:.1f} s")
        self._relay.stall(direction)
        self._stopping.wait(seconds)
        self._relay.flow()

    def _end_direction(self) -> None:
        direction = self._direction()
        self._tell(f"end of the stream {direction}")
        self._relay.end(direction)

    def _silence_direction(self) -> None:
        """Nothing passes any more in one direction of this connection, until the mount has made another one."""
        direction = self._direction()
        self._tell(f"silence {direction} until the next connection")
        before = self._relay.stats()["accepted"]
        self._relay.stall(direction, new_connections=False)
        wait_until(
            lambda: self._relay.stats()["accepted"] > before, self._NOTICED_S, "a new connection", 0.05
        )
        self._tell("the next connection is there")
        self._relay.flow()

    def _kill_sessions(self) -> None:
        self._tell("kill the sessions")
        self._sshd.kill_sessions()

    def _kill_daemon(self) -> None:
        self._tell("kill the server for 3 s")
        self._sshd.kill()
        self._stopping.wait(3.0)
        self._sshd.start()

    def _pause_sessions(self) -> None:
        self._tell("stop the sessions for 5 s")
        sessions = self._sshd.sessions()
        send_signal(sessions, signal.SIGSTOP)
        self._stopping.wait(5.0)
        send_signal(sessions, signal.SIGCONT)

    def _change_delay(self) -> None:
        rtt_ms = self._rng.choice([0.0, 5.0, 20.0, 60.0])
        self._tell(f"a round trip takes {rtt_ms:g} ms")
        self._relay.set_line(rtt_ms=rtt_ms)


if __name__ == "__main__":
    name, place, local, seed = sys.argv[1:]
    json.dump(ROLES[name](Path(place), Path(local), int(seed)).run(), sys.stdout)
