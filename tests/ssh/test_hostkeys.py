"""known_hosts: our reading of it against OpenSSH's own (ssh-keygen), and the verdict on every kind of host key."""

from __future__ import annotations

import base64
import fcntl
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sftpmount.errors import HostKeyError
from sftpmount.ssh import hostkeys, keys
from sftpmount.ssh.hostkeys import HostName, KnownHosts, Trust
from support.process import program
from support.sshd import keygen, public_key

NOW_S = 1_800_000_000.0
HERE = HostName.of("box.example.org", 22)


def blob_of(private: Path) -> bytes:
    return base64.b64decode(public_key(private).split()[1])


def ssh_keygen(*arguments: str) -> str:
    command = [program("ssh-keygen", "openssh-client"), *arguments]
    answer = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return answer.stdout


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Path]:
    """Name -> private key file: one of each type, another ed25519 and two CAs."""
    home = tmp_path_factory.mktemp("keys")
    kinds = {"ed25519": "ed25519", "other": "ed25519", "ecdsa": "ecdsa", "rsa": "rsa", "ca": "ed25519"}
    kinds.update({"rsa_ca": "rsa", "wrong_ca": "ed25519"})
    made = {name: keygen(home / name, kind) for name, kind in kinds.items()}
    return {**made, "short_ca": keygen(home / "short_ca", "rsa", 1024)}


Sign = Callable[..., bytes]


@pytest.fixture
def sign(pairs: Dict[str, Path], tmp_path: Path) -> Sign:
    """A host certificate made by ``ssh-keygen -s``, as its wire blob."""
    numbers = itertools.count()

    def make(*options: str, ca: str = "ca", key: str = "ed25519", host: bool = True) -> bytes:
        public = tmp_path / f"{next(numbers)}.pub"
        public.write_text(public_key(pairs[key]) + "\n")
        command = [program("ssh-keygen", "openssh-client"), "-q", "-s", str(pairs[ca]), "-I", "an id"]
        subprocess.run([*command, *(["-h"] if host else []), *options, str(public)], check=True)
        return keys.decode_public(Path(f"{str(public)[:-4]}-cert.pub").read_bytes())[0]

    return make


def known(*lines: str) -> KnownHosts:
    return KnownHosts(hostkeys.parse("\n".join(lines).encode("utf-8", "surrogateescape"), "file"))


def check(lines: List[str], blob: bytes, name: HostName = HERE) -> hostkeys.Verdict:
    return known(*lines).check(name, blob, now_s=NOW_S, rsa_bits_min=3072)


# (the host field, the host asked for, its port, whether it matches)
PATTERNS = [
    ("box.example.org", "box.example.org", 22, True),
    ("box.example.org", "BOX.Example.ORG", 22, True),
    ("Box.Example.Org", "box.example.org", 22, True),
    ("box.example.org", "box.example.com", 22, False),
    ("box.example.org,10.0.0.1", "10.0.0.1", 22, True),
    ("*.example.org", "box.example.org", 22, True),
    ("*.example.org", "example.org", 22, False),
    ("b?x.example.org", "box.example.org", 22, True),
    ("b?x.example.org", "boox.example.org", 22, False),
    ("*", "anything", 22, True),
    ("*", "anything", 2222, True),
    ("*.example.org,!box.example.org", "box.example.org", 22, False),
    ("!box.example.org,*.example.org", "box.example.org", 22, False),
    ("!box.example.org,*.example.org", "fox.example.org", 22, True),
    ("!box.example.org", "fox.example.org", 22, False),
    ("[box.example.org]:2222", "box.example.org", 2222, True),
    ("[box.example.org]:2222", "box.example.org", 22, False),
    ("[box.example.org]:2222", "box.example.org", 2223, False),
    ("[*.example.org]:2222", "box.example.org", 2222, True),
    ("[box.example.org]:*", "box.example.org", 2222, True),
    ("2001:db8::1", "2001:DB8::1", 22, True),
    ("[2001:db8::1]:2222", "2001:db8::1", 2222, True),
    ("a,,b", "", 22, True),
    ("box.example.org.", "box.example.org", 22, False),
]


@pytest.mark.parametrize(("field", "host", "port", "expected"), PATTERNS)
def test_patterns(field: str, host: str, port: int, expected: bool) -> None:
    assert hostkeys.match_patterns(field, HostName.of(host, port).listed) is expected


def test_patterns_agree_with_openssh(pairs: Dict[str, Path], tmp_path: Path) -> None:
    """ssh-keygen -F matches as ssh does: the same table, hashed names as well."""
    key = public_key(pairs["ed25519"])
    for field, host, port, expected in PATTERNS:
        if not host or host != host.lower():  # ssh lowers the name before it looks, ssh-keygen -F does not
            continue
        file = tmp_path / "known_hosts"
        file.write_text(f"{field} {key}\n")
        name = host if port == 22 else f"[{host}]:{port}"
        assert bool(ssh_keygen("-F", name, "-f", str(file))) is expected, (field, name)


def test_names_hashed_by_openssh_are_found(pairs: Dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "known_hosts"
    names = [HostName.of("box.example.org", 22), HostName.of("box.example.org", 2222), HostName.of("::1", 22)]
    file.write_text("".join(f"{name.listed} {public_key(pairs['ed25519'])}\n" for name in names))
    ssh_keygen("-H", "-f", str(file))
    text = file.read_text()
    assert text.count("|1|") == 3
    assert "example" not in text
    entries = KnownHosts.load([str(file)])
    for name in names:
        assert entries.check(name, blob_of(pairs["ed25519"]), now_s=NOW_S).trust is Trust.KNOWN
    elsewhere = HostName.of("fox.example.org", 22)
    assert entries.check(elsewhere, blob_of(pairs["ed25519"]), now_s=NOW_S).trust is Trust.UNKNOWN


def test_names_hashed_by_us_are_found_by_openssh(pairs: Dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "known_hosts"
    name = HostName.of("box.example.org", 2222)
    hostkeys.accept_new(str(file), name, blob_of(pairs["ed25519"]), hashed=True)
    assert "example" not in file.read_text()
    assert "found: line 1" in ssh_keygen("-F", "[box.example.org]:2222", "-f", str(file))


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_fingerprints_and_bits_are_openssh_s(kind: str, pairs: Dict[str, Path]) -> None:
    bits, shown, *_ = ssh_keygen("-l", "-f", str(pairs[kind])).split()
    assert keys.fingerprint(blob_of(pairs[kind])) == shown
    assert keys.rsa_bits(blob_of(pairs[kind])) == (int(bits) if kind == "rsa" else None)


def test_a_certificate_has_the_fingerprint_of_its_key(pairs: Dict[str, Path], sign: Sign) -> None:
    for kind in ("ed25519", "ecdsa", "rsa"):
        certificate = sign("-n", "box", key=kind)
        assert keys.plain_key(certificate) == blob_of(pairs[kind])
        assert keys.fingerprint(certificate) == keys.fingerprint(blob_of(pairs[kind]))


# Each line is skipped, and those around it count.
BAD_LINES = [
    "",
    "#  a comment",
    "   ",
    "box.example.org",
    "box.example.org ssh-ed25519",
    "box.example.org ssh-ed25519 AAAA",
    "box.example.org ssh-ed25519 not/base64!",
    "box.example.org ssh-ed25519 {rsa}",
    "box.example.org 2048 65537 24999",
    "@unknown box.example.org ssh-ed25519 {ed25519}",
    "@revoked",
    "@cert-authority  ",
    "@ box.example.org ssh-ed25519 {ed25519}",
    "|1|broken ssh-ed25519 {ed25519}",
    "|2|c2FsdA==|aGFzaA== ssh-ed25519 {ed25519}",
    "|1|c2FsdA==|!!! ssh-ed25519 {ed25519}",
    "\ufffd\x00\x1b[31m",
]


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_malformed_line_spoils_nothing(line: str, pairs: Dict[str, Path]) -> None:
    filled = line
    for name in ("ed25519", "rsa"):
        filled = filled.replace("{" + name + "}", public_key(pairs[name]).split()[1])
    text = f"before {public_key(pairs['other'])}\n{filled}\nbehind {public_key(pairs['other'])}\n"
    entries = KnownHosts(hostkeys.parse(text.encode()))
    assert entries.check(HERE, blob_of(pairs["ed25519"]), now_s=NOW_S).trust is Trust.UNKNOWN
    for host in ("before", "behind"):
        verdict = entries.check(HostName.of(host, 22), blob_of(pairs["other"]), now_s=NOW_S)
        assert verdict.trust is Trust.KNOWN


@pytest.mark.parametrize(
    "line",
    [
        "box.example.org  {key}",
        "  box.example.org {key}",
        "\tbox.example.org\t{key}",
        "box.example.org {key} a comment with @revoked in it",
        "box.example.org {key}\r",
        "box.example.org,\udcff {key}",
    ],
)
def test_odd_but_valid_lines_count(line: str, pairs: Dict[str, Path]) -> None:
    lines = [line.replace("{key}", public_key(pairs["ed25519"]))]
    assert check(lines, blob_of(pairs["ed25519"])).trust is Trust.KNOWN


def test_verdicts_on_plain_keys(pairs: Dict[str, Path]) -> None:
    mine, other = public_key(pairs["ed25519"]), public_key(pairs["other"])
    blob = blob_of(pairs["ed25519"])
    at_2222 = HostName.of("box.example.org", 2222)
    assert check([f"box.example.org {mine}"], blob).trust is Trust.KNOWN
    assert check([f"box.example.org {other}", f"*.example.org {mine}"], blob).trust is Trust.KNOWN
    assert check([f"fox.example.org {mine}"], blob).trust is Trust.UNKNOWN
    assert check([], blob).trust is Trust.UNKNOWN
    changed = check(
        [f"# first\nbox.example.org {public_key(pairs['rsa'])}", f"box.example.org {other}"], blob
    )
    assert changed.trust is Trust.CHANGED
    assert changed.entry is not None
    assert (changed.entry.path, changed.entry.line) == ("file", 3)  # the line of the same type, not just any
    # A host that is known by other key types is not new, or a man in the middle would just use another type.
    assert check([f"box.example.org {public_key(pairs['rsa'])}"], blob).trust is Trust.CHANGED
    # As OpenSSH: known without port is known at any port, but not the other way round.
    assert check([f"box.example.org {mine}"], blob, at_2222).trust is Trust.KNOWN
    assert check([f"box.example.org {other}"], blob, at_2222).trust is Trust.UNKNOWN
    assert check([f"[box.example.org]:2222 {mine}"], blob).trust is Trust.UNKNOWN
    changed = check([f"box.example.org {mine}", f"[box.example.org]:2222 {other}"], blob, at_2222)
    assert changed.trust is Trust.CHANGED
    assert changed.entry is not None
    assert changed.entry.line == 2


def test_lines_without_a_port_revoke_and_certify_at_every_port(pairs: Dict[str, Path], sign: Sign) -> None:
    at_2222 = HostName.of("box.example.org", 2222)
    mine, blob = public_key(pairs["ed25519"]), blob_of(pairs["ed25519"])
    for listed in ("box.example.org", "[box.example.org]:2222"):
        lines = [f"{listed} {mine}", f"@revoked box.example.org {mine}"]
        assert check(lines, blob, at_2222).trust is Trust.REVOKED
    lines = [f"@cert-authority *.example.org {public_key(pairs['ca'])}"]
    assert check(lines, sign("-n", "box.example.org"), at_2222).trust is Trust.CERTIFIED
    assert check(lines, sign("-n", "fox.example.org"), at_2222).trust is Trust.BAD_CERTIFICATE
    assert known(*lines).key_types(at_2222) == known(*lines).key_types(HERE) != []
    lines = [f"@cert-authority [*.example.org]:2222 {public_key(pairs['ca'])}"]
    assert check(lines, sign("-n", "box.example.org")).trust is Trust.UNKNOWN


def test_host_key_alias_stands_for_host_and_port(pairs: Dict[str, Path]) -> None:
    name = HostName.of("10.0.0.7", 2222, "Backup-Box")
    assert check([f"backup-box {public_key(pairs['ed25519'])}"], blob_of(pairs["ed25519"]), name).is_good
    lines = [f"[10.0.0.7]:2222 {public_key(pairs['ed25519'])}"]
    assert check(lines, blob_of(pairs["ed25519"]), name).trust is Trust.UNKNOWN


def test_revoked_wins_over_everything(pairs: Dict[str, Path], sign: Sign, tmp_path: Path) -> None:
    mine, blob = public_key(pairs["ed25519"]), blob_of(pairs["ed25519"])
    ca = f"@cert-authority * {public_key(pairs['ca'])}"
    for lines in (
        [f"box.example.org {mine}", f"@revoked * {mine}"],
        [f"@revoked box.example.org {mine}", f"box.example.org {mine}"],
    ):
        verdict = check(lines, blob)
        assert verdict.trust is Trust.REVOKED
        assert "REVOKED in file:" in str(hostkeys.refusal(verdict, "box", 22, blob))
    assert check([f"@revoked fox {mine}", f"box.example.org {mine}"], blob).trust is Trust.KNOWN
    certificate = sign("-n", "box.example.org")
    assert check([ca], certificate).trust is Trust.CERTIFIED
    assert check([ca, f"@revoked * {mine}"], certificate).trust is Trust.REVOKED
    assert check([ca, f"@revoked * {public_key(pairs['ca'])}"], certificate).trust is Trust.REVOKED
    listed = tmp_path / "revoked"
    listed.write_text(f"# gone\n\n{mine} old box\n")
    verdict = known(f"box.example.org {mine}").check(
        HERE, blob, now_s=NOW_S, revoked=hostkeys.load_revoked(str(listed))
    )
    assert verdict.trust is Trust.REVOKED


@pytest.mark.parametrize("content", [b"SSHKRL\n\0\0\0\0\1", b"not a key\n"])
def test_a_revocation_list_that_is_not_understood_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "revoked").write_bytes(content)
    with pytest.raises(HostKeyError, match="RevokedHostKeys"):
        hostkeys.load_revoked(str(tmp_path / "revoked"))
    with pytest.raises(HostKeyError, match="No such file"):
        hostkeys.load_revoked(str(tmp_path / "absent"))


# (options of ssh-keygen -s, further arguments, why it is refused; "" where it is good)
CERTIFICATES = [
    (["-n", "box.example.org"], {}, ""),
    (["-n", "fox,box.example.org"], {}, ""),
    (["-n", "*.example.org"], {}, ""),
    ([], {}, "names no host"),
    (["-n", "box.example.org"], {"ca": "rsa_ca"}, ""),
    (["-n", "box.example.org", "-t", "rsa-sha2-256"], {"ca": "rsa_ca"}, ""),
    (["-n", "box.example.org"], {"key": "rsa"}, ""),
    (["-n", "box.example.org"], {"key": "ecdsa"}, ""),
    (["-n", "box.example.org", "-V", "20200101:20400101"], {}, ""),
    (["-n", "box.example.org", "-V", "20200101:20210101"], {}, "expired at 20"),
    (["-n", "box.example.org", "-V", "20380101:20390101"], {}, "not valid before 20"),
    (["-n", "fox.example.org"], {}, "is for fox.example.org, not for box.example.org"),
    (["-n", "box.example.org"], {"host": False}, "not a host certificate"),
    (["-n", "box.example.org"], {"ca": "wrong_ca"}, "which no @cert-authority line names"),
    (["-n", "box.example.org", "-O", "critical:wax=poetic"], {}, "critical option that is not understood"),
    (["-n", "box.example.org", "-t", "ssh-rsa"], {"ca": "rsa_ca"}, "signed with ssh-rsa"),
    (["-n", "box.example.org"], {"ca": "short_ca"}, "CA has an RSA key of 1024 bits, and 3072 and more"),
]


@pytest.mark.parametrize(("options", "arguments", "fault"), CERTIFICATES)
def test_certificates(
    options: List[str], arguments: Dict[str, object], fault: str, pairs: Dict[str, Path], sign: Sign
) -> None:
    blob = sign(*options, **arguments)
    lines = [
        f"@cert-authority *.example.org {public_key(pairs[name])}" for name in ("ca", "rsa_ca", "short_ca")
    ]
    verdict = check(lines, blob)
    if not fault:
        assert verdict.trust is Trust.CERTIFIED, verdict
        return
    assert verdict.trust is Trust.BAD_CERTIFICATE
    assert fault in str(hostkeys.refusal(verdict, "box.example.org", 22, blob))
    # The plain key in it may be known by itself, as in OpenSSH.
    kind = str(arguments.get("key", "ed25519"))
    assert check([*lines, f"box.example.org {public_key(pairs[kind])}"], blob).trust is Trust.KNOWN


def test_a_certificate_without_any_ca_line_is_a_plain_key(pairs: Dict[str, Path], sign: Sign) -> None:
    blob = sign("-n", "box.example.org")
    assert check([f"box.example.org {public_key(pairs['ed25519'])}"], blob).trust is Trust.KNOWN
    verdict = check([f"@cert-authority *.example.com {public_key(pairs['ca'])}"], blob)
    assert verdict.trust is Trust.UNKNOWN
    assert keys.fingerprint(blob_of(pairs["ca"])) in verdict.reason


def test_every_flipped_bit_of_a_certificate_is_noticed(pairs: Dict[str, Path], sign: Sign) -> None:
    blob = sign("-n", "box.example.org")
    entries = known(f"@cert-authority * {public_key(pairs['ca'])}")
    for index in range(len(blob)):
        broken = blob[:index] + bytes([blob[index] ^ 1]) + blob[index + 1 :]
        assert not entries.check(HERE, broken, now_s=NOW_S).is_good, index
    for length in range(len(blob)):
        assert not entries.check(HERE, blob[:length], now_s=NOW_S).is_good, length
    assert not entries.check(HERE, blob + b"\0", now_s=NOW_S).is_good


def test_the_types_to_negotiate_are_those_known(pairs: Dict[str, Path]) -> None:
    lines = [
        f"box.example.org {public_key(pairs['rsa'])}",
        f"box.example.org {public_key(pairs['ecdsa'])}",
        f"fox {public_key(pairs['ed25519'])}",
        f"@revoked * {public_key(pairs['other'])}",
    ]
    assert known(*lines).key_types(HERE) == ["ssh-rsa", "ecdsa-sha2-nistp256"]
    with_ca = known(*lines, f"@cert-authority *.example.org {public_key(pairs['ca'])}").key_types(HERE)
    assert with_ca[0] == "ssh-ed25519-cert-v01@openssh.com"
    assert "rsa-sha2-512-cert-v01@openssh.com" in with_ca
    assert with_ca[-2:] == ["ssh-rsa", "ecdsa-sha2-nistp256"]


def test_refusals_say_what_to_do(pairs: Dict[str, Path]) -> None:
    blob, shown = blob_of(pairs["ed25519"]), keys.fingerprint(blob_of(pairs["ed25519"]))
    unknown = str(hostkeys.refusal(check([], blob), "box", 2222, blob))
    for part in (shown, "ssh-ed25519", "[box]:2222", "ssh-keyscan -p 2222 box", "accept-new"):
        assert part in unknown
    lines = [f"box.example.org {public_key(pairs['other'])}"]
    changed = str(hostkeys.refusal(check(lines, blob), "box.example.org", 22, blob))
    for part in ("CHANGED", shown, keys.fingerprint(blob_of(pairs["other"])), "file:1"):
        assert part in changed


def test_several_files_and_those_that_cannot_be_read(pairs: Dict[str, Path], tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text(f"fox {public_key(pairs['other'])}\n")
    second.write_text(f"box.example.org {public_key(pairs['ed25519'])}")  # no newline at its end
    entries = KnownHosts.load([str(first), str(tmp_path / "absent"), "/dev/null", str(second)])
    assert entries.check(HERE, blob_of(pairs["ed25519"]), now_s=NOW_S).trust is Trust.KNOWN
    with pytest.raises(HostKeyError, match="cannot be read"):
        KnownHosts.load([str(tmp_path)])


# Appending.


def test_accept_new_makes_file_and_directory_private(pairs: Dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "home" / ".ssh" / "known_hosts"
    previous = os.umask(0)
    try:
        verdict = hostkeys.accept_new(str(file), HostName.of("Box", 2222), blob_of(pairs["ed25519"]))
    finally:
        os.umask(previous)
    assert verdict.trust is Trust.KNOWN
    assert file.read_text() == f"[box]:2222 {public_key(pairs['ed25519'])}\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert "found: line 1" in ssh_keygen("-F", "[box]:2222", "-f", str(file))


def test_accept_new_mends_a_missing_newline(pairs: Dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "known_hosts"
    file.write_text(f"fox {public_key(pairs['other'])}")
    hostkeys.accept_new(str(file), HERE, blob_of(pairs["ed25519"]))
    assert file.read_text().splitlines() == [
        f"fox {public_key(pairs['other'])}",
        f"box.example.org {public_key(pairs['ed25519'])}",
    ]


def test_accept_new_never_takes_a_second_key(pairs: Dict[str, Path], tmp_path: Path) -> None:
    """Another process may have recorded a different key since we looked: two keys would let anyone in."""
    file = tmp_path / "known_hosts"
    hostkeys.accept_new(str(file), HERE, blob_of(pairs["other"]))
    before = file.read_bytes()
    assert hostkeys.accept_new(str(file), HERE, blob_of(pairs["ed25519"])).trust is Trust.CHANGED
    assert hostkeys.accept_new(str(file), HERE, blob_of(pairs["other"])).trust is Trust.KNOWN
    assert file.read_bytes() == before


def test_accept_new_by_eight_processes_at_once(pairs: Dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "known_hosts"
    program_text = (
        "import base64, sys; from sftpmount.ssh import hostkeys\n"
        "path, blob, number = sys.argv[1], base64.b64decode(sys.argv[2]), int(sys.argv[3])\n"
        "sys.stdin.read()\n"
        "for each in ('shared', *(f'host-{number}-{turn}' for turn in range(20))):\n"
        "    verdict = hostkeys.accept_new(path, hostkeys.HostName.of(each, 22), blob)\n"
        "    assert verdict.is_good, verdict\n"
    )
    blob = public_key(pairs["ed25519"]).split()[1]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program_text, str(file), blob, str(number)], stdin=subprocess.PIPE
        )
        for number in range(8)
    ]
    for process in running:  # all of them wait for this, and start together
        assert process.stdin is not None
        process.stdin.close()
    assert [process.wait(timeout=60) for process in running] == [0] * 8
    lines = file.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 8 * 20 + 1
    assert all(line.endswith(public_key(pairs["ed25519"])) for line in lines)


def test_accept_new_follows_a_file_that_was_replaced(pairs: Dict[str, Path], tmp_path: Path) -> None:
    """ssh-keygen -R renames a new file over the old one: what goes to the old one would be lost."""
    file = tmp_path / "known_hosts"
    file.write_text("")
    holder = os.open(file, os.O_RDWR)
    fcntl.flock(holder, fcntl.LOCK_EX)

    def replace_then_unlock(_: float) -> None:
        nonlocal holder
        if holder >= 0:
            (tmp_path / "new").write_text(f"fox {public_key(pairs['other'])}\n")
            os.replace(tmp_path / "new", file)
            os.close(holder)
            holder = -1

    hostkeys.accept_new(str(file), HERE, blob_of(pairs["ed25519"]), sleep=replace_then_unlock)
    assert [line.split()[0] for line in file.read_text().splitlines()] == ["fox", "box.example.org"]


def test_accept_new_waits_only_so_long_for_a_lock(pairs: Dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "known_hosts"
    file.write_text("")
    times = iter(range(1000))
    with file.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(HostKeyError, match="locked"):
            hostkeys.accept_new(
                str(file),
                HERE,
                blob_of(pairs["ed25519"]),
                sleep=lambda _: None,
                clock=lambda: float(next(times)),
            )
    assert file.read_text() == ""


def test_accept_new_says_when_the_file_cannot_be_written(pairs: Dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(HostKeyError, match="cannot be added"):
        hostkeys.accept_new(str(tmp_path), HERE, blob_of(pairs["ed25519"]))


# Fuzzing.

_WORD = st.sampled_from(
    [
        b"@revoked",
        b"@cert-authority",
        b"box.example.org",
        b"*",
        b"!*",
        b"|1|c2FsdA==|aGFzaA==",
        b"ssh-ed25519",
        b"ssh-rsa",
    ]
    + [
        b"AAAAC3NzaC1lZDI1NTE5AAAAIA==",
        base64.b64encode(keys.string(b"ssh-ed25519") + keys.string(b"x" * 32)),
        b"#",
    ]
)
_LINE = st.lists(st.one_of(_WORD, st.binary(max_size=12)), max_size=6).map(b" ".join)


@given(st.lists(_LINE, max_size=8).map(b"\n".join), st.binary(max_size=64), st.text(max_size=20))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_file_any_key_and_any_host_give_a_verdict(text: bytes, blob: bytes, host: str) -> None:
    entries = hostkeys.parse(text, "fuzz")
    for entry in entries:
        assert keys.key_type(entry.blob)
    for port in (22, 2222):
        name = HostName.of(host, port)
        known_hosts = KnownHosts(entries)
        known_hosts.key_types(name)
        verdict = known_hosts.check(name, blob, now_s=NOW_S)
        assert not verdict.is_good or blob in [entry.blob for entry in entries]
        if verdict.trust is Trust.UNKNOWN:
            assert str(hostkeys.refusal(verdict, "box", 22, blob)).isprintable()


def test_a_hostile_pattern_takes_no_time() -> None:
    started = time.monotonic()
    assert not hostkeys.match_patterns("*a" * 200 + "b", "a" * 250)
    assert time.monotonic() - started < 2.0
