"""Source trees for backups, and the comparison of whole trees."""

from __future__ import annotations

import os
import random
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Tuple


def make_tree(root: Path, seed: int = 1, *, files: int = 120, hard_links: bool = False) -> Path:
    """Directories, small and middling files, symlinks, odd names, modes and times; all the same for the same seed."""
    rng = random.Random(seed)
    root.mkdir()
    directories = [root]
    for count in range(8):
        directory = rng.choice(directories) / f"dir {count}"
        directory.mkdir()
        directories.append(directory)
    made: List[Path] = []
    for count in range(files):
        suffix = rng.choice(["", ".txt", " with space", "-\u00e4\u6f22"])
        path = rng.choice(directories) / f"file-{count}{suffix}"
        length = rng.choice([0, 1, 100, 4096, 5000, 20_000, 70_000, 131_073])
        # Half compressible, as real files are.
        path.write_bytes(
            rng.randbytes(length) if count % 2 else (b"line of text %d\n" % count * 9000)[:length]
        )
        path.chmod(rng.choice([0o600, 0o640, 0o644, 0o755, 0o444]))
        made.append(path)
    (root / "large").write_bytes(rng.randbytes(3_000_001))
    os.utime(root / "large", (1_400_000_000, 1_400_000_000))  # so that a change in the same second shows
    with (root / "sparse").open("wb") as file:
        file.seek(2_000_000)
        file.write(b"end")
    os.symlink("large", root / "link")
    os.symlink("nowhere", root / "dangling")
    (root / "empty directory").mkdir()
    (Path(os.fsdecode(os.fsencode(root) + b"/not-utf8-\xff\xfe"))).write_bytes(b"odd name")
    if hard_links:
        for count in range(5):
            os.link(made[count], directories[-1] / f"hard-{count}")
    for count, path in enumerate(sorted(made)):
        os.utime(path, (1_500_000_000 + count, 1_500_000_000 + 2 * count))
    return root


def change_tree(root: Path, seed: int = 2) -> None:
    """What a day does to it: files changed, appended to, removed, added, renamed."""
    rng = random.Random(seed)
    files = sorted(path for path in root.rglob("*.txt") if path.is_file())
    for count, path in enumerate(files):
        if count % 5 == 0:
            path.unlink()
        elif count % 5 == 1:
            path.chmod(0o644)
            path.write_bytes(rng.randbytes(30_000))
        elif count % 5 == 2:
            path.rename(path.with_name(f"renamed-{count}"))
    (root / "added").mkdir()
    for count in range(10):
        (root / "added" / f"new-{count}").write_bytes(rng.randbytes(10_000))
    with (root / "large").open("r+b") as file:
        file.seek(1_000_003)
        file.write(b"changed in the middle")


def contents(root: Path) -> Dict[str, Tuple[str, bytes]]:
    """Relative name -> (type, bytes or link target) of everything below ``root``."""
    found: Dict[str, Tuple[str, bytes]] = {}
    for directory, directories, files in os.walk(root):
        for name in directories + files:
            path = os.path.join(directory, name)
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                entry = ("link", os.fsencode(os.readlink(path)))
            elif stat.S_ISDIR(mode):
                entry = ("directory", b"")
            else:
                with open(path, "rb") as file:
                    entry = ("file", file.read())
            found[os.path.relpath(path, root)] = entry
    return found


def metadata(root: Path) -> Dict[str, Tuple[int, int]]:
    """Relative name -> (mode, modification time in seconds); links have their time only where they were given one."""
    return {
        os.path.relpath(path, root): (attributes.st_mode, int(attributes.st_mtime))
        for path in map(str, sorted(root.rglob("*")))
        for attributes in [os.lstat(path)]
    }


def same_contents(one: Path, other: Path) -> None:
    """Assert that two trees hold the same names, bytes and links."""
    first, second = contents(one), contents(other)
    assert sorted(first) == sorted(second)
    for name, entry in first.items():
        assert entry == second[name], f"{name} differs between {one} and {other}"


def run(
    *command: object,
    cwd: Optional[Path] = None,
    env: Optional[Mapping[str, str]] = None,
    ok: Tuple[int, ...] = (0,),
) -> str:
    """Run a program in a clean environment; returns its stdout, fails with its stderr."""
    assert shutil.which(str(command[0])), f"The tests need {command[0]}: see contrib/check."
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(cwd or "/nonexistent"),
        "LC_ALL": "C.UTF-8",
        **(env or {}),
    }
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    assert result.returncode in ok, (
        f"{command}: status {result.returncode}\n{result.stdout[-2000:]}{result.stderr[-4000:]}"
    )
    return result.stdout
