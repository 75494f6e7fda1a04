"""`python -m bench.precondition`: preconditioned students against plain ones at an equal budget, paper's mixture.

Each pair of students has the same network, grid, seed, optimiser and fresh teacher pairs; only the preconditioning
differs. Errors are composed relative squared errors on fresh points. Writes `bench/results/precondition-cpu.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.__main__ import processor
from flowfast import GaussianMixture, OUProcess, Recipe, distill, evaluate, flow_map, time_grid
from flowfast.experiments.machine import machine, versions

SEGMENTS = 4
POINTS = 20_000  # of the evaluation


def main() -> None:
    """Train every pair, print a table, write the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.precondition", description=__doc__)
    parser.add_argument("--steps", type=int, default=1_500, help="optimiser steps")
    parser.add_argument("--seeds", type=int, default=2, help="training seeds, from 0")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the JSON file")
    options = parser.parse_args()
    recipe = Recipe(
        steps=options.steps, batch_size=128, width=256, weight_decay=0.0,
        reduced=False, learning_rate=2e-3, schedule="one-cycle",
    )  # fmt: skip
    mixture, process = GaussianMixture.random(20, 64, std=1.0, seed=0), OUProcess(5.0)
    times = time_grid(mixture, process, SEGMENTS, kind="uniform")
    path = teacher_path(mixture, process, times)
    table = Table(title=f"composed relative squared error, {SEGMENTS} uniform segments, {options.steps} steps")
    for heading in ("networks", "seed", "preconditioned", "plain"):
        table.add_column(heading, justify="right")
    runs: list[dict[str, Any]] = []
    for shared in (False, True):
        for seed in range(options.seeds):
            errors = {}
            for preconditioned in (True, False):
                settings = replace(recipe, shared=shared, preconditioned=preconditioned)
                begin = time.perf_counter()
                student = distill(mixture, process, times, recipe=settings, seed=seed)
                seconds = time.perf_counter() - begin
                found = evaluate(student, path)
                runs.append({"recipe": asdict(settings), "seed": seed, "seconds": round(seconds, 1), **asdict(found)})
                errors[preconditioned] = found.composed
            table.add_row("shared" if shared else "separate", str(seed), f"{errors[True]:.4f}", f"{errors[False]:.4f}")
    Console().print(table)
    problem = {"k": 20, "d": 64, "std": 1.0, "beta": 5.0, "mean_seed": 0, "times": times.tolist(), "points": POINTS}
    about = {"processor": processor(), **machine(), "versions": versions(), "problem": problem}
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "precondition-cpu.json"
    file.write_text(json.dumps({**about, "runs": runs}, indent=1) + "\n")
    Console().print(f"written: {file}", highlight=False)


def teacher_path(mixture: GaussianMixture, process: OUProcess, times: Tensor) -> Tensor:
    """Where the exact flow takes fresh noise (m + 1, n, d)."""
    generator = torch.Generator().manual_seed(1_000_003)  # far from the seeds of the trainings
    points = [process.marginal(mixture, float(times[0])).sample(POINTS, generator=generator)]
    for t_from, t_to in zip(times.tolist(), times.tolist()[1:], strict=False):
        points.append(flow_map(points[-1], mixture, process, t_from, t_to))
    return torch.stack(points)


if __name__ == "__main__":
    main()
