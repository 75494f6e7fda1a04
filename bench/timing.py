"""How it is timed: contenders take turns (A B C A B C ...), so that a busy machine slows all of them alike.

Libraries leave their threads spinning for some milliseconds after a call, at the expense of whoever is next. So a turn
begins with untimed calls of the contender whose turn it is, until the others' threads have gone to sleep.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.cases import Case, Contender
from bench.peers import NotOffered, Problem, Run

LONGEST = 20.0  # seconds of a call, beyond which a peer is skipped
TRIAL = 16  # part of the points on which it is found out
MOST_TURNS, FEWEST_TURNS = 200, 3
SETTLE = 0.12  # seconds of untimed calls, at least one, before each timed one
SLOW = 1.0  # seconds of a call that needs no untimed one before it
ONCE = 3.0  # seconds of a call that is timed but once, the first on all points
HOW = (
    f"contenders take turns; before each timed call untimed ones of the same contender for {SETTLE} s, at least one "
    f"(none where a call takes above {SLOW:g} s); the median of at least {FEWEST_TURNS} timed calls (one where a call "
    f"takes above {ONCE:g} s, the first on all points)"
)
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
    """Call every contender once, then let them take turns until each has had `seconds` of its own."""
    turns: dict[str, Callable[[], float]] = {}
    samples: dict[str, list[float]] = {}
    errors: dict[str, tuple[float, float, float]] = {}
    absent: dict[str, str] = {}
    exact = case.exact()
    for name, contender in case.contenders.items():
        try:
            run = _build(case, contender)
            begin = time.perf_counter()
            got = run()
            first = time.perf_counter() - begin
            errors[name] = row_errors(as_tensor(got), exact)
            tried = not contender.compiles and _smaller(case.problem)[1] < 1  # what it loads is loaded
            if tried and first > ONCE:
                samples[name] = [first]
            else:
                turns[name] = partial(turn, run)
        except NotOffered as reason:
            absent[name] = str(reason)
        except ModuleNotFoundError as error:
            absent[name] = f"not installed ({error.name})"
        except Exception as error:  # whatever a peer trips over is its result
            if contender.ours:
                raise
            absent[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    samples |= take_turns(turns, seconds)
    return Measured({name: Timing(*summary(samples[name]), *errors[name]) for name in errors}, absent)


def take_turns(turns: Mapping[str, Callable[[], float]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each timed call, given functions that make one turn and say how long its timed call took.

    Each takes turns until it has had `seconds`, untimed calls included, and no fewer than FEWEST_TURNS.
    """
    samples: dict[str, list[float]] = {name: [] for name in turns}
    spent = dict.fromkeys(turns, 0.0)
    waiting = list(turns)
    while waiting:
        for name in waiting:
            begin = time.perf_counter()
            samples[name].append(turns[name]())
            spent[name] += time.perf_counter() - begin
        waiting = [name for name in waiting if _goes_on(samples[name], spent[name], seconds)]
    return samples


def _goes_on(taken: list[float], spent: float, seconds: float) -> bool:
    fewest = 1 if taken[-1] > ONCE else FEWEST_TURNS
    return len(taken) < fewest or (spent < seconds and len(taken) < MOST_TURNS)


def turn(run: Run) -> float:
    """Seconds of one call after untimed ones, or of the first when it is slow."""
    begin, settled = time.perf_counter(), False
    while not settled:
        taken = _seconds(run)
        if taken > SLOW:
            return taken
        settled = time.perf_counter() - begin >= SETTLE
    return _seconds(run)


def summary(taken: list[float]) -> tuple[float, float, float, float, int]:
    """Median, quartiles, fastest and number of turns."""
    lower, _, upper = statistics.quantiles(taken, n=4, method="inclusive") if len(taken) > 1 else taken * 3
    return statistics.median(taken), lower, upper, min(taken), len(taken)


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
    """The function to time, unless a smaller problem says that it would take too long."""
    run = contender.build(case.problem)
    small, part = _smaller(case.problem)
    if part < 1 and not contender.ours and not contender.compiles:
        trial = contender.build(small)
        for _ in range(2):  # a first call may compile or import: the second one counts
            taken = _seconds(trial)
            if taken <= LONGEST * part:
                return run
        raise NotOffered(f"skipped: above {LONGEST:.0f} s per call ({taken:.1f} s for 1/{1 / part:.0f} of the work)")
    return run


def _smaller(problem: Problem) -> tuple[Problem, float]:
    """A part of the problem, and how much of the work it is."""
    if problem.operation == "diameter":
        rows = max(1, len(problem.means) // math.isqrt(TRIAL))  # its work grows with their square
        return replace(problem, means=problem.means[:rows].contiguous()), 1 / TRIAL
    rows = len(problem.x) // TRIAL
    return (replace(problem, x=problem.x[:rows].contiguous()), 1 / TRIAL) if rows else (problem, 1.0)


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
