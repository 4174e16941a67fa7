"""The contract of sftp/ on every server, over the real connection."""

from __future__ import annotations

from typing import Iterator

import pytest

from interop.servers import SERVERS
from sftp.places import Place, at_server
from sftp.test_contract import (  # noqa: F401
    TestAttributes,
    TestFiles,
    TestNames,
    place,
    remote,
    test_refusals_have_the_errno_of_a_local_file_system,
)
from sftpmount.sftp.remote import Remote


@pytest.fixture(scope="module", params=SERVERS)
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Place, Remote]]:
    directory = tmp_path_factory.mktemp("server")
    with SERVERS[request.param](directory) as server:
        place = at_server(server, server.tree)
        remote = Remote(place.dial, retry_timeout_s=20.0)
        remote.start()
        yield place, remote
        remote.close()
