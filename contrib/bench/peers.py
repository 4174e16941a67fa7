"""What is compared: programs that mount a directory of one sshd, each under its own defaults."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Dict, Iterator, NamedTuple, Optional, Type

from support.mount import Mount, SshfsMount
from support.process import program
from support.relay import Relay
from support.sshd import Sshd

OURS = "sftpmount"
PEERS: Dict[str, Type[Mount]] = {OURS: Mount, "sshfs": SshfsMount}


class Line(NamedTuple):
    """The network between mount and server; without one, loopback as it is."""

    rtt_ms: float
    rate_bps: Optional[float]


class Place:
    """A directory of a server, and mounts of it by one peer. ``served`` is the server's side."""

    def __init__(self, peer: str, sshd: Sshd, port: int, work_dir: Path, served: Path) -> None:
        self.peer = peer
        self.served = served
        self._sshd = sshd
        self._port = port
        self._work_dir = work_dir

    def mount(self) -> Mount:
        """A fresh mount, with nothing cached; the caller ends it with unmount() or close()."""
        return PEERS[self.peer](self._sshd, self._work_dir, port=self._port, directory=str(self.served))


@contextlib.contextmanager
def server(work_dir: Path, line: Optional[Line]) -> Iterator[Dict[str, Place]]:
    """One hardened sshd, with the relay before it where a line is asked for, and a place for each installed peer."""
    with contextlib.ExitStack() as stack:
        sshd = stack.enter_context(Sshd(work_dir))
        port = sshd.port
        if line is not None:
            relay = Relay(sshd.port, rtt_ms=line.rtt_ms, up_bps=line.rate_bps, down_bps=line.rate_bps)
            port = stack.enter_context(relay).port
            sshd.trust(port)
        places = {}
        for name in PEERS:
            if name != OURS:
                program(name, name)  # raises with what to install
            (sshd.tree / name).mkdir()
            places[name] = Place(name, sshd, port, work_dir, sshd.tree / name)
        yield places
