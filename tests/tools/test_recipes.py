"""Each recipe of RECIPES.md: two backups, a restore and verification on a fresh mount; and all of it over bad lines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable, Iterator

import pytest

from contrib.lib.recipes import DUPLICITY, JOB, RECIPES, RESTIC, Recipe
from faults.conftest import Line
from system.scratch import write_command
from tools.practice import Practice, reset_in_the_middle, undisturbed
from tools.trees import run, same_contents

# The extra bytes are what a reset needs a middle of. Six runs of gpg make duplicity slow.
CASES = [
    *(
        pytest.param(each, undisturbed, 0, id=each.name, marks=[pytest.mark.long] * (each is DUPLICITY))
        for each in RECIPES
    ),
    *(
        pytest.param(each, reset_in_the_middle, 8 << 20, id=f"{each.name}, resets", marks=pytest.mark.long)
        for each in RECIPES
    ),
]


@pytest.mark.parametrize(("recipe", "disturbed", "extra_bytes"), CASES)
def test_recipe(
    recipe: Recipe,
    disturbed: Callable[[Line, str], Iterator[None]],
    extra_bytes: int,
    mounted: Callable[[], Line],
    tmp_path: Path,
) -> None:
    line = mounted()
    practice = Practice(recipe, line.mount.path, tmp_path, extra_bytes)
    practice.init()
    with disturbed(line, "up"):
        practice.backup()
    practice.change()
    with disturbed(line, "up"):
        practice.backup()

    line = mounted()
    with disturbed(line, "down"):
        practice.restore()
    practice.verify()
    same_contents(line.mount.path, line.mount.served)
    line.unmount()


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_an_older_state_and_what_is_left_of_it(
    recipe: Recipe, mounted: Callable[[], Line], tmp_path: Path
) -> None:
    """Then on the server, where the tool finds the same."""
    line = mounted()
    practice = Practice(recipe, line.mount.path, tmp_path)
    practice.init()
    practice.backup()
    first = practice.change()
    practice.backup()

    line = mounted()
    if recipe.older:
        practice.restore(older=first)
    practice.prune()
    same_contents(line.mount.path, line.mount.served)
    line.unmount()
    practice.look_at(line.mount.served)
    practice.verify()
    practice.restore()


def test_the_nightly_job(mounted: Callable[[], Line], tmp_path: Path) -> None:
    """It refuses to run without the mount, and without the disk behind it; else all is stored at its end."""
    line = mounted()
    practice = Practice(RESTIC, line.mount.path, tmp_path)
    practice.init()
    (tmp_path / "bin").mkdir()
    write_command(tmp_path / "bin" / "sftpmount")
    job = tmp_path / "nightly"
    job.write_text(practice.here(JOB))
    job.chmod(0o700)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "XDG_RUNTIME_DIR": str(tmp_path)}

    def snapshots() -> int:
        return len(list((line.mount.served / "restic" / "snapshots").iterdir()))

    run(job, cwd=tmp_path / "home", env=environment, ok=(1,))
    assert snapshots() == 0
    (line.mount.path / ".this-is-the-backup-disk").touch()
    run(job, cwd=tmp_path / "home", env=environment)
    assert snapshots() == 1
    line.unmount()
    said = run("sh", "-c", f"{job} 2>&1", cwd=tmp_path / "home", env=environment, ok=(1,))
    assert f"{line.mount.path} is not mounted" in said
    assert snapshots() == 1
    assert list(line.mount.path.iterdir()) == []
