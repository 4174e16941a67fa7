"""Who reads what the server sends: the transport thread, or who waits for it; and what leaves in one packet."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from _thread import allocate_lock
from contextlib import closing
from pathlib import Path
from typing import Callable, Iterator, List, Optional

import pytest

from sftpmount import waiting
from sftpmount.errors import ConnectionLost, FsError
from sftpmount.ssh import packetizer
from sftpmount.ssh.sealing import Gather
from sftpmount.ssh.transport import Connection
from ssh.test_transport import HARDENED, WAIT_S, connect, in_thread, own_server
from support.process import wait_until
from support.sshd import Sshd


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with own_server(tmp_path_factory.mktemp("echo")) as sshd:
        yield sshd


@pytest.fixture
def connection(server: Sshd) -> Iterator[Connection]:
    with closing(connect(server)) as each:
        yield each


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, who waits reads."""
    monkeypatch.setattr(packetizer, "_HELP_S", WAIT_S)
    monkeypatch.setattr(packetizer, "_ATTEND_S", 0.0)


class Echo:
    """A channel that sends back what it gets; ``ask`` waits for that as a request does for its reply."""

    def __init__(self, connection: Connection, name: str = "echo") -> None:
        self.connection = connection
        self.readers: List[str] = []
        self.endings: List[Exception] = []
        self.on_data: Callable[[bytes], None] = lambda data: None
        self._wanted = 0
        self.got = b""
        self.lock = allocate_lock()
        self.channel = connection.open_subsystem(name, self._take, self._end)

    def _take(self, data: bytes) -> None:
        self.readers.append(threading.current_thread().name)
        self.on_data(data)
        self.got += data
        if len(self.got) >= self._wanted and self.lock.locked():
            self.lock.release()

    def _end(self, error: Exception) -> None:
        self.endings.append(error)
        if self.lock.locked():
            self.lock.release()

    def ask(self, data: bytes) -> None:
        self.got, self._wanted = b"", len(data)
        self.lock.acquire()
        self.channel.send(data)
        self.connection.wait_for(self.lock)
        self.lock.release()
        if self.endings:
            raise self.endings[0]
        assert self.got == data


def test_who_waits_alone_reads(connection: Connection, patient: None) -> None:
    echo = Echo(connection)
    connection.be_lazy_when(lambda: not echo.lock.locked())  # else the transport thread is told to read on
    me = threading.current_thread().name
    for number in range(2000):
        echo.ask(b"%d" % number * 10)
        if echo.readers.count(me) >= 20:
            break
    else:
        pytest.fail(f"read by the transport thread: {len(echo.readers)} times")


def test_what_takes_long_is_left_to_the_transport_thread(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packetizer, "_HELP_S", 0.0)
    echo = Echo(connection)
    for number in range(20):
        echo.ask(b"%d" % number)
    assert set(echo.readers) == {"sftpmount-transport"}


def test_what_nobody_waits_for_arrives_behind_a_helper(connection: Connection, patient: None) -> None:
    echo, other = Echo(connection), Echo(connection)
    for number in range(50):
        other.channel.send(b"x")
        echo.ask(b"%d" % number)
    wait_until(lambda: other.got == b"x" * 50, WAIT_S, "the other channel's data")


def test_two_who_wait(connection: Connection, patient: None) -> None:
    """The one whose reply comes first must not leave the other's unread."""
    echoes = [Echo(connection) for _ in range(4)]

    def work(echo: Echo) -> Callable[[], None]:
        return lambda: [echo.ask(os.urandom(500)) for _ in range(200)] and None

    failures = [in_thread(work(echo)) for echo in echoes]
    wait_until(lambda: sum(len(echo.readers) >= 200 for echo in echoes) == 4, WAIT_S, "all replies")
    assert not any(failures)


@pytest.mark.parametrize("by_server", [False, True])
def test_keys_are_exchanged_while_who_waits_reads(tmp_path: Path, patient: None, by_server: bool) -> None:
    config = "RekeyLimit 16K\n" if by_server else ""
    with own_server(tmp_path, config) as sshd:
        with closing(connect(sshd, HARDENED, rekey_bytes_max=None if by_server else 16_000)) as connection:
            echo = Echo(connection)
            for _ in range(200):
                echo.ask(os.urandom(1000))
            transport = connection._transport
            assert transport.exchanges > 3  # type: ignore[attr-defined]


def test_an_exception_of_on_data_ends_the_connection(connection: Connection, patient: None) -> None:
    echo = Echo(connection)
    echo.ask(b"well")

    def fail(data: bytes) -> None:
        raise ValueError("a fault of ours")

    echo.on_data = fail
    with pytest.raises(ConnectionLost):
        echo.ask(b"ill")
    wait_until(lambda: not connection.is_alive, WAIT_S, "the connection's end")


def test_a_connection_that_ends_while_who_waits_reads(connection: Connection, patient: None) -> None:
    echo = Echo(connection, "discard")
    timer = threading.Timer(0.2, connection.abort)
    timer.start()
    with pytest.raises(ConnectionLost):
        echo.ask(b"into the void")
    timer.join()


def test_the_descriptor_lives_until_who_reads_has_left(connection: Connection, patient: None) -> None:
    """Its number may be another file's the next moment."""
    echo = Echo(connection)
    echo.ask(b"well")
    stream = connection._transport.packetizer
    with stream._reading:
        connection.abort()
        wait_until(lambda: bool(echo.endings), WAIT_S, "the channel's end")
        assert os.fstat(stream._socket_fd)
        assert not stream._released
    wait_until(lambda: stream._released, WAIT_S, "the release")


def test_who_is_ended_while_it_reads(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it stays behind: others go on, with the same connection."""
    void, echo = Echo(connection, "discard"), Echo(connection)
    told: List[object] = []

    def program() -> None:
        waiting.serve(lambda: True)
        try:
            void.ask(b"into the void")
        except FsError as error:
            told.append(error.errno)

    monkeypatch.setattr(packetizer, "_HELP_S", 0.05)
    thread = threading.Thread(target=program)
    thread.start()
    thread.join(WAIT_S)
    assert told == [errno.EINTR]
    echo.ask(b"goes on")


class TestTogether:
    @pytest.fixture
    def packets(self, connection: Connection, monkeypatch: pytest.MonkeyPatch) -> List[int]:
        """The size of each packet of channel data from now on."""
        stream = connection._transport.packetizer
        seal, sizes = stream.seal_data, []

        def counted(channel: int, source: Gather, size: int, bytes_max: int) -> None:
            sizes.append(size)
            seal(channel, source, size, bytes_max)

        monkeypatch.setattr(stream, "seal_data", counted)
        return sizes

    def test_one_packet(self, connection: Connection, packets: List[int]) -> None:
        echo = Echo(connection)
        with echo.channel.together():
            echo.channel.send(b"a", b"b")
            with echo.channel.together():
                echo.channel.send(b"c")
            assert not packets
        assert packets == [3]
        wait_until(lambda: echo.got == b"abc", WAIT_S, "the echo")
        echo.channel.send(b"d")
        assert packets == [3, 1]

    def test_nothing_is_no_packet(self, connection: Connection, packets: List[int]) -> None:
        with Echo(connection).channel.together():
            pass
        assert not packets

    def test_what_was_sent_before_a_failure_leaves(self, connection: Connection) -> None:
        echo = Echo(connection)
        with pytest.raises(ZeroDivisionError), echo.channel.together():
            echo.channel.send(b"a")
            raise ZeroDivisionError
        wait_until(lambda: echo.got == b"a", WAIT_S, "the echo")

    def test_it_leaves_though_nobody_waits_any_more(
        self, connection: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Behind another failure nobody takes back what has not left."""
        monkeypatch.setattr(waiting, "POLL_S", 0.01)
        echo = Echo(connection)
        channel = echo.channel
        waits, wait = itertools.count(1), channel._changed.wait
        looked_again = threading.Event()

        def counted(timeout: Optional[float] = None) -> bool:
            if next(waits) == 3:
                looked_again.set()
            return wait(timeout)

        monkeypatch.setattr(channel._changed, "wait", counted)
        with channel._lock:
            window, channel._window_out = channel._window_out, 0

        def ask() -> None:
            waiting.serve(lambda: True)
            with channel.together():
                channel.send(b"a")
                raise ZeroDivisionError

        failures = in_thread(ask)
        wait_until(lambda: looked_again.is_set() or bool(failures), WAIT_S, "the wait for the window")
        channel.widen(window)
        wait_until(lambda: bool(failures), WAIT_S, "the end")
        assert isinstance(failures[0], ZeroDivisionError)
        wait_until(lambda: echo.got == b"a", WAIT_S, "the echo")

    def test_a_window_that_has_not_room_for_all(self, connection: Connection) -> None:
        """ProFTPD grants more only once there is less left than 96 KiB, however large the window was."""
        echo = Echo(connection)
        channel = echo.channel
        with channel._lock:
            channel._window_out, channel._window_bytes_max = 100_000, 2**32 - 1

        def ask() -> None:
            with channel.together():
                for _ in range(4):
                    channel.send(bytes(33_000))

        failures = in_thread(ask)
        wait_until(lambda: len(echo.got) >= 99_000, WAIT_S, "what there was room for")
        channel.widen(100_000)
        wait_until(lambda: len(echo.got) == 132_000, WAIT_S, "the rest")
        assert not failures

    def test_others_come_behind(self, connection: Connection) -> None:
        echo = Echo(connection)
        with echo.channel.together():
            echo.channel.send(b"a")
            failures = in_thread(lambda: echo.channel.send(b"c"))
            echo.channel.send(b"b")
        wait_until(lambda: len(echo.got) == 3, WAIT_S, "the echo")
        assert echo.got == b"abc" and not failures

    def test_on_a_dead_connection(self, connection: Connection) -> None:
        echo = Echo(connection)
        with pytest.raises(ConnectionLost), echo.channel.together():
            echo.channel.send(b"a")
            connection.abort()
            wait_until(lambda: bool(echo.endings), WAIT_S, "the channel's end")
