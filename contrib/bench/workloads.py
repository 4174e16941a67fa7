"""What is timed. A workload is a function of a Place and the options that returns the seconds it took, or raises.

Writes end when the unmounted process has ended: everything it promised is on the server then. Reads start on a fresh mount,
so that nothing is cached on this side; the server's own page cache is made warm, or cold, the same for every peer. What was
moved is compared byte by byte, written files on the server's side and outside the time.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Callable, Dict, NamedTuple

from bench.data import Data
from bench.peers import Place
from support.mount import Mount


class Options(NamedTuple):
    total_bytes: int
    block_bytes: int
    server_cache: str  # "warm" or "cold", for reads


Workload = Callable[[Place, Options], float]


def sequential_write(place: Place, options: Options) -> float:
    """Write one file in blocks, fsync, close, unmount."""
    data = Data(options.total_bytes, options.block_bytes)
    mount = place.mount()
    try:
        started = time.monotonic()
        data.write(mount.path / "written")
        unmount(mount)
        seconds = time.monotonic() - started
    finally:
        mount.close()
    data.check(place.served / "written")
    (place.served / "written").unlink()
    return seconds


def sequential_read(place: Place, options: Options) -> float:
    """Read one file that this mount has never seen, from start to end."""
    data = Data(options.total_bytes, options.block_bytes)
    source = place.served / "to-read"
    if not source.exists():
        data.write(source)
    set_server_cache(source, options.server_cache)
    mount = place.mount()
    try:
        started = time.monotonic()
        data.check(mount.path / "to-read")
        seconds = time.monotonic() - started
        unmount(mount)
    finally:
        mount.close()
    return seconds


WORKLOADS: Dict[str, Workload] = {"write": sequential_write, "read": sequential_read}


def unmount(mount: Mount) -> None:
    """Until the process has ended; its failure is ours."""
    status = mount.unmount(timeout_s=600.0)
    if status != 0:
        raise RuntimeError(f"{type(mount).__name__} ended with status {status}: {mount.log_text()[-1000:]}")


def set_server_cache(path: Path, state: str) -> None:
    """Bring the server's page cache for a file into a known state."""
    fd = os.open(path, os.O_RDONLY)
    try:
        if state == "cold":
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            while os.read(fd, 2**20):
                pass
    finally:
        os.close(fd)
