"""What --help, -o help and --version print, from the table of options (pure)."""

from __future__ import annotations

import textwrap

from . import __version__
from .options import GROUPS, CommandLine

_COLUMNS = 80

_BEGINS = r"""usage: sftpmount [user@]host:[dir] mountpoint [options]    also sftp://host/dir
       sftpmount audit [user@]host:[dir] [options] [--json]   would it be fit?
  -o NAME[=VALUE],...  the options below; explained by -o help and sftpmount(1)
  -p PORT, -F FILE     Port=PORT, ssh_config=FILE
  -f, -v, -d           stay in the foreground; log more; both, to stderr
  -h, -V               this text; the version
"""
_ENDS = """Other options of sshfs, ssh_config and mount(8) are taken where they make sense.
Exit status: 0 mounted, 1 unexpected, or data could not be stored, 2 usage,
  3 mountpoint, 4 FUSE, 5 unreachable, 6 host key, 7 algorithms, 8 login,
  9 remote directory, 130 interrupted. To unmount: fusermount3 -u mountpoint
"""


def answer(line: CommandLine) -> str:
    """The text that a command line asks for instead of a mount; "" where it asks for none."""
    if line.help:
        return overview()
    if line.version:
        return f"sftpmount {__version__}\n"
    if ("help", None) in line.words:
        return explanations()
    return ""


def overview() -> str:
    """All that one needs to begin, on one screen of 80 columns and 24 lines."""
    lines = []
    for title, group in GROUPS:
        names = ", ".join(option.name for option in group)
        lines += textwrap.wrap(
            names, _COLUMNS, initial_indent=f"{title}: ", subsequent_indent="  ", break_on_hyphens=False
        )
    return _BEGINS + "\n".join(lines) + "\n" + _ENDS


def explanations() -> str:
    """A line for each option, in groups."""
    lines = []
    for title, group in GROUPS:
        lines.append(f"{title}:")
        for option in group:
            name = f"{option.name}={option.value}" if option.value else option.name
            lines.append(f"  {name:<30} {option.help}")
    return "\n".join(lines) + "\n"
