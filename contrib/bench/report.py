"""Rounds into medians, ratios, a table and a plot (pure)."""

from __future__ import annotations

import math
import statistics
from html import escape
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

from bench.peers import OURS, Line
from bench.run import Figures, Sizes
from bench.workloads import WORKLOADS


class Failure(NamedTuple):
    """A run that brought no figures: the program was told of an error, or the bytes are not those written."""

    sentence: str


class Case(NamedTuple):
    """A workload at a size. ``str()`` is how it is called in tables."""

    workload: str
    scale: float = 1.0

    def __str__(self) -> str:
        return self.workload if self.scale == 1 else f"{self.workload} x{self.scale:g}"


Result = Union[Figures, Failure]
Rounds = Dict[Case, Dict[str, List[Result]]]  # -> peer -> result of each round


def summary(rounds: Rounds, sizes: Sizes, line: Optional[Line]) -> List[Dict[str, Any]]:
    """One entry per case and peer, all figures over the rounds that did not fail, whose number is ``failed``; None: unknown.

    ``ratio`` is the peer's median time over ours, ``ratio_min`` and ``ratio_max`` its spread over the rounds, each round
    compared within itself. ``of_line`` is the median over the time that the bytes need at the line's rate, and
    ``round_trips`` the median over the number of operations, in round trips of the line. ``cpu_s`` and ``peak_mib`` are of
    the mount's processes.
    """
    entries = []
    for case, peers in rounds.items():
        for peer, results in peers.items():
            sentences = [result.sentence for result in results if isinstance(result, Failure)]
            entries.append(
                {
                    "workload": case.workload,
                    "scale": case.scale,
                    "peer": peer,
                    "failed": len(sentences),
                    "error": sentences[0] if sentences else None,
                    **_times(results, peers.get(OURS, [])),
                    **_relations(case, results, sizes.times(case.scale), line),
                }
            )
    return entries


def table(entries: List[Dict[str, Any]]) -> str:
    """For the terminal. The ratio column says how many times as long as sftpmount the peer took."""
    head = f"{'workload':15} {'mount':11} {'median':>9}  {'(spread)':17} {'x line':>6} {'RTT each':>8} {'MiB/s':>7} "
    lines = [head + f"{'CPU s':>7} {'MiB':>5}  ratio to sftpmount (spread)"]
    for entry in entries:
        row = f"{Case(entry['workload'], entry['scale'])!s:15} {entry['peer']:11} "
        if entry["median_s"] is None:
            lines.append(f"{row}{entry['error']}")
            continue
        row += f"{entry['median_s']:8.2f}s  {'({min_s:.2f} to {max_s:.2f})'.format(**entry):17} "
        row += f"{_cell(entry['of_line'], '6.2f')} {_cell(entry['round_trips'], '8.2f')} "
        row += f"{_cell(entry['mib_per_s'], '7.1f')} {_cell(entry['cpu_s'], '7.2f')} {_cell(entry['peak_mib'], '5.0f')}"
        if entry["ratio"] is not None and entry["peer"] != OURS:
            row += "  {ratio:.2f} ({ratio_min:.2f} to {ratio_max:.2f})".format(**entry)
        if entry["failed"]:
            row += f"  {entry['failed']} failed: {entry['error']}"
        lines.append(row.rstrip())
    return "\n".join(lines)


def growth(entries: List[Dict[str, Any]]) -> str:
    """For each workload and peer, at each size: how many times as long as at the smallest it took, and the peak memory.

    Equal factors of size and time are a straight line; what a mount costs at its start and end makes the time grow less.
    """
    by_size: Dict[Tuple[str, str], List[Dict[str, Any]]] = {}
    for entry in sorted(entries, key=lambda entry: float(entry["scale"])):
        if entry["median_s"] is not None:
            by_size.setdefault((entry["workload"], entry["peer"]), []).append(entry)
    lines = ["growth: size, time (both in multiples of the smallest), peak MiB"]
    for (workload, peer), measured in by_size.items():
        smallest = measured[0]
        row = f"{workload:15} {peer:11}"
        for entry in measured:
            times = entry["median_s"] / smallest["median_s"]
            row += (
                f" {entry['scale'] / smallest['scale']:6g} x: {times:7.2f} {_cell(entry['peak_mib'], '5.0f')}"
            )
        lines.append(row.rstrip())
    return "\n".join(lines)


def plot(entries: List[Dict[str, Any]], title: str) -> str:
    """An SVG: for each case and peer a dot at the ratio to sftpmount, on a logarithmic scale, with its spread as a line."""
    rows = [entry for entry in entries if entry["ratio"] is not None and entry["peer"] != OURS]
    bounds = [value for entry in rows for value in (entry["ratio_min"], entry["ratio_max"])] or [1.0]
    low = min(-1, math.floor(math.log10(min(bounds))))
    high = max(1, math.ceil(math.log10(max(bounds))))
    left, width, row_height, top = 220, 560, 20, 50
    bottom = top + row_height * len(rows)

    def x(ratio: float) -> float:
        return round(left + width * (math.log10(ratio) - low) / (high - low), 1)

    drawn = [f'<text x="10" y="20" font-weight="bold">{escape(title)}</text>']
    drawn.append('<text x="10" y="38">time relative to sftpmount; right of 1: slower than sftpmount</text>')
    for exponent in range(low, high + 1):
        at, colour = x(10.0**exponent), "black" if exponent == 0 else "lightgray"
        drawn.append(f'<line x1="{at}" y1="{top}" x2="{at}" y2="{bottom}" stroke="{colour}"/>')
        drawn.append(f'<text x="{at}" y="{bottom + 16}" text-anchor="middle">{10.0**exponent:g}</text>')
    colours = dict(zip(dict.fromkeys(row["peer"] for row in rows), ("#c0392b", "#2471a3", "#1e8449")))
    for number, row in enumerate(rows):
        y, colour = top + row_height * number + 12, colours.get(row["peer"], "black")
        name = escape(f"{Case(row['workload'], row['scale'])}, {row['peer']}")
        drawn.append(f'<text x="10" y="{y + 4}">{name}</text>')
        ends = f'x1="{x(row["ratio_min"])}" x2="{x(row["ratio_max"])}"'
        drawn.append(f'<line {ends} y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
        drawn.append(f'<circle cx="{x(row["ratio"])}" cy="{y}" r="4" fill="{colour}"/>')
        drawn.append(f'<text x="{left + width + 12}" y="{y + 4}">{row["ratio"]:.2f}</text>')
    size = f'width="{left + width + 70}" height="{bottom + 28}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    paper = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, paper, *drawn, "</svg>", ""])


def _times(results: List[Result], ours: List[Result]) -> Dict[str, Any]:
    seconds = [result.seconds for result in results if isinstance(result, Figures)]
    own = [result.seconds for result in ours if isinstance(result, Figures)]
    ratios = [
        theirs.seconds / mine.seconds
        for theirs, mine in zip(results, ours)
        if isinstance(theirs, Figures) and isinstance(mine, Figures)
    ]
    return {
        "seconds": [round(each, 4) for each in seconds],
        "median_s": round(statistics.median(seconds), 4) if seconds else None,
        "min_s": round(min(seconds), 4) if seconds else None,
        "max_s": round(max(seconds), 4) if seconds else None,
        "ratio": round(statistics.median(seconds) / statistics.median(own), 3) if ratios else None,
        "ratio_min": round(min(ratios), 3) if ratios else None,
        "ratio_max": round(max(ratios), 3) if ratios else None,
    }


def _relations(case: Case, results: List[Result], sizes: Sizes, line: Optional[Line]) -> Dict[str, Any]:
    figures = [result for result in results if isinstance(result, Figures)]
    if not figures:
        return dict.fromkeys(("mib_per_s", "of_line", "round_trips", "cpu_s", "peak_mib"))
    workload = WORKLOADS[case.workload]
    median_s = statistics.median(each.seconds for each in figures)
    payload_bytes = workload.payload_bytes(sizes) if workload.payload_bytes else None
    operations = workload.operations(sizes) if workload.operations else None
    rate_bps, rtt_ms = (line.rate_bps, line.rtt_ms) if line else (None, 0.0)
    cpu_s = [each.cpu_s for each in figures if each.cpu_s is not None]
    peaks = [each.peak_bytes for each in figures if each.peak_bytes is not None]
    return {
        "mib_per_s": round(payload_bytes / 2**20 / median_s, 1) if payload_bytes else None,
        "of_line": round(median_s * rate_bps / (8 * payload_bytes), 3)
        if payload_bytes and rate_bps
        else None,
        "round_trips": round(median_s / operations / rtt_ms * 1000, 3) if operations and rtt_ms else None,
        "cpu_s": round(statistics.median(cpu_s), 2) if cpu_s else None,
        "peak_mib": round(max(peaks) / 2**20, 1) if peaks else None,
    }


def _cell(value: Optional[float], form: str) -> str:
    return format(value, form) if value is not None else " " * int(form.split(".")[0])
