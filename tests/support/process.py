"""Processes and ports: what sshd.py, relay.py and mount.py share."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional


class Missing(RuntimeError):
    """Something the tests need is not on this machine; the text says what, and how to get it."""


def program(name: str, package: str) -> str:
    """The absolute path of a program, which is looked for in the sbin directories too. Raises Missing."""
    path = shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin:/usr/local/sbin")
    if path is None:
        raise Missing(
            f"The tests need the program {name}, which is not installed: apt-get install {package}."
        )
    return path


def sftp_server_program() -> Path:
    """OpenSSH's program, where the distributions put it."""
    for directory in ("lib/openssh", "libexec/openssh", "lib/ssh", "libexec", "lib/misc"):
        path = Path("/usr") / directory / "sftp-server"
        if path.exists():
            return path
    raise Missing("The tests need OpenSSH's sftp-server: apt-get install openssh-sftp-server.")


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on, below the range from which the kernel takes ports for clients.

    From that range (32768 up) any outgoing connection could take the port while a server is down between two starts.
    """
    for _ in range(200):
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free TCP port between 20000 and 32000 on 127.0.0.1")


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str, interval_s: float = 0.01) -> None:
    """Return as soon as ``condition()`` holds; raise TimeoutError that names ``what`` when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        is_last = time.monotonic() >= deadline  # before the look, which may take its time
        if condition():
            return
        if is_last:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(interval_s)


def parent_of(pid: int) -> Optional[int]:
    """The parent's pid; None when the process is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    state, parent = stat.rpartition(")")[2].split()[:2]  # the name before the last ")" may hold anything
    return None if state in "ZX" else int(parent)


def descendants(pid: int) -> List[int]:
    """The live children of a process, their children and so on; parents come before their children."""
    children: Dict[int, List[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            parent = parent_of(int(entry))
            if parent is not None:
                children.setdefault(parent, []).append(int(entry))
    found: List[int] = []
    level = children.get(pid, [])
    while level:
        found += level
        level = [child for parent in level for child in children.get(parent, [])]
    return found


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    return parent_of(pid) is not None


def send_signal(pids: List[int], number: signal.Signals) -> None:
    """Signal each process that still exists."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def end_all(pids: List[int], number: signal.Signals) -> None:
    """Signal each, suspended ones too, and return when all are gone; SIGKILL for those that are not within 5 s."""
    send_signal(pids, number)
    send_signal(pids, signal.SIGCONT)
    try:
        wait_until(lambda: not any(map(is_running, pids)), 5.0, "the end of the processes")
    except TimeoutError:
        send_signal(pids, signal.SIGKILL)
        wait_until(lambda: not any(map(is_running, pids)), 5.0, "the end of the killed processes")


def end_with_input(process: subprocess.Popen[Any], timeout_s: float = 10.0) -> None:
    """End a process that lives until its input ends, and kill it when that takes longer. Its input and output are pipes."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def rss_bytes(pid: int) -> int:
    """Resident memory of one process in bytes; 0 when it is gone."""
    return _status_bytes(pid, "VmRSS")


def peak_rss_bytes(pid: int) -> int:
    """The most resident memory that one process ever had, in bytes; 0 when it is gone."""
    return _status_bytes(pid, "VmHWM")


def cpu_s(pid: int) -> float:
    """Seconds for which one process, with all its threads, has computed, in steps of 10 ms; 0 when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return 0.0
    user, system = stat.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _status_bytes(pid: int, field: str) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
