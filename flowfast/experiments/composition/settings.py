"""What one run of the composition study is: a problem, a student, a time grid, a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from flowfast.experiments.paper.settings import digest
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.training import Schedule

Student = Literal["plain", "preconditioned", "shared"]
STUDENTS: tuple[Student, ...] = get_args(Student)


@dataclass(frozen=True)
class Problem:
    """A flow from t = 1 to the data: a mixture of the paper's family and its process.

    Args:
        std: of the components, sigma0. components, dim: k and d. seed: of the means, uniform in [-5, 5]^d.
    """

    std: float
    components: int
    dim: int
    seed: int = 0

    def mixture(self) -> GaussianMixture:
        """The law of the data, float32."""
        return GaussianMixture.random(self.components, self.dim, std=self.std, seed=self.seed)

    def process(self) -> OUProcess:
        """The paper's process, beta = 5."""
        return OUProcess(5.0)


@dataclass(frozen=True)
class Run:
    """One training: n segments composed from noise to data, at a budget that n does not change.

    Args:
        problem: what is learnt. grid: a kind of `time_grid`, "log-r" or "random-i", see `grids.times_of`.
        segments: n. seed: of weights and pairs.
        student: "plain" (networks that map points to points) or "preconditioned" (Eq. 10), one network per segment,
            steps / n optimiser steps of batch_size pairs each; or "shared": preconditioned, one network for all
            segments, `steps` steps of batch_size / n pairs of each segment. Pairs seen in all, and arithmetic, are the
            same for every n and every student.
        steps: optimiser steps of batch_size pairs in all. batch_size: a multiple of n.
        width, depth: of every network. learning_rate, schedule: of AdamW, see `Recipe`; no weight decay.
        points: fresh ones of the evaluation.
    """

    problem: Problem
    grid: str
    segments: int
    student: Student
    steps: int
    seed: int = 0
    batch_size: int = 128
    width: int = 64
    depth: int = 3
    learning_rate: float = 2e-3
    schedule: Schedule = "one-cycle"
    points: int = 4_096

    def __post_init__(self) -> None:
        """Refuse a budget that does not divide evenly, and students that do not exist."""
        if self.student not in STUDENTS:
            raise ValueError(f"student must be one of {', '.join(STUDENTS)}; got {self.student!r}")
        for name in ("steps", "batch_size"):
            if self.segments < 1 or getattr(self, name) % self.segments:
                raise ValueError(f"{name} must be a multiple of segments={self.segments}; got {getattr(self, name)}")

    @property
    def shared(self) -> bool:
        """Whether one network serves all segments."""
        return self.student == "shared"

    def updates(self) -> int:
        """Optimiser steps of each network."""
        return self.steps if self.shared else self.steps // self.segments

    def rows(self) -> int:
        """Pairs of each segment in one of these steps."""
        return self.batch_size // self.segments if self.shared else self.batch_size

    def digest(self) -> str:
        """Name of the run by its content."""
        return digest(asdict(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Run:
        """What `to_dict` gave."""
        return cls(**{**values, "problem": Problem(**values["problem"])})
