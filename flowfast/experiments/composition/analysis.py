"""What the stored lines say: rank correlations of predictors, grids beside each other. A pure function of the files."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from flowfast.experiments.composition.ingredients import name_of
from flowfast.experiments.composition.lines import read
from flowfast.experiments.composition.predictors import predictions
from flowfast.experiments.composition.settings import Run

RESAMPLES = 2_000
LEVEL = 0.95
LEAST_GRIDS = 5  # of a group in which ranks are compared

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Found:
    """One finished run: its settings, times, composed error, and each segment's own error."""

    run: Run
    times: tuple[float, ...]
    error: float
    local: tuple[float, ...]


@dataclass(frozen=True)
class Interval:
    """An estimate with a bootstrap interval of LEVEL, and the number of groups behind it."""

    value: float
    low: float
    high: float
    groups: int


def read_runs(path: Path) -> list[Found]:
    """Every finished run of a file of results."""
    return [
        Found(Run.from_dict(line["run"]), tuple(line["times"]), line["error"], tuple(line["local"]))
        for line in read(path)
        if "run" in line
    ]


def read_ingredients(path: Path) -> dict[str, dict[str, Any]]:
    """Every grid's ingredients by name."""
    return {line["digest"]: line for line in read(path) if "digest" in line}


def grouped_by(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by key, in order."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def rank_correlations(
    runs: Sequence[Found], known: Mapping[str, Mapping[str, Any]], *, within: Callable[[Found], Hashable]
) -> dict[str, Interval]:
    """Spearman's rank correlation of every predictor with the composed error, mean over groups.

    Args:
        runs: of one kind of student. known: ingredients by name of grid. within: what a group has in common; ranks
            are compared within groups of at least LEAST_GRIDS runs.

    Returns:
        By predictor, with an interval from resampled problems (their grids are not independent of each other).
    """
    values: dict[str, dict[Any, list[float]]] = {}  # of a predictor and problem: the correlation in each group
    for group in grouped_by(runs, within).values():
        if len(group) < LEAST_GRIDS:
            continue
        said = [predictions(known[name_of(f.run.problem, f.times)], f.run.student, f.local) for f in group]
        table = np.array([list(one.values()) for one in said])
        found = spearman(table, np.array([one.error for one in group]))
        for name, rho in zip(said[0], found.tolist(), strict=True):
            values.setdefault(name, {}).setdefault(group[0].run.problem, []).append(rho)
    return {name: interval(list(by_problem.values())) for name, by_problem in values.items()}


def spearman(table: np.ndarray[Any, Any], errors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rank correlation of every column of table (n, m) with errors (n,): (m,); 0 where a column is constant."""
    from scipy.stats import rankdata

    ranks, order = rankdata(table, axis=0), rankdata(errors)
    ranks, order = ranks - ranks.mean(0), order - order.mean()
    size = np.sqrt((ranks**2).sum(0) * (order**2).sum())
    found: np.ndarray[Any, Any] = np.divide(order @ ranks, size, out=np.zeros_like(size), where=size > 0)
    return found


def interval(clusters: Sequence[Sequence[float]]) -> Interval:
    """Mean over all values, with an interval from resampled clusters."""
    sums = np.array([sum(values) for values in clusters])
    counts = np.array([len(values) for values in clusters])
    draws = np.random.default_rng(0).integers(len(clusters), size=(RESAMPLES, len(clusters)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high), int(counts.sum()))


def repeatability(runs: Sequence[Found]) -> Interval | None:
    """Rank correlation of the errors between training seeds 0 and 1 on the same grids: no predictor can do much better.

    None where fewer than LEAST_GRIDS were trained twice.
    """
    by_problem: dict[Any, list[float]] = {}
    for (problem, _, _), group in grouped_by(runs, lambda f: (f.run.problem, f.run.student, f.run.segments)).items():
        seeds = grouped_by(group, lambda found: found.run.seed)
        if not {0, 1} <= set(seeds):
            continue
        first, second = ({found.times: found.error for found in seeds[seed]} for seed in (0, 1))
        shared = [times for times in first if times in second]
        if len(shared) >= LEAST_GRIDS:
            once, again = (np.array([errors[times] for times in shared]) for errors in (first, second))
            by_problem.setdefault(problem, []).append(float(spearman(once[:, None], again)[0]))
    return interval(list(by_problem.values())) if by_problem else None


def grid_ratios(runs: Sequence[Found], grids: Sequence[str], base: str = "uniform") -> dict[str, Interval]:
    """Composed error on each grid over that on `base`, geometric mean over problems (the exponents' mean is taken).

    A grid that a problem does not list because another has the same times counts by that one.
    """
    logs: dict[str, dict[Any, list[float]]] = {grid: {} for grid in grids}
    for group in grouped_by(runs, lambda f: (f.run.problem, f.run.student, f.run.segments, f.run.seed)).values():
        errors = {found.run.grid: found.error for found in group}
        if group[0].run.problem.std == 1:  # s = 1 always: see `grid_study`
            errors |= {"signed": errors.get("balanced", math.nan), "log-r": errors.get("uniform", math.nan)}
        for grid in grids:
            if base in errors and grid in errors and group[0].run.segments > 1:
                logs[grid].setdefault(group[0].run.problem, []).append(math.log(errors[grid] / errors[base]))
    found = {grid: interval(list(by_problem.values())) for grid, by_problem in logs.items() if by_problem}
    return {
        grid: Interval(math.exp(one.value), math.exp(one.low), math.exp(one.high), one.groups)
        for grid, one in found.items()
    }
