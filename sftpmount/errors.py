"""The exceptions of the whole package, and how an SFTP status becomes an errno.

Two audiences: ``SftpMountError`` and its kin carry a sentence and an exit status for the person at the terminal;
``FsError`` carries an errno for the program that called the kernel. ``ConnectionLost`` is for neither: it says that the
outcome of what was in flight is unknown, and is resolved by ``sftp.remote`` (retry, verify) before anyone above sees it.
"""

from __future__ import annotations

import errno
import os
from typing import Dict, Optional, Sequence


class SftpMountError(Exception):
    """Something a person must act on; ``str(e)`` is one or two sentences: the cause and the next step."""

    exit_status = 1


class UsageError(SftpMountError):
    """A bad option, host syntax or combination."""

    exit_status = 2


class MountpointError(SftpMountError):
    """The mountpoint is absent, not a directory, not empty of other mounts, or not ours."""

    exit_status = 3


class FuseUnavailable(SftpMountError):
    """libfuse, fusermount or /dev/fuse is missing or may not be used."""

    exit_status = 4


class Unreachable(SftpMountError):
    """No TCP connection or no SSH greeting: name resolution, refusal, timeout."""

    exit_status = 5


class HostKeyError(SftpMountError):
    """The host key is unknown, changed, revoked, or of a kind that is not accepted."""

    exit_status = 6


class PolicyError(SftpMountError):
    """Server and policy share no algorithm, or the server's offer is not safe enough.

    ``server_lines``: what cures it in the sshd_config of an OpenSSH server, each line in place of the one with its keyword,
    but HostKey beside its like.
    """

    exit_status = 7

    def __init__(self, sentence: str, server_lines: Sequence[str] = ()) -> None:
        super().__init__(sentence)
        self.server_lines = tuple(server_lines)


class AuthenticationError(SftpMountError):
    """The server accepted none of the identities offered."""

    exit_status = 8


class RemoteDirectoryError(SftpMountError):
    """The remote directory is absent, not a directory, or may not be read; or the server has no SFTP."""

    exit_status = 9


class ChannelRefused(Exception):
    """The server opens no further channel, or has no such subsystem; ``str(e)`` is the server's reason."""


class ConnectionLost(Exception):
    """The SSH connection or one of its channels ended; what was in flight has an unknown outcome."""


class NotSent(ConnectionLost):
    """The connection was found dead before any byte of the request left: it may be repeated whatever it is."""


class ProtocolViolation(ConnectionLost):
    """The server broke the file protocol; the connection is given up, since nothing it says can be trusted."""


class FsError(OSError):
    """An error of a file operation; ``errno`` is always an int, since fusepy kills the mount on anything else."""

    def __init__(self, code: int, detail: str = "") -> None:
        super().__init__(code, detail or os.strerror(code))


# SSH_FXP_STATUS codes, draft-ietf-secsh-filexfer-02 section 7; 11 is v6's FILE_ALREADY_EXISTS, which ProFTPD sends in v3.
FX_OK = 0
FX_EOF = 1
FX_NO_SUCH_FILE = 2
FX_PERMISSION_DENIED = 3
FX_FAILURE = 4
FX_BAD_MESSAGE = 5
FX_OP_UNSUPPORTED = 8
FX_FILE_ALREADY_EXISTS = 11

_ERRNO_OF_STATUS: Dict[int, int] = {
    FX_NO_SUCH_FILE: errno.ENOENT,
    FX_PERMISSION_DENIED: errno.EACCES,
    FX_FAILURE: errno.EIO,
    FX_BAD_MESSAGE: errno.EINVAL,  # how OpenSSH's sftp-server reports EINVAL and ENAMETOOLONG
    6: errno.ENOTCONN,
    7: errno.ENOTCONN,
    FX_OP_UNSUPPORTED: errno.ENOTSUP,
    9: errno.EBADF,
    10: errno.ENOENT,
    FX_FILE_ALREADY_EXISTS: errno.EEXIST,
    12: errno.EROFS,
    14: errno.ENOSPC,
    15: errno.EDQUOT,
    18: errno.ENOTEMPTY,
    19: errno.ENOTDIR,
    21: errno.ELOOP,
    24: errno.EISDIR,
}

# Many servers put strerror() into the message of a bare FAILURE: believed only for errnos that a FAILURE can stand for.
_ERRNO_OF_MESSAGE: Dict[str, int] = {
    os.strerror(code).lower(): code
    for code in (
        errno.ENOSPC, errno.EDQUOT, errno.EEXIST, errno.ENOTEMPTY, errno.EROFS, errno.EXDEV, errno.EFBIG, errno.EMLINK,
        errno.ENOTDIR, errno.EISDIR, errno.EBUSY, errno.ELOOP, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE,
        errno.EPERM, errno.EINVAL,
    )
}  # fmt: skip


class StatusError(Exception):
    """The server's SSH_FXP_STATUS for a request that failed. ``code`` is the FX code, ``message`` the server's text."""

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(f"status {code}: {message}" if message else f"status {code}")
        self.code = code
        self.message = message
        self.explained: Optional[int] = (
            None  # the errno that a program was told, once the server was asked for more
        )

    @property
    def errno(self) -> int:
        """The errno that the status alone implies; callers with more context refine EIO (a bare FAILURE)."""
        if self.code == FX_FAILURE:
            return errno_of_text(self.message) or errno.EIO
        return _ERRNO_OF_STATUS.get(self.code, errno.EIO)

    @property
    def is_bare_failure(self) -> bool:
        """True where the server said only "failure": OpenSSH does so for ENOSPC, EDQUOT, EEXIST, ENOTEMPTY, EXDEV, EIO."""
        return self.code == FX_FAILURE and errno_of_text(self.message) is None


def errno_of_text(message: str) -> Optional[int]:
    """The errno whose strerror() text ``message`` contains, or None."""
    lowered = message.lower()
    for text, code in _ERRNO_OF_MESSAGE.items():
        if text in lowered:
            return code
    return None
