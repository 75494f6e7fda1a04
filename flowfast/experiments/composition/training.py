"""Runs of equal shape trained side by side as one batched model, and their errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flowfast.ensemble import Ensemble
from flowfast.experiments.composition.grids import times_of
from flowfast.experiments.composition.settings import Problem, Run
from flowfast.flow import flow_map
from flowfast.seeds import generator_for
from flowfast.students import FlowStudent, SegmentTable
from flowfast.teacher_pairs import PairSource, SegmentTarget, TeacherPairs
from flowfast.training import Recipe

BLOCK_ROWS = 8_192  # pairs of a segment that are made at once
MOST = 64  # networks side by side: beyond, a batched step costs as much per network

_Part: TypeAlias = tuple[FlowStudent, int, int]
"""A student, a segment of it, and the index of the source of its pairs."""


@dataclass(frozen=True)
class Group:
    """Runs whose networks have one shape and one number of optimiser steps."""

    runs: tuple[Run, ...]

    def networks(self) -> int:
        """How many are trained."""
        return sum(1 if run.shared else run.segments for run in self.runs)


def grouped(runs: Sequence[Run], most: int = MOST) -> list[Group]:
    """Divide runs into groups of at most `most` networks (or one run), in the order of their first runs."""
    groups: list[list[Run]] = []
    latest: dict[tuple[Any, ...], int] = {}
    for run in runs:
        key = (
            run.shared, run.problem.dim, run.updates(), run.rows(), run.segments if run.shared else 0,
            run.width, run.depth, run.learning_rate, run.schedule,
        )  # fmt: skip
        index = latest.get(key)
        if index is None or Group((*groups[index], run)).networks() > most:
            latest[key] = index = len(groups)
            groups.append([])
        groups[index].append(run)
    return [Group(tuple(group)) for group in groups]


def train(group: Group) -> list[FlowStudent]:
    """Train every run of the group on fresh pairs of the exact flow: a student per run, in order.

    Pairs of one problem, segment and seed are drawn once for all runs that need them: students, and grids where they
    agree, differ by what they are, not by their luck.
    """
    students = [student_of(run) for run in group.runs]
    first = group.runs[0]
    recipe = Recipe(steps=first.updates(), learning_rate=first.learning_rate, schedule=first.schedule)
    places: dict[tuple[Any, ...], int] = {}
    sources: list[PairSource] = []
    plan: list[list[_Part]] = []  # per network
    for run, student in zip(group.runs, students, strict=True):
        times = times_of(run.problem, run.grid, run.segments)
        parts = []
        for i, (t_from, t_to) in enumerate(zip(times[:-1], times[1:], strict=True)):
            key = run.problem, run.seed, i, t_from, t_to
            if key not in places:
                places[key] = len(sources)
                stream = run.seed, "composition", i
                target = SegmentTarget(t_from, t_to)
                sources.append(PairSource(_mixture(run.problem), run.problem.process(), target, stream))
            parts.append((student, i, places[key]))
        plan += [parts] if run.shared else [[part] for part in parts]
    ensemble = Ensemble(list(_networks(students)), learning_rate=first.learning_rate, together=MOST)
    for step, (x, y) in enumerate(_steps(plan, sources, first.rows(), recipe.steps)):
        ensemble.learning_rate = recipe.learning_rate_at(step)
        ensemble.step(x, y)
    for index, network in enumerate(_networks(students)):
        network.load_state_dict(ensemble.member(index).state_dict())
    return [student.eval() for student in students]


def student_of(run: Run) -> FlowStudent:
    """A fresh student of the run, its weights a function of the seed alone."""
    mixture, process = _mixture(run.problem), run.problem.process()
    times = torch.tensor(times_of(run.problem, run.grid, run.segments), dtype=torch.float64)
    table = SegmentTable(
        r=tuple(process.snr_root(times, run.problem.std).tolist()),
        s=tuple(process.std(times, run.problem.std).tolist()),
    )
    center = mixture.means.double().mean(0)
    return FlowStudent(
        run.problem.dim,
        table,
        width=run.width,
        depth=run.depth,
        preconditioned=run.student != "plain",
        shared=run.shared,
        center=center,
        scale=float((mixture.means.double() - center).square().mean().sqrt()),
        seed=run.seed,
    )


@torch.inference_mode()
def errors(run: Run, student: FlowStudent) -> dict[str, Any]:
    """The composed error of a student and that of each segment alone.

    Returns:
        error: relative squared error of the composition against the exact flow, on fresh points; local: mean squared
        error of each segment's end, from points of the exact flow, in units of the data's mean square.
    """
    path = path_of(run.problem, times_of(run.problem, run.grid, run.segments), run.points)
    norm = path[-1].double().square().sum(1).mean()
    found = student(path[0]).double()
    local = [
        _apart(student.segment(i, path[i]).double(), path[i + 1].double()) / norm for i in range(student.n_segments)
    ]
    return {
        "error": float(_apart(found, path[-1].double()) / norm),
        "local": [float(value) for value in local],
    }


def _apart(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum(1).mean()


@lru_cache(maxsize=64)
def path_of(problem: Problem, times: tuple[float, ...], points: int) -> Tensor:
    """Where the exact flow takes points that no training sees: (n + 1, points, d)."""
    mixture, process = _mixture(problem), problem.process()
    generator = generator_for("composition", "evaluation")
    path = [process.marginal(mixture, times[0]).sample(points, generator=generator)]
    for t_from, t_to in zip(times[:-1], times[1:], strict=True):
        path.append(flow_map(path[-1], mixture, process, t_from, t_to))
    return torch.stack(path)


@lru_cache(maxsize=64)
def _mixture(problem: Problem) -> Any:
    return problem.mixture()


def _networks(students: Sequence[FlowStudent]) -> Iterator[Any]:
    for student in students:
        yield from student.networks


def _steps(
    plan: Sequence[Sequence[_Part]], sources: Sequence[PairSource], rows: int, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the networks are asked and should answer in each step: (M, b, d_in) and (M, b, d_out).

    Pairs become the networks' own numbers for many steps at once: small tensors cost more than they hold.
    """
    together = max(1, BLOCK_ROWS // rows)
    pairs = TeacherPairs(sources, together * rows)
    for block in range(-(-steps // together)):
        x_from, x_to = pairs(block)
        made = [
            _joined([student.network_pair(i, x_from[at], x_to[at]) for student, i, at in parts], together)
            for parts in plan
        ]
        x, y = (torch.stack(side) for side in zip(*made, strict=True))  # (M, together, b, d_in or d_out)
        yield from ((x[:, i], y[:, i]) for i in range(min(together, steps - block * together)))


def _joined(pairs: Sequence[tuple[Tensor, Tensor]], steps: int) -> tuple[Tensor, Tensor]:
    """The segments of one network side by side: (steps, b, d_in) and (steps, b, d_out)."""
    inputs, outputs = ([x.unflatten(0, (steps, -1)) for x in side] for side in zip(*pairs, strict=True))
    return torch.cat(inputs, 1), torch.cat(outputs, 1)
