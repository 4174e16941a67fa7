"""What the filesystem hands out: attributes, open files, and what open(2) flags mean to the server."""

from __future__ import annotations

import os
from typing import NamedTuple, Optional

from ..cache.blocks import FileCache
from ..cache.node import Node
from ..cache.readahead import Pattern
from ..errors import StatusError
from ..sftp import wire
from ..sftp.remote_file import RemoteFile


class Stat(NamedTuple):
    """What stat(2) shows; sizes in bytes, times in seconds."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    atime: int
    mtime: int


class Handle:
    """An open file of this mount."""

    __slots__ = ("appends", "file", "node", "owed", "pattern", "remote", "trusted", "unopened", "writable")

    def __init__(
        self, node: Node, file: FileCache, remote: RemoteFile, writable: bool, pattern: Pattern
    ) -> None:
        self.node = node
        self.file = file
        self.remote = remote
        self.writable = writable
        self.pattern = pattern
        self.owed: Optional[StatusError] = None
        self.appends = False  # O_APPEND
        self.unopened = False  # the server is asked at the first read
        self.trusted = False  # the bytes known before this open are still true


def pflags_of(flags: int) -> int:
    """open(2) flags as SFTP pflags. O_APPEND stays here: the kernel gives the offset, and a resend must be repeatable."""
    access = flags & os.O_ACCMODE
    pflags = {os.O_RDONLY: wire.FXF_READ, os.O_WRONLY: wire.FXF_WRITE}.get(
        access, wire.FXF_READ | wire.FXF_WRITE
    )
    if flags & os.O_TRUNC:
        pflags |= wire.FXF_TRUNC
    return pflags
