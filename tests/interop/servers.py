"""The servers, each real, on 127.0.0.1, and serving the whole file system to whoever runs the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict

from support.asyncssh_server import AsyncsshServer
from support.dropbear import DropbearServer
from support.process import Missing, sftp_server_program
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
