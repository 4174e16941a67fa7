"""What we know of names: attributes, complete listings, absent names, each with a lifetime (a *lease*).

Invariants, checked by ``check_invariants``:
1. A directory whose listing is complete and fresh answers for every name in it: what is not there is absent.
2. A node that is linked under several names is one object: its links share inode number, link count and data.
3. Inode numbers are unique among the nodes held (``tree``).
4. What the server told is only taken in where nothing that we changed meanwhile contradicts it: whoever asks takes a
   ``mark()`` before the request, and what was changed after that mark is not overwritten by the older answer, nor is what a
   younger question has brought (``Node.as_of``). A rename is seen on the server before we know that it is done: until then
   nothing is taken to be gone (``renaming``).
5. At most ``entries_max`` nodes are kept, plus those that must be (``tree``).
"""

from __future__ import annotations

import collections
import contextlib
import stat
import threading
import time
from typing import Callable, Counter, Dict, Iterator, List, Optional, Sequence, Tuple

from ..sftp.wire import Attrs, Entry
from .node import NEVER, Node
from .tree import ROOT_INO, Tree, join, split

# What was listed without a program's asking answers for no longer.
AHEAD_LIFETIME_S = 5.0


def _same_type(node: Node, attrs: Attrs) -> bool:
    """True unless both types are known and differ; some listings come without attributes."""
    return not node.mode or not attrs.mode or stat.S_IFMT(node.mode) == stat.S_IFMT(attrs.mode)


def _over(old: Attrs, new: Attrs) -> Attrs:
    """``old`` with what is not None in ``new``."""
    return Attrs(*(after if after is not None else before for after, before in zip(new, old)))


class Absent(Exception):
    """The name is known not to exist."""


class Namespace:
    """The cached tree. All methods are short and never touch the network."""

    def __init__(
        self,
        root_attrs: Attrs,
        *,
        lifetime_s: float,
        entries_max: int,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._wall = wall
        self._lock = threading.RLock()
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._mark = 1
        self.root = Node(ROOT_INO, root_attrs, clock() + lifetime_s)
        self._tree = Tree(self.root, entries_max, on_gone=self._is_gone)
        self._changes: Dict[Node, int] = {}
        # The mark of the last rename of a directory, since paths in older answers may mean another, or of the last change to
        # a node that was forgotten since.
        self._moved = 0
        # Directories in which something is being renamed, None where that is a directory itself or not known.
        self._renaming: Counter[Optional[Node]] = collections.Counter()
        self._hits = self._misses = 0

    # -- asking ---------------------------------------------------------------------------------------------------

    def mark(self) -> int:
        """Taken before a request whose answer is to be taken in: see invariant 4."""
        with self._lock:
            self._mark += 1
            return self._mark

    def get(self, path: bytes) -> Optional[Node]:
        """The node last known at ``path``, fresh or not; None where none is known."""
        with self._lock:
            return self._tree.walk(path)

    def fresh(self, path: bytes) -> Optional[Node]:
        """The node at ``path`` if its attributes may be believed; None = ask the server; raises Absent."""
        with self._lock:
            self._hits += 1
            node = self._fresh(path, self._clock())
            if node is None:
                self._hits -= 1
                self._misses += 1
            return node

    def known(self, path: bytes) -> Optional[Node]:
        """The same where nobody has asked for it yet; None also where it is absent."""
        with self._lock:
            try:
                return self._fresh(path, self._clock())
            except Absent:
                return None

    def _fresh(self, path: bytes, now: float) -> Optional[Node]:
        if path == b"/":
            return self.root if self.root.attrs_until > now else None
        parent_path, name = split(path)
        parent = self._tree.walk(parent_path)
        if parent is None:
            return None
        node = parent.children.get(name)
        if node is not None:
            if node.owed is not None or node.is_being_written:
                return node
            return node if node.attrs_until > now and node.is_told else None
        if parent.complete_until > now or parent.absent.get(name, 0.0) > now:
            raise Absent
        return None

    def state(self) -> Dict[str, int]:
        """For status: names held and at most to be held, and how often one was known (hits) or asked for (misses)."""
        with self._lock:
            return {
                "entries": len(self._tree),
                "limit_entries": self._tree.entries_max,
                "hits": self._hits,
                "misses": self._misses,
            }

    def listing(
        self, path: bytes, *, unchanged_since: Optional[int] = None
    ) -> Optional[List[Tuple[bytes, Node]]]:
        """The names and nodes of a directory whose complete listing is fresh, else None.

        With ``unchanged_since`` also None where we have changed anything in it since that mark.
        """
        with self._lock:
            node = self._tree.walk(path)
            if node is None or node.complete_until <= self._clock():
                return None
            if unchanged_since is not None and self._has_changed(node, unchanged_since):
                return None
            self._tree.touch(node)
            return list(node.children.items())

    def take_listing_ahead(self, path: bytes, since_s: float) -> Optional[List[Tuple[bytes, Node]]]:
        """The names and nodes that a listing ahead has brought, for one program, once; else None.

        Only where the server was asked after ``since_s``, a time of the clock, and after our last change in there.
        """
        with self._lock:
            node = self._tree.walk(path)
            if node is None:
                return None
            (asked_s, mark), node.ahead = node.ahead, NEVER
            if asked_s < since_s or self._has_changed(node, mark):
                return None
            node.complete_until = max(node.complete_until, asked_s + self._lifetime_s)
            self._tree.touch(node)
            return list(node.children.items())

    def is_listed(self, path: bytes, since_s: float, *, is_lease_enough: bool = True) -> bool:
        """True where its listing is fresh, or one ahead was asked for after ``since_s``."""
        with self._lock:
            node = self._tree.walk(path)
            if node is None:
                return False
            is_leased = is_lease_enough and node.complete_until > self._clock()
            return is_leased or node.ahead[0] >= since_s

    def is_known_empty(self, path: bytes) -> bool:
        """True where a fresh, complete listing has nothing in it."""
        entries = self.listing(path)
        return entries is not None and not entries

    def is_one_of_many(self, path: bytes) -> bool:
        """True where the fresh, complete listing of a directory that is not sticky has ``path``, and other names."""
        with self._lock:
            parent_path, name = split(path)
            parent = self._tree.walk(parent_path)
            if parent is None or parent.complete_until <= self._clock():
                return False
            return name in parent.children and len(parent.children) > 1 and not parent.mode & stat.S_ISVTX

    def path_of(self, node: Node) -> Optional[bytes]:
        """One current path of ``node``; None where it has none any more."""
        with self._lock:
            return self._tree.path_of(node)

    def link_count(self, node: Node) -> int:
        """The names that this mount knows a file by; 1 for directories ("unknown", to find and tar)."""
        return 1 if node.is_dir else len(node.links)

    def children(self, path: bytes) -> List[Tuple[bytes, Node]]:
        """The names below a directory that are known, whatever their age."""
        with self._lock:
            directory = self._tree.walk(path)
            return [] if directory is None else list(directory.children.items())

    def count(self, path: bytes) -> int:
        """How many names below a directory are known, whatever their age."""
        with self._lock:
            directory = self._tree.walk(path)
            return 0 if directory is None else len(directory.children)

    def open_nodes(self, below: Optional[bytes] = None) -> List[Node]:
        """The nodes with open handles, or with attributes that are owed: all, or those at and below a path."""
        with self._lock:
            start = self.root if below is None else self._tree.walk(below)
            return [] if start is None else list(self._tree.pinned(start))

    def __len__(self) -> int:
        return len(self._tree)

    # -- what the server told -----------------------------------------------------------------------------------------

    def told(self, path: bytes, attrs: Attrs, mark: int) -> Node:
        """The server's attributes of ``path``, asked for at ``mark``. Returns the node, which may know better."""
        with self._lock:
            until = self._clock() + self._lifetime_s
            if path == b"/":
                return self._take_in(self.root, attrs, until, mark)
            self._tree.forget_oldest()
            parent_path, name = split(path)
            parent = self._tree.walk(parent_path) or self._tree.grow(parent_path)
            node = parent.children.get(name)
            current = max(self._changes.get(parent, 0), self._moved) < mark
            if node is not None and self._moved >= mark:
                return node
            if not current:  # good for who asked; that the name is there is no news
                until = node.attrs_until if node is not None else 0.0
            if node is not None and _same_type(node, attrs):
                return self._take_in(node, attrs, until, mark)
            if node is not None:
                if not current or node.as_of > mark:
                    return node
                self._tree.unlink(parent, name)  # another client replaced it by something else
            elif not current:
                parent.is_incomplete()  # it would show in the listing
            return self._tree.insert(parent, name, path, attrs, until, mark if current else 0)

    def is_as_of(self, node: Node, mark: int) -> bool:
        """True where the attributes of ``node`` are no older than ``mark``, or ours; else we overtook the answer: ask again."""
        with self._lock:
            return node.as_of >= mark or node.owed is not None or node.is_being_written

    def told_absent(self, path: bytes, mark: int) -> None:
        """The server said that ``path`` does not exist, asked for at ``mark``."""
        with self._lock:
            parent_path, name = split(path)
            parent = self._tree.walk(parent_path)
            if path == b"/" or parent is None or self._has_changed(parent, mark):
                return
            node = parent.children.get(name)
            if node is not None:
                if node.as_of > mark:
                    return
                self._tree.unlink(parent, name)
            if len(parent.absent) > 10_000:
                parent.absent.clear()
            parent.absent[name] = self._clock() + self._lifetime_s

    def told_listing(
        self,
        path: bytes,
        entries: Sequence[Entry],
        mark: int,
        *,
        ahead_s: Optional[float] = None,
        beginning_with: Optional[bytes] = None,
    ) -> bool:
        """The server's whole listing of ``path``, asked for at ``mark``.

        What no program asked for (but we, at ``ahead_s``) is believed for a shorter time, and tells of no absent names, unless
        it renews a lease. Where it is longer than what is kept, a piece of it is: the first names, or those that begin with
        ``beginning_with``, since whoever asks for one asks for those behind it next.
        Returns False, taking in nothing, where we changed something in that directory meanwhile: list again; also where it
        was asked for ahead, does not fit and does not have that name.
        """
        piece = self._tree.piece(entries, beginning_with)
        names = {entry.name for entry in piece}
        outside = {entry.name for entry in entries if entry.name not in names}
        if outside and ahead_s is not None and beginning_with not in names:
            return False
        with self._lock:
            found = self._tree.walk(path)
            if self._has_changed(found, mark):
                return False
            node = found or self._tree.grow(path)
            is_lease = ahead_s is None or node.complete_until > 0.0
            lifetime_s = self._lifetime_s if is_lease else min(AHEAD_LIFETIME_S, self._lifetime_s)
            until = self._clock() + lifetime_s
            gone = node.children.keys() - names
            for entry in piece:
                child = node.children.get(entry.name)
                if child is not None and (child.as_of > mark or _same_type(child, entry.attrs)):
                    self._take_in(child, entry.attrs, until, mark)
                    continue
                if child is not None:
                    self._tree.unlink(node, entry.name)
                self._tree.insert(node, entry.name, join(path, entry.name), entry.attrs, until, mark)
            for name in gone:
                child = node.children[name]
                if self._tree.can_go(child) if name in outside else child.as_of <= mark:
                    self._tree.unlink(node, name)
            node.absent.clear()
            if is_lease:
                node.complete_until = until
            node.ahead = NEVER if ahead_s is None else (ahead_s, mark)
            if outside:
                node.is_incomplete()
            self._tree.touch(node)
            self._tree.forget_oldest()
            return True

    # -- what we changed ----------------------------------------------------------------------------------------------

    def created(self, path: bytes, attrs: Attrs, *, complete: bool = False) -> Node:
        """We made ``path``; a directory is ``complete`` from birth, so that nothing in it need be asked for."""
        with self._lock:
            parent_path, name = split(path)
            parent = self._tree.walk(parent_path) or self._tree.grow(parent_path)
            self._changed_in(parent)
            node = parent.children.get(name)
            if node is not None and _same_type(node, attrs) and not complete:
                node.changed = 0
                self._take_in(node, attrs, self._clock() + self._lifetime_s, self._mark)
                node.as_of = self._mark
                return node
            if node is not None:
                self._tree.unlink(parent, name)
            node = self._tree.insert(parent, name, path, attrs, self._clock() + self._lifetime_s, self._mark)
            if complete:
                node.complete_until = self._clock() + self._lifetime_s
            self._tree.forget_oldest()
            return node

    def linked(self, node: Node, path: bytes) -> None:
        """We made ``path`` a further hard link of ``node``."""
        with self._lock:
            parent_path, name = split(path)
            parent = self._tree.walk(parent_path) or self._tree.grow(parent_path)
            self._changed_in(parent)
            if name in parent.children:
                self._tree.unlink(parent, name)
            parent.children[name] = node
            parent.absent.pop(name, None)
            node.links.append((parent, name))
            node.changed = self._mark
            node.aliased = True
            self._tree.touch(parent)

    def removed(self, path: bytes) -> None:
        """We removed ``path``."""
        with self._lock:
            parent_path, name = split(path)
            parent = self._tree.walk(parent_path)
            if parent is None:
                return
            self._changed_in(parent)
            if name in parent.children:
                if parent.children[name].is_dir:
                    self._moved = self._mark
                self._tree.unlink(parent, name)
            parent.absent[name] = self._clock() + self._lifetime_s

    @contextlib.contextmanager
    def renaming(self, old: bytes) -> Iterator[None]:
        """While the server is told to rename ``old``, from before until ``renamed``: that a name is gone may be our doing."""
        with self._lock:
            node = self._tree.walk(old)
            parent = None if node is None or node.is_dir else self._tree.walk(split(old)[0])
            self._renaming[parent] += 1
        try:
            yield
        finally:
            with self._lock:
                self._renaming[parent] -= 1
                if not self._renaming[parent]:
                    del self._renaming[parent]

    def renamed(self, old: bytes, new: bytes) -> None:
        """We renamed ``old`` to ``new``, replacing what was there."""
        with self._lock:
            (old_parent_path, old_name), (new_parent_path, new_name) = split(old), split(new)
            new_parent = self._tree.walk(new_parent_path) or self._tree.grow(new_parent_path)
            old_parent = self._tree.walk(old_parent_path)
            self._changed_in(new_parent)
            if old_parent is not None:
                self._changed_in(old_parent)
            node = old_parent.children.get(old_name) if old_parent is not None else None
            target = new_parent.children.get(new_name)
            if target is not None:
                if target is node:
                    return  # two links of one file: POSIX rename leaves both
                self._tree.unlink(new_parent, new_name)
            if node is not None and old_parent is not None:
                del old_parent.children[old_name]
                node.links.remove((old_parent, old_name))
                node.links.insert(0, (new_parent, new_name))
                new_parent.children[new_name] = node
                new_parent.absent.pop(new_name, None)
                node.changed = self._mark
                self._tree.touch(new_parent)
                if node.is_dir:
                    self._moved = self._mark
            else:
                new_parent.is_incomplete()
                new_parent.absent.pop(new_name, None)
                self._moved = self._mark
            if old_parent is not None:
                old_parent.absent[old_name] = self._clock() + self._lifetime_s

    def set_attrs(self, node: Node, attrs: Attrs) -> None:
        """We changed attributes of ``node``: what is not None in ``attrs`` holds from now on."""
        with self._lock:
            self._mark += 1
            node.changed = self._mark
            node.attrs = _over(node.attrs, attrs)

    def is_ours(self, node: Node) -> bool:
        """True for a file or directory of one name that this mount has made, while its attributes may be believed."""
        with self._lock:
            is_known = node.owed is not None or node.attrs_until > self._clock()
            return node.ours and is_known and not node.aliased and not node.is_symlink

    def owe(self, node: Node, attrs: Attrs) -> None:
        """These attributes are to be shown from now on; the server is told of them later, see ``paid``."""
        with self._lock:
            node.owed = _over(node.owed or Attrs(), attrs)

    def paid(self, node: Node, attrs: Attrs) -> bool:
        """The server has, or refuses, what was owed; True unless more has come meanwhile."""
        with self._lock:
            self._mark += 1
            node.changed = self._mark  # older answers do not have it
            if node.owed is not attrs:
                return node.owed is None
            node.owed = None
            return True

    def distrust(self, node: Node) -> None:
        """Ask the server before the next answer about ``node``."""
        with self._lock:
            node.attrs_until = 0.0

    def distrust_path(self, path: bytes) -> None:
        """Ask the server about ``path`` and the listing it stands in; an operation on it failed or its outcome is odd."""
        with self._lock:
            node = self._tree.walk(path)
            if node is not None:
                node.attrs_until = 0.0
                node.is_incomplete()
            if path != b"/":
                parent_path, name = split(path)
                parent = self._tree.walk(parent_path)
                if parent is not None:
                    parent.is_incomplete()
                    parent.absent.pop(name, None)

    def pin(self, node: Node) -> None:
        """A handle was opened on ``node``."""
        with self._lock:
            node.pins += 1

    def unpin(self, node: Node) -> None:
        """A handle of ``node`` was closed."""
        with self._lock:
            node.pins -= 1
            self._tree.free_number(node)

    def check_invariants(self) -> None:
        """Raise AssertionError where invariants 2, 3 or 5 do not hold."""
        with self._lock:
            self._tree.check_invariants()

    # -- under the lock ---------------------------------------------------------------------------------------------

    def _take_in(self, node: Node, attrs: Attrs, until: float, mark: int) -> Node:
        if node.changed < mark and node.as_of <= mark and node.owed is None:
            node.as_of = mark
            if node.attrs.mtime != attrs.mtime or node.attrs.size != attrs.size:
                node.target = None
                if node.is_dir and node is not self.root:
                    node.is_incomplete()
                elif not node.is_being_written:
                    node.ours = False  # another client has written it, or put another in its place
            node.attrs = attrs if attrs.mode else attrs._replace(mode=node.attrs.mode)
            node.attrs_until = until if attrs.mode else 0.0
        return node

    def _is_gone(self, node: Node) -> None:
        # Answers that are older than what we changed in it must not be taken in when it is met again.
        self._moved = max(self._moved, node.changed, self._changes.pop(node, 0))

    def _has_changed(self, directory: Optional[Node], mark: int) -> bool:
        """True where an answer that was asked for at ``mark`` proves nothing about what is not in it."""
        if self._renaming and (directory in self._renaming or None in self._renaming):
            return True
        changed = self._changes.get(directory, 0) if directory is not None else 0
        return max(changed, self._moved) >= mark

    def _changed_in(self, parent: Node) -> None:
        self._mark += 1
        self._changes[parent] = self._mark
        parent.changed = self._mark
        # The server sets its mtime to about now; to ask for it after every change would cost a round trip per file.
        parent.attrs = parent.attrs._replace(mtime=int(self._wall()))
