"""What the text behind an option's "=" becomes (pure). Each function or factory here gives a ``Convert``."""

from __future__ import annotations

import re
from typing import Any, Callable, List, Optional, Tuple

from .errors import UsageError
from .place import check_user

MiB = 1024 * 1024

# (name of the option, its text or None where there was no "=") -> the value, or UsageError.
Convert = Callable[[str, Optional[str]], Any]


def _given(name: str, text: Optional[str]) -> str:
    if not text:
        raise UsageError(f"option {name} needs a value: write {name}=VALUE.")
    return text


def _bad(name: str, text: str, expected: str) -> UsageError:
    return UsageError(f"option {name}: {text[:80]!r} is not {expected}.")


def text(name: str, text: Optional[str]) -> str:
    return _given(name, text)


def list_of_one(name: str, text: Optional[str]) -> Tuple[str, ...]:
    return (_given(name, text),)


def keyword(name: str, text: Optional[str]) -> Tuple[Tuple[str, str], ...]:
    """One of ssh_config's, handed on as it is."""
    return ((name.lower(), _given(name, text)),)


def user(name: str, text: Optional[str]) -> str:
    return check_user(_given(name, text))


def constant(value: object) -> Convert:
    """A flag."""

    def convert(name: str, text: Optional[str]) -> object:
        if text is not None:
            raise UsageError(f"option {name} takes no value: write only {name}.")
        return value

    return convert


def fuse_flag(name: str, text: Optional[str]) -> Tuple[Tuple[str, str], ...]:
    return ((name, constant("")(name, text)),)


def fuse_number(name: str, text: Optional[str]) -> Tuple[Tuple[str, str], ...]:
    return ((name, str(number(0, 1 << 31)(name, text))),)


def choice(*choices: str, **meanings: object) -> Convert:
    """One of ``choices``, or what one of the words ``meanings`` stands for."""
    known = {**{word: word for word in choices}, **meanings}

    def convert(name: str, text: Optional[str]) -> object:
        text = _given(name, text)
        if text.lower() not in known:
            raise _bad(name, text, "one of " + ", ".join(known))
        return known[text.lower()]

    return convert


yes_no = choice(yes=True, no=False, true=True, false=False, on=True, off=False)


def number(low: int, high: int, base: int = 10) -> Convert:
    """A whole number from ``low`` to ``high``, both allowed."""
    digits = re.compile("[0-7]{1,12}" if base == 8 else "[0-9]{1,12}")
    kind = f"an octal number up to {high:o}" if base == 8 else f"a whole number from {low} to {high}"

    def convert(name: str, text: Optional[str]) -> int:
        text = _given(name, text)
        if not digits.fullmatch(text) or not low <= int(text, base) <= high:
            raise _bad(name, text, kind)
        return int(text, base)

    return convert


_SECONDS_OF = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def seconds(low: float, why: str = "", **words: Optional[float]) -> Convert:
    """Seconds, or a time as ssh_config writes it (90, 1.5, 1m30s), at least ``low``; or one of ``words``."""

    def convert(name: str, text: Optional[str]) -> Optional[float]:
        text = _given(name, text).lower()
        if text in words:
            return words[text]
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?|([0-9]{1,6}[smhdw]){1,5}", text):
            raise _bad(name, text, "a time such as " + ", ".join(["20", "1m30s", *words]))
        total = sum(float(n) * _SECONDS_OF[unit] for n, unit in re.findall(r"([0-9.]+)([smhdw]?)", text))
        if total < low:
            raise UsageError(f"option {name}: {text} is too short, the least is {low:g}{why}.")
        return total

    return convert


def size(low: int) -> Convert:
    """Bytes, or with a suffix K, M, G, T (powers of 1024; "KiB" and "KB" mean the same), at least ``low``."""

    def convert(name: str, text: Optional[str]) -> int:
        text = _given(name, text)
        match = re.fullmatch(r"([0-9]{1,15})([KMGTkmgt]?)(?:i?[Bb])?", text)
        count = int(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ") if match else -1
        if not low <= count < 1 << 50:
            raise _bad(name, text, "a size such as 64M" + (f", of at least {low // MiB}M" if low else ""))
        return count

    return convert


def file_names(name: str, text: Optional[str]) -> List[str]:
    """Names apart by blanks, in double quotes where they hold some, as ssh_config has them."""
    names = [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|([^\s"]+)', _given(name, text))]
    if not all(names) or not names:
        raise _bad(name, str(text), "one or more file names")
    return names


def algorithms(name: str, text: Optional[str]) -> str:
    text = _given(name, text)
    if not re.fullmatch(r"[-+^]?[A-Za-z0-9@._*?!-]+(,[A-Za-z0-9@._*?!-]+)*", text):
        raise _bad(name, text, r"a list of algorithm names (a comma inside a list is written \, here)")
    return text


def host_key_checking(name: str, text: Optional[str]) -> str:
    text = _given(name, text).lower()
    if text in ("no", "off", "false"):
        raise UsageError(
            f"option {name}={text} is refused, since anyone could then pose as the server: write {name}=accept-new "
            "to trust the key of a host at its first connection only."
        )
    if text not in ("yes", "true", "ask", "accept-new"):
        raise _bad(name, text, "one of yes, accept-new")
    # "ask" is "yes": a mount asks nobody, so an unknown key is refused.
    return "accept-new" if text == "accept-new" else "yes"


def only(reason: str, *accepted: str) -> Convert:
    """An option of which just the harmless values in ``accepted`` are taken, and nothing is kept."""

    def convert(name: str, text: Optional[str]) -> None:
        if (text or "").lower() not in accepted:
            raise UsageError(f"option {name} is refused: {reason}.")

    return convert


_WORKAROUNDS = frozenset(
    ("none", "all", "rename", "renamexdev", "truncate", "fstat", "buflimit", "createmode")
)


def workaround(name: str, text: Optional[str]) -> None:
    for word in _given(name, text).split(":"):
        if word not in _WORKAROUNDS and not (word.startswith("no") and word[2:] in _WORKAROUNDS):
            raise _bad(name, word, "one of sshfs's workarounds")


def ignored(name: str, text: Optional[str]) -> None:
    """Taken, and without effect."""
