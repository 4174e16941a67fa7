"""Which algorithms are accepted, in which order, and what to say when a server offers none of them. Data and pure functions.

A ``Policy`` is a profile (``hardened``, ``compatible``, ``pq``), possibly narrowed or reordered by the user's lists, never
widened. ``agree`` applies it to the server's offer (RFC 4253 section 7.1: the first of ours that the server has) and raises a
``PolicyError`` whose sentence names what the server offered and what to change; ``weigh`` does the same and goes on to the
end, for whoever wants all the reasons. ``verdict`` grades one algorithm by name, ``standing`` says what a policy does with it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

from sftpmount.errors import PolicyError, UsageError

CERTIFICATE_SUFFIX = "-cert-v01@openssh.com"
STRICT_KEX_SERVER = "kex-strict-s-v00@openssh.com"

# Best first. ML-KEM outlives a recording made today; x25519 and the large groups have no known doubt, the NIST curves do.
_KEX_PQ = ("mlkem768x25519-sha256",)
_KEX = (
    *_KEX_PQ,
    "curve25519-sha256",
    "curve25519-sha256@libssh.org",
    "diffie-hellman-group16-sha512",
    "diffie-hellman-group-exchange-sha256",
    "diffie-hellman-group18-sha512",
    "ecdh-sha2-nistp256",
    "ecdh-sha2-nistp384",
    "ecdh-sha2-nistp521",
)
_KEX_COMPATIBLE = (*_KEX, "diffie-hellman-group14-sha256")

# Every AEAD cipher comes before every cipher that needs a MAC: a server whose MACs are weak is still safe with an AEAD.
# Sealing 32 KiB in this package, AES and SHA-256 in hardware: GCM 14 us with either key size, so the larger one goes first;
# chacha20-poly1305 36 us, CTR with hmac-sha2-256 37 us, with hmac-sha2-512 63 us. Without AES in hardware chacha20 wins.
_CHACHA20 = "chacha20-poly1305@openssh.com"
_GCM = ("aes256-gcm@openssh.com", "aes128-gcm@openssh.com")
_CTR = ("aes128-ctr", "aes192-ctr", "aes256-ctr")
_AEAD = frozenset((*_GCM, _CHACHA20))

_MACS = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com")
_MACS_COMPATIBLE = (*_MACS, "hmac-sha2-256", "hmac-sha2-512")

_HOST_KEYS = (
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "rsa-sha2-512",
    "rsa-sha2-256",
)

# Accepted, but offered only where the user's list or known_hosts names them: constants that nobody has explained, and signatures
# whose maker must never repeat a random number. ssh-audit calls a client that offers them to everybody a failure.
_ON_REQUEST = "*-nistp*"

# What a person calls the list, its keyword in sshd_config, and what an OpenSSH server should have in it for this client.
_WORDING: Dict[str, Tuple[str, str, Tuple[str, ...]]] = {
    "kex": ("key exchanges", "KexAlgorithms", ("curve25519-sha256", "curve25519-sha256@libssh.org")),
    "host_key": ("host key types", "HostKeyAlgorithms", ("ssh-ed25519", "rsa-sha2-512", "rsa-sha2-256")),
    "cipher": ("ciphers", "Ciphers", _GCM),
    "mac": ("MACs", "MACs", ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com")),
}
# Where ssh-keygen -A puts it.
_HOST_KEY_LINE = "HostKey /etc/ssh/ssh_host_ed25519_key"


@dataclass(frozen=True)
class Policy:
    """What is offered, best first; sizes are in bits. ``host_keys`` holds all that are accepted, plain and certificates, and
    ``host_keys_offered`` those which a server is offered of which nothing is known."""

    profile: str
    kex: Tuple[str, ...]
    host_keys: Tuple[str, ...]
    host_keys_offered: Tuple[str, ...]
    ciphers: Tuple[str, ...]
    macs: Tuple[str, ...]
    rsa_bits_min: int
    gex_bits_min: int

    @property
    def plain_host_keys(self) -> Tuple[str, ...]:
        """Accepted host key algorithms without certificates: also the signatures that user keys may make."""
        return _plain(self.host_keys)


@dataclass(frozen=True)
class ServerOffer:
    """The name-lists of the server's KEXINIT; ``out`` is client to server. Markers such as ext-info-s are not in ``kex``."""

    kex: Tuple[str, ...]
    host_keys: Tuple[str, ...]
    ciphers_out: Tuple[str, ...]
    ciphers_in: Tuple[str, ...]
    macs_out: Tuple[str, ...]
    macs_in: Tuple[str, ...]
    strict_kex: bool
    compression_out: Tuple[str, ...] = ()
    compression_in: Tuple[str, ...] = ()

    def ways(self, category: str) -> Tuple[Tuple[str, ...], Tuple[str, ...]]:
        """What is offered of a category of ``verdict``, client to server and back; some have one list for both."""
        return {
            "kex": (self.kex, self.kex),
            "host_key": (self.host_keys, self.host_keys),
            "cipher": (self.ciphers_out, self.ciphers_in),
            "mac": (self.macs_out, self.macs_in),
            "compression": (self.compression_out, self.compression_in),
        }[category]


@dataclass(frozen=True)
class Agreement:
    """What both sides use; a MAC is "" where the cipher authenticates by itself."""

    kex: str
    host_key: str
    cipher_out: str
    cipher_in: str
    mac_out: str
    mac_in: str


def is_aead(cipher: str) -> bool:
    """True where the cipher authenticates by itself, so that no MAC is agreed."""
    return cipher in _AEAD


def make_policy(
    profile: str = "hardened",
    *,
    kex_algorithms: Optional[str] = None,
    host_key_algorithms: Optional[str] = None,
    ciphers: Optional[str] = None,
    macs: Optional[str] = None,
    fast_aes: bool = True,
) -> Policy:
    """The policy of a profile, narrowed or reordered by lists in OpenSSH's syntax (None: as the profile has them).

    ``fast_aes``: the processor has AES instructions; without them chacha20-poly1305 goes first.
    Raises UsageError for an unknown profile, or a list that leaves nothing.
    """
    base = _profile(profile, fast_aes)
    host_keys = _narrow("HostKeyAlgorithms", base.host_keys, base.host_keys, host_key_algorithms, profile)
    unasked = tuple(name for name in base.kex if not _matches(_ON_REQUEST, name))
    return replace(
        base,
        kex=_narrow("KexAlgorithms", base.kex, unasked, kex_algorithms, profile),
        host_keys=host_keys,
        host_keys_offered=_plain(
            _narrow("HostKeyAlgorithms", base.host_keys, base.host_keys_offered, host_key_algorithms, profile)
        ),
        ciphers=_narrow("Ciphers", base.ciphers, base.ciphers, ciphers, profile),
        macs=_narrow("MACs", base.macs, base.macs, macs, profile),
    )


def _profile(profile: str, fast_aes: bool) -> Policy:
    aead = (*_GCM, _CHACHA20) if fast_aes else (_CHACHA20, *_GCM)
    hardened = Policy(
        profile=profile,
        kex=_KEX,
        host_keys=(*_HOST_KEYS, *(name + CERTIFICATE_SUFFIX for name in _HOST_KEYS)),
        host_keys_offered=tuple(name for name in _HOST_KEYS if not _matches(_ON_REQUEST, name)),
        ciphers=(*aead, *_CTR),
        macs=_MACS,
        rsa_bits_min=3072,
        gex_bits_min=3072,
    )
    if profile == "hardened":
        return hardened
    if profile == "compatible":
        return replace(
            hardened, kex=_KEX_COMPATIBLE, macs=_MACS_COMPATIBLE, rsa_bits_min=2048, gex_bits_min=2048
        )
    if profile == "pq":
        # MACs stay in the offer, for servers that look for a common one even where the cipher is AEAD; none is used.
        return replace(hardened, kex=_KEX_PQ, ciphers=aead)
    raise UsageError(f"security={printable(profile)} is not a profile; choose hardened, compatible or pq.")


def _plain(host_keys: Iterable[str]) -> Tuple[str, ...]:
    return tuple(name for name in host_keys if not name.endswith(CERTIFICATE_SUFFIX))


def _narrow(
    keyword: str, accepted: Tuple[str, ...], unasked: Tuple[str, ...], spec: Optional[str], profile: str
) -> Tuple[str, ...]:
    """OpenSSH's list syntax over what the profile accepts: a list, or + (add), - (remove), ^ (put first) to what stands there
    unasked."""
    result = unasked if spec is None else apply_list(keyword, spec, accepted, unasked)
    if not result:
        raise UsageError(
            f"{keyword}={printable(spec or '')} leaves nothing that security={profile} accepts; name at least one of "
            f"{', '.join(accepted)}."
        )
    return result


def apply_list(
    keyword: str, spec: str, accepted: Sequence[str], unasked: Optional[Sequence[str]] = None
) -> Tuple[str, ...]:
    """The names that a list in OpenSSH's syntax leaves of ``accepted``; ``unasked``: those that +, - and ^ change (all of them).

    Raises UsageError for a negation, which would be a narrowing that is not understood."""
    unasked = tuple(accepted if unasked is None else unasked)
    operator, patterns = (spec[0], spec[1:]) if spec[:1] in ("+", "-", "^") else ("", spec)
    chosen: List[str] = []
    for pattern in filter(None, patterns.split(",")):
        if pattern.strip().startswith("!"):
            raise UsageError(
                f"{keyword}={printable(spec)} negates with !; write {keyword}=-NAME,... to leave names out."
            )
        chosen += [name for name in accepted if _matches(pattern, name) and name not in chosen]
    if operator == "+":
        return (*unasked, *(name for name in chosen if name not in unasked))
    if operator == "-":
        return tuple(name for name in unasked if name not in chosen)
    if operator == "^":
        return (*chosen, *(name for name in unasked if name not in chosen))
    return tuple(chosen)


def _matches(pattern: str, name: str) -> bool:
    """OpenSSH's wildcards: * and ? only."""
    regex = "".join({"*": ".*", "?": "."}.get(char, re.escape(char)) for char in pattern.strip())
    return re.fullmatch(regex, name) is not None


def agree(policy: Policy, offer: ServerOffer, host_keys: Optional[Sequence[str]] = None) -> Agreement:
    """What client and server will use. ``host_keys``: the host key algorithms offered to this server (default: the policy's
    plain ones). Raises PolicyError, one sentence that says what the server offered and what to do."""
    agreement, problems = weigh(policy, offer, host_keys)
    if problems:
        raise problems[0]
    return agreement


def weigh(
    policy: Policy, offer: ServerOffer, host_keys: Optional[Sequence[str]] = None
) -> Tuple[Agreement, Tuple[PolicyError, ...]]:
    """As ``agree``, but with every reason to refuse in place of the first; where nothing is agreed the name is ""."""
    problems: Dict[str, PolicyError] = {}  # by sentence: both directions mostly have the same

    def pick(category: str, ours: Iterable[str], theirs: Sequence[str], cipher: str = "") -> str:
        for name in ours:
            if name in theirs:
                return name
        problem = _no_agreement(category, policy, tuple(ours), theirs, cipher)
        problems.setdefault(str(problem), problem)
        return ""

    def pick_mac(cipher: str, theirs: Sequence[str]) -> str:
        return "" if not cipher or is_aead(cipher) else pick("mac", policy.macs, theirs, cipher)

    kex = pick("kex", policy.kex, offer.kex)
    host_key = pick(
        "host_key", policy.host_keys_offered if host_keys is None else tuple(host_keys), offer.host_keys
    )
    cipher_out = pick("cipher", policy.ciphers, offer.ciphers_out)
    cipher_in = pick("cipher", policy.ciphers, offer.ciphers_in)
    mac_out, mac_in = pick_mac(cipher_out, offer.macs_out), pick_mac(cipher_in, offer.macs_in)
    agreement = Agreement(kex, host_key, cipher_out, cipher_in, mac_out, mac_in)
    if not offer.strict_kex:
        problem = _open_to_terrapin(agreement, offer)
        if problem is not None:
            problems.setdefault(str(problem), problem)
    return agreement, tuple(problems.values())


def _open_to_terrapin(agreement: Agreement, offer: ServerOffer) -> Optional[PolicyError]:
    """The Terrapin attack (CVE-2023-48795) cuts messages off the start of a session under chacha20-poly1305 or EtM MACs."""
    for cipher, mac in ((agreement.cipher_out, agreement.mac_out), (agreement.cipher_in, agreement.mac_in)):
        if cipher != _CHACHA20 and not mac.endswith("-etm@openssh.com"):
            continue
        has_gcm = set(_GCM) & set(offer.ciphers_out) & set(offer.ciphers_in)
        remedy = (
            "connect with -o Ciphers=aes*-gcm@openssh.com, or update the server (OpenSSH 9.6 and later have it)"
            if has_gcm
            else "update the server (OpenSSH 9.6 and later have it), or allow aes256-gcm@openssh.com in its Ciphers"
        )
        return PolicyError(
            f"The server has no strict key exchange, without which {cipher}{' with ' + mac if mac else ''} is open to the "
            f"Terrapin attack (CVE-2023-48795): {remedy}.",
            (f"Ciphers {','.join(_GCM)}",),
        )
    return None


def _no_agreement(
    category: str, policy: Policy, ours: Sequence[str], theirs: Sequence[str], cipher: str
) -> PolicyError:
    plural, keyword, examples = _WORDING[category]
    offered = ", ".join(printable(name) for name in theirs[:20]) or "none"
    profile = _profile(policy.profile, True)
    narrowed = [name for name in accepted(profile, category) if name in theirs and name not in ours]
    lines: Tuple[str, ...] = ()
    if narrowed and category == "host_key":
        remedy = (
            f"connect with a known_hosts file that has its {narrowed[0]} key, or allow it with "
            f"-o HostKeyAlgorithms=+{narrowed[0]}"
        )
    elif narrowed:
        remedy = (
            f"security={policy.profile} would accept {narrowed[0]}: allow it with -o {keyword}=+{narrowed[0]}"
        )
    else:
        lacking = tuple(name for name in examples if name in ours) or tuple(ours[:1])
        lines = (_server_line(keyword, (*lacking, *theirs)),)
        if category == "host_key":
            remedy = "add an ssh-ed25519 key (ssh-keygen -A makes one) to HostKey in the server's sshd_config"
            lines = (_HOST_KEY_LINE, *lines)
        else:
            remedy = f"add {lacking[0]} to {keyword} in the server's sshd_config"
        if category == "mac":
            remedy += ", or a cipher that needs no MAC (aes256-gcm@openssh.com) to its Ciphers"
        if lacking[0] in _KEX_PQ:
            remedy += " (OpenSSH 9.9 and later have it)"
        remedy += _gentler_profile(category, policy, theirs)
    purpose = f" for {cipher}" if cipher else ""
    verb = "asks for" if narrowed else "accepts"
    return PolicyError(
        f"The server offers only these {plural}{purpose}: {offered}, of which security={policy.profile} {verb} none; {remedy}.",
        lines,
    )


def _server_line(keyword: str, names: Iterable[str]) -> str:
    """The whole list for sshd_config: its + would add to OpenSSH's defaults, and not to what this server offers."""
    plain = (name for name in dict.fromkeys(names) if re.fullmatch(r"[\w.@+-]{1,64}", name, re.ASCII))
    return f"{keyword} {','.join(name for name in plain if name != 'none')}"


def _gentler_profile(category: str, policy: Policy, theirs: Sequence[str]) -> str:
    """The clause that names a profile under which this list would do, or nothing."""
    for profile in ("hardened", "compatible"):
        would = [name for name in accepted(_profile(profile, True), category) if name in theirs]
        if profile != policy.profile and would:
            return f"; -o security={profile} would accept {would[0]}"
    return ""


def require_rsa_bits(policy: Policy, bits: int, whose: str) -> None:
    """Raises PolicyError where ``bits``, the size of an RSA key, is below the policy's least; ``whose`` begins the sentence,
    e.g. "The server's host key"."""
    if bits < policy.rsa_bits_min:
        is_own = policy.rsa_bits_min > _profile(policy.profile, True).rsa_bits_min
        demands = "RequiredRSASize" if is_own else f"security={policy.profile}"
        raise PolicyError(
            f"{whose} is an RSA key of {bits} bits, and {demands} accepts {policy.rsa_bits_min} and more; "
            "use an ed25519 key, or make a larger one with ssh-keygen -t rsa -b 4096.",
            (_HOST_KEY_LINE,),
        )


def require_gex_bits(policy: Policy, bits: int, offered: Sequence[str] = ()) -> None:
    """Raises PolicyError where ``bits``, the size of the group that group exchange found, is below the policy's least or above
    8192 (RFC 4419 section 3); ``offered``: the server's key exchanges, for the advice."""
    if not policy.gex_bits_min <= bits <= 8192:
        raise PolicyError(
            f"The server chose a Diffie-Hellman group of {bits} bits, and security={policy.profile} accepts "
            f"{policy.gex_bits_min} to 8192; remove the small groups from its /etc/ssh/moduli, or allow curve25519-sha256 in "
            "its KexAlgorithms.",
            (_server_line("KexAlgorithms", (*_WORDING["kex"][2], *offered)),),
        )


def concessions(agreement: Agreement, rsa_bits: Optional[int]) -> Tuple[str, ...]:
    """What ``agreement`` has that security=hardened would have refused, each once, in words for ``lenience``; () for nothing.

    ``rsa_bits``: the size of the host key, None where it is not RSA. The size of a group that group exchange (RFC 4419) found
    is not part of an agreement, and not told."""
    hardened = _profile("hardened", True)
    names = [agreement.kex] if agreement.kex not in hardened.kex else []
    names += [mac for mac in (agreement.mac_out, agreement.mac_in) if mac and mac not in hardened.macs]
    if rsa_bits is not None and rsa_bits < hardened.rsa_bits_min:
        names.append(f"an RSA host key of {rsa_bits} bits")
    return tuple(dict.fromkeys(names))


def lenience(policy: Policy, used: Sequence[str]) -> str:
    """What security=compatible takes that hardened would not, as a sentence for whoever mounts; "" under other profiles.
    ``used``: what of it this connection uses, from ``concessions``."""
    if policy.profile != "compatible":
        return ""
    uses = f", and this connection uses {' and '.join(used)}" if used else ""
    return (
        "security=compatible accepts MACs that are not encrypt-then-MAC, and groups and RSA keys of "
        f"{policy.rsa_bits_min} bits{uses}; sftpmount audit says whether security=hardened would do."
    )


def printable(text: str, chars_max: int = 200) -> str:
    """Text from a server or a file without control characters, for a terminal or a log, cut at ``chars_max``."""
    return "".join(char if char.isprintable() else "?" for char in text[:chars_max])


# Grades of verdict(), in the order of descending safety.
GOOD, UNSUPPORTED, WEAK, BROKEN = "good", "unsupported", "weak", "broken"

# (category or "" for all, pattern, grade, reason): the first match wins. Anything else is judged by the profiles.
_JUDGEMENTS: Tuple[Tuple[str, str, str, str], ...] = (
    ("kex", "ecdh-sha2-nistp*", GOOD, "NIST curve: accepted where KexAlgorithms names it"),
    ("kex", "mlkem*", GOOD, "post-quantum hybrid"),
    ("kex", "sntrup761x25519*", UNSUPPORTED, "post-quantum hybrid, good, not spoken here"),
    ("kex", "diffie-hellman-group14-sha256", WEAK, "2048-bit group: accepted only under security=compatible"),
    ("kex", "*sha1*", BROKEN, "SHA-1"),
    ("kex", "diffie-hellman-group1-*", BROKEN, "1024-bit group"),
    ("host_key", "ssh-rsa*", BROKEN, "RSA signatures with SHA-1"),
    ("host_key", "ssh-dss*", BROKEN, "1024-bit DSA with SHA-1"),
    ("host_key", "webauthn-*", UNSUPPORTED, "for user keys, not for hosts"),
    ("host_key", "sk-*", UNSUPPORTED, "for user keys, not for hosts"),
    ("cipher", "*-cbc*", BROKEN, "CBC mode leaks plaintext to an active attacker"),
    ("cipher", "rijndael-cbc*", BROKEN, "CBC mode leaks plaintext to an active attacker"),
    ("cipher", "arcfour*", BROKEN, "RC4"),
    ("cipher", "none", BROKEN, "no encryption"),
    ("cipher", "3des-*", BROKEN, "64-bit blocks"),
    ("cipher", "blowfish-*", BROKEN, "64-bit blocks"),
    ("cipher", "cast128-*", BROKEN, "64-bit blocks"),
    ("mac", "hmac-md5*", BROKEN, "MD5"),
    ("mac", "hmac-sha1*", BROKEN, "SHA-1"),
    ("mac", "none", BROKEN, "no authentication"),
    ("mac", "umac-64*", WEAK, "64-bit tag"),
    ("mac", "hmac-sha2-*-96*", WEAK, "shortened tag"),
    ("mac", "umac-128-etm@openssh.com", UNSUPPORTED, "encrypt-then-MAC, good, not spoken here"),
    ("mac", "*-etm@openssh.com", GOOD, "encrypt-then-MAC"),
    ("mac", "hmac-sha2-*", WEAK, "not encrypt-then-MAC: accepted only under security=compatible"),
    ("mac", "*", WEAK, "not encrypt-then-MAC"),
    ("compression", "none", GOOD, "accepted"),
    ("compression", "*", UNSUPPORTED, "data travels uncompressed: backups are compressed already"),
)


def verdict(category: str, algorithm: str) -> Tuple[str, str]:
    """(grade, reason) of an algorithm in a server's offer; category is kex, host_key, cipher, mac or compression. What is
    neither accepted by a profile nor known to be weak is "unsupported"."""
    for kind, pattern, grade, reason in _JUDGEMENTS:
        if kind == category and _matches(pattern, algorithm):
            return grade, reason
    if algorithm not in accepted(_profile("hardened", True), category):
        return UNSUPPORTED, "not spoken here"
    if is_aead(algorithm):
        return GOOD, "authenticated encryption"
    return (
        GOOD,
        "needs an encrypt-then-MAC MAC and strict key exchange" if category == "cipher" else "accepted",
    )


def accepted(policy: Policy, category: str) -> Tuple[str, ...]:
    """What ``policy`` takes of a category of ``verdict``, best first."""
    return {
        "kex": policy.kex,
        "host_key": policy.host_keys,
        "cipher": policy.ciphers,
        "mac": policy.macs,
        "compression": ("none",),
    }[category]


USED, ACCEPTED, REFUSED = "used", "accepted", "refused"
# What good algorithms lack in the eyes of the strictest profile, pq.
_WANTING = {"kex": "not post-quantum", "cipher": "not authenticated encryption"}


def standing(
    policy: Policy, category: str, algorithm: str, agreement: Optional[Agreement]
) -> Tuple[str, str]:
    """(used, accepted or refused; why) of an algorithm in a server's offer; why may be "" unless it is refused. ``agreement``:
    what ``policy`` and the server agree, None where they do not."""
    grade, reason = verdict(category, algorithm)
    if algorithm not in accepted(policy, category):
        if algorithm in accepted(make_policy(policy.profile), category):
            reason = "left out by your own list"
        elif algorithm in accepted(_profile(policy.profile, True), category):
            reason = f"a NIST curve: used only where you ask, KexAlgorithms=+{algorithm}"
        elif grade == GOOD:
            reason = _WANTING.get(category, f"not accepted by security={policy.profile}")
        return REFUSED, reason
    if reason == "accepted":
        reason = ""
    if agreement is None:
        return ACCEPTED, reason
    in_use = {
        "kex": (agreement.kex,),
        "host_key": (agreement.host_key,),
        "cipher": (agreement.cipher_out, agreement.cipher_in),
        "mac": (agreement.mac_out, agreement.mac_in),
        "compression": ("none",),
    }[category]
    return USED if algorithm in in_use else ACCEPTED, reason
