"""A fake server, and sessions and remotes on it that end with their test."""

from __future__ import annotations

from typing import Any, Callable, Iterator, List

import pytest

from sftp.fake_server import FakeServer
from sftpmount.sftp.remote import Remote

# The machine may be busy with other tests.


@pytest.fixture
def make_server() -> Iterator[Callable[..., FakeServer]]:
    """FakeServer(...), as many as the test likes."""
    made: List[FakeServer] = []

    def make(**settings: Any) -> FakeServer:
        made.append(FakeServer(**settings))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def server(make_server: Callable[..., FakeServer]) -> FakeServer:
    return make_server()


@pytest.fixture
def make_remote() -> Iterator[Callable[..., Remote]]:
    """A started Remote on a server (anything with dial())."""
    made: List[Remote] = []

    def make(server: Any, **settings: Any) -> Remote:
        settings = {
            "retry_timeout_s": 20.0,
            "alive_interval_s": 0.0,
            "lanes": 1,
            "settle_s": 0.0,
            **settings,
        }
        remote = Remote(server.dial, **settings)
        made.append(remote)
        remote.start()
        return remote

    yield make
    for remote in reversed(made):
        remote.close()
