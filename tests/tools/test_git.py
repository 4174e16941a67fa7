"""git's working tree on the mount: clone, commits, garbage collection, fsck."""

from __future__ import annotations

from pathlib import Path
from typing import Dict

from support.mount import Mount
from tools.trees import make_tree, run, same_contents

ENVIRONMENT: Dict[str, str] = {
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.org",
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
}


def git(directory: Path, *arguments: str) -> str:
    return run("git", *arguments, cwd=directory, env=ENVIRONMENT)


def test_clone_commit_gc_fsck(mount: Mount, tmp_path: Path) -> None:
    origin = make_tree(tmp_path / "origin", files=60)
    git(origin, "init", "-q", "-b", "main")
    git(origin, "add", "-A")
    git(origin, "commit", "-qm", "first")

    git(mount.path, "clone", "-q", f"file://{origin}", "work")
    work = mount.path / "work"
    for count in range(8):
        (work / f"new-{count}").write_bytes(b"%d\n" % count * 5000)
        (work / "changing").write_bytes(b"version %d\n" % count)
        git(work, "add", "-A")
        git(work, "commit", "-qm", f"commit {count}")
    git(work, "checkout", "-q", "-b", "branch", "HEAD~4")
    git(work, "checkout", "-q", "main")
    git(work, "mv", "new-1", "moved")
    git(work, "commit", "-qam", "moved")
    git(work, "gc", "-q", "--aggressive", "--prune=now")
    git(work, "fsck", "--full", "--strict")
    assert git(work, "status", "--porcelain") == ""
    assert len(git(work, "log", "--oneline").splitlines()) == 10
    git(work, "push", "-q", "origin", "main:pushed")
    same_contents(work, mount.served / "work")

    assert mount.unmount() == 0
    git(mount.served / "work", "fsck", "--full", "--strict")
    assert git(mount.served / "work", "status", "--porcelain") == ""
    assert (mount.served / "work" / "changing").read_bytes() == b"version 7\n"
    assert git(origin, "rev-parse", "pushed") == git(mount.served / "work", "rev-parse", "main")
