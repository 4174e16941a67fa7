"""The command as a person meets it: what it says and how it ends, with a real server and real mounts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional

import pytest

import sftpmount
from sftpmount import cli, errors, options
from support.mount import CHECKOUT, Mount, fuse_mounts
from support.namespace import Namespace
from support.process import descendants, is_running, wait_until
from support.sshd import Sshd, keygen

WAIT_S = 30.0


def command(*words: str, env: Optional[Dict[str, str]] = None, cwd: Path = CHECKOUT) -> subprocess.Popen[str]:
    """``sftpmount words`` without a terminal, an agent or a home directory of note."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SSH_")}
    environment["PYTHONPATH"] = str(CHECKOUT)
    environment.update(env or {})
    return subprocess.Popen(
        [sys.executable, "-m", "sftpmount", *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=cwd,
        start_new_session=True,
    )


class Result:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.out, self.err = process.communicate(timeout=WAIT_S)
        self.status = process.returncode


class Command:
    """Background mounts of a server on ``path``."""

    def __init__(self, sshd: Sshd, tmp_path: Path) -> None:
        self.sshd = sshd
        self.path = tmp_path / "mnt"
        self.path.mkdir()
        self.log = tmp_path / "log"
        self.place = f"{sshd.user}@127.0.0.1:{sshd.tree}"

    def words(self, *more: str) -> List[str]:
        """The options that the server and this test need; ``more`` come last and win."""
        said = (
            f"port={self.sshd.port},UserKnownHostsFile={self.sshd.known_hosts},GlobalKnownHostsFile=/dev/null"
        )
        key = f"IdentityFile={self.sshd.user_key},IdentitiesOnly=yes,log_file={self.log}"
        return ["-F", "none", "-o", said, "-o", key, *more]

    def mount(self, *more: str, env: Optional[Dict[str, str]] = None) -> Result:
        return Result(command(self.place, str(self.path), *self.words(*more), env=env))

    @property
    def is_mounted(self) -> bool:
        return str(self.path) in [path for path, _ in fuse_mounts()]

    @property
    def pid(self) -> int:
        """The mount's process, as its log has it."""
        return int(self.log_text().splitlines()[-1].split()[2])

    def log_text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for_end(self, pid: int) -> None:
        wait_until(lambda: not is_running(pid), WAIT_S, "the end of the mount's process")

    def close(self) -> None:
        if self.is_mounted:
            subprocess.run(["fusermount3", "-uz", str(self.path)], check=False)
        if self.log_text() and is_running(self.pid):
            os.kill(self.pid, signal.SIGKILL)


@pytest.fixture
def background(sshd: Sshd, tmp_path: Path) -> Iterator[Command]:
    each = Command(sshd, tmp_path)
    yield each
    each.close()


@pytest.fixture
def own_background(own_sshd: Sshd, tmp_path: Path) -> Iterator[Command]:
    each = Command(own_sshd, tmp_path)
    yield each
    each.close()


# -- words -------------------------------------------------------------------------------------------------------------------


def test_help_fits_a_screen_and_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    for _, group in options.GROUPS:
        for option in group:
            assert option.name in shown
    statuses = {
        error.exit_status
        for error in errors.SftpMountError.__subclasses__()
        if error.__module__ == errors.__name__
    }
    assert statuses == set(range(2, 10))
    for status in [0, 1, *statuses, 130]:
        assert f" {status} " in shown.replace("\n", " ")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-V"]) == 0
    assert capsys.readouterr().out == f"sftpmount {sftpmount.__version__}\n"


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (
            ["host:", "{tmp}", "-o", "reconect"],
            2,
            "option 'reconect' is not known: the nearest is reconnect.",
        ),
        (["host:", "{tmp}", "-Z"], 2, "option -Z not recognized"),
        (["host", "{tmp}"], 2, "'host' is not of the form [user@]host:[dir]"),
        (["mnt"], 2, "'mnt' is neither a command nor [user@]host:[dir]"),
        (["host:", "{tmp}/absent"], 3, "/absent does not exist: create it with mkdir"),
        (["host:", "{tmp}/file"], 3, "/file is not a directory"),
        (["host:", "{tmp}"], 3, "is not empty"),
        (["host:", "/proc"], 3, "/proc is in use as the mountpoint of"),
    ],
)
def test_refusals_before_anything_is_tried(
    words: List[str], status: int, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cli.main([word.format(tmp=tmp_path) for word in words]) == status
    said = capsys.readouterr().err
    assert said.startswith("sftpmount: ") and said.count("\n") == 1 and sentence in said


def test_missing_fuse_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sftpmount.fs import fuse

    monkeypatch.setattr(fuse, "fuse", None)
    monkeypatch.setattr(fuse, "_IMPORT_ERROR", "no libfuse", raising=False)
    assert cli.main(["host:", str(tmp_path)]) == 4
    assert "apt install" in capsys.readouterr().err


def test_help_needs_neither_fuse_nor_paramiko() -> None:
    heavy = "import sys, sftpmount.cli as c; c.main(['-V']); print({'fuse', 'paramiko'} & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", heavy], capture_output=True, text=True, cwd=CHECKOUT, check=True
    )
    assert run.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("line", [["host:", "."], ["-f", "host:", "."], ["audit", "host:"]], ids=" ".join)
def test_missing_packages_are_a_sentence(line: List[str], tmp_path: Path) -> None:
    """As where the checkout is run with a Python that has none of them."""
    run = subprocess.run(
        [sys.executable, "-S", "-m", "sftpmount", *line],
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (run.returncode, run.stderr.count("\n")) == (1, 1), run.stderr
    assert run.stderr.startswith(f"sftpmount: {sys.executable} lacks what sftpmount needs (No module named ")


# -- failures with a server, in both modes -----------------------------------------------------------------------------------


def silent(error: str) -> bool:
    """Whether stderr holds the one sentence and nothing else."""
    return error.startswith("sftpmount: ") and error.count("\n") == 1 and error.rstrip().endswith((".", ")"))


@pytest.mark.parametrize("mode", [[], ["-f"]], ids=["background", "foreground"])
@pytest.mark.parametrize(
    ("place", "words", "status", "part"),
    [
        ("127.0.0.1:", ["-o", "port=1"], 5, "127.0.0.1 port 1 cannot be reached"),
        ("no-such-host.invalid:", [], 5, "no-such-host.invalid"),
        ("127.0.0.1:", ["-o", "UserKnownHostsFile=/dev/null"], 6, "is unknown"),
        ("nobody-here@127.0.0.1:", [], 8, "nobody-here"),
        ("{user}@127.0.0.1:/no/such/dir", [], 9, "/no/such/dir"),
        ("{user}@127.0.0.1:/etc/passwd", [], 9, "not a directory"),
        ("{user}@127.0.0.1:", ["-o", "log_file=/no/such/dir/log"], 2, "option log_file"),
        ("{user}@127.0.0.1:", ["-o", "fsname=" + "x" * 9000], 3, "FUSE could not mount on"),
    ],
    ids=["refused", "no-host", "host-key", "login", "no-dir", "no-directory", "log", "fuse"],
)  # fmt: skip
def test_failures_are_told_in_one_sentence_and_leave_no_mount(
    place: str, words: List[str], status: int, part: str, mode: List[str], background: Command
) -> None:
    place = place.format(user=background.sshd.user)
    result = Result(command(place, str(background.path), *background.words(*words), *mode))
    assert (result.status, result.out) == (status, "")
    assert part in result.err and silent(result.err), result.err
    assert not background.is_mounted
    assert os.listdir(background.path) == []


def test_a_changed_host_key_is_not_an_unknown_one(background: Command, tmp_path: Path) -> None:
    false_key = keygen(tmp_path / "false", "ed25519").with_suffix(".pub").read_text()
    known_hosts = tmp_path / "known_hosts"
    known_hosts.write_text(f"[127.0.0.1]:{background.sshd.port} {false_key}")
    result = background.mount("-o", f"UserKnownHostsFile={known_hosts}")
    assert result.status == 6 and silent(result.err) and "changed" in result.err.lower()


@pytest.fixture
def mute_port() -> Iterator[int]:
    """Takes connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.parametrize("mode", [[], ["-f"]], ids=["background", "foreground"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_connecting_ends_all(
    number: signal.Signals, mode: List[str], mute_port: int, tmp_path: Path
) -> None:
    process = command("127.0.0.1:", str(tmp_path), "-F", "none", "-p", str(mute_port), *mode)
    _wait_for_connection(mute_port)
    family = descendants(process.pid)
    os.killpg(process.pid, number)
    result = Result(process)
    expected = (
        (-number, "") if mode else (130, "sftpmount: interrupted.\n")
    )  # a shell shows both as 130 and more
    assert (result.status, result.err) == expected
    assert not [pid for pid in family if is_running(pid)]


def test_a_server_that_says_nothing_is_waited_for_no_longer_than_told(mute_port: int, tmp_path: Path) -> None:
    result = Result(
        command("127.0.0.1:", str(tmp_path), "-F", "none", "-p", str(mute_port), "-o", "ConnectTimeout=3")
    )
    assert result.status == 5 and silent(result.err)


def test_a_child_that_is_killed_while_connecting_is_told_of(mute_port: int, tmp_path: Path) -> None:
    process = command("127.0.0.1:", str(tmp_path), "-F", "none", "-p", str(mute_port))
    _wait_for_connection(mute_port)
    (child,) = descendants(process.pid)
    os.kill(child, signal.SIGKILL)
    result = Result(process)
    assert result.status == 1 and "ended early (signal 9)" in result.err


def _wait_for_connection(port: int) -> None:
    """Return once something has connected to ``port`` (ESTABLISHED is 01 in /proc/net/tcp)."""
    mark = f"0100007F:{port:04X} 01"

    def connected() -> bool:
        rows = [line.split()[2:4] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return any(" ".join(row) == mark for row in rows)

    wait_until(connected, WAIT_S, "a connection")


# -- background ----------------------------------------------------------------------------------------------------------------


def test_the_command_ends_with_0_once_the_mount_is_usable(background: Command) -> None:
    result = background.mount()
    assert (result.status, result.out, result.err) == (0, "", "")
    assert background.path.stat().st_dev != background.path.parent.stat().st_dev
    (background.path / "file").write_bytes(b"stored")
    assert (background.sshd.tree / "file").read_bytes() == b"stored"
    pid = background.pid
    assert os.getsid(pid) == pid and os.readlink(f"/proc/{pid}/cwd") == "/"
    assert {os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)} == {"/dev/null"}
    subprocess.run(["fusermount3", "-u", str(background.path)], check=True)
    background.wait_for_end(pid)
    assert background.log.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_unmounts(number: signal.Signals, background: Command) -> None:
    assert background.mount().status == 0
    pid = background.pid
    os.kill(pid, number)
    background.wait_for_end(pid)
    assert not background.is_mounted and "not stored" not in background.log_text()
    assert os.listdir(background.path) == []


def test_a_second_mount_on_the_same_directory_is_refused(background: Command) -> None:
    assert background.mount().status == 0
    result = background.mount()
    assert result.status == 3 and silent(result.err)
    assert (
        f"{background.path} is in use as the mountpoint of {background.place} (fuse.sftpmount)" in result.err
    )
    assert background.mount("-o", "nonempty").status == 3


def test_a_dead_mount_is_named_with_its_remedy(background: Command) -> None:
    assert background.mount().status == 0
    pid = background.pid
    os.kill(pid, signal.SIGKILL)
    background.wait_for_end(pid)
    result = background.mount()
    assert result.status == 3 and f"run fusermount3 -uz {background.path} first." in result.err
    subprocess.run(["fusermount3", "-uz", str(background.path)], check=True)
    assert background.mount().status == 0


def test_relative_names_and_odd_ones(background: Command, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/a b,c\\\xff"
    os.mkdir(odd)
    words = [word.replace(f"{tmp_path}/", "") for word in background.words()]
    words[-1] += f",UserKnownHostsFile={os.path.relpath(background.sshd.known_hosts, tmp_path)}"
    words[-1] += f",IdentityFile={os.path.relpath(background.sshd.user_key, tmp_path)}"
    result = Result(command(background.place, os.fsdecode(os.path.basename(odd)), *words, cwd=tmp_path))
    assert (result.status, result.err) == (0, "")
    try:
        Path(os.fsdecode(odd), "file").write_text("here")
        assert (background.sshd.tree / "file").read_text() == "here"
    finally:
        subprocess.run([b"fusermount3", b"-u", odd], check=True)
        background.wait_for_end(background.pid)


def test_what_the_mount_table_shows(background: Command) -> None:
    assert (
        background.mount("-o", r"fsname=a\,b\\c d,ro,noatime,nosuid,nodev,uid=12,gid=13,umask=027").status
        == 0
    )
    (line,) = [
        line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(background.path) in line
    ]
    assert r" - fuse.sftpmount a,b\134c\040d ro," in line
    assert {"ro", "noatime", "nosuid", "nodev"} <= set(line.split()[5].split(","))
    status = background.path.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (12, 13, 0o750)
    with pytest.raises(OSError, match="Read-only file system"):
        (background.path / "x").touch()


def test_a_passphrase_is_asked_for_through_askpass_and_never_logged(
    background: Command, tmp_path: Path
) -> None:
    key = keygen(tmp_path / "locked", "ed25519", passphrase="open sesame")
    with (background.sshd.dir / "authorized_keys").open("a") as authorized:
        authorized.write(key.with_suffix(".pub").read_text())
    askpass = tmp_path / "askpass"
    askpass.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/asked\necho open sesame\n')
    askpass.chmod(0o755)
    words = [word.replace(str(background.sshd.user_key), str(key)) for word in background.words()]
    words += ["-o", "log_level=debug"]
    refused = Result(command(background.place, str(background.path), *words))
    assert refused.status == 8 and silent(refused.err) and "locked" in refused.err
    result = Result(
        command(background.place, str(background.path), *words, env={"SSH_ASKPASS": str(askpass)})
    )
    assert (result.status, result.err) == (0, "")
    assert len((tmp_path / "asked").read_text().splitlines()) == 1
    assert "sesame" not in background.log_text()


def test_a_password_is_in_no_log_process_list_or_environment(background: Command) -> None:
    """The server takes keys only, so that the password is read and kept, and the key lets us in."""
    secret = b"open\xffsesame"  # whatever the locale says of it
    words = background.words("-d", "-o", "password_stdin,PreferredAuthentications=password\\,publickey")
    process = subprocess.Popen(
        [sys.executable, "-m", "sftpmount", background.place, str(background.path), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        cwd=CHECKOUT,
    )
    assert process.stdin is not None
    process.stdin.write(secret + b"\n")
    process.stdin.flush()
    wait_until(lambda: background.is_mounted, WAIT_S, "the mount")
    for pid in (process.pid, *descendants(process.pid)):
        for name in ("cmdline", "environ"):
            assert b"sesame" not in Path(f"/proc/{pid}/{name}").read_bytes()
    process.terminate()
    said, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
    assert b"sesame" not in said + background.log.read_bytes()


@pytest.mark.parametrize(("word", "expected"), [("ro", "(1, 1)"), ("core_dumps", "(4096, 8192)")])
@pytest.mark.parametrize("words", [["audit", "nowhere.invalid:"], ["nowhere.invalid:", "{mnt}", "-f"]])
def test_a_core_is_left_only_where_asked_for(
    words: List[str], word: str, expected: str, background: Command
) -> None:
    program = """if True:
        import resource
        from sftpmount import cli
        resource.setrlimit(resource.RLIMIT_CORE, (4096, 8192))
        assert cli.main() == 5
        print(resource.getrlimit(resource.RLIMIT_CORE))
    """
    if "-f" in words:
        program = program.replace("assert cli", "cli.daemon.leave = lambda status: None; assert cli")
    filled = [each.replace("{mnt}", str(background.path)) for each in words]
    done = subprocess.run(
        [sys.executable, "-c", program, *filled, "-F", "none", "-o", word],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == expected, done.stderr


# -- the end -------------------------------------------------------------------------------------------------------------------


def test_a_busy_mount_is_detached_stored_and_ends_with_its_last_user(background: Command) -> None:
    assert background.mount().status == 0
    pid = background.pid
    with (background.path / "busy").open("wb") as file:
        file.write(b"first")
        file.flush()
        os.kill(pid, signal.SIGTERM)
        wait_until(
            lambda: (background.sshd.tree / "busy").read_bytes() == b"first", WAIT_S, "stored while in use"
        )
        wait_until(lambda: not background.is_mounted, WAIT_S, "detached")
        assert is_running(pid)
        file.write(b", second")
    background.wait_for_end(pid)
    assert (background.sshd.tree / "busy").read_bytes() == b"first, second"
    assert "is in use" in background.log_text()


@pytest.mark.parametrize("unmounted_before", [True, False])
def test_a_signal_ends_a_mount_that_another_namespace_has_a_copy_of(
    mount: Mount, unmounted_before: bool
) -> None:
    with Namespace() as other:
        seen_there = Path(f"{other.root}{mount.path}")
        if unmounted_before:
            subprocess.run(["fusermount3", "-u", mount.path], check=True)
            (seen_there / "served on").write_bytes(b"to the others")
            assert (mount.served / "served on").read_bytes() == b"to the others" and mount.is_running
        mount.terminate()
        assert mount.wait(WAIT_S) == 0
        assert "still mounted in another mount namespace" in mount.log_text()
        with pytest.raises(OSError, match="not connected"):
            seen_there.stat()


def test_a_second_signal_ends_at_once_and_the_log_names_what_is_lost(
    own_sshd: Sshd, make_mount: Callable[..., Mount]
) -> None:
    mount = make_mount(own_sshd)
    file = (mount.path / "held").open("wb", buffering=0)
    file.write(b"never stored")
    own_sshd.pause()
    mount.terminate()
    wait_until(lambda: "is in use" in mount.log_text(), WAIT_S, "detached")
    mount.terminate()
    assert mount.wait(WAIT_S) == 1
    own_sshd.resume()
    assert "not stored: " in mount.log_text() and "/held: interrupted" in mount.log_text()
    assert not mount.is_mounted
    with pytest.raises(OSError, match=r"."):
        file.write(b"into the void")
    with pytest.raises(OSError, match=r"."):
        file.close()


def test_data_that_cannot_be_stored_makes_the_exit_status_1(
    own_sshd: Sshd, make_mount: Callable[..., Mount]
) -> None:
    mount = make_mount(own_sshd, "-o", "retry_timeout=1")
    file = (mount.path / "file").open("wb", buffering=0)
    file.write(b"not on the server's disk")
    own_sshd.kill()
    with pytest.raises(OSError, match=r"."):
        file.close()
    assert mount.unmount() == 1
    assert "not stored: /file: " in mount.log_text()
