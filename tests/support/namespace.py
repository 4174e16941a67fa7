"""A mount namespace for a test: what is mounted in it is not on the machine, and goes when it ends."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import List

from support.process import Missing, end_with_input, program

# For sh, in a mount namespace of its own. root's alone can be dropped; others' stay until the namespace ends.
DROP_COPIES = """# Copies of mounts that others have here would keep those from ending.
awk '/ - fuse[.]/ { print $5 }' /proc/self/mountinfo | while read -r copy; do umount -l -i "$copy"; done || true
"""


class Namespace:
    """A mount namespace in which ``script`` has run, for ``sh -e``; it lasts until ``close``.

    Who is not root gets it in a user namespace in which he is. ``pid`` is the process that holds it, ``root`` the path at
    which others see its files. Raises Missing where the machine refuses it, or a command of the script fails.
    """

    def __init__(self, script: str = "") -> None:
        is_root = os.geteuid() == 0
        self._enter = ["--mount", *([] if is_root else ["--user", "--preserve-credentials"])]
        self._holder = subprocess.Popen(
            [
                *[program("unshare", "util-linux"), "--mount"],
                *([] if is_root else ["--user", "--map-root-user"]),
                *["sh", "-e", "-c", f"{script}\necho ready\nexec cat"],
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._holder.pid
        self.root = Path(f"/proc/{self.pid}/root")
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            self.close()
            raise Missing(
                "The tests need root, or user namespaces: sysctl kernel.unprivileged_userns_clone=1."
            )

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def entering(self, *words: str) -> List[str]:
        """The command line that runs ``words`` in the namespace."""
        return [program("nsenter", "util-linux"), f"--target={self.pid}", *self._enter, *words]

    def close(self) -> None:
        """End the namespace; it goes when the last process that has entered it has ended, too."""
        end_with_input(self._holder)
