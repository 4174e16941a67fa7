"""chacha20-poly1305@openssh.com: how packets of one direction are sealed and opened.

The construction is OpenSSH's (PROTOCOL.chacha20poly1305 in its source), not RFC 8439's: the packet length is encrypted under a
key of its own, the nonce is the packet's sequence number, and the tag covers encrypted length and encrypted packet.

    key      64 bytes: [:32] encrypts the packet and makes the Poly1305 key (block 0), [32:] encrypts the length
    nonce    the sequence number, 64 bits, big-endian
    packet   4 bytes of encrypted length | encrypted padding length, payload, padding | 16 bytes of tag
"""

from __future__ import annotations

from struct import Struct
from typing import Union

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.poly1305 import Poly1305

NAME = "chacha20-poly1305@openssh.com"
KEY_BYTES = 64

# cryptography's ChaCha20 takes the block counter (64 bits, little-endian) and the nonce as one 16-byte value.
_NONCE_AT_BLOCK_0 = Struct(">QQ")  # block counter 0, so its byte order is of no matter
_LENGTH = Struct(">I")
_BLOCK_0 = bytes(64)

Buffer = Union[bytes, bytearray, memoryview]


class BadTag(Exception):
    """The packet is not what the peer sealed."""


class ChaCha20Poly1305:
    """One direction's cipher state. Not thread-safe. ``reset_nonce`` on a kept context halves the cost of a new one."""

    block_size = 8  # padding makes the packet without its length field a multiple of this
    tag_size = 16
    head_size = 4
    pads_length_field = False

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key of {KEY_BYTES} bytes is needed")
        start = bytes(16)
        self._packets = Cipher(algorithms.ChaCha20(key[:32], start), mode=None).encryptor()
        self._lengths = Cipher(algorithms.ChaCha20(key[32:], start), mode=None).encryptor()

    def seal(self, sequence: int, plain: memoryview, out: memoryview) -> None:
        """Encrypt ``plain`` (length field and packet) into ``out``, which has room for the tag as well."""
        size = len(plain)
        nonce = _NONCE_AT_BLOCK_0.pack(0, sequence)
        self._lengths.reset_nonce(nonce)
        self._lengths.update_into(plain[:4], out[:4])
        poly_key = self._start(nonce)
        self._packets.update_into(plain[4:], out[4:size])
        out[size : size + 16] = Poly1305.generate_tag(poly_key, out[:size])

    def length(self, sequence: int, head: memoryview) -> int:
        """The packet length in the encrypted length field; not yet authenticated, so to be bounded before use."""
        self._lengths.reset_nonce(_NONCE_AT_BLOCK_0.pack(0, sequence))
        return int(_LENGTH.unpack(self._lengths.update(head[:4]))[0])

    def open(self, sequence: int, packet: memoryview, out: memoryview) -> None:
        """Check the tag of ``packet`` (encrypted length, packet, tag), then decrypt the packet into ``out``.

        Raises BadTag, and has then decrypted nothing.
        """
        size = len(packet) - 16
        poly_key = self._start(_NONCE_AT_BLOCK_0.pack(0, sequence))
        try:
            Poly1305.verify_tag(poly_key, packet[:size], bytes(packet[size:]))  # in constant time
        except InvalidSignature:
            raise BadTag from None
        self._packets.update_into(packet[4:size], out[: size - 4])

    def _start(self, nonce: bytes) -> bytes:
        """The Poly1305 key of this packet; leaves the keystream at block 1, where the packet's own begins."""
        self._packets.reset_nonce(nonce)
        return self._packets.update(_BLOCK_0)[:32]
