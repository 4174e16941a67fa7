"""Connect to a server: resolve, dial, exchange keys, verify the host key, and only then authenticate.

1. No credential leaves this machine before the host key is verified, and before the agreed algorithms satisfy the policy.
2. A reconnect finds the very host key of the first connection, or fails.
3. Every wait is bounded: ``connect_timeout_s`` each for dialling, key exchange and every answer while authenticating. Only
   a person at a prompt may take longer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import BinaryIO, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from sftpmount.errors import (
    AuthenticationError,
    ChannelRefused,
    ConnectionLost,
    HostKeyError,
    PolicyError,
    Unreachable,
    UsageError,
)
from sftpmount.options import SshOptions
from sftpmount.ssh import hostkeys, keys
from sftpmount.ssh.auth import Authenticator, Memory, Prompt
from sftpmount.ssh.config import Local, Target, parse_hop, resolve
from sftpmount.ssh.dial import dial_command, dial_tcp
from sftpmount.ssh.hostkeys import HostName, KnownHosts, Trust
from sftpmount.ssh.policy import lenience
from sftpmount.ssh.transport import Connection, HardenedTransport
from sftpmount.ssh.userauth import UserAuth

__all__ = ["Dialer", "Prompt", "connect", "judge_host_key", "known_hosts", "wanted_host_keys"]

HOPS_MAX = 8
# What was said for the server itself but holds for the jump hosts on the way as well.
_KEYWORDS_FOR_HOPS = frozenset(
    (
        "addressfamily",
        "casignaturealgorithms",
        "certificatefile",
        "connecttimeout",
        "globalknownhostsfile",
        "hashknownhosts",
        "identitiesonly",
        "identityagent",
        "identityfile",
        "requiredrsasize",
        "revokedhostkeys",
        "tcpkeepalive",
        "userknownhostsfile",
    )
)

_log = logging.getLogger(__name__)


def connect(options: SshOptions, prompt: Prompt, pinned_host_key: Optional[bytes] = None) -> Connection:
    """One authenticated connection. ``pinned_host_key``: the only host key (wire format) to be accepted.

    Raises UsageError, Unreachable, HostKeyError, PolicyError, AuthenticationError.
    """
    return Dialer(options, prompt, pinned_host_key=pinned_host_key)()


class Dialer:
    """Connects to one server, again and again: each call returns a new Connection.

    It remembers what the first connection needed a person for (passphrases as unlocked keys, passwords and answers, all in
    memory only) and the host keys found. Once a connection stood, nobody is asked any more: where memory is not enough,
    AuthenticationError says so. Calls must not overlap.
    """

    def __init__(
        self,
        options: SshOptions,
        prompt: Prompt,
        *,
        pinned_host_key: Optional[bytes] = None,
        local: Optional[Local] = None,
        stdin: Optional[BinaryIO] = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._options = options
        self._prompt = prompt
        self._pinned_host_key = pinned_host_key
        self._local = local or Local.current()
        self._stdin = stdin
        self._now_s = now_s
        self._memory = Memory()
        self._targets: Dict[
            SshOptions, Target
        ] = {}  # a reconnect follows the configuration of the first connection
        self._password: Optional[str] = None
        self._has_connected = False

    def __call__(self) -> Connection:
        """Raises UsageError, Unreachable, HostKeyError, PolicyError, AuthenticationError."""
        if self._options.password_stdin and self._password is None:
            line = os.fsdecode((self._stdin or sys.stdin.buffer).readline())  # in whatever encoding it is
            if not line:
                raise AuthenticationError(
                    "password_stdin: standard input holds no password; give it on one line."
                )
            self._password = line.rstrip("\r\n")
        connection = self._connect(self._options, self._password, self._pinned_host_key, HOPS_MAX)
        self._has_connected = True
        return connection

    @property
    def target(self) -> Target:
        """The server, as the options and ssh_config have it. Raises UsageError."""
        return self._resolved(self._options)

    @contextmanager
    def stream(self) -> Iterator[socket.socket]:
        """A bare byte stream to the server, through its jump hosts (which are verified and logged in to), for a look at it;
        both end with the block. Raises what a call raises."""
        target = self.target
        via = self._jump(self._options, target, HOPS_MAX) if target.proxy_jump else None
        try:
            sock = _dial(target) if via is None else _tunnel(via, target)
            try:
                yield sock
            finally:
                _hang_up(sock)
        finally:
            if via is not None:
                via.close()

    def _resolved(self, options: SshOptions) -> Target:
        if options not in self._targets:
            self._targets[options] = resolve(options, self._local)
        return self._targets[options]

    def _connect(
        self, options: SshOptions, password: Optional[str], pinned: Optional[bytes], hops_left: int
    ) -> Connection:
        target = self._resolved(options)
        pinned = pinned or self._memory.host_keys.get((target.host, target.port))
        via: Optional[Connection] = None
        sock: Optional[socket.socket] = None
        transport: Optional[HardenedTransport] = None
        try:
            if target.proxy_jump:
                via = self._jump(options, target, hops_left)
                sock = _tunnel(via, target)
            else:
                sock = _dial(target)
            known = known_hosts(target)
            transport = HardenedTransport(
                sock,
                target.policy,
                host_key_algorithms=wanted_host_keys(target, known, pinned),
                rekey_bytes_max=target.rekey_bytes_max,
                rekey_interval_s=target.rekey_interval_s,
            )
            with _naming(target):
                transport.handshake(target.connect_timeout_s)
            self._verify(target, transport.host_key_blob, known, pinned)
            with _naming(target):
                self._authenticate(options, target, transport, password)
            connection = Connection(transport, via)
        except BaseException:
            if transport is not None:
                transport.close()
            elif sock is not None:
                _hang_up(sock)
            if via is not None:
                via.close()
            raise
        self._memory.host_keys[target.host, target.port] = keys.plain_key(transport.host_key_blob)
        _log.info("connected to %s port %d: %s", target.host, target.port, connection.negotiated)
        said = lenience(target.policy, transport.concessions)
        if said and not self._has_connected:
            self._prompt.notice(f"{target.host}: {said}")
        return connection

    def _jump(self, options: SshOptions, target: Target, hops_left: int) -> Connection:
        """The connection to the last hop before ``target``; that one goes through the hops before it."""
        if hops_left == 0:
            raise UsageError(
                f"ProxyJump for {target.alias} leads through more than {HOPS_MAX} hosts; is it a loop?"
            )
        *before, last = target.proxy_jump
        user, host, port = parse_hop(last)
        ssh_options = [pair for pair in options.ssh_options if pair[0] in _KEYWORDS_FOR_HOPS]
        if before:
            ssh_options.append(("proxyjump", ",".join(before)))
        hop = replace(
            options,
            host=host,
            user=user,
            port=port,
            password_stdin=False,
            ciphers=None,
            macs=None,
            kex_algorithms=None,
            host_key_algorithms=None,
            ssh_options=tuple(ssh_options),
        )
        return self._connect(hop, None, None, hops_left - 1)

    def _verify(self, target: Target, blob: bytes, known: KnownHosts, pinned: Optional[bytes]) -> None:
        """Return only where the host key may be trusted, recording a new one where that was asked for."""
        verdict = judge_host_key(target, known, blob, self._now_s())
        if pinned is not None:
            if keys.plain_key(blob) != keys.plain_key(pinned):
                raise HostKeyError(
                    f"The host key of {target.host} has CHANGED since this was mounted: "
                    f"{keys.fingerprint(pinned)} then, {keys.fingerprint(blob)} now. Nothing was sent to it. "
                    f"Verify the new key with the server's administrator, then mount again."
                )
            if verdict.trust is Trust.UNKNOWN:
                return  # it was accepted when it was pinned, and no file says anything else
        if verdict.trust is Trust.UNKNOWN and target.accept_new:
            files = [path for path in target.known_hosts_files if path != "/dev/null"]
            if not files:
                raise HostKeyError(
                    "StrictHostKeyChecking=accept-new needs a known_hosts file to keep the key in."
                )
            verdict = hostkeys.accept_new(files[0], _name(target), blob, hashed=target.hash_known_hosts)
            if verdict.is_good:
                self._prompt.notice(
                    f"New host key of {target.host} accepted and added to {files[0]}: "
                    f"{keys.key_type(keys.plain_key(blob))} {keys.fingerprint(blob)}"
                )
        if not verdict.is_good:
            raise hostkeys.refusal(verdict, target.host, target.port, blob)
        _log.debug("host key of %s: %s", target.host, verdict.trust.value)

    def _authenticate(
        self, options: SshOptions, target: Target, transport: HardenedTransport, password: Optional[str]
    ) -> None:
        conversation = UserAuth(transport, target.user, target.connect_timeout_s, self._show_banner)
        Authenticator(
            conversation,
            target,
            self._prompt,
            self._memory,
            algorithms=target.user_key_algorithms,
            rsa_bits_min=target.policy.rsa_bits_min,
            batch_mode=options.batch_mode or self._has_connected,
            password=password,
        ).run()

    def _show_banner(self, text: str) -> None:
        if not self._has_connected:
            self._prompt.notice(text)


@contextlib.contextmanager
def _naming(target: Target) -> Iterator[None]:
    """Which of perhaps several hosts an error is about."""
    try:
        yield
    except (Unreachable, PolicyError, HostKeyError) as error:
        raise type(error)(f"{target.host} port {target.port}: {error}") from error


def _dial(target: Target) -> socket.socket:
    if target.proxy_command is not None:
        return dial_command(target.proxy_command, target.host)
    return dial_tcp(
        target.host,
        target.port,
        target.connect_timeout_s,
        family=target.address_family,
        bind_address=target.bind_address,
        bind_interface=target.bind_interface,
        keepalive=target.tcp_keepalive,
    )


def _tunnel(via: Connection, target: Target) -> socket.socket:
    try:
        return via.open_tunnel(target.host, target.port)
    except (ChannelRefused, ConnectionLost) as error:
        raise Unreachable(
            f"The jump host does not connect us to {target.host} port {target.port} ({error}). "
            f"Check that it can reach that host and allows TCP forwarding."
        ) from None


def _hang_up(sock: socket.socket) -> None:
    """Shut down as well as close, since a tunnel or a ProxyCommand at the other end waits for that."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    sock.close()


def known_hosts(target: Target) -> KnownHosts:
    """The user's and the system's known_hosts. Raises HostKeyError for a file that exists but cannot be read."""
    return KnownHosts.load((*target.known_hosts_files, *target.global_known_hosts_files))


def judge_host_key(target: Target, known: KnownHosts, blob: bytes, now_s: float) -> hostkeys.Verdict:
    """What known_hosts, and the list of revoked keys, say of a host key of ``target``; ``now_s`` is seconds since 1970.

    Raises HostKeyError where that list cannot be read."""
    revoked = hostkeys.load_revoked(target.revoked_keys_file) if target.revoked_keys_file else []
    return known.check(
        _name(target),
        blob,
        now_s=now_s,
        ca_algorithms=target.ca_algorithms,
        rsa_bits_min=target.policy.rsa_bits_min,
        revoked=revoked,
    )


def wanted_host_keys(target: Target, known: KnownHosts, pinned: Optional[bytes] = None) -> Sequence[str]:
    """Host key algorithms in the order to negotiate: those of known keys first, so that a known one is shown to us."""
    types: List[str] = [] if pinned is None else [keys.key_type(pinned)]
    types += known.key_types(_name(target))
    wanted: List[str] = []
    for kind in types:
        wanted += _signature_algorithms(kind)
    return tuple(dict.fromkeys((*wanted, *target.policy.host_keys_offered)))


def _name(target: Target) -> HostName:
    return HostName.of(target.host, target.port, target.host_key_alias)


def _signature_algorithms(kind: str) -> Tuple[str, ...]:
    return keys.RSA_ALGORITHMS if kind == "ssh-rsa" else (kind,)
