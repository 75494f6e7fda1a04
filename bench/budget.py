"""`python -m bench.budget`: what the published tables cost at full protocol, counted, and what follows for a machine.

Counts the optimiser steps and the floating-point operations of all trainings (forward and backward: six per weight and
point) from the tables' own settings; nothing is trained. Hours on this machine's core are counted operations over the
rate that `bench/results/ensemble-cpu.json` gives for a training step. Hours on a GPU are counted operations over a
rate that you name (`--tflops`): an extrapolation, no measurement.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flowfast.experiments.paper import TABLES, Request
from flowfast.experiments.paper.groups import flops
from flowfast.experiments.paper.settings import Settings

STEP_FILE = Path("bench/results/ensemble-cpu.json")
GRIDS = ("grid=uniform", "grid=balanced")  # of Table 5 as published, with 4, 8 and 16 segments


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.budget", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tflops", type=float, nargs="+", default=[20.0, 40.0, 200.0], help="sustained, of a GPU")
    options = parser.parse_args()
    rate = _core_rate()
    table = Table(title=f"all trainings of {options.seeds} seeds; GPU columns are extrapolations, not measurements")
    table.add_column("table")
    heads = ("runs", "steps", "operations", "hours of a core", *(f"min at {rate:g} TFLOP/s" for rate in options.tflops))
    for head in heads:
        table.add_column(head, justify="right")
    total = 0.0
    for number in TABLES:
        only = tuple(f"{grid},segments={n}" for grid in GRIDS for n in (4, 8, 16)) if number == 5 else ()
        runs = Request(tables=(number,), seeds=options.seeds, teachers=("exact",), only=only).runs()
        work = sum(map(flops, (run.settings for run in runs)))
        total += work
        steps = sum(run.settings.steps for run in runs)
        table.add_row(str(number), f"{len(runs)}", f"{steps:,}", *_row(work, rate, options.tflops))
    table.add_row("all", "", "", *_row(total, rate, options.tflops))
    Console(width=140).print(table)


def _row(work: float, rate: float, tflops: list[float]) -> list[str]:
    return [f"{work:.2e}", f"{work / rate / 3600:,.0f}", *(f"{work / each / 1e12 / 60:.1f}" for each in tflops)]


def _core_rate() -> float:
    """Operations per second of one core in a training step, as measured."""
    stored = json.loads(STEP_FILE.read_text())
    about = stored["settings"]
    step = Settings(width=about["width"], depth=about["depth"], batch_size=about["batch"], dim=about["dim"], steps=1)
    milliseconds: float = stored["processor_ms"]["ensemble of 1"]["median"]
    return flops(step) / (milliseconds / 1e3)


if __name__ == "__main__":
    main()
