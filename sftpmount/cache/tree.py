"""The tree of nodes: what is at a path, inode numbers, and who is forgotten first.

Inode numbers are derived from the path where that is free, so that they stay the same when a node is forgotten and met again.
At most ``entries_max`` nodes are kept, plus those that must be; the directories longest unused are forgotten first.

Paths are bytes that begin with a slash, the mount's root being b"/". All is guarded by the namespace's lock.
"""

from __future__ import annotations

import hashlib
import stat
from collections import OrderedDict
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

from ..sftp.wire import Attrs, Entry
from .node import Node

ROOT_INO = 1


def split(path: bytes) -> Tuple[bytes, bytes]:
    """Parent and name of a path other than the root."""
    parent, _, name = path.rpartition(b"/")
    return parent or b"/", name


def join(directory: bytes, name: bytes) -> bytes:
    """The path of a name in a directory."""
    return (b"/" if directory == b"/" else directory + b"/") + name


class Tree:
    """The nodes of a mount. ``on_gone`` is called for each whose last name is taken away."""

    def __init__(self, root: Node, entries_max: int, *, on_gone: Callable[[Node], None]) -> None:
        self.root = root
        self.entries_max = entries_max
        self._room = entries_max * 15 // 16  # for one directory: not each name more shall drive out another
        self._on_gone = on_gone
        self._inos: Set[int] = {ROOT_INO}
        # Directories that have children, the one longest unused first.
        self._used: OrderedDict[Node, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._inos)

    def walk(self, path: bytes) -> Optional[Node]:
        """The node at ``path``, fresh or not; None where none is known."""
        node = self.root
        for name in path.split(b"/"):
            if name:
                found = node.children.get(name)
                if found is None:
                    return None
                node = found
        return node

    def path_of(self, node: Node) -> Optional[bytes]:
        """One current path of ``node``; None where it has none any more."""
        names: List[bytes] = []
        while node is not self.root:
            if not node.links:
                return None
            node, name = node.links[0]
            names.append(name)
        return b"/" + b"/".join(reversed(names))

    def pinned(self, start: Node) -> Iterator[Node]:
        """The nodes at and below ``start`` with open handles, or with attributes that are owed."""
        nodes = [start]
        seen: Set[Node] = set()
        while nodes:
            node = nodes.pop()
            if (node.pins or node.owed is not None) and node not in seen:
                seen.add(node)
                yield node
            nodes.extend(node.children.values())

    def grow(self, path: bytes) -> Node:
        """The node of ``path``, made of unknown directories where need be (the kernel may know names we have forgotten)."""
        node, grown = self.root, b""
        for name in path.split(b"/"):
            if name:
                grown += b"/" + name
                found = node.children.get(name)
                if found is None:
                    node.is_incomplete()  # the listing did not have it: it is a guess
                    found = self.insert(node, name, grown, Attrs(mode=stat.S_IFDIR | 0o700), 0.0)
                node = found
        return node

    def insert(
        self, parent: Node, name: bytes, path: bytes, attrs: Attrs, until: float, mark: int = 0
    ) -> Node:
        """A new node, its attributes believed until then."""
        node = Node(self._new_ino(path), attrs, until)
        node.as_of = mark
        node.links.append((parent, name))
        parent.children[name] = node
        parent.absent.pop(name, None)
        self.touch(parent)
        return node

    def _new_ino(self, path: bytes) -> int:
        salt = b""
        while True:
            digest = hashlib.blake2b(path + salt, digest_size=8).digest()
            # Below 2**62: some programs keep inode numbers in signed or floating numbers of their own.
            ino = int.from_bytes(digest, "big") >> 2
            if ino > ROOT_INO and ino not in self._inos:
                self._inos.add(ino)
                return ino
            salt += b"\0+"

    def unlink(self, parent: Node, name: bytes) -> None:
        """Take away a name, and with a node's last name all that is below it."""
        node = parent.children.pop(name)
        node.links.remove((parent, name))
        if node.links:
            return
        for child_name in list(node.children):
            self.unlink(node, child_name)
        self._used.pop(node, None)
        self._on_gone(node)
        self.free_number(node)

    def free_number(self, node: Node) -> None:
        """Another node may have its inode number, unless it has a name or is open."""
        if not node.pins and not node.links and node is not self.root:
            self._inos.discard(node.ino)

    # -- what is kept --------------------------------------------------------------------------------------------------------

    def touch(self, directory: Node) -> None:
        """It was used just now."""
        self._used[directory] = None
        self._used.move_to_end(directory)

    def forget_oldest(self) -> None:
        """Directories below one that is forgotten have a time of their own. Of the one used last the first names are kept."""
        newest = next(reversed(self._used), None)
        tries = len(self._used)
        while len(self._inos) > self.entries_max and tries > 0:
            tries -= 1
            directory, _ = self._used.popitem(last=False)
            directory.absent.clear()
            going = [name for name, child in directory.children.items() if self.can_go(child)]
            if directory is newest:
                going = going[self._room - len(self._inos) :]
            if going:
                directory.is_incomplete()
            for name in going:
                self.unlink(directory, name)
            if directory.children:
                self.touch(directory)

    def can_go(self, child: Node) -> bool:
        """True where nothing but the server is needed to know it again."""
        return child not in self._used and not child.pins and child.owed is None

    def piece(self, entries: Sequence[Entry], beginning_with: Optional[bytes]) -> Sequence[Entry]:
        """As many as are kept of one directory."""
        if len(entries) <= self._room:
            return entries
        names = (entry.name for entry in entries)
        begin = next((at for at, name in enumerate(names) if name == beginning_with), 0)
        begin = min(begin, len(entries) - self._room)
        return entries[begin : begin + self._room]

    def check_invariants(self) -> None:
        """Raise AssertionError where a number is not unique, or a name and its node do not know each other."""
        seen: Dict[int, Node] = {}
        nodes = [self.root]
        while nodes:
            node = nodes.pop()
            assert seen.setdefault(node.ino, node) is node, f"inode {node.ino} twice"
            assert node.ino in self._inos
            for name, child in node.children.items():
                assert (node, name) in child.links, (name, child.links)
                if child.ino not in seen:
                    nodes.append(child)
            if node.children:
                assert node in self._used
