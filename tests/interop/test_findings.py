"""The table of servers is what the servers say, and no mount reports done what is not so."""

from __future__ import annotations

from pathlib import Path
from typing import List

import pytest

from interop.findings import MOUNT, SERVER, WRONG, findings
from interop.servers import SERVERS, version
from interop.table import load, section
from servers.table import document
from support.mount import CHECKOUT

# Each in another dialect; the others take as long, and differ less.
QUICK = {"OpenSSH, gesftpserver", "ProFTPD mod_sftp", "rclone serve sftp"}


def marked() -> List[object]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in SERVERS]


@pytest.mark.parametrize("name", marked())
def test_a_server_and_a_mount_of_it_are_as_the_table_says(name: str, tmp_path: Path) -> None:
    with SERVERS[name](tmp_path) as server:
        found = findings(server, tmp_path)
    wrong = {what: said for what, said in found["mount"].items() if said.startswith(WRONG)}
    assert not wrong, f"reported done, and not so: {wrong}"
    if version(name) == load()["versions"][name]:  # another release may have learnt
        assert found == load()["servers"][name], "run contrib/interop --update"


def test_every_server_was_asked_everything() -> None:
    results = load()
    assert list(results["servers"]) == list(results["versions"]) == list(SERVERS)
    for found in results["servers"].values():
        assert list(found["server"]) == [*SERVER, "channels of one connection"]
        assert list(found["mount"]) == list(MOUNT)
        assert not any(said.startswith(WRONG) for said in found["mount"].values())


def test_the_document_shows_it() -> None:
    assert section(load()).strip() in document()
    assert document() == (CHECKOUT / "SERVERS.md").read_text(), "run contrib/interop --update"
