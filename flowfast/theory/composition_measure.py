"""Theorem 3 in numbers: measured errors of residual compositions, constructive and learned, beside the bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from flowfast.ensemble import Ensemble
from flowfast.flow import flow_map
from flowfast.metrics import relative_mse
from flowfast.mixture import GaussianMixture
from flowfast.ops import velocity
from flowfast.process import OUProcess
from flowfast.seeds import generator_for
from flowfast.stability import cumulative_stability
from flowfast.students.mlp import MLP, check_size
from flowfast.teacher_pairs import PairSource, ScoreTarget, TeacherPairs
from flowfast.theory.composition import ResidualComposition, block_times
from flowfast.theory.score_net import checked_marginal, score_norm_bound

Score = Callable[[Tensor], Tensor]
Target = Literal["score", "posterior mean"]
TARGETS: tuple[Target, ...] = get_args(Target)

_RATE = 2e-3
_FINE = 256  # steps on which the velocity's variation along the flow is summed


@dataclass(frozen=True)
class CompositionBound:
    """`exp(exponent) (drift / blocks + scores eps)` bounds the relative L^2 error.

    In a step of length h the velocity along the exact flow moves by its variation there, and the score is off by at
    most eps d / sqrt(tr Cov(p_t)) at any x; both errors then grow by 1 + h L(t) per step. `drift` is the length of the
    window times the variation of the velocity, in L^2, `scores` the integral of beta d / sqrt(tr Cov(p_t)), both over
    the norm of the end points. The exponent is the integral of L, whose left-hand sums do not exceed it for std <= 1.

    Source: arXiv 2606.03820, Theorem 3, with C = max(drift, scores).
    """

    exponent: float
    drift: float
    scores: float

    def log10(self, blocks: int, eps: float) -> float:
        """Decimal logarithm of the bound, which itself may be beyond any floating number."""
        return self.exponent / math.log(10) + math.log10(self.drift / blocks + self.scores * eps)


@dataclass(frozen=True)
class CompositionRow:
    """One constructive composition.

    Attributes:
        blocks, eps: as built. depth, nonzero: read off the layers. error: relative L^2 error. median: of the points'
            errors, over the root mean square of the end points. log10_bound: see `CompositionBound`.
    """

    blocks: int
    eps: float
    depth: int
    nonzero: int
    error: float
    median: float
    log10_bound: float


@dataclass(frozen=True)
class LearnedRow:
    """One composition of learned scores.

    Attributes:
        blocks: as built. target: what the networks learned. score_error: relative L^2 error of the scores, the root of
            the mean square over blocks. error, median: as in `CompositionRow`.
    """

    blocks: int
    target: Target
    score_error: float
    error: float
    median: float


@dataclass(frozen=True)
class Window:
    """Points of p at t_from and where the exact flow carries them at t_to, with the mixture (float64) and process."""

    mixture: GaussianMixture
    process: OUProcess
    t_from: float
    t_to: float
    x: Tensor
    y: Tensor

    @classmethod
    def of(
        cls, mixture: GaussianMixture, process: OUProcess, t_from: float, t_to: float, *, n: int = 1_000, seed: int = 0
    ) -> Window:
        """A window with n fresh points."""
        check_size("n", n)
        block_times(1, t_from, t_to)
        data = checked_marginal(mixture, process, 0.0)
        generator = generator_for(seed, "composition", "evaluation")
        x = process.marginal(data, t_from).sample(n, generator=generator)
        return cls(data, process, t_from, t_to, x, flow_map(x, data, process, t_from, t_to))

    def errors(self, end: Tensor) -> tuple[float, float]:
        """Relative L^2 error of the end points (n, d), and the median of their distances over the root mean square."""
        scale = float(self.y.square().sum(1).mean().sqrt())
        return math.sqrt(relative_mse(end, self.y)), float((end - self.y).norm(dim=1).median()) / scale

    @cached_property
    def bound(self) -> CompositionBound:
        """The bound's constants; the variation is summed over 256 steps along the flow of the window's points."""
        mixture, process = self.mixture, self.process
        times = block_times(_FINE, self.t_from, self.t_to).tolist()
        x, before, variation, scores = self.x, velocity(self.x, mixture, process, self.t_from), 0.0, 0.0
        for t, after in zip(times, times[1:], strict=False):
            x = flow_map(x, mixture, process, t, after)
            now = velocity(x, mixture, process, after)
            variation += float((now - before).square().sum(1).mean().sqrt())
            scores += (t - after) * float(process.beta(t)) * score_norm_bound(process.marginal(mixture, t))
            before = now
        scale = float(self.y.square().sum(1).mean().sqrt())
        ends = (float(cumulative_stability(mixture, process, t)) for t in (self.t_from, self.t_to))
        exponent = next(ends) - next(ends)
        return CompositionBound(exponent, (self.t_from - self.t_to) * variation / scale, scores / scale)


def composition_rows(window: Window, blocks: Sequence[int], accuracies: Sequence[float]) -> list[CompositionRow]:
    """Build a composition for every eps and number of blocks, and measure it on the window's points, in float64."""
    rows = []
    for eps in accuracies:
        for count in blocks:
            net = ResidualComposition(
                window.mixture, window.process, count, eps, t_from=window.t_from, t_to=window.t_to
            )
            found = window.errors(net(window.x))
            nonzero = net.parameter_count.nonzero
            rows.append(CompositionRow(count, eps, net.depth, nonzero, *found, window.bound.log10(count, eps)))
    return rows


def learned_rows(window: Window, blocks: Sequence[int], *, steps: int, seed: int = 0) -> list[LearnedRow]:
    """The same compositions with a small trained network for every score: an MLP with two hidden layers of 128 units.

    Once it learns the score itself, once the posterior mean, from which the score follows exactly.

    Args:
        window: where. blocks: numbers of blocks. steps: of AdamW per block, >= 1, on batches of 256, at a rate of 2e-3
            that halves every quarter. seed: of weights and batches.
    """
    check_size("steps", steps)
    rows = []
    for target in TARGETS:
        for count in blocks:
            times = block_times(count, window.t_from, window.t_to)
            scores, score_error = _learn(window, times[:-1].tolist(), target, steps, seed)
            found = window.errors(euler(window.x, scores, window.process, times))
            rows.append(LearnedRow(count, target, score_error, *found))
    return rows


def euler(x: Tensor, scores: Sequence[Score], process: OUProcess, times: Tensor) -> Tensor:
    """Blocks `x <- x + h f(x)`, `f(x) = -beta (x + score(x))`, one per score.

    Args:
        x: (n, d) at times[0]. scores: N functions of (n, d). process: for beta. times: (N + 1,), decreasing.
    """
    for k, score in enumerate(scores):
        h, beta = float(times[k + 1] - times[k]), float(process.beta(times[k]))
        x = x - h * beta * (x + score(x))
    return x


def _learn(window: Window, times: Sequence[float], target: Target, steps: int, seed: int) -> tuple[list[Score], float]:
    """Train a score per time; the scores in float64, and their error on fresh points (see `LearnedRow`)."""
    mixture = window.mixture.to(torch.float32)
    sources = [PairSource(mixture, window.process, ScoreTarget(t), (seed, "blocks", i)) for i, t in enumerate(times)]
    students = [
        MLP(mixture.dim, mixture.dim, width=128, depth=2, generator=generator_for(seed, "blocks", i, "weights"))
        for i in range(len(times))
    ]
    ensemble, pairs = Ensemble(students, learning_rate=_RATE), TeacherPairs(sources, 256)
    stds = window.process.std(torch.tensor(times), mixture.std)  # (N,)
    for step in range(steps):
        ensemble.learning_rate = _RATE * 0.5 ** (4 * step // steps)
        x, y = pairs(step)
        ensemble.step(x, y if target == "score" else (x + stds[:, None, None] ** 2 * y).float())
    scores = [_score_of(ensemble.member(i), float(stds[i]), target) for i in range(len(times))]
    total = 0.0
    for score, source in zip(scores, sources, strict=True):
        x, y = (side.double() for side in source.draw(2_000, "evaluation"))
        total += relative_mse(score(x), y) / len(scores)
    return scores, math.sqrt(total)


def _score_of(network: nn.Module, std: float, target: Target) -> Score:
    network = network.double().requires_grad_(False)
    if target == "score":
        return network
    return lambda x: (network(x) - x) / std**2
