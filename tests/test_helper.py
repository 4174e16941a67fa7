"""helper: what mount(8) says to a helper, in the command's own words."""

from __future__ import annotations

from typing import List

import pytest

from sftpmount import cli, helper
from sftpmount.errors import SftpMountError, UsageError

PLACE = ["nas:/srv", "/mnt"]


def test_flags_are_mounts_not_ours() -> None:
    call = helper.understand(
        [*PLACE, "-sfnv", "-t", "fuse.sftpmount", "-o", "rw,noatime,nonsense=1,IdentityFile=/k"]
    )
    assert call.fake and call.left_out == ("nonsense",)
    assert call.line.operands == tuple(PLACE)
    assert call.line.words == (("rw", None), ("noatime", None), ("IdentityFile", "/k"))


def test_without_s_nothing_is_left_out() -> None:
    call = helper.understand([*PLACE, "-r", "-o", "nonsense=1"])
    assert not call.fake and call.left_out == ()
    assert call.line.words == (("ro", None), ("nonsense", "1"))


def test_a_place_may_look_like_a_flag() -> None:
    assert helper.understand(["--", "-x:", "/mnt"]).line.operands == ("-x:", "/mnt")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([*PLACE, "-N", "/proc/1/ns/mnt"], "run nsenter --mount=NAMESPACE"),
        ([*PLACE, "-Z"], "this is for mount(8) to call"),
        ([*PLACE, "-o"], "option -o requires argument"),
    ],
)
def test_what_is_refused(argv: List[str], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        helper.understand(argv)
    assert sentence in str(caught.value)


def test_every_status_is_one_that_mount_knows(capsys: pytest.CaptureFixture[str]) -> None:
    ours = {error.exit_status for error in SftpMountError.__subclasses__()} | {130}
    assert {status: helper.exit_status(status) for status in (0, 2, 130)} == {0: 0, 2: 1, 130: 8}
    assert {helper.exit_status(status) for status in ours - {2, 130}} == {32}
    assert cli.main(["mount-helper", *PLACE, "-o", "remount"]) == 1
    assert "a mount cannot change its options" in capsys.readouterr().err
    assert cli.main(["mount-helper", "-V"]) == 0
