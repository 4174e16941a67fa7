"""How the packets of one direction are sealed and opened, but for chacha20-poly1305 (its own module).

A cipher has ``block_size`` (what padding fills up to), ``tag_size``, ``head_size`` (bytes needed to know a packet's length),
``pads_length_field`` (whether the 4 bytes of the length count in the padding), and three methods:

    seal(sequence, plain, out)    plain: length field and packet; out: as long, and the tag
    length(sequence, head)        the packet's length, without the length field; to be bounded by the caller. Once per packet.
    open(sequence, packet, out)   packet: length field, packet and tag as received; out: the packet. Raises BadTag.

None is thread-safe.
"""

from __future__ import annotations

import hmac
from struct import Struct
from typing import Any, Optional

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import CipherContext
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sftpmount.ssh.chacha20 import BadTag, ChaCha20Poly1305

_U32 = Struct(">I")


class Clear:
    """No cipher: before the first key exchange."""

    block_size = 8
    tag_size = 0
    head_size = 4
    pads_length_field = True

    def seal(self, sequence: int, plain: memoryview, out: memoryview) -> None:
        out[: len(plain)] = plain

    def length(self, sequence: int, head: memoryview) -> int:
        return int(_U32.unpack_from(head)[0])

    def open(self, sequence: int, packet: memoryview, out: memoryview) -> None:
        out[: len(packet) - 4] = packet[4:]


class _Gcm:
    """aes*-gcm@openssh.com (RFC 5647): the length field is clear and authenticated; the last 64 bits of the nonce count."""

    block_size = 16
    tag_size = 16
    head_size = 4
    pads_length_field = False

    def __init__(self, cipher: AESGCM, nonce: bytes) -> None:
        self._cipher = cipher
        self._fixed = nonce[:4]
        self._counter = int.from_bytes(nonce[4:], "big")

    def _nonce(self) -> bytes:
        nonce = self._fixed + self._counter.to_bytes(8, "big")
        self._counter = (self._counter + 1) & 0xFFFFFFFFFFFFFFFF
        return nonce

    def seal(self, sequence: int, plain: memoryview, out: memoryview) -> None:
        head = plain[:4]
        out[:4] = head
        self._cipher.encrypt_into(self._nonce(), plain[4:], head, out[4 : len(plain) + 16])

    def length(self, sequence: int, head: memoryview) -> int:
        return int(_U32.unpack_from(head)[0])

    def open(self, sequence: int, packet: memoryview, out: memoryview) -> None:
        try:
            self._cipher.decrypt_into(self._nonce(), packet[4:], packet[:4], out[: len(packet) - 20])
        except InvalidTag:
            raise BadTag from None


class _EncryptThenMac:
    """A stream cipher with an -etm@openssh.com MAC: the length field is clear, the MAC covers what is on the wire."""

    head_size = 4
    pads_length_field = False

    def __init__(self, cipher: CipherContext, block_size: int, mac: Any, key: bytes, tag_size: int) -> None:
        self._cipher = cipher
        self._mac = hmac.new(key, None, mac)
        self.block_size = block_size
        self.tag_size = tag_size

    def _tag(self, sequence: int, wire: memoryview) -> bytes:
        mac = self._mac.copy()
        mac.update(_U32.pack(sequence))
        mac.update(wire)
        return mac.digest()[: self.tag_size]

    def seal(self, sequence: int, plain: memoryview, out: memoryview) -> None:
        size = len(plain)
        out[:4] = plain[:4]
        self._cipher.update_into(
            plain[4:], out[4:]
        )  # needs block_size - 1 bytes of room behind, which the tag's place gives
        out[size : size + self.tag_size] = self._tag(sequence, out[:size])

    def length(self, sequence: int, head: memoryview) -> int:
        return int(_U32.unpack_from(head)[0])

    def open(self, sequence: int, packet: memoryview, out: memoryview) -> None:
        size = len(packet) - self.tag_size
        if not hmac.compare_digest(self._tag(sequence, packet[:size]), packet[size:]):
            raise BadTag
        self._cipher.update_into(packet[4:size], out)


class _EncryptAndMac:
    """A stream cipher with a plain MAC (RFC 4253): everything is encrypted, the MAC covers the plaintext. ``compatible`` only."""

    pads_length_field = True

    def __init__(self, cipher: CipherContext, block_size: int, mac: Any, key: bytes, tag_size: int) -> None:
        self._cipher = cipher
        self._mac = hmac.new(key, None, mac)
        self._first = b""
        self.block_size = block_size
        self.head_size = block_size
        self.tag_size = tag_size

    def _tag(self, sequence: int, *plain: Any) -> bytes:
        mac = self._mac.copy()
        mac.update(_U32.pack(sequence))
        for part in plain:
            mac.update(part)
        return mac.digest()[: self.tag_size]

    def seal(self, sequence: int, plain: memoryview, out: memoryview) -> None:
        size = len(plain)
        tag = self._tag(sequence, plain)
        self._cipher.update_into(plain, out)
        out[size : size + self.tag_size] = tag

    def length(self, sequence: int, head: memoryview) -> int:
        self._first = self._cipher.update(head)
        return int(_U32.unpack_from(self._first)[0])

    def open(self, sequence: int, packet: memoryview, out: memoryview) -> None:
        first = self._first
        size = len(packet) - self.tag_size
        out[: len(first) - 4] = first[4:]
        self._cipher.update_into(packet[len(first) : size], out[len(first) - 4 :])
        if not hmac.compare_digest(self._tag(sequence, first[:4], out[: size - 4]), packet[size:]):
            raise BadTag


def make_cipher(
    engine: Any,
    block_size: int,
    mac: Any,
    tag_size: int,
    key: bytes,
    etm: bool,
    aead: bool,
    nonce: Optional[bytes],
) -> Any:
    """The cipher for what paramiko derived from the key exchange: its engine, MAC digest, and nonce or None."""
    if isinstance(engine, ChaCha20Poly1305):
        return engine
    if aead:
        assert nonce is not None
        return _Gcm(engine, nonce)
    return (_EncryptThenMac if etm else _EncryptAndMac)(engine, block_size, mac, key, tag_size)
