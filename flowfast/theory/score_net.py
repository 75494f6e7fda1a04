"""Theorem 1 as a module: the score of a mixture's marginal by a network that is built, not trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess, Times
from flowfast.theory import exact
from flowfast.theory.channels import Blueprint, Channels, joined
from flowfast.theory.network import ReluNetwork


@dataclass(frozen=True)
class Budget:
    """Settings that keep a constructive network's relative L^2(p_t) error below eps.

    Attributes:
        clip: R; logits more than R below the largest count as R below. squarings: of the exponential. newton: steps of
            the reciprocal. amplification: relative error of the score per error of the weights in l1.

    With weights off by delta in l1 the score is off by at most delta max_k |m_k - c| / s^2, whatever x is, and its norm
    in L^2(p_t) is at least `score_norm_bound`. The three errors, 2 (k - 1) e^-R of clipping, 2 (k - 1) 16^-squarings of
    exponentials and that of the reciprocal, get a third each.
    """

    clip: float
    squarings: int
    newton: int
    amplification: float

    @classmethod
    def of(cls, marginal: GaussianMixture, eps: float) -> Budget:
        """Settings for the score of a mixture whose means average to 0; eps of (0, 1)."""
        k = marginal.n_components
        radius = float(marginal.means.norm(dim=1).max())
        amplification = radius / float(marginal.std) ** 2 / score_norm_bound(marginal)
        share = min(0.5, eps / (3 * amplification)) if amplification > 0 else 0.5  # error of the weights, each cause
        clip = max(1.0, math.log(2 * max(1, k - 1) / share))
        return cls(
            clip=clip,
            squarings=exact.exponential_squarings(clip, share / (2 * max(1, k - 1))),
            newton=exact.reciprocal_steps(max(2, k), share),
            amplification=amplification,
        )


class ConstructiveScoreNet(ReluNetwork):
    """Score of the marginal at time t as an explicit feed-forward network of affine layers, ReLU and ReQU units.

    Nothing is trained: logits, which are affine in x once the common |x|^2 has dropped out of the softmax; their
    maximum by a tree; clipping; exponentials by a polynomial and squarings; Newton's reciprocal; the weighted sum of
    the means. Relative L^2(p_t) error at most eps in exact arithmetic, for any mixture (docs/theory.md proves it).
    Rounding comes on top: of the weights by some 2^m units in the last place, m = budget.squarings, and of the logits
    by one of the largest. Building takes memory for a few times (2 d + 3 k)^2 numbers.

    Args:
        mixture: law of the data. process: forward process. t: one time >= 0 (0 is data).
        eps: accuracy asked for, of (0, 1).

    Attributes:
        depth, width, largest_weight, parameter_count: read off the layers.
        budget: the settings that eps led to. eps: as given.

    `forward(x)` takes points (..., d) of the network's dtype, float64 unless cast by `.float()`, to scores (..., d).

    Raises:
        TypeError: mixture or process of another kind. ValueError: eps or t out of range.

    Source: arXiv 2606.03820, section 4, Theorem 1. Affine logits, a width that does not depend on eps, and the error
    bound with its constant are ours.
    """

    def __init__(self, mixture: GaussianMixture, process: OUProcess, t: Times, eps: float) -> None:
        marginal = checked_marginal(mixture, process, t)
        precision = float(marginal.std) ** -2
        layers, budget = posterior_layers(marginal, eps, keep=-precision, pull=precision)
        super().__init__(mixture.dim, layers)
        self.eps, self.budget = float(eps), budget
        self.to(mixture.device)

    def extra_repr(self) -> str:
        """Accuracy and size."""
        return f"eps={self.eps:g}, depth={self.depth}, width={self.width}"


def checked_marginal(mixture: GaussianMixture, process: OUProcess, t: Times) -> GaussianMixture:
    """The marginal at time t in float64, on the CPU, without gradient and without components of weight zero."""
    if not isinstance(mixture, GaussianMixture):
        raise TypeError(f"mixture must be a GaussianMixture; got {type(mixture).__name__}")
    if not isinstance(process, OUProcess):
        raise TypeError(f"process must be an OUProcess; got {type(process).__name__}")
    live = mixture.log_weights.detach() > -math.inf
    means = mixture.means.detach()[live].to("cpu", torch.float64)
    exact_mixture = GaussianMixture(means, float(mixture.std.detach()), mixture.log_weights.detach()[live].exp().cpu())
    return process.marginal(exact_mixture, t)


def score_norm_bound(marginal: GaussianMixture) -> float:
    """A number that the score's norm in L^2 is at least: d / sqrt(tr Cov).

    By Cauchy-Schwarz, since integration by parts gives E[score . (x - E x)] = -d.
    """
    weights, d = marginal.weights, marginal.dim
    means = marginal.means - weights @ marginal.means
    return d / math.sqrt(d * float(marginal.std) ** 2 + float(weights @ means.square().sum(1)))


def posterior_layers(
    marginal: GaussianMixture, eps: float, *, keep: float, pull: float
) -> tuple[list[nn.Module], Budget]:
    """Layers of the network `keep * x + pull * posterior_mean(x)`.

    Args:
        marginal: of k components, float64, on the CPU. eps: bound on the relative L^2 error of its score.
        keep, pull: coefficients; -1 / std^2 and 1 / std^2 make the score.

    Returns:
        The layers, and the settings.

    Raises:
        ValueError: eps out of range.
    """
    if not 0 < eps < 1:
        raise ValueError(f"eps must lie between 0 and 1; got {eps}")
    k, d = marginal.means.shape
    center = marginal.means.mean(0)
    means = marginal.means - center  # (k, d)
    std = float(marginal.std)
    budget = Budget.of(GaussianMixture(means, std, marginal.weights), eps)
    offset = marginal.log_weights - means.square().sum(1) / (2 * std**2)  # (k,)

    def logits(ends: Channels) -> Channels:
        return (ends[:d] - ends[d:]).mixed(means / std**2) + offset

    plan = Blueprint(d)
    x = plan.inputs() - center
    ends = joined(plan.hidden([x, -x]))  # x itself must reach the output: ReLU(x) and ReLU(-x) go through all layers
    top, ends = exact.maximum(plan, logits(ends), ends)
    ends, above = plan.hidden([ends, logits(ends) - top + budget.clip])  # ReLU clips: [0, R]
    powers, ends = exact.exponential(plan, above, budget.clip, budget.squarings, ends)
    most = max(2, k)
    total = powers.mixed(torch.ones(1, k, dtype=torch.float64))
    inverse, carried = exact.reciprocal(plan, total, most, budget.newton, joined([powers, ends]))
    weights, ends = exact.product(plan, carried[:k], inverse, carried[k:])
    mean = weights.mixed(means.T / math.sqrt(most))
    return plan.output(mean * pull + (ends[:d] - ends[d:]) * keep + center * (keep + pull)), budget
