"""Which servers are mounted and which are refused: the data of the tests, and of SERVERS.md, which contrib/servers-table makes.

Algorithms are said in sshd_config's words, whatever the server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Optional, Tuple

from support.kexinit import Edit

OPENSSH, ASYNCSSH, PROFTPD, TINYSSHD = "OpenSSH", "asyncssh", "ProFTPD mod_sftp", "tinysshd"

_CHACHA20 = "chacha20-poly1305@openssh.com"
_GCM = "aes256-gcm@openssh.com,aes128-gcm@openssh.com"
_C6 = f"Ciphers {_CHACHA20},{_GCM},aes256-ctr,aes192-ctr,aes128-ctr\n"
_ETM = "hmac-sha2-512-etm@openssh.com,hmac-sha2-256-etm@openssh.com"
_E3 = f"{_ETM},umac-128-etm@openssh.com"
_PLAIN = "hmac-sha2-512,hmac-sha2-256"
_X25519 = "curve25519-sha256@libssh.org"
_GEX = "diffie-hellman-group-exchange-sha256"
_NIST = "ecdh-sha2-nistp521,ecdh-sha2-nistp384,ecdh-sha2-nistp256"
_SSH_AUDIT_KEX = (
    f"KexAlgorithms sntrup761x25519-sha512@openssh.com,curve25519-sha256,{_X25519},"
    f"diffie-hellman-group18-sha512,diffie-hellman-group16-sha512,{_GEX}\n"
)
_SSH_AUDIT_KEYS = "HostKeyAlgorithms ssh-ed25519,rsa-sha2-512,rsa-sha2-256\n"

ED25519 = ("ed25519",)
BOTH = ("ed25519", "rsa-3072")


@dataclass(frozen=True)
class Accepted:
    """A server that is mounted. ``agreed``: key exchange, host key, cipher (and MAC) that ``profile`` agrees on with it.

    ``options`` are words of the command line that it takes beyond the profile, ``certified`` a host key certificate from a
    known CA in place of a known key. ``quick`` ones are tested in every run.
    """

    name: str
    profile: str
    agreed: Tuple[str, str, str]
    config: str = ""
    server: str = OPENSSH
    host_key_types: Tuple[str, ...] = ED25519
    certified: bool = False
    options: Tuple[str, ...] = ()
    note: str = ""
    quick: bool = False


@dataclass(frozen=True)
class Refused:
    """A server that is refused, with the exit status and words of the sentence that says why.

    host_key    what its keys or known_hosts have become: a name of host_keys.HOST_KEYS
    strict_kex  whether it has strict key exchange; asyncssh only
    between     a man in the middle of the key exchange
    profiles    under each of which it is refused
    """

    name: str
    status: int
    says: Tuple[str, ...]
    config: str = ""
    server: str = OPENSSH
    host_key_types: Tuple[str, ...] = ED25519
    host_key: str = ""
    strict_kex: bool = True
    between: Optional[Edit] = None
    profiles: Tuple[str, ...] = ("hardened",)
    quick: bool = True


# --- mounted: what the guides make ---------------------------------------------------------------------------------------

_GCM256 = "aes256-gcm@openssh.com"
_NO_SNTRUP = "without sntrup761, which this server lacks"

GUIDES = (
    Accepted(
        "Secure Secure Shell (stribika)",
        "hardened",
        (_X25519, "ssh-ed25519", _GCM256),
        f"KexAlgorithms {_X25519},{_GEX}\n{_C6}MACs {_E3},{_PLAIN},umac-128@openssh.com\n",
        host_key_types=BOTH,
        quick=True,
    ),
    Accepted(
        "Mozilla, Modern",
        "hardened",
        (_X25519, "ssh-ed25519", _GCM256),
        f"KexAlgorithms {_X25519},{_NIST},{_GEX}\n{_C6}MACs {_E3},{_PLAIN},umac-128@openssh.com\n",
        host_key_types=(*BOTH, "ecdsa-256"),
        quick=True,
    ),
    Accepted(
        "ssh-audit: Debian 12; Ubuntu 22.04 and 24.04; Rocky Linux 9",
        "hardened",
        ("curve25519-sha256", "ssh-ed25519", _GCM256),
        f"{_SSH_AUDIT_KEX}{_C6}MACs {_E3}\n{_SSH_AUDIT_KEYS}RequiredRSASize 3072\n",
        host_key_types=BOTH,
        quick=True,
    ),
    *(
        Accepted(
            "ssh-audit: Debian 13; Ubuntu 26.04; Rocky Linux 10",
            profile,
            ("mlkem768x25519-sha256", "ssh-ed25519", _GCM256),
            f"KexAlgorithms mlkem768x25519-sha256\n{_C6}MACs {_ETM}\n{_SSH_AUDIT_KEYS}",
            ASYNCSSH,
            host_key_types=BOTH,
            note=f"{_NO_SNTRUP}, and without umac-128-etm",
            quick=profile == "hardened",
        )
        for profile in ("hardened", "pq")
    ),
    *(
        Accepted(
            "GrapheneOS",
            profile,
            ("mlkem768x25519-sha256", "ssh-ed25519", _GCM256),
            f"KexAlgorithms mlkem768x25519-sha256\nCiphers {_GCM256}\nMACs \n",
            ASYNCSSH,
            quick=profile == "pq",
        )
        for profile in ("hardened", "pq")
    ),
    Accepted(
        "GrapheneOS, but for its key exchange",
        "hardened",
        ("curve25519-sha256", "ssh-ed25519", _GCM256),
        f"KexAlgorithms curve25519-sha256\nCiphers {_GCM256}\nMACs -*\n",
        quick=True,
    ),
    Accepted(
        "dev-sec",
        "hardened",
        (_X25519, "rsa-sha2-512", _GCM256),
        f"KexAlgorithms sntrup761x25519-sha512@openssh.com,{_X25519},{_GEX}\n{_C6}MACs {_E3},{_PLAIN}\n",
        host_key_types=("rsa-3072", "ecdsa-256", "ed25519"),
        quick=True,
    ),
    Accepted(
        "STIG for RHEL 9 (FIPS)",
        "hardened",
        ("diffie-hellman-group16-sha512", "ecdsa-sha2-nistp256", _GCM256),
        f"KexAlgorithms {_NIST},{_GEX},diffie-hellman-group14-sha256,diffie-hellman-group16-sha512,"
        f"diffie-hellman-group18-sha512\nCiphers {_GCM},aes256-ctr,aes128-ctr\nMACs {_ETM},{_PLAIN}\n",
        host_key_types=("ecdsa-256", "rsa-3072"),
        quick=True,
    ),
    Accepted(
        "BSI TR-02102-4",
        "hardened",
        ("diffie-hellman-group16-sha512", "ecdsa-sha2-nistp384", _GCM256),
        f"KexAlgorithms {_GEX},diffie-hellman-group16-sha512,{_NIST}\n"
        f"Ciphers {_GCM},aes256-ctr,aes192-ctr,aes128-ctr\nMACs {_ETM},{_PLAIN}\n",
        host_key_types=("ecdsa-384",),
        note="without group15, which this server lacks",
        quick=True,
    ),
    Accepted(
        "AWS Transfer, 2024-01",
        "hardened",
        ("diffie-hellman-group16-sha512", "rsa-sha2-512", _GCM256),
        f"KexAlgorithms {_NIST},diffie-hellman-group18-sha512,diffie-hellman-group16-sha512,{_GEX}\n"
        f"Ciphers {_GCM},aes128-ctr,aes192-ctr,aes256-ctr\nMACs hmac-sha2-256-etm@openssh.com,hmac-sha2-512-etm@openssh.com\n",
        host_key_types=("rsa-3072", "ecdsa-256", "ed25519"),
        quick=True,
    ),
    Accepted(
        "tinysshd",
        "hardened",
        ("curve25519-sha256", "ssh-ed25519", _CHACHA20),
        server=TINYSSHD,
        note="from 20240101: older ones have no strict key exchange, are refused, and are tested here with that demand lifted",
        quick=True,
    ),
    Accepted(
        "ProFTPD mod_sftp 1.3.8, as it comes",
        "hardened",
        ("curve25519-sha256", "ssh-ed25519", _GCM256),
        server=PROFTPD,
        host_key_types=("ed25519", "rsa-3072"),
        quick=True,
    ),
    Accepted(
        "ProFTPD mod_sftp without GCM and encrypt-then-MAC",
        "compatible",
        ("diffie-hellman-group14-sha256", "rsa-sha2-512", "aes128-ctr with hmac-sha2-256"),
        "KexAlgorithms diffie-hellman-group14-sha256\nCiphers aes256-ctr,aes128-ctr\nMACs hmac-sha2-256,hmac-sha1\n",
        PROFTPD,
        host_key_types=("rsa-2048",),
        quick=True,
    ),
    Accepted(
        "OpenSSH, as it comes", "hardened", ("curve25519-sha256", "ssh-ed25519", _GCM256), host_key_types=BOTH
    ),
)


# --- mounted: each algorithm alone ---------------------------------------------------------------------------------------


def _kex_alone(name: str) -> Accepted:
    return Accepted(
        name,
        "compatible" if "group14" in name else "hardened",
        (name, "ssh-ed25519", _GCM256),
        f"KexAlgorithms {name}\n",
        ASYNCSSH if "mlkem" in name else OPENSSH,
        options=("-o", f"KexAlgorithms=+{name}") if "nistp" in name else (),
        quick="group16" in name,
    )


def _cipher_alone(name: str) -> Accepted:
    mac = "hmac-sha2-256-etm@openssh.com"
    agreed = f"{name} with {mac}" if name.endswith("-ctr") else name
    return Accepted(
        name,
        "hardened",
        ("curve25519-sha256", "ssh-ed25519", agreed),
        f"Ciphers {name}\nMACs {mac}\n",
        quick=name in (_CHACHA20, "aes256-ctr"),
    )


def _mac_alone(name: str) -> Accepted:
    return Accepted(
        name,
        "hardened" if "etm" in name else "compatible",
        ("curve25519-sha256", "ssh-ed25519", f"aes128-ctr with {name}"),
        f"Ciphers aes256-ctr,aes192-ctr,aes128-ctr\nMACs {name}\n",
    )


def _host_key_alone(name: str) -> Accepted:
    plain = name.replace("-cert-v01@openssh.com", "")
    if plain.startswith("rsa"):
        kind = "rsa-3072"
    else:
        kind = plain.replace("ssh-", "").replace("sha2-nistp", "")
    return Accepted(
        name,
        "hardened",
        ("curve25519-sha256", name, _GCM256),
        f"HostKeyAlgorithms {name}\n",
        host_key_types=(kind,),
        certified=plain != name,
        quick=name == "ssh-ed25519-cert-v01@openssh.com",
    )


_HOST_KEYS = (
    *("ssh-ed25519", "rsa-sha2-512", "rsa-sha2-256"),
    *("ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521"),
)

ALONE: Dict[str, Tuple[Accepted, ...]] = {
    "Key exchange": tuple(
        map(
            _kex_alone,
            (
                *("mlkem768x25519-sha256", "curve25519-sha256", _X25519, "diffie-hellman-group16-sha512"),
                *("diffie-hellman-group18-sha512", _GEX, *_NIST.split(","), "diffie-hellman-group14-sha256"),
            ),
        )
    ),
    "Cipher": tuple(
        map(_cipher_alone, (*_GCM.split(","), _CHACHA20, "aes256-ctr", "aes192-ctr", "aes128-ctr"))
    ),
    "MAC, with CTR": tuple(map(_mac_alone, (*_ETM.split(","), *_PLAIN.split(",")))),
    "Host key": tuple(
        map(_host_key_alone, (*_HOST_KEYS, *(f"{name}-cert-v01@openssh.com" for name in _HOST_KEYS)))
    ),
}

ACCEPTED = (*GUIDES, *(case for cases in ALONE.values() for case in cases))


# --- refused -------------------------------------------------------------------------------------------------------------

_ALL = ("hardened", "compatible", "pq")
_CTR_ONLY = "Ciphers aes256-ctr,aes192-ctr,aes128-ctr\n"
_TERRAPIN = ("no strict key exchange", "Terrapin attack (CVE-2023-48795)", "update the server")
_FALSE_SIGNATURE = (
    "The signature of the server's host key does not fit",
    "someone between you and the server",
)
_SIDES = ("server", "client")


def _mac_refused(
    *names: str, profiles: Tuple[str, ...] = ("hardened", "compatible"), quick: bool = True
) -> Refused:
    return Refused(
        f"CTR with {', '.join(names)} alone",
        7,
        (f"MACs for aes128-ctr: {', '.join(names)}, of which", "hmac-sha2-256-etm@openssh.com"),
        f"{_CTR_ONLY}MACs {','.join(names)}\n",
        profiles=profiles,
        quick=quick,
    )


def _cipher_refused(*names: str, server: str = OPENSSH, quick: bool = True) -> Refused:
    return Refused(
        f"{', '.join(names)} alone",
        7,
        (f"ciphers: {', '.join(names)}, of which", "accepts none", f"add {_GCM256} to Ciphers"),
        f"Ciphers {','.join(names)}\n"
        + ("KexAlgorithms mlkem768x25519-sha256\n" if server == ASYNCSSH else ""),
        server,
        profiles=_ALL if server == ASYNCSSH else ("hardened", "compatible"),
        quick=quick,
    )


def _kex_refused(name: str, quick: bool = True) -> Refused:
    return Refused(
        f"{name} alone",
        7,
        (f"key exchanges: {name}, of which", "accepts none", "add curve25519-sha256 to KexAlgorithms"),
        f"KexAlgorithms {name}\n",
        profiles=_ALL,
        quick=quick,
    )


REFUSED: Dict[str, Tuple[Refused, ...]] = {
    "Weak algorithms": (
        _mac_refused("hmac-md5"),
        _mac_refused("hmac-sha1"),
        _mac_refused("hmac-sha1-etm@openssh.com", quick=False),
        _mac_refused("hmac-md5-etm@openssh.com", quick=False),
        _mac_refused("umac-64-etm@openssh.com", quick=False),
        _mac_refused("umac-128@openssh.com", "hmac-sha1-96", quick=False),
        _mac_refused("hmac-sha2-512", "hmac-sha2-256", profiles=("hardened",)),
        _cipher_refused("aes256-cbc", "aes192-cbc", "aes128-cbc"),
        _cipher_refused("3des-cbc"),
        _cipher_refused("arcfour256", "arcfour128", "arcfour", server=ASYNCSSH),
        _kex_refused("diffie-hellman-group14-sha1"),
        _kex_refused("diffie-hellman-group-exchange-sha1", quick=False),
        _kex_refused("diffie-hellman-group1-sha1", quick=False),
        Refused(
            "diffie-hellman-group14-sha256 alone (2048 bits)",
            7,
            ("diffie-hellman-group14-sha256", "accepts none", "-o security=compatible would accept"),
            "KexAlgorithms diffie-hellman-group14-sha256\n",
        ),
        Refused(
            "ecdh-sha2-nistp256 alone, unasked",
            7,
            ("ecdh-sha2-nistp256", "asks for none", "-o KexAlgorithms=+ecdh-sha2-nistp256"),
            "KexAlgorithms ecdh-sha2-nistp256\n",
            profiles=("hardened", "compatible"),
        ),
        Refused(
            "no post-quantum key exchange",
            7,
            ("curve25519-sha256", "accepts none", "-o security=hardened would accept"),
            "KexAlgorithms curve25519-sha256\n",
            profiles=("pq",),
            quick=False,
        ),
    ),
    "Host keys": (
        Refused(
            "ssh-rsa signatures (SHA-1) alone",
            7,
            ("host key types: ssh-rsa, of which", "accepts none", "ssh-keygen -A"),
            "HostKeyAlgorithms ssh-rsa\n",
            host_key_types=("rsa-3072",),
            profiles=("hardened", "compatible"),
        ),
        Refused(
            "RSA host key of 2048 bits",
            7,
            ("host key is an RSA key of 2048 bits", "accepts 3072 and more", "ssh-keygen -t rsa -b 4096"),
            host_key_types=("rsa-2048",),
        ),
        Refused(
            "RSA host key of 1024 bits",
            7,
            ("host key is an RSA key of 1024 bits", "and more"),
            host_key_types=("rsa-1024",),
            profiles=("hardened", "compatible"),
            quick=False,
        ),
        Refused(
            "unknown", 6, ("is unknown: ssh-ed25519 SHA256:", "ssh-keyscan", "accept-new"), host_key="unknown"
        ),
        Refused(
            "changed",
            6,
            ("has CHANGED: the server shows", "known_hosts:1 says ssh-ed25519 SHA256:", "verify that"),
            host_key="changed",
        ),
        Refused(
            "of another type than the known one",
            6,
            ("has CHANGED: the server shows ssh-ed25519", "says ecdsa-sha2-nistp256", "verify that"),
            host_key="another type",
            quick=False,
        ),
        Refused("revoked in known_hosts", 6, ("REVOKED in", "known_hosts:2"), host_key="revoked"),
        Refused(
            "revoked in RevokedHostKeys",
            6,
            ("REVOKED in the list of revoked keys", "Ask the server's administrator"),
            host_key="listed as revoked",
        ),
        Refused(
            "certificate expired",
            6,
            ("host certificate", "it expired at 2021-01-01", "issue a certificate"),
            host_key="expired certificate",
        ),
        Refused(
            "certificate of another host",
            6,
            ("host certificate", "it is for elsewhere, not for 127.0.0.1", "issue a certificate"),
            host_key="certificate of another host",
        ),
        Refused(
            "certificate of another CA",
            6,
            ("host certificate", "which no @cert-authority line names", "issue a certificate"),
            host_key="certificate of another CA",
        ),
        Refused(
            "of a jump host: unknown",
            6,
            ("The host key of [localhost]:", "is unknown: ssh-ed25519"),
            host_key="unknown jump host",
        ),
    ),
    "No strict key exchange, and a man in the middle": (
        Refused(
            f"{_CHACHA20} without strict key exchange",
            7,
            (*_TERRAPIN, _CHACHA20),
            f"Ciphers {_CHACHA20}\nKexAlgorithms curve25519-sha256\n",
            ASYNCSSH,
            strict_kex=False,
            profiles=("hardened", "compatible"),
        ),
        Refused(
            "encrypt-then-MAC without strict key exchange",
            7,
            (*_TERRAPIN, "aes128-ctr with hmac-sha2-256-etm@openssh.com"),
            f"{_CTR_ONLY}MACs {_ETM}\nKexAlgorithms curve25519-sha256\n",
            ASYNCSSH,
            strict_kex=False,
            profiles=("hardened", "compatible"),
            quick=False,
        ),
        Refused(
            "strict key exchange taken out on the way, chacha20-poly1305 left",
            7,
            (*_TERRAPIN, _CHACHA20),
            between=Edit(_SIDES, ("kex-strict-*", "*-gcm*", "*-ctr")),
        ),
        Refused(
            "strict key exchange taken out on the way, GCM left",
            6,
            _FALSE_SIGNATURE,
            between=Edit(_SIDES, ("kex-strict-*",)),
        ),
        Refused(
            "strict key exchange taken out of what the client says",
            6,
            _FALSE_SIGNATURE,
            between=Edit(("client",), ("kex-strict-*",)),
            quick=False,
        ),
        Refused(
            "the best key exchanges taken out on the way",
            6,
            _FALSE_SIGNATURE,
            between=Edit(_SIDES, ("curve25519*", "sntrup*", "mlkem*")),
        ),
        Refused(
            "the authenticated ciphers taken out on the way",
            6,
            _FALSE_SIGNATURE,
            between=Edit(_SIDES, ("*-gcm*", "chacha20*")),
            quick=False,
        ),
        Refused(
            "all but the weakest put in on the way: ciphers",
            7,
            ("ciphers: 3des-cbc, arcfour, none, of which", "accepts none"),
            between=Edit(ciphers="3des-cbc,arcfour,none"),
            profiles=("hardened", "compatible"),
        ),
        Refused(
            "all but the weakest put in on the way: MACs",
            7,
            ("MACs for aes128-ctr: hmac-md5, none, of which", "accepts none"),
            between=Edit(ciphers="aes128-ctr", macs="hmac-md5,none"),
            profiles=("hardened", "compatible"),
            quick=False,
        ),
        Refused(
            "all but the weakest put in on the way: key exchanges",
            7,
            ("key exchanges: diffie-hellman-group1-sha1, of which", "accepts none"),
            between=Edit(kex="diffie-hellman-group1-sha1"),
            profiles=_ALL,
            quick=False,
        ),
        Refused(
            "all but the weakest put in on the way: host keys",
            7,
            ("host key types: ssh-dss, ssh-rsa, of which", "accepts none"),
            between=Edit(host_keys="ssh-dss,ssh-rsa"),
            profiles=("hardened", "compatible"),
            quick=False,
        ),
    ),
}
