"""Backups to a mount of each server: twice, verified by the tool, restored, compared byte for byte; and what lies on the server."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Iterator

import pytest

from interop.servers import SERVERS
from interop.table import load
from support.mount import Mount
from support.process import wait_until
from tools.trees import change_tree, contents, make_tree, run, same_contents

pytestmark = pytest.mark.long


@pytest.fixture(params=SERVERS)
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mount]:
    with SERVERS[request.param](tmp_path) as server:
        with Mount(server, tmp_path / "mounts") as mount:
            yield mount
            assert mount.unmount() == 0


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "source", files=40)


def test_restic(mounted: Mount, source: Path, tmp_path: Path) -> None:
    env = {"RESTIC_PASSWORD": "secret", "RESTIC_CACHE_DIR": str(tmp_path / "cache")}
    restic = ("restic", "-r", mounted.path / "repository")
    run(*restic, "init", env=env)
    for change in (lambda: None, lambda: change_tree(source)):
        change()
        run(*restic, "backup", ".", cwd=source, env=env)
    run(*restic, "check", "--read-data", env=env)
    run(*restic, "restore", "latest", "--target", tmp_path / "restored", env=env)
    same_contents(source, tmp_path / "restored")
    run(*restic, "forget", "--keep-last", "1", "--prune", env=env)
    run(*restic, "check", env=env)


def test_borg(mounted: Mount, source: Path, tmp_path: Path) -> None:
    env = {"BORG_PASSPHRASE": "secret", "BORG_BASE_DIR": str(tmp_path / "borg")}
    repository = mounted.path / "repository"
    run("borg", "init", "--encryption=repokey", repository, env=env)
    run("borg", "create", f"{repository}::first", ".", cwd=source, env=env)
    change_tree(source)
    run("borg", "create", f"{repository}::second", ".", cwd=source, env=env)
    run("borg", "check", "--verify-data", repository, env=env)
    (tmp_path / "restored").mkdir()
    run("borg", "extract", f"{repository}::second", cwd=tmp_path / "restored", env=env)
    same_contents(source, tmp_path / "restored")


def test_rsync(mounted: Mount, source: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    server = load()["servers"][request.node.callspec.params["mounted"]]
    what = "-a" if server["mount"]["symbolic link"] == "as a local disk" else "-rt"
    for change in (lambda: None, lambda: change_tree(source)):
        change()
        run("rsync", what, "--delete", f"{source}/", f"{mounted.path}/copy/")
    if what != "-a":
        for path in source.rglob("*"):
            if path.is_symlink():
                path.unlink()
    compared = run("rsync", f"{what}nci", "--delete", f"{source}/", f"{mounted.path}/copy/")
    assert not [line for line in compared.splitlines() if line.startswith((">f", "*deleting"))], compared
    with contextlib.suppress(
        TimeoutError
    ):  # rclone stores behind the close; the comparison says what is missing
        wait_until(lambda: contents(mounted.served / "copy") == contents(source), 20.0, "the last files")
    same_contents(source, mounted.served / "copy")
