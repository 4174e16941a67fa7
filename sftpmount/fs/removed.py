"""Files that are removed while they are open: out of sight at once, gone from the server with their last handle.

libfuse 2 turns such an unlink into a rename to ``.fuse_hidden...`` in the same directory, and goes on to use that path. The
server's file is moved to a name of its own in the mount's root instead, so that its directory can be listed as empty and
removed, and so that it survives a reconnect, which a file that the server has already removed would not. Where the
server does not let it go there, it takes the name that libfuse gave it. A crash leaves such files behind in the root, named
for what they are.
"""

from __future__ import annotations

import errno
import logging
import secrets
import threading
import time
from collections import deque
from typing import Callable, Deque, Dict, Optional, Set, Tuple

from .. import waiting
from ..cache.namespace import Namespace
from ..cache.node import Node
from ..cache.tree import join
from ..errors import FsError
from ..sftp.remote import Remote

log = logging.getLogger(__name__)

LIBFUSE_PREFIX = b".fuse_hidden"
PREFIX = b".sftpmount-removed-"
# How long the release of a file that was closed a moment ago may take to arrive.
RELEASE_S = 0.03
# How long after the first step of a replacement the second may take to arrive, on a busy machine; and how often it is looked
# whether libfuse has gone on to something else.
REPLACE_S = 2.0
LOOK_S = 0.002
# How long a removal or a replacement is remembered, for answers that were asked for before it.
REMEMBER_S = 60.0


def is_libfuse_name(path: bytes) -> bool:
    """True for a path that libfuse made up for a file removed while open."""
    return path.rpartition(b"/")[2].startswith(LIBFUSE_PREFIX)


class RemovedFiles:
    """The files of one mount that have no name any more and are open still. Thread-safe."""

    def __init__(self, remote: Remote, clock: Callable[[], float] = time.monotonic) -> None:
        self._remote = remote
        self.root = b""  # the mounted directory on the server
        self._lock = threading.Lock()
        self._unpinned = threading.Condition()
        self._returned = threading.Condition()  # guards _gone and _coming
        # Paths removed while open -> when, what was there, and whether libfuse is done with that operation.
        self._gone: Dict[bytes, Tuple[float, Node, Callable[[], bool]]] = {}
        # Those of them that are being removed, or replaced by a rename, right now.
        self._coming: Set[bytes] = set()
        self._replaced: Dict[bytes, float] = {}  # paths that were replaced -> when
        self._clock = clock
        self._nodes: Dict[bytes, Node] = {}  # libfuse's path -> node
        self._places: Dict[Node, bytes] = {}  # node -> the server's path, where the file has no other name
        # The names of such places, from before the server has them until no listing has them any more: seconds, name.
        self._hidden: Set[bytes] = set()
        self._unhiding: Deque[Tuple[float, bytes]] = deque()

    def node_at(self, path: bytes) -> Optional[Node]:
        """The file that libfuse means by ``path``."""
        return self._nodes.get(path) if self._nodes else None

    def place_of(self, path: bytes) -> Optional[bytes]:
        """Where that file is on the server."""
        node = self.node_at(path)
        return self._places.get(node) if node is not None else None

    def place(self, node: Node) -> bytes:
        """Where a file that has no name any more is on the server; b"" where it is not."""
        return self._places.get(node, b"")

    def names_in_root(self) -> Set[bytes]:
        """What the root's listing must not show: also what the server may have by now, or had a while ago."""
        with self._lock:
            return self._hidden.copy()

    def _hide(self, place: bytes) -> None:
        now = self._clock()
        with self._lock:
            while self._unhiding and self._unhiding[0][0] < now - REMEMBER_S:
                self._hidden.discard(self._unhiding.popleft()[1])
            self._hidden.add(place.rpartition(b"/")[2])

    def _hide_no_more(self, place: bytes, *, is_gone: bool) -> None:
        name = place.rpartition(b"/")[2]
        with self._lock:
            if is_gone:  # in older listings it may be
                self._unhiding.append((self._clock(), name))
            else:
                self._hidden.discard(name)

    def remove(
        self, names: Namespace, node: Node, far_old: bytes, old: bytes, far_new: bytes, new: bytes
    ) -> None:
        """libfuse renames ``old`` to ``new`` because ``node`` is open: take the name away, keep the file."""
        self._begin(old, node)
        try:
            self._take_away(names, node, far_old, old, far_new, new)
        except BaseException:
            self.rename_ends(old)
            raise
        with self._returned:
            self._gone[old] = (self._clock(), node, waiting.end_of_operation())
            self._coming.discard(old)
            self._returned.notify_all()

    def _begin(self, path: bytes, node: Node) -> None:
        """From before the server knows: whoever finds the name gone is to find it here."""
        with self._returned:
            now = self._clock()
            for old in [each for each, (since, _, _) in self._gone.items() if since < now - REMEMBER_S]:
                if old not in self._coming:
                    del self._gone[old]
            self._replaced = {each: when for each, when in self._replaced.items() if when > now - REMEMBER_S}
            self._gone[path] = (now, node, waiting.end_of_operation())
            self._coming.add(path)

    def _take_away(
        self, names: Namespace, node: Node, far_old: bytes, old: bytes, far_new: bytes, new: bytes
    ) -> None:
        place: Optional[bytes] = None
        if len(node.links) > 1 or self._is_being_released(node):
            self._remote.unlink(far_old)
        else:
            place = join(self.root, PREFIX + secrets.token_hex(8).encode())
            try:
                self._move(node, far_old, place)
            except FsError as error:
                if error.errno == errno.ETIMEDOUT:
                    raise
                place = far_new
                self._move(node, far_old, place)
        names.removed(old)
        with self._lock:
            if node.pins:
                self._nodes[new] = node
            was_released = place is not None and not node.pins  # meanwhile: nobody will come for it again
            if place is not None and not was_released:
                self._places[node] = place
        if place is not None and was_released:
            self._remove_from_server(place)
        file = node.file
        if place is None and not node.pins and not node.links and file is not None:
            with file.lock:
                file.distrust()  # nobody can ask for its bytes again

    def _move(self, node: Node, far_old: bytes, place: bytes) -> None:
        self._hide(place)
        try:
            self._remote.rename(far_old, place, node.attrs)
        except BaseException:
            self._hide_no_more(place, is_gone=False)
            raise

    def _is_being_released(self, node: Node) -> bool:
        """True where the last handle goes this moment: the kernel does not wait for a release, so an unlink overtakes it."""
        if node.pins:
            waiting.step_aside()  # the release is another's to take
        with self._unpinned:
            return bool(self._unpinned.wait_for(lambda: node.pins == 0, RELEASE_S))

    def is_replacing_itself(self, path: bytes, node: Optional[Node]) -> bool:
        """True where ``node`` is renamed to a name that it just had itself: POSIX leaves both names of a hard link."""
        since, gone, _ = self._gone.get(path, (0.0, None, None))
        return gone is not None and gone is node and self._clock() - since < REPLACE_S

    def was_removed(self, path: bytes) -> bool:
        """True where ``path`` was removed while open: a rename to it may be the second step of a replacement."""
        return path in self._gone

    def rename_begins(self, path: bytes) -> None:
        """A rename to ``path`` is on its way to the server."""
        with self._returned:
            if path in self._gone:
                self._coming.add(path)

    def rename_ends(self, path: bytes) -> None:
        """It is over, done or not."""
        if path in self._coming:
            with self._returned:
                self._coming.discard(path)
                self._gone.pop(path, None)
                self._replaced[path] = self._clock()
                self._returned.notify_all()

    def now_s(self) -> float:
        """What ``may_be_replaced`` counts by."""
        return self._clock()

    def may_be_replaced(self, path: bytes, asked_s: float) -> bool:
        """True, after a wait, where ``path`` seemed absent only because libfuse replaces an open file in two steps.

        To POSIX a rename over an open file is one step; to libfuse it is this module's ``remove`` and then the rename.
        Whoever looks between the two waits for the second, or until libfuse is seen to have gone on without it. ``asked_s`` is when
        the answer was asked for: the second step may have come and gone since.
        """
        with self._returned:
            if path not in self._gone:
                return self._replaced.get(path, asked_s - 1.0) >= asked_s
            while path in self._gone:
                if path in self._coming:
                    waiting.wait(self._returned)
                    continue
                since, _, is_over = self._gone[path]
                remaining_s = since + REPLACE_S - self._clock()
                if (
                    is_over()
                ):  # it was removed, not replaced: what is renamed to this name later is another matter
                    del self._gone[path]
                    return False
                if remaining_s <= 0:
                    return False
                waiting.step_aside()
                self._returned.wait(min(remaining_s, LOOK_S))
            return True

    def forget(self, path: bytes) -> bool:
        """libfuse removes its made-up name, after the last release; True where it was one of ours."""
        with self._lock:
            return self._nodes.pop(path, None) is not None

    def released(self, node: Node) -> None:
        """The last handle of ``node`` is gone: so is the file, if it has no name."""
        with self._unpinned:
            self._unpinned.notify_all()
        if node.links:
            return
        with self._lock:
            place = self._places.pop(node, None)
            for path in [path for path, other in self._nodes.items() if other is node]:
                del self._nodes[path]
        if place is not None:
            self._remove_from_server(place)

    def _remove_from_server(self, place: bytes) -> None:
        try:
            self._remote.unlink(place)
        except FsError as error:
            log.warning("%r, removed while it was open, is left on the server: %s", place, error.strerror)
            self._hide_no_more(place, is_gone=False)
        else:
            self._hide_no_more(place, is_gone=True)

    def directory_renamed(self, old: bytes, new: bytes) -> None:
        """libfuse's paths move with their directories."""
        with self._lock:
            for path in [path for path in self._nodes if path.startswith(old + b"/")]:
                self._nodes[new + path[len(old) :]] = self._nodes.pop(path)
