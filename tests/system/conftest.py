"""One scratch environment for all tests of a module; what a test leaves mounted there is taken away after it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Iterator

import pytest

from support.sshd import Sshd
from system.scratch import Scratch

# Reached by this name from the scratch environment, as if it were a machine of its own.
HOST = "nas.example"


@pytest.fixture(scope="module")
def shared_scratch(sshd: Sshd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scratch]:
    with Scratch(tmp_path_factory.mktemp("scratch")) as each:
        each.write(
            "/etc/ssh/ssh_config",
            f"Host {HOST}\n HostName 127.0.0.1\n Port {sshd.port}\n GlobalKnownHostsFile /etc/ssh/known\n"
            " UserKnownHostsFile /dev/null\n IdentitiesOnly yes\n",
        )
        each.write("/etc/ssh/known", sshd.known_hosts.read_text())
        yield each


@pytest.fixture
def scratch(shared_scratch: Scratch) -> Iterator[Scratch]:
    yield shared_scratch
    shared_scratch.unmount_all()
    os.chown(shared_scratch.mnt, os.geteuid(), -1)


@pytest.fixture
def served(sshd: Sshd, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the server with one file, ``hello``."""
    path = sshd.tree / tmp_path_factory.mktemp("served").name
    path.mkdir()
    (path / "hello").write_text("from the server")
    return path
