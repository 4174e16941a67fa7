"""Small things that the tests of a real mount share."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Iterator, List, NamedTuple, Union

AT_FDCWD = -100
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

PathLike = Union[Path, bytes, str]


class Here(NamedTuple):
    """A fresh directory: ``path`` on the mount, ``served`` on the server's side."""

    path: Path
    served: Path

    def both(self, name: str) -> List[Path]:
        return [self.path / name, self.served / name]


@contextlib.contextmanager
def refused(*codes: int) -> Iterator[None]:
    """The block must raise OSError with one of these errnos."""
    wanted = "/".join(errno.errorcode[code] for code in codes)
    try:
        yield
    except OSError as error:
        got = errno.errorcode.get(error.errno or 0, str(error))
        assert error.errno in codes, f"{got} ({error}) instead of {wanted}"
        return
    raise AssertionError(f"no error instead of {wanted}")


@contextlib.contextmanager
def opened(path: PathLike, flags: int, mode: int = 0o644) -> Iterator[int]:
    """os.open() for a with statement; an error of close() is raised."""
    fd = os.open(path, flags, mode)
    try:
        yield fd
    except BaseException:
        try:
            os.close(fd)
        except OSError:
            pass  # the first error counts
        raise
    os.close(fd)


def fsync_directory(path: Path) -> None:
    """What is owed to the server of anything below is there when this returns."""
    with opened(path, os.O_RDONLY) as fd:
        os.fsync(fd)


def noise(length: int, seed: int = 1) -> bytes:
    """Bytes without pattern, the same for the same seed."""
    return random.Random(seed).randbytes(length)


def renameat2(source: PathLike, target: PathLike, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), ctypes.c_uint(flags))
        != 0
    ):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


def utimensat(
    path: PathLike, access_ns: int, modification_ns: int, *, access_s: int = 0, modification_s: int = 0
) -> None:
    """utimensat(2) with what Python's os.utime cannot say: UTIME_NOW and UTIME_OMIT for each time."""
    times = (_Timespec * 2)(_Timespec(access_s, access_ns), _Timespec(modification_s, modification_ns))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.utimensat(AT_FDCWD, os.fsencode(path), times, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def in_another_process(code: str, *arguments: object) -> str:
    """Run Python code with ``arguments`` as sys.argv[1:]; returns its output, raises with its errors."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def is_root() -> bool:
    return os.geteuid() == 0
