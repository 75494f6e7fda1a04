"""Distillation: a student trained to jump where the exact flow goes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowfast import backends
from flowfast.dataset import TeacherDataset
from flowfast.dataset.plan import DTYPES, grid_times, mixture_digest
from flowfast.metrics import relative_mse
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.seeds import as_seed
from flowfast.step_pairs import Pairs, fresh_pairs, steps_together, stored_pairs
from flowfast.storage import differences, dtype_name
from flowfast.students import FlowStudent, SegmentTable
from flowfast.students.mlp import check_size
from flowfast.training import Recipe as Recipe
from flowfast.training import Trainer

_REPORTS = 100  # progress calls in a training
_SPAN = 1e-6  # of the largest spread; along axes with less the means do not differ


@dataclass(frozen=True)
class Progress:
    """A sign of life of a training.

    Attributes:
        step: optimiser steps done. steps: in all. loss: mean since the last sign. seconds: since this call began.
    """

    step: int
    steps: int
    loss: float
    seconds: float


def distill(
    mixture: GaussianMixture,
    process: OUProcess,
    times: Tensor | Sequence[float],
    *,
    recipe: Recipe | None = None,
    data: TeacherDataset | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 500,
    progress: Callable[[Progress], None] | None = None,
    backend: str = "auto",
) -> FlowStudent:
    """Train a student of the flow on a time grid, all segments in the same steps.

    The pairs of a step are a pure function of seed, step and the rows that each segment gets, which a checkpoint holds:
    a training that is killed and resumed ends with the bits of one that was not, on one machine with one number of
    threads. No global random state is used.

    Args:
        mixture: law of the data, float32 or float64; the student takes its dtype and device. process: forward process.
        times: (m + 1,) decreasing, noise first; see `time_grid`. recipe: None is `Recipe()`.
        data: stored pairs of the same mixture, process and times; None makes fresh pairs for every step, starting
            from the closed-form marginals.
        seed: of weights and pairs, >= 0.
        checkpoint: file for the state of the training (safetensors); an existing one is resumed.
        checkpoint_every: steps between two writes of it, >= 1.
        progress: called about a hundred times, and at the end.
        backend: of the teacher of fresh pairs, see `flow_map`.

    Returns:
        The student, in evaluation mode.

    Raises:
        TypeError, ValueError: an argument of another kind or range, data of another problem, or a checkpoint that is
            damaged or of other settings (the fields are named).
        RuntimeError: the loss is no longer finite.

    Source: arXiv 2606.03820, section 5 (segments and their composition); preconditioning as in `FlowStudent`.
    """
    recipe = Recipe() if recipe is None else recipe
    check_size("checkpoint_every", checkpoint_every)
    if mixture.dtype not in DTYPES.values():
        raise TypeError(f"mixture must be float32 or float64; got {mixture.dtype}: convert with mixture.to(...)")
    grid = grid_times(times)
    student = new_student(mixture, process, grid, recipe, as_seed(seed))
    trainer = Trainer(student, recipe)
    if data is None:
        pairs = fresh_pairs(mixture, process, grid, recipe, seed, backends.choose(backend, mixture.device))
    else:
        _check_data(data, mixture, process, grid)
        pairs = stored_pairs(data, seed, mixture.device)
    keep: Callable[[], None] | None = None
    if checkpoint is not None:
        path, settings = Path(checkpoint), _settings(mixture, student, recipe, data, seed, backend)
        if path.exists():
            trainer.read(path, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        keep = partial(trainer.write, path, settings)
    _train(trainer, pairs, keep, checkpoint_every, progress)
    return student.eval()


def _train(
    trainer: Trainer,
    pairs: Pairs,
    keep: Callable[[], None] | None,
    keep_every: int,
    progress: Callable[[Progress], None] | None,
) -> None:
    steps, begin, report_every = trainer.recipe.steps, time.perf_counter(), max(1, trainer.recipe.steps // _REPORTS)
    block = steps_together(trainer.recipe, trainer.student.n_segments)
    total, counted = torch.zeros((), device=trainer.student.center.device), 0
    while trainer.done < steps:
        if trainer.done % block == 0:
            trainer.allocate_rows()
        total += trainer.step(*pairs(trainer.done, trainer.rows))
        counted += 1
        done, last = trainer.done, trainer.done == steps
        report, write = (last or done % every == 0 for every in (report_every, keep_every))
        if (report or write) and not math.isfinite(loss := float(total) / counted):
            raise RuntimeError(f"the loss is no longer finite at step {done}: lower recipe.learning_rate")
        if write and keep is not None:
            keep()
        if report:
            if progress is not None:
                progress(Progress(done, steps, loss, time.perf_counter() - begin))
            total, counted = torch.zeros_like(total), 0


def new_student(
    mixture: GaussianMixture, process: OUProcess, grid: tuple[float, ...], recipe: Recipe, seed: int
) -> FlowStudent:
    """The untrained student that `distill` starts from."""
    at = torch.tensor(grid, dtype=torch.float64)
    std = mixture.std.detach().cpu()
    means, weights = mixture.means.detach().double(), mixture.weights.detach().double()
    center = weights @ means / weights.sum()  # (d,)
    axes, spread = _principal_axes((weights / weights.sum()).sqrt()[:, None] * (means - center))
    reduced = recipe.reduced and 0 < axes.shape[1] < mixture.dim
    return FlowStudent(
        mixture.dim,
        SegmentTable(r=tuple(process.snr_root(at, std).tolist()), s=tuple(process.std(at, std).tolist())),
        width=recipe.width,
        depth=recipe.depth,
        activation=recipe.activation,
        preconditioned=recipe.preconditioned,
        shared=recipe.shared,
        center=center.cpu(),
        scale=math.sqrt(spread / (axes.shape[1] if reduced else mixture.dim)),
        axes=axes.cpu() if reduced else None,
        seed=seed,
        dtype=mixture.dtype,
    ).to(mixture.device)


def _principal_axes(weighted: Tensor) -> tuple[Tensor, float]:
    """Directions in which the means differ, and how far.

    Args:
        weighted: (k, d) float64, the means about their centre, times the square roots of their weights (sum 1).

    Returns:
        Orthonormal columns (d, a), a = 0 when the means do not differ, and their mean squared distance from the centre.
    """
    _, size, axes = torch.linalg.svd(weighted, full_matrices=False)  # axes: rows
    return axes[size > _SPAN * size[0]].mT, float(size.square().sum())


def _check_data(data: TeacherDataset, mixture: GaussianMixture, process: OUProcess, grid: tuple[float, ...]) -> None:
    there = {"mixture": data.plan.mixture, "process": data.plan.process, "times": list(data.plan.times or ())}
    here = {
        "mixture": mixture_digest(mixture.to(data.dtype)),
        "process": process.to_dict(),
        "times": list(grid),
    }
    differing = differences(there, here)
    if differing:
        raise ValueError(f"data: {data.folder} is of another problem ({differing}): generate a set for this one")
    if not data.pairs_per_segment:
        raise ValueError(f"data: {data.folder} has {len(data)} rows, less than one per segment: generate more")


def _settings(
    mixture: GaussianMixture,
    student: FlowStudent,
    recipe: Recipe,
    data: TeacherDataset | None,
    seed: int,
    backend: str,
) -> dict[str, Any]:
    """Everything that decides the bits of a training, as plain values."""
    source = backends.choose(backend, mixture.device) if data is None else f"teacher set {data.plan.digest()}"
    return {
        "recipe": asdict(recipe),
        "mixture": mixture_digest(mixture),
        "segments": asdict(student.segments),
        "dtype": dtype_name(mixture.dtype),
        "device": mixture.device.type,
        "seed": seed,
        "pairs": source,
    }


@dataclass(frozen=True)
class Evaluation:
    """Relative squared errors of a student against the teacher.

    Attributes:
        composed: of the whole map, noise to data.
        segments: of each segment alone, started where the teacher is.
        along: after each segment of the composition, started at noise; the last is `composed`.
    """

    composed: float
    segments: tuple[float, ...]
    along: tuple[float, ...]


@torch.no_grad()
def evaluate(student: FlowStudent, path: Tensor) -> Evaluation:
    """Measure a student against teacher trajectories.

    Args:
        student: of m segments.
        path: (m + 1, n, d), the teacher's states at the grid's times, noise first, from fresh starting points.

    Returns:
        Errors as `relative_mse`, end to end and per segment.

    Raises:
        TypeError, ValueError: path is no such tensor.
    """
    if not isinstance(path, Tensor) or not path.is_floating_point():
        raise TypeError(f"path must be a tensor of floating numbers; got {getattr(path, 'dtype', type(path).__name__)}")
    m = student.n_segments
    if path.ndim != 3 or path.shape[0] != m + 1 or path.shape[2] != student.dim or path.shape[1] == 0:
        raise ValueError(f"path must have shape ({m + 1}, n, {student.dim}) with n >= 1; got {tuple(path.shape)}")
    composed = student.trajectory(path[0])
    along = tuple(relative_mse(composed[i + 1], path[i + 1]) for i in range(m))
    segments = tuple(relative_mse(student.segment(i, path[i]), path[i + 1]) for i in range(m))
    return Evaluation(composed=along[-1], segments=segments, along=along)
