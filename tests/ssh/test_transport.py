"""The transport and its channels against real servers: every algorithm, refusals, rekeying, bulk data, and every kind of end."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import select
import shutil
import socket
import sys
import tempfile
import threading
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Set

import asyncssh
import paramiko
import pytest
from paramiko import Message

from sftpmount import waiting
from sftpmount.errors import ChannelRefused, ConnectionLost, HostKeyError, PolicyError, Unreachable
from sftpmount.ssh import hardened
from sftpmount.ssh.ciphers import Clear
from sftpmount.ssh.config import aes_in_hardware
from sftpmount.ssh.kex import _GROUP18_PRIME, KexGexAtLeast
from sftpmount.ssh.packetizer import PacketStream
from sftpmount.ssh.policy import Policy, make_policy
from sftpmount.ssh.sealing import _ROOMS_KEPT_MAX, Gather
from sftpmount.ssh.transport import Channel, Connection, HardenedTransport
from support.process import free_port, wait_until
from support.sshd import Sshd

SUBSYSTEMS = """\
Subsystem echo /bin/cat
Subsystem discard /bin/cat >/dev/null
Subsystem source /usr/bin/head -c 8000000 /dev/zero
Subsystem stuck /bin/sleep 1000
"""
ALL_MACS = "MACs hmac-sha2-512-etm@openssh.com,hmac-sha2-256-etm@openssh.com,hmac-sha2-256,hmac-sha2-512\n"

HARDENED = make_policy()
WITH_ECDSA = make_policy(host_key_algorithms="+ecdsa*")
ONLY_CHACHA = make_policy(ciphers="chacha20*")
WAIT_S = 20.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """OpenSSH with its own default algorithms, and subsystems that echo, swallow and produce data."""
    directory = tmp_path_factory.mktemp("algorithms")
    with Sshd(directory, SUBSYSTEMS + ALL_MACS, hardened=False, sftp_only=False) as sshd:
        yield sshd


@contextmanager
def own_server(tmp_path: Path, config: str = "", **keywords: Any) -> Iterator[Sshd]:
    keywords = {"hardened": False, "sftp_only": False, "host_key_types": ("ed25519",), **keywords}
    with Sshd(tmp_path, SUBSYSTEMS + config, **keywords) as sshd:
        yield sshd


class CountingTransport(HardenedTransport):
    """Counts the key exchanges."""

    exchanges = 0

    def _parse_newkeys(self, m: Message) -> None:
        super()._parse_newkeys(m)
        self.exchanges += 1


def handshake(port: int, policy: Policy = HARDENED, **keywords: Any) -> CountingTransport:
    transport = CountingTransport(socket.create_connection(("127.0.0.1", port)), policy, **keywords)
    transport.handshake(WAIT_S)
    return transport


def connect(sshd: Any, policy: Policy = HARDENED, **keywords: Any) -> Connection:
    transport = handshake(sshd.port, policy, **keywords)
    transport.auth_publickey(sshd.user, paramiko.Ed25519Key.from_private_key_file(str(sshd.user_key)))
    return Connection(transport)


@pytest.fixture
def connection(server: Sshd) -> Iterator[Connection]:
    with closing(connect(server)) as each:
        yield each


class Receiver:
    """What arrives on a channel, and how it ended."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.bytes = 0
        self.endings: List[Exception] = []
        self.threads: List[threading.Thread] = []

    def on_data(self, data: bytes) -> None:
        assert isinstance(data, bytes)
        self.digest.update(data)
        self.bytes += len(data)

    def on_closed(self, error: Exception) -> None:
        self.endings.append(error)

    def open(self, connection: Connection, name: str) -> Channel:
        return connection.open_subsystem(name, self.on_data, self.on_closed)

    def expect(self, count: int) -> None:
        wait_until(
            lambda: self.bytes >= count or bool(self.endings), WAIT_S, f"{count} bytes (have {self.bytes})"
        )
        assert self.bytes == count, self.endings

    def expect_end(self) -> Exception:
        wait_until(lambda: bool(self.endings), WAIT_S, "the channel's end")
        assert len(self.endings) == 1
        return self.endings[0]


def in_thread(work: Callable[[], None]) -> List[BaseException]:
    """Run it in a thread; returns a list that gets its exception."""
    failures: List[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threading.Thread(target=run, daemon=True).start()
    return failures


def echo(connection: Connection, size: int) -> None:
    """Send ``size`` random bytes in uneven parts, and check that the same come back."""
    receiver = Receiver()
    channel = receiver.open(connection, "echo")
    data = memoryview(os.urandom(size))
    at, step = 0, 1
    while at < size:
        channel.send(
            data[at : at + 9], bytearray(data[at + 9 : at + step]), b""
        ) if step > 9 else channel.send(data[at : at + step])
        at += step
        step = min(step * 3 + 1, 1_000_003)
    receiver.expect(size)
    assert receiver.digest.digest() == hashlib.sha256(data).digest()
    channel.close()
    receiver.expect_end()


# --- algorithms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cipher", HARDENED.ciphers)
def test_every_cipher_alone(server: Sshd, cipher: str) -> None:
    with closing(connect(server, make_policy(ciphers=cipher))) as connection:
        assert (connection.negotiated.cipher_out, connection.negotiated.cipher_in) == (cipher, cipher)
        assert (connection.negotiated.mac_out == "") == ("ctr" not in cipher)
        echo(connection, 3_000_001)


@pytest.mark.parametrize("mac", make_policy("compatible").macs)
def test_every_mac_alone(server: Sshd, mac: str) -> None:
    with closing(connect(server, make_policy("compatible", ciphers="aes256-ctr", macs=mac))) as connection:
        assert (connection.negotiated.mac_out, connection.negotiated.mac_in) == (mac, mac)
        echo(connection, 1_000_001)


@pytest.mark.parametrize(
    "kex", [name for name in make_policy("compatible", kex_algorithms="*").kex if "mlkem" not in name]
)
def test_every_key_exchange_alone(server: Sshd, kex: str) -> None:
    with closing(connect(server, make_policy("compatible", kex_algorithms=kex))) as connection:
        assert connection.negotiated.kex == kex
        echo(connection, 10_001)


@pytest.mark.parametrize("profile", ["hardened", "pq"])
def test_ml_kem(tmp_path: Path, profile: str) -> None:
    """Debian 12's OpenSSH does not have it; asyncssh does."""
    with (
        AsyncsshEcho("mlkem768x25519-sha256") as server,
        closing(connect(server, make_policy(profile))) as connection,
    ):
        assert connection.negotiated.kex == "mlkem768x25519-sha256"
        echo(connection, 300_001)


@pytest.mark.parametrize("name", ["ssh-ed25519", "rsa-sha2-512", "rsa-sha2-256"])
def test_every_host_key_type_alone(server: Sshd, name: str) -> None:
    with closing(handshake(server.port, host_key_algorithms=[name])) as transport:
        assert transport.negotiated.host_key_type == name
        kind = "rsa" if "rsa" in name else "ed25519"
        line = (server.dir / f"host_{kind}.pub").read_text().split()
        key = paramiko.PKey.from_type_string(line[0], base64.b64decode(line[1]))
        assert transport.host_key_blob == key.asbytes()
        assert transport.negotiated.host_key_fingerprint == key.fingerprint


@pytest.mark.parametrize("bits", [256, 384, 521])
def test_ecdsa_host_keys(tmp_path: Path, bits: int) -> None:
    transport_key = paramiko.ECDSAKey.generate(bits=bits)
    with WeakServer(transport_key) as weak:
        assert weak.handshake().host_key_type == f"ecdsa-sha2-nistp{bits}"


def test_what_was_negotiated_is_told(connection: Connection) -> None:
    told = connection.negotiated
    assert told.strict_kex
    assert told.server_version.startswith("SSH-2.0-OpenSSH")
    assert told.host_key_fingerprint.startswith("SHA256:")


def test_no_strict_kex_is_accepted_with_gcm() -> None:
    with WeakServer(cipher="aes128-gcm@openssh.com", strict_kex=False) as weak:
        assert not weak.handshake().strict_kex


def test_a_small_group_in_group_exchange_is_refused() -> None:
    class Offer:
        kex = ("diffie-hellman-group-exchange-sha256",)

    class Transport:
        policy = HARDENED
        offer = Offer

    message = Message()
    message.add_mpint(2**2047 + 1)
    message.add_mpint(2)
    with pytest.raises(PolicyError, match="group of 2048 bits") as caught:
        KexGexAtLeast(Transport())._parse_kexdh_gex_group(Message(message.asbytes()))
    (line,) = caught.value.server_lines
    assert line.startswith("KexAlgorithms curve25519-sha256,") and line.endswith(Offer.kex[0])


def test_the_prime_of_group18_is_rfc_3526s() -> None:
    """2^8192 - 2^8128 - 1 + 2^64 * (floor(2^8062 pi) + 4743158), with pi by Machin's formula."""

    def arctan_inverse(x: int, one: int) -> int:
        total = term = one // x
        n, sign = 3, -1
        while term:
            term //= x * x
            total += sign * (term // n)
            n, sign = n + 2, -sign
        return total

    one = 1 << (8062 + 128)
    pi = 4 * (4 * arctan_inverse(5, one) - arctan_inverse(239, one))
    expected = 2**8192 - 2**8128 - 1 + 2**64 * ((pi >> 128) + 4743158)
    assert expected == _GROUP18_PRIME


def test_ml_kem_is_not_offered_where_the_library_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: kex for name, kex in HardenedTransport._kex_info.items() if "mlkem" not in name}
    monkeypatch.setattr(HardenedTransport, "_kex_info", known)
    with WeakServer() as weak:
        assert weak.handshake().kex.startswith("curve25519-sha256")
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(PolicyError, match="cryptography 48"):
        HardenedTransport(ours, make_policy("pq"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("flags\t: fpu aes avx\n", True), ("Features\t: fp asimd crc32\n", False), ("model name\t: x\n", True)],
)
def test_aes_in_hardware(tmp_path: Path, text: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert aes_in_hardware(str(tmp_path / "cpuinfo")) is expected
    assert aes_in_hardware(str(tmp_path / "missing")) is True


def test_another_host_key_at_rekeying_is_refused(connection: Connection) -> None:
    transport = connection._transport
    transport.host_key_blob = transport.host_key_blob[:-1] + b"x"
    transport.request_rekey()
    wait_until(lambda: not connection.is_alive and transport._ended_by is not None, WAIT_S, "the end")
    assert isinstance(transport._ended_by, HostKeyError)


# --- rekeying --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cipher", [*HARDENED.ciphers[:4], "aes256-ctr"])
def test_rekeying_by_us_during_transfer_both_ways(server: Sshd, cipher: str) -> None:
    with closing(connect(server, make_policy(ciphers=cipher), rekey_bytes_max=1_000_000)) as connection:
        echo(connection, 8_000_003)
        assert connection._transport.exchanges >= 5  # type: ignore[attr-defined]


def test_rekeying_by_the_server_during_transfer_both_ways(tmp_path: Path) -> None:
    with own_server(tmp_path, "RekeyLimit 1M\n") as sshd, closing(connect(sshd)) as connection:
        echo(connection, 8_000_003)
        assert connection._transport.exchanges >= 5  # type: ignore[attr-defined]


def test_rekeying_by_both_at_once(tmp_path: Path) -> None:
    with (
        own_server(tmp_path, "RekeyLimit 1M\n") as sshd,
        closing(connect(sshd, rekey_bytes_max=1_000_000)) as connection,
    ):
        echo(connection, 8_000_003)


def test_no_rekeying_before_the_login(server: Sshd) -> None:
    """OpenSSH takes no key exchange while it authenticates, however little may be sent with one set of keys."""
    with closing(connect(server, rekey_bytes_max=16)) as connection:
        echo(connection, 10_001)
        assert connection._transport.exchanges >= 2  # type: ignore[attr-defined]


def test_the_limits_of_rekeying_narrow_and_never_widen(server: Sshd) -> None:
    for policy, bytes_max in ((HARDENED, 2**35), (ONLY_CHACHA, 2**30)):
        with closing(
            handshake(server.port, policy, rekey_bytes_max=2**40, rekey_interval_s=1e6)
        ) as transport:
            packets = transport.packetizer
            assert (packets.rekey_bytes_max, packets.rekey_interval_s) == (bytes_max, 3600.0)


def test_rekeying_by_time(server: Sshd) -> None:
    with closing(connect(server, rekey_interval_s=0.2)) as connection:
        wait_until(lambda: connection._transport.exchanges >= 2, WAIT_S, "new keys")  # type: ignore[attr-defined]
        echo(connection, 10_001)


def test_rekeying_on_chacha_by_the_server(tmp_path: Path) -> None:
    with own_server(tmp_path, "RekeyLimit 1M\n") as sshd, closing(connect(sshd, ONLY_CHACHA)) as connection:
        echo(connection, 8_000_003)
        assert connection._transport.exchanges >= 5  # type: ignore[attr-defined]


def test_the_heartbeat_does_not_wait_for_a_key_exchange(server: Sshd) -> None:
    with closing(connect(server)) as connection:
        transport = connection._transport
        transport.clear_to_send.clear()  # as during an exchange
        began = time.monotonic()
        connection.heartbeat()
        assert time.monotonic() - began < 5.0
        transport.clear_to_send.set()


# --- channels --------------------------------------------------------------------------------------------------------


def test_receiving_more_than_a_window_of_packets(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small window, so that it must be topped up many times."""
    monkeypatch.setattr("sftpmount.ssh.transport._WINDOW_BYTES", 200_000)
    receiver = Receiver()
    receiver.open(connection, "source")
    receiver.expect(8_000_000)
    assert receiver.digest.digest() == hashlib.sha256(bytes(8_000_000)).digest()
    assert "closed the channel" in str(receiver.expect_end())


def test_senders_of_one_channel_do_not_mix(connection: Connection) -> None:
    """Each send() is a run of one byte, as long as that byte says."""
    received = bytearray()
    channel = connection.open_subsystem("echo", received.extend, lambda _: None)

    def work(number: int) -> Callable[[], None]:
        def send() -> None:
            for _ in range(20):
                channel.send(bytes([number]) * 20_000, bytes([number]) * (number * 1000))

        return send

    failures = [in_thread(work(number)) for number in range(1, 5)]
    total = sum(20 * (20_000 + number * 1000) for number in range(1, 5))
    wait_until(lambda: len(received) >= total, WAIT_S, "the echo")
    assert not any(failures)
    at = 0
    while at < total:
        number = received[at]
        size = 20_000 + number * 1000
        assert received[at : at + size] == bytes([number]) * size
        at += size


def test_many_channels_at_once(connection: Connection) -> None:
    failures = [in_thread(lambda: echo(connection, 1_500_000)) for _ in range(5)]
    echo(connection, 1_500_000)
    wait_until(lambda: not connection._transport._own_channels, WAIT_S, "the end of all channels")
    assert not any(failures)


def test_a_small_request_overtakes_bulk_data(connection: Connection) -> None:
    """While one channel's sender waits for a window that will not open, another channel is as quick as ever."""
    stuck = Receiver().open(connection, "stuck")
    failures = in_thread(lambda: stuck.send(bytes(50_000_000)))
    wait_until(lambda: stuck._window_out == 0, WAIT_S, "a full window")
    echo(connection, 100_001)
    assert not failures


class Serving:
    """Sends in a thread that serves the kernel, and notes in which waits it lets another serve."""

    def __init__(self, send: Callable[[], None]) -> None:
        self.waits: Set[str] = set()

        def work() -> None:
            waiting.serve(lambda: False, step_aside=self._note)
            with suppress(ConnectionLost, EOFError):
                send()

        in_thread(work)

    def _note(self) -> None:
        self.waits.add(sys._getframe(2).f_code.co_name)  # behind waiting.step_aside

    def expect(self, wait: str) -> None:
        wait_until(lambda: wait in self.waits, WAIT_S, f"{wait} to let another serve (have {self.waits})")


def test_who_waits_for_the_window_lets_another_serve(connection: Connection) -> None:
    stuck = Receiver().open(connection, "stuck")
    Serving(lambda: stuck.send(bytes(50_000_000))).expect("_take_window")


def test_who_waits_for_the_socket_lets_another_serve(tmp_path: Path) -> None:
    with own_server(tmp_path) as sshd:
        connection = connect(sshd)
        channels = [Receiver().open(connection, "echo") for _ in range(2)]
        sshd.pause()
        try:
            first, second = (
                Serving(lambda channel=channel: [channel.send(bytes(1_000_000)) for _ in range(100)] and None)  # type: ignore[misc]
                for channel in channels
            )
            wait_until(
                lambda: {"_wait_writable", "flush"} <= first.waits | second.waits, WAIT_S, "both waits"
            )
        finally:
            sshd.resume()
            connection.abort()


@pytest.mark.parametrize("is_mute", [False, True])
def test_a_channel_that_is_not_opened_in_time(
    connection: Connection, monkeypatch: pytest.MonkeyPatch, is_mute: bool
) -> None:
    """On a line that is full of other things the answer may be late: only of a mute server it is the end."""
    other = Receiver()
    channel = other.open(connection, "echo")
    monkeypatch.setattr("sftpmount.ssh.transport._CHANNEL_TIMEOUT_S", 0.5 if is_mute else 3.0)
    send = HardenedTransport.send_payload
    monkeypatch.setattr(
        HardenedTransport,
        "send_payload",
        lambda self, payload: (
            None if bytes(payload)[0] == 90 else send(self, payload)
        ),  # CHANNEL_OPEN is lost
    )
    failures = in_thread(lambda: Receiver().open(connection, "echo") and None)
    sent = 0
    while not failures:
        if not is_mute:
            channel.send(b"x")
            sent += 1
            other.expect(sent)
        else:
            wait_until(lambda: bool(failures), WAIT_S, "the end")
    assert isinstance(failures[0], ConnectionLost if is_mute else ChannelRefused)
    assert connection.is_alive != is_mute


def test_a_subsystem_that_is_missing_is_refused(connection: Connection) -> None:
    receiver = Receiver()
    with pytest.raises(ChannelRefused, match="no such subsystem"):
        receiver.open(connection, "nonsense")
    echo(connection, 1001)
    assert not receiver.endings


def test_too_many_channels_are_refused(tmp_path: Path) -> None:
    with own_server(tmp_path, "MaxSessions 1\n") as sshd, closing(connect(sshd)) as connection:
        first = Receiver()
        channel = first.open(connection, "echo")
        with pytest.raises(ChannelRefused, match="the server opens no channel: "):
            Receiver().open(connection, "echo")
        channel.send(b"still here")
        first.expect(10)


def test_stderr_is_the_reason_of_the_end_and_harmless() -> None:
    """OpenSSH keeps a subsystem's stderr to itself; others send it."""
    with AsyncsshEcho() as server, closing(connect(server)) as connection:
        receiver = Receiver()
        receiver.open(connection, "grumble")
        assert "no ?[2J disk" in str(receiver.expect_end())
        assert receiver.bytes == 0


def test_close_ends_the_channel_once_and_keeps_the_connection(connection: Connection) -> None:
    receiver = Receiver()
    channel = receiver.open(connection, "echo")
    channel.close()
    channel.close()
    receiver.expect_end()
    with pytest.raises(ConnectionLost):
        channel.send(b"x")
    echo(connection, 1001)
    assert len(receiver.endings) == 1


def test_an_exception_of_on_data_ends_the_connection(connection: Connection) -> None:
    def on_data(data: bytes) -> None:
        raise ValueError("nonsense from the server")

    endings: List[Exception] = []
    channel = connection.open_subsystem("echo", on_data, endings.append)
    channel.send(b"x")
    wait_until(lambda: bool(endings), WAIT_S, "the end")
    assert "nonsense from the server" in str(endings[0])
    assert not connection.is_alive


def test_a_tunnel_carries_a_second_connection(server: Sshd, tmp_path: Path) -> None:
    jump = connect(server)
    sock = jump.open_tunnel("127.0.0.1", server.port)
    transport = HardenedTransport(sock, ONLY_CHACHA)
    transport.handshake(WAIT_S)
    transport.auth_publickey(server.user, paramiko.Ed25519Key.from_private_key_file(str(server.user_key)))
    inner = Connection(transport, via=jump)
    echo(inner, 1_000_001)
    inner.close()
    wait_until(lambda: not jump.is_alive, WAIT_S, "the end of the connection below")


def test_a_tunnel_to_nowhere_is_refused(connection: Connection) -> None:
    with pytest.raises(ChannelRefused):
        connection.open_tunnel("127.0.0.1", free_port())
    echo(connection, 1001)


# --- liveness and the end --------------------------------------------------------------------------------------------


def test_the_heartbeat_is_answered(connection: Connection) -> None:
    before = connection.last_heard_s()
    connection.heartbeat()
    wait_until(lambda: connection.last_heard_s() > before, WAIT_S, "the answer")


def test_a_mute_server_is_noticed_and_does_not_block_the_heartbeat(tmp_path: Path) -> None:
    with own_server(tmp_path) as sshd:
        connection = connect(sshd)
        channel = Receiver().open(connection, "echo")
        sshd.pause()
        try:
            failures = in_thread(lambda: [channel.send(bytes(1_000_000)) for _ in range(100)] and None)
            wait_until(
                lambda: connection._transport.packetizer._socket_lock.locked(), WAIT_S, "a blocked sender"
            )
            heard = connection.last_heard_s()
            began = time.monotonic()
            for _ in range(3):
                connection.heartbeat()
            assert time.monotonic() - began < 5.0
            assert connection.last_heard_s() == heard
            connection.abort()
            wait_until(lambda: bool(failures), 3.0, "the sender's end")
            assert isinstance(failures[0], ConnectionLost)
        finally:
            sshd.resume()


@pytest.mark.parametrize("twice", [False, True])
def test_abort_releases_a_sender_that_waits_for_the_window(server: Sshd, twice: bool) -> None:
    connection = connect(server)
    receiver = Receiver()
    channel = receiver.open(connection, "stuck")
    failures = in_thread(lambda: channel.send(bytes(50_000_000)))
    wait_until(lambda: channel._window_out == 0, WAIT_S, "a full window")
    began = time.monotonic()
    connection.abort()
    if twice:
        connection.abort()
    wait_until(lambda: bool(failures), WAIT_S, "the sender's end")
    assert time.monotonic() - began < 5.0
    assert isinstance(failures[0], ConnectionLost)
    assert isinstance(receiver.expect_end(), ConnectionLost)
    assert not connection.is_alive


def test_abort_releases_a_sender_that_waits_for_a_key_exchange(server: Sshd) -> None:
    connection = connect(server)
    channel = Receiver().open(connection, "echo")
    connection._transport.clear_to_send.clear()
    failures = in_thread(lambda: channel.send(b"x"))
    connection.abort()
    wait_until(lambda: bool(failures), 3.0, "the sender's end")
    assert isinstance(failures[0], ConnectionLost)


class UnsendableSocket:
    """The peer is gone, as far as sending goes."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.tried = threading.Event()

    def send(self, data: bytes) -> int:
        self.tried.set()
        raise ConnectionResetError("Connection reset by peer")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


@pytest.mark.parametrize("how", ["send", "heartbeat"])
def test_what_came_before_a_send_that_fails_is_handed_on(server: Sshd, how: str) -> None:
    with closing(connect(server)) as connection:
        packetizer, receiver = connection._transport.packetizer, Receiver()
        channel = receiver.open(connection, "echo")
        with packetizer._reading:  # the thread that reads is busy
            channel.send(b"0123456789")
            wait_until(lambda: select.select([packetizer._socket], [], [], 0)[0], WAIT_S, "the echo")
            packetizer._socket = unsendable = UnsendableSocket(packetizer._socket)
            sends = {"send": lambda: channel.send(b"more"), "heartbeat": connection.heartbeat}
            sender = threading.Thread(target=lambda: suppress_lost(sends[how]), daemon=True)
            sender.start()
            assert unsendable.tried.wait(WAIT_S)
            if how == "heartbeat":
                sender.join(WAIT_S)  # it waits for nothing
            assert sender.is_alive() == (how == "send") and receiver.bytes == 0
        receiver.expect_end()
        sender.join(WAIT_S)
        assert receiver.bytes == 10 and not sender.is_alive()


def test_a_send_that_fails_does_not_wait_for_long(server: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardened, "_CLOSE_TIMEOUT_S", 0.1)
    with closing(connect(server)) as connection:
        packetizer, receiver = connection._transport.packetizer, Receiver()
        channel = receiver.open(connection, "echo")
        with packetizer._reading:  # the thread that reads is stuck
            packetizer._socket = UnsendableSocket(packetizer._socket)
            with pytest.raises(ConnectionLost):
                channel.send(b"more")
            assert not receiver.endings
        receiver.expect_end()


def suppress_lost(work: Callable[[], None]) -> None:
    with suppress(ConnectionLost):
        work()


def test_nothing_is_sent_in_silence_on_a_dead_connection(tmp_path: Path) -> None:
    with own_server(tmp_path) as sshd:
        connection = connect(sshd)
        receiver = Receiver()
        channel = receiver.open(connection, "echo")
        sshd.kill_sessions()
        assert isinstance(receiver.expect_end(), ConnectionLost)
        with pytest.raises(ConnectionLost):
            channel.send(b"x")
        wait_until(lambda: not connection.is_alive, WAIT_S, "the end")
        for call in (connection.heartbeat, lambda: Receiver().open(connection, "echo")):
            with pytest.raises(ConnectionLost):
                call()
        connection.close()


def test_close_is_quick_and_leaves_nothing(server: Sshd) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    threads = threading.active_count()
    took_s: List[float] = []
    for _ in range(3):
        connection = connect(server)
        receiver = Receiver()
        receiver.open(connection, "echo")
        began = time.monotonic()
        connection.close()
        took_s.append(time.monotonic() - began)
        receiver.expect_end()
    assert min(took_s) < 1.5  # of the three: a busy machine may spoil single ones
    wait_until(lambda: threading.active_count() <= threads, WAIT_S, "the end of the threads")
    assert len(os.listdir("/proc/self/fd")) <= descriptors


# --- servers that are none -------------------------------------------------------------------------------------------


@contextmanager
def raw_server(answer: bytes, close: bool = True) -> Iterator[socket.socket]:
    """The client's end of a connection to something that says ``answer``."""
    ours, theirs = socket.socketpair()
    theirs.sendall(answer)
    if close:
        theirs.shutdown(socket.SHUT_WR)
    with theirs, ours:
        yield ours


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "SSH protocol banner"),
        (b"", "SSH protocol banner"),
        (b"x" * 100_000, "line without end"),
        (b"SSH-1.5-old\r\n", "version"),
        (b"SSH-2.0-x\r\n", "closed the connection"),
        (b"SSH-2.0-x\r\n" + b"\xff" * 5000, "corrupt packet length"),
        (b"SSH-2.0-x\r\n\x00\x00\x00\x0c\xff\x14" + bytes(10), "impossible padding"),
        (b"SSH-2.0-x\r\n\x00\x00\x00\x0c\x0a\x5e" + bytes(10), "Expecting packet"),
    ],
)
def test_what_is_no_ssh_server_is_told_so(answer: bytes, words: str) -> None:
    with raw_server(answer) as sock, pytest.raises((Unreachable, PolicyError), match=words):
        HardenedTransport(sock, HARDENED).handshake(WAIT_S)


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-x\r\n"])
def test_a_silent_server_is_given_up_in_time(answer: bytes) -> None:
    began = time.monotonic()
    with raw_server(answer, close=False) as sock, pytest.raises(Unreachable, match=r"within 0\.3 s"):
        HardenedTransport(sock, HARDENED).handshake(0.3)
    assert time.monotonic() - began < 3.0


@pytest.mark.parametrize("cipher", [*HARDENED.ciphers[:3], "aes128-ctr", "plain mac"])
def test_a_packet_changed_on_the_way_ends_the_connection(server: Sshd, cipher: str) -> None:
    policy = (
        make_policy("compatible", ciphers="aes128-ctr", macs="hmac-sha2-256")
        if cipher == "plain mac"
        else None
    )
    with TamperingRelay(server.port) as relay:
        relay_as = type("Server", (), {"port": relay.port, "user": server.user, "user_key": server.user_key})
        connection = connect(relay_as, policy or make_policy(ciphers=cipher))
        receiver = Receiver()
        channel = receiver.open(connection, "echo")
        channel.send(b"good")
        receiver.expect(4)
        relay.tamper_at = 30
        channel.send(bytes(1000))
        assert "MAC" in str(receiver.expect_end())
        assert receiver.bytes == 4


# --- the packet stream by itself -------------------------------------------------------------------------------------


def test_gather_reads_through_its_parts() -> None:
    gather = Gather([b"ab", b"", bytearray(b"cdef"), memoryview(b"ghi")])
    out = memoryview(bytearray(4))
    assert gather.left == 9
    gather.fill(out)
    assert bytes(out) == b"abcd"
    gather.fill(out)
    assert bytes(out) == b"efgh"
    assert gather.left == 1


def test_packets_arrive_whole_in_whatever_pieces() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    stream = PacketStream(ours)
    packets = [bytes([50]) + os.urandom(size) for size in (0, 1, 100, 35_000)]
    wire = b"".join(as_clear_packet(payload) for payload in packets)

    def feed() -> None:
        for at in range(0, len(wire), 997):
            theirs.sendall(wire[at : at + 997])

    failures = in_thread(feed)
    for number, payload in enumerate(packets):
        kind, message = stream.read_message()
        assert bytes([kind]) + message.asbytes() == payload
        assert message.seqno == number
    assert not failures
    stream.release()
    theirs.close()


@pytest.mark.parametrize("and_forget", [False, True])
def test_an_aborted_connection_sends_nothing_late(and_forget: bool) -> None:
    """What our kernel holds when a line is given up must not change files there once the line is back."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    ours.setblocking(False)
    stream = PacketStream(ours)
    while not stream._stalled:  # until the line is full
        stream.seal(bytes(30_000))
        stream.flush(block=False)
    stream.close(and_forget=and_forget)
    stream.release()
    with theirs:
        theirs.settimeout(20)
        if and_forget:
            with pytest.raises(ConnectionResetError):
                while theirs.recv(1 << 20):
                    pass
        else:  # as TCP does it: every byte, then the end
            while theirs.recv(1 << 20):
                pass


def test_what_a_full_socket_does_not_take_now_is_sent_later_in_order() -> None:
    """A thread that must not wait leaves its packets to the reading thread, which sends them when there is room."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    stream = PacketStream(ours)
    reader = in_thread(lambda: stream.read_message() and None)
    payloads = [bytes([50]) + bytes([number % 256]) * 20_000 for number in range(100)]
    for payload in payloads:
        stream.seal(payload)
        stream.flush(block=False)
    assert stream._sealed.queue
    expected = sum(len(as_clear_packet(payload)) for payload in payloads)
    received = bytearray()
    while len(received) < expected:
        received += theirs.recv(1 << 20)
    at = 0
    for payload in payloads:
        assert received[at + 5 : at + 5 + len(payload)] == payload
        at += 4 + int.from_bytes(received[at : at + 4], "big")
    stream.close()
    wait_until(lambda: bool(reader), WAIT_S, "the reader's end")
    assert isinstance(reader[0], EOFError)
    stream.release()
    theirs.close()


def test_a_buffer_is_sealed_into_again_only_when_all_of_it_is_sent() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    stream = PacketStream(ours)
    received = bytearray()
    buffers = {}  # kept, so that no two have one id
    size = 130_000
    for number in range(100):
        stream.seal_data(7, Gather([bytes([number]) * size]), size, 32_768)
        buffers[id(stream._sealed.queue[-1].obj)] = stream._sealed.queue[-1].obj
        stream.flush(block=False)
        if (
            len(stream._sealed.queue) > 10
        ):  # the line takes some, in pieces that end in the middle of a buffer
            received += theirs.recv(1_000_003)
    while stream._sealed.queue:
        stream.flush(block=False)
        received += theirs.recv(1 << 20)
    with suppress(BlockingIOError):
        while piece := theirs.recv(1 << 20):
            received += piece
    assert len(buffers) < 50, "as good as a new buffer for each batch"
    assert 0 < len(stream._sealed._rooms) <= _ROOMS_KEPT_MAX
    data, at = bytearray(), 0
    while at < len(received):
        length, padding = int.from_bytes(received[at : at + 4], "big"), received[at + 4]
        data += received[at + 14 : at + 4 + length - padding]
        at += 4 + length
    assert data == b"".join(bytes([number]) * size for number in range(100))
    stream.close()
    stream.release()
    theirs.close()


def as_clear_packet(payload: bytes) -> bytes:
    padding = 4 + -(5 + len(payload) + 4) % Clear.block_size
    body = bytes([padding]) + payload + bytes(padding)
    return len(body).to_bytes(4, "big") + body


# --- servers ---------------------------------------------------------------------------------------------------------


class WeakServer:
    """paramiko as a server in this process, for what OpenSSH does no more; up to the key exchange."""

    def __init__(
        self,
        key: Optional[paramiko.PKey] = None,
        cipher: str = "aes128-gcm@openssh.com",
        strict_kex: bool = True,
    ) -> None:
        self._ours, theirs = socket.socketpair()
        policy = make_policy("compatible", ciphers=cipher)

        class Server(paramiko.Transport):
            _cipher_info = HardenedTransport._cipher_info
            _preferred_ciphers = policy.ciphers
            _preferred_macs = policy.macs
            _preferred_kex = ("curve25519-sha256@libssh.org",)

        self._server = Server(theirs, strict_kex=strict_kex)
        self._server.add_server_key(key or paramiko.ECDSAKey.generate())
        self._client: Optional[HardenedTransport] = None

    def __enter__(self) -> WeakServer:
        self._server.start_server(event=threading.Event())
        return self

    def handshake(self, policy: Policy = WITH_ECDSA) -> Any:
        self._client = HardenedTransport(self._ours, policy)
        return self._client.handshake(WAIT_S)

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._client.close()
        self._server.close()
        self._server.join(WAIT_S)


class AsyncsshEcho:
    """An asyncssh server in this process with one key exchange: subsystem "grumble" writes to stderr and ends, others echo."""

    user = "anyone"

    def __init__(self, kex: str = "curve25519-sha256") -> None:
        self._kex = kex
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._directory = Path(tempfile.mkdtemp())
        self.user_key = self._directory / "key"

    def __enter__(self) -> AsyncsshEcho:
        key = asyncssh.generate_private_key("ssh-ed25519")
        key.write_private_key(str(self.user_key))
        self._thread.start()

        async def serve() -> Any:
            return await asyncssh.listen(
                "127.0.0.1",
                0,
                server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
                authorized_client_keys=asyncssh.import_authorized_keys(key.export_public_key().decode()),
                kex_algs=[self._kex],
                encoding=None,
                process_factory=self._echo,
            )

        self._listener = asyncio.run_coroutine_threadsafe(serve(), self._loop).result(WAIT_S)
        self.port = self._listener.get_port()
        return self

    @staticmethod
    async def _echo(process: Any) -> None:
        if process.subsystem == "grumble":
            process.stderr.write(b"no \x1b[2J disk")
        else:
            while data := await process.stdin.read(65536):
                process.stdout.write(data)
        process.exit(0)

    def __exit__(self, *_: object) -> None:
        async def stop() -> None:
            self._listener.close()
            await self._listener.wait_closed()

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(WAIT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        self._loop.close()
        shutil.rmtree(self._directory)


class TamperingRelay:
    """A TCP relay for one connection; set ``tamper_at`` to flip a bit at this place of what the server sends next."""

    def __init__(self, port: int) -> None:
        self.tamper_at: Optional[int] = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._target = port
        self._sockets: List[socket.socket] = []

    def __enter__(self) -> TamperingRelay:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        server = socket.create_connection(("127.0.0.1", self._target))
        self._sockets = [client, server]
        in_thread(lambda: self._pump(client, server, False))
        self._pump(server, client, True)

    def _pump(self, source: socket.socket, target: socket.socket, may_tamper: bool) -> None:
        try:
            while data := bytearray(source.recv(65536)):
                if may_tamper and self.tamper_at is not None and len(data) > self.tamper_at:
                    data[self.tamper_at] ^= 1
                    self.tamper_at = None
                target.sendall(data)
        except OSError:
            pass
        for each in (source, target):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for each in self._sockets:
            each.close()
