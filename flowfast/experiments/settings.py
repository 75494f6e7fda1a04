"""What a job is: its settings, checked when they are made, and the events it sends while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flowfast.distillation import Recipe
from flowfast.grids import KINDS, GridKind

STORED: Literal["stored"] = "stored"  # the grid of a teacher set that is there already
Kind = GridKind | Literal["stored"]


@dataclass(frozen=True)
class JobSettings:
    """Everything that decides a job's numbers besides the mixture and the process.

    Args:
        name: of the mixture, for titles.
        segments: steps of a student, >= 1.
        grids: kinds of time grid to distil on, each once; of "uniform", "balanced", "signed", "measured". With `data`
            it is ("stored",).
        rows: teacher pairs stored per segment of a grid, >= 1.
        evaluation_rows: fresh starting points on which errors are measured, >= 1.
        pictures: samples shown in the report, >= 1, at most evaluation_rows.
        image_shape: (height, width) when a point is a grey image, else None.
        horizon: time T at which the noise starts, > 0.
        seed: of everything random, >= 0.
        recipe: how a student is trained.
        data: digest of the plan of a stored teacher set, whose grid and rows are taken; None generates sets.

    Raises:
        ValueError: a value outside these ranges.
    """

    name: str = "mixture"
    segments: int = 4
    grids: tuple[Kind, ...] = ("uniform", "balanced", "measured")
    rows: int = 24_576
    evaluation_rows: int = 2_048
    pictures: int = 12
    image_shape: tuple[int, int] | None = None
    horizon: float = 1.0
    seed: int = 0
    recipe: Recipe = field(default_factory=Recipe)
    data: str | None = None

    def __post_init__(self) -> None:
        """Refuse values outside the documented ranges."""
        for name in ("segments", "rows", "evaluation_rows", "pictures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.pictures > self.evaluation_rows:
            raise ValueError(f"pictures must be at most evaluation_rows={self.evaluation_rows}; got {self.pictures}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0; got {self.seed}")
        if not (self.horizon > 0 and math.isfinite(self.horizon)):
            raise ValueError(f"horizon must be positive and finite; got {self.horizon}")
        if (self.data is not None) != (self.grids == (STORED,)):
            raise ValueError(f"grids must be ('stored',) with data, and only then; got {self.grids}")
        unknown = [kind for kind in self.grids if kind not in (*KINDS, STORED)]
        if unknown or not self.grids:
            raise ValueError(f"grids must name some of {', '.join(KINDS)}; got {', '.join(unknown) or 'none'}")
        if len(set(self.grids)) < len(self.grids):
            raise ValueError(f"grids must name each kind once; got {', '.join(self.grids)}")

    def check_dim(self, dim: int) -> None:
        """Raise ValueError when image_shape does not hold exactly `dim` pixels."""
        if self.image_shape is not None and math.prod(self.image_shape) != dim:
            height, width = self.image_shape
            raise ValueError(f"image_shape {height} x {width} must hold as many pixels as a mean has numbers, {dim}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Event:
    """One sign of life of a running job.

    Args:
        stage: "exact flow", "teacher data", "training" or "evaluation".
        grid: kind of grid it works on, None for the stage before the first.
        done: units finished (rows, optimiser steps or parts) of total.
        total: units in the stage.
        loss: latest training loss, None outside training.
    """

    stage: str
    grid: str | None
    done: int
    total: int
    loss: float | None = None


Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Listener of a job nobody watches."""
