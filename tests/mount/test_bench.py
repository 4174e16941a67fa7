"""The benchmark runs, compares bytes and tells ratios; its figures are not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest

from support.mount import CHECKOUT
from support.sshd import Sshd


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CHECKOUT / "contrib"))


def speed(tmp_path: Path, *options: object) -> Tuple[List[Dict[str, Any]], str]:
    """(its results, its standard output) of a run that succeeds."""
    command = [sys.executable, CHECKOUT / "contrib" / "bench" / "speed", "--work-dir", tmp_path]
    command += ["--json", tmp_path / "figures.json", *options]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    entries: List[Dict[str, Any]] = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert [entry["error"] for entry in entries] == [None] * len(entries), result.stdout
    return entries, result.stdout


def test_every_workload_in_small(tmp_path: Path) -> None:
    """With sshfs, which starts in no time; that programs work on sftpmount is shown elsewhere."""
    from bench.workloads import WORKLOADS

    entries, _ = speed(tmp_path, "--scale", "0.005", "--rounds", "1", "--peers", "sshfs,restic-sftp")
    expected = [(name, peer) for name, each in WORKLOADS.items() for peer in ("sshfs", *each.beside)]
    assert [(entry["workload"], entry["peer"]) for entry in entries] == expected
    assert all(entry["median_s"] > 0 for entry in entries)


def test_two_mounts_two_rounds_and_a_plot(tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    entries, output = speed(tmp_path, "--mib", 4, "--rounds", 2, "--only", "write", "--plot", plot)
    assert [entry["peer"] for entry in entries] == ["sftpmount", "sshfs"]
    for entry in entries:
        assert len(entry["seconds"]) == 2
        assert entry["min_s"] <= entry["median_s"] <= entry["max_s"]
        assert entry["ratio_min"] <= entry["ratio_max"]
        assert entry["peak_mib"] > 1.0
    assert "sshfs" in output
    drawn = xml.etree.ElementTree.parse(plot).getroot()
    assert len(drawn.findall("{http://www.w3.org/2000/svg}circle")) == 1


def test_a_users_own_server(sshd: Sshd, tmp_path: Path) -> None:
    """Options come as ssh_config knows them, and nothing is left there."""
    directory = tmp_path / "theirs"
    directory.mkdir()
    options = [f"Port={sshd.port}", f"IdentityFile={sshd.user_key}", f"UserKnownHostsFile={sshd.known_hosts}"]
    words = [word for option in options for word in ("-o", option)]
    words += ["--only", "find", "--scale", "0.02", "--rounds", "1", "--peers", "sshfs,rclone"]
    entries, _ = speed(tmp_path, "--server", f"{sshd.user}@127.0.0.1:{directory}", *words)
    assert [entry["peer"] for entry in entries] == ["sshfs", "rclone"]
    assert list(directory.iterdir()) == []


def test_medians_ratios_line_and_round_trips() -> None:
    from bench.peers import Line
    from bench.report import Case, Failure, growth, summary, table
    from bench.run import Figures, Sizes

    def figures(*seconds: float) -> List[Figures]:
        return [Figures(each, each / 2, 2**20) for each in seconds]

    rounds = {
        Case("write"): {"sftpmount": figures(2.0, 1.0, 4.0), "sshfs": figures(4.0, 6.0, 2.0)},
        Case("write", 4.0): {"sftpmount": figures(8.0), "sshfs": [Failure("lost")]},
        Case("looks"): {"sftpmount": figures(1.6)},
    }
    entries = summary(rounds, Sizes(bulk_bytes=25_000_000), Line(40.0, 100e6))
    write, theirs, larger, lost, looks = entries
    assert (write["median_s"], write["of_line"], write["cpu_s"], write["peak_mib"]) == (2.0, 1.0, 1.0, 1.0)
    assert (theirs["ratio"], theirs["ratio_min"], theirs["ratio_max"]) == (2.0, 0.5, 6.0)
    assert (larger["of_line"], lost["median_s"], lost["failed"]) == (1.0, None, 1)
    assert looks["round_trips"] == 2.0
    assert "write x4        sshfs       lost" in table(entries)
    assert "     4 x:    4.00     1" in growth(entries)


@pytest.mark.parametrize("change", ["shorter", "longer", "other", "missing", "more"])
def test_a_tree_that_differs_is_an_error(tmp_path: Path, change: str) -> None:
    from bench.data import WrongBytes, make_tree, store
    from bench.run import same

    make_tree(tmp_path / "one", 20)
    store(tmp_path / "one", tmp_path / "two")
    same(tmp_path / "one", tmp_path / "two")
    path = tmp_path / "two" / "dir-003" / "file-00013"
    data = path.read_bytes()
    changed = {"shorter": data[:-1], "longer": data + b"x", "other": data[:99] + b"#" + data[100:]}
    if change == "missing":
        path.unlink()
    elif change == "more":
        path.with_name("more").touch()
    else:
        path.write_bytes(changed[change])
    with pytest.raises(WrongBytes):
        same(tmp_path / "one", tmp_path / "two")


def test_wrong_bytes_are_an_error(tmp_path: Path) -> None:
    from bench.data import Data, WrongBytes

    data, path = Data(3_000_000, 70_000), tmp_path / "file"
    data.write(path)
    data.check(path)
    written = path.read_bytes()
    assert data.at(140_000, 5000) == written[140_000:145_000]
    for wrong in (written[:-1], written + b"x", written[:99] + b"#" + written[100:]):
        path.write_bytes(wrong)
        with pytest.raises(WrongBytes):
            data.check(path)
