"""An sqlite database on the mount: many small transactions, several connections, every journal mode that needs no shared memory."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Iterator

import pytest

from support.mount import Mount


@contextlib.contextmanager
def connection(path: Path) -> Iterator[sqlite3.Connection]:
    database = sqlite3.connect(path, timeout=30.0, isolation_level=None)
    try:
        yield database
    finally:
        database.close()


def transact(database: sqlite3.Connection, number: int) -> None:
    database.execute("BEGIN IMMEDIATE")
    database.execute("INSERT INTO entries VALUES (?, ?)", (number, b"%d" % number * (1 + number % 700)))
    if number % 3 == 0:
        database.execute("UPDATE entries SET data = ? WHERE number = ?", (b"updated", number // 2))
    if number % 10 == 0:
        database.execute("DELETE FROM entries WHERE number = ?", (number // 5,))
    database.execute("ROLLBACK" if number % 50 == 49 else "COMMIT")


def dump(path: Path) -> str:
    with connection(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return "\n".join(database.iterdump())


def build(path: Path, journal: str, transactions: int) -> None:
    with connection(path) as database:
        assert database.execute(f"PRAGMA journal_mode = {journal}").fetchone() == (journal,)
        database.execute("CREATE TABLE entries (number INTEGER PRIMARY KEY, data BLOB)")
        for number in range(transactions):
            transact(database, number)


@pytest.mark.parametrize(("journal", "transactions"), [("delete", 1000), ("truncate", 200), ("persist", 200)])
def test_transactions(mount: Mount, tmp_path: Path, journal: str, transactions: int) -> None:
    build(mount.path / "database", journal, transactions)
    build(tmp_path / "twin", journal, transactions)
    expected = dump(tmp_path / "twin")
    assert dump(mount.path / "database") == expected
    assert (mount.path / "database").read_bytes() == (mount.served / "database").read_bytes()
    assert mount.unmount() == 0
    assert dump(mount.served / "database") == expected


def test_memory_mapped_reads(mount: Mount, tmp_path: Path) -> None:
    build(mount.path / "database", "delete", 100)
    build(tmp_path / "twin", "delete", 100)
    with connection(mount.path / "database") as database:
        database.execute("PRAGMA mmap_size = 10000000")
        transact(database, 1000)
    with connection(tmp_path / "twin") as database:
        transact(database, 1000)
    assert dump(mount.served / "database") == dump(tmp_path / "twin")


def test_vacuum(mount: Mount) -> None:
    build(mount.path / "database", "delete", 100)
    before = dump(mount.path / "database")
    with connection(mount.path / "database") as database:
        database.execute("VACUUM")
    assert dump(mount.path / "database") == before
    assert (mount.path / "database").read_bytes() == (mount.served / "database").read_bytes()


def test_two_connections_take_turns(mount: Mount) -> None:
    build(mount.path / "database", "delete", 10)
    with connection(mount.path / "database") as one, connection(mount.path / "database") as two:
        for number in range(100, 200):
            transact(one if number % 2 else two, number)
            counts = [each.execute("SELECT count(*) FROM entries").fetchone() for each in (one, two)]
            assert counts[0] == counts[1]
    dump(mount.served / "database")
