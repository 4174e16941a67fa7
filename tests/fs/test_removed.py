"""Files that libfuse replaces in two steps: whoever looks or opens meanwhile finds the old file or the new one, never none."""

from __future__ import annotations

import errno
import os
import threading
from typing import Any, Callable, List, Optional

import pytest

from sftp.fake_server import FakeServer, Fault, named
from sftpmount import waiting
from sftpmount.errors import FsError
from sftpmount.fs import removed
from sftpmount.fs.filesystem import Filesystem

WAIT_S = 20.0
HIDDEN = b"/.fuse_hidden0000000100000001"

Look = Callable[[Filesystem], int]


def stat_size(fs: Filesystem) -> int:
    return fs.getattr(b"/f").size


def open_size(fs: Filesystem) -> int:
    handle = fs.open(b"/f", os.O_RDONLY)
    try:
        return handle.file.size
    finally:
        fs.release(handle)


LOOKS = [pytest.param(stat_size, "lstat", id="stat"), pytest.param(open_size, "open", id="open")]


@pytest.fixture
def replacing(server: FakeServer, fs: Filesystem) -> Callable[[], None]:
    """/f is open, 3 bytes long, and a call replaces it by 5 bytes as libfuse does."""
    server.make(b"/home/f", b"old")
    server.make(b"/home/new", b"newer")
    fs.open(b"/f", os.O_RDONLY)
    fs.getattr(b"/new")

    def replace() -> None:
        fs.rename(b"/f", HIDDEN)
        fs.rename(b"/new", b"/f")

    return replace


@pytest.mark.parametrize("look, request_name", LOOKS)
def test_the_second_step_comes_before_the_answer(
    fs: Filesystem, replacing: Callable[[], None], look: Look, request_name: str
) -> None:
    """The server was asked between the steps; when its answer is judged, the replacement is over."""
    original = getattr(fs._remote, request_name)
    asked = []

    def overtaken(*arguments: Any) -> Any:
        if asked:
            return original(*arguments)
        asked.append(True)
        fs.rename(b"/f", HIDDEN)
        try:
            return original(*arguments)
        finally:
            fs.rename(b"/new", b"/f")

    fs._ns.distrust_path(b"/f")
    setattr(fs._remote, request_name, overtaken)
    assert look(fs) == 5
    assert asked


@pytest.mark.parametrize("look, request_name", LOOKS)
def test_the_first_step_is_on_its_way(
    server: FakeServer, fs: Filesystem, replacing: Callable[[], None], look: Look, request_name: str
) -> None:
    """The server has taken the name away already, and we have not heard of it yet."""
    hold = server.arm(Fault("hold", named("posix-rename")))
    replacement = threading.Thread(target=replacing)
    replacement.start()
    assert hold.fired.wait(WAIT_S)
    fs._ns.distrust_path(b"/f")
    sizes = []
    looking = threading.Thread(target=lambda: sizes.append(look(fs)))
    looking.start()
    hold.release()
    replacement.join(WAIT_S)
    looking.join(WAIT_S)
    assert sizes in ([3], [5])


def test_what_is_only_removed_is_absent(fs: Filesystem, replacing: Callable[[], None]) -> None:
    fs.rename(b"/f", HIDDEN)
    with pytest.raises(FsError, match="No such file"):
        fs.getattr(b"/f")


def test_who_looks_does_not_wait_once_libfuse_has_gone_on(
    server: FakeServer, fs: Filesystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unlink of an open file begins like a replacement; the thread that it came in tells which it was."""
    over = threading.Event()
    monkeypatch.setattr(waiting, "end_of_operation", lambda: over.is_set)
    monkeypatch.setattr(removed, "REPLACE_S", 60.0)
    handle = fs.create(b"/f", os.O_RDWR | os.O_CREAT, 0o644)
    fs.rename(b"/f", HIDDEN)
    found: List[Optional[int]] = []

    def look() -> None:
        try:
            fs.getattr(b"/f")
        except FsError as error:
            found.append(error.errno)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive(), "the second step may still come"
    over.set()
    thread.join(WAIT_S)
    assert found == [errno.ENOENT]
    fs.release(handle)


@pytest.mark.parametrize("is_over", [True, False])
def test_a_hard_link_is_renamed_to_the_name_that_was_just_removed(
    server: FakeServer, fs: Filesystem, monkeypatch: pytest.MonkeyPatch, is_over: bool
) -> None:
    """POSIX leaves both names where one of them replaces the other, but the one was removed: nothing is replaced."""
    monkeypatch.setattr(waiting, "end_of_operation", lambda: lambda: is_over)
    monkeypatch.setattr(removed, "REPLACE_S", 60.0)
    handle = fs.create(b"/f", os.O_RDWR | os.O_CREAT, 0o644)
    fs.link(b"/f", b"/g")
    fs.rename(b"/f", HIDDEN)
    if is_over:  # the kernel looks at both names before it renames
        with pytest.raises(FsError, match="No such file"):
            fs.getattr(b"/f")
    fs.rename(b"/g", b"/f")
    assert server.has(b"/home/f") and server.has(b"/home/g") != is_over
    fs.release(handle)


def test_a_file_that_is_released_while_it_is_removed_is_not_left_behind(
    server: FakeServer, fs: Filesystem
) -> None:
    """The kernel does not wait for a release, and a release may take its time."""
    handle = fs.create(b"/f", os.O_RDWR | os.O_CREAT, 0o644)
    moving = server.arm(Fault("hold", named("posix-rename")))
    removing = threading.Thread(target=fs.rename, args=(b"/f", HIDDEN))
    removing.start()
    assert moving.fired.wait(WAIT_S)
    fs.release(handle)
    moving.release()
    removing.join(WAIT_S)
    assert server.root.children[b"home"].children == {}
