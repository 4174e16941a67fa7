"""SFTP version 3 and the OpenSSH extensions: bytes <-> values. Sans-IO: no socket, no thread, no clock.

Sources: draft-ietf-secsh-filexfer-02 (version 3) and OpenSSH's PROTOCOL file. Requests are built as the bytes *after* the
request id (``session`` frames them); replies are cut from the byte stream by ``ReplyReader`` and decoded by the
``parse_*`` functions. Everything that comes from the server is untrusted: each parser either returns a value or raises
``WireError``, and none allocates more than the packet it was given.

Names and paths are bytes throughout: SFTP v3 knows no encoding.
"""

from __future__ import annotations

import struct
from typing import Dict, List, NamedTuple, Optional, Sequence, Union

from ..errors import StatusError

Buffer = Union[bytes, bytearray, memoryview]

INIT, VERSION = 1, 2
OPEN, CLOSE, READ, WRITE, LSTAT, FSTAT, SETSTAT, FSETSTAT = 3, 4, 5, 6, 7, 8, 9, 10
OPENDIR, READDIR, REMOVE, MKDIR, RMDIR, REALPATH, STAT, RENAME = 11, 12, 13, 14, 15, 16, 17, 18
READLINK, SYMLINK = 19, 20
STATUS, HANDLE, DATA, NAME, ATTRS = 101, 102, 103, 104, 105
EXTENDED, EXTENDED_REPLY = 200, 201

FXF_READ, FXF_WRITE, FXF_APPEND, FXF_CREAT, FXF_TRUNC, FXF_EXCL = 1, 2, 4, 8, 16, 32

ATTR_SIZE, ATTR_UIDGID, ATTR_PERMISSIONS, ATTR_ACMODTIME = 1, 2, 4, 8
ATTR_EXTENDED = 0x80000000

HANDLE_BYTES_MAX = 256  # the draft's limit
# OpenSSH sends at most 256 KiB; a bound four times that leaves room for servers that pack more names in one reply.
REPLY_BYTES_MAX = 1 << 20
PARTS_MAX = 256

_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")
_LENGTH_TYPE_ID = struct.Struct(">IBI")


class WireError(ValueError):
    """The server's bytes are not SFTP version 3."""


class Attrs(NamedTuple):
    """File attributes; None where absent. ``size`` in bytes, times in whole seconds since 1970, ``mode`` with type bits."""

    size: Optional[int] = None
    uid: Optional[int] = None
    gid: Optional[int] = None
    mode: Optional[int] = None
    atime: Optional[int] = None
    mtime: Optional[int] = None


class Entry(NamedTuple):
    """One name of a listing: ``name`` without slashes or NUL, ``longname`` as the server formats it, its attributes."""

    name: bytes
    longname: bytes
    attrs: Attrs


class Limits(NamedTuple):
    """limits@openssh.com, in bytes (requests in ``open_handles``); 0 means that the server names no limit."""

    packet_bytes: int
    read_bytes: int
    write_bytes: int
    open_handles: int


class StatVfs(NamedTuple):
    """statvfs@openssh.com, the fields of POSIX statvfs."""

    bsize: int
    frsize: int
    blocks: int
    bfree: int
    bavail: int
    files: int
    ffree: int
    favail: int
    fsid: int
    flag: int
    namemax: int


STATVFS_READ_ONLY = 1


# -- writers: the body of a request, from after its id --------------------------------------------------------------


def u32(value: int) -> bytes:
    """A 32-bit big-endian number."""
    return _U32.pack(value)


def string(data: bytes) -> bytes:
    """A length-prefixed byte string."""
    return _U32.pack(len(data)) + data


def attrs(value: Attrs) -> bytes:
    """The ATTRS structure. uid and gid, and the two times, go in pairs on the wire: both or neither must be given."""
    flags, fields = 0, b""
    if value.size is not None:
        flags |= ATTR_SIZE
        fields += _U64.pack(value.size)
    if value.uid is not None and value.gid is not None:
        flags |= ATTR_UIDGID
        fields += struct.pack(">II", value.uid & 0xFFFFFFFF, value.gid & 0xFFFFFFFF)
    if value.mode is not None:
        flags |= ATTR_PERMISSIONS
        fields += _U32.pack(value.mode)
    if value.atime is not None and value.mtime is not None:
        flags |= ATTR_ACMODTIME
        fields += struct.pack(">II", _time32(value.atime), _time32(value.mtime))
    return _U32.pack(flags) + fields


def _time32(seconds: int) -> int:
    # Version 3 has unsigned 32-bit seconds: what lies outside is shown as the nearest time that can be told.
    return min(max(seconds, 0), 0xFFFFFFFF)


def init() -> bytes:
    """The whole INIT packet; it asks for version 3, since what later versions add has no wide support."""
    return _U32.pack(5) + bytes([INIT]) + _U32.pack(3)


def header(kind: int, request_id: int, body_bytes: int) -> bytes:
    """The frame of a request: length, type, id. ``body_bytes`` counts what follows the id."""
    return _LENGTH_TYPE_ID.pack(5 + body_bytes, kind, request_id)


def open_body(path: bytes, pflags: int, value: Attrs = Attrs()) -> bytes:  # noqa: B008 (an immutable value)
    """OPEN: ``pflags`` is an OR of FXF_*."""
    return string(path) + _U32.pack(pflags) + attrs(value)


def read_body(handle: bytes, offset: int, length: int) -> bytes:
    """READ ``length`` bytes at ``offset``."""
    return string(handle) + _U64.pack(offset) + _U32.pack(length)


def write_head(handle: bytes, offset: int, length: int) -> bytes:
    """WRITE without its data: ``length`` bytes of it must follow."""
    return string(handle) + _U64.pack(offset) + _U32.pack(length)


def extended_body(name: bytes, *arguments: bytes) -> bytes:
    """EXTENDED request ``name`` with ready-made argument fields."""
    return string(name) + b"".join(arguments)


def symlink_body(target: bytes, link_path: bytes) -> bytes:
    """SYMLINK. The draft says link path first; OpenSSH's server, and all that follow it, read the target first."""
    return string(target) + string(link_path)


# -- readers: consume and return, or raise ---------------------------------------------------------------------------


class Cursor:
    """Reads fields from the front of one packet's body; every getter raises WireError where the packet is too short."""

    __slots__ = ("_data", "_position")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def u32(self) -> int:
        """The next 32-bit number."""
        end = self._position + 4
        if end > len(self._data):
            raise WireError("packet ends inside a number")
        (value,) = _U32.unpack_from(self._data, self._position)
        self._position = end
        return int(value)

    def u64(self) -> int:
        """The next 64-bit number."""
        end = self._position + 8
        if end > len(self._data):
            raise WireError("packet ends inside a number")
        (value,) = _U64.unpack_from(self._data, self._position)
        self._position = end
        return int(value)

    def string(self) -> bytes:
        """The next length-prefixed byte string."""
        length = self.u32()
        end = self._position + length
        if end > len(self._data):
            raise WireError("string reaches past the end of its packet")
        value = self._data[self._position : end]
        self._position = end
        return value

    @property
    def at_end(self) -> bool:
        """True where nothing is left."""
        return self._position >= len(self._data)

    def attrs(self) -> Attrs:
        """The next ATTRS structure; extended pairs are skipped."""
        flags = self.u32()
        size = self.u64() if flags & ATTR_SIZE else None
        uid = gid = mode = atime = mtime = None
        if flags & ATTR_UIDGID:
            uid, gid = self.u32(), self.u32()
        if flags & ATTR_PERMISSIONS:
            mode = self.u32()
        if flags & ATTR_ACMODTIME:
            atime, mtime = self.u32(), self.u32()
        if flags & ATTR_EXTENDED:
            for _ in range(self.u32()):
                self.string()
                self.string()
        if size is not None and size >= 1 << 63:
            raise WireError("file size past what a file can have")
        return Attrs(size, uid, gid, mode, atime, mtime)


class Reply(NamedTuple):
    """One packet from the server. For DATA ``body`` is the file's bytes alone, for others all that follows the id."""

    kind: int
    request_id: int
    body: bytes


class ReplyReader:
    """Cuts the byte stream of one channel into replies, whatever the chunks; keeps at most one packet and a chunk."""

    __slots__ = ("_bytes_max", "_have", "_need", "_parts")

    def __init__(self, bytes_max: int = REPLY_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._parts: List[memoryview] = []
        self._have = 0
        self._need = 0  # bytes of the packet at the front, its length field included; 0 = not yet known

    def feed(self, data: Buffer) -> List[Reply]:
        """The replies that ``data`` completes, in order. Raises WireError on an impossible length or a truncated reply."""
        if len(data):
            self._parts.append(memoryview(data))
            self._have += len(data)
            if len(self._parts) > PARTS_MAX:  # a server that trickles must not cost a view for every byte
                self._parts = [memoryview(b"".join(self._parts))]
        replies = []
        while self._have >= 4:
            if not self._need:
                self._need = 4 + self._peek_length()
            if self._have < self._need:
                break
            replies.append(self._cut(self._take(self._need)))
            self._need = 0
        return replies

    def _peek_length(self) -> int:
        first = self._parts[0]
        if len(first) < 4:
            first = self._parts[0] = memoryview(b"".join(self._parts))
            del self._parts[1:]
        (length,) = _U32.unpack_from(first, 0)
        if not 5 <= length <= self._bytes_max:
            raise WireError(f"reply of {length} bytes")
        return int(length)

    def _take(self, count: int) -> List[memoryview]:
        self._have -= count
        taken = []
        while count:
            part = self._parts[0]
            if len(part) <= count:
                taken.append(part)
                count -= len(part)
                del self._parts[0]
            else:
                taken.append(part[:count])
                self._parts[0] = part[count:]
                count = 0
        return taken

    @staticmethod
    def _cut(parts: List[memoryview]) -> Reply:
        if len(parts[0]) < 13 and len(parts) > 1:
            parts = [memoryview(b"".join(parts))]
        first = parts[0]
        _, kind, request_id = _LENGTH_TYPE_ID.unpack_from(first, 0)
        if kind == DATA:
            # The file's bytes are joined once, without the framing: they go into the cache as they are.
            body_bytes = sum(map(len, parts)) - 13
            if body_bytes < 0 or _U32.unpack_from(first, 9)[0] != body_bytes:
                raise WireError("DATA whose length is not that of its packet")
            parts[0] = first[13:]
        else:
            parts[0] = first[9:]
        return Reply(kind, request_id, b"".join(parts))


def parse_extensions(body: bytes) -> Dict[bytes, bytes]:
    """The extensions of a VERSION packet. Its version number stands where others have their id."""
    cursor = Cursor(body)
    extensions = {}
    while not cursor.at_end:
        name = cursor.string()
        extensions[name] = cursor.string()
    return extensions


def parse_status(body: bytes) -> Optional[StatusError]:
    """None for SSH_FX_OK, else the error (not raised). Servers of version 2 leave the message out."""
    cursor = Cursor(body)
    code = cursor.u32()
    if code == 0:
        return None
    message = b"" if cursor.at_end else cursor.string()
    return StatusError(code, message.decode("utf-8", "replace")[:200])


def parse_handle(body: bytes) -> bytes:
    """A file or directory handle, 1 to 256 bytes."""
    handle = Cursor(body).string()
    if not 1 <= len(handle) <= HANDLE_BYTES_MAX:
        raise WireError(f"handle of {len(handle)} bytes")
    return handle


def parse_names(body: bytes) -> List[Entry]:
    """The entries of a NAME reply, as the server gave them: ``is_plain_name`` tells which may be shown in a directory."""
    cursor = Cursor(body)
    count = cursor.u32()
    if count * 12 > len(body):
        raise WireError(f"{count} names in {len(body)} bytes")
    return [Entry(cursor.string(), cursor.string(), cursor.attrs()) for _ in range(count)]


def is_plain_name(name: bytes) -> bool:
    """True for what can be one component of a local path; a server's ``..`` or ``a/b`` must not lead out of the mount."""
    return 0 < len(name) <= 255 and name not in (b".", b"..") and b"/" not in name and b"\0" not in name


def parse_attrs(body: bytes) -> Attrs:
    """The attributes of an ATTRS reply."""
    return Cursor(body).attrs()


def parse_limits(body: bytes) -> Limits:
    """The reply to limits@openssh.com."""
    return Limits(*_u64s(body, 4))


def parse_statvfs(body: bytes) -> StatVfs:
    """The reply to statvfs@openssh.com."""
    return StatVfs(*_u64s(body, 11))


def _u64s(body: bytes, count: int) -> Sequence[int]:
    if len(body) < 8 * count:
        raise WireError("packet ends inside a number")
    return struct.unpack_from(f">{count}Q", body)
