"""libfuse 2's main function in its steps, with the kernel's handshake in our hands.

libfuse 2 speaks protocol 7.19 and reads at most 128 KiB from the kernel at once; fusepy knows no other libfuse. What the
kernel learned since needs a word in the handshake (include/uapi/linux/fuse.h), and no more but for the last:

FUSE_MAX_PAGES         one WRITE of up to a MiB instead of eight: each costs two changes of threads (7.28, Linux 4.20)
FUSE_PARALLEL_DIROPS   programs that look names up in one directory do not wait for each other (7.25, Linux 4.7)
FUSE_DO_READDIRPLUS    names come with their attributes (7.21, Linux 3.9): ``readdirplus``

So the kernel's INIT is read here and given to libfuse; its reply is caught, completed and sent. The kernel then asks for
buffers that hold the longest request. libfuse takes their size from its channel and has no function to set it: it is set in
the struct, where that looks as in 2.9. Where it does not, or the kernel is older, all stays as libfuse does it.
"""

from __future__ import annotations

import ctypes
import logging
import os
from struct import Struct
from typing import Any, Callable, List

log = logging.getLogger(__name__)

IN_HEADER = Struct("=IIQQIIII")  # length, opcode, unique, node id, uid, gid, pid, padding
_INIT_IN = Struct("=IIII")  # major, minor, max_readahead, flags
OUT_HEADER = Struct("=IiQ")  # length, error, unique
_INIT_OUT = Struct(
    "=IIIIHHI"
)  # major, minor, max_readahead, flags, max_background, congestion_threshold, max_write
_INIT_OUT_MORE = Struct("=IHH32x")  # time_gran, max_pages, map_alignment and what is unused (7.23 and later)
_INIT = 26
_READDIRPLUS = 1 << 13 | 1 << 14  # where programs look at names: FUSE_DO_READDIRPLUS, FUSE_READDIRPLUS_AUTO
_PARALLEL_DIROPS = 1 << 18
_MAX_PAGES = 1 << 22
_PAGE_BYTES = 4096
_HEADERS_BYTES = 4096  # what libfuse, too, adds for them
# struct fuse_chan: three functions, the session, the descriptor, the size of buffers
_SESSION, _DESCRIPTOR, _BUFFER_BYTES = 3, 4, 5


class _Iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


_Send = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(_Iovec), ctypes.c_size_t)


class _ChannelOperations(ctypes.Structure):
    _fields_ = [("receive", ctypes.c_void_p), ("send", _Send), ("destroy", ctypes.c_void_p)]


Work = Callable[[int, int], None]
Ask = Callable[[bytes], bytes]


def own_main(
    library: Any, write_bytes_max: int, serve: Callable[[int, int, Work, Ask], None]
) -> Callable[..., int]:
    """What to call in place of ``library.fuse_main_real``; requests then have up to ``write_bytes_max`` bytes of data.

    ``serve(device, buffer_bytes, work, ask)`` is called in place of libfuse's loop: see ``loop.Loop``; ``ask`` takes a
    request that is not the kernel's and gives what libfuse replies, b"" where it does not. ``library`` is declared.
    """

    def main(argc: int, argv: Any, operations: Any, size: int, data: Any) -> int:
        mountpoint, is_threaded = ctypes.c_char_p(), ctypes.c_int()
        fuse = library.fuse_setup(
            argc, argv, operations, size, ctypes.byref(mountpoint), ctypes.byref(is_threaded), data
        )
        if not fuse:
            return 1
        session = library.fuse_get_session(fuse)
        channel = library.fuse_session_next_chan(session, None)
        _shake_hands(library, session, channel, write_bytes_max)

        def work(address: int, length: int) -> None:
            library.fuse_session_process(session, address, length, channel)

        device, buffer_bytes = library.fuse_chan_fd(channel), library.fuse_chan_bufsize(channel)
        try:
            with _Asking(library, session, buffer_bytes) as ask:
                serve(device, buffer_bytes, work, ask)
        except OSError as error:
            log.error("reading the kernel's requests: %s", error.strerror)
            return 1
        finally:
            library.fuse_teardown(fuse, mountpoint)
        return 0

    return main


def declare(library: Any) -> None:
    """Say what its functions take and give. Raises AttributeError where it is another library than libfuse 2."""
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for name, result, arguments in (
        ("fuse_setup", pointer, None),
        ("fuse_teardown", None, [pointer, ctypes.c_char_p]),
        ("fuse_get_session", pointer, [pointer]),
        ("fuse_session_next_chan", pointer, [pointer, pointer]),
        ("fuse_session_process", None, [pointer, pointer, size, pointer]),
        ("fuse_chan_fd", number, [pointer]),
        ("fuse_chan_bufsize", size, [pointer]),
        ("fuse_chan_new", pointer, [ctypes.POINTER(_ChannelOperations), number, size, pointer]),
        ("fuse_chan_destroy", None, [pointer]),
    ):
        function = getattr(library, name)
        function.restype = result
        if arguments is not None:
            function.argtypes = arguments


def _shake_hands(library: Any, session: int, channel: int, write_bytes_max: int) -> None:
    device, buffer_bytes = library.fuse_chan_fd(channel), library.fuse_chan_bufsize(channel)
    words = (ctypes.c_size_t * (_BUFFER_BYTES + 1)).from_address(channel)
    if (words[_SESSION], words[_DESCRIPTOR] & 0xFFFFFFFF, words[_BUFFER_BYTES]) != (
        session,
        device,
        buffer_bytes,
    ):
        log.debug("another libfuse than 2.9: requests of at most %d bytes", buffer_bytes)
        return
    try:
        request = os.read(device, buffer_bytes)
    except OSError as error:  # unmounted already: the loop finds out
        log.debug("no handshake: %s", error)
        return
    opcode = IN_HEADER.unpack_from(request)[1]
    offered = _INIT_IN.unpack_from(request, IN_HEADER.size)[3] if opcode == _INIT else 0
    if not offered & _MAX_PAGES:
        log.debug("the kernel's requests have at most %d bytes", buffer_bytes)
        library.fuse_session_process(session, request, len(request), channel)
        return
    with _Asking(library, session, write_bytes_max + _HEADERS_BYTES) as ask:
        reply = ask(request)
    refusal, unique = OUT_HEADER.unpack_from(reply)[1:]
    if refusal == 0:
        fields = list(_INIT_OUT.unpack_from(reply, OUT_HEADER.size))
        fields[3] |= offered & (_READDIRPLUS | _PARALLEL_DIROPS | _MAX_PAGES)
        body = _INIT_OUT.pack(*fields) + _INIT_OUT_MORE.pack(0, write_bytes_max // _PAGE_BYTES, 0)
        reply = OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body
        words[_BUFFER_BYTES] = write_bytes_max + _HEADERS_BYTES
    os.write(device, reply)


class _Asking:
    """Requests that are not the kernel's; what libfuse replies is caught. Thread-safe."""

    def __init__(self, library: Any, session: int, buffer_bytes: int) -> None:
        self._library = library
        self._session = session
        self._buffer_bytes = buffer_bytes
        self._channels: List[_Channel] = []
        self._idle: List[_Channel] = []

    def __enter__(self) -> Ask:
        return self._ask

    def __exit__(self, *_: object) -> None:
        for channel in self._channels:
            self._library.fuse_chan_destroy(channel.address)

    def _ask(self, request: bytes) -> bytes:
        try:
            channel = self._idle.pop()
        except IndexError:
            channel = _Channel(self._library, self._buffer_bytes)
            self._channels.append(channel)
        try:
            self._library.fuse_session_process(self._session, request, len(request), channel.address)
            reply, channel.reply = channel.reply, b""
            return reply
        finally:
            self._idle.append(channel)


class _Channel:
    """Keeps the reply that libfuse sends through it."""

    def __init__(self, library: Any, buffer_bytes: int) -> None:
        self.reply = b""
        self._operations = _ChannelOperations(None, _Send(self._send), None)
        self.address = library.fuse_chan_new(ctypes.byref(self._operations), -1, buffer_bytes, None)

    def _send(self, _: Any, parts: Any, count: int) -> int:
        self.reply = b"".join(ctypes.string_at(parts[at].base, parts[at].length) for at in range(count))
        return 0
