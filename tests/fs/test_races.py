"""What the server tells one thread while another changes the same names: answers that come late, or before our own."""

from __future__ import annotations

import os
import stat
import threading
from typing import Any, Callable, List

import pytest

from fs.conftest import START_S, Clock
from fs.test_filesystem import NEW, WAIT_S, Mount, get, names, put, refused
from sftp.fake_server import FakeServer, Fault, named
from sftpmount.fs.filesystem import Filesystem
from sftpmount.fs.removed import PREFIX

OLD = int(START_S) - 1000
MakeServer = Callable[..., FakeServer]


def behind(owner: Any, name: str, act: Callable[[], object], times: int = 1) -> None:
    """The next ``times`` calls of ``owner``'s method return only after ``act``: the server has done its work by then."""
    method, left = getattr(owner, name), [None] * times

    def answered_late(*arguments: Any, **more: Any) -> Any:
        result = method(*arguments, **more)
        if left:
            left.pop()
            act()
        return result

    setattr(owner, name, answered_late)


def read_ahead(fs: Filesystem, path: bytes) -> None:
    """As ``FilesAhead`` does in a thread of its own."""
    fs._files_ahead._fetch([path])


class TestOlderAnswers:
    """An answer is taken in after a newer one."""

    @pytest.mark.parametrize("ahead", [False, True])
    def test_a_listing_and_a_file_that_was_opened_meanwhile(
        self, server: FakeServer, fs: Filesystem, ahead: bool
    ) -> None:
        server.make_dir(b"/home/d")
        server.make(b"/home/d/a", b"a")
        fs.getattr(b"/d/a")
        opened: List[Any] = []

        def another_makes_it() -> None:
            server.make(b"/home/d/f", b"another's")
            opened.append(fs.open(b"/d/f", os.O_RDWR))
            fs.write(opened[0], b"x" * 20, 0)

        behind(fs._remote, "list_on", another_makes_it)
        if ahead:
            fs._listings._list(b"/d", 1000)
        else:
            fs.readdir(b"/d")
        (handle,) = opened
        assert fs._ns.path_of(handle.node) == b"/d/f"
        assert fs.getattr(b"/d/f") == fs.stat_of(handle.node)
        assert fs.getattr(b"/d/f").size == 20
        fs.rename(b"/d/f", b"/d/g")
        server.cut()
        fs.fsync(handle)
        assert server.disk(b"/home/d/g") == b"x" * 20
        fs.release(handle)

    def test_a_listing_and_the_size_of_a_file_that_was_opened_meanwhile(
        self, server: FakeServer, fs: Filesystem
    ) -> None:
        server.make_dir(b"/home/d")
        server.make(b"/home/d/f", b"short", mtime=OLD)
        opened: List[Any] = []

        def another_writes_it() -> None:
            server.make(b"/home/d/f", b"much longer", mtime=OLD + 1)
            opened.append(fs.open(b"/d/f", os.O_RDONLY))

        behind(fs._remote, "list_on", another_writes_it)
        fs.readdir(b"/d")
        assert fs.getattr(b"/d/f").size == 11, "the kernel cuts reads at what it is told"
        assert fs.read(opened[0], 100, 0) == b"much longer"
        fs.release(opened[0])

    def test_a_name_that_was_absent(self, server: FakeServer, fs: Filesystem) -> None:
        server.make_dir(b"/home/d")
        mark = fs._ns.mark()
        server.make(b"/home/d/f", b"another's")
        handle = fs.open(b"/d/f", os.O_RDONLY)
        fs._ns.told_absent(b"/d/f", mark)
        assert fs._ns.path_of(handle.node) == b"/d/f"
        assert fs.getattr(b"/d/f").size == 9
        fs.release(handle)


class TestOwnChangesBehindTheQuestion:
    """The server has answered; we change something before the answer is taken in."""

    def test_what_is_read_ahead_of_a_file_that_became_a_directory(
        self, server: FakeServer, fs: Filesystem, clock: Clock
    ) -> None:
        server.make(b"/home/x", b"file", mtime=OLD)
        fs.readdir(b"/")
        opened: List[Any] = []

        def replace() -> None:
            fs.unlink(b"/x")
            fs.mkdir(b"/x", 0o755)
            opened.append(fs.create(b"/x/f", NEW, 0o644))
            fs.write(opened[0], b"abc", 0)

        behind(fs._remote, "read_whole_on", replace)
        read_ahead(fs, b"/x")
        (handle,) = opened
        assert stat.S_ISDIR(fs.getattr(b"/x").mode)
        assert fs._ns.path_of(handle.node) == b"/x/f"
        clock.s += fs.lifetime_s + 1
        assert stat.S_ISDIR(fs.getattr(b"/x").mode)
        assert fs._ns.path_of(handle.node) == b"/x/f"
        fs.rename(b"/x", b"/y")
        server.cut()
        fs.fsync(handle)
        assert server.disk(b"/home/y/f") == b"abc"
        fs.release(handle)

    @pytest.mark.parametrize("how", ["rename", "create"])
    def test_what_is_read_ahead_of_a_file_that_is_another_now(
        self, server: FakeServer, fs: Filesystem, how: str
    ) -> None:
        server.make(b"/home/x", b"old file", mtime=OLD, mode=0o600)
        fs.readdir(b"/")
        opened: List[Any] = []

        def replace() -> None:
            if how == "create":
                fs.unlink(b"/x")
                opened.append(fs.create(b"/x", NEW, 0o644))
            else:
                opened.append(fs.create(b"/t", NEW, 0o644))
                fs.rename(b"/t", b"/x")
            fs.write(opened[0], b"abc", 0)

        behind(fs._remote, "read_whole_on", replace)
        read_ahead(fs, b"/x")
        shown = fs.getattr(b"/x")
        assert (shown.size, stat.S_IMODE(shown.mode), shown.ino) == (3, 0o644, opened[0].node.ino)
        fs.flush(opened[0])
        fs.release(opened[0])
        assert get(fs, b"/x") == b"abc"

    def test_what_is_read_ahead_of_a_file_that_was_written_meanwhile(
        self, server: FakeServer, fs: Filesystem, clock: Clock
    ) -> None:
        """In the same second, and as long: neither size nor mtime tell."""
        server.make(b"/home/f", b"old bytes")
        fs.readdir(b"/")
        behind(fs._remote, "read_whole_on", lambda: put(fs, b"/f", b"new bytes"))
        read_ahead(fs, b"/f")
        clock.s += 10
        assert get(fs, b"/f") == b"new bytes"

    @pytest.mark.parametrize("change", ["another directory", "its mode", "its times"])
    @pytest.mark.parametrize("ask", ["getattr", "open"])
    def test_what_another_stored_before_we_asked(
        self, server: FakeServer, fs: Filesystem, clock: Clock, change: str, ask: str
    ) -> None:
        server.make(b"/home/f", b"old bytes", mtime=OLD)
        server.make_dir(b"/home/d")
        assert get(fs, b"/f") == b"old bytes"
        fs.getattr(b"/d")
        act = {
            "another directory": lambda: fs.rename(b"/d", b"/e"),
            "its mode": lambda: fs.chmod(b"/f", 0o600),
            "its times": lambda: fs.utimens(b"/f", OLD, OLD),
        }[change]
        if ask == "getattr":
            clock.s += 3600
            if change != "another directory":
                fs.getattr(b"/f")
                fs._ns.distrust(fs._ns.get(b"/f"))
        server.make(b"/home/f", b"what another stored", mtime=OLD + 1)
        if ask == "getattr":
            behind(fs._remote, "lstat", act)
            assert fs.getattr(b"/f").size == 19
        else:
            behind(fs._remote, "open", act)
            assert get(fs, b"/f") == b"what another stored"
        if change == "its mode":
            assert stat.S_IMODE(fs.getattr(b"/f").mode) == 0o600

    def test_what_another_wrote_within_the_second_in_which_it_was_read(
        self, server: FakeServer, fs: Filesystem, clock: Clock
    ) -> None:
        server.make(b"/home/f", b"old bytes")
        assert get(fs, b"/f") == b"old bytes"
        server.make(b"/home/f", b"new bytes")
        for _ in range(2):
            clock.s += 10
            assert get(fs, b"/f") == b"new bytes"
        assert server.count("READ") == 2

    def test_a_directory_is_renamed_while_a_file_in_it_is_opened_late_and_the_line_breaks(
        self, server: FakeServer, fs: Filesystem
    ) -> None:
        fs.mkdir(b"/d", 0o755)
        fs.release(fs.create(b"/d/f", NEW, 0o644))
        handle = fs.open(b"/d/f", os.O_RDONLY)
        assert handle.unopened
        opening = server.arm(Fault("hold", named("OPEN")))
        reading = threading.Thread(target=fs.read, args=(handle, 10, 0))
        reading.start()
        assert opening.fired.wait(WAIT_S)
        moving = threading.Thread(target=fs.rename, args=(b"/d", b"/e"))
        attached: List[object] = []

        def attach() -> None:
            attached.append(fs._remote.fstat(handle.remote))

        looking = threading.Thread(target=attach)

        def break_off() -> None:
            server.cut()
            fs._remote.session()
            looking.start()
            looking.join(0.2)

        behind(fs._remote, "rename", break_off)
        moving.start()
        opening.release()
        for thread in (reading, moving, looking):
            thread.join(WAIT_S)
        assert len(attached) == 1 and handle.remote.path == b"/home/e/f"
        fs.release(handle)


class TestRemovedWhileOpen:
    def test_it_is_out_of_sight_from_the_first_moment_to_the_last(
        self, server: FakeServer, fs: Filesystem
    ) -> None:
        fs.mkdir(b"/d", 0o755)
        handle = fs.create(b"/d/f", NEW, 0o644)
        seen: List[bytes] = []
        behind(fs._remote, "rename", lambda: seen.extend(names(fs)))
        fs.rename(b"/d/f", b"/d/.fuse_hidden1")
        assert any(name.startswith(PREFIX) for name in server.tree())
        seen += names(fs)
        behind(fs._remote, "listdir", lambda: fs.release(handle))
        seen += names(fs)
        assert set(seen) == {b"d"}
        assert list(server.tree()) == [b"d"]

    def test_what_was_listed_ahead_before_it_went(self, server: FakeServer, fs: Filesystem) -> None:
        fs.mkdir(b"/d", 0o755)
        handle = fs.create(b"/d/f", NEW, 0o644)
        fs.rename(b"/d/f", b"/d/.fuse_hidden1")
        fs._listings._list(b"/", 1000)
        fs.release(handle)
        assert names(fs) == [b"d"]

    def test_a_line_that_breaks_behind_its_rename(self, make_server: MakeServer, mount: Mount) -> None:
        """It was the only name in the mount, by which a server without statvfs is known."""
        server = make_server(without=(b"statvfs@openssh.com",))
        fs = mount(server, retry_timeout_s=3.0)
        handle = fs.create(b"/f", NEW, 0o644)
        fs.write(handle, b"abc", 0)
        server.arm(Fault("cut after", named("posix-rename")))
        fs.rename(b"/f", b"/.fuse_hidden1")
        fs.fsync(handle)
        fs.release(handle)
        assert server.tree() == {}


def test_a_name_that_we_removed_does_not_tell_which_directory_is_mounted(
    make_server: MakeServer, mount: Mount
) -> None:
    """An older answer says that it is there still."""
    server = make_server(without=(b"statvfs@openssh.com",))
    server.make(b"/home/f", b"abc", mtime=OLD)
    fs = mount(server, retry_timeout_s=3.0)
    fs.readdir(b"/")
    behind(fs._remote, "read_whole_on", lambda: fs.unlink(b"/f"))
    read_ahead(fs, b"/f")
    server.cut()
    assert names(fs) == []


def test_a_directory_that_we_removed_is_not_guessed_back(make_server: MakeServer, mount: Mount) -> None:
    server = make_server(without=(b"statvfs@openssh.com",))
    server.make_dir(b"/home/d")
    fs = mount(server, retry_timeout_s=3.0)
    fs.readdir(b"/")
    behind(fs._remote, "list_on", lambda: fs.rmdir(b"/d"))
    fs._listings._list(b"/d", 1000)
    server.cut()
    assert names(fs) == []
    assert refused(lambda: fs.getattr(b"/d"))
