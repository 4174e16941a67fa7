"""Links that lead out of the mount: which they are, and what is shown of them."""

from __future__ import annotations

import errno
import stat
from typing import Callable, Optional

import pytest

from fs.test_filesystem import refused
from sftp.fake_server import FakeServer
from sftpmount.fs.filesystem import Filesystem
from sftpmount.fs.links import as_relative, leads_out

# (where the link is, its target, whether it may lead out)
TARGETS = [
    (b"/l", b"file", False),
    (b"/l", b"./a//b/.", False),
    (b"/l", b"a..b/...", False),
    (b"/l", b"..", True),
    (b"/l", b"/", True),
    (b"/l", b"/etc/passwd", True),
    (b"/l", b"//etc", True),
    (b"/l", b"../etc", True),
    (b"/d/l", b"..", False),
    (b"/d/l", b"../a", False),
    (b"/d/l", b"./../a", False),
    (b"/d/l", b"../..", True),
    (b"/d/e/l", b"../../a", False),
    (b"/d/e/l", b"../../../a", True),
    (b"/d/l", b"a/../b", True),  # a may be a link, and what is above it anywhere
    (b"/d/l", b"../a/..", True),
]


@pytest.mark.parametrize(("path", "target", "expected"), TARGETS)
def test_leads_out(path: bytes, target: bytes, expected: bool) -> None:
    assert leads_out(path, target) is expected


@pytest.mark.parametrize(
    ("root", "path", "target", "expected"),
    [
        (b"/srv", b"/l", b"/srv/a", b"a"),
        (b"/srv", b"/d/e/l", b"/srv/a/b", b"../../a/b"),
        (b"/srv", b"/l", b"/srv", b"."),
        (b"/srv", b"/d/l", b"/srv/", b".."),
        (b"/srv", b"/l", b"/srv//a", b"a"),
        (b"/srv", b"/l", b"/srv2/a", None),
        (b"/srv", b"/l", b"/etc/passwd", None),
        (b"/srv", b"/l", b"/srv/../etc", None),
        (b"/", b"/d/l", b"/etc/passwd", b"../etc/passwd"),
        (b"/", b"/l", b"/", b"."),
    ],
)
def test_as_relative(root: bytes, path: bytes, target: bytes, expected: Optional[bytes]) -> None:
    assert as_relative(root, path, target) == expected
    assert expected is None or not leads_out(path, expected)


def put_link(server: FakeServer, path: bytes, target: bytes) -> None:
    link = server.make(path, mode=0o777)
    link.mode, link.target = stat.S_IFLNK | 0o777, target


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, [b"/etc/passwd", b"/home/file", b"file"]),
        ({"contain_symlinks": True}, [None, None, b"file"]),
        ({"transform_symlinks": True}, [b"/etc/passwd", b"file", b"file"]),
        ({"contain_symlinks": True, "transform_symlinks": True}, [None, b"file", b"file"]),
    ],
)
def test_options(
    server: FakeServer,
    mount: Callable[..., Filesystem],
    options: dict[str, bool],
    shown: list[Optional[bytes]],
) -> None:
    fs = mount(server, **options)
    for name, target in ((b"/far", b"/etc/passwd"), (b"/near", b"/home/file"), (b"/plain", b"file")):
        put_link(server, b"/home" + name, target)
    for name, expected in zip((b"/far", b"/near", b"/plain"), shown):
        for _ in range(2):  # asked for, and remembered
            if expected is None:
                assert refused(lambda name=name: fs.readlink(name)) == errno.EPERM
            else:
                assert fs.readlink(name) == expected


def test_the_log_names_what_a_server_leads_out(
    server: FakeServer, fs: Filesystem, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sftpmount.fs.links.LINKS_TOLD_MAX", 3)
    for number in range(5):
        put_link(server, b"/home/%d" % number, b"/etc/%d" % number)
    put_link(server, b"/home/inside", b"0")
    fs.symlink(b"/etc/ours", b"/ours")
    for name in (b"/inside", b"/ours", b"/0", b"/0", b"/1", b"/2", b"/3", b"/4"):
        fs.readlink(name)
    told = [record.getMessage() for record in caplog.records if "leads out" in record.getMessage()]
    assert [f"b'/etc/{number}'" in line for number, line in enumerate(told)] == [True] * 3
    assert ["further" in line for line in told] == [False, False, True]


def test_a_link_that_is_replaced_is_named_again(
    server: FakeServer, mount: Callable[..., Filesystem], caplog: pytest.LogCaptureFixture
) -> None:
    fs = mount(server, dir_cache_timeout_s=0.0)
    put_link(server, b"/home/l", b"/etc/one")
    assert fs.readlink(b"/l") == b"/etc/one"
    put_link(server, b"/home/l", b"/etc/other")
    assert fs.readlink(b"/l") == b"/etc/other"
    assert "/etc/other" in caplog.text
