"""restic with another restic; backups, checks and restores are in test_recipes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

from support.mount import Mount
from tools.trees import make_tree, run, same_contents


def test_two_restics_at_once(mount: Mount, tmp_path: Path, request_many: Callable[..., None]) -> None:
    """Each sees the other's lock, and both backups are whole."""
    environment = {
        "RESTIC_PASSWORD": "secret",
        "RESTIC_REPOSITORY": str(mount.path / "repository"),
        "RESTIC_CACHE_DIR": str(tmp_path / "cache"),
    }
    run("restic", "init", env=environment)
    sources = [make_tree(tmp_path / f"source{count}", seed=count, files=40) for count in (1, 2)]
    request_many(
        [lambda each=each: run("restic", "backup", ".", cwd=each, env=environment) for each in sources]
    )
    assert "no errors were found" in run("restic", "check", "--read-data", env=environment)
    same_contents(mount.path / "repository", mount.served / "repository")
