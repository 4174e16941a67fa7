"""Several processes at once under one root: random operations in a directory of each, and a shared one with rules.

Private part: each worker makes a random sequence over a small set of names, chosen by its seed alone, so that many
operations fail and the errno is compared too. What every operation returned is logged; the same sequence on a local
directory must return the same, line by line, and leave the same tree.

Shared part, whose outcome does not depend on who comes first: one winner of each O_EXCL create, mkdir and link; a counter
under a mkdir lock and one under a directory renamed onto a full one; files replaced by rename that are whole at every
look; records appended through O_APPEND, none lost or torn.

    python -m exercise.namespace MOUNTPOINT/dir --local TWIN --workers 4 --operations 2000 --seed 3

Both directories must be absent or empty.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import random
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

_NAMES = ("a", "b", "c", "d", "e\u00e4", "f.tmp")
_HELD_MAX = 3
_SHARED_ROUNDS = 30
_LOOKS_MAX = 10
_TESTS = Path(__file__).resolve().parents[1]


class Disagreement(AssertionError):
    """The tree or an outcome is not what a local directory's is; the text holds the seed and the last operations."""


class Worker:
    """Random operations under ``root``, which nobody else touches; ``log`` gets one line per operation with its outcome."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = str(root)
        self.log: List[str] = []
        self._rng = random.Random(seed)
        self._held: List[Tuple[int, str]] = []  # descriptor, the name it was opened by
        self._text = ""  # the operation under way, for the log
        weighted: List[Tuple[int, Callable[[], str]]] = [
            (10, self._create_exclusive),
            (12, self._write_whole),
            (8, self._append),
            (14, self._rename),
            (8, self._link),
            (8, self._unlink),
            (9, self._mkdir),
            (5, self._rmdir),
            (5, self._symlink),
            (4, self._readlink),
            (10, self._stat),
            (5, self._lstat),
            (8, self._list),
            (3, self._chmod),
            (3, self._truncate),
            (8, self._read),
            (6, self._hold),
            (6, self._write_held),
            (6, self._read_held),
            (4, self._release),
            (2, self._set_time),
        ]
        self._weights = [weight for weight, _ in weighted]
        self._operations = [operation for _, operation in weighted]

    def run(self, operations: int) -> None:
        os.makedirs(self.root, exist_ok=True)
        for count in range(operations):
            text, outcome = self.step()
            self.log.append(f"{count} {text} -> {outcome}")
        self.release()

    def step(self) -> Tuple[str, str]:
        """One operation: what it was, and what came of it."""
        operation = self._rng.choices(self._operations, self._weights)[0]
        self._text = operation.__name__.strip("_")
        try:
            outcome = operation()
        except OSError as error:
            outcome = errno.errorcode.get(error.errno or 0, str(error))
        return self._text, outcome

    def release(self) -> None:
        """Close what is held open."""
        for fd, _ in self._held:
            os.close(fd)

    # Each says what it does in self._text and returns what it saw. All choices are drawn before the first system call,
    # so that the sequence depends on the seed alone.

    def _create_exclusive(self) -> str:
        path = self._path()
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640)
        os.close(fd)
        return "ok"

    def _write_whole(self) -> str:
        path, data = self._path(), self._data()
        fd = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
        try:
            return str(os.write(fd, data))
        finally:
            os.close(fd)

    def _append(self) -> str:
        path, data = self._path(), self._data()
        fd = os.open(path, os.O_APPEND | os.O_WRONLY)
        try:
            os.write(fd, data)
            return f"size {os.fstat(fd).st_size}"
        finally:
            os.close(fd)

    def _rename(self) -> str:
        one, other = self._path(), self._path()
        os.rename(one, other)
        return "ok"

    def _link(self) -> str:
        one, other = self._path(), self._path()
        os.link(one, other, follow_symlinks=False)
        return f"links {os.lstat(one).st_nlink} {os.lstat(other).st_nlink}"

    def _unlink(self) -> str:
        os.unlink(self._path())
        return "ok"

    def _mkdir(self) -> str:
        os.mkdir(self._path(), 0o755)
        return "ok"

    def _rmdir(self) -> str:
        os.rmdir(self._path())
        return "ok"

    def _symlink(self) -> str:
        target, path = self._rng.choice(_NAMES), self._path()
        os.symlink(target, path)
        return "ok"

    def _readlink(self) -> str:
        return os.readlink(self._path())

    def _stat(self) -> str:
        return _attributes(os.stat(self._path()))

    def _lstat(self) -> str:
        return _attributes(os.lstat(self._path()))

    def _list(self) -> str:
        directory = os.path.dirname(self._path())
        return " ".join(sorted(os.listdir(directory)))

    def _chmod(self) -> str:
        path, mode = self._path(), self._rng.choice([0o600, 0o644, 0o700, 0o755])
        os.chmod(path, mode | 0o700 if os.path.isdir(path) else mode)
        return "ok"

    def _truncate(self) -> str:
        path, size = self._path(), self._rng.randrange(9000)
        os.truncate(path, size)
        return _attributes(os.stat(path))

    def _read(self) -> str:
        with open(self._path(), "rb") as file:
            return _digest(file.read())

    def _hold(self) -> str:
        """Keep a file open: what follows may rename, replace or unlink it."""
        path = self._path()
        if len(self._held) >= _HELD_MAX:
            return "enough"
        self._held.append((os.open(path, os.O_RDWR), os.path.basename(path)))
        return "ok"

    def _write_held(self) -> str:
        choice, data, start = self._rng.random(), self._data(), self._rng.randrange(5000)
        if not self._held:
            return "none"
        fd, name = self._held[int(choice * len(self._held))]
        self._text += f" {name} {start}+{len(data)}"
        os.pwrite(fd, data, start)
        return f"size {os.fstat(fd).st_size}"

    def _read_held(self) -> str:
        choice = self._rng.random()
        if not self._held:
            return "none"
        fd, name = self._held[int(choice * len(self._held))]
        self._text += f" {name}"
        return f"size {os.fstat(fd).st_size} {_digest(os.pread(fd, 100_000, 0))}"

    def _release(self) -> str:
        choice = self._rng.random()
        if not self._held:
            return "none"
        fd, name = self._held.pop(int(choice * len(self._held)))
        self._text += f" {name}"
        os.close(fd)
        return "ok"

    def _set_time(self) -> str:
        path, seconds = self._path(), self._rng.randrange(1_000_000_000, 2_000_000_000)
        os.utime(path, (seconds, seconds + 1), follow_symlinks=False)
        return str(int(os.lstat(path).st_mtime))

    def _path(self) -> str:
        depth = self._rng.choice([1, 1, 1, 2, 2, 3])
        relative = "/".join(self._rng.choice(_NAMES) for _ in range(depth))
        self._text += f" {relative}"
        return f"{self.root}/{relative}"

    def _data(self) -> bytes:
        data = self._rng.randbytes(self._rng.choice([1, 100, 4096, 4097, 20_000]))
        self._text += f" {len(data)} bytes"
        return data


def shared_work(root: Path, index: int, workers: int, rounds: int) -> Dict[str, Any]:
    """One worker's part in the shared directory; returns what it won and saw. Raises on any outcome that is wrong."""
    base = str(root)
    won: Dict[str, List[int]] = {"excl": [], "mkdir": [], "link": []}
    mine = f"{base}/source-{index}"
    with open(mine, "xb") as file:
        file.write(b"%d" % index)
    record = b"%02d" % index + b"x" * 61 + b"\n"
    log = os.open(f"{base}/log", os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    looks = 0
    for turn in range(rounds):
        attempts: Dict[str, Callable[[], None]] = {
            "excl": lambda turn=turn: os.close(
                os.open(f"{base}/excl-{turn}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            ),
            "mkdir": lambda turn=turn: os.mkdir(f"{base}/mkdir-{turn}"),
            "link": lambda turn=turn: os.link(mine, f"{base}/link-{turn}"),
        }
        for name, attempt in attempts.items():
            try:
                attempt()
                won[name].append(turn)
            except FileExistsError:
                pass
        _replace_target(base, index, turn)
        looks += _look_at_target(base)
        assert os.write(log, record) == len(record)
        _count_under_mkdir(base)
        _count_under_rename(base, index)
    os.close(log)
    return {"won": won, "looks": looks}


def _replace_target(base: str, index: int, turn: int) -> None:
    body = b"%d\n" % index * (1000 + 37 * index + turn)
    temporary = f"{base}/target.{index}.tmp"
    with open(temporary, "xb") as file:
        file.write(body)
    os.rename(temporary, f"{base}/target")


def _look_at_target(base: str) -> int:
    """Once there, the target is there at every look, and is one writer's work from first to last byte.

    Several looks: libfuse 2 answers an open by itself, with ENOENT, when the file that the kernel had found under the name lost
    its last name and its last handle while the request was on its way. What comes then finds the new file, unless that has
    been replaced, too, on a busy machine.
    """
    for _ in range(_LOOKS_MAX):
        try:
            descriptor = os.open(f"{base}/target", os.O_RDONLY)
            break
        except FileNotFoundError as error:
            missing = error
    else:
        raise missing
    with os.fdopen(descriptor, "rb") as file:
        body = file.read()
        size = os.fstat(file.fileno()).st_size
    lines = set(body.splitlines())
    assert len(lines) == 1 and body.endswith(b"\n"), (
        f"torn target: {len(body)} bytes, writers {sorted(lines)[:5]}"
    )
    assert size == len(body), f"target: fstat says {size}, read {len(body)}"
    assert b"target" in os.listdir(os.fsencode(base)), "the target is missing in a listing"
    return 1


def _count_under_mkdir(base: str) -> None:
    lock = f"{base}/lock"
    _retry(lambda: os.mkdir(lock), (errno.EEXIST,))
    _increment(f"{base}/count-mkdir")
    os.rmdir(lock)


def _count_under_rename(base: str, index: int) -> None:
    """borg's lock: a directory with a file in it, renamed onto the lock's name; a full directory there refuses."""
    lock, own = f"{base}/lock.exclusive", f"{base}/lock.{index}"
    os.mkdir(own)
    with open(f"{own}/holder", "xb"):
        pass
    _retry(lambda: os.rename(own, lock), (errno.ENOTEMPTY, errno.EEXIST))
    _increment(f"{base}/count-rename")
    os.rename(lock, own)  # away first, so that nobody sees it empty and merges into it
    os.unlink(f"{own}/holder")
    os.rmdir(own)


def _retry(attempt: Callable[[], None], expected: Tuple[int, ...]) -> None:
    deadline = time.monotonic() + 60.0
    while True:
        try:
            attempt()
            return
        except OSError as error:
            if error.errno not in expected or time.monotonic() > deadline:
                raise
        time.sleep(0.002)


def _increment(path: str) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        value = int(os.pread(fd, 100, 0) or b"0")
        os.pwrite(fd, b"%d" % (value + 1), 0)
    finally:
        os.close(fd)


def check_shared(root: Path, workers: int, rounds: int, results: List[Dict[str, Any]]) -> None:
    """The invariants of the shared directory after all have ended, on the mount or on the server's side."""
    for name in ("excl", "mkdir", "link"):
        winners = sorted(turn for result in results for turn in result["won"][name])
        if winners != list(range(rounds)):
            raise Disagreement(
                f"{name}: each of {rounds} turns has one winner, but these were won: {winners}"
            )
    expected = {"target", "log", "count-mkdir", "count-rename"}
    expected |= {f"source-{index}" for index in range(workers)}
    expected |= {f"{name}-{turn}" for name in ("excl", "mkdir", "link") for turn in range(rounds)}
    names = set(os.listdir(root))
    if names != expected:
        raise Disagreement(f"shared: missing {sorted(expected - names)}, too many {sorted(names - expected)}")
    for name in ("count-mkdir", "count-rename"):
        value = int((root / name).read_bytes())
        if value != workers * rounds:
            raise Disagreement(f"{name}: {value}, not {workers * rounds}: the lock let two in")
    records = (root / "log").read_bytes().splitlines(keepends=True)
    for index in range(workers):
        record = b"%02d" % index + b"x" * 61 + b"\n"
        if records.count(record) != rounds:
            raise Disagreement(f"log: {records.count(record)} whole records of worker {index}, not {rounds}")
    if len(records) != workers * rounds:
        raise Disagreement(f"log: {len(records)} records, not {workers * rounds}")
    for index, result in enumerate(results):
        for turn in result["won"]["link"]:
            if (root / f"link-{turn}").read_bytes() != b"%d" % index:
                raise Disagreement(f"link-{turn} is not the winner's ({index})")


def snapshot(root: Path, *, links: bool = True) -> List[str]:
    """A tree as text: path, type, mode, size, content, link target; ``links``: link counts and which names share a file."""
    lines: List[str] = []
    first_name: Dict[Tuple[int, int], str] = {}
    for directory, directories, files in os.walk(root):
        directories.sort()
        for name in sorted(directories + files):
            path = os.path.join(directory, name)
            relative = os.path.relpath(path, root)
            attributes = os.lstat(path)
            line = f"{relative} {_attributes(attributes, links=links)}"
            if stat.S_ISLNK(attributes.st_mode):
                line += f" -> {os.readlink(path)}"
            elif stat.S_ISREG(attributes.st_mode):
                with open(path, "rb") as file:
                    line += f" {_digest(file.read())}"
                if links:
                    line += (
                        f" same as {first_name.setdefault((attributes.st_dev, attributes.st_ino), relative)}"
                    )
            lines.append(line)
    return sorted(lines)


def compare(got: List[str], expected: List[str], what: str) -> None:
    """Raises Disagreement at the first line that differs, with what led there."""
    for index, (one, other) in enumerate(zip(got, expected)):
        if one != other:
            before = "\n  ".join(expected[max(0, index - 25) : index])
            raise Disagreement(
                f"{what}, line {index}\n  got      {one}\n  expected {other}\nafter\n  {before}"
            )
    if len(got) != len(expected):
        surplus = (got + expected)[min(len(got), len(expected)) :][:5]
        raise Disagreement(f"{what}: {len(got)} lines, not {len(expected)}: {surplus}")


def exercise(
    root: Path, local: Path, *, seed: int, workers: int, operations: int, rounds: int = _SHARED_ROUNDS
) -> List[Dict[str, Any]]:
    """The whole thing: workers as processes on ``root``, the same on ``local`` one by one, comparison.

    Returns what check_shared() needs to look at the server's side too. Raises Disagreement.
    """
    shared = root / "shared"
    shared.mkdir(parents=True)
    command = [
        sys.executable,
        "-m",
        "exercise.namespace",
        str(root),
        "--seed",
        str(seed),
        "--workers",
        str(workers),
    ]
    command += ["--operations", str(operations), "--rounds", str(rounds)]
    environment = {**os.environ, "PYTHONPATH": str(_TESTS)}
    processes = [
        subprocess.Popen(
            [*command, "--worker", str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        for index in range(workers)
    ]
    outputs = [process.communicate() for process in processes]
    for index, (process, (_, errors)) in enumerate(zip(processes, outputs)):
        if process.returncode != 0:
            raise Disagreement(f"worker {index}, seed {seed}: {errors.decode(errors='replace')[-4000:]}")
    results = [json.loads(output) for output, _ in outputs]
    for index in range(workers):
        twin = Worker(local / f"worker-{index}", _worker_seed(seed, index))
        twin.run(operations)
        compare(results[index]["log"], twin.log, f"worker {index}, seed {seed}")
        compare(
            snapshot(root / f"worker-{index}"),
            snapshot(local / f"worker-{index}"),
            f"tree {index}, seed {seed}",
        )
    check_shared(shared, workers, rounds, results)
    return results


def _worker_seed(seed: int, index: int) -> int:
    return seed * 1000 + index


def _attributes(attributes: os.stat_result, *, links: bool = True) -> str:
    kind = stat.filemode(attributes.st_mode)
    if stat.S_ISDIR(attributes.st_mode):
        return kind  # size and link count of a directory are its file system's own affair
    if stat.S_ISLNK(attributes.st_mode):
        return f"{kind} {attributes.st_size}"
    return f"{kind} {attributes.st_size}" + (f" links {attributes.st_nlink}" if links else "")


def _digest(data: bytes) -> str:
    return f"{len(data)}:{hashlib.sha256(data).hexdigest()[:16]}"


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description="Several processes at once in one tree, compared with a local one."
    )
    parser.add_argument("root", type=Path)
    parser.add_argument("--local", type=Path, help="a directory on a local file system")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--operations", type=int, default=2000, help="of each worker")
    parser.add_argument("--rounds", type=int, default=_SHARED_ROUNDS, help="in the shared directory")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker is not None:
        worker = Worker(options.root / f"worker-{options.worker}", _worker_seed(options.seed, options.worker))
        worker.run(options.operations)
        result = shared_work(options.root / "shared", options.worker, options.workers, options.rounds)
        json.dump({**result, "log": worker.log}, sys.stdout)
        return 0
    if options.local is None:
        parser.error("--local is needed")
    try:
        exercise(
            options.root,
            options.local,
            seed=options.seed,
            workers=options.workers,
            operations=options.operations,
            rounds=options.rounds,
        )
    except Disagreement as disagreement:
        print(disagreement, file=sys.stderr)
        return 1
    print(f"seed {options.seed}: {options.workers} x {options.operations} operations agree")
    return 0


if __name__ == "__main__":
    sys.exit(main())
