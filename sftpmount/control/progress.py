"""How storing gets on, for a person: a line that is drawn again and again, on terminals only."""

from __future__ import annotations

import collections
import os
import time
from typing import Any, Callable, Deque, Dict, Optional, TextIO, Tuple

from ..logs import printable
from .text import in_bytes, in_time

BAR_COLUMNS = 24
RATE_WINDOW_S = 5.0
_ERASE = "\r\x1b[K"


class Bar:
    """Draws on ``stream`` where that is a terminal, else does nothing."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream: Optional[TextIO] = stream if stream.isatty() else None
        self._clock = clock
        self._begun_bytes: Optional[int] = None
        self._is_drawn = False
        self._samples: Deque[Tuple[float, int]] = collections.deque()

    def show(self, progress: Dict[str, Any]) -> None:
        """Draw ``progress``, which is ``state.Reporter.progress``'s."""
        if self._stream is None:
            return
        if self._begun_bytes is None:
            self._begun_bytes = progress["written_bytes"]
        sent = progress["written_bytes"] - self._begun_bytes
        line = as_line(progress, sent, self._rate(sent))
        self._stream.write(_ERASE + line[: max(10, self._columns() - 1)])
        self._stream.flush()
        self._is_drawn = True

    def clear(self) -> None:
        """Take the line away."""
        if self._stream is not None and self._is_drawn:
            self._stream.write(_ERASE)
            self._stream.flush()
            self._is_drawn = False

    def _rate(self, sent: int) -> float:
        samples = self._samples
        samples.append((self._clock(), sent))
        while len(samples) > 2 and samples[-1][0] - samples[0][0] > RATE_WINDOW_S:
            samples.popleft()
        (first_s, first), (last_s, last) = samples[0], samples[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0

    def _columns(self) -> int:
        assert self._stream is not None
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80


def as_line(progress: Dict[str, Any], sent_bytes: int, rate_bytes_per_s: float) -> str:
    """One line: ``sent_bytes`` since it began, of what is not sent yet besides."""
    unsent = progress["unsent_bytes"]
    total = sent_bytes + unsent
    share = sent_bytes / total if total else 1.0
    filled = int(share * BAR_COLUMNS)
    bar = f"[{'#' * filled}{'-' * (BAR_COLUMNS - filled)}] {int(share * 100):3d} %"
    if progress["away_for_s"]:
        why = f": {printable(progress['why'])}" if progress["why"] else ""
        return (
            f"{bar}  {in_bytes(unsent)} wait; the server is away for {in_time(progress['away_for_s'])}{why}"
        )
    if not unsent:
        return f"{bar}  {in_bytes(sent_bytes)} sent" + (
            f", {in_bytes(progress['uncommitted_bytes'])} on the way to the disk"
            if progress["uncommitted_bytes"]
            else ""
        )
    left = f", {in_time(unsent / rate_bytes_per_s)} left" if rate_bytes_per_s >= 1 else ""
    return f"{bar}  {in_bytes(sent_bytes)} of {in_bytes(total)}, {in_bytes(rate_bytes_per_s)}/s{left}"
