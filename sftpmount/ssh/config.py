"""From what the user typed and ssh_config says to one ``Target``: whom to reach, how, whom to trust and what to offer.

Where the ``ssh`` program is installed, ``ssh -G`` evaluates the configuration, so that it means here exactly what it means to
ssh. Without it paramiko's parser reads the same files; what that one would get wrong (``Include`` of a file that exists,
``Match`` by anything but host and user) is refused with a sentence instead of guessed.

Nothing from the command line or fstab can become an option or a shell word: host and user names are checked here, before
they reach any other program, and again as ssh_config returns them.
"""

from __future__ import annotations

import glob
import hashlib
import os
import pwd
import re
import shlex
import shutil
import socket
import subprocess
from dataclasses import dataclass, replace
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import paramiko

from sftpmount import option_values as to
from sftpmount.errors import UsageError
from sftpmount.options import SshOptions
from sftpmount.ssh import keys
from sftpmount.ssh.agent import agent_path
from sftpmount.ssh.policy import Policy, apply_list, make_policy

METHODS = ("publickey", "keyboard-interactive", "password")
USER_CONFIG, SYSTEM_CONFIG = "~/.ssh/config", "/etc/ssh/ssh_config"
DEFAULT_IDENTITIES = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")
DEFAULT_KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2")
DEFAULT_GLOBAL_KNOWN_HOSTS = ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")
# These hand the decision to algorithms that ssh may not know yet, so they never go through ``ssh -G`` from our command line.
_LISTS = ("ciphers", "macs", "kexalgorithms", "hostkeyalgorithms")
_REPEATED = ("identityfile", "certificatefile")
# OpenSSH refuses these in names too (CVE-2023-51385): they could leave a ProxyCommand's or Match exec's shell word.
_FORBIDDEN = frozenset("'`\"$\\;&<>|(){}*?#!~^[]")

# paramiko would expand these for the wrong user, port and home directory, and forgets that %% is a percent sign.
_HIDDEN = str.maketrans("%~", "\x01\x02")
_SHOWN = str.maketrans("\x01\x02", "%~")

Settings = Dict[str, List[str]]


@dataclass(frozen=True)
class Local:
    """This end of the connection, as tokens and ``~`` in ssh_config need it."""

    home: str
    user: str
    hostname: str
    agent_socket: Optional[str]  # SSH_AUTH_SOCK
    ssh_program: Optional[str]  # None: not installed

    @classmethod
    def current(cls) -> Local:
        try:
            entry = pwd.getpwuid(os.getuid())
            home, user = entry.pw_dir, entry.pw_name
        except KeyError:  # no account: a container's random uid
            home, user = os.environ.get("HOME", "/"), os.environ.get("USER", str(os.getuid()))
        agent_socket = os.environ.get("SSH_AUTH_SOCK") or None
        return cls(home, user, socket.gethostname(), agent_socket, shutil.which("ssh"))


@dataclass(frozen=True)
class Target:
    """One server, with everything decided. Paths are absolute or relative to the working directory; times in seconds."""

    alias: str  # as typed
    host: str
    port: int
    user: str
    policy: Policy
    connect_timeout_s: float
    identity_files: Tuple[str, ...]
    default_identity_files: Tuple[str, ...]
    certificate_files: Tuple[str, ...]
    agent_path: Optional[str]
    identities_only: bool
    methods: Tuple[str, ...]  # of authentication, in order
    password_prompts: int
    known_hosts_files: Tuple[str, ...]  # the user's; the first one takes new keys
    global_known_hosts_files: Tuple[str, ...]
    revoked_keys_file: Optional[str]
    accept_new: bool
    hash_known_hosts: bool
    host_key_alias: Optional[str]
    ca_algorithms: Tuple[str, ...]  # signatures a CA of hosts may make
    user_key_algorithms: Tuple[str, ...]  # signatures our keys may make
    proxy_jump: Tuple[str, ...]  # hops, the nearest first
    proxy_command: Optional[str]  # a shell line, tokens expanded
    address_family: int  # socket.AF_*
    bind_address: Optional[str]
    bind_interface: Optional[str]
    tcp_keepalive: bool
    rekey_bytes_max: Optional[int]  # None: what suits the cipher
    rekey_interval_s: Optional[float]  # None: as the transport has it


def resolve(options: SshOptions, local: Local) -> Target:
    """Evaluate ssh_config for these options. Raises UsageError."""
    check_host(options.host)
    if options.user is not None:
        check_user(options.user)
    for keyword, value in options.ssh_options:
        if not keyword.isalnum() or _has_controls(value):
            raise UsageError(f"The option {keyword!r} has characters that ssh_config does not allow.")
        _check_names(keyword, value)
    if local.ssh_program is not None:
        settings = _ask_ssh(local.ssh_program, options, options.host, is_default=False)
        defaults = _ask_ssh(local.ssh_program, options, options.host, is_default=True)
    else:
        settings, defaults = _read_config(options, local), {}
    # What equals ssh's own default was not said by anyone, and our defaults apply.
    said = {key: values for key, values in settings.items() if values != defaults.get(key)}
    for key in set(_LISTS) & set(said) & set(defaults):
        said[key] = [_as_change(said[key][0], defaults[key][0])]
    return _target(options, local, settings, said)


def _check_names(keyword: str, value: str) -> None:
    """The names in an option, before ``ssh -G`` hands them to the shell of a ``Match exec`` as %h, %k and %j."""
    if keyword == "hostname":
        check_host(value.replace("%h", "h").replace("%%", "%"))
    elif keyword == "hostkeyalias" and value.lower() != "none":
        check_host(value)
    elif keyword == "proxyjump" and value.lower() != "none":
        for hop in value.split(","):
            parse_hop(hop)


def check_host(host: str) -> None:
    """Refuse what no host name is, before it reaches a resolver or a command line. Raises UsageError."""
    if not host or host.startswith("-") or _has_controls(host, " /@,") or _FORBIDDEN & set(host):
        raise UsageError(f"{host!r} is not a host name.")


def check_user(user: str) -> None:
    """The same for a user name; a backslash may stand between a domain and a name. Raises UsageError."""
    bad = _FORBIDDEN - {"\\"}
    if (
        not user
        or user.startswith("-")
        or _has_controls(user, " /")
        or bad & set(user)
        or user.endswith("\\")
    ):
        raise UsageError(f"{user!r} is not a user name.")


def _has_controls(text: str, further: str = "") -> bool:
    return any(not (char.isprintable() or "\udc80" <= char <= "\udcff") or char in further for char in text)


def _ask_ssh(program: str, options: SshOptions, host: str, *, is_default: bool) -> Settings:
    """What ``ssh -G`` says: each keyword with its lines. ``is_default``: as if nobody had said anything."""
    command = [program, "-G"]
    if is_default:
        command += ["-F", "none"]
    else:
        if options.config_file is not None:
            command += ["-F", options.config_file]
        if options.port is not None:
            command += ["-p", str(options.port)]
        if options.user is not None:
            command += ["-l", options.user]
        for keyword, value in options.ssh_options:
            if keyword not in _LISTS:
                command += ["-o", f"{keyword}={value}"]
    command += ["--", host]
    try:
        answer = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=options.connect_timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UsageError("Reading ssh_config takes too long (ssh -G); is there a Match exec in it?") from None
    except OSError as error:
        raise UsageError(f"{program} cannot be run ({error.strerror}) to read ssh_config.") from None
    if answer.returncode != 0:
        said = answer.stderr.decode("utf-8", "replace").strip().splitlines()
        lines = [
            line for line in said if not line.startswith("Pseudo-terminal") and "terminating" not in line
        ]
        detail = " ".join(line if line.isprintable() else repr(line) for line in lines[:2])
        raise UsageError(f"ssh does not accept this configuration: {detail or 'ssh -G failed'}")
    settings: Settings = {}
    for line in answer.stdout.decode("utf-8", "surrogateescape").splitlines():
        keyword, _, value = line.partition(" ")
        settings.setdefault(keyword.lower(), []).append(value)
    return settings


def _as_change(value: str, default: str) -> str:
    """A list of algorithms as + or ^ had it, where it takes nothing from ssh's own: ``ssh -G`` writes that one out in full,
    without what ssh does not know, and with what is accepted here only where somebody names it. A list that was
    shortened stays as it is, since - cannot be told from a list of names."""
    names, usual = value.split(","), default.split(",")
    if names[: len(usual)] == usual:
        return "+" + ",".join(names[len(usual) :])
    for count in range(1, len(names)):
        if names[count:] == [name for name in usual if name not in names[:count]]:
            return "^" + ",".join(names[:count])
    return value


def _read_config(options: SshOptions, local: Local) -> Settings:
    """The same without ssh, by paramiko's parser; keywords of the command line come first, since the first value wins."""
    settings: Settings = {}
    for keyword, value in options.ssh_options:
        if keyword in _REPEATED or keyword not in settings:
            settings.setdefault(keyword, []).append(value)
    if options.config_file is None:
        paths = [_tilde(USER_CONFIG, local), SYSTEM_CONFIG]
    else:
        paths = [] if options.config_file.lower() == "none" else [options.config_file]
    text = f"User {options.user}\n" if options.user is not None else ""  # for "Match user"
    for path in paths:
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                if options.config_file is None and path != SYSTEM_CONFIG:
                    _refuse_what_others_may_write(file.fileno(), path)
                # "Match all" ends the last block of one file before the next begins.
                text += _understood(file.read(), path, local) + "\nMatch all\n"
        except FileNotFoundError:
            if options.config_file is not None:
                raise UsageError(f"There is no configuration file {path}.") from None
        except OSError as error:
            raise UsageError(f"{path} cannot be read ({error.strerror}).") from None
    try:
        found = paramiko.SSHConfig.from_text(text.translate(_HIDDEN)).lookup(options.host)
    except Exception as error:  # paramiko raises what comes: its own errors, ValueError, IndexError
        raise UsageError(f"ssh_config cannot be read: {error}") from None
    for keyword, got in found.items():
        values = [value.translate(_SHOWN) for value in (got if isinstance(got, list) else [str(got)])]
        if keyword in _REPEATED:
            settings.setdefault(keyword, []).extend(values)
        elif keyword not in settings:
            settings[keyword] = values
    return settings


def _refuse_what_others_may_write(descriptor: int, path: str) -> None:
    """As ssh does with the user's own file: whoever writes to it decides what runs as this user (ProxyCommand)."""
    status = os.fstat(descriptor)
    if status.st_uid not in (0, os.getuid()) or status.st_mode & 0o022:
        raise UsageError(
            f"{path} belongs to others or may be written by them, so it is not used: correct its owner or mode."
        )


def _understood(text: str, path: str, local: Local) -> str:
    """Refuse what paramiko's parser gets wrong: Include it skips, and an unknown Match criterion it takes for true."""
    kept = []
    for number, line in enumerate(text.split("\n"), 1):
        words = re.split(r"[\s=]+", line.strip())
        keyword, arguments = words[0].lower(), words[1:]
        if keyword == "include":
            base = (
                os.path.join(local.home, ".ssh") if path != SYSTEM_CONFIG else os.path.dirname(SYSTEM_CONFIG)
            )
            if any(glob.glob(os.path.join(base, _tilde(pattern, local))) for pattern in arguments):
                raise UsageError(
                    f"{path}:{number} uses Include, which only the ssh program can follow: "
                    f"install openssh-client, or mount with -F and a plain file."
                )
            continue
        if keyword == "match":
            criteria = [word.lstrip("!").lower() for word in arguments]
            if criteria != ["all"] and not set(criteria[::2]) <= {
                "host",
                "originalhost",
                "user",
                "localuser",
            }:
                raise UsageError(
                    f"{path}:{number} uses a Match that only the ssh program can decide: "
                    f"install openssh-client, or mount with -F and a plain file."
                )
        kept.append(line)
    return "\n".join(kept)


def _target(options: SshOptions, local: Local, settings: Settings, said: Settings) -> Target:
    def first(keyword: str) -> Optional[str]:
        values = settings.get(keyword)
        return values[0] if values and values[0] != "" else None

    def is_on(keyword: str, default: bool) -> bool:
        value = first(keyword)
        return default if value is None else value.lower() in ("yes", "true", "ask")

    def is_set(keyword: str) -> Optional[str]:
        value = first(keyword)
        return None if value is None or value.lower() == "none" else value

    host = (first("hostname") or options.host).replace("%h", options.host).replace("%%", "%")
    user = options.user or first("user") or local.user
    port = options.port if options.port is not None else _port(first("port") or "22")
    alias = is_set("hostkeyalias")
    check_host(host)
    check_user(user)
    if alias is not None:
        check_host(alias)

    jump = is_set("proxyjump")
    tokens = _tokens(options.host, host, port, user, alias, jump, local)

    def paths(values: Sequence[str]) -> Tuple[str, ...]:
        return tuple(_path(value, tokens, local) for value in values if value.lower() != "none")

    def files(keyword: str, default: Sequence[str]) -> Tuple[str, ...]:
        value = said.get(keyword)
        return paths(split_words(value[0]) if value else default)

    def list_of(keyword: str) -> Optional[str]:
        return next(iter(said.get(keyword, ())), None)

    profile = make_policy(
        options.security,
        kex_algorithms=options.kex_algorithms or list_of("kexalgorithms"),
        host_key_algorithms=options.host_key_algorithms or list_of("hostkeyalgorithms"),
        ciphers=options.ciphers or list_of("ciphers"),
        macs=options.macs or list_of("macs"),
        fast_aes=aes_in_hardware(),
    )
    required_bits = _count("RequiredRSASize", first("requiredrsasize") or "0")
    policy = replace(profile, rsa_bits_min=max(profile.rsa_bits_min, required_bits))
    strict = options.strict_host_key_checking or first("stricthostkeychecking") or "yes"
    command = is_set("proxycommand")
    timeout = first("connecttimeout")
    timeout_s = options.connect_timeout_s
    if timeout is not None and timeout.isdigit() and int(timeout) > 0:
        timeout_s = min(timeout_s, float(timeout))
    agent = first("identityagent")
    identities = (*options.identity_files, *said.get("identityfile", []))  # perhaps only "none"
    rekey_bytes_max, rekey_interval_s = _rekey_limit(first("rekeylimit") or "default none")
    return Target(
        alias=options.host,
        host=host,
        port=port,
        user=user,
        policy=policy,
        connect_timeout_s=timeout_s,
        identity_files=paths(identities),
        default_identity_files=() if identities else paths(DEFAULT_IDENTITIES),
        certificate_files=paths(said.get("certificatefile", [])),
        agent_path=_agent(agent, tokens, local),
        identities_only=is_on("identitiesonly", False),
        methods=_methods(first, is_on),
        password_prompts=_count("NumberOfPasswordPrompts", first("numberofpasswordprompts") or "3"),
        known_hosts_files=paths(options.known_hosts_files)
        or files("userknownhostsfile", DEFAULT_KNOWN_HOSTS),
        global_known_hosts_files=files("globalknownhostsfile", DEFAULT_GLOBAL_KNOWN_HOSTS),
        revoked_keys_file=next(iter(paths([is_set("revokedhostkeys") or "none"])), None),
        accept_new=strict == "accept-new",
        hash_known_hosts=is_on("hashknownhosts", False),
        host_key_alias=alias,
        ca_algorithms=_signatures(said, "CASignatureAlgorithms"),
        user_key_algorithms=_signatures(said, "PubkeyAcceptedAlgorithms"),
        proxy_jump=tuple(jump.split(",")) if jump and command is None else (),
        proxy_command=None if command is None else expand_shell(command, tokens),
        address_family=_family(first("addressfamily")),
        bind_address=is_set("bindaddress"),
        bind_interface=is_set("bindinterface"),
        tcp_keepalive=is_on("tcpkeepalive", True),
        rekey_bytes_max=rekey_bytes_max,
        rekey_interval_s=rekey_interval_s,
    )


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= 65535:
        raise UsageError(f"{text!r} is not a port number.")
    return int(text)


def _count(keyword: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UsageError(f"{keyword} {text!r} is not a whole number.")
    return int(text)


def _rekey_limit(value: str) -> Tuple[Optional[int], Optional[float]]:
    """ssh_config(5), RekeyLimit: bytes and seconds, each None where it is not said ("default", "none", or 0 from ssh -G)."""
    words = value.split()
    if not 1 <= len(words) <= 2:
        raise UsageError(f"RekeyLimit {value!r} is not a size, and a time perhaps.")
    amount, time = (*words, "none")[:2]
    bytes_max = None if amount.lower() == "default" else to.size(0)("RekeyLimit", amount)
    return bytes_max or None, to.seconds(0, none=None)("RekeyLimit", time) or None


def _family(value: Optional[str]) -> int:
    return {"inet": socket.AF_INET, "inet6": socket.AF_INET6}.get((value or "").lower(), socket.AF_UNSPEC)


def _signatures(said: Settings, keyword: str) -> Tuple[str, ...]:
    values = said.get(keyword.lower())
    return apply_list(keyword, values[0], keys.SIGNATURE_ALGORITHMS) if values else keys.SIGNATURE_ALGORITHMS


def _methods(first: Callable[[str], Optional[str]], is_on: Callable[[str, bool], bool]) -> Tuple[str, ...]:
    allowed = {
        "publickey": is_on("pubkeyauthentication", True)
        or first("pubkeyauthentication") in ("host-bound", "unbound"),
        "keyboard-interactive": is_on("kbdinteractiveauthentication", True),
        "password": is_on("passwordauthentication", True),
    }
    order = (first("preferredauthentications") or ",".join(METHODS)).split(",")
    return tuple(name for name in order if allowed.get(name, False))


def _agent(value: Optional[str], tokens: Mapping[str, str], local: Local) -> Optional[str]:
    if value is not None and value.startswith("$") and "{" not in value:
        return agent_path(os.environ.get(value[1:]) or "none", local.agent_socket)
    plain = value is None or value.lower() == "none" or value == "SSH_AUTH_SOCK"
    return agent_path(value if plain else _path(value or "", tokens, local), local.agent_socket)


def _tokens(
    original: str, host: str, port: int, user: str, alias: Optional[str], jump: Optional[str], local: Local
) -> Dict[str, str]:
    """ssh_config(5), TOKENS."""
    digest = hashlib.sha1(
        f"{local.hostname}{host}{port}{user}{jump or ''}".encode("utf-8", "surrogateescape")
    )
    return {
        "%": "%",
        "C": digest.hexdigest(),
        "d": local.home,
        "h": host,
        "i": str(os.getuid()),
        "j": jump or "",
        "k": alias or original,
        "L": local.hostname.split(".")[0],
        "l": local.hostname,
        "n": original,
        "p": str(port),
        "r": user,
        "u": local.user,
    }


def expand(text: str, tokens: Mapping[str, str], quote: Callable[[str], str] = str) -> str:
    """Replace %-tokens, each value passed through ``quote``. Raises UsageError for an unknown token."""

    def value(match: re.Match[str]) -> str:
        token = match.group(1)
        if token not in tokens:
            raise UsageError(f"The token %{token} in {text!r} is not known.")
        return "%" if token == "%" else quote(tokens[token])

    return re.sub(r"%(.?)", value, text, flags=re.DOTALL)


def expand_shell(command: str, tokens: Mapping[str, str]) -> str:
    """A ProxyCommand with its tokens expanded; values are quoted, though names were checked already."""
    return expand(command, {token: tokens[token] for token in "%hnpr"}, shlex.quote)


def _path(text: str, tokens: Mapping[str, str], local: Local) -> str:
    def variable(match: re.Match[str]) -> str:
        found = os.environ.get(match.group(1))
        if found is None:
            raise UsageError(f"The environment variable {match.group(1)} in {text!r} is not set.")
        return found

    return expand(re.sub(r"\$\{(\w+)\}", variable, _tilde(_unquoted(text), local)), tokens)


def _tilde(path: str, local: Local) -> str:
    if path == "~" or path.startswith("~/"):
        return local.home + path[1:]
    return os.path.expanduser(path) if path.startswith("~") else path


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text


def split_words(value: str) -> List[str]:
    """Words of an ssh_config value, which may be quoted."""
    return [quoted or bare for quoted, bare in re.findall(r'"([^"]*)"|(\S+)', value)]


def parse_hop(hop: str) -> Tuple[Optional[str], str, Optional[int]]:
    """(user, host, port) of one ProxyJump hop: ``[user@]host[:port]`` or ``ssh://...``. Raises UsageError."""
    text = hop.strip()
    if text.lower().startswith("ssh://"):
        text = text[len("ssh://") :].rstrip("/")
    user, at, place = text.rpartition("@")
    found = re.fullmatch(r"\[([^\]]+)\](?::(\d+))?|([^:\[\]]+)(?::(\d+))?", place)
    if found is None:
        raise UsageError(f"ProxyJump {hop!r} is not [user@]host[:port].")
    host, port = found.group(1) or found.group(3), found.group(2) or found.group(4)
    check_host(host)
    if at:
        check_user(user)
    return user if at else None, host, _port(port) if port else None


def aes_in_hardware(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether the processor has AES instructions, for make_policy(fast_aes=); True where it cannot be known."""
    try:
        with open(cpuinfo, encoding="ascii", errors="replace") as file:
            flags = [line.split() for line in file if line.startswith(("flags", "Features"))]
    except OSError:
        return True
    return not flags or "aes" in flags[0]
