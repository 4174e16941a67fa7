"""contrib/quickstart does what it says, and leaves nothing behind however it ends (its packages are contrib/check's)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import List, Sequence

import pytest

from support.mount import fuse_mounts
from support.process import descendants, is_running, wait_until

DEMO = Path(__file__).resolve().parents[1] / "contrib" / "lib" / "demo.py"


# A signal that comes before the mount's process is in anybody's hands.
INTERRUPTED = """
import runpy, subprocess, sys

class Popen(subprocess.Popen):
    def __init__(self, command, *arguments, **keywords):
        super().__init__(command, *arguments, **keywords)
        if "sftpmount" in command:
            sys.exit(1)

subprocess.Popen = Popen
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def start(tmp_path: Path, *changes: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with (tmp_path / "out").open("wb") as out:
        return subprocess.Popen(
            [sys.executable, *changes, str(DEMO)],
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            env=environment,
        )


def everyone() -> List[str]:
    """The command lines of all processes."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            lines.append(path.read_bytes().decode(errors="replace"))
    return lines


def assert_nothing_left(tmp_path: Path, family: Sequence[int] = ()) -> None:
    """Nor of ``family``: sshd's sessions do not name the directory in their command lines."""
    out = (tmp_path / "out").read_text()
    assert not [pid for pid in family if is_running(pid)], out
    assert not [each for each in everyone() if str(tmp_path) in each], out
    assert [path for path, _ in fuse_mounts() if path.startswith(str(tmp_path))] == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_quickstart_shows_a_backup_and_the_same_bytes(tmp_path: Path) -> None:
    process = start(tmp_path)
    assert process.wait(timeout=100) == 0, (tmp_path / "out").read_text()
    text = (tmp_path / "out").read_text()
    assert "restored files are identical to the originals" in text
    assert "no errors were found" in text
    assert "MB/s" in text
    assert "ssh-ed25519 SHA256:" in text and "curve25519-sha256@libssh.org" in text  # what was negotiated
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("==> The mount", signal.SIGTERM),
        ("==> A restic repository", signal.SIGHUP),
        ("first backup: ", signal.SIGINT),
    ],
)
def test_interrupted_quickstart_leaves_nothing(tmp_path: Path, moment: str, number: signal.Signals) -> None:
    process = start(tmp_path)
    out = tmp_path / "out"
    wait_until(lambda: moment in out.read_text() or process.poll() is not None, 60, moment)
    family = descendants(process.pid)
    assert family, out.read_text()
    process.send_signal(number)
    assert process.wait(timeout=30) == (130 if number == signal.SIGINT else 1)
    assert_nothing_left(tmp_path, family)


def test_interrupted_while_a_process_is_started(tmp_path: Path) -> None:
    process = start(tmp_path, "-c", INTERRUPTED)
    assert process.wait(timeout=60) == 1, (tmp_path / "out").read_text()
    assert "==> The mount" in (tmp_path / "out").read_text()
    assert_nothing_left(tmp_path)
