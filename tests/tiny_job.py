"""A job small enough for tests: 5 components in 4 dimensions, two grids, a few optimiser steps."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from flowfast import GaussianMixture, OUProcess
from flowfast.distillation import Recipe
from flowfast.experiments import JobResult, JobSettings, run_job

MIXTURE = GaussianMixture.random(5, 4, half_width=1.0, std=0.2, seed=1)
PROCESS = OUProcess(5.0)
SETTINGS = JobSettings(
    name="tiny",
    segments=2,
    grids=("balanced", "measured"),
    rows=96,
    evaluation_rows=48,
    pictures=6,
    recipe=Recipe(steps=60, batch_size=32, width=16, depth=2),
)
IMAGES = replace(SETTINGS, name="tiny images", grids=("uniform",), image_shape=(2, 2), segments=1)


_PLACE = TemporaryDirectory(prefix="flowfast-tiny-")  # removed when the test session ends


@cache
def finished(settings: JobSettings = SETTINGS) -> JobResult:
    """The finished job, run once per test session; tests that write into a folder copy it."""
    return run_job(MIXTURE, PROCESS, settings, Path(_PLACE.name) / settings.name)
