"""What a mount's process has for being seen and steered: the control socket, the metrics file, SIGUSR1."""

from __future__ import annotations

import logging
from typing import Any, Callable, Mapping, Optional, Sequence

from .metrics import MetricsFile
from .server import Control
from .state import Filesystem, Remote, Reporter
from .text import as_lines

log = logging.getLogger(__name__)


class Panel:
    """Of one mount. ``facts`` are ``Reporter``'s, ``places`` ``Control``'s."""

    def __init__(
        self,
        facts: Mapping[str, Any],
        remote: Remote,
        filesystem: Filesystem,
        *,
        places: Sequence[str],
        metrics_file: Optional[str],
    ) -> None:
        self._reports = Reporter(facts, remote, filesystem)
        self._control = Control(places, self._reports, filesystem.sync)
        self._metrics = MetricsFile(metrics_file, self._reports.state) if metrics_file else None

    def start(
        self, device: Optional[str], *, is_mounted: Callable[[], bool], unmount: Callable[[], str]
    ) -> None:
        """It is mounted, as the file system with this number.

        is_mounted  whether it still is: False once it is out of sight, and only stores what is left
        unmount     as for ``Control.start``
        """
        self._reports.device, self._reports.is_mounted = device, is_mounted
        self._control.start(unmount)
        if self._metrics is not None:
            self._metrics.start()

    def close(self, lost: Sequence[str]) -> None:
        """It has ended, and this was not stored."""
        self._control.close(lost)
        if self._metrics is not None:
            self._metrics.close()

    def dump(self) -> None:
        """The state to the log, whatever its level: somebody asked for it."""
        for line in as_lines(self._reports.state()):
            log.handle(log.makeRecord(log.name, logging.INFO, __file__, 0, line, (), None, "dump"))
