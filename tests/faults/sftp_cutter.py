"""An sftp subsystem that ends its SSH connection at a chosen request: sshd runs this program in place of sftp-server.

It starts the real sftp-server, one for each channel as sshd does, and copies packets both ways. The requests of all
channels are counted through one locked state file, which also says where to cut:

    arm(state, [(17, AFTER_REQUEST)])      # the 17th request from now on
    ... use the mount ...
    made(state)                            # ["17 after request: RENAME"], or [] where there were fewer requests

A cut is SIGKILL to the sshd process that holds the connection, so that all its channels end at once. With several cuts
the count begins anew after each: the second counts the requests of the reconnect, its INITs included. While a cut is on
its way no other request of any channel reaches a server.

    sftp_cutter.py STATE SFTP-SERVER
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import sys
import termios
import threading
import time
from typing import Any, Dict, List, NoReturn, Optional, Sequence, Tuple

BEFORE = "before"  # the request does not reach the server
AFTER_REQUEST = "after request"  # the server has done it, its reply does not reach the client
AFTER_REPLY = "after reply"  # the reply is with the client
WAYS = (BEFORE, AFTER_REQUEST, AFTER_REPLY)

Cut = Tuple[int, str]  # which request, counted from 1, and the way

_INIT = 1
_EXTENDED = 200
_KINDS = {
    1: "INIT",
    3: "OPEN",
    4: "CLOSE",
    5: "READ",
    6: "WRITE",
    7: "LSTAT",
    8: "FSTAT",
    9: "SETSTAT",
    10: "FSETSTAT",
    11: "OPENDIR",
    12: "READDIR",
    13: "REMOVE",
    14: "MKDIR",
    15: "RMDIR",
    16: "REALPATH",
    17: "STAT",
    18: "RENAME",
    19: "READLINK",
    20: "SYMLINK",
}
_READ_BYTES = 1 << 18


# -- for the test --------------------------------------------------------------------------------------------------------


def arm(path: str, cuts: Sequence[Cut]) -> None:
    """Count from here on, and make these cuts, one after the other. Creates the state file."""
    with _State(path) as state:
        state.save({"count": 0, "cuts": list(cuts), "made": []})


def made(path: str) -> List[str]:
    """The cuts made since arm(): "17 after request: RENAME"."""
    with _State(path) as state:
        return list(state.load()["made"])


def counted(path: str) -> int:
    """The requests since arm(), or since the last cut."""
    with _State(path) as state:
        return int(state.load()["count"])


class _State:
    """The state file, locked between enter and exit."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> _State:
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def load(self) -> Dict[str, Any]:
        values: Dict[str, Any] = json.loads(os.pread(self._fd, 1 << 16, 0))
        return values

    def save(self, values: Dict[str, Any]) -> None:
        data = json.dumps(values).encode()
        os.ftruncate(self._fd, os.pwrite(self._fd, data, 0))


# -- the program ---------------------------------------------------------------------------------------------------------


class Cutter:
    """One channel: standard input and output are the client's, the pipes are the server's."""

    def __init__(self, state_path: str, sftp_server: str) -> None:
        self._state_path = state_path
        self._session = os.getppid()
        with open(f"/proc/{self._session}/comm") as comm:
            name = comm.read()
        if not name.startswith("sshd"):
            raise RuntimeError(f"the parent is {name.strip()}, not sshd")
        server_in, self._to_server = os.pipe()
        self._from_server, server_out = os.pipe()
        actions = [(os.POSIX_SPAWN_DUP2, server_in, 0), (os.POSIX_SPAWN_DUP2, server_out, 1)]
        os.posix_spawn(sftp_server, [sftp_server], os.environ, file_actions=actions)
        os.close(server_in)
        os.close(server_out)
        self._last: Optional[Tuple[bytes, str]] = (
            None  # the request to cut at, when it has been handed over: id, way
        )
        self._cutting: Optional[_State] = None

    def run(self) -> None:
        """Until the client or the server ends."""
        threading.Thread(target=self._copy_replies, daemon=True).start()
        while True:
            packet = _packet(0)
            if packet is None:
                os.close(self._to_server)  # sftp-server ends, and with its last reply this process
                threading.Event().wait()
            else:
                self._request(packet)

    def _request(self, packet: bytes) -> None:
        with _State(self._state_path) as state:
            if os.getppid() != self._session:
                os._exit(
                    1
                )  # cut at another channel's request: what came after that does not reach the server
            values = state.load()
            values["count"] += 1
            state.save(values)
            if values["cuts"] and values["count"] == values["cuts"][0][0]:
                number, way = values["cuts"].pop(0)
                values["made"].append(f"{number} {way}: {_name(packet)}")
                values["count"] = 0
                self._cutting = state
                self._cut_values = values
                if way == BEFORE:
                    self._cut()
                self._last = (_id(packet), way)
                _write(self._to_server, packet)
                threading.Event().wait()  # the other thread ends the process, and with it the lock
            _write(self._to_server, packet)

    def _copy_replies(self) -> None:
        while True:
            packet = _packet(self._from_server)
            if packet is None:
                os._exit(0)
            last = self._last
            if last is None or last[0] != _id(packet):
                _write(1, packet)
                continue
            if last[1] == AFTER_REPLY:
                _write(1, packet)
                self._wait_until_sent()
            self._cut()

    def _wait_until_sent(self) -> None:
        """Until sshd has read all that this process wrote, and sleeps again: then it is in the client's socket."""
        unread = termios.TIOCOUTQ if stat.S_ISSOCK(os.fstat(1).st_mode) else termios.FIONREAD
        while True:
            count = int.from_bytes(fcntl.ioctl(1, unread, b"\0" * 4), sys.byteorder)
            with open(f"/proc/{self._session}/stat") as status:
                is_asleep = status.read().rpartition(")")[2].split()[0] == "S"
            if count == 0 and is_asleep:
                return
            time.sleep(0.0005)

    def _cut(self) -> NoReturn:
        assert self._cutting is not None
        self._cutting.save(self._cut_values)
        os.kill(self._session, signal.SIGKILL)
        while os.getppid() == self._session:  # from here on the other channels see it too
            time.sleep(0.0005)
        os._exit(1)


def _packet(fd: int) -> Optional[bytes]:
    """The next whole packet, its length included; None at the end."""
    head = _read(fd, 4)
    body = _read(fd, int.from_bytes(head, "big")) if len(head) == 4 else b""
    return head + body if body else None


def _read(fd: int, length: int) -> bytes:
    """As many bytes as asked for; fewer at the end."""
    parts: List[bytes] = []
    while length:
        try:
            part = os.read(fd, min(length, _READ_BYTES))
        except ConnectionError:
            break
        if not part:
            break
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except (BrokenPipeError, ConnectionError):
        os._exit(1)  # the other end has gone


def _id(packet: bytes) -> bytes:
    """The request's id; INIT and VERSION have none, and are the first of their channel."""
    return b"" if packet[4] in (_INIT, _INIT + 1) else packet[5:9]


def _name(packet: bytes) -> str:
    if packet[4] == _EXTENDED:
        length = int.from_bytes(packet[9:13], "big")
        return packet[13 : 13 + length].decode("ascii", "replace")
    return _KINDS.get(packet[4], str(packet[4]))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    Cutter(sys.argv[1], sys.argv[2]).run()
