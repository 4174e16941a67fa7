"""``sftpmount status``, ``sync`` and ``umount``: what they print, and their exit statuses.

0 is: healthy; everything is stored; everything is stored and the process has ended. 1 is: it is not, and stderr says what.
The others are those of a mount: 2 usage, 3 no such mount, 130 interrupted.
"""

from __future__ import annotations

import getopt
import json
import os
import sys
import time
from typing import Any, Callable, Dict, List, Sequence, Set, Tuple

from .. import mountpoint
from ..daemon import INTERRUPTED
from ..errors import SftpMountError, UsageError
from ..logs import printable, show
from . import client
from .progress import Bar
from .text import as_lines

FORMAT = 1  # of --json: names keep their meaning while it stays
WATCH_S = 1.0
_CLEAR = "\x1b[H\x1b[J"


class Failed(SftpMountError):
    """It was not all stored."""


_USAGE = {
    "status": """usage: sftpmount status [mountpoint] [--json] [--watch]

How the mount is, or all of your mounts: connection, server, what is not stored yet, traffic, caches.
  --json    for programs; the schema is status.schema.json in the package sftpmount.control
  --watch   again every second, until interrupted or unmounted
Exit status: 0 healthy, 1 there is a problem (named first), 2 usage, 3 no such mount.
""",
    "sync": """usage: sftpmount sync mountpoint

Returns when all that was written so far is stored on the server. Ctrl-C leaves the mount as it is.
Exit status: 0 all is stored, 1 not (stderr says which files, and why), 2 usage, 3 no such mount, 130 interrupted.
""",
    "umount": """usage: sftpmount umount mountpoint

Stores all that is held, waiting for programs that write, then unmounts and returns when the mount's process has ended.
Ctrl-C before that leaves the mount as it is; so does a file that cannot be stored, or a program that uses the mount.
Exit status: 0 unmounted, all is stored, 1 not (stderr says why), 2 usage, 3 no such mount, 130 interrupted.
""",
}
COMMANDS = tuple(_USAGE)


def run(argv: Sequence[str], places: Sequence[str]) -> int:
    """Run the command ``argv[0]``; ``places`` are the directories of the control sockets. Raises SftpMountError."""
    command = argv[0]
    flags, operands = _understood(command, argv[1:])
    if flags & {"--help", "-h"}:
        print(_USAGE[command], end="")
        return 0
    if command == "sync":
        return _sync(operands[0], places)
    if command == "umount":
        return _umount(operands[0], places)
    try:
        return _status(operands, places, as_json="--json" in flags, watch="--watch" in flags)
    except BrokenPipeError:  # as by head(1), which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


def _understood(command: str, argv: Sequence[str]) -> Tuple[Set[str], List[str]]:
    long_flags = ["help", *(["json", "watch"] if command == "status" else [])]
    try:
        found, operands = getopt.gnu_getopt(list(argv), "h", long_flags)
    except getopt.GetoptError as error:
        raise UsageError(f"{error.msg!r}: sftpmount {command} --help shows what there is.") from None
    flags = {flag for flag, _ in found}
    if len(operands) > 1:
        raise UsageError(f"{operands[1]!r} is a word too many: name one mountpoint.")
    if command != "status" and not operands and not flags & {"--help", "-h"}:
        raise UsageError(f"no mountpoint: write sftpmount {command} mountpoint.")
    return flags, operands


# -- status --------------------------------------------------------------------------------------------------------------


def _status(operands: Sequence[str], places: Sequence[str], *, as_json: bool, watch: bool) -> int:
    def look() -> Tuple[List[Dict[str, Any]], List[client.Silent]]:
        if not operands:
            return client.mounts(places)
        found = client.find(operands[0], places)
        found.peer.close()
        return [found.state], []

    showing = _show_json if as_json else _show_text
    if not watch:
        return _told(look, showing)
    is_screen = sys.stdout.isatty() and not as_json
    try:
        while True:
            if is_screen:
                sys.stdout.write(_CLEAR)
            status = _told(look, _show_json_line if as_json else showing)
            if status == 3:
                return status
            time.sleep(WATCH_S)
    except KeyboardInterrupt:
        return 0


def _told(
    look: Callable[[], Tuple[List[Dict[str, Any]], List[client.Silent]]],
    showing: Callable[[List[Dict[str, Any]]], None],
) -> int:
    """Look and show; the exit status."""
    try:
        states, silent = look()
    except SftpMountError:
        if showing is not _show_text:
            showing([])
        raise
    showing(states)
    for error in silent:
        _say(str(error))
    if not states and not silent:
        _say("nothing is mounted, or by another user.")
        return 3
    return 0 if not silent and all(state["healthy"] for state in states) else 1


def _show_text(states: List[Dict[str, Any]]) -> None:
    for state in states:
        for line in as_lines(state):
            show(line)


def _show_json(states: List[Dict[str, Any]]) -> None:
    show(json.dumps({"format": FORMAT, "mounts": states}, indent=2))


def _show_json_line(states: List[Dict[str, Any]]) -> None:
    show(json.dumps({"format": FORMAT, "mounts": states}))


# -- sync and umount -----------------------------------------------------------------------------------------------------


def _sync(path: str, places: Sequence[str]) -> int:
    bar = Bar(sys.stderr)
    with client.find(path, places).peer as peer:
        try:
            for answer in peer.ask("sync"):
                if "progress" in answer:
                    bar.show(answer["progress"])
                else:
                    return _verdict(bar, answer["end"])
        except KeyboardInterrupt:
            _say("interrupted; the mount is as it was, and goes on storing.")
            return INTERRUPTED
        finally:
            bar.clear()
    raise Failed(_NO_WORD)


def _umount(path: str, places: Sequence[str]) -> int:
    bar = Bar(sys.stderr)
    found = client.find(path, places)
    was_mounted, is_ending = found.state["phase"] == "mounted", False
    with found.peer as peer:
        try:
            for answer in peer.ask("unmount"):
                if "progress" in answer:
                    bar.show(answer["progress"])
                elif "unmounted" in answer:
                    is_ending = True
                elif is_ending:
                    _await_end(peer)
                    return _verdict(bar, answer["end"])
                elif was_mounted:
                    return _refusal(bar, found.state["mountpoint"], answer["end"])
                else:
                    status = _verdict(bar, answer["end"])
                    _say(f"it is unmounted, and process {peer.pid} goes on with what is left.")
                    return status
        except KeyboardInterrupt:
            _say(
                "interrupted; the mount is as it was, and goes on storing."
                if was_mounted and not is_ending
                else f"interrupted; it is unmounted, and process {peer.pid} stores what is left."
            )
            return INTERRUPTED
        finally:
            bar.clear()
    raise Failed(_NO_WORD)


_NO_WORD = "the mount's process ended without a word on whether everything is stored: see its log."


def _await_end(peer: client.Peer) -> None:
    if not peer.await_end():
        raise Failed(f"it is unmounted and has stored what it could, but process {peer.pid} does not end.")


def _verdict(bar: Bar, end: Dict[str, Any]) -> int:
    bar.clear()
    for each in end["unstored"]:
        _say(f"not stored: {each}")
    if end["unstored"]:
        return 1
    if sys.stderr.isatty():
        _say("everything is stored.")
    return 0


def _refusal(bar: Bar, path: str, end: Dict[str, Any]) -> int:
    """The mount stays: say why."""
    if not end["unstored"]:
        users = ", ".join(mountpoint.users_of(path))
        bar.clear()
        _say(f"{path} stays mounted: {end['why']}" + (f"; it is in use by {users}." if users else "."))
        return 1
    status = _verdict(bar, end)
    _say(f"{path} stays mounted, so that nothing is lost yet; fusermount3 -uz {path} gives it up.")
    return status


def _say(text: str) -> None:
    print(f"sftpmount: {printable(text)}", file=sys.stderr, flush=True)
