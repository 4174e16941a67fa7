"""READDIRPLUS, which libfuse 2 does not know: names with their attributes, made of its READDIR and a LOOKUP of each.

A program that lists a directory mostly looks at each name then (ls -l, rsync, tar, rm): to the kernel a question for each, and
without distance most of its time goes into waking who answers. One answer here tells of many. The kernel asks so for the
first names of each directory, and goes on as a program does, which looks at them or not (FUSE_READDIRPLUS_AUTO). Of names
that would have to be asked for on the server, it is given the name alone, and asks when a program does.

Requests and replies are those of include/uapi/linux/fuse.h.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import time
from struct import Struct
from typing import Callable, ContextManager, Iterator, List, NamedTuple

from .. import waiting
from .libfuse import IN_HEADER, OUT_HEADER

log = logging.getLogger(__name__)

# From the first look to the reply: attributes that are older when the kernel hears of them are not to be believed.
LATE_S = 0.015
_LOOKING_S = 0.01  # then the reply is sent as it is, and the kernel asks for the rest
_ALONE = 16  # names that are looked up before other requests are looked for
_OPCODE_AT = 4
_LOOKUP, _FORGET, _READDIR, _READDIRPLUS = 1, 2, 28, 44
_READ_IN = Struct("=16xI20x")  # size
_DIRENT = Struct("=16xI4x")  # length of the name
_NODE_ID = Struct("=Q")
_ENTRY_BYTES = 128  # struct fuse_entry_out
_NAME_ALONE = bytes(_ENTRY_BYTES)
_ATTR_VALID_S, _ATTR_VALID_NS = slice(24, 32), slice(36, 40)


class _Name(NamedTuple):
    name: bytes
    dirent: bytes  # struct fuse_dirent, filled up to eight bytes


class ReadDirPlus:
    """Called with the address and the length of each request; True where it was one of these, and is answered.

    device      the descriptor of /dev/fuse
    ask         what libfuse replies to a request that the kernel does not know of; b"" where that has no reply
    known_only  within it, a LOOKUP fails that would have to ask the server
    """

    def __init__(
        self, device: int, ask: Callable[[bytes], bytes], known_only: Callable[[], ContextManager[None]]
    ) -> None:
        self._device = device
        self._ask = ask
        self._known_only = known_only

    def __call__(self, address: int, length: int) -> bool:
        if ctypes.c_uint32.from_address(address + _OPCODE_AT).value != _READDIRPLUS:
            return False
        request = ctypes.string_at(address, length)
        try:
            self._answer(request)
        except Exception:
            log.exception("READDIRPLUS failed in a way that is not foreseen")
            self._send(request, errno.EIO, b"")
        return True

    def _answer(self, request: bytes) -> None:
        _, _, unique, directory, *caller = IN_HEADER.unpack_from(request)
        (room,) = _READ_IN.unpack_from(request, IN_HEADER.size)

        def ask(opcode: int, node: int, body: bytes) -> bytes:
            return self._ask(IN_HEADER.pack(IN_HEADER.size + len(body), opcode, unique, node, *caller) + body)

        listing = ask(_READDIR, directory, request[IN_HEADER.size :])
        error, names = OUT_HEADER.unpack_from(listing)[1], _names(listing[OUT_HEADER.size :])
        entries: List[bytes] = []
        dirents: List[bytes] = []
        began_s = time.monotonic()
        with self._known_only():
            for name, dirent in names:
                room -= _ENTRY_BYTES + len(dirent)
                if room < 0 or (dirents and time.monotonic() - began_s > _LOOKING_S):
                    break
                if len(dirents) % _ALONE == 0:
                    waiting.let_others()
                # The kernel does not count these two as looked up.
                reply = b"" if name in (b".", b"..") else ask(_LOOKUP, directory, name + b"\0")
                entries.append(reply[OUT_HEADER.size :] or _NAME_ALONE)
                dirents.append(dirent)
        if time.monotonic() - began_s > LATE_S:
            entries = [_not_believed(entry) for entry in entries]
        body = b"".join(part for pair in zip(entries, dirents) for part in pair)
        if not self._send(request, -error, body):
            for (node,) in map(_NODE_ID.unpack_from, entries):
                if node:
                    ask(_FORGET, node, _NODE_ID.pack(1))

    def _send(self, request: bytes, error: int, body: bytes) -> bool:
        """False where the kernel did not take it."""
        unique = IN_HEADER.unpack_from(request)[2]
        try:
            os.write(self._device, OUT_HEADER.pack(OUT_HEADER.size + len(body), -error, unique) + body)
        except OSError as problem:
            if problem.errno not in (errno.ENOENT, errno.ENODEV):  # nobody waits for it; the mount has ended
                log.error("answering READDIRPLUS: %s", problem.strerror)
            return False
        return True


def _names(dirents: bytes) -> Iterator[_Name]:
    """Of a reply to READDIR, whose last name may be cut."""
    at = 0
    while at + _DIRENT.size <= len(dirents):
        (length,) = _DIRENT.unpack_from(dirents, at)
        end = at + (_DIRENT.size + length + 7) // 8 * 8
        if end > len(dirents):
            return
        yield _Name(dirents[at + _DIRENT.size : at + _DIRENT.size + length], dirents[at:end])
        at = end


def _not_believed(entry: bytes) -> bytes:
    """The same name and node, whose attributes the kernel asks for when it needs them."""
    changed = bytearray(entry)
    changed[_ATTR_VALID_S], changed[_ATTR_VALID_NS] = bytes(8), bytes(4)
    return bytes(changed)
