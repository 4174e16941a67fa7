"""What to send next, and who waits for it.

A write is taken in as dirty and, as soon as there is enough for a full request, sent by the thread that brought it; flow
control of the SSH channel is then what slows the writer down. The rest is sent by close, fsync, truncation, age (the ticker)
or pressure.
What is held (dirty, in flight, not committed) has a budget; half of it uncommitted in one file starts an fsync on the way.

``flush`` is the point of truth: it returns when every byte that was dirty at its start is acknowledged and, with
``commit``, on the server's disk; last writes, FSYNC and FSTAT leave in one flight, since a server keeps the order of
requests on one handle (draft-ietf-secsh-filexfer-02, section 4.1). Through a lost session it goes on by itself: the bytes
are dirty again, and the next attempt sends them all.

A failure is sticky (``FileCache.failure``): nothing more is sent for that file until a flush, or a write, tries again; the
bytes are kept as long as someone has the file open for writing. Each open handle is told once.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from .. import waiting
from ..errors import ConnectionLost, FsError, NotSent, StatusError
from ..sftp.lane import Lane, Pending
from ..sftp.remote import FSYNC, Remote
from ..sftp.remote_file import RemoteFile
from ..sftp.session import Session
from ..sftp.wire import Attrs
from .blocks import BLOCK_BYTES, FileCache, Teller
from .extents import Extents
from .fsync import Fsync

log = logging.getLogger(__name__)

# The server's memory pages: requests that begin in the middle of one are copied twice there.
PAGE_BYTES = 4096
REQUESTS_MAX = 64
# Bytes that were written again while the first write of them was on its way are sent in a second pass of a flush, and where
# another thread sent them, its write may come behind that pass's fsync. What is dirty after three is younger than the flush,
# unless something failed meanwhile: then there is one more.
PASSES_MAX = 3
AGE_S = 2.0
# Errors of who waits, or of the line: they say nothing of the bytes.
NOT_THE_FILES_FAULT = (errno.EINTR, errno.ETIMEDOUT)


class _Questions(NamedTuple):
    """What a flush asks behind what it sent."""

    sends: int  # how much was sent before, -1 where more may come behind
    committing: Optional[Fsync]


class WriteBack:
    """Write-back of all files of a mount."""

    def __init__(
        self,
        remote: Remote,
        *,
        dirty_bytes_max: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._remote = remote
        self._bytes_max = max(dirty_bytes_max, 4 * BLOCK_BYTES)
        self._clock = clock
        self._lock = threading.Lock()  # guards _held
        self._held: Dict[FileCache, int] = {}
        self.losses = 0  # sessions that ended
        self.acknowledged_bytes = 0  # since the start; counted by the thread that reads alone
        self._closing = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="write-back", daemon=True)
        self._ticker.start()

    @property
    def held_bytes(self) -> int:
        """Bytes of memory held for data that is not safe yet."""
        with self._lock:
            return sum(self._held.values())

    def files(self) -> List[FileCache]:
        """The files that hold unsafe bytes."""
        with self._lock:
            return list(self._held)

    def state(self) -> Dict[str, Any]:
        """What is not stored yet, for status: sums in bytes, seconds since the oldest of it, and file by file.

        The files that hold most come first; ``path`` is the server's. No wait for the network.
        """
        now_s = self._clock()
        files = []
        for file in self.files():
            with file.lock:
                if file.unsafe or file.failure is not None:
                    files.append(_state_of(file, now_s))
        files.sort(key=lambda each: -each["unstored_bytes"])
        sums = ("dirty_bytes", "in_flight_bytes", "uncommitted_bytes", "unstored_bytes")
        return {
            **{name: sum(each[name] for each in files) for name in sums},
            "limit_bytes": self._bytes_max,
            "lag_s": max((each["lag_s"] for each in files), default=0.0),
            "files": files,
        }

    def close(self) -> None:
        """Stop the ticker."""
        self._closing.set()

    # -- writing ------------------------------------------------------------------------------------------------------

    def write(self, file: FileCache, handle: Teller, offset: int, data: bytes) -> None:
        """Take ``data`` in. Raises FsError where an earlier write of this file failed, or there is no room in time."""
        self.tell(file, handle)
        if file.failure is not None:
            self.flush(
                file, commit=False
            )  # told already, writes on: only a retry that stores the bytes clears it
        with file.lock:
            self._take_in(file, offset, data)
        self._send_on(file, around=offset + len(data) - 1)
        if self.held_bytes > self._bytes_max:
            try:
                self._make_room(file)
            except FsError as error:
                if (
                    error.errno != errno.EINTR
                ):  # it is taken in: told otherwise, a program that goes on would write it twice
                    raise

    def try_write(self, file: FileCache, handle: Teller, offset: int, data: bytes) -> bool:
        """``write`` where it waits for nothing, sends nothing and cannot fail; else False, and nothing was done."""
        session = self._remote.session_now()
        if session is None or handle.owed is not None or not file.lock.acquire(blocking=False):
            return False
        try:
            may_fail = file.failure is not None or not file.writers
            if may_fail or self._has_enough(session, file, len(data)):
                return False
            if self.held_bytes + 2 * BLOCK_BYTES > self._bytes_max:
                return False
            self._take_in(file, offset, data)
        finally:
            file.lock.release()
        return True

    def _take_in(self, file: FileCache, offset: int, data: bytes) -> None:
        """For who holds ``file.lock``."""
        file.store(offset, data)
        file.touched_s = self._clock()
        self.account(file)

    def _is_much_uncommitted(self, file: FileCache) -> bool:
        return file.written.total > self._bytes_max // 2

    def _has_enough(self, session: Session, file: FileCache, more: int = 0) -> bool:
        """True where a full WRITE, or an FSYNC on the way, is due; ``more``: bytes that come."""
        return file.dirty.total + more >= _request_bytes(session) or self._is_much_uncommitted(file)

    def tell(self, file: FileCache, handle: Teller) -> None:
        """Raise the failure that ``handle`` has not been told yet."""
        status, handle.owed = handle.owed, None
        if status is not None:
            raise self._explain(file, status)

    def _explain(self, file: FileCache, status: StatusError) -> FsError:
        path = file.writers[0].path if file.writers else b"/"
        error = self._remote.explain("write", status, path)
        status.explained = error.errno
        return error

    def account(self, file: FileCache) -> None:
        """Count what ``file`` holds against the budget; called when that may have changed."""
        with self._lock:
            if file.unsafe:
                if file not in self._held:
                    file.unsafe_since_s = self._clock()
                self._held[file] = file.buffer_bytes
            else:
                self._held.pop(file, None)

    def _make_room(self, file: FileCache) -> None:
        """Wait for what is on its way to be committed, or commit the file that holds most, until the budget fits."""
        while self.held_bytes > self._bytes_max:
            with self._lock:
                if not self._held:
                    return
                most = max(self._held, key=lambda held: self._held[held])
            with most.lock:
                if most.commits and not most.failure:
                    waiting.wait(most.request_ended)
                    self.account(most)
                    continue
            try:
                self.flush(most, commit=True)
            except FsError:
                if most is file:
                    raise
                return  # its own handles are told; this writer must not wait for another file's full quota

    def _send_on(self, file: FileCache, *, around: Optional[int] = None) -> None:
        """Send what may be sent now, without waiting for a session; a lost one is for flush to deal with."""
        session = self._remote.session_now()
        if file.failure is not None or session is None:
            return
        if around is not None and not self._has_enough(session, file):
            return
        try:
            self._send(session, file, around)
            with file.lock:
                commit = not file.commits and self._is_much_uncommitted(file)
            if commit:
                self._commit_on_the_way(session, file)
        except (ConnectionLost, FsError) as error:
            log.debug("write-back interrupted: %s", error)

    def _send(
        self,
        session: Session,
        file: FileCache,
        around: Optional[int] = None,
        through: Optional[RemoteFile] = None,
        at_once: Optional[Lane] = None,
    ) -> None:
        """Send every dirty byte, waiting for the window; with ``around`` full requests there, while the window has room.

        Within ``Remote.together``, which gives ``at_once``, nothing may be waited for: what would have to wait is left dirty.
        """
        bytes_max = _request_bytes(session)
        durable = FSYNC not in session.extensions
        while True:
            with file.lock:
                while file.requests_in_flight >= REQUESTS_MAX:
                    if around is not None or at_once is not None:
                        return
                    waiting.wait(file.request_ended)
                if file.failure is not None or not file.writers or file.recut:
                    return
                if at_once is not None and _is_on_another_lane(file, at_once):
                    return
                taken = file.take_request(bytes_max, around=around)
                if taken is None:
                    return
                writer: RemoteFile = (through or file.writers[0]).borrow()  # its release may come at any time
                lane = at_once
                if lane is not None:
                    file.lanes[lane] += 1
            start, parts = taken
            end = start + sum(map(len, parts))

            try:
                lane = lane or self._behind_other_lanes(session, file, writer)
                done = partial(self._write_done, session, file, lane, start, end, durable)
                self._remote.write_soon(writer, session, start, parts, done)
            except BaseException as error:
                with file.lock:
                    self._is_answered(file, lane)
                    file.failed(start, end)
                    if isinstance(error, FsError) and error.errno not in NOT_THE_FILES_FAULT:
                        file.refused(StatusError(4, str(error.strerror)))
                raise
            finally:
                with file.lock:
                    file.left(start, end)
                writer.give_back()

    def _behind_other_lanes(self, session: Session, file: FileCache, writer: RemoteFile) -> Lane:
        """Before a WRITE leaves through ``writer``: its lane, which it counts on; what is on its way by others is answered.

        A server keeps the order of one lane only, and the handles of one file may be on several.
        """
        lane, _ = writer.attach(session)
        with file.lock:
            self._await_other_lanes(file, lane)
            file.lanes[lane] += 1
        return lane

    @staticmethod
    def _await_other_lanes(file: FileCache, lane: Lane) -> None:
        """For who holds ``file.lock``."""
        while _is_on_another_lane(file, lane):
            waiting.wait(file.request_ended)

    @staticmethod
    def _is_answered(file: FileCache, lane: Optional[Lane]) -> None:
        """The other half of ``_behind_other_lanes``, ahead of what wakes who waits. For who holds ``file.lock``."""
        if lane is not None:
            file.lanes[lane] -= 1
            if not file.lanes[lane]:
                del file.lanes[lane]  # it may be a session's that has ended

    def _write_done(
        self,
        session: Session,
        file: FileCache,
        lane: Lane,
        start: int,
        end: int,
        durable: bool,
        pending: Pending,
    ) -> None:
        """In the thread that reads. An acknowledgement that arrives with the loss of its session is none."""
        status: Optional[StatusError] = None
        is_lost = False
        try:
            pending.expect_ok()
        except StatusError as error:
            status = error
        except ConnectionLost as error:
            is_lost = True
            if not isinstance(error, NotSent):
                session.abort(error)  # which it is not yet where the reply makes no sense
        with file.lock:
            self._is_answered(file, lane)
            if status is not None or is_lost or session.lost is not None:
                file.failed(start, end)
                if status is not None:
                    file.refused(status)
            else:
                file.acknowledged(start, end, durable=durable)
                self.acknowledged_bytes += end - start
                if durable:
                    self.account(file)

    def _commit_on_the_way(self, session: Session, file: FileCache) -> None:
        """Send FSYNC behind what was sent; nobody waits for what it commits."""
        with file.lock:
            if not file.writers:
                return
            writer: RemoteFile = file.writers[0].borrow()
        try:
            lane, _ = writer.attach(session)
            with file.lock:
                self._await_other_lanes(file, lane)
                commit = self._begin_commit(session, file)
            if commit is not None:
                with commit.about_to_leave():
                    self._remote.fsync_soon(writer, session, commit.done)
        finally:
            writer.give_back()

    def _begin_commit(self, session: Session, file: FileCache) -> Optional[Fsync]:
        """For who holds ``file.lock``; None where there is nothing to commit."""
        if not (file.written or file.in_flight or file.cut_to is not None):
            return None
        return Fsync(session, file, self.account)

    # -- the point of truth ---------------------------------------------------------------------------------------------

    def flush(self, file: FileCache, *, commit: bool) -> Optional[Attrs]:
        """Store what is unsent now and, with ``commit``, what is uncommitted; then the server's attributes.

        Returns None where there was nothing to do, empty attributes where another thread has sent more meanwhile. Raises
        FsError with the errno of the first failure.
        """
        with file.lock:
            target = Extents(file.dirty)
            target.update(file.in_flight)
            if commit:
                target.update(file.written)
            # What was acknowledged already still changed the server's size and time.
            if not target and not file.recut and not file.sent and not (commit and file.unsafe):
                return None
            discards = file.discards
            file.failure = (
                None  # this is the retry that may clear it: the bytes are all sent again, or it fails anew
            )
        try:
            attrs = self._remote.run(lambda session: self._flush_on(session, file, target, commit))
            if file.discards != discards:
                raise FsError(errno.EIO, "the last writer has gone, and what it could not store with it")
            return attrs
        except StatusError as status:
            with file.lock:
                file.refused(status)
            raise self._explain(file, status) from None
        finally:
            with file.lock:
                self.account(file)

    def _flush_on(self, session: Session, file: FileCache, target: Extents, commit: bool) -> Optional[Attrs]:
        with_fsync = commit and FSYNC in session.extensions
        passes = 0
        while True:
            setbacks = file.setbacks
            self._cut_again(session, file)
            asked = self._send_all(session, file, target, with_fsync)
            if asked is None:
                return None  # the last writer was released meanwhile, which ended what there was to do
            sends, committing, looking = asked
            looking.wait()  # the last of the replies, where the server keeps the order
            with file.lock:
                while any(file.in_flight.overlaps(*span) for span in target):
                    waiting.wait(file.request_ended)
            if session.lost is not None:
                raise session.lost
            if committing is not None:
                committing.wait()
            attrs = looking.attrs()
            with file.lock:
                if file.failure is not None:
                    raise file.failure
                is_true = file.stored((attrs.size, attrs.mtime), sends)
                if is_true and attrs.size is not None and attrs.size < file.size:
                    log.error("the server has less than it acknowledged, %d bytes: %s", attrs.size, file)
                    raise FsError(errno.EIO, "the server has less than it acknowledged")
                again = any(file.dirty.overlaps(*span) for span in target)
                again = again or (with_fsync and any(file.written.overlaps(*span) for span in target))
                passes += setbacks == file.setbacks
            if not again or passes == PASSES_MAX:
                break
        return attrs if is_true else Attrs()

    def _send_all(
        self, session: Session, file: FileCache, target: Extents, with_fsync: bool
    ) -> Optional[Tuple[int, Optional[Fsync], Pending]]:
        """Send what is dirty and, behind what is sent of ``target``, the questions; None where no writer is left.

        Of a small file all leaves in one packet.
        """
        with file.lock:
            writer = file.writers[0].borrow() if file.writers else None
            is_small = not file.in_flight and file.dirty.total <= BLOCK_BYTES
        if writer is None:
            return None
        try:
            if is_small:
                with self._remote.together(writer, session) as lane:
                    self._send(session, file, through=writer, at_once=lane)
                    with file.lock:
                        is_left = any(file.dirty.overlaps(*span) for span in target)
                        may_ask = bool(file.writers) and not is_left and self._may_ask(file, target, lane)
                        questions = self._questions(session, file, with_fsync) if may_ask else None
                    if questions is not None:
                        return self._ask(session, writer, questions)
            self._send(session, file, through=writer)
            lane, _ = writer.attach(session)
            with file.lock:
                while file.writers and not self._may_ask(file, target, lane):
                    waiting.wait(file.request_ended)
                if not file.writers:
                    return None
                questions = self._questions(session, file, with_fsync)
            return self._ask(session, writer, questions)
        finally:
            writer.give_back()

    @staticmethod
    def _may_ask(file: FileCache, target: Extents, lane: Lane) -> bool:
        """Questions on this lane cover ``target``. For who holds ``file.lock``.

        What another thread has taken must leave before, and what went by another lane be answered.
        """
        is_leaving = any(file.leaving.overlaps(*span) for span in target)
        return not is_leaving and not _is_on_another_lane(file, lane)

    def _questions(self, session: Session, file: FileCache, with_fsync: bool) -> _Questions:
        """For who holds ``file.lock``."""
        # What has not left may come behind the question, and be acknowledged before the answer is looked at.
        sends = -1 if file.leaving or file.recut else file.sends
        return _Questions(sends, self._begin_commit(session, file) if with_fsync else None)

    def _ask(
        self, session: Session, writer: RemoteFile, questions: _Questions
    ) -> Tuple[int, Optional[Fsync], Pending]:
        """Send them, and FSTAT behind them, in one packet."""
        sends, committing = questions
        with contextlib.nullcontext() if committing is None else committing.about_to_leave():
            with self._remote.together(writer, session):
                if committing is not None:
                    self._remote.fsync_soon(writer, session, committing.done)
                return sends, committing, self._remote.fstat_soon(writer, session)

    def _cut_again(self, session: Session, file: FileCache) -> None:
        """The server may have forgotten a truncation: make it again, before the bytes that were written after it."""
        if not file.recut:
            return
        with file.cutting:  # not twice: the second would come behind what is sent after the first
            with file.lock:
                if not file.recut or file.cut_to is None or not file.writers:
                    return
                writer: RemoteFile = file.writers[0].borrow()
                sizes = (file.cut_to, file.size)
            try:
                for size in sizes:
                    self._remote.fsetstat_now(writer, session, Attrs(size=size))
            finally:
                writer.give_back()
            with file.lock:
                if session.lost is None:
                    file.recut = False

    def lost(self) -> None:
        """The session ended: see ``FileCache.lost``. Called before there can be another session."""
        self.losses += 1
        for file in self.files():
            with file.lock:
                file.lost()

    def _tick(self) -> None:
        """Send what has been dirty for a while, so that little is left for close."""
        while not self._closing.wait(AGE_S / 2):
            now = self._clock()
            for file in self.files():
                with file.lock:
                    due = (
                        bool(file.dirty)
                        and now - file.touched_s > AGE_S
                        and file.requests_in_flight < REQUESTS_MAX
                    )
                    self.account(file)
                if due:
                    self._send_on(file)


def _is_on_another_lane(file: FileCache, lane: Lane) -> bool:
    """Something of it is on its way elsewhere. For who holds ``file.lock``."""
    return any(each is not lane for each in file.lanes)


def _request_bytes(session: Session) -> int:
    """The most that one WRITE carries."""
    bytes_max = session.limits.write_bytes
    return bytes_max - bytes_max % PAGE_BYTES if bytes_max > PAGE_BYTES else bytes_max


def _state_of(file: FileCache, now_s: float) -> Dict[str, Any]:
    dirty, in_flight, written = file.dirty.total, file.in_flight.total, file.written.total
    failure = file.failure
    return {
        "path": file.writers[0].path if file.writers else None,
        "dirty_bytes": dirty,
        "in_flight_bytes": in_flight,
        "uncommitted_bytes": written,
        "unstored_bytes": dirty + in_flight + written,
        "lag_s": max(0.0, now_s - file.unsafe_since_s),
        "error": None if failure is None else os.strerror(failure.explained or failure.errno),
    }
