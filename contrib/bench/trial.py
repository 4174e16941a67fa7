"""One fault against one peer: a throw-away sshd behind a relay, a fresh mount of it, programs on the mount, and the server's
bytes beside what the programs were told.

A peer may store after the program was told that it has (rclone does): it is given GRACE_S for that, then unmounted as at the
end of a backup, and only then judged. Faults that take this time away say so themselves.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple, Type

from bench.data import difference
from bench.peers import OURS, RcloneMount
from bench.verdicts import Outcome, outcome
from mount.disks import SmallDisk
from mount.helpers import noise
from support.mount import Mount, SshfsMount
from support.process import wait_until
from support.relay import Relay
from support.sshd import Sshd

LIMIT_S = 60.0  # for a program or an unmount to end; each peer's own limits are below it
GRACE_S = 45.0  # rclone waits 5 s before its first try, 10 s before the second, 20 s before the third
FILE_BYTES = 24 * 2**20
STRIKE_BYTES = 6 * 2**20  # of them are on their way when the fault comes
_LINE_BPS = 100e6  # so that a file takes two seconds, and a fault meets it in the middle
_RTT_MS = 4.0

_PREAMBLE = """
import os, sys
def pause():
    print(flush=True)
    sys.stdin.readline()
"""


class Peer(NamedTuple):
    mount: Type[Mount]
    options: Tuple[str, ...]


_ALIVE = "ServerAliveInterval=2,ServerAliveCountMax=2"
PEERS: Dict[str, Peer] = {
    "sshfs": Peer(SshfsMount, ("-o", f"reconnect,{_ALIVE}")),
    "rclone": Peer(RcloneMount, ()),
    OURS: Peer(Mount, ("-o", f"{_ALIVE},retry_timeout=20")),
}


class Hangs(Exception):
    """Something did not end within LIMIT_S."""


class Untested(Exception):
    """The fault did not come about."""


class Program:
    """A program on the mount; its errors go to a file, its standard output is read line by line."""

    def __init__(self, command: List[str], errors: Path, cwd: Path) -> None:
        self.name = Path(command[0]).name
        self._errors = errors
        self._cwd = cwd
        with errors.open("wb") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=cwd,
                env={**os.environ, "LC_ALL": "C.UTF-8"},
            )

    def reaches_pause(self) -> bool:
        """Wait until the program pauses; False where it ended before."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(LIMIT_S):
                raise Hangs(f"{self.name} did not get on within {LIMIT_S:g} s")
        return self._process.stdout.readline() != b""

    def go_on(self) -> None:
        """End a pause; a program that has ended is left so."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass

    def finish(self) -> Tuple[Optional[str], str]:
        """(None, or the error it ended with; its output)."""
        try:
            output, _ = self._process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            raise Hangs(f"{self.name} did not end within {LIMIT_S:g} s") from None
        text = output.decode(errors="replace")
        if self._process.returncode == 0:
            return None, text
        lines = (self._errors.read_text(errors="replace") + text).strip().splitlines() or ["nothing"]
        said = lines[-1] if self.name.startswith("python") else lines[0]  # a traceback's end says it
        said = said.replace(f"{self._cwd}/", "")
        return f'{self.name} ended with {self._process.returncode} and said "{said}"', text

    def close(self) -> None:
        """After the mount was closed, so that nothing keeps the program in the kernel."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait(timeout=20.0)


class Trial:
    """Attributes: ``sshd``, ``relay``, ``mount``, ``source`` (a local file of FILE_BYTES) and ``served`` (the mounted
    directory on the server's side)."""

    def __init__(
        self,
        peer: str,
        work_dir: Path,
        stack: contextlib.ExitStack,
        prepare: Callable[[Path], None],
        disk: str,
    ) -> None:
        """``prepare`` fills the directory before it is mounted; ``disk`` are options of a tmpfs to serve, or empty."""
        self.work_dir = work_dir
        self.source = work_dir / "source"
        self.source.write_bytes(noise(FILE_BYTES))
        sftp_server, directory, self.served = "internal-sftp", work_dir / "served", work_dir / "served"
        if disk:
            small = SmallDisk(directory, disk)
            stack.callback(small.close)
            sftp_server, self.served = small.sftp_server, small.seen
        else:
            directory.mkdir()
        prepare(self.served)
        # Commands are permitted, since rclone compares checksums with them.
        server = Sshd(work_dir, sftp_server=sftp_server, sftp_only=False, host_key_types=("ed25519",))
        self.sshd = stack.enter_context(server)
        line = Relay(self.sshd.port, rtt_ms=_RTT_MS, up_bps=_LINE_BPS, down_bps=_LINE_BPS)
        self.relay = stack.enter_context(line)
        self._programs: List[Program] = []
        stack.callback(self._close_programs)
        kind, options = PEERS[peer]
        self.mount = stack.enter_context(
            kind(self.sshd, work_dir, *options, port=self.relay.port, directory=str(directory))
        )
        self._before = self.relay.stats()

    # ---- programs ----

    def start(self, *command: str) -> Program:
        """A program in the mounted directory's parent: names on the mount are short there."""
        errors = self.work_dir / f"errors{len(self._programs)}"
        self._programs.append(Program(list(command), errors, self.mount.path.parent))
        return self._programs[-1]

    def python(self, code: str, *arguments: str) -> Program:
        """Python code that may call pause(), with ``arguments`` as sys.argv[1:]."""
        return self.start(sys.executable, "-c", _PREAMBLE + code, *arguments)

    def run(self, *command: str) -> Tuple[Optional[str], str]:
        return self.start(*command).finish()

    def on_mount(self, name: str) -> str:
        """How programs call a file on the mount."""
        return f"{self.mount.path.name}/{name}"

    # ---- the moment of the fault ----

    def passed_bytes(self, direction: str) -> int:
        """Through the relay since the mount was made."""
        return self.relay.stats()[direction] - self._before[direction]

    def wait_for_strike(self) -> None:
        """Return when STRIKE_BYTES are on their way, be it after the program's end."""
        try:
            wait_until(lambda: self.passed_bytes("up") >= STRIKE_BYTES, LIMIT_S, "the moment of the fault")
        except TimeoutError as error:
            raise Untested(str(error)) from None

    # ---- the judgement ----

    def lacks(self, name: str = "file", source: Optional[Path] = None) -> Optional[str]:
        """What is wrong with a file or tree on the server, compared with ``source``; None: nothing."""
        return difference(source or self.source, self.served / name)

    def judge(
        self, told: Optional[str], lacks: Callable[[], Optional[str]], grace_s: float = GRACE_S
    ) -> Outcome:
        """After what the program was told: wait for bytes that are still missing, unmount, compare."""
        late, where, started = "", "the server", time.monotonic()
        at_success = lacks()
        if told is None and at_success is not None:
            try:
                wait_until(lambda: lacks() is None, grace_s, "the rest", interval_s=0.2)
            except TimeoutError:
                where = f"the server, {grace_s:g} s later and after the unmount"
            late = f"Stored {time.monotonic() - started:.0f} s after the program was told that all is well ({at_success} then)"
        self.unmount()
        return outcome(told, lacks(), late, where=where)

    def unmount(self) -> None:
        try:
            self.mount.unmount(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise Hangs(f"the unmount did not end within {LIMIT_S:g} s") from None
        except RuntimeError:  # not mounted any more, or still in use
            self.mount.close()

    def _close_programs(self) -> None:
        for each in self._programs:
            each.close()
