"""The stages of a job. Each leaves a JSON file when it is finished, and is skipped when that file is there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from flowfast.dataset import TeacherDataset, generate_dataset
from flowfast.distillation import Progress, distill, evaluate
from flowfast.experiments.folder import Clock
from flowfast.experiments.result import GridResult, TeacherCost
from flowfast.experiments.settings import Event, JobSettings, Kind, Listener
from flowfast.flow import FlowSolution, solve_flow
from flowfast.grids import GridKind, time_grid
from flowfast.mixture import GaussianMixture
from flowfast.ops import log_density, posterior_weights
from flowfast.process import OUProcess
from flowfast.seeds import generator_for
from flowfast.stability import cumulative_stability
from flowfast.storage import read_json, read_tensors, write_json, write_tensors
from flowfast.students import FlowStudent

T = TypeVar("T")

CHECKPOINT_EVERY = 100  # optimiser steps; a kill costs at most these
ROWS_PER_SHARD = 4_096
QUANTILES = (0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Work:
    """One job while it runs: what run_job was called with."""

    mixture: GaussianMixture
    process: OUProcess
    settings: JobSettings
    folder: Path
    listener: Listener
    backend: str
    data: TeacherDataset | None = None

    def place(self, kind: str) -> Path:
        """The folder of one grid."""
        return self.folder / "grids" / kind

    def times(self, kind: Kind) -> Tensor:
        """The times (m + 1,) of one grid, noise first."""
        if self.data is not None and self.data.times is not None:
            return self.data.times
        n, horizon = self.settings.segments, self.settings.horizon
        return time_grid(self.mixture, self.process, n, kind=cast(GridKind, kind), horizon=horizon)

    def noise(self) -> Tensor:
        """Starting points of the evaluation (n, d), the same for every grid and no training point."""
        generator = generator_for(self.settings.seed, "evaluation")
        marginal = self.process.marginal(self.mixture, self.settings.horizon)
        return marginal.sample(self.settings.evaluation_rows, generator=generator)

    def flow(self, x: Tensor, t_from: float, t_to: float) -> FlowSolution:
        """The exact flow of x (n, d) with its cost; RuntimeError when a trajectory failed."""
        solution = solve_flow(x, self.mixture, self.process, t_from, t_to, backend=self.backend)
        failed = solution.status.nonzero().flatten().tolist()
        if failed:
            raise RuntimeError(
                f"the teacher failed on {len(failed)} of {len(x)} trajectories between t = {t_from:g} and {t_to:g}, "
                f"first {failed[0]} (status {int(solution.status[failed[0]])})"
            )
        return solution

    def likelihood(self, x: Tensor) -> float:
        """Mean of -log p_0 over the points x (n, d), nats."""
        return -float(log_density(x, self.mixture, backend=self.backend).double().mean())


def teacher(work: Work) -> TeacherCost:
    """Stage "teacher": the exact flow of the evaluation points from the horizon to the data, with its cost."""
    done, arrays = work.folder / "teacher.json", work.folder / "teacher.safetensors"
    if not done.is_file():
        work.listener(Event("exact flow", None, 0, 1))
        noise = work.noise()
        solution, seconds = _timed(lambda: work.flow(noise, work.settings.horizon, 0.0))
        write_tensors(arrays, {"noise": noise, "data": solution.x}, {})
        cost = TeacherCost(
            backend=solution.backend,
            evaluations=float(solution.evaluations.double().mean()),
            evaluations_max=int(solution.evaluations.max()),
            seconds=seconds,
            negative_log_density=work.likelihood(solution.x),
        )
        write_json(done, asdict(cost))
        work.listener(Event("exact flow", None, 1, 1))
    return TeacherCost(**read_json(done, "teacher's cost"))


def grid(work: Work, kind: Kind) -> GridResult:
    """Stages "teacher data", "training" and "evaluation" of one grid."""
    place = work.place(kind)
    place.mkdir(parents=True, exist_ok=True)
    times = work.times(kind)
    _data(work, kind, times)
    _training(work, kind, times)
    done = place / "evaluation.json"
    if not done.is_file():
        work.listener(Event("evaluation", kind, 0, 1))
        start = time.perf_counter()
        numbers, tensors = _evaluation(work, kind, times)
        write_tensors(place / "evaluation.safetensors", tensors, {})
        write_json(done, {**numbers, "evaluation_seconds": time.perf_counter() - start})
        work.listener(Event("evaluation", kind, 1, 1))
    stored: dict[str, Any] = {}
    for name in ("teacher", "training", "evaluation"):
        stored |= read_json(place / f"{name}.json", f"{name} of the {kind} grid")
    return GridResult.from_dict(stored)


def _data(work: Work, kind: str, times: Tensor) -> None:
    place, rows = work.place(kind), work.settings.rows * work.settings.segments
    if (place / "teacher.json").is_file():
        return
    if work.data is not None:
        write_json(place / "teacher.json", {"data_seconds": 0.0})
        return
    clock = Clock(place / ".teacher-clock.json")

    def progress(done: int, total: int) -> None:
        clock.tick()
        work.listener(Event("teacher data", kind, done, total))

    work.listener(Event("teacher data", kind, 0, rows))
    generate_dataset(
        work.mixture,
        work.process,
        times,
        rows,
        place / "teacher",
        seed=work.settings.seed,
        rows_per_shard=ROWS_PER_SHARD,
        progress=progress,
        backend=work.backend,
    )
    write_json(place / "teacher.json", {"data_seconds": clock.seconds()})


def _training(work: Work, kind: str, times: Tensor) -> None:
    place, recipe = work.place(kind), work.settings.recipe
    if (place / "training.json").is_file():
        return
    clock = Clock(place / ".training-clock.json")

    def progress(now: Progress) -> None:
        clock.tick()
        work.listener(Event("training", kind, now.step, now.steps, now.loss))

    student = distill(
        work.mixture,
        work.process,
        times,
        recipe=recipe,
        data=work.data or TeacherDataset(place / "teacher"),
        seed=work.settings.seed,
        checkpoint=place / "checkpoint.safetensors",
        checkpoint_every=max(1, min(CHECKPOINT_EVERY, recipe.steps // 4)),
        progress=progress,
        backend=work.backend,
    )
    student.save(place / "student")
    parameters = sum(p.numel() for p in student.parameters())
    write_json(place / "training.json", {"training_seconds": clock.seconds(), "parameters": parameters})


def _evaluation(work: Work, kind: str, times: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    student = FlowStudent.load(work.place(kind) / "student")
    noise = work.noise()
    clock_times = [float(t) for t in times]
    solutions, teacher_seconds = _timed(lambda: _path(work, noise, clock_times))
    path = torch.stack([noise, *(solution.x for solution in solutions)])  # (m+1, n, d)
    with torch.inference_mode():
        output, student_seconds = _timed(lambda: student(noise))
    if not bool(torch.isfinite(output).all()):
        raise RuntimeError(f"training on the {kind} grid diverged (NaN or infinity): lower the learning rate")
    found = evaluate(student, path)
    errors = _distances(output, path[-1])
    exponents = cumulative_stability(work.mixture, work.process, times).diff().neg()
    numbers = {
        "kind": kind,
        "times": clock_times,
        "snr_roots": work.process.snr_root(times, work.mixture.std).tolist(),
        "exponents": exponents.tolist(),
        "composed": found.composed,
        "segments": list(found.segments),
        "along": list(found.along),
        "quantiles": torch.quantile(errors, torch.tensor(QUANTILES).to(errors)).tolist(),
        "same_component": _same_component(work, output, path[-1]),
        "negative_log_density": work.likelihood(output),
        "teacher_evaluations": [float(s.evaluations.double().mean()) for s in solutions],
        "teacher_seconds": teacher_seconds,
        "student_seconds": student_seconds,
    }
    return numbers, {"student": output, "errors": errors}


def _path(work: Work, x: Tensor, times: list[float]) -> list[FlowSolution]:
    solutions: list[FlowSolution] = []
    for t_from, t_to in zip(times, times[1:], strict=False):
        solutions.append(work.flow(solutions[-1].x if solutions else x, t_from, t_to))
    return solutions


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    """A call's result and its seconds, the better of two: the first may find caches cold and threads asleep."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Distance of each row of x from y's (n,), in units of the root mean square norm of y's rows."""
    x, y = x.double(), y.double()
    scale = y.square().sum(-1).mean().sqrt()
    distances: Tensor = torch.linalg.vector_norm(x - y, dim=-1)
    return distances / scale


def _same_component(work: Work, x: Tensor, y: Tensor) -> float:
    same = 0
    for rows in torch.arange(len(x)).split(256):  # the weights of all points at once could fill the memory
        labels = [posterior_weights(z[rows], work.mixture, backend=work.backend).argmax(-1) for z in (x, y)]
        same += int((labels[0] == labels[1]).sum())
    return same / len(x)


def teacher_points(work: Work) -> dict[str, Tensor]:
    """The teacher stage's tensors: noise and data, each (n, d)."""
    return read_tensors(work.folder / "teacher.safetensors", "teacher's points")[0]


def student_points(work: Work, kind: str) -> dict[str, Tensor]:
    """One grid's evaluation tensors: student (n, d) and errors (n,)."""
    return read_tensors(work.place(kind) / "evaluation.safetensors", "student's points")[0]
