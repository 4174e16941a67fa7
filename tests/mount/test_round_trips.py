"""How many round trips programs wait for: upper bounds, so that no change adds one unseen.

The sequences of rsync, restic and borg are the system calls that these programs make for one file (strace).
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import pytest

from mount.helpers import fsync_directory, noise, opened, refused
from support.flights import CountedMount
from support.relay import Relay
from support.sshd import Sshd

RTT_MS = 100.0
ATTEMPTS = (
    10  # a machine that stalls for a round trip parts a flight in two: only what comes again is our doing
)
OLD = 1_400_000_000
DATA = noise(5000)
NEW = os.O_CREAT | os.O_EXCL


@pytest.fixture(scope="module")
def counted(sshd: Sshd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CountedMount]:
    directory = tmp_path_factory.mktemp("counted")
    (sshd.tree / directory.name).mkdir()
    with Relay(sshd.port, rtt_ms=RTT_MS) as relay:
        with CountedMount(sshd, directory, port=relay.port, subdir=directory.name) as mount:
            yield mount


def write(path: Path, flags: int = NEW | os.O_WRONLY, mode: int = 0o600) -> None:
    with opened(path, flags, mode) as fd:
        os.write(fd, DATA)


def read(path: Path) -> None:
    with opened(path, os.O_RDONLY) as fd:
        assert os.read(fd, 2**16) + os.read(fd, 2**16) == DATA


def rsync(path: Path) -> None:
    with refused(errno.ENOENT):
        os.lstat(path / "file")
    temporary = path / ".file.Zir9qH"
    with opened(temporary, NEW | os.O_RDWR | os.O_NOFOLLOW, 0o600) as fd:
        os.fchmod(fd, 0o600)
        os.write(fd, DATA)
    os.lstat(temporary)
    os.utime(temporary, (OLD, OLD), follow_symlinks=False)
    os.lstat(temporary)
    with opened(temporary, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW) as fd:
        os.fchmod(fd, 0o644)
    os.rename(temporary, path / "file")


def old_rsync(path: Path) -> None:
    """Versions before 3.5 do it so."""
    with refused(errno.ENOENT):
        os.lstat(path / "file")
    temporary = path / ".file.Zir9qH"
    with opened(temporary, NEW | os.O_RDWR, 0o600) as fd:
        os.fchmod(fd, 0o600)
        os.write(fd, DATA)
    os.utime(temporary, (OLD, OLD), follow_symlinks=False)
    os.chmod(temporary, 0o644)
    os.rename(temporary, path / "file")


def restic(path: Path) -> None:
    temporary = path / "file-tmp-4117083771"
    with opened(temporary, NEW | os.O_RDWR, 0o600) as fd:
        os.write(fd, DATA)
        os.fsync(fd)
    with refused(errno.ENOENT):
        os.lstat(path / "file")
    os.rename(temporary, path / "file")
    fsync_directory(path)
    os.chmod(path / "file", 0o400)


def borg_segment(path: Path) -> None:
    with opened(path / "17", NEW | os.O_RDWR, 0o600) as fd:
        os.fstat(fd)
        os.write(fd, DATA)
        os.fdatasync(fd)
        fsync_directory(path)


def borg_save(path: Path) -> None:
    """Its indexes, hints and configuration: a temporary file takes the place of the old one."""
    temporary = path / "hints.5.tmp"
    with opened(temporary, NEW | os.O_RDWR | os.O_NOFOLLOW, 0o600) as fd:
        os.write(fd, DATA)
        os.fsync(fd)
    os.replace(temporary, path / "hints.5")
    fsync_directory(path)


def borg_lock(path: Path) -> None:
    os.mkdir(path / "lock.exclusive.f6nwaoc_.tmp", 0o700)
    with opened(path / "lock.exclusive.f6nwaoc_.tmp" / "vm@1.2-0", os.O_CREAT | os.O_TRUNC | os.O_WRONLY):
        pass
    os.rename(path / "lock.exclusive.f6nwaoc_.tmp", path / "lock.exclusive")


def borg_look(path: Path) -> None:
    """What there is in its repository: it asks time and again."""
    deeper = path / "data" / "0"
    deeper.mkdir(parents=True)
    for _ in range(2):
        for each in (path, path / "data", deeper):
            os.listdir(each)


def stat_absent(path: Path) -> None:
    with refused(errno.ENOENT):
        os.lstat(path / "absent")


def read_ten(path: Path) -> None:
    for name in sorted(os.listdir(path)):
        os.lstat(path / name)
        read(path / name)


def stat_ten(path: Path) -> None:
    for count in range(10):
        os.lstat(path / f"file-{count}")


def stat_ten_absent(path: Path) -> None:
    """As for each new file in a directory whose lease has run out."""
    for count in range(10):
        with refused(errno.ENOENT):
            os.lstat(path / f"absent-{count}")


def remove_all(path: Path) -> None:
    for name in sorted(os.listdir(path)):
        os.unlink(path / name)
    os.rmdir(path)


class Sequence(NamedTuple):
    """``least`` round trips are what the promises demand: exclusive creation and rename by the server, storing at close, no
    invented answers; of removals, the first and the last. ``most`` is what we allow ourselves; in a directory that this
    mount has ``made``, has ``listed``, of which all it holds (``many`` files) is ``unknown``, or that itself is ``unseen``."""

    run: Callable[[Path], object]
    directory: str
    least: int
    most: int


SEQUENCES = {
    "create": Sequence(lambda path: write(path / "file"), "made", 2, 2),
    "create an unknown name": Sequence(lambda path: write(path / "file"), "unknown", 2, 3),
    "rsync": Sequence(rsync, "made", 3, 3),
    "rsync before 3.5": Sequence(old_rsync, "made", 3, 3),
    "restic": Sequence(restic, "made", 3, 3),
    "borg's segment": Sequence(borg_segment, "made", 2, 2),
    "borg's other files": Sequence(borg_save, "made", 3, 3),
    "borg's lock": Sequence(borg_lock, "made", 3, 4),
    "borg's looks": Sequence(borg_look, "made", 10, 10),
    "stat a known name": Sequence(lambda path: os.lstat(path / "file-3"), "listed", 0, 0),
    "stat an absent name": Sequence(stat_absent, "listed", 0, 0),
    "stat an absent name in a new directory": Sequence(stat_absent, "made", 0, 0),
    "stat an unknown name": Sequence(lambda path: os.lstat(path / "file-3"), "unknown", 1, 1),
    "stat an unknown absent name": Sequence(stat_absent, "unknown", 1, 1),
    "stat ten unknown names": Sequence(stat_ten, "unknown", 1, 3),
    "stat ten unknown absent names": Sequence(stat_ten_absent, "unknown", 1, 10),
    "read a known file": Sequence(lambda path: read(path / "file-3"), "listed", 1, 2),
    "read an unknown file": Sequence(lambda path: read(path / "file-3"), "unknown", 1, 3),
    "read ten in turn": Sequence(read_ten, "unknown", 3, 8),
    "list": Sequence(os.listdir, "unknown", 2, 2),
    "list at the first look": Sequence(os.listdir, "unseen", 2, 3),
    "mkdir": Sequence(lambda path: os.mkdir(path / "new"), "made", 1, 1),
    "remove ten": Sequence(remove_all, "unknown", 7, 9),
    "remove a hundred": Sequence(remove_all, "many", 7, 11),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_round_trips(counted: CountedMount, name: str) -> None:
    run, directory, least, most = SEQUENCES[name]
    for attempt in range(ATTEMPTS):
        path, served = (root / f"{name}, {attempt}" for root in (counted.path, counted.served))
        prepare(path, served, directory)
        with counted.counting() as flights:
            run(path)
        if len(flights) <= most:
            break
    assert least <= len(flights) <= most, "\n".join(map(str, flights))


def prepare(path: Path, served: Path, directory: str) -> None:
    if directory == "made":
        path.mkdir()
        return
    served.mkdir()
    for count in range(100 if directory == "many" else 10):
        (served / f"file-{count}").write_bytes(DATA)
        os.utime(served / f"file-{count}", (OLD, OLD))
    if directory != "unseen":
        path.lstat()
    if directory == "listed":
        os.listdir(path)
