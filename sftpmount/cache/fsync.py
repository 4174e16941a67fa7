"""One FSYNC on its way, and what its outcome means for the bytes of its file."""

from __future__ import annotations

import contextlib
import threading
from typing import Callable, Iterator, Optional

from .. import waiting
from ..errors import ConnectionLost, NotSent, StatusError
from ..sftp.lane import Pending
from ..sftp.session import Session
from .blocks import FileCache


class Fsync:
    """Begun before it is sent, by who holds ``file.lock``: it commits what had left by its lane then, or was answered.

    account  called with the file, whose lock is held, when it may hold less, or more
    """

    def __init__(self, session: Session, file: FileCache, account: Callable[[FileCache], None]) -> None:
        self._session = session
        self._file = file
        self._account = account
        self._commit = file.begin_commit()
        self._ended = threading.Event()
        self._error: Optional[Exception] = None

    @contextlib.contextmanager
    def about_to_leave(self) -> Iterator[None]:
        """Within, it is sent; where that fails, nothing has changed for the bytes."""
        try:
            yield
        except BaseException:
            self._end(ok=False, was_sent=False)
            raise

    def done(self, pending: Pending) -> None:
        """Its reply, in the thread that reads."""
        try:
            pending.expect_ok()
        except StatusError as error:
            self._error = error
        except ConnectionLost as error:
            self._error = error
            if not isinstance(error, NotSent):
                self._session.abort(error)  # which it is not yet where the reply makes no sense
        self._error = self._error or self._session.lost
        self._end(ok=self._error is None, was_sent=not isinstance(self._error, NotSent))

    def _end(self, *, ok: bool, was_sent: bool) -> None:
        """Take the outcome in, the first that comes. After a failed fsync nothing is known of the bytes: they are dirty again."""
        with self._file.lock:
            if self._ended.is_set():
                return
            self._file.end_commit(self._commit, ok=ok)
            if not ok and was_sent:
                self._file.resend()
                if isinstance(self._error, StatusError):
                    self._file.refused(self._error)
            self._account(self._file)
            self._ended.set()

    def wait(self) -> None:
        """Raise what it ended with. Raises FsError (EINTR)."""
        if not self._ended.is_set():
            waiting.step_aside()
        while not self._ended.wait(waiting.POLL_S):
            waiting.check()
        if self._error is not None:
            raise self._error
