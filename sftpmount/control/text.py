"""The state as a person reads it (pure)."""

from __future__ import annotations

from typing import Any, Dict, Iterator, List

from ..logs import printable

LISTED_MAX = 10


def as_lines(state: Dict[str, Any]) -> List[str]:
    """``state`` as lines that a terminal may be given."""
    return [printable(line) for line in _lines(state)]


def _lines(state: Dict[str, Any]) -> Iterator[str]:
    line, unstored, traffic, cache = (state[part] for part in ("connection", "unstored", "traffic", "cache"))
    yield f"{state['mountpoint']}: {state['source']}, process {state['pid']}, mounted since {state['mounted_at']}"
    for problem in state["problems"]:
        yield f"  PROBLEM     {problem}"
    yield f"  connection  {_connection(line)}"
    yield f"  server      {state['host']} port {state['port']}: {line['server_version'] or 'unknown'}"
    yield f"  algorithms  {_algorithms(line)}"
    yield f"  durability  {_durability(state)}"
    yield f"  to store    {_unstored(unstored)}"
    for each in unstored["listed"][:LISTED_MAX]:
        why = f": {each['error']}" if each["error"] else ""
        yield f"              {in_bytes(each['unstored_bytes'])}, {in_time(each['lag_s'])}  {each['path']}{why}"
    if unstored["files"] > LISTED_MAX:
        yield f"              and {unstored['files'] - LISTED_MAX} more"
    yield (
        f"  traffic     {in_bytes(traffic['written_bytes'])} written, {in_bytes(traffic['written_bytes_per_s'])}/s; "
        f"{in_bytes(traffic['received_bytes'])} received, {in_bytes(traffic['received_bytes_per_s'])}/s"
    )
    blocks, names = cache["blocks"], cache["names"]
    yield (
        f"  cache       {in_bytes(blocks['bytes'])} of {in_bytes(blocks['limit_bytes'])}, {_hits(blocks)} hits; "
        f"{names['entries']} names, {_hits(names)} hits"
    )


def _connection(line: Dict[str, Any]) -> str:
    since = f"since {line['since']}"
    if line["connected"]:
        told = f"connected {since}, heard of {in_time(line['heard_s'])} ago"
    else:
        waits = line["retry_timeout_s"]
        patience = "for ever" if waits is None else f"up to {in_time(waits)}"
        told = f"AWAY {since}; programs wait {patience}"
    reconnects = line["reconnects"]
    if not reconnects:
        return told
    last = next(outage for outage in reversed(line["outages"]) if outage["back"])
    return f"{told}; {reconnects} reconnect{'s' if reconnects > 1 else ''}, the last at {last['back']}"


def _algorithms(line: Dict[str, Any]) -> str:
    if not line["kex"]:
        return "unknown"
    ways = [
        f"{line[f'cipher_{way}']} with {line[f'mac_{way}']}" if line[f"mac_{way}"] else line[f"cipher_{way}"]
        for way in ("out", "in")
    ]
    strict = " (strict)" if line["strict_kex"] else ""
    ciphers = " / ".join(dict.fromkeys(ways))
    return f"{line['kex']}{strict}, {line['host_key_type']} {line['host_key_fingerprint']}, {ciphers}"


def _durability(state: Dict[str, Any]) -> str:
    told = f"close() means {state['durability']['close_means']}"
    if not state["durability"]["fsync"]:
        return f"{told}, and so does fsync(): the server has no fsync@openssh.com"
    return f"{told}, fsync() on the server's disk"


def _unstored(unstored: Dict[str, Any]) -> str:
    if not unstored["files"]:
        return "nothing"
    return (
        f"{in_bytes(unstored['dirty_bytes'])} to send, {in_bytes(unstored['in_flight_bytes'])} on the way, "
        f"{in_bytes(unstored['uncommitted_bytes'])} not yet on the disk; {unstored['files']} "
        f"file{'s' if unstored['files'] > 1 else ''}, the oldest for {in_time(unstored['lag_s'])}"
    )


def _hits(counts: Dict[str, Any]) -> str:
    asked = counts["hits"] + counts["misses"]
    return f"{100 * counts['hits'] // asked} %" if asked else "no"


def in_bytes(count: float) -> str:
    """12.3 MiB"""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def in_time(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 5 min, 3 d 4 h"""
    whole = int(seconds)
    for unit, large, lesser, small in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= large:
            return f"{whole // large} {unit} {whole % large // small} {lesser}"
    return f"{whole} s"
