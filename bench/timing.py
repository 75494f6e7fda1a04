"""How it is timed: contenders take turns (A B C A B C ...), so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.cases import Case, Contender
from bench.peers import NotOffered, Run

LONGEST = 60.0  # seconds of a call, beyond which a peer is skipped
TRIAL = 16  # part of the points on which it is found out
MOST_TURNS = 200
ENOUGH = (5e-6, 1e-4)  # median and 99.9 % quantile of the error that counts as equal accuracy in float32 flows


@dataclass(frozen=True)
class Timing:
    """One contender of one case.

    Attributes:
        median, lower, upper, fastest: seconds; lower and upper are quartiles. turns: number of them.
        error_median, error_most, error_worst: relative error of a row against float64; most is its 99.9 % quantile.
    """

    median: float
    lower: float
    upper: float
    fastest: float
    turns: int
    error_median: float
    error_most: float
    error_worst: float


@dataclass(frozen=True)
class Measured:
    """Timings of those who ran, and why the others did not."""

    timings: dict[str, Timing]
    absent: dict[str, str]


def measure(case: Case, *, seconds: float = 1.0) -> Measured:
    """Warm every contender up, then let them take turns until each has had `seconds` of its own, or one turn."""
    ready: dict[str, tuple[Run, float]] = {}
    errors: dict[str, tuple[float, float, float]] = {}
    absent: dict[str, str] = {}
    exact = case.exact()
    for name, contender in case.contenders.items():
        try:
            run = _build(case, contender)
            begin = time.perf_counter()
            errors[name] = row_errors(as_tensor(run()), exact)
            ready[name] = (run, time.perf_counter() - begin)
        except NotOffered as reason:
            absent[name] = str(reason)
        except ModuleNotFoundError as error:
            absent[name] = f"not installed ({error.name})"
        except Exception as error:  # whatever a peer trips over is its result
            if contender.ours:
                raise
            absent[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    samples: dict[str, list[float]] = {name: [] for name in ready}
    cuda = exact.is_cuda
    waiting = list(ready)
    while waiting:
        for name in waiting:
            samples[name].append(_seconds(ready[name][0], cuda))
        waiting = [name for name in waiting if sum(samples[name]) < seconds and len(samples[name]) < MOST_TURNS]
    return Measured({name: _timing(taken, errors[name]) for name, taken in samples.items()}, absent)


def row_errors(got: Tensor, exact: Tensor) -> tuple[float, float, float]:
    """Median, 99.9 % quantile and largest relative error of a row; infinite where something is not finite."""
    rows = got.reshape(-1, exact.shape[1])[: len(exact)].to(exact.device, torch.float64)
    errors = (rows - exact).norm(dim=1) / exact.norm(dim=1)
    errors = errors.nan_to_num(nan=float("inf")).sort().values
    at = [len(errors) // 2, min(int(0.999 * len(errors)), len(errors) - 1), len(errors) - 1]
    low, most, worst = errors[at].tolist()
    return low, most, worst


def as_tensor(got: Any) -> Tensor:
    """A torch tensor of any library's array or number."""
    return got if isinstance(got, Tensor) else torch.from_numpy(np.array(got))


def accurate(timing: Timing) -> bool:
    """Whether the errors are small enough for a comparison at equal accuracy."""
    return timing.error_median <= ENOUGH[0] and timing.error_most <= ENOUGH[1]


def _build(case: Case, contender: Contender) -> Run:
    """The function to time, unless a sixteenth of the points says that it would take too long."""
    problem = case.problem
    rows = len(problem.x) // TRIAL
    if rows and not contender.ours and not contender.compiles and problem.operation != "diameter":
        small = contender.build(replace(problem, x=problem.x[:rows].contiguous()))
        begin = time.perf_counter()
        small()
        taken = time.perf_counter() - begin
        if taken > LONGEST / TRIAL:  # a first call may compile or import: the second one counts
            begin = time.perf_counter()
            small()
            taken = time.perf_counter() - begin
        if taken > LONGEST / TRIAL:
            raise NotOffered(f"skipped: above {LONGEST:.0f} s per call ({taken:.1f} s for 1/{TRIAL} of the points)")
    return contender.build(problem)


def _timing(taken: list[float], errors: tuple[float, float, float]) -> Timing:
    lower, _, upper = statistics.quantiles(taken, n=4, method="inclusive") if len(taken) > 1 else taken * 3
    return Timing(statistics.median(taken), lower, upper, min(taken), len(taken), *errors)


def _seconds(run: Run, cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
