"""The tests' own tools are what they say: the server, the bad network, and the clean-up after both."""

from __future__ import annotations

import getpass
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import pytest

from support.asyncssh_server import AsyncsshServer
from support.listener import Listener
from support.mount import Mount, MountFailed, SshfsMount, fuse_mounts, unmount_stale
from support.process import descendants, is_running, program, wait_until
from support.relay import Relay
from support.sshd import Server, Sshd, keygen, ssh_options

MiB = 1024 * 1024


# ---- Sshd ----


def run_ssh(sshd: Sshd, *command: str) -> subprocess.CompletedProcess[str]:
    words = [program("ssh", "openssh-client"), *ssh_options(sshd), "127.0.0.1", *command]
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)


def run_sftp(
    server: Server, batch: str, *options: str, port: Optional[int] = None
) -> subprocess.CompletedProcess[str]:
    words = [program("sftp", "openssh-client"), *ssh_options(server, port), *options, "-b", "-", "127.0.0.1"]
    return subprocess.run(words, input=batch, capture_output=True, text=True, timeout=30)


class HeldFile:
    """OpenSSH's sftp in the middle of a transfer: it holds a file under ``sshd.tree`` open, through ``port``."""

    def __init__(self, sshd: Sshd, tmp_path: Path, port: Optional[int] = None) -> None:
        source = tmp_path / "big"
        with source.open("wb") as file:
            file.truncate(1024 * MiB)
        words = [
            program("sftp", "openssh-client"),
            *ssh_options(sshd, port),
            "-l",
            "8000",
            "-b",
            "-",
            "127.0.0.1",
        ]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        assert self.process.stdin is not None
        self.process.stdin.write(f"put {source} {sshd.tree / 'held'}\n".encode())
        self.process.stdin.flush()
        held = sshd.tree / "held"
        wait_until(lambda: held.exists() and held.stat().st_size > 0, 20, "a transfer that runs")

    def end(self) -> int:
        assert self.process.stdin is not None
        self.process.terminate()
        self.process.stdin.close()
        return self.process.wait(timeout=20)


@pytest.fixture
def held_file(own_sshd: Sshd, tmp_path: Path) -> Iterator[HeldFile]:
    held = HeldFile(own_sshd, tmp_path)
    yield held
    held.end()


def test_openssh_client_reads_and_writes(sshd: Sshd, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(100_000))
    target = sshd.tree / "by-openssh"
    result = run_sftp(sshd, f"put {source} {target}\nget {target} {tmp_path / 'back'}\n")
    assert result.returncode == 0, result.stderr
    assert target.read_bytes() == source.read_bytes() == (tmp_path / "back").read_bytes()


def test_offer_is_that_of_the_guide(sshd: Sshd) -> None:
    result = run_ssh(sshd, "-v", "true")
    assert "kex: host key algorithm: ssh-ed25519" in result.stderr
    refused = run_ssh(sshd, "-o", "Ciphers=aes128-cbc", "true")
    assert refused.returncode == 255
    assert (
        "no matching cipher found. Their offer: chacha20-poly1305@openssh.com,aes256-gcm@openssh.com"
        in refused.stderr
    )


def test_commands_run_only_where_permitted(sshd: Sshd, tmp_path: Path) -> None:
    assert "permitted" not in run_ssh(sshd, "echo", "permitted").stdout
    with Sshd(tmp_path, sftp_only=False, host_key_types=["ed25519"]) as open_to_commands:
        assert run_ssh(open_to_commands, "echo", "permitted").stdout == "permitted\n"


def test_shells_of_the_server_read_no_startup_files_of_the_user(tmp_path: Path) -> None:
    with Sshd(tmp_path, sftp_only=False, host_key_types=["ed25519"]) as sshd:
        home = Path(run_ssh(sshd, "echo", "$HOME").stdout.rstrip("\n"))
        assert home.is_relative_to(tmp_path)
        assert list(home.iterdir()) == []


def test_external_sftp_server(tmp_path: Path) -> None:
    with Sshd(tmp_path, sftp_server="/usr/lib/openssh/sftp-server", host_key_types=["ed25519"]) as sshd:
        assert run_sftp(sshd, f"mkdir {sshd.tree / 'made'}\n").returncode == 0
        assert (sshd.tree / "made").is_dir()


def test_extra_config_wins(tmp_path: Path) -> None:
    with Sshd(tmp_path, "Ciphers aes128-gcm@openssh.com\n", host_key_types=["ed25519"]) as sshd:
        refused = run_ssh(sshd, "-o", "Ciphers=chacha20-poly1305@openssh.com", "true")
        assert "Their offer: aes128-gcm@openssh.com\n" in refused.stderr.replace("\r", "")


def test_failure_to_start_shows_the_log(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="Bad configuration option: NoSuchOption"):
        Sshd(tmp_path, "NoSuchOption yes\n", host_key_types=["ed25519"]).start()


def test_another_key_is_refused(sshd: Sshd, tmp_path: Path) -> None:
    other = keygen(tmp_path / "other", "ed25519")
    result = run_ssh(
        sshd, "-o", f"IdentityFile={other}", "true"
    )  # the first IdentityFile is sshd's own: it works
    assert result.returncode != 255
    words = [word for word in ssh_options(sshd) if "IdentityFile" not in word]
    command = [program("ssh", "openssh-client"), "-i", str(other), *words, "127.0.0.1", "true"]
    refused = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)
    assert "Permission denied (publickey)" in refused.stderr


def test_open_files_counts_what_a_session_holds(own_sshd: Sshd, tmp_path: Path) -> None:
    (own_sshd.tree / "closed").touch()
    assert own_sshd.open_files() == 0
    held = HeldFile(own_sshd, tmp_path)
    try:
        assert own_sshd.open_files() == 1
    finally:
        held.end()
    wait_until(lambda: own_sshd.open_files() == 0, 10, "the end of the session")


@pytest.mark.parametrize("end", [Sshd.stop, Sshd.kill], ids=["stop", "kill"])
def test_nothing_survives_the_server(
    own_sshd: Sshd, held_file: HeldFile, end: Callable[[Sshd], None]
) -> None:
    assert own_sshd.pid is not None
    family = [own_sshd.pid, *descendants(own_sshd.pid)]
    assert len(family) >= 2
    end(own_sshd)
    assert not any(map(is_running, family))
    assert held_file.process.wait(timeout=20) != 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", own_sshd.port)).close()


def test_restart_keeps_port_and_keys(own_sshd: Sshd) -> None:
    port, pid = own_sshd.port, own_sshd.pid
    own_sshd.restart()
    assert own_sshd.port == port and own_sshd.pid != pid
    assert run_sftp(own_sshd, "pwd\n").returncode == 0


def test_kill_sessions_leaves_the_listener(own_sshd: Sshd, held_file: HeldFile) -> None:
    own_sshd.kill_sessions()
    assert held_file.process.wait(timeout=20) != 0
    assert own_sshd.sessions() == []
    assert run_sftp(own_sshd, "pwd\n").returncode == 0


def test_paused_server_says_nothing_until_resumed(own_sshd: Sshd) -> None:
    own_sshd.pause()
    with socket.create_connection(("127.0.0.1", own_sshd.port), timeout=0.3) as client:  # the kernel accepts
        with pytest.raises(socket.timeout):
            client.recv(4)
        own_sshd.resume()
        client.settimeout(10)
        assert client.recv(4) == b"SSH-"


def test_asyncssh_server_is_as_hard(tmp_path: Path) -> None:
    with AsyncsshServer(tmp_path) as server:
        assert getpass.getuser() == server.user
        (tmp_path / "source").write_bytes(os.urandom(100_000))
        batch = f"put {tmp_path / 'source'} {server.tree / 'target'}\n"
        result = run_sftp(server, batch)
        assert result.returncode == 0, result.stderr
        assert (server.tree / "target").read_bytes() == (tmp_path / "source").read_bytes()
        refused = run_sftp(server, batch, "-oCiphers=aes128-cbc")
        assert refused.returncode == 255 and "no matching cipher found" in refused.stderr
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port)).close()


# ---- Relay ----


class Echo:
    """A TCP server on 127.0.0.1. It keeps what it receives, and sends it back unless told to be silent."""

    def __init__(self, *, silent: bool = False) -> None:
        self.received: List[bytearray] = []
        self.errors: List[Optional[OSError]] = []
        self._silent = silent
        self._threads: List[threading.Thread] = []
        self._listener = Listener(self._accept)
        self.port = self._listener.port

    def __enter__(self) -> Echo:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()

    def _accept(self, client: socket.socket) -> None:
        self.received.append(bytearray())
        self.errors.append(None)
        self._threads.append(threading.Thread(target=self._serve, args=(client, len(self.received) - 1)))
        self._threads[-1].start()

    def _serve(self, client: socket.socket, number: int) -> None:
        with client:
            try:
                while True:
                    data = client.recv(65536)
                    if not data:
                        return
                    self.received[number] += data
                    if not self._silent:
                        client.sendall(data)
            except OSError as error:
                self.errors[number] = error


@pytest.fixture
def echo() -> Iterator[Echo]:
    with Echo() as server:
        yield server


@pytest.fixture
def sink() -> Iterator[Echo]:
    with Echo(silent=True) as server:
        yield server


def connect(relay: Relay, timeout_s: float = 20.0) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", relay.port), timeout=timeout_s)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def receive(client: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = client.recv(min(65536, count - len(data)))
        if not part:
            break
        data += part
    return bytes(data)


def ask(client: socket.socket, question: bytes = b"?") -> bytes:
    client.sendall(question)
    return receive(client, len(question))


def send_in_background(client: socket.socket, data: bytes) -> threading.Thread:
    def send() -> None:
        try:
            client.sendall(data)
        except OSError:
            pass

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_relay_hands_on_every_byte_and_the_end(echo: Echo) -> None:
    data = os.urandom(8 * MiB)
    with Relay(echo.port) as relay, connect(relay) as client:
        sender = send_in_background(client, data)
        assert receive(client, len(data)) == data
        sender.join()
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        wait_until(lambda: relay.stats()["open"] == 0, 5, "the end of the connection")
        assert relay.stats() == {"up": len(data), "down": len(data), "accepted": 1, "open": 0, "resets": 0}


def test_delay_is_the_round_trip_asked_for(echo: Echo) -> None:
    with Relay(echo.port, rtt_ms=40) as relay, connect(relay) as client:
        ask(client)
        times = []
        for _ in range(11):
            start = time.perf_counter()
            ask(client)
            times.append(time.perf_counter() - start)
    assert 0.040 <= min(times) < 0.055  # the least: a busy machine may spoil single ones


def test_delay_does_not_limit_the_rate(echo: Echo) -> None:
    """A delay line, not a pause per packet: 16 MiB take about one round trip more than without delay."""
    data = os.urandom(16 * MiB)
    times: List[float] = []
    while len(times) < 5 and min(times, default=9.0) >= 2.0:  # again where a busy machine spoiled it
        with Relay(echo.port, rtt_ms=100) as relay, connect(relay) as client:
            start = time.perf_counter()
            sender = send_in_background(client, data)
            assert receive(client, len(data)) == data
            times.append(time.perf_counter() - start)
            sender.join()
    assert 0.1 <= min(times) < 2.0


@pytest.mark.parametrize("direction", ["up", "down"])
def test_rate_is_the_one_asked_for(echo: Echo, direction: str) -> None:
    data = os.urandom(25_000_000 // 2)  # half a second at 200 Mbit/s
    times: List[float] = []
    while len(times) < 5 and min(times, default=9.0) >= 0.75:  # again where a busy machine spoiled it
        with Relay(echo.port) as relay, connect(relay) as client:
            relay.set_line(rtt_ms=40, **{f"{direction}_bps": 200e6})
            start = time.perf_counter()
            sender = send_in_background(client, data)
            assert receive(client, len(data)) == data
            times.append(time.perf_counter() - start)
            sender.join()
    assert 0.5 + 0.040 - 0.001 <= min(times) < 0.75


def test_queue_is_bounded(sink: Echo) -> None:
    """At 1 Mbit/s a sender soon waits: the kernel's buffers and 256 KiB of queue are all that it can get rid of."""
    with Relay(sink.port, up_bps=1e6) as relay, connect(relay) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        sent = client.send(bytes(16 * 1024))
        wait_until(lambda: relay.stats()["up"] > 0, 20, "the relay to be at work")
        client.settimeout(1.0)
        with pytest.raises(socket.timeout):
            while True:
                sent += client.send(bytes(16 * 1024))
    assert 256 * 1024 < sent < 2 * MiB


def test_small_packets_wait_behind_the_queue_only(echo: Echo) -> None:
    """A second connection's byte is not queued behind the first one's bytes: each connection has its own line."""
    with Relay(echo.port, up_bps=1e6) as relay, connect(relay) as bulk, connect(relay) as small:
        ask(bulk)
        ask(small)
        sender = send_in_background(bulk, bytes(MiB))
        start = time.perf_counter()
        assert ask(small) == b"?"
        assert time.perf_counter() - start < 1.5  # bulk's queue alone takes 2.1 s
        relay.reset()
        sender.join()


def test_stall_holds_back_and_flow_delivers(echo: Echo) -> None:
    with Relay(echo.port) as relay, connect(relay) as client:
        ask(client)
        relay.stall()
        client.settimeout(0.3)
        client.sendall(b"held back")
        with pytest.raises(socket.timeout):
            client.recv(1)
        with connect(relay, 0.3) as other, pytest.raises(socket.timeout):
            ask(other)
        assert bytes(echo.received[0]) == b"?"
        relay.flow()
        client.settimeout(20)
        assert receive(client, 9) == b"held back"


def test_stall_of_one_direction(echo: Echo) -> None:
    with Relay(echo.port) as relay, connect(relay) as client:
        relay.stall("down")
        client.settimeout(0.3)
        client.sendall(b"heard")
        wait_until(lambda: [bytes(each) for each in echo.received] == [b"heard"], 20, "the way up")
        with pytest.raises(socket.timeout):
            client.recv(1)


def test_silent_death_where_new_connections_work(echo: Echo) -> None:
    with Relay(echo.port) as relay, connect(relay) as old:
        ask(old)
        relay.stall(new_connections=False)
        with connect(relay) as new:
            assert ask(new, b"works") == b"works"
        old.settimeout(0.3)
        old.sendall(b"x")
        with pytest.raises(socket.timeout):
            old.recv(1)


def test_reset_reaches_both_sides(echo: Echo) -> None:
    with Relay(echo.port, rtt_ms=20) as relay, connect(relay) as client:
        ask(client)
        relay.reset()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        wait_until(lambda: echo.errors[0] is not None, 5, "the reset of the server's side")
        assert isinstance(echo.errors[0], ConnectionResetError)
        with connect(relay) as again:
            assert ask(again) == b"?"


@pytest.mark.parametrize("count", [1, 4095, 100_000, 3 * MiB + 1])
@pytest.mark.parametrize(
    "line", [{}, {"rtt_ms": 20}, {"rtt_ms": 10, "up_bps": 400e6}], ids=["free", "far", "slow"]
)
def test_reset_after_delivers_exactly_so_many(sink: Echo, count: int, line: Dict[str, Any]) -> None:
    with Relay(sink.port, **line) as relay, connect(relay) as client:
        client.sendall(b"before")
        wait_until(lambda: relay.stats()["up"] == 6, 5, "the first bytes")
        relay.reset_after(count)
        sender = send_in_background(client, bytes(count + MiB))
        wait_until(lambda: sink.errors[:1] not in ([], [None]), 20, "the reset")
        sender.join(20)
        assert not sender.is_alive()
        assert len(sink.received[0]) == 6 + count
        with connect(relay) as again:  # one-shot
            again.sendall(b"after")
            wait_until(lambda: sink.received[1:] == [b"after"], 5, "bytes after the reset")


def test_reset_after_again_and_again(sink: Echo) -> None:
    with Relay(sink.port) as relay:
        relay.reset_after(1000, times=3)
        for _ in range(3):
            with connect(relay) as client:
                client.sendall(bytes(2000))
                with pytest.raises(ConnectionResetError):
                    client.recv(1)
        with connect(relay) as client:
            client.sendall(bytes(2000))
            wait_until(lambda: sum(map(len, sink.received)) == 5000, 5, "bytes after the last reset")
        assert list(map(len, sink.received)) == [1000, 1000, 1000, 2000]
        assert relay.stats()["resets"] == 3


def test_reset_after_counts_replies_too(echo: Echo) -> None:
    with Relay(echo.port) as relay, connect(relay) as client:
        relay.reset_after(3, "down")
        client.sendall(b"abcdef")
        assert receive(client, 3) == b"abc"
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_corrupt_flips_one_bit_once(echo: Echo) -> None:
    data = bytes(300_000)
    with Relay(echo.port) as relay, connect(relay) as client:
        relay.corrupt_after(123_456, "down")
        sender = send_in_background(client, data)
        answer = receive(client, len(data))
        sender.join()
        assert [i for i in range(len(data)) if answer[i]] == [123_456]
        assert bin(answer[123_456]).count("1") == 1
        assert bytes(echo.received[0]) == data
        assert ask(client, b"clean") == b"clean"


def test_end_is_an_orderly_end(echo: Echo) -> None:
    with Relay(echo.port) as relay, connect(relay) as client:
        ask(client)
        relay.end("down")
        assert client.recv(1) == b""


def test_refuse_and_take_again(echo: Echo) -> None:
    with Relay(echo.port) as relay, connect(relay) as open_one:
        ask(open_one)
        relay.refuse()
        with pytest.raises(ConnectionRefusedError):
            connect(relay)
        assert ask(open_one) == b"?"
        relay.refuse(False)
        with connect(relay) as client:
            assert ask(client) == b"?"


def test_server_that_is_down_resets_the_client(echo: Echo) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with Relay(port) as relay:
        # By connect() itself where the relay is quick.
        with pytest.raises(ConnectionResetError), connect(relay) as client:
            client.recv(1)
        relay.set_target(echo.port)
        with connect(relay) as client:
            assert ask(client) == b"?"


def test_reset_by_the_client_reaches_the_server(echo: Echo) -> None:
    with Relay(echo.port) as relay:
        client = connect(relay)
        ask(client)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        wait_until(lambda: echo.errors[0] is not None, 5, "the reset")


def test_bad_arguments_are_told(echo: Echo) -> None:
    with Relay(echo.port) as relay:
        with pytest.raises(ValueError, match="sideways"):
            relay.stall("sideways")
        assert relay.stats()["open"] == 0


def test_relay_ends_with_its_owner(echo: Echo) -> None:
    relay = Relay(echo.port)
    with connect(relay) as client:
        ask(client)
        relay.close()
        assert not is_running(relay.pid)
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_ssh_through_a_slow_and_corrupting_relay(sshd: Sshd, relay: Relay, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(MiB))
    target = sshd.tree / "through-relay"
    relay.set_line(rtt_ms=20, up_bps=100e6, down_bps=100e6)
    result = run_sftp(sshd, f"put {source} {target}\n", port=relay.port)
    assert result.returncode == 0, result.stderr
    assert target.read_bytes() == source.read_bytes()
    relay.corrupt_after(500_000, "up")
    assert run_sftp(sshd, f"put {source} {target}\n", port=relay.port).returncode != 0


# ---- Mount ----


@pytest.mark.parametrize("kind", [Mount, SshfsMount])
def test_mount_stores_and_ends(sshd: Sshd, tmp_path: Path, kind: Callable[..., Mount]) -> None:
    (sshd.tree / tmp_path.name).mkdir()
    with kind(sshd, tmp_path, subdir=tmp_path.name) as mount:
        assert mount.is_mounted and mount.is_running
        (mount.path / "file").write_bytes(b"through the mount")
        assert mount.rss_bytes() > MiB and mount.fd_count() > 3
        assert mount.unmount() == 0
        assert (mount.served / "file").read_bytes() == b"through the mount"
        assert not mount.is_mounted and not mount.is_running and list(mount.path.iterdir()) == []


def test_mount_through_a_relay(sshd: Sshd, relay: Relay, tmp_path: Path) -> None:
    with Mount(sshd, tmp_path, port=relay.port) as mount:
        list(mount.path.iterdir())
        assert relay.stats()["open"] == 1


def test_kill_leaves_no_mountpoint(mount: Mount) -> None:
    mount.kill()
    assert mount.exit_status == -signal.SIGKILL
    assert not mount.is_mounted and list(mount.path.iterdir()) == []


def test_terminate_unmounts(mount: Mount) -> None:
    mount.terminate()
    assert mount.wait() == 0
    assert not mount.is_mounted


def test_failed_mount_tells_what_the_command_said(sshd: Sshd, tmp_path: Path) -> None:
    with pytest.raises(MountFailed, match="absent") as failure:
        Mount(sshd, tmp_path, subdir="absent")
    assert failure.value.exit_status == 9
    assert [path for path, _ in fuse_mounts() if path.startswith(str(tmp_path))] == []


def test_close_gets_rid_of_a_busy_mount_of_a_dead_server(own_sshd: Sshd, tmp_path: Path) -> None:
    (own_sshd.tree / "file").write_bytes(b"x")
    with Mount(own_sshd, tmp_path) as mount:
        descriptor = os.open(mount.path / "file", os.O_RDONLY)
        own_sshd.pause()
        mount.close()
        assert not mount.is_mounted and not mount.is_running
        with pytest.raises(OSError, match="not connected"):
            os.close(descriptor)
    own_sshd.resume()


def test_stale_mounts_are_swept_only_below(sshd: Sshd, tmp_path: Path) -> None:
    with Mount(sshd, tmp_path / "swept") as swept, Mount(sshd, tmp_path / "kept") as kept:
        os.kill(swept.pid, signal.SIGKILL)
        assert unmount_stale(tmp_path / "swept") == [str(swept.path)]
        assert not swept.is_mounted and kept.is_mounted
