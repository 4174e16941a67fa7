"""Small writes that only go to memory: taken in and answered without libfuse.

tar writes 10 KiB at a time, others 4: a program that waits for each of them waits mostly for libfuse and for ctypes. So a WRITE
(include/uapi/linux/fuse.h) that needs no more than memory is read from the kernel's buffer, and answered, here. All others
are libfuse's: what may wait, fail or send, appends, hard links, more than one block.
"""

from __future__ import annotations

import errno
import logging
import os
from struct import Struct
from typing import Any, Callable, Dict

from ..cache.blocks import BLOCK_BYTES
from .handles import Handle

log = logging.getLogger(__name__)

# Of the request: its type and number, the handle, where and how much, and flags.
_WRITE_IN = Struct("=4xIQ24xQQII")
_DATA_AT = 80  # behind all of struct fuse_in_header and struct fuse_write_in
_WRITE = 16
_FROM_A_MAPPING = 1
_REPLY = Struct("=IiQI4x")  # struct fuse_out_header (length, error, number), struct fuse_write_out (size)


class SmallWrites:
    """Called with each request and its length, in the thread that took it; True where it was one of these, and is done.

    handles  the open files by the numbers that the kernel was given; what is no ``Handle`` is not written to
    take     ``Files.try_write``
    """

    def __init__(
        self, device: int, handles: Dict[int, Any], take: Callable[[Handle, bytes, int], bool]
    ) -> None:
        self._device = device
        self._handles = handles
        self._take = take

    def __call__(self, buffer: Any, length: int) -> bool:
        if length <= _DATA_AT:
            return False
        kind, number, fh, offset, size, flags = _WRITE_IN.unpack_from(buffer)
        if kind != _WRITE or flags & _FROM_A_MAPPING or size + offset % BLOCK_BYTES > BLOCK_BYTES:
            return False
        handle = self._handles.get(fh)
        if (
            not isinstance(handle, Handle)
            or handle.appends
            or handle.node.aliased
            or length != _DATA_AT + size
        ):
            return False
        try:
            if not self._take(handle, buffer[_DATA_AT:length], offset):
                return False
            os.write(self._device, _REPLY.pack(_REPLY.size, 0, number, size))
        except OSError as error:
            # Nobody waits for it any more, or the mount has ended; else libfuse is to answer, which takes it in again.
            return error.errno in (errno.ENOENT, errno.ENODEV)
        except Exception:
            log.exception("a write failed in a way that is not foreseen")
            return False
        return True
