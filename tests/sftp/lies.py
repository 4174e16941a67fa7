"""An SFTP server that serves a directory honestly, but for one lie: ``python -I -S lies.py CONTROL``.

CONTROL is a file that holds the name of a lie; it is read at every request, so that a lie can begin and end under a living
session. ``LIES`` is the one table of them for the tests of every level: the codec gets the twisted reply, a session gets it
from the fake server, a mount from this program. A twist takes an honest reply as it goes over the wire and returns what is
sent in its place: no packet, one, or many.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import struct
import sys
from typing import Callable, Dict, List, NamedTuple, Tuple

STATUS, HANDLE, DATA, NAME, ATTRS, EXTENDED_REPLY = 101, 102, 103, 104, 105, 201
ESCAPE = b"\x1b]0;owned\x07\x1b[2J\x9b31m\r\n"  # sets a terminal's title, clears it, writes in red
LOOKS = ("LSTAT", "STAT", "FSTAT")
OPENS = ("OPEN", "OPENDIR")
CHANGES = (
    "WRITE",
    "SETSTAT",
    "FSETSTAT",
    "MKDIR",
    "RMDIR",
    "REMOVE",
    "posix-rename",
    "RENAME",
    "fsync",
    "CLOSE",
)
RESULTS = (*LOOKS, *OPENS, "READ", "READDIR")

Twist = Callable[[bytes], bytes]


class Lie(NamedTuple):
    """The replies to ``requests`` are twisted. What must become of them is said in ``end``:

    frame      the codec finds no packet in them
    body       the codec finds no value in the packet
    session    each packet is good by itself, and not what was asked for
    start      there is no session: it is the first reply of all
    deadline   nothing comes, or not all of it
    ""         it can be read: what is above must bear it
    """

    requests: Tuple[str, ...]
    twist: Twist
    end: str = ""


def string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def packet(kind: int, request_id: int, body: bytes) -> bytes:
    return struct.pack(">IBI", 5 + len(body), kind, request_id) + body


def cut(reply: bytes) -> Tuple[int, int, bytes]:
    kind, request_id = struct.unpack_from(">BI", reply, 4)
    return kind, request_id, reply[9:]


def instead(kind: int, body: bytes) -> Twist:
    """Another reply, to the same request."""
    return lambda reply: packet(kind, cut(reply)[1], body)


def status(code: int, text: bytes = b"") -> Twist:
    return instead(STATUS, struct.pack(">I", code) + string(text) + string(b""))


def only(kind: int, change: Callable[[bytes], bytes]) -> Twist:
    """Change the body of replies of this kind; the others (a STATUS) are left honest."""

    def twist(reply: bytes) -> bytes:
        found, request_id, body = cut(reply)
        return packet(kind, request_id, change(body)) if found == kind else reply

    return twist


def attrs(size: int = 4096, mode: int = 0o100644, mtime: int = 1_700_000_000) -> bytes:
    return struct.pack(">IQIIIII", 0xF, size, 0, 0, mode, mtime, mtime)


def field(at: int, form: str, change: Callable[[int], int]) -> Twist:
    """Change one number in the attributes of a reply that has all of them."""

    def changed(body: bytes) -> bytes:
        (value,) = struct.unpack_from(form, body, at)
        return body[:at] + struct.pack(form, change(value)) + body[at + struct.calcsize(form) :]

    return only(ATTRS, changed)


def more_names(*names: bytes, longname: bytes = b"", value: bytes = attrs()) -> Twist:
    """Names put before the honest ones."""

    def changed(body: bytes) -> bytes:
        (count,) = struct.unpack_from(">I", body)
        told = b"".join(string(name) + string(longname or name) + value for name in names)
        return struct.pack(">I", count + len(names)) + told + body[4:]

    return only(NAME, changed)


def endless(numbers: Callable[[], itertools.count[int]], longname: bytes = b"") -> Twist:
    """A listing that has no end; each reply holds 1000 names."""
    count = numbers()

    def twist(reply: bytes) -> bytes:
        entries = b"".join(string(b"n%d" % next(count)) + string(longname) + attrs() for _ in range(1000))
        return packet(NAME, cut(reply)[1], struct.pack(">I", 1000) + entries)

    return twist


def with_id(change: Callable[[int], int]) -> Twist:
    return lambda reply: reply[:5] + struct.pack(">I", change(cut(reply)[1]) & 0xFFFFFFFF) + reply[9:]


def with_length(length: int) -> Twist:
    return lambda reply: struct.pack(">I", length) + reply[4:]


def version(number: int, rest: bytes = b"") -> Twist:
    return lambda reply: packet(2, number, rest)


def in_type(kind: int) -> Callable[[int], int]:
    return lambda mode: stat.S_IMODE(mode) | kind


ALL_ONES = 0xFFFFFFFFFFFFFFFF
EVIL_NAMES = (b"", b".", b"..", b"/", b"../../evil", b"a/b", b"a\0b", b"x" * 256, b"\0", b"/etc/passwd")

LIES: Dict[str, Lie] = {
    # lengths and frames
    "a length of 0": Lie(RESULTS, with_length(0), "frame"),
    "a length of 4": Lie(RESULTS, with_length(4), "frame"),
    "a length of 2**32 - 1": Lie(RESULTS, with_length(0xFFFFFFFF), "frame"),
    "a length of -2**31": Lie(RESULTS, with_length(0x80000000), "frame"),
    "a length one too long": Lie(
        ("LSTAT",), lambda reply: struct.pack(">I", len(reply) - 3) + reply[4:], "deadline"
    ),
    "noise": Lie(RESULTS, lambda reply: ESCAPE * 100, "frame"),
    # ids
    "an id of nobody": Lie(RESULTS, with_id(lambda number: number + 100_000), "session"),
    "an id of 0": Lie(RESULTS, with_id(lambda number: 0), "session"),
    "every reply twice": Lie(RESULTS, lambda reply: reply + reply, "session"),
    # types
    "a handle where attributes are owed": Lie(LOOKS, instead(HANDLE, string(b"h")), "session"),
    "attributes where a handle is owed": Lie(OPENS, instead(ATTRS, attrs()), "session"),
    "data where names are owed": Lie(("READDIR",), instead(DATA, string(b"abc")), "session"),
    "names where data is owed": Lie(("READ",), instead(NAME, bytes(4)), "session"),
    "data where a status is owed": Lie(CHANGES, instead(DATA, string(b"abc")), "session"),
    "a type of 0": Lie(RESULTS, instead(0, b""), "session"),
    "VERSION once more": Lie(LOOKS, instead(2, b""), "session"),
    # statuses
    "OK where a result is owed": Lie(RESULTS, status(0), "session"),
    "a status without a code": Lie(CHANGES, instead(STATUS, b"\0\0"), "body"),
    "an end of file for everything": Lie((*RESULTS, *CHANGES), status(1)),
    "no such file for everything": Lie(RESULTS, status(2)),
    "a status of 2**32 - 1, with escapes": Lie((*RESULTS, *CHANGES), status(0xFFFFFFFF, ESCAPE * 2000)),
    "a failure with escapes": Lie((*RESULTS, *CHANGES), status(4, b"\xff" + ESCAPE)),
    # attributes
    "a size of 2**63": Lie(LOOKS, field(4, ">Q", lambda size: 1 << 63), "body"),
    "a size of 2**63 - 1": Lie(LOOKS, field(4, ">Q", lambda size: (1 << 63) - 1)),
    "FSTAT with another size": Lie(("FSTAT",), field(4, ">Q", lambda size: size + 1)),
    "no attributes": Lie(LOOKS, only(ATTRS, lambda body: bytes(4))),
    "2**32 - 1 pairs of attributes": Lie(LOOKS, only(ATTRS, lambda body: b"\x80\0\0\0\xff\xff\xff\xff"), "body"),
    "attributes cut off": Lie(LOOKS, only(ATTRS, lambda body: body[:-1]), "body"),
    "bytes behind the attributes": Lie(LOOKS, only(ATTRS, lambda body: body + ESCAPE * 1000)),
    "a mode without a type": Lie(LOOKS, field(20, ">I", in_type(0))),
    "a mode of all ones": Lie(LOOKS, field(20, ">I", lambda mode: 0xFFFFFFFF)),
    "everything is a directory": Lie(LOOKS, field(20, ">I", in_type(stat.S_IFDIR))),
    "everything is a file": Lie(LOOKS, field(20, ">I", in_type(stat.S_IFREG))),
    "everything is a disk": Lie(LOOKS, field(20, ">I", in_type(stat.S_IFBLK))),
    "times of -1": Lie(LOOKS, field(28, ">I", lambda mtime: 0xFFFFFFFF)),
    # names
    "names that lead out": Lie(("READDIR",), more_names(*EVIL_NAMES)),
    "names with escapes": Lie(("READDIR",), more_names(ESCAPE, ESCAPE + b"/", longname=ESCAPE)),
    "the same name with other attributes": Lie(
        ("READDIR",), more_names(b"file", b"file", value=attrs(1 << 40, 0o40755, 0xFFFFFFFF))
    ),
    "names without attributes": Lie(("READDIR",), more_names(b"new", value=bytes(4))),
    "more names than there are": Lie(
        ("READDIR",), only(NAME, lambda body: struct.pack(">I", 50) + body[4:]), "body"
    ),
    "2**32 - 1 names": Lie(("READDIR",), only(NAME, lambda body: b"\xff\xff\xff\xff" + body[4:]), "body"),
    "a listing without end": Lie(("READDIR",), endless(itertools.count)),
    "a listing without end, of one name": Lie(("READDIR",), endless(lambda: itertools.count(0, 0))),
    "a listing without end, of long ones": Lie(("READDIR",), endless(itertools.count, b"l" * 900)),
    # data
    "more data than asked for": Lie(("READ",), only(DATA, lambda body: string(body[4:] + b"more"))),
    "data a byte at a time": Lie(("READ",), only(DATA, lambda body: string(body[4:5]))),
    "data of no bytes": Lie(("READ",), only(DATA, lambda body: string(b""))),
    "data of 2**32 - 1 bytes": Lie(("READ",), only(DATA, lambda body: b"\xff\xff\xff\xff" + body[4:]), "frame"),
    "data without its length": Lie(("READ",), only(DATA, lambda body: b"\0\0"), "frame"),
    "a file that ends at once": Lie(("READ",), status(1)),
    # handles
    "a handle of no bytes": Lie(OPENS, only(HANDLE, lambda body: string(b"")), "body"),
    "a handle of 256 bytes": Lie(OPENS, only(HANDLE, lambda body: string(body[4:].ljust(256, b"h")))),
    "a handle of 257 bytes": Lie(OPENS, only(HANDLE, lambda body: string(body[4:].ljust(257, b"h"))), "body"),
    # silence
    "no word on attributes": Lie(("LSTAT",), lambda reply: b"", "deadline"),
    "no word on data": Lie(("READ",), lambda reply: b"", "deadline"),
    "no word on changes": Lie(CHANGES, lambda reply: b"", "deadline"),
    "half a word": Lie(("LSTAT",), lambda reply: reply[:7], "deadline"),
    # VERSION
    "no VERSION": Lie(("INIT",), lambda reply: b"", "start"),
    "version 0": Lie(("INIT",), version(0), "start"),
    "version 6": Lie(("INIT",), version(6), "start"),
    "version 2**32 - 1": Lie(("INIT",), version(0xFFFFFFFF), "start"),
    "a status for VERSION": Lie(("INIT",), instead(STATUS, bytes(12)), "start"),
    "a greeting for VERSION": Lie(("INIT",), lambda reply: b"Welcome!" + ESCAPE, "start"),
    "extensions cut off": Lie(("INIT",), version(3, string(b"posix-rename@openssh.com") + b"\0"), "start"),
    "an extension of 4 GiB": Lie(("INIT",), version(3, b"\xff\xff\xff\xff" + ESCAPE), "start"),
    "extensions without sense": Lie(("INIT",), version(3, (string(ESCAPE) + string(b"")) * 20_000)),
    # other answers
    "limits of 1": Lie(("limits",), instead(EXTENDED_REPLY, struct.pack(">4Q", 1, 1, 1, 1))),
    "limits of 2**64 - 1": Lie(("limits",), instead(EXTENDED_REPLY, struct.pack(">4Q", *[ALL_ONES] * 4))),
    "three limits": Lie(("limits",), instead(EXTENDED_REPLY, bytes(24)), "start"),
    "a statvfs of zeros": Lie(("statvfs",), instead(EXTENDED_REPLY, bytes(88))),
    "a statvfs of ones": Lie(("statvfs",), instead(EXTENDED_REPLY, b"\xff" * 88)),
    "half a statvfs": Lie(("statvfs",), instead(EXTENDED_REPLY, bytes(44)), "body"),
    "a link to a NUL": Lie(("READLINK",), instead(NAME, struct.pack(">I", 1) + string(b"a\0b") * 2 + bytes(4))),
    "a link to nothing": Lie(("READLINK",), instead(NAME, struct.pack(">I", 1) + string(b"") * 2 + bytes(4))),
    "a link without a target": Lie(("READLINK",), instead(NAME, bytes(4))),
    "a link to 100 kB": Lie(
        ("READLINK",), instead(NAME, struct.pack(">I", 1) + string(b"file/" * 20_000) + bytes(8))
    ),
}  # fmt: skip


# -- the honest server -----------------------------------------------------------------------------------------------------

EXTENSIONS = ("posix-rename", "statvfs", "fsync", "hardlink", "limits")
NAMES = {
    3: "OPEN", 4: "CLOSE", 5: "READ", 6: "WRITE", 7: "LSTAT", 8: "FSTAT", 9: "SETSTAT", 10: "FSETSTAT", 11: "OPENDIR",
    12: "READDIR", 13: "REMOVE", 14: "MKDIR", 15: "RMDIR", 16: "REALPATH", 17: "STAT", 18: "RENAME", 19: "READLINK",
    20: "SYMLINK",
}  # fmt: skip
CODES = {errno.ENOENT: 2, errno.ENOTDIR: 2, errno.EACCES: 3, errno.EPERM: 3, errno.EINVAL: 5}


class Fields:
    """Reads the fields of a request."""

    def __init__(self, data: bytes) -> None:
        self.rest = data

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self.rest)
        self.rest = self.rest[struct.calcsize(form) :]
        return int(value)

    def string(self) -> bytes:
        length = self.number(">I")
        value, self.rest = self.rest[:length], self.rest[length:]
        return value


def told(found: os.stat_result) -> bytes:
    return struct.pack(
        ">IQIIIII", 0xF, found.st_size, found.st_uid, found.st_gid, found.st_mode, int(found.st_atime), int(found.st_mtime)
    )  # fmt: skip


def one_name(name: bytes) -> Tuple[int, bytes]:
    return NAME, struct.pack(">I", 1) + string(name) * 2 + bytes(4)


class Server:
    """One session on the standard input and output."""

    def __init__(self) -> None:
        self.files: Dict[bytes, int] = {}
        self.listings: Dict[bytes, List[bytes]] = {}
        self.numbers = itertools.count(1)

    def answer(self, name: str, fields: Fields) -> Tuple[int, bytes]:
        try:
            if name in ("CLOSE", "READ", "WRITE", "FSTAT", "FSETSTAT", "READDIR", "fsync"):
                result = self.of_handle(name, fields.string()[:4], fields)
            else:
                result = self.of_path(name, fields.string(), fields)
        except (OSError, KeyError) as error:
            code = CODES.get(getattr(error, "errno", 0) or 0, 4)
            return STATUS, struct.pack(">I", code) + string(b"") * 2
        return result or (STATUS, struct.pack(">I", 0) + string(b"") * 2)

    def of_handle(self, name: str, handle: bytes, fields: Fields) -> Tuple[int, bytes] | None:
        if name == "READDIR":
            some, self.listings[handle][:100] = self.listings[handle][:100], []
            return (
                (NAME, struct.pack(">I", len(some)) + b"".join(some))
                if some
                else (STATUS, bytes([0, 0, 0, 1]))
            )
        if handle in self.listings:
            del self.listings[handle]
            return None
        descriptor = self.files[handle]
        if name == "CLOSE":
            os.close(self.files.pop(handle))
        elif name == "READ":
            offset = fields.number(">Q")
            data = os.pread(descriptor, fields.number(">I"), offset)
            return (DATA, string(data)) if data else (STATUS, bytes([0, 0, 0, 1]))
        elif name == "WRITE":
            offset = fields.number(">Q")
            os.pwrite(descriptor, fields.string(), offset)
        elif name == "FSTAT":
            return ATTRS, told(os.fstat(descriptor))
        elif name == "FSETSTAT":
            self.set(descriptor, fields)
        else:
            os.fsync(descriptor)
        return None

    def of_path(self, name: str, path: bytes, fields: Fields) -> Tuple[int, bytes] | None:
        if name == "OPEN":
            asked = fields.number(">I")
            flags = (os.O_RDONLY, os.O_RDONLY, os.O_WRONLY, os.O_RDWR)[asked & 3]
            flags |= (
                (os.O_CREAT if asked & 8 else 0)
                | (os.O_TRUNC if asked & 16 else 0)
                | (os.O_EXCL if asked & 32 else 0)
            )
            handle = struct.pack(">I", next(self.numbers))
            self.files[handle] = os.open(path, flags, 0o644)
            return HANDLE, string(handle)
        if name == "OPENDIR":
            entries = [string(each) * 2 + told(os.lstat(path + b"/" + each)) for each in os.listdir(path)]
            handle = struct.pack(">I", next(self.numbers))
            self.listings[handle] = entries
            return HANDLE, string(handle)
        if name in ("LSTAT", "STAT"):
            return ATTRS, told(os.lstat(path) if name == "LSTAT" else os.stat(path))
        if name == "REALPATH":
            return one_name(os.path.realpath(path))
        if name == "READLINK":
            return one_name(os.readlink(path))
        if name == "limits":
            return EXTENDED_REPLY, struct.pack(">4Q", 262144, 261120, 261120, 100)
        if name == "statvfs":
            found = os.statvfs(path)
            return EXTENDED_REPLY, struct.pack(
                ">11Q", found.f_bsize, found.f_frsize, found.f_blocks, found.f_bfree, found.f_bavail, found.f_files,
                found.f_ffree, found.f_favail, 7, 0, found.f_namemax,
            )  # fmt: skip
        if name == "SETSTAT":
            self.set(path, fields)
        elif name == "SYMLINK":
            os.symlink(path, fields.string())
        elif name in ("RENAME", "posix-rename"):
            os.rename(path, fields.string())
        elif name == "hardlink":
            os.link(path, fields.string())
        else:
            {"REMOVE": os.unlink, "MKDIR": os.mkdir, "RMDIR": os.rmdir}[name](path)
        return None

    @staticmethod
    def set(file: int | bytes, fields: Fields) -> None:
        flags = fields.number(">I")
        if flags & 1:
            os.truncate(file, fields.number(">Q"))
        if flags & 2:
            fields.rest = fields.rest[8:]
        if flags & 4:
            os.chmod(file, stat.S_IMODE(fields.number(">I")))
        if flags & 8:
            os.utime(file, (fields.number(">I"), fields.number(">I")))


def serve(control: str) -> None:
    server = Server()
    stream = sys.stdin.buffer
    while True:
        head = stream.read(4)
        if len(head) < 4:
            return
        fields = Fields(stream.read(struct.unpack(">I", head)[0]))
        kind, request_id = fields.number(">B"), fields.number(">I")
        with open(control, encoding="utf-8") as file:
            lie = file.read()
        if kind == 1:
            name = "INIT"
            reply = packet(
                2, 3, b"".join(string(f"{each}@openssh.com".encode()) + string(b"1") for each in EXTENSIONS)
            )
        else:
            name = NAMES[kind] if kind != 200 else fields.string().decode().split("@")[0]
            if name == "limits":
                fields.rest = bytes(4)
            reply = packet(*(lambda found: (found[0], request_id, found[1]))(server.answer(name, fields)))
        if lie == "noise on stderr":
            os.write(2, ESCAPE * 500)
        elif lie and name in LIES[lie].requests:
            reply = LIES[lie].twist(reply)
        sys.stdout.buffer.write(reply)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve(sys.argv[1])
