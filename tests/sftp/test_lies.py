"""The lies of ``lies.LIES`` to the codec and to a session: a value, an error of the server's, or its end; never anything else."""

from __future__ import annotations

import struct
import threading
import tracemalloc
from typing import Any, Callable, Dict, List

import pytest

from sftp import lies
from sftp.fake_server import FakeServer
from sftp.lies import LIES, Lie
from sftpmount.errors import ConnectionLost, ProtocolViolation, RemoteDirectoryError, StatusError
from sftpmount.sftp import wire
from sftpmount.sftp.lane import Pending
from sftpmount.sftp.session import Session

DEADLINE_S = 0.3  # of a request
WAIT_S = 20.0
CONTENT = bytes(range(256)) * 40

# Request -> an honest reply, and what reads it.
HONEST: Dict[str, Any] = {
    **dict.fromkeys(lies.LOOKS, (lies.ATTRS, lies.attrs(), wire.parse_attrs)),
    **dict.fromkeys(lies.OPENS, (lies.HANDLE, lies.string(b"1234"), wire.parse_handle)),
    **dict.fromkeys(lies.CHANGES, (lies.STATUS, bytes(12), wire.parse_status)),
    "READ": (lies.DATA, lies.string(CONTENT), bytes),
    "READDIR": (lies.NAME, struct.pack(">I", 1) + lies.string(b"file") * 2 + lies.attrs(), wire.parse_names),
    "READLINK": (*lies.one_name(b"file"), wire.parse_names),
    "INIT": (2, lies.string(b"fsync@openssh.com") + lies.string(b"1"), wire.parse_extensions),
    "limits": (lies.EXTENDED_REPLY, struct.pack(">4Q", 262144, 261120, 261120, 0), wire.parse_limits),
    "statvfs": (lies.EXTENDED_REPLY, struct.pack(">11Q", *[4096] * 11), wire.parse_statvfs),
}
with_a_lie = pytest.mark.parametrize("lie", LIES.values(), ids=LIES)


@with_a_lie
def test_codec(lie: Lie) -> None:
    for request in lie.requests:
        kind, body, parse = HONEST[request]
        tracemalloc.start()
        stream = lie.twist(lies.packet(kind, 7, body))
        steps = (1 << 20, 1009, 1 if len(stream) < 2000 else 3001)
        ends = [end_at_the_codec(stream, kind, parse, step) for step in steps]
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        wanted = lie.end if lie.end in ("frame", "body") else None
        assert wanted is None or ends == [wanted] * 3, request
        assert wanted is not None or not {"frame", "body"} & set(ends) or lie.end == "start", (request, ends)
        assert peak_bytes < 8 << 20


def end_at_the_codec(stream: bytes, kind: int, parse: Callable[[bytes], Any], step: int) -> str:
    """ "frame" or "body", where the codec refuses one; "" where it has values for all of it. Other exceptions pass through."""
    reader = wire.ReplyReader()
    try:
        replies = [each for at in range(0, len(stream), step) for each in reader.feed(stream[at : at + step])]
    except wire.WireError:
        return "frame"
    try:
        for reply in replies:
            if reply.kind in (kind, lies.STATUS):
                (parse if reply.kind == kind else wire.parse_status)(reply.body)
    except wire.WireError:
        return "body"
    return ""


class Talk:
    """One session, and every kind of request on it."""

    def __init__(self, server: FakeServer, lie: Lie) -> None:
        self.values: List[Any] = []
        self.errors: List[Exception] = []
        self.session = Session(
            server.dial(),
            lanes=1,
            alive_interval_s=0.4,
            alive_count_max=50,
            request_deadline_s=DEADLINE_S if lie.end in ("deadline", "start") else WAIT_S,
            on_lost=lambda session: None,
        )

    def ask(self, decode: Callable[[Pending], Any], kind: int, *fields: bytes) -> Any:
        try:
            self.values.append(decode(self.session.meta.request(kind, b"".join(fields)).wait()))
            return self.values[-1]
        except (StatusError, ConnectionLost) as error:
            self.errors.append(error)
            return None

    def extended(self, decode: Callable[[Pending], Any], name: bytes, *fields: bytes) -> Any:
        return self.ask(decode, wire.EXTENDED, wire.extended_body(name + b"@openssh.com", *fields))

    def all(self) -> None:
        path, directory = wire.string(b"/home/file"), wire.string(b"/home")
        for kind in (wire.LSTAT, wire.STAT):
            self.ask(Pending.attrs, kind, path)
        self.ask(Pending.names, wire.REALPATH, directory)
        self.ask(Pending.names, wire.READLINK, wire.string(b"/home/link"))
        handle = self.ask(Pending.handle, wire.OPENDIR, directory)
        if handle is not None:
            self.ask(Pending.names, wire.READDIR, wire.string(handle))
            self.ask(Pending.expect_ok, wire.CLOSE, wire.string(handle))
        handle = self.ask(
            Pending.handle, wire.OPEN, wire.open_body(b"/home/file", wire.FXF_READ | wire.FXF_WRITE)
        )
        if handle is not None:
            self.ask(Pending.data, wire.READ, wire.read_body(handle, 0, len(CONTENT)))
            self.ask(Pending.attrs, wire.FSTAT, wire.string(handle))
            self.ask(Pending.expect_ok, wire.WRITE, wire.write_head(handle, 0, 1), b"x")
            self.ask(
                Pending.expect_ok, wire.FSETSTAT, wire.string(handle), wire.attrs(wire.Attrs(mode=0o600))
            )
            self.extended(Pending.expect_ok, b"fsync", wire.string(handle))
            self.ask(Pending.expect_ok, wire.CLOSE, wire.string(handle))
        self.extended(Pending.statvfs, b"statvfs", directory)
        self.extended(Pending.expect_ok, b"posix-rename", path, wire.string(b"/home/moved"))
        self.ask(
            Pending.expect_ok, wire.SETSTAT, wire.string(b"/home/moved"), wire.attrs(wire.Attrs(mode=0o600))
        )
        for kind in (wire.MKDIR, wire.RMDIR):
            self.ask(Pending.expect_ok, kind, wire.string(b"/home/new"), wire.attrs(wire.Attrs()))
        self.ask(Pending.expect_ok, wire.REMOVE, wire.string(b"/home/moved"))


@with_a_lie
def test_session(server: FakeServer, lie: Lie) -> None:
    server.make(b"/home/file", CONTENT)
    link = server.make(b"/home/link", mode=0o777)
    link.mode, link.target = 0o120777, b"file"
    server.twist = lambda name, reply: lie.twist(reply) if name in lie.requests else reply
    threads = threading.active_count()
    if lie.end == "start":
        with pytest.raises((ProtocolViolation, ConnectionLost, RemoteDirectoryError)) as caught:
            within(WAIT_S, lambda: Talk(server, lie))
        assert str(caught.value).isprintable()
        return
    talk = within(WAIT_S, lambda: Talk(server, lie))
    try:
        within(WAIT_S, talk.all)
        lost = talk.session.lost
        if lie.end in ("frame", "body", "session"):
            assert any(isinstance(error, ProtocolViolation) for error in [lost, *talk.errors]), talk.errors
        elif lie.end == "deadline":
            assert "no reply" in str(lost)
        else:
            assert lost is None
            assert not any(isinstance(error, ConnectionLost) for error in talk.errors), talk.errors
        assert all(str(error).isprintable() for error in talk.errors if not isinstance(error, StatusError))
    finally:
        talk.session.abort(ConnectionLost("the test has ended"))
    assert threading.active_count() <= threads + 2


def within(timeout_s: float, act: Callable[[], Any]) -> Any:
    """What ``act`` returns or raises; AssertionError where it does not end in time."""
    ends: List[Callable[[], Any]] = []

    def run() -> None:
        try:
            result = act()
            ends.append(lambda: result)
        except BaseException as error:
            ends.append(lambda error=error: throw(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    assert ends, f"no end within {timeout_s} s"
    return ends[0]()


def throw(error: BaseException) -> None:
    raise error
