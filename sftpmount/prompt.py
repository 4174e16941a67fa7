"""Asking a person for a secret: at the terminal, or through SSH_ASKPASS where there is none."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
from typing import Mapping

from .daemon import interruptible
from .errors import AuthenticationError
from .logs import printable


class Prompt:
    """The person who started the command. Everything shown is escaped: questions and notices may come from the server."""

    def __init__(self, environment: Mapping[str, str], *, batch_mode: bool) -> None:
        self._environment = environment
        self._batch_mode = batch_mode

    def secret(self, text: str) -> str:
        """The answer to ``text``, or AuthenticationError where nobody can be asked."""
        question = printable(text.strip())
        if self._batch_mode:
            raise AuthenticationError(
                f"BatchMode=yes forbids to ask {question!r}: use a key that an agent holds."
            )
        return self._ask(question)

    def notice(self, text: str) -> None:
        """Say ``text`` (one line or several) to the person."""
        for line in text.splitlines():
            print(f"sftpmount: {printable(line)}", file=sys.stderr, flush=True)

    def _ask(self, question: str) -> str:
        # ssh(1): SSH_ASKPASS_REQUIRE is "never", "prefer" or "force"; without it the program is for want of a terminal.
        program = self._environment.get("SSH_ASKPASS", "")
        require = self._environment.get("SSH_ASKPASS_REQUIRE", "")
        has_terminal = require != "force" and _has_terminal()
        if has_terminal and not (program and require == "prefer"):
            try:
                with interruptible():
                    return getpass.getpass(question + " ")
            except (
                EOFError,
                UnicodeDecodeError,
            ):  # the answer, or a byte of it, is in the message of the latter
                raise AuthenticationError(f"{question!r} was not answered: mount again.") from None
        if program and require != "never":
            return _askpass(program, question)
        raise AuthenticationError(
            f"there is no terminal to ask {question!r} at: use a key that an agent holds, password_stdin, or SSH_ASKPASS."
        )


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _askpass(program: str, question: str) -> str:
    try:
        run = subprocess.run([program, question], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    except OSError as error:
        raise AuthenticationError(
            f"SSH_ASKPASS={program!r} cannot be run ({error.strerror}): correct it."
        ) from None
    if run.returncode:
        raise AuthenticationError(f"{question!r} was not answered: mount again.")
    return os.fsdecode(run.stdout.split(b"\n", 1)[0].rstrip(b"\r"))
