"""What one run is: everything that decides its numbers, and a digest by which its result is found again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from flowfast.grids import GridKind
from flowfast.mixture import GaussianMixture
from flowfast.students.mlp import Activation

Target = Literal["score", "flow"]
Teacher = Literal["exact", "paper"]
Student = Literal["mlp", "transformer", "residual"]
Precision = Literal["float32", "tf32", "bf16"]

LEAST_BATCH, LEAST_ROWS, LEAST_STEPS = 16, 1_000, 20


@dataclass(frozen=True)
class Settings:
    """One cell of a table, without the seed.

    Args:
        target: "score" at time `time`, or the "flow" from `time` to the data, one student per segment, composed.
        time: of the score, or at which the flow starts, > 0.
        std: of the mixture's components, sigma0.
        grid: kind of time grid over [0, time]. segments: of it, >= 1. Both mean nothing for a score.
        teacher: of the flow: "exact", or "paper": classical Runge-Kutta uniform in t.
        teacher_steps: of the paper's teacher over [0, time], which an exact one is compared with, too; a segment takes
            its share by length.
        student: kind of network. width: of its layers. depth: hidden layers of an "mlp", or blocks.
        activation: of an "mlp".
        weight_bound: every weight matrix is clamped to [-B, B] after each step; None leaves them free.
        steps: optimiser steps in all, shared evenly by the segments.
        batch_size: fresh pairs per step and segment. evaluation_rows: fresh points of every error.
        own_means: the means are drawn with the run's seed; otherwise with seed 0.
        learning_rate: of AdamW, constant. clip_norm: bound on the gradient norm. weight_decay: of AdamW.
        precision: of the training step.
        components, dim, half_width: of the mixture. beta: rate of the forward process.
    """

    target: Target = "flow"
    time: float = 1.0
    std: float = 1.0
    grid: GridKind = "uniform"
    segments: int = 1
    teacher: Teacher = "exact"
    teacher_steps: int = 100
    student: Student = "mlp"
    width: int = 512
    depth: int = 4
    activation: Activation = "relu-requ"
    weight_bound: float | None = None
    steps: int = 20_000
    batch_size: int = 1_024
    evaluation_rows: int = 50_000
    own_means: bool = False
    learning_rate: float = 2e-4
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    precision: Precision = "float32"
    components: int = 20
    dim: int = 64
    half_width: float = 5.0
    beta: float = 5.0

    def scaled(self, scale: float) -> Settings:
        """A rehearsal: steps, batch and evaluation points times `scale`, but at least 20 a segment, 16 and 1,000."""
        if scale == 1.0:
            return self
        return replace(
            self,
            steps=max(LEAST_STEPS * self.segments, round(self.steps * scale)),
            batch_size=max(LEAST_BATCH, round(self.batch_size * scale)),
            evaluation_rows=max(LEAST_ROWS, round(self.evaluation_rows * scale)),
        )

    def steps_per_segment(self) -> int:
        """Optimiser steps of each segment's student."""
        return self.steps // self.segments

    def mixture(self, seed: int) -> GaussianMixture:
        """The run's mixture, float32: means uniform in [-half_width, half_width]^dim."""
        return GaussianMixture.random(
            self.components, self.dim, half_width=self.half_width, std=self.std, seed=seed if self.own_means else 0
        )


@dataclass(frozen=True)
class Variant:
    """How the tables are run where the paper leaves a choice, the same for everything in one folder.

    Args:
        scale: in (0, 1]; below 1 a rehearsal, see `Settings.scaled`. precision: of the training steps.
        student: of Table 4: "transformer", or "residual" (blocks x + h v with an inner network each).
    """

    scale: float = 1.0
    precision: Precision = "float32"
    student: Student = "transformer"


@dataclass(frozen=True)
class Run:
    """One training with its evaluation: a cell's settings and a seed."""

    settings: Settings
    seed: int

    def identity(self) -> dict[str, Any]:
        """Plain values that make this run this run."""
        return {"settings": asdict(self.settings), "seed": self.seed}

    def digest(self) -> str:
        """Name of the run by its content; runs of equal content are one run, whichever tables they serve."""
        return digest(self.identity())


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits of plain values' content."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
