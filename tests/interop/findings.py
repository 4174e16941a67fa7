"""What each server can do, asked over the protocol itself, and what comes of it on a mount of it, seen from the server's side.

Every finding is a few words, the same in every run. On the mount they are:

    as a local disk     it was done, and is so on the server
    the errno's name    it was refused, and nothing was changed that should not be
    a substitute        in other words
    WRONG ...           it was reported done, and is not so: what no mount may say
"""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path
from typing import Any, Callable, Dict

from mount.helpers import noise, opened
from sftp.places import at_server
from sftpmount.errors import FX_EOF, FsError, StatusError
from sftpmount.sftp import wire
from sftpmount.sftp.dialect import symlink_body
from sftpmount.sftp.remote import FSYNC, HARDLINK, POSIX_RENAME, STATVFS, Remote
from sftpmount.sftp.session import Session
from sftpmount.sftp.wire import Attrs, string
from support.mount import Mount
from support.process import wait_until

LOCAL = "as a local disk"
WRONG = "WRONG"
DONE, REFUSED, LIES = "yes", "no", "says so, does not"
CHANNELS_MAX = 12
_ARRIVES_S = 20.0  # rclone stores behind its close


# ---- the server, asked by hand ----


class Asked:
    """One session on a directory of the server; ``local`` is the same directory on its own side."""

    def __init__(self, session: Session, local: Path) -> None:
        self.session = session
        self.local = local

    def path(self, name: str) -> bytes:
        return os.fsencode(self.local / name)

    def put(self, name: str, data: bytes = b"") -> bytes:
        (self.local / name).write_bytes(data)
        return self.path(name)

    def request(self, kind: int, *fields: bytes) -> Any:
        return self.session.meta.request(kind, *fields).wait()

    def open(self, path: bytes, pflags: int) -> bytes:
        handle: bytes = self.request(wire.OPEN, wire.open_body(path, pflags)).handle()
        return handle

    def close(self, handle: bytes) -> None:
        self.request(wire.CLOSE, string(handle)).expect_ok()

    def write(self, handle: bytes, offset: int, data: bytes) -> None:
        self.request(wire.WRITE, wire.write_head(handle, offset, len(data)), data).expect_ok()

    def extended(self, name: bytes, *fields: bytes) -> Any:
        return self.request(wire.EXTENDED, wire.extended_body(name, *fields))

    def eventually(self, holds: Callable[[], bool]) -> str:
        """Whether what the server said it did comes true."""
        try:
            wait_until(holds, 2.0, "it")
        except TimeoutError:
            return LIES
        return DONE


def _fsync(asked: Asked) -> str:
    handle = asked.open(asked.put("fsync", b"x"), wire.FXF_READ | wire.FXF_WRITE)
    asked.extended(FSYNC, string(handle)).expect_ok()
    asked.close(handle)
    return DONE


def _posix_rename(asked: Asked) -> str:
    old, new = asked.put("old", b"new"), asked.put("new", b"old")
    asked.extended(POSIX_RENAME, string(old), string(new)).expect_ok()
    return asked.eventually(lambda: (asked.local / "new").read_bytes() == b"new")


def _hardlink(asked: Asked) -> str:
    old = asked.put("linked")
    asked.extended(HARDLINK, string(old), string(asked.path("link"))).expect_ok()
    return asked.eventually(lambda: (asked.local / "linked").stat().st_nlink == 2)


def _statvfs(asked: Asked) -> str:
    return DONE if asked.extended(STATVFS, string(bytes(asked.local))).statvfs().bavail > 0 else LIES


def _lsetstat(asked: Asked) -> str:
    (asked.local / "l").symlink_to("nowhere")
    attrs = wire.attrs(Attrs(atime=5, mtime=5))
    asked.extended(b"lsetstat@openssh.com", string(asked.path("l")), attrs).expect_ok()
    return asked.eventually(lambda: (asked.local / "l").lstat().st_mtime == 5)


def _limits(asked: Asked) -> str:
    packet, read, write, _ = asked.extended(b"limits@openssh.com").limits()
    return f"packet {packet}, read {read}, write {write}"


def _largest_read(asked: Asked) -> str:
    handle = asked.open(asked.put("large", bytes(300_000)), wire.FXF_READ)
    return str(len(asked.request(wire.READ, wire.read_body(handle, 0, 261120)).data()))


def _plain_rename(asked: Asked) -> str:
    old, new = asked.put("from", b"new"), asked.put("to", b"old")
    try:
        asked.request(wire.RENAME, string(old) + string(new)).expect_ok()
    except StatusError as status:
        return f"refused, status {status.code}"
    return "replaces"


def _exclusive(asked: Asked) -> str:
    path = asked.put("there", b"theirs")
    try:
        asked.close(asked.open(path, wire.FXF_WRITE | wire.FXF_CREAT | wire.FXF_EXCL))
    except StatusError:
        return DONE
    return "no, opens what is there"


def _keeps(asked: Asked) -> str:
    path = asked.put("kept", b"precious")
    asked.close(asked.open(path, wire.FXF_WRITE))
    time.sleep(0.2)  # what would come behind the close
    return DONE if (asked.local / "kept").read_bytes() == b"precious" else "no, empties it"


def _append(asked: Asked) -> str:
    handle = asked.open(asked.put("grows", b"first "), wire.FXF_WRITE | wire.FXF_APPEND)
    with (asked.local / "grows").open("ab") as theirs:
        theirs.write(b"theirs ")
    asked.write(handle, 0, b"ours")
    asked.close(handle)
    wait_until(lambda: b"ours" in (asked.local / "grows").read_bytes(), _ARRIVES_S, "the write")
    return DONE if (asked.local / "grows").read_bytes() == b"first theirs ours" else REFUSED


def _read_and_write(asked: Asked) -> str:
    handle = asked.open(asked.path("both"), wire.FXF_READ | wire.FXF_WRITE | wire.FXF_CREAT)
    asked.write(handle, 0, b"abc")
    return DONE if asked.request(wire.READ, wire.read_body(handle, 0, 10)).data() == b"abc" else REFUSED


def _symlink(asked: Asked) -> str:
    body = symlink_body(asked.session, b"target", asked.path("symlink"))
    asked.request(wire.SYMLINK, body).expect_ok()
    if os.readlink(asked.local / "symlink") != "target":
        return LIES
    return "link, target" if asked.session.link_path_first else "target, link"


def _lstat(asked: Asked) -> str:
    asked.put("behind")
    (asked.local / "leads").symlink_to("behind")
    seen = asked.request(wire.LSTAT, string(asked.path("leads"))).attrs()
    return "the link" if stat.S_ISLNK(seen.mode or 0) else "what it leads to"


def _renamed_link(asked: Asked) -> str:
    asked.put("behind")
    (asked.local / "leads").symlink_to("behind")
    asked.request(wire.RENAME, string(asked.path("leads")), string(asked.path("moved"))).expect_ok()
    wait_until(lambda: os.path.lexists(asked.local / "moved"), 2.0, "it")
    return "the link" if (asked.local / "moved").is_symlink() else "what it leads to"


def _readlink(asked: Asked) -> str:
    (asked.local / "relative").symlink_to("elsewhere")
    target = asked.request(wire.READLINK, string(asked.path("relative"))).names()[0].name
    return "as it is" if target == b"elsewhere" else "made absolute"


def _setstat(**attrs: int) -> Callable[[Asked], str]:
    def ask(asked: Asked) -> str:
        path = asked.put("set", b"0123456789")
        asked.request(wire.SETSTAT, string(path) + wire.attrs(Attrs(**attrs))).expect_ok()

        def is_so() -> bool:
            now = (asked.local / "set").stat()
            seen = Attrs(now.st_size, now.st_uid, now.st_gid, stat.S_IMODE(now.st_mode), 5, int(now.st_mtime))
            return all(getattr(seen, name) == value for name, value in attrs.items())

        return asked.eventually(is_so)

    return ask


def _odd_names(asked: Asked) -> str:
    names = {b"\xff\xfe", b"a\nb", b" ", b"-rf", b"x" * 255, b"a:b?*\\", "ä".encode()}
    for name in names:
        path = asked.path(os.fsdecode(name))
        asked.close(asked.open(path, wire.FXF_WRITE | wire.FXF_CREAT | wire.FXF_TRUNC))
    wait_until(lambda: names <= set(os.listdir(bytes(asked.local))), _ARRIVES_S, "the names")
    listed = set()
    handle = string(asked.request(wire.OPENDIR, string(bytes(asked.local))).handle())
    while True:
        entries = asked.request(wire.READDIR, handle).names()
        if not entries:
            break
        listed |= {entry.name for entry in entries}
    changed = sorted(names - listed)
    return DONE if not changed else f"no: {', '.join(map(repr, changed))}"


def _removed(asked: Asked) -> str:
    path = asked.put("removed", b"abc")
    handle = asked.open(path, wire.FXF_READ)
    asked.request(wire.REMOVE, string(path)).expect_ok()
    return DONE if asked.request(wire.READ, wire.read_body(handle, 0, 3)).data() == b"abc" else REFUSED


SERVER: Dict[str, Callable[[Asked], str]] = {
    "fsync@openssh.com": _fsync,
    "posix-rename@openssh.com": _posix_rename,
    "hardlink@openssh.com": _hardlink,
    "statvfs@openssh.com": _statvfs,
    "lsetstat@openssh.com": _lsetstat,
    "limits@openssh.com": _limits,
    "bytes in reply to one READ of 261120": _largest_read,
    "RENAME onto a file": _plain_rename,
    "OPEN with EXCL fails where the name is taken": _exclusive,
    "OPEN for writing keeps the file": _keeps,
    "OPEN with APPEND appends": _append,
    "reads through a handle open for both": _read_and_write,
    "reads on after REMOVE": _removed,
    "SYMLINK's arguments": _symlink,
    "LSTAT of a link shows": _lstat,
    "RENAME of a link renames": _renamed_link,
    "READLINK gives the target": _readlink,
    "SETSTAT: mode": _setstat(mode=0o600),
    "SETSTAT: times": _setstat(atime=5, mtime=6),
    "SETSTAT: size": _setstat(size=4),
    "names of any bytes": _odd_names,
}


def server_findings(server: Any) -> Dict[str, str]:
    """What it does, by the names of ``SERVER``, and how many channels one connection may have."""
    place = at_server(server, server.tree)
    remote = Remote(place.dial, retry_timeout_s=20.0, lanes=1)
    remote.start()
    found = {}
    try:
        session = remote.session()
        for number, (name, ask) in enumerate(SERVER.items()):
            directory = server.tree / f"asked {number}"
            directory.mkdir()
            if name.endswith("@openssh.com") and name.encode() not in session.extensions:
                found[name] = REFUSED
                continue
            try:
                found[name] = ask(Asked(session, directory))
            except StatusError as status:
                said = name.endswith("@openssh.com")
                found[name] = LIES if said else "no, end of file" if status.code == FX_EOF else REFUSED
        found["channels of one connection"] = _channels(session)
    finally:
        remote.close()
    return found


def _channels(session: Session) -> str:
    for count in range(1, CHANNELS_MAX):
        try:
            session.connection.open_subsystem("sftp", lambda data: None, lambda error: None)
        except Exception:
            return str(count)
    return f"{CHANNELS_MAX} or more"


# ---- the mount ----


class Mounted:
    """A fresh directory: ``path`` on the mount, ``served`` on the server's side."""

    def __init__(self, path: Path, served: Path) -> None:
        self.path = path
        self.served = served

    def write(self, name: str, data: bytes = b"0123456789") -> Path:
        (self.path / name).write_bytes(data)
        return self.path / name

    def holds(self, name: str, data: bytes) -> str:
        """The file has these bytes, on the server and here."""

        def there() -> bool:
            try:
                return (self.served / name).read_bytes() == data
            except FileNotFoundError:
                return False

        try:
            wait_until(there, _ARRIVES_S, "the bytes")
        except TimeoutError:
            return f"{WRONG}: other bytes on the server"
        return LOCAL if (self.path / name).read_bytes() == data else f"{WRONG}: other bytes on the mount"


def _is(right: bool) -> str:
    return LOCAL if right else WRONG


def _stores(here: Mounted) -> str:
    data = noise(1_000_001)
    return here.holds(here.write("f", data).name, data)


def _fsyncs(here: Mounted) -> str:
    with opened(here.path / "f", os.O_WRONLY | os.O_CREAT) as fd:
        os.write(fd, b"abc")
        os.fsync(fd)
    return here.holds("f", b"abc")


def _writes_after_fsync(here: Mounted) -> str:
    with opened(here.path / "f", os.O_WRONLY | os.O_CREAT) as fd:
        os.write(fd, b"abc")
        os.fsync(fd)
        os.write(fd, b"def")
    return here.holds("f", b"abcdef")


def _kept(here: Mounted, act: Callable[[Path], object], data: bytes) -> str:
    """``act`` makes ``data`` of a file of ten digits, or is refused and leaves it as it is."""
    path = here.write("f")
    if here.holds("f", b"0123456789") != LOCAL:
        return f"{WRONG}: not stored"
    try:
        act(path)
    except OSError as error:
        name = errno.errorcode[error.errno or 0]
        return name if here.holds("f", b"0123456789") == LOCAL else f"{WRONG}: {name}, and the file is lost"
    return here.holds("f", data)


def _appends(here: Mounted) -> str:
    def act(path: Path) -> None:
        with path.open("ab") as file:
            file.write(b"++")

    return _kept(here, act, b"0123456789++")


def _patches(here: Mounted) -> str:
    def act(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(3)
            file.write(b"XX")
            file.seek(0)
            assert file.read() == b"012XX56789"

    return _kept(here, act, b"012XX56789")


def _renames_over(here: Mounted) -> str:
    here.write("new", b"new")
    here.write("old", b"old")
    os.rename(here.path / "new", here.path / "old")
    return here.holds("old", b"new")


def _merges(here: Mounted) -> str:
    for name in ("one", "two"):
        (here.path / name).mkdir()
        here.write(f"{name}/{name}")
    try:
        os.rename(here.path / "one", here.path / "two")
    except OSError as error:
        return _is(error.errno == errno.ENOTEMPTY)
    return f"{WRONG}: merged"


def _replaces_empty(here: Mounted) -> str:
    (here.path / "one").mkdir()
    (here.path / "two").mkdir()
    here.write("one/f")
    os.rename(here.path / "one", here.path / "two")
    return _is((here.served / "two" / "f").exists())


def _links(here: Mounted) -> str:
    os.link(here.write("f"), here.path / "g")
    return _is(os.path.samefile(here.served / "f", here.served / "g"))


def _symlinks(here: Mounted) -> str:
    here.write("f")
    for name, target in (("l", "f"), ("m", "nowhere")):
        os.symlink(target, here.path / name)
        if os.readlink(here.served / name) != target or os.readlink(here.path / name) != target:
            return WRONG
    return LOCAL


def _renames_links(here: Mounted) -> str:
    """To a new name, over links and over a file, and a file over a link: what they lead to stays as it is."""
    for name in ("full", "empty"):
        (here.path / name).mkdir()
    here.write("full/f")
    here.write("file", b"precious")
    targets = {"one": "full", "two": "empty", "three": "file", "four": "full", "five": "nowhere"}
    for name, target in targets.items():
        os.symlink(target, here.path / name)
    here.write("replaced", b"old")
    here.write("new", b"new")
    for old, new in (("one", "moved"), ("two", "moved"), ("three", "replaced"), ("new", "four")):
        os.rename(here.path / old, here.path / new)
    # ProFTPD's READLINK tells absolute targets, and a link that is made anew may have what it tells: where it leads counts.
    links = {
        path.name: os.path.normpath(here.served / os.readlink(path))
        for path in here.served.iterdir()
        if path.is_symlink()
    }
    leads = {"moved": "empty", "replaced": "file", "five": "nowhere"}
    return _is(
        links == {name: str(here.served / target) for name, target in leads.items()}
        and (here.served / "file").read_bytes() == b"precious"
        and (here.served / "four").read_bytes() == b"new"
        and os.listdir(here.served / "full") == ["f"]
        and os.listdir(here.served / "empty") == []
    )


def _links_a_link(here: Mounted) -> str:
    here.write("f")
    os.symlink("f", here.path / "l")
    os.link(here.path / "l", here.path / "m", follow_symlinks=False)
    return _is((here.served / "m").is_symlink() and (here.served / "f").stat().st_nlink == 1)


def _their_link(here: Mounted) -> str:
    (here.served / "precious").mkdir()
    (here.served / "l").symlink_to("precious")
    if not stat.S_ISLNK(os.lstat(here.path / "l").st_mode):
        return f"{WRONG}: shown as what it leads to"
    target = os.readlink(here.path / "l")
    return LOCAL if target == "precious" else "the target is absolute"


def _chmods(here: Mounted) -> str:
    os.chmod(here.write("f"), 0o600)
    with opened(here.path, os.O_RDONLY) as fd:
        os.fsync(fd)
    return LOCAL if (here.served / "f").stat().st_mode & 0o777 == 0o600 else "the server ignores it"


def _times(here: Mounted) -> str:
    os.utime(here.write("f"), (5, 6))
    with opened(here.path, os.O_RDONLY) as fd:
        os.fsync(fd)
    return _is((here.served / "f").stat().st_mtime == 6)


def _link_times(here: Mounted) -> str:
    os.symlink("nowhere", here.path / "l")
    os.utime(here.path / "l", (5, 6), follow_symlinks=False)
    return _is((here.served / "l").lstat().st_mtime == 6)


def _exclusively(here: Mounted) -> str:
    os.listdir(here.path)  # known to be empty
    (here.served / "lock").write_bytes(b"theirs")
    try:
        os.close(os.open(here.path / "lock", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return LOCAL
    return "a name that another client took meanwhile is opened"


def _lists(here: Mounted) -> str:
    for count in range(2000):
        (here.served / f"{count:04d}").touch()
    return _is(sorted(os.listdir(here.path)) == sorted(os.listdir(here.served)))


def _space(here: Mounted) -> str:
    return _is(os.statvfs(here.path).f_bavail > 0)


def _odd(here: Mounted) -> str:
    names = {b"\xff\xfe", b"a\nb", b" ", b"-rf", b"x" * 255}
    for name in names:
        here.write(os.fsdecode(name), name)
    wait_until(lambda: set(os.listdir(bytes(here.served))) == names, _ARRIVES_S, "the names")
    changed = sorted(names - set(os.listdir(bytes(here.path))))
    return f"listed under another name: {', '.join(map(repr, changed))}" if changed else LOCAL


def _unlinked(here: Mounted) -> str:
    path = here.write("f")
    with path.open("rb") as file:
        path.unlink()
        return _is(file.read() == b"0123456789")


MOUNT: Dict[str, Callable[[Mounted], str]] = {
    "write, close, read": _stores,
    "fsync": _fsyncs,
    "fsync, then write on": _writes_after_fsync,
    "append": _appends,
    "change in the middle, and read it": _patches,
    "cut a file": lambda here: _kept(here, lambda path: os.truncate(path, 4), b"0123"),
    "extend a file": lambda here: _kept(here, lambda path: os.truncate(path, 12), b"0123456789\0\0"),
    "rename over a file": _renames_over,
    "rename a directory over an empty one": _replaces_empty,
    "rename a directory over a full one fails": _merges,
    "create exclusively": _exclusively,
    "hard link": _links,
    "symbolic link": _symlinks,
    "rename symbolic links": _renames_links,
    "hard link of a symbolic link": _links_a_link,
    "another's symbolic link": _their_link,
    "chmod": _chmods,
    "times": _times,
    "times of a symbolic link": _link_times,
    "read after unlink": _unlinked,
    "a directory of 2000": _lists,
    "names of any bytes": _odd,
    "df": _space,
}


def mount_findings(mount: Mount) -> Dict[str, str]:
    """What comes of it there, by the names of ``MOUNT``."""
    found = {}
    for number, (name, act) in enumerate(MOUNT.items()):
        (mount.served / f"here {number}").mkdir()
        try:
            found[name] = act(Mounted(mount.path / f"here {number}", mount.served / f"here {number}"))
        except OSError as error:
            found[name] = errno.errorcode.get(error.errno or 0, str(error))
    return found


def findings(server: Any, tmp_dir: Path) -> Dict[str, Dict[str, str]]:
    """Of a running server: ``{"server": ..., "mount": ...}``. Raises FsError, OSError where it is not what it should be."""
    asked = server_findings(server)
    with Mount(server, tmp_dir / "mounts") as mount:  # not beside what a server lists that serves all
        done = mount_findings(mount)
        status = mount.unmount()
        if status:
            raise FsError(errno.EIO, f"the mount ended with {status}: {mount.log_text()}")
    return {"server": asked, "mount": done}
