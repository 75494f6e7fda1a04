"""Runs of equal shape are trained together, all segments of a run at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flowfast.experiments.paper.settings import Run, Settings, digest

# Students per group on a GPU. A transformer of 1,024 points keeps about 1.3 GB of activations per block (estimated from
# its layer sizes, not measured).
MOST_MLPS, MOST_BLOCKS = 64, 64


@dataclass(frozen=True)
class Group:
    """Runs whose students have the same shape and budget: one batched training."""

    runs: tuple[Run, ...]

    def members(self) -> Iterator[tuple[Run, int]]:
        """Every student: its run and its segment, from noise to data."""
        for run in self.runs:
            for segment in range(run.settings.segments):
                yield run, segment

    def size(self) -> int:
        """Number of students."""
        return sum(run.settings.segments for run in self.runs)

    def cost(self) -> float:
        """Size of the training in multiplications, roughly: a step reads and writes its weights, too."""
        return sum(run.settings.steps * (run.settings.batch_size + 64) * _per_point(run.settings) for run in self.runs)

    def digest(self) -> str:
        """Name of the group by its content and order."""
        return digest([run.digest() for run in self.runs])


def _per_point(settings: Settings) -> float:
    """Multiplications of one pass of a student over one point."""
    width, depth, dim = settings.width, settings.depth, settings.dim
    if settings.student == "mlp":
        return 2 * dim * width + (depth - 1) * width**2
    if settings.student == "residual":
        return depth * (2 * dim * width + width**2)
    return dim * depth * (12 * width**2 + 2 * dim * width)


def flops(settings: Settings) -> float:
    """Floating-point operations of one run's training: six per weight and point, forward and backward."""
    return 6.0 * settings.steps * settings.batch_size * _per_point(settings)


def most_members(settings: Settings, device: torch.device) -> int:
    """Students trained together at most. On a CPU one run at a time, whose segments still go together."""
    if device.type == "cpu":
        return 1
    return MOST_MLPS if settings.student != "transformer" else max(1, MOST_BLOCKS // settings.depth)


def grouped(runs: Sequence[Run], device: torch.device, most: int | None = None) -> list[Group]:
    """Divide runs into groups, in the order of their first runs; a pure function of the runs.

    Args:
        runs: each once. device: of the training. most: students per group; None asks `most_members`. A run is never
            divided, so that a group holds one run at least.
    """
    groups: list[list[Run]] = []
    latest: dict[Any, int] = {}
    for run in runs:
        key, limit = _shape(run.settings), most or most_members(run.settings, device)
        index = latest.get(key)
        if index is None or Group((*groups[index], run)).size() > limit:
            latest[key] = index = len(groups)
            groups.append([])
        groups[index].append(run)
    return [Group(tuple(group)) for group in groups]


def share(groups: Sequence[Group], rank: int, world: int) -> list[Group]:
    """The groups of one process of `world`: dealt out by size, largest first, each to who has least so far.

    A pure function of the groups, so that processes need not talk to each other; in the groups' order.
    """
    loads, owners = [0.0] * world, [0] * len(groups)
    for index in sorted(range(len(groups)), key=lambda i: -groups[i].cost()):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += groups[index].cost()
    return [group for group, owner in zip(groups, owners, strict=True) if owner == rank]


def _shape(settings: Settings) -> tuple[Any, ...]:
    """What the students of a group have in common."""
    return (
        settings.student,
        settings.dim,
        settings.width,
        settings.depth,
        settings.activation,
        settings.steps_per_segment(),
        settings.batch_size,
        settings.learning_rate,
        settings.clip_norm,
        settings.weight_decay,
        settings.precision,
    )
