"""The local directory: what must be true of it before a mount, and how a mount is taken away again."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import stat
import subprocess
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

from .errors import MountpointError
from .logs import printable

log = logging.getLogger(__name__)

UNMOUNT_TIMEOUT_S = 10.0
USERS_NAMED_MAX = 5
LINKS_MAX = 40  # as the kernel follows


class Mounted(NamedTuple):
    """The topmost mount on a directory. The kernel gives ``mount_id`` to another as soon as the mount is gone, ``device`` when
    the last copy of it is."""

    mount_id: int
    kind: str  # "ext4", "fuse.sftpmount"
    source: str
    device: str = ""  # "0:53", the same for all mounts of one file system
    uid: Optional[int] = None  # whose a FUSE mount is


def mounts(table: str = "/proc/self/mountinfo") -> Dict[str, Mounted]:
    """The topmost mount on each mountpoint. Touches only the table, so it never hangs."""
    return dict(_every_mount(table))


def _every_mount(table: str = "/proc/self/mountinfo") -> Iterator[Tuple[str, Mounted]]:
    """Mountpoints and what is mounted there; of several mounts on one the topmost comes last."""
    with open(table, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            # proc(5): id parent major:minor root mountpoint options... - type source options
            before, _, after = line.rstrip("\n").partition(" - ")
            fields, (kind, source, *options) = before.split(" "), after.split(" ")
            owner = re.search(r"(?:^|,)user_id=([0-9]+)", options[0]) if options else None
            yield (
                _unescaped(fields[4]),
                Mounted(
                    int(fields[0]), kind, _unescaped(source), fields[2], int(owner[1]) if owner else None
                ),
            )


def mounted_at(path: str, table: str = "/proc/self/mountinfo") -> Optional[Mounted]:
    """What is mounted on ``path`` (absolute, without symlinks), or None. Touches only the table, so it never hangs."""
    return mounts(table).get(path)


def located(path: str) -> str:
    """The mountpoint that a person means by ``path``: absolute, without symlinks, found without asking what is mounted there."""
    known = mounts()
    path = os.path.abspath(path)
    for _ in range(LINKS_MAX):
        if path in known:
            break
        path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        if path in known:
            break
        try:
            path = os.path.normpath(os.path.join(os.path.dirname(path), os.readlink(path)))
        except OSError:
            break
    return path


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)


def check(path: str, *, nonempty: bool) -> int:
    """The st_dev of the directory that a mount on ``path`` will hide, or MountpointError with what is wrong with it."""
    shown = printable(path)
    try:
        status = os.stat(path)
        present = mounted_at(path)
        automount = present is not None and present.kind == "autofs"
        if not stat.S_ISDIR(status.st_mode):
            raise MountpointError(f"{shown} is not a directory: name a directory to mount on.")
        if present and not automount and (not nonempty or present.kind == "fuse.sftpmount"):
            by = f"{printable(present.source)} ({printable(present.kind)})"
            remedy = "fusermount3 -u" if present.kind.startswith("fuse") else "umount"
            raise MountpointError(f"{shown} is in use as the mountpoint of {by}: run {remedy} {shown} first.")
        if not automount and not _may_mount_on(path, status):
            raise MountpointError(
                f"{shown} is not yours to mount on: name a directory that you own and may write to."
            )
        # To look into an automount point that waits for this very mount would wait for ever; it is empty anyway.
        if not automount and not nonempty and os.listdir(path):
            raise MountpointError(
                f"{shown} is not empty, and may hold a backup made while nothing was mounted there: "
                "move away what it holds, or write -o nonempty to hide it."
            )
    except OSError as error:
        raise MountpointError(_explained(error, shown)) from None
    return status.st_dev


def _may_mount_on(path: str, status: os.stat_result) -> bool:
    """What fusermount asks of an ordinary user's mountpoint."""
    uid = os.geteuid()
    return uid == 0 or (
        os.access(path, os.W_OK) and (status.st_uid == uid or not status.st_mode & stat.S_ISVTX)
    )


def _explained(error: OSError, shown: str) -> str:
    if error.errno == errno.ENOENT:
        return f"{shown} does not exist: create it with mkdir {shown}."
    if error.errno == errno.ENOTCONN:
        return (
            f"{shown} is left over from a mount whose process has ended: run fusermount3 -uz {shown} first."
        )
    if error.errno == errno.ENOTDIR:
        return f"{shown} is not a directory: name a directory to mount on."
    return f"{shown} cannot be used ({error.strerror}): name a directory that you own and may write to."


def users_of(path: str) -> List[str]:
    """The programs that hold something of the mount on ``path`` open, as "name (pid)": those that this user may look at."""
    found = []
    for process in _processes():
        try:
            links = [f"{process}/cwd", *(f"{process}/fd/{number}" for number in os.listdir(f"{process}/fd"))]
            held = [os.readlink(link) for link in links]
            if any(each == path or each.startswith(path + "/") for each in held):
                with open(f"{process}/comm", encoding="utf-8", errors="surrogateescape") as file:
                    found.append(f"{printable(file.read().strip())} ({os.path.basename(process)})")
        except OSError:
            pass  # it has ended, or is another user's
        if len(found) == USERS_NAMED_MAX:
            break
    return found


def is_stale(path: str) -> bool:
    """Whether ``path`` is a FUSE mount that has lost its process. Waits for one that lives."""
    try:
        os.statvfs(path)  # what os.stat asks for the kernel may know, for a moment
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


class OwnMount:
    """What is mounted on ``path`` when this is made, and how it ends: it is taken away here, but may live on for programs that
    have something of it open, and in other mount namespaces.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._mounted = mounted_at(path)
        self._was_idle = False  # when it was taken away

    @property
    def device(self) -> Optional[str]:
        """As ``Mounted`` has it; None where it was gone again at once."""
        return None if self._mounted is None else self._mounted.device

    def is_mounted(self) -> bool:
        """Whether it is there still, if only under another one. Of this process's mount namespace alone."""
        return any(each == self._mounted for _, each in _every_mount())

    def unmount(self) -> bool:
        """Take it away, if it is there and no other lies over it. A failure is logged.

        Returns True where programs still use it: it is then out of sight, and ends with the last of them.
        """
        if self.unmount_unless_busy() and mounted_at(self._path) == self._mounted:
            if _fusermount("-uz", self._path) and self.is_mounted():
                log.error("%s could not be unmounted: run fusermount3 -uz %s", self._path, self._path)
        if self._mounted is None or self._was_idle or self.is_mounted():
            return False
        return _is_in_use(self._mounted)

    def unmount_unless_busy(self) -> str:
        """Take it away unless programs use it; returns "" or why it is still there."""
        present = mounted_at(self._path)
        if not self.is_mounted():
            return ""
        if present is not None and present != self._mounted:
            return f"another mount, of {present.source}, lies over it"
        why = _fusermount("-u", self._path)
        self._was_idle = not why
        return why


def _is_in_use(mounted: Mounted) -> bool:
    """Whether programs use it where it was mounted, now that it is out of sight.

    It has not ended, so somebody uses it: where no copy is seen, programs here. That need not be an open file (a mapping or a
    working directory will do), and is the safe answer where the copy is in a namespace that this user may not look at.
    """
    return _is_held(mounted) or not _has_copy(mounted)


def _is_held(mounted: Mounted) -> bool:
    """Whether a program has a file of it open, other than through a copy, which has a number of its own."""
    mark = f"mnt_id:\t{mounted.mount_id}\n"
    for process in _processes():
        try:
            numbers = os.listdir(f"{process}/fdinfo")
        except OSError:
            continue  # it has ended, or is another user's
        for number in numbers:
            try:
                with open(f"{process}/fdinfo/{number}", encoding="ascii", errors="replace") as lines:
                    if mark in lines and not _is_anothers(mounted.mount_id, process):
                        return True
            except OSError:
                pass  # it was closed
    return False


def _is_anothers(mount_id: int, process: str) -> bool:
    """Whether the number of a mount that is out of sight was given to one that the process sees."""
    return any(each.mount_id == mount_id for _, each in _every_mount(f"{process}/mountinfo"))


def _has_copy(mounted: Mounted) -> bool:
    """Whether a mount namespace that this user may look at has the file system, too."""
    seen = set()
    for process in _processes():
        try:
            namespace = os.readlink(f"{process}/ns/mnt")
            if namespace not in seen:
                seen.add(namespace)
                if any(each.device == mounted.device for _, each in _every_mount(f"{process}/mountinfo")):
                    return True
        except OSError:
            pass  # it has ended, or is another user's
    return False


def _processes() -> Iterator[str]:
    return (f"/proc/{name}" for name in os.listdir("/proc") if name.isdigit())


def _fusermount(flag: str, path: str) -> str:
    """Returns "", or why it did not succeed."""
    program = shutil.which("fusermount3") or shutil.which("fusermount") or "fusermount3"
    try:
        run = subprocess.run(
            [program, flag, "--", path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=UNMOUNT_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.error("%s %s: %s", program, flag, error)
        return str(error)
    if run.returncode == 0:
        return ""
    said = os.fsdecode(run.stderr.strip()) or f"exit status {run.returncode}"
    log.debug("%s %s: %s", program, flag, said)
    return said
