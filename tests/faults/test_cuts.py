"""The wire is cut at every request of a sequence of file operations, and nothing above notices but an honest EEXIST.

A program runs on a real mount of a real sshd while the connection is cut before the k-th request reaches the server, after
the server has done it and before its reply is delivered, or after its reply; for every k (--long; a sample otherwise). The
same program then runs on a local directory. Every operation must have come out as it did there, within OPERATION_S, and
the server's tree must be the local one: names, types, modes, link counts, bytes. One exception per cut: an exclusive
create, mkdir or link whose reply was lost may say EEXIST, and what it was to make is there then.

Replay one cut, as a failure's first line names it:

    CUT="commit=fsync: data: 17 after request" python -m pytest tests/faults/test_cuts.py -k replay
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import os
import random
import sys
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Sequence, Tuple

import pytest

from exercise.namespace import Disagreement, compare, snapshot
from faults.scenario import SCENARIOS, Program
from faults.sftp_cutter import AFTER_REQUEST, WAYS, Cut, arm, counted, made
from support.mount import Mount
from support.process import sftp_server_program, wait_until
from support.sshd import Sshd

VARIANTS: Dict[str, Tuple[str, ...]] = {
    "defaults": (),
    "commit=fsync": ("-o", "commit=fsync"),
    "small": ("-o", "cache_size=1M,dirty_size=1M,read_ahead=0"),
    "lanes=1": ("-o", "lanes=1"),
    "uncached": ("-o", "dcache_timeout=0"),
}
# Nothing is listed ahead, and no lane is opened late: each request has its number.
NUMBERED: Dict[str, Tuple[str, ...]] = {"numbered": ("-o", "dcache_timeout=0,lanes=1")}
# For each operation, whatever is cut: a reconnect takes a few tenths of a second.
OPERATION_S = 20.0
# An idle machine needs 30 s for the short tests together; a busy one much longer, and no verdict depends on it.
pytestmark = pytest.mark.timeout(600)

CREATING = ("MKDIR", "OPEN", "hardlink@openssh.com")
PLACES = 2
SAMPLE = 40
FAILURES_MAX = 5


# A mount whose session ends within ten seconds waits longer each time before it dials again, for the server's sake. Here
# each cut is to be the first one of its mount.
class Case(NamedTuple):
    """One run of a sequence with its cuts; the text is what CUT takes."""

    scenario: str
    cuts: Tuple[Cut, ...]

    def __str__(self) -> str:
        return f"{self.scenario}: " + ", ".join(f"{number} {way}" for number, way in self.cuts)


class Result(NamedTuple):
    """The cuts that were made, and how many operations said EEXIST because of one."""

    cuts: List[str]
    excuses: int


class PromptMount(Mount):
    """Reconnects at once, however short the session was."""

    changes = "from sftpmount.sftp import reconnect; reconnect.STEADY_S = 0.0"


class Place:
    """A server that cuts, a mount of it, and a fresh directory for every case."""

    def __init__(self, tmp_dir: Path, variant: str) -> None:
        self.variant = variant
        self.state = str(tmp_dir / "state")
        arm(self.state, [])
        cutter = Path(__file__).with_name("sftp_cutter.py")
        command = f"exec {sys.executable} -I -S {cutter} {self.state} {sftp_server_program()}"
        self._local = tmp_dir / "local"
        self._numbers = itertools.count(1)
        with contextlib.ExitStack() as stack:
            self.sshd = stack.enter_context(Sshd(tmp_dir, sftp_server=command))
            self.mount = stack.enter_context(
                PromptMount(self.sshd, tmp_dir, *{**VARIANTS, **NUMBERED}[variant], life_s=7200.0)
            )
            self._stack = stack.pop_all()

    def close(self) -> None:
        self._stack.close()

    def count(self, scenario: str) -> int:
        """How many requests a sequence makes when nothing is cut."""
        assert self.run(Case(scenario, ())) == ([], 0)
        return counted(self.state)

    def run(self, case: Case) -> Result:
        """Raises Disagreement."""
        name = f"{next(self._numbers)}"
        (self.mount.served / name).mkdir()
        sequence = SCENARIOS[case.scenario]
        os.statvfs(self.mount.path)  # asks the server: the mount is connected now
        arm(self.state, case.cuts)
        program = Program(self.mount.path / name, self.mount.served / name)
        try:
            sequence(program)
        finally:
            done = made(self.state)
            program.end()
        try:
            excuses = self._judge(case, program, name, done)
        except Disagreement as disagreement:
            lines = [line for line in self.mount.log_text().splitlines() if "connect" not in line]
            log = "\n".join(lines[-10:])
            text = f"{self.variant}: {case}\ncut at {done}\n{disagreement}\nthe mount's log:\n{log}"
            raise Disagreement(text) from None
        return Result(done, excuses)

    def _judge(self, case: Case, program: Program, name: str, done: List[str]) -> int:
        local = self._local / name
        local.mkdir(parents=True)
        twin = Program(local, local, frozenset(program.excusable))
        SCENARIOS[case.scenario](twin)
        twin.end()
        compare(program.lines, twin.lines, "what the operations said")
        # Where the request did not reach the server, or its reply reached the client, there is no excuse.
        unsure = [cut for cut in done if AFTER_REQUEST in cut or not cut.endswith(CREATING)]
        if twin.used_excuses > len(unsure):
            raise Disagreement(f"{twin.used_excuses} operations said EEXIST without a reason")
        compare(snapshot(program.served), snapshot(local), "the server's tree")
        if program.slowest_s > OPERATION_S:
            raise Disagreement(f"{program.slowest} took {program.slowest_s:.1f} s")
        return twin.used_excuses

    def end(self) -> None:
        """Nothing is left behind by files that were removed while they were open, and the mount ends in order."""
        wait_until(lambda: not self._left_behind(), 10.0, "the removal of removed files")
        assert self.mount.unmount() == 0, self.mount.log_text()[-3000:]

    def _left_behind(self) -> List[str]:
        return [name for name in os.listdir(self.mount.served) if name.startswith(".")]


class Report:
    """What came of many cases; a failing one does not stop the others at once."""

    def __init__(self) -> None:
        self.cut = self.excuses = 0
        self.not_cut: List[str] = []
        self.kinds: collections.Counter[str] = collections.Counter()
        self.failures: List[str] = []
        self.is_ended = False

    def run(self, place: Place, cases: Sequence[Case]) -> None:
        for case in cases:
            if self.is_ended or len(self.failures) >= FAILURES_MAX:
                return
            try:
                done, excuses = place.run(case)
            except Disagreement as disagreement:
                self.failures.append(str(disagreement))
                continue
            self.cut += len(done)
            self.excuses += excuses
            self.kinds.update(cut.partition(" ")[2] for cut in done)
            if len(done) < len(case.cuts):
                self.not_cut.append(str(case))


@contextlib.contextmanager
def places(tmp_path: Path, variant: str, count: int = PLACES) -> Iterator[List[Place]]:
    with contextlib.ExitStack() as stack:
        made_places: List[Place] = []
        for number in range(count):
            directory = tmp_path / f"place{number}"
            directory.mkdir()
            made_places.append(Place(directory, variant))
            stack.callback(made_places[-1].close)
        yield made_places
        for place in made_places:
            place.end()


def run_all(at: List[Place], cases: Sequence[Case]) -> Report:
    """The cases, shared among the places."""
    report = Report()
    with concurrent.futures.ThreadPoolExecutor(len(at)) as pool:
        futures = [pool.submit(report.run, place, cases[n :: len(at)]) for n, place in enumerate(at)]
        try:
            for future in futures:
                future.result()
        except BaseException:  # a thread that hangs in an operation ends with its mount
            report.is_ended = True
            for place in at:
                place.close()
            raise
    if report.failures:
        pytest.fail("\n\n".join(report.failures), pytrace=False)
    print(f"{report.cut} cuts, {report.excuses} EEXIST, {len(report.not_cut)} cases ended before their cut")
    print(*sorted(f"{count} {kind}" for kind, count in report.kinds.items()), sep="\n")
    return report


def every_cut(place: Place) -> List[Case]:
    """For each request of each sequence, and two more, since their number is not always the same."""
    return [
        Case(scenario, ((number, way),))
        for scenario in SCENARIOS
        for number in range(1, place.count(scenario) + 3)
        for way in WAYS
    ]


def two_cuts(place: Place, count: int, seed: int) -> List[Case]:
    """A cut, and another at one of the first requests of the reconnect or a little later."""
    rng = random.Random(seed)
    length = {scenario: place.count(scenario) for scenario in SCENARIOS}

    def one(scenario: str) -> Case:
        first = (rng.randrange(1, length[scenario] - 10), rng.choice(WAYS))
        return Case(scenario, (first, (rng.randrange(1, 20), rng.choice(WAYS))))

    return [one(scenario) for _, scenario in zip(range(count), itertools.cycle(SCENARIOS))]


def parse(text: str) -> Tuple[str, Case]:
    """ "variant: scenario: 17 after request, 3 before" as failures name it."""
    variant, scenario, cuts = text.split(": ")
    pairs = [each.split(" ", 1) for each in cuts.split(", ")]
    return variant, Case(scenario, tuple((int(number), way) for number, way in pairs))


def test_only_a_lost_reply_is_an_excuse(tmp_path: Path) -> None:
    """The cutter's three ways, seen from above: the sequence "names" begins with a mkdir."""
    with places(tmp_path, "numbered", 1) as (place,):
        for way in WAYS:
            said: Dict[str, int] = {}
            for number in range(1, 40):  # what comes before it are looks, more of them for an ordinary user
                result = place.run(Case("names", ((number, way),)))
                said.update({cut.rpartition(" ")[2]: result.excuses for cut in result.cuts})
                if "MKDIR" in said:
                    break
            assert said == {"LSTAT": 0, "MKDIR": 1 if way == AFTER_REQUEST else 0}, way


if "CUT" in os.environ:

    def test_replay(tmp_path: Path) -> None:
        variant, case = parse(os.environ["CUT"])
        with places(tmp_path, variant, 1) as at:
            run_all(at, [case] * 5)


def test_some_cuts(tmp_path: Path) -> None:
    with places(tmp_path, "defaults") as at:
        cases = every_cut(at[0])
        stride = len(cases) // SAMPLE
        report = run_all(at, cases[stride // 2 :: stride])
        assert report.cut >= SAMPLE - 2, report.not_cut


def test_some_cuts_of_the_reconnect(tmp_path: Path) -> None:
    with places(tmp_path, "defaults") as at:
        cases = two_cuts(at[0], 12, seed=1)
        report = run_all(at, cases)
        assert report.cut >= 2 * len(cases) - 2, report.not_cut


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_cut(tmp_path: Path, variant: str) -> None:
    with places(tmp_path, variant) as at:
        cases = every_cut(at[0])
        report = run_all(at, cases)
        assert report.cut >= len(cases) * 0.95, report.not_cut


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("variant", VARIANTS)
def test_many_cuts_of_the_reconnect(tmp_path: Path, variant: str) -> None:
    with places(tmp_path, variant) as at:
        cases = two_cuts(at[0], 150, seed=2)
        report = run_all(at, cases)
        assert report.cut >= 2 * len(cases) * 0.9, report.not_cut
