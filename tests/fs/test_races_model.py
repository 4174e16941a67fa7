"""Random work of one program on a small tree, while answers to questions of others come late, against a model of plain dicts.

Nobody but this mount changes anything, so each answer that the program gets has exactly one value, whatever is taken in when.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import stat
import threading
from typing import Any, Callable, Dict, List, Optional

import pytest

from fs.conftest import Clock, Mounted
from sftp.fake_server import FakeServer
from sftpmount import waiting
from sftpmount.errors import FsError
from sftpmount.fs.files_ahead import AHEAD_S
from sftpmount.fs.handles import Handle

SECONDS = 20.0
# What a thread of the background is given: it may wait for what the program is doing just now.
BLOCKED_S = 0.02
BACKGROUND_MAX = 3
DIRECTORIES = [b"", b"/d", b"/e", b"/d/s"]
PATHS = [directory + b"/" + name for directory in DIRECTORIES for name in (b"a", b"b")]
PLACES = [*DIRECTORIES[1:], *PATHS]
# Other programs' and our own threads' questions; all of them end in one of ASKED.
QUESTIONS: Dict[str, Callable[[Any, bytes], object]] = {
    "listing ahead": lambda fs, path: fs._listings._list(path.rpartition(b"/")[0] or b"/", 1000),
    "listing": lambda fs, path: fs.readdir(path.rpartition(b"/")[0] or b"/"),
    "look": lambda fs, path: fs.getattr(path),
    "file ahead": lambda fs, path: fs._files_ahead._fetch([path]),
}
ASKED = ("list_on", "lstat", "read_whole_on")
DONE = ("mkdir", "rmdir", "unlink", "rename", "symlink", "link", "setstat", "open", "fsetstat")


class File:
    """A file of the program's; ``mtime`` where it has set it since it wrote last."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.mode = 0o644
        self.mtime: Optional[int] = None


class Opened:
    def __init__(self, handle: Handle, file: File, path: bytes, writable: bool) -> None:
        self.handle = handle
        self.file = file
        self.path = path
        self.writable = writable


class Question(threading.Thread):
    """Asks the server, and holds the answer back until ``let_go``."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.act = act
        self.is_answered = threading.Event()
        self.may_go = threading.Event()
        self.error: Optional[BaseException] = None
        self.start()
        self.is_answered.wait(BLOCKED_S)

    def run(self) -> None:
        try:
            self.act()
        except FsError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                self.error = error
        except BaseException as error:
            self.error = error
        finally:
            self.is_answered.set()

    def hold(self) -> None:
        self.is_answered.set()
        assert self.may_go.wait(SECONDS)


class Work:
    """``rng`` decides everything but how threads are scheduled."""

    def __init__(self, rng: random.Random, mounted: Mounted, server: FakeServer, clock: Clock) -> None:
        self.rng = rng
        self.fs: Any = mounted.fs
        self.server = server
        self.clock = clock
        self.log: List[str] = []
        self.tree: Dict[bytes, Any] = {}  # path -> File, "dir", or a symlink's target
        self.opened: List[Opened] = []
        self.questions: List[Question] = []
        self.hidden = 0
        self.number = 0
        for name in (*ASKED, *DONE):
            self.wrap(mounted.remote, name)

    def end_of_operation(self) -> Callable[[], bool]:
        number = self.number
        return lambda: self.number != number

    def wrap(self, remote: Any, name: str) -> None:
        method = getattr(remote, name)

        def wrapped(*arguments: Any, **more: Any) -> Any:
            thread = threading.current_thread()
            if isinstance(thread, Question):
                try:
                    return method(*arguments, **more)
                finally:
                    if name in ASKED:
                        thread.hold()
            if thread is not threading.main_thread():
                return method(*arguments, **more)
            self.meddle(f"before {name}")
            try:
                return method(*arguments, **more)
            finally:
                self.meddle(f"behind {name}")

        setattr(remote, name, wrapped)

    def meddle(self, when: str) -> None:
        """Something is asked, or an answer is let go, the newest as well as older ones."""
        dice = self.rng.random()
        if dice < 0.3 and len(self.questions) < BACKGROUND_MAX:
            name, path = self.rng.choice(list(QUESTIONS)), self.rng.choice(PLACES)
            self.log.append(f"    {when}: {name} {path!r}")
            self.questions.append(Question(lambda: QUESTIONS[name](self.fs, path)))
        elif dice < 0.6 and self.questions:
            which = self.rng.randrange(len(self.questions))
            self.log.append(f"    {when}: answer {which} of {len(self.questions)}")
            self.let_go(self.questions.pop(which))

    def let_go(self, question: Question, *, is_last: bool = False) -> None:
        question.may_go.set()
        question.join(SECONDS if is_last else BLOCKED_S)
        if is_last:
            assert not question.is_alive()
        if question.error is not None:
            raise question.error

    # -- the program ----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        steps = [
            self.create, self.create, self.mkdir, self.mkdir, self.rmdir, self.unlink, self.unlink, self.rename, self.rename,
            self.rename, self.link, self.symlink, self.chmod, self.utimens, self.truncate, self.open, self.open, self.write,
            self.write, self.read, self.fsync, self.close, self.close, self.look, self.list, self.wait, self.cut,
            self.another,
        ]  # fmt: skip
        act = self.rng.choice(steps)
        self.number += 1
        self.log.append(act.__name__)
        act()
        self.meddle("between")
        self.check()

    def of(self, *kinds: str) -> List[bytes]:
        return [path for path, what in self.tree.items() if self.kind(what) in kinds]

    @staticmethod
    def kind(what: Any) -> str:
        return "file" if isinstance(what, File) else "dir" if what == "dir" else "link"

    def some(self, paths: List[bytes]) -> Optional[bytes]:
        if not paths:
            return None
        path = self.rng.choice(paths)
        self.log.append(f"  {path!r}")
        if self.rng.random() < 0.5:
            self.see(path)
        return path

    def free(self) -> Optional[bytes]:
        path = self.some([p for p in PLACES if p not in self.tree and self.has_parent(p)])
        if path is not None:
            self.see(path)  # the kernel looks at what it does not know to be there
        return path

    def has_parent(self, path: bytes) -> bool:
        parent = path.rpartition(b"/")[0]
        return not parent or self.tree.get(parent) == "dir"

    def below(self, path: bytes) -> List[bytes]:
        return [each for each in self.tree if each.startswith(path + b"/")]

    def create(self) -> None:
        path = self.free()
        if path is not None:
            flags = os.O_RDWR | os.O_CREAT | self.rng.choice([0, os.O_EXCL, os.O_TRUNC])
            file = self.tree[path] = File()
            self.opened.append(Opened(self.fs.create(path, flags, 0o644), file, path, True))

    def mkdir(self) -> None:
        path = self.some([p for p in DIRECTORIES[1:] if p not in self.tree and self.has_parent(p)])
        if path is not None:
            self.fs.mkdir(path, 0o755)
            self.tree[path] = "dir"

    def rmdir(self) -> None:
        path = self.some(self.of("dir"))
        if path is None:
            return
        if self.below(path):
            with pytest.raises(FsError) as raised:
                self.fs.rmdir(path)
            assert raised.value.errno == errno.ENOTEMPTY
        else:
            self.fs.rmdir(path)
            del self.tree[path]

    def unlink(self) -> None:
        path = self.some([path for path in self.of("file", "link") if not self.is_last_of_open(path)])
        if path is not None:
            self.take_away(path)

    def is_last_of_open(self, path: bytes) -> bool:
        """libfuse does not know that it is open, by another name that is gone: it does not survive a lost connection then."""
        users = [each.path for each in self.opened if each.file is self.tree[path]]
        others = [each for each in self.tree if self.tree[each] is self.tree[path] and each != path]
        return bool(users) and path not in users and not others

    def take_away(self, path: bytes) -> None:
        """As libfuse does: what is open by that name is renamed."""
        users = [each for each in self.opened if each.path == path]
        if not users:
            self.fs.unlink(path)
        else:
            self.hidden += 1
            away = path.rpartition(b"/")[0] + b"/.fuse_hidden%04d" % self.hidden
            self.fs.rename(path, away)
            for each in users:
                each.path = away
        del self.tree[path]

    def rename(self) -> None:
        old = self.some(list(self.tree))
        if old is None:
            return
        new = self.some([path for path in PLACES if self.may_replace(old, path)])
        if new is None:
            return
        self.see(new)
        if any(each.path == new for each in self.opened):
            self.take_away(new)
        self.fs.rename(old, new)
        for path in [old, *self.below(old)]:
            self.tree[new + path[len(old) :]] = self.tree.pop(path)
        for each in self.opened:
            if each.path == old or each.path.startswith(old + b"/"):
                each.path = new + each.path[len(old) :]

    def may_replace(self, old: bytes, new: bytes) -> bool:
        if not self.has_parent(new) or (new + b"/").startswith(old + b"/"):
            return False
        if new not in self.tree:
            return self.tree[old] != "dir" or new in DIRECTORIES
        is_other = self.tree[new] is not self.tree[old] and "dir" not in (self.tree[new], self.tree[old])
        return is_other and not self.is_last_of_open(new)

    def link(self) -> None:
        old, new = self.some(self.of("file")), self.free()
        if old is not None and new is not None:
            self.fs.link(old, new)
            self.tree[new] = self.tree[old]

    def symlink(self) -> None:
        path = self.free()
        if path is not None:
            target = b"to-%d" % self.rng.randrange(1000)
            self.fs.symlink(target, path)
            self.tree[path] = target

    def chmod(self) -> None:
        path = self.some(self.of("file"))
        if path is not None:
            self.tree[path].mode = mode = self.rng.choice([0o600, 0o640, 0o644])
            self.fs.chmod(path, mode)

    def utimens(self) -> None:
        path = self.some(self.of("file"))
        if path is not None:
            mtime = self.rng.randrange(1000, 2000)
            self.fs.utimens(path, mtime, mtime)
            self.tree[path].mtime = mtime

    def truncate(self) -> None:
        path = self.some(self.of("file"))
        if path is not None:
            length = self.rng.choice([0, 3, 10])
            self.fs.truncate(path, length)
            self.changed(self.tree[path], length)

    def changed(self, file: File, length: int) -> None:
        del file.content[length:]
        file.content.extend(bytes(length - len(file.content)))
        file.mtime = None

    def open(self) -> None:
        path = self.some(self.of("file"))
        if path is not None:
            self.open_at(path, self.rng.choice([os.O_RDONLY, os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC]))

    def open_at(self, path: bytes, flags: int) -> None:
        handle = self.fs.open(path, flags)
        self.opened.append(Opened(handle, self.tree[path], path, flags != os.O_RDONLY))
        if flags & os.O_TRUNC:
            self.changed(self.tree[path], 0)

    def one(self, *, writable: bool = False) -> Optional[Opened]:
        opened = [each for each in self.opened if each.writable or not writable]
        if not opened:
            return None
        each = self.rng.choice(opened)
        self.log.append(f"  {each.path!r}")
        return each

    def write(self) -> None:
        opened = self.one(writable=True)
        if opened is not None:
            data = b"%03d" % self.rng.randrange(1000) * self.rng.choice([1, 3])
            offset = self.rng.choice([0, 0, 2])
            self.fs.write(opened.handle, data, offset)
            content = opened.file.content
            content.extend(bytes(max(0, offset - len(content))))
            content[offset : offset + len(data)] = data
            opened.file.mtime = None

    def read(self) -> None:
        opened = self.one()
        if opened is not None:
            assert self.fs.read(opened.handle, 100, 0) == opened.file.content

    def fsync(self) -> None:
        opened = self.one(writable=True)
        if opened is not None:
            self.fs.fsync(opened.handle)
            for path, what in self.tree.items():
                if what is opened.file:
                    assert self.server.disk(b"/home" + path) == opened.file.content

    def close(self) -> None:
        opened = self.one()
        if opened is not None:
            self.opened.remove(opened)
            self.fs.flush(opened.handle)
            self.fs.release(opened.handle)
            if b"/.fuse_hidden" in opened.path and not any(each.path == opened.path for each in self.opened):
                with contextlib.suppress(FsError):  # it went with its last handle
                    self.fs.unlink(opened.path)

    def look(self) -> None:
        path = self.rng.choice(PLACES)
        self.log.append(f"  {path!r}")
        self.see(path)

    def see(self, path: bytes) -> None:
        what = self.tree.get(path)
        try:
            shown = self.fs.getattr(path)
        except FsError as error:
            assert error.errno == errno.ENOENT and what is None
            return
        assert what is not None, "it is gone"
        kinds = {"file": stat.S_ISREG, "dir": stat.S_ISDIR, "link": stat.S_ISLNK}
        assert kinds[self.kind(what)](shown.mode)
        if isinstance(what, File):
            assert shown.size == len(what.content)
            assert stat.S_IMODE(shown.mode) == what.mode
            assert what.mtime in (None, shown.mtime)
            users = {each.handle.node.ino for each in self.opened if each.file is what}
            assert users <= {shown.ino}
        elif what != "dir":
            assert self.fs.readlink(path) == what

    def list(self) -> None:
        directory = self.rng.choice([b"/", *self.of("dir")])
        self.log.append(f"  {directory!r}")
        above = directory.rstrip(b"/")
        names = {path[len(above) + 1 :] for path in self.tree if path.rpartition(b"/")[0] == above}
        assert {name for name, _, _ in self.fs.readdir(directory)} == names

    # -- the world ------------------------------------------------------------------------------------------------------

    def wait(self) -> None:
        self.clock.s += self.rng.choice([0.3, 1, 6, 30])

    def cut(self) -> None:
        if self.rng.random() < 0.3:
            self.server.cut()

    def another(self) -> None:
        """Another client puts a file there, and the program opens it: from then on it is known."""
        links = [what for what in self.tree.values() if isinstance(what, File)]
        files = [
            path for path, what in self.tree.items()
            if isinstance(what, File) and links.count(what) == 1 and all(what is not each.file for each in self.opened)
        ]  # fmt: skip
        path = self.some(files + [p for p in PLACES if p not in self.tree and self.has_parent(p)])
        if path is None:
            return
        self.fs.fsyncdir(b"/")
        node = self.fs._ns.get(path)
        if node is not None and self.fs._ns.is_ours(node):
            return
        self.clock.s += AHEAD_S + 0.1
        file = self.tree[path] = File()
        file.content += b"another's %d" % self.number
        file.mtime = 10_000 + self.number
        self.server.make(b"/home" + path, bytes(file.content), mtime=file.mtime)
        self.open_at(path, self.rng.choice([os.O_RDONLY, os.O_RDWR]))
        self.see(path)

    def check(self) -> None:
        self.fs._ns.check_invariants()
        for each in self.opened:
            names = [path for path, what in self.tree.items() if what is each.file]
            path = self.fs._ns.path_of(each.handle.node)
            assert path in names if names else path is None, (path, names)

    def end(self) -> None:
        for question in self.questions:
            self.let_go(question, is_last=True)
        self.questions.clear()
        self.check()
        for path in PLACES:
            self.see(path)
        while self.opened:
            self.close()
        assert self.fs.drain() == []
        for path, what in self.tree.items():
            if isinstance(what, File):
                assert self.server.content(b"/home" + path) == what.content
                assert stat.S_IMODE(self.server.at(b"/home" + path).mode) == what.mode
                assert what.mtime in (None, self.server.at(b"/home" + path).mtime)
                handle = self.fs.open(path, os.O_RDONLY)
                assert self.fs.read(handle, 100, 0) == what.content
                self.fs.release(handle)


def work(monkeypatch: pytest.MonkeyPatch, seed: int, steps: int) -> None:
    clock = Clock()
    server = FakeServer(now=clock)
    mounted = Mounted(server, b"", clock, leaps=True, lanes=1)
    task = Work(random.Random(seed), mounted, server, clock)
    monkeypatch.setattr(waiting, "end_of_operation", task.end_of_operation)
    try:
        for _ in range(steps):
            task.step()
        task.end()
    except BaseException:
        print(f"seed {seed}", *task.log, sep="\n")
        raise
    finally:
        for question in task.questions:
            question.may_go.set()
        mounted.close()
        server.close()


@pytest.mark.parametrize("seed", range(60, 80))
def test_whenever_answers_come(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    work(monkeypatch, seed, 60)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_whenever_answers_come_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(1000, 2500):
        work(monkeypatch, seed, 100)
