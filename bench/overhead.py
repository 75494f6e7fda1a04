"""`python -m bench.overhead`: what a call costs beside its arithmetic, for one point on one core of the CPU.

The same score by every way that leads to it. Contenders take turns; a turn is a run of calls timed by the thread's own
clock, which stands still while other programs have the core. Writes `bench/results/overhead-cpu.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.__main__ import processor
from flowfast import GaussianMixture, MixtureScore, OUProcess, _cpp, flow_map, operators, score, velocity
from flowfast.experiments.machine import machine, versions

SIZES = ((2, 2), (20, 64))  # k, d


def contenders(k: int, d: int) -> dict[str, Callable[[], object]]:
    """Ways to the score of one point, cheapest first, and what is built on it."""
    mixture, process = GaussianMixture.random(k, d, std=1.0, seed=0), OUProcess(5.0)
    x = torch.randn(1, d, generator=torch.Generator().manual_seed(1))
    leaf = x.clone().requires_grad_()
    one = torch.ones((), dtype=torch.float64)
    tensors = (x, mixture.means, mixture.log_weights_in(x.dtype), one, mixture.std)
    module = MixtureScore(mixture, process)
    operator = operators.OPERATORS["score"]
    return {
        "torch: x + x": lambda: x + x,
        "torch: x @ means.T": lambda: x @ mixture.means.T,
        "body in C++": lambda: _cpp.score(*tensors),
        "score": lambda: score(x, mixture),
        "MixtureScore": lambda: module(x),
        "operator": lambda: operator(*tensors),
        "score, x requires grad": lambda: score(leaf, mixture),
        "velocity": lambda: velocity(x, mixture, process, 0.5),
        "score, reference": lambda: score(x, mixture, backend="reference"),
        "flow_map": lambda: flow_map(x, mixture, process, 1.0, 0.0),
    }


def measure(k: int, d: int, *, rounds: int, calls: int) -> dict[str, dict[str, float]]:
    """Microseconds of the thread's own time per call of each contender: median and quartiles over rounds."""
    found: dict[str, list[float]] = {}
    ways = contenders(k, d)
    for turn in range(-1, rounds):  # the first round, before the count, loads what is loaded once
        for name, run in ways.items():
            begin = time.thread_time_ns()
            for _ in range(calls):
                run()
            took = (time.thread_time_ns() - begin) / calls / 1e3
            if turn >= 0:
                found.setdefault(name, []).append(took)
    rows = {}
    for name, times in found.items():
        lower, median, upper = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        rows[name] = {"median": median, "lower": lower, "upper": upper, "fastest": min(times)}
    return rows


def main() -> None:
    """Measure on one core and one thread, print a table, write the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="turns of each contender")
    parser.add_argument("--calls", type=int, default=100, help="calls in a turn")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the JSON file")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    load, console = os.getloadavg()[0], Console(width=120, highlight=False)
    results: list[dict[str, Any]] = []
    for k, d in SIZES:
        rows = measure(k, d, rounds=options.rounds, calls=options.calls)
        results.append({"n": 1, "k": k, "d": d, "dtype": "float32", "microseconds": rows})
        table = Table(title=f"microseconds per call, n = 1, k = {k}, d = {d}, float32", title_justify="left")
        for heading in ("", "median", "quartiles", "fastest"):
            table.add_column(heading, justify="right" if heading else "left")
        for name, row in rows.items():
            quartiles = f"{row['lower']:.1f}-{row['upper']:.1f}"
            table.add_row(name, f"{row['median']:.1f}", quartiles, f"{row['fastest']:.1f}")
        console.print(table)
    about = {"processor": processor(), **machine(), "versions": versions(), "load_before": load}
    about |= {"clock": "thread_time", "rounds": options.rounds, "calls": options.calls}
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "overhead-cpu.json"
    file.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    console.print(f"written: {file}")


if __name__ == "__main__":
    main()
