"""SERVERS.md says what the tests show."""

from __future__ import annotations

from servers.cases import ACCEPTED, REFUSED
from servers.table import document
from support.mount import CHECKOUT

WRITTEN = CHECKOUT / "SERVERS.md"


def test_it_is_what_the_data_gives() -> None:
    assert WRITTEN.read_text() == document(), "run contrib/servers-table > SERVERS.md"


def test_it_has_a_line_for_every_case() -> None:
    matrices = WRITTEN.read_text().partition("\n## Beside")[0]
    lines = [line for line in matrices.splitlines() if line.startswith("| ")]
    heads = [line for line in lines if line.startswith("| ---")]
    refused = [case for cases in REFUSED.values() for case in cases]
    assert len(lines) - 2 * len(heads) == len(ACCEPTED) + len(refused)
    assert len({*ACCEPTED, *refused}) == len(ACCEPTED) + len(refused)
