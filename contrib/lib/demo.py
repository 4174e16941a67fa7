"""What contrib/quickstart shows: a hardened server, a mount of it, a real backup through the mount, and the same bytes back.

Run by contrib/quickstart, which sees to the packages. Everything lives in one temporary directory; the server, the mounts
and restic end with this process, also on Ctrl-C, SIGTERM, SIGHUP or a failure.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, Iterator, List, Union

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from sftpmount.errors import SftpMountError  # noqa: E402
from sftpmount.options import SshOptions  # noqa: E402
from sftpmount.prompt import Prompt  # noqa: E402
from sftpmount.ssh.connect import connect  # noqa: E402
from support.asyncssh_server import AsyncsshServer  # noqa: E402
from support.mount import Mount, unmount_stale  # noqa: E402
from support.process import Missing, descendants, end_all, program  # noqa: E402
from support.sshd import Sshd  # noqa: E402

MB = 1_000_000  # as disks and networks count
BIG_FILE_BYTES = 128 * MB


class Failed(Exception):
    """A step went wrong; the text says which and how."""


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # so that the clean-up below runs
    try:
        with contextlib.ExitStack() as stack:
            tmp_dir = Path(tempfile.mkdtemp(prefix="sftpmount-quickstart-"))
            stack.callback(shutil.rmtree, tmp_dir, ignore_errors=True)
            stack.callback(end_what_is_left, tmp_dir)
            show(tmp_dir, stack)
    except KeyboardInterrupt:
        print("\nquickstart: interrupted; everything it started has ended.", file=sys.stderr)
        return 130
    except (Failed, SftpMountError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    return 0


def end_what_is_left(tmp_dir: Path) -> None:
    """A signal may come when a process has begun and is in nobody's hands yet."""
    end_all(descendants(os.getpid()), signal.SIGTERM)
    unmount_stale(tmp_dir)


def show(tmp_dir: Path, stack: contextlib.ExitStack) -> None:
    say("A throw-away SFTP server with fresh keys, hardened after the Secure Secure Shell guide")
    server = start_server(tmp_dir, stack)
    note(f"listens on 127.0.0.1 port {server.port} and serves {server.tree}")
    for line in negotiated(server):
        note(line)

    say("The mount")
    mount = stack.enter_context(Mount(server, tmp_dir))
    note(f"sftpmount {server.user}@127.0.0.1:{server.tree} {mount.path}")
    for line in mount.log_text().splitlines():
        note(line)

    say("One large file in, with fsync, and out again through a fresh mount")
    with timed("written and on the server's disk", BIG_FILE_BYTES):
        write_random(mount.path / "large", BIG_FILE_BYTES)
    unmount(mount)
    mount = stack.enter_context(Mount(server, tmp_dir))
    with timed("read", BIG_FILE_BYTES):
        same = subprocess.run(["cmp", str(mount.path / "large"), str(server.tree / "large")]).returncode == 0
    if not same:
        raise Failed("the large file differs between the mount and the server.")
    note("byte for byte what the server has")

    say("A restic repository on the mount: init, two backups, check of all data")
    source = tmp_dir / "source"
    source_bytes = make_source(source)
    restic = Restic(mount.path / "repository", tmp_dir)
    restic("init")
    with timed("first backup", source_bytes):
        restic("backup", str(source))
    (source / "documents" / "added later").write_bytes(os.urandom(MB))
    with timed("second backup, one file added"):
        restic("backup", str(source))
    with timed("check --read-data", source_bytes):
        restic("check", "--read-data")

    say("Restore through a fresh mount, so that every byte comes from the server")
    unmount(mount)
    mount = stack.enter_context(Mount(server, tmp_dir))
    restic = Restic(mount.path / "repository", tmp_dir)
    restored = tmp_dir / "restored"
    with timed("restore", source_bytes):
        restic("restore", "latest", "--target", str(restored))
    compare = ["diff", "--recursive", "--no-dereference", str(source), f"{restored}{source}"]
    if subprocess.run(compare).returncode != 0:
        raise Failed("what restic restored differs from what it backed up; see above.")
    note("restored files are identical to the originals")
    unmount(mount)
    server.stop()
    say("Unmounted, server stopped, nothing left running: all is well.")
    note("Next: README.md, Install and A nightly backup: this has put no sftpmount into your PATH")


def start_server(tmp_dir: Path, stack: contextlib.ExitStack) -> Union[Sshd, AsyncsshServer]:
    try:
        program("sshd", "openssh-server")
    except Missing:
        note("no sshd on this machine: asyncssh serves instead")
        return stack.enter_context(AsyncsshServer(tmp_dir))
    return stack.enter_context(Sshd(tmp_dir))


def negotiated(server: Union[Sshd, AsyncsshServer]) -> List[str]:
    """What a connection to the server agrees on, in the words of ssh."""
    options = SshOptions(
        host="127.0.0.1",
        user=server.user,
        port=server.port,
        config_file="none",
        identity_files=(str(server.user_key),),
        known_hosts_files=(str(server.known_hosts),),
        batch_mode=True,
    )
    connection = connect(options, Prompt(os.environ, batch_mode=True))
    agreed = connection.negotiated
    connection.close()
    return [
        f"server        {agreed.server_version}",
        f"key exchange  {agreed.kex}{', strict (no Terrapin)' if agreed.strict_kex else ''}",
        f"host key      {agreed.host_key_type} {agreed.host_key_fingerprint}",
        f"cipher        {agreed.cipher_out} out, {agreed.cipher_in} in",
        f"integrity     {agreed.mac_out or 'by the cipher'} out, {agreed.mac_in or 'by the cipher'} in",
    ]


class Restic:
    """restic on one repository, with a password and a cache of its own."""

    def __init__(self, repository: Path, tmp_dir: Path) -> None:
        self._environment: Dict[str, str] = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RESTIC_")},
            "RESTIC_REPOSITORY": str(repository),
            "RESTIC_PASSWORD": "quickstart",
            "RESTIC_CACHE_DIR": str(tmp_dir / "restic-cache"),
        }

    def __call__(self, *words: str) -> None:
        command = [program("restic", "restic"), *words]
        result = subprocess.run(command, env=self._environment, capture_output=True, text=True)
        if result.returncode != 0:
            raise Failed(f"restic {words[0]} ended with status {result.returncode}: {result.stderr.strip()}")
        for line in result.stdout.splitlines():
            if re.search(r"^snapshot \w+ saved|no errors were found|^created restic repository", line):
                note(f"restic {words[0]}: {line}")


def make_source(source: Path) -> int:
    """Something to back up: a few large files, many small ones, a link and an empty directory; returns the bytes."""
    chooser = random.Random(1)
    for number in range(300):
        path = source / "documents" / f"{number % 17}" / f"note {number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{number} " * chooser.randrange(1, 8000))
    for number in range(3):
        write_random(source / f"photograph-{number}", 20 * MB)
    (source / "empty").mkdir()
    (source / "link").symlink_to("documents")
    return sum(path.stat().st_size for path in source.rglob("*") if path.is_file() and not path.is_symlink())


def write_random(path: Path, count: int) -> None:
    with path.open("wb") as file:
        block = os.urandom(MB)
        for number in range(count // MB):
            file.write(number.to_bytes(8, "big") + block[8:])
        file.flush()
        os.fsync(file.fileno())


def unmount(mount: Mount) -> None:
    with timed("unmounted, everything stored"):
        status = mount.unmount()
    if status != 0:
        raise Failed(f"the mount ended with status {status}: {mount.log_text()}")


@contextlib.contextmanager
def timed(what: str, count: int = 0) -> Iterator[None]:
    """Report how long the block took and, where bytes are given, MB/s."""
    start = time.perf_counter()
    yield
    elapsed = time.perf_counter() - start
    rate = f", {count / MB:.0f} MB, {count / MB / elapsed:.0f} MB/s" if count else ""
    note(f"{what}: {elapsed:.1f} s{rate}")


def say(text: str) -> None:
    bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"{bold}==> {text}{plain}", flush=True)


def note(text: str) -> None:
    print(f"    {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
