"""The SSH binary packet protocol (RFC 4253 section 6) over a socket: what paramiko's Transport uses in place of its Packetizer.

It is written for bulk transfer from several threads, and for a transport thread that never waits for the network to take
bytes (a peer that waits for us to read, while we wait for it to read, would be a deadlock):

1. Packets are sealed in order, and queued (``sealing``).
2. Whoever holds ``_socket_lock`` empties the queue into the socket. A thread that must not wait leaves the rest to the
   holder, or to the reading thread, which then polls for writability too.
3. One thread reads at a time, under ``_reading``: the transport thread or, where it is alone, the one that waits for what comes
   next (``wait_for``), for as long as that comes soon. It takes as much from the socket as there is, and hands data and
   window adjustments straight to the channel's sink; everything else, also what goes wrong, is the transport thread's,
   which hands it to paramiko.
4. Who cannot send any more shuts the connection down, and what has come is read to its end.
5. The descriptor is closed only by ``release``, when no thread can be inside a system call on it; ``close`` shuts it down.

Locks: ``_socket_lock`` and the one of ``sealing`` are leaves, neither is taken with the other held. ``_reading`` is above
them, waited for by ``release`` alone, and held while a sink takes data.
"""

from __future__ import annotations

import select
import socket
import threading
from _thread import LockType
from struct import Struct
from time import monotonic, sleep
from typing import Any, Callable, Dict, Optional, Protocol, Tuple

from paramiko import Message, SSHException
from paramiko.packet import NeedRekeyException

from sftpmount import waiting
from sftpmount.ssh.chacha20 import BadTag
from sftpmount.ssh.ciphers import Clear, make_cipher
from sftpmount.ssh.sealing import CHANNEL_DATA, PACKET_BYTES_MAX, SCRATCH_BYTES, Gather, Sealed

_RECEIVE_BUFFER_BYTES = 1024 * 1024
_ROOM_FOR_A_PACKET_BYTES = PACKET_BYTES_MAX + 128  # with length field and tag
_BANNER_LINE_BYTES_MAX = 8192
_POLL_MS = 1000
_RESET_ON_CLOSE = Struct("ii").pack(1, 0)  # struct linger
_NAP_S = 0.001
# A reply that came within this time the last time is read by the thread that waits for it: to wake the transport thread, and
# have that wake the other, takes longer than a server on the same network needs to answer.
_HELP_S = 0.002
_LENT_MS = 2  # so long may lie what comes meanwhile and nobody waits for
_ATTEND_S = 0.002
_SEQUENCE_MASK = 0xFFFFFFFF
_REKEY_PACKETS = 2**31  # RFC 4344 section 3.1: before the sequence number comes round
# RFC 4253 section 9: what is safe with every cipher.
REKEY_BYTES = 2**30
REKEY_INTERVAL_S = 3600.0

_WINDOW_ADJUST = 93
_BULK = (_WINDOW_ADJUST, CHANNEL_DATA)
_DATA_FIELDS = Struct(
    ">BBII"
)  # the same without the packet length, as opened; WINDOW_ADJUST has these fields too


class Sink(Protocol):
    """A channel of ours, as far as bulk messages go; called in the thread that reads, must neither wait nor send."""

    def take(self, data: bytes) -> None: ...  # pragma: no cover

    def widen(self, count: int) -> None: ...  # pragma: no cover


class PacketStream:
    """Sealed packets over ``sock``, a connected stream socket. ``last_heard_s``: monotonic() of the last bytes received.

    ``sinks``: our channel number -> what takes its data and window adjustments; used while ``data_may_flow``.
    ``rekey_bytes_max`` and ``rekey_interval_s`` bound what is sealed or opened with one set of keys, once ``may_rekey``: OpenSSH
    takes no key exchange while it authenticates.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._closed = False
        self._released = False
        self._socket_lock = threading.Lock()
        self._sealed = Sealed()
        self._stalled = False  # the queue waits for the reading thread to find the socket writable
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._wake_fd = self._wake_out.fileno()
        self._socket_fd = sock.fileno()
        self._reader = select.poll()
        self._reader.register(self._wake_out, select.POLLIN)
        self._reader.register(sock, select.POLLIN)
        self._polls = select.POLLIN

        self._inbound: Any = Clear()
        self._sequence_in = 0
        self._plain_in = memoryview(bytearray(SCRATCH_BYTES))
        self._buffer = memoryview(bytearray(_RECEIVE_BUFFER_BYTES))
        self._start = self._end = 0  # what is received and not yet opened
        self._length: Optional[int] = None  # of the packet at _start, once known
        self._drained = False  # the socket has nothing more to read as far as we know
        self._reading = threading.Lock()  # held by who takes from the socket and opens packets
        self._lent = False  # the transport thread leaves that to another
        self._kept: Optional[Tuple[int, Message]] = None  # what such another found that is not for a sink
        self._failure: Optional[Exception] = None  # or what it met
        self._attends_until_s = 0.0
        self._last_wait_s = 0.0
        self._spin = waiting.Spin()
        self.sinks: Dict[int, Sink] = {}
        self.data_may_flow = False
        self.nobody_waits: Callable[[], bool] = lambda: False
        self.last_heard_s = monotonic()

        self.rekey_bytes_max = REKEY_BYTES
        self.rekey_interval_s = REKEY_INTERVAL_S
        self.may_rekey = False
        self.kex_deadline_s: Optional[float] = None  # set while keys are exchanged
        self._rekey_due = False
        self._rekey_at_s = self.last_heard_s + self.rekey_interval_s
        self._bytes_in = self._packets_in = 0
        self._initial_kex_done = False  # set by paramiko

    # --- what Transport configures -------------------------------------------------------------------------------

    def set_outbound_cipher(
        self,
        block_engine: Any,
        block_size: int,
        mac_engine: Any,
        mac_size: int,
        mac_key: bytes,
        sdctr: bool = False,
        etm: bool = False,
        aead: bool = False,
        iv_out: Optional[bytes] = None,
    ) -> None:
        cipher = make_cipher(block_engine, block_size, mac_engine, mac_size, mac_key, etm, aead, iv_out)
        self._sealed.set_cipher(cipher)

    def set_inbound_cipher(
        self,
        block_engine: Any,
        block_size: int,
        mac_engine: Any,
        mac_size: int,
        mac_key: bytes,
        etm: bool = False,
        aead: bool = False,
        iv_in: Optional[bytes] = None,
    ) -> None:
        self._inbound = make_cipher(block_engine, block_size, mac_engine, mac_size, mac_key, etm, aead, iv_in)
        self._bytes_in = self._packets_in = 0

    def reset_seqno_out(self) -> None:
        self._sealed.reset_sequence()

    def reset_seqno_in(self) -> None:
        self._sequence_in = 0

    def set_log(self, log: object) -> None:
        """Nothing is logged here: packets are too many, and their content is not for logs."""

    def start_handshake(self, timeout: float) -> None:
        """Nothing: HardenedTransport.handshake has the deadline."""

    def complete_handshake(self) -> None:
        """Nothing, as above."""

    # --- rekeying ------------------------------------------------------------------------------------------------

    def need_rekey(self) -> bool:
        """True when the keys have done their work and no exchange is going on."""
        return self._rekey_due and self.kex_deadline_s is None

    def request_rekey(self) -> None:
        """Have the transport thread exchange keys now."""
        self._rekey_due = True
        self._wake()

    def kex_started(self, deadline_s: float) -> None:
        self.kex_deadline_s = deadline_s
        self._rekey_due = False

    def kex_finished(self) -> None:
        self.kex_deadline_s = None
        self._rekey_due = False
        self._rekey_at_s = monotonic() + self.rekey_interval_s

    # --- sending -------------------------------------------------------------------------------------------------

    def seal(self, payload: bytes) -> None:
        """Queue one packet; ``flush`` sends it."""
        self._sealed.seal(payload)
        self._note_sealed()

    def seal_data(self, channel: int, source: Gather, size: int, packet_bytes_max: int) -> None:
        """Queue the next ``size`` bytes of ``source`` as CHANNEL_DATA packets for the peer's ``channel``."""
        self._sealed.seal_data(channel, source, size, packet_bytes_max)
        self._note_sealed()

    def _note_sealed(self) -> None:
        worn = self._sealed.bytes >= self.rekey_bytes_max or self._sealed.packets >= _REKEY_PACKETS
        if worn and not self._rekey_due and self.kex_deadline_s is None and self.may_rekey:
            self.request_rekey()

    def write_all(self, data: bytes) -> None:
        """Send bytes as they are: our version line."""
        self._sealed.queue.append(memoryview(data))
        self.flush(block=True)

    def flush(self, block: bool) -> None:
        """Hand queued packets to the socket: all of them with ``block``, else what it takes now.

        What is left, also where nobody waits any more, is for the transport thread to send. Raises EOFError where the
        connection is over; without ``block`` where it is closed only, since the reading thread finds out about the rest.
        """
        while (
            self._sealed.queue
        ):  # again after the release: what another thread queued meanwhile is ours to send
            while not self._socket_lock.acquire(blocking=False):
                if not block or waiting.interrupted():
                    return  # who has the lock sends it
                waiting.step_aside()
                if self._socket_lock.acquire(timeout=waiting.POLL_S):
                    break
            try:
                if not self._drain(block):
                    return
            finally:
                self._socket_lock.release()

    def _drain(self, block: bool) -> bool:
        queue = self._sealed.queue
        while queue:
            if self._closed:
                raise EOFError("the connection is closed")
            data = queue[0]
            try:
                sent = self._socket.send(data)
            except (BlockingIOError, InterruptedError):
                if not block or waiting.interrupted():
                    self._stalled = True
                    self._wake()
                    return False
                self._wait_writable()
                continue
            except OSError as error:
                # What came before is still to be read: a reply that has arrived is no lost one.
                self._shut_down()
                if not block:
                    return False
                raise EOFError(str(error)) from error
            if sent == len(data):
                self._sealed.spend(queue.popleft())
            else:
                queue[0] = data[sent:]
        return True

    def _wait_writable(self) -> None:
        waiting.step_aside()
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        poll.poll(int(waiting.POLL_S * 1000))

    # --- receiving -----------------------------------------------------------------------------------------------

    def read_message(self) -> Tuple[int, Message]:
        """The next message that is not data of a channel with a sink. Transport thread only.

        Raises EOFError, SSHException for what no honest peer sends, NeedRekeyException when keys should be exchanged first.
        """
        while True:
            if self._reading.acquire(blocking=False):
                try:
                    message = self._read(lambda: True)
                finally:
                    self._reading.release()
                if message is not None:
                    return message
            else:
                self._lent = True
            self._wait_readable()

    def wait_for(self, lock: LockType) -> None:
        """Acquire ``lock``, which what arrives will release, and read it in this thread where that spares waking another.

        Raises FsError (EINTR).
        """
        began_s = monotonic()
        if self._last_wait_s < _HELP_S and lock.locked():
            self._help(lock)
        waiting.acquire(lock)
        self._last_wait_s = monotonic() - began_s

    def _help(self, lock: LockType) -> None:
        """Read until ``lock`` is free, unless the transport thread had better do it: others wait too, or keys are exchanged."""
        if not self._may_help() or not self._reading.acquire(blocking=False):
            return
        spin = self._spin
        spin.begin()
        try:
            while self._may_help():
                self._drained = False
                self._kept = self._read(lock.locked)
                if not lock.locked():
                    spin.end()
                    break
                if self._kept is not None:
                    break
                if spin.again():
                    waiting.let_others()
                elif not waiting.for_input(self._socket_fd, _HELP_S):
                    break
        except NeedRekeyException:
            pass  # the transport thread's next wait finds out, too
        except Exception as error:
            self._failure = error
        finally:
            self._reading.release()
        if self._kept is not None or self._failure is not None or self._rekey_due:
            self._wake()
        elif not self.nobody_waits():
            self.attend()

    def _may_help(self) -> bool:
        is_theirs = self.kex_deadline_s is not None or self._rekey_due or not self.data_may_flow
        is_over = self._closed or self._failure is not None
        return not (is_theirs or is_over or self._kept is not None or monotonic() < self._attends_until_s)

    def attend(self) -> None:
        """Someone waits for what arrives, and does not read it: the transport thread is to, and soon."""
        self._attends_until_s = monotonic() + _ATTEND_S
        if self._lent:
            self._wake()

    def _read(self, go_on: Callable[[], bool]) -> Optional[Tuple[int, Message]]:
        """Take what the socket has, while ``go_on()``, and hand it on; returns the first message that no sink is for.

        For who holds ``_reading``. None where nothing more is there. Raises as ``read_message``.
        """
        if self._failure is not None:
            raise self._failure
        message, self._kept = self._kept, None
        while message is None:
            size = self._next_packet()
            if size is not None:
                message = self._hand_on(size)
                if message is None and self._rekey_due and self.kex_deadline_s is None:
                    raise NeedRekeyException
            elif not go_on() or not self._receive():
                break
        return message

    def _hand_on(self, size: int) -> Optional[Tuple[int, Message]]:
        """What to do with the packet in ``_plain_in``: data goes to its sink, another message is returned."""
        plain = self._plain_in
        sequence = self._sequence_in
        self._sequence_in = (sequence + 1) & _SEQUENCE_MASK
        if self._sequence_in == 0 and not self._initial_kex_done:
            raise SSHException("sequence number rolled over during the initial key exchange")
        padding, kind, channel, count = _DATA_FIELDS.unpack_from(plain)
        if padding < 4 or padding + 2 > size:
            raise SSHException("packet with impossible padding")
        if kind in _BULK and self.data_may_flow:
            sink = self.sinks.get(channel)
            if sink is not None:
                if 10 + padding + (count if kind == CHANNEL_DATA else 0) > size:
                    raise SSHException("a message longer than its packet")
                if kind == CHANNEL_DATA:
                    sink.take(bytes(plain[10 : 10 + count]))
                else:
                    sink.widen(count)
                return None
        message = Message(bytes(plain[2 : size - padding]))
        message.seqno = sequence
        return kind, message

    def _next_packet(self) -> Optional[int]:
        """Open the next packet into ``_plain_in``; returns its length (padding length, payload and padding).

        None where the buffer does not hold all of it.
        """
        cipher = self._inbound
        start, received = self._start, self._end - self._start
        if self._length is None:
            if received < cipher.head_size:
                return None
            length = cipher.length(self._sequence_in, self._buffer[start : start + cipher.head_size])
            covered = length + 4 if cipher.pads_length_field else length
            if length < 6 or length > PACKET_BYTES_MAX or covered % cipher.block_size:
                raise SSHException("corrupt packet length")
            self._length = length
        length = self._length
        total: int = 4 + length + cipher.tag_size
        if received < total:
            return None
        try:
            cipher.open(self._sequence_in, self._buffer[start : start + total], self._plain_in)
        except BadTag:
            raise SSHException("packet with a wrong MAC: corrupted or tampered with on the way") from None
        self._start = start + total
        self._length = None
        self._bytes_in += total
        self._packets_in += 1
        if self.kex_deadline_s is not None:
            if monotonic() > self.kex_deadline_s:
                raise SSHException("the server does not finish the key exchange")
        elif self._bytes_in >= self.rekey_bytes_max or self._packets_in >= _REKEY_PACKETS:
            self._rekey_due = self.may_rekey
        return length

    def _receive(self) -> bool:
        """Take what the socket has; False where that is nothing. Raises EOFError."""
        if self._drained:
            return False
        buffer = self._buffer
        if self._start == self._end:
            self._start = self._end = 0
        elif len(buffer) - self._start < _ROOM_FOR_A_PACKET_BYTES:
            kept = self._end - self._start
            buffer[:kept] = bytes(buffer[self._start : self._end])
            self._start, self._end = 0, kept
        try:
            got = self._socket.recv_into(buffer[self._end :])
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            raise EOFError(str(error)) from error
        if got == 0:
            raise EOFError("the server closed the connection")
        # It had less than it was asked for: do not ask in vain.
        self._drained = self._end + got < len(buffer)
        self._end += got
        self.last_heard_s = monotonic()
        if self._stalled:
            self._stalled = False
            self.flush(block=False)
        if self.last_heard_s >= self._rekey_at_s:
            self._rekey_due = self.may_rekey
        return True

    def _wait_readable(self) -> None:
        """Wait for bytes, or for who reads in our stead; meanwhile send what is stalled. Transport thread only.

        Raises NeedRekeyException, EOFError once closed.
        """
        events = (0 if self._lent else select.POLLIN) | (select.POLLOUT if self._stalled else 0)
        if events != self._polls:
            self._polls = events
            self._reader.modify(self._socket, events)
        writable = False
        ready = self._reader.poll(_LENT_MS if self._lent else _POLL_MS)
        if self._lent:
            self._lent = self._reading.locked() and not ready
        elif self.nobody_waits():
            # A wake-up for each acknowledgement and each window adjustment of a bulk write costs a tenth of its speed.
            sleep(_NAP_S)
        self._drained = False
        for descriptor, found in ready:
            if descriptor == self._wake_fd:
                self._wake_out.recv(4096)
            else:
                writable = bool(found & select.POLLOUT)
        if self._closed:
            raise EOFError("the connection is closed")
        if self._stalled and writable:
            self._stalled = False
            self.flush(block=False)
        now = monotonic()
        if self.kex_deadline_s is not None:
            if now > self.kex_deadline_s:
                raise SSHException("the server does not finish the key exchange")
        elif self._rekey_due or (now >= self._rekey_at_s and self.may_rekey):
            self._rekey_due = True
            raise NeedRekeyException

    def readline(self, timeout: float) -> str:
        """A line of the server's greeting. Raises EOFError, SSHException; the time is HardenedTransport.handshake's to keep."""
        while True:
            line = bytes(self._buffer[self._start : self._end])
            end = line.find(b"\n")
            if end >= 0:
                self._start += end + 1
                return line[:end].rstrip(b"\r").decode("utf-8", "replace")
            if len(line) > _BANNER_LINE_BYTES_MAX:
                raise SSHException("no SSH greeting: a line without end")
            if not self._receive():
                try:
                    self._wait_readable()
                except NeedRekeyException:
                    pass

    # --- the end -------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """End the reading thread's wait."""
        try:
            self._wake_in.send(b"w")
        except OSError:
            pass  # the pipe is full, so it will wake; or everything is over

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self, *, and_forget: bool = False) -> None:
        """Shut the connection down: every wait in it ends at once. Idempotent, from any thread; never waits.

        With ``and_forget`` the kernel sends nothing more of what we gave it: on a line that comes back after a minute, it
        would change files under those who have done other things with them since.
        """
        self._closed = True
        try:
            if and_forget:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        except OSError:
            pass  # no TCP, or gone
        self._shut_down()

    def _shut_down(self) -> None:
        """Nothing comes or goes any more; what has come can be read."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # never connected, or gone
        self._wake()

    def release(self) -> None:
        """Close the descriptors, after ``close`` and once nothing reads any more."""
        self.close()
        with self._reading, self._socket_lock:  # both are left at once where the connection is shut down
            if not self._released:
                self._released = True
                self._sealed.queue.clear()
                self._socket.close()
                self._wake_in.close()
                self._wake_out.close()
