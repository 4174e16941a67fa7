"""Takes connections in a thread, for servers that live in the test's own process."""

from __future__ import annotations

import socket
import threading
from typing import Callable, Optional

_CLOSE_TIMEOUT_S = 20.0


class Listener:
    """Hands each connection to ``serve``, one after the other, until ``close``; ``serve`` or its heirs close the connection.

    ``sock`` listens already, None for a free port of 127.0.0.1.
    """

    def __init__(self, serve: Callable[[socket.socket], None], sock: Optional[socket.socket] = None) -> None:
        self._serve = serve
        self._sock = sock or socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens, on TCP."""
        return int(self._sock.getsockname()[1])

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take no more connections, and return when ``serve`` is done. Raises TimeoutError when it is not in time."""
        self._sock.shutdown(socket.SHUT_RDWR)  # close alone would not wake accept
        self._thread.join(_CLOSE_TIMEOUT_S)
        self._sock.close()
        if self._thread.is_alive():
            raise TimeoutError(f"a connection is still served after {_CLOSE_TIMEOUT_S:g} s")

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._sock.accept()
            except OSError:
                return
            self._serve(connection)
