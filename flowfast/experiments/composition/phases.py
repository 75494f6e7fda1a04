"""When composing helps: errors at n segments beside one segment, by problem, budget and student."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flowfast.experiments.composition.analysis import Found, grouped_by
from flowfast.experiments.composition.settings import Problem, Student

CONFIDENCE = 0.95  # of "helps" and "hurts", by Student's t over the seeds


@dataclass(frozen=True)
class Phase:
    """One number of segments against one segment, everything else equal.

    Attributes:
        problem: with seed 0, standing for all seeds. student, steps, segments: what ran.
        error, alone: geometric means over the seeds, with n segments and with one.
        log_ratio: mean over seeds of log(error with n / error with one). spread: its standard error.
        seeds: how many. verdict: "helps", "hurts", or "open" where zero lies within the interval of CONFIDENCE.
    """

    problem: Problem
    student: Student
    steps: int
    segments: int
    error: float
    alone: float
    log_ratio: float
    spread: float
    seeds: int
    verdict: str


def phases(runs: Sequence[Found]) -> list[Phase]:
    """Every cell that has at least two seeds with n segments and with one.

    Args:
        runs: of the phase study; a seed has means, weights and pairs of its own, the same for every n.
    """
    found = []
    cells = grouped_by(runs, lambda f: (replace(f.run.problem, seed=0), f.run.student, f.run.steps))
    for (problem, student, steps), group in cells.items():
        errors = {(one.run.segments, one.run.seed): one.error for one in group}
        for segments in sorted({n for n, _ in errors if n > 1}):
            seeds = [seed for n, seed in errors if n == segments and (1, seed) in errors]
            if len(seeds) < 2:
                continue
            composed = [math.log(errors[segments, seed]) for seed in seeds]
            alone = [math.log(errors[1, seed]) for seed in seeds]
            ratios = [a - b for a, b in zip(composed, alone, strict=True)]
            mean, spread = statistics.fmean(ratios), statistics.stdev(ratios) / len(seeds) ** 0.5
            found.append(
                Phase(
                    problem,
                    student,
                    steps,
                    segments,
                    math.exp(statistics.fmean(composed)),
                    math.exp(statistics.fmean(alone)),
                    mean,
                    spread,
                    len(seeds),
                    _verdict(mean, spread, len(seeds)),
                )  # fmt: skip
            )
    return found


def _verdict(mean: float, spread: float, seeds: int) -> str:
    from scipy.stats import t

    bound = float(t.ppf((1 + CONFIDENCE) / 2, seeds - 1)) * spread
    if abs(mean) <= bound:
        return "open"
    return "helps" if mean < 0 else "hurts"


def counts(found: Sequence[Phase]) -> dict[tuple[Student, int, int], dict[str, int]]:
    """How many cells say what, by student, budget and n."""
    return {
        key: {word: sum(one.verdict == word for one in group) for word in ("helps", "open", "hurts")}
        for key, group in grouped_by(found, lambda one: (one.student, one.steps, one.segments)).items()
    }
