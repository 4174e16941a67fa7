"""The report of an audit, for a person and for a program (pure). Its text is harmless: every line goes through printable()."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

from .errors import SftpMountError
from .logs import printable
from .sftp.wire import Limits
from .ssh.audit import CATEGORIES, PROFILES, Algorithm, Finding, HostKey, ProfileFindings, SshFindings
from .ssh.policy import REFUSED, Agreement

FORMAT = 1  # of the JSON: a key that is there stays there, with its meaning
WIDTH = 100

FIT, REMARKS, UNFIT = "fit", "fit with remarks", "refused"
_EXIT_STATUS = {FIT: 0, REMARKS: 1, UNFIT: 2}

_TITLES = {
    "kex": "key exchange",
    "host_key": "host key types",
    "cipher": "ciphers",
    "mac": "MACs",
    "compression": "compression",
}
_DIRECTIONS = {"": "", "out": " (to the server only)", "in": " (from the server only)"}

_DURABLE = (
    "The server has fsync@openssh.com. Once a program's close() or fsync() has returned, the file is on the server's disk: a "
    "crash or a power failure there does not lose it."
)
_NOT_DURABLE = (
    "The server has no fsync@openssh.com. What a backup tool was told is stored may be in the server's memory only, for half a "
    "minute or so: a crash or a power failure there can lose it, or leave files that are empty or cut short. After one, check "
    "the repository before you rely on it. OpenSSH's own SFTP server has the extension."
)
_UNKNOWN = "Not found out, since that takes a login."


@dataclass(frozen=True)
class SftpFindings:
    """What a login showed. ``why``: why there was none, where it was not ``reached``; ``fsync`` None then.

    ``limits`` are those that a mount would work with, in bytes; ``extensions`` name -> version.
    """

    reached: bool = False
    why: str = ""
    directory: str = ""
    extensions: Dict[str, str] = field(default_factory=dict)
    limits: Optional[Limits] = None
    fsync: Optional[bool] = None


@dataclass(frozen=True)
class Report:
    """Everything found. A mount would be refused for the ``refusals``; the ``remarks`` are worth a look."""

    ssh: SshFindings
    sftp: SftpFindings
    refusals: Tuple[Finding, ...]
    remarks: Tuple[Finding, ...]

    @property
    def result(self) -> str:
        return UNFIT if self.refusals else REMARKS if self.remarks else FIT

    @property
    def exit_status(self) -> int:
        return _EXIT_STATUS[self.result]


def durability(fsync: Optional[bool]) -> str:
    """What the presence of fsync@openssh.com (None: not known) means to who makes backups."""
    return _UNKNOWN if fsync is None else _DURABLE if fsync else _NOT_DURABLE


# -- for a program -----------------------------------------------------------------------------------------------------


def as_dict(report: Report) -> Dict[str, Any]:
    """The report as JSON takes it."""
    ssh, sftp = report.ssh, report.sftp
    return {
        "format": FORMAT,
        "result": report.result,
        "exit_status": report.exit_status,
        "refusals": _findings(report.refusals),
        "remarks": _findings(report.remarks),
        "server": {"host": ssh.host, "port": ssh.port, "user": ssh.user, "software": ssh.software},
        "profile": ssh.profile,
        "profiles": {
            each.profile: {
                "agreed": None if each.agreement is None else asdict(each.agreement),
                "refusals": _findings(each.refusals),
            }
            for each in ssh.profiles
        },
        "offer": {
            category: [_algorithm(each) for each in ssh.algorithms if each.category == category]
            for category in CATEGORIES
        },
        "strict_kex": ssh.strict_kex,
        "host_keys": [asdict(key) for key in ssh.host_keys],
        "authentication": None if ssh.methods is None else list(ssh.methods),
        "sftp": {
            "reached": sftp.reached,
            "why": sftp.why,
            "directory": sftp.directory,
            "extensions": sftp.extensions,
            "limits": None if sftp.limits is None else sftp.limits._asdict(),
        },
        "durability": {"fsync": sftp.fsync, "meaning": durability(sftp.fsync)},
    }


def failure_as_dict(host: str, error: SftpMountError) -> Dict[str, Any]:
    """The same beginning, where there was nothing to look at."""
    return {
        "format": FORMAT,
        "result": "failed",
        "exit_status": error.exit_status,
        "refusals": [{"problem": printable(str(error)), "sshd_config": []}],
        "remarks": [],
        "server": {"host": host},
    }


def _findings(findings: Sequence[Finding]) -> List[Dict[str, Any]]:
    return [{"problem": printable(each.problem), "sshd_config": list(each.server_lines)} for each in findings]


def _algorithm(each: Algorithm) -> Dict[str, Any]:
    verdicts = {profile: {"verdict": word, "why": why} for profile, (word, why) in each.standings.items()}
    return {"name": each.name, "directions": each.directions or "both", **verdicts}


# -- for a person ------------------------------------------------------------------------------------------------------


def as_text(report: Report) -> str:
    """The report in lines of about 100 columns."""
    ssh = report.ssh
    lines = [f"{ssh.user}@{ssh.host} port {ssh.port}: {ssh.software or 'no greeting'}"]
    lines += ["", *_table(ssh)]
    lines += ["", "What would be agreed"]
    for each in ssh.profiles:
        lines += _entry(f"{each.profile:<12}", _outcome(each, each.profile == ssh.profile))
    offered = "offered" if ssh.strict_kex else "NOT offered"
    lines += ["", f"Strict key exchange (against the Terrapin attack): {offered}"]
    lines += ["", "Host keys", *(line for key in ssh.host_keys for line in _host_key(key))]
    lines += ["", *_entry("Login methods: ", _methods(ssh.methods), indent="")]
    lines += ["", *_sftp(report.sftp)]
    lines += ["", *_entry("Durability: ", durability(report.sftp.fsync), indent="")]
    for title, findings in (("Refused, because", report.refusals), ("Remarks", report.remarks)):
        if findings:
            lines += ["", title, *(line for each in findings for line in _finding(each))]
    if any(each.server_lines for each in (*report.refusals, *report.remarks)):
        lines += [
            "",
            "On the server, test the new sshd_config with sshd -t, and reload sshd from a session that stays open.",
        ]
    verdict = {FIT: "Fit", REMARKS: "Fit, with remarks,", UNFIT: "Refused"}[report.result]
    lines += ["", f"{verdict} under security={ssh.profile}."]
    return "\n".join(map(printable, lines))


def _table(ssh: SshFindings) -> Iterator[str]:
    names = [each.name + _DIRECTIONS[each.directions] for each in ssh.algorithms]
    width = max(map(len, names), default=0) + 4
    heads = [profile + ("*" if profile == ssh.profile else "") for profile in PROFILES]
    yield f"{'Offered':<{width}}{''.join(f'{head:<12}' for head in heads)}".rstrip()
    category = ""
    for each, name in zip(ssh.algorithms, names):
        if each.category != category:
            category = each.category
            yield f" {_TITLES[category]}"
        words = "".join(f"{each.standings[profile][0]:<12}" for profile in PROFILES)
        yield f"{'  ' + name:<{width}}{words}{_why(each)}".rstrip()
    yield f" * the profile of this mount (-o security={ssh.profile})"


def _why(each: Algorithm) -> str:
    """One clause for the three verdicts: a reason to refuse says for whom, unless it is for all."""
    reasons: Dict[str, List[str]] = {}
    for profile, (word, why) in each.standings.items():
        if word == REFUSED:
            reasons.setdefault(why, []).append(profile)
    if not reasons:
        return each.standings[PROFILES[0]][1]
    return "; ".join(
        why if len(profiles) == len(PROFILES) or "security=" in why else f"{', '.join(profiles)}: {why}"
        for why, profiles in reasons.items()
    )


def _outcome(each: ProfileFindings, is_mounts_own: bool) -> str:
    if each.agreement is not None:
        return _agreed(each.agreement)
    if is_mounts_own:
        return "refused, see below"
    # What to do about it comes behind the semicolon, and only the mount's own profile has to be cured.
    return "refused. " + " ".join(
        refusal.problem.split(";")[0].rstrip(".") + "." for refusal in each.refusals
    )


def _agreed(agreement: Agreement) -> str:
    ways = [
        f"{cipher} with {mac}" if mac else cipher
        for cipher, mac in (
            (agreement.cipher_out, agreement.mac_out),
            (agreement.cipher_in, agreement.mac_in),
        )
    ]
    return ", ".join((agreement.kex, agreement.host_key, " and back ".join(dict.fromkeys(ways))))


def _host_key(key: HostKey) -> Iterator[str]:
    kind = f"{key.kind} ({key.bits} bits)" if key.bits else key.kind
    used = ", the one a mount uses" if key.is_used else ""
    yield f"  {kind:<24}{key.fingerprint or key.standing}{used}"
    yield f"  {'':<24}{key.standing + ': ' if key.fingerprint else ''}{key.detail}".rstrip(" :")


def _methods(methods: Optional[Sequence[str]]) -> str:
    if methods is None:
        return "not found out"
    if not methods:
        return "none is offered"
    return "nothing is asked for" if methods == ("none",) else ", ".join(methods)


def _sftp(sftp: SftpFindings) -> Iterator[str]:
    if not sftp.reached:
        yield from _entry("SFTP: ", f"not reached, since {sftp.why}.", indent="")
        return
    yield f"SFTP, in {sftp.directory}"
    yield from _entry("extensions  ", ", ".join(sftp.extensions) or "none")
    if sftp.limits is not None:
        limits = sftp.limits
        handles = f"{limits.open_handles} open files" if limits.open_handles else "open files not limited"
        named = "" if "limits@openssh.com" in sftp.extensions else " (assumed, since the server names none)"
        yield from _entry(
            "limits      ",
            f"{limits.read_bytes} bytes a read, {limits.write_bytes} a write, {handles}{named}",
        )


def _finding(finding: Finding) -> Iterator[str]:
    yield from _entry("- ", finding.problem)
    for title, lines in (
        (
            "OpenSSH: beside the HostKey lines of the server's sshd_config (without any, ssh-keygen -A will do):",
            [line for line in finding.server_lines if _is_added(line)],
        ),
        (
            "OpenSSH: in the server's sshd_config, in place of any other line with this keyword:",
            [line for line in finding.server_lines if not _is_added(line)],
        ),
    ):
        if lines:
            yield from (f"    {title}", *(f"      {line}" for line in lines))


def _is_added(line: str) -> bool:
    return line.startswith("HostKey ")


def _entry(head: str, text: str, indent: str = "  ") -> List[str]:
    return textwrap.wrap(
        printable(text),
        WIDTH,
        initial_indent=indent + head,
        subsequent_indent=indent + " " * len(head) if indent else "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
