"""What a service manager is told of the mount, as sd_notify(3) has it: datagrams to the socket in NOTIFY_SOCKET.

Where there is no such socket, or it does not answer, nothing is said.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Callable, Iterator, MutableMapping, Tuple

# More time is asked for three times within the time that was asked for.
EXTENSION_S = 30
_INTERVAL_S = EXTENSION_S / 3


class Notify:
    """One mount's manager; takes NOTIFY_SOCKET out of ``environment``, since the programs that we run are no services."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        self._address = environment.pop("NOTIFY_SOCKET", "")

    def tell(self, *assignments: str) -> None:
        """Send ``assignments`` ("READY=1", "STATUS=...") as one message."""
        if not self._address.startswith(("/", "@")):
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.setblocking(False)
            manager.sendto("\n".join(assignments).encode("utf-8", "backslashreplace"), address)

    @contextlib.contextmanager
    def draining(self, left: Callable[[], Tuple[int, bool]]) -> Iterator[None]:
        """Within, the service is stopping, and asks for more time while something is being stored.

        ``left()`` gives how many files are not stored yet, and whether the server answers. While it does not, no time is
        asked for: the manager's own limit (TimeoutStopSec=) then decides how long to wait for it.
        """
        ended = threading.Event()

        def report() -> None:
            while True:
                files, answers = left()
                more = [f"EXTEND_TIMEOUT_USEC={EXTENSION_S * 1_000_000}"] if files and answers else []
                what = "storing" if answers else "waiting for the server to store"
                self.tell("STOPPING=1", f"STATUS={what} {files} files", *more)
                if ended.wait(_INTERVAL_S):
                    return

        if self._address:
            threading.Thread(target=report, name="notify", daemon=True).start()
        try:
            yield
        finally:
            ended.set()
