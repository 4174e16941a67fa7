"""A file that is open by one of several names goes on through a reconnect by another of them when that name goes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Callable

import pytest

from mount.helpers import opened
from support.mount import Mount
from support.process import wait_until
from support.relay import Relay
from support.sshd import Sshd


def reconnect(relay: Relay) -> None:
    before = relay.stats()["accepted"]
    relay.reset()
    wait_until(lambda: relay.stats()["accepted"] > before, 20.0, "a new connection")


@pytest.mark.parametrize("cut_first", [True, False])
@pytest.mark.parametrize("replaced", [True, False])
def test_another_name_is_left(
    sshd: Sshd,
    relay: Relay,
    make_mount: Callable[..., Mount],
    tmp_path: Path,
    replaced: bool,
    cut_first: bool,
) -> None:
    directory = sshd.tree / f"links-{tmp_path.name}"
    directory.mkdir()
    mount = make_mount(sshd, port=relay.port, directory=str(directory))
    (mount.path / "held").write_bytes(b"x" * 100)
    (mount.path / "other").write_bytes(b"another file")
    os.link(mount.path / "held", mount.path / "left")
    with opened(mount.path / "held", os.O_RDWR) as fd:
        os.pwrite(fd, b"written", 10)
        if cut_first:
            reconnect(relay)
        if replaced:
            os.rename(mount.path / "other", mount.path / "held")
        else:
            os.unlink(mount.path / "held")
        if not cut_first:
            reconnect(relay)
    assert (mount.served / "left").read_bytes() == b"x" * 10 + b"written" + b"x" * 83
    assert (mount.served / "other").exists() != replaced
