"""`python -m bench.tune`: find launch configurations for the GPU that is here, and write them into the kernels' tables.

For every fallback row of a table the tuner climbs from that row: it changes one number at a time, as long as that is
faster by a measurable part. A candidate that does not compile, spills, would be miscompiled or misses the reference is
dropped. Rows for this GPU go before the fallback rows; run `python -m bench.kernel_table` afterwards.

`--rehearse` takes the same path without a GPU: interpreted, one candidate, tiny sizes, into a folder of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.trials import WORKLOADS, Dropped, Machine, Trial, fallback, family, prepared, seconds
from flowfast.kernels import launch
from flowfast.kernels.launch import TABLES, Launch

WORTH = 0.98  # of the best time so far: what is not faster than that stays
WARPS, STAGES = (1, 2, 4, 8, 16), (1, 2, 3, 4, 5)
# Sizes that may be tried, by the beginning of a table's name; others stay, as those that follow from d have to.
SPACES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "diameter": {"BLOCK_I": (16, 32), "BLOCK_J": (32, 64, 128, 256), "BLOCK_D": (16, 32, 64)},
    "posterior": {"BLOCK_N": (1, 2, 4, 8, 16, 32), "BLOCK_K": (1, 2, 4, 8, 16, 32)},
    "products": {"BLOCK_N": (16, 32), "BLOCK_K": (32, 64, 128)},
    "two_pass": {"BLOCK_K": (256, 512, 1024, 2048), "BLOCK_D": (128, 256, 512, 1024)},
    "flow": {"BLOCK_N": (16, 32, 64)},
}


def main(arguments: list[str] | None = None) -> int:
    """Tune, print, write; exit code 2 where there is no GPU, 1 when a fallback row itself is faulty."""
    options = parse(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        print("the tuner measures on a GPU and torch sees none: --rehearse goes through it without one")
        return 2
    if options.rehearse:
        if options.out.resolve() == TABLES.resolve():
            print("--rehearse measures nothing that could be shipped: give another folder with --out")
            return 2
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    device = torch.device("cpu" if options.rehearse else "cuda")
    gpu = "rehearsal" if options.rehearse else torch.cuda.get_device_name()
    faulty = False
    with tempfile.TemporaryDirectory() as cache, torch.inference_mode():
        os.environ["TRITON_CACHE_DIR"] = cache
        machine = Machine(gpu, device, Path(cache))
        for kernel in options.kernel or tables():
            found = tuned(kernel, machine)
            faulty |= None in found
            options.out.mkdir(parents=True, exist_ok=True)
            write(options.out / f"{kernel}.json", merged(launch.rows(kernel), [row for row in found if row]))
    return 1 if faulty else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--kernel", nargs="+", choices=tables(), help="only these tables")
    parser.add_argument("--out", type=Path, default=TABLES, help="folder of the tables that are written")
    parser.add_argument(
        "--rehearse", action="store_true", help="without a GPU: tiny and interpreted, times mean nothing"
    )
    return parser.parse_args(arguments)


def tables() -> list[str]:
    """Names of the kernels that have a table."""
    return sorted(path.stem for path in TABLES.glob("*.json"))


def tuned(kernel: str, machine: Machine) -> list[dict[str, Any] | None]:
    """A row for this GPU for each fallback row of `kernel`, None for one that is faulty.

    A fallback row that no workload needs is copied: a row of this GPU for larger d would hide it otherwise.
    """
    chosen = WORKLOADS[family(kernel, WORKLOADS)][: 1 if machine.rehearsal else None]
    trials = [trial for workload in chosen for trial in prepared(kernel, workload, machine)]
    found: list[dict[str, Any] | None] = []
    for row in fallback(kernel):
        mine = [trial for trial in trials if trial.row is row]
        if mine:
            best = climbed(kernel, row, mine, machine)
        else:
            print(f"{named(kernel, row)}: no workload, the fallback is copied")
            best = dict(row)
        found.append(best and {**best, "gpu": machine.gpu})
    return found


def named(kernel: str, row: Mapping[str, Any]) -> str:
    """A row, for messages."""
    return f"{kernel}, {row['dtype']}, d <= {row['most_d']}"


def climbed(kernel: str, row: Mapping[str, Any], trials: list[Trial], machine: Machine) -> dict[str, Any] | None:
    """The row with the best numbers found, None if the numbers it has are faulty."""
    costs: dict[tuple[int, ...], float] = {}
    dropped: Counter[str] = Counter()

    def cost(numbers: Mapping[str, int]) -> float:
        key = tuple(numbers.values())
        if key not in costs:
            try:
                costs[key] = seconds(kernel, as_launch(numbers), trials, machine)
            except Dropped as reason:
                costs[key] = math.inf
                dropped[str(reason)] += 1
        return costs[key]

    best = first = {**row["blocks"], "warps": row["warps"], "stages": row["stages"]}
    if cost(first) == math.inf:
        print(f"{named(kernel, row)}: the fallback row is faulty: {', '.join(dropped)}")
        return None
    start = None
    while start is not best:
        start = best
        for candidate in itertools.islice(neighbours(start, kernel), 1 if machine.rehearsal else None):
            if cost(candidate) < WORTH * cost(best):
                best = candidate
        if machine.rehearsal:
            break
    reasons = "".join(f"; {count} dropped: {reason}" for reason, count in dropped.items())
    times = f"{1e3 * cost(first):.4g} -> {1e3 * cost(best):.4g} ms"
    print(f"{named(kernel, row)}: {times}, {len(costs)} tried{reasons}; {best}")
    chosen = as_launch(best)
    return {**row, "blocks": dict(chosen.blocks), "warps": chosen.warps, "stages": chosen.stages}


def neighbours(numbers: dict[str, int], kernel: str) -> Iterator[dict[str, int]]:
    """Candidates that differ in one number, by one place in what may be tried."""
    space = {**SPACES[family(kernel, SPACES)], "warps": WARPS, "stages": STAGES}
    for name, value in numbers.items():
        near = sorted({value, *space.get(name, ())})
        for other in near:
            if abs(near.index(other) - near.index(value)) == 1:
                yield {**numbers, name: other}


def as_launch(numbers: Mapping[str, int]) -> Launch:
    """Numbers by name as a launch configuration."""
    blocks = {name: value for name, value in numbers.items() if name not in ("warps", "stages")}
    return Launch(blocks, numbers["warps"], numbers["stages"])


def merged(table: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table with these rows in front, and without the rows of the same GPU that were there."""
    gpus = {row["gpu"] for row in rows}
    return [*rows, *(row for row in table if row["gpu"] not in gpus)]


def write(path: Path, table: list[dict[str, Any]]) -> None:
    """A table as JSON, one row a line."""
    path.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in table) + "\n]\n")
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
