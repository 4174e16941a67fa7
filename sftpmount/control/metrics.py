"""The state as a file for the textfile collector of Prometheus's node_exporter.

The collector reads all files of a directory whose names end in .prom, at any moment: so each is written beside its place
and moved there. Names and units are as Prometheus's documentation asks (prometheus.io/docs/practices/naming, and
instrumenting/exposition_formats for the text). A mount that has ended leaves no file.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Any, Callable, Dict, Iterator, List, Tuple

log = logging.getLogger(__name__)

INTERVAL_S = 15.0

Labels = Dict[str, str]
# (name without its prefix, type, help, samples)
Family = Tuple[str, str, str, List[Tuple[Labels, float]]]


class MetricsFile:
    """Keeps ``path`` up to date. Where it cannot be written the log says so, once, and the next time is tried all the same."""

    def __init__(
        self, path: str, state: Callable[[], Dict[str, Any]], *, interval_s: float = INTERVAL_S
    ) -> None:
        self._path = path
        self._state = state
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._lock = threading.Lock()  # held while the file is written or removed
        self._complaint = ""

    def start(self) -> None:
        """Write it now, and then in a thread of its own."""
        self.write()
        threading.Thread(target=self._run, name="metrics", daemon=True).start()

    def close(self) -> None:
        """The mount has ended: remove the file."""
        self._ended.set()
        with self._lock:
            try:
                os.unlink(self._path)
            except OSError as error:
                log.debug("metrics: %s", error)

    def write(self) -> None:
        """Bring the file up to date."""
        text = as_text(self._state())
        with self._lock:
            if self._ended.is_set():
                return
            try:
                _replace(self._path, text.encode("utf-8", "backslashreplace"))
                self._complaint = ""
            except OSError as error:
                if str(error) != self._complaint:
                    self._complaint = str(error)
                    log.warning("the metrics cannot be written: %s", error)

    def _run(self) -> None:
        while not self._ended.wait(self._interval_s):
            try:
                self.write()
            except Exception:
                log.exception("the metrics failed in a way that is not foreseen")


def _replace(path: str, data: bytes) -> None:
    beside = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o644)  # the collector is another user
            file.write(data)
        os.rename(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def as_text(state: Dict[str, Any]) -> str:
    """The text exposition format, version 0.0.4."""
    mount = {"mountpoint": state["mountpoint"]}
    lines = []
    for name, kind, help_text, samples in _families(state):
        lines.append(f"# HELP sftpmount_{name} {help_text}")
        lines.append(f"# TYPE sftpmount_{name} {kind}")
        for labels, value in samples:
            shown = ",".join(f'{label}="{_escaped(text)}"' for label, text in {**mount, **labels}.items())
            lines.append(f"sftpmount_{name}{{{shown}}} {float(value)!r}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _families(state: Dict[str, Any]) -> Iterator[Family]:
    line, unstored, traffic, cache = (state[part] for part in ("connection", "unstored", "traffic", "cache"))
    plain: Labels = {}
    info = {"source": state["source"], "server": line["server_version"] or "", "version": state["version"]}
    yield "info", "gauge", "What is mounted, always 1.", [(info, 1)]
    yield "healthy", "gauge", "1 where sftpmount status names no problem.", [(plain, state["healthy"])]
    yield "connected", "gauge", "1 while the server is there.", [(plain, line["connected"])]
    yield "reconnects_total", "counter", "Connections made again.", [(plain, line["reconnects"])]
    yield (
        "durable",
        "gauge",
        "1 where fsync() reaches the server's disk.",
        [(plain, state["durability"]["fsync"])],
    )
    yield (
        "unstored_bytes",
        "gauge",
        "Written, and not yet safe on the server.",
        [({"state": kind}, unstored[f"{kind}_bytes"]) for kind in ("dirty", "in_flight", "uncommitted")],
    )
    yield "unstored_files", "gauge", "Files that hold such bytes.", [(plain, unstored["files"])]
    yield "failed_files", "gauge", "Of these, refused by the server.", [(plain, unstored["failed_files"])]
    yield (
        "lost_files_total",
        "counter",
        "Not stored, with no program to tell.",
        [(plain, state["lost_files"])],
    )
    yield (
        "lag_seconds",
        "gauge",
        "For how long the oldest of them has held some.",
        [(plain, unstored["lag_s"])],
    )
    yield (
        "written_bytes_total",
        "counter",
        "Of files, taken by the server.",
        [(plain, traffic["written_bytes"])],
    )
    yield (
        "received_bytes_total",
        "counter",
        "From the server, of all kinds.",
        [(plain, traffic["received_bytes"])],
    )
    for outcome in ("hits", "misses"):
        samples: List[Tuple[Labels, float]] = [
            ({"cache": kind}, cache[kind][outcome]) for kind in ("blocks", "names")
        ]
        yield f"cache_{outcome}_total", "counter", f"Look-ups in the caches: {outcome}.", samples
    yield "cache_bytes", "gauge", "File data kept for reading.", [(plain, cache["blocks"]["bytes"])]
