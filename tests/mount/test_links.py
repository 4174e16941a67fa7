"""A server that leads away from the mount, and programs that need links that lead out of it."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import Callable

import pytest

from mount.helpers import refused
from support.mount import Mount
from support.process import program
from support.sshd import Sshd


@pytest.fixture
def served(sshd: Sshd, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = sshd.tree / tmp_path_factory.mktemp("links").name
    directory.mkdir()
    return directory


def test_a_rogue_link_is_not_followed_where_links_are_contained(
    sshd: Sshd, served: Path, make_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("local")
    (served / "directory").symlink_to(secret)
    (served / "up").symlink_to("../" * 20 + str(secret)[1:])
    (served / "inside").symlink_to("file")
    (served / "file").write_text("remote")
    mount = make_mount(sshd, "-o", "contain_symlinks", directory=str(served))
    assert (mount.path / "inside").read_text() == "remote"
    for name in ("directory", "up"):
        with refused(errno.EPERM):
            (mount.path / name / "key").read_text()
        with refused(errno.EPERM):
            (mount.path / name / "new").write_text("from the mount")
        with refused(errno.EPERM):
            os.readlink(mount.path / name)
    assert sorted(os.listdir(secret)) == ["key"]
    (mount.path / "directory").unlink()  # the link itself is the mount's
    assert not (served / "directory").is_symlink()


def test_absolute_links_into_the_mount_lead_there_where_they_are_transformed(
    sshd: Sshd, served: Path, make_mount: Callable[..., Mount]
) -> None:
    (served / "d").mkdir()
    (served / "d" / "link").symlink_to(served / "file")
    (served / "file").write_text("remote")
    mount = make_mount(sshd, "-o", "contain_symlinks,transform_symlinks", directory=str(served))
    assert os.readlink(mount.path / "d" / "link") == "../file"
    assert (mount.path / "d" / "link").read_text() == "remote"


def test_what_leads_out_is_in_the_log(sshd: Sshd, served: Path, make_mount: Callable[..., Mount]) -> None:
    (served / "link").symlink_to("/etc/\x1b]0;x\x07")
    mount = make_mount(sshd, directory=str(served))
    assert os.readlink(mount.path / "link") == "/etc/\x1b]0;x\x07"
    assert "leads out of the mount" in mount.log_text()
    assert "\x1b" not in mount.log_text() and "\x07" not in mount.log_text()


def test_dpkg_installs_what_has_absolute_links(
    sshd: Sshd, served: Path, make_mount: Callable[..., Mount], tmp_path: Path
) -> None:
    """A file, an absolute link and one that an upgrade replaces; dpkg's own database is on the mount, too. The owner in
    the package is who runs the test: nobody but root may give files away."""
    mount = make_mount(sshd, directory=str(served))
    database = mount.path / "var/lib/dpkg"
    for directory in ("info", "updates", "triggers", "parts"):
        (database / directory).mkdir(parents=True)
    (database / "status").touch()
    for version in ("1", "2"):
        package = tmp_path / version
        (package / "DEBIAN").mkdir(parents=True)
        (package / "DEBIAN/control").write_text(
            f"Package: linked\nVersion: {version}\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
        )
        (package / "etc").mkdir()
        (package / "etc/absolute").symlink_to("/etc/passwd")
        (package / "etc/changing").symlink_to(f"/opt/{version}")
        (package / "etc/file").write_text(version)
        deb = tmp_path / f"{version}.deb"
        build = [program("dpkg-deb", "dpkg"), "--build", str(package), str(deb)]
        subprocess.run(build, check=True, capture_output=True)
        install = [
            "dpkg",
            f"--root={mount.path}",
            "--force-not-root",
            "--force-bad-path",  # /sbin is not in everybody's
            "--force-script-chrootless",
            "--log=/dev/null",
            "--install",
            str(deb),
        ]
        answer = subprocess.run(install, capture_output=True, text=True, timeout=100.0)
        assert answer.returncode == 0, answer.stderr
        assert (
            os.readlink(served / "etc/absolute") == os.readlink(mount.path / "etc/absolute") == "/etc/passwd"
        )
        assert (
            os.readlink(served / "etc/changing")
            == os.readlink(mount.path / "etc/changing")
            == f"/opt/{version}"
        )
        assert (served / "etc/file").read_text() == version
    check = ["dpkg", f"--root={mount.path}", "--verify", "linked"]
    assert subprocess.run(check, capture_output=True, text=True, timeout=60.0).stdout == ""
