"""For servers that know one place for authorized keys, ~/.ssh, and want all directories above it to be root's or the user's own.

Each of their processes gets a mount namespace in which the top one (/root, or /home) is the server's. Files of the tests that
lie below that directory are hidden from it.
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import List

from support.namespace import DROP_COPIES
from support.process import program


def in_own_home(directory: Path, public_key: Path) -> List[str]:
    """Make in ``directory`` a home where ``public_key`` may log in; returns the words before a command that is to see it."""
    top, *below = Path(pwd.getpwuid(os.geteuid()).pw_dir).parts[1:]
    home = directory.joinpath("top", *below)
    (home / ".ssh").mkdir(mode=0o700, parents=True)
    for each in (home, *home.parents[: len(below)]):
        each.chmod(0o700)
    authorized = home / ".ssh" / "authorized_keys"
    authorized.write_bytes(public_key.read_bytes())
    authorized.chmod(0o600)
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    script = f'{DROP_COPIES}mount --bind "$1" "$2" && shift 2 && exec "$@"'
    return [
        *[program("unshare", "util-linux"), "--mount", *as_root, "sh", "-c", script, "sh"],
        *[str(directory / "top"), f"/{top}"],
    ]
