"""Sequences of file operations that say what each operation did, for a mount and for a local directory alike.

``Program`` does the operations under ``root`` and keeps a line for each: what was asked, and what came of it. A line is the
same on every correct file system. Where a reply was lost an exclusive create, mkdir or link may say EEXIST although it was
done (design, promise 5); the local twin is told of these (``excused``), does them all the same and says EEXIST too, so that
lines and trees stay comparable. What would have gone on with the file is left out in both.
"""

from __future__ import annotations

import errno
import os
import stat
import time
import zlib
from pathlib import Path
from typing import Callable, Dict, FrozenSet, List, Optional, TypeVar

from mount.helpers import noise

T = TypeVar("T")

MODIFIED_S = 1_500_000_000


class Program:
    """``served`` is ``root`` on the server's side; ``excused`` are the numbers of the lines that may say EEXIST."""

    def __init__(self, root: Path, served: Path, excused: FrozenSet[int] = frozenset()) -> None:
        self.root = root
        self.served = served
        self.lines: List[str] = []
        self.slowest_s = 0.0
        self.slowest = ""
        self.excusable: List[int] = []  # lines that said EEXIST where a lost reply excuses that
        self.used_excuses = 0  # of ``excused``, those that would have gone well
        self._excused = excused
        self._held: List[int] = []

    # -- names

    def mkdir(self, name: str, mode: int = 0o755) -> None:
        self._do(f"mkdir {name}", lambda: os.mkdir(self._at(name), mode), excusable=True)

    def rmdir(self, name: str) -> None:
        self._do(f"rmdir {name}", lambda: os.rmdir(self._at(name)))

    def unlink(self, name: str) -> None:
        self._do(f"unlink {name}", lambda: os.unlink(self._at(name)))

    def rename(self, old: str, new: str) -> None:
        self._do(f"rename {old} {new}", lambda: os.rename(self._at(old), self._at(new)))

    def link(self, old: str, new: str) -> None:
        self._do(f"link {old} {new}", lambda: os.link(self._at(old), self._at(new)), excusable=True)

    def symlink(self, target: str, name: str) -> None:
        self._do(f"symlink {target} {name}", lambda: os.symlink(target, self._at(name)))

    def readlink(self, name: str) -> None:
        self._do(f"readlink {name}", lambda: os.readlink(self._at(name)))

    def listdir(self, name: str) -> None:
        self._do(f"listdir {name}", lambda: sorted(os.listdir(self._at(name))))

    def lstat(self, name: str) -> None:
        self._do(f"lstat {name}", lambda: _shown(os.lstat(self._at(name))))

    def chmod(self, name: str, mode: int) -> None:
        self._do(f"chmod {name} {mode:o}", lambda: os.chmod(self._at(name), mode))

    def utime(self, name: str, modified_s: int = MODIFIED_S) -> None:
        self._do(f"utime {name}", lambda: os.utime(self._at(name), (modified_s, modified_s)))

    def truncate(self, name: str, size: int) -> None:
        self._do(f"truncate {name} {size}", lambda: os.truncate(self._at(name), size))

    def fsync_directory(self, name: str) -> None:
        fd = self.open(name, os.O_RDONLY | os.O_DIRECTORY)
        self.fsync(fd)
        self.close(fd)

    # -- files

    def open(self, name: str, flags: int, mode: int = 0o644) -> Optional[int]:
        excusable = bool(flags & os.O_EXCL)
        fd = self._do(
            f"open {name} {flags:#o}",
            lambda: os.open(self._at(name), flags, mode),
            excusable=excusable,
            undo=os.close,
            silent=True,
        )
        if fd is not None:
            self._held.append(fd)
        return fd

    def write(self, fd: Optional[int], offset: Optional[int], length: int) -> None:
        """``length`` bytes of noise, which differ from those of any other line; without an offset where the file goes on."""
        data = noise(length, len(self.lines))
        if offset is None:
            self._with(fd, f"write {length}", lambda held: os.write(held, data))
        else:
            place = offset
            self._with(fd, f"pwrite {offset}+{length}", lambda held: os.pwrite(held, data, place))

    def read(self, fd: Optional[int], offset: int, length: int) -> None:
        self._with(fd, f"pread {offset}+{length}", lambda held: _digest(_pread(held, length, offset)))

    def fstat(self, fd: Optional[int]) -> None:
        self._with(fd, "fstat", lambda held: _shown(os.fstat(held)))

    def ftruncate(self, fd: Optional[int], size: int) -> None:
        self._with(fd, f"ftruncate {size}", lambda held: os.ftruncate(held, size))

    def fsync(self, fd: Optional[int]) -> None:
        self._with(fd, "fsync", os.fsync)

    def close(self, fd: Optional[int]) -> None:
        self._with(fd, "close", os.close)
        if fd is not None:
            self._held.remove(fd)

    def read_back(self, name: str) -> None:
        """Through a new handle, to the end and a little further."""
        fd = self.open(name, os.O_RDONLY)
        self._with(fd, f"read {name}", lambda held: _digest(_pread(held, 1 << 20, 0)))
        self.close(fd)

    # -- the server's side

    def stored(self, name: str) -> None:
        """What the server has of a file, just after an fsync or a close said that it has all."""
        self._do(f"stored {name}", lambda: _digest((self.served / name).read_bytes()))

    def stored_time(self, name: str) -> None:
        """The modification time that the server has, after it was set and the directory synced."""
        self._do(f"stored time of {name}", lambda: int((self.served / name).stat().st_mtime))

    def end(self) -> None:
        """Close what is open still; for a sequence that was left in its middle."""
        while self._held:
            os.close(self._held.pop())

    # -- how

    def _at(self, name: str) -> str:
        return str(self.root / name)

    def _with(self, fd: Optional[int], text: str, call: Callable[[int], object]) -> None:
        if fd is None:
            self.lines.append(f"{text}: left out, it was not opened")
        else:
            self._do(text, lambda: call(fd))

    def _do(
        self,
        text: str,
        call: Callable[[], T],
        *,
        excusable: bool = False,
        undo: Callable[[T], object] = lambda value: None,
        silent: bool = False,
    ) -> Optional[T]:
        number = len(self.lines)
        began_s = time.monotonic()
        value: Optional[T] = None
        try:
            value = call()
            outcome = "ok" if value is None or silent else str(value)
        except OSError as error:
            outcome = errno.errorcode.get(error.errno or 0, str(error))
            if excusable and error.errno == errno.EEXIST:
                self.excusable.append(number)
        else:
            if number in self._excused:
                undo(value)
                value, outcome = None, "EEXIST"
                self.used_excuses += 1
        took_s = time.monotonic() - began_s
        if took_s > self.slowest_s:
            self.slowest_s, self.slowest = took_s, text
        self.lines.append(f"{text}: {outcome}")
        return value


def _shown(attributes: os.stat_result) -> str:
    size = attributes.st_size if stat.S_ISREG(attributes.st_mode) else "-"
    return f"{stat.filemode(attributes.st_mode)} {size}"


def _pread(fd: int, length: int, offset: int) -> bytes:
    data = b""
    while len(data) < length:
        part = os.pread(fd, length - len(data), offset + len(data))
        if not part:
            break
        data += part
    return data


def _digest(data: bytes) -> str:
    return f"{len(data)} bytes, {zlib.crc32(data):08x}"


# -- the sequences -------------------------------------------------------------------------------------------------------


def data(program: Program) -> None:
    """One file written, overwritten, appended to, cut and extended through two handles and by its name."""
    one = program.open("a", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
    program.write(one, 0, 300_000)
    program.write(one, 100_000, 5_000)  # part of a block
    program.read(one, 99_000, 8_000)
    program.fsync(one)
    program.stored("a")
    other = program.open("a", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    program.write(other, None, 70_000)
    program.fstat(one)
    program.ftruncate(one, 250_001)
    program.write(one, 250_000, 3)
    program.ftruncate(one, 280_000)
    program.read(one, 240_000, 50_000)
    program.close(other)
    program.stored("a")
    program.truncate("a", 120_000)
    program.write(one, 4_096, 4_096)
    program.truncate("a", 400_000)
    program.write(one, 390_000, 20_000)
    program.fsync(one)
    program.write(one, 0, 1)
    program.close(one)
    program.stored("a")
    program.read_back("a")
    program.utime("a")
    program.fsync_directory("")
    program.stored_time("a")
    again = program.open("a", os.O_WRONLY | os.O_TRUNC)
    program.write(again, 10, 10)
    program.close(again)
    program.stored("a")
    program.lstat("a")
    appended = program.open("b", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for length in (1, 5_000, 140_000):
        program.write(appended, None, length)
    program.close(appended)
    program.stored("b")
    program.chmod("b", 0o400)
    program.read_back("b")


def names(program: Program) -> None:
    """Directories, links and renames, among them those that must be refused."""
    program.mkdir("d")
    program.mkdir("d/e", 0o700)
    program.mkdir("d")
    for name in ("d/one", "d/three"):
        created = program.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        program.write(created, 0, 100)
        program.close(created)
    program.stored("d/one")
    program.open("d/one", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    program.link("d/one", "d/two")
    program.link("d/one", "d/three")
    program.symlink("one", "d/symbolic")
    program.symlink("other", "d/symbolic")
    program.readlink("d/symbolic")
    program.listdir("d")
    program.rename("d/one", "d/three")
    program.lstat("d/one")
    program.lstat("d/three")
    program.rmdir("d")
    program.rename("d/e", "d/f")
    program.mkdir("d/g")
    program.rename("d/f", "d/g")
    program.rename("d/g", "d/three")
    program.chmod("d/two", 0o440)
    program.utime("d/two")
    program.chmod("d/g", 0o750)
    program.rename("d/symbolic", "d/moved")
    program.unlink("d/moved")
    program.unlink("d/moved")
    program.rename("d/three", "d/g/three")
    program.rename("d", "h")
    program.listdir("h")
    program.listdir("h/g")
    program.stored_time("h/two")
    program.link("h/two", "four")
    program.rename("four", "h/two")  # two names of one file: both stay
    program.unlink("h/two")
    program.mkdir("k")
    program.rmdir("k")
    program.rmdir("k")
    program.listdir("")


def replaced(program: Program) -> None:
    """As backup tools and databases do it: temporary files renamed over open ones, files removed and moved while open."""
    program.mkdir("d")
    target = program.open("d/target", os.O_RDWR | os.O_CREAT)
    program.write(target, 0, 150_000)
    program.fsync(target)
    temporary = program.open("d/temporary", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    program.write(temporary, 0, 140_000)
    program.fsync(temporary)
    program.chmod("d/temporary", 0o444)
    program.write(temporary, 140_000, 1_000)
    program.close(temporary)
    program.rename("d/temporary", "d/target")
    program.fsync_directory("d")
    program.stored("d/target")
    program.read_back("d/target")
    program.write(target, 150_000, 100)  # of the file that has no name any more
    program.read(target, 140_000, 20_000)
    program.close(target)
    moving = program.open("d/moving", os.O_RDWR | os.O_CREAT)
    program.write(moving, 0, 9_000)
    program.rename("d/moving", "d/moved")
    program.write(moving, 5_000, 9_000)
    program.rename("d", "e")
    program.write(moving, 20_000, 9_000)
    program.fsync(moving)
    program.stored("e/moved")
    removed = program.open("e/removed", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    program.write(removed, 0, 50_000)
    program.unlink("e/removed")
    program.listdir("e")
    program.write(removed, 30_000, 50_000)
    program.read(removed, 0, 80_000)
    program.fsync(removed)
    program.link("e/moved", "linked")
    program.unlink("e/moved")
    program.write(moving, 1, 2)
    program.close(moving)
    program.stored("linked")
    program.close(removed)
    program.unlink("e/target")
    program.rmdir("e")
    program.listdir("")
    program.read_back("linked")


def removed(program: Program) -> None:
    """As rm -r and a prune do it: most of these removals are not waited for (``fs/removals.py``)."""
    for directory, count in (("d", 9), ("e", 2)):
        program.mkdir(directory)
        for number in range(count):
            created = program.open(f"{directory}/{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            program.close(created)
    program.listdir("d")
    for number in range(6):
        program.unlink(f"d/{number}")
    program.unlink("e/0")  # behind those
    again = program.open("d/5", os.O_WRONLY | os.O_CREAT | os.O_EXCL)  # which is gone
    program.write(again, 0, 100)
    program.close(again)
    program.rename("e/1", "d/0")
    program.listdir("d")
    for name in ("0", "5", "6", "7", "8"):
        program.unlink(f"d/{name}")
    program.rmdir("d")
    program.rmdir("e")
    program.listdir("")


SCENARIOS: Dict[str, Callable[[Program], None]] = {
    "data": data,
    "names": names,
    "replaced": replaced,
    "removed": removed,
}
