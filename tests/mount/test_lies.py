"""Programs on a mount of a server that lies (``sftp.lies``): they end in time, with the truth or an error, and so do we."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, Iterator, List

import pytest

from mount.helpers import noise
from mount.test_limits import peak_resident_bytes
from sftp import lies
from sftp.lies import LIES
from support.mount import Mount, MountFailed
from support.process import wait_until
from support.sshd import Sshd

MIB = 2**20
CONTENT = noise(300_000)
PROGRAM_MAX_S = 30.0
RESIDENT_BYTES_MAX = 250 * MIB
ON_STDERR = "noise on stderr"
QUICK = (
    "every reply twice",
    "a status of 2**32 - 1, with escapes",
    "a size of 2**63",
    "no attributes",
    "a mode of all ones",
    "names that lead out",
    "names with escapes",
    "a listing without end, of long ones",
    "a file that ends at once",
    "a statvfs of zeros",
    ON_STDERR,
)
QUICK_STARTS = ("no VERSION", "version 6", "extensions cut off", "a greeting for VERSION")


class ImpatientMount(Mount):
    """Gives a request up after a second, and dials again at once."""

    changes = """
from sftpmount.sftp import reconnect, remote
reconnect.BACKOFF_FIRST_S, reconnect.BACKOFF_MAX_S = 0.02, 0.1
reconnect.Reconnecting.__init__.__kwdefaults__.update(request_deadline_s=1.0, settle_s=0.0)
remote.Remote.listdir.__kwdefaults__.update(entries_max=50_000)
"""


class Liar:
    """A real sshd whose SFTP program lies when ``says`` is told to."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._control = directory / "lie"
        self.says("")
        command = f"{sys.executable} -I -S {lies.__file__} {self._control}"
        self.sshd = Sshd(directory, sftp_server=command, host_key_types=("ed25519",))

    def says(self, lie: str) -> None:
        new = self._control.with_suffix(".new")
        new.write_text(lie)
        new.rename(self._control)

    def mount(self, kind: type[Mount] = ImpatientMount) -> Mount:
        options = "retry_timeout=1,ServerAliveInterval=1,dcache_timeout=0"
        return kind(self.sshd, self.directory, "-o", options, life_s=300.0)


@pytest.fixture(scope="module")
def liar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Liar]:
    liar = Liar(tmp_path_factory.mktemp("liar"))
    with liar.sshd:
        yield liar


@pytest.fixture(scope="module")
def mounts(liar: Liar) -> Iterator[List[Mount]]:
    made: List[Mount] = []
    yield made
    for mount in made:
        mount.close()


def printable_log(mount: Mount) -> bytes:
    log = mount.log.read_bytes()
    assert not set(log) & {*range(10), *range(11, 32), 127}, "control bytes in the log"
    assert log.decode().replace("\n", "").isprintable()
    return log


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.long)
        for name in [*(name for name, lie in LIES.items() if lie.end != "start"), ON_STDERR]
    ],
)
def test_programs(name: str, liar: Liar, mounts: List[Mount], tmp_path: Path) -> None:
    served = liar.sshd.tree
    for old in served.iterdir():
        old.unlink()
    (served / "file").write_bytes(CONTENT)
    (served / "old").write_bytes(b"old")
    (served / "link").symlink_to("file")
    (tmp_path / "local").write_bytes(CONTENT)
    if not mounts:
        mounts.append(liar.mount())
    mount = mounts[0]
    beside = sorted(liar.directory.iterdir())

    liar.says(name)
    if {"INIT", "limits"} & set(LIES[name].requests if name in LIES else ()):
        liar.sshd.kill_sessions()
    ends: Dict[str, subprocess.CompletedProcess[bytes]] = {}
    for command in (
        ["ls", "-la", f"{mount.path}"],
        ["cat", f"{mount.path}/file"],
        ["stat", f"{mount.path}/file"],
        ["readlink", f"{mount.path}/link"],
        ["df", f"{mount.path}"],
        ["cp", f"{mount.path}/file", f"{tmp_path}/copy"],
        ["dd", f"if={tmp_path}/local", f"of={mount.path}/new", "bs=100000", "status=none"],
        ["mv", f"{mount.path}/old", f"{mount.path}/moved"],
    ):
        ends[command[0]] = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROGRAM_MAX_S
        )
    liar.says("")

    if ends["cat"].returncode == 0:
        assert ends["cat"].stdout == CONTENT
    if ends["cp"].returncode == 0:
        assert (tmp_path / "copy").read_bytes() == CONTENT
    if ends["dd"].returncode == 0:
        assert (served / "new").read_bytes() == CONTENT
    if ends["mv"].returncode == 0:
        assert (served / "moved").read_bytes() == b"old"
    if ends["readlink"].returncode == 0:
        assert ends["readlink"].stdout == b"file\n"
    wait_until(lambda: is_readable(mount.path / "file"), 10.0, "the truth")
    assert mount.is_running and mount.is_mounted
    assert peak_resident_bytes(mount.pid) < RESIDENT_BYTES_MAX
    assert sorted(liar.directory.iterdir()) == beside
    assert b"not foreseen" not in printable_log(mount)


def is_readable(path: Path) -> bool:
    try:
        return path.read_bytes() == CONTENT
    except OSError:
        return False


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK_STARTS else pytest.mark.long)
        for name, lie in LIES.items()
        if lie.end == "start"
    ],
)
def test_start(name: str, liar: Liar) -> None:
    liar.says(name)
    started = time.monotonic()
    try:
        with pytest.raises(MountFailed) as caught:
            liar.mount().close()
    finally:
        liar.says("")
    assert caught.value.exit_status in (5, 9), caught.value
    assert time.monotonic() - started < PROGRAM_MAX_S
    said = str(caught.value)
    assert said.replace("\n", "").isprintable() and "Traceback" not in said, said


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in LIES if name.startswith("a listing without end")])
def test_memory_of_a_listing_without_end(name: str, liar: Liar) -> None:
    """With the limits that users have."""
    with liar.mount(Mount) as mount:
        liar.says(name)
        try:
            answer = subprocess.run(["ls", f"{mount.path}"], capture_output=True, timeout=110.0)
        finally:
            liar.says("")
        assert answer.returncode != 0
        assert peak_resident_bytes(mount.pid) < 800 * MIB


def test_set_user_id_and_devices_do_not_count(liar: Liar, mounts: List[Mount]) -> None:
    """Whoever serves the files would else be whoever mounts them."""
    if not mounts:
        mounts.append(liar.mount())
    (line,) = [
        line
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if f" {mounts[0].path} " in line
    ]
    assert {"nosuid", "nodev"} <= set(line.split(" ")[5].split(","))
