"""What a fault did to a program's bytes, in one word and a sentence, and the table of it (pure)."""

from __future__ import annotations

import enum
from typing import Any, Dict, Iterable, NamedTuple, Optional, Sequence

from bench.peers import OURS

LOUD_IS_RIGHT = ("disk-full", "outage")  # nothing can be stored or known: an error is the only true answer


class Verdict(enum.Enum):
    GOES_ON = "goes on"  # the program succeeded, and the bytes are right
    LATE = "late"  # the program succeeded while bytes were missing, which came afterwards: lost, had the peer died there
    LOUD = "loud"  # the program was told of an error; nobody was told that its bytes are whole
    LOSS = "SILENT LOSS"  # the program succeeded, and the bytes are missing or wrong
    STALE = "stale"  # the server's bytes are right, but a program on the same mount was shown others, without an error
    HANGS = "hangs"  # no end within the limit
    UNTESTED = "untested"  # the fault could not be brought about: this says nothing about the peer


class Outcome(NamedTuple):
    """``sentence`` says what the program said and what the server has; empty where there is nothing to add."""

    verdict: Verdict
    sentence: str = ""


class Cell(NamedTuple):
    fault: str
    peer: str
    outcome: Outcome
    seconds: float

    def as_json(self) -> Dict[str, Any]:
        verdict, sentence = self.outcome.verdict.value, self.outcome.sentence
        return {
            "fault": self.fault,
            "peer": self.peer,
            "verdict": verdict,
            "sentence": sentence,
            "seconds": round(self.seconds, 1),
        }


def outcome(
    told: Optional[str], lacking: Optional[str], late: str = "", *, where: str = "the server", more: str = ""
) -> Outcome:
    """``told`` is the error that the program met, ``lacking`` what is not right ``where`` the bytes should be, None: nothing;
    ``late`` is what to say where they came after the program had succeeded, and ``more`` is added to every sentence."""
    if told is not None:
        return Outcome(Verdict.LOUD, f"{told}; {where}: {lacking or 'all there'}{more}")
    if lacking is not None:
        return Outcome(Verdict.LOSS, f"The program was told that all is well; {where}: {lacking}{more}")
    if late:
        return Outcome(Verdict.LATE, f"{late}{more}")
    return Outcome(Verdict.GOES_ON)


def ours_are_right(cells: Sequence[Cell]) -> bool:
    """Whether sftpmount did what it promises wherever it was tried."""
    return all(
        cell.outcome.verdict is Verdict.GOES_ON
        or (cell.outcome.verdict is Verdict.LOUD and cell.fault in LOUD_IS_RIGHT)
        for cell in cells
        if cell.peer == OURS
    )


def table(cells: Sequence[Cell]) -> str:
    """Faults as rows, peers as columns, totals, and below them each sentence there is."""
    faults = list(dict.fromkeys(cell.fault for cell in cells))
    peers = list(dict.fromkeys(cell.peer for cell in cells))
    words = {(cell.fault, cell.peer): cell.outcome.verdict.value for cell in cells}
    rule = "-" * (20 + 13 * len(peers))
    rows = [_row(fault, [words.get((fault, peer), "-") for peer in peers]) for fault in faults]
    totals = []
    for verdict in Verdict:
        counts = [sum(words.get((fault, peer)) == verdict.value for fault in faults) for peer in peers]
        if any(counts):
            totals.append(_row(verdict.value, map(str, counts)))
    sentences = [
        f"{cell.fault}, {cell.peer}: {cell.outcome.verdict.value}. {cell.outcome.sentence}."
        for cell in cells
        if cell.outcome.sentence
    ]
    return "\n".join([_row("fault", peers), rule, *rows, rule, *totals, "", *sentences]).rstrip()


def _row(name: str, words: Iterable[str]) -> str:
    return f"{name:20}" + "".join(f"{word:13}" for word in words).rstrip()
