"""Backup tools on a mount: the command lines that RECIPES.md shows, and that the tests run with other directories.

Each step is a few lines of sh. PLACES are the directories they name, and all that they name; a restored tree lies where a
person would look for it, below the place that restores go to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import List, Mapping, Tuple

MOUNT = "/mnt/backup"
SOURCE = "/home"
RESTORED = "/srv/restored"
CONFIG = "/etc/backup"
PLACES = (MOUNT, SOURCE, RESTORED, CONFIG)

PASSWORD = f"{CONFIG}/password"


@dataclass(frozen=True)
class Recipe:
    """One tool.

    package   Debian's; ``programs`` are what is used of it
    settings  lines that go before each of the others; ``files`` are what has to be there: name -> text
    init      once, before the first backup
    backup    each time
    verify    fails (status other than 0) where the newest backup is not whole
    restore   the newest backup; its tree is then in ``restored``
    older     the one before the newest, to the same place; "" where that takes the reader's choice of a time
    prune     what has become too old; "" where that is no command of the tool
    notes     what to know, in Markdown
    hard_links  whether links between files come back as such
    only_files  whether empty directories, modes and times are not kept by the tool
    """

    name: str
    package: str
    programs: Tuple[str, ...]
    backup: str
    verify: str
    restore: str
    restored: str = RESTORED
    settings: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    init: str = ""
    older: str = ""
    prune: str = ""
    notes: str = ""
    hard_links: bool = True
    only_files: bool = False


RESTIC = Recipe(
    name="restic",
    package="restic",
    programs=("restic",),
    settings=f"export RESTIC_REPOSITORY={MOUNT}/restic RESTIC_PASSWORD_FILE={PASSWORD}",
    files={PASSWORD: "a long one\n"},
    init="restic init",
    backup=f"restic backup {SOURCE}",
    verify="restic check --read-data",
    restore=f"restic restore latest --target {RESTORED}",
    restored=RESTORED + SOURCE,
    older="oldest=$(restic snapshots --quiet --compact | awk 'NR == 3 { print $1 }')\n"
    f'restic restore "$oldest" --target {RESTORED}',
    prune="restic forget --keep-daily 14 --keep-monthly 12 --prune",
    notes="Its locks are files on the server, which other machines see: `--no-lock` is not needed, and two backups at once are "
    "safe. `--read-data` fetches all there is; `--read-data-subset=5%` is for every day. The cache in `~/.cache` saves most "
    "round trips: a service needs `HOME` or `RESTIC_CACHE_DIR`.",
)

BORG = Recipe(
    name="borg",
    package="borgbackup",
    programs=("borg",),
    settings=f"export BORG_REPO={MOUNT}/borg BORG_PASSCOMMAND='cat {PASSWORD}'",
    files={PASSWORD: "a long one\n"},
    init="borg init --encryption=repokey-blake2",
    backup=f"borg create '::{{now}}' {SOURCE}",
    verify="borg check --verify-data",
    restore=f'newest=$(borg list --short --last 1)\ncd {RESTORED} && borg extract "::$newest"',
    restored=RESTORED + SOURCE,
    older=f'oldest=$(borg list --short --first 1)\ncd {RESTORED} && borg extract "::$oldest"',
    prune="borg prune --keep-daily 14 --keep-monthly 12\nborg compact",
    notes="Hard links in what is backed up are kept; on a server without hard links borg warns once and does without. Its "
    "lock is respected between machines. `borg serve`'s append-only mode is not to be had over SFTP: let the server take "
    "snapshots (SERVER_SIDE.md). Keep a copy of `borg key export`.",
)

DUPLICITY = Recipe(
    name="duplicity",
    package="duplicity",
    programs=("duplicity", "gpg"),
    settings=f'export PASSPHRASE="$(cat {PASSWORD})"',
    files={PASSWORD: "a long one\n"},
    backup=f"duplicity --full-if-older-than 1M {SOURCE} file://{MOUNT}/duplicity",
    verify=f"duplicity verify --compare-data file://{MOUNT}/duplicity {SOURCE}",
    restore=f"duplicity restore file://{MOUNT}/duplicity {RESTORED}/files",
    restored=f"{RESTORED}/files",
    prune=f"duplicity remove-all-but-n-full 3 --force file://{MOUNT}/duplicity",
    hard_links=False,
    notes="`file://` and three slashes: the mount is a local directory to it, and its own SFTP is not used. An older state: "
    "`--time 3D`. Verification compares with what is there *now*: whatever changed since the backup is a difference.",
)

RDIFF_BACKUP = Recipe(
    name="rdiff-backup",
    package="rdiff-backup",
    programs=("rdiff-backup",),
    backup=f"rdiff-backup backup {SOURCE} {MOUNT}/rdiff-backup",
    verify=f"rdiff-backup verify {MOUNT}/rdiff-backup",
    restore=f"rdiff-backup restore {MOUNT}/rdiff-backup {RESTORED}/files",
    older=f"rdiff-backup restore --at 1B {MOUNT}/rdiff-backup {RESTORED}/files",
    restored=f"{RESTORED}/files",
    prune=f"rdiff-backup --force remove increments --older-than 3M {MOUNT}/rdiff-backup || test $? -eq 2",
    notes="The commands are those of 2.2. Owners and extended attributes that the server's account cannot have are kept in the "
    "metadata beside the mirror, and come back with a restore. `remove`'s status 2 is a warning: nothing is so old.",
)

RSNAPSHOT = Recipe(
    name="rsnapshot",
    package="rsnapshot",
    programs=("rsnapshot", "rsync"),
    files={
        f"{CONFIG}/rsnapshot.conf": "config_version\t1.2\n"
        f"snapshot_root\t{MOUNT}/rsnapshot/\n"
        "no_create_root\t1\n"
        "cmd_cp\t/bin/cp\n"
        "cmd_rm\t/bin/rm\n"
        "cmd_rsync\t/usr/bin/rsync\n"
        f"lockfile\t{MOUNT}/rsnapshot.pid\n"
        "retain\tdaily\t14\n"
        "retain\tmonthly\t12\n"
        f"backup\t{SOURCE}/\t./\n"
    },
    init=f"mkdir {MOUNT}/rsnapshot",
    backup=f"rsnapshot -c {CONFIG}/rsnapshot.conf daily",
    verify=f"differing=$(rsync -ainc --delete {SOURCE}/ {MOUNT}/rsnapshot/daily.0{SOURCE}/)\n"
    'test -z "$differing"',
    restore=f"rsync -aH {MOUNT}/rsnapshot/daily.0{SOURCE}/ {RESTORED}/",
    older=f"rsync -aH {MOUNT}/rsnapshot/daily.1{SOURCE}/ {RESTORED}/",
    hard_links=False,
    notes="The words of its file are apart by tabs. `no_create_root` keeps it from filling the bare mountpoint. Generations "
    "share what has not changed through hard links, which the server has to offer (`sftpmount audit` says so); each costs a "
    "round trip for every name of the tree, so restic or borg suit a long line better. It keeps `retain` generations by itself, "
    "and has no verification: rsync's comparison by checksums, with what is there now, stands in for one.",
)

BUP = Recipe(
    name="bup",
    package="bup",
    programs=("bup",),
    settings=f"export BUP_DIR={MOUNT}/bup",
    init="bup init",
    backup=f"bup index {SOURCE}\nbup save --quiet --name laptop {SOURCE}",
    verify="bup fsck",
    restore=f"bup restore --quiet --outdir {RESTORED} /laptop/latest{SOURCE}/.",
    older=f'oldest=$(bup ls laptop | head -n 1)\nbup restore --quiet --outdir {RESTORED} "/laptop/$oldest{SOURCE}/."',
    prune="bup prune-older --keep-dailies-for 14d --keep-monthlies-for 1y --unsafe laptop",
    notes="Its index is written through a shared memory map, which the mount supports. `--unsafe` is bup's own word for "
    "`prune-older`, to be weighed. `bup fsck --generate` adds par2 data that can mend a damaged pack.",
)

RSYNC = Recipe(
    name="rsync",
    package="rsync",
    programs=("rsync",),
    init=f"mkdir {MOUNT}/rsync",
    backup="now=$(date +%Y-%m-%dT%H:%M:%S)\n"
    f'rsync -aH --link-dest={MOUNT}/rsync/latest {SOURCE}/ "{MOUNT}/rsync/unfinished-$now/"\n'
    f'mv "{MOUNT}/rsync/unfinished-$now" "{MOUNT}/rsync/$now"\n'
    f'ln -sfn "$now" {MOUNT}/rsync/latest',
    verify=f'differing=$(rsync -ainc --delete {SOURCE}/ {MOUNT}/rsync/latest/)\ntest -z "$differing"',
    restore=f"rsync -aH {MOUNT}/rsync/latest/ {RESTORED}/",
    older=f'oldest=$(ls {MOUNT}/rsync | head -n 1)\nrsync -aH "{MOUNT}/rsync/$oldest/" {RESTORED}/',
    hard_links=False,
    notes="A tree for each backup, in which what has not changed is a hard link to the one before; the first run says that "
    "there is none yet. What was cut short keeps its name `unfinished-`. As an ordinary user on the server owners cannot be "
    "kept: add `--fake-super`, or `--no-owner --no-group`. rsync's own status 23 says that something was not done.",
)

TAR = Recipe(
    name="tar",
    package="tar",
    programs=("tar",),
    init=f"mkdir {MOUNT}/tar",
    backup="now=$(date +%Y-%m-%dT%H:%M:%S)\n"
    f"tar --create --gzip --listed-incremental={MOUNT}/tar/state --directory={SOURCE} \\\n"
    f'    --file="{MOUNT}/tar/$now.tar.gz" .',
    verify=f'for archive in {MOUNT}/tar/*.tar.gz; do gzip --test "$archive"; done\n'
    f"newest=$(ls {MOUNT}/tar/*.tar.gz | tail -n 1)\n"
    f'tar --compare --file="$newest" --directory={SOURCE}',
    restore=f"for archive in {MOUNT}/tar/*.tar.gz; do\n"
    f'    tar --extract --listed-incremental=/dev/null --directory={RESTORED} --file="$archive"\n'
    "done",
    older=f"oldest=$(ls {MOUNT}/tar/*.tar.gz | head -n 1)\n"
    f'tar --extract --listed-incremental=/dev/null --directory={RESTORED} --file="$oldest"',
    notes="The first archive is whole, those after it hold what changed: remove `state` now and then to begin again. Not "
    "encrypted: put `gpg --encrypt` behind it where the server is not to read it.",
)

DAR = Recipe(
    name="dar",
    package="dar",
    programs=("dar",),
    init=f"mkdir {MOUNT}/dar",
    backup="now=$(date +%Y-%m-%dT%H-%M-%S)\n"
    f"last=$(ls {MOUNT}/dar/*.1.dar 2>/dev/null | tail -n 1)\n"
    f'dar -Q --create "{MOUNT}/dar/$now" ${{last:+--ref "${{last%.1.dar}}"}} --fs-root {SOURCE} --compression=gzip',
    verify=f'for slice in {MOUNT}/dar/*.1.dar; do dar -Q --test "${{slice%.1.dar}}"; done\n'
    f'dar -Q --diff "${{slice%.1.dar}}" --fs-root {SOURCE}',
    restore=f"for slice in {MOUNT}/dar/*.1.dar; do\n"
    f'    dar -Q --extract "${{slice%.1.dar}}" --fs-root {RESTORED} --no-warn\n'
    "done",
    older=f"oldest=$(ls {MOUNT}/dar/*.1.dar | head -n 1)\n"
    f'dar -Q --extract "${{oldest%.1.dar}}" --fs-root {RESTORED}',
    notes="The first archive is whole, each one after it holds the changes since the last. `-Q` is for where there is no "
    "terminal. With a password in a file of options (`-B`) it encrypts.",
)

GIT = Recipe(
    name="git",
    package="git",
    programs=("git",),
    settings="export GIT_AUTHOR_NAME=backup GIT_AUTHOR_EMAIL=backup@localhost\n"
    "export GIT_COMMITTER_NAME=backup GIT_COMMITTER_EMAIL=backup@localhost",
    init=f"git init --quiet --bare {MOUNT}/files.git\n"
    f"git --git-dir={MOUNT}/files.git config transfer.unpackLimit 1\n"
    f"git init --quiet {SOURCE}\n"
    f"git -C {SOURCE} remote add backup {MOUNT}/files.git",
    backup=f"git -C {SOURCE} add --all\n"
    f'git -C {SOURCE} commit --quiet --allow-empty --message="$(date)"\n'
    f"git -C {SOURCE} push --quiet backup HEAD:main",
    verify=f"git --git-dir={MOUNT}/files.git fsck --full --strict",
    restore=f"git clone --quiet --branch main {MOUNT}/files.git {RESTORED}/files",
    older=f"git clone --quiet --branch main {MOUNT}/files.git {RESTORED}/files\n"
    f"git -C {RESTORED}/files checkout --quiet HEAD~1",
    restored=f"{RESTORED}/files",
    prune=f"git --git-dir={MOUNT}/files.git gc --quiet",
    only_files=True,
    hard_links=False,
    notes="For text that people write, not for whole machines: modes, times and empty directories are not kept. With `unpackLimit` "
    "a push is stored as one file; else each object is one, with round trips of its own. Where the mount "
    "shows another owner than you, git asks for `git config --global --add safe.directory '/mnt/backup/*'`, or mount with "
    "`idmap=user`. A working tree on the mount works as well.",
)

RECIPES: List[Recipe] = [RESTIC, BORG, DUPLICITY, RDIFF_BACKUP, RSNAPSHOT, BUP, RSYNC, TAR, DAR, GIT]

JOB = f"""\
#!/bin/sh
# Status 0: backed up, checked and stored. Else why not, for the journal or cron's mail.
set -eu
export HOME="${{HOME:-/root}}"
refuse() {{
    echo "nightly: no backup was made: $*" >&2
    sftpmount status {MOUNT} >&2 || true
    exit 1
}}
# The mount, not the directory under it; and an answer from the server within a minute.
findmnt --types fuse.sftpmount --mountpoint {MOUNT} >/dev/null || refuse "{MOUNT} is not mounted"
timeout 60 test -e {MOUNT}/.this-is-the-backup-disk || refuse "no answer, or no .this-is-the-backup-disk"
{RESTIC.settings}
{RESTIC.backup}
{RESTIC.prune}
{RESTIC.verify}-subset=5%
sftpmount sync {MOUNT}
"""
