"""restic's repository on the mount: init, two backups, check, restore; then the same from the server's side."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

from support.mount import Mount
from tools.trees import change_tree, make_tree, run, same_contents


def test_two_backups_check_and_restore(mount: Mount, tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source")
    first = tmp_path / "first"
    environment = {
        "RESTIC_PASSWORD": "secret",
        "RESTIC_REPOSITORY": str(mount.path / "repository"),
        "RESTIC_CACHE_DIR": str(tmp_path / "cache"),
    }
    run("restic", "init", env=environment)
    run("restic", "backup", ".", cwd=source, env=environment)
    run("cp", "-a", source, first)
    change_tree(source)
    run("restic", "backup", ".", cwd=source, env=environment)
    assert "no errors were found" in run("restic", "check", "--read-data", "--no-cache", env=environment)
    run("restic", "restore", "latest", "--target", tmp_path / "restored", env=environment)
    same_contents(tmp_path / "restored", source)
    assert list((mount.path / "repository" / "locks").iterdir()) == []

    # The same bytes on the server, and a restic that reads them there agrees.
    same_contents(mount.path / "repository", mount.served / "repository")
    assert mount.unmount() == 0
    server = {**environment, "RESTIC_REPOSITORY": str(mount.served / "repository")}
    assert "no errors were found" in run("restic", "check", "--read-data", "--no-cache", env=server)
    snapshots = run("restic", "snapshots", "--compact", env=server).split()
    oldest = next(word for word in snapshots if len(word) == 8 and int(word, 16) >= 0)
    run("restic", "restore", oldest, "--target", tmp_path / "restored first", env=server)
    same_contents(tmp_path / "restored first", first)


def test_forget_and_prune(mount: Mount, tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source", files=30)
    environment = {
        "RESTIC_PASSWORD": "secret",
        "RESTIC_REPOSITORY": str(mount.path / "repository"),
        "RESTIC_CACHE_DIR": str(tmp_path / "cache"),
    }
    run("restic", "init", env=environment)
    for seed in (2, 3):
        run("restic", "backup", ".", cwd=source, env=environment)
        change_tree_again(source, seed)
    run("restic", "backup", ".", cwd=source, env=environment)
    run("restic", "forget", "--keep-last", "1", "--prune", env=environment)
    assert "no errors were found" in run("restic", "check", "--read-data", env=environment)
    same_contents(mount.path / "repository", mount.served / "repository")


def change_tree_again(source: Path, seed: int) -> None:
    (source / f"only-{seed}").write_bytes(bytes([seed]) * 100_000)
    (source / f"only-{seed - 1}").unlink(missing_ok=True)


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
