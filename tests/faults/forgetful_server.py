"""An SFTP server whose disk forgets what was not fsynced when the power fails, and which is soon back.

The disk keeps what a journaling file system keeps: names at once and in order, a file's bytes and its truncations with the
fsync that follows them. Of what was written since, a power loss leaves nothing, or the truncation alone, or some blocks, or
some length, as it happens on real disks. What an fsync covered is there.
"""

from __future__ import annotations

import asyncio
import os
import random
import stat
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Set, Union

import asyncssh

from mount.faulty_server import FaultyServer
from support.process import free_port

BLOCK_BYTES = 4096

REQUESTS = [
    "open",
    "close",
    "read",
    "write",
    "fsync",
    "lstat",
    "fstat",
    "setstat",
    "fsetstat",
    "posix_rename",
    "remove",
]
_CHANGES = {"open", "write", "setstat", "fsetstat"}  # may change a file's bytes or length


class _OnDisk:
    """What the disk has of one inode. Our descriptor keeps the inode's number from being given to another file."""

    def __init__(self, path: Union[bytes, str]) -> None:
        self.descriptor = os.open(path, os.O_RDWR)
        self.committed = b""
        self.mtime_ns = os.fstat(self.descriptor).st_mtime_ns
        self.least_bytes = 0  # the file's smallest length since the commit

    def content(self) -> bytes:
        return os.pread(self.descriptor, os.fstat(self.descriptor).st_size, 0)

    def commit(self) -> None:
        self.committed = self.content()
        self.least_bytes = len(self.committed)
        self.mtime_ns = os.fstat(self.descriptor).st_mtime_ns

    def forget(self, chance: random.Random) -> None:
        """The power failed. What is left is on the disk from now on."""
        written = self.content()
        if written != self.committed or self.least_bytes < len(written):
            left = what_is_left(self.committed, self.least_bytes, written, chance)
            mtime_ns = chance.choice([self.mtime_ns, os.fstat(self.descriptor).st_mtime_ns])
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, left, 0)
            os.utime(self.descriptor, ns=(mtime_ns, mtime_ns))
        self.commit()


def what_is_left(committed: bytes, least_bytes: int, written: bytes, chance: random.Random) -> bytes:
    """One of the contents that a power loss may leave of a file that went from ``committed`` to ``written``."""
    old = chance.choice([committed, committed, committed[:least_bytes]])
    length = chance.choice([len(old), len(old), len(written), (len(old) + len(written)) // 2])
    share = chance.choice([0.0, 0.5, 1.0])
    left = bytearray(old[:length].ljust(length, b"\0"))
    for start in range(0, min(length, len(written)), BLOCK_BYTES):
        if chance.random() < share:
            end = min(start + BLOCK_BYTES, length, len(written))
            left[start:end] = written[start:end]
    return bytes(left)


class ForgetfulServer(FaultyServer):
    """See Sshd for what Mount takes of it. ``on_loss`` is called, in the server's thread, while the power is off.

    ``lies``: fsync is answered well and does nothing, as some disks do; to see that the tests see it.
    """

    def __init__(self, tmp_dir: Path, seed: int, *, lies: bool = False) -> None:
        super().__init__(tmp_dir)
        self.port = free_port()  # the same over restarts
        self.losses = 0
        self.is_up = True
        self.on_loss: Callable[[], None] = lambda: None
        self.trouble: Optional[Exception] = None  # what on_loss raised
        self.requests = 0
        self.lies = lies
        self.held = ""  # this request is not answered until the power fails
        self.waiting: List[asyncio.Future[None]] = []  # the answers
        self._chance = random.Random(seed)
        self._disk: Dict[int, _OnDisk] = {}
        self.connections: Set[Any] = set()
        self.opened: Set[Any] = set()  # the sessions' files
        self._loss_at = ""  # "before fsync"
        self._skip = 0
        self._down_s = 0.0
        self._coming_back: Optional[asyncio.Task[None]] = None
        self._power: Optional[asyncio.TimerHandle] = None

    def __enter__(self) -> ForgetfulServer:
        super().__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._end)
        super().__exit__(*exc_info)
        for each in self._disk.values():
            os.close(each.descriptor)

    def _end(self) -> None:
        self._set_timer(0.0, lambda: None)
        self.is_up = False
        self._end_sessions()

    def lose_power(self, *, at: str = "", skip: int = 0, after_s: float = 0.0, down_s: float = 0.0) -> None:
        """Plan one power loss, ``after_s`` at the latest, or ``at`` a request, of which ``skip`` pass before.

        "before fsync" it is not done, "behind fsync" done and not answered, "after fsync" just answered. The server is back
        ``down_s`` after the loss.
        """

        def plan() -> None:
            self._loss_at, self._skip, self._down_s = at, skip, down_s
            self._set_timer(after_s, self._fail)

        self._loop.call_soon_threadsafe(plan)

    def is_back(self, losses: int) -> bool:
        """Whether there were so many power losses, and the server is up."""
        return self.losses >= losses and self.is_up

    def _set_timer(self, delay_s: float, act: Callable[[], object]) -> None:
        if self._power is not None:
            self._power.cancel()
        self._power = self._loop.call_later(delay_s, act)

    async def _listen(self) -> Any:
        return await asyncssh.listen(
            "127.0.0.1",
            self.port,
            server_factory=lambda: _Login(self),
            server_host_keys=[str(self._host_key)],
            authorized_client_keys=f"{self.user_key}.pub",
            sftp_factory=lambda channel: _Session(channel, self),
        )

    def _fail(self) -> None:
        """In the server's thread, between two requests or in the midst of one: no other runs meanwhile."""
        self._loss_at = ""
        if self._power is not None:
            self._power.cancel()  # one loss for each plan
        for listener in self._acceptor._server.sockets:
            self._loop.remove_reader(listener.fileno())
        self._end_sessions()
        for number, each in list(self._disk.items()):
            each.forget(self._chance)
            if os.fstat(each.descriptor).st_nlink == 0:
                os.close(each.descriptor)
                del self._disk[number]
        self.losses += 1
        self.is_up = False
        self.held = ""
        for answer in self.waiting:
            if not answer.done():
                answer.set_exception(asyncssh.SFTPConnectionLost("the power is off"))
        self.waiting = []
        try:
            self.on_loss()
        except Exception as error:
            self.trouble = error
        self._coming_back = self._loop.create_task(self._come_back())

    def _end_sessions(self) -> None:
        for connection in list(self.connections):
            connection.abort()
        for file in self.opened:
            file.close()
        self.opened.clear()

    async def _come_back(self) -> None:
        for _ in range(
            10
        ):  # asyncio loses track of a connection that it was accepting when its listener closed
            await asyncio.sleep(0)
        self._acceptor.close()
        await asyncio.sleep(self._down_s)
        self._acceptor = await self._listen()
        self.is_up = True

    # -- what the sessions tell -----------------------------------------------------------------------------------------

    def reached(self, moment: str) -> None:
        """A request is about to be done, or was done and is not answered yet."""
        if moment != self._loss_at:
            return
        self._skip -= 1
        if self._skip < 0 and moment.startswith("after"):
            self._loss_at = ""
            self._set_timer(self._chance.choice([0.0, 0.0005, 0.001, 0.002]), self._fail)
        elif self._skip < 0:
            self._fail()

    def changed(self, file: Any) -> None:
        """A path's or an open file's bytes or length may be others now."""
        found = os.stat(file if isinstance(file, bytes) else file.fileno())
        if not stat.S_ISREG(found.st_mode):
            return
        known = self._disk.get(found.st_ino)
        if known is None:
            path = file if isinstance(file, bytes) else f"/proc/self/fd/{file.fileno()}"
            known = self._disk[found.st_ino] = _OnDisk(path)
        known.least_bytes = min(known.least_bytes, found.st_size)

    def committed(self, descriptor: int) -> None:
        """The file was fsynced."""
        if not self.lies:
            self._disk[os.fstat(descriptor).st_ino].commit()


class _Login(asyncssh.SSHServer):  # type: ignore[misc]
    def __init__(self, server: ForgetfulServer) -> None:
        self._server = server

    def connection_made(self, connection: Any) -> None:
        self._connection = connection
        self._server.connections.add(connection)
        if not self._server.is_up:
            connection.abort()

    def connection_lost(self, error: Optional[Exception]) -> None:
        self._server.connections.discard(self._connection)


class _Session(asyncssh.SFTPServer):  # type: ignore[misc]
    """Ends with the power: what was on its way to it then is not done any more."""

    def __init__(self, channel: Any, server: ForgetfulServer) -> None:
        super().__init__(channel)
        self._server = server
        self._losses = server.losses

    @property
    def is_dead(self) -> bool:
        return self._losses != self._server.losses

    def do(self, request: str, *arguments: Any) -> Any:
        server = self._server
        server.requests += 1
        server.reached(f"before {request}")
        if self.is_dead:
            raise asyncssh.SFTPConnectionLost("the power is off")
        if request == server.held:
            server.waiting.append(asyncio.get_running_loop().create_future())
            return server.waiting[-1]
        result = None
        if request == "fsync":
            server.committed(arguments[0].fileno())
        else:
            result = getattr(asyncssh.SFTPServer, request)(self, *arguments)
        if request == "open":
            server.opened.add(result)
        elif request == "close":
            server.opened.discard(arguments[0])
        if request in _CHANGES:
            server.changed(result if request == "open" else arguments[0])
        server.reached(f"behind {request}")
        server.reached(f"after {request}")
        if self.is_dead:
            raise asyncssh.SFTPConnectionLost("the power is off")
        return result


def _serve(request: str) -> None:
    setattr(_Session, request, lambda self, *arguments: self.do(request, *arguments))


for _request in REQUESTS:
    _serve(_request)
