"""Where a symbolic link of the server leads on this machine (pure).

The kernel follows a link from where it stands on the mount, an absolute one from this machine's root. A server can so lead
whoever reads or writes through the mount to any file here; only what is left inside the mount is its own.
"""

from __future__ import annotations

from typing import Optional


def leads_out(path: bytes, target: bytes) -> bool:
    """True unless a link at ``path`` of the mount to ``target`` is sure to stay on the mount.

    Only leading ``..`` can be counted: what comes before a later one may be a link itself.
    """
    if target.startswith(b"/"):
        return True
    names = [name for name in target.split(b"/") if name not in (b"", b".")]
    ups = 0
    while ups < len(names) and names[ups] == b"..":
        ups += 1
    return ups > _depth(path) or b".." in names[ups:]


def as_relative(root: bytes, path: bytes, target: bytes) -> Optional[bytes]:
    """The relative target by which a link at ``path`` leads to what ``target``, absolute on the server, means there.

    None where that is not below ``root``, the mounted directory.
    """
    inside = root.rstrip(b"/") + b"/"
    if not (target + b"/").startswith(inside) or b".." in target.split(b"/"):
        return None
    return (b"../" * _depth(path) + target[len(inside) :].lstrip(b"/")).rstrip(b"/") or b"."


def _depth(path: bytes) -> int:
    """How many directories a link at ``path`` is below the mount's root."""
    return path.count(b"/") - 1
