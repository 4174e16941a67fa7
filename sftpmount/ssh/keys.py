"""Public keys, private keys and certificates: SSH's own encoding of them, and what is worth knowing of each.

Pure: bytes in, values or one named error out. Formats: RFC 4251 (encoding), RFC 4253 section 6.6,
RFC 5656, RFC 8332 and RFC 8709 (keys and signatures), OpenSSH's PROTOCOL.certkeys (certificates).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Tuple, Union

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import SSHCertificate, load_ssh_public_identity

CERT_SUFFIX = "-cert-v01@openssh.com"
CERT_TYPE_HOST = 2
FOREVER = 2**64 - 1

# Never ssh-rsa: that name means a SHA-1 signature (RFC 8332).
SIGNATURE_ALGORITHMS = (
    "ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "rsa-sha2-512", "rsa-sha2-256",
)  # fmt: skip
RSA_ALGORITHMS = ("rsa-sha2-512", "rsa-sha2-256")

_RSA_HASHES: Dict[str, Callable[[], hashes.HashAlgorithm]] = {
    "rsa-sha2-256": hashes.SHA256,
    "rsa-sha2-512": hashes.SHA512,
}
_ECDSA_HASHES: Dict[str, Callable[[], hashes.HashAlgorithm]] = {
    "ecdsa-sha2-nistp256": hashes.SHA256,
    "ecdsa-sha2-nistp384": hashes.SHA384,
    "ecdsa-sha2-nistp521": hashes.SHA512,
}
# How many strings of key material follow the nonce of a certificate of this key type.
_KEY_FIELDS = {
    "ssh-ed25519": 1,
    "ssh-rsa": 2,
    "ecdsa-sha2-nistp256": 2,
    "ecdsa-sha2-nistp384": 2,
    "ecdsa-sha2-nistp521": 2,
    "sk-ssh-ed25519@openssh.com": 2,
    "sk-ecdsa-sha2-nistp256@openssh.com": 3,
}


class MalformedKey(ValueError):
    """Bytes that are no key, certificate or signature."""


class PassphraseNeeded(Exception):
    """The private key is encrypted, and no passphrase or a wrong one was given."""


class Reader:
    """Takes SSH's basic types off the front of ``data``; raises MalformedKey where it is too short."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise MalformedKey("truncated")
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "big")

    def string(self) -> bytes:
        return self.take(self.u32())

    def name(self) -> str:
        try:
            return self.string().decode("ascii")
        except UnicodeDecodeError:
            raise MalformedKey("a name that is not ASCII") from None

    @property
    def at_end(self) -> bool:
        return self._at == len(self._data)


def string(data: bytes) -> bytes:
    """``data`` as an SSH string: its length in four bytes, then itself."""
    return len(data).to_bytes(4, "big") + data


def mpint(number: int) -> bytes:
    """A non-negative ``number`` as an SSH mpint."""
    return string(number.to_bytes(number.bit_length() // 8 + 1, "big") if number else b"")


def key_type(blob: bytes) -> str:
    """The type name that a public key or certificate begins with."""
    return Reader(blob).name()


def is_certificate(type_name: str) -> bool:
    return type_name.endswith(CERT_SUFFIX)


def plain_type(type_name: str) -> str:
    """The key type or algorithm behind a certificate's, or the name itself."""
    if not is_certificate(type_name):
        return type_name
    plain = type_name[: -len(CERT_SUFFIX)]
    return plain + "@openssh.com" if plain.startswith("sk-") else plain


def certificate_type(type_name: str) -> str:
    """The name of the certificate form of a key type or signature algorithm."""
    suffix = "@openssh.com"
    return (type_name[: -len(suffix)] if type_name.endswith(suffix) else type_name) + CERT_SUFFIX


def fingerprint(blob: bytes) -> str:
    """``SHA256:...`` as ``ssh-keygen -l`` prints it; of a certificate, that of the key in it."""
    try:
        blob = plain_key(blob)
    except MalformedKey:
        pass  # still worth a fingerprint: it names what was refused
    digest = hashlib.sha256(blob).digest()
    return "SHA256:" + base64.b64encode(digest).decode("ascii").rstrip("=")


def plain_key(blob: bytes) -> bytes:
    """The public key in a certificate, or ``blob`` itself where it is a plain key already."""
    reader = Reader(blob)
    type_name = reader.name()
    if not is_certificate(type_name):
        return blob
    plain = plain_type(type_name)
    if plain not in _KEY_FIELDS:
        raise MalformedKey(f"a certificate of unknown type {type_name}")
    reader.string()  # nonce
    fields = [reader.string() for _ in range(_KEY_FIELDS[plain])]
    return string(plain.encode("ascii")) + b"".join(string(field) for field in fields)


def rsa_bits(blob: bytes) -> Optional[int]:
    """The size in bits of an RSA key (or of the one in a certificate); None for other types."""
    reader = Reader(plain_key(blob))
    if reader.name() != "ssh-rsa":
        return None
    reader.string()  # the exponent
    return int.from_bytes(reader.string(), "big").bit_length()


def decode_public(line: bytes) -> Tuple[bytes, str]:
    """(blob, comment) of one line ``type base64 [comment]``, as in a ``.pub`` file. Raises MalformedKey."""
    fields = line.split(None, 2)
    if len(fields) < 2:
        raise MalformedKey("not a public key line")
    try:
        blob = base64.b64decode(fields[1], validate=True)
    except (binascii.Error, ValueError):
        raise MalformedKey("bad base64") from None
    if string(fields[0]) != blob[: 4 + len(fields[0])]:
        raise MalformedKey("the type and the key differ")
    return blob, fields[2].decode("utf-8", "replace").strip() if len(fields) > 2 else ""


@dataclass(frozen=True)
class Certificate:
    """A parsed certificate. ``kind`` is 1 for a user's, 2 for a host's; times are seconds since 1970."""

    kind: int
    key_id: str
    principals: Tuple[str, ...]
    valid_after_s: int
    valid_before_s: int
    critical_options: Tuple[str, ...]
    ca_key: bytes
    signature_algorithm: str
    _parsed: Optional[SSHCertificate]

    def signature_is_good(self) -> bool:
        """Whether the CA key in the certificate really signed it. SHA-1 is for the caller to refuse before."""
        if self._parsed is None:
            return False
        try:
            self._parsed.verify_cert_signature()
        except (InvalidSignature, UnsupportedAlgorithm, ValueError, AssertionError):
            return False
        return True


def parse_certificate(blob: bytes) -> Certificate:
    """Take a certificate apart. Raises MalformedKey."""
    reader = Reader(blob)
    type_name = reader.name()
    plain = plain_type(type_name)
    if not is_certificate(type_name) or plain not in _KEY_FIELDS:
        raise MalformedKey(f"not a certificate: {type_name}")
    for _ in range(1 + _KEY_FIELDS[plain]):  # the nonce, then the key
        reader.string()
    reader.u64()  # serial
    kind = reader.u32()
    key_id = reader.string().decode("utf-8", "replace")
    principals = _strings(reader.string())
    valid_after_s, valid_before_s = reader.u64(), reader.u64()
    critical = _strings(reader.string())[::2]  # name, data, name, data ...
    reader.string()  # extensions
    reader.string()  # reserved
    ca_key = reader.string()
    signature = Reader(reader.string())
    if not reader.at_end:
        raise MalformedKey("something follows the certificate")
    line = type_name.encode("ascii") + b" " + base64.b64encode(blob)
    try:
        parsed = load_ssh_public_identity(line)
    except UnsupportedAlgorithm:
        parsed = None  # a CA on a security key, say
    except ValueError as error:
        raise MalformedKey(str(error)) from None
    return Certificate(
        kind=kind,
        key_id=key_id,
        principals=principals,
        valid_after_s=valid_after_s,
        valid_before_s=valid_before_s,
        critical_options=critical,
        ca_key=ca_key,
        signature_algorithm=signature.name(),
        _parsed=parsed if isinstance(parsed, SSHCertificate) else None,
    )


def _strings(data: bytes) -> Tuple[str, ...]:
    reader = Reader(data)
    found: List[str] = []
    while not reader.at_end:
        found.append(reader.string().decode("utf-8", "replace"))
    return tuple(found)


_Private = Union[ed25519.Ed25519PrivateKey, ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey]


class PrivateKey:
    """A private key in memory. ``blob`` is its public half on the wire."""

    def __init__(self, key: _Private) -> None:
        self._key = key
        line = key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        self.blob = decode_public(line)[0]

    def sign(self, data: bytes, algorithm: str) -> bytes:
        """The signature of ``data`` on the wire; ``algorithm`` counts for RSA only (rsa-sha2-512, rsa-sha2-256)."""
        key = self._key
        if isinstance(key, ed25519.Ed25519PrivateKey):
            return string(b"ssh-ed25519") + string(key.sign(data))
        if isinstance(key, rsa.RSAPrivateKey):
            signature = key.sign(data, padding.PKCS1v15(), _RSA_HASHES[algorithm]())
            return string(algorithm.encode("ascii")) + string(signature)
        name = key_type(self.blob)
        r, s = decode_dss_signature(key.sign(data, ec.ECDSA(_ECDSA_HASHES[name]())))
        return string(name.encode("ascii")) + string(mpint(r) + mpint(s))


def load_private_key(data: bytes, passphrase: Optional[str] = None) -> PrivateKey:
    """A private key from a file's bytes: OpenSSH's own format, or PEM.

    Raises PassphraseNeeded where it is encrypted and ``passphrase`` is None or wrong, MalformedKey otherwise.
    """
    secret = None if passphrase is None else passphrase.encode("utf-8", "surrogateescape")
    is_openssh = b"-----BEGIN OPENSSH PRIVATE KEY-----" in data
    load = serialization.load_ssh_private_key if is_openssh else serialization.load_pem_private_key
    try:
        key = load(data, secret)
    except TypeError:  # cryptography's word for a passphrase that is missing, or there but not needed
        if secret is not None:
            return load_private_key(data)
        raise PassphraseNeeded from None
    except (ValueError, UnsupportedAlgorithm) as error:
        if secret is not None:
            raise PassphraseNeeded from None
        raise MalformedKey(f"not a private key that can be used ({error})") from None
    if not isinstance(key, (ed25519.Ed25519PrivateKey, ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey)):
        raise MalformedKey(
            "a key type that is not accepted (only Ed25519, ECDSA and RSA are, others through an agent)"
        )
    try:
        loaded = PrivateKey(key)
    except (ValueError, UnsupportedAlgorithm):
        raise MalformedKey("a curve that SSH does not know") from None
    return loaded


def public_of_private(data: bytes) -> Optional[bytes]:
    """The public key that OpenSSH's format keeps in clear beside an encrypted private one; None in other formats."""
    begin, end = b"-----BEGIN OPENSSH PRIVATE KEY-----", b"-----END OPENSSH PRIVATE KEY-----"
    try:
        body = base64.b64decode(b"".join(data.split(begin)[1].split(end)[0].split()))
        reader = Reader(body)
        if reader.take(15) != b"openssh-key-v1\0":
            return None
        for _ in range(3):  # cipher, kdf, kdf options
            reader.string()
        return reader.string() if reader.u32() == 1 else None
    except (IndexError, ValueError):
        return None
