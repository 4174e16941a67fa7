"""What comes from others, made wrong at random: server replies, known_hosts files, command lines and ssh_config files.

A few hundred examples of each in every run; with --long, others each time and more than a hundred thousand together.
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import test_options
from sftp import test_lies
from sftpmount.errors import StatusError, UsageError
from sftpmount.options import SshOptions
from sftpmount.sftp import wire
from sftpmount.ssh import config
from sftpmount.ssh.config import Local
from ssh import test_hostkeys

QUICK = 100

# -- replies ---------------------------------------------------------------------------------------------------------------

_Edit = Tuple[float, int, bytes]
# Numbers that are lengths, counts, flags or sizes where they fall on such.
_CHUNK = st.binary(max_size=8) | st.sampled_from(
    [struct.pack(">I", number) for number in (0, 1, 255, 256, 1 << 20, 1 << 31, 0xFFFFFFFF)]
    + [struct.pack(">Q", number) for number in (1 << 62, 1 << 63, (1 << 64) - 1)]
)
_EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), _CHUNK), max_size=4)


def edited(data: bytes, edits: List[_Edit]) -> bytes:
    """At a place (0 the beginning, 1 the end) so many bytes are replaced by others."""
    for place, length, chunk in edits:
        at = int(place * len(data))
        data = data[:at] + chunk + data[at + length :]
    return data


def check_reply(request: str, edits: List[_Edit]) -> None:
    _, body, parse = test_lies.HONEST[request]
    body = edited(body, edits)
    try:
        value = parse(body)
    except wire.WireError:
        return
    if parse is wire.parse_names:
        assert len(value) * 12 <= len(body)
        assert sum(len(entry.name) + len(entry.longname) for entry in value) <= len(body)
    elif parse is wire.parse_attrs:
        assert value.size is None or 0 <= value.size < 1 << 63
        assert all(number is None or 0 <= number < 1 << 32 for number in value[1:])
    elif parse is wire.parse_handle:
        assert 1 <= len(value) <= 256
    elif parse is wire.parse_status:
        assert value is None or (
            isinstance(value, StatusError) and isinstance(value.errno, int) and value.errno > 0
        )


def check_stream(requests: List[str], edits: List[_Edit], step: int) -> None:
    honest = b"".join(
        wire.header(kind, number, len(body)) + body
        for number, (kind, body, _) in enumerate(test_lies.HONEST[request] for request in requests)
    )
    stream = edited(honest, edits)
    (whole, whole_is_good), (pieces, pieces_are_good) = read(stream, len(stream) or 1), read(stream, step)
    assert whole_is_good == pieces_are_good
    assert (
        pieces == whole if whole_is_good else not whole
    )  # what comes in one chunk with a bad packet goes with it
    assert edits or len(whole) == len(requests)
    assert sum(9 + len(reply.body) for reply in pieces) <= len(stream)


def read(stream: bytes, step: int) -> Tuple[List[wire.Reply], bool]:
    """The replies in a stream that is fed so many bytes at a time, up to the first bad one; False where there is one."""
    reader = wire.ReplyReader()
    replies: List[wire.Reply] = []
    try:
        for at in range(0, len(stream), step):
            replies.extend(reader.feed(stream[at : at + step]))
    except wire.WireError:
        return replies, False
    return replies, True


# -- files and command lines ---------------------------------------------------------------------------------------------

_KEYWORDS = (
    st.sampled_from(
        ["Host", "Match", "Include", "HostName", "User", "Port", "ProxyJump", "ProxyCommand", "IdentityFile"]
    )
    | st.sampled_from(
        ["UserKnownHostsFile", "NumberOfPasswordPrompts", "ConnectTimeout", "RequiredRSASize", "Ciphers"]
    )
    | st.sampled_from(
        ["StrictHostKeyChecking", "AddressFamily", "IdentityAgent", "MACs", "PreferredAuthentications"]
    )
    | st.sampled_from(
        ["HostKeyAlias", "BindAddress", "CASignatureAlgorithms", "KexAlgorithms", "CertificateFile"]
    )
    | st.text(max_size=8)
)
_SETTINGS = st.sampled_from(
    [
        "box",
        "*",
        "!box",
        "all",
        "host box",
        "exec true",
        "none",
        "no",
        "yes",
        "22",
        "-1",
        "65536",
        "%h",
        "%",
        "%z",
        "${X}",
    ]
    + [
        "~",
        "~nobody/x",
        '"a b"',
        '"',
        "a,b",
        "+x",
        "-*",
        "^aes*",
        "-oX=y",
        "a@b:3,[::1]:4",
        "accept-new",
        "inet6",
    ]
) | st.text(max_size=12)
_LINES = st.builds(
    lambda a, b, c: a + b + c, _KEYWORDS, st.sampled_from([" ", "=", " = ", "\t", ""]), _SETTINGS
)


def check_ssh_config(lines: List[str]) -> None:
    """Where ssh is installed it is its parser that reads the file; without it, paramiko's under ours."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", errors="surrogateescape") as file:
        file.write("\n".join(lines))
        file.flush()
        home = str(Path(file.name).parent)
        try:
            target = config.resolve(
                SshOptions("box", config_file=file.name), Local(home, "me", "here", None, None)
            )
        except UsageError as error:
            assert str(error)
            return
    assert target.host and not target.host.startswith("-") and target.host.isprintable()
    assert target.user and not target.user.startswith("-")
    assert 1 <= target.port <= 65535 and target.connect_timeout_s > 0 and target.policy.rsa_bits_min >= 3072
    assert target.policy.ciphers and all("cbc" not in name for name in target.policy.ciphers)


class Target(NamedTuple):
    """``strategies`` give the arguments of ``check``."""

    check: Callable[..., None]
    strategies: Tuple[st.SearchStrategy[Any], ...]
    examples: int  # with --long


_REQUESTS = st.sampled_from(list(test_lies.HONEST))
TARGETS: Dict[str, Target] = {
    "replies": Target(check_reply, (_REQUESTS, _EDITS), 50_000),
    "streams": Target(check_stream, (st.lists(_REQUESTS, max_size=4), _EDITS, st.integers(1, 40)), 15_000),
    "known_hosts": Target(
        test_hostkeys.test_any_file_any_key_and_any_host_give_a_verdict.hypothesis.inner_test,
        (
            st.lists(test_hostkeys._LINE, max_size=8).map(b"\n".join),
            st.binary(max_size=64),
            st.text(max_size=20),
        ),
        10_000,
    ),
    "command lines": Target(
        test_options.test_only_usage_errors_escape.hypothesis.inner_test,
        (st.lists(test_options._arguments, max_size=6),),
        15_000,
    ),
    "options": Target(
        test_options.test_only_usage_errors_escape_from_words.hypothesis.inner_test,
        (st.lists(test_options._words, max_size=5),),
        10_000,
    ),
    "ssh_config": Target(check_ssh_config, (st.lists(_LINES, max_size=6),), 10_000),
}


def fuzz(target: Target, examples: int, *, same: bool) -> int:
    """Returns how many examples were run."""
    count = 0

    def check(arguments: Tuple[Any, ...]) -> None:
        nonlocal count
        count += 1
        target.check(*arguments)

    run = settings(
        max_examples=examples,
        deadline=None,
        derandomize=same,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run(given(st.tuples(*target.strategies))(check))()
    return count


@pytest.mark.parametrize("name", TARGETS)
def test_a_little(name: str) -> None:
    assert fuzz(TARGETS[name], QUICK, same=True) >= QUICK / 2


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", TARGETS)
def test_a_lot(name: str) -> None:
    assert fuzz(TARGETS[name], TARGETS[name].examples, same=False) >= TARGETS[name].examples


def test_a_lot_is_more_than_a_hundred_thousand() -> None:
    assert sum(target.examples for target in TARGETS.values()) >= 100_000
