"""Hours of backups over a bad network: four processes work on one mount while faults strike, and nothing shows of them.

No operation fails, no listing is short, and in the end the server has every byte, name, mode and link that the four say it
has. Then the mount and the server are back to what they used after a warm-up, which was the same load with the same faults:
memory, descriptors, threads, connections, the server's processes and its open files.

    SFTPMOUNT_SOAK_S      seconds of the long run (3600)
    SFTPMOUNT_SOAK_SEED   the seed of either run, which a failure names
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import pytest

from faults.soak import Faults, Load, check_server
from mount.helpers import noise, opened
from sftpmount.fs import files_ahead, listings, owed
from sftpmount.options import MountOptions
from support.mount import Mount
from support.process import wait_until
from support.relay import Relay
from support.sshd import Sshd

LONG_S = float(os.environ.get("SFTPMOUNT_SOAK_S", "3600"))
SEED = os.environ.get("SFTPMOUNT_SOAK_SEED")
MIB = 2**20
CACHE_MIB = 64  # cache_size, the default

# The three together notice a silent death after nine seconds, which is more than a stall or a stopped server lasts.
OPTIONS = ("-o", "ServerAliveInterval=3,ServerAliveCountMax=3")
# No step may take longer: the longest outage is some ten seconds and the longest pause between attempts fifteen, and a step
# (all of an rsync, or of a file of 20 MiB in small pieces) may meet several.
STEP_MAX_S = 150.0
# What the allocator keeps of the buffers under load differs from one look to the next. After two minutes of warm-up it has
# seen the most of them, and a leak of 2 MiB in a reconnect, or of 1 KiB in an operation, is more than this in an hour; ten
# seconds are no warm-up, and then only a gross leak shows.
RESIDENT_GROWTH_MAX = 64 * MIB
RESIDENT_GROWTH_SHORT_MAX = 128 * MIB
# More than libfuse keeps idle (ten), so that it keeps just these whatever the load had made it start.
BURST = 30


# Threads of these pools are started when a pool is first busy, and kept: no leak until there are more than it may have.
POOLS = {
    "list-ahead": listings._THREADS,
    "read-ahead": files_ahead._THREADS,
    "attributes": owed._THREADS,
    "removals": 1,
}
# sshd's own for a connection, and one for each lane: further ones are opened where many files are written at once.
SERVER_PROCESSES_MAX = 2 + MountOptions.lanes


class NamedMount(Mount):
    """Its threads' names are the kernel's, too; SIGUSR2 has it write what each of them is about to its log."""

    changes = """
import ctypes, faulthandler, signal, threading
faulthandler.register(signal.SIGUSR2)
libc, begin = ctypes.CDLL(None), threading.Thread._bootstrap_inner
def named(thread):
    libc.prctl(15, thread.name.encode()[:15], 0, 0, 0)  # PR_SET_NAME
    begin(thread)
threading.Thread._bootstrap_inner = named
"""


def stacks(mount: Mount) -> str:
    """What the threads of a mount are about: a program that waits for ever is seen by nothing else."""
    if not mount.is_running:
        return "the mount's process has ended"
    before = len(mount.log_text())
    os.kill(mount.pid, signal.SIGUSR2)
    with contextlib.suppress(TimeoutError):
        # The main thread comes last, and its first function.
        wait_until(lambda: " in <module>\n" in mount.log_text()[before:], 10.0, "the stacks")
    return mount.log_text()[before:]


class Level(NamedTuple):
    """What a mount and its server use while nothing is asked of them."""

    resident_bytes: int
    descriptors: int
    threads: int
    connections: int
    server_processes: int
    server_files: int


def level(mount: Mount, sshd: Sshd, relay: Relay) -> Level:
    return Level(
        mount.rss_bytes(),
        mount.fd_count(),
        threads(mount),
        relay.stats()["open"],
        len(sshd.sessions()),
        sshd.open_files(),
    )


def threads(mount: Mount) -> int:
    """Those that belong to no pool."""
    names: List[str] = []
    for path in Path(f"/proc/{mount.pid}/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has ended
            names.append(path.read_text().strip())
    pooled = collections.Counter(name.partition("_")[0] for name in names if "_" in name)
    assert all(count <= POOLS.get(pool, count) for pool, count in pooled.items()), pooled
    return len(names) - sum(pooled[pool] for pool in POOLS)


def burst(mount: Mount, relay: Relay) -> None:
    """Many questions at once, none of which is answered before all are asked."""
    asking = [threading.Thread(target=os.statvfs, args=(mount.path,), daemon=True) for _ in range(BURST)]
    relay.stall()
    try:
        for each in asking:
            each.start()
        wait_until(lambda: threads(mount) >= BURST, 20.0, "a thread for each question")
    finally:
        relay.flow()
    for each in asking:
        each.join(30.0)


def fill_cache(mount: Mount) -> None:
    """Read more than the mount may keep, so that it keeps as much at every look."""
    with (mount.served / "fill").open("wb") as file:
        for number in range(CACHE_MIB + 16):
            file.write(noise(MIB, number))
    with opened(mount.path / "fill", os.O_RDONLY) as fd:
        for number in range(CACHE_MIB + 16):
            assert os.pread(fd, MIB, number * MIB) == noise(MIB, number)


def settled(mount: Mount, sshd: Sshd, relay: Relay, before: Optional[Level]) -> Level:
    """The level once nothing is open and no count is above ``before``; or what it is after a minute. Memory is not waited for."""
    burst(mount, relay)
    fill_cache(mount)

    def is_settled() -> bool:
        now = level(mount, sshd, relay)
        if before is not None:
            return not above(now, before)
        return now.threads < BURST and now.connections == 1 and now.server_files == 0

    try:
        wait_until(is_settled, 60.0, "the level", 0.2)
    except TimeoutError:
        pass
    now = level(mount, sshd, relay)
    os.unlink(mount.path / "fill")
    return now


def above(now: Level, before: Level) -> List[str]:
    """What is higher than it was, or than it may be; memory left out."""
    most = before._replace(server_processes=SERVER_PROCESSES_MAX)
    return [name for name in Level._fields[1:] if getattr(now, name) > getattr(most, name)]


def check_figures(figures: Dict[str, Dict[str, Any]], faults: int) -> None:
    for role, values in figures.items():
        assert values["steps"] > 0, f"{role} did nothing"
        assert values["longest_s"] < STEP_MAX_S, f"{role}: {values['longest']} took {values['longest_s']} s"
    unclaimed = figures["namespace"]["unclaimed"]
    assert len(unclaimed) <= faults, (
        f"a fault loses one reply at most, but these were not claimed: {unclaimed}"
    )


def check_levels(first: Level, last: Level, growth_max: int) -> None:
    assert first.connections == 1 and first.server_files == 0, f"after the warm-up: {first}"
    assert not above(last, first), f"{above(last, first)} grew from {first} to {last}"
    growth = last.resident_bytes - first.resident_bytes
    assert growth < growth_max, f"memory grew by {growth} bytes, from {first} to {last}"


def soak(
    sshd: Sshd,
    mount: Mount,
    relay: Relay,
    local: Path,
    seed: int,
    phases_s: Sequence[float],
    mean_s: float,
    growth_max: int,
) -> None:
    """The load with its faults, for each of ``phases_s``; what the last leaves is held against what the first leaves."""
    told: List[str] = []
    levels: List[Level] = []
    try:
        for number, seconds in enumerate(phases_s):
            name = f"phase-{number}"
            load = Load(mount.path / name, local / name, seed + number)
            with Faults(sshd, relay, seed + number, mean_s, told) as faults:
                figures = load.run(seconds)
            stored = check_server(mount.served / name, local / name)
            levels.append(settled(mount, sshd, relay, levels[0] if levels else None))
            told.append(f"{time.strftime('%H:%M:%S')} end of {name}, {seconds:g} s: {levels[-1]}")
            print(f"{told[-1]}; seed {seed}, {faults.count} faults, {stored} bytes compared")
            for role, values in figures.items():
                print(f"    {role}: {values}")
            check_figures(figures, faults.count)
        check_levels(levels[0], levels[-1], growth_max)
        assert "Traceback" not in mount.log_text()
        assert sorted(os.listdir(mount.served)) == [f"phase-{number}" for number in range(len(phases_s))]
        assert mount.unmount() == 0
    except (AssertionError, OSError, RuntimeError) as error:
        listed, log_end = "\n  ".join(told), mount.log_text()[-8000:]
        raise AssertionError(
            f"seed {seed}: {error}\nfaults:\n  {listed}\nthe mount's log ends:\n{log_end}\n"
            f"its threads:\n{stacks(mount)}"
        ) from error


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_minute(own_sshd: Sshd, tmp_path: Path) -> None:
    run(
        own_sshd,
        tmp_path,
        seed=int(SEED or 1),
        phases_s=(10.0, 25.0),
        mean_s=4.0,
        growth_max=RESIDENT_GROWTH_SHORT_MAX,
    )


@pytest.mark.long
@pytest.mark.timeout(LONG_S + 1200)
def test_an_hour(own_sshd: Sshd, tmp_path: Path) -> None:
    seed = int(SEED or random.randrange(1_000_000))
    run(
        own_sshd,
        tmp_path,
        seed=seed,
        phases_s=(120.0, LONG_S),
        mean_s=20.0,
        growth_max=RESIDENT_GROWTH_MAX,
    )


def run(
    sshd: Sshd,
    tmp_path: Path,
    *,
    seed: int,
    phases_s: Sequence[float],
    mean_s: float,
    growth_max: int,
) -> None:
    print(f"seed {seed}")
    with Relay(sshd.port) as relay:
        with NamedMount(sshd, tmp_path, *OPTIONS, port=relay.port, life_s=sum(phases_s) + 900.0) as mount:
            soak(sshd, mount, relay, tmp_path, seed, phases_s, mean_s, growth_max)
