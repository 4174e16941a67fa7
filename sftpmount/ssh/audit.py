"""A look at a server from outside: what it offers, its host keys, its ways to log in. Nothing is changed, here or there.

1. The server gets no credential. The one authentication request is ``none``, which names the user, and a server whose host
   key is known to be false does not even get that.
2. known_hosts files are read, and never written; nobody is asked for anything.
3. Each look is a connection of its own, made as a mount makes its connection: by way of the same jump hosts (which are
   verified and logged in to) or the same ProxyCommand. There is one for each kind of host key, up to ``LOOKS_MAX``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from sftpmount.errors import HostKeyError, PolicyError, SftpMountError, Unreachable, UsageError
from sftpmount.options import SshOptions
from sftpmount.ssh import hostkeys, keys
from sftpmount.ssh.auth import Prompt
from sftpmount.ssh.config import Local, Target, resolve
from sftpmount.ssh.connect import Dialer, judge_host_key, known_hosts, wanted_host_keys
from sftpmount.ssh.hostkeys import Trust
from sftpmount.ssh.policy import (
    REFUSED,
    Agreement,
    Policy,
    ServerOffer,
    make_policy,
    printable,
    require_rsa_bits,
    standing,
    verdict,
    weigh,
)
from sftpmount.ssh.transport import HardenedTransport
from sftpmount.ssh.userauth import UserAuth

PROFILES = ("hardened", "compatible", "pq")
CATEGORIES = ("kex", "host_key", "cipher", "mac", "compression")
# Of host keys. Since 9.8 an OpenSSH server turns away who has made some 15 connections without a login in as many seconds
# (sshd_config(5), PerSourcePenalties: noauth 1 s each, enforced from 15 s on).
LOOKS_MAX = 10
NAMES_MAX = 100  # of one category: OpenSSH knows 20 of the longest

_FALSE = (Trust.CHANGED, Trust.REVOKED, Trust.BAD_CERTIFICATE)


class NoSshServer(Unreachable):
    """Something answers at the port, and it is no SSH server, or one that ends every connection."""

    exit_status = 2


@dataclass(frozen=True)
class Finding:
    """A sentence for a person. ``server_lines``: what cures it in sshd_config, as PolicyError has them."""

    problem: str
    server_lines: Tuple[str, ...] = ()

    @classmethod
    def of(cls, error: SftpMountError) -> Finding:
        return cls(str(error), error.server_lines if isinstance(error, PolicyError) else ())


@dataclass(frozen=True)
class Algorithm:
    """One name of the server's offer. ``directions``: "", or "out" (client to server) or "in" where only that way has it.
    ``standings``: profile -> ("used", "accepted" or "refused"; why)."""

    category: str
    name: str
    directions: str
    standings: Dict[str, Tuple[str, str]]


@dataclass(frozen=True)
class ProfileFindings:
    """What a profile and the server agree: None where they do not, and ``refusals`` says why."""

    profile: str
    agreement: Optional[Agreement]
    refusals: Tuple[Finding, ...]


@dataclass(frozen=True)
class HostKey:
    """A host key that the server has. ``kind`` as known_hosts names it, ``bits`` of an RSA key only, ``standing`` one of
    Trust's words or "not shown", ``detail`` a clause, ``is_used``: it is the one that a mount would be shown."""

    kind: str
    fingerprint: str  # "SHA256:...", or "" where the key was not shown
    bits: Optional[int]
    standing: str
    detail: str
    is_used: bool


@dataclass(frozen=True)
class SshFindings:
    """Everything found before a login. All text is harmless on a terminal."""

    host: str
    port: int
    user: str
    software: str  # the server's greeting, e.g. "SSH-2.0-OpenSSH_9.9"
    profile: str  # the one that the mount would have
    strict_kex: bool
    algorithms: Tuple[Algorithm, ...]
    profiles: Tuple[ProfileFindings, ...]
    host_keys: Tuple[HostKey, ...]
    methods: Optional[Tuple[str, ...]]  # to log in; ("none",) where nothing is asked for; None: not found out
    refusals: Tuple[Finding, ...]
    remarks: Tuple[Finding, ...]
    pinned_host_key: Optional[bytes]  # for the login: an unknown key that accept-new would take
    obstacle: str  # why a login cannot be tried; "" where it can


def for_a_look(options: SshOptions) -> SshOptions:
    """The same server and credentials, but nobody is asked and nothing is added to known_hosts."""
    return replace(options, batch_mode=True, strict_host_key_checking="yes")


def survey(options: SshOptions, prompt: Prompt, now_s: Callable[[], float] = time.time) -> SshFindings:
    """Look at the server of a mount with these options.

    Raises UsageError; Unreachable where nothing can be connected to, and NoSshServer where what answers is none; whatever a
    jump host's login raises.
    """
    return _Survey(options, prompt, now_s).findings()


@dataclass(frozen=True)
class _Look:
    """What one connection showed; ``problem`` is why it was not completed."""

    software: str = ""
    offer: Optional[ServerOffer] = None
    host_key: bytes = b""
    problem: Optional[SftpMountError] = None


class _Survey:
    """The state of one survey."""

    def __init__(self, options: SshOptions, prompt: Prompt, now_s: Callable[[], float]) -> None:
        self._options = for_a_look(options)
        local = Local.current()
        self._accept_new = resolve(options, local).accept_new
        self._dialer = Dialer(self._options, prompt)
        self._target = self._dialer.target
        self._targets: Dict[str, Target] = {}
        self._policies: Dict[str, Policy] = {}
        self._unfit: Dict[str, Finding] = {}  # no such policy here: own lists leave nothing, a library is old
        for profile in PROFILES:
            try:
                target = resolve(replace(self._options, security=profile), local)
                self._policies[profile] = HardenedTransport.within_means(target.policy)
                self._targets[profile] = target
            except (UsageError, PolicyError) as error:
                self._unfit[profile] = Finding.of(error)
        self._known = known_hosts(self._target)
        self._now_s = now_s
        # For host keys alone: nothing of ours goes over such a connection, so it may be as weak as any profile allows.
        self._lenient = replace(make_policy("compatible"), rsa_bits_min=0)
        self._methods: Optional[Tuple[str, ...]] = None
        self._may_ask_methods = True  # once, and never a server that showed a false key
        self._refusals: List[Finding] = []
        self._remarks: List[Finding] = []

    def findings(self) -> SshFindings:
        target = self._target
        first = self._look(target.policy, wanted_host_keys(target, self._known))
        if target.policy.profile in self._unfit:  # nothing was said: it is this side that lacks something
            seen = self._look(self._lenient, self._lenient.plain_host_keys)
            first = replace(seen, host_key=b"", problem=first.problem if seen.offer else seen.problem)
        offer = first.offer
        if offer is None:
            raise NoSshServer(f"{target.host} port {target.port}: {first.problem}")
        blobs, host_keys = self._host_keys(offer, first.host_key)
        profiles = tuple(self._profile(profile, offer, blobs, first.problem) for profile in PROFILES)
        self._refusals += profiles[PROFILES.index(self._options.security)].refusals
        if first.problem is not None and not self._refusals:
            self._refusals.append(Finding.of(first.problem))
        trust = self._conclude(first, offer)
        self._remark_on_hardened(profiles)
        obstacle = ""
        if self._refusals:
            obstacle = "the mount would be refused before it logs in"
        elif trust is Trust.UNKNOWN and not self._accept_new:
            obstacle = "the host key is unknown, so no credential was sent"
        return SshFindings(
            host=target.host,
            port=target.port,
            user=printable(target.user),
            software=first.software,
            profile=self._options.security,
            strict_kex=offer.strict_kex,
            algorithms=self._algorithms(offer, profiles),
            profiles=profiles,
            host_keys=host_keys,
            methods=self._methods,
            refusals=tuple(self._refusals),
            remarks=tuple(self._remarks),
            pinned_host_key=first.host_key if trust is Trust.UNKNOWN and self._accept_new else None,
            obstacle=obstacle,
        )

    # -- connections ----------------------------------------------------------------------------------------------

    def _look(self, policy: Policy, host_key_algorithms: Sequence[str]) -> _Look:
        """One connection up to its host key, and the first time to the methods of authentication as well."""
        problem: Optional[SftpMountError] = None
        with self._dialer.stream() as sock:
            try:
                transport = HardenedTransport(sock, policy, host_key_algorithms=host_key_algorithms)
            except PolicyError as error:
                return _Look(problem=error)
            try:
                transport.handshake(self._target.connect_timeout_s)
                self._ask_methods(transport)
            except (PolicyError, HostKeyError, Unreachable) as error:
                problem = error
            finally:
                transport.close()
        return _Look(printable(transport.remote_version), transport.offer, transport.host_key_blob, problem)

    def _ask_methods(self, transport: HardenedTransport) -> None:
        is_allowed = self._may_ask_methods and self._judge(transport.host_key_blob).trust not in _FALSE
        self._may_ask_methods = False
        if not is_allowed:
            return
        target = self._target
        conversation = UserAuth(transport, target.user, target.connect_timeout_s, lambda banner: None)
        try:
            conversation.start()
            reply = conversation.none()
        except Unreachable as error:
            self._remarks.append(Finding(f"The methods of authentication were not found out: {error}"))
        else:
            self._methods = ("none",) if reply.success else reply.methods

    def _judge(self, blob: bytes) -> hostkeys.Verdict:
        return judge_host_key(self._target, self._known, blob, self._now_s())

    # -- host keys ------------------------------------------------------------------------------------------------

    def _host_keys(self, offer: ServerOffer, used: bytes) -> Tuple[Dict[str, bytes], Tuple[HostKey, ...]]:
        """(kind -> key, what is found of each): ``used`` is the one that was shown already, the others are asked for."""
        algorithms: Dict[str, List[str]] = {}
        for name in offer.host_keys[:NAMES_MAX]:
            algorithms.setdefault(_kind_of(name), []).append(name)
        blobs = {keys.key_type(used): used} if used else {}
        found: List[HostKey] = []
        stop = ""  # why no more are asked for
        for kind, names in algorithms.items():
            spoken = [name for name in names if name in self._lenient.host_keys]
            why = stop
            if kind not in blobs and not spoken:
                why = " and ".join(sorted({verdict("host_key", name)[1] for name in names}))
            elif kind not in blobs and not stop:
                why = stop = self._fetch(kind, spoken, offer, blobs)
            if kind in blobs:
                found.append(self._host_key(kind, blobs[kind], is_used=blobs[kind] == used))
            else:
                found.append(HostKey(printable(kind, 64), "", None, "not shown", why, False))
        return blobs, tuple(found)

    def _fetch(
        self, kind: str, algorithms: Sequence[str], offer: ServerOffer, blobs: Dict[str, bytes]
    ) -> str:
        """Add the host key of a kind to ``blobs``, or return why neither this one nor another can be had."""
        if weigh(self._lenient, offer, algorithms)[1]:
            return "no profile can exchange keys with this server"
        if len(blobs) >= LOOKS_MAX:
            return f"{LOOKS_MAX} were looked at"
        try:
            look = self._look(self._lenient, algorithms)
        except SftpMountError as error:
            look = _Look(problem=error)
        if look.problem is not None:
            self._remarks.append(Finding(f"Not every host key was shown: {look.problem}"))
            return "the connection that was to show it failed"
        blobs[kind] = look.host_key
        return ""

    def _host_key(self, kind: str, blob: bytes, is_used: bool) -> HostKey:
        said = self._judge(blob)
        entry = said.entry
        place = f"{entry.path}:{entry.line}" if entry is not None else ""
        word, detail = said.trust.value, place or said.reason
        if said.trust is Trust.CHANGED and entry is not None:
            if entry.key_type == keys.key_type(blob) or is_used:
                detail = f"{place} has {entry.key_type} {keys.fingerprint(entry.blob)}"
            else:  # known by another key: this one is only one more
                word, detail = Trust.UNKNOWN.value, f"{place} has its {entry.key_type} key"
        key = HostKey(kind, keys.fingerprint(blob), keys.rsa_bits(blob), word, printable(detail), is_used)
        if not is_used and word in [trust.value for trust in _FALSE]:
            self._remarks.append(
                Finding(str(hostkeys.refusal(said, self._target.host, self._target.port, blob)))
            )
        return key

    # -- conclusions ----------------------------------------------------------------------------------------------

    def _profile(
        self, profile: str, offer: ServerOffer, blobs: Dict[str, bytes], problem: Optional[SftpMountError]
    ) -> ProfileFindings:
        """``problem``: how the connection under the mount's own profile ended."""
        if profile in self._unfit:
            return ProfileFindings(profile, None, (self._unfit[profile],))
        policy = self._policies[profile]
        agreement, errors = weigh(policy, offer, wanted_host_keys(self._targets[profile], self._known))
        refusals = [Finding.of(error) for error in errors]
        blob = blobs.get(_kind_of(agreement.host_key)) if agreement.host_key else None
        bits = None if blob is None else keys.rsa_bits(blob)
        if bits is not None:
            try:
                require_rsa_bits(policy, bits, "The server's host key")
            except PolicyError as error:
                refusals.append(self._of_short_key(error, policy, blobs))
        if profile == self._options.security and isinstance(problem, PolicyError) and not refusals:
            refusals.append(Finding.of(problem))  # what only the exchange itself shows: a group too small
        return ProfileFindings(profile, None if refusals else agreement, tuple(refusals))

    def _of_short_key(self, error: PolicyError, policy: Policy, blobs: Dict[str, bytes]) -> Finding:
        others = [kind for kind in blobs if kind in policy.plain_host_keys]
        if not others:
            return Finding.of(error)
        return Finding(
            f"{error} The server has an {others[0]} key too: verify its fingerprint with the administrator and write it "
            "to known_hosts in place of the RSA one."
        )

    def _conclude(self, first: _Look, offer: ServerOffer) -> Optional[Trust]:
        """Refusals and remarks about the connection that a mount would have; returns what is thought of its host key."""
        if self._methods == ("none",):
            self._remarks.append(
                Finding(
                    f"The server lets {printable(self._target.user)} in without any key or password, and so everybody."
                )
            )
        if not offer.strict_kex and not self._refusals:
            self._remarks.append(
                Finding(
                    "The server has no strict key exchange (OpenSSH 9.6 and later have it): what is agreed here is safe "
                    "from the Terrapin attack (CVE-2023-48795), chacha20-poly1305 and encrypt-then-MAC MACs would not be."
                )
            )
        if not first.host_key:
            return None
        said = self._judge(first.host_key)
        refusal = hostkeys.refusal(said, self._target.host, self._target.port, first.host_key)
        if said.trust in _FALSE:
            self._refusals.append(Finding(str(refusal)))
        elif said.trust is Trust.UNKNOWN and self._accept_new:
            self._remarks.append(
                Finding(
                    "The host key is unknown; a mount would add it to known_hosts (StrictHostKeyChecking=accept-new)."
                )
            )
        elif said.trust is Trust.UNKNOWN:
            self._remarks.append(Finding(str(refusal)))
        return said.trust

    def _remark_on_hardened(self, profiles: Sequence[ProfileFindings]) -> None:
        if self._options.security == "compatible" and not self._refusals:
            for refusal in profiles[PROFILES.index("hardened")].refusals:
                problem = f"Only security=compatible will do. {refusal.problem}"
                self._remarks.append(Finding(problem, refusal.server_lines))

    def _algorithms(self, offer: ServerOffer, profiles: Sequence[ProfileFindings]) -> Tuple[Algorithm, ...]:
        agreed = {each.profile: each.agreement for each in profiles}

        def under(profile: str, category: str, name: str) -> Tuple[str, str]:
            if profile in self._unfit:
                return REFUSED, f"security={profile} cannot be had here"
            return standing(self._policies[profile], category, name, agreed[profile])

        found = []
        for category in CATEGORIES:
            out, back = offer.ways(category)
            for name in list(dict.fromkeys(out + back))[:NAMES_MAX]:
                directions = "" if name in out and name in back else "out" if name in out else "in"
                standings = {profile: under(profile, category, name) for profile in PROFILES}
                found.append(Algorithm(category, printable(name, 64), directions, standings))
        return tuple(found)


def _kind_of(algorithm: str) -> str:
    """The type of key, as known_hosts has it, behind a host key algorithm."""
    plain = keys.plain_type(algorithm)
    kind = "ssh-rsa" if plain in keys.RSA_ALGORITHMS else plain
    return keys.certificate_type(kind) if keys.is_certificate(algorithm) else kind
