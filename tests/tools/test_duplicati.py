"""What Duplicati does to a local folder, call by call: volumes put, listed, fetched and compared by hash, compacted, deleted.

.NET opens the target without O_TRUNC or O_EXCL, locks it, cuts it to nothing, writes, and drops what close() says: all that
Duplicati has to go by is the size it finds afterwards, and the hash when it fetches the volume again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path
from typing import Callable, Dict

from faults.conftest import Line, in_background
from mount.helpers import noise
from support.process import wait_until
from tools.practice import reset_in_the_middle
from tools.trees import same_contents

BUFFER_BYTES = 81920  # of .NET's Stream.CopyTo
VOLUME_BYTES = 3 << 20


class Folder:
    """The backend "local folder", and of each volume what the local database knows: its bytes' hash and their number."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.known: Dict[str, bytes] = {}
        self._sizes: Dict[str, int] = {}

    def put(self, name: str, data: bytes) -> None:
        fd = os.open(self._path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            for start in range(0, len(data), BUFFER_BYTES):
                os.write(fd, data[start : start + BUFFER_BYTES])
        finally:
            try:
                os.close(fd)
            except OSError:
                pass  # as .NET does
        assert (self._path / name).stat().st_size == len(data)
        self.known[name] = hashlib.sha256(data).digest()
        self._sizes[name] = len(data)

    def get(self, name: str) -> bytes:
        with open(self._path / name, "rb", buffering=BUFFER_BYTES) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            data = file.read()
        assert hashlib.sha256(data).digest() == self.known[name], name
        return data

    def delete(self, name: str) -> None:
        (self._path / name).unlink()
        del self.known[name], self._sizes[name]

    def verify_list(self) -> None:
        """Before and after each backup: a volume that is missing, too many or of another size ends in an error."""
        assert {entry.name: entry.stat().st_size for entry in os.scandir(self._path)} == self._sizes


def back_up(folder: Folder, number: int) -> None:
    folder.verify_list()
    for volume in range(3):
        identity = f"{number:016x}{volume:016x}"
        folder.put(
            f"duplicati-b{identity}.dblock.zip.aes", noise(VOLUME_BYTES + volume, seed=10 * number + volume)
        )
        folder.put(f"duplicati-i{identity}.dindex.zip.aes", noise(5000 + volume, seed=100 * number + volume))
    folder.put(f"duplicati-2026112{number}T020000Z.dlist.zip.aes", noise(40_000, seed=number))
    folder.verify_list()


def compact(folder: Folder) -> None:
    """The blocks of two volumes go into a new one, whose index follows; only then are the old ones deleted."""
    old = sorted(name for name in folder.known if ".dblock." in name)[:2]
    folder.put("duplicati-bc0.dblock.zip.aes", b"".join(folder.get(name) for name in old))
    folder.put("duplicati-ic0.dindex.zip.aes", noise(9000, seed=77))
    for name in old:
        folder.delete(name.replace("-b", "-i", 1).replace("dblock", "dindex"))
        folder.delete(name)
    folder.verify_list()


def test_two_backups_a_compaction_and_all_hashes_over_resets(mounted: Callable[[], Line]) -> None:
    line = mounted()
    folder = Folder(line.mount.path)
    for number in (1, 2):
        with reset_in_the_middle(line, "up"):
            back_up(folder, number)
    line = mounted()
    with reset_in_the_middle(line, "down"):
        for name in folder.known:
            folder.get(name)
    compact(folder)
    for name in folder.known:
        folder.get(name)
    same_contents(line.mount.path, line.mount.served)
    line.unmount()


def test_the_list_of_an_unreachable_server_is_waited_for(mounted: Callable[[], Line]) -> None:
    """Never an empty one: it would take the volumes for lost, and its repair would forget them."""
    line = mounted()
    folder = Folder(line.mount.path)
    back_up(folder, 1)
    line = mounted()
    line.relay.refuse()
    line.relay.reset()
    wait_until(lambda: line.losses == 1, 20, "the loss")
    listing = in_background(folder.verify_list)
    line.relay.refuse(False)
    listing.result(60)
    assert line.reconnects == 1
