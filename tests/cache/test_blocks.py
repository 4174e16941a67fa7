"""The block cache against a model: what the program wrote, what the server has, and what a crash of it would leave.

The state machine plays write-back, the server and the network by hand. Blocks are 8 bytes in these tests, so that a few
short writes meet every edge.
"""

from __future__ import annotations

import itertools
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sftpmount.cache import blocks, fetch
from sftpmount.cache.blocks import CleanBlocks, Commit, FileCache
from sftpmount.cache.extents import Extents
from sftpmount.cache.fetch import Fetch, Fetcher
from sftpmount.errors import StatusError

BLOCK = 8
TOP = 5 * BLOCK
REAL_BLOCK_BYTES = blocks.BLOCK_BYTES

NO_SPACE = StatusError(4, "No space left on device")


def small_blocks(size: int) -> None:
    blocks.BLOCK_BYTES = fetch.BLOCK_BYTES = size


@pytest.fixture(autouse=True)
def eight_byte_blocks() -> Iterator[None]:
    small_blocks(BLOCK)
    yield
    small_blocks(REAL_BLOCK_BYTES)


class Sent(NamedTuple):
    """A WRITE on its way, with the bytes it carries."""

    start: int
    end: int
    data: bytes


class Handle:
    """What FileCache sees of an open handle."""

    def __init__(self) -> None:
        self.owed: Optional[StatusError] = None


def patch(image: bytearray, start: int, data: bytes) -> None:
    """WRITE: a file grows by zeros where it is written behind its end."""
    if start > len(image):
        image.extend(bytes(start - len(image)))
    image[start : start + len(data)] = data


def resize(image: bytearray, size: int) -> None:
    del image[size:]
    image.extend(bytes(size - len(image)))


class Machine(RuleBasedStateMachine):
    """One file. ``way`` holds what was sent and not yet carried out, ``replies`` what was and is not yet answered."""

    has_fsync = True

    def __init__(self) -> None:
        super().__init__()
        small_blocks(BLOCK)
        self.values = itertools.cycle(range(1, 256))
        self.taken: List[Sent] = []
        self.way: List[Union[Sent, Commit]] = []
        self.replies: List[Tuple[Union[Sent, Commit], Optional[StatusError]]] = []
        self.fetches: List[Tuple[Fetch, Optional[bytes]]] = []
        self.begin(b"", 2)

    def teardown(self) -> None:
        try:
            self.settle_everything()
        finally:
            small_blocks(REAL_BLOCK_BYTES)

    @initialize(size=st.integers(0, TOP), capacity=st.integers(1, 6))
    def start(self, size: int, capacity: int) -> None:
        self.begin(bytes(next(self.values) for _ in range(size)), capacity)

    def begin(self, content: bytes, capacity: int) -> None:
        self.local = bytearray(content)
        self.server = bytearray(content)
        self.disk = bytes(content)
        self.clean = CleanBlocks(capacity * BLOCK)
        self.file = FileCache(1, len(content), self.clean)
        self.file.lock.acquire()
        self.fetcher = Fetcher(None, self.clean)  # type: ignore[arg-type]
        self.handle = Handle()
        self.file.handles.append(self.handle)
        self.file.writers.append(object())

    # -- the program ---------------------------------------------------------------------------------------------------

    @rule(offset=st.integers(0, TOP), size=st.integers(1, 2 * BLOCK + 3))
    def store(self, offset: int, size: int) -> None:
        data = bytes([next(self.values)]) * size
        self.file.store(offset, data)
        patch(self.local, offset, data)

    @rule(index=st.integers(0, 4), count=st.integers(1, 2))
    def store_whole_blocks(self, index: int, count: int) -> None:
        self.store(index * BLOCK, count * BLOCK)

    @precondition(lambda self: self.quiet)
    @rule(size=st.integers(0, TOP))
    def truncate(self, size: int) -> None:
        """As the filesystem does it: everything was sent, then the server is told, then we know."""
        resize(self.server, size)
        resize(self.local, size)
        self.file.truncate(size)
        if not self.has_fsync:
            self.file.cut_to = None

    @property
    def quiet(self) -> bool:
        return not self.file.unsent and not self.file.recut

    # -- write-back ----------------------------------------------------------------------------------------------------

    @rule(bytes_max=st.sampled_from([3, BLOCK, 3 * BLOCK]), around=st.none() | st.integers(0, TOP))
    def send(self, bytes_max: int, around: Optional[int]) -> None:
        self.send_one(bytes_max, around)
        self.leave()

    @rule(bytes_max=st.sampled_from([3, BLOCK, 3 * BLOCK]))
    def take_without_sending_yet(self, bytes_max: int) -> None:
        """A thread is stopped between the two; others send, and fsync, meanwhile."""
        self.send_one(bytes_max)

    @rule()
    def leave(self) -> None:
        while self.taken:
            sent = self.taken.pop(0)
            self.way.append(sent)
            self.file.left(sent.start, sent.end)

    def send_one(self, bytes_max: int, around: Optional[int] = None) -> bool:
        if self.file.recut or self.file.failure is not None:
            return False
        before = list(self.on_the_way())
        taken = self.file.take_request(bytes_max, around=around)
        if taken is None:
            assert around is not None or not self.file.dirty.first(self.file.in_flight)
            return False
        start, data = taken[0], b"".join(taken[1])
        end = start + len(data)
        assert 0 < end - start <= bytes_max
        assert around is None or end - start == bytes_max, "a short one may still grow"
        assert data == self.local[start:end]
        for other in before:
            assert end <= other.start or other.end <= start, "no byte is in two requests"
        self.taken.append(Sent(start, end, data))
        return True

    def on_the_way(self) -> List[Sent]:
        return [
            each
            for each in [*self.taken, *self.way, *(one for one, _ in self.replies)]
            if isinstance(each, Sent)
        ]

    @precondition(lambda self: self.has_fsync and len(self.file.commits) < 3)
    @rule()
    def send_fsync(self) -> None:
        if not self.file.recut:
            self.way.append(self.file.begin_commit())

    @rule()
    def retry(self) -> None:
        """A flush tries again what was refused, and cuts again what a server may have forgotten."""
        self.file.failure = None
        if self.file.recut and self.file.cut_to is not None:
            resize(self.server, self.file.cut_to)
            resize(self.server, self.file.size)
            self.file.recut = False

    # -- the server ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.way)
    @rule(refuses=st.booleans())
    def carry_out(self, refuses: bool) -> None:
        """In order, as a server does for one handle."""
        self.carry_out_one(NO_SPACE if refuses else None)

    def carry_out_one(self, status: Optional[StatusError] = None) -> None:
        request = self.way.pop(0)
        if status is None:
            if isinstance(request, Sent):
                patch(self.server, request.start, request.data)
            else:
                self.disk = bytes(self.server)
        self.replies.append((request, status))

    @precondition(lambda self: self.replies)
    @rule(which=st.integers(0, 10))
    def answer(self, which: int) -> None:
        """Replies may overtake each other: gesftpserver lets them."""
        request, status = self.replies.pop(which % len(self.replies))
        if isinstance(request, Sent):
            if status is None:
                self.file.acknowledged(request.start, request.end, durable=not self.has_fsync)
                return
            self.file.failed(request.start, request.end)
        else:
            self.file.end_commit(request, ok=status is None)
            if status is not None:
                self.file.resend()
        if status is not None:
            self.file.refused(status)

    @rule(carried_out=st.integers(0, 10), answered=st.integers(0, 10), forgets=st.booleans())
    def lose(self, carried_out: int, answered: int, forgets: bool) -> None:
        """The connection ends; some of what was on its way was carried out, and a server that reboots forgets."""
        for _ in range(min(carried_out, len(self.way))):
            self.carry_out_one()
        for request in [*(one for one, _ in self.replies), *self.way, *self.taken]:
            if isinstance(request, Sent):
                self.file.failed(request.start, request.end)
                self.file.left(request.start, request.end)
            else:
                self.file.end_commit(request, ok=False)
                self.file.lost()
        self.replies.clear()
        self.way.clear()
        self.taken.clear()
        for each, _ in self.fetches:
            self.fetcher._settle(each)
        self.fetches.clear()
        self.file.lost()
        if forgets and self.has_fsync:
            self.server = bytearray(self.disk)

    # -- reading -------------------------------------------------------------------------------------------------------

    @rule(index=st.integers(0, 6))
    def fetch(self, index: int) -> None:
        """A reader or read-ahead asks for a block; the server answers now, the answer arrives later."""
        base = index * BLOCK
        if base >= self.file.size or index in self.file.fetches or self.clean.has(1, index):
            return
        expected = min(BLOCK, self.file.size - base)
        if self.file.valid.covers(base, base + expected):
            return
        each = Fetch(self.file, index, expected)
        self.file.fetches[index] = each
        data = bytes(self.server[base : base + expected])
        self.fetches.append((each, data if len(data) == expected else None))

    @precondition(lambda self: self.fetches)
    @rule(which=st.integers(0, 10))
    def arrive(self, which: int) -> None:
        each, data = self.fetches.pop(which % len(self.fetches))
        each.data = data
        self.fetcher._settle(each)

    @rule()
    def distrust(self) -> None:
        if not self.file.unsafe:
            self.file.distrust()

    # -- the end of a file that could not be stored ----------------------------------------------------------------------

    @precondition(lambda self: self.file.failure is not None)
    @rule()
    def discard(self) -> None:
        """The last writer goes; requests may be on their way still. From here on the server's file is the truth."""
        self.leave()
        self.file.discard()
        assert not self.file.dirty
        assert not self.file.written
        while self.way:
            self.carry_out_one()
        while self.replies:
            self.answer(0)
        assert not self.file.unsafe, "nothing comes back from what was given up"
        self.handle.owed = None
        self.local = bytearray(self.server)
        self.disk = bytes(self.server)
        self.file.size = len(self.server)

    # -- what always holds -------------------------------------------------------------------------------------------------

    @invariant()
    def the_modules_invariants_hold(self) -> None:
        self.file.check_invariants()
        assert self.file.size == len(self.local)
        assert self.file.requests_in_flight == len(self.on_the_way())
        in_flight = Extents((sent.start, sent.end) for sent in self.on_the_way())
        assert self.file.in_flight == in_flight
        assert all(b in self.file.buffers for s, e in self.file.valid for b in blocks.block_range(s, e))

    @invariant()
    def held_bytes_are_what_the_program_wrote(self) -> None:
        shown = bytearray(len(self.local))
        self.file.overlay(0, shown)
        for start, end in self.file.valid:
            assert shown[start:end] == self.local[start:end]

    @invariant()
    def clean_blocks_are_true(self) -> None:
        for index in range(-(-len(self.local) // BLOCK) + 3):
            data = self.clean._lru.get((1, index))
            if data is None:
                continue
            base = index * BLOCK
            assert data == self.local[base : base + BLOCK], f"block {index}"

    @invariant()
    def what_is_not_held_any_more_is_safe(self) -> None:
        """Every byte is dirty, in flight or written, or on the server's disk (on the server, where it has no fsync)."""
        stored = self.disk if self.has_fsync else bytes(self.server)
        cut_to = self.file.cut_to
        unsafe = Extents(self.file.dirty)
        unsafe.update(self.file.in_flight)
        unsafe.update(self.file.written)
        end = len(self.local) if cut_to is None else min(cut_to, len(self.local))
        for start, stop in unsafe.gaps(0, end):
            safe = stored[start:stop].ljust(stop - start, b"\0")
            assert safe == self.local[start:stop], f"bytes {start} to {stop} are held nowhere"
        if not self.file.unsafe:
            assert stored == self.local

    @invariant()
    def a_refusal_is_told(self) -> None:
        if self.file.failure is not None:
            assert self.handle.owed is not None

    # -- and in the end ----------------------------------------------------------------------------------------------------

    def settle_everything(self) -> None:
        """Sending everything and committing makes the server's disk what the program wrote."""
        for _ in range(100):
            self.retry()
            while self.send_one(BLOCK):
                self.leave()
            self.leave()
            if self.has_fsync:
                self.send_fsync()
            while self.way:
                self.carry_out_one()
            while self.replies:
                self.answer(0)
            if not self.file.unsafe:
                break
        else:
            raise AssertionError("it never becomes safe")
        while self.fetches:
            self.arrive(0)
        self.the_modules_invariants_hold()
        self.clean_blocks_are_true()
        assert self.server == self.local
        if self.has_fsync:
            assert self.disk == self.local
        assert not self.file.buffers, "nothing is held once everything is safe"
        assert self.file.buffer_bytes == 0


class MachineWithoutFsync(Machine):
    has_fsync = False


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestMachineWithoutFsync = MachineWithoutFsync.TestCase
TestMachineWithoutFsync.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


@pytest.mark.long
@pytest.mark.timeout(1800)
class TestMachineForLong(Machine.TestCase):  # type: ignore[misc, name-defined]
    settings = settings(max_examples=5000, stateful_step_count=80, deadline=None)


def fresh(content: bytes = b"", capacity: int = 10) -> FileCache:
    """A file whose lock is held: all its methods ask for that."""
    file = FileCache(1, len(content), CleanBlocks(capacity * BLOCK))
    file.lock.acquire()
    return file


def all_requests(
    file: FileCache, bytes_max: int = 3 * BLOCK, *, around: Optional[int] = None
) -> List[Tuple[int, bytes]]:
    taken: List[Tuple[int, bytes]] = []
    while True:
        request = file.take_request(bytes_max, around=around)
        if request is None:
            return taken
        start, data = request[0], b"".join(request[1])
        file.left(start, start + len(data))
        taken.append((start, data))


class TestRequests:
    def test_full_requests_leave_at_once_and_the_rest_waits(self) -> None:
        file = fresh()
        file.store(1, b"a" * (2 * BLOCK + 3))
        assert all_requests(file, BLOCK, around=2 * BLOCK + 3) == [
            (1, b"a" * BLOCK),
            (1 + BLOCK, b"a" * BLOCK),
        ]
        assert all_requests(file) == [(1 + 2 * BLOCK, b"aaa")]
        assert all_requests(file) == []

    def test_small_writes_become_full_requests(self) -> None:
        file = fresh()
        for start in range(0, BLOCK, 2):
            file.store(start, b"xy")
            expected = [] if start + 2 < BLOCK else [(0, b"xy" * (BLOCK // 2))]
            assert all_requests(file, BLOCK, around=start + 1) == expected

    def test_dirty_bytes_elsewhere_wait(self) -> None:
        file = fresh()
        file.store(0, b"a" * BLOCK)
        file.store(3 * BLOCK, b"b" * BLOCK)
        assert all_requests(file, BLOCK, around=3 * BLOCK) == [(3 * BLOCK, b"b" * BLOCK)]

    def test_an_fsync_does_not_cover_a_request_that_has_not_left(self) -> None:
        """Another thread has taken it, and comes to sending it when the fsync is on its way already."""
        file = fresh()
        file.store(0, b"a" * BLOCK)
        assert file.take_request(BLOCK) is not None
        commit = file.begin_commit()
        file.left(0, BLOCK)
        file.acknowledged(0, BLOCK, durable=False)
        file.end_commit(commit, ok=True)
        assert list(file.written) == [(0, BLOCK)]

    def test_bytes_written_again_wait_for_the_first_write_to_end(self) -> None:
        file = fresh()
        file.store(0, b"a" * BLOCK)
        assert all_requests(file) == [(0, b"a" * BLOCK)]
        file.store(2, b"bb")
        assert all_requests(file) == []
        file.acknowledged(0, BLOCK, durable=False)
        assert list(file.written) == [(0, 2), (4, BLOCK)]
        assert all_requests(file) == [(2, b"bb")]

    def test_an_fsync_covers_only_what_was_sent_before_it(self) -> None:
        file = fresh()
        file.store(0, b"a" * BLOCK)
        all_requests(file)
        commit = file.begin_commit()
        file.acknowledged(0, BLOCK, durable=False)
        file.store(0, b"b")
        file.end_commit(commit, ok=True)
        assert list(file.dirty) == [(0, 1)]
        assert not file.written
        assert file.unsafe

    def test_what_a_refused_fsync_covered_is_not_covered_by_the_next(self) -> None:
        """On two lanes: what is sent again is acknowledged before the other, older fsync is."""
        file = fresh()
        file.store(0, b"a" * BLOCK)
        all_requests(file)
        file.acknowledged(0, BLOCK, durable=False)
        refused, other = file.begin_commit(), file.begin_commit()
        file.end_commit(refused, ok=False)
        file.resend()
        all_requests(file)
        file.acknowledged(0, BLOCK, durable=False)
        file.end_commit(other, ok=True)
        assert list(file.written) == [(0, BLOCK)]

    def test_a_refused_write_is_not_covered_by_the_fsync_behind_it(self) -> None:
        """A server that answers out of order: the retry's acknowledgement comes before the old fsync's."""
        file = fresh()
        file.store(0, b"a" * BLOCK)
        all_requests(file)
        commit = file.begin_commit()
        file.failed(0, BLOCK)
        all_requests(file)
        file.acknowledged(0, BLOCK, durable=False)
        file.end_commit(commit, ok=True)
        assert list(file.written) == [(0, BLOCK)]


class TestCleanBlocks:
    def test_the_budget_holds(self) -> None:
        clean = CleanBlocks(3 * BLOCK)
        for index in range(20):
            clean.put(1, index, bytes(BLOCK))
            assert clean.held_bytes <= 3 * BLOCK
        assert [index for index in range(20) if clean.has(1, index)] == [17, 18, 19]

    def test_the_one_longest_unused_goes_first(self) -> None:
        clean = CleanBlocks(3 * BLOCK)
        for index in range(3):
            clean.put(1, index, bytes(BLOCK))
        assert clean.get(1, 0) is not None
        clean.put(2, 0, bytes(BLOCK))
        assert clean.get(1, 1) is None
        assert clean.get(1, 0) is not None
        assert (clean.hits, clean.misses) == (2, 1)

    def test_drop_is_for_one_file_and_the_range_named(self) -> None:
        clean = CleanBlocks(100 * BLOCK)
        for file_id in (1, 2):
            for index in range(6):
                clean.put(file_id, index, bytes(BLOCK))
        clean.drop(1, 2, 3)
        assert [index for index in range(6) if clean.has(1, index)] == [0, 1, 4, 5]
        clean.drop(1, 4)
        assert [index for index in range(6) if clean.has(1, index)] == [0, 1]
        clean.drop(1)
        clean.drop(1)
        assert [index for index in range(6) if clean.has(2, index)] == list(range(6))
        assert clean.held_bytes == 6 * BLOCK

    def test_a_block_put_twice_counts_once(self) -> None:
        clean = CleanBlocks(100 * BLOCK)
        clean.put(1, 0, bytes(BLOCK))
        clean.put(1, 0, bytes(3))
        once = CleanBlocks(100 * BLOCK)
        once.put(1, 0, bytes(3))
        assert clean.held_bytes == once.held_bytes < BLOCK
        assert clean.get(1, 0) == bytes(3)

    @pytest.mark.parametrize("blocks_kept", [0, 1, 4])
    def test_its_index_does_not_outgrow_it(self, blocks_kept: int) -> None:
        clean = CleanBlocks(blocks_kept * BLOCK)
        for file_id in range(50):
            clean.put(file_id, file_id, bytes(BLOCK))
        kept: Dict[Any, Any] = clean._lru.of_file
        assert sum(map(len, kept.values())) == len(clean._lru) <= max(1, blocks_kept)


class TestBuffers:
    def test_a_whole_block_is_kept_as_it_came(self) -> None:
        """No copy for bulk writes: the very object that the kernel's write was made into."""
        file = fresh()
        data = b"a" * BLOCK
        file.store(0, data)
        assert file.buffers[0] is data

    def test_bytes_in_flight_are_not_changed_by_a_later_write(self) -> None:
        file = fresh()
        data = b"a" * BLOCK
        file.store(0, data)
        request = file.take_request(BLOCK)
        assert request is not None
        file.store(0, b"b" * 3)
        assert b"".join(request[1]) == data

    def test_a_partly_known_block_is_not_passed_for_clean(self) -> None:
        content = b"0" * 2 * BLOCK
        file = fresh(content)
        file.store(2, b"xx")
        all_requests(file)
        file.acknowledged(2, 4, durable=True)
        assert not file.buffers
        assert file._clean.get(1, 0) is None

    def test_an_old_clean_block_does_not_outlive_a_write(self) -> None:
        """It was fetched for the gap beside the dirty bytes, and arrives while they are held."""
        file = fresh(b"0" * 2 * BLOCK)
        fetcher = Fetcher(None, file._clean)  # type: ignore[arg-type]
        file.store(2, b"xx")
        late = Fetch(file, 0, BLOCK)
        file.fetches[0] = late
        late.data = b"0" * BLOCK
        fetcher._settle(late)
        all_requests(file)
        file.acknowledged(2, 4, durable=True)
        assert file._clean.get(1, 0) in (None, b"00xx0000")
