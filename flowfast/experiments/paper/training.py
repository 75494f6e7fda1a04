"""Training of one group: its students as one batched model, fresh pairs every step, a checkpoint now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from flowfast.ensemble import Ensemble
from flowfast.experiments.folder import Clock
from flowfast.experiments.paper.groups import Group
from flowfast.experiments.paper.settings import Run
from flowfast.experiments.paper.sources import sources_of
from flowfast.seeds import generator_for
from flowfast.storage import part_of
from flowfast.students import MLP, ResidualFlowMap, TransformerFlowMap
from flowfast.teacher_pairs import TeacherPairs

UNFINISHED = "unfinished"
TELL_EVERY = 0.2  # seconds

Tell = Callable[[int, int, float | None], None]


class Training:
    """The students of one group and where their training stands.

    Args:
        group: runs of equal shape. folder: of the results; checkpoints stand in a folder of their own there.
        device: of students and pairs.
    """

    def __init__(self, group: Group, folder: Path, device: torch.device) -> None:
        self._members = list(group.members())
        self._settings = group.runs[0].settings
        self._checkpoint, clock = _files(group, folder)
        self._checkpoint.parent.mkdir(exist_ok=True)
        self._clock = Clock(clock, every=0.0)
        self._seconds = 0.0
        self._identity = {"group": [run.identity() for run in group.runs]}
        bounds = [run.settings.weight_bound or math.inf for run, _ in self._members]
        self._ensemble = Ensemble(
            [student_of(run, segment).to(device) for run, segment in self._members],
            learning_rate=self._settings.learning_rate,
            weight_decay=self._settings.weight_decay,
            clip_norm=self._settings.clip_norm,
            weight_bound=None if all(math.isinf(bound) for bound in bounds) else bounds,
            precision=self._settings.precision,
        )
        sources = [source for run in group.runs for source in sources_of(run, device)]
        self._pairs = TeacherPairs(sources, self._settings.batch_size)
        if self._checkpoint.is_file():
            self._ensemble.read(self._checkpoint, self._identity)

    def run(self, tell: Tell, *, every: float) -> None:
        """Take the steps that are left.

        Args:
            tell: called with steps done, steps in all and the mean loss, now and then. every: seconds between
                checkpoints; there is one at the end, too, so that a stopped evaluation does not cost the training.
        """
        steps, ensemble = self._settings.steps_per_segment(), self._ensemble
        written = told = time.monotonic()
        if ensemble.done < steps:
            tell(ensemble.done, steps, None)
        while ensemble.done < steps:
            losses = ensemble.step(*self._pairs(ensemble.done))
            now = time.monotonic()
            if now - told >= TELL_EVERY:
                told = now
                tell(ensemble.done, steps, float(losses.mean()))
            if now - written >= every or ensemble.done == steps:
                self._write()
                written = time.monotonic()
        self._seconds = self._clock.seconds()

    def students(self, run: Run) -> list[nn.Module]:
        """The students of one run, from noise to data."""
        return [self._ensemble.member(i) for i, (other, _) in enumerate(self._members) if other == run]

    def seconds(self, run: Run) -> float:
        """This run's share of the group's training time: all attempts, each up to its last checkpoint."""
        return self._seconds * run.settings.segments / len(self._members)

    def _write(self) -> None:
        self._ensemble.write(self._checkpoint, self._identity)
        self._clock.tick()


def forget(group: Group, folder: Path) -> None:
    """Remove what a group whose runs are all stored has left, a write that was killed included."""
    for file in _files(group, folder):
        file.unlink(missing_ok=True)
        part_of(file).unlink(missing_ok=True)


def _files(group: Group, folder: Path) -> tuple[Path, Path]:
    """Checkpoint and clock of a group."""
    place = folder / UNFINISHED
    return place / f"{group.digest()}.safetensors", place / f"{group.digest()}.json"


def student_of(run: Run, segment: int) -> nn.Module:
    """A fresh student with weights from a stream of its own, float32."""
    settings, generator = run.settings, generator_for(run.seed, "student", segment)
    if settings.student == "transformer":
        return TransformerFlowMap(settings.dim, width=settings.width, blocks=settings.depth, generator=generator)
    if settings.student == "residual":
        return ResidualFlowMap(settings.dim, width=settings.width, blocks=settings.depth, generator=generator)
    return MLP(
        settings.dim,
        settings.dim,
        width=settings.width,
        depth=settings.depth,
        activation=settings.activation,
        generator=generator,
    )
