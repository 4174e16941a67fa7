"""The units of contrib/systemd, and what a mount tells a service manager: readiness, a drain that takes time, a log."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Set

import pytest

from contrib.lib.recipes import JOB, MOUNT, RESTIC
from sftpmount.notify import Notify
from support.mount import CHECKOUT, Mount
from support.process import is_running, program, wait_until
from support.relay import Relay
from support.sshd import Sshd
from system.conftest import HOST
from system.scratch import WAIT_S, Scratch, words_of

UNITS = CHECKOUT / "contrib" / "systemd"
SERVICE = (UNITS / "sftpmount@.service").read_text()
GENERATOR = "/usr/lib/systemd/system-generators/systemd-fstab-generator"


def values_of(unit: str, key: str) -> List[str]:
    """The values of the lines ``key=`` of a unit's text."""
    return re.findall(rf"^{key}=(.*)$", unit, re.MULTILINE)


# -- the units ---------------------------------------------------------------------------------------------------------------


def test_the_units_are_found_good(scratch: Scratch, tmp_path: Path) -> None:
    job = tmp_path / "nightly"
    job.touch(0o700)
    for unit in [*UNITS.glob("*@.service"), *UNITS.glob("example/*.*")]:
        text = unit.read_text().replace("/etc/backup/nightly", str(job))
        (tmp_path / unit.name.replace("@.", "@mnt-backup.")).write_text(text)
    units = sorted(str(path) for path in tmp_path.glob("*.*"))
    assert len(units) == 6
    program("systemd-analyze", "systemd")
    done = scratch.run("systemd-analyze", "verify", "--man=no", *units)
    assert (done.returncode, done.stderr) == (0, ""), words_of(done)


def test_what_systemd_makes_of_a_line_of_fstab(scratch: Scratch, tmp_path: Path) -> None:
    scratch.fstab(
        "backup@nas:/srv /mnt/backup fuse.sftpmount noauto,x-systemd.automount,_netdev,IdentityFile=/etc/sftpmount/key 0 0"
    )
    done = scratch.run(GENERATOR, *[str(tmp_path)] * 3)
    assert done.returncode == 0, words_of(done)
    unit = (tmp_path / "mnt-backup.mount").read_text()
    assert values_of(unit, "Type") == ["fuse.sftpmount"]
    # With _netdev it counts as one of the network, which is what orders it.
    assert (tmp_path / "remote-fs.target.requires" / "mnt-backup.automount").is_symlink()
    verified = scratch.run("systemd-analyze", "verify", "--man=no", str(tmp_path / "mnt-backup.automount"))
    assert (verified.returncode, verified.stderr) == (0, ""), words_of(verified)


def test_nothing_in_the_service_would_hide_the_mount() -> None:
    """systemd.exec(5): each of these gives the service a mount namespace, and the mount would stay in it."""
    hiding = (
        r"^(Protect(System|Home|KernelTunables|KernelModules|KernelLogs|ControlGroups|Proc)|Private(Tmp|Devices|Mounts|Users)"
        r"|(ReadOnly|ReadWrite|Inaccessible|Exec|NoExec)Paths|Bind(ReadOnly)?Paths|TemporaryFileSystem|Root\w+|MountFlags"
        r"|DynamicUser|ProcSubset)="
    )
    assert re.findall(hiding, SERVICE, re.MULTILINE) == []


def test_the_service_is_ordered_after_the_network_and_so_stopped_before_it() -> None:
    assert "network.target network-online.target" in values_of(SERVICE, "After")[0]
    assert values_of(SERVICE, "Type") == ["notify"]


def test_the_rights_of_the_service_are_enough(scratch: Scratch, sshd: Sshd, served: Path) -> None:
    """The command line and the capabilities of the unit, as systemd would give them."""
    options = f"idmap=user,IdentityFile={sshd.user_key}"
    filled = {"${OPTIONS}": options, "${PLACE}": f"{sshd.user}@{HOST}:{served}", "%f": str(scratch.mnt)}
    command = [filled.get(word, word) for word in shlex.split(values_of(SERVICE, "ExecStart")[0])]
    bounded = ",".join(
        f"+{name[4:].lower()}" for name in values_of(SERVICE, "CapabilityBoundingSet")[0].split()
    )
    assert values_of(SERVICE, "NoNewPrivileges") == ["yes"]
    setpriv = ["setpriv", "--no-new-privs", f"--bounding-set=-all,{bounded}"]
    process = subprocess.Popen(
        scratch.entering(*(setpriv if os.geteuid() == 0 else []), *command), stderr=subprocess.PIPE, text=True
    )
    with process:
        wait_until(
            lambda: bool(scratch.findmnt(scratch.mnt)) or process.poll() is not None, WAIT_S, "the mount"
        )
        assert scratch.run("cp", f"{scratch.mnt}/hello", f"{scratch.mnt}/copy").returncode == 0
        (pid,) = scratch.mount_pids()
        process.terminate()
        _, said = process.communicate(timeout=WAIT_S)
        assert (process.returncode, is_running(pid)) == (0, False), said
    assert (served / "copy").read_text() == "from the server"
    assert scratch.findmnt(scratch.mnt) == {}


@pytest.mark.long
def test_the_filters_of_the_service_let_through_what_a_mount_needs(
    scratch: Scratch, sshd: Sshd, served: Path, tmp_path: Path
) -> None:
    """System calls and address families of a mount that is used and ended, against the unit's."""
    place, trace = f"{sshd.user}@{HOST}:{served}", tmp_path / "trace"
    traced = [program("strace", "strace"), "-f", "-o", str(trace), "sftpmount", "-f", place, str(scratch.mnt)]
    process = subprocess.Popen(scratch.entering(*traced, "-o", f"idmap=user,IdentityFile={sshd.user_key}"))
    wait_until(lambda: bool(scratch.findmnt(scratch.mnt)) or process.poll() is not None, WAIT_S, "the mount")
    used = f"cd {scratch.mnt} && mkdir d && cp hello d && sync d/hello && mv d/hello d/h && ls -lR . && df . && rm -r d"
    done = scratch.run("sh", "-c", used)
    assert done.returncode == 0, words_of(done)
    for pid in scratch.mount_pids():
        os.kill(pid, signal.SIGTERM)
    assert process.wait(WAIT_S) == 0
    calls = re.findall(r"^\d+ +(\w+)\(", trace.read_text(), re.MULTILINE)
    assert (
        len(set(calls)) > 40
        and set(calls) - allowed_calls(*values_of(SERVICE, "SystemCallFilter")[0].split()) == set()
    )
    families = set(re.findall(r"\bsocket\((AF_\w+)", trace.read_text()))
    assert families <= set(values_of(SERVICE, "RestrictAddressFamilies")[0].split())
    assert not re.search(r"\b(unshare|setns)\(|CLONE_NEW", trace.read_text())  # RestrictNamespaces=


def allowed_calls(*groups: str) -> Set[str]:
    """The system calls of systemd's groups, and of those in them."""
    allowed: Set[str] = set()
    for group in groups:
        words = ["systemd-analyze", "syscall-filter", group]
        shown = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        names = [line.strip() for line in shown.splitlines()[1:] if not line.strip().startswith("#")]
        allowed |= {name for name in names if name and not name.startswith("@")}
        allowed |= allowed_calls(*(name for name in names if name.startswith("@")))
    return allowed


def test_the_job_of_the_service_fails_in_the_eyes_of_systemd() -> None:
    """systemd.unit(5): a unit that its Condition...= or Assert...= stops has not failed, and OnFailure= is not told."""
    unit = (UNITS / "example" / "restic-backup.service").read_text()
    assert values_of(unit, "ExecStart") == ["/etc/backup/nightly"]
    assert values_of(unit, r"(?:Condition|Assert)\w+") == []
    (told,) = values_of(unit, "OnFailure")
    assert (UNITS / "example" / told.replace("%n", "")).is_file()


def test_a_backup_is_refused_unless_the_mount_is_healthy(scratch: Scratch, sshd: Sshd, served: Path) -> None:
    guards = JOB[: JOB.index(RESTIC.settings)].replace(MOUNT, str(scratch.mnt))

    def refused() -> str:
        """Why, in a sentence on stderr; "" where the backup would be made."""
        done = scratch.run("sh", "-c", guards)
        assert (done.returncode, done.stdout) == (1 if done.stderr else 0, "")
        return done.stderr.partition("\n")[0]

    marker = ".this-is-the-backup-disk"
    assert marker in guards
    not_mounted = f"nightly: no backup was made: {scratch.mnt} is not mounted"
    assert refused() == not_mounted
    (scratch.mnt / marker).touch()  # a bare mountpoint that looks like the real thing
    assert refused() == not_mounted
    assert scratch.run("mount", "--bind", str(scratch.mnt), str(scratch.mnt)).returncode == 0
    assert refused() == not_mounted
    assert scratch.run("umount", str(scratch.mnt)).returncode == 0
    (scratch.mnt / marker).unlink()
    place = f"{sshd.user}@{HOST}:{served}"
    assert (
        scratch.run(
            "sftpmount", place, str(scratch.mnt), "-o", f"idmap=user,IdentityFile={sshd.user_key}"
        ).returncode
        == 0
    )
    assert refused() == f"nightly: no backup was made: no answer, or no {marker}"
    assert scratch.run("touch", f"{scratch.mnt}/{marker}").returncode == 0
    assert refused() == ""


# -- what the manager is told ------------------------------------------------------------------------------------------------


class Manager:
    """A service manager's notification socket at ``address``."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self._socket.settimeout(WAIT_S)

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def next(self) -> Dict[str, str]:
        """The assignments of the next message, which is waited for."""
        return dict(line.split("=", 1) for line in self._socket.recv(65536).decode().splitlines())

    def until(self, name: str) -> Dict[str, str]:
        """The next message that has ``name``."""
        while True:
            message = self.next()
            if name in message:
                return message


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with Manager(str(tmp_path / "notify")) as each:
        yield each


def test_ready_when_usable_stopping_while_draining(
    manager: Manager, sshd: Sshd, relay: Relay, make_mount: Callable[..., Mount]
) -> None:
    mount = make_mount(sshd, port=relay.port, env={"NOTIFY_SOCKET": manager.address})
    ready = manager.until("READY")
    assert ready["READY"] == "1" and str(mount.path) in ready["STATUS"]
    data = os.urandom(4 << 20)
    relay.set_line(up_bps=32e6)
    with (mount.path / "slow").open("wb", buffering=0) as file:
        file.write(data)
        mount.terminate()
        stopping = manager.until("STOPPING")
        assert stopping["STATUS"] == "storing 1 files"
        assert int(stopping["EXTEND_TIMEOUT_USEC"]) >= 10_000_000
    assert mount.wait() == 0
    assert (sshd.tree / "slow").read_bytes() == data


def test_an_unmount_from_outside_is_told_of_too(
    manager: Manager, sshd: Sshd, make_mount: Callable[..., Mount]
) -> None:
    mount = make_mount(sshd, env={"NOTIFY_SOCKET": manager.address})
    assert manager.next()["READY"] == "1"
    assert mount.unmount() == 0
    assert manager.until("STOPPING")["STATUS"] == "storing 0 files"


def test_no_time_is_asked_for_while_the_server_is_away() -> None:
    with Manager(f"@sftpmount-test-{os.getpid()}") as manager:
        environment = {"NOTIFY_SOCKET": manager.address, "HOME": "/"}
        notify = Notify(environment)
        assert environment == {"HOME": "/"}  # what we run is no service
        with notify.draining(lambda: (3, False)):
            message = manager.next()
        assert message == {"STOPPING": "1", "STATUS": "waiting for the server to store 3 files"}
        with notify.draining(lambda: (3, True)):
            assert "EXTEND_TIMEOUT_USEC" in manager.next()
        with notify.draining(lambda: (0, True)):
            assert "EXTEND_TIMEOUT_USEC" not in manager.next()


@pytest.mark.parametrize("address", ["", "relative", "/no/such/socket", "@nobody-listens-here"])
def test_a_manager_that_does_not_listen_is_no_failure(address: str) -> None:
    notify = Notify({"NOTIFY_SOCKET": address})
    notify.tell("READY=1")
    with notify.draining(lambda: (1, True)):
        pass


def test_the_journal_gets_priorities(tmp_path: Path) -> None:
    log = tmp_path / "journal"
    with log.open("wb") as stream:
        status = os.fstat(stream.fileno())
        command = [
            sys.executable,
            "-m",
            "sftpmount",
            "-f",
            "-F",
            "none",
            "-p",
            "1",
            "127.0.0.1:",
            str(tmp_path / "mnt"),
        ]
        (tmp_path / "mnt").mkdir()
        environment = {
            **os.environ,
            "PYTHONPATH": str(CHECKOUT),
            "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}",
        }
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stderr=stream)
    assert done.returncode == 5
    assert log.read_text().startswith("<3>sftpmount: 127.0.0.1 port 1 cannot be reached")
