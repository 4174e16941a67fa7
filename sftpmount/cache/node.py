"""What is known of one file, directory or symlink. The tree of them is ``namespace``'s."""

from __future__ import annotations

import stat
from typing import Any, Dict, List, Optional, Tuple

from .. import waiting
from ..sftp.wire import Attrs

NEVER = (float("-inf"), 0)


class Node:
    """One file, directory or symlink. Fields are guarded by the namespace's lock unless said otherwise."""

    __slots__ = (
        "__weakref__",
        "absent",
        "ahead",
        "aliased",
        "as_of",
        "attrs",
        "attrs_until",
        "changed",
        "children",
        "complete_until",
        "file",
        "ino",
        "links",
        "operation",
        "ours",
        "owed",
        "pins",
        "target",
        "times_set",
    )

    def __init__(self, ino: int, attrs: Attrs, attrs_until: float) -> None:
        self.ino = ino
        self.attrs = attrs
        self.attrs_until = attrs_until
        self.changed = 0  # the mark of our last own change to the attributes, or to what has this name
        self.as_of = 0  # the mark of the youngest question whose answer was taken in; 0 for a guess
        self.links: List[Tuple[Node, bytes]] = []
        self.children: Dict[bytes, Node] = {}
        self.absent: Dict[bytes, float] = {}
        self.complete_until = 0.0
        # When a listing that no program has seen yet was asked for: seconds, mark.
        self.ahead: Tuple[float, int] = NEVER
        self.target: Optional[bytes] = None  # a symlink's target, where known
        self.times_set = False  # by us, and not committed: a server that forgets may have older ones again
        self.aliased = False  # has or had several names: the kernel holds an inode for each
        self.ours = False  # made by this mount, and seen as such since
        self.owed: Optional[Attrs] = None  # changes that the server is not told of yet
        self.pins = 0  # open handles: a pinned node is never forgotten
        self.file: Any = (
            None  # cache.blocks.FileCache, from the first open until many others were opened after the last
        )
        self.operation = waiting.RLock()

    @property
    def is_being_written(self) -> bool:
        """True while it is open and our size and times are right, the server's not yet."""
        file = self.file  # may go meanwhile, see fs.files
        return bool(self.pins and file is not None and file.authoritative)

    @property
    def is_guess(self) -> bool:
        """True where nobody told that it is there, but an answer that we may have overtaken."""
        return not self.as_of

    @property
    def mode(self) -> int:
        """The st_mode as the server gave it, 0 where it gave none."""
        return self.attrs.mode or 0

    @property
    def is_dir(self) -> bool:
        """True for a directory."""
        return stat.S_ISDIR(self.mode)

    def is_incomplete(self) -> None:
        """Names may be missing among its children: its listing answers for nothing any more."""
        self.complete_until, self.ahead = 0.0, NEVER

    @property
    def is_file(self) -> bool:
        """True for a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_told(self) -> bool:
        """True where the server gave a type, and a size if it is a file's: listings may leave them out."""
        return self.attrs.mode is not None and (self.attrs.size is not None or not stat.S_ISREG(self.mode))

    @property
    def is_symlink(self) -> bool:
        """True for a symbolic link."""
        return stat.S_ISLNK(self.mode)
