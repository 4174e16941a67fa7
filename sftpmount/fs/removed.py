"""Files that are removed while they are open: out of sight at once, gone from the server with their last handle.

libfuse 2 turns such an unlink into a rename to ``.fuse_hidden...`` in the same directory, and goes on to use that path. The
server's file is moved to a name of its own in the mount's root instead, so that its directory can be listed as empty and
removed, and so that it survives a reconnect, which a file that the server has already removed would not. Where the
server does not let it go there, it takes the name that libfuse gave it. A crash leaves such files behind in the root, named
for what they are.
"""

from __future__ import annotations

import logging
import secrets
import threading
from typing import Dict, List, Optional

from ..cache.namespace import Namespace, Node
from ..errors import FsError
from ..sftp.remote import Remote

log = logging.getLogger(__name__)

LIBFUSE_PREFIX = b".fuse_hidden"
PREFIX = b".sftpmount-removed-"
# How long the release of a file that was closed a moment ago may take to arrive.
RELEASE_S = 0.03


def is_libfuse_name(path: bytes) -> bool:
    """True for a path that libfuse made up for a file removed while open."""
    return path.rpartition(b"/")[2].startswith(LIBFUSE_PREFIX)


class RemovedFiles:
    """The files of one mount that have no name any more and are open still. Thread-safe."""

    def __init__(self, remote: Remote, root: bytes) -> None:
        self._remote = remote
        self._root = root
        self._lock = threading.Lock()
        self._unpinned = threading.Condition()
        self._nodes: Dict[bytes, Node] = {}  # libfuse's path -> node
        self._places: Dict[Node, bytes] = {}  # node -> the server's path, where the file has no other name

    def node_at(self, path: bytes) -> Optional[Node]:
        """The file that libfuse means by ``path``."""
        return self._nodes.get(path) if self._nodes else None

    def place_of(self, path: bytes) -> Optional[bytes]:
        """Where that file is on the server."""
        node = self.node_at(path)
        return self._places.get(node) if node is not None else None

    def names_in_root(self) -> List[bytes]:
        """What the root's listing must not show."""
        with self._lock:
            return [place.rpartition(b"/")[2] for place in self._places.values()]

    def remove(
        self, names: Namespace, node: Node, far_old: bytes, old: bytes, far_new: bytes, new: bytes
    ) -> None:
        """libfuse renames ``old`` to ``new`` because ``node`` is open: take the name away, keep the file."""
        place: Optional[bytes] = None
        if len(node.links) > 1 or self._is_being_released(node):
            self._remote.unlink(far_old)
        else:
            place = (
                (b"" if self._root == b"/" else self._root) + b"/" + PREFIX + secrets.token_hex(8).encode()
            )
            try:
                self._remote.rename(far_old, place, node.attrs)
            except FsError:
                place = far_new
                self._remote.rename(far_old, place, node.attrs)
        with self._lock:
            self._nodes[new] = node
            if place is not None:
                self._places[node] = place
        names.removed(old)
        if place is not None and node.file is not None:
            with node.file.lock:
                for handle in node.file.handles:
                    handle.remote.path = place

    def _is_being_released(self, node: Node) -> bool:
        """True where the last handle goes this moment: the kernel does not wait for a release, so an unlink overtakes it."""
        with self._unpinned:
            return bool(self._unpinned.wait_for(lambda: node.pins == 0, RELEASE_S))

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
            try:
                self._remote.unlink(place)
            except FsError as error:
                log.warning("%r, removed while it was open, is left on the server: %s", place, error.strerror)

    def directory_renamed(self, old: bytes, new: bytes) -> None:
        """libfuse's paths move with their directories."""
        with self._lock:
            for path in [path for path in self._nodes if path.startswith(old + b"/")]:
                self._nodes[new + path[len(old) :]] = self._nodes.pop(path)
