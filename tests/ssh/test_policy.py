"""Profiles, the user's lists, what is agreed with a server, and the sentences where nothing is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sftpmount.errors import PolicyError, UsageError
from sftpmount.ssh import policy as p
from sftpmount.ssh.policy import Policy, ServerOffer, agree, make_policy, verdict

CHACHA = "chacha20-poly1305@openssh.com"
GCM = "aes256-gcm@openssh.com"
ETM = "hmac-sha2-256-etm@openssh.com"

DEBIAN_12 = ServerOffer(
    kex=("sntrup761x25519-sha512@openssh.com", "curve25519-sha256", "diffie-hellman-group14-sha256"),
    host_keys=("rsa-sha2-512", "rsa-sha2-256", "ssh-ed25519"),
    ciphers_out=(CHACHA, "aes128-ctr", "aes128-gcm@openssh.com", GCM),
    ciphers_in=(CHACHA, "aes128-ctr", "aes128-gcm@openssh.com", GCM),
    macs_out=("umac-64-etm@openssh.com", ETM, "hmac-sha1"),
    macs_in=("umac-64-etm@openssh.com", ETM, "hmac-sha1"),
    strict_kex=True,
)


def offering(**lists: object) -> ServerOffer:
    """DEBIAN_12 with other ``ciphers`` or ``macs`` in both directions, or other fields."""
    for name in ("ciphers", "macs"):
        if name in lists:
            lists[f"{name}_out"] = lists[f"{name}_in"] = lists.pop(name)
    return replace(DEBIAN_12, **lists)  # type: ignore[arg-type]


def everything(policy: Policy) -> str:
    return " ".join((*policy.kex, *policy.host_keys, *policy.ciphers, *policy.macs))


@pytest.mark.parametrize("profile", ["hardened", "compatible", "pq"])
def test_no_profile_offers_what_is_broken(profile: str) -> None:
    offered = everything(make_policy(profile))
    for word in ("cbc", "sha1", "md5", "arcfour", "3des", "ssh-dss", "umac-64", "group1-", "-96"):
        assert word not in offered
    assert "ssh-rsa" not in make_policy(profile).host_keys


def test_hardened_macs_are_encrypt_then_mac_only() -> None:
    assert all(name.endswith("-etm@openssh.com") for name in make_policy().macs)
    assert "hmac-sha2-256" in make_policy("compatible").macs


def test_pq_is_ml_kem_and_aead_only() -> None:
    policy = make_policy("pq")
    assert policy.kex == ("mlkem768x25519-sha256",)
    assert all(map(p.is_aead, policy.ciphers))
    assert policy.ciphers[0] == GCM  # 256-bit keys first


def test_every_aead_cipher_precedes_every_other() -> None:
    for fast_aes in (True, False):
        kinds = [p.is_aead(name) for name in make_policy(fast_aes=fast_aes).ciphers]
        assert kinds == sorted(kinds, reverse=True)
    assert make_policy(fast_aes=False).ciphers[0] == CHACHA
    assert make_policy(fast_aes=True).ciphers[0] == GCM


def test_an_unknown_profile_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="hardened, compatible or pq"):
        make_policy("lax")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("aes256-ctr,aes128-gcm@openssh.com", ("aes256-ctr", "aes128-gcm@openssh.com")),
        ("3des-cbc,aes256-ctr", ("aes256-ctr",)),
        ("aes*-gcm@openssh.com", (GCM, "aes128-gcm@openssh.com")),
        ("aes???-ctr", ("aes128-ctr", "aes192-ctr", "aes256-ctr")),
        ("-*-ctr,chacha*", (GCM, "aes128-gcm@openssh.com")),
        ("^aes256-ctr", ("aes256-ctr", GCM, "aes128-gcm@openssh.com", CHACHA, "aes128-ctr", "aes192-ctr")),
        ("+3des-cbc", make_policy().ciphers),
    ],
)
def test_the_users_list_narrows_or_reorders(spec: str, expected: object) -> None:
    assert make_policy(ciphers=spec).ciphers == expected


@pytest.mark.parametrize("spec", ["3des-cbc", "-*", "", "aes[12]*"])
def test_a_list_that_leaves_nothing_is_a_usage_error(spec: str) -> None:
    with pytest.raises(UsageError, match=r"Ciphers=.* leaves nothing that security=hardened accepts"):
        make_policy(ciphers=spec)


@pytest.mark.parametrize("spec", ["aes*,!aes128*", "-!aes256-ctr", "!chacha*"])
def test_a_negation_is_refused_and_not_passed_over(spec: str) -> None:
    with pytest.raises(UsageError, match=r"negates with !; write Ciphers=-NAME"):
        make_policy(ciphers=spec)


def test_other_lists_are_narrowed_too() -> None:
    policy = make_policy(
        kex_algorithms="curve25519-sha256", macs="hmac-sha1,hmac-sha2-512-etm*", host_key_algorithms="-*nist*"
    )
    assert policy.kex == ("curve25519-sha256",)
    assert policy.macs == ("hmac-sha2-512-etm@openssh.com",)
    assert policy.plain_host_keys == ("ssh-ed25519", "rsa-sha2-512", "rsa-sha2-256")
    assert "ssh-ed25519-cert-v01@openssh.com" in policy.host_keys


@pytest.mark.parametrize("profile", ["hardened", "compatible"])
def test_nist_curves_are_for_those_who_name_them(profile: str) -> None:
    policy = make_policy(profile)
    assert "nistp" not in " ".join((*policy.kex, *policy.host_keys_offered))
    assert "ecdsa-sha2-nistp256" in policy.host_keys  # for servers that known_hosts has such a key of
    asked = make_policy(profile, kex_algorithms="+ecdh-sha2-nistp384", host_key_algorithms="^ecdsa*")
    assert asked.kex == (*policy.kex, "ecdh-sha2-nistp384")
    assert asked.host_keys_offered == (*asked.plain_host_keys[:3], *policy.host_keys_offered)
    assert make_policy(profile, kex_algorithms="ecdh*521").kex == ("ecdh-sha2-nistp521",)


@pytest.mark.parametrize(
    ("offer", "remedy"),
    [
        (offering(kex=("ecdh-sha2-nistp256",)), "-o KexAlgorithms=+ecdh-sha2-nistp256"),
        (
            offering(host_keys=("ecdsa-sha2-nistp256",)),
            "known_hosts file that has its ecdsa-sha2-nistp256 key",
        ),
    ],
)
def test_the_sentence_says_how_to_name_them(offer: ServerOffer, remedy: str) -> None:
    with pytest.raises(PolicyError, match="asks for none") as caught:
        agree(make_policy(), offer)
    assert remedy in str(caught.value)


def test_agreement_is_the_first_of_ours_that_the_server_has() -> None:
    agreed = agree(make_policy(), DEBIAN_12)
    assert (agreed.kex, agreed.host_key) == ("curve25519-sha256", "ssh-ed25519")
    assert (agreed.cipher_out, agreed.cipher_in) == (GCM, GCM)
    assert (agreed.mac_out, agreed.mac_in) == ("", "")


def test_no_mac_is_asked_for_where_the_cipher_is_aead() -> None:
    assert agree(make_policy(), offering(macs=())).mac_out == ""
    assert agree(make_policy(), offering(macs=("hmac-md5",))).mac_in == ""


def test_directions_are_agreed_separately() -> None:
    agreed = agree(make_policy(), offering(ciphers_out=("aes256-ctr",)))
    assert (agreed.cipher_out, agreed.mac_out) == ("aes256-ctr", ETM)
    assert (agreed.cipher_in, agreed.mac_in) == (GCM, "")


def test_host_keys_offered_to_this_server_are_what_counts() -> None:
    assert agree(make_policy(), DEBIAN_12, ["rsa-sha2-256"]).host_key == "rsa-sha2-256"


@pytest.mark.parametrize(
    ("offer", "words"),
    [
        (offering(kex=("diffie-hellman-group1-sha1",)), ("key exchanges", "group1-sha1", "KexAlgorithms")),
        (offering(host_keys=("ssh-rsa",)), ("host key types", "ssh-rsa", "ssh-ed25519")),
        (offering(ciphers=("aes256-cbc", "3des-cbc")), ("ciphers", "aes256-cbc, 3des-cbc", "Ciphers", GCM)),
        (
            offering(ciphers=("aes256-ctr",), macs=("hmac-sha1", "hmac-md5")),
            ("MACs for aes256-ctr", "hmac-sha1, hmac-md5", ETM, "sshd_config"),
        ),
        (
            offering(ciphers=("aes256-ctr",), macs=("hmac-sha2-512",)),
            ("security=compatible would accept hmac-sha2-512",),
        ),
        (offering(ciphers=("aes256-ctr",), macs=()), ("none", ETM)),
        (offering(kex=("diffie-hellman-group14-sha256",)), ("security=compatible would accept",)),
    ],
)
def test_the_sentence_says_what_was_offered_and_what_to_do(offer: ServerOffer, words: object) -> None:
    with pytest.raises(PolicyError) as caught:
        agree(make_policy(), offer)
    sentence = str(caught.value)
    for word in words:  # type: ignore[attr-defined]
        assert word in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_the_sentence_names_the_users_own_list_when_that_is_the_cause() -> None:
    with pytest.raises(
        PolicyError, match=r"asks for none; security=hardened would accept (\S+): .* -o Ciphers=\+\1"
    ):
        agree(make_policy(ciphers="aes192-ctr"), DEBIAN_12)


def test_pq_names_the_profile_that_would_do() -> None:
    with pytest.raises(PolicyError, match="-o security=hardened would accept curve25519-sha256"):
        agree(make_policy("pq"), DEBIAN_12)


def test_a_servers_escape_sequences_do_not_reach_the_terminal() -> None:
    with pytest.raises(PolicyError) as caught:
        agree(make_policy(), offering(kex=("\x1b[2Jgotcha\n",)))
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ciphers", [(CHACHA,), ("aes256-ctr",)])
def test_strict_kex_is_demanded_where_terrapin_matters(ciphers: object) -> None:
    with pytest.raises(PolicyError, match=r"no strict key exchange.*Terrapin.*OpenSSH 9\.6"):
        agree(make_policy(), offering(ciphers=ciphers, strict_kex=False))
    agree(make_policy(), offering(ciphers=ciphers))


@pytest.mark.parametrize("ciphers", [CHACHA, "aes256-ctr"])
@pytest.mark.parametrize("direction", ["ciphers_out", "ciphers_in"])
def test_strict_kex_is_demanded_where_terrapin_matters_in_one_direction(ciphers: str, direction: str) -> None:
    both_gcm = offering(ciphers=(GCM,), strict_kex=False)
    agree(make_policy(), both_gcm)
    with pytest.raises(PolicyError, match=f"without which {ciphers}"):
        agree(make_policy(), replace(both_gcm, **{direction: (ciphers,)}))  # type: ignore[arg-type]


def test_strict_kex_may_be_missing_with_gcm_and_with_plain_macs() -> None:
    agree(make_policy(), offering(strict_kex=False))
    agree(
        make_policy("compatible"),
        offering(ciphers=("aes256-ctr",), macs=("hmac-sha2-256",), strict_kex=False),
    )


def test_the_terrapin_sentence_names_gcm_where_the_server_has_it() -> None:
    with pytest.raises(PolicyError, match=r"-o Ciphers=aes\*-gcm@openssh.com"):
        agree(make_policy(fast_aes=False), offering(strict_kex=False))


def test_sizes() -> None:
    for profile, least in (("hardened", 3072), ("pq", 3072), ("compatible", 2048)):
        policy = make_policy(profile)
        p.require_rsa_bits(policy, least, "The key")
        p.require_gex_bits(policy, least)
        with pytest.raises(PolicyError, match=f"RSA key of {least - 1} bits"):
            p.require_rsa_bits(policy, least - 1, "The key")
        with pytest.raises(PolicyError, match="group of 2047 bits"):
            p.require_gex_bits(policy, 2047)
    with pytest.raises(PolicyError):
        p.require_gex_bits(make_policy(), 8193)


@pytest.mark.parametrize(
    ("category", "name", "grade"),
    [
        ("kex", "mlkem768x25519-sha256", p.GOOD),
        ("kex", "sntrup761x25519-sha512@openssh.com", p.UNSUPPORTED),
        ("kex", "diffie-hellman-group14-sha256", p.WEAK),
        ("kex", "diffie-hellman-group14-sha1", p.BROKEN),
        ("kex", "diffie-hellman-group-exchange-sha1", p.BROKEN),
        ("host_key", "ssh-ed25519", p.GOOD),
        ("host_key", "ssh-rsa", p.BROKEN),
        ("host_key", "ssh-rsa-cert-v01@openssh.com", p.BROKEN),
        ("cipher", CHACHA, p.GOOD),
        ("cipher", "aes256-ctr", p.GOOD),
        ("cipher", "aes256-cbc", p.BROKEN),
        ("cipher", "arcfour128", p.BROKEN),
        ("cipher", "never-heard-of", p.UNSUPPORTED),
        ("mac", ETM, p.GOOD),
        ("mac", "hmac-sha1-etm@openssh.com", p.BROKEN),
        ("mac", "umac-64-etm@openssh.com", p.WEAK),
        ("mac", "umac-128-etm@openssh.com", p.UNSUPPORTED),
        ("mac", "hmac-sha2-256", p.WEAK),
        ("mac", "umac-128@openssh.com", p.WEAK),
    ],
)
def test_verdicts(category: str, name: str, grade: str) -> None:
    assert verdict(category, name)[0] == grade
    assert verdict(category, name)[1]


@pytest.mark.parametrize("category", ["kex", "host_key", "cipher", "mac"])
def test_what_hardened_offers_is_good(category: str) -> None:
    policy = make_policy()
    lists = {"kex": policy.kex, "host_key": policy.host_keys, "cipher": policy.ciphers, "mac": policy.macs}
    for name in lists[category]:
        assert verdict(category, name)[0] == p.GOOD


def test_every_reason_of_a_refusal_is_told_with_its_line() -> None:
    offer = offering(kex=("diffie-hellman-group1-sha1",), ciphers=("aes128-ctr",), macs=("hmac-md5", "a b"))
    agreement, problems = p.weigh(make_policy(), offer)
    assert (agreement.kex, agreement.cipher_out, agreement.mac_out) == ("", "aes128-ctr", "")
    assert [problem.server_lines for problem in problems] == [
        ("KexAlgorithms curve25519-sha256,curve25519-sha256@libssh.org,diffie-hellman-group1-sha1",),
        ("MACs hmac-sha2-256-etm@openssh.com,hmac-sha2-512-etm@openssh.com,hmac-md5",),
    ]
    with pytest.raises(PolicyError) as caught:
        agree(make_policy(), offer)
    assert str(caught.value) == str(problems[0])


@pytest.mark.parametrize("category", ["kex", "host_key", "cipher", "mac"])
@pytest.mark.parametrize("profile", ["hardened", "compatible", "pq"])
def test_the_named_lines_make_every_profile_agree(profile: str, category: str) -> None:
    field = {"kex": "kex", "host_key": "host_keys", "cipher": "ciphers", "mac": "macs"}[category]
    offer = offering(
        **{"kex": make_policy("pq").kex + DEBIAN_12.kex, "ciphers": ("aes128-ctr", GCM), field: ("none",)}
    )
    if category == "mac":
        offer = replace(offer, ciphers_out=("aes128-ctr",), ciphers_in=("aes128-ctr",))
    _, problems = p.weigh(make_policy(profile), offer)
    for line in (line for problem in problems for line in problem.server_lines):
        keyword, _, value = line.partition(" ")
        name = {
            "KexAlgorithms": "kex",
            "Ciphers": "ciphers",
            "MACs": "macs",
            "HostKeyAlgorithms": "host_keys",
        }.get(keyword)
        if name is not None:
            names = tuple(value.split(","))
            ways = (f"{name}_out", f"{name}_in") if name in ("ciphers", "macs") else (name,)
            offer = replace(offer, **dict.fromkeys(ways, names))  # type: ignore[arg-type]
    assert problems
    agree(make_policy(profile), offer)


def test_a_list_of_ones_own_is_not_cured_on_the_server() -> None:
    _, (problem,) = p.weigh(make_policy(ciphers=CHACHA), offering(ciphers=(GCM,)))
    assert problem.server_lines == ()


def test_standings() -> None:
    policy = make_policy("pq", ciphers=GCM)
    offer = offering(kex=("mlkem768x25519-sha256", "curve25519-sha256"), compression_out=("zlib",))
    agreed = agree(policy, offer)
    assert p.standing(policy, "kex", "mlkem768x25519-sha256", agreed) == (p.USED, "post-quantum hybrid")
    assert p.standing(policy, "kex", "mlkem768x25519-sha256", None)[0] == p.ACCEPTED
    assert p.standing(policy, "kex", "curve25519-sha256", agreed) == (p.REFUSED, "not post-quantum")
    assert p.standing(policy, "cipher", "aes128-ctr", agreed) == (p.REFUSED, "not authenticated encryption")
    assert p.standing(policy, "cipher", CHACHA, agreed) == (p.REFUSED, "left out by your own list")
    unasked = p.standing(make_policy(), "kex", "ecdh-sha2-nistp256", None)
    assert unasked == (p.REFUSED, "a NIST curve: used only where you ask, KexAlgorithms=+ecdh-sha2-nistp256")
    assert p.standing(policy, "mac", ETM, agreed) == (p.ACCEPTED, "encrypt-then-MAC")
    assert p.standing(policy, "host_key", "ssh-ed25519", agreed) == (p.USED, "")
    assert p.standing(policy, "compression", "none", agreed) == (p.USED, "")
    assert p.standing(policy, "compression", "zlib", agreed)[0] == p.REFUSED
    assert offer.ways("compression") == (("zlib",), ())
