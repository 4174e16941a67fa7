"""New keys in the middle of a transfer: by volume and by time, as RekeyLimit says here or on the server, under every cipher.

One program writes a file while another reads another, so that keys change with data on its way in both directions.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, NamedTuple

import pytest

from sftpmount.ssh.policy import is_aead, make_policy
from support.mount import Mount
from support.sshd import Sshd

MIB = 2**20
LONG_BYTES, QUICK_BYTES = 1024 * MIB, 12 * MIB
LONG_VOLUME_BYTES, QUICK_VOLUME_BYTES = 64 * MIB, MIB
INTERVAL_S = 1
LIMIT_S = 600.0

_POLICY = make_policy()
SUITES = [
    (cipher, mac)
    for cipher in _POLICY.ciphers
    for mac in (_POLICY.macs[:1] if is_aead(cipher) else _POLICY.macs)
]


class Case(NamedTuple):
    cipher: str
    mac: str  # where the cipher needs one
    whose: str  # RekeyLimit: "ours" or "the server's"
    by: str  # "volume" or "time"

    def __str__(self) -> str:
        suite = self.cipher if is_aead(self.cipher) else f"{self.cipher} with {self.mac}"
        return f"{suite}, {self.whose} by {self.by}"


LONG = [
    Case(*suite, whose, by)
    for suite in SUITES
    for whose in ("ours", "the server's")
    for by in ("volume", "time")
]
QUICK = [Case(*suite, whose, "volume") for suite, whose in zip(SUITES[1:4], ("the server's", "ours", "ours"))]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Path]]:
    """A file of so many random bytes, no block like another."""
    made: Dict[int, Path] = {}
    directory = tmp_path_factory.mktemp("sources")

    def make(size: int) -> Path:
        if size not in made:
            made[size] = directory / str(size)
            with made[size].open("wb") as file:
                for _ in range(size // MIB):
                    file.write(os.urandom(MIB))
        return made[size]

    yield make
    for path in made.values():
        path.unlink()  # pytest keeps the directories of several runs


def transfer(mount: Mount, source: Path) -> float:
    """Write a copy of ``source`` and read another, at the same time; returns the seconds that both took."""
    os.link(source, mount.served / "there")
    began = time.monotonic()
    writer = subprocess.Popen(["cp", source, mount.path / "written"])
    try:
        subprocess.run(["cmp", source, mount.path / "there"], check=True, timeout=LIMIT_S)
        assert writer.wait(timeout=LIMIT_S) == 0
    finally:
        writer.kill()
        writer.wait()
    seconds = time.monotonic() - began
    subprocess.run(["cmp", source, mount.served / "written"], check=True, timeout=LIMIT_S)
    (mount.served / "written").unlink()
    return seconds


def check(case: Case, tmp_path: Path, source: Path, volume_bytes: int) -> None:
    limit = str(volume_bytes) if case.by == "volume" else f"default {INTERVAL_S}s"
    ours = case.whose == "ours"
    config = f"Ciphers {case.cipher}\nMACs {case.mac}\n" + ("" if ours else f"RekeyLimit {limit}\n")
    options = ["-o", "log_level=debug", *(["-o", f"RekeyLimit={limit}"] if ours else [])]
    with Sshd(tmp_path, config, hardened=False) as sshd, Mount(sshd, tmp_path, *options) as mount:
        seconds = transfer(mount, source)
        log = mount.log_text()
        assert mount.unmount() == 0
    assert len(re.findall("connected to .* port ", log)) == 1, "a connection was lost"
    assert f" {case.cipher}" in log and (is_aead(case.cipher) or f"with {case.mac}" in log)
    renewals = log.count("Switch to new keys") - 1
    if case.by == "volume":
        wanted = (
            source.stat().st_size // volume_bytes * 3 // 4
        )  # what is on its way when keys change counts for the next
    else:
        wanted = int(seconds / INTERVAL_S / 2)
        assert wanted >= 1
    print(f"{case}: {renewals} renewals in {seconds:.1f} s, at least {wanted} wanted")
    assert renewals >= wanted


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_new_keys_during_a_transfer(case: Case, tmp_path: Path, source: Callable[[int], Path]) -> None:
    check(case, tmp_path, source(QUICK_BYTES), QUICK_VOLUME_BYTES)


@pytest.mark.long
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("case", LONG, ids=str)
def test_new_keys_during_a_long_transfer(case: Case, tmp_path: Path, source: Callable[[int], Path]) -> None:
    check(case, tmp_path, source(LONG_BYTES), LONG_VOLUME_BYTES)


def test_every_cipher_and_mac_is_tried() -> None:
    assert {case.cipher for case in LONG} == set(_POLICY.ciphers)
    assert {case.mac for case in LONG if not is_aead(case.cipher)} == set(_POLICY.macs)
