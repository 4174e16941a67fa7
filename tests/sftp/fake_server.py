"""An SFTP server in memory, with the manners of OpenSSH's sftp-server and every fault that a test may want.

It stands where ``ssh.transport.Connection`` stands: ``FakeServer.dial()`` returns connections whose channels speak the wire
format. The encoding is written from draft-ietf-secsh-filexfer-02 and OpenSSH's PROTOCOL, not with ``sftp.wire``.

A file has two copies: ``data`` in the server's memory, and ``disk``, which is what fsync@openssh.com brings up to date and
what is left after ``crash()``. Names are as durable as a journalling file system makes them: at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import stat
import struct
import threading
import time
from _thread import LockType
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

from sftpmount import waiting
from sftpmount.errors import ChannelRefused, ConnectionLost, Unreachable

NAMES = {
    3: "OPEN", 4: "CLOSE", 5: "READ", 6: "WRITE", 7: "LSTAT", 8: "FSTAT", 9: "SETSTAT", 10: "FSETSTAT", 11: "OPENDIR",
    12: "READDIR", 13: "REMOVE", 14: "MKDIR", 15: "RMDIR", 16: "REALPATH", 17: "STAT", 18: "RENAME", 19: "READLINK",
    20: "SYMLINK",
}  # fmt: skip
EXTENSIONS = {
    b"posix-rename@openssh.com": b"1",
    b"statvfs@openssh.com": b"2",
    b"fstatvfs@openssh.com": b"2",
    b"hardlink@openssh.com": b"1",
    b"fsync@openssh.com": b"1",
    b"lsetstat@openssh.com": b"1",
    b"limits@openssh.com": b"1",
}
LIMITS = (262144, 261120, 261120, 1000)
NAMES_PER_REPLY = 100  # as OpenSSH's READDIR
STATUS_TEXT = {
    0: "Success", 1: "End of file", 2: "No such file", 3: "Permission denied", 4: "Failure", 5: "Bad message",
    8: "Operation unsupported",
}  # fmt: skip


def status_of(code: int) -> int:
    """OpenSSH's errno_to_portable()."""
    if code in (errno.ENOENT, errno.ENOTDIR, errno.EBADF, errno.ELOOP):
        return 2
    if code in (errno.EPERM, errno.EACCES, errno.EFAULT):
        return 3
    if code in (errno.ENAMETOOLONG, errno.EINVAL):
        return 5
    return 8 if code == errno.ENOSYS else 4


class Status(Exception):
    """Ends a request with this status."""

    def __init__(self, code: int, message: Optional[str] = None) -> None:
        super().__init__(code)
        self.code = code
        self.message = STATUS_TEXT.get(code, "?") if message is None else message


class Inode:
    """A file, directory or symlink."""

    def __init__(self, mode: int, now: int, data: bytes = b"") -> None:
        self.mode = mode
        self.uid, self.gid = os.getuid(), os.getgid()
        self.atime = self.mtime = now
        self.nlink = 1
        self.data = bytearray(data)
        self.disk = bytes(data)
        self.children: Dict[bytes, Inode] = {}
        self.target = b""

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.mode)

    def attrs(self) -> bytes:
        size = 4096 if self.is_dir else len(self.target) if self.is_link else len(self.data)
        return struct.pack(
            ">IQIIIII",
            0x0F,
            size,
            self.uid,
            self.gid,
            self.mode,
            self.atime & 0xFFFFFFFF,
            self.mtime & 0xFFFFFFFF,
        )


class Request(NamedTuple):
    """What a fault may look at. ``path`` is that of the handle where the request names one."""

    name: str
    lane: int
    path: bytes
    offset: int


class Fault:
    """Something that goes wrong with the ``first``-th matching request (counted from 1), and ``times`` - 1 more.

    ``act`` is one of: "cut before", "cut after" (the connection ends before or after the request is carried out), "no reply",
    "silence" (nothing is ever heard again on the connection, heartbeats included), "status" (``code``, ``message``),
    "not done" (an OK that is a lie), "wrong id", "wrong type", "huge length", "truncated", "hold" (the reply waits for
    ``release()``, the request is carried out), "hold before" (it is carried out then too), "replace" (``code`` = the type,
    ``body`` = what follows the id).
    """

    def __init__(
        self,
        act: str,
        matches: Callable[[Request], bool] = lambda request: True,
        *,
        first: int = 1,
        times: int = 1,
        code: int = 4,
        message: str = "Failure",
        body: bytes = b"",
        then: Optional[Callable[[], None]] = None,
    ) -> None:
        self.act = act
        self.matches = matches
        self.first = first
        self.times = times
        self.code = code
        self.message = message
        self.body = body
        self.then = then  # called when the fault fires, the tree's lock being held
        self.seen = 0
        self.fired = threading.Event()
        self._released = threading.Event()

    def strikes(self, request: Request) -> bool:
        if not self.matches(request):
            return False
        self.seen += 1
        return self.first <= self.seen < self.first + self.times

    def release(self) -> None:
        """Let what is held go on."""
        self._released.set()

    def wait_released(self) -> None:
        assert self._released.wait(30.0), "a held reply was never released"


def named(*names: str) -> Callable[[Request], bool]:
    """Matches requests of these types; extensions go by the part before the @."""
    return lambda request: request.name in names


class FakeServer:
    """One server and its tree; any number of connections."""

    def __init__(
        self,
        *,
        without: Tuple[bytes, ...] = (),
        limits: Tuple[int, int, int, int] = LIMITS,
        channels_max: int = 10,
        version: int = 3,
        read_bytes_max: int = 261120,
        chunk_bytes: int = 1 << 20,
        root_user: bool = True,
        link_path_first: bool = False,
        follows_links: bool = False,
        empties_opened: bool = False,
        ignores_excl: bool = False,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.lock = threading.RLock()
        self.root = Inode(stat.S_IFDIR | 0o755, int(now()))
        self.home = b"/home"
        self.root.children[b"home"] = Inode(stat.S_IFDIR | 0o755, int(now()))
        self.extensions = {name: value for name, value in EXTENSIONS.items() if name not in without}
        self.limits = limits
        self.channels_max = channels_max
        self.version = version
        self.read_bytes_max = read_bytes_max
        self.chunk_bytes = chunk_bytes
        self.link_path_first = link_path_first  # in SYMLINK, as the draft has it
        self.follows_links = follows_links  # that lead somewhere, in LSTAT, RENAME and hardlink
        self.ignores_excl = ignores_excl  # in OPEN
        self.empties_opened = empties_opened  # files that are opened for writing, TRUNC or not
        self.root_user = root_user  # False: the mode bits of the owner count
        self.now = now
        self.free_bytes = 1 << 40
        self.read_only = False
        self.fsid = 7
        self.twist: Callable[[str, bytes], bytes] = lambda name, reply: (
            reply
        )  # a lie: what is sent in its place
        self.down = False
        self.dials = 0
        self.faults: List[Fault] = []
        self.log: List[Request] = []
        self.connections: List[FakeConnection] = []

    # -- for tests -------------------------------------------------------------------------------------------------

    def dial(self) -> FakeConnection:
        """A new connection; raises Unreachable while the server is down."""
        self.dials += 1
        if self.down:
            raise Unreachable("the fake server is down")
        connection = FakeConnection(self)
        self.connections.append(connection)
        return connection

    def arm(self, fault: Fault) -> Fault:
        """Let ``fault`` happen; requests are counted from now on."""
        with self.lock:
            self.faults.append(fault)
        return fault

    def disarm(self) -> None:
        with self.lock:
            for fault in self.faults:
                fault.release()
            self.faults.clear()

    def cut(self) -> None:
        """End every connection."""
        for connection in self.connections:
            connection.abort()

    def crash(self) -> None:
        """Power loss: every connection ends, and files are what was committed of them."""
        self.cut()
        with self.lock:
            self.forget()

    def forget(self) -> None:
        """Files are what was committed of them."""
        for inode in self._inodes(self.root, set()):
            inode.data = bytearray(inode.disk)

    def close(self) -> None:
        """End everything, and wait for the threads."""
        self.down = True
        self.disarm()
        for connection in self.connections:
            connection.abort()
            for channel in connection.channels:
                channel.thread.join(10.0)
                assert not channel.thread.is_alive(), "a channel of the fake server does not end"

    def make(
        self, path: bytes, data: bytes = b"", *, mode: int = 0o644, mtime: Optional[int] = None
    ) -> Inode:
        """A file as another client leaves it: whole, and committed."""
        with self.lock:
            parent, name = self._parent(path)
            inode = Inode(stat.S_IFREG | mode, int(self.now()) if mtime is None else mtime, data)
            parent.children[name] = inode
            parent.mtime = int(self.now())
            return inode

    def make_dir(self, path: bytes, mode: int = 0o755) -> Inode:
        with self.lock:
            parent, name = self._parent(path)
            parent.children[name] = Inode(stat.S_IFDIR | mode, int(self.now()))
            parent.mtime = int(self.now())
            return parent.children[name]

    def at(self, path: bytes) -> Inode:
        """The inode at ``path``, links not followed; KeyError where there is none."""
        with self.lock:
            try:
                return self._find(path, follow=False)
            except Status:
                raise KeyError(path) from None

    def has(self, path: bytes) -> bool:
        with contextlib.suppress(KeyError):
            return self.at(path) is not None
        return False

    def content(self, path: bytes) -> bytes:
        """What a new reader gets now."""
        return bytes(self.at(path).data)

    def disk(self, path: bytes) -> bytes:
        """What is left after a crash."""
        return self.at(path).disk

    def tree(self, path: bytes = b"/home") -> Dict[bytes, object]:
        """Every name below ``path``: its content, its target as str, or a dict."""
        with self.lock:
            return self._tree(self._find(path))

    def _tree(self, directory: Inode) -> Dict[bytes, object]:
        return {
            name: self._tree(child)
            if child.is_dir
            else child.target.decode()
            if child.is_link
            else bytes(child.data)
            for name, child in directory.children.items()
        }

    def count(self, *names: str) -> int:
        """How many requests of these types were received so far (all, where none is named)."""
        with self.lock:
            return sum(1 for request in self.log if not names or request.name in names)

    def _inodes(self, inode: Inode, seen: Set[int]) -> Iterator[Inode]:
        if id(inode) not in seen:
            seen.add(id(inode))
            yield inode
            for child in inode.children.values():
                yield from self._inodes(child, seen)

    # -- the file system ---------------------------------------------------------------------------------------------

    def _find(self, path: bytes, *, follow: bool = True, depth: int = 0) -> Inode:
        if depth > 20:
            raise Status(status_of(errno.ELOOP))
        if not path.startswith(b"/"):
            path = self.home + b"/" + path
        trail = [self.root]
        names = [name for name in path.split(b"/") if name not in (b"", b".")]
        if b"\0" in path:
            raise Status(status_of(errno.ENOENT))
        if len(path) > 4095:
            raise Status(status_of(errno.ENAMETOOLONG))
        for position, name in enumerate(names):
            if len(name) > 255:
                raise Status(status_of(errno.ENAMETOOLONG))
            here = trail[-1]
            if name == b"..":
                del trail[max(1, len(trail) - 1) :]
                continue
            if not here.is_dir:
                raise Status(status_of(errno.ENOTDIR))
            child = here.children.get(name)
            if child is None:
                raise Status(status_of(errno.ENOENT))
            last = position == len(names) - 1
            if child.is_link and (follow or not last):
                base = b"/" + b"/".join(names[:position])
                target = child.target if child.target.startswith(b"/") else base + b"/" + child.target
                rest = b"".join(b"/" + n for n in names[position + 1 :])
                return self._find(target + rest, follow=follow, depth=depth + 1)
            trail.append(child)
        return trail[-1]

    def _parent(self, path: bytes) -> Tuple[Inode, bytes]:
        head, _, name = path.rstrip(b"/").rpartition(b"/")
        if len(name) > 255:
            raise Status(status_of(errno.ENAMETOOLONG))
        parent = self._find(head or b"/") if path.startswith(b"/") else self._find(head or b".")
        if not parent.is_dir:
            raise Status(status_of(errno.ENOTDIR))
        return parent, name

    def _changed(self, directory: Inode) -> None:
        directory.mtime = int(self.now())

    def set_attrs(self, inode: Inode, fields: Dict[str, int]) -> None:
        if self.read_only:
            raise Status(status_of(errno.EROFS))
        if "size" in fields:
            if inode.is_dir:
                raise Status(status_of(errno.EISDIR))
            size = fields["size"]
            del inode.data[size:]
            inode.data.extend(bytes(size - len(inode.data)))
            inode.mtime = int(self.now())
        if "mode" in fields:
            inode.mode = stat.S_IFMT(inode.mode) | (fields["mode"] & 0o7777)
        if "mtime" in fields:
            inode.atime, inode.mtime = fields["atime"], fields["mtime"]
        if "uid" in fields:
            inode.uid, inode.gid = fields["uid"], fields["gid"]

    def write(self, inode: Inode, offset: int, data: bytes) -> None:
        if self.free_bytes < len(data):
            raise Status(status_of(errno.ENOSPC))
        if offset > len(inode.data):
            inode.data.extend(bytes(offset - len(inode.data)))
        inode.data[offset : offset + len(data)] = data
        inode.mtime = int(self.now())

    def rename(self, old: bytes, new: bytes, *, posix: bool) -> None:
        source_dir, source_name = self._parent(old)
        source = source_dir.children.get(source_name)
        if source is None:
            raise Status(status_of(errno.ENOENT))
        target_dir, target_name = self._parent(new)
        target = target_dir.children.get(target_name)
        if (
            source.is_dir
            and (new.rstrip(b"/") + b"/").startswith(old.rstrip(b"/") + b"/")
            and source is not target
        ):
            raise Status(status_of(errno.EINVAL))
        if target is not None and not posix:
            raise Status(status_of(errno.EEXIST))
        if target is source:
            return
        if target is not None:
            if target.is_dir and not source.is_dir:
                raise Status(status_of(errno.EISDIR))
            if source.is_dir and not target.is_dir:
                raise Status(status_of(errno.ENOTDIR))
            if target.children:
                raise Status(status_of(errno.ENOTEMPTY))
            target.nlink -= 1
        del source_dir.children[source_name]
        target_dir.children[target_name] = source
        self._changed(source_dir)
        self._changed(target_dir)


class FakeConnection:
    """What ``ssh.transport.Connection`` is to a session."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.channels: List[FakeChannel] = []
        self.heartbeats = 0
        self.is_silent = False
        self.is_closed = False  # by close()
        self.ended = threading.Event()
        self.delivering = (
            threading.Lock()
        )  # one transport thread: replies of all channels come one after the other
        self._heard_s = time.monotonic()

    @property
    def is_alive(self) -> bool:
        return not self.ended.is_set()

    def open_subsystem(
        self, name: str, on_data: Callable[[bytes], None], on_closed: Callable[[Exception], None]
    ) -> FakeChannel:
        if self.ended.is_set():
            raise ConnectionLost("the fake connection has ended")
        if name != "sftp" or len(self.channels) >= self.server.channels_max:
            raise ChannelRefused("the fake server opens no more channels")
        channel = FakeChannel(self, len(self.channels), on_data, on_closed)
        self.channels.append(channel)
        if self.ended.is_set():
            channel.close()  # it came too late for abort() to see it
        return channel

    def be_lazy_when(self, nobody_waits: Callable[[], bool]) -> None:
        """Nothing here arrives in bulk."""

    def wait_for(self, lock: LockType) -> None:
        waiting.acquire(lock)

    def attend(self) -> None:
        """Replies come in a thread of their own."""

    def heartbeat(self) -> None:
        self.heartbeats += 1
        if self.ended.is_set():
            raise ConnectionLost("the fake connection has ended")
        self.heard()

    def heard(self) -> None:
        if not self.is_silent:
            self._heard_s = time.monotonic()

    def last_heard_s(self) -> float:
        return self._heard_s

    def state(self) -> Dict[str, Any]:
        return {}

    def abort(self) -> None:
        self.ended.set()
        for channel in list(self.channels):
            channel.inbox.put(None)

    def close(self) -> None:
        self.is_closed = True
        self.abort()


class _Open:
    """A handle."""

    def __init__(self, path: bytes, inode: Inode, pflags: int = 0) -> None:
        self.path = path
        self.inode = inode
        self.pflags = pflags
        self.left: Optional[List[Tuple[bytes, Inode]]] = None


class FakeChannel:
    """One sftp-server process: handles of its own, requests answered in order."""

    def __init__(
        self,
        connection: FakeConnection,
        number: int,
        on_data: Callable[[bytes], None],
        on_closed: Callable[[Exception], None],
    ) -> None:
        self.connection = connection
        self.server = connection.server
        self.number = number
        self.inbox: queue.SimpleQueue[Optional[bytes]] = queue.SimpleQueue()
        self.handles: Dict[bytes, _Open] = {}
        self._on_data = on_data
        self._on_closed = on_closed
        self._bytes = b""
        self._sending = threading.RLock()
        self._held_up: Optional[List[bytes]] = None
        self._next_handle = 0
        self.thread = threading.Thread(target=self._run, name=f"fake-sftp-{number}", daemon=True)
        self.thread.start()

    # -- the client's side ---------------------------------------------------------------------------------------------

    def send(self, *parts: bytes) -> None:
        if self.connection.ended.is_set():
            raise ConnectionLost("the fake connection has ended")
        with self._sending:
            data = b"".join(bytes(part) for part in parts)
            if self._held_up is None:
                self.inbox.put(data)
            else:
                self._held_up.append(data)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        with self._sending:
            self._held_up = []
            try:
                yield
            finally:
                held_up, self._held_up = self._held_up, None
                if held_up:
                    self.send(*held_up)

    def close(self) -> None:
        self.inbox.put(None)

    # -- the server's side -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            data = self.inbox.get()
            if data is None or self.connection.ended.is_set():
                break
            self._bytes += data
            while len(self._bytes) >= 4:
                (length,) = struct.unpack_from(">I", self._bytes)
                if len(self._bytes) < 4 + length:
                    break
                packet, self._bytes = self._bytes[4 : 4 + length], self._bytes[4 + length :]
                self._serve(packet)
                if self.connection.ended.is_set():
                    break
        with self.connection.delivering:
            self._on_closed(ConnectionLost("the fake connection has ended"))

    def _serve(self, packet: bytes) -> None:
        fields = Fields(packet)
        kind = fields.byte()
        if kind == 1:
            assert fields.u32() == 3, "the client asks for version 3"
            pairs = b"".join(string(k) + string(v) for k, v in self.server.extensions.items())
            said = frame(bytes([2]) + struct.pack(">I", self.server.version) + pairs)
            self._deliver(self.server.twist("INIT", said))
            return
        request_id = fields.u32()
        name = fields.string().split(b"@")[0].decode() if kind == 200 else NAMES[kind]
        # Every request begins with a path or a handle.
        peek = Fields(fields.rest)
        first = peek.string() if fields.rest else b""
        opened = self.handles.get(first)
        offset = peek.u64() if name in ("READ", "WRITE") else 0
        request = Request(name, self.number, opened.path if opened else first, offset)
        with self.server.lock:
            self.server.log.append(request)
            fault = next((f for f in list(self.server.faults) if f.strikes(request)), None)
        if fault is None:
            reply: Optional[bytes] = self._answer(name, fields, request_id)
        else:
            reply = self._misbehave(fault, name, fields, request_id)
        if reply is not None:
            self._deliver(self.server.twist(name, reply))

    def _misbehave(self, fault: Fault, name: str, fields: Fields, request_id: int) -> Optional[bytes]:
        act = fault.act
        if act == "hold before":
            fault.fired.set()
            fault.wait_released()
        with self.server.lock:
            if fault.then is not None:
                fault.then()
            done = act not in ("cut before", "status", "not done", "silence", "replace")
            reply = self._answer(name, fields, request_id) if done else b""
        fault.fired.set()
        if act in ("cut before", "cut after"):
            self.connection.abort()
            return None
        if act == "silence":
            self.connection.is_silent = True
            return None
        if act == "no reply":
            return None
        if act == "hold":
            fault.wait_released()
        if act == "status":
            return frame(bytes([101]) + struct.pack(">I", request_id) + status(fault.code, fault.message))
        if act == "not done":
            return frame(bytes([101]) + struct.pack(">I", request_id) + status(0, "Success"))
        if act == "replace":
            return frame(bytes([fault.code]) + struct.pack(">I", request_id) + fault.body)
        if act == "wrong id":
            return reply[:5] + struct.pack(">I", request_id + 1000) + reply[9:]
        if act == "wrong type":
            return reply[:4] + bytes([{101: 104}.get(reply[4], 102 if reply[4] != 102 else 105)]) + reply[5:]
        if act == "huge length":
            return b"\xff\xff\xff\xff" + reply[4:]
        if act == "truncated":  # a packet that ends inside its first field
            return frame(reply[4:11])
        assert act in ("hold", "hold before"), act
        return reply

    def _deliver(self, reply: bytes) -> None:
        if self.connection.is_silent:
            return
        step = self.server.chunk_bytes
        for start in range(0, len(reply), step):
            with self.connection.delivering:
                if self.connection.ended.is_set():
                    return
                self.connection.heard()
                self._on_data(reply[start : start + step])

    def _answer(self, name: str, fields: Fields, request_id: int) -> bytes:
        try:
            with self.server.lock:
                kind, body = getattr(self, "_" + name.lower().replace("-", "_"))(fields)
        except Status as error:
            kind, body = 101, status(error.code, error.message)
        return frame(bytes([kind]) + struct.pack(">I", request_id) + body)

    def _handle(self, fields: Fields) -> _Open:
        opened = self.handles.get(fields.string())
        if opened is None:
            raise Status(4)  # "Failure", as OpenSSH says of a handle it does not know
        return opened

    def _new_handle(self, opened: _Open) -> Tuple[int, bytes]:
        self._next_handle += 1
        name = struct.pack(">I", self._next_handle)
        self.handles[name] = opened
        return 102, string(name)

    def _writable(self) -> None:
        if self.server.read_only:
            raise Status(status_of(errno.EROFS))

    def _open(self, fields: Fields) -> Tuple[int, bytes]:
        server, path, pflags, attrs = self.server, fields.string(), fields.u32(), fields.attrs()
        if pflags & (2 | 8):
            self._writable()
        parent, name = server._parent(path)
        inode = parent.children.get(name)
        if inode is not None and pflags & 8 and pflags & 32 and not server.ignores_excl:
            raise Status(status_of(errno.EEXIST))
        if inode is not None and inode.is_link:
            inode = server._find(path)
        if inode is None:
            if not pflags & 8:
                raise Status(status_of(errno.ENOENT))
            inode = Inode(stat.S_IFREG | (attrs.get("mode", 0o666) & 0o7777), int(server.now()))
            parent.children[name] = inode
            server._changed(parent)
        elif not server.root_user:
            if (pflags & 1 and not inode.mode & 0o400) or (pflags & 2 and not inode.mode & 0o200):
                raise Status(status_of(errno.EACCES))
        if inode.is_dir and pflags & 2:
            raise Status(status_of(errno.EISDIR))
        if pflags & 16 or (pflags & 2 and server.empties_opened):
            inode.data.clear()
            inode.mtime = int(server.now())
        return self._new_handle(_Open(path, inode, pflags))

    def _close(self, fields: Fields) -> Tuple[int, bytes]:
        name = fields.string()
        if self.handles.pop(name, None) is None:
            raise Status(4)
        return 101, status(0)

    def _read(self, fields: Fields) -> Tuple[int, bytes]:
        opened, offset, length = self._handle(fields), fields.u64(), fields.u32()
        if opened.inode.is_dir:
            raise Status(status_of(errno.EISDIR))
        if not opened.pflags & 1:
            raise Status(status_of(errno.EBADF))
        data = bytes(opened.inode.data[offset : offset + min(length, self.server.read_bytes_max)])
        if not data:
            raise Status(1)
        return 103, string(data)

    def _write(self, fields: Fields) -> Tuple[int, bytes]:
        opened, offset, data = self._handle(fields), fields.u64(), fields.string()
        if not opened.pflags & 2:
            raise Status(status_of(errno.EBADF))
        self.server.write(opened.inode, offset, data)
        return 101, status(0)

    def _lstat(self, fields: Fields) -> Tuple[int, bytes]:
        return 105, self.server._find(self._behind(fields), follow=False).attrs()

    def _behind(self, fields: Fields) -> bytes:
        """A path, as this server understands it."""
        path = fields.string()
        if self.server.follows_links:
            with contextlib.suppress(Status):
                inode = self.server._find(path, follow=False)
                self.server._find(path)
                if inode.is_link:
                    return os.path.join(os.path.dirname(path), inode.target)
        return path

    def _stat(self, fields: Fields) -> Tuple[int, bytes]:
        return 105, self.server._find(fields.string()).attrs()

    def _fstat(self, fields: Fields) -> Tuple[int, bytes]:
        return 105, self._handle(fields).inode.attrs()

    def _setstat(self, fields: Fields) -> Tuple[int, bytes]:
        self.server.set_attrs(self.server._find(fields.string()), fields.attrs())
        return 101, status(0)

    def _lsetstat(self, fields: Fields) -> Tuple[int, bytes]:
        self.server.set_attrs(self.server._find(fields.string(), follow=False), fields.attrs())
        return 101, status(0)

    def _fsetstat(self, fields: Fields) -> Tuple[int, bytes]:
        self.server.set_attrs(self._handle(fields).inode, fields.attrs())
        return 101, status(0)

    def _opendir(self, fields: Fields) -> Tuple[int, bytes]:
        path = fields.string()
        inode = self.server._find(path)
        if not inode.is_dir:
            raise Status(status_of(errno.ENOTDIR))
        opened = _Open(path, inode)
        opened.left = [(b".", inode), (b"..", inode), *inode.children.items()]
        return self._new_handle(opened)

    def _readdir(self, fields: Fields) -> Tuple[int, bytes]:
        opened = self._handle(fields)
        if opened.left is None:
            raise Status(4)
        some, opened.left = opened.left[:NAMES_PER_REPLY], opened.left[NAMES_PER_REPLY:]
        if not some:
            raise Status(1)
        return 104, struct.pack(">I", len(some)) + b"".join(
            string(name) + string(b"?" * 10 + b" " + name) + inode.attrs() for name, inode in some
        )

    def _remove(self, fields: Fields) -> Tuple[int, bytes]:
        self._writable()
        parent, name = self.server._parent(fields.string())
        inode = parent.children.get(name)
        if inode is None:
            raise Status(status_of(errno.ENOENT))
        if inode.is_dir:
            raise Status(status_of(errno.EISDIR))
        inode.nlink -= 1
        del parent.children[name]
        self.server._changed(parent)
        return 101, status(0)

    def _mkdir(self, fields: Fields) -> Tuple[int, bytes]:
        self._writable()
        path, attrs = fields.string(), fields.attrs()
        parent, name = self.server._parent(path)
        if name in parent.children:
            raise Status(status_of(errno.EEXIST))
        mode = attrs.get("mode", 0o777) & 0o7777
        parent.children[name] = Inode(stat.S_IFDIR | mode, int(self.server.now()))
        self.server._changed(parent)
        return 101, status(0)

    def _rmdir(self, fields: Fields) -> Tuple[int, bytes]:
        self._writable()
        parent, name = self.server._parent(fields.string())
        inode = parent.children.get(name)
        if inode is None:
            raise Status(status_of(errno.ENOENT))
        if not inode.is_dir:
            raise Status(status_of(errno.ENOTDIR))
        if inode.children:
            raise Status(status_of(errno.ENOTEMPTY))
        del parent.children[name]
        self.server._changed(parent)
        return 101, status(0)

    def _realpath(self, fields: Fields) -> Tuple[int, bytes]:
        path = fields.string() or b"."
        if not path.startswith(b"/"):
            path = self.server.home + b"/" + path
        names: List[bytes] = []
        for part in path.split(b"/"):
            if part == b"..":
                del names[-1:]
            elif part not in (b"", b"."):
                names.append(part)
        full = b"/" + b"/".join(names)
        if names:
            self.server._parent(full)
        return 104, struct.pack(">I", 1) + string(full) + string(full) + struct.pack(">I", 0)

    def _rename(self, fields: Fields) -> Tuple[int, bytes]:
        self._writable()
        self.server.rename(self._behind(fields), self._behind(fields), posix=False)
        return 101, status(0)

    def _posix_rename(self, fields: Fields) -> Tuple[int, bytes]:
        self._writable()
        self.server.rename(self._behind(fields), self._behind(fields), posix=True)
        return 101, status(0)

    def _readlink(self, fields: Fields) -> Tuple[int, bytes]:
        inode = self.server._find(fields.string(), follow=False)
        if not inode.is_link:
            raise Status(status_of(errno.EINVAL))
        return 104, struct.pack(">I", 1) + string(inode.target) * 2 + struct.pack(">I", 0)

    def _symlink(self, fields: Fields) -> Tuple[int, bytes]:
        self._writable()
        target, path = fields.string(), fields.string()  # OpenSSH's order, not the draft's
        if self.server.link_path_first:
            target, path = path, target
        parent, name = self.server._parent(path)
        if name in parent.children or not name:
            raise Status(status_of(errno.EEXIST))
        inode = Inode(stat.S_IFLNK | 0o777, int(self.server.now()))
        inode.target = target
        parent.children[name] = inode
        self.server._changed(parent)
        return 101, status(0)

    def _hardlink(self, fields: Fields) -> Tuple[int, bytes]:
        self._writable()
        inode = self.server._find(self._behind(fields), follow=False)
        parent, name = self.server._parent(fields.string())
        if name in parent.children:
            raise Status(status_of(errno.EEXIST))
        if inode.is_dir:
            raise Status(status_of(errno.EPERM))
        parent.children[name] = inode
        inode.nlink += 1
        self.server._changed(parent)
        return 101, status(0)

    def _fsync(self, fields: Fields) -> Tuple[int, bytes]:
        inode = self._handle(fields).inode
        inode.disk = bytes(inode.data)
        return 101, status(0)

    def _limits(self, fields: Fields) -> Tuple[int, bytes]:
        return 201, struct.pack(">4Q", *self.server.limits)

    def _statvfs(self, fields: Fields) -> Tuple[int, bytes]:
        self.server._find(fields.string())
        free = self.server.free_bytes // 4096
        flag = 1 if self.server.read_only else 0
        return 201, struct.pack(
            ">11Q", 4096, 4096, 1 << 30, free, free, 1 << 20, 1 << 19, 1 << 19, self.server.fsid, flag, 255
        )


class Fields:
    """Reads the fields of a request."""

    def __init__(self, data: bytes) -> None:
        self.rest = data

    def byte(self) -> int:
        value, self.rest = self.rest[0], self.rest[1:]
        return value

    def u32(self) -> int:
        (value,) = struct.unpack_from(">I", self.rest)
        self.rest = self.rest[4:]
        return int(value)

    def u64(self) -> int:
        (value,) = struct.unpack_from(">Q", self.rest)
        self.rest = self.rest[8:]
        return int(value)

    def string(self) -> bytes:
        length = self.u32()
        assert len(self.rest) >= length, "a string of the client's reaches past its packet"
        value, self.rest = self.rest[:length], self.rest[length:]
        return value

    def attrs(self) -> Dict[str, int]:
        flags = self.u32()
        fields: Dict[str, int] = {}
        if flags & 1:
            fields["size"] = self.u64()
        if flags & 2:
            fields["uid"], fields["gid"] = self.u32(), self.u32()
        if flags & 4:
            fields["mode"] = self.u32()
        if flags & 8:
            fields["atime"], fields["mtime"] = self.u32(), self.u32()
        assert not self.rest, "bytes behind the attributes"
        return fields


def string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def status(code: int, message: Optional[str] = None) -> bytes:
    text = STATUS_TEXT.get(code, "?") if message is None else message
    return struct.pack(">I", code) + string(text.encode()) + string(b"")


def frame(packet: bytes) -> bytes:
    return struct.pack(">I", len(packet)) + packet
