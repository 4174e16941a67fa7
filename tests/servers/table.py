"""SERVERS.md, from the data of the tests."""

from __future__ import annotations

from typing import Tuple

from interop import table as interop
from servers.cases import ALONE, GUIDES, REFUSED, Accepted, Refused
from servers.door_table import load, section, table

_HEAD = """\
# Servers that are mounted, and servers that are refused

What `tests/servers` shows with real servers, the real command and real mounts; `contrib/servers-table > SERVERS.md` writes
this file from the data of those tests. "Agreed" is what a connection uses, on a processor that has AES.

## Mounted: what the hardening guides make

Each server is configured as its guide says, mounted under the profile named, and compared after a file was stored.
"""

_ALONE = """
## Mounted: each algorithm alone

Each server has this one and no other of its kind. NIST curves are offered only where `KexAlgorithms` or known_hosts names them.
"""

_REFUSED = """
## Refused

Nothing is mounted, no key or password is sent, and one sentence says why; these are words of it. README.md explains the exit
status.
"""

_TITLES = {
    "Weak algorithms": "What the server offers",
    "Host keys": "The server's host key",
    "No strict key exchange, and a man in the middle": "Between client and server",
}


def document() -> str:
    parts = [_HEAD, table(("Guide", "Server", "`security=`", "Agreed"), map(_guide, GUIDES))]
    parts.append(_ALONE)
    for kind, cases in ALONE.items():
        parts.append(table((kind, "Server", "`security=`"), map(_alone, cases)))
    parts.append(_REFUSED)
    for title, refused in REFUSED.items():
        parts.append(table((_TITLES[title], "Server", "`security=`", "Exit", "Said"), map(_refused, refused)))
    parts.append(section(load()))
    parts.append(interop.section(interop.load()))
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _guide(case: Accepted) -> Tuple[str, ...]:
    name = f"{case.name} ({case.note})" if case.note else case.name
    return name, case.server, case.profile, ", ".join(case.agreed)


def _alone(case: Accepted) -> Tuple[str, ...]:
    return case.name, case.server, case.profile


def _refused(case: Refused) -> Tuple[str, ...]:
    profiles = ", ".join(case.profiles)
    return case.name, case.server, profiles, str(case.status), " ... ".join(case.says)
