"""Attribute changes that are owed to the server: they ride with the next operation on their file, or go within a second.

rsync and tar set times and mode of each file they have just made, a round trip each, and rename it then. Such a change is
taken in here, shown at once, and sent in one flight with the rename; ahead of whatever else depends on it; at the latest
after ``OWED_S``. Only for what this mount itself has made and nobody has open on the server: there it cannot fail but by the
line, or by another client's doing. What fails is told by the next operation on that file; else by the log and the unmount.
"""

from __future__ import annotations

import logging
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Dict, List, Optional

from ..cache.namespace import Namespace
from ..cache.node import Node
from ..cache.writeback import NOT_THE_FILES_FAULT
from ..errors import ConnectionLost, FsError, StatusError
from ..sftp.lane import Pending
from ..sftp.remote import Remote
from ..sftp.wire import Attrs

log = logging.getLogger(__name__)

OWED_S = 0.5
_THREADS = 8


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
        self._payers = ThreadPoolExecutor(_THREADS, "attributes")

    def close(self) -> None:
        """Send nothing more by ourselves."""
        with self._some:
            self._closing = True
            self._some.notify_all()
        self._payers.shutdown(wait=False)

    def take(self, node: Node, attrs: Attrs) -> bool:
        """Owe this change of mode or times from now on; False where it must be made at once. For who holds ``node.operation``."""
        # A handle on the server would be told of the old times, and take the file for another's.
        file = node.file
        is_open = file is not None and any(not handle.unopened for handle in list(file.handles))
        if not self._ns.is_ours(node) or is_open or not self._remote.connected or not may_wait(node, attrs):
            return False
        self._ns.owe(node, attrs)
        with self._some:
            self._since.setdefault(node, self._clock())
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name="attributes", daemon=True)
                self._thread.start()
            self._some.notify_all()
        return True

    def below(self, path: bytes) -> List[Node]:
        """What something is owed of below a directory."""
        prefix = path if path == b"/" else path + b"/"
        with self._some:
            nodes = list(self._since)
        return [node for node in nodes if (self._ns.path_of(node) or b"").startswith(prefix)]

    def paths(self) -> List[bytes]:
        """The files and directories that something is owed of."""
        with self._some:
            nodes = list(self._since)
        return [path for path in map(self._ns.path_of, nodes) if path is not None]

    def settle(self, node: Optional[Node]) -> None:
        """Send what is owed of ``node``, and wait for it: ahead of an operation on it. Raises FsError."""
        if node is None or node.owed is None:
            return
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

    def pay(self, *nodes: Optional[Node]) -> None:
        """``settle``, ahead of an operation on something else: that does not fail with what is refused here.

        Raises FsError where the server could not be asked (EINTR, ETIMEDOUT).
        """
        for node in nodes:
            try:
                self.settle(node)
            except FsError as error:
                if node is None or error.errno in NOT_THE_FILES_FAULT:
                    raise
                self._tell(node, error)

    def drain(self) -> List[str]:
        """Everything; returns "path: reason" for what could not be set, now or by ourselves before."""
        with self._some:
            nodes = list(self._since)
        for node, error in zip(nodes, self._payers.map(self._try, nodes)):
            if error is not None:
                self._tell(node, error)
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
        self.settle(node)

    # -- by ourselves -----------------------------------------------------------------------------------------------------

    def _paid(self, node: Node, attrs: Attrs) -> None:
        if self._ns.paid(node, attrs):
            with self._some:
                self._since.pop(node, None)

    def _run(self) -> None:
        while True:
            with self._some:
                while not self._closing and not self._since:
                    self._some.wait()
                if self._closing:
                    return
                now_s = self._clock()
                due = [node for node, since_s in self._since.items() if since_s + OWED_S <= now_s]
                if not due:
                    self._some.wait(next(iter(self._since.values())) + OWED_S - now_s)
                    continue
            try:
                failed = list(zip(due, self._payers.map(self._try, due)))
            except RuntimeError:  # closed
                return
            for node, error in failed:
                if error is not None and error.errno in NOT_THE_FILES_FAULT:
                    with self._some:  # later, behind the others
                        self._since.pop(node, None)
                        self._since[node] = self._clock()
                elif error is not None:
                    self._tell(node, error)

    def _try(self, node: Node) -> Optional[FsError]:
        try:
            self.settle(node)
        except FsError as error:
            return error
        return None

    def _tell(self, node: Node, error: FsError) -> None:
        path = self._ns.path_of(node) or b"(removed)"
        self._failed.append(f"{path.decode('utf-8', 'backslashreplace')}: mode or times: {error.strerror}")
        log.error("mode or times of %r could not be set: %s", path, error.strerror)


def may_wait(node: Node, attrs: Attrs) -> bool:
    """False for a directory's mode that changes who may use what is in it: the next request may depend on that.

    What it gives to others than its owner, and takes from nobody, can wait.
    """
    if not node.is_dir or attrs.mode is None:
        return True
    old, new = stat.S_IMODE(node.mode), stat.S_IMODE(attrs.mode)
    return not old & ~new and not (old ^ new) & stat.S_IRWXU


class _Ride:
    """A SETSTAT on its way."""

    __slots__ = ("attrs", "pending")

    def __init__(self, attrs: Attrs, pending: Pending) -> None:
        self.attrs = attrs
        self.pending = pending
