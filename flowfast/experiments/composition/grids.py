"""The time grids that the study compares: the library's kinds, one uniform in log r, and random ones."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from flowfast.experiments.composition.curves import time_of_log_r
from flowfast.experiments.composition.settings import Problem
from flowfast.grids import KINDS, time_grid
from flowfast.seeds import generator_for

RANDOM = "random-"


@lru_cache(maxsize=4096)
def times_of(problem: Problem, grid: str, segments: int) -> tuple[float, ...]:
    """Ends of the segments, (n + 1,), from noise at t = 1 to data.

    Args:
        problem: whose flow. segments: n >= 1.
        grid: a kind of `time_grid`; "log-r", uniform in the log of alpha / s; or "random-i", order statistics of
            n - 1 uniform numbers, in t when i is even and in log r when it is odd.

    Raises:
        ValueError: an unknown grid.
    """
    if segments == 1:
        return 1.0, 0.0
    if grid in KINDS:
        found = time_grid(problem.mixture(), problem.process(), segments, kind=grid)
        return tuple(found.tolist())
    if grid == "log-r":
        return _from_log_r(problem, torch.arange(1, segments, dtype=torch.float64) / segments)
    number = grid.removeprefix(RANDOM)
    if not grid.startswith(RANDOM) or not number.isdecimal():
        raise ValueError(f"grid must be one of {', '.join(KINDS)}, log-r or random-<number>; got {grid!r}")
    generator = generator_for("random grid", int(number), segments)
    shares = torch.rand(segments - 1, generator=generator, dtype=torch.float64).sort().values
    if int(number) % 2:
        return _from_log_r(problem, shares)
    return 1.0, *(1 - shares).tolist(), 0.0


def _from_log_r(problem: Problem, shares: Tensor) -> tuple[float, ...]:
    """Inner times at these shares, increasing, of the way from noise to data in log r."""
    process = problem.process()
    low, high = float(process.snr_root(1.0, problem.std).log()), -math.log(problem.std)
    values = (low + (high - low) * shares).tolist()
    return 1.0, *(time_of_log_r(problem.mixture(), process, value) for value in values), 0.0
