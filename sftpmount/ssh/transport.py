"""An authenticated SSH connection and its channels, for bulk data from many threads.

Receiving: channel data goes from the thread that reads straight to ``on_data``, under a window so large that it is topped up
rarely, and then without waiting. Sending: full packets, a batch of them with one system call, as much as the server's window
takes. A dead connection is never silent: whoever sends or waits gets ConnectionLost.

Lock order: Channel._send_lock < Channel._lock; neither _lock nor any lock below is held while something is sent.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from _thread import LockType
from dataclasses import asdict
from time import monotonic
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Union

import paramiko
from paramiko import Message, SSHException

from sftpmount import waiting
from sftpmount.errors import ChannelRefused, ConnectionLost
from sftpmount.ssh.chacha20 import Buffer
from sftpmount.ssh.hardened import HardenedTransport, Negotiated
from sftpmount.ssh.policy import printable
from sftpmount.ssh.sealing import Gather

__all__ = ["Channel", "Connection", "HardenedTransport", "Negotiated"]

# What we let the server send before we say more: requests in flight bound it for an honest one, the session for others.
_WINDOW_BYTES = 2**30
_PACKET_BYTES_IN = 32768
_PACKET_BYTES_OUT_MAX = 128 * 1024
# Handed to the socket at once: a WRITE of 128 KiB with its header. A request of another channel waits no longer than for this.
_BATCH_BYTES = 132 * 1024
_CHANNEL_TIMEOUT_S = 60.0

# Message numbers (RFC 4250 section 4.1.2).
_DISCONNECT = 1
_GLOBAL_REQUEST = 80
_CHANNEL_OPEN, _WINDOW_ADJUST = 90, 93
_CHANNEL_CLOSE, _CHANNEL_REQUEST, _CHANNEL_FAILURE = 97, 98, 100
_BY_APPLICATION = 11


class Channel:
    """A session channel that runs a subsystem; made by Connection.open_subsystem. Sending is thread-safe."""

    def __init__(
        self,
        transport: HardenedTransport,
        number: int,
        on_data: Callable[[bytes], None],
        on_closed: Callable[[Exception], None],
    ) -> None:
        self._transport = transport
        self._number = number
        self._on_data = on_data
        self._on_closed = on_closed
        self._send_lock = waiting.RLock()  # held for a whole send(), so that what it sends stays together
        # By who holds the lock: each ``parts`` that are to be sent when it leaves ``together``.
        self._held_up: Optional[List[Sequence[Buffer]]] = None
        self._lock = threading.RLock()  # guards what follows
        self._changed = threading.Condition(self._lock)
        self._peer = -1  # the server's number of the channel, once open
        self._packet_bytes_max = 0
        self._window_out = 0
        self._window_bytes_max = 0
        self._is_open = False  # the subsystem runs: from here on on_closed tells the end
        self._refused: Optional[str] = None
        self._closing = False
        self._ended: Optional[Exception] = None
        # for the thread that reads:
        self._consumed = 0  # of the window we granted, since the last top-up
        self._stderr = b""

    def send(self, *parts: Buffer) -> None:
        """Send the concatenation of ``parts``, unbroken by other senders of this channel; returns when the socket has all of it.

        Waits for the server's window, the socket and key exchanges. Raises ConnectionLost; what was sent then is unknown. Raises
        FsError (EINTR) where nothing was sent and nobody waits for it any more.
        """
        with self._send_lock:
            if self._held_up is None:
                self._send(parts)
            else:
                self._held_up.append(parts)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What this thread sends within leaves at the end of the block, in one packet if it fits, with nothing of others between.

        The end raises what ``send`` does. Within, nothing may be waited for that others have yet to send.
        """
        with self._send_lock:
            if self._held_up is not None:  # the outer block sends it
                yield
                return
            self._held_up = []
            patience: contextlib.AbstractContextManager[None] = waiting.patiently()
            try:
                yield
                patience = contextlib.nullcontext()
            finally:
                held_up, self._held_up = self._held_up, None
                if held_up:
                    with patience:  # behind an error nobody takes back what is not sent
                        self._send(*held_up)

    def _send(self, first: Sequence[Buffer], *more: Sequence[Buffer]) -> None:
        source = Gather([*first, *itertools.chain(*more)])
        # Not for all of several requests: ProFTPD grants more only once there is less left than 96 KiB.
        self._await_window(sum(map(len, first)))
        while source.left:
            size = self._take_window(source.left)
            self._transport.send_data(self._peer, source, size, self._packet_bytes_max)

    def close(self) -> None:
        """Tell the server that we are done. ``on_closed`` follows when it agrees; ``on_data`` is called no more. Idempotent."""
        with self._lock:
            if self._closing or self._ended is not None:
                return
            self._closing = True
            self._changed.notify_all()
        try:
            self._transport.send_payload(_message(_CHANNEL_CLOSE, self._peer))
        except ConnectionLost:
            pass  # on_closed has been or will be called

    def _await_window(self, wanted: int) -> None:
        """Wait for room for all of it, where the window is ever that large: later it is too late to leave."""
        with self._lock:
            wanted = min(wanted, self._window_bytes_max // 2)
            while self._window_out < wanted and self._ended is None and not self._closing:
                waiting.wait(self._changed)

    def _take_window(self, wanted: int) -> int:
        """Wait for room in the server's window; returns how much of ``wanted`` may be sent now."""
        with self._lock:
            while self._window_out == 0 and self._ended is None and not self._closing:
                waiting.step_aside()
                self._changed.wait()
            if self._ended is not None:
                raise ConnectionLost(str(self._ended))
            if self._closing:
                raise ConnectionLost("the channel is closed")
            size = min(wanted, self._window_out, _BATCH_BYTES)
            self._window_out -= size
            return size

    # --- opening -------------------------------------------------------------------------------------------------

    def open(self, subsystem: str) -> None:
        """Open the channel and start the subsystem. Raises ChannelRefused, ConnectionLost."""
        transport = self._transport
        transport.send_payload(
            _message(_CHANNEL_OPEN, "session", self._number, _WINDOW_BYTES, _PACKET_BYTES_IN)
        )
        try:
            self._await(lambda: self._peer >= 0)
        except ChannelRefused:
            if self._refused is not None:  # else it may be opened yet, and is left alone
                transport.remove_channel(self._number)
            raise
        try:
            transport.send_payload(_message(_CHANNEL_REQUEST, self._peer, "subsystem", True, subsystem))
            self._await(lambda: self._is_open)
        except ChannelRefused:
            self.close()
            raise

    def _await(self, is_done: Callable[[], bool]) -> None:
        with self._lock:
            answered = self._changed.wait_for(
                lambda: is_done() or self._refused is not None or self._ended is not None, _CHANNEL_TIMEOUT_S
            )
            if self._refused is not None:
                raise ChannelRefused(self._refused)
            if is_done():
                return
            if answered:
                raise ConnectionLost(str(self._ended))
        if monotonic() - self._transport.packetizer.last_heard_s < _CHANNEL_TIMEOUT_S:
            raise ChannelRefused(
                f"not opened within {_CHANNEL_TIMEOUT_S:g} s"
            )  # the line may be full of other things
        self._transport.packetizer.close()  # a server that is mute for so long is gone
        raise ConnectionLost(f"the server did not open a channel within {_CHANNEL_TIMEOUT_S:g} s")

    # --- called by the thread that reads (names with _ are paramiko.Channel's) ------------------------------------

    def take(self, data: bytes) -> None:
        """Data from the server."""
        self._consume(len(data))
        if not self._closing and self._ended is None:
            self._on_data(data)

    def widen(self, count: int) -> None:
        """The server takes ``count`` bytes more."""
        with self._lock:
            self._window_out += count
            # OpenSSH opens a channel with none, and grants it when the subsystem runs.
            self._window_bytes_max = max(self._window_bytes_max, self._window_out)
            self._changed.notify_all()

    def refuse(self, reason: str) -> None:
        """The server does not open the channel, or not the subsystem."""
        with self._lock:
            self._refused = reason
            self._changed.notify_all()

    def end(self, error: Exception) -> None:
        """The channel is over; the first call counts."""
        with self._lock:
            if self._ended is not None:
                return
            self._ended = error
            self._changed.notify_all()
        self._transport.remove_channel(self._number)
        if self._is_open:
            self._on_closed(error)

    def _consume(self, count: int) -> None:
        self._consumed += count
        if self._consumed >= _WINDOW_BYTES // 2:
            self._transport.post(_message(_WINDOW_ADJUST, self._peer, self._consumed))
            self._consumed = 0

    def _set_remote_channel(self, number: int, window_bytes: int, packet_bytes_max: int) -> None:
        with self._lock:
            self._peer = number
            self._window_out = self._window_bytes_max = window_bytes
            self._packet_bytes_max = max(1, min(packet_bytes_max, _PACKET_BYTES_OUT_MAX))
            self._changed.notify_all()

    def _request_success(self, message: Message) -> None:
        with self._lock:
            self._is_open = True
            self._changed.notify_all()

    def _request_failed(self, message: Message) -> None:
        self.refuse("the server has no such subsystem")

    def _feed(self, message: Message) -> None:
        self.take(message.get_string())

    def _feed_extended(self, message: Message) -> None:
        """stderr: kept only as the reason of an end; it uses the same window as the data."""
        message.get_int()
        text = message.get_string()
        self._stderr = (self._stderr + text)[-1024:]
        self._consume(len(text))

    def _window_adjust(self, message: Message) -> None:
        self.widen(message.get_int())

    def _handle_request(self, message: Message) -> None:
        message.get_string()  # exit-status and the like
        if message.get_boolean():
            self._transport.post(_message(_CHANNEL_FAILURE, self._peer))

    def _handle_eof(self, message: Message) -> None:
        """An SFTP server that sends no more answers is of no use, even if it would still listen."""
        self._close_and_end()

    def _handle_close(self, message: Message) -> None:
        self._close_and_end()

    def _close_and_end(self) -> None:
        with self._lock:
            send_close, self._closing = not self._closing, True
        if send_close:
            self._transport.post(_message(_CHANNEL_CLOSE, self._peer))
        said = printable(self._stderr.decode("utf-8", "replace").strip())
        reason = "the server closed the channel" + (f": {said}" if said else "")
        if not self._is_open:
            self.refuse(reason)
        self.end(ConnectionLost(reason))

    def _unlink(self) -> None:
        """paramiko's transport ends."""
        self.end(self._transport._lost())


class Connection:
    """One authenticated SSH connection. ``via`` is the connection to the jump host it runs through, ended with this one."""

    def __init__(self, transport: HardenedTransport, via: Optional[Connection] = None) -> None:
        self._transport = transport
        self._via = via
        self.negotiated = transport.negotiated
        self.host_key = transport.host_key_blob
        transport.packetizer.may_rekey = True

    def open_subsystem(
        self, name: str, on_data: Callable[[bytes], None], on_closed: Callable[[Exception], None]
    ) -> Channel:
        """Open a session channel and start subsystem ``name`` on it.

        ``on_data`` gets each chunk, in order, in the thread that reads: it must neither wait nor send. An exception from it
        ends the connection. ``on_closed`` is called once, in the transport thread, when the channel or the connection ends;
        not if this call raises. Raises ConnectionLost, ChannelRefused.
        """
        transport = self._transport
        channel = transport.add_channel(lambda number: Channel(transport, number, on_data, on_closed))
        channel.open(name)
        return channel

    def open_tunnel(self, host: str, port: int) -> socket.socket:
        """A connection from the server to ``host``:``port`` (direct-tcpip) as a socket. Raises ChannelRefused, ConnectionLost."""
        try:
            channel = self._transport.open_channel(
                "direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=_CHANNEL_TIMEOUT_S
            )
        except paramiko.ChannelException as error:
            raise ChannelRefused(printable(error.text)) from error
        except (SSHException, EOFError, OSError) as error:
            raise ConnectionLost(printable(str(error))) from error
        ours, theirs = socket.socketpair()
        threading.Thread(target=_tunnel, args=(channel, ours), name="sftpmount-tunnel", daemon=True).start()
        return theirs

    def be_lazy_when(self, nobody_waits: Callable[[], bool]) -> None:
        """While ``nobody_waits()`` what arrives may lie for about a millisecond, so that more is read at once."""
        self._transport.packetizer.nobody_waits = nobody_waits

    def wait_for(self, lock: LockType) -> None:
        """Acquire ``lock``, which ``on_data`` will release; it may be called in this thread. Raises FsError (EINTR)."""
        self._transport.packetizer.wait_for(lock)

    def attend(self) -> None:
        """Something is on its way that somebody waits for, but not with ``wait_for``."""
        self._transport.packetizer.attend()

    def heartbeat(self) -> None:
        """Ask the server for a sign of life, without waiting for it or for anything else. Raises ConnectionLost.

        Nothing is sent while keys are exchanged: that makes the server speak anyway.
        """
        self._transport.post(_message(_GLOBAL_REQUEST, "keepalive@openssh.com", True), defer=False)

    def last_heard_s(self) -> float:
        """time.monotonic() of the last bytes that came from the server."""
        return self._transport.packetizer.last_heard_s

    def state(self) -> Dict[str, Any]:
        """What was agreed: the fields of ``Negotiated``, the server's words made printable."""
        agreed = asdict(self.negotiated)
        return {name: printable(value) if isinstance(value, str) else value for name, value in agreed.items()}

    @property
    def is_alive(self) -> bool:
        return self._transport.active and not self._transport.packetizer.closed

    def abort(self) -> None:
        """End the connection at once, without waiting: every waiter gets ConnectionLost. Idempotent, from any thread."""
        self._transport.packetizer.close(and_forget=True)
        if self._via is not None:
            self._via.abort()

    def close(self) -> None:
        """Take leave of the server and end the connection; waits 2 s at most for the transport thread."""
        try:
            self._transport.post(_message(_DISCONNECT, _BY_APPLICATION, "done", ""), defer=False)
        except (ConnectionLost, SSHException):
            pass
        self._transport.close()
        if self._via is not None:
            self._via.close()


def _message(number: int, *fields: Union[str, bool, int]) -> bytes:
    """A message's payload: str as string, bool as boolean, int as uint32 (RFC 4251 section 5)."""
    message = Message()
    message.add_byte(bytes([number]))
    for field in fields:
        if isinstance(field, str):
            message.add_string(field)
        elif isinstance(field, bool):
            message.add_boolean(field)
        else:
            message.add_bytes(field.to_bytes(4, "big"))
    return message.asbytes()


def _tunnel(channel: paramiko.Channel, sock: socket.socket) -> None:
    """Carry bytes between the two until either ends, then end both."""
    outbound = threading.Thread(
        target=_pump,
        args=(sock.recv, channel.sendall, channel, sock),
        name="sftpmount-tunnel-out",
        daemon=True,
    )
    outbound.start()
    _pump(channel.recv, sock.sendall, channel, sock)
    outbound.join()
    sock.close()


def _pump(
    read: Callable[[int], bytes],
    write: Callable[[bytes], object],
    channel: paramiko.Channel,
    sock: socket.socket,
) -> None:
    """Copy until the end of one side, then shut both down, so that the pump of the other direction ends as well."""
    try:
        while True:
            data = read(65536)
            if not data:
                break
            write(data)
    except (OSError, EOFError, ConnectionLost, SSHException):
        pass
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    try:
        channel.close()
    except (ConnectionLost, SSHException):
        pass
