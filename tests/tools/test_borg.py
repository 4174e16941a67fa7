"""borg's repository on the mount: create twice, check, prune, compact, extract; its lock; then from the server's side."""

from __future__ import annotations

from pathlib import Path
from typing import Dict

from support.mount import Mount
from tools.trees import change_tree, make_tree, run, same_contents


def environment(tmp_path: Path) -> Dict[str, str]:
    return {
        "BORG_PASSPHRASE": "secret",
        "BORG_BASE_DIR": str(tmp_path / "borg"),
        "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
    }


def test_create_check_prune_compact_extract(mount: Mount, tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source", hard_links=True)
    env, repository = environment(tmp_path), mount.path / "repository"
    run("borg", "init", "--encryption=repokey", repository, env=env)
    run("borg", "create", f"{repository}::first", ".", cwd=source, env=env)
    run("cp", "-a", source, tmp_path / "first")
    change_tree(source)
    run("borg", "create", f"{repository}::second", ".", cwd=source, env=env)
    run("borg", "check", "--verify-data", repository, env=env)
    extract(f"{repository}::first", tmp_path / "extracted first", env)
    same_contents(tmp_path / "extracted first", tmp_path / "first")
    run("borg", "prune", "--keep-last=1", repository, env=env)
    run("borg", "compact", "--threshold=0", repository, env=env)
    assert run("borg", "list", "--short", repository, env=env) == "second\n"
    assert not [path for path in repository.iterdir() if path.name.startswith("lock")]

    same_contents(repository, mount.served / "repository")
    assert mount.unmount() == 0
    served = mount.served / "repository"
    run("borg", "check", "--verify-data", served, env=env)
    extract(f"{served}::second", tmp_path / "extracted", env)
    same_contents(tmp_path / "extracted", source)


def extract(archive: str, target: Path, env: Dict[str, str]) -> None:
    target.mkdir()
    run("borg", "extract", archive, cwd=target, env=env)


def test_a_held_lock_is_respected(mount: Mount, tmp_path: Path) -> None:
    env, repository = environment(tmp_path), mount.path / "repository"
    run("borg", "init", "--encryption=none", repository, env=env)
    source = make_tree(tmp_path / "source", files=5)
    run(
        "borg",
        "with-lock",
        repository,
        "sh",
        "-c",
        f"! borg --lock-wait 0 create {repository}::x {source}",
        env=env,
    )
    run("borg", "create", f"{repository}::x", ".", cwd=source, env=env)
    assert run("borg", "list", "--short", repository, env=env) == "x\n"
