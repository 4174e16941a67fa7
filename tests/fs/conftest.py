"""A fake server with a clock of its own, and filesystems on it that end with their test."""

from __future__ import annotations

import itertools
from typing import Any, Callable, Dict, Iterator, List

import pytest

from sftp.fake_server import FakeServer
from sftpmount.fs.filesystem import Filesystem
from sftpmount.sftp.remote import Remote
from support.process import wait_until

START_S = 1_700_000_000.0


class Clock:
    """Seconds that pass when a test says so; serves as monotonic clock, wall clock and the server's."""

    def __init__(self) -> None:
        self.s = START_S

    def __call__(self) -> float:
        return self.s


class Leaps:
    """A clock for ``Remote`` by which every session lived long: no loss makes the next reconnect wait."""

    def __init__(self) -> None:
        self._calls = itertools.count()

    def __call__(self) -> float:
        return 60.0 * next(self._calls)


class Mounted:
    """A filesystem with its remote."""

    def __init__(self, server: Any, root: bytes, clock: Callable[[], float], **settings: Any) -> None:
        far: Dict[str, Any] = {"retry_timeout_s": 20.0, "alive_interval_s": 0.0, "lanes": 3, "settle_s": 0.0}
        far.update(request_deadline_s=300.0, alive_count_max=3)
        far.update({name: settings.pop(name) for name in list(settings) if name in far})
        if settings.pop("leaps", False):
            far.update(clock=Leaps(), retry_timeout_s=None)
        self.remote = Remote(server.dial, **far)
        self.remote.start()
        session = self.remote.session()
        if far["lanes"] == 3:
            wait_until(lambda: session.read_lane is not session.write_lane, 10.0, "three lanes")
        self.fs = Filesystem(self.remote, root, clock=clock, wall=clock, **settings)
        self.fs.start()

    def close(self) -> None:
        self.fs.close()
        self.remote.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_server(clock: Clock) -> Iterator[Callable[..., FakeServer]]:
    made: List[FakeServer] = []

    def make(**settings: Any) -> FakeServer:
        made.append(FakeServer(now=clock, **settings))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def server(make_server: Callable[..., FakeServer]) -> FakeServer:
    return make_server()


@pytest.fixture
def mount(make_server: Callable[..., FakeServer], clock: Clock) -> Iterator[Callable[..., Filesystem]]:
    """A started Filesystem on /home of a server; options of Remote and of Filesystem."""
    made: List[Mounted] = []

    def make(server: FakeServer, root: bytes = b"", **settings: Any) -> Filesystem:
        made.append(Mounted(server, root, clock, **settings))
        return made[-1].fs

    yield make
    for mounted in reversed(made):
        mounted.close()


@pytest.fixture
def fs(mount: Callable[..., Filesystem], server: FakeServer) -> Filesystem:
    return mount(server)
