"""SERVER_SIDE.md's fragment of sshd_config in a real sshd: a mount works, and nothing else does.

The account is whoever runs the tests. Only root can chroot: for others that one line is left out.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Callable, Dict, Iterator, List

import pytest

from mount.helpers import is_root
from support.mount import CHECKOUT, Mount
from support.namespace import DROP_COPIES
from support.process import program
from support.sshd import Sshd, keygen
from test_audit import Result, words_for
from tools.trees import make_tree, run, same_contents

ACCOUNT = "sftp-backup"
(FRAGMENT,) = re.findall(
    r"^```sshd_config\n(.*?)^```", (CHECKOUT / "SERVER_SIDE.md").read_text(), re.S | re.M
)

# Every directory above a chroot has to be root's alone: the test's own is shown where that holds.
JAIL = "/srv"


@pytest.fixture(scope="module")
def jailed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """The server of the page; ``tree`` is its directory ``data``."""
    tmp_path = tmp_path_factory.mktemp("jailed")
    jail = tmp_path / "jail"
    (jail / "data").mkdir(parents=True)
    (jail / "data").chmod(0o700)
    jail.chmod(0o755)
    lines = FRAGMENT.replace(ACCOUNT, "@user@").replace("/etc/ssh/authorized_keys/%u", "@keys@")
    if is_root():
        lines = lines.replace("/srv/sftp/%u", JAIL)
        script = f'{DROP_COPIES}mount --bind "$0" {JAIL} && exec "$@"'
        under = [program("unshare", "util-linux"), "--mount", "sh", "-ec", script, str(jail)]
    else:
        lines = re.sub(r"^ *ChrootDirectory .*\n", "", lines, flags=re.M).replace("/data", str(jail / "data"))
        under = []
    fragment = tmp_path / "sftp-backup.conf"
    server = Sshd(tmp_path, f"Include {fragment}", host_key_types=["ed25519"], under=under)
    keys = server.dir / "authorized_keys"
    keys.write_text(f'restrict,from="127.0.0.0/8" {keys.read_text()}')
    fragment.write_text(lines.replace("@user@", server.user).replace("@keys@", str(keys)))
    server.tree = jail / "data"
    with server:
        yield server


def effective(config: Path, user: str) -> Dict[str, str]:
    """What sshd makes of a configuration for that user: keyword, in lower case -> value."""
    shown = run(
        program("sshd", "openssh-server"), "-T", "-f", config, "-C", f"user={user},host=x,addr=192.0.2.1"
    )
    return dict(line.split(" ", 1) for line in shown.splitlines())


def test_sshd_takes_the_fragment_and_it_is_for_that_account_only(tmp_path: Path) -> None:
    if is_root():
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    config = tmp_path / "sshd_config"
    config.write_text(f"HostKey {keygen(tmp_path / 'host_key', 'ed25519')}\n{FRAGMENT}")
    run(program("sshd", "openssh-server"), "-t", "-f", config)
    theirs, others = (effective(config, user) for user in (ACCOUNT, "daemon"))
    assert theirs["chrootdirectory"] == "/srv/sftp/%u"
    assert theirs["forcecommand"].split()[0] == "internal-sftp"
    assert theirs["disableforwarding"] == "yes" and theirs["permittty"] == "no"
    assert (others["chrootdirectory"], others["forcecommand"]) == ("none", "none")


def test_a_mount_of_it(jailed: Sshd, make_mount: Callable[..., Mount], tmp_path: Path) -> None:
    mount = make_mount(jailed, directory="")
    source = make_tree(tmp_path / "source", files=20)
    run("rsync", "-a", f"{source}/", f"{mount.path}/copy/")
    (mount.path / "private").write_bytes(b"new")
    same_contents(jailed.tree / "copy", source)
    assert (jailed.tree / "private").stat().st_mode & 0o777 == 0o600
    assert mount.unmount() == 0
    # Outside of data there is nothing to see, or, without the chroot, nothing to be told of.
    if is_root():
        mount = make_mount(jailed, directory="/")
        assert os.listdir(mount.path) == ["data"]


def test_it_is_found_fit(jailed: Sshd) -> None:
    found = Result(words_for(jailed, place=f"{jailed.user}@127.0.0.1:"))
    assert found.status == 0, found.out + found.err


@pytest.mark.parametrize(
    "words", [["127.0.0.1", "id"], ["-tt", "127.0.0.1"], ["-W", "127.0.0.1:{port}", "127.0.0.1"]]
)
def test_nothing_but_sftp_is_to_be_had(jailed: Sshd, words: List[str]) -> None:
    command = [program("ssh", "openssh-client"), *jailed.ssh_options()]
    done = subprocess.run(
        [*command, *(word.format(port=jailed.port) for word in words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "uid=" not in done.stdout and "SSH-2.0" not in done.stdout
    if "-W" in words:
        assert "administratively prohibited" in done.stderr
    if "-tt" in words:
        assert "PTY allocation request failed" in done.stderr
