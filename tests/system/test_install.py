"""contrib/install puts its files where they are looked for and takes them away; sdist and wheel carry all of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import List, Set

import pytest

from support.mount import CHECKOUT, fuse_mounts
from support.process import wait_until
from support.sshd import Sshd
from system.scratch import INSTALL, WAIT_S, install, write_command

# What mount(8), man(1), the shells and systemd look for, with the default prefix.
EXPECTED = {
    "sbin/mount.sftpmount",
    "sbin/mount.fuse.sftpmount",
    "usr/local/share/man/man1/sftpmount.1",
    "usr/local/share/man/man8/mount.sftpmount.8",
    "usr/local/share/bash-completion/completions/sftpmount",
    "usr/local/share/zsh/site-functions/_sftpmount",
    "usr/local/share/fish/vendor_completions.d/sftpmount.fish",
    "usr/local/lib/systemd/system/sftpmount@.service",
    *(
        f"usr/local/share/doc/sftpmount/examples/{each.name}"
        for each in (CHECKOUT / "contrib" / "systemd" / "example").iterdir()
    ),
}


def files_in(root: Path) -> Set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}


@pytest.fixture
def command(tmp_path: Path) -> Path:
    return write_command(tmp_path / "sftpmount")


def test_everything_is_where_it_is_looked_for_and_goes_again(command: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for _ in range(2):  # the second time over the first
        named = install(root, command)
        assert {os.path.relpath(line, root) for line in named} == files_in(root) == EXPECTED
    theirs = root / "sbin" / "mount.nfs"
    theirs.touch()
    install(root, command, "--uninstall")
    assert files_in(root) == {"sbin/mount.nfs"}
    assert not (root / "usr" / "local" / "share" / "doc" / "sftpmount").exists()


def test_the_examples_that_readme_puts_in_place_are_there() -> None:
    text = (CHECKOUT / "README.md").read_text()
    named = " ".join(re.findall(r"^install -m \d+ (.*?) /etc/", text, re.MULTILINE)).split()
    examples = CHECKOUT / "contrib" / "systemd" / "example"
    found = {path.name for pattern in named for path in examples.glob(pattern)}
    assert found == {"nightly", "restic-backup.service", "restic-backup.timer", "mail-to-root@.service"}


def test_the_prefix_and_the_command_reach_what_runs_it(command: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    install(root, command, "--prefix=/usr")
    for name in ("mount.sftpmount", "mount.fuse.sftpmount"):
        helper = root / "sbin" / name
        assert f"\nexec {command} mount-helper" in helper.read_text() and os.access(helper, os.X_OK)
    unit = (root / "usr" / "lib" / "systemd" / "system" / "sftpmount@.service").read_text()
    assert re.search(rf"^ExecStart={re.escape(str(command))} -f ", unit, re.MULTILINE)
    page = root / "usr" / "share" / "man" / "man1" / "sftpmount.1"
    assert page.read_bytes() == (CHECKOUT / "contrib" / "man" / "sftpmount.1").read_bytes()
    assert page.stat().st_mode & 0o777 == 0o644


def test_a_link_that_is_in_the_way_is_replaced_not_followed(command: Path, tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    elsewhere.write_text("somebody's")
    (root / "sbin").mkdir(parents=True)
    (root / "sbin" / "mount.sftpmount").symlink_to(elsewhere)
    install(root, command)
    assert elsewhere.read_text() == "somebody's" and not (root / "sbin" / "mount.sftpmount").is_symlink()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--prefix=usr"], "--prefix=usr: write an absolute path."),
        (["--command=sftpmount"], "--command=sftpmount: write an absolute path."),
        (["--unistall"], "--unistall is not known: see install --help."),
        (["--command=/opt/my programs/sftpmount"], "put the command where its path needs no quoting."),
        ([], "there is no sftpmount in PATH: name it with --command=FILE."),
    ],
)
def test_what_is_refused_installs_nothing(words: List[str], sentence: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    done = subprocess.run(
        [str(INSTALL), *words],
        env={"PATH": "/usr/bin:/bin", "DESTDIR": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and sentence in done.stderr and done.stderr.count("\n") == 1
    assert files_in(root) == set()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_clean_environment_gets_a_working_command(sshd: Sshd, tmp_path: Path) -> None:
    """sdist -> wheel -> a fresh virtual environment -> a mount; nothing but pip's index is asked."""
    source = tmp_path / "source"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info")
    shutil.copytree(CHECKOUT, source, ignore=unwanted)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }

    def run(*words: object, cwd: Path = tmp_path) -> str:
        done = subprocess.run(
            [str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    run(sys.executable, "-m", "venv", tmp_path / "builder")
    builder = tmp_path / "builder" / "bin" / "python"
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    run(builder, *pip, "install", "setuptools>=61", "wheel")
    run(
        builder,
        "-c",
        f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})",
        cwd=source,
    )
    (sdist,) = tmp_path.glob("sftpmount-*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    carried = {str(path.relative_to(source)) for path in (source / "contrib").rglob("*") if path.is_file()}
    assert carried <= packed and {"README.md", "SSHFS.md", "LICENSE", "tests/conftest.py"} <= packed
    run(builder, *pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, sdist)
    (wheel,) = tmp_path.glob("*.whl")

    clean = tmp_path / "clean"
    run(sys.executable, "-m", "venv", clean)
    run(clean / "bin" / "python", *pip, "install", wheel)
    command = clean / "bin" / "sftpmount"
    assert run(command, "--version").startswith("sftpmount ")
    assert (clean / "share" / "man" / "man1" / "sftpmount.1").is_file()
    # From the wheel, with the wheel's own command.
    root = tmp_path / "root"
    environment["DESTDIR"] = str(root)
    run(clean / "share" / "sftpmount" / "contrib" / "install")
    assert files_in(root) == EXPECTED
    assert f"exec {command} mount-helper" in (root / "sbin" / "mount.sftpmount").read_text()

    mnt = tmp_path / "mnt"
    mnt.mkdir()
    options = (
        f"port={sshd.port},IdentityFile={sshd.user_key},UserKnownHostsFile={sshd.known_hosts},ssh_config=none"
    )
    run(root / "sbin" / "mount.sftpmount", f"{sshd.user}@127.0.0.1:{sshd.tree}", mnt, "-o", f"rw,{options}")
    try:
        (mnt / "from the wheel").write_text("stored")
    finally:
        run("fusermount3", "-u", mnt)
    wait_until(lambda: str(mnt) not in [path for path, _ in fuse_mounts()], WAIT_S, "the unmount")
    assert (sshd.tree / "from the wheel").read_text() == "stored"
