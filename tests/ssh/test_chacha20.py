"""chacha20-poly1305@openssh.com against a second implementation, written here from RFC 8439 and OpenSSH's description."""

from __future__ import annotations

import os
import struct
from typing import List

import pytest

from sftpmount.ssh.chacha20 import KEY_BYTES, BadTag, ChaCha20Poly1305


def quarter_round(s: List[int], a: int, b: int, c: int, d: int) -> None:
    for x, y, z, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        s[x] = (s[x] + s[y]) & 0xFFFFFFFF
        s[z] ^= s[x]
        s[z] = ((s[z] << turn) | (s[z] >> (32 - turn))) & 0xFFFFFFFF


def chacha20_block(key: bytes, last_four_words: bytes) -> bytes:
    start = list(struct.unpack("<16I", b"expand 32-byte k" + key + last_four_words))
    s = list(start)
    for _ in range(10):
        for columns in ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)):
            quarter_round(s, *columns)
        for diagonals in ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)):
            quarter_round(s, *diagonals)
    return struct.pack("<16I", *((a + b) & 0xFFFFFFFF for a, b in zip(s, start)))


def chacha20(key: bytes, counter: int, sequence: int, data: bytes) -> bytes:
    """The original ChaCha20: a counter and a nonce of 64 bits each."""
    blocks = range(counter, counter + (len(data) + 63) // 64)
    stream = b"".join(chacha20_block(key, struct.pack("<Q", n) + struct.pack(">Q", sequence)) for n in blocks)
    return bytes(a ^ b for a, b in zip(data, stream))


def poly1305(key: bytes, data: bytes) -> bytes:
    r = int.from_bytes(key[:16], "little") & 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF
    total = 0
    for at in range(0, len(data), 16):
        total = (total + int.from_bytes(data[at : at + 16] + b"\1", "little")) * r % (2**130 - 5)
    return ((total + int.from_bytes(key[16:], "little")) % 2**128).to_bytes(16, "little")


def sealed_by_the_book(key: bytes, sequence: int, plain: bytes) -> bytes:
    main, header = key[:32], key[32:]
    wire = chacha20(header, 0, sequence, plain[:4]) + chacha20(main, 1, sequence, plain[4:])
    return wire + poly1305(chacha20(main, 0, sequence, bytes(32)), wire)


def seal(cipher: ChaCha20Poly1305, sequence: int, plain: bytes) -> bytearray:
    out = bytearray(len(plain) + 16)
    cipher.seal(sequence, memoryview(plain), memoryview(out))
    return out


def packet(size: int) -> bytes:
    return struct.pack(">I", size) + os.urandom(size)


def test_the_reference_is_right() -> None:
    """RFC 8439 sections 2.3.2 and 2.5.2."""
    block = chacha20_block(bytes(range(32)), bytes.fromhex("01000000000000090000004a00000000"))
    assert block.hex().startswith("10f1e7e4d13b5915500fdd1fa32071c4")
    key = bytes.fromhex("85d6be7857556d337f4452fe42d506a80103808afb0db2fd4abff6af4149f51b")
    assert poly1305(key, b"Cryptographic Forum Research Group").hex() == "a8061dc1305136c6c22b8baf0c0127a9"


@pytest.mark.parametrize("size", [8, 16, 56, 64, 120, 1000, 4096])
@pytest.mark.parametrize("sequence", [0, 1, 3, 0x01020304, 0xFFFFFFFF])
def test_sealed_as_the_book_says(size: int, sequence: int) -> None:
    key, plain = os.urandom(KEY_BYTES), packet(size)
    assert bytes(seal(ChaCha20Poly1305(key), sequence, plain)) == sealed_by_the_book(key, sequence, plain)


def test_one_cipher_seals_and_opens_many_packets() -> None:
    key = os.urandom(KEY_BYTES)
    sender, receiver = ChaCha20Poly1305(key), ChaCha20Poly1305(key)
    for sequence, size in enumerate((8, 32784, 16, 264)):
        plain = packet(size)
        wire = memoryview(seal(sender, sequence, plain))
        assert bytes(wire) == sealed_by_the_book(key, sequence, plain)
        assert receiver.length(sequence, wire[:4]) == size
        out = memoryview(bytearray(40000))
        receiver.open(sequence, wire, out)
        assert bytes(out[:size]) == plain[4:]


@pytest.mark.parametrize("at", [0, 3, 4, 20, 67, 68, 83])
def test_a_changed_byte_is_refused_before_anything_is_decrypted(at: int) -> None:
    key = os.urandom(KEY_BYTES)
    wire = seal(ChaCha20Poly1305(key), 7, packet(64))
    wire[at] ^= 1
    out = memoryview(bytearray(64))
    with pytest.raises(BadTag):
        ChaCha20Poly1305(key).open(7, memoryview(wire), out)
    assert bytes(out) == bytes(64)


def test_a_packet_out_of_its_place_is_refused() -> None:
    key = os.urandom(KEY_BYTES)
    wire = seal(ChaCha20Poly1305(key), 7, packet(64))
    with pytest.raises(BadTag):
        ChaCha20Poly1305(key).open(8, memoryview(wire), memoryview(bytearray(64)))


def test_a_key_of_the_wrong_size_is_an_error() -> None:
    with pytest.raises(ValueError):
        ChaCha20Poly1305(bytes(32))
