"""A bad network: a TCP relay on 127.0.0.1 with delay, a rate limit, black holes, resets and corruption on request.

    with Relay(sshd.port, rtt_ms=40, up_bps=200e6, down_bps=200e6) as relay:
        ... connect to relay.port ...
        relay.stall(); relay.flow(); relay.reset(); relay.reset_after(1_000_000, "up")

"up" is from the client to the server, "down" the other way. The relay is a process of its own, since the tests' own
interpreter would spoil its timing; this module is also that process's program. It ends with its standard input, so it
cannot outlive the test run.

How bytes travel in each direction: what is read is cut into packets; a packet leaves when the ones before it have left
(rate), and arrives half a round trip later (delay). What waits to leave is at most ``queue_bytes``, as in a router: when
that is full, nothing more is read, and the sender's TCP feels it. Nothing is dropped or sent twice.

Behaviour on failure: the end of a stream is handed on like its bytes, a reset at once; when the server cannot be reached
the client is reset.
"""

from __future__ import annotations

import asyncio
import collections
import fcntl
import json
import selectors
import socket
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any, Callable, Deque, Dict, List, Mapping, Optional, Tuple

from support.process import end_with_input, free_port

DIRECTIONS = ("up", "down")

_READ_MAX_BYTES = 256 * 1024
_PACKET_MAX_S = 0.001  # with a rate limit, a packet is what the line carries in this time ...
_PACKET_MIN_BYTES = 1500  # ... but at least this
_LINE_MAX_BYTES = 64 * 1024 * 1024  # on the way with a delay and no rate: bounds memory
_RECEIVE_BUFFER_BYTES = 128 * 1024  # small, else the kernel's buffers hide the queue's back-pressure
_CALL_TIMEOUT_S = 20.0


class Relay:
    """One relay to 127.0.0.1:``target_port``. Rates are in bit/s, None for no limit."""

    def __init__(
        self,
        target_port: int,
        *,
        rtt_ms: float = 0.0,
        up_bps: Optional[float] = None,
        down_bps: Optional[float] = None,
        queue_bytes: int = 256 * 1024,
    ) -> None:
        settings = {"target": target_port, "rtt_ms": rtt_ms, "up_bps": up_bps, "down_bps": down_bps}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.relay", json.dumps({**settings, "queue_bytes": queue_bytes})],
            cwd=Path(__file__).resolve().parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in the test run must not end it before its clients
        )
        self.pid = self._process.pid
        self.port = int(self._answer()["port"])

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the relay; its connections are reset."""
        end_with_input(self._process)

    def set_line(
        self, *, rtt_ms: float = 0.0, up_bps: Optional[float] = None, down_bps: Optional[float] = None
    ) -> None:
        """Change delay and rates from now on, for open connections too."""
        self._call("set_line", rtt_ms=rtt_ms, up_bps=up_bps, down_bps=down_bps)

    def stall(self, direction: str = "both", *, new_connections: bool = True) -> None:
        """A black hole: connections stay open and no byte passes in ``direction`` until flow().

        Connections made meanwhile are taken and stalled as well, or, with ``new_connections=False``, work: the silent
        death of a session, as after a changed address or a forgotten NAT entry.
        """
        self._call("stall", direction=direction, new_connections=new_connections)

    def flow(self) -> None:
        """End stall(): what was held back goes on its way."""
        self._call("flow")

    def reset(self) -> None:
        """Reset (RST) all connections, on both sides, now."""
        self._call("reset")

    def reset_after(self, count_bytes: int, direction: str = "up", *, times: int = 1) -> None:
        """Reset all connections once ``count_bytes`` more bytes (of all connections) were delivered in ``direction``.

        Exactly that many are delivered. This happens ``times`` times, each counted from the one before; a later call
        replaces an earlier one.
        """
        self._call("reset_after", count_bytes=count_bytes, direction=direction, times=times)

    def end(self, direction: str = "both") -> None:
        """Send the orderly end of the stream (FIN) to the receiver of ``direction``; drop what follows there."""
        self._call("end", direction=direction)

    def corrupt_after(self, count_bytes: int, direction: str = "up") -> None:
        """Flip one bit of the byte that follows the next ``count_bytes`` delivered in ``direction``. One-shot."""
        self._call("corrupt_after", count_bytes=count_bytes, direction=direction)

    def refuse(self, on: bool = True) -> None:
        """Refuse new connections (nothing listens any more), or take them again."""
        self._call("refuse", on=on)

    def set_target(self, port: int) -> None:
        """Lead new connections to another port of 127.0.0.1."""
        self._call("set_target", port=port)

    def stats(self) -> Dict[str, int]:
        """Bytes delivered so far as "up" and "down", connections so far as "accepted", those now as "open".

        "resets" is how often reset() or reset_after() has cut a connection.
        """
        return {key: int(value) for key, value in self._call("stats").items()}

    def _call(self, command: str, **arguments: Any) -> Dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Dict[str, Any]:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(_CALL_TIMEOUT_S):
                raise TimeoutError(f"the relay did not answer within {_CALL_TIMEOUT_S:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the relay ended with status {self._process.wait()}")
        answer: Dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer


# ---- the relay's process ----


class _Direction:
    """What holds for all connections in one direction."""

    def __init__(self) -> None:
        self.bps: Optional[float] = None
        self.delivered_bytes = 0
        self.reset_at: Optional[int] = None  # in units of delivered_bytes, as is:
        self.reset_every_bytes = 0
        self.resets_left = 0
        self.corrupt_at: Optional[int] = None
        self.stalls_new = False

    def reset_after(self, count_bytes: int, times: int) -> None:
        self.reset_at = self.delivered_bytes + count_bytes if times > 0 else None
        self.reset_every_bytes, self.resets_left = count_bytes, times

    def marks(self) -> List[int]:
        return [mark for mark in (self.reset_at, self.corrupt_at) if mark is not None]


class _Pipe:
    """One direction of one connection: a reader that fills the line and a writer that empties it."""

    def __init__(
        self, server: _Server, direction: _Direction, source: socket.socket, sink: socket.socket
    ) -> None:
        self._server = server
        self._direction = direction
        self._source = source
        self._sink = sink
        # (time of arrival, bytes); b"" is the end of the stream
        self._line: Deque[Tuple[float, bytes]] = collections.deque()
        self._line_bytes = 0
        self._free_at = 0.0  # when the last packet has left
        self._changed = asyncio.Event()  # anything in the line, or taken from it
        self.flows = asyncio.Event()
        self.ended = False
        if not direction.stalls_new:
            self.flows.set()

    async def fill(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self.flows.wait()
            data = await loop.sock_recv(self._source, self._packet_bytes())
            await self.flows.wait()
            now = loop.time()
            if self._direction.bps is not None:
                self._free_at = max(now, self._free_at) + len(data) * 8 / self._direction.bps
            else:
                self._free_at = now
            self._line.append((self._free_at + self._server.delay_s, data))
            self._line_bytes += len(data)
            self._changed.set()
            if not data:
                return
            await self._room()

    async def empty(self) -> None:
        while True:
            while not self._line:
                self._changed.clear()
                await self._changed.wait()
            arrives_at, data = self._line.popleft()
            await _sleep_until(arrives_at)
            await self.flows.wait()
            self._line_bytes -= len(data)
            self._changed.set()
            if not data:
                if not self.ended:
                    self._sink.shutdown(socket.SHUT_WR)
                return
            if not self.ended:
                await self._deliver(data)

    async def _deliver(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        direction = self._direction
        while data:
            marks = direction.marks()
            part = data
            if marks:
                part = data[: max(0, min(marks) - direction.delivered_bytes)]
            if part:
                direction.delivered_bytes += len(part)  # before the wait: other connections count on
                data = data[len(part) :]
                await loop.sock_sendall(self._sink, part)
            if data and direction.delivered_bytes == direction.corrupt_at:
                direction.corrupt_at = None
                data = bytes([data[0] ^ 0x10]) + data[1:]
            if direction.delivered_bytes == direction.reset_at:
                direction.reset_after(direction.reset_every_bytes, direction.resets_left - 1)
                await _sent(self._sink)
                self._server.reset()
                raise ConnectionResetError  # this task is running: its cancellation would wait for its next wait

    async def _room(self) -> None:
        """Wait until the queue before the line, and the line itself, can take more."""
        if self._direction.bps is not None:
            await _sleep_until(self._free_at - self._server.queue_bytes * 8 / self._direction.bps)
        while self._line_bytes >= self._line_max_bytes():
            self._changed.clear()
            await self._changed.wait()

    def _line_max_bytes(self) -> int:
        """More than this is only on the line where the receiver is slower than the line."""
        if self._direction.bps is None:
            return _LINE_MAX_BYTES if self._server.delay_s else 2 * _READ_MAX_BYTES
        return int(self._server.queue_bytes + 2 * self._server.delay_s * self._direction.bps / 8 + 64 * 1024)

    def _packet_bytes(self) -> int:
        if self._direction.bps is None:
            return _READ_MAX_BYTES
        return min(_READ_MAX_BYTES, max(_PACKET_MIN_BYTES, int(self._direction.bps / 8 * _PACKET_MAX_S)))


class _Connection:
    """A client's socket, the server's, and the two pipes between them."""

    def __init__(self, server: _Server, client: socket.socket, target: socket.socket) -> None:
        self.sockets = (client, target)
        self.pipes = {
            "up": _Pipe(server, server.directions["up"], client, target),
            "down": _Pipe(server, server.directions["down"], target, client),
        }
        self._tasks: List[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Until both directions have ended, or one failed: then both sides are reset."""
        work = [half for pipe in self.pipes.values() for half in (pipe.fill(), pipe.empty())]
        self._tasks = [asyncio.ensure_future(half) for half in work]
        try:
            await asyncio.gather(*self._tasks)
        except (OSError, asyncio.CancelledError):
            for each in self.sockets:
                _set_linger_zero(each)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for each in self.sockets:
                each.close()

    def reset(self) -> None:
        for each in self.sockets:
            _set_linger_zero(each)
        for task in self._tasks:
            task.cancel()


class _Server:
    """The listener, its connections, and the commands that the test sends."""

    def __init__(self, settings: Dict[str, Any]) -> None:
        self.queue_bytes = int(settings["queue_bytes"])
        self.directions = {name: _Direction() for name in DIRECTIONS}
        self.delay_s = 0.0
        self._target = int(settings["target"])
        self._connections: List[_Connection] = []
        self._accepted = 0
        self._resets = 0
        self._running: List[asyncio.Task[None]] = []
        self._accepting: Optional[asyncio.Task[None]] = None
        self._set_line(settings["rtt_ms"], settings["up_bps"], settings["down_bps"])
        self.port = 0

    async def serve_commands(self) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        self._listen()
        _print({"port": self.port})
        commands: Dict[str, Callable[..., Any]] = {
            "set_line": self._set_line,
            "stall": self._stall,
            "flow": self._flow,
            "reset": self.reset,
            "reset_after": self._reset_after,
            "corrupt_after": self._corrupt_after,
            "end": self._end,
            "refuse": self._refuse,
            "set_target": self._set_target,
            "stats": self._stats,
        }
        while True:
            line = await reader.readline()
            if not line:
                break
            request = json.loads(line)
            try:
                answer = commands[request.pop("command")](**request)
                _print((await answer if asyncio.iscoroutine(answer) else answer) or {})
            except (KeyError, ValueError) as error:
                _print({"error": repr(error)})
        await self._refuse(True)
        self.reset()
        await asyncio.gather(*self._running, return_exceptions=True)

    def reset(self) -> None:
        self._resets += bool(self._connections)
        for connection in self._connections:
            connection.reset()

    def _listen(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
        if self.port == 0:
            self.port = free_port()
        listener.bind(("127.0.0.1", self.port))
        listener.listen(100)
        listener.setblocking(False)
        self._accepting = asyncio.ensure_future(self._accept(listener))

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                client, _ = await loop.sock_accept(listener)
                self._accepted += 1
                self._running = [task for task in self._running if not task.done()]
                self._running.append(asyncio.ensure_future(self._carry(client)))

    async def _carry(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        target = socket.socket()
        for each in (client, target):
            each.setblocking(False)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
        try:
            await loop.sock_connect(target, ("127.0.0.1", self._target))
        except OSError:
            _set_linger_zero(client)
            client.close()
            target.close()
            return
        connection = _Connection(self, client, target)
        self._connections.append(connection)
        try:
            await connection.run()
        finally:
            self._connections.remove(connection)

    def _set_line(self, rtt_ms: float, up_bps: Optional[float], down_bps: Optional[float]) -> None:
        self.delay_s = rtt_ms / 2000.0
        self.directions["up"].bps = up_bps
        self.directions["down"].bps = down_bps

    def _stall(self, direction: str, new_connections: bool) -> None:
        for name in _names(direction):
            self.directions[name].stalls_new = new_connections
            for connection in self._connections:
                connection.pipes[name].flows.clear()

    def _flow(self) -> None:
        for name in DIRECTIONS:
            self.directions[name].stalls_new = False
            for connection in self._connections:
                connection.pipes[name].flows.set()

    def _reset_after(self, count_bytes: int, direction: str, times: int) -> None:
        self.directions[direction].reset_after(count_bytes, times)

    def _corrupt_after(self, count_bytes: int, direction: str) -> None:
        each = self.directions[direction]
        each.corrupt_at = each.delivered_bytes + count_bytes

    def _end(self, direction: str) -> None:
        for name in _names(direction):
            for connection in self._connections:
                connection.pipes[name].ended = True
                connection.sockets[1 if name == "up" else 0].shutdown(socket.SHUT_WR)

    async def _refuse(self, on: bool) -> None:
        if on and self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait([self._accepting])  # only then is the listener closed
            self._accepting = None
        elif not on and self._accepting is None:
            self._listen()

    def _set_target(self, port: int) -> None:
        self._target = port

    def _stats(self) -> Dict[str, int]:
        counts = {name: self.directions[name].delivered_bytes for name in DIRECTIONS}
        return {
            **counts,
            "accepted": self._accepted,
            "open": len(self._connections),
            "resets": self._resets,
        }


def _names(direction: str) -> Tuple[str, ...]:
    if direction == "both":
        return DIRECTIONS
    if direction not in DIRECTIONS:
        raise ValueError(f"direction {direction!r}: not up, down or both")
    return (direction,)


async def _sleep_until(when: float) -> None:
    wait_s = when - asyncio.get_running_loop().time()
    if wait_s > 0:
        await asyncio.sleep(wait_s)


async def _sent(sink: socket.socket) -> None:
    """Wait, at most a second, until the receiver's kernel has what was written, since a reset discards the rest."""
    for _ in range(1000):
        if struct.unpack("i", fcntl.ioctl(sink, termios.TIOCOUTQ, b"\0\0\0\0"))[0] == 0:
            return
        await asyncio.sleep(0.001)


def _set_linger_zero(sock: socket.socket) -> None:
    """Make close() send RST instead of FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _print(answer: Mapping[str, object]) -> None:
    print(json.dumps(answer), flush=True)


def _main() -> None:
    # select() counts time in microseconds, epoll in milliseconds: too coarse for packets of one millisecond.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    try:
        loop.run_until_complete(_Server(json.loads(sys.argv[1])).serve_commands())
    finally:
        loop.close()


if __name__ == "__main__":
    _main()
