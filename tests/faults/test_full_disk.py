"""The server's disk gets full at each point of a program's work: the program is told, and fails; nothing it left looks whole.

All tests share one mount of one disk, whose free space a filler sets in steps of a page, and each ends with space made and the
same work done to its end on that mount.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Dict, Iterator, List, Tuple

import pytest

from mount.disks import SmallDisk
from mount.helpers import noise, opened, refused
from mount.test_errors import KEYS, MIB, Outcome, write_file
from support.mount import Mount
from support.process import wait_until
from support.sshd import Sshd
from tools.test_borg import environment as borg_environment
from tools.trees import make_tree, run, same_contents

DISK_BYTES = 48 * MIB
PAGE = 4096
REQUEST = 63 * PAGE  # what the mount writes at once: OpenSSH's limit of 261120 bytes, in whole pages
NO_SPACE = "No space left on device"
WHOLE = noise(3 * MIB + 1000)
SMALL = 100_000  # less than a request: nothing of it leaves before fsync or close
# Free bytes when WHOLE is written: nothing, within the first request, at its end, in the middle, all but the last page.
FREE_BYTES = [0, PAGE, REQUEST - PAGE, REQUEST, REQUEST + PAGE, MIB, 2 * REQUEST, 3 * MIB - PAGE, 3 * MIB]


class Disk:
    """``path`` is a directory on the mount, ``served`` the same on the server's side; the filler lies beside it."""

    def __init__(self, mount: Mount, seen: Path) -> None:
        self.path = mount.path
        self.served = seen / "served"
        self._filler = seen / "filler"

    def leave(self, free_bytes: int) -> None:
        """Fill the disk up to ``free_bytes``, in whole pages, once the server has closed what was unlinked."""
        self.free()
        wait_until(lambda: self.used_bytes() == self._named_bytes(), 10.0, "unlinked files are closed")
        self.fill(free_bytes)

    def fill(self, free_bytes: int) -> None:
        disk = os.statvfs(self.served)
        with self._filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - free_bytes // PAGE * PAGE)

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)

    def used_bytes(self) -> int:
        disk = os.statvfs(self.served)
        return (disk.f_blocks - disk.f_bfree) * disk.f_frsize

    def _named_bytes(self) -> int:
        return sum(path.lstat().st_blocks * 512 for path in self.served.rglob("*"))

    def check_not_whole(self, name: str, whole: bytes) -> None:
        """What is shown is what the server has, and that is not all."""
        path, served = self.path / name, self.served / name
        assert path.exists() == served.exists()
        if served.exists():
            assert path.stat().st_size == served.stat().st_size < len(whole)
            assert path.read_bytes() == served.read_bytes()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    directory = tmp_path_factory.mktemp("disk")
    with SmallDisk(directory / "disk", f"size={DISK_BYTES}") as small:
        (small.seen / "served").mkdir()
        with Sshd(directory, sftp_server=small.sftp_server, host_key_types=KEYS) as sshd:
            with Mount(sshd, directory, directory=str(small.directory / "served"), life_s=3600.0) as mount:
                yield Disk(mount, small.seen)


@pytest.fixture
def disk(shared: Disk) -> Iterator[Disk]:
    """The shared disk with one file on it, which no test may harm."""
    (shared.path / "kept").write_bytes(noise(SMALL, 7))
    yield shared
    shared.free()
    assert (shared.served / "kept").read_bytes() == (shared.path / "kept").read_bytes() == noise(SMALL, 7)
    for path in shared.path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert list(shared.served.iterdir()) == []


def write_on(path: Path, data: bytes) -> int:
    """Write, on from where a short write ended as programs do, and close; returns the first errno, or 0."""
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    code, rest = 0, memoryview(data)
    try:
        while rest:
            rest = rest[os.write(fd, rest) :]
    except OSError as error:
        code = error.errno or errno.EIO
    try:
        os.close(fd)
    except OSError as error:
        code = code or error.errno or errno.EIO
    return code


def close_telling(fd: int, told: Tuple[int, ...]) -> None:
    """Close; an error that is ``told`` once more is none."""
    try:
        os.close(fd)
    except OSError as error:
        assert error.errno in told


def tell(*command: object, env: Dict[str, str], cwd: Path) -> Tuple[int, str]:
    """Exit status and all that a program says."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd), "LC_ALL": "C.UTF-8", **env}
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    return result.returncode, result.stdout


class TestOneFile:
    @pytest.mark.parametrize("fsync", [True, False], ids=["fsync", "close"])
    def test_each_point_of_a_long_write(self, disk: Disk, fsync: bool) -> None:
        for free_bytes in FREE_BYTES:
            disk.leave(free_bytes)
            outcome = write_file(disk.path / "f", len(WHOLE), fsync=fsync, block_bytes=len(WHOLE))
            assert outcome.stage is not None, f"nothing was told with {free_bytes} bytes free"
            assert errno.errorcode[outcome.code] == "ENOSPC"
            disk.check_not_whole("f", WHOLE)
            disk.free()
            assert write_file(disk.path / "f", len(WHOLE), fsync=fsync, block_bytes=len(WHOLE)).stage is None
            assert (disk.served / "f").read_bytes() == WHOLE
            os.unlink(disk.path / "f")

    @pytest.mark.parametrize("stage", ["fsync", "close"])
    def test_what_is_sent_last_is_told_last(self, disk: Disk, stage: str) -> None:
        for free_bytes in (0, PAGE, SMALL // 2, SMALL - PAGE):
            disk.leave(free_bytes)
            outcome = write_file(disk.path / "f", SMALL, fsync=stage == "fsync")
            assert outcome == Outcome(stage, errno.ENOSPC, SMALL)
            disk.check_not_whole("f", noise(MIB)[:SMALL])
            disk.free()
            assert write_file(disk.path / "f", SMALL, fsync=stage == "fsync").stage is None
            assert (disk.served / "f").read_bytes() == noise(MIB)[:SMALL]
            os.unlink(disk.path / "f")

    def test_a_file_that_fits_to_the_byte_is_stored(self, disk: Disk) -> None:
        disk.leave(len(WHOLE) + PAGE)
        assert write_file(disk.path / "f", len(WHOLE), fsync=True, block_bytes=len(WHOLE)).stage is None
        assert (disk.served / "f").read_bytes() == WHOLE

    def test_bytes_that_need_no_space_are_stored_on_a_full_disk(self, disk: Disk) -> None:
        (disk.path / "f").write_bytes(WHOLE)
        disk.leave(0)
        with opened(disk.path / "f", os.O_WRONLY) as fd:
            os.pwrite(fd, noise(MIB, 3), 1000)
        assert (disk.served / "f").read_bytes() == WHOLE[:1000] + noise(MIB, 3) + WHOLE[1000 + MIB :]

    def test_a_hole_that_cannot_be_filled(self, disk: Disk) -> None:
        (disk.path / "f").touch()
        os.truncate(disk.path / "f", len(WHOLE))
        disk.leave(PAGE)
        with refused(errno.ENOSPC):
            with opened(disk.path / "f", os.O_WRONLY) as fd:
                os.pwrite(fd, noise(MIB, 3), MIB)
        disk.free()
        with opened(disk.path / "f", os.O_WRONLY) as fd:
            os.pwrite(fd, noise(MIB, 3), MIB)
        assert (disk.served / "f").read_bytes() == bytes(MIB) + noise(MIB, 3) + bytes(len(WHOLE) - 2 * MIB)

    def test_a_mapping_hears_of_it_at_msync(self, disk: Disk) -> None:
        (disk.path / "f").touch()
        os.truncate(disk.path / "f", MIB)
        disk.leave(PAGE)
        # The server says "failure", and the reason is asked for a moment later: there may be space again then.
        told = (errno.ENOSPC, errno.EIO)
        fd = os.open(disk.path / "f", os.O_RDWR)
        with contextlib.ExitStack() as stack:
            stack.callback(close_telling, fd, told)
            mapped = stack.enter_context(mmap.mmap(fd, MIB))
            mapped[:] = noise(MIB)
            with refused(errno.ENOSPC):
                mapped.flush()
            disk.free()
            mapped[:] = noise(MIB, 2)
            try:
                mapped.flush()
            except OSError as error:  # once more is no lie; the retry below must then succeed
                assert error.errno in told
                mapped[:] = noise(MIB, 2)
                mapped.flush()
            assert (disk.served / "f").read_bytes() == noise(MIB, 2)

    def test_another_file_goes_on_while_one_fails(self, disk: Disk) -> None:
        """What is open beside a file that does not fit: reads, and writes where there is space already."""
        (disk.path / "other").write_bytes(WHOLE)
        with opened(disk.path / "other", os.O_RDWR) as fd:
            disk.leave(MIB)
            assert write_file(disk.path / "f", len(WHOLE), fsync=False).code == errno.ENOSPC
            assert os.pread(fd, len(WHOLE), 0) == WHOLE
            os.pwrite(fd, noise(MIB, 4), 0)
            os.fsync(fd)
        assert (disk.served / "other").read_bytes() == noise(MIB, 4) + WHOLE[MIB:]
        disk.check_not_whole("f", WHOLE)

    def test_space_that_comes_and_goes_makes_no_file_that_only_looks_whole(self, disk: Disk) -> None:
        """close() returns 0 for the very bytes or not at all; which errno is a matter of when the server was asked."""
        ended = threading.Event()

        def breathe() -> None:
            while not ended.is_set():
                try:
                    disk.fill(MIB)
                except OSError as error:  # the file under test was quicker
                    assert error.errno == errno.ENOSPC
                ended.wait(0.01)
                disk.free()
                ended.wait(0.05)

        stored = failed = 0
        breathing = threading.Thread(target=breathe)
        breathing.start()
        try:
            deadline = time.monotonic() + 60.0
            while (stored < 5 or failed < 5) and time.monotonic() < deadline:
                code = write_on(disk.path / "f", WHOLE)
                assert code in (0, errno.ENOSPC, errno.EIO)
                stored += code == 0
                failed += code != 0
                served = (disk.served / "f").read_bytes()
                assert served == WHOLE or code != 0
                assert (disk.path / "f").stat().st_size == len(served)
                assert (disk.path / "f").read_bytes() == served
                os.unlink(disk.path / "f")
        finally:
            ended.set()
            breathing.join()
        assert stored >= 5 and failed >= 5, f"{stored} were stored, {failed} failed: nothing was shown"


class TestPrograms:
    @pytest.mark.parametrize(
        "command",
        [
            ["dd", "if={source}", "of={target}", "bs=64k"],
            ["dd", "if={source}", "of={target}", "bs=1M", "conv=fsync"],
            ["dd", "if={source}", "of={target}", "bs=64k", "oflag=sync"],
            ["cp", "{source}", "{target}"],
            ["rsync", "{source}", "{target}"],
            ["rsync", "--inplace", "{source}", "{target}"],
            ["tar", "-C", "/", "-cf", "{target}", "{source}"],
        ],
        ids=lambda command: "-".join(word for word in command if "{" not in word and "/" not in word),
    )
    def test_a_copy_fails_and_says_why_then_succeeds(
        self, disk: Disk, tmp_path: Path, command: List[str]
    ) -> None:
        source = tmp_path / "source"
        source.write_bytes(WHOLE)
        words = [word.format(source=source, target=disk.path / "f") for word in command]
        for free_bytes in (0, REQUEST + PAGE, 3 * MIB):
            disk.leave(free_bytes)
            status, said = tell(*words, env={}, cwd=tmp_path)
            assert status != 0, f"{words[0]} ended with 0 where {free_bytes} bytes were free"
            assert NO_SPACE in said
            disk.check_not_whole("f", WHOLE)
            disk.free()
            status, said = tell(*words, env={}, cwd=tmp_path)
            assert status == 0, said
            stored = (disk.served / "f").read_bytes()
            assert stored == (disk.path / "f").read_bytes()
            assert stored == WHOLE or (words[0] == "tar" and WHOLE in stored)
            os.unlink(disk.path / "f")
        assert [path.name for path in disk.served.iterdir()] == ["kept"]  # no temporary files

    def test_rsync_of_a_tree(self, disk: Disk, tmp_path: Path) -> None:
        source = make_tree(tmp_path / "source", files=40)
        # In an ordinary user's namespace only one group is known.
        words = ["rsync", "-a", "--no-group", f"{source}/", f"{disk.path}/copy/"]
        for free_bytes in (0, MIB, 3 * MIB, 4 * MIB):
            disk.leave(free_bytes)
            status, said = tell(*words, env={}, cwd=tmp_path)
            # 10, 12: the sender noticed, as it wrote or read, that the receiver has ended, before its words came to it.
            assert status in (10, 12) or (status == 11 and NO_SPACE in said), (status, said)
            for path in (disk.served / "copy").rglob("*"):
                if path.is_file() and not path.is_symlink():
                    twin = source / path.relative_to(disk.served / "copy")
                    assert path.read_bytes() == twin.read_bytes(), f"{path.name} is there, but not whole"
            disk.free()
            run(*words)
            same_contents(source, disk.served / "copy")
            shutil.rmtree(disk.path / "copy")


LONG_STEPS = [0, 10, 20, 30, 50, 60, 70, 80, 90, 95, 98, 99]
STEPS = [40, *(pytest.param(percent, marks=pytest.mark.long) for percent in LONG_STEPS)]


class TestRestic:
    """``percent`` of the space that the backup takes is free."""

    @pytest.fixture
    def env(self, disk: Disk, tmp_path: Path) -> Dict[str, str]:
        env = {
            "RESTIC_PASSWORD": "secret",
            "RESTIC_REPOSITORY": str(disk.path / "repository"),
            "RESTIC_CACHE_DIR": str(tmp_path / "cache"),
        }
        run("restic", "init", env=env)
        return env

    @pytest.mark.parametrize("percent", STEPS)
    def test_a_backup(self, disk: Disk, env: Dict[str, str], tmp_path: Path, percent: int) -> None:
        source = make_tree(tmp_path / "source")
        words = ["restic", "backup", "--no-cache", "."]
        needed = self.needed_bytes(disk, env, source)
        disk.leave(needed * percent // 100)
        status, said = tell(*words, env=env, cwd=source)
        assert status != 0, said
        assert NO_SPACE.lower() in said.lower()
        assert list((disk.served / "repository" / "snapshots").iterdir()) == []
        self.check_names(disk.served / "repository")
        disk.free()
        run(*words, env=env, cwd=source)
        same_contents(disk.path / "repository", disk.served / "repository")
        assert "no errors were found" in run("restic", "check", "--read-data", "--no-cache", env=env)
        run("restic", "restore", "latest", "--no-cache", "--target", tmp_path / "restored", env=env)
        same_contents(tmp_path / "restored", source)

    @staticmethod
    def needed_bytes(disk: Disk, env: Dict[str, str], source: Path) -> int:
        """What the backup takes on this disk; taken away again, on the mount."""
        shutil.copytree(disk.served / "repository", disk.path / "twin")
        before = disk.used_bytes()
        twin = {**env, "RESTIC_REPOSITORY": str(disk.path / "twin")}
        run("restic", "backup", "--no-cache", ".", env=twin, cwd=source)
        needed = disk.used_bytes() - before
        shutil.rmtree(disk.path / "twin")
        return needed

    @staticmethod
    def check_names(repository: Path) -> None:
        """restic names a file after its contents once it is whole."""
        for path in repository.rglob("*"):
            if path.is_file() and len(path.name) == 64:
                assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name, f"{path} is not whole"


class TestBorg:
    @pytest.mark.parametrize("percent", STEPS)
    def test_a_create(self, disk: Disk, tmp_path: Path, percent: int) -> None:
        env = borg_environment(tmp_path)
        source = make_tree(tmp_path / "source")
        disk.leave(DISK_BYTES // 2)  # settles what earlier tests have unlinked
        disk.free()
        before = disk.used_bytes()
        run("borg", "init", "--encryption=none", disk.path / "twin", env=env)
        run("borg", "create", f"{disk.path}/twin::first", ".", env=env, cwd=source)
        needed = disk.used_bytes() - before
        run("borg", "delete", disk.path / "twin", env={**env, "BORG_DELETE_I_KNOW_WHAT_I_AM_DOING": "YES"})
        repository = disk.path / "repository"
        run("borg", "init", "--encryption=none", repository, env=env)
        disk.leave(needed * percent // 100)
        status, said = tell("borg", "create", f"{repository}::first", ".", env=env, cwd=source)
        assert status != 0, said
        # borg itself asks statvfs before it commits.
        assert NO_SPACE in said or "Insufficient free space" in said
        disk.free()
        served = disk.served / "repository"
        same_contents(repository, served)
        assert run("borg", "list", "--short", repository, env=env) == ""
        run("borg", "create", f"{repository}::first", ".", env=env, cwd=source)
        same_contents(repository, served)
        run("borg", "check", "--verify-data", served, env=env)
        (tmp_path / "extracted").mkdir()
        run("borg", "extract", f"{served}::first", env=env, cwd=tmp_path / "extracted")
        same_contents(tmp_path / "extracted", source)
