"""What was found on the servers, as the repository has it, and the part of SERVERS.md that shows it.

``RESULTS`` holds the versions, and for each server what findings.py finds. contrib/interop --update writes both.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any, Dict, List, Mapping

from contrib.lib.recipes import RECIPES
from interop.servers import SERVERS
from servers.door_table import table

RESULTS = Path(__file__).with_name("findings.json")
_SAME = {"yes", "as a local disk"}

# Recipes that a server cannot serve: the tool fails, and why.
UNFIT: Dict[str, Dict[str, str]] = {
    "ProFTPD mod_sftp": {
        "rsnapshot": "makes hard links of symbolic links",
        "rsync": "finds the targets of symbolic links changed when it verifies",
    },
    "rclone serve sftp": {
        "rdiff-backup": "asks for the space that is left",
        "rsnapshot": "makes symbolic and hard links",
        "bup": "changes its index in place",
        "rsync": "makes symbolic and hard links",
        "tar": "changes the file of its state in place",
        "dar": "cuts the file that it writes, and takes no notice that it cannot",
    },
}

_SECTION = """
## What servers lack, and what the mount does then

{setting}

{offers}
On a mount: {same} of {all} findings are "as a local disk". The others:

{lacks}
- Without fsync@openssh.com the mount says when it starts that stored means received by the server, not written to its disk, and
  it closes a file to have it committed; without lsetstat@openssh.com the times of symbolic links stay as they are (ENOSYS,
  which rsync and cp pass over).
- SYMLINK's arguments come in either order. The mount asks first, with two requests that can make nothing.
- Where LSTAT shows what a link leads to, READLINK is sent with it and the link is shown. A target that READLINK makes absolute
  is shown so: `transform_symlinks` makes those within the mount relative again. Such a server would also rename what a link leads
  to: a link is made anew under the new name and the old one removed, one that is to be replaced is removed first, and a hard
  link of one is refused (EPERM).
- Where a server says OK and makes no hard link, or leaves a file's size as it was, the program gets the error.
- Where OPEN for writing empties the file, one that holds something is not opened (ENOTSUP, the file is kept): backup tools that
  write new files and rename them work, whatever appends does not. This is tried once, with a file of the mount's own, where the
  server has no fsync@openssh.com.
- Where EXCL is ignored, the mount asks whether the name is taken before it makes a file. Two clients that make the same lock
  file in the same moment may both get it all the same: they must not share such a server. A program that syncs a file there and
  writes on hears of a failure to store it when it closes the file, not before.

Every recipe of RECIPES.md, {recipes} of them, makes two backups on a mount of each of these servers, verifies and restores. These
do not, and the tool says so:

{unfit}"""

_SETTING = """
Seven servers, each real, asked by `contrib/interop`, which writes this part: {versions}. Each question is put to the protocol
itself, and done on a mount by programs that look at the server's own side afterwards. Nothing goes by a server's name: what
servers read differently is found out by asking, before anything is changed.
"""


def load() -> Dict[str, Any]:
    """What was found, as the repository has it."""
    results: Dict[str, Any] = json.loads(RESULTS.read_text())
    return results


def section(results: Mapping[str, Any]) -> str:
    """The part of SERVERS.md."""
    servers: Mapping[str, Mapping[str, Mapping[str, str]]] = results["servers"]
    done = [found for server in servers.values() for found in server["mount"].values()]
    versions = "; ".join(f"{name} ({results['versions'][name]})" for name in SERVERS)
    setting = " ".join(_SETTING.format(versions=versions).split())
    return _SECTION.format(
        setting=textwrap.fill(setting, 126, break_on_hyphens=False, break_long_words=False),
        offers=_matrix(servers, "server", only_parting=False),
        same=sum(found in _SAME for found in done),
        all=len(done),
        lacks=_matrix(servers, "mount", only_parting=True),
        recipes=len(RECIPES),
        unfit=table(
            ["server", "recipe", "because it"],
            [[server, name, why] for server, names in UNFIT.items() for name, why in names.items()],
        ),
    )


def _matrix(servers: Mapping[str, Mapping[str, Mapping[str, str]]], side: str, *, only_parting: bool) -> str:
    rows: List[List[str]] = []
    for name in next(iter(servers.values()))[side]:
        row = [server[side][name] for server in servers.values()]
        if not only_parting or not _SAME.issuperset(row):
            rows.append([name, *("" if only_parting and found in _SAME else found for found in row)])
    return table(["", *servers], rows)
