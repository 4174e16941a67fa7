"""A complete SFTP server of our own (asyncssh) that refuses what the test tells it to, in the words the test chooses."""

from __future__ import annotations

import asyncio
import getpass
import threading
from pathlib import Path
from typing import Any, AsyncIterator, Callable, Dict, Optional

import asyncssh

from support.sshd import keygen, public_key

_START_TIMEOUT_S = 20.0


class Faults:
    """What fails from now on: request name ("write", "fsync", "close", "read", "setstat", "readdir", "remove") -> the error.

    ``write_budget_bytes`` lets so much be written before "write" fails, as a quota does; None: fails at once.
    """

    def __init__(self) -> None:
        self.errors: Dict[str, Callable[[], Exception]] = {}
        self.write_budget_bytes: Optional[int] = None
        self._lock = threading.Lock()

    def clear(self) -> None:
        with self._lock:
            self.errors = {}
            self.write_budget_bytes = None

    def check(self, request: str) -> None:
        with self._lock:
            make = self.errors.get(request)
        if make is not None:
            raise make()

    def check_write(self, length: int) -> None:
        with self._lock:
            if self.write_budget_bytes is not None and "write" in self.errors:
                if length <= self.write_budget_bytes:
                    self.write_budget_bytes -= length
                    return
                self.write_budget_bytes = 0
        self.check("write")


class FaultyServer:
    """Has what Mount takes from an Sshd: port, user, user_key, known_hosts, tree, trust()."""

    def __init__(self, tmp_dir: Path) -> None:
        self.dir = tmp_dir / "faulty"
        self.tree = self.dir / "tree"
        self.tree.mkdir(parents=True)
        self.faults = Faults()
        self.user = getpass.getuser()
        self.user_key = keygen(self.dir / "id_ed25519", "ed25519")
        self.known_hosts = self.dir / "known_hosts"
        self._host_key = keygen(self.dir / "host_ed25519", "ed25519")
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-server")

    def __enter__(self) -> FaultyServer:
        self._thread.start()
        self._acceptor = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(_START_TIMEOUT_S)
        self.port = self._acceptor.get_port()
        self.trust(self.port)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(_START_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def trust(self, port: int) -> None:
        with self.known_hosts.open("a") as file:
            file.write(f"[127.0.0.1]:{port} {public_key(self._host_key)}\n")

    async def _listen(self) -> Any:
        faults = self.faults
        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[str(self._host_key)],
            authorized_client_keys=f"{self.user_key}.pub",
            sftp_factory=lambda channel: _Session(channel, faults),
        )

    async def _close(self) -> None:
        self._acceptor.close()
        await self._acceptor.wait_closed()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


class _Session(asyncssh.SFTPServer):  # type: ignore[misc]
    def __init__(self, channel: Any, faults: Faults) -> None:
        super().__init__(channel)
        self._faults = faults

    def write(self, file_obj: object, offset: int, data: bytes) -> Any:
        self._faults.check_write(len(data))
        return super().write(file_obj, offset, data)

    def read(self, file_obj: object, offset: int, size: int) -> Any:
        self._faults.check("read")
        return super().read(file_obj, offset, size)

    def fsync(self, file_obj: object) -> Any:
        self._faults.check("fsync")
        return super().fsync(file_obj)

    def close(self, file_obj: object) -> Any:
        result = super().close(file_obj)
        self._faults.check("close")
        return result

    def setstat(self, path: bytes, attrs: Any) -> Any:
        self._faults.check("setstat")
        return super().setstat(path, attrs)

    def fsetstat(self, file_obj: object, attrs: Any) -> Any:
        self._faults.check("setstat")
        return super().fsetstat(file_obj, attrs)

    def lsetstat(self, path: bytes, attrs: Any) -> Any:
        self._faults.check("setstat")
        return super().lsetstat(path, attrs)

    def remove(self, path: bytes) -> Any:
        self._faults.check("remove")
        return super().remove(path)

    async def scandir(self, path: bytes) -> AsyncIterator[Any]:
        count = 0
        async for entry in super().scandir(path):
            if count >= 300:  # asyncssh sends 128 names at a time: the first replies are good
                self._faults.check("readdir")
            count += 1
            yield entry
