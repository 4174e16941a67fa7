"""A man in the middle of the key exchange: a relay to an SSH server that edits what both sides say they can do.

The KEXINITs (RFC 4253 section 7.1) are the first packets, and clear. What follows is relayed as it is. An edit that both
sides are shown alike leaves two sides that agree with each other and not with what was sent: only the signature over the
exchange hash can tell.
"""

from __future__ import annotations

import fnmatch
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Dict, List, Tuple

from support.listener import Listener

_MSG_KEXINIT = 20
_COOKIE_BYTES = 16
_CIPHERS = ("ciphers_out", "ciphers_in")
_MACS = ("macs_out", "macs_in")
_FIELDS = ("kex", "host_keys", *_CIPHERS, *_MACS)


@dataclass
class KexInit:
    """The name-lists of a KEXINIT that say algorithms, by the names of policy.ServerOffer, and the rest as bytes."""

    cookie: bytes
    lists: Dict[str, List[str]]
    rest: bytes

    @classmethod
    def parse(cls, payload: bytes) -> KexInit:
        assert payload[0] == _MSG_KEXINIT, f"message {payload[0]} where KEXINIT was expected"
        at = 1 + _COOKIE_BYTES
        lists = {}
        for name in _FIELDS:
            (size,) = struct.unpack_from(">I", payload, at)
            lists[name] = payload[at + 4 : at + 4 + size].decode().split(",") if size else []
            at += 4 + size
        return cls(payload[1 : 1 + _COOKIE_BYTES], lists, payload[at:])

    def pack(self) -> bytes:
        lists = (",".join(self.lists[name]).encode() for name in _FIELDS)
        packed = b"".join(struct.pack(">I", len(text)) + text for text in lists)
        return bytes([_MSG_KEXINIT]) + self.cookie + packed + self.rest


@dataclass(frozen=True)
class Edit:
    """What is done to the KEXINITs of ``sides``.

    without       patterns of names that are taken out of every list
    kex, ...      the names that are put in a list's place, with commas; "" leaves it
    """

    sides: Tuple[str, ...] = ("server",)
    without: Tuple[str, ...] = ()
    kex: str = ""
    host_keys: str = ""
    ciphers: str = ""
    macs: str = ""

    def apply(self, message: KexInit) -> None:
        lists = message.lists
        for fields, names in (
            (("kex",), self.kex),
            (("host_keys",), self.host_keys),
            (_CIPHERS, self.ciphers),
            (_MACS, self.macs),
        ):
            if names:
                lists.update({field: names.split(",") for field in fields})
        for name in _FIELDS:
            lists[name] = [each for each in lists[name] if not self._takes_out(each)]

    def _takes_out(self, algorithm: str) -> bool:
        return any(fnmatch.fnmatchcase(algorithm, pattern) for pattern in self.without)


@dataclass
class ManInTheMiddle:
    """The relay, on a port of 127.0.0.1 of its own, to ``target_port`` there. ``seen``: the sides whose KEXINIT passed;
    ``changed``: those in which there was something to edit."""

    target_port: int
    edit: Edit
    seen: List[str] = field(default_factory=list)
    changed: List[str] = field(default_factory=list)

    def __enter__(self) -> ManInTheMiddle:
        self._sockets: List[socket.socket] = []
        self._listener = Listener(self._serve)
        self.port = self._listener.port
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for each in self._sockets:
            _hang_up(each)

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self.target_port))
        self._sockets += [client, server]
        for relayed in (("client", client, server), ("server", server, client)):
            threading.Thread(target=self._relay, args=relayed, daemon=True).start()

    def _relay(self, side: str, source: socket.socket, target: socket.socket) -> None:
        try:
            with source.makefile("rb") as stream:
                line = b""
                while not line.startswith(b"SSH-"):  # other lines may come before the greeting
                    line = stream.readline()
                    if not line:
                        return
                    target.sendall(line)
                (size,) = struct.unpack(">I", stream.read(4))
                packet = stream.read(size)
                message = KexInit.parse(packet[1 : size - packet[0]])
                if side in self.edit.sides:
                    self.edit.apply(message)
                if message.pack() != packet[1 : size - packet[0]]:
                    self.changed.append(side)
                self.seen.append(side)
                target.sendall(_packet(message.pack()))
                while data := stream.read1(65536):
                    target.sendall(data)
        except (OSError, struct.error):
            pass  # one of the two has hung up
        finally:
            _hang_up(source)
            _hang_up(target)


def read_server_kexinit(port: int) -> KexInit:
    """What the server on this port of 127.0.0.1 says it can do."""
    with socket.create_connection(("127.0.0.1", port), timeout=20.0) as sock, sock.makefile("rb") as stream:
        sock.sendall(b"SSH-2.0-test\r\n")
        while not stream.readline().startswith(b"SSH-"):
            pass
        (size,) = struct.unpack(">I", stream.read(4))
        packet = stream.read(size)
        return KexInit.parse(packet[1 : size - packet[0]])


def _packet(payload: bytes) -> bytes:
    padding = 4 + -(5 + len(payload) + 4) % 8
    return struct.pack(">IB", 1 + len(payload) + padding, padding) + payload + bytes(padding)


def _hang_up(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    sock.close()
