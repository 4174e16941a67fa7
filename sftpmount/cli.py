"""The command ``sftpmount``: the only place that wires the parts together."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import pwd
import resource
import signal
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Callable, Dict, Iterator, List, Optional, Sequence, Union

from . import daemon, helper, logs, mountpoint, options, usage
from .control import commands, directory
from .control.panel import Panel
from .errors import (
    ChannelRefused,
    ConnectionLost,
    MountpointError,
    RemoteDirectoryError,
    SftpMountError,
    Unreachable,
    UsageError,
)
from .logs import printable
from .notify import Notify
from .options import MountOptions
from .prompt import Prompt

if TYPE_CHECKING:
    from .fs.filesystem import Filesystem

log = logging.getLogger(__name__)

# Python's default of 5 ms lets the thread that computes hold up the one that answers the kernel: at 0.5 ms a sequential
# write is a third faster.
SWITCH_INTERVAL_S = 0.0005
# Less than the least core; and where the kernel pipes cores to a program, which 0 does not keep it from, it dumps none at 1
# (fs/coredump.c: that marks the program's own process).
_NO_CORE_BYTES = 1
# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8

_NO_FSYNC = "this server has no fsync@openssh.com: what it has received may be lost if it crashes."


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command with ``argv`` (default: the process's); returns the exit status, having said why on stderr."""
    words = sys.argv[1:] if argv is None else argv
    if list(words[:1]) == ["mount-helper"]:  # no place of a mount is without a colon
        return helper.exit_status(_status_of(lambda: _help_mount(words[1:])))
    return _status_of(lambda: _run(words))


def _status_of(run: Callable[[], int]) -> int:
    try:
        return run()
    except SftpMountError as error:
        priority = "<3>" if logs.is_journal(sys.stderr, os.environ) else ""
        print(f"{priority}sftpmount: {printable(str(error))}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("sftpmount: interrupted.", file=sys.stderr)
        return daemon.INTERRUPTED


def _run(argv: Sequence[str]) -> int:
    if list(argv[:1]) == ["audit"]:
        return _audit(argv[1:])
    if argv and argv[0] in commands.COMMANDS:
        return commands.run(argv, directory.places(os.environ, os.geteuid()))
    return _mount_line(options.split(argv))


def _help_mount(argv: Sequence[str]) -> int:
    call = helper.understand(argv)
    for name in call.left_out:
        print(f"sftpmount: option {printable(name[:40])!r} is not known, and left out.", file=sys.stderr)
    return _mount_line(call.line, fake=call.fake)


def _mount_line(line: options.CommandLine, *, fake: bool = False) -> int:
    """Do what a sorted command line asks for; with ``fake`` as mount -f does, all but the mount."""
    if _answers(line):
        return 0
    wanted = options.understand(line)
    if wanted.setuid is not None:
        _become(wanted.setuid)
    wanted = _independent_of_cwd(wanted)
    hidden = mountpoint.check(wanted.mountpoint, nonempty=wanted.nonempty)
    with _dependencies():
        from .fs import fuse  # late: --help needs neither libfuse nor paramiko
        from .ssh import connect  # noqa: F401  here rather than in the child, so that what it lacks is told

    fuse.check_available()
    if fake:
        return 0
    if wanted.foreground:
        daemon.leave(_mount(wanted, lambda: None))

    def check_usable() -> None:
        # FUSE has a device number of its own: while the old one is seen, what is written goes into the bare directory.
        try:
            seen = os.stat(wanted.mountpoint).st_dev
        except OSError as error:
            raise MountpointError(
                f"{wanted.mountpoint} is mounted but not usable ({error.strerror}): see the log."
            ) from None
        if seen == hidden:
            raise MountpointError(f"{wanted.mountpoint} does not show the mount: look who else mounts there.")

    try:
        daemon.in_background(lambda ready: _mount(wanted, ready), check_usable)
    except BaseException:
        if mountpoint.is_stale(wanted.mountpoint):
            mountpoint.OwnMount(wanted.mountpoint).unmount()
        raise
    return 0


def _become(name: str) -> None:
    """Make this process that user's, with his groups and home directory."""
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        raise UsageError(f"option setuid: there is no user {name!r} here: name another.") from None
    if user.pw_uid == os.geteuid():
        return
    if os.geteuid() != 0:
        raise UsageError(f"option setuid={name} is for root: leave it out to mount as yourself.")
    os.initgroups(name, user.pw_gid)
    os.setgid(user.pw_gid)
    os.setuid(user.pw_uid)
    os.environ.update(HOME=user.pw_dir, USER=name, LOGNAME=name)


def _answers(line: options.CommandLine) -> bool:
    """Print the help or version that a command line asks for; False where it asks for neither."""
    text = usage.answer(line)
    if text:
        sys.stdout.write(text)
    return bool(text)


@contextlib.contextmanager
def _dependencies() -> Iterator[None]:
    """Around imports that need more than Python: raises SftpMountError, with what to install, where that is not there."""
    try:
        yield
    except ImportError as error:
        raise SftpMountError(
            f"{sys.executable} lacks what sftpmount needs ({error}): install sftpmount and its Python packages into an "
            "environment of their own, with pipx or as README.md says under Install, and run the command from there."
        ) from error


def _audit(argv: Sequence[str]) -> int:
    line = options.split(argv, further=["json"])
    if _answers(line):
        return 0
    wanted = options.understand_audit(line)
    _keep_secrets(wanted)
    logs.configure(
        wanted.log_level, log_file=wanted.log_file, stream=sys.stderr if wanted.debug else None, syslog=""
    )
    with _dependencies():
        from . import audit  # late: --help needs no paramiko

    return audit.run(wanted, as_json=line.json)


def _mount(wanted: MountOptions, ready: Callable[[], None]) -> int:
    """Connect, mount, serve until unmounted, store what is held; returns the exit status. ``ready`` is called in between."""
    daemon.die_of_stop_signals()
    _keep_secrets(wanted)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    _tune_malloc()
    prompt = Prompt(os.environ, batch_mode=wanted.ssh.batch_mode)
    terminal = None
    if wanted.foreground:
        terminal = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    notices = logs.configure(wanted.log_level, log_file=wanted.log_file, stream=terminal)

    notify = Notify(os.environ)

    def usable() -> None:
        for notice in notices:  # not before: a failure is to be the only thing said
            prompt.notice(notice)
        ready()
        notify.tell(
            "READY=1", f"STATUS={printable(wanted.fsname)} is mounted on {printable(wanted.mountpoint)}"
        )

    lost = _connect_and_serve(wanted, prompt, usable, notify)
    for each in lost:
        log.error("not stored: %s", each)
    return 1 if lost else 0


def _keep_secrets(wanted: MountOptions) -> None:
    """No core of this process or of what it runs, unless asked for: it would hold keys, passwords and what is in the files.

    Not by prctl(PR_SET_DUMPABLE), which would also take from us, unless we are root, the sight of what our threads wait in.
    """
    if not wanted.core_dumps:
        _, hard = resource.getrlimit(resource.RLIMIT_CORE)
        limit = _NO_CORE_BYTES if hard == resource.RLIM_INFINITY else min(_NO_CORE_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))


def _tune_malloc() -> None:
    """For blocks of 128 KiB that come and go by the thousand, in glibc.

    It gives threads heaps of their own, and each keeps what it once needed: Python's threads allocate in turn. And it gives
    the end of a heap back to the kernel as soon as it is free, which clears every page when the next block needs it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 2)
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        mallopt(_M_TRIM_THRESHOLD, 16 << 20)
    except AttributeError:
        pass  # another libc


def _connect_and_serve(
    wanted: MountOptions, prompt: Prompt, ready: Callable[[], None], notify: Notify
) -> List[str]:
    """Wire the parts and run them; returns what could not be stored ("path: reason")."""
    from .fs.filesystem import Filesystem
    from .sftp.remote import Remote
    from .ssh.connect import Dialer

    dialer = Dialer(wanted.ssh, prompt)
    remote = Remote(
        dialer,
        retry_timeout_s=wanted.retry_timeout_s,
        alive_interval_s=wanted.server_alive_interval_s,
        alive_count_max=wanted.server_alive_count_max,
        lanes=wanted.lanes,
    )
    filesystem = Filesystem(
        remote,
        wanted.directory,
        commit=wanted.commit,
        dir_cache_timeout_s=wanted.dir_cache_timeout_s,
        entries_max=wanted.entries_max,
        cache_bytes_max=wanted.cache_bytes_max,
        dirty_bytes_max=wanted.dirty_bytes_max,
        read_ahead_bytes_max=wanted.read_ahead_bytes_max,
        idmap_user=wanted.idmap == "user",
        contain_symlinks=wanted.contain_symlinks,
        transform_symlinks=wanted.transform_symlinks,
    )
    try:
        remote.start()
        filesystem.start()
        # The log says so, too, but in the background nobody sees it.
        if not wanted.foreground and not filesystem.describe()["fsync"]:
            prompt.notice(_NO_FSYNC)

        def drain() -> List[str]:
            with notify.draining(lambda: (len(filesystem.unstored()), remote.connected)):
                return filesystem.drain()

        panel = Panel(
            {
                "mountpoint": wanted.mountpoint,
                "source": wanted.fsname,
                "host": dialer.target.host,
                "port": dialer.target.port,
                "read_only": wanted.ro,
            },
            remote,
            filesystem,
            places=directory.places(os.environ, os.geteuid()),
            metrics_file=wanted.metrics_file,
        )
        return _serve(filesystem, panel, wanted, ready, drain)
    except ChannelRefused as error:
        place = wanted.ssh.host
        raise RemoteDirectoryError(f"{place} offers no SFTP ({error}): enable the subsystem there.") from None
    except ConnectionLost as error:
        raise Unreachable(f"{wanted.ssh.host} ended the connection ({error}): its log may say why.") from None
    finally:
        filesystem.close()
        remote.close()


def _serve(
    filesystem: Filesystem,
    panel: Panel,
    wanted: MountOptions,
    ready: Callable[[], None],
    drain: Callable[[], List[str]],
) -> List[str]:
    """Mount ``filesystem`` until it is unmounted or a signal comes, then ``drain``; returns what could not be stored."""
    from .fs import callers, fuse

    own: mountpoint.OwnMount
    noise = None if wanted.debug else daemon.Noise()

    def serve(on_ready: Callable[[], None], on_forced: Callable[[], None]) -> None:
        def mounted() -> None:
            nonlocal own
            own = mountpoint.OwnMount(wanted.mountpoint)
            on_ready()

        fuse.serve(
            filesystem,
            wanted.mountpoint,
            fuse_options=_fuse_options(wanted),
            on_ready=mounted,
            on_forced=on_forced,
        )

    def usable(end: Callable[[], None]) -> None:
        def unmount_unless_busy() -> str:
            why = own.unmount_unless_busy()
            if not why:
                end()  # somebody may use it still
            return why

        panel.start(own.device, is_mounted=own.is_mounted, unmount=unmount_unless_busy)
        if noise:
            noise.end()
        log.info("%s is mounted on %s", wanted.fsname, wanted.mountpoint)
        ready()

    def is_elsewhere() -> bool:
        """A container or a service that was started meanwhile has a copy of the mount, as unshare(1) describes."""
        return not own.is_mounted() and callers.is_connected()

    def unstored() -> List[str]:
        return [os.fsdecode(path) + ": interrupted" for path in filesystem.unstored()]

    try:
        with daemon.harmless_stderr() if wanted.debug else contextlib.nullcontext():
            lost = daemon.supervise(
                serve,
                ready=usable,
                unmount=lambda: own.unmount() and callers.is_connected(),
                is_elsewhere=is_elsewhere,
                store=drain,
                unstored=unstored,
                on_signals={signal.SIGUSR1: panel.dump},
            )
        panel.close(lost)
        return lost
    except MountpointError as error:
        said = noise.end() if noise else ""
        raise MountpointError(f"{error} ({said})" if said else str(error)) from None
    except daemon.Abandoned as error:
        panel.close(error.unstored)
        for each in error.unstored:
            log.error("not stored: %s", each)
        daemon.leave(1)  # an orderly exit would wait for the threads that wait for the server


def _fuse_options(wanted: MountOptions) -> Dict[str, Union[str, bool]]:
    """libfuse's own, values escaped as it reads them."""
    given: Dict[str, Union[str, bool, None]] = {
        **{name: value or True for name, value in wanted.fuse_options},
        "fsname": wanted.fsname,
        "subtype": wanted.subtype,
        "uid": None if wanted.uid is None else str(wanted.uid),
        "gid": None if wanted.gid is None else str(wanted.gid),
        "umask": None if wanted.umask is None else f"{wanted.umask:o}",
        "allow_other": wanted.allow_other,
        "allow_root": wanted.allow_root,
        "default_permissions": wanted.default_permissions,
        "ro": wanted.ro,
        "nonempty": True,  # mountpoint.check has looked
        "debug": wanted.debug,
    }
    return {
        name: value if value is True else value.replace("\\", "\\\\").replace(",", "\\,")
        for name, value in given.items()
        if value is not None and value is not False
    }


# Keywords of ssh_config whose values name files.
_FILE_KEYWORDS = ("certificatefile", "globalknownhostsfile", "identityagent", "revokedhostkeys")


def _independent_of_cwd(wanted: MountOptions) -> MountOptions:
    """The same with absolute paths, since the mount's process leaves the working directory."""
    ssh = wanted.ssh
    return replace(
        wanted,
        mountpoint=os.path.realpath(wanted.mountpoint),
        log_file=wanted.log_file and os.path.abspath(wanted.log_file),
        metrics_file=wanted.metrics_file and os.path.abspath(wanted.metrics_file),
        ssh=replace(
            ssh,
            config_file=ssh.config_file and _absolute(ssh.config_file),
            identity_files=tuple(map(_absolute, ssh.identity_files)),
            known_hosts_files=tuple(map(_absolute, ssh.known_hosts_files)),
            ssh_options=tuple(
                (keyword, _absolute(value) if keyword in _FILE_KEYWORDS else value)
                for keyword, value in ssh.ssh_options
            ),
        ),
    )


def _absolute(path: str) -> str:
    """``path`` made absolute, unless it is "none", begins with a token of ssh_config or names an environment variable."""
    return (
        path
        if path.startswith(("~", "%", "$")) or path in ("none", "SSH_AUTH_SOCK")
        else os.path.abspath(path)
    )
