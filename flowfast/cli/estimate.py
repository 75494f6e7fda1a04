"""How long a teacher set will take: short trials of computing, hashing and writing; nothing that remains is written."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flowfast.cli.jobs import cores
from flowfast.dataset.generate import check_claim
from flowfast.dataset.plan import DTYPES, Plan
from flowfast.dataset.receipts import missing_shards
from flowfast.dataset.shards import make_shard, row_bytes
from flowfast.dataset.store import LocalStore, Store
from flowfast.mixture import GaussianMixture
from flowfast.report.numbers import seconds

_COMPUTING = 0.3, 2_048, 2**20  # of a trial: seconds that are long enough, first and last number of rows
_HASHING, _WRITING = (0.05, 2**22, 2**26), (0.1, 2**22, 2**26)  # the same in bytes
_BLOCK = 2**22  # bytes of one write


def estimate(store: Store, plan: Plan, mixture: GaussianMixture, workers: int) -> dict[str, Any]:
    """What is missing, free space, and minutes of what is left to do.

    Args:
        store, plan: of the set. mixture: the plan's, in any dtype.
        workers: processes that share the work; one computes on all of torch's threads, each of several on one.

    Returns:
        missing, free_bytes, minutes in all; parts, the minutes of computing, hashing and writing (None where writing
        cannot be tried), and limit, the part that decides. Shards are written while others are computed and hashed.

    Raises:
        ValueError: see `check_claim`.
    """
    missing = missing_shards(store, plan).count(1) if check_claim(store, plan) else plan.n_shards
    rows = min(plan.rows, missing * plan.rows_per_shard)
    size, at_once = rows * row_bytes(plan, mixture.dim), min(workers, cores())
    threads = 1 if workers > 1 else torch.get_num_threads()
    computing = rows * _compute(plan, mixture.to(DTYPES[plan.dtype]), threads) / at_once
    each = _write(store)
    hashing, writing = size * _hash() / (at_once * threads), size * (each or 0.0)
    parts = {"computing": computing / 60, "hashing": hashing / 60, "writing": None if each is None else writing / 60}
    return {
        "missing": missing,
        "free_bytes": store.free_bytes(),
        "minutes": max(computing + hashing, writing) / 60,
        "parts": parts,
        "limit": "writing"
        if writing > computing + hashing
        else max("computing", "hashing", key=lambda n: parts[n] or 0),
    }


def sentence(facts: dict[str, Any]) -> str:
    """The estimate in words."""
    parts = [f"{name} {'unknown' if part is None else seconds(60 * part)}" for name, part in facts["parts"].items()]
    said = "{rows:,} rows in {shards:,} shards, {bytes:,} bytes; {missing:,} shards are missing".format(**facts)
    if facts["missing"]:
        said += f", about {seconds(60 * facts['minutes'])}, limited by {facts['limit']} ({', '.join(parts)})"
    free = facts["free_bytes"]
    return f"{said}; free bytes: {'unknown' if free is None else f'{free:,}'}"


def _compute(plan: Plan, mixture: GaussianMixture, threads: int) -> float:
    """Seconds per row on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _slope(
            lambda n: make_shard(dataclasses.replace(plan, rows=n, rows_per_shard=n), mixture, 0), *_COMPUTING
        )
    finally:
        torch.set_num_threads(before)


def _hash() -> float:
    """Seconds per byte of SHA-256."""
    block = os.urandom(_BLOCK)
    return _slope(lambda n: [hashlib.sha256(block) for _ in range(n // _BLOCK)], *_HASHING)


def _write(store: Store) -> float | None:
    """Seconds per byte written and synced, beside the set's folder; None where that cannot be tried."""
    if not isinstance(store, LocalStore):
        return None
    place = Path(store.location).absolute()
    if not place.is_mount():
        place = next(parent for parent in place.parents if parent.exists())
    block = os.urandom(_BLOCK)  # no file system can make it shorter
    try:
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:  # without a name from the start on

            def write(n: int) -> None:
                file.seek(0)
                file.truncate()
                for _ in range(n // _BLOCK):
                    file.write(block)
                os.fsync(file.fileno())

            return _slope(write, *_WRITING)
    except OSError:
        return None


def _slope(work: Callable[[int], object], enough: float, n: int, most: int) -> float:
    """Seconds per unit of `work(n)`, by the first of calls with n, 2 n, ... that takes long enough."""
    work(n)  # what only the first call costs
    while True:
        begin = time.perf_counter()
        work(n)
        taken = time.perf_counter() - begin
        if taken >= enough or 2 * n > most:
            return taken / n
        n *= 2
