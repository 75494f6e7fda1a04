"""`python -m bench.recipes`: what each ingredient of a student's training is worth, on the problem of Table 5.

Students of the exact flow over [0, 1] (k = 20, d = 64, std = 1), MLPs of width 512 with 4 hidden layers, 1,024 fresh
teacher pairs per optimiser step in all: a shared network on n segments splits them, separate networks split the steps.
Errors are composed relative squared errors on 50,000 fresh points. Appends a line per run to
`bench/results/recipes-cpu.jsonl` (`--device cuda`: `recipes-cuda.jsonl`); runs that stand there are not repeated. One
process, one thread. With `--table` it prints what stands there as the tables of docs/students.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.__main__ import processor
from bench.ingredients import LOOPS, Task
from flowfast import Evaluation, FlowStudent, GaussianMixture, OUProcess, Recipe, distill, evaluate, flow_map, time_grid
from flowfast.experiments.machine import machine, versions
from flowfast.grids import GridKind

PAIRS = 1_024  # per optimiser step, all segments of a shared network together
POINTS = 50_000  # of the evaluation
STEPS = {"ingredients": 1_200, "paper": 10_000, "best": 10_000, "full": 100_000}  # in all; "full" is Table 5's

PAPER = Recipe(
    preconditioned=False, shared=False, learning_rate=2e-4, schedule="constant", weight_decay=0.0, batch_size=PAIRS
)
BEST = Recipe.fresh()
ALONE = replace(BEST, shared=False)
EQUAL = replace(BEST, allocation="equal")
STEADY = replace(BEST, schedule="constant")
STEADY_EQUAL = replace(EQUAL, schedule="constant")


@dataclass(frozen=True)
class Trial:
    """One student: a recipe whose steps and batch are set by `run`, on n segments of a grid, and its training.

    loop: of `bench.ingredients`; None is `distill`.
    """

    recipe: Recipe
    segments: int = 1
    grid: GridKind = "uniform"
    loop: str | None = None


TRIALS: Mapping[str, Mapping[str, Trial]] = {
    "ingredients": {
        "none": Trial(BEST),
        "not preconditioned": Trial(replace(BEST, preconditioned=False)),
        "all coordinates": Trial(replace(BEST, reduced=False)),
        "peak 2e-3": Trial(replace(BEST, learning_rate=2e-3)),
        "peak 4e-3": Trial(replace(BEST, learning_rate=4e-3)),
        "one-cycle schedule": Trial(replace(BEST, schedule="one-cycle")),
        "constant rate": Trial(STEADY),
        "weight decay 0.1": Trial(replace(BEST, weight_decay=0.1)),
        "gradients clipped at 0.25": Trial(replace(BEST, clip_norm=0.25)),
        "Muon": Trial(replace(BEST, optimiser="muon")),
        "the paper's student": Trial(PAPER),
        "n = 4": Trial(BEST, 4),
        "n = 4, measured grid": Trial(BEST, 4, "measured"),
        "n = 4, equal rows": Trial(EQUAL, 4),
        "n = 4, equal rows, measured grid": Trial(EQUAL, 4, "measured"),
        "n = 4, a network per segment": Trial(ALONE, 4),
        "n = 4, a network per segment, each from the one before": Trial(ALONE, 4, loop="one by one"),
        "n = 4, a network per segment, each from the one after": Trial(ALONE, 4, loop="one by one, backwards"),
        "n = 4, equal rows, weights averaged": Trial(EQUAL, 4, loop="averaged"),
        "n = 4, equal rows, constant rate": Trial(STEADY_EQUAL, 4),
        "n = 4, equal rows, constant rate, weights averaged": Trial(STEADY_EQUAL, 4, loop="averaged"),
        "n = 4, equal rows, composed error at the end": Trial(EQUAL, 4, loop="end to end"),
        "n = 4, equal rows, composed error beside the segments' at the end": Trial(EQUAL, 4, loop="end to end, beside"),
        "n = 8": Trial(BEST, 8),
        "n = 8, measured grid": Trial(BEST, 8, "measured"),
        "n = 8, equal rows": Trial(EQUAL, 8),
        "n = 8, equal rows, measured grid": Trial(EQUAL, 8, "measured"),
    },
    "paper": {f"n = {n}": Trial(PAPER, n, "balanced") for n in (1, 4, 8)},
    "best": {f"n = {n}": Trial(BEST, n, "measured" if n > 1 else "uniform") for n in (1, 8, 4, 2)}
    | {f"n = {n}, equal rows": Trial(EQUAL, n, "measured") for n in (8, 4, 2)}
    | {"n = 4, uniform grid": Trial(BEST, 4), "n = 4, equal rows, uniform grid": Trial(EQUAL, 4)}
    | {"n = 1, Muon": Trial(replace(BEST, optimiser="muon"))},
    "full": {f"n = {n}": Trial(BEST, n, "measured" if n > 1 else "uniform") for n in (1, 8)}
    | {"n = 1, peak 2e-3": Trial(replace(BEST, learning_rate=2e-3))},
}

AGAINST: Mapping[str, str] = {  # the line without the ingredient, where it is not that of n segments alone
    "n = 4, a network per segment, each from the one before": "n = 4, a network per segment",
    "n = 4, a network per segment, each from the one after": "n = 4, a network per segment",
    "n = 4, equal rows, measured grid": "n = 4, measured grid",
    "n = 4, equal rows, weights averaged": "n = 4, equal rows",
    "n = 4, equal rows, constant rate": "n = 4, equal rows",
    "n = 4, equal rows, constant rate, weights averaged": "n = 4, equal rows, constant rate",
    "n = 4, equal rows, composed error at the end": "n = 4, equal rows",
    "n = 4, equal rows, composed error beside the segments' at the end": "n = 4, equal rows",
    "n = 8, equal rows, measured grid": "n = 8, measured grid",
}


def main() -> None:
    """Train what is not yet in the file, a line each."""
    parser = argparse.ArgumentParser(prog="python -m bench.recipes", description=__doc__)
    known = ", ".join(TRIALS)
    parser.add_argument("sets", nargs="*", default=list(TRIALS)[:-1], help=f"of {known}; none is all but the last")
    parser.add_argument("--only", nargs="+", help="names within the sets, such as 'n = 1'")
    parser.add_argument("--steps", type=int, help="optimiser steps in all; none is the set's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda, with a file of its own")
    parser.add_argument("--table", action="store_true", help="print the tables and train nothing")
    parser.add_argument("--out", type=Path, help="none is bench/results/recipes-DEVICE.jsonl")
    options = parser.parse_args()
    out = options.out or Path(f"bench/results/recipes-{options.device}.jsonl")
    unknown = sorted(set(options.sets) - set(TRIALS))
    if unknown:
        parser.error(f"sets must be of {known}; got {', '.join(unknown)}")
    if options.table:
        print(tables(rows_of(out)))
        return
    torch.set_num_threads(1)
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {"processor": processor(), **machine(), "versions": versions()}
    for group in options.sets:
        for name, trial in TRIALS[group].items():
            if options.only and name not in options.only:
                continue
            settings = settings_of(group, name, trial, options.steps or STEPS[group], options.seed)
            if any(settings.items() <= row.items() for row in rows_of(out)):
                continue
            found = run(trial, settings["steps"], options.seed, options.device)
            with out.open("a") as file:
                file.write(json.dumps({**settings, **found, **about}) + "\n")
            print(f"{group}, {name}: {found['composed']:.5f} in {found['seconds']} s", flush=True)


def settings_of(group: str, name: str, trial: Trial, steps: int, seed: int) -> dict[str, Any]:
    """Everything that decides the numbers of a run, as plain values, under its names."""
    settings = {
        "set": group, "name": name, "segments": trial.segments, "grid": trial.grid, "steps": steps, "seed": seed,
        "recipe": asdict(sized(trial, steps)),
    }  # fmt: skip
    return settings if trial.loop is None else {**settings, "loop": trial.loop}


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The runs that stand in the file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def tables(rows: list[dict[str, Any]]) -> str:
    """The runs as tables in Markdown: students at many steps, ingredients at few, those of n = 1 and of n = 4 apart."""
    students = [row for row in rows if row["set"] in ("best", "paper", "full")]
    lines = [
        "| n | student | grid | steps | seed | composed error | processor seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(students, key=lambda row: (row["steps"], row["segments"], row["set"])):
        who = "the paper's" if row["set"] == "paper" else "the recipe"
        who += "".join(f", {word}" for word in row["name"].split(", ")[1:] if word != f"{row['grid']} grid")
        lines.append(
            f"| {row['segments']} | {who} | {row['grid']} | {row['steps']:,} | {row['seed']} | {row['composed']:.4f} | "
            f"{row['seconds']:.0f} |"
        )
    few = [row for row in rows if row["set"] == "ingredients"]
    for n in sorted({row["segments"] for row in few}):
        lines += ["", *_ingredients([row for row in few if row["segments"] == n])]
    return "\n".join(lines)


def _ingredients(rows: list[dict[str, Any]]) -> list[str]:
    """A table of one line per change to the recipe and number of steps, the least error of the first seed above.

    The ratio is to another line's errors with the same seeds, summed over these.
    """
    seeds = sorted({row["seed"] for row in rows})
    errors: dict[tuple[str, int], dict[int, float]] = {}
    for row in rows:
        errors.setdefault((row["name"], row["steps"]), {})[row["seed"]] = row["composed"]
    lines = [f"| change to the recipe | steps | {' | '.join(f'error, seed {seed}' for seed in seeds)} | ratio | to |"]
    lines.append("|---" * (4 + len(seeds)) + "|")
    for (name, steps), found in sorted(errors.items(), key=lambda item: min(item[1].items())[1]):
        other = AGAINST.get(name, name.split(",")[0] if name.startswith("n = ") else "none")
        plain = errors.get((other, steps), {})
        both = set() if name == other else set(found) & set(plain)
        ratio = f"{sum(found[i] for i in both) / sum(plain[i] for i in both):.2f} | {other}" if both else " | "
        cells = [f"{found[seed]:.4f}" if seed in found else "" for seed in seeds]
        lines.append(f"| {name} | {steps:,} | {' | '.join(cells)} | {ratio} |")
    return lines


def sized(trial: Trial, steps: int) -> Recipe:
    """The trial's recipe at PAIRS pairs per step and `steps` steps in all."""
    n = trial.segments
    if trial.recipe.shared:
        return replace(trial.recipe, steps=steps, batch_size=PAIRS // n)
    return replace(trial.recipe, steps=steps // n, batch_size=PAIRS)


def run(trial: Trial, steps: int, seed: int, device: str = "cpu") -> dict[str, Any]:
    """Train and measure: errors, processor and wall seconds of the training."""
    mixture, process = GaussianMixture.random(20, 64, std=1.0, seed=0).to(device), OUProcess(5.0)
    times = time_grid(mixture, process, trial.segments, kind=trial.grid).cpu()
    wall, begin = time.perf_counter(), time.process_time()
    recipe = sized(trial, steps)
    if trial.loop is None:
        student = distill(mixture, process, times, recipe=recipe, seed=seed)
    else:
        student = LOOPS[trial.loop](Task(mixture, process, tuple(times.tolist()), recipe, seed))
    seconds, wall = time.process_time() - begin, time.perf_counter() - wall
    found = measured(student, mixture, process, times, POINTS)
    errors = {"composed": found.composed, "each": found.segments, "along": found.along}
    return {"times": times.tolist(), **errors, "seconds": round(seconds, 1), "wall": round(wall, 1)}


def measured(
    student: FlowStudent, mixture: GaussianMixture, process: OUProcess, times: Tensor, points: int
) -> Evaluation:
    """Errors of the student along exact trajectories from fresh noise."""
    generator = torch.Generator(mixture.device).manual_seed(1_000_003)  # far from the seeds of the trainings
    path = [process.marginal(mixture, float(times[0])).sample(points, generator=generator)]
    for t_from, t_to in zip(times.tolist(), times.tolist()[1:], strict=False):
        path.append(flow_map(path[-1], mixture, process, t_from, t_to))
    return evaluate(student, torch.stack(path))


if __name__ == "__main__":
    main()
