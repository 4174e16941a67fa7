"""The mount's end of the control socket. What it says is in the package's docstring.

One thread listens, and looks at the rates once a second; each connection has a thread of its own, at most
``CONNECTIONS_MAX``. Storing is done by one further thread for all who ask: who asks while it is at work waits for the
next round, which has what was written before he asked.

Behaviour on failure: a mount without its socket goes on as a mount. Where the directory disappears (the end of a session
takes its runtime directory along) another socket is made in the next one.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import select
import socket
import struct
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Protocol, Sequence, Tuple

from .directory import SUFFIX, address, open_private, sockets

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 32
REQUEST_BYTES_MAX = 4096
# For the request to come, and for each line of the answer to be taken.
PATIENCE_S = 5.0
PROGRESS_S = 0.2
SAMPLE_S = 1.0
CHECK_S = 10.0  # whether the socket is still where it was put
FAREWELL_S = 2.0
GRACE_S = 1.0
NAP_S = 0.1
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid


class Reports(Protocol):
    """What is asked of ``state.Reporter``."""

    def sample(self) -> None: ...  # pragma: no cover

    def state(self) -> Dict[str, Any]: ...  # pragma: no cover

    def progress(self) -> Dict[str, Any]: ...  # pragma: no cover


class Control:
    """Listens for requests from the mount's owner.

    places    directories for the socket, see ``directory.places``
    sync      stores what is held; returns "path: reason" of what is not stored
    """

    def __init__(
        self,
        places: Sequence[str],
        reports: Reports,
        sync: Callable[[], List[str]],
        *,
        check_s: float = CHECK_S,
    ) -> None:
        self._places = places
        self._reports = reports
        self._unmount: Callable[[], str] = lambda: "it is not mounted yet"
        self._storing = _Storing(sync)
        self._slots = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._lock = threading.Lock()  # guards what follows
        self._socket: Optional[_Listening] = None
        self._serving: List[threading.Thread] = []
        self._kept: List[socket.socket] = []  # to end with the process
        self._ended = threading.Event()
        self._lost: List[str] = []
        self._check_s = check_s
        self._complaint = ""

    def start(self, unmount: Callable[[], str]) -> None:
        """Listen, from now on and in a thread of its own. Where that cannot be, the log says why.

        ``unmount`` takes the mount away unless it is in use; it returns "" or why the mount is still there.
        """
        self._unmount = unmount
        self._listen()
        threading.Thread(target=self._run, name="control", daemon=True).start()

    def close(self, lost: Sequence[str]) -> None:
        """The mount has ended, and this was not stored: who waits is told. Who asked for the end sees it, as his connection's."""
        self._lost = list(lost)
        self._ended.set()
        with self._lock:
            listening, self._socket = self._socket, None
            serving = list(self._serving)
        if listening is not None:
            listening.close()
        deadline_s = time.monotonic() + FAREWELL_S
        for thread in serving:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _listen(self) -> None:
        """Make a socket in the first place where that can be done; else say why not, once."""
        reasons = []
        for place in self._places:
            try:
                listening = _Listening(place)
            except OSError as error:
                reasons.append(str(error))
                continue
            with self._lock:
                if not self._ended.is_set():
                    self._socket, self._complaint = listening, ""
                    return
            listening.close()
            return
        complaint = "; ".join(reasons)
        if complaint != self._complaint:
            self._complaint = complaint
            log.warning(
                "no control socket, so sftpmount status, sync and umount cannot find this mount: %s",
                complaint,
            )

    def _run(self) -> None:
        checked_s = time.monotonic()
        while not self._ended.is_set():
            listening = self._socket
            connection = listening.accept(SAMPLE_S) if listening is not None else None
            if listening is None:
                self._ended.wait(SAMPLE_S)
            self._reports.sample()
            if connection is not None:
                self._take(connection)
            if time.monotonic() - checked_s > self._check_s:
                checked_s = time.monotonic()
                self._listen_again()

    def _listen_again(self) -> None:
        with self._lock:
            listening = self._socket
            if self._ended.is_set() or (listening is not None and listening.is_there):
                return
            self._socket = None
        if listening is not None:
            listening.close()
        self._listen()

    def _take(self, connection: socket.socket) -> None:
        if not self._slots.acquire(blocking=False):
            connection.close()
            return
        threading.Thread(target=self._serve, args=(connection,), name="control-request", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with self._lock:
            self._serving.append(threading.current_thread())
        kept = False
        try:
            connection.settimeout(PATIENCE_S)
            if peer_of(connection)[1] != os.geteuid():
                _tell(connection, "error", "this mount belongs to another user")
                return
            name = _request(connection)
            if name == "status":
                _tell(connection, "state", self._reports.state())
            elif name == "sync":
                self._serve_sync(connection)
            elif name == "unmount":
                kept = self._serve_unmount(connection)
            else:
                _tell(connection, "error", f"no request that is known here: {name!r}")
        except OSError as error:
            log.debug("control: %s", error)
        except Exception:
            log.exception("a control request failed in a way that is not foreseen")
        finally:
            with self._lock:
                self._serving.remove(threading.current_thread())
                if kept:
                    self._kept.append(connection)
            self._slots.release()
            if not kept:
                connection.close()

    def _serve_sync(self, connection: socket.socket) -> None:
        unstored = self._store(connection)
        if unstored is not None:
            _tell(connection, "end", {"unstored": unstored, "why": ""})

    def _store(self, connection: socket.socket) -> Optional[List[str]]:
        """Store, and show progress; returns what is not stored, None where the asker has left."""
        storing = self._storing.ask()
        while not storing.done.wait(PROGRESS_S):
            if self._ended.is_set():
                return self._lost
            if _has_left(connection):
                return None
            _tell(connection, "progress", self._reports.progress())
        _tell(connection, "progress", self._reports.progress())
        return storing.unstored

    def _serve_unmount(self, connection: socket.socket) -> bool:
        """True where the mount ends: the connection is then to end with the process."""
        while not self._ended.is_set():
            unstored = self._store(connection)
            if unstored is None or _has_left(connection):
                return False
            if self._ended.is_set():
                break
            why = "not everything could be stored" if unstored else self._unmount()
            if why and not unstored:
                # A program that is writing holds it up, and is waited for; one that only has it open is not.
                if self._sees_writing():
                    continue
                if _has_left(connection):
                    return False
                why = self._unmount()
            if not why:
                break
            _tell(connection, "end", {"unstored": unstored, "why": why})
            return False
        _tell(connection, "unmounted", True)
        while not self._ended.wait(PROGRESS_S):
            _tell(connection, "progress", self._reports.progress())
        _tell(connection, "end", {"unstored": self._lost, "why": ""})
        return True

    def _sees_writing(self) -> bool:
        """Whether anything is written now; a program that copies has, at times, nothing on the way."""
        before = self._reports.progress()["written_bytes"]
        until_s = time.monotonic() + GRACE_S
        while time.monotonic() < until_s and not self._ended.wait(PROGRESS_S):
            now = self._reports.progress()
            if now["unsent_bytes"] or now["uncommitted_bytes"] or now["written_bytes"] != before:
                return True
        return self._ended.is_set()


class _Listening:
    """A socket in a private directory."""

    def __init__(self, place: str) -> None:
        self._directory = open_private(place, create=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._remove_stale()
            name = f"{os.getpid()}-{secrets.token_hex(4)}"
            unready = address(self._directory, "." + name)
            self._socket.bind(unready)
            os.chmod(unready, 0o600)
            self._socket.listen(CONNECTIONS_MAX)
            # Under its name it answers from the first moment on: one that does not is a dead mount's.
            self._path = address(self._directory, name + SUFFIX)
            os.rename(unready, self._path)
        except BaseException:
            self._socket.close()
            os.close(self._directory)
            raise

    def _remove_stale(self) -> None:
        """What mounts that were killed have left."""
        for path in sockets(self._directory):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.setblocking(False)
                try:
                    probe.connect(path)
                except ConnectionRefusedError:
                    os.unlink(path)
                except OSError:
                    pass  # alive and busy

    @property
    def is_there(self) -> bool:
        return os.path.lexists(self._path)

    def accept(self, timeout_s: float) -> Optional[socket.socket]:
        """The next connection, or None where none comes in time."""
        try:
            if _is_readable(self._socket, timeout_s):
                return self._socket.accept()[0]
        except (OSError, ValueError):
            time.sleep(NAP_S)  # closed meanwhile, or too many files are open
        return None

    def close(self) -> None:
        try:
            os.unlink(self._path)
        except OSError:
            pass
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._socket.close()
        os.close(self._directory)


class _Round:
    """One pass over what is held."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.unstored: List[str] = []


class _Storing:
    """One thread that stores for all who ask, while somebody does."""

    def __init__(self, sync: Callable[[], List[str]]) -> None:
        self._sync = sync
        self._lock = threading.Lock()  # guards what follows
        self._next: Optional[_Round] = None
        self._is_running = False

    def ask(self) -> _Round:
        """A round that has not begun yet."""
        with self._lock:
            if self._next is None:
                self._next = _Round()
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name="control-sync", daemon=True).start()
            return self._next

    def _run(self) -> None:
        while True:
            with self._lock:
                now, self._next = self._next, None
                self._is_running = now is not None
            if now is None:
                return
            try:
                now.unstored = self._sync()
            except Exception as error:
                log.exception("storing failed in a way that is not foreseen")
                now.unstored = [f"the mount: {error}"]
            now.done.set()


def peer_of(connection: socket.socket) -> Tuple[int, int, int]:
    """pid, uid and gid of the process at the other end."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    return pid, uid, gid


def _request(connection: socket.socket) -> str:
    """The request's name, "" for what is none."""
    deadline_s = time.monotonic() + PATIENCE_S
    line = b""
    while not line.endswith(b"\n") and len(line) < REQUEST_BYTES_MAX and time.monotonic() < deadline_s:
        part = connection.recv(REQUEST_BYTES_MAX - len(line))
        if not part:
            break
        line += part
    try:
        asked = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    return str(asked.get("request", ""))[:100] if isinstance(asked, dict) else ""


def _tell(connection: socket.socket, key: str, value: object) -> None:
    connection.sendall(json.dumps({key: value}).encode() + b"\n")


def _has_left(connection: socket.socket) -> bool:
    return _is_readable(connection, 0.0)


def _is_readable(connection: socket.socket, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))
