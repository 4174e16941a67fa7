"""What each outcome of an FSYNC means for the bytes that it was to commit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, List, Optional

import pytest

from sftpmount.cache.blocks import CleanBlocks, FileCache
from sftpmount.cache.fsync import Fsync
from sftpmount.errors import ConnectionLost, NotSent, ProtocolViolation, StatusError
from sftpmount.sftp import wire
from sftpmount.sftp.lane import Pending

OK = bytes(4)
FAILURE = (4).to_bytes(4, "big") + wire.string(b"Input/output error") + wire.string(b"")


class Session:
    """What an Fsync sees of a session."""

    def __init__(self) -> None:
        self.lost: Optional[ConnectionLost] = None

    def abort(self, error: ConnectionLost) -> None:
        self.lost = error


class Case:
    """A file with three bytes that the server has acknowledged, and an FSYNC of them."""

    def __init__(self) -> None:
        self.session: Any = Session()
        self.accounted: List[FileCache] = []
        self.handle: Any = SimpleNamespace(owed=None)
        file = self.file = FileCache(1, 0, CleanBlocks(1024))
        with file.lock:
            file.handles.append(self.handle)
            file.writers.append(object())
            file.store(0, b"abc")
            request = file.take_request(3)
            assert request is not None and request[0] == 0
            file.left(0, 3)
            file.acknowledged(0, 3, durable=False)
            self.fsync = Fsync(self.session, file, self.accounted.append)

    def answer(self, kind: int, body: bytes, error: Optional[ConnectionLost] = None) -> None:
        """Its reply arrives, and it is over for the file."""
        pending = Pending(callback=self.fsync.done, asked=wire.EXTENDED)
        pending.complete(kind, body, error)
        assert self.accounted == [self.file] and not self.file.commits

    @property
    def dirty(self) -> bool:
        """They are to be sent again; where False, they wait for an FSYNC."""
        assert bool(self.file.dirty) != bool(self.file.written)
        return bool(self.file.dirty)


@pytest.fixture
def case() -> Case:
    return Case()


def test_stored(case: Case) -> None:
    case.answer(wire.STATUS, OK)
    case.fsync.wait()
    assert not case.file.unsafe and case.session.lost is None


def test_refused_while_nobody_waits(case: Case) -> None:
    """It was sent behind a close: the next one who asks is told, and the bytes go once more."""
    case.answer(wire.STATUS, FAILURE)
    assert case.dirty and isinstance(case.file.failure, StatusError)
    assert case.handle.owed is case.file.failure and case.session.lost is None
    with pytest.raises(StatusError):
        case.fsync.wait()


def test_a_reply_that_makes_no_sense_ends_the_session(case: Case) -> None:
    case.answer(wire.HANDLE, wire.string(b"h"))
    assert case.dirty and case.file.failure is None
    assert isinstance(case.session.lost, ProtocolViolation)
    with pytest.raises(ProtocolViolation):
        case.fsync.wait()


def test_the_connection_is_lost(case: Case) -> None:
    case.answer(0, b"", ConnectionLost("reset"))
    assert case.dirty and case.file.failure is None
    with pytest.raises(ConnectionLost):
        case.fsync.wait()


def test_a_success_behind_the_end_of_its_session_is_none(case: Case) -> None:
    """The bytes may have been sent anew since, and what it answers for is not known."""
    case.session.lost = ConnectionLost("another lane ended")
    case.answer(wire.STATUS, OK)
    assert case.dirty
    with pytest.raises(ConnectionLost):
        case.fsync.wait()


def test_it_was_never_sent(case: Case) -> None:
    case.answer(0, b"", NotSent("no room"))
    assert not case.dirty and case.session.lost is None
    with pytest.raises(NotSent):
        case.fsync.wait()


def test_sending_fails(case: Case) -> None:
    with pytest.raises(ConnectionLost):
        with case.fsync.about_to_leave():
            raise ConnectionLost("the writer has no handle")
    assert not case.dirty and not case.file.commits and case.accounted == [case.file]


def test_the_first_outcome_counts(case: Case) -> None:
    """Sending fails where the end of the lane has been told already."""
    case.answer(wire.STATUS, OK)
    with pytest.raises(ConnectionLost):
        with case.fsync.about_to_leave():
            raise ConnectionLost("sending failed")
    assert not case.file.unsafe and case.accounted == [case.file]
