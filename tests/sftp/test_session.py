"""One session: replies matched to requests, lanes, limits, liveness, and servers that break the protocol."""

from __future__ import annotations

import contextlib
import errno
import struct
import threading
import time
from _thread import LockType
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest

from sftp.fake_server import FakeChannel, FakeServer, Fault, named
from sftpmount.errors import (
    ConnectionLost,
    FsError,
    NotSent,
    ProtocolViolation,
    RemoteDirectoryError,
    StatusError,
)
from sftpmount.sftp import wire
from sftpmount.sftp.lane import Lane, Pending
from sftpmount.sftp.session import BUSY, DATA_BYTES_MAX, DEFAULT_LIMITS, Session
from support.process import wait_until

WAIT_S = 10.0


class Recorder:
    """Counts the calls of on_lost."""

    def __init__(self) -> None:
        self.sessions: List[Session] = []
        self.event = threading.Event()

    def __call__(self, session: Session) -> None:
        self.sessions.append(session)
        self.event.set()


@pytest.fixture
def lost() -> Recorder:
    return Recorder()


@pytest.fixture
def make(lost: Recorder) -> Iterator[Callable[..., Session]]:
    made: List[Session] = []

    def build(server: FakeServer, **settings: Any) -> Session:
        settings = {
            "lanes": 1,
            "alive_interval_s": 0.0,
            "alive_count_max": 3,
            "request_deadline_s": 60.0,
            "on_lost": lost,
            **settings,
        }
        made.append(Session(server.dial(), **settings))
        return made[-1]

    yield build
    for session in made:
        session.close()


def lstat(session: Session, path: bytes, callback: Optional[Callable[[Pending], None]] = None) -> Pending:
    return session.meta.request(wire.LSTAT, wire.string(path), callback=callback)


class TestReplies:
    @pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 20])
    def test_requests_in_flight_get_their_own_replies(
        self, make_server: Callable[..., FakeServer], make: Callable[..., Session], chunk_bytes: int
    ) -> None:
        server = make_server(chunk_bytes=chunk_bytes)
        for size in range(50):
            server.make(b"/home/%d" % size, bytes(size))
        session = make(server)
        pending = [lstat(session, b"/home/%d" % size) for size in range(50)]
        assert [each.wait().attrs().size for each in reversed(pending)] == list(range(49, -1, -1))
        assert session.meta.in_flight == 0

    def test_many_threads(self, server: FakeServer, make: Callable[..., Session]) -> None:
        for size in range(8):
            server.make(b"/home/%d" % size, bytes(size))
        session = make(server)
        wrong: List[object] = []

        def ask(size: int) -> None:
            for _ in range(100):
                got = lstat(session, b"/home/%d" % size).wait().attrs().size
                if got != size:
                    wrong.append((size, got))

        threads = [threading.Thread(target=ask, args=(size,)) for size in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert not wrong
        assert server.count("LSTAT") == 800

    def test_a_callback_gets_the_reply_once(self, server: FakeServer, make: Callable[..., Session]) -> None:
        got: List[Pending] = []
        pending = lstat(make(server), b"/home", got.append)
        pending.wait()
        wait_until(lambda: bool(got), WAIT_S, "the callback")
        assert got == [pending]

    def test_a_callback_that_fails_harms_no_other_request(
        self, server: FakeServer, make: Callable[..., Session], caplog: pytest.LogCaptureFixture
    ) -> None:
        def fail(pending: Pending) -> None:
            raise ValueError("on purpose")

        session = make(server)
        lstat(session, b"/home", fail).wait()
        assert lstat(session, b"/home").wait().attrs().mode
        assert session.lost is None
        assert "on purpose" in caplog.text

    def test_a_status_is_raised_with_its_code_and_text(
        self, server: FakeServer, make: Callable[..., Session]
    ) -> None:
        session = make(server)
        server.arm(Fault("status", named("LSTAT"), code=4, message="No space left on device"))
        with pytest.raises(StatusError) as caught:
            lstat(session, b"/home").wait().attrs()
        assert (caught.value.code, caught.value.message) == (4, "No space left on device")
        with pytest.raises(StatusError) as caught:
            lstat(session, b"/home/none").wait().attrs()
        assert caught.value.code == 2

    def test_end_of_file_is_an_empty_answer(self, server: FakeServer, make: Callable[..., Session]) -> None:
        server.make(b"/home/f", b"abc")
        lane = make(server).meta
        handle = lane.request(wire.OPEN, wire.open_body(b"/home/f", wire.FXF_READ)).wait().handle()
        assert lane.request(wire.READ, wire.read_body(handle, 3, 10)).wait().data() == b""
        assert lane.request(wire.READ, wire.read_body(handle, 1, 10)).wait().data() == b"bc"

    @pytest.mark.parametrize("decode", [Pending.handle, Pending.attrs, Pending.limits, Pending.statvfs])
    def test_end_of_file_is_an_error_where_there_is_no_file_to_end(
        self, server: FakeServer, make: Callable[..., Session], decode: Callable[[Pending], object]
    ) -> None:
        session = make(server)
        server.arm(Fault("status", code=1, message=""))
        with pytest.raises(StatusError):
            decode(lstat(session, b"/home").wait())

    @pytest.mark.parametrize(
        "decode",
        [Pending.handle, Pending.names, Pending.attrs, Pending.limits, Pending.statvfs],
    )
    def test_ok_is_no_result(
        self, server: FakeServer, make: Callable[..., Session], decode: Callable[[Pending], object]
    ) -> None:
        session = make(server)
        server.arm(Fault("not done"))
        with pytest.raises(ProtocolViolation):
            decode(lstat(session, b"/home").wait())

    def test_ok_is_no_data_but_no_reason_to_reconnect(
        self, server: FakeServer, make: Callable[..., Session]
    ) -> None:
        session = make(server)
        server.arm(Fault("not done"))
        with pytest.raises(StatusError):
            lstat(session, b"/home").wait().data()


class TestLimits:
    def test_of_the_server(
        self, make_server: Callable[..., FakeServer], make: Callable[..., Session]
    ) -> None:
        assert make(make_server(limits=(70000, 65536, 32768, 5))).limits == wire.Limits(
            70000, 65536, 32768, 5
        )

    def test_none_named(self, make_server: Callable[..., FakeServer], make: Callable[..., Session]) -> None:
        limits = make(make_server(limits=(0, 0, 0, 0))).limits
        assert (limits.read_bytes, limits.write_bytes) == (DATA_BYTES_MAX, DATA_BYTES_MAX)

    def test_huge_ones_are_not_used_up(
        self, make_server: Callable[..., FakeServer], make: Callable[..., Session]
    ) -> None:
        limits = make(make_server(limits=(1 << 40, 1 << 63, 1 << 40, 0))).limits
        assert (limits.read_bytes, limits.write_bytes) == (DATA_BYTES_MAX, DATA_BYTES_MAX)

    def test_without_the_extension_the_drafts(
        self, make_server: Callable[..., FakeServer], make: Callable[..., Session]
    ) -> None:
        server = make_server(without=(b"limits@openssh.com",))
        assert make(server).limits == DEFAULT_LIMITS
        assert DEFAULT_LIMITS.write_bytes == 32768


class TestLanes:
    def test_three_lanes_have_channels_of_their_own(
        self, server: FakeServer, make: Callable[..., Session]
    ) -> None:
        session = make(server, lanes=3)
        wait_until(
            lambda: len({session.meta, session.write_lane, session.read_lane}) == 3, WAIT_S, "three lanes"
        )
        assert len(server.connections[0].channels) == 3

    @pytest.mark.parametrize("channels", [1, 2])
    def test_a_server_that_allows_fewer_shares_them(
        self, make_server: Callable[..., FakeServer], make: Callable[..., Session], channels: int
    ) -> None:
        server = make_server(channels_max=channels)
        session = make(server, lanes=3)
        wait_until(lambda: len(server.connections[0].channels) == channels, WAIT_S, "the lanes")
        wait_until(
            lambda: (session.write_lane is not session.meta) == (channels > 1), WAIT_S, "the shared lane"
        )
        assert session.read_lane is session.write_lane
        assert session.lost is None
        assert lstat(session, b"/home").wait().attrs().mode

    def test_a_look_does_not_wait_behind_the_writes(
        self, server: FakeServer, make: Callable[..., Session]
    ) -> None:
        session = make(server, lanes=3)
        wait_until(lambda: session.write_lane is not session.meta, WAIT_S, "the write lane")
        lane = session.write_lane
        handle = lane.request(wire.OPEN, wire.open_body(b"/home/f", 2 | 8)).wait().handle()
        hold = server.arm(Fault("hold", named("WRITE")))
        writing = lane.request(wire.WRITE, wire.write_head(handle, 0, 1), b"x")
        assert hold.fired.wait(WAIT_S)
        assert lstat(session, b"/home").wait().attrs().mode
        hold.release()
        writing.wait().expect_ok()

    def busy(self, server: FakeServer, session: Session, lane: Lane) -> Fault:
        """The server's process of this lane has enough to do."""
        hold = server.arm(Fault("hold", named("FSTAT")))
        for _ in range(BUSY):
            lane.request(wire.FSTAT, wire.string(b"none"))
        assert hold.fired.wait(WAIT_S)
        return hold

    def test_further_ones_where_those_for_writes_are_busy(
        self, server: FakeServer, make: Callable[..., Session]
    ) -> None:
        session = make(server, lanes=5)

        def is_open(count: int) -> bool:
            return session.state()["lanes"] == count and not session._opening.locked()

        wait_until(lambda: is_open(3), WAIT_S, "the first three")
        assert [session.lane_to_write() for _ in range(9)] == [session.write_lane] * 9
        found, holds = [session.write_lane], []
        for count in (4, 5, 5):
            holds.append(self.busy(server, session, found[-1]))
            assert session.lane_to_write() in found, "nobody waits for the next one"
            wait_until(lambda: is_open(count), WAIT_S, f"{count} lanes")  # noqa: B023
            found.append(session.write_lane)
        assert len(set(found)) == 3 and session.read_lane not in found and session.meta not in found
        assert len(server.connections[0].channels) == 5
        for hold in holds:
            hold.release()
        wait_until(lambda: not any(lane.in_flight for lane in found), WAIT_S, "the replies")
        assert session.write_lane is found[0]

    def test_what_is_refused_is_not_asked_for_again(
        self,
        make_server: Callable[..., FakeServer],
        make: Callable[..., Session],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level("INFO")
        server = make_server(channels_max=3)
        session = make(server, lanes=6)
        wait_until(lambda: session.read_lane is not session.write_lane, WAIT_S, "the first three")
        hold = self.busy(server, session, session.write_lane)
        for _ in range(3):
            assert session.lane_to_write() in session._write_lanes
            wait_until(lambda: "no further channel" in caplog.text, WAIT_S, "the refusal")
        assert caplog.text.count("no further channel") == 1
        hold.release()

    def test_the_end_of_one_lane_is_the_end_of_all(
        self, server: FakeServer, make: Callable[..., Session], lost: Recorder
    ) -> None:
        session = make(server, lanes=3)
        wait_until(lambda: session.read_lane is not session.write_lane, WAIT_S, "the lanes")
        hold = server.arm(Fault("no reply", named("LSTAT")))
        pending = lstat(session, b"/home")
        assert hold.fired.wait(WAIT_S)
        server.connections[0].channels[2].close()
        with pytest.raises(ConnectionLost):
            pending.wait()
        assert lost.event.wait(WAIT_S)
        assert not server.connections[0].is_alive
        with pytest.raises(NotSent):
            lstat(session, b"/home")
        assert lost.sessions == [session]


class TestLoss:
    def test_every_request_in_flight_ends_once(
        self, server: FakeServer, make: Callable[..., Session], lost: Recorder
    ) -> None:
        session = make(server)
        ended: List[Pending] = []
        server.arm(Fault("no reply", times=1000))
        pending = [lstat(session, b"/home", ended.append) for _ in range(200)]
        server.cut()
        for each in pending:
            with pytest.raises(ConnectionLost):
                each.wait()
        assert lost.event.wait(WAIT_S)
        assert sorted(map(id, ended)) == sorted(map(id, pending))
        assert session.lost is not None
        assert lost.sessions == [session]

    def test_requests_made_while_the_connection_ends(
        self, server: FakeServer, make: Callable[..., Session]
    ) -> None:
        """Each either ends or is refused: none is left waiting, whenever the end comes."""
        session = make(server)
        outcomes: List[str] = []

        def ask() -> None:
            while True:
                try:
                    lstat(session, b"/home").wait().attrs()
                except NotSent:
                    outcomes.append("not sent")
                    return
                except ConnectionLost:
                    outcomes.append("lost")

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.count("LSTAT") > 50, WAIT_S, "some traffic")
        server.cut()
        for thread in threads:
            thread.join(WAIT_S)
            assert not thread.is_alive()
        assert outcomes.count("not sent") == 8

    def test_abort_is_idempotent_and_frees_every_waiter(
        self, server: FakeServer, make: Callable[..., Session], lost: Recorder
    ) -> None:
        session = make(server)
        server.arm(Fault("no reply"))
        pending = lstat(session, b"/home")
        first = ConnectionLost("first")
        session.abort(first)
        session.abort(ConnectionLost("second"))
        with pytest.raises(ConnectionLost, match="first"):
            pending.wait()
        assert session.lost is first
        assert lost.sessions == [session]

    def test_an_orderly_end_is_no_loss(
        self, server: FakeServer, make: Callable[..., Session], lost: Recorder
    ) -> None:
        session = make(server)
        session.close()
        session.close()
        assert server.connections[0].is_closed
        server.connections[0].channels[0].thread.join(WAIT_S)
        assert lost.sessions == []

    @pytest.mark.parametrize("name", ["limits"])
    @pytest.mark.parametrize("act", ["cut before", "cut after"])
    def test_a_connection_that_ends_while_the_session_starts(
        self, server: FakeServer, make: Callable[..., Session], name: str, act: str
    ) -> None:
        server.arm(Fault(act, named(name)))
        with pytest.raises(ConnectionLost):
            make(server)
        assert not server.connections[0].is_alive


class TestLies:
    """Rule 4: whoever breaks the protocol is cut off, and nothing of what it says is believed."""

    @pytest.mark.parametrize("act", ["wrong id", "huge length"])
    def test_a_broken_frame_ends_the_session(
        self, server: FakeServer, make: Callable[..., Session], lost: Recorder, act: str
    ) -> None:
        session = make(server)
        server.arm(Fault(act))
        with pytest.raises(ConnectionLost):
            lstat(session, b"/home").wait()
        assert lost.event.wait(WAIT_S)
        assert isinstance(session.lost, ProtocolViolation)
        assert not server.connections[0].is_alive

    @pytest.mark.parametrize("act", ["wrong type", "truncated"])
    def test_a_broken_body_is_a_violation(
        self, server: FakeServer, make: Callable[..., Session], act: str
    ) -> None:
        session = make(server)
        server.arm(Fault(act))
        with pytest.raises(ProtocolViolation):
            lstat(session, b"/home").wait().attrs()

    def test_a_reply_that_comes_twice(self, server: FakeServer, make: Callable[..., Session]) -> None:
        session = make(server)
        lstat(session, b"/home").wait()
        connection = server.connections[0]
        connection.channels[0]._deliver(struct.pack(">IBII", 9, 101, 2, 0))
        assert isinstance(session.lost, ProtocolViolation)

    def test_a_reply_to_nothing(self, server: FakeServer, make: Callable[..., Session]) -> None:
        session = make(server)
        server.connections[0].channels[0]._deliver(struct.pack(">IBII", 9, 101, 4711, 0))
        assert isinstance(session.lost, ProtocolViolation)

    @pytest.mark.parametrize("version", [0, 1, 2])
    def test_a_server_of_an_older_version_is_refused(
        self, make_server: Callable[..., FakeServer], make: Callable[..., Session], version: int
    ) -> None:
        """Version 2 has no symbolic links and other rename rules; it must not be spoken to as version 3."""
        with pytest.raises((RemoteDirectoryError, ProtocolViolation)):
            make(make_server(version=version))

    def test_something_that_is_not_sftp(self, make: Callable[..., Session]) -> None:
        """A login script that prints a greeting is the classic."""
        for greeting in (
            b"Welcome to this machine!\n",
            b"\x00\x00\x00\x09\x65\x00\x00\x00\x01\x00\x00\x00\x00",
        ):
            with pytest.raises((RemoteDirectoryError, ProtocolViolation)):
                make(Greeter(greeting))


class Greeter:
    """A server and connection that answers whatever is sent with one text."""

    def __init__(self, greeting: bytes) -> None:
        self._greeting = greeting
        self._on_data: Callable[[bytes], None] = lambda data: None

    def dial(self) -> Greeter:
        return self

    def open_subsystem(self, name: str, on_data: Callable[[bytes], None], on_closed: object) -> Greeter:
        self._on_data = on_data
        return self

    def send(self, *parts: bytes) -> None:
        threading.Thread(target=self._on_data, args=(self._greeting,), daemon=True).start()

    def be_lazy_when(self, nobody_waits: object) -> None:
        pass

    def wait_for(self, lock: LockType) -> None:
        lock.acquire()

    def attend(self) -> None:
        pass

    def heartbeat(self) -> None:
        pass

    def last_heard_s(self) -> float:
        return time.monotonic()

    def state(self) -> Dict[str, Any]:
        return {}

    def abort(self) -> None:
        pass

    close = abort


def test_who_goes_in_the_moment_that_the_lane_ends(
    server: FakeServer, make: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request ends once."""
    session = make(server)
    got: List[Pending] = []

    def send(channel: FakeChannel, *parts: bytes) -> None:
        session.abort(ConnectionLost("cut"))
        raise FsError(errno.EINTR)

    monkeypatch.setattr(FakeChannel, "send", send)
    asked = lstat(session, b"/home", got.append)
    assert got == [asked]
    with pytest.raises(ConnectionLost):
        asked.wait()


class TestTogether:
    def test_they_leave_at_once(
        self, server: FakeServer, make: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        session = make(server)
        send, sizes = FakeChannel.send, []

        def counted(channel: FakeChannel, *parts: bytes) -> None:
            if channel._held_up is None:
                sizes.append(sum(map(len, parts)))
            send(channel, *parts)

        monkeypatch.setattr(FakeChannel, "send", counted)
        with session.meta.together():
            first = lstat(session, b"/home")
            with session.meta.together():
                second = lstat(session, b"/nothing")
            assert session.meta.in_flight == 2 and not sizes
        assert first.wait().attrs().mode
        with pytest.raises(StatusError):
            second.wait().attrs()
        assert len(sizes) == 1

    def test_a_line_that_ends_meanwhile(self, server: FakeServer, make: Callable[..., Session]) -> None:
        """The block does not fail: what was asked for does."""
        session = make(server)
        got: List[Pending] = []
        with session.meta.together():
            asked = [lstat(session, b"/home"), lstat(session, b"/home", got.append)]
            server.connections[-1].ended.set()  # nobody has noticed yet
        for each in asked:
            with pytest.raises(ConnectionLost):
                each.wait()
        assert got == [asked[1]] and session.meta.in_flight == 0

    def test_a_lane_that_is_lost(self, server: FakeServer, make: Callable[..., Session]) -> None:
        session = make(server)
        session.abort(ConnectionLost("cut"))
        with pytest.raises(NotSent), session.meta.together():
            lstat(session, b"/home")
        assert session.meta.in_flight == 0

    def test_nobody_waits_any_more_when_they_are_to_leave(
        self, server: FakeServer, make: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As if none had been asked for: their callbacks hear it, and what comes next has its reply."""
        session = make(server)

        @contextlib.contextmanager
        def congested(channel: FakeChannel) -> Iterator[None]:
            channel._held_up = []
            yield
            channel._held_up = None
            raise FsError(errno.EINTR)

        got: List[Pending] = []
        with monkeypatch.context() as patched:
            patched.setattr(FakeChannel, "together", congested)
            with pytest.raises(FsError) as caught, session.meta.together():
                asked = lstat(session, b"/home", got.append)
        assert caught.value.errno == errno.EINTR
        assert got == [asked] and session.meta.in_flight == 0 and not session.meta.is_awaited
        with pytest.raises(NotSent):
            asked.wait()
        assert lstat(session, b"/home").wait().attrs().mode and server.count("LSTAT") == 1


class TestLiveness:
    def test_a_silent_peer_is_dead_after_its_heartbeats(
        self, server: FakeServer, make: Callable[..., Session], lost: Recorder
    ) -> None:
        session = make(server, alive_interval_s=0.5, alive_count_max=3)
        server.arm(Fault("silence"))
        with pytest.raises(ConnectionLost, match="nothing heard"):
            lstat(session, b"/home").wait()
        assert time.monotonic() - server.connections[0].last_heard_s() >= 1.5
        assert server.connections[0].heartbeats >= 1
        assert lost.event.wait(WAIT_S)

    def test_an_idle_silent_peer_is_found_dead_too(
        self, server: FakeServer, make: Callable[..., Session], lost: Recorder
    ) -> None:
        make(server, alive_interval_s=0.5, alive_count_max=2)
        server.connections[0].is_silent = True
        assert lost.event.wait(WAIT_S)

    def test_a_peer_that_answers_heartbeats_lives(
        self, server: FakeServer, make: Callable[..., Session], lost: Recorder
    ) -> None:
        session = make(
            server, alive_interval_s=0.1, alive_count_max=20
        )  # patient enough for a machine that is busy
        hold = server.arm(Fault("hold"))
        pending = lstat(session, b"/home")
        wait_until(lambda: server.connections[0].heartbeats >= 25, WAIT_S, "heartbeats")
        assert session.lost is None
        hold.release()
        assert pending.wait().attrs().mode
        assert not lost.sessions

    def test_a_lane_that_never_answers_is_dead_however_alive_the_rest(
        self, server: FakeServer, make: Callable[..., Session]
    ) -> None:
        session = make(server, lanes=2, alive_interval_s=0.1, alive_count_max=100, request_deadline_s=0.5)
        wait_until(lambda: session.write_lane is not session.meta, WAIT_S, "the write lane")
        server.arm(Fault("no reply", lambda request: request.lane == 1, times=100))
        stuck = session.write_lane.request(wire.LSTAT, wire.string(b"/home"))
        started = time.monotonic()
        while session.lost is None and time.monotonic() - started < WAIT_S:
            try:
                lstat(session, b"/home").wait()
            except ConnectionLost:
                break
        with pytest.raises(ConnectionLost, match="no reply"):
            stuck.wait()
        assert time.monotonic() - started >= 0.4

    def test_a_server_that_never_says_its_version_is_given_up(self) -> None:
        class Connection:
            """Alive, and mute on its channel, as where the subsystem's program hangs."""

            def open_subsystem(self, *arguments: object) -> Connection:
                return self

            def send(self, *parts: object) -> None:
                pass

            def heartbeat(self) -> None:
                pass

            def last_heard_s(self) -> float:
                return time.monotonic()

            def abort(self) -> None:
                pass

        with pytest.raises(ConnectionLost, match="no reply on the metadata lane"):
            Session(
                Connection(),  # type: ignore[arg-type]
                lanes=1,
                alive_interval_s=0.1,
                alive_count_max=3,
                request_deadline_s=0.3,
                on_lost=lambda session: None,
            )

    def test_the_deadline_counts_from_the_last_reply_not_from_the_request(
        self, server: FakeServer, make: Callable[..., Session]
    ) -> None:
        session = make(server, alive_interval_s=0.1, alive_count_max=100, request_deadline_s=2.0)
        holds = [server.arm(Fault("hold", lambda r, n=n: r.path == b"/%d" % n)) for n in range(5)]
        pending = [lstat(session, b"/%d" % n) for n in range(5)]
        for hold in holds:
            time.sleep(0.5)  # what is tested: five of these are past the deadline, each of them is not
            hold.release()
        for each in pending:
            with pytest.raises(StatusError):
                each.wait().attrs()
        assert session.lost is None
