"""`python -m bench.dataset`: how fast teacher sets are stored and read, beside the flow kernel and the disk.

k = 20, d = 64, float32, 8 segments of the measured grid. Rates are rows per second on the clock, so the machine should
be idle; rounds of all contenders alternate, and medians are kept. A set's rate is measured from its first eighth on,
which leaves the start of the processes out. Processor time per row, on one thread, stands beside them: it stays
meaningful on a busy machine. The disk's rate is measured twice: through the page cache, and past it as shards are
written. The set and a file of random bytes are written to a temporary folder beside the results and removed. Writes
`bench/results/dataset-cpu.json`. OMP_WAIT_POLICY=PASSIVE, which the command line sets, keeps torch's idle threads from
taking half a core of the flow's rate; the file says what it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.__main__ import processor
from flowfast import GaussianMixture, OUProcess, TeacherDataset, flow_map, time_grid
from flowfast.dataset.generate import carry_out, make_plan
from flowfast.dataset.plan import Plan
from flowfast.dataset.shards import make_shard, row_bytes, shard_memory, write_shard
from flowfast.dataset.store import LocalStore
from flowfast.dataset.uncached import new_uncached_file
from flowfast.experiments.machine import machine, versions
from flowfast.sampling import sample_rows

K, DIM, SEGMENTS, BATCH = 20, 64, 8, 1_024
FLOW_ROWS = 32_768  # of one call of the flow, as many as a generator's calls have
CORES = len(os.sched_getaffinity(0))
PIECE = 1 << 22  # bytes of one write to the disk
PROCESS = OUProcess(5.0)


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.dataset", description=__doc__)
    parser.add_argument("--rows", type=int, default=8_000_000, help="of the set")
    parser.add_argument("--rows-per-shard", type=int, default=None, help="none takes the default")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every contender")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the JSON file")
    options = parser.parse_args()
    mixture = GaussianMixture.random(K, DIM, std=0.1, seed=0)
    times = time_grid(mixture, PROCESS, SEGMENTS, kind="measured")
    plan = make_plan(mixture, PROCESS, times, options.rows, options.rows_per_shard)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        processor_times = _processor_times(plan, mixture, Path(folder) / "shard", options.rounds)
        rates = _in_turns(_contenders(plan, mixture, Path(folder)), options.rounds)
    found = {**_compared(plan, rates), "processor_us_per_row": processor_times}
    table = Table(title=f"teacher sets, k = {K}, d = {DIM}, {plan.rows:,} rows, {row_bytes(plan, DIM)} bytes each")
    for heading in ("work", "rows per second", "GB/s"):
        table.add_column(heading, justify="left" if heading == "work" else "right")
    for name, rate in found["rows_per_second"].items():
        table.add_row(name, f"{rate:,.0f}", f"{rate * row_bytes(plan, DIM) / 1e9:.3f}")
    console = Console()
    console.print(table)
    for name, time_per_row in processor_times.items():
        console.print(f"{name}: {time_per_row:.2f} us of one processor per row", highlight=False)
    for name, shares in found["shares"].items():
        said = ", ".join(f"{share:.0%} {limit}" for limit, share in shares.items())
        console.print(f"{name}: {said}", highlight=False)
    about: dict[str, Any] = {
        "processor": processor(),
        **machine(),
        "cores": CORES,
        "load": os.getloadavg(),
        "versions": versions(),
    }
    about["omp_wait_policy"] = os.environ.get("OMP_WAIT_POLICY", "not set")
    settings = {"rows": plan.rows, "rows_per_shard": plan.rows_per_shard, "rounds": options.rounds}
    file = options.out / "dataset-cpu.json"
    file.write_text(json.dumps({**about, "settings": settings, **found}, indent=1) + "\n")
    console.print(f"written: {file}", highlight=False)


def _contenders(plan: Plan, mixture: GaussianMixture, folder: Path) -> dict[str, Callable[[], float]]:
    """Calls that give rows per second, in an order in which the reader finds a set."""
    work: dict[str, Callable[[], float]] = {
        f"flow, {torch.get_num_threads()} threads": lambda: _flow(plan, mixture),
        "disk, through the page cache": lambda: _disk(plan, lambda: (folder / "random").open("wb")),
        "disk": lambda: _disk(plan, lambda: new_uncached_file(folder / "random")),
    }
    for workers in (1, CORES, CORES + 1):
        name = f"stored by {workers} processes" if workers > 1 else "stored by this process"
        work[name] = partial(_stored, plan, mixture, folder / "set", workers)
    return work | {
        "read, shuffled batches, from the disk": lambda: _read_again(folder / "set"),
        "read, shuffled batches": lambda: _read(folder / "set"),
    }


def _in_turns(work: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            rates[name].append(call())
    return rates


def _compared(plan: Plan, rates: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and what share of the flow's rate and of the disk's each way of storing reaches."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    limits = {name: rate for name, rate in medians.items() if name.startswith(("flow", "disk"))}
    shares = {
        name: {f"of {limit}": rate / most for limit, most in limits.items()}
        for name, rate in medians.items()
        if name.startswith("stored")
    }
    return {"bytes_per_row": row_bytes(plan, DIM), "rows_per_second": medians, "all": rates, "shares": shares}


def _processor_times(plan: Plan, mixture: GaussianMixture, file: Path, rounds: int) -> dict[str, float]:
    """Least processor microseconds per row, on one thread, of what is done for a shard."""
    threads, n = torch.get_num_threads(), plan.rows_of(0)
    torch.set_num_threads(1)
    memory = shard_memory(plan, DIM)
    content = make_shard(plan, mixture, 0, memory=memory).content
    t_from, t_to, x = _starts(plan, mixture)

    def write() -> None:
        with new_uncached_file(file) as stream:
            write_shard(stream, content)
        file.unlink()

    work: dict[str, tuple[int, Callable[[], object]]] = {
        "the flow alone": (FLOW_ROWS, lambda: flow_map(x, mixture, PROCESS, t_from, t_to)),
        "starting points and flow": (n, lambda: make_shard(plan, mixture, 0, memory=memory)),
        "hash": (n, lambda: hashlib.sha256(content)),
        "hash and write": (n, write),
    }
    least = dict.fromkeys(work, float("inf"))
    for _ in range(rounds + 1):
        for name, (rows, call) in work.items():
            begin = time.thread_time()
            call()
            least[name] = min(least[name], (time.thread_time() - begin) / rows * 1e6)
    torch.set_num_threads(threads)
    return least


def _starts(plan: Plan, mixture: GaussianMixture) -> tuple[Tensor, Tensor, Tensor]:
    """Times from and to of FLOW_ROWS rows, and their starting points."""
    grid = torch.tensor(plan.times, dtype=torch.float64)
    segment = torch.arange(FLOW_ROWS) % SEGMENTS
    x = sample_rows(mixture, 0, 0, FLOW_ROWS, process=PROCESS, t=grid[segment])
    return grid[segment], grid[segment + 1], x


def _flow(plan: Plan, mixture: GaussianMixture) -> float:
    """The flow of rows that are in memory already, on all threads, for half a second."""
    t_from, t_to, x = _starts(plan, mixture)
    flow_map(x, mixture, PROCESS, t_from, t_to)  # warm-up
    begin, calls, passed = time.perf_counter(), 0, 0.0
    while passed < 0.5:
        flow_map(x, mixture, PROCESS, t_from, t_to)
        calls, passed = calls + 1, time.perf_counter() - begin
    return calls * FLOW_ROWS / passed


def _disk(plan: Plan, create: Callable[[], BinaryIO]) -> float:
    """As many bytes as the set's, in files of a shard's size, each made durable and removed before the next."""
    piece = mmap.mmap(-1, PIECE)
    piece[:] = os.urandom(PIECE)
    written, total = 0, plan.rows * row_bytes(plan, DIM)
    begin = time.perf_counter()
    while written < total:
        with create() as stream:
            for _ in range(max(1, plan.rows_per_shard * row_bytes(plan, DIM) // PIECE)):
                written += stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
            os.unlink(stream.name)
    return written / row_bytes(plan, DIM) / (time.perf_counter() - begin)


def _stored(plan: Plan, mixture: GaussianMixture, folder: Path, workers: int) -> float:
    """A whole set, from its first eighth on."""
    shutil.rmtree(folder, ignore_errors=True)
    first: list[tuple[float, int]] = []

    def note(done: int, rows: int) -> None:
        if done >= rows / 8 and not first:
            first.append((time.perf_counter(), done))

    carry_out(plan, mixture, LocalStore(folder), workers=workers, progress=note)
    at, done = first[0]
    return (plan.rows - done) / (time.perf_counter() - at)


def _read_again(folder: Path) -> float:
    """Shuffled batches of a set of which nothing is in memory, for a second."""
    for file in (folder / "shards").iterdir():
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return _batches(TeacherDataset(folder))


def _read(folder: Path) -> float:
    """Shuffled batches of a set whose pages are in memory, for a second."""
    data = TeacherDataset(folder)
    for shard in (folder / "shards").iterdir():
        with shard.open("rb") as stream:
            while stream.read(PIECE):
                pass
    _batches(data)  # maps the files
    return _batches(data)


def _batches(data: TeacherDataset) -> float:
    begin, rows, passed = time.perf_counter(), 0, 0.0
    for x_from, _, _ in data.batches(BATCH):
        rows, passed = rows + len(x_from), time.perf_counter() - begin
        if passed > 1:
            break
    return rows / passed


if __name__ == "__main__":
    main()
