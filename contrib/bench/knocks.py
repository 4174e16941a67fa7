"""One peer before the server of one case: a mount, a small file stored through it, and what it said."""

from __future__ import annotations

import re
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, Iterator, NamedTuple, Tuple, Type

from bench.trial import RcloneMount
from mount.helpers import noise
from servers.cases import TINYSSHD, Accepted
from servers.door_table import OURS, RCLONE, RCLONE_BARE, SSHFS, Case, Verdict
from servers.host_keys import HOST_KEYS
from servers.start import certify, is_strict, known_ca, make_server
from support.kexinit import ManInTheMiddle
from support.mount import Mount, MountFailed, SshfsMount
from support.process import wait_until

LIMIT_S = 40.0  # to mount, and to store the file
_FILE_BYTES = 10 * 32768  # whole packets: what rclone 1.60 adds to a short one is too much for asyncssh
_SAID_CHARS_MAX = 400


class Peer(NamedTuple):
    mount: Type[Mount]
    options: Tuple[
        str, ...
    ]  # beyond its defaults: what makes it check host keys, and quiet where nothing is amiss


# When rclone uploads, and how often it hears a refusal before it believes it (ten times, in ten seconds), is no question here.
_AT_ONCE = ("--vfs-write-back", "0s", "--low-level-retries", "1")
PEERS: Dict[str, Peer] = {
    OURS: Peer(Mount, ("-o", "log_level=warning")),
    SSHFS: Peer(SshfsMount, ("-o", "StrictHostKeyChecking=yes")),
    RCLONE: Peer(RcloneMount, _AT_ONCE),
    RCLONE_BARE: Peer(RcloneMount, (*_AT_ONCE, "--sftp-known-hosts-file", "")),
}


class Knock(NamedTuple):
    """``said`` is what the peer wrote on standard error, in a line and without what differs from run to run."""

    peer: str
    verdict: Verdict
    said: str
    is_right: bool  # for sftpmount, as its tests have it; others promise nothing of the kind


def knocks(case: Case, peers: Tuple[str, ...], work_dir: Path) -> Iterator[Knock]:
    """Start the server of the case, and let each peer try it."""
    with ExitStack() as stack:
        server = make_server(case, work_dir)
        if isinstance(case, Accepted) and case.certified:
            certify(server, work_dir / "ca")
        stack.enter_context(server)
        port, options, between = server.port, (), None
        if isinstance(case, Accepted):
            wanted = Verdict.MOUNTS
            if case.certified:
                server.known_hosts.write_text(known_ca(work_dir / "ca", port))
            if case.server == TINYSSHD and not is_strict(port):
                wanted = Verdict.REFUSES  # one of before 20240101
        else:
            wanted = Verdict.REFUSES
            options = HOST_KEYS[case.host_key](server, work_dir)
            if case.between is not None:
                between = stack.enter_context(ManInTheMiddle(port, case.between))
                port = between.port
                server.trust(port)
        for peer in peers:
            if between is not None:
                between.changed.clear()
            verdict, said = _knock(peer, case, server, port, options, work_dir)
            if between is not None and not between.changed:
                verdict = Verdict.NO_CASE
            for varying, constant in ((str(work_dir), ""), (str(server.port), "PORT"), (str(port), "PORT")):
                said = said.replace(varying, constant)
            agrees = verdict is wanted or (wanted is Verdict.MOUNTS and verdict is Verdict.WARNS)
            yield Knock(peer, verdict, said, peer != OURS or agrees)


def _knock(
    peer: str, case: Case, server: Any, port: int, options: Tuple[str, ...], work_dir: Path
) -> Tuple[Verdict, str]:
    kind, own = PEERS[peer]
    if kind is RcloneMount and options:
        return Verdict.NO_CASE, ""  # neither a list of revoked keys nor a jump host
    if peer == OURS:
        profile = case.profile if isinstance(case, Accepted) else case.profiles[0]
        own = (*own, "-o", f"security={profile}", *(case.options if isinstance(case, Accepted) else ()))
    elif peer == SSHFS and options:
        # A jump host has its own ssh, which knows of the command line only where the configuration is.
        config = work_dir / "ssh_config"
        config.write_text(f"UserKnownHostsFile {server.known_hosts}\nIdentityFile {server.user_key}\n")
        own = (*own, "-F", str(config))
    name = f"stored by {peer}"
    source = work_dir / name
    source.write_bytes(noise(_FILE_BYTES))
    server_port = None if port == server.port else port
    try:
        mount = kind(server, work_dir, *own, *options, port=server_port, ready_timeout_s=LIMIT_S)
    except MountFailed as error:
        verdict = Verdict.HANGS if error.exit_status is None else Verdict.REFUSES
        return verdict, _in_a_line(str(error).partition(": ")[2])
    with mount:
        try:
            subprocess.run(
                ["cp", source, mount.path / name], check=True, capture_output=True, timeout=LIMIT_S
            )
            wait_until(lambda: _same(source, server.tree / name), LIMIT_S, "the file on the server")
            stored = True
        except (subprocess.SubprocessError, TimeoutError):
            stored = False
        said = _in_a_line(mount.log_text())
    if not stored:
        return Verdict.STORES_NOTHING, said
    return (Verdict.WARNS if said else Verdict.MOUNTS), said


def _same(source: Path, stored: Path) -> bool:
    return stored.exists() and stored.read_bytes() == source.read_bytes()


def _in_a_line(said: str) -> str:
    constant = re.sub(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d ", "", said)
    constant = re.sub(r"SHA256:[\w+/]+", "SHA256:...", constant)
    return " ".join(constant.split())[:_SAID_CHARS_MAX]
