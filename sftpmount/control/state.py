"""What is known of a mount at this moment, as status.schema.json describes it; gathered without a wait for the network."""

from __future__ import annotations

import collections
import os
import time
from datetime import datetime, timezone
from typing import Any, Callable, Deque, Dict, List, Mapping, Optional, Protocol, Tuple

from .. import __version__

State = Dict[str, Any]

RATE_WINDOW_S = 10.0
FILES_LISTED_MAX = 100


class Remote(Protocol):
    """What is asked of ``sftp.remote.Remote``."""

    @property
    def received_bytes(self) -> int: ...  # pragma: no cover

    def state(self) -> State: ...  # pragma: no cover


class Files(Protocol):
    """What is asked of ``fs.files.Files``."""

    @property
    def acknowledged_bytes(self) -> int: ...  # pragma: no cover


class Filesystem(Protocol):
    """What is asked of ``fs.filesystem.Filesystem``."""

    @property
    def files(self) -> Files: ...  # pragma: no cover

    def state(self) -> State: ...  # pragma: no cover

    @property
    def sync(self) -> Callable[[], List[str]]: ...  # pragma: no cover


class Reporter:
    """Reports on one mount. ``facts`` are what does not change: mountpoint, source, host, port, read_only."""

    def __init__(
        self,
        facts: Mapping[str, Any],
        remote: Remote,
        filesystem: Filesystem,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._facts = dict(facts)
        self._remote = remote
        self._filesystem = filesystem
        self._clock = clock
        self._wall = wall
        self._mounted_at = as_time(wall())
        self._samples: Deque[Tuple[float, int, int]] = collections.deque([self._sample()])
        self.device: Optional[str] = None  # as ``mountpoint.Mounted`` has it, once mounted
        # To be set: False once it is only there to store what is left.
        self.is_mounted: Callable[[], bool] = lambda: True

    def _sample(self) -> Tuple[float, int, int]:
        return self._clock(), self._filesystem.files.acknowledged_bytes, self._remote.received_bytes

    def sample(self) -> None:
        """Take note of how much went over the line; to be called about once a second."""
        samples = self._samples
        samples.append(self._sample())
        while len(samples) > 2 and samples[-1][0] - samples[0][0] > RATE_WINDOW_S:
            samples.popleft()

    def progress(self) -> State:
        """The part of ``state`` that tells how storing gets on."""
        connection, unstored = self._remote.state(), self._filesystem.state()["unstored"]
        return {
            "written_bytes": self._filesystem.files.acknowledged_bytes,
            "unsent_bytes": unstored["dirty_bytes"] + unstored["in_flight_bytes"],
            "uncommitted_bytes": unstored["uncommitted_bytes"],
            "files": len(unstored["files"]),
            "away_for_s": 0.0 if connection["connected"] else max(0.0, self._wall() - connection["since_s"]),
            "why": connection["why"],
        }

    def state(self) -> State:
        """Everything; see status.schema.json."""
        held, line = self._filesystem.state(), self._remote.state()
        unstored = held["unstored"]
        files = unstored["files"]
        failed = [each for each in files if each["error"]]
        durable = held["fsync"] and held["commit"] == "close"
        now, oldest = self._sample(), self._samples[0]
        window_s = max(now[0] - oldest[0], 0.001)
        state: State = {
            **self._facts,
            "version": __version__,
            "pid": os.getpid(),
            "device": self.device,
            "phase": "mounted" if self.is_mounted() else "storing",
            "mounted_at": self._mounted_at,
            "time": as_time(self._wall()),
            "directory": held["directory"],
            "connection": {
                **{name: line.get(name) for name in _AGREED},
                **{name: line[name] for name in _LIVE},
                "since": as_time(line["since_s"]),
                "missing_extensions": held["missing"],
                "outages": [
                    {"lost": as_time(lost_s), "back": as_time(back_s), "why": why}
                    for lost_s, back_s, why in line["outages"]
                ],
            },
            "durability": {
                "commit": held["commit"],
                "fsync": held["fsync"],
                "close_means": "on the server's disk" if durable else "received by the server",
            },
            "unstored": {
                **{name: value for name, value in unstored.items() if name != "files"},
                "files": len(files),
                "failed_files": len(failed),
                "listed": [*failed, *(each for each in files if not each["error"])][:FILES_LISTED_MAX],
            },
            "lost_files": len(held["lost"]),
            "lost": held["lost"][-FILES_LISTED_MAX:],
            "traffic": {
                "written_bytes": now[1],
                "received_bytes": now[2],
                "written_bytes_per_s": (now[1] - oldest[1]) / window_s,
                "received_bytes_per_s": (now[2] - oldest[2]) / window_s,
            },
            "cache": {"blocks": held["blocks"], "names": held["names"]},
        }
        state["problems"] = _problems(state)
        state["healthy"] = not state["problems"]
        return state


_AGREED = (
    "server_version", "kex", "strict_kex", "host_key_type", "host_key_fingerprint",
    "cipher_out", "cipher_in", "mac_out", "mac_in",
)  # fmt: skip
_LIVE = ("connected", "why", "heard_s", "lanes", "requests_in_flight", "retry_timeout_s", "reconnects")


def _problems(state: State) -> List[str]:
    """Why a person should look at it, one sentence each."""
    found = []
    connection, unstored = state["connection"], state["unstored"]
    if state["phase"] != "mounted":
        found.append("it is unmounted, and its process stores what is left")
    if not connection["connected"]:
        found.append(f"the server is away since {connection['since']}: {connection['why']}")
    found += [
        f"{each['path']} is not stored: {each['error']}" for each in unstored["listed"] if each["error"]
    ]
    found += [f"{each} (lost: no program could be told)" for each in state["lost"]]
    return found


def as_time(seconds: Optional[float]) -> Optional[str]:
    """Seconds since 1970 as RFC 3339 has it, in UTC: 2026-11-23T19:58:52Z."""
    return None if seconds is None else f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
