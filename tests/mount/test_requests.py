"""What the kernel asks for: long writes in one request, look-ups of one directory side by side; and less where it must be."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Callable, List, Type

import pytest

from mount.helpers import noise, opened
from sftpmount.cache.blocks import BLOCK_BYTES
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
