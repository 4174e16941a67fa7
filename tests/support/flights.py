"""Counts round trips: how many flights of SFTP requests a program has to wait for, one after the other.

A request belongs to the flight behind the last one of which a reply had arrived when it was sent; requests that leave
together are one flight. Arrivals are what count, so the server is best some tens of milliseconds away (a Relay): only then
are no replies there before the last request of a flight has left.

    with CountedMount(sshd, tmp_path, port=relay.port) as mount:
        with mount.counting() as flights:
            (mount.path / "file").write_bytes(b"x")
        assert len(flights) <= 3, flights        # [["LSTAT"], ["LSTAT", "OPEN"], ["EXTENDED", "FSTAT", "WRITE"]]
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

from sftpmount.sftp import wire
from sftpmount.sftp.lane import Pending, ReplyCallback
from support.mount import CHECKOUT, Mount
from support.process import wait_until

_LOG = "SFTPMOUNT_FLIGHTS"
_NAMES = {value: name for name, value in vars(wire).items() if name.isalpha() and isinstance(value, int)}


class _Event(NamedTuple):
    """A line of the log: a request was sent in a flight (">"), or its reply has come ("<")."""

    what: str
    flight: int
    request: str


class CountedMount(Mount):
    """A mount that writes down each request and reply of its SFTP sessions."""

    changes = f"import sys; sys.path.append({str(CHECKOUT / 'tests')!r}); from support import flights; flights.record()"

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        directory = Path(arguments[1])
        directory.mkdir(parents=True, exist_ok=True)
        self._flights = directory / "flights"
        super().__init__(*arguments, **{**keywords, "env": {_LOG: str(self._flights)}})

    @contextlib.contextmanager
    def counting(self) -> Iterator[List[List[str]]]:
        """After the block: the requests of each flight whose replies had come by its end, in the order of their names.

        Nothing is on its way when the block begins. A flight of which nothing came back was waited for by nobody.
        """
        wait_until(self._is_quiet, 20.0, "the end of what was before")
        begin = len(self._events())
        counted: List[List[str]] = []
        yield counted
        events = self._events()
        flights: Dict[int, List[str]] = {}
        for event in events[begin:]:
            if event.what == ">":
                flights.setdefault(event.flight, []).append(event.request)
        arrived = {event.flight for event in events[begin:] if event.what == "<"}
        counted.extend(sorted(flights[flight]) for flight in sorted(arrived))

    def _is_quiet(self) -> bool:
        events = self._events()
        return 2 * sum(event.what == ">" for event in events) == len(events)

    def _events(self) -> List[_Event]:
        words = (line.split() for line in self._flights.read_text().splitlines())
        return [_Event(what, int(flight), request) for what, flight, request in words]


def record() -> None:
    """In the mount's process: write the log that the environment names."""
    log = os.open(os.environ[_LOG], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    lock = threading.Lock()
    flights: Dict[Pending, int] = {}
    arrived = 0
    init, complete = Pending.__init__, Pending.complete

    def write(what: str, flight: int, asked: int) -> None:
        os.write(log, f"{what} {flight} {_NAMES[asked]}\n".encode())

    def recorded_init(
        pending: Pending, callback: Optional[ReplyCallback] = None, asked: int = wire.INIT, *more: Any
    ) -> None:
        init(pending, callback, asked, *more)
        if asked != wire.INIT:  # which is the greeting of a lane
            with lock:
                flights[pending] = arrived + 1
                write(">", flights[pending], asked)

    def recorded_complete(pending: Pending, *arguments: Any) -> None:
        nonlocal arrived
        with lock:
            flight = flights.pop(pending, None)
            if flight is not None:
                arrived = max(arrived, flight)
                write("<", flight, pending.asked)
        complete(pending, *arguments)

    setattr(Pending, "__init__", recorded_init)  # noqa: B010
    setattr(Pending, "complete", recorded_complete)  # noqa: B010
