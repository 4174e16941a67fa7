"""Brings a file's bytes from the server: whole blocks, many at once, each once for all who wait for it.

A ``Fetch`` is one block on its way. Its reply is parsed and put among the clean blocks in the thread that reads, where it
arrives; who needs the block waits for the fetch itself, so it cannot lose it to eviction. A fetch that fails for any reason
(refused, lost, short) is no error yet: the reader asks once more by itself, with the retries of ``sftp.remote``, and that
answer counts. Read-ahead nobody waits for fails in silence.
"""

from __future__ import annotations

import errno
from _thread import allocate_lock
from typing import Dict, List, Optional, Tuple

from .. import waiting
from ..errors import ConnectionLost, FsError, StatusError
from ..sftp.lane import Pending
from ..sftp.remote import Remote
from ..sftp.remote_file import RemoteFile
from ..sftp.session import Session
from ..sftp.wire import Attrs
from .blocks import BLOCK_BYTES, CleanBlocks, FileCache, Read, block_range
from .readahead import Pattern

# Requests for one file on their way: 8 MiB of blocks, what OpenSSH's own client keeps in flight at most.
FETCHES_MAX = 64
LOOKS_MAX = 3


class Fetch:
    """One block on its way; ``data`` is None until it has come whole."""

    __slots__ = ("_done", "_missing", "_parts", "check", "data", "expected", "file", "index")

    def __init__(self, file: FileCache, index: int, expected: int) -> None:
        self.file = file
        self.index = index
        self.expected = expected
        self.data: Optional[bytes] = None
        self.check: Optional[Pending] = None  # FSTAT, sent behind the READs of its batch
        self._parts: Dict[int, bytes] = {}
        self._missing = expected
        self._done = allocate_lock()
        self._done.acquire()

    def arrived(self, at: int, wanted: int, pending: Pending) -> bool:
        """One READ's reply, for ``wanted`` bytes at ``at`` within the block; True where the fetch has ended by it."""
        if self._missing < 0:
            return False
        try:
            part = pending.data()
        except (StatusError, ConnectionLost):
            part = b""
        if len(part) != wanted:
            self._missing = -1
            return True
        self._parts[at] = part
        self._missing -= wanted
        if self._missing == 0:
            self.data = (
                part if wanted == self.expected else b"".join(self._parts[i] for i in sorted(self._parts))
            )
            return True
        return False

    def give_up(self) -> bool:
        """It could not be sent; True where it had not ended by itself."""
        ended, self._missing = self._missing < 0, -1
        return not ended

    def finish(self) -> None:
        """Wake who waits; once."""
        self._done.release()

    def wait(self) -> Optional[bytes]:
        """The block, or None where it did not come."""
        waiting.acquire(self._done)
        self._done.release()
        return self.data


def _changed_meanwhile() -> FsError:
    return FsError(errno.ESTALE, "the file was changed on the server while it was open here")


class Fetcher:
    """Reads of all files of a mount."""

    def __init__(self, remote: Remote, clean: CleanBlocks) -> None:
        self._remote = remote
        self._clean = clean

    def read(self, file: FileCache, source: RemoteFile, pattern: Pattern, offset: int, size: int) -> bytes:
        """At most ``size`` bytes at ``offset`` as this mount sees the file now; fewer only at its end. Raises FsError."""
        while True:
            with file.lock:
                end = min(offset + size, file.size)
                if file.is_stale(source.seen):
                    raise _changed_meanwhile()
                if offset >= end:
                    return b""
                read = Read(offset, end)
                file.reads.append(read)
                ahead = pattern.note(offset, end)
                found, fetches, direct = self._plan(file, offset, end, pattern.sequential)
                new = [f for f in fetches if f.index not in file.fetches]
                new += self._plan_ahead(file, *ahead)
                for fetch in new:
                    file.fetches[fetch.index] = fetch
            try:
                if new:
                    self._send(source, new)
                blocks = dict(found)
                for fetch in fetches:
                    blocks[fetch.index] = self._await(file, source, fetch)
                pieces = [(start, self._exactly(file, source, start, stop)) for start, stop in direct]
            except BaseException:
                with file.lock:
                    file.reads.remove(read)
                raise
            with file.lock:
                file.reads.remove(read)
                if (
                    not read.stale
                ):  # else truncated, replaced, or written and released while we waited: once more
                    return self._compose(file, offset, end, blocks, pieces)

    def _plan(
        self, file: FileCache, start: int, end: int, sequential: bool
    ) -> Tuple[List[Tuple[int, bytes]], List[Fetch], List[Tuple[int, int]]]:
        """Clean blocks at hand, fetches to wait for, and ranges to read exactly (random access)."""
        found: List[Tuple[int, bytes]] = []
        fetches: List[Fetch] = []
        direct: List[Tuple[int, int]] = []
        for index in block_range(start, end):
            base = index * BLOCK_BYTES
            low, high = max(base, start), min(base + BLOCK_BYTES, end)
            if file.is_hole(low) or (file.valid and file.valid.covers(low, high)):
                continue
            data = self._clean.get(file.file_id, index)
            if data is not None:
                found.append((index, data))
                continue
            fetch = file.fetches.get(index)
            expected = min(BLOCK_BYTES, file.size - base)
            if fetch is not None:
                fetches.append(fetch)
            elif sequential or high - low == expected:
                fetches.append(Fetch(file, index, expected))
            else:
                direct.append((low, high))
        return found, fetches, direct

    def _plan_ahead(self, file: FileCache, start: int, end: int) -> List[Fetch]:
        fetches: List[Fetch] = []
        for index in block_range(start, min(end, file.size)):
            if len(file.fetches) + len(fetches) >= FETCHES_MAX:
                break
            base = index * BLOCK_BYTES
            expected = min(BLOCK_BYTES, file.size - base)
            if file.is_hole(base) or index in file.fetches or self._clean.has(file.file_id, index):
                continue
            if not (file.valid and file.valid.covers(base, base + expected)):
                fetches.append(Fetch(file, index, expected))
        return fetches

    def _send(self, source: RemoteFile, fetches: List[Fetch]) -> None:
        """Send what these fetches need; a fetch that cannot be sent ends at once, and its reader asks for itself."""
        session = self._remote.session_now()
        waiting = list(fetches)
        try:
            if session is None:
                raise ConnectionLost
            with self._remote.together(source, session):
                while waiting:
                    self._send_one(source, session, waiting[0])
                    waiting.pop(0)
                check = self._remote.fstat_soon(source, session)
                for fetch in fetches:
                    fetch.check = check
        except (ConnectionLost, FsError):
            for fetch in waiting:
                if fetch.give_up():
                    self._settle(fetch)

    def _send_one(self, source: RemoteFile, session: Session, fetch: Fetch) -> None:
        base = fetch.index * BLOCK_BYTES
        step = session.limits.read_bytes
        for at in range(0, fetch.expected, step):
            wanted = min(step, fetch.expected - at)

            def arrived(pending: Pending, at: int = at, wanted: int = wanted) -> None:
                if fetch.arrived(at, wanted, pending):
                    self._settle(fetch)

            self._remote.read_soon(source, session, base + at, wanted, arrived)

    def _settle(self, fetch: Fetch) -> None:
        file = fetch.file
        with file.lock:
            if file.fetches.get(fetch.index) is fetch:
                del file.fetches[fetch.index]
                base = fetch.index * BLOCK_BYTES
                end = base + fetch.expected
                whole = end == min(base + BLOCK_BYTES, file.size) and not file.is_hole(end - 1)
                if whole and fetch.data is not None and fetch.index not in file.buffers:
                    self._clean.put(file.file_id, fetch.index, fetch.data)
        fetch.finish()

    def _await(self, file: FileCache, source: RemoteFile, fetch: Fetch) -> bytes:
        data = fetch.wait()
        if data is not None and fetch.check is not None:
            try:
                self._compare(file, source, fetch.check.wait().attrs())
            except (ConnectionLost, StatusError):
                data = None
        if data is not None:
            return data
        base = fetch.index * BLOCK_BYTES
        return self._exactly(file, source, base, base + fetch.expected)

    def _exactly(self, file: FileCache, source: RemoteFile, start: int, end: int) -> bytes:
        """The bytes of ``[start, end)``; the part that the server does not have yet reads as zeros, as a hole does."""
        for _ in range(LOOKS_MAX):
            data, attrs = self._remote.read_with_attrs(source, start, end - start)
            self._compare(file, source, attrs)
            if len(data) == end - start:
                return data
            with file.lock:
                ours = file.authoritative or file.unsafe or end > file.size
                settled = not file.unsafe and not file.sent and file.truncating_to is None
                stored = file.validator[0] if settled and file.validator is not None else 0
            if not ours:
                raise FsError(errno.ESTALE, "the file was cut short on the server while it was open here")
            # A hole is where the server, too, says that the file ends. What it has told to have, or tells now, is none; but our
            # own writes may have come between the two answers: once more.
            if attrs.size is not None and max(attrs.size, stored or 0) <= start + len(data):
                return data.ljust(end - start, b"\0")
        raise FsError(errno.EIO, "the server does not give the bytes that it says it has")

    @staticmethod
    def _compare(file: FileCache, source: RemoteFile, now: Attrs) -> None:
        """``now`` was asked for behind the bytes: ESTALE where they are another version's than the handle was opened at."""
        with file.lock:
            ours = file.authoritative or file.unsafe or file.validator is None
            if not ours and file.validator != (now.size, now.mtime):
                file.distrust()
                file.size = now.size or 0
                file.validator = (now.size, now.mtime)
            if file.is_stale(source.seen):
                raise _changed_meanwhile()

    @staticmethod
    def _compose(
        file: FileCache, start: int, end: int, blocks: Dict[int, bytes], pieces: List[Tuple[int, bytes]]
    ) -> bytes:
        overlaid = file.is_hole(end - 1) or (bool(file.valid) and file.valid.overlaps(start, end))
        if not overlaid and not pieces and len(blocks) == 1:
            ((index, data),) = blocks.items()
            base = index * BLOCK_BYTES
            return data if start == base and end == base + len(data) else data[start - base : end - base]
        if not overlaid and not blocks and len(pieces) == 1:
            return pieces[0][1]
        out = bytearray(end - start)
        for index, data in blocks.items():
            base = index * BLOCK_BYTES
            low, high = max(start, base), min(end, base + len(data))
            out[low - start : high - start] = memoryview(data)[low - base : high - base]
        for low, data in pieces:
            out[low - start : low - start + len(data)] = data
        if overlaid:
            if file.cut_to is not None and file.cut_to < end:
                hole = max(start, file.cut_to) - start
                out[hole:] = bytes(len(out) - hole)
            file.overlay(start, out)
        return bytes(out)
