"""A client of ssh-agent (draft-miller-ssh-agent): list the keys, have one sign. Blocking, each step bounded in time."""

from __future__ import annotations

import socket
from typing import List, Optional, Tuple

from sftpmount.ssh.keys import MalformedKey, Reader, string

_REQUEST_IDENTITIES = 11
_IDENTITIES_ANSWER = 12
_SIGN_REQUEST = 13
_SIGN_RESPONSE = 14
# OpenSSH's agent looks at the first flag that is set, so never both.
_SIGN_FLAGS = {"rsa-sha2-256": 2, "rsa-sha2-512": 4}
MESSAGE_BYTES_MAX = 256 * 1024  # as OpenSSH's agent
KEYS_MAX = 2048
LIST_TIMEOUT_S = 10.0
SIGN_TIMEOUT_S = 60.0  # a person may have to confirm, or to touch a security key


class AgentError(Exception):
    """The agent is not there, refuses, or talks nonsense; ``str(e)`` is a clause for a person."""


class Agent:
    """One connection to the agent that listens at ``path``; a context manager."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(LIST_TIMEOUT_S)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise AgentError(f"no agent answers at {path} ({error.strerror or error})") from None

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def list_keys(self) -> List[Tuple[bytes, str]]:
        """(public key or certificate, comment) of each key held. Raises AgentError."""
        reader = self._ask(bytes([_REQUEST_IDENTITIES]), _IDENTITIES_ANSWER, LIST_TIMEOUT_S)
        try:
            count = reader.u32()
            if count > KEYS_MAX:
                raise MalformedKey("too many keys")
            return [(reader.string(), reader.string().decode("utf-8", "replace")) for _ in range(count)]
        except MalformedKey as error:
            raise AgentError(f"the agent's list of keys cannot be read ({error})") from None

    def sign(self, blob: bytes, data: bytes, algorithm: str) -> bytes:
        """The agent's signature on the wire. Raises AgentError where it refuses (locked, not confirmed, no touch)."""
        flags = _SIGN_FLAGS.get(algorithm, 0)
        request = bytes([_SIGN_REQUEST]) + string(blob) + string(data) + flags.to_bytes(4, "big")
        try:
            signature = self._ask(request, _SIGN_RESPONSE, SIGN_TIMEOUT_S).string()
            made = Reader(signature).name()
        except MalformedKey as error:
            raise AgentError(f"the agent's signature cannot be read ({error})") from None
        if made != algorithm:  # agents that know no flags sign with SHA-1
            raise AgentError(f"the agent cannot sign with {algorithm}")
        return signature

    def _ask(self, message: bytes, expected: int, timeout_s: float) -> Reader:
        self._socket.settimeout(timeout_s)
        try:
            self._socket.sendall(string(message))
            length = int.from_bytes(self._read(4), "big")
            if not 1 <= length <= MESSAGE_BYTES_MAX:
                raise AgentError("the agent's answer has an impossible length")
            answer = self._read(length)
        except OSError as error:
            raise AgentError(f"the agent does not answer ({error.strerror or error})") from None
        if answer[0] != expected:
            raise AgentError("the agent refused")
        return Reader(answer[1:])

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self._socket.recv(count - len(data))
            if not piece:
                raise AgentError("the agent hung up")
            data += piece
        return data


def agent_path(identity_agent: Optional[str], environment_path: Optional[str]) -> Optional[str]:
    """The socket that IdentityAgent names: a path, "SSH_AUTH_SOCK", "none"; where it is not set, SSH_AUTH_SOCK's."""
    if identity_agent is None or identity_agent == "SSH_AUTH_SOCK":
        return environment_path or None
    return None if identity_agent.lower() == "none" else identity_agent
