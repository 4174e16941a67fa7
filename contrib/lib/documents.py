"""The documents that follow from data: the options of sftpmount/options.py and the recipes, in the templates beside them.

A template's lines ``@NAME@`` stand for what is made here. All else in those of the man pages is mdoc(7).
"""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import Callable, Dict, List, Sequence

from contrib.lib.recipes import JOB, PASSWORD, RECIPES, Recipe
from contrib.lib.sshfs_options import FLAGS, WORDS, Row
from sftpmount.options import GROUPS, OPTIONS, Option

CONTRIB = Path(__file__).resolve().parents[1]

# What -o help has no room for.
_MORE = {
    "Port": "A port in ssh_config or in an sftp:// URL does the same.",
    "ssh_config": "The word none stands for no file at all.",
    "ProxyJump": "Several hosts, apart by commas, are gone through in turn. Each one's host key and algorithms are held to "
    "the same rules.",
    "ServerAliveCountMax": "A server that has said nothing for that many intervals is taken for dead.",
    "retry_timeout": "With 0 they fail at once, with hard they wait for ever. What is waited for is the same server with the "
    "same directory: one that comes up without its backup disk is not it.",
    "lanes": "With three a look at a directory does not wait behind a long file. Others are opened while many files are written. "
    "Servers that allow one channel get one.",
    "security": "The profile hardened takes encrypt-then-MAC and AEAD ciphers, no SHA-1 and no small RSA keys; compatible takes "
    "what older servers need, CBC and SHA-1 never; pq takes post-quantum key exchange only.",
    "StrictHostKeyChecking": "With accept-new the key of a host is trusted at its first connection only. The word no is "
    "refused, since anyone could then pose as the server.",
    "UserKnownHostsFile": "Several names may be given, apart by blanks.",
    "Ciphers": "A list narrows what the profile accepts, or puts it into another order; it never widens it. A comma within "
    "it is written as \\,.",
    "BatchMode": "For whatever runs unattended.",
    "commit": "With close a file is on the server's disk when close() returns 0; with fsync it has then reached the "
    "server, and only fsync() makes it durable. A server without fsync@openssh.com can promise the latter only, and the mount "
    "says so when it starts.",
    "dirty_size": "Programs that write faster than the line carries wait when so much is held.",
    "dcache_timeout": "Another client's changes are seen at the latest after this time; 0 asks the server every time.",
    "idmap": "Files of the remote user are then shown as those of the user who mounts; others stay as they are.",
    "contain_symlinks": "Such links cannot be read or followed (EPERM): absolute ones, and relative ones with more .. than there "
    "are directories above them, or with one behind a name.",
    "transform_symlinks": "Together with contain_symlinks all that is left stays on the mount.",
    "allow_other": "An ordinary user may say so where /etc/fuse.conf has the line user_allow_other.",
    "default_permissions": "Without it the server alone decides what is permitted.",
    "nonempty": "Without it a directory that holds something is refused: it may be a backup made while nothing was mounted.",
    "setuid": "The process then has that user's groups, home directory and keys, and he must be able to mount: the mountpoint has "
    "to be his.",
    "log_file": "The file has mode 0600, and may be rotated by moving it away.",
}  # fmt: skip


def documents() -> Dict[str, str]:
    """Name in the checkout -> text, of every document."""
    made = {each: _filled(CONTRIB / "lib" / f"{each}.in") for each in ("SSHFS.md", "RECIPES.md")}
    made["contrib/systemd/example/nightly"] = JOB
    for directory in ("man", "completion"):
        for template in sorted((CONTRIB / directory).glob("*.in")):
            made[f"contrib/{directory}/{template.stem}"] = _filled(template)
    return made


def _filled(template: Path) -> str:
    parts: Dict[str, Callable[[], str]] = {
        "OPTIONS": _man_options,
        "OTHER_OPTIONS": _man_other_options,
        "JOB": lambda: JOB.rstrip("\n"),
        "RECIPES": lambda: "\n\n".join(map(_recipe, RECIPES)),
        "SSHFS": lambda: _markdown(WORDS),
        "SSHFS_FLAGS": lambda: _markdown(FLAGS),
        "BASH_OPTIONS": lambda: "\n".join(f"    {each}" for each in _names_with_equals()),
        "BASH_VALUES": _bash_values,
        "ZSH_OPTIONS": _zsh_options,
        "FISH_OPTIONS": _fish_options,
    }
    lines = [
        parts[line.strip("@")]() if re.fullmatch(r"@[A-Z_]+@", line) else line
        for line in template.read_text(encoding="utf-8").splitlines()
    ]
    return "\n".join(lines) + "\n"


def _recipe(recipe: Recipe) -> str:
    steps = (
        ("In the shell, and in every job", recipe.settings),
        ("Once", recipe.init),
        ("Each time", recipe.backup),
        ("Is it whole?", recipe.verify),
        ("The newest comes back", recipe.restore),
        ("An older one", recipe.older),
        ("What is too old goes", recipe.prune),
    )
    code = "\n".join(f"# {title}\n{text}" for title, text in steps if text)
    files = "".join(
        f"`{name}`:\n\n```\n{text}```\n\n" for name, text in recipe.files.items() if name != PASSWORD
    )
    notes = fill(recipe.notes, 124, break_on_hyphens=False, break_long_words=False)
    return f"### {recipe.name}\n\nDebian's package {recipe.package}.\n\n{files}```sh\n{code}\n```\n\n{notes}"


def completed() -> List[Option]:
    """What a completion offers: every option that does something."""
    return [option for option in OPTIONS if option.verdict == "taken"]


def _names_with_equals() -> List[str]:
    return [option.name + ("=" if option.value else "") for option in completed()]


def _choices(option: Option) -> List[str]:
    """The words that an option's value can be, where they are few."""
    return [word for word in option.value.split("|") if word.islower()]


def _files(option: Option) -> bool:
    return "FILE" in option.value


# -- man pages, mdoc(7) --------------------------------------------------------------------------------------------------------


def _roff(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", text)


def _sentence(text: str) -> str:
    """Each sentence on a line of its own, as mdoc wants it; the first word is left alone where it is one of ours."""
    if not re.match(r"\w+(_|:|=|\()", text):
        text = text[:1].upper() + text[1:]
    return re.sub(r"(?<=[\w)]\.) (?=[A-Z])", "\n", _roff(text.rstrip(".") + "."))


def _man_item(option: Option) -> List[str]:
    value = f" Ns = Ns Ar {_roff(option.value)}" if option.value else ""
    more = _MORE.get(option.name)
    return [f".It Cm {option.name}{value}", _sentence(option.help), *([_sentence(more)] if more else [])]


def _man_options() -> str:
    lines: List[str] = []
    for title, group in GROUPS:
        lines += [f".Ss {title}", ".Bl -tag -width Ds"]
        for option in group:
            lines += _man_item(option)
        lines.append(".El")
    return "\n".join(lines)


def _others() -> List[Option]:
    listed = {option for _, group in GROUPS for option in group}
    return [option for option in OPTIONS if option not in listed]


_VERDICTS = (
    ("taken", "Further options", "These do something, too."),
    ("without effect", "Taken without effect", "So that command lines and lines of fstab for others work as they are."),
    ("refused", "Refused", "The mount would not do what they say.\nA value behind the name is accepted, and no other."),
)  # fmt: skip


def _man_other_options() -> str:
    lines: List[str] = []
    for verdict, title, sentence in _VERDICTS:
        lines += [f".Ss {title}", sentence, ".Bl -tag -width Ds"]
        rows = [option for option in _others() if option.verdict == verdict]
        for (why, value), together in groupby(rows, key=lambda option: (option.help, option.value)):
            names = [option.name for option in together]
            shown = f" Ns = Ns Ar {_roff(value)}" if value else ""
            lines += [f".It Cm {' , '.join(names)}{shown}", _sentence(why)]
        lines.append(".El")
    return "\n".join(lines)


# -- sshfs's options -----------------------------------------------------------------------------------------------------------


def _markdown(rows: Sequence[Row]) -> str:
    lines = [f"| `{row.shown}` | {row.verdict} | {row.note} |" for row in rows]
    return "\n".join(["| sshfs | here | |", "| --- | --- | --- |", *lines])


# -- completion ----------------------------------------------------------------------------------------------------------------


def _bash_values() -> str:
    lines = [
        f"        {option.name}) words='{' '.join(_choices(option))}' ;;"
        for option in completed()
        if _choices(option)
    ]
    names = "|".join(option.name for option in completed() if _files(option))
    lines.append(f"        {names}) files=yes ;;")
    return "\n".join(lines)


def _zsh_options() -> str:
    lines = []
    for option in completed():
        text = re.sub(r"([\[\]:'])", "", option.help)
        value = ""
        if option.value:
            value = f":{option.value.lower()}:"
            value += (
                f"({' '.join(_choices(option))})" if _choices(option) else "_files" if _files(option) else ""
            )
        lines.append(f"    '{option.name}[{text}]{value}'")
    return "\n".join(lines)


def _fish_options() -> str:
    lines = []
    for option in completed():
        equals = "=" if option.value else ""
        text = option.help.replace("\\", "").replace("'", "")
        lines.append(f"        {option.name}{equals} '{text}' \\")
    return "\n".join(lines)
