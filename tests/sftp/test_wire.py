"""SFTP version 3 on the wire. The vectors are written by hand from the draft (filexfer-02) and OpenSSH's PROTOCOL."""

from __future__ import annotations

import struct
import time
import tracemalloc
from typing import Any, Callable, List, Tuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftpmount.errors import StatusError
from sftpmount.sftp import wire
from sftpmount.sftp.wire import Attrs, Cursor, Entry, Limits, ReplyReader, StatVfs, WireError

# What -> (its bytes as we write them, the hex of the document). The id of each request is 7.
REQUESTS: List[Tuple[str, Callable[[], bytes], str]] = [
    ("INIT", wire.init, "00000005 01 00000003"),
    (
        "OPEN /a for reading",
        lambda: packet(3, wire.open_body(b"/a", wire.FXF_READ)),
        "00000013 03 00000007 00000002 2f61 00000001 00000000",
    ),
    (
        "OPEN, create exclusively, truncate, write, append, mode 0640",
        lambda: packet(3, wire.open_body(b"x", 2 | 4 | 8 | 16 | 32, Attrs(mode=0o640))),
        "00000016 03 00000007 00000001 78 0000003e 00000004 000001a0",
    ),
    ("CLOSE", lambda: packet(4, wire.string(b"h1")), "0000000b 04 00000007 00000002 6831"),
    (
        "READ 32768 bytes at 2**32",
        lambda: packet(5, wire.read_body(b"h", 1 << 32, 32768)),
        "00000016 05 00000007 00000001 68 0000000100000000 00008000",
    ),
    (
        "WRITE three bytes at 5",
        lambda: packet(6, wire.write_head(b"h", 5, 3) + b"abc"),
        "00000019 06 00000007 00000001 68 0000000000000005 00000003 616263",
    ),
    ("LSTAT", lambda: packet(7, wire.string(b"/")), "0000000a 07 00000007 00000001 2f"),
    ("FSTAT", lambda: packet(8, wire.string(b"h")), "0000000a 08 00000007 00000001 68"),
    (
        "SETSTAT of everything",
        lambda: packet(9, wire.string(b"f") + wire.attrs(Attrs(4096, 1000, 100, 0o100644, 1, 0x7FFFFFFF))),
        "0000002a 09 00000007 00000001 66 0000000f 0000000000001000 000003e8 00000064 000081a4 00000001 7fffffff",
    ),
    (
        "FSETSTAT of the times",
        lambda: packet(10, wire.string(b"h") + wire.attrs(Attrs(atime=0, mtime=0xFFFFFFFF))),
        "00000016 0a 00000007 00000001 68 00000008 00000000 ffffffff",
    ),
    ("OPENDIR", lambda: packet(11, wire.string(b"/d")), "0000000b 0b 00000007 00000002 2f64"),
    ("READDIR", lambda: packet(12, wire.string(b"h")), "0000000a 0c 00000007 00000001 68"),
    ("REMOVE", lambda: packet(13, wire.string(b"/f")), "0000000b 0d 00000007 00000002 2f66"),
    (
        "MKDIR 0755",
        lambda: packet(14, wire.string(b"/d") + wire.attrs(Attrs(mode=0o755))),
        "00000013 0e 00000007 00000002 2f64 00000004 000001ed",
    ),
    (
        "RENAME",
        lambda: packet(18, wire.string(b"/a") + wire.string(b"/b")),
        "00000011 12 00000007 00000002 2f61 00000002 2f62",
    ),
    (
        "SYMLINK as OpenSSH's server reads it: target, then link (PROTOCOL section 4.1)",
        lambda: packet(20, wire.symlink_body(b"to", b"/l")),
        "00000011 14 00000007 00000002 746f 00000002 2f6c",
    ),
    (
        "posix-rename@openssh.com (PROTOCOL 4.3)",
        lambda: packet(
            200, wire.extended_body(b"posix-rename@openssh.com", wire.string(b"a"), wire.string(b"b"))
        ),
        "0000002b c8 00000007 00000018 706f7369782d72656e616d65406f70656e7373682e636f6d 00000001 61 00000001 62",
    ),
    (
        "fsync@openssh.com (PROTOCOL 4.6)",
        lambda: packet(200, wire.extended_body(b"fsync@openssh.com", wire.string(b"h"))),
        "0000001f c8 00000007 00000011 6673796e63406f70656e7373682e636f6d 00000001 68",
    ),
    (
        "a name that is not UTF-8",
        lambda: packet(17, wire.string(b"\xff\x00/")),
        "0000000c 11 00000007 00000003 ff002f",
    ),
]

ATTRS_ALL = "0000000f 0000000000001000 000003e8 00000064 000081a4 00000001 00000002"

# What -> (hex of the reply's body behind the id, its parser, the value).
BODIES: List[Tuple[str, str, Callable[[bytes], Any], Any]] = [
    ("HANDLE", "00000004 00000001", wire.parse_handle, b"\0\0\0\1"),
    ("HANDLE of 256 bytes", "00000100" + "61" * 256, wire.parse_handle, b"a" * 256),
    ("ATTRS, none", "00000000", wire.parse_attrs, Attrs()),
    ("ATTRS, all", ATTRS_ALL, wire.parse_attrs, Attrs(4096, 1000, 100, 0o100644, 1, 2)),
    ("ATTRS, the largest size", "00000001 7fffffffffffffff", wire.parse_attrs, Attrs(size=(1 << 63) - 1)),
    (
        "ATTRS with extended pairs",
        "80000004 000001ff 00000002 00000001 61 00000001 62 00000000 00000000",
        wire.parse_attrs,
        Attrs(mode=0o777),
    ),
    ("NAME, none", "00000000", wire.parse_names, []),
    (
        "NAME, two",
        "00000002 00000001 61 00000002 6c61 00000000 00000002 2e2e 00000000 00000004 000041ed",
        wire.parse_names,
        [Entry(b"a", b"la", Attrs()), Entry(b"..", b"", Attrs(mode=0o40755))],
    ),
    (
        "limits@openssh.com",
        "0000000000040000 000000000003fc00 000000000003fc00 0000000000000040",
        wire.parse_limits,
        Limits(262144, 261120, 261120, 64),
    ),
    (
        "statvfs@openssh.com",
        " ".join(f"{n:016x}" for n in range(1, 12)),
        wire.parse_statvfs,
        StatVfs(*range(1, 12)),
    ),
    ("VERSION without extensions", "", wire.parse_extensions, {}),
    (
        "VERSION with two",
        "00000001 61 00000001 31 00000002 6262 00000000",
        wire.parse_extensions,
        {b"a": b"1", b"bb": b""},
    ),
    ("STATUS OK", "00000000 00000007 53756363657373 00000000", wire.parse_status, None),
]

PARSERS: List[Callable[[bytes], Any]] = [
    wire.parse_handle,
    wire.parse_attrs,
    wire.parse_names,
    wire.parse_limits,
    wire.parse_statvfs,
    wire.parse_extensions,
    wire.parse_status,
]

# What -> (hex of a body, the parser that must refuse it).
BROKEN: List[Tuple[str, str, Callable[[bytes], Any]]] = [
    ("nothing at all", "", wire.parse_handle),
    ("an empty handle", "00000000", wire.parse_handle),
    ("a handle of 257 bytes", "00000101" + "61" * 257, wire.parse_handle),
    ("a string longer than its packet", "00000005 61626364", wire.parse_handle),
    ("a string of 4 GiB", "ffffffff 61", wire.parse_handle),
    ("a length cut off", "000001", wire.parse_handle),
    ("attributes without their flags", "", wire.parse_attrs),
    ("a size cut off", "00000001 00000000", wire.parse_attrs),
    ("a gid missing", "00000002 00000000", wire.parse_attrs),
    ("a size that is negative to a file system", "00000001 8000000000000000", wire.parse_attrs),
    ("2**32 - 1 extended pairs", "80000000 ffffffff", wire.parse_attrs),
    ("an extended pair cut off", "80000000 00000001 00000001 61", wire.parse_attrs),
    ("2**32 - 1 names", "ffffffff", wire.parse_names),
    ("more names than bytes", "00000003 00000000 00000000 00000000", wire.parse_names),
    ("a name without attributes", "00000001 00000001 61 00000001 61", wire.parse_names),
    ("three limits", "00" * 24, wire.parse_limits),
    ("half a statvfs", "00" * 44, wire.parse_statvfs),
    ("an extension without its value", "00000001 61", wire.parse_extensions),
    ("a status without a code", "0000", wire.parse_status),
    ("a status whose message is cut off", "00000004 00000009 61", wire.parse_status),
]


def ids(table: List[Any]) -> List[str]:
    return [row[0] for row in table]


def unhex(text: str) -> bytes:
    return bytes.fromhex(text.replace(" ", ""))


def packet(kind: int, body: bytes) -> bytes:
    return wire.header(kind, 7, len(body)) + body


def reply(kind: int, request_id: int, body: bytes) -> bytes:
    return struct.pack(">IBI", 5 + len(body), kind, request_id) + body


class TestWriters:
    @pytest.mark.parametrize(("_", "written", "expected"), REQUESTS, ids=ids(REQUESTS))
    def test_request(self, _: str, written: Callable[[], bytes], expected: str) -> None:
        assert written().hex() == expected.replace(" ", "")

    @pytest.mark.parametrize(
        ("seconds", "on_the_wire"),
        [(-1, 0), (-(1 << 40), 0), (0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (1 << 32, 0xFFFFFFFF)],
    )
    def test_times_that_version_3_cannot_tell_are_the_nearest_it_can(
        self, seconds: int, on_the_wire: int
    ) -> None:
        assert wire.attrs(Attrs(atime=seconds, mtime=seconds)) == struct.pack(
            ">III", 8, on_the_wire, on_the_wire
        )

    def test_ids_are_unsigned_32_bit(self) -> None:
        assert wire.header(5, 0xFFFFFFFF, 0) == unhex("00000005 05 ffffffff")


class TestReaders:
    @pytest.mark.parametrize(("_", "body", "parse", "value"), BODIES, ids=ids(BODIES))
    def test_body(self, _: str, body: str, parse: Callable[[bytes], Any], value: Any) -> None:
        assert parse(unhex(body)) == value

    @pytest.mark.parametrize(("_", "body", "parse", "value"), BODIES, ids=ids(BODIES))
    def test_body_cut_anywhere_is_refused_or_another_whole_value(
        self, _: str, body: str, parse: Callable[[bytes], Any], value: Any
    ) -> None:
        whole = unhex(body)
        for length in range(len(whole)):
            try:
                parse(whole[:length])
            except WireError:
                continue
            # A status may lack its message and language (version 2), extensions may end between two pairs.
            assert parse in (wire.parse_status, wire.parse_extensions)

    @pytest.mark.parametrize(("_", "body", "parse"), BROKEN, ids=ids(BROKEN))
    def test_broken(self, _: str, body: str, parse: Callable[[bytes], Any]) -> None:
        with pytest.raises(WireError):
            parse(unhex(body))

    def test_status(self) -> None:
        status = wire.parse_status(unhex("00000004 00000007 4661696c757265 00000002 656e"))
        assert isinstance(status, StatusError)
        assert (status.code, status.message) == (4, "Failure")

    def test_status_of_version_2_has_no_message(self) -> None:
        status = wire.parse_status(unhex("00000002"))
        assert status is not None
        assert (status.code, status.message) == (2, "")

    def test_status_message_of_any_bytes_and_any_length(self) -> None:
        status = wire.parse_status(struct.pack(">II", 4, 1 << 16) + b"\xff" * (1 << 16))
        assert status is not None
        assert len(status.message) <= 200

    @pytest.mark.parametrize(
        ("name", "plain"),
        [
            (b"a", True),
            (b"...", True),
            (b"\xff\n ", True),
            (b"x" * 255, True),
            (b"", False),
            (b".", False),
            (b"..", False),
            (b"/", False),
            (b"../../etc/passwd", False),
            (b"a/b", False),
            (b"a\0", False),
            (b"x" * 256, False),
        ],
    )
    def test_names_that_a_directory_can_hold(self, name: bytes, plain: bool) -> None:
        assert wire.is_plain_name(name) is plain

    def test_cursor_reads_to_the_end_and_not_beyond(self) -> None:
        cursor = Cursor(unhex("00000001 0000000000000002 00000001 61"))
        assert (cursor.u32(), cursor.u64(), cursor.at_end, cursor.string(), cursor.at_end) == (
            1,
            2,
            False,
            b"a",
            True,
        )
        for read in (cursor.u32, cursor.u64, cursor.string, cursor.attrs):
            with pytest.raises(WireError):
                read()


STREAM = b"".join(
    [
        reply(101, 1, unhex("00000000 00000000 00000000")),
        reply(103, 2, unhex("00000003 616263")),
        reply(102, 3, unhex("00000001 68")),
        reply(103, 4, unhex("00000000")),
        reply(104, 0xFFFFFFFF, unhex("00000000")),
        reply(2, 3, b""),
    ]
)
REPLIES = [
    (101, 1, unhex("00000000 00000000 00000000")),
    (103, 2, b"abc"),
    (102, 3, unhex("00000001 68")),
    (103, 4, b""),
    (104, 0xFFFFFFFF, unhex("00000000")),
    (2, 3, b""),
]


def fed(chunks: List[bytes]) -> List[Tuple[int, int, bytes]]:
    reader = ReplyReader()
    return [tuple(each) for chunk in chunks for each in reader.feed(chunk)]  # type: ignore[misc]


class TestReplyReader:
    def test_whole(self) -> None:
        assert fed([STREAM]) == REPLIES

    def test_byte_by_byte(self) -> None:
        assert fed([STREAM[i : i + 1] for i in range(len(STREAM))]) == REPLIES

    @given(st.lists(st.integers(0, len(STREAM)), max_size=12))
    def test_cut_anywhere(self, cuts: List[int]) -> None:
        edges = [0, *sorted(cuts), len(STREAM)]
        assert fed([STREAM[a:b] for a, b in zip(edges, edges[1:])]) == REPLIES

    def test_each_reply_comes_with_its_last_byte(self) -> None:
        reader = ReplyReader()
        counts = [len(reader.feed(STREAM[i : i + 1])) for i in range(len(STREAM))]
        ends = [i for i, count in enumerate(counts) if count]
        assert counts.count(1) == len(REPLIES)
        assert ends[0] == 4 + 5 + 12 - 1

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_any_buffer_is_taken(self, kind: Callable[[bytes], Any]) -> None:
        assert fed([kind(STREAM)]) == REPLIES

    @pytest.mark.parametrize("length", [0, 1, 4, (1 << 20) + 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
    def test_impossible_lengths_are_refused_at_their_fourth_byte(self, length: int) -> None:
        reader = ReplyReader()
        head = struct.pack(">I", length)
        assert reader.feed(head[:3]) == []
        with pytest.raises(WireError):
            reader.feed(head[3:])

    def test_the_largest_reply(self) -> None:
        body = struct.pack(">I", (1 << 20) - 9) + bytes((1 << 20) - 9)
        ((kind, request_id, data),) = fed([reply(103, 9, body)])
        assert (kind, request_id, len(data)) == (103, 9, (1 << 20) - 9)

    @pytest.mark.parametrize("said", [0, 2, 4, 0xFFFFFFFF])
    def test_data_whose_length_is_not_that_of_its_packet(self, said: int) -> None:
        with pytest.raises(WireError):
            fed([reply(103, 1, struct.pack(">I", said) + b"abc")])

    def test_data_without_a_length(self) -> None:
        with pytest.raises(WireError):
            fed([reply(103, 1, b"\0\0\0")])

    def test_one_byte_at_a_time_costs_neither_time_nor_memory(self) -> None:
        """A server may cut its replies as it likes; what is kept stays near the size of the packet, and so does the work."""
        size = 200_000
        stream = reply(103, 1, struct.pack(">I", size) + bytes(size))
        reader = ReplyReader()
        tracemalloc.start()
        try:
            for i in range(len(stream) - 1):
                reader.feed(stream[i : i + 1])
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        started = time.process_time()
        assert len(reader.feed(stream[-1:])) == 1
        last = time.process_time() - started
        assert held < 20 * size, f"{held} bytes are held for a packet of {size}"
        assert last < 0.5, f"putting the packet together took {last:.2f} s"


u32s = st.integers(0, 0xFFFFFFFF)
whole_attrs = st.builds(
    lambda size, owner, mode, times: Attrs(size, owner[0], owner[1], mode, times[0], times[1]),
    st.none() | st.integers(0, (1 << 63) - 1),
    st.just((None, None)) | st.tuples(u32s, u32s),
    st.none() | u32s,
    st.just((None, None)) | st.tuples(u32s, u32s),
)


class TestAnything:
    @given(st.binary(max_size=300), st.sampled_from(PARSERS))
    def test_arbitrary_bytes_raise_nothing_but_wire_error(
        self, body: bytes, parse: Callable[[bytes], Any]
    ) -> None:
        try:
            parse(body)
        except WireError:
            pass

    @given(st.lists(st.binary(max_size=40), max_size=20))
    def test_an_arbitrary_stream_raises_nothing_but_wire_error(self, chunks: List[bytes]) -> None:
        reader = ReplyReader()
        total = 0
        try:
            for chunk in chunks:
                total += sum(9 + len(each.body) for each in reader.feed(chunk))
        except WireError:
            return
        assert total <= sum(map(len, chunks))

    @given(
        st.lists(
            st.tuples(st.sampled_from([101, 102, 103, 104, 105, 201, 7]), u32s, st.binary(max_size=60)),
            max_size=8,
        ),
        st.integers(1, 50),
    )
    def test_framed_noise_comes_out_as_it_went_in(
        self, sent: List[Tuple[int, int, bytes]], step: int
    ) -> None:
        stream = b"".join(
            reply(kind, number, struct.pack(">I", len(body)) + body if kind == 103 else body)
            for kind, number, body in sent
        )
        assert fed([stream[i : i + step] for i in range(0, len(stream), step)]) == sent

    @given(whole_attrs)
    def test_attrs_round_trip(self, value: Attrs) -> None:
        cursor = Cursor(wire.attrs(value))
        assert cursor.attrs() == value
        assert cursor.at_end

    @given(st.binary(max_size=300))
    def test_string_round_trip(self, value: bytes) -> None:
        assert Cursor(wire.string(value)).string() == value

    @given(st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=20), whole_attrs), max_size=6))
    def test_names_round_trip(self, entries: List[Tuple[bytes, bytes, Attrs]]) -> None:
        body = struct.pack(">I", len(entries)) + b"".join(
            wire.string(name) + wire.string(longname) + wire.attrs(value) for name, longname, value in entries
        )
        assert wire.parse_names(body) == entries

    @pytest.mark.parametrize("parse", PARSERS)
    def test_no_parser_takes_much_more_memory_than_its_packet(self, parse: Callable[[bytes], Any]) -> None:
        for head in ("ffffffff", "7fffffff", "00010000", "80000000 ffffffff"):
            body = unhex(head) + bytes(1000)
            tracemalloc.start()
            try:
                parse(body)
            except WireError:
                pass
            finally:
                _, peak = tracemalloc.get_traced_memory()
                tracemalloc.stop()
            assert peak < 200_000
