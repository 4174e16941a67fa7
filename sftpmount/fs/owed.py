"""Attribute changes that are owed to the server: they ride with the next operation on their file, or go within a second.

rsync and tar set times and mode of each file they have just made, a round trip each, and rename it then. Such a change is
taken in here, shown at once, and sent in one flight with the rename; ahead of whatever else depends on it; at the latest
after ``OWED_S``. Only for what this mount itself has made and nobody writes to: there it cannot fail but by the line, or by
another client's doing. What fails is told by the operation that it rides with; else by the log and by the unmount.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Callable, Dict, List, Optional

from ..cache.namespace import Namespace, Node
from ..cache.writeback import NOT_THE_FILES_FAULT
from ..errors import ConnectionLost, FsError, StatusError
from ..sftp.remote import Remote
from ..sftp.session import Pending
from ..sftp.wire import Attrs

log = logging.getLogger(__name__)

OWED_S = 0.5


class OwedAttrs:
    """What is owed of a mount's files and directories. Thread-safe."""

    def __init__(
        self,
        remote: Remote,
        names: Namespace,
        far_path: Callable[[bytes], bytes],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._remote = remote
        self._ns = names
        self._far_path = far_path
        self._clock = clock
        self._some = threading.Condition()  # guards _since, _closing
        self._since: Dict[Node, float] = {}  # the oldest first
        self._closing = False
        self._failed: List[str] = []  # "path: reason" of what nobody could be told about
        self._thread: Optional[threading.Thread] = None

    def close(self) -> None:
        """Send nothing more by ourselves."""
        with self._some:
            self._closing = True
            self._some.notify_all()

    def take(self, node: Node, attrs: Attrs) -> bool:
        """Owe this change of mode or times from now on; False where it must be made at once."""
        is_written = node.file is not None and bool(node.file.writers)
        if not self._ns.is_ours(node) or is_written or not self._remote.connected:
            return False
        self._ns.owe(node, attrs)
        with self._some:
            self._since.setdefault(node, self._clock())
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._pay, name="attributes", daemon=True)
                self._thread.start()
            self._some.notify_all()
        return True

    def settle(self, node: Optional[Node]) -> None:
        """Send what is owed of ``node``, and wait for it. Raises FsError."""
        if node is None or node.owed is None:
            return
        if node.is_dir:
            self.settle_all()  # a mode that forbids to change what is in it must not come before those changes
        else:
            self.settle_alone(node)

    def settle_all(self, *, but: Optional[Node] = None) -> None:
        """Everything (``but`` one), in the order in which it came. Raises FsError, the first."""
        failure: Optional[FsError] = None
        with self._some:
            nodes = [node for node in self._since if node is not but]
        for node in nodes:
            try:
                self.settle_alone(node)
            except FsError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def drain(self) -> List[str]:
        """Everything; returns "path: reason" for what could not be set, now or by ourselves before."""
        with self._some:
            nodes = list(self._since)
        for node in nodes:
            self._pay_one(node, is_last=True)
        return self._failed

    # -- in one flight with something else ----------------------------------------------------------------------------

    def send(self, node: Optional[Node]) -> Optional[_Ride]:
        """Send what is owed of ``node`` without waiting; the caller calls ``arrived``, and holds ``node.operation`` until then."""
        session = self._remote.session_now()
        if node is None or session is None:
            return None
        owed, path = node.owed, self._ns.path_of(node)
        if owed is None or path is None:
            return None
        try:
            return _Ride(owed, self._remote.setstat_soon(session, self._far_path(path), owed))
        except ConnectionLost:
            return None

    def arrived(self, node: Optional[Node], ride: Optional[_Ride]) -> None:
        """Wait for it, and send it again where it failed: the operation may have overtaken it. Raises FsError."""
        if node is None or node.owed is None:
            return
        if ride is not None:
            try:
                ride.pending.wait().expect_ok()
            except (StatusError, ConnectionLost):
                pass
            else:
                self._paid(node, ride.attrs)
        self.settle_alone(node)

    # -- one by one -------------------------------------------------------------------------------------------------------

    def settle_alone(self, node: Node) -> None:
        """``settle`` of this node and no other, whatever it is. Raises FsError."""
        with node.operation:
            owed, path = node.owed, self._ns.path_of(node)
            if owed is None:
                return
            if path is None:  # removed meanwhile
                self._paid(node, owed)
                return
            try:
                self._remote.setstat(self._far_path(path), owed)
            except FsError as error:
                if error.errno not in NOT_THE_FILES_FAULT:
                    self._paid(node, owed)
                    self._ns.distrust(node)
                raise
            self._paid(node, owed)

    def _paid(self, node: Node, attrs: Attrs) -> None:
        if self._ns.paid(node, attrs):
            with self._some:
                self._since.pop(node, None)

    def _pay(self) -> None:
        while True:
            with self._some:
                while not self._closing and not self._since:
                    self._some.wait()
                if self._closing:
                    return
                node, since_s = next(iter(self._since.items()))
                remaining_s = since_s + OWED_S - self._clock()
                if remaining_s > 0:
                    self._some.wait(remaining_s)
                    continue
            self._pay_one(node, is_last=False)

    def _pay_one(self, node: Node, *, is_last: bool) -> None:
        try:
            self.settle_alone(node)
        except FsError as error:
            if error.errno in NOT_THE_FILES_FAULT and not is_last:
                with self._some:
                    self._since.pop(node, None)
                    self._since[node] = self._clock()
                return
            path = self._ns.path_of(node) or b"(removed)"
            self._failed.append(
                f"{path.decode('utf-8', 'backslashreplace')}: mode or times: {error.strerror}"
            )
            log.error("mode or times of %r could not be set: %s", path, error.strerror)


class _Ride:
    """A SETSTAT on its way."""

    __slots__ = ("attrs", "pending")

    def __init__(self, attrs: Attrs, pending: Pending) -> None:
        self.attrs = attrs
        self.pending = pending
