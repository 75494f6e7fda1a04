"""How it is timed: contenders take turns (A B C A B C ...), so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bench.cases import Case


@dataclass(frozen=True)
class Timing:
    """One contender of one case.

    Attributes:
        median, fastest, slowest: seconds. rounds: number of turns.
        error_median, error_worst: relative error of a row against float64.
    """

    median: float
    fastest: float
    slowest: float
    rounds: int
    error_median: float
    error_worst: float


def measure(case: Case, *, seconds: float = 6.0, most_rounds: int = 200) -> dict[str, Timing]:
    """Warm every contender up once, then let them take turns until `seconds` have passed, at least three times."""
    errors = {name: row_errors(run(), case.exact) for name, run in case.contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in case.contenders}
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or (rounds < most_rounds and time.perf_counter() - start < seconds):
        for name, run in case.contenders.items():
            samples[name].append(_seconds(run, case.exact.is_cuda))
        rounds += 1
    return {
        name: Timing(statistics.median(taken), min(taken), max(taken), rounds, *errors[name])
        for name, taken in samples.items()
    }


def row_errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """Median and largest relative error of a row; infinite where something is not finite."""
    errors = (got.double() - exact).norm(dim=1) / exact.norm(dim=1)
    errors = errors.nan_to_num(nan=float("inf"))
    return float(errors.median()), float(errors.max())


def as_json(timings: dict[str, Timing]) -> dict[str, dict[str, float]]:
    """The timings as plain numbers, each with the ratio of its median to the first contender's."""
    first = next(iter(timings.values()))
    return {name: asdict(timing) | {"ratio": timing.median / first.median} for name, timing in timings.items()}


def _seconds(run: Callable[[], Tensor], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
