"""``mount-helper``: the command as mount(8), systemd and autofs call a helper ``mount.TYPE`` (pure).

mount(8), section "External helpers": ``PLACE MOUNTPOINT [-sfnv] [-N namespace] [-o options] [-t type.subtype]``. What the
flags mean there is not what they mean to sftpmount: -f is to do everything but the mount, and -s, which autofs always says,
is to leave out options that are not known.
"""

from __future__ import annotations

import getopt
from dataclasses import replace
from typing import List, NamedTuple, Sequence, Tuple

from . import options
from .errors import UsageError

# mount(8), "Exit status"
_INCORRECT_CALL, _INTERRUPTED, _MOUNT_FAILED = 1, 8, 32
_STATUS = {0: 0, UsageError.exit_status: _INCORRECT_CALL, 130: _INTERRUPTED}


class Call(NamedTuple):
    """What is asked for. ``left_out`` are the names of options that are not known."""

    line: options.CommandLine
    fake: bool
    left_out: Tuple[str, ...]


def understand(argv: Sequence[str]) -> Call:
    """The call behind the helper's arguments ``argv``, or UsageError."""
    try:
        found, operands = getopt.gnu_getopt(list(argv), "sfnvrwhVN:t:o:")
    except getopt.GetoptError as error:
        raise UsageError(f"{error.msg!r}: this is for mount(8) to call, see mount.sftpmount(8).") from None
    flags = {flag for flag, _ in found}
    if "-N" in flags:
        raise UsageError("mount -N is not supported: run nsenter --mount=NAMESPACE sftpmount ... instead.")
    handed_on: List[str] = [flag for flag in ("-h", "-r", "-V", "-w") if flag in flags]
    for flag, value in found:
        if flag == "-o":
            handed_on += [flag, value]
    line = options.split([*handed_on, "--", *operands])
    left_out = tuple(name for name, _ in line.words if "-s" in flags and not options.is_known(name))
    words = tuple(word for word in line.words if word[0] not in left_out)
    return Call(replace(line, words=words), "-f" in flags, left_out)


def exit_status(status: int) -> int:
    """What mount(8) expects in place of the command's own exit status."""
    return _STATUS.get(status, _MOUNT_FAILED)
