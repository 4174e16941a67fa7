"""The contract of sftp/ on every server, over the real connection."""

from __future__ import annotations

from typing import Dict, Iterator, Tuple

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

pytestmark = pytest.mark.long

# What the servers cannot, or refuse with another word than a local file system's; what the kernel asks first is among it.
DEVIATIONS: Dict[str, Tuple[str, ...]] = {
    "OpenSSH, gesftpserver": (
        "test_of_a_link_itself",  # no lsetstat@openssh.com
        "-creating exclusively over a link to nothing]",  # it creates what the link leads to
    ),
    "ProFTPD mod_sftp": (
        "test_of_a_link_itself",
        "test_symlinks_keep_their_target_as_it_is",  # READLINK makes it absolute
        "-readlink of a file]",
        "-opening a directory for writing]",
        "-creating over a directory]",
        "-creating exclusively over a directory]",
        "-creating exclusively over a link to nothing]",
        "-a path too long]",
    ),
    "rclone serve sftp": (
        "test_of_each_kind",  # no symbolic links, nor do the refusals come to pass that begin with one
        "test_refusals_have_the_errno",
        "test_symlinks_keep_their_target",
        "test_of_a_link_itself",
        "test_mode_times_and_size_by_path",  # modes and sizes stay as they are
        "test_through_a_handle",
        "test_statvfs",
        "test_writes_behind_the_end_leave_a_hole",  # no handle for reading and writing
        "test_open_modes",  # EXCL is ignored, and files are emptied
        "test_fstat_and_fsync_behind_the_writes",
        "test_a_handle_outlives_the_name",
        "test_commit_by_close_leaves_a_file_that_can_be_used",
        r"a\nb]",
        "test_rename_replaces_an_empty_directory",
        "test_a_hard_link_is_the_same_file",
    ),
}


@pytest.fixture(autouse=True)
def deviation(request: pytest.FixtureRequest) -> None:
    """Expect the failures of ``DEVIATIONS``, and complain where one has gone."""
    server = request.node.callspec.params["shared"]
    if any(words in request.node.name for words in DEVIATIONS.get(server, ())):
        request.applymarker(pytest.mark.xfail(strict=True))


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
