"""Bytes to write and to recognise again: without pattern, and another piece for every block, so that a swap would show.

Trees of files likewise, copies of them, and what a copy lacks.
"""

from __future__ import annotations

import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator, Optional, Sequence

_PIECE_BYTES = 16 * 2**20
_STEP = 1_040_449  # prime: neighbours do not overlap where they would look alike
_COMPARED_BYTES = 4096
_COPIES_AT_ONCE = 16
_TIME_S = 1_500_000_000  # old, so that no "racily clean" rule of any program applies; each file has another


class WrongBytes(Exception):
    """A file is not what was written; the text says where."""


class Data:
    """``total_bytes`` of noise in blocks of ``block_bytes``, the last one perhaps shorter."""

    def __init__(self, total_bytes: int, block_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.block_bytes = block_bytes
        self._piece = random.Random(block_bytes).randbytes(_PIECE_BYTES + block_bytes)

    def blocks(self) -> Iterator[bytes]:
        for count, start in enumerate(range(0, self.total_bytes, self.block_bytes)):
            yield self._of_block(count, 0, min(self.block_bytes, self.total_bytes - start))

    def at(self, start: int, length: int) -> bytes:
        """Bytes from within one block."""
        count, skip = divmod(start, self.block_bytes)
        return self._of_block(count, skip, min(length, self.total_bytes - start))

    def write(self, path: Path) -> None:
        """Write the file, fsync and close it."""
        fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        try:
            for block in self.blocks():
                if os.write(fd, block) != len(block):
                    raise OSError(f"short write to {path}")
            os.fsync(fd)
        finally:
            os.close(fd)

    def check(self, path: Path) -> None:
        """Read the file from its start to its end. Raises WrongBytes."""
        with path.open("rb", buffering=0) as file:
            for count, block in enumerate(self.blocks()):
                got = file.read(len(block))
                while got is not None and 0 < len(got) < len(block):
                    more = file.read(len(block) - len(got))
                    if not more:
                        break
                    got += more
                if got != block:
                    raise WrongBytes(f"{path}: block {count} of {self.block_bytes} bytes differs")
            if file.read(1):
                raise WrongBytes(f"{path}: longer than {self.total_bytes} bytes")

    def _of_block(self, count: int, skip: int, length: int) -> bytes:
        place = count * _STEP % _PIECE_BYTES + skip
        return self._piece[place : place + length]


def make_tree(
    root: Path, files: int, sizes: Sequence[int] = (500, 2_000, 5_000, 20_000), directories: int = 10
) -> None:
    """``files`` files in so many directories, their sizes in turn."""
    noise = random.Random(files).randbytes(max(sizes) + files)
    for count in range(files):
        path = root / f"dir-{count % directories:03}" / f"file-{count:05}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise[count : count + sizes[count % len(sizes)]])
        os.utime(path, (_TIME_S + count, _TIME_S + count))


def make_entries(root: Path, count: int) -> None:
    """One directory with so many small files."""
    root.mkdir()
    for number in range(count):
        (root / f"entry-{number:06}").write_bytes(b"x" * (number % 10))


def store(source: Path, target: Path) -> None:
    """Copy a file or a tree with its times. Many files at once, since the target may be far away."""
    if source.is_file():
        shutil.copy2(source, target)
        return
    target.mkdir()
    inside = sorted(source.rglob("*"))
    for each in inside:
        if each.is_dir():
            (target / each.relative_to(source)).mkdir()
    with ThreadPoolExecutor(_COPIES_AT_ONCE) as pool:
        copies = [
            pool.submit(shutil.copy2, each, target / each.relative_to(source))
            for each in inside
            if each.is_file()
        ]
        for copy in copies:
            copy.result()
    for each in [*reversed(inside), source]:
        if each.is_dir():
            shutil.copystat(each, target / each.relative_to(source))


def difference(source: Path, served: Path) -> Optional[str]:
    """In a few words what ``served`` lacks of ``source``, a file or a tree of files; None: the same names and bytes."""
    if source.is_dir():
        names = [path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file()]
        wrong = [name for name in names if difference(source / name, served / name) is not None]
        if wrong:
            return f"{len(wrong)} of {len(names)} files are missing or wrong"
        there = {path.relative_to(served) for path in served.rglob("*") if path.is_file()}
        more = sorted(there - set(names))
        return f"{more[0]} should not be there" if more else None
    try:
        got = served.read_bytes()
    except FileNotFoundError:
        return "no such file"
    wanted = source.read_bytes()
    if got == wanted:
        return None
    end = min(len(got), len(wanted))
    starts = range(0, end, _COMPARED_BYTES)
    differs = (
        at
        for at in starts
        if got[at : min(at + _COMPARED_BYTES, end)] != wanted[at : min(at + _COMPARED_BYTES, end)]
    )
    right = next(differs, end)
    return f"{len(got)} of {len(wanted)} bytes, right up to {right}"
