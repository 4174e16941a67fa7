"""A mount that reaches a server of the module's own through a relay: both may be broken at will."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from support.mount import Mount
from support.process import wait_until
from support.relay import Relay
from support.sshd import Sshd

# A dead connection is found after four seconds instead of 45.
QUICK = ("-o", "ServerAliveInterval=2,ServerAliveCountMax=2")


@dataclass(frozen=True)
class Line:
    """A mount, the relay it goes through and the server behind it."""

    mount: Mount
    relay: Relay
    sshd: Sshd

    @property
    def reconnects(self) -> int:
        """How often the mount has been connected again."""
        return self.mount.log_text().count("connected again")

    @property
    def losses(self) -> int:
        """How often the mount has found its connection gone."""
        return self.mount.log_text().count("connection lost")

    def wait_for_bytes(self, count_bytes: int, direction: str = "up") -> None:
        """Return when so many more bytes have passed."""
        target = self.relay.stats()[direction] + count_bytes
        wait_until(
            lambda: self.relay.stats()[direction] >= target, 60, f"{count_bytes} more bytes {direction}"
        )

    def unmount(self) -> None:
        """All is stored, and nothing had to be given up."""
        assert self.mount.unmount() == 0, self.mount.log_text()
        assert "not stored" not in self.mount.log_text()


@pytest.fixture(scope="module")
def module_sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with Sshd(tmp_path_factory.mktemp("faults")) as server:
        yield server


@pytest.fixture
def module_relay(module_sshd: Sshd) -> Iterator[Relay]:
    if module_sshd.pid is None:  # a test that failed has left it down
        module_sshd.start()
    with Relay(module_sshd.port) as relay:
        yield relay


@pytest.fixture
def make_line(
    module_sshd: Sshd,
    module_relay: Relay,  # before make_mount: the mounts end while the server can be reached
    make_mount: Callable[..., Mount],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Line]:
    """make_line(*mount options): a Line to a fresh directory of the server."""

    def make(*options: str) -> Line:
        served = module_sshd.tree / tmp_path_factory.mktemp("served").name
        served.mkdir()
        mount = make_mount(module_sshd, *options, port=module_relay.port, subdir=served.name)
        return Line(mount, module_relay, module_sshd)

    return make


@pytest.fixture
def line(make_line: Callable[..., Line]) -> Line:
    """A Line whose mount finds a dead connection within seconds."""
    return make_line(*QUICK)


def in_background(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Future[Any]:
    """Run a function in a thread that does not outlive the test run, should it hang in a dead mount."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments, **keywords))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@pytest.fixture
def megabytes_64(tmp_path: Path) -> Path:
    """A file of 64 MiB without pattern."""
    path = tmp_path / "64 MiB"
    with open("/dev/urandom", "rb") as noise:
        path.write_bytes(noise.read(64 << 20))
    return path
