"""The file exerciser on a real mount of a real server."""

from __future__ import annotations

from pathlib import Path

import pytest

from exercise.random_operations import Disagreement, RandomOperations
from support.mount import Mount
from support.sshd import Sshd


class Remounted:
    """A mount of one directory that can be taken away and brought back on the same mountpoint name (through a link)."""

    def __init__(self, sshd: Sshd, tmp_dir: Path) -> None:
        self._sshd = sshd
        self._tmp_dir = tmp_dir
        self.served = sshd.tree / f"exercise-{tmp_dir.name}"
        self.served.mkdir()
        self.path = tmp_dir / "current"
        self._mount = self._mounted()

    def remount(self) -> None:
        assert self._mount.unmount() == 0, self._mount.log_text()
        self.path.unlink()
        self._mount = self._mounted()

    def close(self) -> None:
        self._mount.close()

    def _mounted(self) -> Mount:
        mount = Mount(self._sshd, self._tmp_dir, directory=str(self.served))
        self.path.symlink_to(mount.path)
        return mount


def run(sshd: Sshd, tmp_dir: Path, seed: int, operations: int, *, length_max: int, watch: bool) -> None:
    place = Remounted(sshd, tmp_dir)
    try:
        RandomOperations(
            place.path / "file",
            seed,
            length_max=length_max,
            server_path=place.served / "file",
            remount=place.remount,
            watch=watch,
        ).run(operations)
    finally:
        place.close()


@pytest.mark.parametrize(
    ("seed", "length_max", "watch"), [(1, 600_000, True), (2, 300_000, False), (3, 20_000, True)]
)
def test_some_operations(sshd: Sshd, tmp_path: Path, seed: int, length_max: int, watch: bool) -> None:
    run(sshd, tmp_path, seed, 1200, length_max=length_max, watch=watch)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("seed", "length_max", "watch"),
    [
        (101, 600_000, True),
        (102, 600_000, False),
        (103, 2_000_000, True),
        (104, 2_000_000, False),
        (105, 150_000, True),
        (106, 9_000, False),
    ],
)
def test_many_operations(sshd: Sshd, tmp_path: Path, seed: int, length_max: int, watch: bool) -> None:
    """120,000 operations in all."""
    run(sshd, tmp_path, seed, 20_000, length_max=length_max, watch=watch)


class Corrupting(RandomOperations):
    """Changes a byte behind the exerciser's back after the 300th operation."""

    def _check(self) -> None:
        if self._count == 300 and self.model:
            with open(self.path, "r+b") as file:
                file.seek(len(self.model) // 2)
                byte = file.read(1)
                file.seek(len(self.model) // 2)
                file.write(bytes([byte[0] ^ 1]))
        super()._check()


def test_a_wrong_byte_is_found_and_reported_with_its_seed(tmp_path: Path) -> None:
    with pytest.raises(Disagreement, match=r"differs from \d+(?s:.*)seed 5, .*operations:\n"):
        Corrupting(tmp_path / "file", 5).run(400)


def test_a_local_file_agrees(tmp_path: Path) -> None:
    RandomOperations(tmp_path / "file", 6, server_path=tmp_path / "file").run(2000)
