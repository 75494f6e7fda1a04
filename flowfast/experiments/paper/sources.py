"""What a run's students learn, segment by segment, as sources of teacher pairs."""

from __future__ import annotations

import torch

from flowfast.experiments.paper.settings import Run
from flowfast.grids import time_grid
from flowfast.process import OUProcess
from flowfast.teacher_pairs import PairSource, ScoreTarget, SegmentTarget, paper_steps

EVALUATION_STEPS = 20  # of the paper's teacher at least, when a segment of a grid is evaluated alone


def times_of(run: Run) -> list[float]:
    """Ends of the segments, from noise to data; for a score its one time."""
    settings = run.settings
    if settings.target == "score":
        return [settings.time]
    times: list[float] = time_grid(
        settings.mixture(run.seed),
        OUProcess(settings.beta),
        settings.segments,
        kind=settings.grid,
        horizon=settings.time,
    ).tolist()
    return times


def sources_of(run: Run, device: torch.device, *, evaluation: bool = False) -> list[PairSource]:
    """One source per segment, from noise to data.

    Args:
        run: whose. device: of the pairs.
        evaluation: with as many steps of the paper's teacher as it takes when a segment is evaluated.
    """
    settings, times = run.settings, times_of(run)
    if settings.target == "score":
        return [_source(run, ScoreTarget(settings.time), 0, device)]
    return [
        _source(run, _segment(run, t_from, t_to, evaluation), k, device)
        for k, (t_from, t_to) in enumerate(zip(times[:-1], times[1:], strict=True))
    ]


def whole_flow(run: Run, device: torch.device) -> PairSource:
    """Fresh points of the flow's start with where the exact flow carries them at time 0."""
    return _source(run, SegmentTarget(run.settings.time, 0.0), "whole", device)


def _source(run: Run, target: ScoreTarget | SegmentTarget, part: int | str, device: torch.device) -> PairSource:
    """The stream is the same in every cell of this seed: cells differ by what they train, not by their luck."""
    settings = run.settings
    return PairSource(
        settings.mixture(run.seed).to(device), OUProcess(settings.beta), target, (run.seed, "paper", part)
    )


def _segment(run: Run, t_from: float, t_to: float, evaluation: bool) -> SegmentTarget:
    settings = run.settings
    if settings.teacher == "exact":
        return SegmentTarget(t_from, t_to)
    if settings.segments == 1:
        steps = settings.teacher_steps
    else:
        least = {"least": EVALUATION_STEPS} if evaluation else {}
        steps = paper_steps(t_from / settings.time, t_to / settings.time, total=settings.teacher_steps, **least)
    return SegmentTarget(t_from, t_to, "paper", steps)
