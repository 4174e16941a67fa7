"""known_hosts as OpenSSH reads it (sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT"), and the verdict on a server's host key.

1. A malformed line is skipped and never spoils the rest; a file that exists but cannot be read is an error, since it may
   revoke keys.
2. ``@revoked`` wins over everything, in whatever file it stands.
3. A certificate counts only where an ``@cert-authority`` line for this host names its CA. Where such a line exists, a bad
   certificate is refused even under accept-new, unless the plain key in it is known by itself.
4. A host that is known by other key types only is not new: its key has changed.
5. Lines without a port hold for every port: what they revoke and certify always, the keys that they name where no line
   speaks of the port.
"""

from __future__ import annotations

import base64
import binascii
import enum
import errno
import fcntl
import hashlib
import hmac
import os
import re
import time
from dataclasses import dataclass
from typing import Callable, Iterable, List, Optional, Sequence, Tuple

from sftpmount.errors import HostKeyError
from sftpmount.ssh import keys
from sftpmount.ssh.policy import printable

FILE_BYTES_MAX = 64 * 1024 * 1024
LOCK_WAIT_S = 10.0
_WHITESPACE = b" \t"


class Trust(enum.Enum):
    KNOWN = "known"
    CERTIFIED = "certified"
    UNKNOWN = "unknown"
    CHANGED = "changed"
    REVOKED = "revoked"
    BAD_CERTIFICATE = "bad certificate"


@dataclass(frozen=True)
class Entry:
    """One line: ``marker`` is "", "revoked" or "cert-authority"; ``hosts`` the first field as it stands."""

    marker: str
    hosts: str
    blob: bytes
    path: str
    line: int

    @property
    def key_type(self) -> str:
        return keys.key_type(self.blob)

    def matches(self, name: str) -> bool:
        """Whether this line speaks of ``name`` (lower case; ``[host]:port`` where the port is not 22)."""
        if self.hosts.startswith("|"):
            return _hash_matches(self.hosts, name)
        return match_patterns(self.hosts, name)


@dataclass(frozen=True)
class HostName:
    """How a host is looked up: ``listed`` as known_hosts writes it, ``plain`` without its port, as certificates do."""

    listed: str
    plain: str

    @property
    def both(self) -> Tuple[str, ...]:
        """The name for this port, then the name for every port, where these differ."""
        return tuple(dict.fromkeys((self.listed, self.plain)))

    @classmethod
    def of(cls, host: str, port: int, alias: Optional[str] = None) -> HostName:
        """``alias`` is HostKeyAlias, which stands for host and port."""
        if alias:
            return cls(alias.lower(), alias.lower())
        plain = host.lower()
        return cls(plain if port == 22 else f"[{plain}]:{port}", plain)


@dataclass(frozen=True)
class Verdict:
    """What known_hosts says of a key; ``entry`` is the line that decided, ``reason`` a clause for a person."""

    trust: Trust
    reason: str = ""
    entry: Optional[Entry] = None

    @property
    def is_good(self) -> bool:
        return self.trust in (Trust.KNOWN, Trust.CERTIFIED)


def match_patterns(patterns: str, name: str) -> bool:
    """OpenSSH's match_pattern_list: comma-separated, ``*`` and ``?``, and ``!`` which vetoes; case does not count."""
    found = False
    for pattern in patterns.lower().split(","):
        negated = pattern.startswith("!")
        if _wildcard(pattern[1:] if negated else pattern, name):
            if negated:
                return False
            found = True
    return found


def _wildcard(pattern: str, name: str) -> bool:
    """Match ``*`` and ``?`` in time linear to len(pattern) * len(name): lines come from files others may write."""
    at, star, mark = 0, -1, 0
    position = 0
    while position < len(name):
        if at < len(pattern) and pattern[at] == "*":
            star, mark = at, position
            at += 1
        elif at < len(pattern) and pattern[at] in ("?", name[position]):
            at, position = at + 1, position + 1
        elif star >= 0:
            mark += 1
            at, position = star + 1, mark
        else:
            return False
    return pattern[at:].strip("*") == ""


def hash_name(name: str, salt: bytes) -> str:
    """``|1|salt|hash`` of a host name; HMAC-SHA1 hides names here and authenticates nothing."""
    digest = hmac.new(salt, name.encode("utf-8", "surrogateescape"), hashlib.sha1).digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"


def _hash_matches(field: str, name: str) -> bool:
    parts = field.split("|")
    if len(parts) != 4 or parts[1] != "1":
        return False
    try:
        salt = base64.b64decode(parts[2], validate=True)
        base64.b64decode(parts[3], validate=True)
    except (binascii.Error, ValueError):
        return False
    return hmac.compare_digest(hash_name(name, salt).split("|")[3], parts[3])


def parse(text: bytes, path: str = "") -> List[Entry]:
    """The entries of a known_hosts file's bytes; comments, SSH-1 keys and malformed lines are left out."""
    entries = []
    for number, raw in enumerate(text.split(b"\n"), 1):
        entry = _parse_line(raw.strip(b" \t\r"), path, number)
        if entry is not None:
            entries.append(entry)
    return entries


def _parse_line(raw: bytes, path: str, number: int) -> Optional[Entry]:
    if not raw or raw.startswith(b"#"):
        return None
    marker = ""
    if raw.startswith(b"@"):
        head, _, raw = raw.replace(b"\t", b" ").partition(b" ")
        if head not in (b"@revoked", b"@cert-authority"):
            return None
        marker = head[1:].decode("ascii")
        raw = raw.lstrip(_WHITESPACE)
    fields = re.split(rb"[ \t]+", raw, maxsplit=1)
    if len(fields) < 2:
        return None
    try:
        blob, _ = keys.decode_public(fields[1])
        keys.plain_key(blob)
    except keys.MalformedKey:
        return None
    return Entry(marker, fields[0].decode("utf-8", "surrogateescape"), blob, path, number)


class KnownHosts:
    """The entries of several known_hosts files, in the order they count."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = tuple(entries)

    @classmethod
    def load(cls, paths: Sequence[str]) -> KnownHosts:
        """Read the files that exist. Raises HostKeyError for one that exists but cannot be read."""
        entries: List[Entry] = []
        for path in paths:
            entries.extend(parse(_read(path), path))
        return cls(entries)

    def key_types(self, name: HostName) -> List[str]:
        """The host's known key types, best known first; a certificate type where a CA may vouch for the host.

        Negotiation should prefer these: a server that has a known key should be asked for that one.
        """
        found: List[str] = []
        if self._speaking_of(name, "cert-authority"):
            found.extend(keys.certificate_type(kind) for kind in keys.SIGNATURE_ALGORITHMS)
        for host in name.both:
            found.extend(entry.key_type for entry in self._marked("") if entry.matches(host))
        return list(dict.fromkeys(found))

    def check(
        self,
        name: HostName,
        blob: bytes,
        *,
        now_s: float,
        ca_algorithms: Sequence[str] = keys.SIGNATURE_ALGORITHMS,
        rsa_bits_min: int = 0,
        revoked: Sequence[bytes] = (),
    ) -> Verdict:
        """The verdict on the key or certificate ``blob`` of host ``name``.

        ``now_s`` is seconds since 1970, ``ca_algorithms`` the signatures a CA may use, ``rsa_bits_min`` the size of its key
        where that is RSA, ``revoked`` further bad keys.
        """
        try:
            plain = keys.plain_key(blob)
            certificate = keys.parse_certificate(blob) if plain != blob else None
        except keys.MalformedKey as error:
            return Verdict(Trust.BAD_CERTIFICATE, f"it cannot be read: {error}")
        suspects = [plain] if certificate is None else [plain, certificate.ca_key]
        if any(suspect in revoked for suspect in suspects):
            return Verdict(Trust.REVOKED, "the list of revoked host keys names it")
        for entry in self._speaking_of(name, "revoked"):
            if keys.plain_key(entry.blob) in suspects:
                return Verdict(Trust.REVOKED, entry=entry)
        problem: Optional[Verdict] = None
        if certificate is not None:
            verdict = self._check_certificate(name, certificate, now_s, ca_algorithms, rsa_bits_min)
            if verdict.trust is Trust.CERTIFIED:
                return verdict
            problem = verdict
        verdict = self._check_plain(name, plain)
        if problem is not None and verdict.trust is Trust.UNKNOWN:
            return problem if problem.entry is not None else Verdict(Trust.UNKNOWN, problem.reason)
        return verdict

    def _check_certificate(
        self,
        name: HostName,
        certificate: keys.Certificate,
        now_s: float,
        ca_algorithms: Sequence[str],
        rsa_bits_min: int,
    ) -> Verdict:
        """CERTIFIED, or BAD_CERTIFICATE with the @cert-authority entry that covers the host, if one does."""
        covering = self._speaking_of(name, "cert-authority")
        entry = next((entry for entry in covering if entry.blob == certificate.ca_key), None)
        if entry is None:
            reason = (
                f"its certificate is signed by the CA {keys.fingerprint(certificate.ca_key)}, "
                f"which no @cert-authority line names for this host"
            )
            return Verdict(Trust.BAD_CERTIFICATE, reason, covering[0] if covering else None)
        reason = certificate_fault(certificate, name.plain, now_s, ca_algorithms, rsa_bits_min)
        return Verdict(Trust.BAD_CERTIFICATE if reason else Trust.CERTIFIED, reason, entry)

    def _check_plain(self, name: HostName, blob: bytes) -> Verdict:
        mine = [entry for entry in self._marked("") if entry.matches(name.listed)]
        candidates = mine or [entry for entry in self._marked("") if entry.matches(name.plain)]
        same = next((entry for entry in candidates if entry.blob == blob), None)
        if same is not None:
            return Verdict(Trust.KNOWN, entry=same)
        if not mine:
            return Verdict(Trust.UNKNOWN)
        kind = keys.key_type(blob)
        of_this_type = (entry for entry in mine if entry.key_type == kind)
        return Verdict(Trust.CHANGED, entry=next(of_this_type, mine[0]))

    def _speaking_of(self, name: HostName, marker: str) -> List[Entry]:
        """The lines with this marker for the host, whether they name its port or not."""
        return [entry for entry in self._marked(marker) if any(map(entry.matches, name.both))]

    def _marked(self, marker: str) -> Iterable[Entry]:
        return (entry for entry in self._entries if entry.marker == marker)


def certificate_fault(
    certificate: keys.Certificate,
    host: str,
    now_s: float,
    ca_algorithms: Sequence[str],
    rsa_bits_min: int,
) -> str:
    """Why a certificate does not prove that its holder is ``host``, as a clause; "" where it does."""
    if certificate.kind != keys.CERT_TYPE_HOST:
        return "it is not a host certificate"
    if certificate.signature_algorithm not in ca_algorithms:
        return f"its CA signed with {printable(certificate.signature_algorithm)}, which is not accepted"
    bits = keys.rsa_bits(certificate.ca_key)
    if bits is not None and bits < rsa_bits_min:
        return f"its CA has an RSA key of {bits} bits, and {rsa_bits_min} and more are accepted"
    if not certificate.signature_is_good():
        return "its CA's signature is wrong"
    if certificate.critical_options:
        return (
            f"it has a critical option that is not understood ({printable(certificate.critical_options[0])})"
        )
    if now_s < certificate.valid_after_s:
        return f"it is not valid before {_date(certificate.valid_after_s)}"
    if certificate.valid_before_s != keys.FOREVER and now_s >= certificate.valid_before_s:
        return f"it expired at {_date(certificate.valid_before_s)}"
    principals = certificate.principals
    if (
        not principals
    ):  # as OpenSSH since 10.3: such a one would stand for every host that the CA may vouch for
        return "it names no host (ssh-keygen -s with -n)"
    if not any(_wildcard(principal.lower(), host) for principal in principals):
        return f"it is for {printable(', '.join(principals))}, not for {host}"
    return ""


def _date(time_s: int) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(time_s))
    except (OverflowError, ValueError, OSError):
        return f"second {time_s}"


def load_revoked(path: str) -> List[bytes]:
    """The plain keys of a RevokedHostKeys file. Raises HostKeyError for a binary KRL, or a file that cannot be read."""
    text = _read(path, must_exist=True)
    if text.startswith(b"SSHKRL"):
        raise HostKeyError(
            f"RevokedHostKeys {path} is a binary KRL, which is not understood; list the revoked keys as text instead."
        )
    found = []
    for raw in text.split(b"\n"):
        try:
            found.append(keys.plain_key(keys.decode_public(raw.strip())[0]))
        except keys.MalformedKey:
            if raw.strip() and not raw.strip().startswith(b"#"):
                raise HostKeyError(f"RevokedHostKeys {path} has a line that is not a public key.") from None
    return found


def _read(path: str, must_exist: bool = False) -> bytes:
    try:
        with open(path, "rb") as file:
            text = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and not must_exist:
            return b""
        raise HostKeyError(
            f"{path} cannot be read ({error.strerror}), so host keys cannot be checked."
        ) from None
    if len(text) > FILE_BYTES_MAX:
        raise HostKeyError(f"{path} is larger than {FILE_BYTES_MAX} bytes; is it a known_hosts file?")
    return text


def accept_new(
    path: str,
    name: HostName,
    blob: bytes,
    *,
    hashed: bool = False,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Verdict:
    """Append an unknown host key to ``path``, unless another process did meanwhile.

    The file is checked again under its lock: KNOWN where the key is in it now, CHANGED where a different one is.
    Raises HostKeyError where the file cannot be written.
    """
    plain = keys.plain_key(blob)
    host = hash_name(name.listed, os.urandom(20)) if hashed else name.listed
    line = f"{host} {keys.key_type(plain)} {base64.b64encode(plain).decode()}\n"
    try:
        os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
        descriptor = _open_locked(path, clock() + LOCK_WAIT_S, sleep, clock)
        try:
            text = _read_all(descriptor)
            verdict = KnownHosts(parse(text, path)).check(name, plain, now_s=0.0)
            if verdict.trust is not Trust.UNKNOWN:
                return verdict
            newline = "\n" if text and not text.endswith(b"\n") else ""
            _write_all(descriptor, (newline + line).encode("utf-8", "surrogateescape"))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise HostKeyError(
            f"The new host key cannot be added to {path} ({error.strerror}); make the file writable."
        ) from None
    return Verdict(Trust.KNOWN)


def _open_locked(
    path: str, deadline: float, sleep: Callable[[float], None], clock: Callable[[], float]
) -> int:
    """Open for appending and lock; opened again where an editor or ssh-keygen replaced the file meanwhile."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            here, there = os.fstat(descriptor), os.stat(path)
            if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
                return descriptor
        except FileNotFoundError:
            pass  # replaced between open and stat: try again
        except BlockingIOError:
            if clock() >= deadline:
                os.close(descriptor)
                raise TimeoutError(errno.ETIMEDOUT, "another process keeps it locked") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        sleep(0.02)


def _read_all(descriptor: int) -> bytes:
    pieces: List[bytes] = []
    offset = 0
    while True:
        piece = os.pread(descriptor, 1 << 20, offset)
        if not piece or offset > FILE_BYTES_MAX:
            return b"".join(pieces)
        pieces.append(piece)
        offset += len(piece)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def refusal(verdict: Verdict, host: str, port: int, blob: bytes) -> HostKeyError:
    """The error for a verdict that is not good: what is wrong, and what a person can do about it."""
    kind, shown = printable(keys.key_type(keys.plain_key(blob))), keys.fingerprint(blob)
    where = host if port == 22 else f"[{host}]:{port}"
    entry = verdict.entry
    place = f"{entry.path}:{entry.line}" if entry is not None else "the list of revoked keys"
    if verdict.trust is Trust.CHANGED and entry is not None:
        return HostKeyError(
            f"The host key of {where} has CHANGED: the server shows {kind} {shown}, but {place} says "
            f"{entry.key_type} {keys.fingerprint(entry.blob)}. Either someone is between you and the server, or it has "
            f"a new key: verify that with its administrator, and only then correct that line."
        )
    if verdict.trust is Trust.REVOKED:
        return HostKeyError(
            f"The host key of {where}, {kind} {shown}, is REVOKED in {place}: whoever holds it must not be trusted. "
            f"Ask the server's administrator for its new key."
        )
    if verdict.trust is Trust.BAD_CERTIFICATE:
        return HostKeyError(
            f"The host certificate of {where} ({kind} {shown}) is refused: {verdict.reason}. "
            f"The server's administrator has to issue a certificate that the @cert-authority line covers."
        )
    detail = f" ({verdict.reason})" if verdict.reason else ""
    scan = f"ssh-keyscan -p {port} {host}" if port != 22 else f"ssh-keyscan {host}"
    return HostKeyError(
        f"The host key of {where} is unknown: {kind} {shown}{detail}. Verify that fingerprint with the server's "
        f"administrator, then add the key to known_hosts ({scan}, or ssh once), "
        f"or mount with -o StrictHostKeyChecking=accept-new."
    )
