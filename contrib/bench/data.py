"""Bytes to write and to recognise again: without pattern, and another piece for every block, so that a swap would show."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Iterator

_PIECE_BYTES = 16 * 2**20
_STEP = 1_040_449  # prime: neighbours do not overlap where they would look alike


class WrongBytes(Exception):
    """A file is not what was written; the text says where."""


class Data:
    """``total_bytes`` of noise in blocks of ``block_bytes``, the last one perhaps shorter."""

    def __init__(self, total_bytes: int, block_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.block_bytes = block_bytes
        self._piece = random.Random(total_bytes).randbytes(_PIECE_BYTES + block_bytes)

    def blocks(self) -> Iterator[bytes]:
        for count, start in enumerate(range(0, self.total_bytes, self.block_bytes)):
            place = count * _STEP % _PIECE_BYTES
            yield self._piece[place : place + min(self.block_bytes, self.total_bytes - start)]

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
