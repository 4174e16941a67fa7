"""logs: where lines go, and that nothing a server sends can pass for one or move a cursor."""

from __future__ import annotations

import io
import logging
import os
import socket
import stat
from pathlib import Path
from typing import Iterator

import pytest

from sftpmount import logs
from sftpmount.errors import UsageError

log = logging.getLogger("sftpmount.test")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    root, paramiko = logging.getLogger(), logging.getLogger("paramiko")
    before = (list(root.handlers), root.level, paramiko.level, logging.raiseExceptions)
    root.handlers.clear()  # pytest's own: configure() closes what it finds
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    paramiko.setLevel(before[2])
    logging.raiseExceptions = before[3]
    logging.captureWarnings(False)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, ümläut 漢", "plain text, ümläut 漢"),
        ("\x1b[2Jgone\r\n", r"\x1b[2Jgone\r\n"),
        ("\udcff\u202e\x00\x7f\x9b", r"\udcff\u202e\x00\x7f\x9b"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert logs.printable(text) == shown


def test_lines_of_the_foreground_are_escaped_and_filtered_by_level() -> None:
    stream = io.StringIO()
    assert logs.configure("info", log_file=None, stream=stream) == []
    log.debug("not shown")
    log.warning("name %s", "a\nsftpmount: forged\x1b[31m")
    logging.getLogger("paramiko.transport").error("noise")
    assert stream.getvalue() == "sftpmount: name a\\nsftpmount: forged\\x1b[31m\n"


def test_tracebacks_are_escaped_line_by_line() -> None:
    stream = io.StringIO()
    logs.configure("debug", log_file=None, stream=stream)
    try:
        raise ValueError("evil\x1b[31m")
    except ValueError:
        log.exception("caught")
    text = stream.getvalue()
    assert "\x1b" not in text and "ValueError: evil\\x1b[31m" in text and text.count("\n") > 3
    assert " sftpmount.test: caught" in text and "MainThread" in text


def test_a_log_file_is_private_and_grows(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    path.chmod(0o644)
    logs.configure("info", log_file=str(path), stream=io.StringIO())
    log.info("one \udcff")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before, line = path.read_text().splitlines()
    assert before == "before" and line.endswith(f"{os.getpid()} INFO sftpmount.test: one \\udcff")


def test_a_log_file_that_logrotate_moved_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    logs.configure("info", log_file=str(path), stream=None)
    log.info("one")
    path.rename(tmp_path / "log.1")
    log.info("two")
    assert path.read_text().endswith("two\n") and (tmp_path / "log.1").read_text().endswith("one\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_log_files_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo", "absent/log", "."):
        with pytest.raises(UsageError, match=r"option log_file: .* cannot be written"):
            logs.configure("info", log_file=str(tmp_path / name), stream=None)
    assert not (tmp_path / "elsewhere").exists()


def test_syslog_gets_one_datagram_a_line(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        syslog.bind(str(tmp_path / "log"))
        syslog.settimeout(5.0)
        assert logs.configure("info", log_file=None, stream=None, syslog=str(tmp_path / "log")) == []
        log.error("lost %s", "a\nb")
        assert syslog.recv(1000) == f"<27>sftpmount[{os.getpid()}]: lost a\\nb\x00".encode()


def test_without_syslog_a_person_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (notice,) = logs.configure("info", log_file=None, stream=None, syslog=str(tmp_path / "absent"))
    assert "log_file=FILE" in notice
    log.error("nowhere")
    assert capsys.readouterr().err == ""


def test_the_journal_gets_the_priority_of_each_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "journal").open("w+") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        logs.configure("info", log_file=None, stream=stream)
        log.info("mounted")
        log.warning("two\nlines")
        try:
            raise ValueError("odd")
        except ValueError:
            log.exception("caught")
        lines = (tmp_path / "journal").read_text().splitlines()
    assert lines[:3] == ["<6>mounted", "<4>two\\nlines", "<3>caught"]
    assert all(line.startswith("<3>") for line in lines[2:]) and lines[-1] == "<3>ValueError: odd"


def test_another_stream_is_not_the_journal(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        assert not logs.is_journal(stream, {"JOURNAL_STREAM": "1:1"})
        assert not logs.is_journal(stream, {})
    assert not logs.is_journal(io.StringIO(), {"JOURNAL_STREAM": ""})
