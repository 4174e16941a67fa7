"""``[user@]host:[dir]`` and ``sftp://`` URLs: who, where, which directory (pure).

Nothing that passes here can become an option or a shell word of a program that is run for the connection
(``ssh -G``, a ProxyCommand): hosts and users that begin with "-" or hold a character that a shell reads are refused.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple, Optional
from urllib.parse import unquote, unquote_to_bytes

from .errors import UsageError


class Place(NamedTuple):
    """A directory on a server; ``directory`` b"" is the home directory, ``host`` has no brackets."""

    user: Optional[str]
    host: str
    port: Optional[int]
    directory: bytes


def parse_place(text: str) -> Place:
    """The place that ``text`` names, or UsageError.

    As with sshfs the first colon outside brackets ends the host, and the last "@" before it ends the user. A URL's
    path is absolute, but "/~/dir" is in the home directory, which is also what no path means.
    """
    url = re.fullmatch(r"(?:sftp|ssh)://([^/]*)(/.*)?", text, re.DOTALL | re.IGNORECASE)
    if url:
        return _of_url(url[1], url[2] or "")
    plain = re.fullmatch(r"((?:[^:\[]|\[[^\]]*\])*):(.*)", text, re.DOTALL)
    if not plain:
        example = f"{text}: for a host of that name" if re.fullmatch(r"[\w.@-]+", text) else "user@host:dir"
        raise UsageError(f"{text!r} is not of the form [user@]host:[dir]: write {example}.")
    user, at, host = plain[1].rpartition("@")
    directory = _home_relative(os.fsencode(plain[2]))
    return Place(check_user(user) if at else None, check_host(host), None, directory)


def _of_url(authority: str, path: str) -> Place:
    user, at, rest = authority.rpartition("@")
    server = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::([0-9]{0,5}))?", rest, re.ASCII)
    if not server:
        raise UsageError(f"the URL's host {rest!r} is not host or host:port: write sftp://user@host:22/dir.")
    port = int(server[2]) if server[2] else None
    if port is not None and not 1 <= port <= 65535:
        raise UsageError(f"the URL's port {port} is not one from 1 to 65535: write sftp://user@host:22/dir.")
    if ":" in user:
        raise UsageError(
            "a password in a URL is refused, since everyone could read it: write password_stdin."
        )
    if ";" in user:
        raise UsageError("parameters in a URL (;name=value) are not understood: write them with -o.")
    directory = unquote_to_bytes(os.fsencode(path))
    if directory == b"/~" or directory.startswith(b"/~/"):
        directory = directory[1:]
    return Place(
        check_user(unquote(user, errors="surrogateescape")) if at else None,
        check_host(server[1]),
        port,
        _home_relative(directory),
    )


def _home_relative(directory: bytes) -> bytes:
    """``directory`` without a leading "~/", which a shell would have expanded had it stood alone."""
    if b"\0" in directory:
        raise UsageError("the directory on the server holds a NUL byte: write it without.")
    if directory == b"~" or directory.startswith(b"~/"):
        return directory[2:].lstrip(b"/")
    return directory


def check_host(host: str) -> str:
    """``host`` without its brackets, or UsageError."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare:
        raise UsageError("the host is empty: write [user@]host:[dir], IPv6 addresses in brackets.")
    if bare.startswith("-") or not re.fullmatch(r"[\w.:+=-]+(%[\w.-]+)?", bare):
        raise UsageError(f"{bare!r} cannot be the name or address of a host: write [user@]host:[dir].")
    return bare


def check_user(user: str) -> str:
    """``user``, or UsageError."""
    if not user:
        raise UsageError("the user is empty: write user@host:[dir], or host:[dir] alone.")
    unsafe = user.startswith("-") or user.endswith("\\") or re.search(r"""[\s'"`$;&<>|(){}]""", user)
    if unsafe or not user.isprintable():
        raise UsageError(f"{user!r} cannot be a user's name: write user@host:[dir].")
    return user
