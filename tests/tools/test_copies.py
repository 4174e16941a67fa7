"""rsync, cp and tar, in and out."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mount.helpers import fsync_directory
from support.mount import Mount
from tools.trees import change_tree, make_tree, metadata, run, same_contents


def transferred(statistics: str) -> int:
    found = re.search(r"Number of regular files transferred: ([\d,]+)", statistics)
    assert found is not None, statistics
    return int(found.group(1).replace(",", ""))


def test_rsync_twice(mount: Mount, tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source", hard_links=True)
    command = ["rsync", "-aH", "--stats", f"{source}/", f"{mount.path}/copy/"]
    assert transferred(run(*command)) > 100
    same_contents(source, mount.served / "copy")
    fsync_directory(mount.path / "copy")
    assert metadata(source) == metadata(mount.served / "copy")
    for count in range(5):
        (linked,) = (mount.served / "copy").rglob(f"hard-{count}")
        assert linked.stat().st_nlink == 2
    statistics = run(*command)
    assert transferred(statistics) == 0
    assert "Total transferred file size: 0 bytes" in statistics
    assert run("rsync", "-aHin", "--delete", f"{source}/", f"{mount.path}/copy/") == ""

    change_tree(source)
    assert transferred(run(*command[:2], "--delete", *command[2:])) > 10
    same_contents(source, mount.served / "copy")
    same_contents(source, mount.path / "copy")


def test_rsync_compares_checksums_and_finds_nothing_to_do(mount: Mount, tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source", files=40)
    run("rsync", "-a", f"{source}/", f"{mount.path}/copy/")
    assert run("rsync", "-ainc", f"{source}/", f"{mount.path}/copy/") == ""


def test_rsync_with_link_dest(mount: Mount, tmp_path: Path) -> None:
    """A new generation shares what has not changed with the last one."""
    source = make_tree(tmp_path / "source", files=40)
    run("rsync", "-a", f"{source}/", f"{mount.path}/day1/")
    (source / "large").write_bytes(b"changed")
    run("rsync", "-a", "--link-dest=../day1", f"{source}/", f"{mount.path}/day2/")
    same_contents(source, mount.served / "day2")
    shared = changed = 0
    for path in (mount.served / "day2").rglob("*"):
        twin = mount.served / "day1" / path.relative_to(mount.served / "day2")
        if path.is_file() and not path.is_symlink():
            shared += os.path.samefile(path, twin)
            changed += not os.path.samefile(path, twin)
    assert changed == 1
    assert shared > 40


def test_rsync_out(mount: Mount, tmp_path: Path) -> None:
    source = make_tree(mount.served / "source", hard_links=True)
    run("rsync", "-a", f"{mount.path}/source/", f"{tmp_path}/copy/")
    same_contents(source, tmp_path / "copy")
    assert metadata(source) == metadata(tmp_path / "copy")


def test_cp_in_and_out(mount: Mount, tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source", hard_links=True)
    run("cp", "-a", source, mount.path / "copy")
    same_contents(source, mount.served / "copy")
    fsync_directory(mount.path / "copy")
    assert metadata(source) == metadata(mount.served / "copy")
    (linked,) = (mount.served / "copy").rglob("hard-1")
    assert linked.stat().st_nlink == 2
    run("cp", "-a", mount.path / "copy", tmp_path / "back")
    same_contents(source, tmp_path / "back")
    assert metadata(source) == metadata(tmp_path / "back")


def test_tar_in_and_out(mount: Mount, tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source", hard_links=True)
    run("tar", "-C", source, "-cf", mount.path / "archive.tar", ".")
    run("tar", "-C", source, "-czf", mount.path / "archive.tar.gz", ".")
    run("tar", "-C", source, "-df", mount.served / "archive.tar")
    (mount.path / "tree").mkdir()
    run("tar", "-C", mount.path / "tree", "-xpf", mount.path / "archive.tar.gz")
    same_contents(source, mount.served / "tree")
    fsync_directory(mount.path / "tree")
    assert metadata(source) == metadata(mount.served / "tree")
    (tmp_path / "back").mkdir()
    run("tar", "-C", mount.path / "tree", "-cf", tmp_path / "back.tar", ".")
    run("tar", "-C", tmp_path / "back", "-xpf", tmp_path / "back.tar")
    same_contents(source, tmp_path / "back")
    assert metadata(source) == metadata(tmp_path / "back")


def test_mv_into_the_mount_and_rm(mount: Mount, tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source", files=40)
    run("cp", "-a", source, tmp_path / "twin")
    run("mv", source, mount.path / "moved")
    assert not source.exists()
    same_contents(tmp_path / "twin", mount.served / "moved")
    run("mv", mount.path / "moved", mount.path / "again")
    same_contents(tmp_path / "twin", mount.path / "again")
    run("rm", "-r", mount.path / "again")
    assert list(mount.served.iterdir()) == []
