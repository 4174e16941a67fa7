"""contrib/bench/faults tells storing from losing: its verdicts one by one, its comparison of bytes, and a real run in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import pytest

from support.mount import CHECKOUT


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CHECKOUT / "contrib"))


def run_faults(tmp_path: Path, *options: str) -> Tuple[int, Dict[Tuple[str, str], str], str]:
    """(exit status, verdicts, standard output) of the command."""
    command: List[object] = [
        sys.executable,
        CHECKOUT / "contrib" / "bench" / "faults",
        "--work-dir",
        tmp_path,
    ]
    command += ["--json", tmp_path / "cells.json", *options]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=100)
    assert "Traceback" not in result.stderr, result.stderr
    cells: List[Dict[str, Any]] = json.loads((tmp_path / "cells.json").read_text())
    return (
        result.returncode,
        {(cell["fault"], cell["peer"]): cell["verdict"] for cell in cells},
        result.stdout,
    )


def test_a_peer_that_loses_and_two_that_do_not(tmp_path: Path) -> None:
    """The last line of a backup unmounts: rclone is known to drop what it has not sent by then."""
    status, verdicts, output = run_faults(tmp_path, "--only", "unmount-at-once")
    assert verdicts == {
        ("unmount-at-once", "sshfs"): "goes on",
        ("unmount-at-once", "rclone"): "SILENT LOSS",
        ("unmount-at-once", "sftpmount"): "goes on",
    }
    assert status == 0, "the losses of others are not ours"
    assert "unmount-at-once, rclone: SILENT LOSS. The program was told that all is well" in output


def test_a_full_disk_may_be_loud(tmp_path: Path) -> None:
    status, verdicts, output = run_faults(tmp_path, "--only", "disk-full", "--peers", "sftpmount")
    assert (status, verdicts) == (0, {("disk-full", "sftpmount"): "loud"})
    assert "No space left on device" in output


def test_a_reset_in_a_write_is_no_event(tmp_path: Path) -> None:
    status, verdicts, _ = run_faults(tmp_path, "--only", "write-reset", "--peers", "sftpmount")
    assert (status, verdicts) == (0, {("write-reset", "sftpmount"): "goes on"})


@pytest.mark.parametrize(
    "told, lacking, late, word",
    [
        (None, None, "", "goes on"),
        (None, None, "5 s", "late"),
        (None, "half", "", "SILENT LOSS"),
        (None, "half", "5 s", "SILENT LOSS"),
        ("EIO", None, "", "loud"),
        ("EIO", "half", "", "loud"),
    ],
)
def test_outcome(told: Optional[str], lacking: Optional[str], late: str, word: str) -> None:
    from bench.verdicts import outcome

    assert outcome(told, lacking, late).verdict.value == word


@pytest.mark.parametrize(
    "fault, excused", [("write-reset", ()), ("disk-full", ("loud",)), ("outage", ("loud",))]
)
def test_what_is_right_for_sftpmount(fault: str, excused: Tuple[str, ...]) -> None:
    from bench.verdicts import Cell, Outcome, Verdict, ours_are_right

    for verdict in Verdict:
        ours = Cell(fault, "sftpmount", Outcome(verdict), 1.0)
        theirs = Cell(fault, "sshfs", Outcome(verdict), 1.0)
        assert ours_are_right([ours]) == (verdict.value in ("goes on", *excused))
        assert ours_are_right([theirs])


def test_table_counts_per_peer() -> None:
    from bench.verdicts import Cell, Outcome, Verdict, table

    cells = [
        Cell("one", "sshfs", Outcome(Verdict.LOUD, "cp said so"), 1.0),
        Cell("one", "sftpmount", Outcome(Verdict.GOES_ON), 1.0),
        Cell("two", "sshfs", Outcome(Verdict.LOUD, "dd said so"), 1.0),
        Cell("two", "sftpmount", Outcome(Verdict.GOES_ON), 1.0),
    ]
    lines = [line.split() for line in table(cells).splitlines()]
    assert ["fault", "sshfs", "sftpmount"] in lines
    assert ["one", "loud", "goes", "on"] in lines
    assert ["goes", "on", "0", "2"] in lines
    assert ["loud", "2", "0"] in lines
    assert "two, sshfs: loud. dd said so." in table(cells)
    assert "SILENT" not in table(cells)


def test_difference(tmp_path: Path) -> None:
    from bench.data import difference

    source, served = tmp_path / "source", tmp_path / "served"
    source.write_bytes(b"a" * 5000 + b"b" * 5000)
    assert difference(source, served) == "no such file"
    served.write_bytes(source.read_bytes())
    assert difference(source, served) is None
    served.write_bytes(source.read_bytes()[:-1])
    assert difference(source, served) == "9999 of 10000 bytes, right up to 9999"
    served.write_bytes(source.read_bytes() + b"x")
    assert difference(source, served) == "10001 of 10000 bytes, right up to 10000"
    served.write_bytes(b"a" * 5000 + b"#" + b"b" * 4999)
    assert difference(source, served) == "10000 of 10000 bytes, right up to 4096"


def test_difference_of_trees(tmp_path: Path) -> None:
    from bench.data import difference

    source, served = tmp_path / "source", tmp_path / "served"
    for tree in (source, served):
        (tree / "directory").mkdir(parents=True)
        (tree / "directory" / "file").write_bytes(b"the same")
    assert difference(source, served) is None
    (served / "left-over").write_bytes(b"")
    assert difference(source, served) == "left-over should not be there"
    (served / "directory" / "file").unlink()
    assert difference(source, served) == "1 of 1 files are missing or wrong"
