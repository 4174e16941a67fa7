"""borg's lock; backups, checks and restores are in test_recipes.py."""

from __future__ import annotations

from pathlib import Path
from typing import Dict

from support.mount import Mount
from tools.trees import make_tree, run


def environment(tmp_path: Path) -> Dict[str, str]:
    return {
        "BORG_PASSPHRASE": "secret",
        "BORG_BASE_DIR": str(tmp_path / "borg"),
        "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
    }


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
