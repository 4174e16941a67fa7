"""What sftpmount, sshfs and rclone mount make of the servers of ``cases``: contrib/bench/doors looks, this shows it.

``RESULTS`` holds what was seen: versions, and for each door what each peer did and said.
"""

from __future__ import annotations

import enum
import json
import textwrap
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Sequence, Tuple, Union

from servers.cases import ALONE, GUIDES, REFUSED, Accepted, Refused

RESULTS = Path(__file__).with_name("doors.json")
OURS, SSHFS, RCLONE, RCLONE_BARE = "sftpmount", "sshfs", "rclone mount", "rclone mount as it comes"
COLUMNS = (OURS, SSHFS, RCLONE, RCLONE_BARE)
BEGIN, END = "<!-- contrib/bench/doors --update writes from here -->", "<!-- to here -->"

Case = Union[Accepted, Refused]
Results = Mapping[str, Any]


class Verdict(enum.Enum):
    MOUNTS = "mounts"  # and the file that was stored is on the server
    WARNS = "mounts, warns"  # the same, and something is on standard error
    STORES_NOTHING = "mounts, stores nothing"  # the file did not arrive
    REFUSES = "refuses"  # it ends with an error, and nothing is mounted
    HANGS = "hangs"  # neither, within the limit
    NO_CASE = (
        "no such case"  # it has no option for what the case is about, or nothing to be taken out on the way
    )


class Door(NamedTuple):
    """The server of a case, and the kind of servers that it is counted under."""

    kind: str
    case: Case

    @property
    def name(self) -> str:
        """Which no other has."""
        profile = self.case.profile if isinstance(self.case, Accepted) else self.case.profiles[0]
        return f"{self.kind}: {self.case.name}" + ("" if profile == "hardened" else f" (security={profile})")


_GUIDE, _ALONE = "Guide", "Alone"
_REFUSED = {
    "Weak algorithms": "Weak",
    "Host keys": "Host key",
    "No strict key exchange, and a man in the middle": "On the way",
}
_KINDS = {
    _GUIDE: "As the guides make them",
    _ALONE: "Each accepted algorithm alone",
    "Weak": "Weak algorithms",
    "Host key": "Weak, unknown and false host keys",
    "On the way": "No strict key exchange; a man in the middle",
}
DOORS: Tuple[Door, ...] = (
    *(Door(_GUIDE, case) for case in GUIDES),
    *(Door(_ALONE, case) for cases in ALONE.values() for case in cases),
    *(Door(_REFUSED[title], case) for title, cases in REFUSED.items() for case in cases),
)


def load() -> Dict[str, Any]:
    """What was seen, as the repository has it."""
    results: Dict[str, Any] = json.loads(RESULTS.read_text())
    return results


def text(results: Results) -> str:
    """The numbers, and every door that was looked at."""
    return f"{_numbers(results)}\n{_doors(results, _seen(results))}"


def readme_with(readme: str, results: Results) -> str:
    """README.md with what stands between the two marks made anew."""
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    parting = [door for door in _seen(results) if door.kind != _ALONE and _part(results["rows"][door.name])]
    block = _README.format(
        setting=_setting(results),
        numbers=_numbers(results),
        remarks=_filled(_REMARKS),
        doors=_doors(results, parting),
    )
    return f"{before}{BEGIN}\n{block}{END}{after}"


def section(results: Results) -> str:
    """The part of SERVERS.md that has every door."""
    said = [
        f"- {door.name}; {peer}: {did['verdict']}. `{did['said']}`\n"
        for door in _seen(results)
        for peer, did in results["rows"][door.name].items()
        if did["said"] and did["verdict"] != Verdict.REFUSES.value
    ]
    doors = _doors(results, _seen(results))
    return _SECTION.format(setting=_setting(results), doors=doors, said="".join(said))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


_SECTION = """
## Beside sshfs and rclone mount

{setting}

{doors}
What was said by those that mounted, but not in silence:

{said}"""

_README = """\
{setting}

{numbers}
{remarks}

{doors}"""

_SETTING = """
Who connects to which server, as `contrib/bench/doors` finds it: sftpmount {sftpmount}, sshfs {sshfs} with OpenSSH {ssh} and
rclone {rclone}, each with its own defaults and a known_hosts file to go by (sshfs with `StrictHostKeyChecking=yes`, sftpmount
under the profile that the server's row names); and rclone as it comes, which takes any host key until it is given a
`known_hosts_file`. "No such case": that rclone has neither a list of revoked keys nor jump hosts, and says nothing of strict key
exchange that could be taken out. The servers of ssh-audit's newest guides lack sntrup761 here, with which OpenSSH would get in,
and Debian 12's tinysshd has no strict key exchange, which newer ones have.
"""
_REMARKS = """
Whoever mounts one of the last three kinds is not always wrong: plain hmac-sha2, groups and RSA keys of 2048 bits and classical
key exchange are refused by default, or under `security=pq`, but not broken. Where the three part (SERVERS.md has all):
"""


def _setting(results: Results) -> str:
    return _filled(_SETTING.format(**results["versions"]))


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 126, break_on_hyphens=False, break_long_words=False)


def _seen(results: Results) -> List[Door]:
    return [door for door in DOORS if door.name in results["rows"]]


def _part(row: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether the three do not do the same. rclone as it comes aside: that it takes any host key is said once."""
    return len({row[peer]["verdict"] for peer in (OURS, SSHFS, RCLONE) if peer in row}) > 1


def _numbers(results: Results) -> str:
    rows = []
    for kind, title in _KINDS.items():
        doors = [door for door in _seen(results) if door.kind == kind]
        rows.append((f"{title} ({len(doors)})", *(_counts(results, doors, peer) for peer in COLUMNS)))
    return table(("Servers", *COLUMNS), rows)


def _counts(results: Results, doors: Sequence[Door], peer: str) -> str:
    verdicts = [_verdict(results, door, peer) for door in doors]
    counts = ((verdict.value, verdicts.count(verdict.value)) for verdict in Verdict)
    return "; ".join(f"{verdict}: {count}" for verdict, count in counts if count)


def _doors(results: Results, doors: Iterable[Door]) -> str:
    rows = [(door.name, *(_verdict(results, door, peer) for peer in COLUMNS)) for door in doors]
    return table(("Server", *COLUMNS), rows)


def _verdict(results: Results, door: Door, peer: str) -> str:
    """Empty where that peer was left out."""
    verdict: str = results["rows"][door.name].get(peer, {"verdict": ""})["verdict"]
    return verdict
