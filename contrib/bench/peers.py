"""What is compared, programs that mount a directory of one server, and where: a throw-away sshd, or a server of the user's own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Protocol, Tuple, Type

from support.mount import Mount, SshfsMount
from support.process import program
from support.relay import Relay
from support.sshd import Server, Sshd

OURS = "sftpmount"
_LIFE_S = 4 * 3600.0


class RcloneMount(Mount):
    """The same with rclone, which by default keeps what it writes nowhere; this mode is the least that backup tools need."""

    fstype = "fuse.rclone"

    def command(self, sshd: Server, port: int, directory: str) -> List[str]:
        host = {"host": "127.0.0.1", "port": port, "user": sshd.user}
        files = {"key-file": sshd.user_key, "known-hosts-file": sshd.known_hosts}
        return self.rclone(directory, {**host, **files})

    def rclone(self, directory: str, settings: Dict[str, object]) -> List[str]:
        """The command line, with ``settings`` of rclone's sftp backend."""
        return [
            *[program("rclone", "rclone"), "mount", f":sftp:{directory}", str(self.path)],
            *["--config", "", "--cache-dir", f"{self.path}.cache", "--vfs-cache-mode", "writes"],
            *(word for name, value in settings.items() for word in (f"--sftp-{name}", str(value))),
        ]


class Peer(NamedTuple):
    """A mount of the throw-away sshd, one of a user's server, and options for both."""

    here: Type[Mount]
    elsewhere: Type[Mount]
    options: Tuple[str, ...] = ()


class Line(NamedTuple):
    """The network between mount and server; without one, loopback as it is. The rate may be unknown or unlimited: None."""

    rtt_ms: float
    rate_bps: Optional[float]


class Venue(Protocol):
    """A directory of a server. ``destination`` and ``ssh_options`` are what OpenSSH's programs need to get there, and
    ``directory`` is its path there; ``is_here`` where the server is of this machine and its page cache in our hands."""

    destination: str
    ssh_options: List[str]
    directory: str
    is_here: bool

    def mount(self, peer: str, name: str) -> Mount:
        """A fresh mount of the subdirectory ``name``, with nothing cached; the caller ends it."""

    def on_server(self) -> contextlib.AbstractContextManager[Path]:
        """The directory as the server has it: never through a mount that is measured."""


class ThrowAway:
    """A Venue on a hardened sshd of our own."""

    is_here = True

    def __init__(self, sshd: Sshd, port: int, work_dir: Path) -> None:
        self.destination = f"{sshd.user}@127.0.0.1"
        self.ssh_options = sshd.ssh_options(port)
        self.directory = str(sshd.tree)
        self._sshd, self._port, self._work_dir = sshd, port, work_dir

    def mount(self, peer: str, name: str) -> Mount:
        kind, _, options = PEERS[peer]
        directory = f"{self.directory}/{name}"
        return kind(
            self._sshd, self._work_dir, *options, port=self._port, directory=directory, life_s=_LIFE_S
        )

    @contextlib.contextmanager
    def on_server(self) -> Iterator[Path]:
        yield self._sshd.tree


class Users:
    """A Venue on a server that exists: a new directory in ``parent``. ``options`` are of ssh_config, as "Port=2222"."""

    is_here = False
    port = 0  # as the options and ssh_config say

    def __init__(self, destination: str, parent: str, options: List[str], work_dir: Path) -> None:
        self.destination = destination
        self.ssh_options = [word for option in options for word in ("-o", option)]
        self.directory = parent
        self._work_dir = work_dir

    def mount(self, peer: str, name: str) -> Mount:
        _, kind, options = PEERS[peer]
        agent = {key: value for key, value in os.environ.items() if key == "SSH_AUTH_SOCK"}
        directory = "/".join(part for part in (self.directory, name) if part)
        return kind(self, self._work_dir, *options, directory=directory, env=agent, life_s=_LIFE_S)

    @contextlib.contextmanager
    def on_server(self) -> Iterator[Path]:
        with self.mount(OURS, "") as mount:
            yield mount.path
            unmount(mount)

    @contextlib.contextmanager
    def new_directory(self) -> Iterator[None]:
        """Work in a directory that has not been there before and is removed at the end."""
        parent, name = self.directory, f"sftpmount-bench-{uuid.uuid4().hex[:8]}"
        with self.on_server() as path:
            (path / name).mkdir()
        self.directory = "/".join(part for part in (parent, name) if part)
        try:
            yield
        finally:
            self.directory = parent
            with self.on_server() as path:
                shutil.rmtree(path / name)


class UsersMount(Mount):
    def command(self, sshd: Users, port: int, directory: str) -> List[str]:
        place = f"{sshd.destination}:{directory}"
        return [sys.executable, "-m", "sftpmount", place, str(self.path), "-f", *sshd.ssh_options]


class UsersSshfsMount(SshfsMount):
    def command(self, sshd: Users, port: int, directory: str) -> List[str]:
        place = f"{sshd.destination}:{directory}"
        return [program("sshfs", "sshfs"), place, str(self.path), "-f", *sshd.ssh_options]


class UsersRcloneMount(RcloneMount):
    """rclone reads no ssh_config: it is told what ssh makes of it."""

    def command(self, sshd: Users, port: int, directory: str) -> List[str]:
        ask = ["ssh", "-G", *sshd.ssh_options, sshd.destination]
        said: Dict[str, List[str]] = {}
        for line in subprocess.run(ask, check=True, capture_output=True, text=True).stdout.splitlines():
            key, _, value = line.partition(" ")
            said.setdefault(key, []).extend(value.split() if key.endswith("file") else [value])
        settings: Dict[str, object] = {
            "host": said["hostname"][0],
            "port": said["port"][0],
            "user": said["user"][0],
        }
        for name, key in (("key-file", "identityfile"), ("known-hosts-file", "userknownhostsfile")):
            paths = map(os.path.expanduser, said.get(key, []))
            found = next(filter(os.path.exists, paths), None)
            if found is not None:
                settings[name] = found
        return self.rclone(directory, settings)


PEERS: Dict[str, Peer] = {
    OURS: Peer(Mount, UsersMount),
    "sshfs": Peer(SshfsMount, UsersSshfsMount),
    # Its default is to begin an upload five seconds after close(), when nothing here waits for it any more.
    "rclone": Peer(RcloneMount, UsersRcloneMount, ("--vfs-write-back", "0s")),
}


@contextlib.contextmanager
def throw_away(work_dir: Path, line: Optional[Line]) -> Iterator[Venue]:
    """One hardened sshd, with the relay before it where a line is asked for."""
    with contextlib.ExitStack() as stack:
        sshd = stack.enter_context(Sshd(work_dir, sftp_only=False))  # rclone compares checksums with commands
        port = sshd.port
        if line is not None:
            relay = Relay(sshd.port, rtt_ms=line.rtt_ms, up_bps=line.rate_bps, down_bps=line.rate_bps)
            port = stack.enter_context(relay).port
            sshd.trust(port)
        yield ThrowAway(sshd, port, work_dir)


@contextlib.contextmanager
def users_server(place: str, options: List[str], work_dir: Path) -> Iterator[Venue]:
    """A new directory in ``place``, "[user@]host:[directory]"."""
    destination, _, directory = place.partition(":")
    venue = Users(destination, directory, options, work_dir)
    with venue.new_directory():
        yield venue


def unmount(mount: Mount) -> None:
    """Until the process has ended; its failure is ours."""
    status = mount.unmount(timeout_s=600.0)
    if status != 0:
        raise RuntimeError(f"{type(mount).__name__} ended with status {status}: {mount.log_text()[-1000:]}")
