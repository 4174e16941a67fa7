"""A server that cannot store reaches write, fsync or close with the right errno, and no file that failed looks whole."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Optional, Tuple

import asyncssh
import pytest

from mount.disks import SmallDisk, growth_limited_sftp_server, ordinary_sftp_server
from mount.faulty_server import FaultyServer
from mount.helpers import Here, fsync_directory, in_another_process, noise, opened, refused
from sftpmount.fs.removals import ROW
from support.mount import Mount
from support.process import wait_until
from support.sshd import Sshd

MIB = 2**20
DISK_BYTES = 16 * MIB
TOO_MUCH = 24 * MIB
KEYS = ("ed25519",)  # an RSA key takes a second to make


class Outcome(NamedTuple):
    """Where a program that writes a file was first told that it failed: "write", "fsync" or "close"; None: never."""

    stage: Optional[str]
    code: int
    accepted_bytes: int


def write_file(path: Path, total_bytes: int, *, fsync: bool, block_bytes: int = MIB) -> Outcome:
    """Write, perhaps fsync, close; stops at the first error but always closes."""
    data = noise(block_bytes)
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    first: Optional[Outcome] = None
    accepted = 0
    try:
        while accepted < total_bytes:
            accepted += os.write(fd, data[: total_bytes - accepted])
    except OSError as error:
        first = Outcome("write", error.errno or 0, accepted)
    if fsync and first is None:
        try:
            os.fsync(fd)
        except OSError as error:
            first = Outcome("fsync", error.errno or 0, accepted)
    try:
        os.close(fd)
    except OSError as error:
        first = first or Outcome("close", error.errno or 0, accepted)
    return first or Outcome(None, 0, accepted)


def check_not_whole(path: Path, served: Path, whole_bytes: int) -> None:
    """What is shown is what the server has, and that is not all."""
    assert path.stat().st_size == served.stat().st_size < whole_bytes
    assert path.read_bytes() == served.read_bytes()


@contextlib.contextmanager
def mounted_disk(tmp_path: Path, options: str) -> Iterator[Tuple[Mount, Path]]:
    """A mount of a tmpfs, and the tmpfs as the server sees it."""
    disk = SmallDisk(tmp_path / "disk", options)
    sshd = Sshd(tmp_path, sftp_server=disk.sftp_server, host_key_types=KEYS)
    with disk, sshd, Mount(sshd, tmp_path, directory=str(disk.directory)) as mount:
        yield mount, disk.seen


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Here]:
    """A mount of a disk of 16 MiB, and the same on the server's side."""
    with mounted_disk(tmp_path, f"size={DISK_BYTES}") as (mount, served):
        yield Here(mount.path, served)


class TestFullDisk:
    @pytest.mark.parametrize("fsync", [True, False])
    def test_write_fsync_or_close_says_enospc(self, small: Here, fsync: bool) -> None:
        outcome = write_file(small.path / "f", TOO_MUCH, fsync=fsync)
        assert outcome.stage is not None
        assert errno.errorcode[outcome.code] == "ENOSPC"
        check_not_whole(small.path / "f", small.served / "f", TOO_MUCH)

    def test_a_long_write_fails_before_it_ends(self, small: Here) -> None:
        """Programs that ignore close() hear of it too: no more is accepted than the disk and the buffers hold."""
        outcome = write_file(small.path / "f", 300 * MIB, fsync=False)
        assert (outcome.stage, outcome.code) == ("write", errno.ENOSPC)
        assert outcome.accepted_bytes < DISK_BYTES + 100 * MIB
        check_not_whole(small.path / "f", small.served / "f", 300 * MIB)

    @pytest.mark.parametrize("left_bytes", [0, 1, 4096, 50_000])
    def test_a_small_file_that_does_not_fit(self, small: Here, left_bytes: int) -> None:
        """Nothing is sent before close here, so that close must tell."""
        self.fill(small, left_bytes)
        outcome = write_file(small.path / "f", 100_000, fsync=False)
        assert outcome.stage is not None
        assert errno.errorcode[outcome.code] == "ENOSPC"
        if (small.served / "f").exists():
            check_not_whole(small.path / "f", small.served / "f", 100_000)

    def test_overwriting_in_place_at_the_end(self, small: Here) -> None:
        (small.path / "f").write_bytes(noise(200_000))
        self.fill(small, 0)
        with pytest.raises(OSError) as caught, opened(small.path / "f", os.O_WRONLY) as fd:
            stored = os.pwrite(fd, noise(100_000, 2), 150_000)
            os.pwrite(fd, noise(100_000, 2)[stored:], 150_000 + stored)
            os.fsync(fd)
        assert caught.value.errno == errno.ENOSPC
        assert (small.path / "f").stat().st_size == (small.served / "f").stat().st_size < 250_000
        assert (small.path / "f").read_bytes() == (small.served / "f").read_bytes()

    @pytest.mark.parametrize(
        "command",
        [
            ["dd", "if={source}", "of={target}", "bs=1M", "conv=fsync"],
            ["dd", "if={source}", "of={target}", "bs=1M"],
            ["dd", "if={source}", "of={target}", "bs=10k"],
            ["cp", "{source}", "{target}"],
            ["sh", "-c", "cat {source} > {target}"],
            ["rsync", "--inplace", "{source}", "{target}"],
            ["tar", "-C", "/", "-cf", "{target}", "{source}"],
        ],
        ids=lambda command: "-".join(word for word in command if "{" not in word and "/" not in word),
    )
    def test_programs_fail_and_say_why(self, small: Here, tmp_path: Path, command: List[str]) -> None:
        source = tmp_path / "source"
        source.write_bytes(noise(TOO_MUCH))
        words = [word.format(source=source, target=small.path / "f") for word in command]
        result = subprocess.run(words, capture_output=True, text=True)
        assert result.returncode != 0
        assert "No space left on device" in result.stderr
        if (small.served / "f").exists():
            check_not_whole(small.path / "f", small.served / "f", TOO_MUCH)

    def test_rsync_leaves_no_file_that_looks_whole(self, small: Here, tmp_path: Path) -> None:
        (tmp_path / "source").mkdir()
        for count in range(12):
            (tmp_path / "source" / f"f{count}").write_bytes(noise(2 * MIB, count))
        command = ["rsync", "-a", f"{tmp_path}/source/", f"{small.path}/copy/"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode != 0
        assert "No space left on device" in result.stderr
        copy = small.served / "copy"
        wait_until(lambda: not list(copy.glob(".*")), 5.0, "the end of rsync's temporary files on the server")
        for name in os.listdir(copy):
            whole = (tmp_path / "source" / name).read_bytes()
            assert (copy / name).read_bytes() == whole, f"{name} is there, but not whole"

    def test_the_error_stays_and_every_handle_hears_of_it(self, small: Here) -> None:
        first = os.open(small.path / "f", os.O_CREAT | os.O_WRONLY)
        second = os.open(small.path / "f", os.O_WRONLY)
        with refused(errno.ENOSPC):
            for _ in range(TOO_MUCH // MIB):
                os.write(first, noise(MIB))
            os.fsync(first)
        with refused(errno.ENOSPC):  # nothing has become better since
            os.fsync(first)
        with refused(errno.ENOSPC):
            os.fsync(second)
        for fd in (first, second):
            try:
                os.close(fd)
            except OSError as error:
                assert error.errno == errno.ENOSPC
        check_not_whole(small.path / "f", small.served / "f", TOO_MUCH)

    def test_a_handle_that_wrote_nothing_hears_of_it_at_close(self, small: Here) -> None:
        first = os.open(small.path / "f", os.O_CREAT | os.O_WRONLY)
        second = os.open(small.path / "f", os.O_WRONLY)
        with refused(errno.ENOSPC):
            for _ in range(TOO_MUCH // MIB):
                os.write(first, noise(MIB))
            os.close(first)
        with refused(errno.ENOSPC):
            os.close(second)

    def test_fsync_succeeds_once_there_is_space_or_goes_on_failing(self, small: Here) -> None:
        """What it may never do is to return 0 for bytes that were dropped."""
        self.fill(small, MIB)
        fd = os.open(small.path / "f", os.O_CREAT | os.O_RDWR)
        accepted = 0
        with refused(errno.ENOSPC):
            for start in range(0, 4 * MIB, 65_536):
                accepted += os.write(fd, noise(4 * MIB)[start : start + 65_536])
            os.fsync(fd)
        os.unlink(small.served / "filler")
        try:
            os.fsync(fd)
        except OSError as error:
            assert error.errno == errno.ENOSPC
        else:
            assert (small.served / "f").read_bytes().startswith(noise(4 * MIB)[:accepted])
        try:
            os.close(fd)
        except OSError as error:
            assert error.errno == errno.ENOSPC
        assert (small.path / "f").stat().st_size == (small.served / "f").stat().st_size

    def test_other_files_are_unharmed(self, small: Here) -> None:
        (small.path / "kept").write_bytes(noise(MIB))
        with opened(small.path / "kept", os.O_RDONLY) as fd:
            assert write_file(small.path / "f", TOO_MUCH, fsync=False).code == errno.ENOSPC
            os.fsync(fd)
            assert os.pread(fd, MIB, 0) == noise(MIB)
        assert (small.path / "kept").read_bytes() == (small.served / "kept").read_bytes() == noise(MIB)

    def test_space_freed_makes_the_next_run_succeed(self, small: Here) -> None:
        for _ in range(3):
            assert write_file(small.path / "f", TOO_MUCH, fsync=False).code == errno.ENOSPC
            os.unlink(small.path / "f")
            assert write_file(small.path / "f", 10 * MIB, fsync=True) == Outcome(None, 0, 10 * MIB)
            assert (small.served / "f").read_bytes() == noise(MIB) * 10
            assert (small.path / "f").read_bytes() == noise(MIB) * 10
            os.unlink(small.path / "f")

    def test_free_space_is_shown_as_it_is(self, small: Here) -> None:
        assert write_file(small.path / "f", 10 * MIB, fsync=True).stage is None
        ours, theirs = os.statvfs(small.path), os.statvfs(small.served)
        assert ours.f_bavail * ours.f_frsize == theirs.f_bavail * theirs.f_frsize == 6 * MIB

    def test_no_inodes_left(self, tmp_path: Path) -> None:
        with mounted_disk(tmp_path, "size=16m,nr_inodes=10") as (mount, _):
            for count in range(9):
                (mount.path / f"f{count}").write_bytes(b"x")
            with refused(errno.ENOSPC):
                (mount.path / "one-more").write_bytes(b"x")
            with refused(errno.ENOSPC):
                os.mkdir(mount.path / "d")
            with refused(errno.ENOSPC):
                os.symlink("f", mount.path / "l")
            assert len(os.listdir(mount.path)) == 9

    def test_unmount_after_a_failed_file_stores_the_others_and_ends(self, tmp_path: Path) -> None:
        """The program was told by close(); the exit status may say so again."""
        with mounted_disk(tmp_path, f"size={DISK_BYTES}") as (mount, served):
            (mount.path / "kept").write_bytes(noise(MIB))
            assert write_file(mount.path / "f", TOO_MUCH, fsync=False).code == errno.ENOSPC
            mount.unmount()
            assert (served / "kept").read_bytes() == noise(MIB)

    @staticmethod
    def fill(small: Here, left_bytes: int) -> None:
        """A file on the server's side that leaves so many bytes, in whole pages."""
        disk = os.statvfs(small.served)
        length = disk.f_bavail * disk.f_frsize - (left_bytes + 4095) // 4096 * 4096
        (small.served / "filler").write_bytes(bytes(length))


class TestGrowthLimit:
    """A limit on the size of a file, which OpenSSH reports as a bare failure: EIO is as true as EFBIG."""

    def test_write_fsync_or_close_fails(self, tmp_path: Path, make_mount: Callable[..., Mount]) -> None:
        limited = growth_limited_sftp_server(tmp_path, 4096)
        with Sshd(tmp_path, sftp_server=limited, host_key_types=KEYS) as sshd:
            mount = make_mount(sshd)
            for fsync in (True, False):
                outcome = write_file(mount.path / "f", 8 * MIB, fsync=fsync)
                assert outcome.stage is not None
                assert outcome.code in (errno.EIO, errno.EFBIG)
                check_not_whole(mount.path / "f", sshd.tree / "f", 8 * MIB)
            assert write_file(mount.path / "fits", MIB, fsync=True).stage is None
            assert (sshd.tree / "fits").read_bytes() == noise(MIB)
            mount.close()


class TestPermissions:
    """An sftp-server that is held to modes, and says so; the mount's own user may be root all the same."""

    @pytest.fixture
    def held(self, tmp_path: Path, make_mount: Callable[..., Mount]) -> Iterator[Here]:
        with Sshd(tmp_path, sftp_server=ordinary_sftp_server(), host_key_types=KEYS) as sshd:
            (sshd.tree / "closed").mkdir()
            (sshd.tree / "closed" / "inside").write_bytes(b"x")
            (sshd.tree / "fixed").mkdir()
            (sshd.tree / "fixed" / "inside").write_bytes(b"x")
            (sshd.tree / "secret").write_bytes(b"x")
            (sshd.tree / "secret").chmod(0o000)
            (sshd.tree / "printed").write_bytes(b"x")
            (sshd.tree / "printed").chmod(0o444)
            (sshd.tree / "closed").chmod(0o000)
            (sshd.tree / "fixed").chmod(0o555)
            if os.geteuid() == 0:
                (sshd.tree / "foreign").write_bytes(b"x")
                os.chown(sshd.tree / "foreign", 12345, 12345)
            else:
                os.symlink("/etc/passwd", sshd.tree / "foreign")
            mount = make_mount(sshd)
            yield Here(mount.path, sshd.tree)
            mount.close()
            for name in ("closed", "fixed"):
                (sshd.tree / name).chmod(0o755)

    def test_each_refusal_is_eacces(self, held: Here) -> None:
        path = held.path
        for call in (
            lambda: os.open(path / "secret", os.O_RDONLY),
            lambda: os.open(path / "printed", os.O_WRONLY),
            lambda: os.open(path / "printed", os.O_RDWR),
            lambda: os.truncate(path / "printed", 0),
            lambda: os.listdir(path / "closed"),
            lambda: os.stat(path / "closed" / "inside"),
            lambda: os.open(path / "closed" / "new", os.O_CREAT | os.O_WRONLY),
            lambda: os.open(path / "fixed" / "new", os.O_CREAT | os.O_WRONLY),
            lambda: os.mkdir(path / "fixed" / "new"),
            lambda: os.unlink(path / "fixed" / "inside"),
            lambda: os.rename(path / "fixed" / "inside", path / "moved"),
            lambda: os.rename(path / "printed", path / "fixed" / "new"),
            lambda: os.symlink("x", path / "fixed" / "new"),
            lambda: os.link(path / "printed", path / "fixed" / "new"),
        ):
            with refused(errno.EACCES):
                call()
        assert os.listdir(held.served / "fixed") == os.listdir(held.path / "fixed") == ["inside"]
        assert (path / "printed").read_bytes() == b"x"

    def test_changing_what_is_not_ours_is_eperm(self, held: Here) -> None:
        with refused(errno.EPERM, errno.EACCES):
            os.chown(held.path / "printed", 12345, -1)
        assert (held.served / "printed").stat().st_uid == os.getuid()
        assert (held.path / "printed").stat().st_uid == os.getuid()
        for call in (lambda path: os.chmod(path, 0o777), lambda path: os.utime(path, (1, 1))):
            with refused(errno.EPERM, errno.EACCES):
                call(held.path / "foreign")
        assert (held.path / "foreign").stat().st_mode & 0o777 != 0o777

    def test_a_permission_taken_away_is_never_an_empty_listing(self, held: Here) -> None:
        for count in range(5):
            (held.path / f"f{count}").write_bytes(b"x")
        (held.path / "d").mkdir()
        (held.path / "d" / "inside").write_bytes(b"x")
        (held.served / "d").chmod(0o000)
        code = "import os, sys; print(os.listdir(sys.argv[1]))"
        try:
            assert in_another_process(code, held.path / "d") == "['inside']"
        except AssertionError as error:
            assert "Permission denied" in str(error)
        (held.served / "d").chmod(0o755)
        assert os.listdir(held.path / "d") == ["inside"]

    def test_a_permission_taken_away_in_mid_file(self, held: Here) -> None:
        """POSIX lets the server's handle go on. Either all is stored, or the error is told and the file not whole."""
        path, served = held.path / "f", held.served / "f"
        fd = os.open(path, os.O_CREAT | os.O_WRONLY)
        code = 0
        try:
            os.write(fd, noise(MIB))
            os.fsync(fd)
            served.chmod(0o000)
            os.write(fd, noise(MIB, 2))
            os.fsync(fd)
        except OSError as error:
            code = error.errno or 0
        try:
            os.close(fd)
        except OSError as error:
            code = code or error.errno or 0
        if code == 0:
            served.chmod(0o644)
            assert served.read_bytes() == noise(MIB) + noise(MIB, 2)
        else:
            assert code == errno.EACCES
            assert path.stat().st_size == served.stat().st_size < 2 * MIB
            with refused(errno.EACCES):
                os.open(path, os.O_WRONLY)


class LastingRows(Mount):
    """Removals are in a row however slow the machine is."""

    changes = "from sftpmount.fs import removals; removals.ROW_S = 60.0"


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:asyncssh")
class TestServersWords:
    """Errors that a POSIX test machine cannot produce at will come from a server of our own."""

    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[FaultyServer]:
        with FaultyServer(tmp_path) as server:
            yield server

    @pytest.fixture
    def mount(self, server: FaultyServer, tmp_path: Path) -> Iterator[Mount]:
        with LastingRows(server, tmp_path) as mount:
            yield mount
            server.faults.clear()

    WORDS = [
        (lambda: asyncssh.SFTPFailure("Disk quota exceeded"), errno.EDQUOT),
        (lambda: asyncssh.SFTPFailure("No space left on device"), errno.ENOSPC),
        (lambda: asyncssh.SFTPFailure("File too large"), errno.EFBIG),
        (lambda: asyncssh.SFTPPermissionDenied("Permission denied"), errno.EACCES),
        (lambda: asyncssh.SFTPFailure("Failure"), errno.EIO),
    ]

    @pytest.mark.parametrize(("make", "code"), WORDS, ids=[errno.errorcode[code] for _, code in WORDS])
    @pytest.mark.parametrize("fsync", [True, False])
    def test_writes_refused_in_mid_file(
        self, server: FaultyServer, mount: Mount, make: Callable[[], Exception], code: int, fsync: bool
    ) -> None:
        server.faults.write_budget_bytes = 3 * MIB
        server.faults.errors["write"] = make
        outcome = write_file(mount.path / "f", 8 * MIB, fsync=fsync)
        assert outcome.stage is not None
        assert errno.errorcode[outcome.code] == errno.errorcode[code]
        # The last blocks may have arrived where a middle one was refused: whole would be the size *and* the bytes.
        assert mount.path.joinpath("f").stat().st_size == (server.tree / "f").stat().st_size
        assert (server.tree / "f").read_bytes() != noise(MIB) * 8
        server.faults.clear()
        assert mount.path.joinpath("f").read_bytes() == (server.tree / "f").read_bytes()
        assert write_file(mount.path / "f", 8 * MIB, fsync=fsync).stage is None
        assert (server.tree / "f").read_bytes() == noise(MIB) * 8

    def test_a_small_file_refused_at_once(self, server: FaultyServer, mount: Mount) -> None:
        server.faults.errors["write"] = lambda: asyncssh.SFTPFailure("Disk quota exceeded")
        outcome = write_file(mount.path / "f", 1000, fsync=False)
        assert (outcome.stage is not None, outcome.code) == (True, errno.EDQUOT)
        assert (mount.path / "f").stat().st_size == (server.tree / "f").stat().st_size == 0

    @pytest.mark.parametrize("request_name", ["fsync", "close"])
    def test_an_error_that_comes_last(
        self,
        server: FaultyServer,
        monkeypatch: pytest.MonkeyPatch,
        make_mount: Callable[..., Mount],
        request_name: str,
    ) -> None:
        """Servers without fsync may store at CLOSE, others at FSYNC: under commit=close, close() returns what they said."""
        if request_name == "close":
            handler = asyncssh.sftp.SFTPServerHandler
            offered = [pair for pair in handler._extensions if pair[0] != b"fsync@openssh.com"]
            monkeypatch.setattr(handler, "_extensions", offered)
        mount = make_mount(server)
        server.faults.errors[request_name] = lambda: asyncssh.SFTPFailure("No space left on device")
        outcome = write_file(mount.path / "f", MIB, fsync=False)
        assert (outcome.stage, outcome.code) == ("close", errno.ENOSPC)
        server.faults.clear()
        assert write_file(mount.path / "f", MIB, fsync=False).stage is None
        assert (server.tree / "f").read_bytes() == noise(MIB)

    def test_fsync_tells(self, server: FaultyServer, mount: Mount) -> None:
        server.faults.errors["fsync"] = lambda: asyncssh.SFTPFailure("Failure")
        outcome = write_file(mount.path / "f", MIB, fsync=True)
        assert (outcome.stage, outcome.code) == ("fsync", errno.EIO)

    def test_a_read_that_fails_is_no_end_of_file(self, server: FaultyServer, mount: Mount) -> None:
        (server.tree / "f").write_bytes(noise(4 * MIB))
        with opened(mount.path / "f", os.O_RDONLY) as fd:
            assert os.pread(fd, 100, 0) == noise(4 * MIB)[:100]
        server.faults.errors["read"] = lambda: asyncssh.SFTPFailure("Failure")
        with opened(mount.path / "f", os.O_RDONLY) as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            with refused(errno.EIO):
                os.pread(fd, MIB, 3 * MIB)
        server.faults.clear()
        assert (mount.path / "f").read_bytes() == noise(4 * MIB)

    @pytest.fixture
    def one_is_left(self, server: FaultyServer, mount: Mount) -> List[str]:
        """Names in a directory of which the first was removed, as far as its program knows, and is there."""
        (server.tree / "d").mkdir()
        names = [f"{number}" for number in range(10)]
        for name in names:
            (server.tree / "d" / name).write_bytes(b"")
        os.listdir(mount.path / "d")
        for _ in range(ROW):
            os.unlink(mount.path / "d" / names.pop(0))
        server.faults.errors["remove"] = lambda: asyncssh.SFTPPermissionDenied("Permission denied")
        os.unlink(mount.path / "d" / names[0])
        wait_until(lambda: "could not be removed" in mount.log_text(), 20.0, "the refusal")
        server.faults.clear()
        return names

    def test_a_removal_that_was_not_waited_for(
        self, server: FaultyServer, mount: Mount, one_is_left: List[str]
    ) -> None:
        told = subprocess.run(["rm", "-r", mount.path / "d"], stderr=subprocess.PIPE, text=True)
        assert told.returncode != 0 and "Permission denied" in told.stderr
        fsync_directory(mount.path / "d")  # the last of rm's removals may still be under way
        assert sorted(os.listdir(server.tree / "d")) == sorted(os.listdir(mount.path / "d")) != []
        subprocess.run(["rm", "-r", mount.path / "d"], check=True)
        assert os.listdir(server.tree) == [] and mount.unmount() == 0

    def test_a_removal_that_nobody_asked_about(
        self, server: FaultyServer, mount: Mount, one_is_left: List[str]
    ) -> None:
        assert mount.unmount() != 0
        assert f"/d/{one_is_left[0]}: not removed: Permission denied" in mount.log_text()
        assert sorted(os.listdir(server.tree / "d")) == one_is_left

    def test_a_listing_that_breaks_off_is_an_error(self, server: FaultyServer, mount: Mount) -> None:
        (server.tree / "d").mkdir()
        for count in range(1000):
            (server.tree / "d" / f"f{count}").touch()
        server.faults.errors["readdir"] = lambda: asyncssh.SFTPFailure("Failure")
        with refused(errno.EIO):
            os.listdir(mount.path / "d")
        server.faults.clear()
        assert len(os.listdir(mount.path / "d")) == 1000

    def test_attributes_refused(self, server: FaultyServer, mount: Mount) -> None:
        (mount.path / "f").write_bytes(b"x")
        os.chmod(mount.path / "f", 0o644)
        server.faults.errors["setstat"] = lambda: asyncssh.SFTPPermissionDenied("Permission denied")
        with refused(errno.EPERM, errno.EACCES):
            os.chmod(mount.path / "f", 0o600)
        with refused(errno.EPERM, errno.EACCES):
            os.truncate(mount.path / "f", 0)
        assert (mount.path / "f").stat().st_mode & 0o777 == 0o644
        assert (mount.path / "f").stat().st_size == 1
