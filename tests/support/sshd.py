"""A real OpenSSH server on 127.0.0.1 that lives as long as the test which started it.

It runs in the foreground with keys, port, configuration and log of its own, as root or as an ordinary user, and needs no
service, no PAM and no entry in /etc. By default it is hardened as the "Secure Secure Shell" guide says.

    with Sshd(tmp_path) as sshd:
        ... sshd.port, sshd.user, sshd.user_key, sshd.known_hosts, sshd.tree ...
"""

from __future__ import annotations

import fcntl
import getpass
import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Protocol, Sequence, Tuple

from support.process import descendants, end_all, free_port, program, send_signal, wait_until

# https://stribika.github.io/2015/01/04/secure-secure-shell.html, the server's side.
HARDENED_CONFIG = """\
KexAlgorithms curve25519-sha256@libssh.org,diffie-hellman-group-exchange-sha256
Ciphers chacha20-poly1305@openssh.com,aes256-gcm@openssh.com,aes128-gcm@openssh.com,aes256-ctr,aes192-ctr,aes128-ctr
MACs hmac-sha2-512-etm@openssh.com,hmac-sha2-256-etm@openssh.com,umac-128-etm@openssh.com,\
hmac-sha2-512,hmac-sha2-256,umac-128@openssh.com
"""

_START_TIMEOUT_S = 20.0


class Server(Protocol):
    """What a client needs to know of a server: Sshd and AsyncsshServer are such."""

    port: int
    user: str
    user_key: Path
    known_hosts: Path
    tree: Path

    def trust(self, port: int) -> None:
        """Name the server's host keys in ``known_hosts`` for another port of 127.0.0.1."""


class Sshd:
    """One sshd. Attributes:

    port          TCP port on 127.0.0.1, the same over restarts
    user          who may log in (the one who runs the tests), with the key file ``user_key``
    host_keys     key type ("ed25519", "rsa", "ecdsa-384") -> private key file
    known_hosts   a file that names these keys for ``port`` and every port given to trust()
    tree          an empty directory meant to be served (the server itself serves the whole file system)
    log           the server's log file
    pid           of the listener; None while it is down

    ``extra_config`` are sshd_config lines which win over the others. ``sftp_server`` is "internal-sftp" or the path of a
    program (with arguments). ``sftp_only=False`` permits commands too, as rsync over ssh needs. ``under`` are words that
    go before sshd's own and end by executing them, as those of unshare do.
    """

    def __init__(
        self,
        tmp_dir: Path,
        extra_config: str = "",
        *,
        hardened: bool = True,
        sftp_server: str = "internal-sftp",
        sftp_only: bool = True,
        host_key_types: Sequence[str] = ("ed25519", "rsa"),
        under: Sequence[str] = (),
    ) -> None:
        self._under = under
        self._binary = program("sshd", "openssh-server")
        self.dir = Path(tmp_dir) / "sshd"
        self.dir.mkdir(mode=0o700, parents=True)
        self.tree = self.dir / "tree"
        self.tree.mkdir()
        (self.dir / "home").mkdir()
        self.user = getpass.getuser()
        self.log = self.dir / "sshd.log"
        self.known_hosts = self.dir / "known_hosts"
        self.user_key = self.dir / "id_ed25519"
        self.pid: Optional[int] = None
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._trusted_ports: List[int] = []
        self.host_keys: Dict[str, Path] = {kind: self.dir / f"host_{kind}" for kind in host_key_types}
        keygen(self.user_key, "ed25519")
        for kind, path in self.host_keys.items():
            keygen(path, kind)
        (self.dir / "authorized_keys").write_bytes(self.user_key.with_suffix(".pub").read_bytes())
        self._template = extra_config.rstrip("\n") + "\n" + self._config(hardened, sftp_server, sftp_only)
        self.port = free_port()

    def __enter__(self) -> Sshd:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and return once it sends its SSH greeting. Raises RuntimeError with the log's end."""
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd's privilege separation directory
        first_start = not self._trusted_ports
        for _ in range(5):
            config = self.dir / "sshd_config"
            config.write_text(f"Port {self.port}\n{self._template}")
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    [*self._under, self._binary, "-D", "-e", "-f", str(config)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C in the test run must not end it before its clients
                )
            self.pid = self._process.pid
            wait_until(self._answers_or_ended, _START_TIMEOUT_S, f"sshd on port {self.port}")
            if self._process.poll() is None:
                self.trust(self.port)
                return
            self.pid = None
            if first_start and "Address already in use" in self.log_text():
                self.port = free_port()
                continue
            break
        raise RuntimeError(f"sshd did not start:\n{self.log_text()[-2000:]}")

    def stop(self) -> None:
        """End the server and its sessions; returns when all of them are gone. Does nothing when it is down."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server and its sessions with SIGKILL, as a crash would."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """stop() and start() on the same port with the same keys."""
        self.stop()
        self.start()

    def configure(self, lines: Iterable[str]) -> None:
        """Put each line of sshd_config in place of those with its keyword (HostKey: beside them), from the next start on."""
        for line in lines:
            keyword = line.split()[0]
            kept = [
                old
                for old in self._template.splitlines()
                if keyword == "HostKey" or old.split()[:1] != [keyword]
            ]
            self._template = "\n".join([line, *kept]) + "\n"

    def kill_sessions(self) -> None:
        """End every session with SIGKILL; the listener goes on taking new ones."""
        if self.pid is not None:
            end_all(descendants(self.pid), signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP the server and its sessions: connections stay open and nothing is answered."""
        self._signal_tree(signal.SIGSTOP)

    def resume(self) -> None:
        """Undo pause()."""
        self._signal_tree(signal.SIGCONT)

    def sessions(self) -> List[int]:
        """The pids of the processes that serve the connections (several each, where sshd separates privileges)."""
        return [] if self.pid is None else descendants(self.pid)

    def open_files(self) -> int:
        """How many file descriptors the sessions hold on files under ``tree``.

        sftp-server hides its /proc/*/fd from everyone but root. For an ordinary user this is the number of *files* under
        ``tree`` that any process has open (a write lease is refused for those), which is 0 in the same cases as long as
        the files still have names.
        """
        if os.geteuid() != 0:
            return sum(1 for path in self.tree.rglob("*") if path.is_file() and _is_open_somewhere(path))
        root = str(self.tree)
        count = 0
        for pid in self.sessions():
            try:
                links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
            except OSError:  # the process or the descriptor ended while we looked
                continue
            count += sum(1 for link in links if link == root or link.startswith(root + "/"))
        return count

    def trust(self, port: int) -> None:
        """Name the host keys in ``known_hosts`` for another port of 127.0.0.1: that of a relay to this server."""
        if port not in self._trusted_ports:
            self._trusted_ports.append(port)
            write_known_hosts(self.known_hosts, self._trusted_ports, self.public_host_keys())

    def public_host_keys(self) -> List[str]:
        """As known_hosts and authorized_keys hold them."""
        return [public_key(path) for path in self.host_keys.values()]

    def ssh_options(self, port: Optional[int] = None) -> List[str]:
        """ssh_options() for this server."""
        return ssh_options(self, port)

    def log_text(self) -> str:
        """What the server has logged so far, over all its starts."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def _config(self, hardened: bool, sftp_server: str, sftp_only: bool) -> str:
        lines = [
            "ListenAddress 127.0.0.1",
            *(f"HostKey {path}" for path in self.host_keys.values()),
            f"PidFile {self.dir / 'sshd.pid'}",
            f"AuthorizedKeysFile {self.dir / 'authorized_keys'}",
            f"AllowUsers {self.user}",
            "StrictModes no",  # the temporary directory's parents may be writable for all
            f"UsePAM {'yes' if _is_locked_root() else 'no'}",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PubkeyAuthentication yes",
            "PermitRootLogin prohibit-password",
            "X11Forwarding no",
            "PrintMotd no",
            "UseDNS no",
            "MaxStartups 100",
            # External programs run in the user's shell, and a shell that sshd starts reads ~/.bashrc and the like: those of
            # the user who runs the tests are not ours to wait for, and not ours to kill half way.
            f"SetEnv HOME={self.dir / 'home'}",
            "LogLevel VERBOSE",
            f"Subsystem sftp {sftp_server}",
        ]
        if sftp_only:
            lines.append(f"ForceCommand {sftp_server}")
        if _version(self._binary) >= (9, 8):
            lines.append("PerSourcePenalties no")  # else a test of refused keys locks the next ones out
        return "\n".join(lines) + "\n" + (HARDENED_CONFIG if hardened else "")

    def _answers_or_ended(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            return True
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as probe:
                return probe.recv(4) == b"SSH-"
        except OSError:
            return False

    def _signal_tree(self, number: signal.Signals) -> None:
        assert self.pid is not None, "the server is down"
        # The listener first, so that it makes no new session between the look and the signal.
        send_signal([self.pid], number)
        send_signal(descendants(self.pid), number)

    def _end(self, number: signal.Signals) -> None:
        process, self._process, self.pid = self._process, None, None
        if process is None:
            return
        if process.poll() is None:
            send_signal([process.pid], signal.SIGSTOP)  # no new sessions from here on
        family = descendants(process.pid)
        send_signal([process.pid], number)
        send_signal([process.pid], signal.SIGCONT)
        end_all(family, number)
        try:
            process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def keygen(path: Path, kind: str, bits: Optional[int] = None, passphrase: str = "") -> Path:
    """Make an OpenSSH key pair (``path`` and ``path``.pub) of the given type, as "ed25519", "ecdsa-384"; RSA has 3072 bits
    unless told."""
    kind, _, told = kind.partition("-")
    size = bits or int(told or (3072 if kind == "rsa" else 0))
    command = [program("ssh-keygen", "openssh-client"), "-q", "-t", kind, "-N", passphrase, "-C", ""]
    command += ["-f", str(path), *(["-b", str(size)] if size else [])]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path


def public_key(private: Path) -> str:
    """The words "type base64" of a key made by keygen(), as known_hosts and authorized_keys hold it."""
    return " ".join(Path(f"{private}.pub").read_text().split()[:2])


def ssh_options(server: Server, port: Optional[int] = None) -> List[str]:
    """Options for OpenSSH's clients: the server's port, keys and known hosts, and nothing of the user's own."""
    options = {
        "Port": port or server.port,
        "User": server.user,
        "IdentityFile": server.user_key,
        "IdentitiesOnly": "yes",
        "UserKnownHostsFile": server.known_hosts,
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "BatchMode": "yes",
    }
    return ["-F", "none", *(f"-o{key}={value}" for key, value in options.items())]


def write_known_hosts(path: Path, ports: Iterable[int], keys: Iterable[str]) -> None:
    """Write a known_hosts file that names each key for each port of 127.0.0.1."""
    keys = list(keys)
    path.write_text("".join(f"[127.0.0.1]:{port} {key}\n" for port in ports for key in keys))


def _version(sshd: str) -> Tuple[int, int]:
    """Old ones answer -V with "unknown option" and their version all the same."""
    answer = subprocess.run([sshd, "-V"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    match = re.search(r"OpenSSH_(\d+)\.(\d+)", answer.stdout + answer.stderr)
    return (int(match.group(1)), int(match.group(2))) if match else (0, 0)


def _is_locked_root() -> bool:
    """Whether we are root with a locked password (Ubuntu's default), whom sshd lets in only where it asks PAM."""
    if os.geteuid() != 0:
        return False
    for line in Path("/etc/shadow").read_text().splitlines():
        if line.startswith("root:"):
            return line.split(":")[1].startswith("!")
    return False


def _is_open_somewhere(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)
