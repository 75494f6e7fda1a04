"""`python -m bench.ensemble`: what a step of training costs, alone and in an ensemble, and the teacher's share of it.

Processor time per member and step (batch 1,024, d = 64, depth 4), not time on the clock: it stays meaningful on a busy
machine. One torch thread; contenders take turns. Writes `bench/results/ensemble-cpu.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bench.__main__ import processor
from flowfast import MLP, Ensemble, GaussianMixture, OUProcess, PairSource, ScoreTarget, SegmentTarget
from flowfast.experiments.machine import machine, versions

BATCH, DIM, MEMBERS = 1_024, 64, 4
ROWS = 8 * BATCH  # a block of pairs, as TeacherPairs makes it
TEACHERS: dict[str, tuple[float, ScoreTarget | SegmentTarget]] = {  # std of the data, target
    "score (Tables 1, 2)": (0.1, ScoreTarget(0.5)),
    "tail window (Table 3)": (1e-4, SegmentTarget(math.log(2) / 10, 0.0)),
    "whole flow (Table 4)": (1e-3, SegmentTarget(1.0, 0.0)),
    "whole flow (Table 5, n = 1)": (1.0, SegmentTarget(1.0, 0.0)),
    "segment 0.5 to 0.25 (Table 5)": (1.0, SegmentTarget(0.5, 0.25)),
}


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.ensemble", description=__doc__)
    parser.add_argument("--width", type=int, default=512, help="of the networks")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every contender")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps = {
        "torch, alone": (1, _plain(options.width)),
        "ensemble of 1": (1, _together(options.width, 1, 1)),
        f"ensemble of {MEMBERS}": (MEMBERS, _together(options.width, MEMBERS, 1)),
        f"ensemble of {MEMBERS}, one stack": (MEMBERS, _together(options.width, MEMBERS, MEMBERS)),
    }
    teachers = {name: (ROWS // BATCH, _draw(std, target)) for name, (std, target) in TEACHERS.items()}
    found = _in_turns({**steps, **teachers}, options.rounds)
    alone = found["ensemble of 1"]["median"]
    table = Table(title=f"processor ms per member and step, width {options.width}, batch {BATCH}")
    for heading in ("work", "least", "median", "of a step"):
        table.add_column(heading, justify="left" if heading == "work" else "right")
    for name, times in found.items():
        table.add_row(name, f"{times['least']:.2f}", f"{times['median']:.2f}", f"{times['median'] / alone:.1%}")
    Console().print(table)
    about = {"processor": processor(), **machine(), "versions": versions(), "threads": 1}
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "ensemble-cpu.json"
    settings = {"width": options.width, "batch": BATCH, "dim": DIM, "depth": 4, "rounds": options.rounds}
    errors = _product_errors(options.width)
    content = {**about, "settings": settings, "processor_ms": found, "product_errors": errors}
    file.write_text(json.dumps(content, indent=1) + "\n")
    Console().print(f"written: {file}", highlight=False)


def _in_turns(work: dict[str, tuple[int, Callable[[], Any]]], rounds: int) -> dict[str, dict[str, float]]:
    """Least and median processor milliseconds of every contender, divided by its number of member steps."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, (parts, call) in work.items():
            begin = time.process_time()
            call()
            if turn:  # the first is a warm-up
                taken[name].append((time.process_time() - begin) / parts * 1e3)
    return {name: {"least": min(times), "median": statistics.median(times)} for name, times in taken.items()}


def _student(width: int, seed: int) -> MLP:
    return MLP(DIM, DIM, width=width, depth=4, generator=torch.Generator().manual_seed(seed))


def _plain(width: int) -> Callable[[], Any]:
    """The step as torch's users write it: the same weights in torch's own layers."""
    layers = [nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features) for layer in _layers(width)]
    for layer, ours in zip(layers, _layers(width), strict=True):
        layer.load_state_dict(ours.state_dict())
    student = nn.Sequential(*(part for layer in layers[:-1] for part in (layer, nn.ReLU(inplace=True))), layers[-1])
    optimiser = torch.optim.AdamW(student.parameters(), lr=2e-4, weight_decay=0.0, fused=True)
    x = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        (student(x) - x).square().mean().backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()

    return step


def _layers(width: int) -> list[nn.Linear]:
    return [layer for layer in _student(width, 0).layers if isinstance(layer, nn.Linear)]


def _product_errors(width: int) -> dict[str, float]:
    """Relative error against float64 of one layer's product, torch's own and ours."""
    layer, x = _layers(width)[1], torch.randn(BATCH, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
        found = {"torch": nn.functional.linear(x, layer.weight, layer.bias), "ours": layer(x)}
    return {name: float((out - exact).norm() / exact.norm()) for name, out in found.items()}


def _together(width: int, members: int, together: int) -> Callable[[], Any]:
    ensemble = Ensemble([_student(width, seed) for seed in range(members)], together=together)
    x = torch.randn(members, BATCH, DIM, generator=torch.Generator().manual_seed(0))
    return lambda: ensemble.step(x, x)


def _draw(std: float, target: ScoreTarget | SegmentTarget) -> Callable[[], Any]:
    source = PairSource(GaussianMixture.random(20, DIM, std=std, seed=0), OUProcess(5.0), target, (0, "bench"))
    return lambda: source.draw(ROWS, "pairs", 0)


if __name__ == "__main__":
    main()
