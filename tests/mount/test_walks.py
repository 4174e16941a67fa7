"""Programs that go through whole trees, for which much is fetched ahead and sent later: they see what the server has."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path
from typing import Dict, List, Tuple

import pytest

from mount.helpers import Here, noise

OLD = 1_400_000_000
LIMIT_S = 120.0


def make_tree(path: Path, *, directories: int = 6, files: int = 30) -> None:
    """Small files of many sizes in some directories, one below the other, with modes and times of their own."""
    made: List[Path] = [path]
    path.mkdir(exist_ok=True)
    for count in range(directories):
        made.append(made[count // 2] / f"d{count}")
        made[-1].mkdir(0o750)
    for count in range(files):
        file = made[count % len(made)] / f"file-{count * 7 % files}"
        file.write_bytes(noise(count * 700, count))
        file.chmod(0o600 | count % 8)
        os.utime(file, (OLD + count, OLD + count))
    os.symlink("file-0", path / "link")
    os.utime(path / "link", (OLD, OLD), follow_symlinks=False)
    for count, directory in enumerate(reversed(made)):
        os.utime(directory, (OLD - count, OLD - count))


def run(*command: object) -> bytes:
    done = subprocess.run([*map(str, command)], capture_output=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def members(tar: bytes) -> Dict[str, Tuple[object, ...]]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        return {
            each.name: (
                each.type,
                each.mode,
                each.mtime,
                each.linkname,
                archive.extractfile(each).read() if each.isfile() else b"",  # type: ignore[union-attr]
            )
            for each in archive
        }


@pytest.mark.parametrize("order", ["name", "inode", "none"])
def test_tar_of_a_tree_that_was_not_seen_before(here: Here, order: str) -> None:
    make_tree(here.served)
    assert members(run("tar", f"--sort={order}", "-C", here.path, "-cf", "-", ".")) == members(
        run("tar", "-C", here.served, "-cf", "-", ".")
    )


def test_find_shows_what_the_server_has(here: Here) -> None:
    make_tree(here.served)
    every = "%P %y %m %U %G %T@ %l"  # sizes and link counts of directories are each file system's own
    command = ["find", ".", "-type", "f", "-printf", f"{every} %s %n\\n", "-o", "-printf", f"{every}\\n"]
    shown, there = (
        sorted(subprocess.run(command, cwd=path, capture_output=True, check=True).stdout.splitlines())
        for path in here
    )
    assert shown == there
    assert run("find", here.path, "-ls").count(b"\n") == run("find", here.served, "-ls").count(b"\n")


def test_rsync_finds_nothing_left_to_do(here: Here, tmp_path: Path) -> None:
    make_tree(tmp_path / "source")
    run("rsync", "-a", f"{tmp_path / 'source'}/", f"{here.path}/copy/")
    assert run("rsync", "-anic", f"{tmp_path / 'source'}/", f"{here.path}/copy/") == b""
    assert run("rsync", "-a", "-i", f"{here.path}/copy/", f"{tmp_path / 'back'}/") != b""
    assert run("rsync", "-anic", f"{tmp_path / 'source'}/", f"{tmp_path / 'back'}/") == b""


def test_a_directory_is_forbidden_and_allowed_again(here: Here) -> None:
    """As `chmod -R u+w` does before `rm -r`."""
    directory = here.path / "d"
    (directory / "e").mkdir(parents=True)
    (directory / "e" / "f").write_bytes(b"x")
    for path in (directory / "e", directory):
        path.chmod(0o500)
    for path in (directory, directory / "e"):
        path.chmod(0o700)
    run("rm", "-r", directory)
    assert not (here.served / "d").exists()


def test_a_file_that_is_removed_before_it_is_read(here: Here) -> None:
    """As shells do with here-documents."""
    path = here.path / "temporary"
    path.write_bytes(b"what was written")
    with path.open("rb") as file:
        path.unlink()
        assert file.read() == b"what was written"
    assert not (here.served / "temporary").exists()
