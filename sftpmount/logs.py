"""Where the log goes: stderr in the foreground, else syslog or a file of the user's own.

What a server sends (names, banners, error texts) reaches the log and the terminal only through ``printable``.
"""

from __future__ import annotations

import io
import logging
import logging.handlers
import os
import stat
from typing import List, Mapping, Optional, TextIO

from .errors import UsageError

SYSLOG_SOCKET = "/dev/log"
# syslog(3)
_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


def printable(text: str) -> str:
    """``text`` with everything a terminal or a log could take for more than a letter as an escape (\\n, \\x1b, \\udce9)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class _Formatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:
        return "\n".join(printable(line) for line in super().formatException(ei).splitlines())  # type: ignore[arg-type]


class _JournalFormatter(_Formatter):
    """Each line begins with its priority, as sd-daemon(3) has it; the journal has times and names of its own."""

    def format(self, record: logging.LogRecord) -> str:
        priority = _PRIORITIES.get(record.levelno, _PRIORITIES[logging.INFO])
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


class _PrivateFile(logging.handlers.WatchedFileHandler):
    """A log file of mode 0600, opened anew when logrotate has moved it away."""

    def _open(self) -> io.TextIOWrapper:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(self.baseFilename, flags, 0o600)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            os.close(descriptor)
            raise PermissionError("not a file of yours")
        os.fchmod(descriptor, 0o600)
        return io.TextIOWrapper(io.FileIO(descriptor, "w"), "utf-8", "backslashreplace", write_through=True)


def configure(
    level: str, *, log_file: Optional[str], stream: Optional[TextIO], syslog: str = SYSLOG_SOCKET
) -> List[str]:
    """Send the log of this process to ``log_file``, else to ``stream``, else to syslog; ``level`` as in --help.

    Returns what a person should know about it. UsageError where the file cannot be written.
    """
    notices: List[str] = []
    handler: logging.Handler
    if log_file is not None:
        try:
            handler = _PrivateFile(log_file, encoding="utf-8")
        except OSError as error:
            reason = error.strerror or error.args[0]
            raise UsageError(
                f"option log_file: {log_file!r} cannot be written ({reason}): name another file."
            ) from None
        handler.setFormatter(_Formatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"))
    elif stream is not None and is_journal(stream, os.environ):
        handler = logging.StreamHandler(stream)
        handler.setFormatter(_JournalFormatter("%(message)s"))
    elif stream is not None:
        handler = logging.StreamHandler(stream)
        verbose = "%(asctime)s %(threadName)s %(levelname)s %(name)s: %(message)s"
        handler.setFormatter(_Formatter(verbose if level == "debug" else "sftpmount: %(message)s"))
    elif _is_socket(syslog):
        handler = logging.handlers.SysLogHandler(syslog, logging.handlers.SysLogHandler.LOG_DAEMON)
        handler.ident = f"sftpmount[{os.getpid()}]: "
        handler.setFormatter(_Formatter("%(message)s"))
    else:
        handler = logging.NullHandler()
        notices.append("there is no syslog here, so nothing is logged: write -o log_file=FILE to keep a log.")
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(level.upper())
    # What paramiko would say of a failed connection is said better, and once, by the exception that comes of it.
    logging.getLogger("paramiko").setLevel(logging.DEBUG if level == "debug" else logging.CRITICAL)
    logging.captureWarnings(True)
    logging.raiseExceptions = (
        level == "debug"
    )  # a log that cannot be written is no reason to write on the terminal
    return notices


def is_journal(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether ``stream`` goes to systemd's journal, as systemd.exec(5) says of $JOURNAL_STREAM."""
    told = environment.get("JOURNAL_STREAM", "")
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return told == f"{status.st_dev}:{status.st_ino}"


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return False
