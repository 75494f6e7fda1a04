"""Fresh teacher pairs for the members of an ensemble, and their error on points that no training saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from flowfast.ensemble import Ensemble
from flowfast.flow import PAPER_STEPS, flow_map
from flowfast.mixture import GaussianMixture
from flowfast.ops import score
from flowfast.process import OUProcess
from flowfast.seeds import generator_for
from flowfast.students.mlp import check_size

Teacher = Literal["exact", "paper"]

_BLOCK_ROWS = {"cpu": 8_192, "cuda": 65_536}  # pairs that one call of a teacher makes: enough to keep the device busy
_CHUNK_ROWS = 5_000  # evaluation points at once


@dataclass(frozen=True)
class ScoreTarget:
    """The score at time t >= 0: x ~ p_t, y = score of p_t at x. Another t is a ValueError.

    Source: arXiv 2606.03820, Tables 1 and 2.
    """

    t: float

    def __post_init__(self) -> None:
        """Refuse values outside the range."""
        if not 0 <= self.t < math.inf:
            raise ValueError(f"t must be finite and at least 0; got {self.t}")


@dataclass(frozen=True)
class SegmentTarget:
    """A segment of the flow: x ~ p at t_from, y = where the flow carries it at t_to.

    Args:
        t_from, t_to: times >= 0, t_from > t_to.
        teacher: "exact" is `flow_map` to rounding; "paper" the published teacher, Runge-Kutta uniform in t.
        steps: of the paper's teacher, >= 1; see `paper_steps`. None, and only None, with the exact one.

    Raises:
        ValueError: an argument outside these ranges.

    Source: arXiv 2606.03820, Tables 3 to 5.
    """

    t_from: float
    t_to: float
    teacher: Teacher = "exact"
    steps: int | None = None

    def __post_init__(self) -> None:
        """Refuse values outside the ranges."""
        if not 0 <= self.t_to < self.t_from < math.inf:
            raise ValueError(f"t_from must lie above t_to >= 0; got {self.t_from} and {self.t_to}")
        if self.teacher not in get_args(Teacher):
            raise ValueError(f"teacher must be 'exact' or 'paper'; got {self.teacher!r}")
        if (self.teacher == "paper") != (self.steps is not None):
            raise ValueError(f"steps must be given with teacher 'paper' and only there; got {self.steps!r}")
        if self.steps is not None:
            check_size("steps", self.steps)


def paper_steps(t_from: float, t_to: float, *, total: int = PAPER_STEPS, least: int = 5) -> int:
    """Steps of the paper's teacher on a segment: its share by length of `total` over [0, 1], `least` at the least."""
    return max(least, round(total * (t_from - t_to)))


@dataclass(frozen=True)
class PairSource:
    """Where a member's pairs come from.

    Args:
        mixture: law of the data, of the students' dtype and device. process: forward process. target: what is learnt.
        stream: name of the member's own stream of random numbers, for example (seed, "segment", 3).
        backend: of the teacher, see `flow_map`.
    """

    mixture: GaussianMixture
    process: OUProcess
    target: ScoreTarget | SegmentTarget
    stream: tuple[int | str, ...]
    backend: str = "auto"

    def draw(self, n: int, *part: int | str) -> tuple[Tensor, Tensor]:
        """The n pairs called `part` of the stream: x and y, each (n, d); a pure function of the source, n and part."""
        generator = generator_for(*self.stream, *part, device=self.mixture.device)
        target = self.target
        if isinstance(target, ScoreTarget):
            marginal = self.process.marginal(self.mixture, target.t)
            x = marginal.sample(n, generator=generator)
            return x, score(x, marginal, backend=self.backend)
        x = self.process.marginal(self.mixture, target.t_from).sample(n, generator=generator)
        method: Literal["snr", "paper"] = "snr" if target.teacher == "exact" else "paper"
        times = target.t_from, target.t_to
        return x, flow_map(
            x, self.mixture, self.process, *times, method=method, steps=target.steps, backend=self.backend
        )


class TeacherPairs:
    """The pairs of every optimiser step: fresh, and for each member from its own stream, whoever else is there.

    Pairs are made for a block of steps at once, a block's length depending on batch_size and device alone. Memory:
    one block, 8,192 pairs per member on the CPU and 65,536 elsewhere (or one batch, where that is larger).

    Args:
        sources: one per member, M >= 1. batch_size: pairs per step and member, >= 1.

    Raises:
        TypeError, ValueError: no source, or a batch size out of range.
    """

    def __init__(self, sources: Sequence[PairSource], batch_size: int) -> None:
        if not sources:
            raise ValueError("sources must hold one source per member; got none")
        check_size("batch_size", batch_size)
        self._sources, self._batch = tuple(sources), batch_size
        rows = _BLOCK_ROWS.get(sources[0].mixture.device.type, _BLOCK_ROWS["cpu"])
        self._steps = max(1, rows // batch_size)
        self._made: tuple[int, Tensor, Tensor] | None = None  # block, x, y, each (M, rows, d)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """x and y of optimiser step `step`, 0 or later: (M, b, d) each, a pure function of sources, batch and step."""
        if step < 0:
            raise ValueError(f"step must be at least 0; got {step}")
        block, part = divmod(step, self._steps)
        if self._made is None or self._made[0] != block:
            self._made = None  # a block is large: the old one goes before the new one comes
            self._made = block, *_side_by_side(self._sources, self._steps * self._batch, "pairs", block)
        here = slice(part * self._batch, (part + 1) * self._batch)
        return self._made[1][:, here], self._made[2][:, here]


def relative_errors(ensemble: Ensemble, sources: Sequence[PairSource], *, n: int = 50_000) -> Tensor:
    """Relative squared error of every member on fresh points, as `relative_mse` defines it.

    Args:
        ensemble: of M members. sources: one per member; their streams name evaluation points that no training sees.
        n: points per member, >= 1, taken in chunks.

    Returns:
        (M,), float64, on the CPU; `sum |f - y|^2 / sum |y|^2`. NaN or infinite where an answer is.

    Raises:
        TypeError, ValueError: another number of sources, or n out of range.
    """
    check_size("n", n)
    if len(sources) != ensemble.size:
        raise ValueError(f"sources must hold one source per member, {ensemble.size}; got {len(sources)}")
    wrong, norm = (torch.zeros(ensemble.size, dtype=torch.float64, device=ensemble.device) for _ in range(2))
    for chunk, first in enumerate(range(0, n, _CHUNK_ROWS)):
        rows = min(_CHUNK_ROWS, n - first)
        x, y = _side_by_side(sources, rows, "evaluation", chunk)
        wrong += (ensemble.predict(x).double() - y.double()).square().sum((1, 2))
        norm += y.double().square().sum((1, 2))
    return (wrong / norm).cpu()


def _side_by_side(sources: Sequence[PairSource], n: int, *part: int | str) -> tuple[Tensor, Tensor]:
    """The pairs called `part` of every source: (M, n, d) each."""
    mixture = sources[0].mixture
    x, y = (mixture.means.new_empty(len(sources), n, mixture.dim) for _ in range(2))
    for i, source in enumerate(sources):
        x[i], y[i] = source.draw(n, *part)
    return x, y
