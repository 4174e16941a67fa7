"""The real command on a real mountpoint: a foreground process that lives as long as the test which started it.

    with Mount(sshd, tmp_path) as mount:
        (mount.path / "file").write_bytes(b"...")      # ... is on the server in sshd.tree
        assert mount.unmount() == 0                    # the process's exit status, everything stored

``SshfsMount`` has the same surface, for comparisons.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from support.process import Missing, descendants, is_running, program, rss_bytes, send_signal
from support.sshd import Server

CHECKOUT = Path(__file__).resolve().parents[2]

_READY_TIMEOUT_S = 20.0
_STEP_S = 0.02
_LAST_WORDS_S = 5.0


class MountFailed(RuntimeError):
    """The process ended, or was ended, before the mount was usable. ``exit_status`` is None where we ended it."""

    def __init__(self, text: str, exit_status: Optional[int]) -> None:
        super().__init__(text)
        self.exit_status = exit_status


class Mount:
    """``python -m sftpmount user@127.0.0.1:DIR MNT -f`` with the server's keys, usable when the constructor returns.

    sshd      the server; DIR is its ``tree``, or ``subdir`` in it, or ``directory`` as it is
    tmp_dir   gets a mountpoint, a log and the control socket; several mounts may share it
    options   words for the command line, e.g. "-o", "commit=fsync", "--debug"
    port      of a relay to the server, when not the server's own
    life_s    the process is killed after this time whatever happens, so that a test which hangs in a dead mount goes on

    ``changes`` of a subclass are lines of Python that run in the mount's process before the command does.
    ``path`` is the mountpoint, ``served`` the same directory on the server, ``pid`` the process, ``log`` the file with
    its stderr. Raises MountFailed.
    """

    fstype = "fuse.sftpmount"
    changes = ""

    def __init__(
        self,
        sshd: Server,
        tmp_dir: Path,
        *options: str,
        port: Optional[int] = None,
        subdir: str = "",
        directory: Optional[str] = None,
        env: Optional[Dict[str, str]] = None,
        ready_timeout_s: float = _READY_TIMEOUT_S,
        life_s: float = 900.0,
    ) -> None:
        require_fuse()
        self.path, self.log = _places(Path(tmp_dir))
        self.exit_status: Optional[int] = None
        if port is not None:
            sshd.trust(port)
        self.served = Path(directory) if directory is not None else sshd.tree / subdir
        command = self.command(sshd, port or sshd.port, str(directory or self.served)) + list(options)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment({"XDG_RUNTIME_DIR": str(tmp_dir), **(env or {})}),
                start_new_session=True,  # Ctrl-C in the test run must not end it before the test has
            )
        self.pid = self._process.pid
        self._killer = threading.Timer(life_s, self._process.kill)
        self._killer.daemon = True
        self._killer.start()
        try:
            self._wait_ready(ready_timeout_s)
        except BaseException:
            self.close()
            raise

    def command(self, sshd: Server, port: int, directory: str) -> List[str]:
        """The command line that mounts ``directory`` of the server in the foreground."""
        changed = f"import sys\nfrom sftpmount import cli\n{self.changes}\nsys.exit(cli.main())"
        return [
            *[sys.executable, *(["-c", changed] if self.changes else ["-m", "sftpmount"])],
            *[f"{sshd.user}@127.0.0.1:{directory}", str(self.path)],
            *["-f", "-F", "none", "-o", f"IdentityFile={sshd.user_key},IdentitiesOnly=yes"],
            *["-o", f"UserKnownHostsFile={sshd.known_hosts},GlobalKnownHostsFile=/dev/null,port={port}"],
        ]

    def __enter__(self) -> Mount:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_mounted(self) -> bool:
        """Whether the mountpoint is one, as the kernel's list says (nothing on the mount itself is touched)."""
        return any(mount_point == str(self.path) for mount_point, _ in fuse_mounts())

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def unmount(self, timeout_s: float = 60.0) -> int:
        """``fusermount3 -u``, then wait for the end of the process; returns its exit status (negative: the signal).

        A busy mountpoint is tried again for five seconds: a program that has just ended may still hold it.
        """
        deadline = time.monotonic() + 5.0
        while True:
            answer = subprocess.run([_fusermount(), "-u", str(self.path)], capture_output=True, text=True)
            if answer.returncode == 0:
                break
            if "busy" not in answer.stderr or time.monotonic() >= deadline:
                raise RuntimeError(f"fusermount3 -u: {answer.stderr.strip()}\n{self.log_text()[-2000:]}")
            time.sleep(_STEP_S)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Wait for the end of the process; returns its exit status."""
        try:
            self.exit_status = self._process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            print(f"{self.path} is mounted for {_who_sees(self.path) or 'nobody'}, and its process goes on")
            raise
        self._killer.cancel()
        return self.exit_status

    def terminate(self) -> None:
        """SIGTERM: the mount should unmount, store everything and end; see wait()."""
        self._process.terminate()

    def kill(self) -> None:
        """SIGKILL, as in a crash, and take the dead mountpoint away."""
        family = [self.pid, *descendants(self.pid)] if self.is_running else []
        send_signal(family, signal.SIGKILL)
        self.wait(10.0)
        self._detach()

    def close(self) -> None:
        """Leave nothing behind, whatever state the mount is in: unmount lazily, wait shortly, kill. Idempotent."""
        family = [self.pid, *descendants(self.pid)] if self.is_running else []
        self._detach()
        if self.is_running:
            self._process.terminate()
            try:
                self.wait(5.0)
            except subprocess.TimeoutExpired:
                pass
        send_signal([pid for pid in family if is_running(pid)], signal.SIGKILL)
        self.wait(10.0)
        self._detach()

    def rss_bytes(self) -> int:
        """Resident memory of the process and its children (for sshfs: its ssh)."""
        return sum(rss_bytes(pid) for pid in [self.pid, *descendants(self.pid)])

    def fd_count(self) -> int:
        """Open file descriptors of the process."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def log_text(self) -> str:
        """What the process has written to stdout and stderr so far."""
        return self.log.read_text(errors="replace")

    def _wait_ready(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.is_mounted:
            status = self._process.poll()
            if status is not None:
                raise MountFailed(f"exit status {status}: {self.log_text().strip()}", status)
            if time.monotonic() >= deadline:
                raise MountFailed(f"not mounted after {timeout_s:g} s: {self.log_text().strip()}", None)
            time.sleep(_STEP_S)
        # Another process looks first, since whoever asks a mount that does not answer waits with it.
        try:
            subprocess.run(["stat", str(self.path)], check=True, capture_output=True, timeout=timeout_s)
            is_there = os.stat(self.path).st_dev != os.stat(self.path.parent).st_dev
        except subprocess.TimeoutExpired:
            raise MountFailed(f"no answer after {timeout_s:g} s: {self.log_text().strip()}", None) from None
        except (subprocess.CalledProcessError, OSError):
            is_there = False
        if not is_there:  # sshfs mounts before it connects, and takes the mount away where it cannot
            try:
                ended: Optional[int] = self._process.wait(_LAST_WORDS_S)
            except subprocess.TimeoutExpired:
                ended = None
            raise MountFailed(f"mounted but not usable: {self.log_text().strip()}", ended)

    def _detach(self) -> None:
        if self.is_mounted:
            subprocess.run([_fusermount(), "-uz", str(self.path)], capture_output=True)


class SshfsMount(Mount):
    """The same with sshfs, under its own defaults unless ``options`` say otherwise."""

    fstype = "fuse.sshfs"

    def command(self, sshd: Server, port: int, directory: str) -> List[str]:
        return [
            *[program("sshfs", "sshfs"), f"{sshd.user}@127.0.0.1:{directory}", str(self.path)],
            *["-f", "-F", "none", "-o", f"IdentityFile={sshd.user_key},IdentitiesOnly=yes"],
            *["-o", f"UserKnownHostsFile={sshd.known_hosts},GlobalKnownHostsFile=/dev/null,port={port}"],
        ]


def require_fuse() -> None:
    """Raise Missing, with what to do, where this user can mount nothing."""
    _fusermount()
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except FileNotFoundError:
        raise Missing("The tests need /dev/fuse: modprobe fuse, or give it to the container.") from None
    except PermissionError:
        raise Missing("The tests need /dev/fuse open to this user: sudo chmod 0666 /dev/fuse.") from None


def fuse_mounts() -> List[Tuple[str, str]]:
    """(mountpoint, type) of every FUSE mount in this mount namespace."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            fields = line.split(" ")
            fstype = fields[fields.index("-") + 1]
            if fstype.startswith("fuse"):
                found.append((_unescape(fields[4]), fstype))
    return found


def unmount_stale(root: Path) -> List[str]:
    """Detach the mounts of Mount, SshfsMount and rclone under ``root``; returns the mountpoints."""
    stale = [
        path
        for path, fstype in fuse_mounts()
        if fstype in (Mount.fstype, SshfsMount.fstype, "fuse.rclone") and path.startswith(f"{root}/")
    ]
    for path in stale:
        subprocess.run([_fusermount(), "-uz", path], capture_output=True)
    return stale


def _who_sees(path: Path) -> List[str]:
    """A process of each mount namespace that has a mount at ``path``, or a copy: it may be another run's."""
    found: Dict[str, str] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f" {path} " in (process / "mountinfo").read_text():
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.setdefault(os.readlink(process / "ns" / "mnt"), f"{process.name} ({command.strip()})")
        except OSError:
            pass  # it has ended, or is another user's
    return list(found.values())


def _fusermount() -> str:
    return program("fusermount3", "fuse3")


def _places(tmp_dir: Path) -> Tuple[Path, Path]:
    """A new empty directory to mount on and a log beside it."""
    number = 0
    while True:
        path = tmp_dir / f"mnt{number}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
            continue
        return path.resolve(), tmp_dir / f"mnt{number}.log"


def _environment(extra: Dict[str, str]) -> Dict[str, str]:
    """Ours, without the user's agent, and with the checkout's package first."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SSH_")}
    environment["PYTHONPATH"] = str(CHECKOUT)
    environment["PYTHONUNBUFFERED"] = "1"
    environment.update(extra)
    return environment


def _unescape(field: str) -> str:
    """mountinfo writes space, tab, newline and backslash in octal."""
    for octal, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(octal, char)
    return field
