"""One file under random operations, compared with a model after each.

Reads, writes and truncates at odd offsets, by path and through several handles at once (read-only, write-only, read-write,
appending), holes, mapped reads and writes, msync, fsync, close and reopen, dropped page cache, renames, remounts. The
model is a bytearray. After every operation the size and a range around what was touched are compared; from time to time,
the whole file. Where ``server_path`` is given, the server's copy must be equal after every fsync of any handle and every
close of a writable one that returned 0, and at the end.

    python -m exercise.random_operations MOUNTPOINT/file --seed 7 --operations 10000

The same seed, length and number of operations give the same sequence.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Callable, Deque, List, NamedTuple, Optional, Tuple

# Where file systems and this protocol cut: pages, SFTP's and FUSE's usual requests, OpenSSH's largest read and write.
_BOUNDARIES = (4096, 32768, 65536, 131072, 261120)
_HANDLES_MAX = 5
_MAPPINGS_MAX = 2
_LOG_LENGTH = 40


class Disagreement(AssertionError):
    """The file is not what the model is; the text holds the seed, the place and the last operations."""


class Handle(NamedTuple):
    fd: int
    flags: int

    @property
    def readable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_WRONLY

    @property
    def writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    @property
    def appends(self) -> bool:
        return bool(self.flags & os.O_APPEND)


class Mapping(NamedTuple):
    map: mmap.mmap
    start: int


class RandomOperations:
    """``length_max`` bounds the file in bytes. ``remount`` is called with all handles closed and must bring ``path`` back.

    ``watch=False`` compares through the handles that happen to be open instead of opening one where none is readable:
    write-only sequences then stay write-only.
    """

    def __init__(
        self,
        path: Path,
        seed: int,
        *,
        length_max: int = 600_000,
        server_path: Optional[Path] = None,
        remount: Optional[Callable[[], None]] = None,
        watch: bool = True,
        full_check_every: int = 50,
    ) -> None:
        self.path = str(path)
        self.other_path = self.path + ".renamed"
        self.seed = seed
        self.model = bytearray()
        self._rng = random.Random(seed)
        self._length_max = length_max
        self._server_path = server_path
        self._remount = remount
        self._watch = watch
        self._full_check_every = full_check_every
        self._handles: List[Handle] = []
        self._mappings: List[Mapping] = []
        self._last_position = 0
        self._log: Deque[str] = deque(maxlen=_LOG_LENGTH)
        self._count = 0
        weighted: List[Tuple[int, Callable[[], None]]] = [
            (80, self._open),
            (60, self._close),
            (5, self._close_all),
            (150, self._read),
            (200, self._write),
            (40, self._write_vector),
            (60, self._append),
            (25, self._write_beyond_end),
            (40, self._truncate_handle),
            (40, self._truncate_path),
            (4, self._fallocate),
            (25, self._fsync),
            (40, self._map),
            (20, self._unmap),
            (60, self._read_mapped),
            (60, self._write_mapped),
            (20, self._msync),
            (60, self._drop_page_cache),
            (10, self._rename),
        ]
        if remount is not None:
            weighted.append((1, self._remount_all))
        self._weights = [weight for weight, _ in weighted]
        self._operations = [operation for _, operation in weighted]

    def run(self, operations: int) -> None:
        """Raises Disagreement. Creates the file, leaves it closed and in place."""
        try:
            self._say("create")
            self._handles.append(self._opened(os.O_RDWR | os.O_CREAT | os.O_TRUNC))
            for self._count in range(1, operations + 1):
                self._rng.choices(self._operations, self._weights)[0]()
                self._check()
            self._say("close all at the end")
            self._drop_all()
            self._check_whole()
            self._check_server("at the end")
        except Disagreement:
            raise
        except Exception as error:
            raise Disagreement(self._report(f"{type(error).__name__}: {error}")) from error
        finally:
            for mapping in self._mappings:
                mapping.map.close()
            for handle in self._handles:
                try:
                    os.close(handle.fd)
                except OSError:
                    pass  # the reason is on its way up already

    # Operations: each applies itself to the file and to the model, or does nothing where nothing fits.

    def _open(self) -> None:
        if len(self._handles) >= _HANDLES_MAX:
            return
        flags = self._rng.choice([os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR])
        if flags != os.O_RDONLY:
            flags |= self._rng.choice([0, 0, os.O_APPEND])
            flags |= self._rng.choice([0, 0, 0, os.O_CREAT])
            if self._rng.random() < 0.05:
                flags |= os.O_TRUNC
        self._say(f"open {flags:#o}")
        self._handles.append(self._opened(flags))
        if flags & os.O_TRUNC:
            del self.model[:]

    def _close(self) -> None:
        if not self._handles:
            return
        handle = self._handles.pop(self._rng.randrange(len(self._handles)))
        self._say(f"close {_name(handle)}")
        os.close(handle.fd)
        if handle.writable:
            self._check_server(f"after close of {_name(handle)}")

    def _close_all(self) -> None:
        self._say("close all")
        self._drop_all()
        self._check_server("after the last close")

    def _read(self) -> None:
        handle = self._pick(lambda each: each.readable)
        if handle is not None:
            start, length = self._position(self._length_max), self._length()
            self._say(f"read {_name(handle)} {start}+{length}")
            self._compare(os.pread(handle.fd, length, start), start, length, f"read through {_name(handle)}")

    def _write(self) -> None:
        handle = self._pick(lambda each: each.writable and not each.appends)
        if handle is not None:
            data = self._data()
            start = min(self._position(len(self.model)), self._length_max - len(data))
            self._say(f"write {_name(handle)} {start}+{len(data)}")
            self._write_at(handle, [data], start)

    def _write_vector(self) -> None:
        handle = self._pick(lambda each: each.writable and not each.appends)
        if handle is not None:
            part_max = min(6000, self._length_max // 6)
            sizes = [self._rng.randrange(1, part_max) for _ in range(self._rng.randrange(2, 6))]
            parts = [self._rng.randbytes(size) for size in sizes]
            start = min(self._position(len(self.model)), self._length_max - sum(map(len, parts)))
            self._say(f"writev {_name(handle)} {start}+{sizes}")
            self._write_at(handle, parts, start)

    def _append(self) -> None:
        handle = self._pick(lambda each: each.appends)
        data = self._data()[: self._length_max - len(self.model)]
        if handle is not None and data:
            self._say(f"append {_name(handle)} {len(self.model)}+{len(data)}")
            assert os.write(handle.fd, data) == len(data)
            self._apply(len(self.model), data)

    def _write_beyond_end(self) -> None:
        handle = self._pick(lambda each: each.writable and not each.appends)
        data = self._data()
        room = self._length_max - len(self.model) - len(data)
        if handle is not None and room > 0:
            start = len(self.model) + self._rng.randrange(1, room + 1)
            self._say(f"write beyond end {_name(handle)} {start}+{len(data)} (end {len(self.model)})")
            self._write_at(handle, [data], start)

    def _truncate_handle(self) -> None:
        handle = self._pick(lambda each: each.writable)
        if handle is not None:
            size = self._new_size()
            self._say(f"ftruncate {_name(handle)} {len(self.model)} -> {size}")
            os.ftruncate(handle.fd, size)
            self._resize(size)

    def _truncate_path(self) -> None:
        size = self._new_size()
        self._say(f"truncate {len(self.model)} -> {size}")
        os.truncate(self.path, size)
        self._resize(size)

    def _fallocate(self) -> None:
        # The C library writes a byte per block where the file system cannot allocate: read-write handles only.
        handle = self._pick(lambda each: each.readable and each.writable and not each.appends)
        if handle is not None:
            start = self._position(len(self.model))
            length = min(self._length(), self._length_max - start)
            if length > 0:
                self._say(f"fallocate {_name(handle)} {start}+{length}")
                os.posix_fallocate(handle.fd, start, length)
                self._resize(max(len(self.model), start + length))

    def _fsync(self) -> None:
        handle = self._pick(lambda each: True)
        if handle is not None:
            call = self._rng.choice([os.fsync, os.fdatasync])
            self._say(f"{call.__name__} {_name(handle)}")
            call(handle.fd)
            self._check_server(f"after {call.__name__} of {_name(handle)}")

    def _map(self) -> None:
        handle = self._pick(lambda each: each.readable and each.writable)
        if handle is not None and self.model and len(self._mappings) < _MAPPINGS_MAX:
            start = self._rng.randrange(len(self.model)) // mmap.PAGESIZE * mmap.PAGESIZE
            start = self._rng.choice([0, start])
            length = self._rng.randrange(1, len(self.model) - start + 1)
            self._say(f"map {_name(handle)} {start}+{length}")
            self._mappings.append(Mapping(mmap.mmap(handle.fd, length, offset=start), start))

    def _unmap(self) -> None:
        if self._mappings:
            mapping = self._mappings.pop(self._rng.randrange(len(self._mappings)))
            self._say(f"unmap {mapping.start}+{len(mapping.map)}")
            mapping.map.close()

    def _read_mapped(self) -> None:
        place = self._mapped_range()
        if place is not None:
            mapping, start, length = place
            self._say(f"read mapped {start}+{length}")
            inside = start - mapping.start
            self._compare(mapping.map[inside : inside + length], start, length, "mapped read")

    def _write_mapped(self) -> None:
        place = self._mapped_range()
        if place is not None:
            mapping, start, length = place
            data = self._rng.randbytes(length)
            self._say(f"write mapped {start}+{length}")
            inside = start - mapping.start
            mapping.map[inside : inside + length] = data
            self._apply(start, data)

    def _msync(self) -> None:
        if self._mappings:
            mapping = self._rng.choice(self._mappings)
            self._say(f"msync {mapping.start}+{len(mapping.map)}")
            mapping.map.flush()

    def _drop_page_cache(self) -> None:
        """Clean pages leave the kernel's cache: the next read is the file system's own."""
        handle = self._pick(lambda each: True)
        if handle is not None:
            start, length = self._rng.choice([(0, 0), (self._position(len(self.model)), self._length())])
            self._say(f"drop page cache {start}+{length}")
            os.posix_fadvise(handle.fd, start, length, os.POSIX_FADV_DONTNEED)

    def _rename(self) -> None:
        self._say("rename")
        os.rename(self.path, self.other_path)
        self.path, self.other_path = self.other_path, self.path
        if self._server_path is not None:
            self._server_path = self._server_path.with_name(os.path.basename(self.path))

    def _remount_all(self) -> None:
        assert self._remount is not None
        self._say("remount")
        self._drop_all()
        self._remount()
        self._check_whole()
        self._check_server("after remount")

    # Comparisons.

    def _check(self) -> None:
        size = os.stat(self.path).st_size
        if size != len(self.model):
            self._fail(f"stat says {size} bytes, not {len(self.model)}")
        handle = self._pick(lambda each: True)
        if handle is not None:
            size = os.fstat(handle.fd).st_size
            if size != len(self.model):
                self._fail(f"fstat of {_name(handle)} says {size} bytes, not {len(self.model)}")
        if self._count % self._full_check_every == 0:
            self._check_whole()
            return
        start = max(0, self._last_position - self._rng.randrange(200))
        length = self._rng.choice([300, 5000, 140_000])
        handle = self._pick(lambda each: each.readable)
        if handle is not None:
            self._compare(os.pread(handle.fd, length, start), start, length, f"check through {_name(handle)}")
        elif self._watch:
            fd = os.open(self.path, os.O_RDONLY)
            try:
                self._compare(os.pread(fd, length, start), start, length, "check through a new handle")
            finally:
                os.close(fd)

    def _check_whole(self) -> None:
        fd = os.open(self.path, os.O_RDONLY)
        try:
            # One byte more than there should be: a file that is too long is a disagreement too.
            data = b""
            while len(data) <= len(self.model):
                chunk = os.pread(fd, len(self.model) + 1 - len(data), len(data))
                if not chunk:
                    break
                data += chunk
            self._compare(data, 0, len(self.model) + 1, "the whole file")
        finally:
            os.close(fd)

    def _check_server(self, when: str) -> None:
        if self._server_path is not None:
            self._compare(self._server_path.read_bytes(), 0, len(self.model) + 1, f"the server's copy {when}")

    def _compare(self, got: bytes, start: int, length: int, what: str) -> None:
        expected = self.model[start : start + length]
        if got == expected:
            return
        if len(got) != len(expected):
            self._fail(
                f"{what}: {len(got)} bytes at {start}, not {len(expected)}{_first_difference(got, expected, start)}"
            )
        self._fail(f"{what}{_first_difference(got, expected, start)}")

    def _fail(self, what: str) -> None:
        raise Disagreement(self._report(what))

    def _report(self, what: str) -> str:
        last = "\n  ".join(self._log)
        return (
            f"{what}\nseed {self.seed}, length_max {self._length_max}, operation {self._count}, "
            f"{len(self.model)} bytes; the last operations:\n  {last}"
        )

    # Helpers.

    def _say(self, text: str) -> None:
        self._log.append(f"{self._count} {text}")

    def _opened(self, flags: int) -> Handle:
        return Handle(os.open(self.path, flags, 0o644), flags)

    def _pick(self, fits: Callable[[Handle], bool]) -> Optional[Handle]:
        fitting = [handle for handle in self._handles if fits(handle)]
        return self._rng.choice(fitting) if fitting else None

    def _drop_all(self) -> None:
        while self._mappings:
            self._mappings.pop().map.close()
        while self._handles:
            os.close(self._handles.pop().fd)

    def _write_at(self, handle: Handle, parts: List[bytes], start: int) -> None:
        data = b"".join(parts)
        assert start >= 0
        assert os.pwritev(handle.fd, parts, start) == len(data)
        self._apply(start, data)

    def _apply(self, start: int, data: bytes) -> None:
        if start > len(self.model):
            self._resize(start)
        self.model[start : start + len(data)] = data
        self._last_position = start

    def _resize(self, size: int) -> None:
        self._last_position = min(size, len(self.model))
        if size < len(self.model):
            del self.model[size:]
        else:
            self.model.extend(bytes(size - len(self.model)))

    def _mapped_range(self) -> Optional[Tuple[Mapping, int, int]]:
        """A mapping and a range of the file inside it and before the end, after which access is SIGBUS."""
        if not self._mappings:
            return None
        mapping = self._rng.choice(self._mappings)
        end = min(mapping.start + len(mapping.map), len(self.model))
        if end <= mapping.start:
            return None
        start = self._rng.randrange(mapping.start, end)
        return mapping, start, min(self._length(), end - start)

    def _position(self, limit: int) -> int:
        kind = self._rng.random()
        if kind < 0.3:
            place = self._rng.randrange(limit + 1)
        elif kind < 0.6:
            step = self._rng.choice(_BOUNDARIES)
            place = self._rng.randrange(self._length_max // step + 2) * step + self._rng.randrange(-3, 4)
        elif kind < 0.8:
            place = len(self.model) + self._rng.randrange(-5000, 20)
        else:
            place = self._last_position + self._rng.randrange(-300, 300)
        return min(max(place, 0), limit)

    def _length(self) -> int:
        kind = self._rng.random()
        if kind < 0.35:
            length = self._rng.randrange(1, 20)
        elif kind < 0.75:
            length = self._rng.randrange(1, 9000)
        elif kind < 0.9:
            length = self._rng.choice(_BOUNDARIES) + self._rng.randrange(-2, 3)
        else:
            length = self._rng.randrange(1, 280_000)
        return min(length, self._length_max)

    def _data(self) -> bytes:
        return self._rng.randbytes(self._length())

    def _new_size(self) -> int:
        if self._rng.random() < 0.05:
            return 0
        if self._rng.random() < 0.5:
            return self._position(len(self.model))
        return self._position(self._length_max)


def _name(handle: Handle) -> str:
    access = {os.O_RDONLY: "r", os.O_WRONLY: "w", os.O_RDWR: "rw"}[handle.flags & os.O_ACCMODE]
    return f"fd {handle.fd} ({access}{'a' if handle.appends else ''})"


def _first_difference(got: bytes, expected: bytes, start: int) -> str:
    for index, (one, other) in enumerate(zip(got, expected)):
        if one != other:
            last = max(i for i, (a, b) in enumerate(zip(got, expected)) if a != b)
            return (
                f": differs from {start + index} to {start + last}: "
                f"got {bytes(got[index : index + 16]).hex()}, expected {bytes(expected[index : index + 16]).hex()}"
            )
    return ""


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        description="One file under random operations, compared with a model after each."
    )
    parser.add_argument("path", type=Path, help="the file to work on; created and overwritten")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--length-max", type=int, default=600_000, metavar="BYTES")
    parser.add_argument("--server-path", type=Path, help="the same file as the server sees it, compared too")
    parser.add_argument("--remount", metavar="COMMAND", help="shell command that unmounts and mounts again")
    parser.add_argument("--no-watch", action="store_true", help="never open a handle only to compare")
    options = parser.parse_args(argv)
    remount = None
    if options.remount:

        def remount() -> None:
            subprocess.run(options.remount, shell=True, check=True)

    exerciser = RandomOperations(
        options.path,
        options.seed,
        length_max=options.length_max,
        server_path=options.server_path,
        remount=remount,
        watch=not options.no_watch,
    )
    try:
        exerciser.run(options.operations)
    except Disagreement as disagreement:
        print(disagreement, file=sys.stderr)
        return 1
    print(
        f"seed {options.seed}: {options.operations} operations agree, {len(exerciser.model)} bytes at the end"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
