"""The command line and the words of fstab, as one frozen value (pure: no I/O, no environment).

``GROUPS`` and ``OPTIONS`` are the one table of every ``-o`` word: it drives the parser, ``--help`` and the tests
that hold the documents to it. Names are sshfs's where the meaning is sshfs's, and ssh_config's where it is ssh's:
those have capital letters here and are recognised in any case. Where a word is said twice the last one counts, as
with mount(8); lists (``IdentityFile``) grow.

The only exception is ``UsageError``: one sentence that names the option and says what to write instead. The value
of an unknown word is never repeated in it, since it might be a password.
"""

from __future__ import annotations

import difflib
import getopt
import os
import re
from dataclasses import dataclass, replace
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from . import option_values as to
from .errors import UsageError
from .option_values import Convert, MiB
from .place import parse_place

AUDIT_TIMEOUT_S = 10
COMMANDS = ("audit", "status", "sync", "umount")  # cli's, which stand in place of a place


@dataclass(frozen=True)
class SshOptions:
    """How to reach, verify and log in to one server. None or (): not said, ssh_config or the default decides."""

    host: str  # as typed, without brackets; an alias of ssh_config perhaps
    user: Optional[str] = None
    port: Optional[int] = None
    security: str = "hardened"  # or "compatible", "pq"
    config_file: Optional[str] = None  # None: the usual two files; "none": no file at all
    identity_files: Tuple[str, ...] = ()  # "~" and "%" tokens not yet expanded, as in ssh_config
    known_hosts_files: Tuple[str, ...] = ()
    strict_host_key_checking: Optional[str] = None  # or "yes", "accept-new"
    connect_timeout_s: float = 30.0
    password_stdin: bool = False
    batch_mode: bool = False  # never ask a person
    ciphers: Optional[str] = None  # these four: OpenSSH list syntax; they narrow or reorder, never widen
    macs: Optional[str] = None
    kex_algorithms: Optional[str] = None
    host_key_algorithms: Optional[str] = None
    ssh_options: Tuple[Tuple[str, str], ...] = ()  # (ssh_config keyword in lower case, value), in order


@dataclass(frozen=True)
class MountOptions:
    """One mount. Sizes in bytes, times in seconds."""

    ssh: SshOptions
    directory: bytes  # on the server; b"" is the home directory
    mountpoint: str  # as typed; surrogateescape for bytes that are not UTF-8
    commit: str = "close"  # close() means on the server's disk; or "fsync": only fsync() does
    retry_timeout_s: Optional[float] = 300.0  # None: wait for ever ("hard"); 0: fail at once
    server_alive_interval_s: float = 15.0
    server_alive_count_max: int = 3
    lanes: int = 6  # SFTP channels on the one connection, at most
    dir_cache_timeout_s: float = 20.0  # 0: names and attributes are not cached
    entries_max: int = 200_000
    cache_bytes_max: int = 64 * MiB
    dirty_bytes_max: int = 64 * MiB  # dirty, in flight and uncommitted together
    read_ahead_bytes_max: int = 8 * MiB  # 0: no read-ahead
    uid: Optional[int] = None
    gid: Optional[int] = None
    umask: Optional[int] = None
    idmap: str = "none"  # or "user"
    contain_symlinks: bool = False  # links that lead out of the mount are not shown
    transform_symlinks: bool = False  # absolute ones to what is mounted are shown as relative ones
    allow_other: bool = False
    allow_root: bool = False
    default_permissions: bool = False
    ro: bool = False
    setuid: Optional[str] = None  # the user that the process is to be; None: who started it
    nonempty: bool = False
    fsname: str = ""  # as `mount` and `df` show it
    subtype: str = "sftpmount"
    fuse_options: Tuple[Tuple[str, str], ...] = ()  # for libfuse: ("noatime", ""), ("max_read", "65536")
    foreground: bool = False
    debug: bool = False
    log_file: Optional[str] = None  # None: stderr in the foreground, else syslog
    log_level: str = "info"
    core_dumps: bool = False  # a crash may leave a core, with keys and data in it
    metrics_file: Optional[str] = None  # for node_exporter's textfile collector


# -- the table -----------------------------------------------------------------------------------------------


class Option(NamedTuple):
    """One ``-o`` word. Without a ``field`` nothing is kept of it; ``value`` is what follows "=" in --help."""

    name: str
    convert: Convert
    field: str = ""  # of MountOptions, or "ssh." + one of SshOptions; a tuple is added to it
    value: str = ""
    help: str = ""

    @property
    def verdict(self) -> str:
        """ "taken", "without effect", or "refused" (but for ``value``, where there is one)."""
        if self.field:
            return "taken"
        return "without effect" if self.convert in (to.ignored, to.workaround) else "refused"


# fmt: off
GROUPS: Tuple[Tuple[str, Tuple[Option, ...]], ...] = (
    ("Connection", (
        Option("Port", to.number(1, 65535), "ssh.port", "N", "the server's port; also -p N"),
        Option("ssh_config", to.text, "ssh.config_file", "FILE", "in place of ~/.ssh/config; also -F FILE"),
        Option("ProxyJump", to.keyword, "ssh.ssh_options", "HOST", "go through this host, itself verified"),
        Option("ConnectTimeout", to.seconds(1), "ssh.connect_timeout_s", "S", "to connect and log in (30)"),
        Option("ServerAliveInterval", to.seconds(1, "; to wait without end write retry_timeout=hard"),
               "server_alive_interval_s", "S", "ask a silent server for a sign of life (15)"),
        Option("ServerAliveCountMax", to.number(1, 1000), "server_alive_count_max", "N", "then reconnect (3)"),
        Option("retry_timeout", to.seconds(0, hard=None), "retry_timeout_s", "S|hard",
               "how long programs wait through an outage (300)"),
        Option("lanes", to.number(1, 16), "lanes", "N", "SFTP channels on the connection, at most (6)"),
    )),
    ("Trust and login", (
        Option("security", to.choice("hardened", "compatible", "pq"), "ssh.security", "hardened|compatible|pq",
               "algorithms (hardened by default)"),
        Option("StrictHostKeyChecking", to.host_key_checking, "ssh.strict_host_key_checking", "yes|accept-new",
               "or trust new hosts (yes)"),
        Option("UserKnownHostsFile", to.file_names, "ssh.known_hosts_files", "FILE",
               "in place of ~/.ssh/known_hosts"),
        Option("Ciphers", to.algorithms, "ssh.ciphers", "LIST", "also MACs, KexAlgorithms, HostKeyAlgorithms"),
        Option("IdentityFile", to.list_of_one, "ssh.identity_files", "FILE", "a private key; may be said again"),
        Option("password_stdin", to.constant(True), "ssh.password_stdin", "",
               "the first line of stdin is the password"),
        Option("BatchMode", to.yes_no, "ssh.batch_mode", "yes|no", "never ask for a password (no)"),
    )),
    ("Storing and caching", (
        Option("commit", to.choice("close", "fsync"), "commit", "close|fsync",
               "which of them puts a file on the server's disk"),
        Option("dirty_size", to.size(MiB), "dirty_bytes_max", "SIZE", "written, not yet stored data (64M)"),
        Option("cache_size", to.size(MiB), "cache_bytes_max", "SIZE", "file data kept for reading (64M)"),
        Option("read_ahead", to.size(0), "read_ahead_bytes_max", "SIZE", "fetched before it is asked for (8M)"),
        Option("dcache_timeout", to.seconds(0), "dir_cache_timeout_s", "S", "names are trusted for so long (20)"),
        Option("dcache_max_size", to.number(100, 1 << 31), "entries_max", "N", "names kept (200000)"),
    )),
    ("What is shown, and to whom", (
        Option("ro", to.constant(True), "ro", "", "read only"),
        Option("uid", to.number(0, (1 << 32) - 2), "uid", "N", "shown as the owner; also gid=N"),
        Option("umask", to.number(0, 0o777, 8), "umask", "MASK", "modes are shown without these bits"),
        Option("idmap", to.choice("none", "user"), "idmap", "none|user", "user: the login's is shown as yours"),
        Option("contain_symlinks", to.constant(True), "contain_symlinks", "", "refuse links that lead out of the mount"),
        Option("transform_symlinks", to.constant(True), "transform_symlinks", "", "absolute links into the mount are relative"),
        Option("allow_other", to.constant(True), "allow_other", "", "to other users, too; also allow_root"),
        Option("default_permissions", to.constant(True), "default_permissions", "", "the kernel checks modes"),
        Option("nonempty", to.constant(True), "nonempty", "", "hide what the mountpoint holds"),
        Option("fsname", to.text, "fsname", "NAME", "the name that mount and df show"),
    )),
    ("The process", (
        Option("setuid", to.user, "setuid", "USER", "run as this user, if root starts it"),
        Option("log_file", to.text, "log_file", "FILE", "in place of syslog"),
        Option("log_level", to.choice("error", "warning", "info", "debug"), "log_level", "error|warning|info|debug",
               "what is logged (info)"),
        Option("metrics", to.text, "metrics_file", "FILE", "kept up to date for node_exporter (.prom)"),
    )),
)
# fmt: on


def _rows(convert: Convert, why: str, names: str, field: str = "", value: str = "") -> List[Option]:
    return [Option(name, convert, field, value, why) for name in names.split()]


def _refused(reason: str, names: str) -> List[Option]:
    return _rows(to.only(reason), reason, names)


OPTIONS: Tuple[Option, ...] = (
    *(option for _, group in GROUPS for option in group),
    # The lesser names of the above.
    Option(
        "MACs", to.algorithms, "ssh.macs", "LIST", "those for message integrity, narrowed or in another order"
    ),
    Option(
        "KexAlgorithms", to.algorithms, "ssh.kex_algorithms", "LIST", "those for the key exchange, likewise"
    ),
    Option(
        "HostKeyAlgorithms",
        to.algorithms,
        "ssh.host_key_algorithms",
        "LIST",
        "the types of host keys, likewise",
    ),
    Option("User", to.user, "ssh.user", "NAME", "who logs in, as user@ before the host"),
    Option("rw", to.constant(False), "ro", help="the contrary of ro"),
    Option("gid", to.number(0, (1 << 32) - 2), "gid", "N", "shown as the group"),
    Option("allow_root", to.constant(True), "allow_root", help="to root, too, but to nobody else"),
    Option("subtype", to.text, "subtype", "NAME", "the type shown, behind fuse. (sftpmount)"),
    Option(
        "core_dumps",
        to.constant(True),
        "core_dumps",
        help="a crash may leave a core, with keys and data in it",
    ),
    Option("foreground", to.constant(True), "foreground", help="also -f"),
    Option("debug", to.constant(True), "debug", help="also -d"),
    Option("no_readahead", to.constant(0), "read_ahead_bytes_max", help="read_ahead=0"),
    *_rows(to.number(100, 1 << 31), "older name of dcache_max_size", "cache_max_size", "entries_max", "N"),
    *_rows(to.seconds(0), "older name of dcache_timeout", "cache_timeout", "dir_cache_timeout_s", "S"),
    *_rows(
        to.seconds(0),
        "the shortest of them is dcache_timeout",
        "dcache_stat_timeout dcache_link_timeout dcache_dir_timeout "
        "cache_stat_timeout cache_link_timeout cache_dir_timeout",
        "separate_timeout_s",
        "S",
    ),
    *_rows(to.yes_no, "with no as dcache_timeout=0", "dir_cache cache", "dir_cache", "yes|no"),
    # ssh_config's other keywords, for ssh.connect to act on.
    *_rows(
        to.keyword,
        "as in ssh_config",
        "AddressFamily BindAddress BindInterface CanonicalDomains CanonicalizeFallbackLocal CanonicalizeHostname "
        "CanonicalizeMaxDots CanonicalizePermittedCNAMEs CASignatureAlgorithms CertificateFile "
        "ChallengeResponseAuthentication ConnectionAttempts GlobalKnownHostsFile HashKnownHosts HostKeyAlias HostName "
        "IdentitiesOnly IdentityAgent IPQoS KbdInteractiveAuthentication NumberOfPasswordPrompts "
        "PasswordAuthentication PreferredAuthentications ProxyCommand PubkeyAcceptedAlgorithms "
        "PubkeyAcceptedKeyTypes PubkeyAuthentication RekeyLimit RequiredRSASize RevokedHostKeys TCPKeepAlive",
        "ssh.ssh_options",
        "VALUE",
    ),
    *_rows(
        to.ignored,
        "a mount has no use for it",
        "AddKeysToAgent CheckHostIP ClearAllForwardings CompressionLevel ControlMaster ControlPath ControlPersist "
        "EscapeChar ExitOnForwardFailure FingerprintHash ForwardAgent ForwardX11 ForwardX11Trusted GatewayPorts "
        "GSSAPIAuthentication GSSAPIDelegateCredentials HostbasedAuthentication LogLevel ProxyUseFdpass RequestTTY "
        "SendEnv SetEnv UpdateHostKeys VerifyHostKeyDNS VisualHostKey",
    ),
    *_rows(to.ignored, "data travels uncompressed: backups are compressed already", "Compression"),
    *_rows(to.only("only SSH 2 is spoken; leave it out", "2"), "only 2", "Protocol ssh_protocol", "", "2"),
    *_rows(to.only("no command is run; leave it out", "no"), "only no", "PermitLocalCommand", "", "no"),
    *_rows(
        to.only("every host key is checked; name it with HostKeyAlias", "no"),
        "only no",
        "NoHostAuthenticationForLocalhost",
        "",
        "no",
    ),
    *_refused(
        "a smart card is reached through an agent; write IdentityAgent=SOCKET instead",
        "PKCS11Provider SecurityKeyProvider SmartcardDevice",
    ),
    *_refused(
        "a mount forwards nothing and runs nothing; leave it out",
        "LocalCommand LocalForward RemoteForward DynamicForward RemoteCommand Tunnel",
    ),
    # sshfs's other words.
    *_rows(to.ignored, "always on", "reconnect"),
    *_rows(to.ignored, "connects at once; write x-systemd.automount in fstab to delay it", "delay_connect"),
    *_rows(to.workaround, "what the server can do is found out", "workaround", "", "LIST"),
    *_rows(to.ignored, "one connection with several lanes does the same", "max_conns"),
    *_rows(to.ignored, "always so", "sync_readdir sync_read async_read"),
    *_rows(to.ignored, "nothing is cleaned by the clock", "dcache_clean_interval dcache_min_clean_interval"),
    *_rows(to.ignored, "what the server can do is found out", "disable_hardlink no_check_root"),
    *_refused("close() waits until the server has it all, which is what counts; leave it out", "sshfs_sync"),
    Option("no_contain_symlinks", to.constant(False), "contain_symlinks", help="as is the default"),
    *_refused(
        "a link to a parent would be a tree without end, and rm -r would empty what links lead to; "
        "mount that directory, too, or write transform_symlinks",
        "follow_symlinks",
    ),
    *_refused("names are not translated; write idmap=user, or uid=N and gid=N", "uidfile gidfile nomap"),
    *_refused("no ssh program is run; write its options here, or ssh_config=FILE", "ssh_command"),
    *_refused("the connection would not be encrypted; leave it out", "directport passive slave vsock"),
    *_rows(
        to.only("the subsystem sftp is used; name the program in the server's sshd_config", "sftp"),
        "only sftp",
        "sftp_server",
        "",
        "sftp",
    ),
    *_refused("everyone could read it in the process list; write password_stdin instead", "password"),
    # libfuse's words.
    *_rows(
        to.ignored,
        "the mount keeps the kernel's caches right by itself",
        "kernel_cache auto_cache noauto_cache direct_io big_writes large_read entry_timeout negative_timeout "
        "attr_timeout ac_attr_timeout noforget remember use_ino readdir_ino hard_remove intr intr_signal "
        "atomic_o_trunc no_rofd_flush max_write max_background max_readahead congestion_threshold no_remote_lock",
    ),
    *_rows(to.ignored, "a dead mount is safer for backups than an empty directory", "auto_unmount"),
    *_refused("write the directory behind the host's colon instead", "modules subdir rellinks norellinks"),
    *_refused("names are bytes, and left as they are", "from_code to_code"),
    *_rows(to.fuse_number, "the kernel's longest read, in bytes", "max_read", "fuse_options", "N"),
    # mount(8)'s words.
    *_rows(
        to.fuse_flag,
        "as in mount(8)",
        "suid nosuid dev nodev exec noexec atime noatime sync async dirsync",
        "fuse_options",
    ),
    *_rows(
        to.ignored,
        "for mount(8) and systemd",
        "defaults auto noauto user users nouser owner group _netdev nofail relatime norelatime strictatime "
        "nostrictatime lazytime nolazytime diratime nodiratime comment silent loud mand nomand iversion noiversion "
        "symfollow helper uhelper",
    ),
    *_refused("libfuse does not know it; write contain_symlinks instead", "nosymfollow"),
    *_refused("libfuse 2 does not know it; write setuid=USER instead", "drop_privileges"),
    *_refused("a mount cannot change its options; unmount it and mount it again", "remount"),
)

_BY_NAME: Dict[str, Option] = {option.name: option for option in OPTIONS}
_BY_KEYWORD: Dict[str, Option] = {name.lower(): row for name, row in _BY_NAME.items() if name != name.lower()}


# -- the command line ----------------------------------------------------------------------------------------

_WORD_OF_FLAG: Dict[str, Tuple[str, Optional[str]]] = {
    "-f": ("foreground", None),
    "--foreground": ("foreground", None),
    "-d": ("debug", None),
    "--debug": ("debug", None),
    "-v": ("log_level", "debug"),
    "--verbose": ("log_level", "debug"),
    "-C": ("Compression", "yes"),
    "-1": ("ssh_protocol", "1"),
    "-r": ("ro", None),
    "-w": ("rw", None),
}
_WORD_OF_FLAG_WITH_VALUE = {"-p": "Port", "-F": "ssh_config"}
_FLAGS_WITHOUT_EFFECT = ("-s", "-n", "-t")  # sshfs's single thread or mount(8)'s "sloppy"; no mtab; type


@dataclass(frozen=True)
class CommandLine:
    """The arguments sorted, not yet understood; ``words`` are those of -o and of the flags that stand for one."""

    operands: Tuple[str, ...]
    words: Tuple[Tuple[str, Optional[str]], ...]
    help: bool
    version: bool
    json: bool = False


def parse(argv: Sequence[str]) -> MountOptions:
    """The mount that ``argv`` (without the program's name) asks for, or UsageError."""
    return understand(split(argv))


def split(argv: Sequence[str], *, further: Sequence[str] = ()) -> CommandLine:
    """Sort ``argv``; ``further`` are long flags of a command. UsageError for an unknown flag, one that lacks its value, or a
    control character."""
    long_flags = ["help", "version", "foreground", "debug", "verbose", *further]
    try:
        found, operands = getopt.gnu_getopt(list(argv), "o:p:F:t:fdvC1rwsnhV", long_flags)
    except getopt.GetoptError as error:
        raise UsageError(f"{error.msg!r}: sftpmount --help shows what there is.") from None
    words: List[Tuple[str, Optional[str]]] = []
    flags = set()
    for flag, value in found:
        if flag == "-o":
            words.extend(_words(value))
        elif flag in _WORD_OF_FLAG_WITH_VALUE:
            words.append((_WORD_OF_FLAG_WITH_VALUE[flag], value))
        elif flag in _WORD_OF_FLAG:
            words.append(_WORD_OF_FLAG[flag])
        elif flag not in _FLAGS_WITHOUT_EFFECT:
            flags.add(flag)
    # mount.fuse(8) ends root's options with these two unless nosuid or nodev is among them: nobody has asked for them, and a
    # server would have its set-user-id programs count here.
    if words[-2:] == [("dev", None), ("suid", None)]:
        del words[-2:]
    for name, text in words:
        if any(ord(character) < 32 or ord(character) == 127 for character in name + (text or "")):
            raise UsageError(f"option {name[:40]!r} holds a control character: write it without.")
    return CommandLine(
        operands=tuple(operands),
        words=tuple(words),
        help=bool(flags & {"-h", "--help"}),
        version=bool(flags & {"-V", "--version"}),
        json="--json" in flags,
    )


def _words(text: str) -> Iterator[Tuple[str, Optional[str]]]:
    """The words of one -o, unescaped as libfuse does: a backslash before three octal digits or any character."""
    for word in re.findall(r"(?:\\.|[^,\\]|\\$)+", text, re.DOTALL):
        plain = re.sub(r"\\([0-3][0-7]{2}|.)", _unescaped, word, flags=re.DOTALL)
        name, equals, value = plain.partition("=")
        yield name, value if equals else None


def _unescaped(escape: re.Match[str]) -> str:
    return escape[1] if len(escape[1]) == 1 else os.fsdecode(bytes([int(escape[1], 8)]))


def understand(line: CommandLine) -> MountOptions:
    """The mount that a sorted command line asks for, or UsageError."""
    if len(line.operands) != 2:
        raise _wrong_operands(line.operands)
    mountpoint = line.operands[1]
    if not mountpoint or "\0" in mountpoint:
        raise UsageError(f"{mountpoint!r} is no mountpoint: name the directory to mount on.")
    return _mount_of(line, line.operands[0], mountpoint)


def understand_audit(line: CommandLine) -> MountOptions:
    """The mount that an audit is to judge, or UsageError. Its mountpoint is ""; a host alone stands for its home directory."""
    if len(line.operands) != 1:
        shown = repr(line.operands[1]) + " is a word too many" if line.operands else "nothing to audit"
        raise UsageError(f"{shown}: write sftpmount audit [options] [user@]host:[dir], and no mountpoint.")
    place = line.operands[0]
    if re.fullmatch(r"[^:/\[]+|([^:/\[]*@)?\[[^\]]*\]", place):
        place += ":"
    # A person waits for it, and it makes several connections; whoever says ConnectTimeout wins over this.
    words = (("ConnectTimeout", str(AUDIT_TIMEOUT_S)), *line.words)
    return _mount_of(replace(line, words=words), place, "")


def _mount_of(line: CommandLine, place_as_typed: str, mountpoint: str) -> MountOptions:
    place = parse_place(place_as_typed)
    values: Dict[str, Any] = {}
    for name, text in line.words:
        option = _find(name)
        if option is None:
            continue
        value = option.convert(option.name, text)
        if isinstance(value, tuple):
            value = values.get(option.field, ()) + value
        elif isinstance(value, list):
            value = tuple(value)
        if option.field:
            values[option.field] = value
    _settle(values, place.user, place.port)
    ssh = {field[4:]: values.pop(field) for field in list(values) if field.startswith("ssh.")}
    values.setdefault("fsname", place_as_typed)
    return MountOptions(SshOptions(place.host, **ssh), place.directory, mountpoint, **values)


def _settle(values: Dict[str, Any], user: Optional[str], port: Optional[int]) -> None:
    """Combine what several words, or a word and the place, say about one thing."""
    for name, said in (("User", user), ("Port", port)):
        field = "ssh." + name.lower()
        if said is not None and values.setdefault(field, said) != said:
            raise UsageError(f"option {name}={values[field]} contradicts {said} in the place: write one.")
    if values.get("allow_other") and values.get("allow_root"):
        raise UsageError("options allow_other and allow_root exclude each other: write one of them.")
    separate = values.pop("separate_timeout_s", None)
    if separate is not None:
        values["dir_cache_timeout_s"] = min(separate, values.get("dir_cache_timeout_s", separate))
    if not values.pop("dir_cache", True):
        values["dir_cache_timeout_s"] = 0.0
    if values.get("debug"):
        values.update(foreground=True, log_level="debug")


def is_known(name: str) -> bool:
    """Whether ``name`` is a word of -o, taken or refused."""
    try:
        _find(name)
    except UsageError:
        return False
    return True


def _find(name: str) -> Optional[Option]:
    """The row of a word, None for systemd's and empty ones, UsageError for an unknown one."""
    if not name or name.startswith(("x-", "X-")):
        return None
    option = _BY_NAME.get(name) or _BY_KEYWORD.get(name.lower())
    if option:
        return option
    lower = {known.lower(): known for known in _BY_NAME}
    near = difflib.get_close_matches(name.lower(), lower, 1)
    hint = f"the nearest is {lower[near[0]]}" if near else "sftpmount --help shows what there is"
    raise UsageError(f"option {name[:40]!r} is not known: {hint}.")


def _wrong_operands(operands: Sequence[str]) -> UsageError:
    if not operands:
        return UsageError("nothing to mount: write [user@]host:[dir] and a mountpoint, or --help.")
    if len(operands) > 2:
        return UsageError(f"{operands[2]!r} is a word too many: write [user@]host:[dir] and a mountpoint.")
    if ":" in operands[0]:
        return UsageError(f"no mountpoint: write the directory to mount on behind {operands[0]!r}.")
    near = difflib.get_close_matches(operands[0], COMMANDS, 1)
    hint = f"did you mean {near[0]}? See" if near else "see"
    return UsageError(f"{operands[0]!r} is neither a command nor [user@]host:[dir]: {hint} sftpmount --help.")
