"""Where the control sockets of a user's mounts are.

A directory is only used where it belongs to this user and nobody else may enter it. It is opened once, and what is in it
is reached through that descriptor: what is put in its place later does not matter, and the 108 bytes of a socket's
address always suffice.
"""

from __future__ import annotations

import os
import stat
from typing import Iterator, List, Mapping, Sequence, Tuple

SUFFIX = ".sock"


def places(environment: Mapping[str, str], uid: int) -> Tuple[str, ...]:
    """The directories in which mounts of ``uid`` put their sockets, the first that can be used; all are looked into.

    They are several since a session's directory comes and goes, and mounts are made without a session too.
    """
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    usual = "/run" if uid == 0 else f"/run/user/{uid}"
    found = [f"{base}/sftpmount" for base in (runtime, usual) if os.path.isabs(base)]
    return tuple(dict.fromkeys([*found, f"/tmp/sftpmount-{uid}"]))


def open_private(path: str, *, create: bool = False) -> int:
    """A descriptor of the directory ``path``; OSError where it is absent, somebody else's, or open to others."""
    if create:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        os.close(descriptor)
        raise PermissionError(f"{path} belongs to another user, or others may enter it")
    return descriptor


def opened(candidates: Sequence[str]) -> Iterator[int]:
    """A descriptor of each directory that is there and to be trusted; closed when the next one is asked for."""
    for path in candidates:
        try:
            descriptor = open_private(path)
        except OSError:
            continue
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def sockets(descriptor: int) -> List[str]:
    """The addresses of the sockets in an open directory, of mounts that have ended without removing theirs too."""
    names = sorted(name for name in os.listdir(descriptor) if name.endswith(SUFFIX))
    return [address(descriptor, name) for name in names]


def address(descriptor: int, name: str) -> str:
    """Something in an open directory, as a path."""
    return f"/proc/self/fd/{descriptor}/{name}"
