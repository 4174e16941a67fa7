"""Rounds into medians, ratios and a table."""

from __future__ import annotations

import statistics
from typing import Any, Dict, List

from bench.peers import OURS

Rounds = Dict[str, Dict[str, List[float]]]  # workload -> peer -> seconds of each round


def summary(rounds: Rounds, total_bytes: int) -> List[Dict[str, Any]]:
    """One entry per workload and peer. ``ratio`` is the peer's median time over ours, ``ratio_min`` and ``ratio_max`` its
    spread over the rounds, each round compared within itself; all are 1 for ourselves."""
    entries = []
    for workload, peers in rounds.items():
        for peer, seconds in peers.items():
            ours = peers.get(OURS, seconds)
            ratios = [theirs / own for theirs, own in zip(seconds, ours)]
            entries.append(
                {
                    "workload": workload,
                    "peer": peer,
                    "seconds": [round(each, 4) for each in seconds],
                    "median_s": round(statistics.median(seconds), 4),
                    "min_s": round(min(seconds), 4),
                    "max_s": round(max(seconds), 4),
                    "mib_per_s": round(total_bytes / 2**20 / statistics.median(seconds), 1),
                    "ratio": round(statistics.median(seconds) / statistics.median(ours), 3),
                    "ratio_min": round(min(ratios), 3),
                    "ratio_max": round(max(ratios), 3),
                }
            )
    return entries


def table(entries: List[Dict[str, Any]]) -> str:
    """For the terminal. The ratio column says how many times as long as sftpmount the peer took."""
    lines = [
        f"{'workload':10} {'mount':12} {'median':>9} {'min':>9} {'max':>9} {'MiB/s':>8}   ratio to sftpmount (spread)"
    ]
    for entry in entries:
        line = f"{entry['workload']:10} {entry['peer']:12} {entry['median_s']:8.2f}s {entry['min_s']:8.2f}s "
        line += f"{entry['max_s']:8.2f}s {entry['mib_per_s']:8.1f}"
        if entry["peer"] != OURS:
            line += f"   {entry['ratio']:.2f} ({entry['ratio_min']:.2f} to {entry['ratio_max']:.2f})"
        lines.append(line)
    return "\n".join(lines)
