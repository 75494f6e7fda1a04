"""`flowfast generate`: a teacher set, with progress on stderr and what the folder holds on stdout."""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flowfast.cli.estimate import estimate, sentence
from flowfast.cli.jobs import cores
from flowfast.cli.options import Generate
from flowfast.dataset.addresses import open_store
from flowfast.dataset.generate import carry_out, make_plan
from flowfast.dataset.plan import DTYPES, Plan, RandomTimes
from flowfast.dataset.shards import row_bytes
from flowfast.grids import time_grid
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.rank import Rank

LINE_EVERY = 15.0  # seconds between progress lines where there is no terminal to draw a bar on


def planned(command: Generate, mixture: GaussianMixture) -> Plan:
    """The plan that the options spell.

    Raises:
        ValueError, TypeError: an option outside its range.
    """
    process = OUProcess(command.beta)
    times: torch.Tensor | RandomTimes
    if command.random_times:
        times = RandomTimes((0.0, command.horizon), (0.0, command.horizon))
    elif command.segments < 1:
        raise ValueError(f"segments must be at least 1; got {command.segments}")
    else:
        times = time_grid(mixture, process, command.segments, kind=command.grid, horizon=command.horizon)
    return make_plan(
        mixture,
        process,
        times,
        command.rows,
        command.rows_per_shard,
        seed=command.seed,
        dtype=None if command.dtype is None else DTYPES[command.dtype],
        backend=command.backend,
    )


def run(command: Generate, plan: Plan, mixture: GaussianMixture) -> dict[str, Any]:
    """Carry out the command, and say what it did unless JSON is wanted.

    Returns:
        Plain values for --json.

    Raises:
        ValueError: a folder or an option that cannot be used. StorageError, ShardsFailed: see `generate_dataset`.
    """
    rank, store = Rank.from_environment(), open_store(command.out)
    workers = command.workers if command.workers is not None else _workers(plan, rank)
    per_row = row_bytes(plan, mixture.dim)
    facts: dict[str, Any] = {
        "folder": str(command.out),
        "plan": plan.digest(),
        "rows": plan.rows,
        "bytes": plan.rows * per_row,
        "shards": plan.n_shards,
        "rows_per_shard": plan.rows_per_shard,
    }
    if command.dry_run:
        facts |= estimate(store, plan, mixture, workers * rank.world)
        said = sentence(facts)
    else:
        begin = time.perf_counter()
        with _terminable(), watch(per_row) as progress:
            outcome = carry_out(
                plan, mixture, store, workers=workers, engine=command.engine, rank=rank, progress=progress
            )
        facts |= {**dataclasses.asdict(outcome), "seconds": time.perf_counter() - begin}
        said = "{made:,} of {shards:,} shards made, {missing:,} missing: {folder}".format(**facts)
    if not command.json:
        print(said)
    return facts


def _workers(plan: Plan, rank: Rank) -> int:
    """One in all where the environment starts processes, or a GPU computes; else one per core, and one to fill in.

    While one waits for the disk to have its shard, another computes.
    """
    return 1 if rank.world > 1 or plan.kernel.backend == "triton" else min(cores() + 1, plan.n_shards)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, with exit code 143: what is unfinished is cleared away."""

    def stop(number: int, frame: FrameType | None) -> None:
        print("flowfast: stopped; finished shards are kept: the same call goes on", file=sys.stderr)
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def watch(per_row: int) -> Iterator[Callable[[int, int], None]]:
    """A listener that shows rows on stderr: a bar on a terminal, a line now and then elsewhere.

    Args:
        per_row: bytes of a row.
    """
    err, pace = Console(stderr=True, highlight=False), _Pace(per_row)
    if not err.is_terminal:
        last = 0.0

        def line(done: int, rows: int) -> None:
            nonlocal last
            now, said = time.monotonic(), pace(done)
            if now - last > LINE_EVERY or done == rows:
                last = now
                print(f"{done:,} of {rows:,} rows{said}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (
        TextColumn("rows"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err) as bar:
        task = bar.add_task("", total=None, note="")

        def draw(done: int, rows: int) -> None:
            if bar.tasks[0].total is None:
                bar.reset(task, total=rows, completed=done)  # rows that stood before are no sign of speed
            bar.update(task, completed=done, note=pace(done).removeprefix(", "))

        yield draw


class _Pace:
    """Rows and bytes per second since the first call."""

    def __init__(self, per_row: int) -> None:
        self._per_row = per_row
        self._first: tuple[float, int] | None = None

    def __call__(self, done: int) -> str:
        now = time.monotonic()
        if self._first is None:
            self._first = now, done
        passed, rows = now - self._first[0], done - self._first[1]
        if passed <= 0 or rows <= 0:
            return ""
        return f", {rows / passed:,.0f} rows/s, {rows * self._per_row / passed / 1e9:.3f} GB/s"
