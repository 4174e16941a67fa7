"""Sealed packets that wait for the socket: what is sent over an SSH connection, in order.

Packets are sealed in order under a lock that is never held over a system call, and queued.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from struct import Struct
from typing import Any, Deque, List, Sequence

from paramiko import SSHException

from sftpmount.ssh.chacha20 import Buffer
from sftpmount.ssh.ciphers import Clear

PACKET_BYTES_MAX = 256 * 1024  # OpenSSH's PACKET_MAX_SIZE; no one sends more
SCRATCH_BYTES = PACKET_BYTES_MAX + 64
CHANNEL_DATA = 94
_ROOM_BYTES = 160 * 1024  # for a full batch of a channel, sealed
_ROOMS_KEPT_MAX = 4
_RANDOM_BYTES = 8192
_QUEUED_PACKETS_MAX = 10_000  # more are answers to a server that asks and asks, and does not read
_SEQUENCE_MASK = 0xFFFFFFFF
_HEADER = Struct(">IB")  # packet length, padding length
_DATA_HEADER = Struct(">IBBII")  # packet length, padding length, CHANNEL_DATA, recipient channel, data length


class Gather:
    """Reads through several buffers as if they were one."""

    def __init__(self, parts: Sequence[Buffer]) -> None:
        self._parts: List[memoryview] = [memoryview(part).cast("B") for part in parts]
        self.left = sum(map(len, self._parts))  # bytes not yet taken
        self._index = 0
        self._offset = 0

    def fill(self, out: memoryview) -> None:
        """Copy the next len(out) bytes."""
        at, size = 0, len(out)
        self.left -= size
        while at < size:
            part = self._parts[self._index]
            count = min(size - at, len(part) - self._offset)
            out[at : at + count] = part[self._offset : self._offset + count]
            at += count
            self._offset += count
            if self._offset == len(part):
                self._index += 1
                self._offset = 0


class Sealed:
    """The queue, and what seals packets into it. ``bytes`` and ``packets``: how much with the present keys.

    ``queue`` is emptied from its left by one thread at a time, which gives each buffer back to ``spend``.
    """

    def __init__(self) -> None:
        self.queue: Deque[memoryview] = deque()
        self.bytes = self.packets = 0
        self._lock = threading.Lock()
        self._cipher: Any = Clear()
        self._sequence = 0
        self._plain = memoryview(bytearray(SCRATCH_BYTES))
        self._random, self._random_used = b"", 0
        self._rooms: List[bytearray] = []  # to seal into; taken under _lock

    def set_cipher(self, cipher: Any) -> None:
        """From the next packet on."""
        with self._lock:
            self._cipher = cipher
            self.bytes = self.packets = 0

    def reset_sequence(self) -> None:
        """Number the packets from 0 again: strict key exchange."""
        with self._lock:
            self._sequence = 0

    def seal(self, payload: bytes) -> None:
        """Queue one packet."""
        size = len(payload)
        if size > PACKET_BYTES_MAX - 64:
            raise SSHException(f"a packet of {size} bytes is too large to send")
        if len(self.queue) > _QUEUED_PACKETS_MAX:
            raise SSHException("the server does not read what we send")
        with self._lock:
            cipher = self._cipher
            padding = _padding(cipher, 1 + size)
            length = 1 + size + padding
            out = memoryview(bytearray(4 + length + cipher.tag_size))
            plain = self._plain[: 4 + length]
            _HEADER.pack_into(plain, 0, length, padding)
            plain[5 : 5 + size] = payload
            plain[5 + size :] = self._noise(padding)
            self._seal(cipher, plain, out)
            self.queue.append(out)

    def seal_data(self, channel: int, source: Gather, size: int, packet_bytes_max: int) -> None:
        """Queue the next ``size`` bytes of ``source`` as CHANNEL_DATA packets for the peer's ``channel``."""
        with self._lock:
            cipher = self._cipher
            overhead = 4 + cipher.tag_size
            lengths = []
            left = size
            while left:
                count = min(left, packet_bytes_max)
                padding = _padding(cipher, 10 + count)
                lengths.append((count, padding, 10 + count + padding))
                left -= count
            out = self._room(sum(length for _, _, length in lengths) + overhead * len(lengths))
            at = 0
            for count, padding, length in lengths:
                plain = self._plain[: 4 + length]
                _DATA_HEADER.pack_into(plain, 0, length, padding, CHANNEL_DATA, channel, count)
                source.fill(plain[14 : 14 + count])
                plain[14 + count :] = self._noise(padding)
                self._seal(cipher, plain, out[at : at + length + overhead])
                at += length + overhead
            self.queue.append(out)

    def _room(self, size: int) -> memoryview:
        """``size`` bytes to seal into; for bulk of a buffer that was sent before: the kernel clears the pages of a new one."""
        if not _ROOM_BYTES // 2 < size <= _ROOM_BYTES:
            return memoryview(bytearray(size))
        return memoryview(self._rooms.pop() if self._rooms else bytearray(_ROOM_BYTES))[:size]

    def _noise(self, count: int) -> bytes:
        """Random padding; a system call for each packet would cost more than to encrypt it."""
        if len(self._random) - self._random_used < count:
            self._random, self._random_used = os.urandom(_RANDOM_BYTES), 0
        used = self._random_used
        self._random_used += count
        return self._random[used : used + count]

    def _seal(self, cipher: Any, plain: memoryview, out: memoryview) -> None:
        cipher.seal(self._sequence, plain, out)
        self._sequence = (self._sequence + 1) & _SEQUENCE_MASK
        self.bytes += len(out)
        self.packets += 1

    def spend(self, packet: memoryview) -> None:
        """All of it was sent: its buffer may be sealed into again."""
        room = packet.obj
        if isinstance(room, bytearray) and len(room) == _ROOM_BYTES and len(self._rooms) < _ROOMS_KEPT_MAX:
            self._rooms.append(room)


def _padding(cipher: Any, size: int) -> int:
    """Padding for ``size`` bytes of padding length and payload: at least 4 bytes, up to the block size."""
    block: int = cipher.block_size
    return 4 + (-(size + 4 + (4 if cipher.pads_length_field else 0))) % block
