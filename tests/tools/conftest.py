from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Callable, List

import pytest

from faults.conftest import Line
from support.mount import Mount
from support.relay import Relay
from support.sshd import Sshd


@pytest.fixture
def request_many() -> Callable[[List[Callable[[], object]]], None]:
    """Run functions at once, each in a thread; the first error is raised after all have ended."""

    def run_all(calls: List[Callable[[], object]]) -> None:
        with ThreadPoolExecutor(len(calls)) as pool:
            futures = [pool.submit(call) for call in calls]
        for future in futures:
            future.result()

    return run_all


@pytest.fixture
def mounted(
    sshd: Sshd,
    relay: Relay,  # before make_mount: the mounts end while the server can be reached
    make_mount: Callable[..., Mount],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[], Line]:
    """mounted(): a mount, each time of the same directory and on the same mountpoint, with nothing in its cache."""
    served = sshd.tree / tmp_path_factory.mktemp("served").name
    served.mkdir()
    made = []

    def mount_again() -> Line:
        if made:
            made[-1].unmount()
            made[-1].mount.path.rmdir()
        made.append(Line(make_mount(sshd, port=relay.port, subdir=served.name), relay, sshd))
        return made[-1]

    return mount_again
