"""paramiko's Transport under a policy: what is agreed with the server, how messages are sent, how it ends.

What is used of paramiko beyond its documented interface (the range is pinned for it; nothing else in the package uses such
parts, but for what ``userauth`` names):

    Transport   _preferred_{kex,ciphers,macs,keys,pubkeys}, _kex_info, _cipher_info, _channel_handler_table, _channels,
                channels_seen, lock, _next_channel, _unlink_channel, _send_kex_init, _negotiate_keys, _really_parse_kex_init,
                _verify_key, _parse_newkeys, _parse_disconnect, _parse_channel_open_failure, _send_message,
                _send_user_message, _log, clear_to_send, clear_to_send_lock, initial_kex_done, in_kex, completion_event,
                saved_exception
    Packetizer  the methods that Transport calls: see packetizer.PacketStream
    Channel     the methods that Transport calls: see transport.Channel
    Kex classes KexCurve25519, KexGroup16SHA512, KexGexSHA256 with _parse_kexdh_gex_group (in kex.py)

The transport thread (paramiko's) reads and dispatches. It never waits for the network to take bytes, for a key exchange, or
for a lock that is held over either. Messages of other threads wait while keys are exchanged (RFC 4253 section 7.1).

Lock order: Transport.lock and clear_to_send_lock are each above the leaves of PacketStream, and never taken together.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import socket
import threading
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Callable, Dict, List, Optional, Protocol, Sequence, Tuple, TypeVar

import paramiko
from paramiko import Message, SSHException
from paramiko.kex_curve25519 import KexCurve25519
from paramiko.ssh_exception import IncompatiblePeer

from sftpmount import waiting
from sftpmount.errors import ConnectionLost, HostKeyError, PolicyError, SftpMountError, Unreachable
from sftpmount.ssh import chacha20
from sftpmount.ssh.kex import KexGexAtLeast, KexGroup18SHA512
from sftpmount.ssh.packetizer import REKEY_BYTES, REKEY_INTERVAL_S, PacketStream, Sink
from sftpmount.ssh.policy import (
    CERTIFICATE_SUFFIX,
    STRICT_KEX_SERVER,
    Agreement,
    Policy,
    ServerOffer,
    agree,
    concessions,
    is_aead,
    printable,
    require_rsa_bits,
)
from sftpmount.ssh.sealing import Gather

_KEX_TIMEOUT_S = 120.0
_CLOSE_TIMEOUT_S = 2.0
_DEFERRED_MESSAGES_MAX = 10_000
_UNSENT_BYTES = (
    256 * 1024
)  # what the kernel queues beyond the wire: little, so that small requests overtake bulk data soon

_REKEY_BYTES_AES = 2**35  # RFC 4344 section 3.2: 2^32 blocks of 128 bits would be 64 GiB

_FIRST_ABOVE_TRANSPORT = 50  # message numbers below may travel during a key exchange (RFC 4250 section 4.1.1)


@dataclass(frozen=True)
class Negotiated:
    """What the key exchange agreed. ``out`` is client to server; a MAC is "" where the cipher authenticates by itself."""

    kex: str
    host_key_type: str
    host_key_fingerprint: (
        str  # "SHA256:..." as ssh-keygen -l shows it; of the key itself where the host has a certificate
    )
    cipher_out: str
    cipher_in: str
    mac_out: str
    mac_in: str
    strict_kex: bool
    server_version: str

    def __str__(self) -> str:
        ways = [
            f"{cipher} with {mac}" if mac else cipher
            for cipher, mac in ((self.cipher_out, self.mac_out), (self.cipher_in, self.mac_in))
        ]
        return ", ".join(
            (
                self.kex + (" (strict)" if self.strict_kex else ""),
                f"{self.host_key_type} {self.host_key_fingerprint}",
                " / ".join(dict.fromkeys(ways)),
                self.server_version,
            )
        )


class OwnChannel(Sink, Protocol):
    """What the transport calls of our channels beyond what it calls of paramiko's."""

    def refuse(self, reason: str) -> None: ...

    def end(self, error: Exception) -> None: ...


T = TypeVar("T", bound=OwnChannel)


class HardenedTransport(paramiko.Transport):
    """paramiko's Transport under ``policy``, as a client, over ``sock``: a connected stream socket, owned from here on.

    ``host_key_algorithms``: what to offer, best first (known_hosts' types of this host, certificates included), within the policy.
    ``rekey_bytes_max``, ``rekey_interval_s``: exchange new keys after so many bytes in a direction, or so many seconds; no
    later than without them.
    ``offer``: the server's lists, once its KEXINIT is there. ``host_key_blob``: its host key as it sent it, not yet checked
    against known_hosts. Authentication is paramiko's (auth_publickey and so on).
    """

    _cipher_info = {
        **paramiko.Transport._cipher_info,  # type: ignore[attr-defined]
        chacha20.NAME: {
            "class": chacha20.ChaCha20Poly1305,
            "block-size": chacha20.ChaCha20Poly1305.block_size,
            "iv-size": 0,
            "key-size": chacha20.KEY_BYTES,
            "is_aead": True,
        },
    }
    _kex_info = {
        **paramiko.Transport._kex_info,  # type: ignore[attr-defined]
        "curve25519-sha256": KexCurve25519,
        "diffie-hellman-group18-sha512": KexGroup18SHA512,
        "diffie-hellman-group-exchange-sha256": KexGexAtLeast,
    }
    # By name instead of by paramiko.Channel's functions, so that our Channel can stand in for it.
    _channel_handler_table = {
        number: (lambda channel, message, name=function.__name__: getattr(channel, name)(message))
        for number, function in paramiko.Transport._channel_handler_table.items()  # type: ignore[attr-defined]
    }

    def __init__(
        self,
        sock: socket.socket,
        policy: Policy,
        *,
        host_key_algorithms: Optional[Sequence[str]] = None,
        rekey_bytes_max: Optional[int] = None,
        rekey_interval_s: Optional[float] = None,
    ) -> None:
        policy = self.within_means(policy)
        super().__init__(sock, packetizer_class=PacketStream)  # type: ignore[arg-type]
        sock.setblocking(
            False
        )  # paramiko sets a timeout, which would cost a poll() before every recv and send
        _tune(sock)
        self.packetizer: PacketStream  # type: ignore[assignment]
        self.packetizer.rekey_interval_s = min(rekey_interval_s or REKEY_INTERVAL_S, REKEY_INTERVAL_S)
        self.sock = (
            self.packetizer
        )  # what paramiko "closes" is only shut down; PacketStream.release has the reason
        self.set_log_channel("sftpmount.ssh")
        self.name = "sftpmount-transport"
        self.policy = policy
        self.offer: Optional[ServerOffer] = None
        self.host_key_blob = b""
        self._rekey_bytes_max = rekey_bytes_max
        self._agreement: Optional[Agreement] = None
        self._ended_by: Optional[BaseException] = None
        self._own_channels: Dict[int, OwnChannel] = {}
        self._deferred: List[
            bytes
        ] = []  # what the transport thread could not send during a key exchange; transport thread only
        self._preferred_kex = policy.kex
        self._preferred_ciphers = policy.ciphers
        self._preferred_macs = policy.macs
        self._preferred_pubkeys = policy.plain_host_keys
        self._preferred_keys = (
            policy.host_keys_offered
            if host_key_algorithms is None
            else tuple(name for name in host_key_algorithms if name in policy.host_keys)
        )

    @classmethod
    def within_means(cls, policy: Policy) -> Policy:
        """The policy without what the installed libraries cannot do: ML-KEM, where OpenSSL is older than 3.5.

        Raises PolicyError where that leaves no key exchange."""
        kex = tuple(name for name in policy.kex if name in cls._kex_info)
        if not kex:
            raise PolicyError(
                f"security={policy.profile} needs {policy.kex[0]}, which the installed Python package cryptography cannot do; "
                "install cryptography 48 or newer from PyPI."
            )
        return replace(policy, kex=kex)

    @property
    def preferred_keys(self) -> Tuple[str, ...]:
        """The host key algorithms offered; certificates only where they were asked for, since only then someone checks them."""
        return self._preferred_keys

    # --- key exchange --------------------------------------------------------------------------------------------

    def handshake(self, timeout_s: float) -> Negotiated:
        """Greet and exchange keys. The host key is not checked against known_hosts here: that is the caller's, before it
        authenticates. Raises Unreachable, PolicyError; the transport is closed then."""
        done = threading.Event()
        self.start_client(event=done)
        answered = done.wait(timeout_s)
        if answered and self.initial_kex_done and self.active:
            return self.negotiated
        error = self._ended_by or self.get_exception()
        self.close()
        if isinstance(error, SftpMountError):
            raise error
        if not answered:
            raise Unreachable(
                f"The server did not finish the SSH key exchange within {timeout_s:g} s; check that the port is an SSH server's "
                "and that it is not overloaded."
            )
        if isinstance(error, IncompatiblePeer):
            raise PolicyError(f"The server cannot be talked to: {printable(str(error))}.")
        if error is not None and not isinstance(error, (EOFError, OSError)):
            raise Unreachable(
                f"The SSH key exchange failed: {printable(str(error) or repr(error))}."
            ) from error
        raise Unreachable(
            "The server closed the connection before the SSH key exchange was done; it may limit or ban connections "
            "(MaxStartups, PerSourcePenalties, fail2ban), or the port is not an SSH server's."
        )

    @property
    def negotiated(self) -> Negotiated:
        """What the (first) key exchange agreed; handshake() must have returned."""
        agreement, offer = self._agreement, self.offer
        assert agreement is not None and offer is not None and self.host_key is not None
        digest = base64.b64encode(hashlib.sha256(self.host_key.asbytes()).digest()).decode().rstrip("=")
        return Negotiated(
            kex=agreement.kex,
            host_key_type=agreement.host_key,
            host_key_fingerprint=f"SHA256:{digest}",
            cipher_out=agreement.cipher_out,
            cipher_in=agreement.cipher_in,
            mac_out=agreement.mac_out,
            mac_in=agreement.mac_in,
            strict_kex=offer.strict_kex,
            server_version=printable(self.remote_version),
        )

    @property
    def concessions(self) -> Tuple[str, ...]:
        """What of the (first) key exchange security=hardened would have refused, in words; handshake() must have returned."""
        assert self._agreement is not None
        bits = self.host_key.get_bits() if isinstance(self.host_key, paramiko.RSAKey) else None
        return concessions(self._agreement, bits)

    def request_rekey(self) -> None:
        """Exchange keys now, in the background."""
        self.packetizer.request_rekey()

    def _send_kex_init(self) -> None:
        self.packetizer.kex_started(monotonic() + _KEX_TIMEOUT_S)
        super()._send_kex_init()  # type: ignore[misc]

    def _negotiate_keys(self, m: Message) -> None:
        self.packetizer.data_may_flow = (
            False  # until NEWKEYS anything but the exchange is an error, which paramiko checks
        )
        super()._negotiate_keys(m)  # type: ignore[misc]

    def _really_parse_kex_init(self, m: Message, ignore_first_byte: bool = False) -> Dict[str, Any]:
        parsed: Dict[str, Any] = super()._really_parse_kex_init(m, ignore_first_byte)  # type: ignore[misc]
        if ignore_first_byte:
            return parsed  # our own, read back
        offer = _offer(parsed)
        if self.offer is None:
            self.offer = offer
        else:
            # Strict key exchange is agreed in the first exchange only; OpenSSH does not repeat the marker.
            parsed["kex_algo_list"] = list(offer.kex)
            offer = replace(offer, strict_kex=self.offer.strict_kex)
        self._agreement = agreement = agree(self.policy, offer, self._preferred_keys)
        # paramiko looks for a common MAC even where the cipher needs none: let it find one, which it then does not use.
        if is_aead(agreement.cipher_out):
            parsed["client_mac_algo_list"] = list(self._preferred_macs)
        if is_aead(agreement.cipher_in):
            parsed["server_mac_algo_list"] = list(self._preferred_macs)
        has_chacha20 = chacha20.NAME in (agreement.cipher_out, agreement.cipher_in)
        safe_bytes = REKEY_BYTES if has_chacha20 else _REKEY_BYTES_AES
        self.packetizer.rekey_bytes_max = min(self._rekey_bytes_max or safe_bytes, safe_bytes)
        return parsed

    def _verify_key(self, host_key: bytes, sig: bytes) -> None:
        """paramiko checks the signature over the exchange hash; here, that it is the key and signature agreed upon."""
        agreed = self.host_key_type or ""
        signature = agreed.replace(CERTIFICATE_SUFFIX, "")
        key_type = "ssh-rsa" if signature.startswith("rsa-") else signature
        if agreed.endswith(CERTIFICATE_SUFFIX):
            key_type += CERTIFICATE_SUFFIX
        if Message(host_key).get_text() != key_type or Message(sig).get_text() != signature:
            raise SSHException("the server's host key or signature is not of the type that was agreed")
        if self.host_key_blob and self.host_key_blob != host_key:
            raise HostKeyError(
                "The server showed another host key when keys were renewed; the connection was given up."
            )
        try:
            super()._verify_key(host_key, sig)  # type: ignore[misc]
        except SSHException as error:
            raise HostKeyError(
                "The signature of the server's host key does not fit what was exchanged: someone between you and the server "
                "changes it, or a server shows a key that it does not hold. Nothing was sent to it; try from another network, "
                "or ask the server's administrator."
            ) from error
        if isinstance(self.host_key, paramiko.RSAKey):
            require_rsa_bits(self.policy, self.host_key.get_bits(), "The server's host key")
        self.host_key_blob = host_key

    def _parse_newkeys(self, m: Message) -> None:
        super()._parse_newkeys(m)  # type: ignore[misc]
        self.in_kex = False
        self.packetizer.kex_finished()
        self.packetizer.data_may_flow = True
        deferred, self._deferred = self._deferred, []
        for payload in deferred:
            self.post(payload)

    # --- sending -------------------------------------------------------------------------------------------------

    def send_data(self, channel: int, source: Gather, size: int, packet_bytes_max: int) -> None:
        """Send the next ``size`` bytes of ``source`` to the peer's ``channel``; waits for the socket and for a key exchange.

        Raises ConnectionLost, once all that came before was handed on. Not for the transport thread.
        """
        self._when_clear(lambda: self.packetizer.seal_data(channel, source, size, packet_bytes_max))

    def send_payload(self, payload: bytes) -> None:
        """Send one message; waits and raises as ``send_data`` does."""
        self._when_clear(lambda: self.packetizer.seal(payload))

    def post(self, payload: bytes, *, defer: bool = True) -> None:
        """Send one message without waiting. During a key exchange it is sent afterwards, or dropped if not ``defer``, which
        threads other than the transport's must not ask for. Raises ConnectionLost."""
        with self.clear_to_send_lock:
            if not self.active:
                raise self._lost()
            if not self.clear_to_send.is_set():
                if defer:
                    if len(self._deferred) >= _DEFERRED_MESSAGES_MAX:
                        raise SSHException("the server asks and asks, and does not finish the key exchange")
                    self._deferred.append(payload)
                return
            self.packetizer.seal(payload)
        try:
            self.packetizer.flush(block=False)
        except EOFError as error:
            raise self._lost() from error

    def _when_clear(self, seal: Callable[[], None]) -> None:
        while True:
            with (
                self.clear_to_send_lock
            ):  # the transport thread takes it to begin a key exchange: never held while waiting
                if not self.active:
                    raise self._lost()
                if self.clear_to_send.is_set():
                    seal()
                    break
            self.clear_to_send.wait()  # set after the exchange and at the end of the connection
        try:
            self.packetizer.flush(block=True)
        except EOFError as error:
            waiting.step_aside()
            self.join(_CLOSE_TIMEOUT_S)  # it hands on what has come until then
            raise self._lost() from error

    def _send_user_message(self, data: Message) -> None:
        """paramiko's way to send from any thread: it would block the transport thread, and drop messages on a dead one."""
        if threading.current_thread() is self:
            self.post(data.asbytes())
        else:
            self.send_payload(data.asbytes())

    def _send_message(self, data: Message) -> None:
        """paramiko's way to send key exchange and authentication messages, and answers to the server's requests."""
        payload = data.asbytes()
        in_transport_thread = threading.current_thread() is self
        if in_transport_thread and payload[0] >= _FIRST_ABOVE_TRANSPORT:
            self.post(payload)
            return
        self.packetizer.seal(payload)
        self.packetizer.flush(block=not in_transport_thread)

    def _lost(self) -> ConnectionLost:
        error = self._ended_by or self.saved_exception
        return ConnectionLost(printable(str(error)) if error else "the connection was closed")

    # --- channels ------------------------------------------------------------------------------------------------

    def add_channel(self, make: Callable[[int], T]) -> T:
        """Number and register a channel of ours."""
        with self.lock:
            number = self._next_channel()  # type: ignore[attr-defined]
            channel = make(number)
            self._channels.put(number, channel)  # type: ignore[attr-defined]
            self.channels_seen[number] = True
            self._own_channels[number] = channel
            self.packetizer.sinks[number] = channel
        if not self.active:
            self.remove_channel(number)
            raise self._lost()
        return channel

    def remove_channel(self, number: int) -> None:
        self._unlink_channel(number)  # type: ignore[attr-defined]
        self._own_channels.pop(number, None)
        self.packetizer.sinks.pop(number, None)

    def _parse_channel_open_failure(self, m: Message) -> None:
        copy = Message(m.asbytes())
        channel = self._own_channels.get(copy.get_int())
        if channel is None:
            super()._parse_channel_open_failure(m)  # type: ignore[misc]
            return
        copy.get_int()  # the reason's number
        said = printable(copy.get_string().decode("utf-8", "replace"))
        channel.refuse("the server opens no channel" + (f": {said}" if said else ""))

    # --- the end -------------------------------------------------------------------------------------------------

    def _parse_disconnect(self, m: Message) -> None:
        m.get_int()
        text = printable(m.get_string().decode("utf-8", "replace"))
        raise SSHException(f"the server ended the connection: {text}")

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._ended_by = self._ended_by or self.saved_exception
            self.active = False
            for channel in list(self._own_channels.values()):
                channel.end(self._lost())
            self.clear_to_send.set()
            if self.completion_event is not None:
                self.completion_event.set()
            self.packetizer.release()

    def stop_thread(self) -> None:
        self.active = False
        self.packetizer.close()
        if not self.is_alive():
            self.packetizer.release()
        elif threading.current_thread() is not self:
            self.join(_CLOSE_TIMEOUT_S)

    def close(self) -> None:
        """End the connection at once; returns when the transport thread has ended, or after 2 s. Idempotent."""
        self.stop_thread()

    def _log(self, level: int, msg: Any, *args: Any) -> None:
        """All that paramiko logs is for debugging: what matters is raised. Server text in it is made harmless."""
        if self.logger.isEnabledFor(logging.DEBUG):
            for line in msg if isinstance(msg, list) else [msg]:
                self.logger.debug("%s", printable(str(line), 4000))


def _offer(parsed: Dict[str, Any]) -> ServerOffer:
    def names(key: str) -> Tuple[str, ...]:
        return tuple(filter(None, parsed[key]))

    kex = names("kex_algo_list")
    return ServerOffer(
        kex=tuple(name for name in kex if not name.startswith(("ext-info-", "kex-strict-"))),
        host_keys=names("server_key_algo_list"),
        ciphers_out=names("client_encrypt_algo_list"),
        ciphers_in=names("server_encrypt_algo_list"),
        macs_out=names("client_mac_algo_list"),
        macs_in=names("server_mac_algo_list"),
        strict_kex=STRICT_KEX_SERVER in kex,
        compression_out=names("client_compress_algo_list"),
        compression_in=names("server_compress_algo_list"),
    )


def _tune(sock: socket.socket) -> None:
    """Small requests leave at once, and do not queue in the kernel behind bulk data; a dead peer is noticed by TCP too."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
