"""The two studies as data: which grid is good, and when composing helps."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from flowfast.experiments.composition.settings import Problem, Run, Student
from flowfast.grids import KINDS

STDS, COMPONENTS, DIMS = (1.0, 0.3, 0.1), (3, 20), (8, 64)
GRIDS = (*KINDS, "log-r", *(f"random-{i}" for i in range(6)))
SEGMENTS = (1, 2, 4, 8)
BUDGETS = (480, 1_440, 4_320)  # optimiser steps in all; each divides by 8
HOUSE: tuple[Student, ...] = ("plain", "shared")


def problems(seed: int = 0) -> list[Problem]:
    """Every combination of sigma0, k and d."""
    return [Problem(*each, seed) for each in product(STDS, COMPONENTS, DIMS)]


def grid_study(steps: int = 2_000) -> list[Run]:
    """Eleven grids, four numbers of segments, separate networks plain and preconditioned; n = 4 with a second seed.

    On sigma0 = 1 the signed grid is the balanced one, and left out.
    """
    runs = []
    for segments, seed in ((4, 0), (8, 0), (2, 0), (4, 1), (1, 0)):
        for problem, grid in product(problems(), GRIDS if segments > 1 else GRIDS[:1]):
            if grid == "signed" and problem.std == 1:
                continue
            first = Run(problem, grid, segments, "preconditioned", steps, seed)
            runs += [first, replace(first, student="plain")]
    return runs


def phase_study(grid: str = "log-r", seeds: int = 3) -> list[Run]:
    """Every problem, budget and number of segments, three seeds with means of their own: plain students, and shared."""
    return [
        Run(problem, grid if segments > 1 else GRIDS[0], segments, student, steps, seed)
        for steps, seed in product(BUDGETS, range(seeds))
        for student, segments, problem in product(HOUSE, SEGMENTS, problems(seed))
    ]
