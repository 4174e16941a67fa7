"""mount(8), fstab, autofs and umount(8), in a scratch environment where the mount is installed; sshfs's lines among them."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import List

import pytest

from support.process import is_running, wait_until
from support.sshd import Sshd
from system.conftest import HOST
from system.scratch import WAIT_S, Scratch, key_of, words_of

USER = "nobody"  # an ordinary one; the tests make none of their own

# What belongs to mount(8), systemd and the desktop: taken, and without effect.
SWALLOWED = (
    "defaults,auto,noauto,nofail,_netdev,owner,group,nouser,rw,relatime,nostrictatime,lazytime,nodiratime,silent,comment=none,"
    "x-systemd.automount,x-systemd.idle-timeout=1min,x-systemd.requires=network-online.target,x-gvfs-show,X-mount.mkdir"
)


class Line:
    """A line of fstab for ``served``, in its parts; ``options`` are those it needs, a test's own come after them."""

    def __init__(self, sshd: Sshd, served: Path, scratch: Scratch) -> None:
        self.place = f"{sshd.user}@{HOST}:{served}"
        # In a user namespace only files of its root may be changed.
        self.options = f"idmap=user,IdentityFile={sshd.user_key}"
        self._mnt = scratch.mnt

    def __call__(self, more: str = "", kind: str = "fuse.sftpmount") -> str:
        return f"{self.place} {self._mnt} {kind} {self.options},{more} 0 0"


@pytest.fixture
def line(sshd: Sshd, served: Path, scratch: Scratch) -> Line:
    return Line(sshd, served, scratch)


def ends_well(scratch: Scratch, *words: str, user: str = "") -> str:
    """Run a command that must succeed; returns what it printed."""
    done = scratch.run(*words, user=user or None)
    assert done.returncode == 0, f"{' '.join(words)}: {words_of(done)}"
    return done.stdout


def test_a_line_of_fstab_is_mounted_shown_and_unmounted(scratch: Scratch, line: Line, served: Path) -> None:
    scratch.fstab(line("_netdev"))
    ends_well(scratch, "mount", "-a")
    found = scratch.findmnt(scratch.mnt)
    assert (found["source"], found["fstype"]) == (line.place, "fuse.sftpmount")
    assert {"rw", "nosuid", "nodev"} <= set(found["options"].split(","))
    assert f"{line.place} on {scratch.mnt} type fuse.sftpmount" in ends_well(scratch, "mount")
    shown = ends_well(scratch, "df", "--output=source,fstype,target", str(scratch.mnt))
    assert shown.splitlines()[1].split() == [line.place, "fuse.sftpmount", str(scratch.mnt)]
    ends_well(scratch, "cp", f"{scratch.mnt}/hello", f"{scratch.mnt}/copy")
    assert (served / "copy").read_text() == "from the server"
    ends_well(scratch, "mount", "-a")  # what is mounted stays as it is
    assert len(scratch.fuse_mountpoints()) == 1
    (pid,) = scratch.mount_pids()
    ends_well(scratch, "umount", str(scratch.mnt))
    wait_until(lambda: not is_running(pid), WAIT_S, "the end of the mount")
    assert scratch.findmnt(scratch.mnt) == {}


@pytest.mark.parametrize("kind", ["sftpmount", "fuse.sftpmount"])
def test_both_types_and_everything_that_is_not_ours(kind: str, scratch: Scratch, line: Line) -> None:
    scratch.fstab(line(SWALLOWED, kind))
    ends_well(scratch, "mount", str(scratch.mnt))
    assert scratch.findmnt(scratch.mnt)["fstype"] == "fuse.sftpmount"
    assert ends_well(scratch, "cat", f"{scratch.mnt}/hello") == "from the server"


def test_flags_of_the_kernel_are_handed_on(scratch: Scratch, line: Line) -> None:
    """All but suid and dev, which mount(8) keeps to itself: what fstab mounts is nosuid and nodev."""
    scratch.fstab(line("ro,suid,dev,noexec,noatime"))
    ends_well(scratch, "mount", str(scratch.mnt))
    flags = set(scratch.findmnt(scratch.mnt)["options"].split(","))
    assert {"ro", "noexec", "noatime", "nosuid", "nodev"} <= flags
    ends_well(scratch, "umount", str(scratch.mnt))
    ends_well(scratch, "sftpmount", line.place, str(scratch.mnt), "-o", f"{line.options},suid,dev")
    assert not {"nosuid", "nodev"} & set(scratch.findmnt(scratch.mnt)["options"].split(","))


@pytest.mark.parametrize("word", ["user", "users"])
def test_an_ordinary_user_mounts_and_unmounts(
    word: str, scratch: Scratch, line: Line, sshd: Sshd, tmp_path: Path
) -> None:
    if os.geteuid() != 0:  # a user namespace has one user, whom mount(8) takes for root
        scratch.fstab(line(word))
        ends_well(scratch, "mount", str(scratch.mnt))
        return
    os.chown(scratch.mnt, pwd.getpwnam(USER).pw_uid, -1)
    line.options = f"IdentityFile={key_of(USER, sshd, tmp_path)}"
    scratch.fstab(line(f"noauto,{word}"))
    ends_well(scratch, "mount", str(scratch.mnt), user=USER)
    flags = set(scratch.findmnt(scratch.mnt)["options"].split(","))
    assert {"nosuid", "nodev", "noexec", f"user_id={pwd.getpwnam(USER).pw_uid}"} <= flags
    (pid,) = scratch.mount_pids()
    assert ends_well(scratch, "cat", f"{scratch.mnt}/hello", user=USER) == "from the server"
    assert scratch.run("ls", str(scratch.mnt), user="daemon").returncode != 0
    anyone = scratch.run("umount", str(scratch.mnt), user="daemon").returncode == 0
    assert anyone == (word == "users")
    if not anyone:
        ends_well(scratch, "umount", str(scratch.mnt), user=USER)
    wait_until(lambda: not is_running(pid), WAIT_S, "the end of the mount")


def test_root_mounts_for_another_user(scratch: Scratch, line: Line, sshd: Sshd, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        scratch.fstab(line(f"setuid={USER}"))
        done = scratch.run("mount", str(scratch.mnt))
        assert done.returncode != 0
        return
    uid = pwd.getpwnam(USER).pw_uid
    os.chown(scratch.mnt, uid, -1)
    line.options = f"IdentityFile={key_of(USER, sshd, tmp_path)}"
    scratch.fstab(line(f"setuid={USER}"))
    ends_well(scratch, "mount", str(scratch.mnt))
    assert f"user_id={uid}" in scratch.findmnt(scratch.mnt)["options"]
    (pid,) = scratch.mount_pids()
    (uids,) = [row for row in Path(f"/proc/{pid}/status").read_text().splitlines() if row.startswith("Uid:")]
    assert set(uids.split()[1:]) == {str(uid)}


def test_a_remount_is_refused_and_leaves_the_mount(scratch: Scratch, line: Line) -> None:
    scratch.fstab(line())
    ends_well(scratch, "mount", str(scratch.mnt))
    done = scratch.run("mount", "-o", "remount,ro", str(scratch.mnt))
    assert done.returncode == 1
    assert (
        "option remount is refused: a mount cannot change its options; unmount it and mount it again."
        in done.stderr
    )
    assert "rw" in scratch.findmnt(scratch.mnt)["options"].split(",")


@pytest.mark.parametrize(
    ("more", "status", "sentence"),
    [
        ("IdentityFiel=/x", 1, "option 'IdentityFiel' is not known: the nearest is IdentityFile."),
        ("port=1", 32, "127.0.0.1 port 1 cannot be reached"),
        ("setuid=no-such-user", 1, "there is no user 'no-such-user' here"),
        ("nosymfollow", 1, "write contain_symlinks instead"),
    ],
)
def test_failures_have_the_statuses_of_mount(
    more: str, status: int, sentence: str, scratch: Scratch, line: Line
) -> None:
    scratch.fstab(line(more))
    done = scratch.run("mount", str(scratch.mnt))
    assert done.returncode == status and sentence in done.stderr, words_of(done)
    assert scratch.findmnt(scratch.mnt) == {}


def test_a_dry_run_looks_at_everything_but_the_server(scratch: Scratch, line: Line) -> None:
    scratch.fstab(line())
    ends_well(scratch, "mount", "-f", str(scratch.mnt))
    assert scratch.findmnt(scratch.mnt) == {} and scratch.mount_pids() == []
    scratch.fstab(line("IdentityFiel=/x"))
    assert scratch.run("mount", "-f", str(scratch.mnt)).returncode == 1


def test_as_autofs_calls_it(scratch: Scratch, line: Line) -> None:
    """automount(8) runs mount -n -s -o OPTIONS -t TYPE; -s is to leave out what the type does not know."""
    words = ["-t", "fuse.sftpmount", "-o", f"{line.options},sloppily", line.place, str(scratch.mnt)]
    assert scratch.run("mount", "-n", *words).returncode == 1
    done = scratch.run("mount", "-n", "-s", *words)
    assert done.returncode == 0 and "option 'sloppily' is not known, and left out." in done.stderr
    assert ends_well(scratch, "cat", f"{scratch.mnt}/hello") == "from the server"
    refused = scratch.run("mount", "-n", "-s", *words[:3], f"{line.options},sshfs_sync", *words[4:])
    assert refused.returncode == 1 and "option sshfs_sync is refused" in refused.stderr


# -- as sshfs, with the word swapped -------------------------------------------------------------------------------------------

# sshfs(1), its README and its issues (101, 228), the guides of distributions and hosters, systemd's issue 17545.
COMMANDS = [
    "sshfs {place} {mnt} -o IdentityFile={key}",
    "sshfs -o idmap=user,identityfile={key} {place} {mnt}",
    "sshfs -o allow_other {place} {mnt} -o reconnect,ServerAliveInterval=15,ServerAliveCountMax=3,IdentityFile={key}",
    "sshfs {place} {mnt} -p {port} -C -o IdentityFile={key} -o cache=yes -o kernel_cache -o compression=no -o large_read",
    "sshfs -F /etc/ssh/ssh_config -s {place} {mnt} -o IdentityFile={key},default_permissions,uid=1000,gid=1000,umask=022",
    "sshfs {place} {mnt} -o IdentityFile={key},Ciphers=aes128-gcm@openssh.com,auto_cache,no_readahead,max_conns=4",
    "sshfs {place} {mnt} -oIdentityFile={key},workaround=rename,dcache_timeout=60,dcache_stat_timeout=30,dir_cache=yes",
    "sshfs {place} {mnt} -o IdentityFile={key},ro,BatchMode=yes,ConnectTimeout=10,StrictHostKeyChecking=accept-new,fsname=nas",
]

FSTAB = [
    # sshfs(1): "use sshfs as the file system type. (For backwards compatibility, you may also use fuse.sshfs)"
    "{place} {mnt} sshfs IdentityFile={key} 0 0",
    "{place} {mnt} fuse.sshfs IdentityFile={key} 0 0",
    # issue 101, in the form of mount.fuse
    "sshfs#{place} {mnt} fuse defaults,user,allow_other,reconnect,delay_connect,ConnectTimeout=5,ServerAliveInterval=5,"
    "IdentityFile={key} 0 0",
    "{place} {mnt} fuse.sshfs noauto,x-systemd.automount,_netdev,users,idmap=user,IdentityFile={key},allow_other,reconnect 0 0",
    "{place} {mnt} fuse.sshfs IdentityFile={key},allow_other,idmap=user,noatime,noauto,workaround=rename,nofail 0 0",
    "{place} {mnt} fuse.sshfs delay_connect,_netdev,user,idmap=user,transform_symlinks,identityfile={key},allow_other,"
    "default_permissions,uid=1000,gid=1000 0 0",
]

REFUSED = [
    ("noauto,x-systemd.automount,_netdev,follow_symlinks,identityfile={key},allow_other,reconnect", "follow_symlinks"),
    ("_netdev,allow_other,IdentityFile={key},reconnect,ssh_command=/usr/bin/ssh-2222", "ssh_command"),
    ("IdentityFile={key},StrictHostKeyChecking=no,UserKnownHostsFile=/dev/null", "StrictHostKeyChecking=no"),
]  # fmt: skip


def swapped(text: str, line: Line, scratch: Scratch, sshd: Sshd) -> str:
    filled = text.format(place=line.place, mnt=scratch.mnt, key=sshd.user_key, port=sshd.port)
    return filled.replace("sshfs", "sftpmount")


@pytest.mark.parametrize(
    "text", [*COMMANDS[:3], *(pytest.param(each, marks=pytest.mark.long) for each in COMMANDS[3:])]
)
def test_commands_of_sshfs(text: str, scratch: Scratch, line: Line, sshd: Sshd) -> None:
    words: List[str] = swapped(text, line, scratch, sshd).split()
    ends_well(scratch, *words)
    assert ends_well(scratch, "cat", f"{scratch.mnt}/hello") == "from the server"


@pytest.mark.parametrize(
    "text", [*FSTAB[:3], *(pytest.param(each, marks=pytest.mark.long) for each in FSTAB[3:])]
)
def test_lines_of_fstab_for_sshfs(text: str, scratch: Scratch, line: Line, sshd: Sshd) -> None:
    scratch.fstab(swapped(text, line, scratch, sshd))
    ends_well(scratch, "mount", str(scratch.mnt))
    assert scratch.findmnt(scratch.mnt)["source"] == line.place
    assert ends_well(scratch, "cat", f"{scratch.mnt}/hello") == "from the server"


@pytest.mark.parametrize(("words", "named"), REFUSED)
def test_lines_of_fstab_for_sshfs_that_are_refused(
    words: str, named: str, scratch: Scratch, line: Line, sshd: Sshd
) -> None:
    scratch.fstab(swapped("{place} {mnt} fuse.sshfs " + words + " 0 0", line, scratch, sshd))
    done = scratch.run("mount", str(scratch.mnt))
    assert done.returncode == 1 and f"option {named} is refused" in done.stderr, words_of(done)
