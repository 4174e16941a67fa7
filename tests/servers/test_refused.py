"""Every weak or false server, as the person at the command meets it: the exit status, one sentence, and nothing mounted."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Iterator

import pytest

from servers.cases import REFUSED, Refused
from servers.host_keys import HOST_KEYS, IS_NEW
from servers.start import make_server
from support.kexinit import Edit, ManInTheMiddle
from support.mount import Mount, MountFailed
from support.sshd import Sshd


def each_profile() -> Iterator[object]:
    """(case, profile): in every run the first profile of the quick ones."""
    for case in (case for cases in REFUSED.values() for case in cases):
        for profile in case.profiles:
            quick = case.quick and profile == case.profiles[0]
            yield pytest.param(
                case, profile, id=f"{case.name}, {profile}", marks=() if quick else (pytest.mark.long,)
            )


@pytest.mark.parametrize(("case", "profile"), list(each_profile()))
def test_it_is_refused_in_a_sentence(case: Refused, profile: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(make_server(case, tmp_path))
        options = HOST_KEYS[case.host_key](server, tmp_path)
        if case.host_key and case.host_key not in IS_NEW:
            options += ("-o", "StrictHostKeyChecking=accept-new")
        port = server.port
        if case.between is not None:
            port = stack.enter_context(ManInTheMiddle(server.port, case.between)).port
        with pytest.raises(MountFailed) as refused:
            Mount(server, tmp_path, "-o", f"security={profile}", *options, port=port)
        assert refused.value.exit_status == case.status, refused.value
        sentence = str(refused.value).partition(": ")[2]
        for words in case.says:
            assert words in sentence
        assert sentence.startswith("sftpmount: ") and sentence.endswith(".") and "\n" not in sentence
        assert "publickey" not in server.log_text()


def test_the_man_in_the_middle_is_let_through_where_he_changes_nothing(tmp_path: Path, sshd: Sshd) -> None:
    """What is refused above is not refused for being relayed."""
    between = ManInTheMiddle(sshd.port, Edit())
    with between, Mount(sshd, tmp_path, port=between.port) as mount:
        (mount.path / "relayed").write_bytes(b"x" * 100_000)
        assert (sshd.tree / "relayed").read_bytes() == b"x" * 100_000
        assert sorted(between.seen[:2]) == ["client", "server"]
