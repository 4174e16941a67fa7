"""contrib/bench/doors: the repository shows every case of it, and the command tells a door that opens from one that does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict

from servers.cases import ACCEPTED, REFUSED
from servers.door_table import (
    BEGIN,
    COLUMNS,
    DOORS,
    END,
    OURS,
    RCLONE,
    Verdict,
    load,
    readme_with,
    section,
    text,
)
from support.mount import CHECKOUT

README = (CHECKOUT / "README.md").read_text()


def test_every_case_was_looked_at_by_every_peer() -> None:
    cases = {*ACCEPTED, *(case for cases in REFUSED.values() for case in cases)}
    assert {door.case for door in DOORS} == cases
    rows = load()["rows"]
    assert list(rows) == [door.name for door in DOORS], "run contrib/bench/doors --update"
    verdicts = {verdict.value for verdict in Verdict}
    for row in rows.values():
        assert list(row) == list(COLUMNS)
        assert {did["verdict"] for did in row.values()} <= verdicts


def test_every_case_has_a_row_in_the_document() -> None:
    shown = section(load())
    for door in DOORS:
        assert shown.count(f"\n| {door.name} |") == 1


def test_readme_shows_what_was_seen() -> None:
    assert README.count(BEGIN) == README.count(END) == 1
    assert readme_with(README, load()) == README, "run contrib/bench/doors --update"


def test_in_the_readme_stands_where_they_part() -> None:
    def row(theirs: Verdict) -> Dict[str, Dict[str, str]]:
        return {
            peer: {"verdict": "refuses" if peer == OURS else theirs.value, "said": ""} for peer in COLUMNS
        }

    doors = DOORS[-2:]
    rows = {doors[0].name: row(Verdict.MOUNTS), doors[1].name: row(Verdict.REFUSES)}
    results = {"versions": load()["versions"], "rows": rows}
    shown = readme_with(f"before{BEGIN}old{END}after", results)
    assert shown.startswith(f"before{BEGIN}\n") and shown.endswith(f"{END}after") and "old" not in shown
    assert f"| {doors[0].name} | refuses | mounts | mounts | mounts |" in shown
    assert f"| {doors[1].name} |" not in shown and f"| {doors[1].name} |" in text(results)
    assert "(2) | refuses: 2 | mounts: 1; refuses: 1 |" in shown


def test_a_guide_and_an_unknown_host(tmp_path: Path) -> None:
    command = [sys.executable, CHECKOUT / "contrib" / "bench" / "doors", "--json", tmp_path / "doors.json"]
    command += ["--work-dir", tmp_path, "--only", "Guide: dev-sec", "--only", "Host key: unknown"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    rows: Dict[str, Any] = json.loads((tmp_path / "doors.json").read_text())["rows"]
    assert [did["verdict"] for did in rows["Guide: dev-sec"].values()] == ["mounts"] * 4
    assert [did["verdict"] for did in rows["Host key: unknown"].values()] == ["refuses"] * 3 + ["mounts"]
    assert "is unknown: ssh-ed25519" in rows["Host key: unknown"][OURS]["said"]
    assert "key is unknown" in rows["Host key: unknown"][RCLONE]["said"]
