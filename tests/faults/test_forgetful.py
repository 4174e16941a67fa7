"""What fsync(), and close() under commit=close, promised is on the server's disk after every power loss of the server.

Workers change files of their own through a real mount and enter in a ledger what each call that returned 0 promised. The
server loses its power at random moments and in the midst of chosen requests; while it is off the ledger is compared with
what is left on its disk. None of that may show to the programs: no call fails, and every file reads as it was last written.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import threading
import traceback
from functools import partial
from pathlib import Path
from typing import Callable, Deque, Dict, Iterator, List, NamedTuple, Optional, Tuple

import pytest

from faults.forgetful_server import REQUESTS, ForgetfulServer
from mount.helpers import noise, opened
from support.mount import Mount
from support.process import wait_until

ENDLESS = 1 << 62
WORKERS = 4
NAMES = 3  # of each worker
LENGTH_MAX = 400_000
PLANS = [f"{moment} {request}" for moment in ("before", "behind", "after") for request in REQUESTS]


class Promise(NamedTuple):
    """One of ``contents`` (None: no such file), but for the ``changed`` ranges."""

    contents: Tuple[Optional[bytes], ...]
    changed: Tuple[Tuple[int, int], ...] = ()

    def is_kept_by(self, found: Optional[bytes]) -> bool:
        return any(self._agree(content, found) for content in self.contents)

    def _agree(self, content: Optional[bytes], found: Optional[bytes]) -> bool:
        if not self.changed or content is None or found is None:
            return content == found
        least = min([len(content), *(start for start, end in self.changed if end == ENDLESS)])
        return len(found) >= least and self._blanked(content, len(content)) == self._blanked(
            found, len(content)
        )

    def _blanked(self, content: bytes, length: int) -> bytes:
        blanked = bytearray(content[:length].ljust(length, b"\0"))
        for start, end in self.changed:
            end = min(end, length)
            blanked[start:end] = bytes(max(end - start, 0))
        return bytes(blanked)


class Ledger:
    """What is promised of each name. Entered before a call for what it may undo, after it for what it promised."""

    def __init__(self, served: Path) -> None:
        self._served = served
        self._lock = threading.Lock()
        self._promises: Dict[str, Promise] = {}
        self.promised = 0
        self.compared = 0
        self.broken: List[str] = []

    def promises(self, name: str, content: Optional[bytes]) -> None:
        with self._lock:
            self._promises[name] = Promise((content,))
            self.promised += 1

    def promises_start(self, name: str, content: bytes) -> None:
        """The file begins with it, and may go on."""
        with self._lock:
            known = self._promises.get(name)
            if known is None or len(known.contents[0] or b"") < len(content):
                self._promises[name] = Promise((content,), ((len(content), ENDLESS),))
                self.promised += 1

    def changes(self, name: str, start: int, end: int) -> None:
        with self._lock:
            known = self._promises.get(name)
            if known is not None:
                self._promises[name] = known._replace(changed=(*known.changed, (start, end)))

    def may_become(self, name: str, content: Optional[bytes]) -> None:
        with self._lock:
            known = self._promises.get(name)
            if known is not None:
                self._promises[name] = known._replace(contents=(*known.contents, content))

    def forget(self, name: str) -> None:
        """Nothing is promised of it any more."""
        with self._lock:
            self._promises.pop(name, None)

    def is_whole(self, name: str) -> bool:
        """Whether everything about the file is promised."""
        with self._lock:
            known = self._promises.get(name)
        return known is not None and len(known.contents) == 1 and not known.changed

    def compare(self, when: str) -> None:
        """Look at the server's side."""
        with self._lock:
            for name, promise in self._promises.items():
                try:
                    found: Optional[bytes] = (self._served / name).read_bytes()
                except FileNotFoundError:
                    found = None
                self.compared += 1
                if not promise.is_kept_by(found):
                    self.broken.append(f"{when}: {name}: {difference(promise, found)}")


def difference(promise: Promise, found: Optional[bytes]) -> str:
    content = promise.contents[0]
    if content is None or found is None:
        return f"{'no file' if content is None else 'a file'} promised, {'none' if found is None else 'one'} found"
    at = next((i for i, (a, b) in enumerate(zip(content, found)) if a != b), min(len(content), len(found)))
    return (
        f"{len(content)} bytes promised, {len(found)} found, first difference at {at};"
        f" changed since {promise.changed[-5:]}, {len(promise.contents)} contents possible"
    )


class Worker:
    """Random jobs on files of its own, which all end as a program would: closed, or renamed to their name."""

    def __init__(
        self, mounted: Path, ledger: Ledger, number: int, seed: float, commit_on_close: bool
    ) -> None:
        self.mounted = mounted
        self.ledger = ledger
        self.chance = random.Random(seed)
        self.commit_on_close = commit_on_close
        self._names = [f"w{number}-{letter}" for letter in "abcdefgh"[:NAMES]]
        self._temp = f"w{number}-temp"
        self._temps = 0
        self.content: Dict[str, bytearray] = {}  # as we last left each file that there is
        self.jobs = 0
        self.steps: Deque[str] = collections.deque(maxlen=25)
        self.error = ""

    def run(self, stop: threading.Event) -> None:
        jobs: List[Callable[[], None]] = [
            *[self.write_new, self.edit, self.edit, self.edit],
            *[self.replace, self.cut_by_name, self.remove],
        ]
        try:
            while not stop.is_set():
                self.chance.choice(jobs)()
                self.look(self.chance.choice(self._names))
                self.jobs += 1
        except BaseException:
            self.error = f"{traceback.format_exc()}\nthe last steps: {list(self.steps)}"

    def settle(self) -> None:
        """Have everything promised."""
        for name in self.content:
            if not self.ledger.is_whole(name):
                file = File(self, name, os.O_RDWR)
                file.fsync()
                file.close()

    def promise_all(self) -> None:
        """The mount has ended well."""
        for name, content in self.content.items():
            self.ledger.promises(name, bytes(content))

    def look(self, name: str) -> None:
        """Our own view is always our own last write."""
        path, known = self.mounted / name, self.content.get(name)
        size, expected = path.stat().st_size if path.exists() else None, None if known is None else len(known)
        assert size == expected, f"{name}: {expected} bytes promised, {size} found"
        if known is not None:
            found = path.read_bytes()
            assert found == known, f"{name} reads otherwise: {difference(Promise((bytes(known),)), found)}"

    def look_at_all(self) -> None:
        for name in self._names:
            self.look(name)

    def note(self, step: str) -> None:
        self.steps.append(step)

    # -- jobs -----------------------------------------------------------------------------------------------------------

    def write_new(self) -> None:
        name = self.chance.choice(self._names)
        file = File(self, name, self.chance.choice([os.O_WRONLY, os.O_RDWR]) | os.O_CREAT | os.O_TRUNC)
        self._some_steps(file, ["append", "append", "append", "append", "fsync"])
        file.close()

    def edit(self) -> None:
        if not self.content:
            return self.write_new()
        name = self.chance.choice(list(self.content))
        file = File(self, name, self.chance.choice([os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND]))
        other = File(self, name, os.O_RDWR) if self.chance.random() < 0.3 else None
        self._some_steps(file, ["append", "overwrite", "overwrite", "cut", "fsync", "look", "dup"])
        if other is not None:
            self._some_steps(other, ["append", "overwrite", "cut", "fsync", "look"])
            other.close()
            self._some_steps(file, ["append", "overwrite"])
        file.close()
        return None

    def replace(self) -> None:
        """As careful programs do, who then go on with the file under its new name now and then."""
        name = self.chance.choice(self._names)
        while True:
            temp = f"{self._temp}-{self._temps}"
            self._temps += 1
            try:
                file = File(self, temp, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                break
            except FileExistsError:  # an exclusive create whose reply was lost is never claimed
                os.unlink(self.mounted / temp)
        self._some_steps(file, ["append"])
        if self.chance.random() < 0.5:
            file.fsync()
        if self.chance.random() < 0.7:
            file.close()
        whole = self.ledger.is_whole(temp)
        content = self.content.pop(temp)
        if whole:
            self.ledger.may_become(temp, None)
            self.ledger.may_become(name, bytes(content))
        else:
            self.ledger.forget(temp)
            self.ledger.forget(name)
        self.note(f"rename {temp} {name}")
        os.rename(self.mounted / temp, self.mounted / name)
        self.content[name] = content
        self.ledger.promises(temp, None)
        if whole:
            self.ledger.promises(name, bytes(content))
        file.name = name
        if not file.closed:
            self._some_steps(file, ["append", "overwrite", "cut", "fsync", "look"])
            file.close()
        self.ledger.forget(temp)

    def cut_by_name(self) -> None:
        """truncate(2) promises nothing until the file is opened and fsynced or closed."""
        if not self.content:
            return
        name = self.chance.choice(list(self.content))
        content = self.content[name]
        size = self.chance.choice([0, len(content) // 2, len(content) + 3000])
        self.ledger.changes(name, min(size, len(content)), ENDLESS)
        self.note(f"truncate {name} {len(content)} to {size} by name")
        os.truncate(self.mounted / name, size)
        content[size:] = bytes(max(size - len(content), 0))
        if self.chance.random() < 0.7:
            file = File(self, name, os.O_WRONLY)
            self._some_steps(file, ["append", "overwrite", "fsync"])
            file.close()

    def remove(self) -> None:
        if not self.content:
            return
        name = self.chance.choice(list(self.content))
        self.ledger.may_become(name, None)
        self.note(f"unlink {name}")
        os.unlink(self.mounted / name)
        del self.content[name]
        self.ledger.promises(name, None)

    # -- steps ----------------------------------------------------------------------------------------------------------

    def _some_steps(self, file: File, steps: List[str]) -> None:
        for _ in range(self.chance.randrange(1, 7)):
            getattr(self, f"_{self.chance.choice(steps)}")(file)

    def _append(self, file: File) -> None:
        length = self.chance.choice([1, 100, 4096, 10_000, 50_000, 140_000])
        size = len(self.content[file.name])
        if size + length <= LENGTH_MAX:
            file.write(size, self.chance.randbytes(length))

    def _overwrite(self, file: File) -> None:
        size = len(self.content[file.name])
        start = self.chance.randrange(size + 5000)  # sometimes behind the end, which leaves a hole
        if file.appends:
            start = size
        file.write(start, self.chance.randbytes(self.chance.choice([1, 300, 4096, 30_000])))

    def _cut(self, file: File) -> None:
        size = len(self.content[file.name])
        file.truncate(self.chance.choice([0, size // 2, max(size - 1, 0), size + 3000]))

    def _fsync(self, file: File) -> None:
        file.fsync()

    def _dup(self, file: File) -> None:
        file.dup()

    def _look(self, file: File) -> None:
        self.look(file.name)


class File:
    """An open file of a worker, which tells the ledger what each call may undo and what it has promised."""

    def __init__(self, worker: Worker, name: str, flags: int) -> None:
        self._worker = worker
        self._ledger = worker.ledger
        self.name = name
        self.appends = bool(flags & os.O_APPEND)
        self.closed = False
        if name not in worker.content:
            self._ledger.forget(name)
        elif flags & os.O_TRUNC:
            self._ledger.changes(name, 0, ENDLESS)
        worker.note(f"open {name} {flags:#o}")
        self._descriptor = os.open(worker.mounted / name, flags, 0o644)
        if flags & os.O_TRUNC or name not in worker.content:
            worker.content[name] = bytearray()

    @property
    def content(self) -> bytearray:
        return self._worker.content[self.name]

    def write(self, start: int, data: bytes) -> None:
        self._ledger.changes(self.name, start, start + len(data))
        self._worker.note(f"write {self.name} {start} {len(data)}")
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], start + done)
        content = self.content
        content.extend(bytes(max(start - len(content), 0)))
        content[start : start + len(data)] = data

    def truncate(self, size: int) -> None:
        content = self.content
        self._ledger.changes(self.name, min(size, len(content)), ENDLESS)
        self._worker.note(f"truncate {self.name} {len(content)} to {size}")
        os.ftruncate(self._descriptor, size)
        content[size:] = bytes(max(size - len(content), 0))

    def fsync(self) -> None:
        self._worker.note(f"fsync {self.name}")
        self._worker.chance.choice([os.fsync, os.fdatasync])(self._descriptor)
        self._ledger.promises(self.name, bytes(self.content))

    def dup(self) -> None:
        """The end of a child process that has inherited the file is a close() too, and promises as much."""
        self._worker.note(f"dup, close {self.name}")
        self._close(os.dup(self._descriptor))

    def close(self) -> None:
        self._worker.note(f"close {self.name}")
        self._close(self._descriptor)
        self.closed = True

    def _close(self, descriptor: int) -> None:
        os.close(descriptor)
        if self._worker.commit_on_close:
            self._ledger.promises(self.name, bytes(self.content))


class Log:
    """A file that one thread appends to while others, with handles of their own, fsync and close it."""

    def __init__(self, mounted: Path, ledger: Ledger, seed: float, commit_on_close: bool) -> None:
        self._mounted = mounted
        self._ledger = ledger
        self._chance = random.Random(seed)
        self._commit_on_close = commit_on_close
        self._moved = threading.Condition()  # guards what follows
        self._written: Dict[str, bytes] = {}
        self._name = ""
        self._promised_bytes = 0
        self._count = 0
        self.jobs = 0
        self.error = ""

    def append(self, stop: threading.Event) -> None:
        """File after file; each is left when all of it is promised."""
        with self._noting_errors():
            while not stop.is_set():
                self._count += 1
                name = f"log-{self._count}"
                descriptor = os.open(self._mounted / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                with self._moved:
                    self._name, self._written[name], self._promised_bytes = name, b"", 0
                for _ in range(self._chance.randrange(5, 25)):
                    record = self._chance.randbytes(self._chance.choice([1, 200, 4096, 20_000]))
                    assert os.write(descriptor, record) == len(record)
                    with self._moved:
                        self._written[name] += record
                        self._moved.notify_all()
                os.close(descriptor)
                with self._moved:
                    while not stop.is_set() and self._is_ahead():
                        self._moved.wait(0.1)
                self.jobs += 1

    def commit(self, stop: threading.Event) -> None:
        """fsync, and close, while the other thread appends."""
        with self._noting_errors():
            while not stop.is_set():
                with self._moved:
                    if not self._moved.wait_for(self._is_ahead, 0.1):
                        continue
                    name = self._name
                descriptor = os.open(self._mounted / name, os.O_WRONLY)
                for _ in range(3):
                    written = self._written[name]
                    os.fsync(descriptor)
                    self._promise(name, written)
                written = self._written[name]
                os.close(descriptor)
                if self._commit_on_close:
                    self._promise(name, written)

    def settle(self) -> None:
        """Have everything promised."""
        for name, written in self._written.items():
            descriptor = os.open(self._mounted / name, os.O_WRONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            self._ledger.promises(name, written)

    def look_at_all(self) -> None:
        """They read as they were written; then they have served."""
        for name, written in self._written.items():
            assert (self._mounted / name).read_bytes() == written, name
            self._ledger.forget(name)
            os.unlink(self._mounted / name)
        self._written.clear()
        self._name = ""

    def _is_ahead(self) -> bool:
        return len(self._written.get(self._name, b"")) > self._promised_bytes

    def _promise(self, name: str, written: bytes) -> None:
        self._ledger.promises_start(name, written)
        with self._moved:
            if name == self._name:
                self._promised_bytes = max(self._promised_bytes, len(written))
                self._moved.notify_all()

    @contextlib.contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.error = traceback.format_exc()


# A session that ends within seconds makes the mount wait longer and longer before it connects again. Here all do.
class QuickMount(Mount):
    """Connects again at once."""

    changes = "from sftpmount.sftp import reconnect; reconnect.STEADY_S, reconnect.BACKOFF_MAX_S = 0.0, 0.4"


class Story:
    """Workers on a mount of a forgetful server, and its power losses."""

    def __init__(self, tmp_path: Path, seed: int, *, commit: str, lies: bool = False) -> None:
        self.chance = random.Random(seed)
        self.server = ForgetfulServer(tmp_path, seed, lies=lies)
        self._tmp_path = tmp_path
        self._commit = commit

    def __enter__(self) -> Story:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.server)
            self.mount = QuickMount(self.server, self._tmp_path, "-o", f"commit={self._commit}")
            stack.enter_context(self.mount)
            self._stack = stack.pop_all()
        self.ledger = Ledger(self.mount.served)
        self.workers = [
            Worker(self.mount.path, self.ledger, number, self.chance.random(), self._commit == "close")
            for number in range(WORKERS)
        ]
        self.log = Log(self.mount.path, self.ledger, self.chance.random(), self._commit == "close")
        self.moment = ""
        self.server.on_loss = self._compare
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _compare(self) -> None:
        self.ledger.compare(f"power loss {self.server.losses} ({self.moment})")

    def work_through(self, losses: int) -> None:
        """Let the workers work through so many power losses, and one more when all is promised."""
        stop = threading.Event()
        runs = [worker.run for worker in self.workers] + [self.log.append, self.log.commit, self.log.commit]
        threads = [threading.Thread(target=run, args=(stop,)) for run in runs]
        for thread in threads:
            thread.start()
        try:
            for _ in range(losses):
                self._lose_power()
        finally:
            stop.set()
            for thread in threads:
                thread.join(60.0)
        self.check()
        assert not any(thread.is_alive() for thread in threads), "a worker does not come to an end"
        for worker in self.workers:
            worker.settle()
            assert all(map(self.ledger.is_whole, worker.content))
        self.log.settle()
        self._lose_power()
        for worker in self.workers:
            worker.look_at_all()
        self.log.look_at_all()
        self.check()

    def unmount(self) -> None:
        """In the midst of a power loss. What was closed is stored whether it was promised before or not."""
        before = self.server.losses
        self.server.lose_power(after_s=self.chance.uniform(0.0, 0.1), down_s=0.5)
        assert self.mount.unmount() == 0, self.mount.log_text()
        wait_until(lambda: self.server.is_back(before + 1), 30.0, "a power loss and its end")
        for worker in self.workers:
            worker.promise_all()
        self._lose_power()
        self.check()

    def check(self) -> None:
        """Nothing was broken so far."""
        errors = [error for error in [*(worker.error for worker in self.workers), self.log.error] if error]
        assert not errors, "\n\n".join(errors) + self.mount.log_text()[-3000:]
        assert self.server.trouble is None, repr(self.server.trouble)
        assert not self.ledger.broken, "\n".join(self.ledger.broken[:20])

    def _lose_power(self) -> None:
        before = self.server.losses
        at = self.chance.choice(PLANS) if self.chance.random() < 0.7 else ""
        after_s = 1.5 if at else self.chance.uniform(0.0, 0.8)
        down_s = 0.0 if self.chance.random() < 0.5 else self.chance.uniform(0.0, 2.0)
        self.moment = at or f"after {after_s:.2f} s"
        self.server.lose_power(at=at, skip=self.chance.randrange(3), after_s=after_s, down_s=down_s)
        wait_until(lambda: self.server.is_back(before + 1), 30.0, "a power loss and its end")

    def figures(self) -> str:
        jobs = sum(worker.jobs for worker in self.workers)
        return (
            f"commit={self._commit}: {self.server.losses} power losses, {jobs} jobs, {self.ledger.promised} promises,"
            f" {self.ledger.compared} comparisons, {self.server.requests} requests"
        )


@pytest.mark.parametrize("commit", ["close", "fsync"])
def test_what_was_promised_is_there(tmp_path: Path, commit: str) -> None:
    with Story(tmp_path, 1, commit=commit) as story:
        for _ in range(2):
            story.work_through(5)
        story.unmount()
        print(story.figures())


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("commit", "seed"), [("close", 11), ("close", 12), ("fsync", 13), ("fsync", 14)])
def test_hundreds_of_power_losses(tmp_path: Path, commit: str, seed: int) -> None:
    with Story(tmp_path, seed, commit=commit) as story:
        for _ in range(12):
            story.work_through(25)
        story.unmount()
        print(story.figures())


def test_a_disk_that_lies_is_found_out(tmp_path: Path) -> None:
    """By who reads it, on the server or through the mount; or by the mount, as it goes on with what it wrote."""
    with Story(tmp_path, 2, commit="close", lies=True) as story:
        with pytest.raises(
            AssertionError, match="(bytes|file) promised|Stale file handle|has less than it acknowledged"
        ):
            story.work_through(2)


@pytest.mark.parametrize("way", ["replaced", "removed, then replaced", "renamed"])
def test_a_name_changes_while_its_file_is_committed_in_the_background(tmp_path: Path, way: str) -> None:
    """Nobody can tell at once whether the rename or the removal was done, nor which file the name leads to."""
    with ForgetfulServer(tmp_path, 3) as server, QuickMount(server, tmp_path, "-o", "commit=fsync") as mount:
        for count in range(3):
            old, new = mount.path / f"old{count}", mount.path / f"new{count}"
            store(old, noise(100_000, count))
            store(new, noise(100_000, 100 + count))
            wait_until(lambda: not server.opened, 10.0, "the end of what the last power loss made late")
            busy = new if way == "renamed" else old
            server.held = "fsync"
            with opened(busy, os.O_WRONLY) as descriptor:
                os.pwrite(descriptor, b"late" * 1000, 0)
            wait_until(lambda: bool(server.waiting), 10.0, "the fsync in the background")
            server.lose_power(at="behind remove" if "removed" in way else "behind posix_rename", after_s=10.0)
            if "removed" in way:
                os.unlink(old)
            os.rename(new, old)
        status = mount.unmount()
        for count in range(3):
            expected = noise(100_000, 100 + count)
            if way == "renamed":
                expected = b"late" * 1000 + expected[4000:]
            assert (mount.served / f"old{count}").read_bytes() == expected, count
        assert status == 0, mount.log_text()


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", ["ftruncate", "truncate", "O_TRUNC"])
def test_a_truncation_that_was_just_answered(tmp_path: Path, way: str) -> None:
    """The power fails behind the answer, when the mount may not even have taken it in."""
    with ForgetfulServer(tmp_path, 4) as server, QuickMount(server, tmp_path) as mount:
        for count in range(70):
            file = mount.path / f"f{count}"
            store(file, noise(100_000))
            server.lose_power(at="after open" if way == "O_TRUNC" else "after fsetstat", after_s=10.0)
            if way == "truncate":
                os.truncate(file, 0)
            with opened(file, os.O_WRONLY | (os.O_TRUNC if way == "O_TRUNC" else 0)) as descriptor:
                if way == "ftruncate":
                    os.ftruncate(descriptor, 0)
                os.write(descriptor, b"new")
            assert (mount.served / f"f{count}").read_bytes() == b"new", count
            wait_until(partial(server.is_back, count + 1), 15.0, "the power loss")


def store(path: Path, data: bytes) -> None:
    with opened(path, os.O_WRONLY | os.O_CREAT) as descriptor:
        os.write(descriptor, data)
        os.fsync(descriptor)
