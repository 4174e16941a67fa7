"""The tree of names against a plain dict of what the server has, with a clock that only tests move."""

from __future__ import annotations

import stat
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sftpmount.cache.namespace import Absent, Namespace
from sftpmount.cache.node import Node
from sftpmount.cache.tree import ROOT_INO, split
from sftpmount.sftp.wire import Attrs, Entry

LIFETIME_S = 20.0
DIR = Attrs(size=4096, uid=0, gid=0, mode=stat.S_IFDIR | 0o755, atime=1, mtime=1)


def regular(size: int, mtime: int = 1) -> Attrs:
    return Attrs(size=size, uid=0, gid=0, mode=stat.S_IFREG | 0o644, atime=mtime, mtime=mtime)


class Clock:
    def __init__(self) -> None:
        self.s = 1000.0

    def __call__(self) -> float:
        return self.s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ns(clock: Clock) -> Namespace:
    return make(clock)


def make(clock: Callable[[], float], entries_max: int = 1000, lifetime_s: float = LIFETIME_S) -> Namespace:
    return Namespace(DIR, lifetime_s=lifetime_s, entries_max=entries_max, clock=clock, wall=clock)


def told(ns: Namespace, path: bytes, attrs: Attrs) -> Node:
    return ns.told(path, attrs, ns.mark())


def list_in(ns: Namespace, path: bytes, **entries: Attrs) -> bool:
    found = [Entry(name.encode(), b"", attrs) for name, attrs in entries.items()]
    return ns.told_listing(path, found, ns.mark())


def seen(ns: Namespace, path: bytes) -> Any:
    """A node, "ask" or "absent"."""
    try:
        return ns.fresh(path) or "ask"
    except Absent:
        return "absent"


class TestLeases:
    def test_nothing_is_known_at_first_but_the_root(self, ns: Namespace) -> None:
        assert seen(ns, b"/") is ns.root
        assert seen(ns, b"/a") == "ask"
        assert ns.listing(b"/") is None

    def test_attributes_live_for_their_lifetime(self, ns: Namespace, clock: Clock) -> None:
        node = told(ns, b"/a", regular(5))
        assert seen(ns, b"/a") is node
        clock.s += LIFETIME_S - 0.1
        assert seen(ns, b"/a") is node
        clock.s += 0.2
        assert seen(ns, b"/a") == "ask"
        assert ns.get(b"/a") is node

    def test_so_do_absent_names(self, ns: Namespace, clock: Clock) -> None:
        ns.told_absent(b"/a", ns.mark())
        assert seen(ns, b"/a") == "absent"
        assert seen(ns, b"/b") == "ask"
        clock.s += LIFETIME_S + 0.1
        assert seen(ns, b"/a") == "ask"

    def test_what_nobody_asked_for_is_not_counted(self, ns: Namespace, clock: Clock) -> None:
        node = told(ns, b"/a", regular(1))
        ns.told_absent(b"/none", ns.mark())
        before = ns.state()
        assert ns.known(b"/a") is node
        assert ns.known(b"/b") is None
        assert ns.known(b"/none") is None
        clock.s += LIFETIME_S + 0.1
        assert ns.known(b"/a") is None
        assert ns.state() == before

    def test_and_listings(self, ns: Namespace, clock: Clock) -> None:
        assert list_in(ns, b"/", a=regular(1), d=DIR)
        assert [name for name, _ in ns.listing(b"/") or []] == [b"a", b"d"]
        assert seen(ns, b"/a").attrs.size == 1
        assert seen(ns, b"/none") == "absent"
        assert seen(ns, b"/d/x") == "ask", "of another directory it says nothing"
        clock.s += LIFETIME_S + 0.1
        assert ns.listing(b"/") is None
        assert seen(ns, b"/none") == seen(ns, b"/a") == "ask"

    def test_the_root_is_asked_for_again_too(self, ns: Namespace, clock: Clock) -> None:
        clock.s += LIFETIME_S + 0.1
        assert seen(ns, b"/") == "ask"
        assert told(ns, b"/", DIR) is ns.root
        assert seen(ns, b"/") is ns.root

    def test_a_lifetime_of_zero_believes_nothing(self, clock: Clock) -> None:
        ns = make(clock, lifetime_s=0.0)
        told(ns, b"/a", regular(1))
        ns.told_absent(b"/b", ns.mark())
        list_in(ns, b"/", a=regular(1))
        ns.created(b"/d", DIR, complete=True)
        assert [seen(ns, path) for path in (b"/", b"/a", b"/b", b"/d", b"/d/x")] == ["ask"] * 5

    def test_a_listing_without_attributes_answers_for_names_only(self, ns: Namespace) -> None:
        list_in(ns, b"/", a=Attrs())
        assert seen(ns, b"/a") == "ask"
        assert seen(ns, b"/b") == "absent"

    def test_and_does_not_tear_an_open_file_from_its_name(self, ns: Namespace) -> None:
        node = ns.created(b"/a", regular(1))
        ns.pin(node)
        list_in(ns, b"/", a=Attrs())
        assert ns.get(b"/a") is node
        assert ns.path_of(node) == b"/a"

    def test_what_another_client_removed_is_gone_with_the_next_listing(self, ns: Namespace) -> None:
        list_in(ns, b"/", a=regular(1), b=regular(2))
        list_in(ns, b"/", b=regular(2))
        assert ns.get(b"/a") is None
        assert seen(ns, b"/a") == "absent"

    def test_what_another_client_replaced_by_another_kind_is_another_node(self, ns: Namespace) -> None:
        first = told(ns, b"/a", regular(1))
        told(ns, b"/a", DIR)
        second = seen(ns, b"/a")
        assert second is not first
        assert second.is_dir
        assert ns.path_of(first) is None
        ns.check_invariants()

    def test_a_directory_whose_time_changed_is_listed_anew(self, ns: Namespace) -> None:
        told(ns, b"/d", DIR)
        list_in(ns, b"/d", x=regular(1))
        told(ns, b"/d", DIR._replace(mtime=99))
        assert ns.listing(b"/d") is None
        assert seen(ns, b"/d/none") == "ask"

    def test_a_link_whose_time_changed_is_read_anew(self, ns: Namespace) -> None:
        link = Attrs(mode=stat.S_IFLNK | 0o777, size=3, mtime=1)
        node = told(ns, b"/l", link)
        node.target = b"old"
        assert told(ns, b"/l", link).target == b"old"
        assert told(ns, b"/l", link._replace(mtime=2)).target is None

    def test_distrust(self, ns: Namespace) -> None:
        list_in(ns, b"/", a=regular(1), d=DIR)
        list_in(ns, b"/d", x=regular(1))
        ns.distrust_path(b"/d/x")
        assert seen(ns, b"/d/x") == "ask"
        assert ns.listing(b"/d") is None
        assert seen(ns, b"/a") != "ask"
        ns.told_absent(b"/d/y", ns.mark())
        ns.distrust_path(b"/d/y")
        assert seen(ns, b"/d/y") == "ask"
        node = ns.get(b"/a")
        assert node is not None
        ns.distrust(node)
        assert seen(ns, b"/a") == "ask"


class TestOwnChanges:
    def test_a_new_directory_is_complete_from_birth(self, ns: Namespace) -> None:
        ns.created(b"/d", DIR, complete=True)
        assert ns.listing(b"/d") == []
        assert ns.is_known_empty(b"/d")
        assert seen(ns, b"/d/x") == "absent"
        ns.created(b"/d/x", regular(0))
        assert seen(ns, b"/d/x").attrs.size == 0
        assert not ns.is_known_empty(b"/d")

    def test_created_and_removed_show_in_a_complete_listing(self, ns: Namespace) -> None:
        list_in(ns, b"/", a=regular(1))
        ns.created(b"/b", regular(2))
        ns.removed(b"/a")
        assert [name for name, _ in ns.listing(b"/") or []] == [b"b"]
        assert seen(ns, b"/a") == "absent"

    def test_an_older_answer_does_not_overwrite_set_attrs(self, ns: Namespace) -> None:
        node = told(ns, b"/a", regular(1))
        mark = ns.mark()
        ns.set_attrs(node, Attrs(size=9, mode=stat.S_IFREG | 0o600))
        ns.told(b"/a", regular(1), mark)
        ns.told_listing(b"/", [Entry(b"a", b"", regular(1))], mark)
        assert (node.attrs.size, node.attrs.mode, node.attrs.mtime) == (9, stat.S_IFREG | 0o600, 1)
        told(ns, b"/a", regular(3))
        assert node.attrs.size == 3

    def test_an_older_answer_does_not_bring_back_what_was_removed(self, ns: Namespace) -> None:
        list_in(ns, b"/", a=regular(1))
        mark = ns.mark()
        ns.removed(b"/a")
        ns.told(b"/a", regular(1), mark)
        assert seen(ns, b"/a") in ("ask", "absent")
        assert ns.told_listing(b"/", [Entry(b"a", b"", regular(1))], mark) is False
        assert seen(ns, b"/a") in ("ask", "absent")

    def test_an_overtaken_answer_leaves_a_name_known_for_as_long_as_it_was(
        self, ns: Namespace, clock: Clock
    ) -> None:
        told(ns, b"/a", regular(1))
        told(ns, b"/b", regular(1))
        mark = ns.mark()
        ns.removed(b"/b")
        clock.s += LIFETIME_S / 2
        ns.told(b"/a", regular(2), mark)
        assert seen(ns, b"/a").attrs.size == 2
        clock.s += LIFETIME_S / 2 + 0.1
        assert seen(ns, b"/a") == "ask"

    def test_of_a_directory_that_is_longer_than_what_is_kept_the_first_names_are(self, clock: Clock) -> None:
        ns = make(clock, entries_max=160)
        told(ns, b"/d", DIR)
        told(ns, b"/other", DIR)
        list_in(ns, b"/other", x=regular(1))
        list_in(ns, b"/d", **{f"{number:03}": regular(number) for number in range(300)})
        known = [number for number in range(300) if seen(ns, b"/d/%03d" % number) != "ask"]
        assert known == list(range(len(known))) and 140 <= len(known) <= 160
        assert ns.listing(b"/d") is None and seen(ns, b"/d/none") == "ask"
        for number in range(len(known), 300):
            node = told(ns, b"/d/%03d" % number, regular(number))
            assert ns.link_count(node) == 1 and len(ns) <= 161
        assert seen(ns, b"/d/000") != "ask"
        ns.check_invariants()

    @pytest.mark.parametrize("first", [0, 100, 290, 299])
    def test_or_the_piece_that_is_asked_for(self, clock: Clock, first: int) -> None:
        ns = make(clock, entries_max=160)
        told(ns, b"/d", DIR)
        entries = [Entry(b"%03d" % number, b"", regular(number)) for number in range(300)]

        def known() -> List[int]:
            return [number for number in range(300) if seen(ns, b"/d/%03d" % number) != "ask"]

        ns.told_listing(b"/d", entries, ns.mark())
        held = ns.get(b"/d/007")
        assert held is not None
        ns.pin(held)
        name = b"%03d" % first
        assert ns.told_listing(b"/d", entries, ns.mark(), ahead_s=clock(), beginning_with=name)
        assert first in known() and 150 <= len(known()) <= 151 and ns.get(b"/d/007") is held
        before = known()
        assert not ns.told_listing(b"/d", entries, ns.mark(), ahead_s=clock(), beginning_with=b"none")
        assert known() == before and len(ns) <= 160 and ns.listing(b"/d") is None
        ns.check_invariants()

    def test_directories_are_forgotten_by_their_own_age(self, clock: Clock) -> None:
        """Not with the root, which nobody has listed for long."""
        ns = make(clock, entries_max=40)
        for each in (b"/a", b"/b", b"/c", b"/d"):
            told(ns, each, DIR)
            list_in(ns, each, **{f"{number:02}": regular(1) for number in range(10)})
        assert ns.listing(b"/a") is None and seen(ns, b"/a/00") == "ask"
        for each in (b"/b", b"/c", b"/d"):
            assert len(ns.listing(each) or ()) == 10 and seen(ns, each + b"/00") != "ask"
        assert len(ns) <= 40
        ns.check_invariants()

    def test_one_of_many(self, ns: Namespace, clock: Clock) -> None:
        told(ns, b"/d", DIR)
        list_in(ns, b"/d", a=regular(1), b=regular(1))
        assert ns.is_one_of_many(b"/d/a") and not ns.is_one_of_many(b"/d/c")
        ns.removed(b"/d/b")
        assert not ns.is_one_of_many(b"/d/a")
        list_in(ns, b"/d", a=regular(1), b=regular(1))
        clock.s += LIFETIME_S + 0.1
        assert not ns.is_one_of_many(b"/d/a")

    def test_an_older_answer_does_not_remove_what_was_created(self, ns: Namespace) -> None:
        mark = ns.mark()
        node = ns.created(b"/a", regular(1))
        ns.told_absent(b"/a", mark)
        assert seen(ns, b"/a") is node
        assert ns.told_listing(b"/", [], mark) is False
        assert seen(ns, b"/a") is node

    def test_answers_about_a_path_that_means_another_directory_now(self, ns: Namespace) -> None:
        """Asked about /a, then /b took its place: what comes then is about the directory that was there before."""
        list_in(ns, b"/", a=DIR, b=DIR)
        list_in(ns, b"/a", x=regular(1))
        list_in(ns, b"/b", x=regular(2), y=regular(3))
        mark = ns.mark()
        ns.renamed(b"/a", b"/c")
        ns.renamed(b"/b", b"/a")
        ns.told(b"/a/x", regular(1), mark)
        assert seen(ns, b"/a/x") == "ask" or seen(ns, b"/a/x").attrs.size == 2
        ns.told_absent(b"/a/y", mark)
        assert seen(ns, b"/a/y") == "ask" or seen(ns, b"/a/y").attrs.size == 3
        ns.told(b"/a/z", regular(4), mark)
        assert seen(ns, b"/a/z") in ("ask", "absent")
        assert ns.told_listing(b"/a", [], mark) is False

    @pytest.mark.parametrize("old", [b"/a/x", b"/a", b"/unknown"])
    def test_nothing_is_gone_that_is_being_renamed(self, ns: Namespace, old: bytes) -> None:
        list_in(ns, b"/", a=DIR)
        list_in(ns, b"/a", x=regular(1))
        node = ns.get(b"/a/x")
        with ns.renaming(old):
            ns.told_absent(b"/a/x", ns.mark())
            assert ns.told_listing(b"/a", [], ns.mark()) is False
            assert ns.get(b"/a/x") is node
        ns.told_absent(b"/a/x", ns.mark())
        assert ns.get(b"/a/x") is None
        assert ns.told_listing(b"/a", [], ns.mark()) is True

    def test_one_of_two_renames_is_over(self, ns: Namespace) -> None:
        list_in(ns, b"/", a=regular(1), b=regular(2), d=DIR)
        list_in(ns, b"/d", c=regular(3))
        with ns.renaming(b"/a"):
            with ns.renaming(b"/b"):
                pass
            ns.told_absent(b"/a", ns.mark())
            assert ns.get(b"/a") is not None
            assert ns.told_listing(b"/d", [], ns.mark()) is True, "another directory"

    def test_answers_about_a_directory_that_was_removed(self, ns: Namespace) -> None:
        list_in(ns, b"/", a=DIR)
        list_in(ns, b"/a", x=regular(1))
        mark = ns.mark()
        ns.removed(b"/a/x")
        ns.removed(b"/a")
        ns.told_listing(b"/a", [Entry(b"x", b"", regular(1))], mark)
        ns.told(b"/a/x", regular(1), mark)
        assert seen(ns, b"/a") in ("ask", "absent")
        assert seen(ns, b"/a/x") in ("ask", "absent")

    def test_renaming_a_tree_takes_all_of_it_along(self, ns: Namespace) -> None:
        ns.created(b"/a", DIR, complete=True)
        ns.created(b"/a/b", DIR, complete=True)
        node = ns.created(b"/a/b/f", regular(7))
        ns.renamed(b"/a", b"/n")
        assert seen(ns, b"/n/b/f") is node
        assert ns.path_of(node) == b"/n/b/f"
        assert seen(ns, b"/n/b/none") == "absent"
        assert seen(ns, b"/a") == "absent"
        assert seen(ns, b"/a/b/f") in ("ask", "absent")
        ns.check_invariants()

    def test_renaming_over_a_file(self, ns: Namespace) -> None:
        first, second = ns.created(b"/a", regular(1)), ns.created(b"/b", regular(2))
        ns.renamed(b"/a", b"/b")
        assert seen(ns, b"/b") is first
        assert ns.path_of(second) is None
        ns.check_invariants()

    def test_renaming_what_is_not_known(self, ns: Namespace) -> None:
        list_in(ns, b"/", b=regular(2))
        ns.distrust_path(b"/a")
        ns.renamed(b"/a", b"/b")
        assert seen(ns, b"/b") == "ask"
        assert seen(ns, b"/a") == "absent"

    def test_renaming_what_is_not_known_to_a_name_that_was_absent(self, ns: Namespace) -> None:
        ns.told_absent(b"/b", ns.mark())
        ns.renamed(b"/a", b"/b")
        assert seen(ns, b"/b") == "ask"

    def test_a_name_created_again_has_another_inode_number_while_the_old_one_lives(
        self, ns: Namespace
    ) -> None:
        old = ns.created(b"/a", regular(1))
        ns.pin(old)
        ns.removed(b"/a")
        new = ns.created(b"/a", regular(2))
        assert new.ino != old.ino
        assert ns.path_of(old) is None
        ns.unpin(old)
        ns.check_invariants()

    def test_inode_numbers_come_from_the_path(self, clock: Clock) -> None:
        numbers = {told(make(clock), b"/d/f", regular(1)).ino for _ in range(3)}
        assert len(numbers) == 1
        assert numbers.pop() > ROOT_INO


class TestLateAnswers:
    """Asked for before a change of ours, and here after it."""

    def test_two_of_them_do_not_bring_a_removed_name_back(self, ns: Namespace) -> None:
        ns.created(b"/a", regular(1))
        first, second = ns.mark(), ns.mark()
        ns.removed(b"/a")
        ns.told(b"/a", regular(1), first)
        ns.told(b"/a", regular(1), second)
        assert seen(ns, b"/a") == "ask"

    def test_they_do_not_stand_in_a_complete_listing(self, ns: Namespace) -> None:
        list_in(ns, b"/", a=regular(1))
        mark = ns.mark()
        ns.removed(b"/a")
        ns.told(b"/a", regular(1), mark)
        assert ns.listing(b"/") is None

    def test_nor_does_the_directory_they_are_about(self, ns: Namespace) -> None:
        list_in(ns, b"/", d=DIR)
        told(ns, b"/d/a", regular(1))
        mark = ns.mark()
        ns.removed(b"/d/a")
        ns.removed(b"/d")
        ns.told(b"/d/a", regular(1), mark)
        assert ns.listing(b"/") is None

    def test_nor_are_they_believed_where_the_directory_was_forgotten_meanwhile(self, clock: Clock) -> None:
        ns = make(clock, entries_max=4)
        ns.created(b"/d", DIR, complete=True)
        ns.created(b"/d/a", regular(1))
        mark = ns.mark()
        ns.removed(b"/d/a")
        list_in(ns, b"/e", **{f"f{i}": regular(1) for i in range(8)})
        list_in(ns, b"/", e=DIR)
        assert ns.get(b"/d") is None, "forgotten"
        ns.told(b"/d/a", regular(1), mark)
        assert seen(ns, b"/d/a") == "ask"


class TestHardLinks:
    def test_names_of_one_file_are_one_node(self, ns: Namespace) -> None:
        node = ns.created(b"/a", regular(1))
        ns.created(b"/d", DIR, complete=True)
        ns.linked(node, b"/d/b")
        assert seen(ns, b"/a") is seen(ns, b"/d/b") is node
        assert ns.link_count(node) == 2
        ns.set_attrs(node, Attrs(size=5))
        assert seen(ns, b"/d/b").attrs.size == 5
        ns.removed(b"/a")
        assert ns.link_count(node) == 1
        assert ns.path_of(node) == b"/d/b"
        assert seen(ns, b"/d/b") is node
        ns.check_invariants()

    def test_a_link_over_a_name_that_was_known(self, ns: Namespace) -> None:
        node, other = ns.created(b"/a", regular(1)), ns.created(b"/b", regular(2))
        ns.linked(node, b"/b")
        assert seen(ns, b"/b") is node
        assert ns.path_of(other) is None
        ns.check_invariants()

    def test_renaming_one_link_over_another_leaves_both(self, ns: Namespace) -> None:
        """POSIX: then rename does nothing at all."""
        node = ns.created(b"/a", regular(1))
        ns.linked(node, b"/b")
        ns.renamed(b"/a", b"/b")
        assert seen(ns, b"/a") is seen(ns, b"/b") is node
        assert ns.link_count(node) == 2
        ns.check_invariants()

    def test_a_listing_does_not_part_them(self, ns: Namespace) -> None:
        node = ns.created(b"/a", regular(1))
        ns.linked(node, b"/b")
        list_in(ns, b"/", a=regular(1), b=regular(1))
        assert ns.get(b"/a") is ns.get(b"/b") is node

    def test_directories_do_not_count_links(self, ns: Namespace) -> None:
        assert ns.link_count(ns.root) == 1


class TestBounds:
    def fill(self, ns: Namespace, directories: int, files: int) -> None:
        for d in range(directories):
            told(ns, b"/%d" % d, DIR)
            ns.told_listing(b"/%d" % d, [Entry(b"%d" % f, b"", regular(f)) for f in range(files)], ns.mark())

    def test_at_most_so_many_nodes(self, clock: Clock) -> None:
        ns = make(clock, entries_max=50)
        self.fill(ns, 40, 10)
        assert len(ns) <= 50 + 40 + 1, "the names, and the directories on the way to them"
        ns.check_invariants()

    def test_the_directory_just_listed_stays(self, clock: Clock) -> None:
        ns = make(clock, entries_max=60)
        self.fill(ns, 10, 10)
        assert seen(ns, b"/9/3").attrs.size == 3
        assert seen(ns, b"/0/3") == "ask"

    def test_what_was_forgotten_is_asked_for_and_never_absent(self, clock: Clock) -> None:
        ns = make(clock, entries_max=20)
        self.fill(ns, 10, 10)
        for d in range(10):
            for f in range(10):
                node = seen(ns, b"/%d/%d" % (d, f))
                assert node == "ask" or node.attrs.size == f

    def test_open_files_and_the_way_to_them_are_kept(self, clock: Clock) -> None:
        ns = make(clock, entries_max=20)
        told(ns, b"/deep", DIR)
        told(ns, b"/deep/er", DIR)
        node = told(ns, b"/deep/er/f", regular(1))
        ns.linked(node, b"/other")
        ns.pin(node)
        self.fill(ns, 30, 10)
        assert ns.get(b"/deep/er/f") is ns.get(b"/other") is node
        assert ns.link_count(node) == 2
        assert ns.open_nodes() == [node]
        assert ns.open_nodes(b"/deep") == [node]
        assert ns.open_nodes(b"/0") == []
        ns.unpin(node)
        self.fill(ns, 30, 10)
        ns.check_invariants()
        assert len(ns) <= 20 + 30 + 1

    def test_one_directory_larger_than_the_limit(self, clock: Clock) -> None:
        ns = make(clock, entries_max=10)
        self.fill(ns, 1, 500)
        ns.check_invariants()
        assert len(ns) <= 500 + 3
        self.fill(ns, 2, 3)
        assert len(ns) <= 20

    def test_absent_names_are_bounded(self, ns: Namespace) -> None:
        for i in range(25_000):
            ns.told_absent(b"/%d" % i, ns.mark())
        assert len(ns.root.absent) <= 10_001


# -- the machine -------------------------------------------------------------------------------------------------------


class Thing:
    """A file or directory of the model."""

    def __init__(self, attrs: Attrs) -> None:
        self.attrs = attrs
        self.children: Dict[bytes, Thing] = {}
        self.names = 1

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.attrs.mode or 0)


PATHS = [b"/a", b"/b", b"/a/a", b"/a/b", b"/b/a", b"/b/b", b"/a/a/a", b"/a/a/b", b"/b/a/a", b"/b/a/b"]
DIRECTORIES = [b"/", *PATHS[:6]]
paths = st.sampled_from(PATHS)


class Tree(RuleBasedStateMachine):
    """Only we change the server; answers that were asked for arrive when they like. What is believed must be true."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 1
        self.clock = Clock()
        self.root = Thing(DIR)
        self.ns = make(self.clock)
        self.answers: List[Tuple[bytes, int, Any]] = []  # path, mark, Attrs | None | entries
        self.pinned: List[Tuple[Node, Thing]] = []

    @initialize(entries_max=st.sampled_from([4, 8, 1000]))
    def start(self, entries_max: int) -> None:
        self.ns = make(self.clock, entries_max=entries_max)

    def new_attrs(self) -> Attrs:
        self.number += 1
        return regular(self.number, self.number)

    def at(self, path: bytes) -> Optional[Thing]:
        thing: Optional[Thing] = self.root
        for name in path.split(b"/"):
            if name and thing is not None:
                thing = thing.children.get(name)
        return thing

    def parent(self, path: bytes) -> Optional[Thing]:
        above = self.at(split(path)[0])
        return above if above is not None and above.is_dir else None

    def names_of(self, wanted: Thing, here: Optional[Thing] = None, prefix: bytes = b"") -> Iterator[bytes]:
        for name, child in (here or self.root).children.items():
            if child is wanted:
                yield prefix + b"/" + name
            if child.children:
                yield from self.names_of(wanted, child, prefix + b"/" + name)

    def look_up(self, path: bytes) -> Optional[Node]:
        """As the filesystem does it, the kernel's walk from the root included."""
        parts = path.split(b"/")[1:]
        node: Optional[Node] = None
        for i in range(len(parts)):
            step = b"/" + b"/".join(parts[: i + 1])
            try:
                node = self.ns.fresh(step)
            except Absent:
                return None
            if node is None:
                mark = self.ns.mark()
                thing = self.at(step)
                if thing is None:
                    self.ns.told_absent(step, mark)
                    return None
                node = self.ns.told(step, thing.attrs, mark)
        return node

    # -- our changes -----------------------------------------------------------------------------------------------------

    @rule(path=paths)
    def mkdir(self, path: bytes) -> None:
        above = self.parent(path)
        if above is None or self.at(path) is not None:
            return
        self.look_up(path)
        above.children[split(path)[1]] = Thing(DIR)
        self.ns.created(path, DIR, complete=True)

    @rule(path=paths)
    def create(self, path: bytes) -> None:
        above = self.parent(path)
        if above is None or self.at(path) is not None:
            return
        self.look_up(path)
        attrs = self.new_attrs()
        above.children[split(path)[1]] = Thing(attrs)
        self.ns.created(path, attrs)

    @rule(old=paths, new=paths)
    def link(self, old: bytes, new: bytes) -> None:
        thing, above = self.at(old), self.parent(new)
        if thing is None or thing.is_dir or above is None or self.at(new) is not None:
            return
        node = self.look_up(old)
        assert node is not None
        above.children[split(new)[1]] = thing
        thing.names += 1
        self.ns.linked(node, new)

    @rule(path=paths)
    def remove(self, path: bytes) -> None:
        thing, above = self.at(path), self.parent(path)
        if thing is None or above is None or thing.children:
            return
        self.look_up(path)
        del above.children[split(path)[1]]
        thing.names -= 1
        self.ns.removed(path)

    @rule(old=paths, new=paths)
    def rename(self, old: bytes, new: bytes) -> None:
        thing, target = self.at(old), self.at(new)
        above, below = self.parent(old), self.parent(new)
        if thing is None or above is None or below is None or (new + b"/").startswith(old + b"/"):
            return
        if target is not None and (target.is_dir != thing.is_dir or target.children):
            return
        self.look_up(old)
        self.look_up(new)
        if target is not thing:
            if target is not None:
                target.names -= 1
            below.children[split(new)[1]] = above.children.pop(split(old)[1])
        self.ns.renamed(old, new)

    @rule(path=paths)
    def change(self, path: bytes) -> None:
        thing = self.at(path)
        if thing is None or thing.is_dir:
            return
        node = self.look_up(path)
        assert node is not None
        thing.attrs = self.new_attrs()
        self.ns.set_attrs(node, thing.attrs)

    # -- answers -----------------------------------------------------------------------------------------------------------

    @rule(path=paths)
    def ask(self, path: bytes) -> None:
        thing = self.at(path)
        self.answers.append((path, self.ns.mark(), thing.attrs if thing is not None else None))

    @rule(path=st.sampled_from(DIRECTORIES))
    def ask_listing(self, path: bytes) -> None:
        thing = self.at(path)
        if thing is not None and thing.is_dir:
            entries = [Entry(name, b"", child.attrs) for name, child in thing.children.items()]
            self.answers.append((path, self.ns.mark(), entries))

    @precondition(lambda self: self.answers)
    @rule(which=st.integers(0, 20))
    def arrive(self, which: int) -> None:
        path, mark, answer = self.answers.pop(which % len(self.answers))
        if answer is None:
            self.ns.told_absent(path, mark)
        elif isinstance(answer, Attrs):
            self.ns.told(path, answer, mark)
        else:
            beginning_with = answer[which % len(answer)].name if answer else None
            self.ns.told_listing(path, answer, mark, beginning_with=beginning_with)

    @rule(path=paths)
    def look(self, path: bytes) -> None:
        node, thing = self.look_up(path), self.at(path)
        assert (node is None) == (thing is None)

    # -- time and handles ----------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([1, 10, 30]))
    def wait(self, seconds: int) -> None:
        self.clock.s += seconds

    @rule(path=paths)
    def open(self, path: bytes) -> None:
        thing = self.at(path)
        if thing is None or thing.is_dir or len(self.pinned) > 3:
            return
        node = self.look_up(path)
        assert node is not None
        if any(self.ns.get(name) is not node for name in self.names_of(thing)):
            return  # a name was forgotten: nothing tells any more that it is the same file
        self.ns.pin(node)
        self.pinned.append((node, thing))

    @precondition(lambda self: self.pinned)
    @rule(which=st.integers(0, 5))
    def close(self, which: int) -> None:
        node, _ = self.pinned.pop(which % len(self.pinned))
        self.ns.unpin(node)

    # -- what always holds -----------------------------------------------------------------------------------------------------

    @invariant()
    def the_modules_invariants_hold(self) -> None:
        self.ns.check_invariants()

    @invariant()
    def what_is_believed_is_true(self) -> None:
        for path in PATHS:
            if self.parent(path) is None:
                continue  # the kernel does not ask below what is not there
            believed, thing = seen(self.ns, path), self.at(path)
            if believed == "absent":
                assert thing is None, f"{path!r} is there"
            elif believed != "ask":
                assert thing is not None, f"{path!r} is not there"
                assert believed.is_dir == thing.is_dir
                if not thing.is_dir:
                    assert (believed.attrs.size, believed.attrs.mtime) == (
                        thing.attrs.size,
                        thing.attrs.mtime,
                    ), path

    @invariant()
    def complete_listings_are_complete(self) -> None:
        for path in DIRECTORIES:
            thing = self.at(path)
            listing = self.ns.listing(path)
            if listing is not None and thing is not None and thing.is_dir:
                assert {name for name, _ in listing} == set(thing.children), path

    @invariant()
    def open_files_keep_their_names(self) -> None:
        for node, thing in self.pinned:
            names = set(self.names_of(thing))
            path = self.ns.path_of(node)
            assert (path in names) if names else path is None
            assert {name for name in names if self.ns.get(name) is node} == names
            assert len(node.links) == len(names)

    @invariant()
    def one_number_for_each_file(self) -> None:
        numbers = [node.ino for node, _ in self.pinned]
        things = [id(thing) for _, thing in self.pinned]
        assert len(set(numbers)) == len(set(things))


TestTree = Tree.TestCase
TestTree.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


@pytest.mark.long
@pytest.mark.timeout(1800)
class TestTreeForLong(Tree.TestCase):  # type: ignore[misc, name-defined]
    settings = settings(max_examples=5000, stateful_step_count=80, deadline=None)
