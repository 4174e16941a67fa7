"""What is timed. A workload is a function of a Run that leaves its figures there, or raises."""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import subprocess
import threading
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional

from bench.data import Data, WrongBytes, make_entries, make_tree
from bench.run import Run, Sizes, same
from tools.trees import run as program

KIB, MIB = 2**10, 2**20
_READ_BYTES = 4 * KIB
_UNDER_WAY_BYTES = 4 * MIB  # written before the first look at a directory


class Workload(NamedTuple):
    """``payload_bytes`` and ``operations`` are what moves and how many things are done, None where that says little;
    ``beside`` names other ways to the same end that need no mount."""

    run: Callable[[Run], None]
    payload_bytes: Optional[Callable[[Sizes], int]] = None
    operations: Optional[Callable[[Sizes], int]] = None
    beside: Dict[str, Callable[[Run], None]] = {}


def write(run: Run, total_bytes: int, block_bytes: int) -> None:
    """One file, fsync, close, unmount."""
    data = Data(total_bytes, block_bytes)
    with run.writing() as path:
        data.write(path / "file")
    with run.written() as path:
        data.check(path / "file")


def read(run: Run) -> None:
    data = Data(run.sizes.bulk_bytes, MIB)
    with run.reading(run.source("bulk", data.write)) as path:
        data.check(path)


def random_reads(run: Run) -> None:
    data = Data(run.sizes.bulk_bytes, MIB)
    source = run.source("bulk", data.write)
    rng = random.Random(1)
    places = [
        rng.randrange(run.sizes.bulk_bytes // _READ_BYTES) * _READ_BYTES for _ in range(run.sizes.reads)
    ]
    with run.reading(source) as path:
        fd = os.open(path, os.O_RDONLY)
        try:
            got = [os.pread(fd, _READ_BYTES, place) for place in places]
        finally:
            os.close(fd)
    if got != [data.at(place, _READ_BYTES) for place in places]:
        raise WrongBytes("a random read brought other bytes")


def small_files(run: Run) -> Path:
    return run.source("tree", lambda path: make_tree(path, run.sizes.files))


def rsync_in(run: Run) -> None:
    source = small_files(run)
    with run.writing() as path:
        program("rsync", "-a", source, path)
    run.check(source, source.name)


def copy_in(run: Run) -> None:
    source = small_files(run)
    with run.writing() as path:
        program("cp", "-r", source, path)
    run.check(source, source.name)


def rsync_again(run: Run) -> None:
    """Nothing is left to do, but rsync has to look."""
    source = small_files(run)
    with run.reading(source) as path:
        told = program("rsync", "-a", "--itemize-changes", source, path.parent)
    sent = [line for line in told.splitlines() if line.startswith("<")]
    if sent:
        raise WrongBytes(f"rsync found {len(sent)} files changed: {sent[0]}")


def find(run: Run) -> None:
    source = small_files(run)
    with run.reading(source) as path:
        told = program("find", ".", "-ls", cwd=path)
    expected = program("find", ".", "-ls", cwd=source)
    _same_lines(told, expected, size=6)


def tar(run: Run) -> None:
    source = small_files(run)
    with run.scratch() as scratch:
        with run.reading(source) as path:
            program("tar", "-cf", scratch / "archive.tar", "-C", path, ".")
        (scratch / "extracted").mkdir()
        program("tar", "-xf", scratch / "archive.tar", "-C", scratch / "extracted")
        same(source, scratch / "extracted")


def remove(run: Run) -> None:
    source = small_files(run)
    with run.writing(source) as path:
        program("rm", "-r", path / source.name)
    with run.written() as path:
        if os.listdir(path):
            raise WrongBytes("not everything was removed")


def list_many(run: Run) -> None:
    source = run.source("many", lambda path: make_entries(path, run.sizes.entries))
    with run.reading(source) as path:
        told = program("ls", "-l", path)
    _same_lines(told, program("ls", "-l", source), size=4)


def backup_source(run: Run) -> Path:
    return run.source(
        "backup",
        lambda path: make_tree(path, max(1, run.sizes.backup_bytes // 200_000), (100_000, 200_000, 300_000)),
    )


def restic(run: Run) -> None:
    """init and backup."""
    source = backup_source(run)
    with run.scratch() as scratch:
        with run.writing() as path:
            _restic_backup(scratch, source, str(path / "repository"))
        _restic_check(run, scratch, source)


def restic_sftp(run: Run) -> None:
    """The same through restic's own SFTP client, which is OpenSSH's ssh."""
    source = backup_source(run)
    ssh = ["ssh", *run.venue.ssh_options, run.venue.destination, "-s", "sftp"]
    with run.scratch() as scratch:
        with run.without_mount() as directory:
            repository = f"sftp:{run.venue.destination}:{directory}/repository"
            _restic_backup(scratch, source, repository, "-o", f"sftp.command={shlex.join(ssh)}")
        _restic_check(run, scratch, source)


def borg(run: Run) -> None:
    """init and create."""
    source = backup_source(run)
    with run.scratch() as scratch:
        environment = {
            "BORG_BASE_DIR": str(scratch / "borg"),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
            "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
        }
        with run.writing() as path:
            program("borg", "init", "--encryption", "none", path / "repository", env=environment)
            program("borg", "create", f"{path / 'repository'}::one", ".", cwd=source, env=environment)
        (scratch / "restored").mkdir()
        with run.written() as path:
            repository = f"{path / 'repository'}::one"
            program("borg", "extract", repository, cwd=scratch / "restored", env=environment)
        same(source, scratch / "restored")


def looks(run: Run) -> None:
    """Each directory is seen for the first time, names and attributes of its ten files, while a large file is written."""
    source = run.source(
        "looks", lambda path: make_tree(path, 10 * run.sizes.looks, directories=run.sizes.looks)
    )
    with run.writing(source) as path:
        with _bulk_write(path / "bulk") as data:
            started = time.monotonic()
            seen = {
                entry.name: entry.stat().st_size
                for directory in sorted(os.listdir(source))
                for entry in os.scandir(path / source.name / directory)
            }
            seconds = time.monotonic() - started
    run.took(seconds)
    if seen != {each.name: each.stat().st_size for each in source.rglob("*") if each.is_file()}:
        raise WrongBytes("a look showed other names or sizes")
    with run.written() as path:
        data.check(path / "bulk")


def many_programs(run: Run) -> None:
    sources = [
        run.source(f"programs/{number}", lambda path: make_tree(path, run.sizes.files_each, directories=1))
        for number in range(run.sizes.programs)
    ]
    with run.writing() as path:
        copies = [subprocess.Popen(["cp", "-r", source, path]) for source in sources]
        statuses = [copy.wait() for copy in copies]
    if any(statuses):
        raise RuntimeError(f"cp ended with {max(statuses)}")
    for source in sources:
        run.check(source, source.name)


def _files(sizes: Sizes) -> int:
    return sizes.files


def _bulk(sizes: Sizes) -> int:
    return sizes.bulk_bytes


def _small_writes(sizes: Sizes) -> int:
    return sizes.small_writes_bytes


WORKLOADS: Dict[str, Workload] = {
    "write": Workload(lambda run: write(run, run.sizes.bulk_bytes, MIB), _bulk),
    "write-10k": Workload(lambda run: write(run, run.sizes.small_writes_bytes, 10 * KIB), _small_writes),
    "write-4k": Workload(lambda run: write(run, run.sizes.small_writes_bytes, 4 * KIB), _small_writes),
    "read": Workload(read, _bulk),
    "random-read": Workload(random_reads, operations=lambda sizes: sizes.reads),
    "rsync": Workload(rsync_in, operations=_files),
    "cp": Workload(copy_in, operations=_files),
    "rsync-again": Workload(rsync_again, operations=_files),
    "find": Workload(find, operations=_files),
    "tar": Workload(tar, operations=_files),
    "rm": Workload(remove, operations=_files),
    "restic": Workload(restic, lambda sizes: sizes.backup_bytes, beside={"restic-sftp": restic_sftp}),
    "borg": Workload(borg, lambda sizes: sizes.backup_bytes),
    "ls": Workload(list_many, operations=lambda sizes: sizes.entries),
    "looks": Workload(looks, operations=lambda sizes: sizes.looks),
    "programs": Workload(many_programs, operations=lambda sizes: sizes.programs * sizes.files_each),
}


def _restic_backup(scratch: Path, source: Path, repository: str, *options: str) -> None:
    environment = _restic_environment(scratch, repository)
    program("restic", *options, "init", env=environment)
    program("restic", *options, "backup", ".", cwd=source, env=environment)


def _restic_check(run: Run, scratch: Path, source: Path) -> None:
    with run.written() as path:
        environment = _restic_environment(scratch, str(path / "repository"))
        program(
            "restic", "restore", "latest", "--no-cache", "--target", scratch / "restored", env=environment
        )
    same(source, scratch / "restored")


def _restic_environment(scratch: Path, repository: str) -> Dict[str, str]:
    return {
        "RESTIC_PASSWORD": "secret",
        "RESTIC_REPOSITORY": repository,
        "RESTIC_CACHE_DIR": str(scratch / "cache"),
    }


@contextlib.contextmanager
def _bulk_write(path: Path) -> Iterator[Data]:
    """While the block runs, a file is written without an end. What is yielded is the file's data once the block has ended."""
    data = Data(0, MIB)
    under_way, enough = threading.Event(), threading.Event()
    errors: List[OSError] = []

    def work() -> None:
        try:
            with path.open("wb", buffering=0) as file:
                for block in Data(2**50, MIB).blocks():
                    data.total_bytes += file.write(block)
                    if data.total_bytes >= _UNDER_WAY_BYTES:
                        under_way.set()
                    if enough.is_set():
                        return
        except OSError as error:
            errors.append(error)
            under_way.set()

    writer = threading.Thread(target=work)
    writer.start()
    under_way.wait()
    try:
        yield data
    finally:
        enough.set()
        writer.join()
    if errors:
        raise errors[0]


def _same_lines(told: str, expected: str, size: int) -> None:
    """Compare the sizes (that column, of files) and names in the output of ls -l or find -ls."""

    def essence(text: str) -> List[List[str]]:
        lines = [line.split() for line in text.splitlines() if not line.startswith("total")]
        return sorted(
            [line[-1], "" if any(word.startswith("d") for word in line[:3]) else line[size]] for line in lines
        )

    if essence(told) != essence(expected):
        raise WrongBytes("the listing differs from the server's")
