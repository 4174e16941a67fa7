"""The bytes we hold: clean blocks in an LRU that may forget any of them at any instant, and what is not yet safe.

A file is cut into blocks of 128 KiB, the largest write that the kernel hands down. Bytes written by us go through

    DIRTY --sent--> IN_FLIGHT --acknowledged--> WRITTEN --fsync acknowledged--> CLEAN
      ^                 |                          |
      +-----------------+--------------------------+   write failed, session lost, or written again

A server without fsync@openssh.com takes them from IN_FLIGHT to CLEAN. Invariants of a ``FileCache``, checked by
``check_invariants``:
1. dirty, in_flight and written lie within valid; each block that any of them touches has a buffer, no other has.
2. in_flight and written are disjoint, dirty and written are disjoint. dirty may overlap in_flight: bytes written again
   while they were on their way. They are sent again only when the first write has ended, so that never two writes are in
   flight over the same bytes.
3. No byte of valid lies at or past ``size``. A block with a buffer is not among the clean ones.
4. While anything is dirty, in flight or written, ``size`` is ours; else it is the server's.
"""

from __future__ import annotations

import collections
import threading
from typing import Any, Counter, Dict, Iterable, List, Optional, Protocol, Set, Tuple, Union

import cachetools

from .. import waiting
from ..errors import StatusError
from .extents import Extents

BLOCK_BYTES = 131072

Buffer = Union[bytes, bytearray]
BlockKey = Tuple[int, int]
Version = Tuple[Optional[int], Optional[int]]


class _Lru(cachetools.LRUCache[BlockKey, bytes]):
    """An LRU that tells which blocks of which file it still has."""

    def __init__(self, bytes_max: int) -> None:
        # A small block counts 512 bytes, about what it costs besides: a million small files must fit the limit too.
        super().__init__(bytes_max, getsizeof=lambda data: max(len(data), BLOCK_BYTES // 256))
        self.of_file: Dict[int, Set[int]] = {}

    def popitem(self) -> Tuple[BlockKey, bytes]:
        key, data = super().popitem()
        self._forget(key)
        return key, data

    def _forget(self, key: BlockKey) -> None:
        blocks = self.of_file.get(key[0])
        if blocks is not None:
            blocks.discard(key[1])
            if not blocks:
                del self.of_file[key[0]]


class CleanBlocks:
    """Blocks that the server has too, for all files together, at most ``bytes_max``. Thread-safe."""

    def __init__(self, bytes_max: int) -> None:
        self._lock = threading.Lock()
        self._lru = _Lru(max(bytes_max, BLOCK_BYTES))
        self.hits = 0
        self.misses = 0

    def get(self, file_id: int, index: int) -> Optional[bytes]:
        """Block ``index`` of a file; the last block of a file is short. None where it is not held."""
        with self._lock:
            data = self._lru.get((file_id, index))
            if data is None:
                self.misses += 1
            else:
                self.hits += 1
            return data

    def has(self, file_id: int, index: int) -> bool:
        """True where the block is held; it may be gone the next moment."""
        return (file_id, index) in self._lru

    def put(self, file_id: int, index: int, data: bytes) -> None:
        """Keep a block for as long as there is room."""
        with self._lock:
            self._lru[(file_id, index)] = data
            self._lru.of_file.setdefault(file_id, set()).add(index)

    def drop(self, file_id: int, first: int = 0, last: Optional[int] = None) -> None:
        """Forget blocks ``first`` to ``last`` (included; None = all that follow) of a file."""
        with self._lock:
            blocks = self._lru.of_file.get(file_id)
            if not blocks:
                return
            for index in [i for i in blocks if i >= first and (last is None or i <= last)]:
                del self._lru[(file_id, index)]
                blocks.discard(index)
            if not blocks:
                del self._lru.of_file[file_id]

    def state(self) -> Dict[str, int]:
        """For status: bytes held and at most to be held, and how often a block was at hand (hits) or not (misses)."""
        with self._lock:
            return {
                "bytes": self.held_bytes,
                "limit_bytes": int(self._lru.maxsize),
                "hits": self.hits,
                "misses": self.misses,
            }

    @property
    def held_bytes(self) -> int:
        """Bytes held now; a small block counts with what it costs besides."""
        return int(self._lru.currsize)


class Teller(Protocol):
    """An open handle, as far as failures go: ``owed`` is what it has not been told yet."""

    owed: Optional[StatusError]
    remote: Any  # sftp.remote.RemoteFile


class Read:
    """A read under way; ``stale`` once what it may have taken in is not the truth any more."""

    __slots__ = ("end", "stale", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.stale = False


class Commit:
    """An fsync under way: what it will make clean, and the least size the file was cut to since it was sent."""

    __slots__ = ("cut_later", "extents")

    def __init__(self, extents: Extents) -> None:
        self.extents = extents
        self.cut_later: Optional[int] = None


def block_range(start: int, end: int) -> range:
    """The indices of the blocks that ``[start, end)`` touches; none where it is empty."""
    return range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES) if start < end else 0)


class FileCache:
    """What is held of one file. Every method but the constructor is called with ``lock`` held."""

    def __init__(self, file_id: int, size: int, clean: CleanBlocks) -> None:
        self.file_id = file_id
        self.lock = threading.RLock()
        self.request_ended = threading.Condition(self.lock)
        self.size = size
        self.dirty = Extents()
        self.in_flight = Extents()
        self.leaving = Extents()  # the part of in_flight that a thread has taken and may not have sent yet
        self.written = Extents()
        self.valid = Extents()
        self.buffers: Dict[int, Buffer] = {}
        self.buffer_bytes = 0
        self.requests_in_flight = 0
        # Those that WRITEs of it have gone to, or are about to: how many are not answered yet.
        self.lanes: Counter[Any] = collections.Counter()
        self.discards = 0  # how often unsafe bytes were given up
        self.setbacks = 0  # how often bytes that had left, or were about to, were dirty again
        self.commits: List[Commit] = []  # what each fsync on its way will make clean
        self.failure: Optional[StatusError] = None  # why the server refused bytes that are dirty still
        self.handles: List[Teller] = []  # every open handle: each hears of a failure once
        self.writers: List[Any] = []  # sftp.remote.RemoteFile, open for writing; write-back uses the first
        self.fetches: Dict[int, Any] = {}  # block index -> cache.fetch.Fetch
        self.reads: List[Read] = []  # those under way
        # The least size the file was cut to since its last commit: a server that forgets may have the old bytes above it
        # again, so what is not held above it is not asked for: it is a hole. ``recut`` says that the server may have
        # forgotten: the cut is to be made again before anything is sent.
        self.cut_to: Optional[int] = None
        self.truncating_to: Optional[int] = None  # what a truncation on its way asks for
        self.recut = False
        self.cutting = waiting.RLock()  # held by who does that
        # The server's (size, mtime) that the clean bytes belong to; None while ours are the newer ones.
        self.validator: Optional[Version] = None
        self.is_young = False  # it may still change without its size and whole seconds telling
        # How often something was sent that changes the server's size or mtime, and how often when the validator was true.
        self.sends = 0
        self._sends_known = 0
        self.times_set = False  # by us, and not committed: a server that forgets may have older ones again
        # The server's mtime can only be younger, even after it forgot what was not committed.
        self.committed_mtime = 0
        self.touched_s = 0.0  # clock of the last write, for write-back by age
        self.unsafe_since_s = 0.0  # clock from which on there was always something unsafe; while ``unsafe``
        self.mtime: Optional[int] = (
            None  # what stat shows while the server's is not yet that of our last write
        )
        self.ahead_s = float("-inf")  # when the server was last asked for all of it, ahead of a program
        self._clean = clean

    def __str__(self) -> str:
        """What is known of the file, for the log."""
        return (
            f"size {self.size}, the server's (size, mtime) {self.validator}, sent since {self.sent}, times set "
            f"{self.times_set}, committed mtime {self.committed_mtime}, cut to {self.cut_to}, truncating to "
            f"{self.truncating_to}, dirty {self.dirty.total}, in flight "
            f"{self.in_flight.total}, written {self.written.total}, {len(self.writers)} writers"
        )

    @property
    def unsafe(self) -> bool:
        """True while any byte, or a cut, is not known to be on the server's disk (on the server, if it has no fsync)."""
        return bool(self.dirty or self.in_flight or self.written) or self.cut_to is not None

    @property
    def unsent(self) -> bool:
        """True while any byte is not acknowledged by the server."""
        return bool(self.dirty or self.in_flight)

    @property
    def sent(self) -> bool:
        """True while something was sent since the validator was taken."""
        return self.sends != self._sends_known

    @property
    def authoritative(self) -> bool:
        """True while our size and times are right and the server's are not yet; after a failed write the server's are."""
        return self.failure is None and bool(self.dirty or self.in_flight or self.writers)

    # -- writing ----------------------------------------------------------------------------------------------------

    def store(self, offset: int, data: bytes) -> None:
        """Take ``data`` in as dirty at ``offset``; the file grows where it reaches past the end."""
        end = offset + len(data)
        if offset > self.size:
            self._spoil_end()
        position = offset
        for index in block_range(offset, end):
            base = index * BLOCK_BYTES
            stop = min(end, base + BLOCK_BYTES)
            piece = (
                data if stop - position == len(data) else memoryview(data)[position - offset : stop - offset]
            )
            self._store_in_block(index, position - base, piece)
            self.fetches.pop(index, None)  # what it brings is older than this write
            position = stop
        self.size = max(self.size, end)
        self.valid.add(offset, end)
        self.dirty.add(offset, end)
        self.written.remove(offset, end)
        for commit in self.commits:
            commit.extents.remove(offset, end)

    def _store_in_block(self, index: int, start: int, piece: Union[bytes, memoryview]) -> None:
        buffer = self.buffers.get(index)
        if buffer is None:
            known = self._clean.get(self.file_id, index)
            if known is not None:
                self._clean.drop(self.file_id, index, index)
            elif start == 0 and isinstance(piece, bytes):
                # A whole block, or the start of one, is kept as the kernel gave it: no copy for bulk writes.
                self.buffers[index] = piece
                self.buffer_bytes += len(piece)
                return
            buffer = bytearray(BLOCK_BYTES)
            if known is not None:
                buffer[: len(known)] = known
                base = index * BLOCK_BYTES
                self.valid.add(base, min(base + len(known), max(self.size, base)))
            self.buffer_bytes += BLOCK_BYTES
        elif isinstance(buffer, bytes):
            self.buffer_bytes += BLOCK_BYTES - len(buffer)
            buffer = bytearray(buffer.ljust(BLOCK_BYTES, b"\0"))
        self.buffers[index] = buffer
        buffer[start : start + len(piece)] = piece

    def take_request(
        self, bytes_max: int, *, around: Optional[int] = None
    ) -> Optional[Tuple[int, List[memoryview]]]:
        """The next dirty bytes to send, moved to in_flight: where they begin, and the parts they consist of; or None.

        With ``around`` only a request of ``bytes_max`` from the dirty bytes about that offset: a shorter one may still grow.
        """
        begin = 0
        if around is not None:
            run = self.dirty.range_at(around)
            if run is None or run[1] - run[0] < bytes_max:
                return None
            begin = run[0]
        found = self.dirty.first(self.in_flight, start=begin)
        if found is None or (around is not None and found[1] - found[0] < bytes_max):
            return None
        start, end = found[0], min(found[1], found[0] + bytes_max)
        self.in_flight.add(start, end)
        self.leaving.add(start, end)
        self.dirty.remove(start, end)
        self.requests_in_flight += 1
        self.sends += 1
        parts = []
        for index in block_range(start, end):
            base = index * BLOCK_BYTES
            parts.append(memoryview(self.buffers[index])[max(start - base, 0) : end - base])
        return start, parts

    def left(self, start: int, end: int) -> None:
        """The request for ``[start, end)`` is with the session: an fsync that is sent from now on comes behind it."""
        self.leaving.remove(start, end)
        self.request_ended.notify_all()

    def acknowledged(self, start: int, end: int, *, durable: bool) -> None:
        """A WRITE ended well. ``durable``: there is no fsync to wait for, the bytes are as safe as this server makes them."""
        self.requests_in_flight -= 1
        self.in_flight.remove(start, end)
        for kept in self.valid.within(start, end):  # what was discarded or cut off meanwhile concerns nobody
            for low, high in self.dirty.gaps(*kept):
                self.written.add(low, high)
        if durable:
            self.committed(Extents([(start, end)]))
        self.request_ended.notify_all()

    def refused(self, failure: StatusError) -> None:
        """The server refused bytes of this file: sticky until they are stored, and told to every handle open now.

        Without such bytes (they were given up, or cut off, while they were on their way) there is nothing to tell.
        """
        if self.failure is None and (self.dirty or self.cut_to is not None):
            self.failure = failure
            for handle in self.handles:
                handle.owed = failure

    def failed(self, start: int, end: int) -> None:
        """A WRITE ended badly or has no known end: its bytes are dirty again (those written again meanwhile still are)."""
        self.setbacks += 1
        self.requests_in_flight -= 1
        self.in_flight.remove(start, end)
        for kept in self.valid.within(start, end):
            self.dirty.add(*kept)
        for commit in self.commits:  # an fsync that was sent behind it does not cover it
            commit.extents.remove(start, end)
        self.request_ended.notify_all()

    def begin_commit(self) -> Commit:
        """An fsync is about to be sent: it covers what has left before. Give the result to ``end_commit``."""
        commit = Commit(Extents(self.written))
        commit.extents.update(self.in_flight)
        for start, end in self.leaving:
            commit.extents.remove(start, end)
        self.commits.append(commit)
        return commit

    def end_commit(self, commit: Commit, *, ok: bool) -> None:
        """The fsync ended. What was written again since ``begin_commit`` is no longer in ``commit``."""
        self.commits.remove(commit)
        if ok:
            self.committed(commit.extents)
            if not self.recut and self.cut_to != commit.cut_later:
                self.cut_to = commit.cut_later
                self.changed()  # what is on its way may be from before the cut was made again
        self.request_ended.notify_all()

    def committed(self, ranges: Extents) -> None:
        """WRITTEN bytes of ``ranges`` are safe: clean blocks take them over."""
        for start, end in ranges:
            for low, high in self.written.within(start, end):
                self.written.remove(low, high)
                self._release(block_range(low, high))

    def resend(self) -> None:
        """An fsync was refused: nothing is known of what it covered, so all of it is to be sent again."""
        self.setbacks += 1
        for commit in self.commits:  # another one, sent before it is sent again, does not cover that
            for start, end in self.written:
                commit.extents.remove(start, end)
        self.dirty.update(self.written)
        self.written.clear()
        self.request_ended.notify_all()

    def lost(self) -> None:
        """The session ended: what was acknowledged but not committed may be gone with the server's memory."""
        self.recut = self.cut_to is not None
        self.resend()

    def _release(self, indices: Iterable[int]) -> None:
        """Drop the buffers of blocks in which nothing is unsafe any more; a fully known block becomes a clean one."""
        released = Extents()
        for index in indices:
            base = index * BLOCK_BYTES
            top = base + BLOCK_BYTES
            if (
                self.dirty.overlaps(base, top)
                or self.in_flight.overlaps(base, top)
                or self.written.overlaps(base, top)
            ):
                continue
            buffer = self.buffers.pop(index, None)
            if buffer is None:
                continue
            self.buffer_bytes -= len(buffer)
            self.fetches.pop(index, None)  # what it brings may be older than what leaves the buffer
            end = min(top, self.size)
            if base < end and self.valid.covers(base, end):
                whole = bytes(buffer) if end == top else bytes(buffer[: end - base])
                self._clean.put(self.file_id, index, whole)
            released.add(base, top)
        for start, end in released:
            self.valid.remove(start, end)
            for read in self.reads:
                read.stale |= read.start < end and read.end > start

    # -- reading ------------------------------------------------------------------------------------------------------

    def is_hole(self, start: int) -> bool:
        """True where the bytes from ``start`` on that are not held are zeros, whatever the server has there."""
        return self.cut_to is not None and start >= self.cut_to

    def overlay(self, start: int, into: bytearray) -> None:
        """Lay the bytes held in buffers over ``into``, which stands for ``[start, start + len(into))``."""
        for low, high in self.valid.within(start, start + len(into)):
            for index in block_range(low, high):
                base = index * BLOCK_BYTES
                a, b = max(low, base), min(high, base + BLOCK_BYTES)
                into[a - start : b - start] = memoryview(self.buffers[index])[a - base : b - base]

    # -- size and truth ---------------------------------------------------------------------------------------------------

    def truncate(self, size: int) -> None:
        """The file has ``size`` bytes now: what lies behind is forgotten, also what was dirty. Nothing may be in flight.

        Like data, the cut is only safe with the next commit: see ``cut_to``.
        """
        self._spoil_end()
        least = min(size, self.size)
        self.cut_to = least if self.cut_to is None else min(least, self.cut_to)
        for commit in self.commits:
            commit.cut_later = least if commit.cut_later is None else min(least, commit.cut_later)
        if size < self.size:
            keep = size // BLOCK_BYTES
            for ranges in (self.dirty, self.written, self.valid, *(c.extents for c in self.commits)):
                ranges.remove(size, max(ranges.end, size))
            self.size = size
            self._release([i for i in self.buffers if i >= keep])
            self._clean.drop(self.file_id, keep)
        self.size = size
        self.changed()

    def forget_cut(self) -> None:
        """There is nothing to commit a cut with, or nobody to commit it for."""
        self.cut_to = None
        self.recut = False
        for commit in self.commits:
            commit.cut_later = None

    def _spoil_end(self) -> None:
        """The block at the end of the file is about to hold more than it does: a short clean block would be wrong."""
        self._clean.drop(self.file_id, self.size // BLOCK_BYTES)

    def changed(self) -> None:
        """Clean bytes are not true any more: nothing fetched before may be taken in."""
        self.fetches.clear()
        for read in self.reads:
            read.stale = True

    def believe(self, version: Optional[Version], *, is_young: bool = False) -> None:
        """What is cached from now on belongs to this version of the server's file; ``is_young``: or to one like it."""
        self.validator = version
        self.is_young = is_young
        self._sends_known = self.sends

    def is_now(self, version: Optional[Version]) -> None:
        """What the server has is what we made of it: the handles that are open go on with it."""
        self.believe(version)
        for handle in self.handles:
            handle.remote.seen = version

    def stored(self, version: Version, sends: int) -> bool:
        """The server said this after our request number ``sends``: True where that is how the file is now."""
        if self.unsent or sends != self.sends or self.truncating_to is not None:
            return False  # another thread has sent more, and will ask
        self.is_now(version)
        self.mtime = None
        if not self.unsafe:
            self.committed_mtime = version[1] or 0
            self.times_set = False
        return True

    def is_stale(self, seen: Optional[Version]) -> bool:
        """True where a handle that was opened at ``seen`` would read another client's file now."""
        ours = self.authoritative or self.unsafe
        return not ours and seen is not None and self.validator is not None and seen != self.validator

    def may_be(self, size: Optional[int], mtime: Optional[int]) -> bool:
        """True where the server's file of that size and mtime can be the one that we have open."""
        if self.times_set:
            mtime = None
        if not self.sent and not self.authoritative and not self.unsafe:
            return self.validator is None or self.validator == (
                size,
                self.validator[1] if mtime is None else mtime,
            )
        known = self.validator[0] if self.validator is not None else None
        # A cut that the server forgot leaves it with more than we know of.
        if (
            size is not None
            and self.cut_to is None
            and size > max(self.size, known or 0, self.truncating_to or 0)
        ):
            return False
        return mtime is None or mtime >= self.committed_mtime

    @property
    def is_held(self) -> bool:
        """True where a file of one block, or of none, is among the clean ones; it may be gone the next moment."""
        return self.size == 0 or self._clean.has(self.file_id, 0)

    def distrust(self) -> None:
        """Forget every clean byte: the server's file is not the one they came from."""
        self._clean.drop(self.file_id)
        self.validator = None
        self.changed()

    def discard(self) -> None:
        """Give up what could not be stored: the last writer has gone, and was told."""
        self.discards += 1
        for ranges in (self.dirty, self.written, self.valid):
            ranges.clear()
        self.buffers.clear()
        self.buffer_bytes = 0
        self.failure = None
        self.forget_cut()
        self.distrust()
        self.request_ended.notify_all()

    def check_invariants(self) -> None:
        """Raise AssertionError where one of the module's invariants does not hold."""
        for ranges in (self.dirty, self.in_flight, self.written, self.valid):
            ranges.check_invariants()
        for ranges in (self.dirty, self.in_flight, self.written):
            for start, end in ranges:
                assert self.valid.covers(start, end) or ranges is self.in_flight, (ranges, self.valid)
                assert ranges is self.in_flight or all(i in self.buffers for i in block_range(start, end))
        for start, end in self.written:
            assert not self.in_flight.overlaps(start, end), "written and in flight"
            assert not self.dirty.overlaps(start, end), "written and dirty"
        assert self.valid.end <= self.size, (self.valid, self.size)
        assert not any(self._clean.has(self.file_id, index) for index in self.buffers), "clean and not"
        assert self.buffer_bytes == sum(map(len, self.buffers.values()))
