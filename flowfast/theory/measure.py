"""Theorem 1 in numbers: sizes and measured errors of constructive networks, and the laws that they follow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flowfast.metrics import relative_mse
from flowfast.mixture import GaussianMixture
from flowfast.ops import score
from flowfast.process import OUProcess
from flowfast.seeds import generator_for
from flowfast.students.mlp import check_size
from flowfast.theory.score_net import ConstructiveScoreNet, checked_marginal


@dataclass(frozen=True)
class NetworkRow:
    """One constructive network: accuracy asked for, size as read off its layers, relative L^2(p_t) error measured."""

    eps: float
    depth: int
    width: int
    largest_weight: float
    nonzero: int
    total: int
    error: float


@dataclass(frozen=True)
class Law:
    """`value <= factor * log2(1/eps)^power + offset` for all rows it was fitted to."""

    factor: float
    power: float
    offset: float

    def __call__(self, eps: float) -> float:
        """The bound at eps."""
        return float(self.factor * math.log2(1 / eps) ** self.power + self.offset)


def score_net_rows(
    mixture: GaussianMixture,
    process: OUProcess,
    t: float,
    accuracies: Sequence[float],
    *,
    n: int = 10_000,
    seed: int = 0,
) -> list[NetworkRow]:
    """Build a network per accuracy and measure its error on n fresh points of p_t, the same for all, in float64.

    Args:
        mixture, process, t: as `ConstructiveScoreNet`. accuracies: eps of each network. n: points, >= 1. seed: of them.

    Returns:
        Rows in the order given; the error is the root of `relative_mse` against the reference score.
    """
    check_size("n", n)
    marginal = checked_marginal(mixture, process, t)
    x = marginal.sample(n, generator=generator_for(seed, "score-net", "evaluation"))
    y = score(x, marginal, backend="reference")
    rows = []
    for eps in accuracies:
        net = ConstructiveScoreNet(mixture, process, t, eps).cpu()
        error = math.sqrt(relative_mse(net(x), y))
        rows.append(NetworkRow(eps, net.depth, net.width, net.largest_weight, *net.parameter_count, error))
    return rows


def linear_law(accuracies: Sequence[float], values: Sequence[float]) -> Law:
    """`c log2(1/eps) + c'`: c by least squares, c' the smallest that bounds every value.

    c is rounded to three digits and c' up to four, so that the law as printed bounds every value.
    """
    logs = [math.log2(1 / eps) for eps in accuracies]
    slope = float(f"{_slope(logs, values):.3g}")
    offset = max(value - slope * log for log, value in zip(logs, values, strict=True))
    unit = 10.0 ** (math.floor(math.log10(abs(offset))) - 3) if offset else 1.0
    return Law(slope, 1.0, float(f"{math.ceil(offset / unit) * unit:.4g}"))


def power_law(accuracies: Sequence[float], values: Sequence[float]) -> Law:
    """`C log2(1/eps)^q`: q by least squares on logarithms, C the smallest that bounds every value (positive)."""
    logs = [math.log2(1 / eps) for eps in accuracies]
    power = _slope([math.log(log) for log in logs], [math.log(value) for value in values])
    return Law(max(value / log**power for log, value in zip(logs, values, strict=True)), power, 0.0)


def rate(blocks: Sequence[int], errors: Sequence[float]) -> float:
    """p of the least-squares law `error = C / blocks^p`; 0 for a single number of blocks."""
    return -_slope([math.log(count) for count in blocks], [math.log(error) for error in errors])


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of the least-squares line; 0 where x does not vary."""
    a, b = (torch.tensor(list(side), dtype=torch.float64) for side in (x, y))
    a = a - a.mean()
    spread = float(a.square().sum())
    return float((a * (b - b.mean())).sum()) / spread if spread > 0 else 0.0
