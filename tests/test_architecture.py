"""The house's rules that a reader cannot see in one file: who may import whom, and what no module may hold.

Imports go one way: cli -> fs -> cache -> sftp -> ssh. What ``READ_BY_ALL`` names is read by all. Only fs/fuse.py knows
FUSE and only ssh/ knows paramiko, so that either can be replaced, and tested without the other.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Set, Tuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sftpmount"
LAYERS = ("ssh", "sftp", "cache", "fs")  # each may import itself and those to its left
READ_BY_ALL = ("errors", "option_values", "options", "waiting")

SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py"))
EVERYTHING = sorted(
    path.relative_to(ROOT).as_posix()
    for directory in ("sftpmount", "tests", "contrib", ".ci")
    for path in (ROOT / directory).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
)


def tree_of(source: str) -> ast.Module:
    return ast.parse((ROOT / source).read_text(encoding="utf-8"), source)


def imports(source: str) -> Iterator[Tuple[int, str]]:
    """(line, dotted module) of every import anywhere in a file; relative ones made absolute."""
    package = list(Path(source).parent.parts)
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, module
            if module in ("sftpmount", *(f"sftpmount.{layer}" for layer in LAYERS)):
                for alias in node.names:  # "from sftpmount import fs" names a module too
                    yield node.lineno, f"{module}.{alias.name}"


def layer_of(module: str) -> str:
    """ "ssh", "sftp", "cache" or "fs"; else the module's own name in the package ("cli", "errors" ...)."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def internal_imports(source: str) -> List[Tuple[int, str]]:
    return [(line, name) for line, name in imports(source) if name.split(".")[0] == "sftpmount"]


@pytest.mark.parametrize("source", SOURCES)
def test_imports_go_one_way(source: str) -> None:
    own = layer_of(source[: -len(".py")].replace("/", "."))
    if own in LAYERS:
        allowed = {*LAYERS[: LAYERS.index(own) + 1], *READ_BY_ALL, "", "__version__"}
        offenders = [f"{source}:{line} imports {name}" for line, name in internal_imports(source)
                     if layer_of(name) not in allowed]  # fmt: skip
        assert not offenders, f"{own}/ may import {sorted(allowed)} only: {offenders}"


@pytest.mark.parametrize(
    "source", [each for each in SOURCES if layer_of(each[:-3].replace("/", ".")) in READ_BY_ALL]
)
def test_what_all_read_reads_nothing_above_it(source: str) -> None:
    offenders = [name for _, name in internal_imports(source) if layer_of(name) in (*LAYERS, "cli")]
    assert not offenders, f"{source} is read by all layers and imports {offenders}"


@pytest.mark.parametrize("source", [each for each in SOURCES if each not in ("sftpmount/__main__.py",)])
def test_nothing_imports_the_command(source: str) -> None:
    offenders = [f"{source}:{line}" for line, name in internal_imports(source) if layer_of(name) == "cli"]
    assert not offenders, f"cli wires the parts together and is imported by none of them: {offenders}"


@pytest.mark.parametrize(
    ("library", "home"), [("fuse", "sftpmount/fs/fuse.py"), ("paramiko", "sftpmount/ssh/"), ("cachetools", "sftpmount/cache/")]
)  # fmt: skip
def test_one_home_for_each_library(library: str, home: str) -> None:
    users = {source for source in SOURCES for _, name in imports(source) if name.split(".")[0] == library}
    strangers = sorted(source for source in users if not source.startswith(home))
    assert not strangers, f"only {home} may import {library}: {strangers}"
    assert users, f"nothing imports {library}, though setup.cfg requires it"


def test_no_import_cycles() -> None:
    graph: Dict[str, Set[str]] = {}
    modules = {source[: -len(".py")].replace("/", ".").replace(".__init__", ""): source for source in SOURCES}
    for module, source in modules.items():
        graph[module] = {
            name for name in (longest_known(each, modules) for _, each in internal_imports(source)) if name
        }
    for start in graph:
        seen: Set[str] = set()
        waiting = list(graph[start] - {start})
        while waiting:
            module = waiting.pop()
            assert module != start, f"{start} imports itself through {sorted(seen)}"
            if module not in seen:
                seen.add(module)
                waiting += graph[module]


def longest_known(name: str, modules: Dict[str, str]) -> str:
    """The module of ours that an import of ``name`` (a module, or something in one) reads."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return "" if name == "sftpmount" else name


MUTABLE_CALLS = re.compile(
    r"^(list|dict|set|bytearray|collections\.\w+|deque|defaultdict|OrderedDict|Counter|threading\.\w+|queue\.\w+|Queue"
    r"|(\w+\.)?\w*(Cache|Lock|Event|Condition)|weakref\.\w+|itertools\.count|count|ContextVar)$"
)


def module_level_state(source: str) -> Iterator[str]:
    """What a module binds at its top level that can change; constants are in capitals and never changed in place."""
    tree = tree_of(source)
    for node in tree.body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        literal = isinstance(
            node.value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
        )
        called = isinstance(node.value, ast.Call) and MUTABLE_CALLS.match(ast.unparse(node.value.func))
        for name in names:
            if name == "__all__":
                continue
            if called or (literal and name != name.upper()):
                yield f"{source}:{node.lineno} {name}"
    for inner in ast.walk(tree):
        if isinstance(inner, ast.Global):
            yield f"{source}:{inner.lineno} global {', '.join(inner.names)}"
    constants = {
        target.id
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    for inner in ast.walk(tree):
        if isinstance(inner, (ast.Assign, ast.AugAssign, ast.Delete)):
            written = [inner.target] if isinstance(inner, ast.AugAssign) else inner.targets
            for target in written:
                name = (
                    target.value.id
                    if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name)
                    else ""
                )
                if name in constants and name == name.upper():
                    yield f"{source}:{inner.lineno} {name} is changed"


@pytest.mark.parametrize("source", SOURCES)
def test_no_state_at_module_level(source: str) -> None:
    offenders = list(module_level_state(source))
    assert not offenders, f"state belongs to an object that the caller makes: {offenders}"


@pytest.mark.parametrize("source", SOURCES)
def test_modules_stay_readable(source: str) -> None:
    lines = len((ROOT / source).read_text(encoding="utf-8").splitlines())
    assert lines <= 700, f"{source} has {lines} lines; near 500 is the aim, so split it by subject"


@pytest.mark.parametrize("source", SOURCES)
def test_every_module_says_what_it_is_for(source: str) -> None:
    assert ast.get_docstring(tree_of(source)), f"{source} has no docstring"


def paths_of_this_machine() -> List[str]:
    """The checkout, the virtual environment, the home directory: what must not find its way into a file."""
    homes = (
        [str(Path.home())] if Path.home().parent != Path("/") else []
    )  # /root is in everybody's documentation
    environments = [sys.prefix] if sys.prefix != sys.base_prefix else []
    return [str(ROOT), *environments, *homes]


@pytest.mark.parametrize("source", EVERYTHING)
def test_no_path_of_one_machine(source: str) -> None:
    text = (ROOT / source).read_text(encoding="utf-8", errors="replace")
    pattern = re.compile("|".join(rf"{re.escape(path)}(?![\w.-])" for path in paths_of_this_machine()))
    offenders = [
        f"{source}:{number} {line.strip()}"
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert not offenders, f"paths come from arguments, the environment or tempfile: {offenders}"
