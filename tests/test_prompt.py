"""prompt: whom secrets are asked of."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Dict, Iterator

import pytest

from sftpmount import prompt
from sftpmount.errors import AuthenticationError
from sftpmount.prompt import Prompt


@pytest.fixture
def askpass(tmp_path: Path) -> str:
    program = tmp_path / "askpass"
    program.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/question\necho geheim\necho more\n')
    program.chmod(0o755)
    return str(program)


@pytest.fixture
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "_has_terminal", lambda: False)


def ask(environment: Dict[str, str], text: str = "Password: ") -> str:
    return Prompt(environment, batch_mode=False).secret(text)


@pytest.mark.usefixtures("no_terminal")
def test_askpass_is_run_where_there_is_no_terminal(askpass: str, tmp_path: Path) -> None:
    assert ask({"SSH_ASKPASS": askpass}, "\x1b[2Jbob's password: ") == "geheim"
    assert (tmp_path / "question").read_text() == "\\x1b[2Jbob's password:\n"


@pytest.mark.usefixtures("no_terminal")
def test_nobody_to_ask(askpass: str, tmp_path: Path) -> None:
    for environment in ({}, {"SSH_ASKPASS": askpass, "SSH_ASKPASS_REQUIRE": "never"}):
        with pytest.raises(AuthenticationError, match="there is no terminal to ask 'Password:' at"):
            ask(environment)
    with pytest.raises(AuthenticationError, match="cannot be run"):
        ask({"SSH_ASKPASS": str(tmp_path / "absent")})
    with pytest.raises(AuthenticationError, match="was not answered"):
        ask({"SSH_ASKPASS": "/bin/false"})


def test_askpass_can_be_preferred_to_a_terminal(askpass: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt, "_has_terminal", lambda: True)
    assert ask({"SSH_ASKPASS": askpass, "SSH_ASKPASS_REQUIRE": "prefer"}) == "geheim"
    assert ask({"SSH_ASKPASS": askpass, "SSH_ASKPASS_REQUIRE": "force"}) == "geheim"


def test_batch_mode_never_asks(askpass: str) -> None:
    with pytest.raises(AuthenticationError, match="BatchMode=yes forbids to ask"):
        Prompt({"SSH_ASKPASS": askpass, "SSH_ASKPASS_REQUIRE": "force"}, batch_mode=True).secret("Password: ")


def test_notices_are_escaped_and_keep_their_lines(capsys: pytest.CaptureFixture[str]) -> None:
    Prompt({}, batch_mode=False).notice("Welcome\nto \x1b[31mred")
    assert capsys.readouterr().err == "sftpmount: Welcome\nsftpmount: to \\x1b[31mred\n"


class Terminal:
    """A process that asks for a password at a terminal of its own. A byte to ``elsewhere`` makes that signal come to another
    thread than the one that reads, which shows what it does in the moment before the read as well: nothing ends that."""

    def __init__(self) -> None:
        code = (
            "import fcntl, os, signal, sys, termios, threading; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
            "def elsewhere(): signal.raise_signal(os.read(int(sys.argv[1]), 1)[0])\n"
            "threading.Thread(target=elsewhere, daemon=True).start()\n"
            "from sftpmount.prompt import Prompt; print(repr(Prompt({}, batch_mode=False).secret('Password: ')))"
        )
        self.controller, self.terminal = pty.openpty()
        reader, self.elsewhere = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(reader)],
            stdin=self.terminal,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            pass_fds=[reader],
            cwd=Path(__file__).parents[1],
        )
        os.close(reader)
        self.seen = b""
        while not self.seen.endswith(b"Password: "):
            self.seen += os.read(self.controller, 100)

    @property
    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self.terminal)[3] & termios.ECHO)

    def close(self) -> None:
        self.process.communicate(timeout=20)
        for each in (self.terminal, self.controller, self.elsewhere):
            os.close(each)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    each = Terminal()
    yield each
    each.process.kill()
    each.close()


def test_a_terminal_is_asked_without_echo(terminal: Terminal) -> None:
    assert not terminal.echoes
    os.write(terminal.controller, b"geheim\n")
    answer, errors = terminal.process.communicate(timeout=20)
    assert answer == b"'geheim'\n", errors
    assert b"geheim" not in terminal.seen + os.read(terminal.controller, 100)


def test_an_answer_that_the_locale_cannot_read_is_none_and_not_shown(terminal: Terminal) -> None:
    os.write(terminal.controller, b"gehe\xffim\n")
    answer, errors = terminal.process.communicate(timeout=20)
    if answer:  # a locale that takes every byte
        assert answer == b"'gehe\\udcffim'\n"
    else:
        assert b"AuthenticationError: 'Password:' was not answered" in errors
    assert b"0xff" not in errors


@pytest.mark.parametrize("is_reading", [True, False])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_at_the_prompt_gives_the_terminal_its_echo_back(
    number: signal.Signals, is_reading: bool, terminal: Terminal
) -> None:
    if is_reading:
        os.kill(terminal.process.pid, number)
    else:
        os.write(terminal.elsewhere, bytes([number]))
    _, errors = terminal.process.communicate(timeout=20)
    assert b"KeyboardInterrupt" in errors
    assert terminal.echoes
