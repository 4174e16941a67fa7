"""Modes, owners, times, statvfs, and `ls -l` equal to the server's."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import time
from pathlib import Path
from typing import List

import pytest

from mount.helpers import UTIME_NOW, UTIME_OMIT, Here, is_root, noise, opened, refused, utimensat
from support.process import wait_until

OLD = 1_200_000_000


def times(path: Path) -> List[int]:
    """Access and modification time in whole seconds, which is what SFTP v3 carries, of the name itself."""
    attributes = os.lstat(path)
    return [int(attributes.st_atime), int(attributes.st_mtime)]


class TestMode:
    @pytest.mark.parametrize("mode", [0o000, 0o400, 0o644, 0o755, 0o777, 0o1777, 0o2755, 0o4755])
    def test_of_a_file(self, here: Here, mode: int) -> None:
        (here.path / "f").write_bytes(b"x")
        os.chmod(here.path / "f", mode)
        assert [stat.S_IMODE(path.stat().st_mode) for path in here.both("f")] == [mode, mode]

    def test_of_a_directory(self, here: Here) -> None:
        (here.path / "d").mkdir()
        for mode in (0o700, 0o755, 0o1777):
            os.chmod(here.path / "d", mode)
            assert stat.S_IMODE((here.path / "d").stat().st_mode) == mode
            there = here.served / "d"
            wait_until(lambda there=there, mode=mode: stat.S_IMODE(there.stat().st_mode) == mode, 10.0, "it")

    def test_of_a_new_directory_honours_umask(self, here: Here) -> None:
        previous = os.umask(0o077)
        try:
            (here.path / "d").mkdir(mode=0o755)
        finally:
            os.umask(previous)
        assert [stat.S_IMODE(path.stat().st_mode) for path in here.both("d")] == [0o700, 0o700]

    def test_by_handle_while_writing(self, here: Here) -> None:
        with opened(here.path / "f", os.O_CREAT | os.O_WRONLY, 0o600) as fd:
            os.write(fd, noise(100_000))
            os.fchmod(fd, 0o444)
            os.write(fd, b"more")
            assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o444
        assert stat.S_IMODE((here.served / "f").stat().st_mode) == 0o444
        assert (here.served / "f").read_bytes() == noise(100_000) + b"more"

    def test_through_a_symlink_changes_the_target(self, here: Here) -> None:
        (here.path / "f").write_bytes(b"")
        os.symlink("f", here.path / "link")
        os.chmod(here.path / "link", 0o600)
        assert stat.S_IMODE((here.served / "f").stat().st_mode) == 0o600

    def test_of_what_is_absent(self, here: Here) -> None:
        with refused(errno.ENOENT):
            os.chmod(here.path / "absent", 0o600)


class TestOwner:
    def test_own_ids(self, here: Here) -> None:
        (here.path / "f").write_bytes(b"")
        os.chown(here.path / "f", os.getuid(), os.getgid())
        os.chown(here.path / "f", -1, -1)
        for path in here.both("f"):
            assert (path.stat().st_uid, path.stat().st_gid) == (os.getuid(), os.getgid())

    def test_other_ids(self, here: Here) -> None:
        """root may give files away; anyone else is told EPERM, and nothing has changed."""
        (here.path / "f").write_bytes(b"data")
        if not is_root():
            with refused(errno.EPERM, errno.EACCES):
                os.chown(here.path / "f", 12345, -1)
            assert (here.served / "f").stat().st_uid == os.getuid()
            return
        os.chown(here.path / "f", 12345, 23456)
        assert [(path.stat().st_uid, path.stat().st_gid) for path in here.both("f")] == [(12345, 23456)] * 2
        os.chown(here.path / "f", -1, 34567)
        os.chown(here.path / "f", 45678, -1)
        assert [(path.stat().st_uid, path.stat().st_gid) for path in here.both("f")] == [(45678, 34567)] * 2

    def test_of_a_symlink_itself(self, here: Here) -> None:
        (here.path / "f").write_bytes(b"")
        os.symlink("f", here.path / "link")
        uid = 12345 if is_root() else os.getuid()
        os.chown(here.path / "link", uid, -1, follow_symlinks=False)
        assert [os.lstat(path).st_uid for path in here.both("link")] == [uid, uid]
        assert (here.served / "f").stat().st_uid == os.getuid()


class TestTimes:
    def test_given_times(self, here: Here) -> None:
        (here.path / "f").write_bytes(b"x")
        (here.path / "d").mkdir()
        for name in ("f", "d"):
            os.utime(here.path / name, (OLD, OLD + 5))
            assert times(here.path / name) == [OLD, OLD + 5]
            wait_until(lambda name=name: times(here.served / name) == [OLD, OLD + 5], 10.0, "the server's")

    def test_given_times_by_handle_with_unsaved_writes(self, here: Here) -> None:
        """cp -p and rsync set the times before the close that stores the last bytes."""
        with opened(here.path / "f", os.O_CREAT | os.O_WRONLY) as fd:
            os.write(fd, noise(300_000))
            os.utime(fd, (OLD, OLD + 5))
            assert int(os.fstat(fd).st_mtime) == OLD + 5
        assert times(here.path / "f")[1] == times(here.served / "f")[1] == OLD + 5
        assert (here.served / "f").read_bytes() == noise(300_000)

    def test_given_times_by_path_while_open_and_dirty(self, here: Here) -> None:
        with opened(here.path / "f", os.O_CREAT | os.O_WRONLY) as fd:
            os.write(fd, noise(10_000))
            os.utime(here.path / "f", (OLD, OLD + 5))
        assert times(here.path / "f")[1] == times(here.served / "f")[1] == OLD + 5

    def test_a_write_after_given_times_counts(self, here: Here) -> None:
        before = int(time.time())
        with opened(here.path / "f", os.O_CREAT | os.O_WRONLY) as fd:
            os.write(fd, b"x")
            os.utime(fd, (OLD, OLD))
            os.write(fd, b"y")
        for path in here.both("f"):
            assert times(path)[1] >= before - 1

    def test_a_write_shows_in_mtime_at_once(self, here: Here) -> None:
        (here.path / "f").write_bytes(b"x")
        os.utime(here.path / "f", (OLD, OLD))
        before = int(time.time())
        with opened(here.path / "f", os.O_WRONLY) as fd:
            os.write(fd, b"y")
            assert int(os.fstat(fd).st_mtime) >= before - 1
            assert times(here.path / "f")[1] >= before - 1
        assert times(here.path / "f")[1] == times(here.served / "f")[1] >= before - 1

    def test_reading_or_closing_does_not_change_mtime(self, here: Here) -> None:
        (here.path / "f").write_bytes(b"x")
        os.utime(here.path / "f", (OLD, OLD + 5))
        with opened(here.path / "f", os.O_RDWR) as fd:
            os.read(fd, 1)
        assert times(here.path / "f")[1] == times(here.served / "f")[1] == OLD + 5

    def test_now(self, here: Here) -> None:
        (here.path / "f").write_bytes(b"x")
        os.utime(here.path / "f", (OLD, OLD))
        before = int(time.time())
        os.utime(here.path / "f")
        for path in here.both("f"):
            assert all(before - 1 <= each <= time.time() + 1 for each in times(path))

    @pytest.mark.parametrize(
        ("access", "modification", "expected"),
        [
            ((UTIME_OMIT, 0), (0, OLD + 9), [OLD, OLD + 9]),
            ((0, OLD + 9), (UTIME_OMIT, 0), [OLD + 9, OLD + 5]),
            ((UTIME_OMIT, 0), (UTIME_OMIT, 0), [OLD, OLD + 5]),
            ((UTIME_NOW, 0), (UTIME_OMIT, 0), [None, OLD + 5]),
            ((UTIME_OMIT, 0), (UTIME_NOW, 0), [OLD, None]),
            ((0, OLD + 9), (UTIME_NOW, 0), [OLD + 9, None]),
        ],
    )
    def test_now_and_omit_for_each_time(
        self, here: Here, access: List[int], modification: List[int], expected: List[int]
    ) -> None:
        (here.path / "f").write_bytes(b"x")
        os.utime(here.path / "f", (OLD, OLD + 5))
        before = int(time.time())
        utimensat(
            here.path / "f", access[0], modification[0], access_s=access[1], modification_s=modification[1]
        )
        for path in here.both("f"):
            for got, wanted in zip(times(path), expected):
                if wanted is None:
                    assert before - 1 <= got <= time.time() + 1
                else:
                    assert got == wanted

    def test_of_a_symlink_itself(self, here: Here) -> None:
        (here.path / "f").write_bytes(b"x")
        os.utime(here.path / "f", (OLD, OLD))
        os.symlink("f", here.path / "link")
        os.symlink("nowhere", here.path / "dangling")
        for name in ("link", "dangling"):
            os.utime(here.path / name, (OLD + 50, OLD + 60), follow_symlinks=False)
            assert times(here.path / name)[1] == times(here.served / name)[1] == OLD + 60
        assert times(here.path / "f") == times(here.served / "f") == [OLD, OLD]

    def test_beyond_2038(self, here: Here) -> None:
        (here.path / "f").write_bytes(b"x")
        os.utime(here.path / "f", (2_500_000_000, 2_500_000_001))
        assert times(here.path / "f") == times(here.served / "f") == [2_500_000_000, 2_500_000_001]

    def test_refusals(self, here: Here) -> None:
        with refused(errno.ENOENT):
            os.utime(here.path / "absent", (OLD, OLD))

    def test_directory_mtime_follows_its_entries(self, here: Here) -> None:
        os.utime(here.path, (OLD, OLD))
        before = int(time.time())
        (here.path / "new").write_bytes(b"")
        assert times(here.path)[1] >= before - 1
        os.utime(here.path, (OLD, OLD))
        os.unlink(here.path / "new")
        assert times(here.path)[1] >= before - 1


class TestStatvfs:
    def test_numbers_are_the_servers(self, here: Here) -> None:
        ours, theirs = os.statvfs(here.path), os.statvfs(here.served)
        assert ours.f_frsize * ours.f_blocks == theirs.f_frsize * theirs.f_blocks
        assert ours.f_files == theirs.f_files
        assert ours.f_namemax == theirs.f_namemax
        slack = theirs.f_frsize * theirs.f_blocks // 20  # others use the disk too
        assert abs(ours.f_frsize * ours.f_bavail - theirs.f_frsize * theirs.f_bavail) < slack
        assert abs(ours.f_frsize * ours.f_bfree - theirs.f_frsize * theirs.f_bfree) < slack

    def test_df(self, here: Here) -> None:
        sizes = [
            subprocess.run(["df", "--output=size", root], check=True, capture_output=True).stdout
            for root in here
        ]
        assert sizes[0] == sizes[1]


class TestListing:
    def populate(self, here: Here) -> None:
        (here.served / "file").write_bytes(noise(12_345))
        (here.served / "empty").write_bytes(b"")
        (here.served / "dir").mkdir(mode=0o750)
        (here.served / "dir" / "below").write_bytes(b"x")
        os.symlink("file", here.served / "link")
        os.symlink("absent", here.served / "dangling")
        os.mkfifo(here.served / "fifo")
        (here.served / "odd \u00e4 name").write_bytes(b"odd")
        for count, name in enumerate(["file", "empty", "dir", "fifo"]):
            os.chmod(here.served / name, [0o640, 0o4755, 0o1770, 0o600][count])
            os.utime(here.served / name, (OLD, OLD + count))
        if is_root():
            os.chown(here.served / "file", 12345, 23456)

    @pytest.mark.parametrize("options", ["-lan", "-la", "-lanL", "-lanu"])
    def test_ls_shows_what_the_servers_shows(self, here: Here, options: str) -> None:
        """All columns but the link count, which SFTP does not carry; times in its whole seconds."""
        self.populate(here)

        def ls(root: Path) -> List[str]:
            command = ["ls", options, "--time-style=+%s", "."]
            result = subprocess.run(command, cwd=root, capture_output=True, text=True)
            lines = [
                line.split(None, 2) for line in result.stdout.splitlines() if not line.startswith("total")
            ]
            # Without "..", the mountpoint's own directory.
            return [f"{line[0]} {line[2]}" for line in lines if not line[-1].endswith(" ..")]

        ls(
            here.served
        )  # the first look moves the times of access, behind those of modification; further ones leave them
        assert ls(here.path) == ls(here.served)
        assert len(ls(here.path)) == 8

    def test_scandir_types_agree_with_stat(self, here: Here) -> None:
        self.populate(here)
        with os.scandir(here.path) as entries:
            for entry in entries:
                attributes = os.lstat(entry.path)
                assert entry.is_dir(follow_symlinks=False) == stat.S_ISDIR(attributes.st_mode)
                assert entry.is_symlink() == stat.S_ISLNK(attributes.st_mode)
                assert entry.stat(follow_symlinks=False).st_size == attributes.st_size
                assert entry.inode() == attributes.st_ino

    def test_inodes_are_distinct_and_stay(self, here: Here) -> None:
        self.populate(here)
        before = {name: os.lstat(here.path / name).st_ino for name in os.listdir(here.path)}
        assert len(set(before.values())) == len(before) == 7
        assert 0 not in before.values()
        os.rename(here.path / "file", here.path / "renamed")
        assert os.lstat(here.path / "renamed").st_ino == before["file"]
        assert {name: os.lstat(here.path / name).st_ino for name in before if name != "file"} == {
            name: inode for name, inode in before.items() if name != "file"
        }

    def test_block_counts_let_du_work(self, here: Here) -> None:
        (here.path / "f").write_bytes(noise(1_000_000))
        assert (here.path / "f").stat().st_blocks * 512 >= 1_000_000
        assert (here.path / "f").stat().st_blksize > 0
        usage = subprocess.run(
            ["du", "-s", "--block-size=1", here.path], check=True, capture_output=True, text=True
        )
        assert 1_000_000 <= int(usage.stdout.split()[0]) < 1_200_000

    def test_find_descends_everywhere(self, here: Here) -> None:
        (here.served / "a" / "b" / "c").mkdir(parents=True)
        (here.served / "a" / "b" / "c" / "f").write_bytes(b"")
        command = ["find", ".", "-type", "f"]
        assert (
            subprocess.run(command, cwd=here.path, check=True, capture_output=True).stdout == b"./a/b/c/f\n"
        )
