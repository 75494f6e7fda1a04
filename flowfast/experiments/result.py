"""What a finished job found: numbers in results.json, arrays in arrays.safetensors, read back from the folder alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from flowfast.experiments.folder import MARK
from flowfast.storage import read_json, read_tensors, write_json, write_tensors

NUMBERS = "results.json"
ARRAYS = "arrays.safetensors"


@dataclass(frozen=True)
class TeacherCost:
    """What the exact flow from the horizon to the data cost on the evaluation points, in one piece.

    Args:
        backend: that served it.
        evaluations: mean number of passes over the mixture per trajectory. evaluations_max: of the worst trajectory.
        seconds: for all evaluation points.
        negative_log_density: mean of -log p_0 at its end points, nats.
    """

    backend: str
    evaluations: float
    evaluations_max: int
    seconds: float
    negative_log_density: float


@dataclass(frozen=True)
class GridResult:
    """One grid: where its times are, how its student does beside the teacher, and what both cost.

    Args:
        kind: of grid.
        times: (m+1,), decreasing. snr_roots: r = alpha/s at these times.
        exponents: (m,), integral of L over each segment.
        composed: relative squared error of the whole composition.
        segments: (m,), of each segment from the teacher's points. along: (m,), of the composition after each segment.
        quantiles: of the distance between student's and teacher's end point in units of the root mean square norm of
            the latter: 10, 50, 90 and 99 per cent.
        same_component: share of points that end at the same component (most probable one) as the teacher's.
        negative_log_density: mean of -log p_0 at the student's end points, nats.
        teacher_evaluations: (m,), mean passes over the mixture per trajectory in each segment.
        teacher_seconds, student_seconds: for all evaluation points, segment after segment.
        data_seconds, training_seconds, evaluation_seconds: spent on the stage, all attempts together.
        parameters: trained numbers of the student.
    """

    kind: str
    times: tuple[float, ...]
    snr_roots: tuple[float, ...]
    exponents: tuple[float, ...]
    composed: float
    segments: tuple[float, ...]
    along: tuple[float, ...]
    quantiles: tuple[float, ...]
    same_component: float
    negative_log_density: float
    teacher_evaluations: tuple[float, ...]
    teacher_seconds: float
    student_seconds: float
    data_seconds: float
    training_seconds: float
    evaluation_seconds: float
    parameters: int

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> GridResult:
        """Rebuild a result from plain values, lists for tuples."""
        values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in stored.items()}
        return cls(**values)


@dataclass(frozen=True)
class JobResult:
    """A finished job.

    Args:
        folder: where it lives.
        settings, process, mixture, versions: plain values: the job's settings, the schedule, the mixture (components,
            dim, std, dtype, ends of the range of its means, diameter), versions of what it ran on.
        machine: architecture, instruction set and threads.
        regimes: t_shrink, t_mix (None where they do not occur) and intervals (low, high, name).
        total_stability: integral of L from 0 to the horizon.
        teacher: cost of the exact flow.
        grids: one result per grid, in the settings' order.
    """

    folder: Path
    settings: Mapping[str, Any]
    process: Mapping[str, Any]
    mixture: Mapping[str, Any]
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    regimes: Mapping[str, Any]
    total_stability: float
    teacher: TeacherCost
    grids: tuple[GridResult, ...]

    @classmethod
    def load(cls, folder: str | Path) -> JobResult:
        """Read a finished job.

        Raises:
            ValueError: no job there, not finished, or files that do not fit.
        """
        folder = Path(folder)
        if not (folder / MARK).is_file():
            raise ValueError(f"{folder} holds no flowfast job: pass the --out folder of flowfast digits or distill")
        if not (folder / NUMBERS).is_file():
            raise ValueError(f"{folder} holds an unfinished job: call the command that started it again")
        stored = read_json(folder / NUMBERS, "results of a job")
        try:
            teacher = TeacherCost(**stored.pop("teacher"))
            grids = tuple(GridResult.from_dict(grid) for grid in stored.pop("grids"))
            return cls(folder=folder, teacher=teacher, grids=grids, **stored)
        except (TypeError, KeyError) as error:
            raise ValueError(f"{folder / NUMBERS} was not written by this version of flowfast: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the folder."""
        stored = asdict(self)
        del stored["folder"]
        return stored

    def save(self, arrays: Mapping[str, Tensor]) -> None:
        """Write the arrays, then the numbers; the job counts as finished when both are there."""
        write_tensors(self.folder / ARRAYS, arrays, {})
        write_json(self.folder / NUMBERS, self.to_dict())

    def arrays(self) -> dict[str, Tensor]:
        """Arrays for figures.

        profile_t, profile (q,) and measured_t, measured (p,): L(t) with the worst and with the measured spread.
        error_levels, errors_<kind> (l,): the distance to the teacher's end point that this share does not exceed.
        teacher, student_<kind>: images (p, d); for other points their principal coordinates (p, 2), and explained
        (2,), the axes' shares of the variance.
        """
        return read_tensors(self.folder / ARRAYS, "arrays of a job")[0]

    def seconds(self) -> float:
        """Time spent on all stages, all attempts together."""
        return self.teacher.seconds + sum(
            g.data_seconds + g.training_seconds + g.evaluation_seconds for g in self.grids
        )

    def best(self) -> GridResult:
        """The grid with the smallest composed error."""
        return min(self.grids, key=lambda grid: grid.composed)

    def grid(self, kind: str) -> GridResult:
        """The result of one kind of grid; ValueError names those that exist."""
        for grid in self.grids:
            if grid.kind == kind:
                return grid
        raise ValueError(
            f"grid must be one that {self.folder} has, {', '.join(g.kind for g in self.grids)}; got {kind!r}"
        )
