"""One workload, once, on one mount: its sources, the timed part and the comparison of bytes.

Writes end when the unmounted process has ended: everything it promised is on the server then. Reads start on a fresh mount,
so that nothing is cached on this side; the server's own page cache is made warm, or cold, the same for every peer. What was
moved is compared byte by byte outside the time, written files as the server has them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Optional

from bench.data import WrongBytes, difference, store
from bench.peers import Venue, unmount
from support.mount import Mount
from support.process import cpu_s, descendants, peak_rss_bytes

_SHARED = "to-read"


class Sizes(NamedTuple):
    """How much each workload moves, and of how many things."""

    bulk_bytes: int
    small_writes_bytes: int = 64 * 2**20
    files: int = 500
    reads: int = 300
    entries: int = 20_000
    backup_bytes: int = 40_000_000
    looks: int = 20
    programs: int = 16
    files_each: int = 50

    def times(self, factor: float) -> Sizes:
        """Larger or smaller. The number of programs at once stays: they would be another workload."""
        larger = {name: max(1, round(value * factor)) for name, value in self._asdict().items()}
        return Sizes(**{**larger, "programs": self.programs})


class Figures(NamedTuple):
    """``cpu_s`` and ``peak_bytes`` are of the mount's processes (for sshfs: its ssh too), None where there is no mount: the
    time they computed while it was timed, and the most memory they ever had, each up to the unmount."""

    seconds: float
    cpu_s: Optional[float] = None
    peak_bytes: Optional[int] = None


class Run:
    """``figures`` are there once the workload has returned."""

    def __init__(self, venue: Venue, peer: str, sizes: Sizes, work_dir: Path, server_cache: str) -> None:
        """``work_dir`` is on this machine and keeps the sources from one run to the next."""
        self.figures = Figures(0.0)
        self.venue, self.peer, self.sizes = venue, peer, sizes
        self._work_dir = work_dir
        self._server_cache = server_cache

    def source(self, name: str, make: Callable[[Path], None]) -> Path:
        """A file or tree on this machine, made when it is first asked for."""
        path = self._work_dir / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)
        return path

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty directory on this machine."""
        path = self._work_dir / "scratch"
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path)

    @contextlib.contextmanager
    def reading(self, source: Path) -> Iterator[Path]:
        """A copy of ``source`` on a mount that has never seen it; timed until the block ends."""
        with self.venue.on_server() as root:
            copy = root / _SHARED / source.name
            if not copy.exists():
                copy.parent.mkdir(exist_ok=True)
                store(source, copy)
            if self.venue.is_here:
                set_server_cache(copy, self._server_cache)
        with self.venue.mount(self.peer, _SHARED) as mount:
            with self._timed(mount):
                yield mount.path / source.name
            unmount(mount)

    @contextlib.contextmanager
    def writing(self, *sources: Path) -> Iterator[Path]:
        """A mount of a directory that holds copies of ``sources`` only; timed until the unmounted process has ended."""
        self.clean(*sources)
        with self.venue.mount(self.peer, self.peer) as mount:
            with self._timed(mount, until_ended=True):
                yield mount.path

    @contextlib.contextmanager
    def without_mount(self) -> Iterator[str]:
        """The name of an empty directory on the server, for programs that reach it by themselves; timed like the others."""
        self.clean()
        started = time.monotonic()
        yield f"{self.venue.directory}/{self.peer}"
        self.took(time.monotonic() - started)

    def clean(self, *sources: Path) -> None:
        """Make the peer's directory on the server hold copies of ``sources`` only, and have all of it on disk."""
        with self.venue.on_server() as root:
            if (root / self.peer).exists():
                shutil.rmtree(root / self.peer)
            (root / self.peer).mkdir()
            for each in sources:
                store(each, root / self.peer / each.name)
        if self.venue.is_here:
            os.sync()  # else this round's fsync pays for the last one's bytes

    def took(self, seconds: float) -> None:
        """What counts, where it is not all that is timed."""
        self.figures = self.figures._replace(seconds=seconds)

    @contextlib.contextmanager
    def written(self) -> Iterator[Path]:
        """The peer's directory as the server has it."""
        with self.venue.on_server() as root:
            yield root / self.peer

    def check(self, source: Path, name: str) -> None:
        """Raise WrongBytes unless the server has ``source`` under this name."""
        with self.written() as directory:
            same(source, directory / name)

    @contextlib.contextmanager
    def _timed(self, mount: Mount, until_ended: bool = False) -> Iterator[None]:
        family: List[int] = [mount.pid, *descendants(mount.pid)]
        before_s = sum(map(cpu_s, family))
        started = time.monotonic()
        yield
        used_s = sum(map(cpu_s, family)) - before_s
        peak_bytes = sum(map(peak_rss_bytes, family))
        if until_ended:
            unmount(mount)
        self.figures = Figures(time.monotonic() - started, used_s, peak_bytes)


def same(source: Path, copy: Path) -> None:
    """Raise WrongBytes unless both, files or trees, have the same names and bytes."""
    wrong = difference(source, copy)
    if wrong is not None:
        raise WrongBytes(f"{copy.name}: {wrong}")


def set_server_cache(path: Path, state: str) -> None:
    """Bring the server's page cache for a file, or the files of a tree, into a known state: "warm" or "cold"."""
    for each in [path] if path.is_file() else (each for each in path.rglob("*") if each.is_file()):
        fd = os.open(each, os.O_RDONLY)
        try:
            if state == "cold":
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while os.read(fd, 2**20):
                    pass
        finally:
            os.close(fd)
