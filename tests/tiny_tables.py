"""The paper's tables with students and budgets small enough for tests; axes, teachers and streams are the real ones.

Run as a program it forks a process per call that works on a folder until it is killed (see test_reproduce.py).
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from flowfast.experiments.paper import TABLES, Request, Table, reproduce

SMALL: dict[str, Any] = {"components": 3, "dim": 4, "width": 8, "steps": 40, "batch_size": 16, "evaluation_rows": 300}
TINY = {number: replace(table, base=replace(table.base, **SMALL)) for number, table in TABLES.items()}
KILLED = Request(tables=(3, 5), seeds=2, only=("sigma0=0.1, B=0.1", "grid=uniform, segments=2"))

EVERY = 0.02  # seconds between checkpoints: several per training


def use_tiny_tables(patch: pytest.MonkeyPatch | None = None) -> None:
    """Put the tiny tables in the real ones' place."""
    for number, table in TINY.items():
        if patch is None:
            cast(dict[int, Table], TABLES)[number] = table
        else:
            patch.setitem(cast(dict[int, Table], TABLES), number, table)


@pytest.fixture(autouse=True)
def tiny_tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny tables and one thread: networks this small train slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    use_tiny_tables(monkeypatch)
    yield
    torch.set_num_threads(threads)


def work_and_die(folder: Path, kills: int, seed: int) -> int:
    """Work on `folder` in forked processes, each killed with SIGKILL at a random moment, then once to the end.

    Returns:
        How many of them were killed before they had finished.
    """
    torch.set_num_threads(1)
    use_tiny_tables()
    reproduce(
        KILLED, folder.with_name("warm"), checkpoint_every=EVERY
    )  # what a first call loads is loaded before forking
    start = time.perf_counter()
    reproduce(KILLED, folder.with_name("whole"), checkpoint_every=EVERY)
    needed, chance, killed = time.perf_counter() - start, random.Random(seed), 0
    for attempt in range(kills + 1):
        child = os.fork()
        if child == 0:
            reproduce(KILLED, folder, checkpoint_every=EVERY)
            os._exit(0)
        if attempt < kills:
            time.sleep(chance.uniform(0.02, 0.2) * needed)
            os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    return killed


if __name__ == "__main__":
    print(work_and_die(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
