"""``sftpmount audit``: would a mount of this server be safe and durable, and if not, what has to change?

It connects and looks, as ``ssh.audit`` says; then it logs in as the mount would, with the mount's own code, and looks at what
the SFTP server can do. It mounts nothing, writes nothing and asks nobody.
"""

from __future__ import annotations

import json
import os
from typing import Dict, Iterator, List, Tuple

from . import audit_report
from .audit_report import Report, SftpFindings
from .errors import AuthenticationError, ChannelRefused, ConnectionLost, RemoteDirectoryError, SftpMountError
from .fs.filesystem import Filesystem
from .logs import printable, show
from .options import MountOptions
from .prompt import Prompt
from .sftp.remote import FSYNC, POSIX_RENAME, Remote
from .ssh import audit as ssh_audit
from .ssh.audit import Finding, SshFindings
from .ssh.connect import Dialer

_SUBSYSTEM_LINE = "Subsystem sftp internal-sftp"


class _Nobody(Prompt):
    """A prompt that neither asks nor shows: a banner is no part of the report."""

    def __init__(self) -> None:
        super().__init__({}, batch_mode=True)

    def notice(self, text: str) -> None:
        pass


def run(wanted: MountOptions, *, as_json: bool) -> int:
    """Print the report on the server of ``wanted``; returns 0 (fit), 1 (fit with remarks) or 2 (refused).

    Raises SftpMountError where there is nothing to report on: the server, or a jump host before it, was not reached.
    """
    try:
        report = examine(wanted)
    except SftpMountError as error:
        if as_json:
            show(json.dumps(audit_report.failure_as_dict(wanted.ssh.host, error), indent=2))
        raise
    show(json.dumps(audit_report.as_dict(report), indent=2) if as_json else audit_report.as_text(report))
    return report.exit_status


def examine(wanted: MountOptions) -> Report:
    """Everything there is to know about the server of ``wanted``. Raises SftpMountError as ``run`` does."""
    ssh = ssh_audit.survey(wanted.ssh, _Nobody())
    if ssh.obstacle:
        return Report(ssh, SftpFindings(why=ssh.obstacle), ssh.refusals, ssh.remarks)
    sftp, refusals, remarks = _log_in(wanted, ssh)
    return Report(ssh, sftp, (*ssh.refusals, *refusals), (*ssh.remarks, *remarks))


def _log_in(
    wanted: MountOptions, ssh: SshFindings
) -> Tuple[SftpFindings, Tuple[Finding, ...], Tuple[Finding, ...]]:
    """What the SFTP server shows to a mount; (findings, refusals, remarks)."""
    timeout_s = wanted.ssh.connect_timeout_s
    options = ssh_audit.for_a_look(wanted.ssh)
    remote = Remote(
        Dialer(options, _Nobody(), pinned_host_key=ssh.pinned_host_key),
        retry_timeout_s=0,
        alive_interval_s=timeout_s / 2,
        alive_count_max=2,
        request_deadline_s=timeout_s,
        lanes=1,
    )
    filesystem = Filesystem(remote, wanted.directory)
    try:
        try:
            remote.start()
        except AuthenticationError as error:
            return SftpFindings(why="the login did not succeed"), (), (Finding(str(error)),)
        except (ChannelRefused, RemoteDirectoryError) as error:
            problem = f"{ssh.host} offers no SFTP ({_clause(error)}): enable the subsystem there."
            return SftpFindings(why="there is no SFTP"), (Finding(problem, (_SUBSYSTEM_LINE,)),), ()
        except SftpMountError as error:
            return SftpFindings(why="the connection failed"), (Finding.of(error),), ()
        except ConnectionLost as error:
            problem = f"{ssh.host} ended the connection ({_clause(error)}): its log may say why."
            return SftpFindings(why="the connection was lost"), (Finding(problem),), ()
        session = remote.session_now()
        limits = session.limits if session is not None else None
        extensions = session.extensions if session is not None else {}
        directory = os.fsdecode(wanted.directory or b"~")
        refusals: List[Finding] = []
        try:
            filesystem.start()
            directory = str(filesystem.describe()["directory"])
        except RemoteDirectoryError as error:
            refusals.append(Finding(str(error)))
        found = SftpFindings(
            reached=True,
            directory=printable(directory),
            extensions={_text(name): _text(version) for name, version in sorted(extensions.items())},
            limits=limits,
            fsync=FSYNC in extensions,
        )
        return found, tuple(refusals), tuple(_remarks(extensions))
    finally:
        filesystem.close()
        remote.close()


def _remarks(extensions: Dict[bytes, bytes]) -> Iterator[Finding]:
    """What the mount can live without, and a backup had better not."""
    if FSYNC not in extensions:
        yield Finding("What the server has received may be lost if it crashes.", (_SUBSYSTEM_LINE,))
    if POSIX_RENAME not in extensions:
        yield Finding(
            "The server has no posix-rename@openssh.com: a file cannot be replaced by renaming in one step.",
            (_SUBSYSTEM_LINE,),
        )


def _clause(error: Exception) -> str:
    return str(error).rstrip(".")


def _text(data: bytes) -> str:
    return printable(data.decode("utf-8", "backslashreplace"))
