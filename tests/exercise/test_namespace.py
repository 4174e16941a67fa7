"""The namespace exerciser on a real mount of a real server."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import pytest

from exercise.namespace import check_shared, compare, exercise, snapshot
from support.mount import Mount
from support.sshd import Sshd


def run(mount: Mount, local: Path, *, seed: int, workers: int, operations: int, rounds: int) -> None:
    results = exercise(
        mount.path / "tree", local, seed=seed, workers=workers, operations=operations, rounds=rounds
    )
    check_server(mount.served / "tree", local, seed=seed, workers=workers)
    check_shared(mount.served / "tree" / "shared", workers, rounds, results)


def check_server(served: Path, local: Path, *, seed: int, workers: int) -> None:
    for index in range(workers):
        name = f"worker-{index}"
        compare(snapshot(served / name), snapshot(local / name), f"the server's tree {index}, seed {seed}")


@pytest.mark.parametrize("seed", [1, 2])
def test_processes_at_once_agree_with_a_local_directory(mount: Mount, tmp_path: Path, seed: int) -> None:
    run(mount, tmp_path / "local", seed=seed, workers=4, operations=300, rounds=15)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [11, 12, 13])
def test_many_operations_by_processes_at_once(mount: Mount, tmp_path: Path, seed: int) -> None:
    run(mount, tmp_path / "local", seed=seed, workers=6, operations=4000, rounds=100)


def test_a_new_mount_shows_the_same_tree(
    sshd: Sshd, make_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    """Link counts are not on the wire, so that a new mount cannot know those of links made before it."""
    directory = sshd.tree / f"again-{tmp_path.name}"
    directory.mkdir()
    first = make_mount(sshd, directory=str(directory))
    exercise(first.path / "tree", tmp_path / "local", seed=4, workers=2, operations=300, rounds=5)
    assert first.unmount() == 0
    second = make_mount(sshd, directory=str(directory))
    for index in range(2):
        name = f"worker-{index}"
        compare(
            snapshot(second.path / "tree" / name, links=False),
            snapshot(tmp_path / "local" / name, links=False),
            f"tree {index} on a new mount",
        )
