"""The two studies as data: which grid is good, and when composing helps."""

from __future__ import annotations

from itertools import product
from typing import cast

from flowfast.experiments.composition.settings import Problem, Run, Student
from flowfast.grids import KINDS

STDS, COMPONENTS, DIMS = (1.0, 0.3, 0.1), (3, 20), (8, 64)
GRIDS = (*KINDS, "log-r", *(f"random-{i}" for i in range(6)))
SEGMENTS = (1, 2, 4, 8)
BUDGETS = {240: SEGMENTS, 800: SEGMENTS, 2_400: (1, 4)}  # optimiser steps in all, and what n they are spent on
PHASE_GRIDS: dict[Student, str] = {"plain": "balanced", "shared": "measured"}  # each student's own best


def problems(seed: int = 0) -> list[Problem]:
    """Every combination of sigma0, k and d."""
    return [Problem(*each, seed) for each in product(STDS, COMPONENTS, DIMS)]


def grid_study(steps: int = 2_000) -> list[Run]:
    """Eleven grids for each kind of student.

    On every problem: separate networks, plain and preconditioned, with n = 4 and 8, and shared ones with n = 4. Besides
    separate networks with n = 2 at sigma0 = 1, and with n = 4 and a second seed at d = 8.
    """
    separate, shared = cast(tuple[Student, ...], ("preconditioned", "plain")), cast(tuple[Student, ...], ("shared",))
    everything = problems()
    parts = (
        (separate, 4, 0, everything),
        (separate, 8, 0, everything),
        (shared, 4, 0, everything),
        (separate, 2, 0, [problem for problem in everything if problem.std == 1]),
        (separate, 4, 1, [problem for problem in everything if problem.dim == 8]),
    )
    return [
        Run(problem, grid, segments, student, steps, seed)
        for students, segments, seed, chosen in parts
        for problem in chosen
        for grid in grids_of(problem)
        for student in students
    ]


def grids_of(problem: Problem) -> list[str]:
    """GRIDS; at sigma0 = 1 the signed grid is the balanced one and log r is linear in t: both are left out."""
    return [grid for grid in GRIDS if problem.std != 1 or grid not in ("signed", "log-r")]


def phase_study(seeds: int = 3) -> list[Run]:
    """Every problem, budget and n, for plain students and shared ones; each seed has means of its own."""
    return [
        Run(problem, grid if segments > 1 else "uniform", segments, student, steps, seed)
        for steps, seed in product(BUDGETS, range(seeds))
        for (student, grid), segments, problem in product(PHASE_GRIDS.items(), BUDGETS[steps], problems(seed))
    ]
