"""The servers, each real, on 127.0.0.1, and serving the whole file system to whoever runs the tests."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

from support.asyncssh_server import AsyncsshServer
from support.dropbear import DropbearServer
from support.process import Missing, program, sftp_server_program
from support.proftpd import ProftpdServer
from support.rclone_server import RcloneServer
from support.sshd import Sshd


def gesftpserver_program() -> Path:
    """Green End SFTP Server's program, where Debian puts it."""
    path = Path("/usr/libexec/gesftpserver")
    if not path.exists():
        raise Missing("The tests need gesftpserver: apt-get install gesftpserver.")
    return path


# Each makes one in a directory, not yet started: a context manager, and a support.sshd.Server.
SERVERS: Dict[str, Callable[[Path], Any]] = {
    "OpenSSH, internal-sftp": Sshd,
    "OpenSSH, sftp-server": lambda tmp_dir: Sshd(tmp_dir, sftp_server=str(sftp_server_program())),
    "dropbear, sftp-server": DropbearServer,
    "OpenSSH, gesftpserver": lambda tmp_dir: Sshd(tmp_dir, sftp_server=str(gesftpserver_program())),
    "ProFTPD mod_sftp": ProftpdServer,
    "asyncssh": AsyncsshServer,
    "rclone serve sftp": RcloneServer,
}

_SSHD = (("sshd", "openssh-server"), "-V", r"OpenSSH_([^ ,]+)")
_GESFTPSERVER = r"Green End SFTP server version (\S+)"
_VERSIONS: Dict[str, Tuple[Tuple[str, str], str, str]] = {
    "OpenSSH, internal-sftp": _SSHD,
    "OpenSSH, sftp-server": _SSHD,
    "dropbear, sftp-server": (("dropbear", "dropbear-bin"), "-V", r"Dropbear v(\S+)"),
    "ProFTPD mod_sftp": (("proftpd", "proftpd-core"), "-v", r"ProFTPD Version (\S+)"),
    "rclone serve sftp": (("rclone", "rclone"), "version", r"rclone v(\S+)"),
}


def version(server: str) -> str:
    """Of the server, as it says itself; "?" where it does not."""
    if server == "asyncssh":
        import asyncssh

        return asyncssh.__version__
    if server == "OpenSSH, gesftpserver":
        command, pattern = [str(gesftpserver_program()), "--version"], _GESFTPSERVER
    else:
        names, flag, pattern = _VERSIONS[server]
        command = [program(*names), flag]
    answer = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    found = re.search(pattern, answer.stdout + answer.stderr)
    return found.group(1) if found else "?"
