from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Callable, List

import pytest


@pytest.fixture
def request_many() -> Callable[[List[Callable[[], object]]], None]:
    """Run functions at once, each in a thread; the first error is raised after all have ended."""

    def run_all(calls: List[Callable[[], object]]) -> None:
        with ThreadPoolExecutor(len(calls)) as pool:
            futures = [pool.submit(call) for call in calls]
        for future in futures:
            future.result()

    return run_all
