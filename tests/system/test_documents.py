"""README, man pages, --help, -o help, completions and SSHFS.md name the options that there are."""

from __future__ import annotations

import re
import subprocess
from itertools import product
from pathlib import Path
from typing import Dict, Iterator, List, Set

import pytest

from contrib.lib.documents import completed, documents
from contrib.lib.sshfs_options import FLAGS, WORDS, Row
from sftpmount import options, usage
from sftpmount.errors import UsageError
from sftpmount.options import COMMANDS, GROUPS, OPTIONS, parse
from support.mount import CHECKOUT
from support.process import program

MAN = CHECKOUT / "contrib" / "man"
COMPLETION = CHECKOUT / "contrib" / "completion"
OFFERED = {option.name for option in completed()}


def run(*words: str, home: Path, stdin: str = "") -> str:
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(home),
        "LC_ALL": "C.UTF-8",
        "TERM": "dumb",
    }
    done = subprocess.run(
        words, input=stdin, env=environment, capture_output=True, text=True, cwd=home, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- the same names everywhere -----------------------------------------------------------------------------------------------


def test_what_is_written_is_what_the_table_gives() -> None:
    outdated = [name for name, text in documents().items() if (CHECKOUT / name).read_text() != text]
    assert outdated == [], "run contrib/documents"


def test_the_overview_and_the_explanations_name_every_listed_option() -> None:
    for text in (usage.overview(), usage.explanations()):
        words = set(re.findall(r"\w+", text))
        assert {option.name for _, group in GROUPS for option in group} <= words
    assert max(map(len, usage.explanations().splitlines())) <= 80


@pytest.mark.parametrize("page", ["sftpmount.1", "mount.sftpmount.8"])
def test_the_man_pages_are_well_formed(page: str, tmp_path: Path) -> None:
    linted = subprocess.run(
        [program("mandoc", "mandoc"), "-T", "lint", "-W", "warning", str(MAN / page)],
        capture_output=True,
        text=True,
    )
    assert (linted.returncode, linted.stdout) == (0, "")


def test_the_man_page_as_it_is_read_has_every_option_and_no_other(tmp_path: Path) -> None:
    page = run(program("mandoc", "mandoc"), "-T", "markdown", str(MAN / "sftpmount.1"), home=tmp_path)
    for option in OPTIONS:
        assert re.search(rf"\*\*{re.escape(option.name).replace('_', '.?_')}\*\*", page), option.name
    items = re.findall(r"^\.It Cm (.*)$", (MAN / "sftpmount.1").read_text(), re.MULTILINE)
    names = [name for item in items for name in re.split(" (?:Ns|Oo|Ar) ", item)[0].split(" , ")]
    assert sorted(names) == sorted([*(option.name for option in OPTIONS), *COMMANDS])
    flags = {
        flag.replace("\\", "") for flag in re.findall(r"Fl ([\\\w-]+)", (MAN / "sftpmount.1").read_text())
    }
    assert {*"opFfdvrwhV1Cnst", "-foreground", "-debug", "-verbose", "-help", "-version", "-json"} <= flags


def test_the_pages_agree_with_the_command_on_statuses() -> None:
    shown = (MAN / "sftpmount.1").read_text()
    readme = (CHECKOUT / "README.md").read_text()
    for status in (*range(10), 130):
        assert f"\n.It {status}\n" in shown and f"\n| {status} | " in readme


def test_readme_names_only_options_that_there_are() -> None:
    readme = (CHECKOUT / "README.md").read_text()
    table = readme[readme.index("\n## Options") :].split("\n### ")[0]
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    named = [word for row in rows for word in re.findall(r"(?:^\| |, )`([A-Za-z_]+)(?:=[^`]*)?`", row)]
    assert len(named) > 20 and [name for name in named if not options.is_known(name)] == []
    for link in ("SSHFS.md", "RECIPES.md", "SERVER_SIDE.md", "contrib/install", "sftpmount(1)"):
        assert link in readme


# -- sshfs ---------------------------------------------------------------------------------------------------------------------


def names_of(shown: str) -> Iterator[str]:
    """The names that sshfs's shorthand stands for: [no]x, dcache_{a,b}_timeout=N, "[no]x, [no]y"."""
    for each in re.split(r", (?=\[)", shown):
        alternatives = [
            ("", part[1:-1])
            if part.startswith("[")
            else tuple(part[1:-1].split(","))
            if part.startswith("{")
            else (part,)
            for part in re.findall(r"\[\w+\]|\{[^}]*\}|[^\[{]+", each.split("=")[0])
        ]
        yield from ("".join(parts) for parts in product(*alternatives))


VERDICTS: Dict[str, Set[str]] = {
    "same": {"taken"},
    "accepted": {"without effect"},
    "replaced": {"refused"},
    "refused": {"refused"},
}


@pytest.mark.parametrize(
    "row", [row for row in WORDS if row.shown != "SSHOPT=VAL"], ids=lambda row: row.shown
)
def test_each_verdict_is_what_the_command_does(row: Row) -> None:
    table = {option.name: option for option in OPTIONS}
    for name in names_of(row.shown):
        assert table[name].verdict in VERDICTS[row.verdict], name
        if row.verdict in ("replaced", "refused"):
            with pytest.raises(UsageError, match="is refused"):
                parse(["host:", "/mnt", "-o", f"{name}=x"])


def test_each_flag_is_taken_or_refused_as_the_table_says() -> None:
    for row in FLAGS:
        flag, _, value = row.shown.split(", ")[0].partition(" ")
        words = ["host:", "/mnt", flag, *(["22" if value == "PORT" else "ro"] if value else [])]
        if row.verdict == "refused":
            with pytest.raises(UsageError):
                parse(words)
        else:
            options.split(words)


def test_the_table_has_every_option_that_sshfs_names(tmp_path: Path) -> None:
    shown = run(program("sshfs", "sshfs"), "--help", home=tmp_path)
    theirs = {name for word in re.findall(r"^ +-o (\S+)", shown, re.MULTILINE) for name in names_of(word)}
    ours = {name for row in WORDS for name in names_of(row.shown)}
    assert len(theirs) > 40 and {name for name in theirs - ours if not name.startswith("opt,")} == set()
    flags = set(
        re.findall(
            r"(?<![\w-])--?\w[\w-]*(?= )", "\n".join(re.findall(r"^ +(-[^o].*)$", shown, re.MULTILINE))
        )
    )
    assert {flag for flag in flags if len(flag) < 10} - {"-o"} <= {
        word for row in FLAGS for word in re.findall(r"--?\w+", row.shown)
    }


# -- completion, in the real shells --------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text("Host nas *.example !x\n  Port 22\nhost attic\n")
    (tmp_path / ".ssh" / "known_hosts").write_text(
        "vault.example,10.0.0.7 ssh-ed25519 AAAA\n[deep.example]:2222 ssh-ed25519 AAAA\n|1|aGFzaA==|aGFzaA== ssh-rsa AAAA\n"
        "@cert-authority *.example ssh-ed25519 AAAA\n"
    )
    (tmp_path / "mountpoint").mkdir()
    return tmp_path


def bash(line: str, home: Path) -> List[str]:
    """What bash offers for the end of ``line``, as it would put it there."""
    script = (
        f'compopt() {{ :; }}\n. "{COMPLETION}/sftpmount.bash"\nCOMP_LINE="$1" COMP_POINT=${{#1}} COMP_CWORD=$2\n'
        '_sftpmount\nprintf "%s\\n" "${COMPREPLY[@]}"'
    )
    shown = run(
        "bash", "-euc", script, "bash", line, str(len(line.split()) - (not line.endswith(" "))), home=home
    )
    return shown.split()


def fish(line: str, home: Path) -> List[str]:
    script = f"source {COMPLETION}/sftpmount.fish; complete --do-complete $argv[1]"
    shown = run(program("fish", "fish"), "--no-config", "-c", script, line, home=home)
    return [each.split("\t")[0] for each in shown.splitlines()]


def zsh(line: str, home: Path) -> List[str]:
    """zsh completes only at a terminal: one is made inside it, and what compadd is given is written to a file."""
    found = home / "found"
    inner = f"""
fpath=({COMPLETION} $fpath)
autoload -Uz compinit && compinit -u -d {home}/dump
compadd() {{
    local -a kept
    builtin compadd -O kept "$@"
    print -rl -- $kept >>{found}
    builtin compadd "$@"
}}
done_completing() {{ print -r -- '<end>' >>{found}; exit }}
zle -N done_completing
bindkey '^I' complete-word
bindkey '^Y' done_completing
print '<ready>'
"""
    (home / "inner").write_text(inner)
    outer = f"""
zmodload zsh/zpty
zpty -b shell zsh -f -i
zpty -w shell '. {home}/inner'
zpty -r shell shown '*<ready>*'
zpty -n -w shell {line!r}$'\\t\\x19'
zpty -r shell shown
while ! grep -q '<end>' {found} 2>/dev/null; do zpty -r -t shell shown || sleep 0.02; done
zpty -d shell
"""
    run(program("zsh", "zsh"), "-f", "-c", outer, home=home)
    offered = [each for each in found.read_text().splitlines() if each not in ("", "<end>")]
    found.unlink()
    return offered


def test_bash_completes_options_values_hosts_and_directories(home: Path) -> None:
    offered = {each.rstrip("=") for each in bash("sftpmount -o ", home)}
    assert offered == OFFERED
    assert bash("sftpmount nas: /mnt -o ro,retry_t", home) == ["ro,retry_timeout="]
    assert bash("sftpmount nas: /mnt -oretry_t", home) == ["-oretry_timeout="]
    assert bash("sftpmount -o commit=", home) == ["close", "fsync"]
    assert bash("sftpmount -o ro,security=p", home) == ["pq"]
    assert bash("sftpmount -o IdentityFile=mou", home) == ["mountpoint"]
    hosts = ["10.0.0.7:", "attic:", "deep.example:", "nas:", "vault.example:"]
    assert bash("sftpmount ", home) == sorted([*hosts, *COMMANDS])
    assert bash("sftpmount joe@va", home) == ["joe@vault.example:"]
    assert bash("sftpmount nas:dir mou", home) == ["mountpoint"]
    assert "--help" in bash("sftpmount --he", home)


def test_fish_completes_options_values_hosts_and_directories(home: Path) -> None:
    offered = {each.rstrip("=") for each in fish("sftpmount -o ", home)}
    assert offered - {"help"} == OFFERED
    assert "ro,retry_timeout=" in fish("sftpmount nas: /mnt -o ro,retry_t", home)
    assert {"nas:", "vault.example:", *COMMANDS} <= set(fish("sftpmount ", home))
    assert "joe@nas:" in fish("sftpmount joe@n", home)
    assert "mountpoint/" in fish("sftpmount nas:dir mou", home)


def test_zsh_completes_options_values_hosts_and_directories(home: Path) -> None:
    assert set(zsh("sftpmount -o ", home)) >= OFFERED
    assert zsh("sftpmount nas: /mnt -o ro,retry_t", home) == ["retry_timeout"]
    assert zsh("sftpmount -o ro,security=p", home) == ["pq"]
    assert {"vault.example", *COMMANDS} <= set(zsh("sftpmount ", home))
    assert zsh("sftpmount joe@n", home) == ["nas"]
    assert "mountpoint" in zsh("sftpmount nas:dir mou", home)
