"""Samples from a finished job's student."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from flowfast.experiments.folder import MIXTURE
from flowfast.experiments.result import JobResult
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.students import FlowStudent


def sample_job(folder: str | Path, n: int, *, grid: str | None = None, seed: int = 0) -> tuple[Tensor, str]:
    """Draw n points from a student: noise at the horizon, carried to the data by the student.

    Args:
        folder: of a finished job. n: points, >= 1. grid: the student's; None takes the one with the smallest composed
            error. seed: of the noise, >= 0.

    Returns:
        points (n, d) in the mixture's dtype, and the grid they came from.

    Raises:
        ValueError: n, seed or grid out of range, or no finished job there.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1; got {n}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0; got {seed}")
    result = JobResult.load(folder)
    kind = result.best().kind if grid is None else result.grid(grid).kind
    student = FlowStudent.load(result.folder / "grids" / kind / "student")
    mixture = GaussianMixture.load(result.folder / MIXTURE)
    marginal = OUProcess.from_dict(result.process).marginal(mixture, float(result.settings["horizon"]))
    noise = marginal.sample(n, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        points: Tensor = student(noise)
    return points, kind
