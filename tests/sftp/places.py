"""Where the contract is tested: a directory of the fake server, or of a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Optional

from sftp.fake_server import FakeServer
from sftpmount.errors import AuthenticationError
from sftpmount.options import SshOptions
from sftpmount.sftp.lane import ByteConnection
from sftpmount.ssh.connect import Dialer
from support.sshd import Server


class Place:
    """A server and a fresh directory on it, ``root``."""

    def __init__(
        self, kind: str, dial: Callable[[], ByteConnection], root: bytes, fake: Optional[FakeServer] = None
    ) -> None:
        self.kind = kind
        self.dial = dial
        self.root = root
        self.fake = fake

    def __truediv__(self, name: bytes) -> bytes:
        return self.root + b"/" + name

    def content(self, name: bytes) -> bytes:
        """What the server has under a name, seen from its own side."""
        if self.fake is not None:
            return self.fake.content(self / name)
        return Path((self / name).decode()).read_bytes()

    def put(self, name: bytes, data: bytes) -> None:
        """Another client stores a file, in place where it is there."""
        if self.fake is None:
            Path((self / name).decode()).write_bytes(data)
        elif self.fake.has(self / name):
            inode = self.fake.at(self / name)
            inode.data[:] = data
            inode.disk = data
            inode.mtime = int(self.fake.now())
        else:
            self.fake.make(self / name, data)


def at_fake(server: FakeServer) -> Place:
    server.make_dir(b"/home/place")
    return Place("fake", server.dial, b"/home/place", server)


def at_server(server: Server, directory: Path) -> Place:
    options = SshOptions(
        "127.0.0.1",
        user=server.user,
        port=server.port,
        config_file="none",
        identity_files=(str(server.user_key),),
        known_hosts_files=(str(server.known_hosts),),
        connect_timeout_s=20.0,
        ssh_options=(("globalknownhostsfile", "none"), ("identityagent", "none")),
    )
    return Place("real", Dialer(options, _Nobody()), str(directory).encode())


class _Nobody:
    """A prompt where nobody sits."""

    def secret(self, text: str) -> str:
        raise AuthenticationError("there is nobody to ask")

    def notice(self, text: str) -> None:
        pass
