"""A mount that the tests of one module share, and a fresh directory on it for each test."""

from __future__ import annotations

import re
from typing import Callable, Iterator, List

import pytest

from mount.helpers import Here
from support.mount import Mount
from support.sshd import Sshd


@pytest.fixture(scope="module")
def live_mount(sshd: Sshd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Mount]]:
    """A function that returns the module's mount, which is made anew where a test has brought it down."""
    directory = tmp_path_factory.mktemp("module")
    served = sshd.tree / directory.name
    served.mkdir()
    mounts: List[Mount] = []

    def live() -> Mount:
        if not mounts or not mounts[-1].is_running or not mounts[-1].is_mounted:
            mounts.append(Mount(sshd, directory, directory=str(served)))
        return mounts[-1]

    yield live
    for mount in reversed(mounts):
        mount.close()


@pytest.fixture
def here(live_mount: Callable[[], Mount], request: pytest.FixtureRequest) -> Here:
    mount = live_mount()
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:60]
    number = 0
    while True:
        try:
            # Made on the server: a directory that the mount makes is complete to it, and hides for some seconds (the lease)
            # what the tests put into it on the server's side.
            (mount.served / f"{name}-{number}").mkdir()
        except FileExistsError:
            number += 1
            continue
        return Here(mount.path / f"{name}-{number}", mount.served / f"{name}-{number}")
