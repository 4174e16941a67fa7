"""File operations: whatever a local folder does, as far as SFTP can carry it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from mount.helpers import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    Here,
    in_another_process,
    noise,
    opened,
    refused,
    renameat2,
)
from support.mount import Mount
from support.process import wait_until

EDGES = [1, 4095, 4096, 4097, 131071, 131072, 131073, 300_001]


class TestOpen:
    def test_creates_with_the_mode_less_umask(self, here: Here) -> None:
        previous = os.umask(0o027)
        try:
            with opened(here.path / "f", os.O_CREAT | os.O_WRONLY, 0o666) as fd:
                assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o640
        finally:
            os.umask(previous)
        assert stat.S_IMODE((here.served / "f").stat().st_mode) == 0o640

    def test_read_only_with_creat_makes_an_empty_file(self, here: Here) -> None:
        with opened(here.path / "f", os.O_CREAT | os.O_RDONLY) as fd:
            assert os.read(fd, 10) == b""
        assert (here.served / "f").read_bytes() == b""

    def test_exclusive_creation_refuses_what_exists(self, here: Here) -> None:
        (here.path / "f").write_bytes(b"kept")
        os.symlink("nowhere", here.path / "dangling")
        (here.path / "d").mkdir()
        for name in ("f", "dangling", "d"):
            with refused(errno.EEXIST):
                os.open(here.path / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        assert (here.served / "f").read_bytes() == b"kept"
        assert not (here.served / "nowhere").exists()

    def test_exclusive_creation_sees_another_clients_new_file(self, here: Here) -> None:
        assert os.listdir(here.path) == []  # so that an empty listing may be cached
        (here.served / "lock").write_bytes(b"theirs")
        with refused(errno.EEXIST):
            os.open(here.path / "lock", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        assert (here.served / "lock").read_bytes() == b"theirs"

    def test_creation_without_exclusive_keeps_another_clients_new_file(self, here: Here) -> None:
        assert os.listdir(here.path) == []
        (here.served / "f").write_bytes(b"theirs")
        with opened(here.path / "f", os.O_CREAT | os.O_RDWR) as fd:
            assert os.read(fd, 100) == b"theirs"

    @pytest.mark.parametrize("access", [os.O_WRONLY, os.O_RDWR])
    def test_truncating(self, here: Here, access: int) -> None:
        (here.path / "f").write_bytes(noise(300_000))
        with opened(here.path / "f", access | os.O_TRUNC) as fd:
            assert os.fstat(fd).st_size == 0
            os.write(fd, b"new")
        assert (here.served / "f").read_bytes() == b"new"

    def test_truncating_while_another_handle_is_dirty(self, here: Here) -> None:
        with opened(here.path / "f", os.O_CREAT | os.O_RDWR) as first:
            os.write(first, noise(200_000))
            with opened(here.path / "f", os.O_WRONLY | os.O_TRUNC) as second:
                os.write(second, b"second")
                assert os.pread(first, 100, 0) == b"second"
            os.pwrite(first, b"F", 0)
        assert (here.served / "f").read_bytes() == b"Fecond"

    def test_appending_ignores_the_position(self, here: Here) -> None:
        (here.served / "f").write_bytes(b"start")
        with opened(here.path / "f", os.O_RDWR | os.O_APPEND) as fd:
            os.lseek(fd, 0, os.SEEK_SET)
            os.write(fd, b"-one")
            os.lseek(fd, 2, os.SEEK_SET)
            os.write(fd, b"-two")
            assert os.pread(fd, 100, 0) == b"start-one-two"
        assert (here.served / "f").read_bytes() == b"start-one-two"

    def test_appending_through_two_handles_and_a_plain_one(self, here: Here) -> None:
        expected = b""
        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
        with opened(here.path / "f", flags) as one, opened(here.path / "f", flags) as two:
            for count in range(100):
                for fd, name in ((one, b"one"), (two, b"two")):
                    record = name * (1 + count * 37 % 400)
                    os.write(fd, record)
                    expected += record
            with opened(here.path / "f", os.O_RDWR) as plain:
                assert os.pread(plain, len(expected) + 1, 0) == expected
                os.pwrite(plain, b"PLAIN", 1000)
                expected = expected[:1000] + b"PLAIN" + expected[1005:]
            os.write(one, b"end")
        assert (here.served / "f").read_bytes() == expected + b"end"

    @pytest.mark.parametrize("start", [0, 5000, 131_070, 299_990, 300_000])
    def test_write_only_changes_part_of_a_block(self, here: Here, start: int) -> None:
        data = bytearray(noise(300_000))
        (here.served / "f").write_bytes(data)
        with opened(here.path / "f", os.O_WRONLY) as fd:
            os.pwrite(fd, b"0123456789", start)
            data[start : start + 10] = b"0123456789"
            assert (here.path / "f").read_bytes() == data
        assert (here.served / "f").read_bytes() == data

    def test_read_write_in_place(self, here: Here) -> None:
        data = bytearray(noise(500_000))
        (here.served / "f").write_bytes(data)
        with opened(here.path / "f", os.O_RDWR) as fd:
            for start in range(0, 500_000, 70_001):
                os.pwrite(fd, b"#" * 100, start)
                data[start : start + 100] = b"#" * 100
                before, after = max(0, start - 50), start + 200
                assert os.pread(fd, after - before, before) == data[before:after]
        assert (here.served / "f").read_bytes() == data

    def test_access_modes_are_kept(self, here: Here) -> None:
        (here.path / "f").write_bytes(b"x")
        with opened(here.path / "f", os.O_RDONLY) as fd, refused(errno.EBADF):
            os.write(fd, b"y")
        with opened(here.path / "f", os.O_WRONLY) as fd, refused(errno.EBADF):
            os.read(fd, 1)

    def test_a_file_created_read_only_is_writable_through_its_handle(self, here: Here) -> None:
        with opened(here.path / "f", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o400) as fd:
            os.write(fd, b"written")
        assert (here.served / "f").read_bytes() == b"written"
        assert stat.S_IMODE((here.served / "f").stat().st_mode) == 0o400

    @pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC])
    def test_synchronous_writes_are_stored_when_write_returns(self, here: Here, flag: int) -> None:
        with opened(here.path / "f", os.O_CREAT | os.O_WRONLY | flag) as fd:
            os.write(fd, noise(10_000))
            assert (here.served / "f").read_bytes() == noise(10_000)

    def test_direct_io_is_right_or_refused(self, here: Here) -> None:
        (here.path / "f").write_bytes(bytes(8192))
        try:
            fd = os.open(here.path / "f", os.O_RDWR | os.O_DIRECT)
        except OSError as error:
            assert error.errno == errno.EINVAL
            return
        with mmap.mmap(-1, 8192) as aligned:
            aligned[:] = noise(8192)
            os.pwrite(fd, aligned, 0)
            assert os.preadv(fd, [aligned], 0) == 8192
            assert aligned[:] == noise(8192)
        os.close(fd)
        assert (here.served / "f").read_bytes() == noise(8192)

    def test_open_refusals(self, here: Here) -> None:
        (here.path / "f").write_bytes(b"")
        (here.path / "d").mkdir()
        os.symlink("f", here.path / "link")
        os.symlink("loop", here.path / "loop")
        cases = [
            ("absent", os.O_RDONLY, errno.ENOENT),
            ("absent/f", os.O_RDONLY | os.O_CREAT, errno.ENOENT),
            ("f/below", os.O_RDONLY, errno.ENOTDIR),
            ("f/below", os.O_WRONLY | os.O_CREAT, errno.ENOTDIR),
            ("f", os.O_RDONLY | os.O_DIRECTORY, errno.ENOTDIR),
            ("d", os.O_WRONLY, errno.EISDIR),
            ("d", os.O_RDWR | os.O_CREAT, errno.EISDIR),
            ("link", os.O_RDONLY | os.O_NOFOLLOW, errno.ELOOP),
            ("loop", os.O_RDONLY, errno.ELOOP),
            ("n" * 256, os.O_RDONLY, errno.ENAMETOOLONG),
            ("n" * 256, os.O_WRONLY | os.O_CREAT, errno.ENAMETOOLONG),
        ]
        for name, flags, code in cases:
            with refused(code):
                os.close(os.open(here.path / name, flags))


class TestData:
    @pytest.mark.parametrize("length", [0, *EDGES, 5_000_001])
    def test_one_write_of_any_length(self, here: Here, length: int) -> None:
        data = noise(length)
        with opened(here.path / "f", os.O_CREAT | os.O_RDWR) as fd:
            assert os.write(fd, data) == length
            assert os.fstat(fd).st_size == length
            assert os.pread(fd, length + 1, 0) == data
        assert (here.path / "f").read_bytes() == data
        assert (here.served / "f").read_bytes() == data

    def test_long_writes_are_not_cut_short_by_a_signal_that_is_handled(self, here: Here) -> None:
        """SIGHUP and SIGTERM may mean "read your configuration": a local disk cuts no write short for them."""
        code = """
import os, signal, sys, threading, time
signal.signal(signal.SIGTERM, lambda number, frame: None)
ended = threading.Event()
def disturb():
    while not ended.wait(0.0005):
        os.kill(os.getpid(), signal.SIGTERM)
thread = threading.Thread(target=disturb)
thread.start()
fd = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
written = set()
for _ in range(60):
    began_s = time.monotonic()
    count = os.write(fd, bytes(1 << 20))
    if time.monotonic() - began_s < 0.25:  # a slower one waited for the server, and may end for what could be its program's end
        written.add(count)
ended.set()
thread.join()
os.close(fd)
print(sorted(written))
"""
        assert in_another_process(code, here.path / "f") == str([1 << 20])

    @pytest.mark.parametrize("block", [1, 1000, 4096, 10_240])
    def test_many_small_writes(self, here: Here, block: int) -> None:
        data = noise(min(400 * block, 1_000_000))
        with (here.path / "f").open("wb", buffering=0) as file:
            for start in range(0, len(data), block):
                file.write(data[start : start + block])
        assert (here.served / "f").read_bytes() == data

    def test_backwards_and_overlapping_writes(self, here: Here) -> None:
        data = bytearray(200_000)
        with opened(here.path / "f", os.O_CREAT | os.O_WRONLY) as fd:
            for count, start in enumerate(range(195_000, -1, -3000)):
                piece = noise(5000, count)
                os.pwrite(fd, piece, start)
                data[start : start + 5000] = piece
        assert (here.served / "f").read_bytes() == data

    @pytest.mark.parametrize("gap", [1, 4096, 131_072, 1_000_003])
    def test_holes_read_as_zeros(self, here: Here, gap: int) -> None:
        with opened(here.path / "f", os.O_CREAT | os.O_RDWR) as fd:
            os.write(fd, b"head")
            os.pwrite(fd, b"tail", 4 + gap)
            assert os.pread(fd, gap + 10, 0) == b"head" + bytes(gap) + b"tail"
        assert (here.served / "f").read_bytes() == b"head" + bytes(gap) + b"tail"

    def test_a_file_past_4_gib(self, here: Here) -> None:
        far = 5 * 2**30 + 1
        with opened(here.path / "f", os.O_CREAT | os.O_RDWR) as fd:
            os.pwrite(fd, b"low", 2**32 - 1)
            os.pwrite(fd, b"far", far)
            assert os.pread(fd, 10, far - 2) == b"\0\0far"
            assert os.fstat(fd).st_size == far + 3
        assert (here.path / "f").stat().st_size == (here.served / "f").stat().st_size == far + 3
        with opened(here.served / "f", os.O_RDONLY) as fd:
            assert os.pread(fd, 5, 2**32 - 2) == b"\0low\0"
            assert os.pread(fd, 5, far - 1) == b"\0far"
        with opened(here.path / "f", os.O_RDONLY) as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(fd, 5, 2**32 - 2) == b"\0low\0"
            assert os.lseek(fd, 0, os.SEEK_END) == far + 3
        os.truncate(here.path / "f", 2**32 + 1)
        assert (here.served / "f").stat().st_size == 2**32 + 1

    def test_reads_at_and_after_the_end(self, here: Here) -> None:
        (here.served / "f").write_bytes(b"12345")
        with opened(here.path / "f", os.O_RDONLY) as fd:
            assert os.pread(fd, 100, 3) == b"45"
            assert os.pread(fd, 100, 5) == b""
            assert os.pread(fd, 100, 10**9) == b""

    def test_a_cold_file_in_pieces_in_any_order(self, here: Here) -> None:
        data = noise(3_000_000)
        (here.served / "f").write_bytes(data)
        with opened(here.path / "f", os.O_RDONLY) as fd:
            for start in [2_999_000, 0, 1_500_001, *range(2_000_000, 1_000_000, -130_000), 131_071, 7]:
                assert os.pread(fd, 50_000, start) == data[start : start + 50_000]
        assert (here.path / "f").read_bytes() == data

    def test_copies_made_by_the_kernel(self, here: Here, tmp_path: Path) -> None:
        data = noise(700_001)
        (here.path / "f").write_bytes(data)
        with opened(here.path / "f", os.O_RDONLY) as source:
            with opened(here.path / "copy", os.O_CREAT | os.O_WRONLY) as target:
                copied = 0
                while copied < len(data):
                    copied += os.copy_file_range(source, target, len(data) - copied, copied, copied)
            with opened(tmp_path / "sent", os.O_CREAT | os.O_WRONLY) as target:
                sent = 0
                while sent < len(data):
                    sent += os.sendfile(target, source, sent, len(data) - sent)
        assert (here.served / "copy").read_bytes() == data
        assert (tmp_path / "sent").read_bytes() == data

    def test_preallocation_extends_with_zeros(self, here: Here) -> None:
        with opened(here.path / "f", os.O_CREAT | os.O_RDWR) as fd:
            os.write(fd, b"data")
            os.posix_fallocate(fd, 0, 50_000)
            assert os.fstat(fd).st_size == 50_000
        assert (here.served / "f").read_bytes() == b"data" + bytes(49_996)

    def test_a_program_runs_from_the_mount(self, here: Here) -> None:
        shutil.copy(shutil.which("echo") or "/bin/echo", here.path / "program")
        output = subprocess.run([here.path / "program", "hello"], check=True, capture_output=True, text=True)
        assert output.stdout == "hello\n"


class TestTruncate:
    @pytest.mark.parametrize("by", ["path", "handle"])
    @pytest.mark.parametrize("dirty", [True, False])
    @pytest.mark.parametrize("size", [0, *EDGES, 500_000])
    def test_down_and_up(self, here: Here, by: str, dirty: bool, size: int) -> None:
        data = noise(300_001)
        if not dirty:
            (here.served / "f").write_bytes(data)
        with opened(here.path / "f", os.O_CREAT | os.O_RDWR) as fd:
            if dirty:
                os.write(fd, data)
            if by == "path":
                os.truncate(here.path / "f", size)
            else:
                os.ftruncate(fd, size)
            expected = data[:size] + bytes(max(0, size - len(data)))
            assert os.fstat(fd).st_size == (here.path / "f").stat().st_size == size
            assert os.pread(fd, size + 1, 0) == expected
        assert (here.served / "f").read_bytes() == expected

    @pytest.mark.parametrize("size", [0, 1, 4095, 131_071, 131_072, 200_000])
    def test_what_was_cut_off_does_not_come_back(self, here: Here, size: int) -> None:
        with opened(here.path / "f", os.O_CREAT | os.O_RDWR) as fd:
            os.write(fd, b"\xff" * 300_000)
            os.ftruncate(fd, size)
            os.ftruncate(fd, 300_000)
            os.pwrite(fd, b"end", 300_000)
            expected = b"\xff" * size + bytes(300_000 - size) + b"end"
            assert os.pread(fd, 400_000, 0) == expected
        assert (here.served / "f").read_bytes() == expected

    def test_by_path_without_an_open_handle(self, here: Here) -> None:
        (here.served / "f").write_bytes(b"0123456789")
        os.truncate(here.path / "f", 4)
        assert (here.served / "f").read_bytes() == b"0123"
        os.truncate(here.path / "f", 6)
        assert (here.served / "f").read_bytes() == b"0123\0\0"
        assert (here.path / "f").read_bytes() == b"0123\0\0"

    def test_refusals(self, here: Here) -> None:
        (here.path / "d").mkdir()
        with refused(errno.EISDIR):
            os.truncate(here.path / "d", 0)
        with refused(errno.ENOENT):
            os.truncate(here.path / "absent", 0)
        (here.path / "f").write_bytes(b"x")
        with opened(here.path / "f", os.O_RDONLY) as fd, refused(errno.EINVAL, errno.EBADF):
            os.ftruncate(fd, 0)


class TestMmap:
    def test_shared_writes_reach_the_server_at_msync(self, here: Here) -> None:
        data = bytearray(noise(200_000))
        (here.served / "f").write_bytes(data)
        with opened(here.path / "f", os.O_RDWR) as fd, mmap.mmap(fd, 200_000) as mapped:
            assert mapped[:] == data
            for start in (0, 4090, 131_070, 199_990):
                mapped[start : start + 10] = data[start : start + 10] = b"0123456789"
            assert os.pread(fd, 200_000, 0) == data
            mapped.flush()
            os.fsync(fd)
            assert (here.served / "f").read_bytes() == data

    def test_a_mapping_outlives_its_descriptor(self, here: Here) -> None:
        (here.path / "f").write_bytes(bytes(10_000))
        with (here.path / "f").open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 10_000)
        mapped[5000:5003] = b"map"
        mapped.close()
        with opened(here.path / "f", os.O_RDONLY) as fd:
            os.fsync(fd)
        assert (here.served / "f").read_bytes() == bytes(5000) + b"map" + bytes(4997)

    def test_two_mappings_and_write_see_each_other(self, here: Here) -> None:
        (here.path / "f").write_bytes(bytes(20_000))
        with (here.path / "f").open("r+b") as one, (here.path / "f").open("r+b") as two:
            first, second = mmap.mmap(one.fileno(), 20_000), mmap.mmap(two.fileno(), 20_000)
            first[100:103] = b"abc"
            assert second[100:103] == b"abc"
            os.pwrite(two.fileno(), b"xyz", 12_000)
            assert first[12_000:12_003] == b"xyz"
            first.close()
            second.close()
        assert (here.served / "f").read_bytes()[12_000:12_003] == b"xyz"

    def test_private_mappings_change_nothing(self, here: Here) -> None:
        (here.path / "f").write_bytes(b"original")
        access = mmap.PROT_READ | mmap.PROT_WRITE
        with opened(here.path / "f", os.O_RDONLY) as fd, mmap.mmap(fd, 8, mmap.MAP_PRIVATE, access) as mapped:
            mapped[:3] = b"new"
            assert mapped[:] == b"newginal"
        assert (here.served / "f").read_bytes() == (here.path / "f").read_bytes() == b"original"


class TestFsync:
    @pytest.mark.parametrize("call", [os.fsync, os.fdatasync])
    def test_of_the_writing_handle(self, here: Here, call: object) -> None:
        with opened(here.path / "f", os.O_CREAT | os.O_WRONLY) as fd:
            os.write(fd, noise(300_000))
            call(fd)  # type: ignore[operator]
            assert (here.served / "f").read_bytes() == noise(300_000)

    def test_of_a_read_only_handle_stores_what_others_wrote(self, here: Here) -> None:
        with opened(here.path / "f", os.O_CREAT | os.O_WRONLY) as writer:
            os.write(writer, noise(300_000))
            with opened(here.path / "f", os.O_RDONLY) as reader:
                os.fsync(reader)
                assert (here.served / "f").read_bytes() == noise(300_000)

    def test_of_a_directory_stores_its_open_files(self, here: Here) -> None:
        with opened(here.path / "f", os.O_CREAT | os.O_WRONLY) as writer:
            os.write(writer, noise(300_000))
            with opened(here.path, os.O_RDONLY | os.O_DIRECTORY) as directory:
                os.fsync(directory)
            assert (here.served / "f").read_bytes() == noise(300_000)

    def test_of_an_unlinked_file(self, here: Here) -> None:
        with opened(here.path / "f", os.O_CREAT | os.O_RDWR) as fd:
            os.write(fd, b"x")
            os.unlink(here.path / "f")
            os.fsync(fd)


class TestClose:
    def test_every_byte_is_on_the_server_when_close_returns(self, here: Here) -> None:
        for count in range(20):
            (here.path / f"f{count}").write_bytes(noise(count * 10_007, count))
            assert (here.served / f"f{count}").read_bytes() == noise(count * 10_007, count)

    def test_close_of_a_duplicate_stores_too(self, here: Here) -> None:
        with opened(here.path / "f", os.O_CREAT | os.O_WRONLY) as fd:
            twin = os.dup(fd)
            os.write(fd, b"before")
            os.close(twin)
            assert (here.served / "f").read_bytes() == b"before"
            os.write(fd, b"after")
        assert (here.served / "f").read_bytes() == b"beforeafter"

    def test_a_handle_inherited_by_another_process(self, here: Here) -> None:
        with (here.path / "f").open("wb") as file:
            subprocess.run(["sh", "-c", "echo one; echo two"], stdout=file, check=True)
            subprocess.run(["sh", "-c", "echo three"], stdout=file, check=True)
        assert (here.served / "f").read_bytes() == b"one\ntwo\nthree\n"


class TestRename:
    def test_to_a_new_name_and_into_another_directory(self, here: Here) -> None:
        (here.path / "a").write_bytes(b"data")
        (here.path / "d").mkdir()
        os.rename(here.path / "a", here.path / "b")
        os.rename(here.path / "b", here.path / "d" / "c")
        assert sorted(os.listdir(here.path)) == sorted(os.listdir(here.served)) == ["d"]
        assert (here.path / "d" / "c").read_bytes() == (here.served / "d" / "c").read_bytes() == b"data"
        with refused(errno.ENOENT):
            os.stat(here.path / "a")

    def test_over_a_file(self, here: Here) -> None:
        (here.path / "a").write_bytes(b"new")
        (here.path / "b").write_bytes(noise(200_000))
        assert (here.path / "b").read_bytes() == noise(200_000)
        os.rename(here.path / "a", here.path / "b")
        assert (here.path / "b").read_bytes() == (here.served / "b").read_bytes() == b"new"
        assert (here.path / "b").stat().st_size == 3
        assert os.listdir(here.path) == os.listdir(here.served) == ["b"]

    def test_over_an_empty_directory(self, here: Here) -> None:
        (here.path / "a").mkdir()
        (here.path / "a" / "f").write_bytes(b"x")
        (here.path / "b").mkdir()
        os.rename(here.path / "a", here.path / "b")
        assert os.listdir(here.path) == os.listdir(here.served) == ["b"]
        assert os.listdir(here.path / "b") == os.listdir(here.served / "b") == ["f"]

    def test_never_over_a_directory_with_entries(self, here: Here) -> None:
        for name in ("a", "b"):
            (here.path / name).mkdir()
            (here.path / name / f"in-{name}").write_bytes(b"x")
        with refused(errno.ENOTEMPTY, errno.EEXIST):
            os.rename(here.path / "a", here.path / "b")
        for root in here:
            assert sorted(os.listdir(root)) == ["a", "b"]
            assert os.listdir(root / "a") == ["in-a"]
            assert os.listdir(root / "b") == ["in-b"]

    def test_never_over_a_directory_that_another_client_filled(self, here: Here) -> None:
        (here.path / "a").mkdir()
        (here.path / "b").mkdir()
        assert os.listdir(here.path / "b") == []
        (here.served / "b" / "theirs").write_bytes(b"x")
        with refused(errno.ENOTEMPTY, errno.EEXIST):
            os.rename(here.path / "a", here.path / "b")
        assert os.listdir(here.served / "b") == ["theirs"]

    def test_a_borg_lock_directory_onto_a_held_one(self, here: Here) -> None:
        """borg makes a directory with a file in it and renames it to lock.exclusive: the second must fail."""
        for name in ("first", "second"):
            (here.path / name).mkdir()
            (here.path / name / f"host.{name}").write_bytes(b"")
        os.rename(here.path / "first", here.path / "lock.exclusive")
        with refused(errno.ENOTEMPTY, errno.EEXIST):
            os.rename(here.path / "second", here.path / "lock.exclusive")
        assert os.listdir(here.served / "lock.exclusive") == ["host.first"]

    def test_refusals(self, here: Here) -> None:
        (here.path / "f").write_bytes(b"f")
        (here.path / "d" / "below").mkdir(parents=True)
        for source, target, code in [
            ("d", "f", errno.ENOTDIR),
            ("f", "d", errno.EISDIR),
            ("d", "d/below/inside", errno.EINVAL),
            ("absent", "f", errno.ENOENT),
            ("f", "absent/f", errno.ENOENT),
            ("f", "f/below", errno.ENOTDIR),
            ("f", "n" * 256, errno.ENAMETOOLONG),
        ]:
            with refused(code):
                os.rename(here.path / source, here.path / target)
        assert (here.served / "f").read_bytes() == b"f"
        with refused(errno.EXDEV):
            os.rename(here.path / "f", here.served / "elsewhere")

    def test_onto_itself_changes_nothing(self, here: Here) -> None:
        (here.path / "f").write_bytes(b"data")
        os.rename(here.path / "f", here.path / "f")
        (here.path / "d").mkdir()
        os.rename(here.path / "d", here.path / "d")
        assert (here.served / "f").read_bytes() == b"data"

    def test_onto_another_link_of_the_same_file_changes_nothing(self, here: Here) -> None:
        (here.path / "a").write_bytes(b"data")
        os.link(here.path / "a", here.path / "b")
        os.rename(here.path / "a", here.path / "b")
        assert sorted(os.listdir(here.path)) == sorted(os.listdir(here.served)) == ["a", "b"]
        assert (here.served / "a").read_bytes() == (here.served / "b").read_bytes() == b"data"

    @pytest.mark.parametrize("open_name", ["a", "b"])
    def test_onto_another_link_of_the_same_open_file_changes_nothing(
        self, here: Here, open_name: str
    ) -> None:
        (here.path / "a").write_bytes(b"data")
        os.link(here.path / "a", here.path / "b")
        with opened(here.path / open_name, os.O_RDWR) as fd:
            os.rename(here.path / "a", here.path / "b")
            os.pwrite(fd, b"D", 0)
            assert sorted(os.listdir(here.path)) == ["a", "b"]
            assert (here.path / "a").read_bytes() == (here.path / "b").read_bytes() == b"Data"
        assert sorted(os.listdir(here.served)) == ["a", "b"]
        assert (here.served / "a").read_bytes() == (here.served / "b").read_bytes() == b"Data"

    def test_an_open_file_with_unsaved_writes(self, here: Here) -> None:
        with opened(here.path / "a", os.O_CREAT | os.O_RDWR) as fd:
            os.write(fd, noise(150_000))
            os.rename(here.path / "a", here.path / "b")
            os.pwrite(fd, b"more", 150_000)
            assert os.pread(fd, 200_000, 0) == noise(150_000) + b"more"
            assert (here.path / "b").stat().st_size == os.fstat(fd).st_size == 150_004
            (here.path / "a").write_bytes(b"another")
        assert (here.served / "b").read_bytes() == noise(150_000) + b"more"
        assert (here.served / "a").read_bytes() == b"another"

    def test_over_an_open_file_leaves_its_handle_the_old_content(self, here: Here) -> None:
        (here.path / "a").write_bytes(noise(300_000, 1))
        (here.path / "b").write_bytes(noise(300_000, 2))
        with opened(here.path / "b", os.O_RDWR) as fd:
            os.rename(here.path / "a", here.path / "b")
            assert os.pread(fd, 300_000, 0) == noise(300_000, 2)
            os.pwrite(fd, b"old", 0)
            assert os.pread(fd, 3, 0) == b"old"
            assert (here.path / "b").read_bytes() == noise(300_000, 1)
            assert sorted(os.listdir(here.path)) == ["b"]
        assert (here.served / "b").read_bytes() == noise(300_000, 1)
        wait_until(
            lambda: os.listdir(here.served) == ["b"], 5.0, "the end of the replaced file on the server"
        )

    def test_a_directory_with_an_open_file_below(self, here: Here) -> None:
        (here.path / "a").mkdir()
        with opened(here.path / "a" / "f", os.O_CREAT | os.O_RDWR) as fd:
            os.write(fd, b"one")
            os.rename(here.path / "a", here.path / "b")
            os.write(fd, b"two")
            assert (here.path / "b" / "f").read_bytes() == b"onetwo"
            os.ftruncate(fd, 5)
        assert (here.served / "b" / "f").read_bytes() == b"onetw"
        assert os.listdir(here.path) == ["b"]

    def test_noreplace_is_honoured_or_refused(self, here: Here) -> None:
        (here.path / "a").write_bytes(b"a")
        (here.path / "b").write_bytes(b"b")
        with refused(errno.EEXIST, errno.EINVAL):
            renameat2(here.path / "a", here.path / "b", RENAME_NOREPLACE)
        assert (here.served / "a").read_bytes() == b"a"
        assert (here.served / "b").read_bytes() == b"b"
        try:
            renameat2(here.path / "a", here.path / "c", RENAME_NOREPLACE)
        except OSError as error:
            assert error.errno == errno.EINVAL
            assert (here.served / "a").read_bytes() == b"a"
        else:
            assert (here.served / "c").read_bytes() == b"a"
            assert not (here.served / "a").exists()

    def test_exchange_is_honoured_or_refused(self, here: Here) -> None:
        (here.path / "a").write_bytes(b"a")
        (here.path / "b").write_bytes(b"b")
        contents = {"a": b"a", "b": b"b"}
        try:
            renameat2(here.path / "a", here.path / "b", RENAME_EXCHANGE)
            contents = {"a": b"b", "b": b"a"}
        except OSError as error:
            assert error.errno == errno.EINVAL
        for name, content in contents.items():
            assert (here.served / name).read_bytes() == (here.path / name).read_bytes() == content


class TestUnlink:
    @staticmethod
    def wait_for_nothing_left(here: Here) -> None:
        """The kernel tells of the last close after close() has returned, and the server's side follows that."""
        wait_until(lambda: os.listdir(here.served) == [], 5.0, "the end of the unlinked file on the server")

    def test_an_open_file_keeps_its_data(self, here: Here) -> None:
        (here.path / "f").write_bytes(noise(300_000))
        with opened(here.path / "f", os.O_RDWR) as fd:
            os.unlink(here.path / "f")
            with refused(errno.ENOENT):
                os.stat(here.path / "f")
            assert os.listdir(here.path) == []
            assert os.pread(fd, 300_001, 0) == noise(300_000)
            os.pwrite(fd, b"end", 300_000)
            os.ftruncate(fd, 300_002)
            assert os.fstat(fd).st_size == 300_002
            assert os.pread(fd, 10, 299_999) == noise(300_000)[-1:] + b"en"
        assert os.listdir(here.path) == []
        self.wait_for_nothing_left(here)

    def test_an_open_file_with_unsaved_writes(self, here: Here) -> None:
        with opened(here.path / "f", os.O_CREAT | os.O_RDWR) as fd:
            os.write(fd, b"unsaved")
            os.unlink(here.path / "f")
            assert os.pread(fd, 100, 0) == b"unsaved"
        self.wait_for_nothing_left(here)

    def test_an_open_file_in_the_root_of_the_mount(self, mount: Mount) -> None:
        """Wherever a mount puts such files meanwhile, its own root is no place to show them."""
        (mount.path / "d").mkdir()
        for path in (mount.path / "f", mount.path / "d" / "f"):
            with opened(path, os.O_CREAT | os.O_RDWR) as fd:
                os.write(fd, b"data")
                os.unlink(path)
                assert os.listdir(mount.path) == ["d"]
                assert os.listdir(mount.path / "d") == []
                assert os.pread(fd, 10, 0) == b"data"
        wait_until(
            lambda: os.listdir(mount.served) == ["d"], 5.0, "the end of the unlinked files on the server"
        )

    def test_many_open_files_of_one_name(self, here: Here) -> None:
        handles = []
        for count in range(50):
            handles.append(os.open(here.path / "f", os.O_CREAT | os.O_EXCL | os.O_RDWR))
            os.write(handles[-1], b"%d" % count)
            os.unlink(here.path / "f")
        assert os.listdir(here.path) == []
        for count, fd in enumerate(handles):
            assert os.pread(fd, 10, 0) == b"%d" % count
            os.close(fd)
        self.wait_for_nothing_left(here)

    def test_the_name_can_be_used_again_at_once(self, here: Here) -> None:
        (here.path / "f").write_bytes(b"old content")
        with opened(here.path / "f", os.O_RDWR) as old:
            os.unlink(here.path / "f")
            with opened(here.path / "f", os.O_CREAT | os.O_EXCL | os.O_RDWR) as new:
                os.write(new, b"new")
                os.pwrite(old, b"OLD", 0)
                assert os.pread(old, 100, 0) == b"OLD content"
                assert os.pread(new, 100, 0) == b"new"
                assert os.fstat(old).st_ino != os.fstat(new).st_ino
        assert (here.served / "f").read_bytes() == b"new"

    def test_the_directory_of_an_open_unlinked_file_can_go(self, here: Here) -> None:
        (here.path / "d").mkdir()
        with opened(here.path / "d" / "f", os.O_CREAT | os.O_RDWR) as fd:
            os.write(fd, b"data")
            os.unlink(here.path / "d" / "f")
            os.rmdir(here.path / "d")
            assert os.pread(fd, 10, 0) == b"data"
        self.wait_for_nothing_left(here)

    def test_refusals(self, here: Here) -> None:
        (here.path / "d" / "below").mkdir(parents=True)
        (here.path / "f").write_bytes(b"")
        for call, name, codes in [
            (os.unlink, "d", (errno.EISDIR, errno.EPERM)),
            (os.unlink, "absent", (errno.ENOENT,)),
            (os.unlink, "f/below", (errno.ENOTDIR,)),
            (os.rmdir, "d", (errno.ENOTEMPTY,)),
            (os.rmdir, "f", (errno.ENOTDIR,)),
            (os.rmdir, "absent", (errno.ENOENT,)),
            (os.mkdir, "d", (errno.EEXIST,)),
            (os.mkdir, "f", (errno.EEXIST,)),
            (os.mkdir, "absent/d", (errno.ENOENT,)),
            (os.mkdir, "f/d", (errno.ENOTDIR,)),
            (os.mkdir, "n" * 256, (errno.ENAMETOOLONG,)),
            (os.listdir, "f", (errno.ENOTDIR,)),
            (os.listdir, "absent", (errno.ENOENT,)),
        ]:
            with refused(*codes):
                call(here.path / name)  # type: ignore[operator]

    def test_rmdir_of_what_another_client_filled(self, here: Here) -> None:
        (here.path / "d").mkdir()
        (here.served / "d" / "theirs").write_bytes(b"x")
        with refused(errno.ENOTEMPTY):
            os.rmdir(here.path / "d")
        assert (here.served / "d" / "theirs").read_bytes() == b"x"

    def test_mkdir_where_another_client_was_first(self, here: Here) -> None:
        assert os.listdir(here.path) == []
        (here.served / "d").mkdir()
        with refused(errno.EEXIST):
            os.mkdir(here.path / "d")

    def test_a_whole_tree(self, here: Here) -> None:
        for top in range(3):
            for below in range(5):
                directory = here.path / f"t{top}" / f"b{below}"
                directory.mkdir(parents=True)
                for name in range(5):
                    (directory / f"f{name}").write_bytes(b"x")
        for top in range(3):
            shutil.rmtree(here.path / f"t{top}")
        assert os.listdir(here.path) == os.listdir(here.served) == []


class TestHardLinks:
    def test_inode_and_count_are_shared(self, here: Here) -> None:
        (here.path / "a").write_bytes(b"data")
        (here.path / "other").write_bytes(b"data")
        os.link(here.path / "a", here.path / "b")
        (here.path / "d").mkdir()
        os.link(here.path / "b", here.path / "d" / "c")
        looks = [(here.path / name).stat() for name in ("a", "b", "d/c")]
        assert {look.st_ino for look in looks} == {looks[0].st_ino}
        assert [look.st_nlink for look in looks] == [3, 3, 3]
        assert (here.path / "other").stat().st_ino != looks[0].st_ino
        assert (here.path / "other").stat().st_nlink == 1
        assert (here.served / "a").stat().st_nlink == 3
        os.unlink(here.path / "a")
        # The kernel holds each name's attributes for some hundredths of a second, and an unlink does not wait them out:
        # that would slow the removal of a tree of hard links down tenfold.
        names = [here.path / "b", here.path / "d" / "c"]
        wait_until(lambda: [name.stat().st_nlink for name in names] == [2, 2], 2.0, "the link count of two")
        assert names[0].stat().st_ino == names[1].stat().st_ino
        os.rename(here.path / "other", here.path / "b")
        wait_until(lambda: (here.path / "d" / "c").stat().st_nlink == 1, 2.0, "the link count of one")
        assert (here.path / "d" / "c").read_bytes() == (here.served / "d" / "c").read_bytes() == b"data"

    def test_listing_agrees_with_stat(self, here: Here) -> None:
        (here.path / "a").write_bytes(b"data")
        os.link(here.path / "a", here.path / "b")
        with os.scandir(here.path) as entries:
            inodes = {entry.name: entry.stat(follow_symlinks=False).st_ino for entry in entries}
        assert inodes["a"] == inodes["b"] == (here.path / "a").stat().st_ino

    def test_of_an_open_file_with_unsaved_writes(self, here: Here) -> None:
        with opened(here.path / "a", os.O_CREAT | os.O_RDWR) as fd:
            os.write(fd, noise(200_000))
            os.link(here.path / "a", here.path / "b")
            assert (here.path / "b").stat().st_size == 200_000
            os.write(fd, b"more")
            assert os.fstat(fd).st_nlink == 2
            assert (here.path / "b").read_bytes() == noise(200_000) + b"more"
        assert (here.served / "b").read_bytes() == noise(200_000) + b"more"

    def test_unlinking_one_name_of_an_open_file(self, here: Here) -> None:
        with opened(here.path / "a", os.O_CREAT | os.O_RDWR) as fd:
            os.link(here.path / "a", here.path / "b")
            os.unlink(here.path / "a")
            os.write(fd, b"through the handle")
            wait_until(lambda: os.fstat(fd).st_nlink == 1, 2.0, "the link count of one")
            assert (here.path / "b").read_bytes() == b"through the handle"
        assert (here.served / "b").read_bytes() == b"through the handle"
        assert os.listdir(here.path) == ["b"]

    def test_refusals(self, here: Here) -> None:
        (here.path / "f").write_bytes(b"")
        (here.path / "d").mkdir()
        for source, target, codes in [
            ("f", "f", (errno.EEXIST,)),
            ("f", "d", (errno.EEXIST,)),
            ("d", "new", (errno.EPERM,)),
            ("absent", "new", (errno.ENOENT,)),
            ("f", "absent/new", (errno.ENOENT,)),
        ]:
            with refused(*codes):
                os.link(here.path / source, here.path / target)

    def test_cp_al(self, here: Here) -> None:
        (here.path / "day1" / "sub").mkdir(parents=True)
        for name in ("x", "y", "sub/z"):
            (here.path / "day1" / name).write_bytes(noise(1000))
        subprocess.run(["cp", "-al", here.path / "day1", here.path / "day2"], check=True)
        for name in ("x", "y", "sub/z"):
            for root in here:
                assert os.path.samefile(root / "day1" / name, root / "day2" / name)


class TestSymlinks:
    @pytest.mark.parametrize(
        "target", ["f", "../x/./y", "/absolute/path", "nowhere", "t" * 1000, "\u00e4 b\nc"]
    )
    def test_target_is_kept(self, here: Here, target: str) -> None:
        os.symlink(target, here.path / "link")
        assert os.readlink(here.path / "link") == os.readlink(here.served / "link") == target
        assert os.lstat(here.path / "link").st_size == len(os.fsencode(target))
        assert stat.S_ISLNK(os.lstat(here.path / "link").st_mode)

    def test_target_that_is_not_utf8(self, here: Here) -> None:
        link = os.fsencode(here.path) + b"/link"
        os.symlink(b"\xff\xfe/\x80", link)
        assert os.readlink(link) == b"\xff\xfe/\x80"
        assert os.readlink(os.fsencode(here.served) + b"/link") == b"\xff\xfe/\x80"

    def test_following(self, here: Here) -> None:
        (here.path / "d").mkdir()
        (here.path / "d" / "f").write_bytes(b"data")
        os.symlink("d", here.path / "link")
        os.symlink("absent", here.path / "dangling")
        assert (here.path / "link" / "f").read_bytes() == b"data"
        assert (here.path / "link").stat().st_ino == (here.path / "d").stat().st_ino
        with refused(errno.ENOENT):
            os.stat(here.path / "dangling")
        (here.path / "dangling").write_bytes(b"made through the link")
        assert (here.served / "absent").read_bytes() == b"made through the link"

    def test_refusals(self, here: Here) -> None:
        (here.path / "f").write_bytes(b"")
        with refused(errno.EEXIST):
            os.symlink("x", here.path / "f")
        with refused(errno.EINVAL):
            os.readlink(here.path / "f")
        with refused(errno.ENOENT):
            os.readlink(here.path / "absent")
        os.symlink("b", here.path / "a")
        os.symlink("a", here.path / "b")
        with refused(errno.ELOOP):
            os.stat(here.path / "a")

    def test_unlink_and_rename_touch_the_link_only(self, here: Here) -> None:
        (here.path / "f").write_bytes(b"data")
        os.symlink("f", here.path / "a")
        os.rename(here.path / "a", here.path / "b")
        assert os.readlink(here.path / "b") == "f"
        os.unlink(here.path / "b")
        assert os.listdir(here.path) == ["f"]


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            b"\xff\xfe\x80",
            b"latin-\xe9",
            b"line\nbreak",
            b" leading and trailing ",
            b"-rf",
            b"back\\slash",
            b"\"quotes'",
            b"*?[x]",
            "\u00e4\u6f22\U0001f600".encode(),
            b"\xed\xa0\x80",
            b"n" * 255,
            b"\xff" * 255,
            b".hidden",
            b"...",
        ],
    )
    def test_any_bytes(self, here: Here, name: bytes) -> None:
        ours, theirs = (os.fsencode(root) + b"/" + name for root in here)
        with opened(ours, os.O_CREAT | os.O_EXCL | os.O_WRONLY) as fd:
            os.write(fd, b"data")
        assert os.listdir(os.fsencode(here.path)) == os.listdir(os.fsencode(here.served)) == [name]
        with opened(theirs, os.O_RDONLY) as fd:
            assert os.read(fd, 10) == b"data"
        os.rename(ours, ours[:-1] + b"Z")
        os.mkdir(ours)
        os.rmdir(ours)
        os.unlink(ours[:-1] + b"Z")
        assert os.listdir(here.served) == []

    def test_composed_and_decomposed_are_two_names(self, here: Here) -> None:
        (here.path / "\u00e9").write_bytes(b"composed")
        (here.path / "e\u0301").write_bytes(b"decomposed")
        assert sorted(os.listdir(here.path)) == sorted(os.listdir(here.served)) == ["e\u0301", "\u00e9"]
        assert (here.path / "\u00e9").read_bytes() == b"composed"

    def test_256_bytes_are_too_long(self, here: Here) -> None:
        long = os.fsencode(here.path) + b"/" + b"n" * 256
        for call in (os.stat, os.mkdir, os.unlink, os.rmdir, lambda path: os.symlink(b"x", path)):
            with refused(errno.ENAMETOOLONG):
                call(long)  # type: ignore[operator]

    def test_deep_directories(self, here: Here) -> None:
        directory = here.path
        for level in range(15):
            directory = directory / (f"{level}-" + "d" * 200)
            directory.mkdir()
        (directory / "f").write_bytes(b"deep")
        assert (here.served / directory.relative_to(here.path) / "f").read_bytes() == b"deep"

    def test_20000_entries(self, here: Here) -> None:
        names = {f"entry-{count:05d}-{'x' * (count % 60)}" for count in range(20_000)}
        (here.served / "many").mkdir()
        for name in names:
            (here.served / "many" / name).touch()
        assert set(os.listdir(here.path / "many")) == names
        for name in sorted(names)[::20]:
            assert (here.path / "many" / name).stat().st_size == 0
        (here.path / "many" / "one more").write_bytes(b"")
        os.unlink(here.path / "many" / min(names))
        assert set(os.listdir(here.path / "many")) == (names | {"one more"}) - {min(names)}

    def test_a_directory_emptied_while_it_is_listed(self, here: Here) -> None:
        for count in range(600):
            (here.served / f"file-{count}").touch()
        with os.scandir(here.path) as entries:
            for entry in entries:
                os.unlink(entry.path)
        assert os.listdir(here.path) == os.listdir(here.served) == []


class TestSpecial:
    def test_mknod_of_a_regular_file(self, here: Here) -> None:
        os.mknod(here.path / "f", stat.S_IFREG | 0o640)
        assert stat.S_ISREG(os.lstat(here.served / "f").st_mode)
        with refused(errno.EEXIST):
            os.mknod(here.path / "f", stat.S_IFREG | 0o640)

    def test_mknod_of_anything_else_is_refused(self, here: Here) -> None:
        with refused(errno.EPERM, errno.ENOTSUP, errno.EINVAL):
            os.mkfifo(here.path / "fifo")
        assert os.listdir(here.served) == []

    def test_extended_attributes_are_not_supported(self, here: Here) -> None:
        (here.path / "f").write_bytes(b"")
        with refused(errno.ENOTSUP):
            os.setxattr(here.path / "f", "user.test", b"x")
        with refused(errno.ENOTSUP):
            os.getxattr(here.path / "f", "user.test")
        with refused(errno.ENOTSUP):
            os.removexattr(here.path / "f", "user.test")
        with refused(errno.ENOTSUP):
            os.listxattr(here.path / "f")

    def test_a_fifo_made_on_the_server_is_shown_as_one(self, here: Here) -> None:
        os.mkfifo(here.served / "fifo")
        assert stat.S_ISFIFO(os.lstat(here.path / "fifo").st_mode)


class TestLocks:
    TRY = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    try:
        {call}
        print("locked")
    except OSError:
        print("refused")
"""

    @pytest.mark.parametrize(
        ("lock", "unlock", "call"),
        [
            (
                lambda fd: fcntl.flock(fd, fcntl.LOCK_EX),
                lambda fd: fcntl.flock(fd, fcntl.LOCK_UN),
                "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
            ),
            (
                lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX, 10, 5),
                lambda fd: fcntl.lockf(fd, fcntl.LOCK_UN, 10, 5),
                "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 10)",
            ),
        ],
        ids=["flock", "fcntl"],
    )
    def test_exclude_another_process(self, here: Here, lock: object, unlock: object, call: str) -> None:
        (here.path / "f").write_bytes(b"x" * 100)
        attempt = self.TRY.format(call=call)
        with opened(here.path / "f", os.O_RDWR) as fd:
            lock(fd)  # type: ignore[operator]
            assert in_another_process(attempt, here.path / "f") == "refused"
            unlock(fd)  # type: ignore[operator]
            assert in_another_process(attempt, here.path / "f") == "locked"

    def test_locks_of_another_part_do_not_conflict(self, here: Here) -> None:
        (here.path / "f").write_bytes(b"x" * 100)
        attempt = self.TRY.format(call="fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 50)")
        with opened(here.path / "f", os.O_RDWR) as fd:
            fcntl.lockf(fd, fcntl.LOCK_EX, 10, 5)
            assert in_another_process(attempt, here.path / "f") == "locked"
