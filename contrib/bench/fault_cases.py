"""The thirteen faults. Each is a function of a Trial that runs a program, strikes, and returns what came of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

from bench.data import difference
from bench.trial import FILE_BYTES, LIMIT_S, STRIKE_BYTES, Trial, Untested
from bench.verdicts import Outcome, Verdict, outcome
from mount.helpers import noise
from support.process import wait_until

BLACK_HOLE_S = 10.0
DOWN_S = 5.0
LISTED = [f"file-{count}" for count in range(20)]
DISK_BYTES = 8 * 2**20  # a third of the file
PART_BYTES = 300_000

_WRITE = """
source, target = sys.argv[1:3]
fd = os.open(target, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
with open(source, "rb") as file:
    while block := file.read(131072):
        assert os.write(fd, block) == len(block)
"""
CLOSE_AFTER_PAUSE = f"{_WRITE}\npause()\nos.close(fd)"
PAUSE_AFTER_CLOSE = f"{_WRITE}\nos.close(fd)\npause()"
RENAME_AFTER_PAUSE = f"{PAUSE_AFTER_CLOSE}\nos.rename(target, sys.argv[3])"
WRITE_IN_PARTS = """
fd = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY, 0o644)
pause()
for part in sys.argv[2:]:
    with open(part, "rb") as file:
        os.write(fd, file.read())
    pause()
os.close(fd)
pause()
"""


def reset_in_write(trial: Trial) -> Outcome:
    trial.relay.reset_after(STRIKE_BYTES, "up")
    told, _ = trial.run(*_dd(trial))
    return _struck(trial, "up", STRIKE_BYTES, trial.judge(told, trial.lacks))


def reset_in_read(trial: Trial) -> Outcome:
    """The bytes were always on the server; those that the program got are compared with them."""
    trial.relay.reset_after(STRIKE_BYTES, "down")
    copy = trial.work_dir / "copy"
    told, _ = trial.run("cp", trial.on_mount("to-read"), str(copy))
    result = outcome(told, difference(trial.served / "to-read", copy), where="the copy")
    return _struck(trial, "down", STRIKE_BYTES, result)


def reset_in_rsync(trial: Trial) -> Outcome:
    tree = trial.work_dir / "tree"
    for count in range(60):
        path = tree / f"dir-{count % 4}" / f"file-{count}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise((0, 1000, 40_000, 300_000)[count // 4 % 4], seed=count))
    strike_bytes = 2 * 2**20
    trial.relay.reset_after(strike_bytes, "up")
    told, _ = trial.run("rsync", "-rt", f"{tree}/", trial.on_mount("copy/"))
    return _struck(trial, "up", strike_bytes, trial.judge(told, lambda: trial.lacks("copy", tree)))


def black_hole(trial: Trial) -> Outcome:
    writer = trial.start(*_dd(trial))
    trial.wait_for_strike()
    trial.relay.stall()
    time.sleep(BLACK_HOLE_S)  # the fault itself
    trial.relay.flow()
    return trial.judge(writer.finish()[0], trial.lacks)


def silent_death(trial: Trial) -> Outcome:
    """As after a changed address or a forgotten NAT entry: nothing passes on the old connection, ever."""
    writer = trial.start(*_dd(trial))
    trial.wait_for_strike()
    trial.relay.stall(new_connections=False)
    return trial.judge(writer.finish()[0], trial.lacks)


def server_restart(trial: Trial) -> Outcome:
    writer = trial.start(*_dd(trial))
    trial.wait_for_strike()
    trial.sshd.kill()
    time.sleep(DOWN_S)  # the fault itself
    trial.sshd.start()
    return trial.judge(writer.finish()[0], trial.lacks)


def reset_before_close(trial: Trial) -> Outcome:
    writer = trial.python(CLOSE_AFTER_PAUSE, str(trial.source), trial.on_mount("file"))
    if writer.reaches_pause():
        trial.relay.reset()
    writer.go_on()
    return trial.judge(writer.finish()[0], trial.lacks)


def reset_before_rename(trial: Trial) -> Outcome:
    names = [trial.on_mount("temporary"), trial.on_mount("file")]
    writer = trial.python(RENAME_AFTER_PAUSE, str(trial.source), *names)
    if writer.reaches_pause():
        trial.relay.reset()
    writer.go_on()
    told, _ = writer.finish()

    def lacks() -> Optional[str]:
        if (trial.served / "temporary").exists():
            return "the file still has its old name"
        return trial.lacks()

    return trial.judge(told, lacks)


def daemon_killed(trial: Trial) -> Outcome:
    """No time of grace: what close() promised must be on the server when the process is gone."""
    writer = trial.python(PAUSE_AFTER_CLOSE, str(trial.source), trial.on_mount("file"))
    closed = writer.reaches_pause()
    trial.mount.kill()
    writer.go_on()
    told, _ = writer.finish()
    return outcome(None if closed else told, trial.lacks())


def unmounted_at_once(trial: Trial) -> Outcome:
    """No time of grace: a backup's last line unmounts, and then the machine is switched off."""
    writer = trial.python(f"{_WRITE}\nos.close(fd)", str(trial.source), trial.on_mount("file"))
    return trial.judge(writer.finish()[0], trial.lacks, grace_s=0.0)


def disk_full(trial: Trial) -> Outcome:
    told, _ = trial.run(*_dd(trial))
    return trial.judge(told, trial.lacks)


def outage(trial: Trial) -> Outcome:
    """A directory that was listed before and one that was not. An error is right; an empty listing, and "No such file", is
    what makes backup tools delete what they believe gone."""
    told, _ = trial.run("ls", trial.on_mount("seen"))
    if told is not None:
        raise Untested(told)
    trial.relay.refuse()
    trial.relay.reset()
    told, lacking = _listed(trial)
    if told is not None and "No such file" in told:
        return Outcome(Verdict.LOSS, f"The program was told that the directory is missing: {told}")
    trial.relay.refuse(False)
    started = time.monotonic()
    try:
        wait_until(lambda: _listed(trial) == (None, None), LIMIT_S, "ls after the outage", interval_s=0.2)
        after = f"right again {time.monotonic() - started:.0f} s after the outage"
    except TimeoutError:
        after = f"not right again {LIMIT_S:g} s after the outage"
    return outcome(told, lacking, where="the listing", more=f"; {after}")


def stale_view(trial: Trial) -> Outcome:
    """After each step of the writer, another program looks at the file and should see all that was written."""
    parts = [trial.work_dir / f"part{count}" for count in range(3)]
    for count, part in enumerate(parts):
        part.write_bytes(noise(PART_BYTES, seed=count))
    written = trial.work_dir / "written"
    written.write_bytes(b"")
    writer = trial.python(WRITE_IN_PARTS, trial.on_mount("file"), *map(str, parts))
    seen: List[str] = []
    for step in ["open", *(f"write {count + 1}" for count in range(len(parts))), "close"]:
        if not writer.reaches_pause():
            break
        if step.startswith("write"):
            with written.open("ab") as file:
                file.write(parts[int(step[-1]) - 1].read_bytes())
        told, size = trial.run("stat", "-c", "%s", trial.on_mount("file"))
        if size.strip() != str(written.stat().st_size):
            seen.append(
                f"after {step}: " + (told or f"stat says {size.strip()} of {written.stat().st_size} bytes")
            )
        told, _ = trial.run("cmp", str(written), trial.on_mount("file"))
        if told is not None:
            seen.append(f"after {step}: {told}")
        writer.go_on()
    stored = trial.judge(writer.finish()[0], lambda: trial.lacks("file", written))
    if stored.verdict is Verdict.GOES_ON and seen:
        return Outcome(Verdict.STALE, "; ".join(seen))
    return stored


class Fault(NamedTuple):
    name: str
    strike: Callable[[Trial], Outcome]
    prepare: Callable[[Path], None] = lambda directory: None
    disk: str = ""  # options of a tmpfs, where the server has a small disk


def _file_to_read(directory: Path) -> None:
    (directory / "to-read").write_bytes(noise(FILE_BYTES, seed=2))


def _two_directories(directory: Path) -> None:
    for name in ("seen", "fresh"):
        (directory / name).mkdir()
        for file in LISTED:
            (directory / name / file).write_bytes(b"listed")


FAULTS: Dict[str, Fault] = {
    fault.name: fault
    for fault in [
        Fault("write-reset", reset_in_write),
        Fault("read-reset", reset_in_read, _file_to_read),
        Fault("rsync-reset", reset_in_rsync),
        Fault("black-hole", black_hole),
        Fault("silent-death", silent_death),
        Fault("reset-before-close", reset_before_close),
        Fault("reset-before-rename", reset_before_rename),
        Fault("daemon-killed", daemon_killed),
        Fault("unmount-at-once", unmounted_at_once),
        Fault("disk-full", disk_full, disk=f"size={DISK_BYTES}"),
        Fault("server-restart", server_restart),
        Fault("outage", outage, _two_directories),
        Fault("stale-view", stale_view),
    ]
}


def _dd(trial: Trial) -> List[str]:
    return [
        "dd",
        f"if={trial.source}",
        f"of={trial.on_mount('file')}",
        "bs=128K",
        "conv=fsync",
        "status=none",
    ]


def _listed(trial: Trial) -> Tuple[Optional[str], Optional[str]]:
    """(the first error of ls, which names are missing) of both directories."""
    errors: List[str] = []
    missing: List[str] = []
    for directory in ("seen", "fresh"):
        told, output = trial.run("ls", trial.on_mount(directory))
        errors += [told] if told else []
        missing += [name for name in LISTED if name not in output.split()]
    lacking = f"{len(missing)} of {2 * len(LISTED)} names are missing" if missing else None
    return (errors[0] if errors else None), lacking


def _struck(trial: Trial, direction: str, strike_bytes: int, result: Outcome) -> Outcome:
    """The outcome, where the reset has come about."""
    passed = trial.passed_bytes(direction)
    if passed < strike_bytes:
        raise Untested(f"only {passed} bytes had passed, the reset was due after {strike_bytes}")
    return result
