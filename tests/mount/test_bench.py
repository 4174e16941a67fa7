"""The benchmark runs, compares bytes and tells ratios; its figures are not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.mount import CHECKOUT


def test_throughput_in_small(tmp_path: Path) -> None:
    command = [sys.executable, CHECKOUT / "contrib" / "bench" / "throughput", "--mib", "4", "--rounds", "2"]
    command += ["--work-dir", tmp_path, "--json", tmp_path / "figures.json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    entries = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert [(entry["workload"], entry["peer"]) for entry in entries] == [
        ("write", "sftpmount"),
        ("write", "sshfs"),
        ("read", "sftpmount"),
        ("read", "sshfs"),
    ]
    for entry in entries:
        assert len(entry["seconds"]) == 2
        assert entry["min_s"] <= entry["median_s"] <= entry["max_s"]
        assert entry["ratio_min"] <= entry["ratio"] <= entry["ratio_max"] or entry["peer"] == "sftpmount"
    assert "sshfs" in result.stdout


def test_wrong_bytes_are_an_error(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path[:0] = [{str(CHECKOUT / "contrib")!r}, {str(CHECKOUT / "tests")!r}]
from pathlib import Path
from bench.data import Data, WrongBytes
data, path = Data(3_000_000, 70_000), Path(sys.argv[1])
data.write(path)
data.check(path)
for change in (lambda all: all[:-1], lambda all: all + b"x", lambda all: all[:99] + b"#" + all[100:]):
    data.write(path)
    path.write_bytes(change(path.read_bytes()))
    try:
        data.check(path)
    except WrongBytes:
        continue
    raise SystemExit("not noticed")
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "file"], check=True)
