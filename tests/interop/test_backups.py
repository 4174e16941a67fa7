"""Each recipe of RECIPES.md on a mount of each server: two backups, then verification and a restore on a fresh mount."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from contrib.lib.recipes import RECIPES, Recipe
from interop.servers import SERVERS
from interop.table import UNFIT
from support.mount import Mount
from tools.practice import Practice

pytestmark = pytest.mark.long


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("name", SERVERS)
def test_recipe(name: str, recipe: Recipe, tmp_path: Path) -> None:
    with SERVERS[name](tmp_path) as server:
        if recipe.name in UNFIT.get(name, {}):
            with pytest.raises(AssertionError, match="status [1-9]"):  # the tool says so, and nobody else
                back_up_and_restore(server, recipe, tmp_path)
        else:
            back_up_and_restore(server, recipe, tmp_path)


def back_up_and_restore(server: Any, recipe: Recipe, tmp_path: Path) -> None:
    with Mount(server, tmp_path / "first") as mount:
        practice = Practice(recipe, mount.path, tmp_path)
        practice.init()
        practice.backup()
        practice.change()
        practice.backup()
        assert mount.unmount() == 0
    with Mount(server, tmp_path / "second") as mount:
        practice.look_at(mount.path)
        practice.verify()
        practice.restore()
        assert mount.unmount() == 0
