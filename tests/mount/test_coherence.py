"""What one handle wrote, every other look shows at once; what another client stored, the next open reads."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import time
from pathlib import Path
from typing import Callable, Iterator, List

import pytest

from mount.helpers import Here, in_another_process, noise, opened, refused
from support.mount import Mount
from support.process import wait_until
from support.sshd import Sshd

READ_ALL = "import sys; sys.stdout.write(open(sys.argv[1], 'rb').read().hex())"


def sizes_shown(path: Path, handles: List[int]) -> List[int]:
    """The size as every way of asking tells it: by path, in a listing, ls of another process, each handle."""
    with os.scandir(path.parent) as entries:
        listed = [entry.stat().st_size for entry in entries if entry.name == path.name]
    ls = subprocess.run(["ls", "-ln", path], check=True, capture_output=True, text=True)
    directory = subprocess.run(["ls", "-ln", path.parent], check=True, capture_output=True, text=True)
    lines = [line for line in directory.stdout.splitlines() if line.endswith(f" {path.name}")]
    return [
        os.stat(path).st_size,
        *listed,
        int(ls.stdout.split()[4]),
        *(int(line.split()[4]) for line in lines),
        *(os.fstat(fd).st_size for fd in handles),
        *(os.lseek(fd, 0, os.SEEK_END) for fd in handles),
    ]


def check_shown(path: Path, expected: bytes, handles: List[int]) -> None:
    assert set(sizes_shown(path, handles)) == {len(expected)}
    for fd in handles:
        assert os.pread(fd, len(expected) + 1, 0) == expected
    assert path.read_bytes() == expected
    assert in_another_process(READ_ALL, path) == expected.hex()


class TestOwnWrites:
    def test_every_look_shows_each_write_while_open_and_after(self, here: Here) -> None:
        path = here.path / "f"
        expected = b""
        with opened(path, os.O_CREAT | os.O_WRONLY) as writer, opened(path, os.O_RDONLY) as reader:
            for count, length in enumerate([1, 10, 5000, 131_072, 3]):
                os.write(writer, noise(length, count))
                expected += noise(length, count)
                check_shown(path, expected, [reader])
        check_shown(path, expected, [])
        assert (here.served / "f").read_bytes() == expected

    def test_overwriting_what_others_have_read(self, here: Here) -> None:
        path = here.path / "f"
        data = bytearray(noise(300_000))
        (here.served / "f").write_bytes(data)
        with opened(path, os.O_RDWR) as writer, opened(path, os.O_RDONLY) as reader:
            check_shown(path, bytes(data), [reader])
            for start in (0, 4000, 131_071, 299_990):
                os.pwrite(writer, b"changed", start)
                data[start : start + 7] = b"changed"
                check_shown(path, bytes(data), [reader, writer])

    def test_truncation(self, here: Here) -> None:
        path = here.path / "f"
        path.write_bytes(noise(300_000))
        with opened(path, os.O_RDWR) as writer, opened(path, os.O_RDONLY) as reader:
            check_shown(path, noise(300_000), [reader])
            os.ftruncate(writer, 150_001)
            check_shown(path, noise(300_000)[:150_001], [reader, writer])
            os.truncate(path, 5)
            check_shown(path, noise(300_000)[:5], [reader, writer])
            os.ftruncate(writer, 9000)
            check_shown(path, noise(300_000)[:5] + bytes(8995), [reader, writer])
            with opened(path, os.O_WRONLY | os.O_TRUNC):
                check_shown(path, b"", [reader, writer])

    def test_mapped_writes(self, here: Here) -> None:
        path = here.path / "f"
        path.write_bytes(bytes(10_000))
        with (
            opened(path, os.O_RDWR) as writer,
            opened(path, os.O_RDONLY) as reader,
            mmap.mmap(writer, 10_000) as mapped,
        ):
            mapped[5000:5003] = b"map"
            expected = bytes(5000) + b"map" + bytes(4997)
            check_shown(path, expected, [reader])
            mapped.flush()
            check_shown(path, expected, [reader])

    def test_a_new_file_is_listed_at_once_and_a_removed_one_is_not(self, here: Here) -> None:
        assert os.listdir(here.path) == []
        with refused(errno.ENOENT):
            os.stat(here.path / "f")
        with opened(here.path / "f", os.O_CREAT | os.O_WRONLY):
            assert os.listdir(here.path) == ["f"]
            check_shown(here.path / "f", b"", [])
        os.rename(here.path / "f", here.path / "g")
        assert os.listdir(here.path) == ["g"]
        os.unlink(here.path / "g")
        assert os.listdir(here.path) == []
        assert in_another_process("import os, sys; print(os.listdir(sys.argv[1]))", here.path) == "[]"

    def test_log_followed_by_tail(self, here: Here) -> None:
        """A reader that goes on where it stopped gets each record as soon as it is written."""
        flags = os.O_CREAT | os.O_WRONLY | os.O_APPEND
        with opened(here.path / "log", flags) as writer, opened(here.path / "log", os.O_RDONLY) as reader:
            for count in range(200):
                record = f"record {count}\n".encode() * (1 + count % 50)
                os.write(writer, record)
                assert os.read(reader, 100_000) == record


class TestHardLinks:
    """Every alias of a file is the file."""

    @pytest.fixture
    def pair(self, here: Here) -> List[Path]:
        (here.path / "a").write_bytes(noise(200_000))
        os.link(here.path / "a", here.path / "b")
        return [here.path / "a", here.path / "b"]

    def test_writes_through_one_show_in_the_other(self, here: Here, pair: List[Path]) -> None:
        data = bytearray(noise(200_000))
        for path in pair:
            check_shown(path, bytes(data), [])
        with opened(pair[0], os.O_RDWR) as one, opened(pair[1], os.O_RDWR) as two:
            for count, (fd, start) in enumerate([(one, 0), (two, 100), (one, 150_000), (two, 199_999)]):
                os.pwrite(fd, noise(300, count), start)
                data[start : start + 300] = noise(300, count)
                for path in pair:
                    check_shown(path, bytes(data), [one, two])
        for name in ("a", "b"):
            assert (here.served / name).read_bytes() == data

    def test_a_cached_read_through_the_other_handle_is_fresh(self, pair: List[Path]) -> None:
        with opened(pair[0], os.O_WRONLY) as writer, opened(pair[1], os.O_RDONLY) as reader:
            assert os.pread(reader, 10, 0) == noise(200_000)[:10]
            os.pwrite(writer, b"0123456789", 0)
            assert os.pread(reader, 10, 0) == b"0123456789"

    def test_truncation_and_mode(self, pair: List[Path]) -> None:
        assert pair[1].stat().st_size == 200_000
        os.truncate(pair[0], 10)
        check_shown(pair[1], noise(200_000)[:10], [])
        os.chmod(pair[1], 0o600)
        os.utime(pair[1], (1000, 2000))
        assert pair[0].stat().st_mode & 0o777 == 0o600
        assert pair[0].stat().st_mtime == 2000

    def test_append_through_each_in_turn(self, here: Here, pair: List[Path]) -> None:
        expected = noise(200_000)
        for count in range(10):
            with opened(pair[count % 2], os.O_WRONLY | os.O_APPEND) as fd:
                os.write(fd, b"%d," % count)
            expected += b"%d," % count
            for path in pair:
                check_shown(path, expected, [])
        assert (here.served / "b").read_bytes() == expected


class TestOtherClients:
    """Close-to-open: a change that was complete on the server before our open is what we read, however fresh our caches."""

    CHANGES = [
        ("longer", noise(300_000, 2)),
        ("shorter", noise(1000, 3)),
        ("empty", b""),
        ("same size", noise(200_000, 4)),
    ]

    @pytest.fixture
    def seen(self, here: Here) -> Here:
        """A file that we have just listed, looked at and read in full."""
        (here.served / "f").write_bytes(noise(200_000))
        self.look(here, noise(200_000))
        return here

    @staticmethod
    def look(here: Here, expected: bytes) -> None:
        assert "f" in os.listdir(here.path)
        assert (here.path / "f").stat().st_size == len(expected)
        assert (here.path / "f").read_bytes() == expected

    @pytest.mark.parametrize(("what", "content"), CHANGES, ids=[what for what, _ in CHANGES])
    @pytest.mark.parametrize("how", ["in place", "replaced"])
    def test_the_next_open_reads_the_change_in_full(
        self, seen: Here, what: str, content: bytes, how: str
    ) -> None:
        for turn in range(4):
            # The kernel begins to believe a look when the program runs again, which a busy machine may put off for longer than
            # the mount allows for: what was spoiled like that is done again.
            for attempt in range(3):
                changed = content if (turn + attempt) % 2 == 0 else noise(200_000)
                if how == "in place":
                    (seen.served / "f").write_bytes(changed)
                else:
                    (seen.served / "new").write_bytes(changed)
                    os.rename(seen.served / "new", seen.served / "f")
                started = time.monotonic()
                with opened(seen.path / "f", os.O_RDONLY) as fd:
                    found = os.fstat(fd).st_size, os.read(fd, 400_000)
                assert time.monotonic() - started < 5.0
                if found == (len(changed), changed):
                    break
            assert found == (len(changed), changed)
            self.look(seen, changed)

    def test_part_overwritten_with_the_old_mtime(self, seen: Here) -> None:
        """Same size, and the same mtime to the second, as with two writers in one second."""
        before = (seen.served / "f").stat()
        with opened(seen.served / "f", os.O_WRONLY) as fd:
            os.pwrite(fd, b"theirs", 100_000)
        os.utime(seen.served / "f", ns=(before.st_atime_ns, before.st_mtime_ns))
        expected = noise(200_000)[:100_000] + b"theirs" + noise(200_000)[100_006:]
        assert (seen.path / "f").read_bytes() == expected

    def test_appending_after_their_append(self, seen: Here) -> None:
        with opened(seen.served / "f", os.O_WRONLY | os.O_APPEND) as fd:
            os.write(fd, b"theirs")
        with opened(seen.path / "f", os.O_WRONLY | os.O_APPEND) as fd:
            os.write(fd, b"ours")
        assert (seen.served / "f").read_bytes() == noise(200_000) + b"theirsours"

    def test_changing_part_of_what_they_changed(self, seen: Here) -> None:
        (seen.served / "f").write_bytes(noise(150_000, 5))
        with opened(seen.path / "f", os.O_WRONLY) as fd:
            os.pwrite(fd, b"ours", 70_000)
        expected = noise(150_000, 5)
        assert (seen.served / "f").read_bytes() == expected[:70_000] + b"ours" + expected[70_004:]

    def test_opening_what_they_removed(self, seen: Here) -> None:
        os.unlink(seen.served / "f")
        with refused(errno.ENOENT):
            os.open(seen.path / "f", os.O_RDONLY)
        with refused(errno.ENOENT):
            os.stat(seen.path / "f")

    def test_while_we_hold_an_older_handle(self, seen: Here) -> None:
        """A new open gets the new file even where an old handle of ours is on the replaced one."""
        with opened(seen.path / "f", os.O_RDONLY) as old:
            assert os.pread(old, 200_000, 0) == noise(200_000)
            (seen.served / "new").write_bytes(noise(250_000, 6))
            os.rename(seen.served / "new", seen.served / "f")
            with opened(seen.path / "f", os.O_RDONLY) as new:
                assert os.read(new, 300_000) == noise(250_000, 6)


class TestLeases:
    """Listings and absences may be remembered for as long as the option says, and not at all where it says 0."""

    @pytest.fixture
    def uncached(self, sshd: Sshd, make_mount: Callable[..., Mount], tmp_path: Path) -> Iterator[Mount]:
        served = sshd.tree / f"uncached-{tmp_path.name}"
        served.mkdir()
        yield make_mount(sshd, "-o", "dcache_timeout=0", directory=str(served))

    def test_without_caching_every_look_is_fresh(self, uncached: Mount) -> None:
        path, served = uncached.path, uncached.served
        assert os.listdir(path) == []
        with refused(errno.ENOENT):
            os.stat(path / "f")
        (served / "f").write_bytes(b"123")
        assert os.listdir(path) == ["f"]
        assert (path / "f").stat().st_size == 3
        (served / "f").write_bytes(b"12345")
        assert (path / "f").stat().st_size == 5
        os.unlink(served / "f")
        with refused(errno.ENOENT):
            os.stat(path / "f")
        assert os.listdir(path) == []

    def test_a_lease_ends(self, sshd: Sshd, make_mount: Callable[..., Mount], tmp_path: Path) -> None:
        served = sshd.tree / f"leased-{tmp_path.name}"
        served.mkdir()
        mount = make_mount(sshd, "-o", "dcache_timeout=1", directory=str(served))
        assert os.listdir(mount.path) == []
        (served / "f").write_bytes(b"123")
        wait_until(lambda: os.listdir(mount.path) == ["f"], 5.0, "the new file in the listing")
        wait_until(lambda: (mount.path / "f").exists(), 5.0, "the new file by name")


class LateAnswers(Mount):
    """The kernel hears of the attributes of names that end in ``late`` a while after they were told, as on a busy machine."""

    changes = """
import time
from sftpmount.fs import fuse
tell = fuse._Adapter.getattr
def tell_late(self, path, buf):
    result = tell(self, path, buf)
    if path.endswith(b"late"):
        time.sleep(0.05)
    return result
fuse._Adapter.getattr = tell_late
"""


def test_a_write_shows_through_another_name_that_the_kernel_heard_of_late(sshd: Sshd, tmp_path: Path) -> None:
    (sshd.tree / tmp_path.name).mkdir()
    with LateAnswers(sshd, tmp_path, subdir=tmp_path.name) as mount:
        name, late = mount.path / "name", mount.path / "late"
        name.touch()
        os.link(name, late)
        with opened(name, os.O_WRONLY | os.O_APPEND) as fd:
            for size in range(20):
                assert late.stat().st_size == size
                os.write(fd, b"x")
                assert late.stat().st_size == size + 1
        assert mount.unmount() == 0
