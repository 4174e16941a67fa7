"""Memory stays bounded whatever the size and the number of files, and open-write-close cycles leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Callable, Iterator, Tuple

import pytest

from mount.helpers import noise, opened
from support.mount import Mount
from support.process import wait_until
from support.sshd import Sshd

MIB = 2**20
RESIDENT_BYTES_MAX = 250 * MIB
_BASE = noise(9 * MIB)


def blocks(total_bytes: int) -> Iterator[bytes]:
    """Blocks of a MiB, each another piece of the same noise."""
    for count in range(total_bytes // MIB):
        start = count * 40_961 % (8 * MIB)
        yield _BASE[start : start + MIB]


def peak_resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} is gone")


def check_content(path: Path, total_bytes: int) -> None:
    with opened(path, os.O_RDONLY) as fd:
        for count, block in enumerate(blocks(total_bytes)):
            got = b""
            while len(got) < MIB:
                piece = os.read(fd, MIB - len(got))
                assert piece, f"the file ends in MiB {count}"
                got += piece
            assert got == block, f"MiB {count} differs"
        assert os.read(fd, 1) == b""


def write_and_read_back(
    sshd: Sshd, make_mount: Callable[..., Mount], directory: Path, total_bytes: int
) -> None:
    directory.mkdir()
    mount = make_mount(sshd, directory=str(directory))
    with opened(mount.path / "big", os.O_CREAT | os.O_WRONLY) as fd:
        for block in blocks(total_bytes):
            assert os.write(fd, block) == MIB
        os.fsync(fd)
    assert peak_resident_bytes(mount.pid) < RESIDENT_BYTES_MAX, "while writing"
    assert mount.unmount() == 0
    check_content(directory / "big", total_bytes)
    mount = make_mount(sshd, directory=str(directory))
    check_content(mount.path / "big", total_bytes)
    assert peak_resident_bytes(mount.pid) < RESIDENT_BYTES_MAX, "while reading"
    (directory / "big").unlink()


class TestMemory:
    def test_512_mib(self, sshd: Sshd, make_mount: Callable[..., Mount], tmp_path: Path) -> None:
        write_and_read_back(sshd, make_mount, sshd.tree / f"limits-{tmp_path.name}", 512 * MIB)

    @pytest.mark.long
    @pytest.mark.timeout(900)
    def test_4_gib(self, sshd: Sshd, make_mount: Callable[..., Mount], tmp_path: Path) -> None:
        write_and_read_back(sshd, make_mount, sshd.tree / f"limits-{tmp_path.name}", 4096 * MIB)


DIRECTORIES, FILES_EACH = 100, 1000


def tree_names() -> Iterator[Tuple[str, bytes]]:
    """100,000 files of one tree, and what is in each."""
    for directory in range(DIRECTORIES):
        for count in range(FILES_EACH):
            yield f"{directory}/file-{count}", b"%d of %d" % (count, directory)


def make_tree(top: Path) -> None:
    for directory in range(DIRECTORIES):
        (top / str(directory)).mkdir(parents=True)
    for name, content in tree_names():
        (top / name).write_bytes(content)


@pytest.mark.long
@pytest.mark.timeout(3600)
class TestManyFiles:
    """100,000 files in one tree, each step on a mount of its own. Names have a limit too: what is kept of them is in the peak."""

    def check(
        self, make_mount: Callable[..., Mount], sshd: Sshd, served: Path, step: Callable[[Path], object]
    ) -> None:
        mount = make_mount(sshd, directory=str(served))
        began = time.monotonic()
        step(mount.path)
        seconds, peak = time.monotonic() - began, peak_resident_bytes(mount.pid)
        print(f"{step.__name__}: {peak // MIB} MiB, {seconds:.0f} s")
        assert peak < RESIDENT_BYTES_MAX
        assert mount.unmount() == 0

    def test_listed_and_read(self, sshd: Sshd, make_mount: Callable[..., Mount], tmp_path: Path) -> None:
        served = sshd.tree / f"many-{tmp_path.name}"
        make_tree(served)

        def listed(top: Path) -> None:
            found = subprocess.run(
                ["find", top, "-type", "f", "-size", "1"], check=True, capture_output=True
            ).stdout
            assert len(found.splitlines()) == DIRECTORIES * FILES_EACH

        def read(top: Path) -> None:
            wanted = dict(tree_names())
            with subprocess.Popen(["tar", "-cf", "-", "-C", top, "."], stdout=subprocess.PIPE) as archive:
                assert archive.stdout is not None
                with tarfile.open(fileobj=archive.stdout, mode="r|") as members:
                    for member in members:
                        if member.isfile():
                            content = members.extractfile(member)
                            assert content is not None and content.read() == wanted.pop(member.name[2:])
            assert archive.returncode == 0 and not wanted

        self.check(make_mount, sshd, served, listed)
        self.check(make_mount, sshd, served, read)

    def test_written(self, sshd: Sshd, make_mount: Callable[..., Mount], tmp_path: Path) -> None:
        served = sshd.tree / f"many-{tmp_path.name}"
        served.mkdir()
        self.check(make_mount, sshd, served, make_tree)
        for name, content in tree_names():
            assert (served / name).read_bytes() == content, name


def write_in_turn(mount: Mount, count: int) -> None:
    """Open, write, close: forty names, truncated, appended to or changed in place, and read now and then."""
    flags = os.O_CREAT | os.O_RDWR | (0, os.O_TRUNC, os.O_TRUNC, os.O_APPEND)[count // 40 % 4]
    with opened(mount.path / f"file-{count % 40}", flags) as fd:
        os.write(fd, _BASE[:5000])
        if count % 5 == 0:
            os.pread(fd, 5000, 0)


def make_and_remove(mount: Mount, count: int) -> None:
    """A new file under the same name each time, some of them removed while open."""
    path = mount.path / "file"
    with opened(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY) as fd:
        os.write(fd, _BASE[:5000])
        if count % 10 == 0:
            os.unlink(path)
    if count % 10:
        os.unlink(path)


def rename_over(mount: Mount, count: int) -> None:
    """As programs replace files: a temporary one, written, renamed over the last."""
    with opened(mount.path / "temporary", os.O_CREAT | os.O_EXCL | os.O_WRONLY) as fd:
        os.write(fd, b"%d" % count)
    os.rename(mount.path / "temporary", mount.path / "file")


CYCLES = [write_in_turn, make_and_remove, rename_over]


@pytest.mark.parametrize("cycle", CYCLES)
class TestLeaks:
    """Measured from after a warm-up, in which caches and threads come into being."""

    def check(
        self,
        sshd: Sshd,
        mount: Mount,
        cycle: Callable[[Mount, int], None],
        cycles: int,
        growth_bytes_max: int,
    ) -> None:
        for count in range(500):
            cycle(mount, count)
        wait_until(lambda: sshd.open_files() == 0, 10.0, "the release of the server's handles")
        descriptors, resident = mount.fd_count(), mount.rss_bytes()
        for count in range(cycles):
            cycle(mount, count)
        wait_until(lambda: sshd.open_files() == 0, 10.0, "the release of the server's handles")
        wait_until(lambda: mount.fd_count() <= descriptors, 10.0, "the release of descriptors")
        growth = mount.rss_bytes() - resident
        assert growth < growth_bytes_max, f"{growth} bytes in {cycles} cycles: {growth // cycles} each"

    def test_1000_cycles(
        self, own_sshd: Sshd, make_mount: Callable[..., Mount], cycle: Callable[[Mount, int], None]
    ) -> None:
        self.check(own_sshd, make_mount(own_sshd), cycle, 1000, 2 * MIB)

    @pytest.mark.long
    @pytest.mark.timeout(900)
    def test_10000_cycles(
        self, own_sshd: Sshd, make_mount: Callable[..., Mount], cycle: Callable[[Mount, int], None]
    ) -> None:
        self.check(own_sshd, make_mount(own_sshd), cycle, 10_000, 3 * MIB)


class TestHandles:
    def test_open_files_of_the_server_are_seen_at_all(
        self, own_sshd: Sshd, make_mount: Callable[..., Mount]
    ) -> None:
        """That the zero above means something."""
        mount = make_mount(own_sshd)
        (own_sshd.tree / "f").write_bytes(noise(100_000))
        with opened(mount.path / "f", os.O_RDWR) as fd:
            os.pread(fd, 10, 0)
            os.pwrite(fd, b"x", 0)
            os.fsync(fd)
            assert own_sshd.open_files() > 0
        wait_until(lambda: own_sshd.open_files() == 0, 10.0, "the release of the server's handles")
