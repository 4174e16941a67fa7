"""What the kernel asks for: long writes in one request, look-ups of one directory side by side; and less where it must be."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path
from typing import Callable, List, Tuple, Type

import pytest

from mount.helpers import noise, opened
from sftpmount.cache.blocks import BLOCK_BYTES
from sftpmount.fs.readdirplus import LATE_S
from support.mount import Mount, MountFailed
from support.process import wait_until
from support.relay import Relay
from support.sshd import Sshd

MIB = 2**20
ORDINARY_BYTES = 131_072
REQUEST_BYTES = 258_048  # of OpenSSH's WRITE, whole pages


class OldKernel(Mount):
    """Offers nothing in its handshake that libfuse 2 does not know."""

    changes = "from sftpmount.fs import libfuse; libfuse._MAX_PAGES = 0"


class AnotherLibrary(Mount):
    """Its channel looks otherwise than that of libfuse 2.9."""

    changes = "from sftpmount.fs import libfuse; libfuse._SESSION = 2"


class NoLibfuse2(Mount):
    """Lacks a function."""

    changes = "from sftpmount.fs import fuse; fuse.declare = lambda library: library.no_such_function"


def writes(mount: Mount) -> List[int]:
    """The sizes of the kernel's WRITE requests, as libfuse's own debugging output tells them."""
    return [int(size) for size in re.findall(r"^write\[\d+\] (\d+) bytes", mount.log_text(), re.MULTILINE)]


@pytest.mark.parametrize(
    ("kind", "longest"),
    [
        (Mount, MIB),
        (OldKernel, ORDINARY_BYTES),
        (AnotherLibrary, ORDINARY_BYTES),
    ],
)
def test_the_longest_write(sshd: Sshd, tmp_path: Path, kind: Type[Mount], longest: int) -> None:
    data = noise(3 * MIB + 5)
    (sshd.tree / (name := tmp_path.name)).mkdir()
    with kind(sshd, tmp_path, "-d", subdir=name) as mount:
        with opened(mount.path / "file", os.O_CREAT | os.O_WRONLY) as fd:
            assert os.write(fd, data) == len(data)
            assert os.pwrite(fd, data[:MIB], 1000) == MIB  # no block of ours begins where this does
        assert mount.unmount() == 0
        assert max(writes(mount)) == longest
        assert sum(writes(mount)) >= 2 * MIB  # those of at most a block may go round libfuse
        assert (mount.served / "file").read_bytes() == data[:1000] + data[:MIB] + data[1000 + MIB :]


@pytest.mark.parametrize("size", [1, 512, 4096, 10240])
def test_libfuse_sees_of_small_writes_what_fills_a_request(sshd: Sshd, tmp_path: Path, size: int) -> None:
    data = noise(min(600 * size, 2 * MIB))
    (sshd.tree / (name := tmp_path.name)).mkdir()
    with Mount(sshd, tmp_path, "-d", subdir=name) as mount:
        with opened(mount.path / "file", os.O_CREAT | os.O_RDWR) as fd:
            for at in range(0, len(data), size):
                assert os.write(fd, data[at : at + size]) == len(data[at : at + size])
                assert os.fstat(fd).st_size == min(at + size, len(data))
            assert os.pread(fd, len(data), 0) == data
        assert mount.unmount() == 0
        across_blocks = len(data) // BLOCK_BYTES if BLOCK_BYTES % size else 0
        assert len(writes(mount)) <= across_blocks + len(data) // (REQUEST_BYTES - size) + 1
        assert (mount.served / "file").read_bytes() == data


def looked_up(mount: Mount) -> int:
    """How often the kernel asked for a name: what is asked of libfuse for a listing has the listing's number."""
    requests = re.findall(r"^unique: (\d+), opcode: (\w+) ", mount.log_text(), re.MULTILINE)
    listings = {unique for unique, opcode in requests if opcode == "READDIR"}
    return sum(1 for unique, opcode in requests if opcode == "LOOKUP" and unique not in listings)


def shown(path: Path) -> List[Tuple[str, int, int, int]]:
    """Names and attributes as a program sees them that looks at each name when it comes to it."""
    with os.scandir(path) as entries:
        stats = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    return sorted((name, each.st_mode, each.st_size, int(each.st_mtime)) for name, each in stats)


@pytest.mark.parametrize(
    ("kind", "options", "at_most", "at_least"),
    [
        (Mount, (), 10, 0),
        (Mount, ("-o", "dcache_timeout=0"), 1000, 300),  # nothing is known
        (OldKernel, (), 1000, 300),
        (AnotherLibrary, (), 1000, 300),
    ],
)
def test_names_come_with_their_attributes(
    sshd: Sshd, tmp_path: Path, kind: Type[Mount], options: Tuple[str, ...], at_most: int, at_least: int
) -> None:
    served = sshd.tree / tmp_path.name
    (served / "many").mkdir(parents=True)
    for number in range(300):
        (served / "many" / f"file-{number}").write_bytes(bytes(number))
    (served / "many" / "directory").mkdir()
    (served / "many" / "link").symlink_to("file-1")
    with kind(sshd, tmp_path, "-d", *options, subdir=tmp_path.name) as mount:
        assert shown(mount.path / "many") == shown(served / "many")
        assert mount.unmount() == 0
        assert at_least <= looked_up(mount) <= at_most


def test_the_kernel_and_libfuse_count_the_same(mount: Mount, tmp_path: Path) -> None:
    """libfuse ends the mount where the kernel forgets what it was not told."""
    directory = mount.served / tmp_path.name
    for number in range(30):
        (directory / str(number)).mkdir(parents=True)
        (directory / str(number) / "file").write_bytes(bytes(number))
    here = mount.path / tmp_path.name
    for _ in range(3):
        for each in [directory, *directory.iterdir()]:
            assert shown(here / each.relative_to(directory)) == shown(each)
        Path("/proc/sys/vm/drop_caches").write_text("2", encoding="ascii")
    subprocess.run(["rm", "-r", here], check=True)
    assert not directory.exists()


@pytest.mark.parametrize("length", [0, 3, 5000])
def test_a_size_that_a_listing_told_does_not_cut_what_is_read(
    mount: Mount, tmp_path: Path, length: int
) -> None:
    """Close-to-open, however lately the kernel was told: that is, when the program that it was told for ran again."""
    directory = mount.served / tmp_path.name
    directory.mkdir()
    names = [str(number) for number in range(100)]
    for name in names:
        (directory / name).write_bytes(bytes(100))
    here = mount.path / tmp_path.name
    conclusive = 0
    while names and conclusive < 20:
        began_s = time.monotonic()
        with os.scandir(here) as entries:
            assert next(entry.stat().st_size for entry in entries if entry.name == names[0]) == 100
        was_in_time = time.monotonic() - began_s < LATE_S
        (directory / names[0]).write_bytes(noise(length))
        found = (here / names.pop(0)).read_bytes()
        if was_in_time:
            conclusive += 1
            assert found == noise(length)
    assert conclusive > 0


def test_another_library_than_libfuse_2_is_refused(sshd: Sshd, tmp_path: Path) -> None:
    with pytest.raises(MountFailed, match="this is no libfuse 2") as caught:
        NoLibfuse2(sshd, tmp_path)
    assert caught.value.exit_status == 4


def test_programs_look_up_names_of_one_directory_at_once(
    sshd: Sshd, relay: Relay, tmp_path: Path, make_mount: Callable[..., Mount]
) -> None:
    (sshd.tree / tmp_path.name).mkdir()
    mount = make_mount(sshd, "-d", subdir=tmp_path.name, port=relay.port)
    relay.stall()
    programs = [
        subprocess.Popen(["stat", mount.path / name], stderr=subprocess.DEVNULL) for name in ("one", "two")
    ]
    try:
        wait_until(
            lambda: {"LOOKUP /one", "LOOKUP /two"} <= set(mount.log_text().splitlines()),
            10.0,
            "both are asked for",
        )
    finally:
        relay.flow()
    assert [program.wait(20.0) for program in programs] == [1, 1]
