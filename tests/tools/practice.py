"""A recipe of RECIPES.md carried out: its own lines, with the directories of a test in place of those that it names."""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, Optional, Tuple

from contrib.lib.recipes import CONFIG, MOUNT, PLACES, RESTORED, SOURCE, Recipe
from faults.conftest import Line
from mount.helpers import noise
from support.process import program, wait_until
from tools.trees import change_tree, contents, make_tree, metadata, run, same_contents

MiB = 1 << 20


@contextmanager
def reset_in_the_middle(line: Line, direction: str) -> Iterator[None]:
    """The block's program goes through a reset of the connection after 3 MiB, and moves at least as much after it."""
    before, reconnects = line.relay.stats(), line.reconnects
    line.relay.reset_after(3 * MiB, direction)
    yield
    after = line.relay.stats()
    assert after["resets"] == before["resets"] + 1
    assert after[direction] - before[direction] > 6 * MiB
    assert line.reconnects == reconnects + 1, line.mount.log_text()


@contextmanager
def undisturbed(line: Line, direction: str) -> Iterator[None]:
    yield


class Practice:
    """``recipe`` with a source tree of its own below ``tmp_path``; ``source`` is what the next backup is made of.

    ``extra_bytes`` without pattern, which no tool can make fewer, are in the tree, and others in their place after change().
    """

    def __init__(self, recipe: Recipe, mountpoint: Path, tmp_path: Path, extra_bytes: int = 0) -> None:
        for each in recipe.programs:
            program(each, recipe.package)
        self.recipe = recipe
        self.source = make_tree(tmp_path / "source", files=60, hard_links=True)
        self._extra_bytes = extra_bytes
        self._add_noise(1)
        self._tmp_path = tmp_path
        self._home = tmp_path / "home"
        self._home.mkdir(mode=0o700)
        self._environment: Dict[str, str] = {}
        self._backed_up_at = 0
        self._restores = 0
        self._places: Dict[str, Path] = {MOUNT: mountpoint, SOURCE: self.source, CONFIG: tmp_path / "config"}
        (tmp_path / "config").mkdir()
        for name, text in recipe.files.items():
            Path(self.here(name)).write_text(self.here(text))

    def look_at(self, mountpoint: Path) -> None:
        """The same backups, from now on in another directory."""
        self._places[MOUNT] = mountpoint
        self._environment["BORG_RELOCATED_REPO_ACCESS_IS_OK"] = "yes"  # borg would ask

    def init(self) -> None:
        self._run(self.recipe.init)

    def backup(self) -> None:
        """In a later second than the last one: tools name their backups by it."""
        wait_until(lambda: int(time.time()) > self._backed_up_at, 2.0, "the next second")
        self._run(self.recipe.backup)
        self._backed_up_at = int(time.time())

    def change(self) -> Path:
        """Let a day pass; returns a copy of the tree as it was."""
        before = self._tmp_path / "before"
        run("cp", "-a", self.source, before)
        change_tree(self.source)
        self._add_noise(2)
        return before

    def verify(self) -> None:
        self._run(self.recipe.verify)

    def prune(self) -> None:
        self._run(self.recipe.prune)

    def restore(self, older: Optional[Path] = None) -> None:
        """The newest backup comes back as ``source`` is; the one before it as ``older``."""
        step, expected = (self.recipe.restore, self.source) if older is None else (self.recipe.older, older)
        self._restores += 1
        self._places[RESTORED] = self._tmp_path / f"restored{self._restores}"
        self._places[RESTORED].mkdir()
        self._run(step)
        restored = Path(self.here(self.recipe.restored))
        if self.recipe.only_files:
            assert _files(restored) == _files(expected)
        else:
            same_contents(restored, expected)
            assert _modes_and_times(restored) == _modes_and_times(expected)
        if self.recipe.hard_links:
            linked = [path for path in restored.rglob("hard-*") if path.stat().st_nlink == 2]
            assert len(linked) == 5

    def _run(self, step: str) -> None:
        script = self.here(f"{self.recipe.settings}\n{step}")
        if "gpg" in self.recipe.programs:
            script = f"trap 'gpgconf --kill gpg-agent' EXIT\n{script}"  # it would outlive the test
        run("sh", "-euc", script, cwd=self._home, env=self._environment)

    def here(self, text: str) -> str:
        """``text`` with the directories of this test."""
        return re.sub("|".join(PLACES), lambda found: str(self._places[found.group()]), text)

    def _add_noise(self, seed: int) -> None:
        if self._extra_bytes:
            (self.source / "noise").write_bytes(noise(self._extra_bytes, seed))


def _files(root: Path) -> Dict[str, Tuple[str, bytes]]:
    """contents() without directories and what git keeps."""
    return {
        name: entry
        for name, entry in contents(root).items()
        if entry[0] != "directory" and not name.startswith(".git/")
    }


def _modes_and_times(root: Path) -> Dict[str, Tuple[int, int]]:
    """metadata() without symbolic links, whose times most tools leave alone."""
    return {name: entry for name, entry in metadata(root).items() if not (root / name).is_symlink()}
