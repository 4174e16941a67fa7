"""A connected byte stream to a server: TCP to one of its addresses, or the two ends of a ProxyCommand."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import threading
import time
from typing import Callable, List, Optional, Tuple

from sftpmount.errors import Unreachable

# A dead peer is noticed by our own heartbeat; these two only make sure that the kernel gives up, too, some time later.
TCP_USER_TIMEOUT_S = 120
TCP_KEEPALIVE_S = 60
ADDRESSES_MAX = 16
COMMAND_END_TIMEOUT_S = 5.0

Resolver = Callable[..., List[Tuple[int, int, int, str, Tuple[object, ...]]]]


def dial_tcp(
    host: str,
    port: int,
    timeout_s: float,
    *,
    family: int = socket.AF_UNSPEC,
    bind_address: Optional[str] = None,
    bind_interface: Optional[str] = None,
    keepalive: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> socket.socket:
    """Connect to the first address of ``host`` that answers, all of them together within ``timeout_s``.

    Raises Unreachable, which names host, port and the cause at each address.
    """
    deadline = clock() + timeout_s
    addresses = _addresses(host, port, family, timeout_s)
    causes: List[str] = []
    for index, (kind, address) in enumerate(addresses):
        left = deadline - clock()
        if left <= 0:
            causes.append(f"no answer within {timeout_s:g} s")
            break
        # One address that swallows packets must leave time for the next.
        share = left if index == len(addresses) - 1 else max(left / 2, min(left, 5.0))
        try:
            return _connect(kind, address, share, bind_address, bind_interface, keepalive)
        except socket.timeout:
            causes.append(f"no answer from {address[0]} within {share:.0f} s")
        except OSError as error:
            causes.append(f"{error.strerror or error} ({address[0]})")
    raise Unreachable(
        f"{host} port {port} cannot be reached: {'; '.join(dict.fromkeys(causes))}. "
        f"Check the host name, the port and that the server is up."
    )


def _addresses(host: str, port: int, family: int, timeout_s: float) -> List[Tuple[int, Tuple[object, ...]]]:
    """Resolve in a thread, since the resolver knows no deadline (a dead name server takes it half a minute)."""
    found: List[Tuple[int, Tuple[object, ...]]] = []
    failures: List[str] = []

    def look_up() -> None:
        try:
            for kind, _, _, _, address in socket.getaddrinfo(host, port, family, socket.SOCK_STREAM):
                if (kind, address) not in found:
                    found.append((kind, address))
        except (OSError, UnicodeError) as error:
            failures.append(getattr(error, "strerror", None) or str(error))

    thread = threading.Thread(target=look_up, name="resolver", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise Unreachable(f"The name {host} was not resolved within {timeout_s:g} s; check the name server.")
    if failures or not found:
        cause = failures[0] if failures else "no address"
        raise Unreachable(
            f"The host name {host} cannot be resolved ({cause}); check the name and the network."
        )
    return found[:ADDRESSES_MAX]


def _connect(
    family: int,
    address: Tuple[object, ...],
    timeout_s: float,
    bind_address: Optional[str],
    bind_interface: Optional[str],
    keepalive: bool,
) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout_s)
        if bind_interface is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, os.fsencode(bind_interface))
        if bind_address is not None:
            sock.bind((bind_address, 0))
        sock.connect(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if keepalive:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, TCP_KEEPALIVE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, TCP_KEEPALIVE_S // 4)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, TCP_USER_TIMEOUT_S * 1000)
    except BaseException:
        sock.close()
        raise
    return sock


def dial_command(command: str, host: str) -> socket.socket:
    """Run a ProxyCommand, as ssh does by the user's shell, and return our end of the socket pair it talks through.

    Shutting that end down ends the command and what it started. Raises Unreachable.
    """
    ours, theirs = socket.socketpair()
    shell = os.environ.get("SHELL") or "/bin/sh"
    try:
        process = subprocess.Popen(
            [shell, "-c", f"exec {command}"],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            close_fds=True,
            start_new_session=True,  # Ctrl-C at the terminal is for the mount, which drains before it lets go
        )
    except OSError as error:
        ours.close()
        raise Unreachable(
            f"The ProxyCommand for {host} cannot be run by {shell} ({error.strerror})."
        ) from None
    finally:
        theirs.close()
    threading.Thread(target=_end_with, args=(process, ours.dup()), name="proxy command", daemon=True).start()
    return ours


def _end_with(process: subprocess.Popen[bytes], sock: socket.socket) -> None:
    """Wait until either end of the pair is shut down, then end the command: not all of them notice by themselves."""
    poller = select.poll()
    poller.register(sock.fileno(), 0)  # which leaves the hang-up alone
    poller.poll()
    sock.close()
    for number in (signal.SIGHUP, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)  # not yet waited for, so the number is still its own
        except ProcessLookupError:
            pass
        try:
            process.wait(COMMAND_END_TIMEOUT_S)
            return
        except subprocess.TimeoutExpired:
            pass
