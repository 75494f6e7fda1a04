"""Errors of a finished run's students on fresh points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowfast.experiments.paper.settings import Run
from flowfast.experiments.paper.sources import sources_of, times_of, whole_flow
from flowfast.flow import flow_map
from flowfast.ops import log_density
from flowfast.stability import cumulative_stability
from flowfast.teacher_pairs import PairSource

ROWS = 2_048  # per chunk: a transformer's attention over more would fill a small machine's memory


class Diverged(RuntimeError):
    """A run whose error is not finite."""


class Ratio:
    """Relative squared error `sum |f - y|^2 / sum |y|^2`, summed over chunks in float64."""

    def __init__(self) -> None:
        self._apart = self._norm = 0.0

    def add(self, found: Tensor, target: Tensor) -> None:
        """Count the rows of `found` (n, d) against `target` (n, d)."""
        exact = target.double()
        self._apart += float((found.double() - exact).square().sum())
        self._norm += float(exact.square().sum())

    def value(self) -> float:
        """The ratio so far."""
        return self._apart / self._norm


def evaluate(run: Run, students: Sequence[nn.Module], device: torch.device) -> dict[str, Any]:
    """The metrics of one run.

    Args:
        run: what was trained. students: one per segment, from noise to data. device: where they are.

    Returns:
        error: relative squared error against the run's own target, composed where there are several segments. For a
        flow also: exact_error, the same against the exact flow; teacher_error, of the paper's teacher against the
        exact flow; segments, each student from points of its own start; worst_segment, their largest; times;
        exponents, the stability A over each segment; negative_log_density, mean of -log p_0 at the end points, and
        teacher_negative_log_density at those of the exact flow, nats.

    Raises:
        Diverged: a metric is not finite.
    """
    with torch.inference_mode():
        if run.settings.target == "score":
            metrics: dict[str, Any] = {"error": _error(run, sources_of(run, device)[0], students[0])}
        else:
            metrics = _flow_metrics(run, students, device)
            alone = zip(sources_of(run, device, evaluation=True), students, strict=True)
            # One segment is the whole flow, whose error is known.
            segments = [metrics["error"]] if len(students) == 1 else [_error(run, *each) for each in alone]
            metrics |= {"segments": segments, "worst_segment": max(segments)}
    wrong = [name for name, value in metrics.items() if not all(map(math.isfinite, _numbers(value)))]
    if wrong:
        raise Diverged(f"not finite: {', '.join(wrong)}; the training diverged")
    return metrics


def _error(run: Run, source: PairSource, student: nn.Module) -> float:
    error = Ratio()
    for x, y in _pairs(run, source):
        error.add(student(x), y)
    return error.value()


def _flow_metrics(run: Run, students: Sequence[nn.Module], device: torch.device) -> dict[str, Any]:
    settings, times, source = run.settings, times_of(run), whole_flow(run, device)
    mixture, process = source.mixture, source.process
    error, exact_error, teacher_error = Ratio(), Ratio(), Ratio()
    density, teacher_density, count = 0.0, 0.0, 0
    for x, exact in _pairs(run, source):
        published = flow_map(x, mixture, process, settings.time, 0.0, method="paper", steps=settings.teacher_steps)
        found = x
        for student in students:
            found = student(found)
        error.add(found, exact if settings.teacher == "exact" else published)
        exact_error.add(found, exact)
        teacher_error.add(published, exact)
        density -= float(log_density(found, mixture).double().sum())
        teacher_density -= float(log_density(exact, mixture).double().sum())
        count += len(x)
    exponents = -cumulative_stability(
        settings.mixture(run.seed), process, torch.tensor(times, dtype=torch.float64)
    ).diff()
    return {
        "error": error.value(),
        "exact_error": exact_error.value(),
        "teacher_error": teacher_error.value(),
        "times": times,
        "exponents": exponents.tolist(),
        "negative_log_density": density / count,
        "teacher_negative_log_density": teacher_density / count,
    }


def _pairs(run: Run, source: PairSource) -> Iterator[tuple[Tensor, Tensor]]:
    """Evaluation points with their targets, chunk by chunk, each from a stream that no training sees."""
    for chunk, first in enumerate(range(0, run.settings.evaluation_rows, ROWS)):
        yield source.draw(min(ROWS, run.settings.evaluation_rows - first), "evaluation", chunk)


def _numbers(value: float | list[float]) -> list[float]:
    return value if isinstance(value, list) else [value]
