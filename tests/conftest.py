"""Fixtures that most tests share: a real hardened server, real mounts of it, and a bad network between."""

from __future__ import annotations

import faulthandler
import getpass
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Iterator, List

import pytest
from hypothesis import settings

from support.mount import Mount, unmount_stale
from support.process import Missing
from support.relay import Relay
from support.sshd import Sshd

# Busy machines make every deadline flaky; the same examples in every run make a red test somebody's doing. With --long, or
# HYPOTHESIS_PROFILE=explore, it looks further.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# Far more than pytest needs to delete the directories of earlier runs, which it does at the very end.
_EXIT_S = 300.0

# What runs under nohup, or in the background of a script, hands down that these are ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Take away what earlier runs left mounted: pytest deletes their old directories, and would delete through a mount."""
    try:
        for directory in _directories_of_dead_runs(session.config):
            for path in unmount_stale(directory):
                print(f"unmounted {path}, left by an earlier run")
    except Missing:
        pass  # the tests that mount something will say so


def pytest_unconfigure() -> None:
    """A thread that a failed test left waiting must not keep the run from ending: say where it waits, and end."""
    faulthandler.dump_traceback_later(_EXIT_S, exit=True, file=sys.__stderr__)


def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    """Tests marked ``long`` run only with --long (or when asked for with -m)."""
    if config.getoption("--long") or "long" in config.getoption("markexpr"):
        return
    chosen = [item for item in items if item.get_closest_marker("long") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked long too")


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """One hardened server for all tests that neither stop nor slow it. Take ``own_sshd`` for those that do."""
    with Sshd(tmp_path_factory.mktemp("shared")) as server:
        yield server


@pytest.fixture
def own_sshd(tmp_path: Path) -> Iterator[Sshd]:
    """A hardened server that this test may kill, pause and restart."""
    with Sshd(tmp_path) as server:
        yield server


@pytest.fixture
def mount(sshd: Sshd, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount of a fresh directory of the shared server; ``mount.served`` is that directory on the server's side."""
    served = sshd.tree / tmp_path_factory.mktemp("served").name
    served.mkdir()
    with Mount(sshd, tmp_path, subdir=served.name) as each:
        yield each


@pytest.fixture
def relay(sshd: Sshd) -> Iterator[Relay]:
    """A transparent relay to the shared server; change it with set_line(), stall(), reset() ..."""
    with Relay(sshd.port) as each:
        sshd.trust(each.port)
        yield each


@pytest.fixture
def make_mount(tmp_path: Path) -> Iterator[Callable[..., Mount]]:
    """Mount(sshd, tmp_path, ...) with all arguments but tmp_path, as often as the test likes; closed at its end."""
    made: List[Mount] = []

    def make(sshd: Sshd, *options: str, **keywords: Any) -> Mount:
        made.append(Mount(sshd, tmp_path, *options, **keywords))
        return made[-1]

    yield make
    for each in reversed(made):
        each.close()


def _directories_of_dead_runs(config: pytest.Config) -> List[Path]:
    """pytest's base directories whose run has ended; each live one holds a .lock with its pid, or was named by --basetemp."""
    if config.option.basetemp:
        return [Path(config.option.basetemp).resolve()]
    root = Path(os.environ.get("PYTEST_DEBUG_TEMPROOT") or tempfile.gettempdir()).resolve()
    runs = (root / f"pytest-of-{getpass.getuser()}").glob("pytest-*")
    return [run for run in runs if not run.is_symlink() and not _is_locked(run)]


def _is_locked(run: Path) -> bool:
    try:
        os.kill(int((run / ".lock").read_text()), 0)
    except (OSError, ValueError):
        return False
    return True
