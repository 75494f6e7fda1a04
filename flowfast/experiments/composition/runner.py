"""Runs of a study that a file of results does not hold yet are trained and added to it, a line each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flowfast.experiments.composition.grids import times_of
from flowfast.experiments.composition.lines import about, append, read
from flowfast.experiments.composition.settings import Run
from flowfast.experiments.composition.training import MOST, errors, grouped, train

Tell = Callable[[int, int], None]


def run_study(runs: Sequence[Run], path: str | Path, *, tell: Tell | None = None, most: int = MOST) -> None:
    """Train and evaluate what is missing; stopped and called again, it goes on after the last whole group.

    Args:
        runs: of the study, each once. path: file of results, made or extended. tell: called with runs done and in all.
        most: networks trained side by side at most.

    Raises:
        ValueError: a damaged line of results. RuntimeError: a student's error is not finite.
    """
    path = Path(path)
    finished = {line["digest"] for line in read(path) if "digest" in line}
    if not path.exists():
        append(path, about())
    for group in grouped(runs, most):
        if tell is not None:
            tell(sum(run.digest() in finished for run in runs), len(runs))
        if all(run.digest() in finished for run in group.runs):
            continue
        begin = time.perf_counter()
        students = train(group)
        seconds = (time.perf_counter() - begin) / len(group.runs)
        for run, student in zip(group.runs, students, strict=True):
            if run.digest() not in finished:
                append(path, _line(run, errors(run, student), seconds))
                finished.add(run.digest())


def _line(run: Run, found: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What is stored of one run: its settings, grid, errors and share of the group's training time."""
    times = times_of(run.problem, run.grid, run.segments)
    return {"digest": run.digest(), "run": run.to_dict(), "times": times, **found, "seconds": seconds}
