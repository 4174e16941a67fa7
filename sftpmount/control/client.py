"""The asker's end of the control socket, and how a mount is found: by the file system that the kernel shows at a mountpoint."""

from __future__ import annotations

import json
import os
import pwd
import select
import socket
import threading
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence

from .. import mountpoint
from ..errors import MountpointError, SftpMountError
from ..logs import printable
from ..mountpoint import Mounted
from .directory import opened, sockets
from .server import peer_of

KIND = "fuse.sftpmount"
STATE_S = 5.0
LINE_S = 30.0  # while a mount stores, lines come several times a second; to take it away may last 10 s
STALE_S = 2.0
END_S = 30.0


class Silent(SftpMountError):
    """A mount's process does not answer, or ended without a last word."""


class Peer:
    """A connection to a mount's process: one request."""

    def __init__(self, path: str) -> None:
        """Raises OSError, PermissionError where another user listens there."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(STATE_S)
            self._socket.connect(path)
            self.pid, uid, _ = peer_of(self._socket)
            if uid != os.geteuid():
                raise PermissionError("another user listens there")
            self._process: Optional[int] = None
            try:
                self._process = os.pidfd_open(self.pid)
            except OSError:
                pass  # before Linux 5.3: the end of the connection has to do
        except BaseException:
            self._socket.close()
            raise
        self._lines = self._socket.makefile("rb")

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
        if self._process is not None:
            os.close(self._process)
            self._process = None

    def ask(self, request: str, *, patience_s: float = LINE_S) -> Iterator[Dict[str, Any]]:
        """The lines of the answer, until the connection ends. Raises Silent where one does not come in time."""
        try:
            self._socket.settimeout(patience_s)
            self._socket.sendall(json.dumps({"request": request}).encode() + b"\n")
            for line in self._lines:
                answer = json.loads(line)
                if "error" in answer:
                    raise Silent(f"process {self.pid} refuses: {printable(str(answer['error']))}.")
                yield answer
        except socket.timeout:
            raise Silent(
                f"process {self.pid} does not answer within {patience_s:g} s: is it stopped?"
            ) from None
        except (OSError, ValueError) as error:
            raise Silent(f"process {self.pid} does not answer ({error}).") from None

    def state(self) -> Dict[str, Any]:
        """Raises Silent."""
        for answer in self.ask("status", patience_s=STATE_S):
            state: Dict[str, Any] = answer["state"]
            return state
        raise Silent(f"process {self.pid} ended before it could answer.")

    def await_end(self) -> bool:
        """Wait until the process has ended; False where it does not within ``END_S``."""
        if self._process is None:
            self._socket.settimeout(END_S)
            return not self._lines.read()
        return bool(select.select([self._process], [], [], END_S)[0])


class Found(NamedTuple):
    """A mount that answers: its state, and a connection to ask it for more."""

    state: Dict[str, Any]
    peer: Peer


class Mounts(NamedTuple):
    """``states`` in the order of their mountpoints; ``silent`` tells of each process that does not answer."""

    states: List[Dict[str, Any]]
    silent: List[Silent]


def mounts(places: Sequence[str]) -> Mounts:
    """All mounts of this user."""
    found = Mounts([], [])
    for path in _sockets(places):
        try:
            with Peer(path) as peer:
                found.states.append(peer.state())
        except Silent as error:
            found.silent.append(error)
        except OSError:
            pass  # of a mount that has ended
    found.states.sort(key=lambda state: (state["mountpoint"], state["pid"]))
    return found


def find(path: str, places: Sequence[str]) -> Found:
    """The mount at ``path``, or one that was there and still stores what it holds; to be closed.

    Raises MountpointError with what is there instead, Silent where it does not answer.
    """
    path = mountpoint.located(path)
    while True:
        present = mountpoint.mounted_at(path)
        silent: List[Silent] = []
        for each in _sockets(places):
            try:
                with Peer(each) as peer:
                    state = peer.state()
                if _is_it(state, path, present):
                    return Found(state, Peer(each))
            except Silent as error:
                silent.append(error)
            except OSError:
                pass  # of a mount that has ended
        if mountpoint.mounted_at(path) == present:  # else it was mounted or unmounted meanwhile
            raise _missing(path, present, silent)


def _sockets(places: Sequence[str]) -> Iterator[str]:
    """Their addresses, each good until the next is asked for."""
    for directory in opened(places):
        yield from sockets(directory)


def _is_it(state: Dict[str, Any], path: str, present: Optional[Mounted]) -> bool:
    if present is not None:  # if only to the asker: a copy, or bound to another directory
        return bool(state["device"] == present.device)
    return bool(state["phase"] == "storing" and state["mountpoint"] == path)


def _missing(path: str, present: Optional[Mounted], silent: Sequence[Silent]) -> SftpMountError:
    shown = printable(path)
    if present is None:
        inside = max(
            (m for m in mountpoint.mounts() if m != "/" and path.startswith(m + "/")), key=len, default=""
        )
        hint = f" (it lies in {printable(inside)})" if inside else ""
        return MountpointError(f"nothing is mounted on {shown}{hint}: sftpmount status lists your mounts.")
    by = f"{printable(present.source)} ({printable(present.kind)})"
    if present.kind != KIND and not (present.kind.startswith("fuse") and silent):
        return MountpointError(f"{shown} is the mountpoint of {by}, which is no mount of sftpmount.")
    if present.uid is not None and present.uid != os.geteuid():
        owner = _name_of(present.uid)
        return MountpointError(f"{shown} is a mount of the user {owner}: only {owner} may ask it.")
    if _is_dead(path):
        return MountpointError(
            f"{shown} is left over from a mount whose process has ended: run fusermount3 -uz {shown} first."
        )
    return (
        silent[0]
        if silent
        else Silent(
            f"the process of {by} on {shown} has no control socket that could be found: its log says why. "
            f"fusermount3 -u {shown} stores everything and ends it."
        )
    )


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _is_dead(path: str) -> bool:
    """Whether its process has ended. One that lives may wait for the server before it answers this: it is not waited for."""
    found: List[bool] = []
    thread = threading.Thread(target=lambda: found.append(mountpoint.is_stale(path)), daemon=True)
    thread.start()
    thread.join(STALE_S)
    return bool(found and found[0])
