"""Every operation on a server that lies (``sftp.lies``): it ends in time, with the truth or an errno, and harms nothing."""

from __future__ import annotations

import os
import stat
import time
from typing import Any, Callable, Dict, List

import pytest

from fs.conftest import Clock
from sftp.fake_server import FakeServer
from sftp.lies import LIES
from sftpmount.errors import FsError
from sftpmount.fs.filesystem import Filesystem
from sftpmount.sftp import reconnect
from sftpmount.sftp.remote import Remote
from sftpmount.sftp.wire import is_plain_name

CONTENT = bytes(range(256)) * 1200  # more than two blocks
RETRY_S = 0.2
DEADLINE_S = 0.2
HONEST_S = 20.0
# Of one operation: some ask several times, and the machine may be busy.
OPERATION_MAX_S = 15.0


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconnect, "BACKOFF_FIRST_S", 0.02)
    monkeypatch.setattr(reconnect, "BACKOFF_MAX_S", 0.1)
    monkeypatch.setitem(Remote.listdir.__kwdefaults__, "entries_max", 20_000)


# Each operation that ends the session takes its time to give up.
QUICK = ("every reply twice", "OK where a result is owed")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if not lie.end or name in QUICK else pytest.mark.long)
        for name, lie in LIES.items()
        if lie.end != "start"
    ],
)
def test_operations(
    name: str,
    server: FakeServer,
    mount: Callable[..., Filesystem],
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lie = LIES[name]
    server.make(b"/home/file", CONTENT)
    server.make(b"/home/old", b"old")
    server.make(b"/home/gone", b"gone")
    link = server.make(b"/home/link", mode=0o777)
    link.mode, link.target = stat.S_IFLNK | 0o777, b"file"
    fs = mount(
        server,
        lanes=1,
        retry_timeout_s=HONEST_S,  # to begin with: the server is honest
        request_deadline_s=DEADLINE_S if lie.end == "deadline" else HONEST_S,
        alive_interval_s=0.2,
        alive_count_max=100,
        cache_bytes_max=0,
        dir_cache_timeout_s=0.0,
    )
    fs._remote._retry_timeout_s = RETRY_S
    server.twist = lambda request, reply: lie.twist(reply) if request in lie.requests else reply
    if {"INIT", "limits"} & set(lie.requests):
        server.cut()

    ends: Dict[str, Any] = {}
    for operation, act in operations(fs).items():
        started = time.monotonic()
        try:
            ends[operation] = act()
        except FsError as error:
            ends[operation] = error
        assert time.monotonic() - started < OPERATION_MAX_S, operation
        clock.s += 10.0

    def succeeded(operation: str) -> bool:
        return not isinstance(ends[operation], FsError)

    if succeeded("read"):
        assert ends["read"] == CONTENT
    if succeeded("write"):
        assert server.content(b"/home/new") == CONTENT
        assert ends["write"] == CONTENT
        if succeeded("read back"):
            assert ends["read back"] == CONTENT
    if succeeded("rename"):
        assert server.has(b"/home/moved") and not server.has(b"/home/old")
    if succeeded("readdir"):
        assert all(is_plain_name(entry) for entry, _, _ in ends["readdir"])
    if succeeded("readlink"):
        assert ends["readlink"] == b"file"
    if succeeded("statfs"):
        disk = ends["statfs"]
        assert 512 <= disk.bsize < 1 << 32 and 512 <= disk.frsize < 1 << 32 and 1 <= disk.namemax <= 255
    assert len(caplog.text) < 50_000
    assert not [record for record in caplog.records if record.exc_info], "an exception that is not foreseen"

    server.twist = lambda request, reply: reply  # the truth again
    assert eventually(lambda: read(fs, b"/file")) == CONTENT
    fs._ns.check_invariants()


def operations(fs: Filesystem) -> Dict[str, Callable[[], Any]]:
    return {
        "getattr": lambda: fs.getattr(b"/file"),
        "readdir": lambda: fs.readdir(b"/"),
        "read": lambda: read(fs, b"/file"),
        "statfs": fs.statfs,
        "readlink": lambda: fs.readlink(b"/link"),
        "write": lambda: write(fs, b"/new", CONTENT),
        "read back": lambda: read(fs, b"/new"),
        "rename": lambda: fs.rename(b"/old", b"/moved"),
        "truncate": lambda: fs.truncate(b"/file", len(CONTENT)),
        "mkdir": lambda: fs.mkdir(b"/directory", 0o755),
        "unlink": lambda: fs.unlink(b"/gone"),
    }


def read(fs: Filesystem, path: bytes) -> bytes:
    """As the kernel reads: 128 KiB at a time, up to the size that it is told."""
    handle = fs.open(path, os.O_RDONLY)
    try:
        parts: List[bytes] = []
        while True:
            part = fs.read(handle, 1 << 17, sum(map(len, parts)))
            if not part:
                return b"".join(parts)
            parts.append(part)
    finally:
        fs.release(handle)


def write(fs: Filesystem, path: bytes, data: bytes) -> bytes:
    """Write, store, and read with the same handle, when most of it is not held any more."""
    handle = fs.create(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        for at in range(0, len(data), 1 << 17):
            fs.write(handle, data[at : at + (1 << 17)], at)
        fs.flush(handle)
        return b"".join(fs.read(handle, 1 << 17, at) for at in range(0, len(data), 1 << 17))
    finally:
        fs.release(handle)


def eventually(act: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + OPERATION_MAX_S
    while True:
        try:
            return act()
        except FsError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
