"""place: what can be mounted, as sshfs writes it and as a URL."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftpmount.errors import UsageError
from sftpmount.place import Place, parse_place


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("host:", (None, "host", None, b"")),
        ("host:dir", (None, "host", None, b"dir")),
        ("user@host:/a b:c@d", ("user", "host", None, b"/a b:c@d")),
        ("me@corp.example@host:dir", ("me@corp.example", "host", None, b"dir")),
        (r"CORP\me@host:", (r"CORP\me", "host", None, b"")),
        ("[::1]:dir", (None, "::1", None, b"dir")),
        ("user@[fe80::1%eth0]:/x", ("user", "fe80::1%eth0", None, b"/x")),
        ("host:~", (None, "host", None, b"")),
        ("host:~/dir", (None, "host", None, b"dir")),
        ("host:~joe", (None, "host", None, b"~joe")),
        ("host:./~/x", (None, "host", None, b"./~/x")),
        ("host:\udcff\u00e9", (None, "host", None, b"\xff\xc3\xa9")),
        ("host:a\nb", (None, "host", None, b"a\nb")),
        ("sftp://host", (None, "host", None, b"")),
        ("sftp://host/", (None, "host", None, b"/")),
        ("sftp://user@host:2222/a%20b/c", ("user", "host", 2222, b"/a b/c")),
        ("ssh://user@[::1]:22/~/x", ("user", "::1", 22, b"x")),
        ("SFTP://me%40corp@host/~", ("me@corp", "host", None, b"")),
        ("sftp://host/~joe/%ff", (None, "host", None, b"/~joe/\xff")),
    ],
)
def test_places(text: str, expected: Place) -> None:
    assert parse_place(text) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("host", "'host' is not of the form [user@]host:[dir]: write host: for a host of that name."),
        ("/some/dir", "is not of the form [user@]host:[dir]: write user@host:dir."),
        ("", "is not of the form"),
        (":dir", "the host is empty"),
        ("::1:dir", "the host is empty: write [user@]host:[dir], IPv6 addresses in brackets."),
        ("[]:dir", "the host is empty"),
        ("[::1:dir", "is not of the form"),
        ("@host:", "the user is empty"),
        ("-oProxyCommand=touch x:dir", "cannot be the name or address of a host"),
        ("u@-oProxyCommand=x:dir", "cannot be the name or address of a host"),
        ("[-x]:", "cannot be the name or address"),
        ("ho st:", "cannot be the name or address"),
        ("host;id:", "cannot be the name or address"),
        ("$(id):", "cannot be the name or address"),
        ("a/b:", "cannot be the name or address"),
        ("h\x1b0m:", "cannot be the name or address"),
        ("host\n:", "cannot be the name or address"),
        ("-l@host:", "cannot be a user's name"),
        ("`id`@host:", "cannot be a user's name"),
        ("a b@host:", "cannot be a user's name"),
        ("\udcff@host:", "cannot be a user's name"),
        ("sftp://", "the host is empty"),
        ("sftp:///dir", "the host is empty"),
        ("sftp://user:secret@host/", "a password in a URL is refused"),
        ("sftp://user;fingerprint=x@host/", "parameters in a URL"),
        ("sftp://host:0/", "the URL's port 0"),
        ("sftp://host:99999/", "the URL's port 99999"),
        ("sftp://host:22x/", "is not host or host:port"),
        ("sftp://host/a%00b", "holds a NUL byte"),
        ("sftp://-x/", "cannot be the name or address"),
        ("sftp://a%20b@host/", "cannot be a user's name"),
    ],
)
def test_refused_places(text: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_place(text)
    assert sentence in str(caught.value)
    assert "secret" not in str(caught.value)


# What a process can be handed: text, and bytes that are none.
_characters = st.characters(exclude_categories=["Cs"]) | st.characters(
    min_codepoint=0xDC80, max_codepoint=0xDCFF
)


@settings(max_examples=500, deadline=None)
@given(st.text(_characters | st.sampled_from("@:[]/%-~.;"), max_size=40))
def test_nothing_that_a_shell_reads_gets_through(text: str) -> None:
    for prefix in ("", "sftp://", "user@host:"):
        try:
            place = parse_place(prefix + text)
        except UsageError:
            continue
        for word in (place.host, place.user or "u"):
            assert word and word[0] != "-" and word.isprintable()
            assert not set(word) & set(" '\"`$;&<>|(){}\t\n")
