"""Theorem 3 as a module: residual blocks, each a score network, that follow the probability flow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.students.mlp import check_size
from flowfast.theory.network import ReluNetwork
from flowfast.theory.score_net import checked_marginal, posterior_layers


class ResidualComposition(ReluNetwork):
    """N residual blocks `x <- x + h f(x)`, `f(x) = -beta (x + s(x))`, s a constructive score network at a block's time.

    This is explicit Euler on the backward flow, from t_from down to t_to in N equal steps, with every score within eps.
    As a block's sum is affine in x and in the weighted means, it is taken up by the last layer of its score network:
    the whole is one feed-forward network of affine layers, ReLU and ReQU units, without skip connections.

    Args:
        mixture: law of the data. process: forward process. blocks: N >= 1. eps: of each score network, see
            `ConstructiveScoreNet`. t_from, t_to: times, t_from > t_to >= 0.

    Attributes:
        times: (N + 1,), decreasing; block k starts at times[k]. depth, width, largest_weight, parameter_count: read off
            the layers.

    `forward(x)` takes points (..., d) of the network's dtype, float64 unless cast, at t_from to points at t_to.

    Raises:
        TypeError, ValueError: an argument of another kind or out of range.

    Source: arXiv 2606.03820, section 5, Definition 1 and Theorem 3.
    """

    def __init__(
        self,
        mixture: GaussianMixture,
        process: OUProcess,
        blocks: int,
        eps: float,
        *,
        t_from: float = 1.0,
        t_to: float = 0.0,
    ) -> None:
        times = block_times(blocks, t_from, t_to)
        layers: list[nn.Module] = []
        for t, h in zip(times.tolist(), times.diff().tolist(), strict=False):
            marginal = checked_marginal(mixture, process, t)
            speed, precision = h * float(process.beta(t)), float(marginal.std) ** -2
            # x + h f(x) with s(x) = (posterior mean - x) / std^2
            block, _ = posterior_layers(marginal, eps, keep=1 - speed * (1 - precision), pull=-speed * precision)
            layers += block
        super().__init__(mixture.dim, layers)
        self.times, self.eps = times, float(eps)
        self.to(mixture.device)

    def extra_repr(self) -> str:
        """Blocks, accuracy and size."""
        return f"blocks={len(self.times) - 1}, eps={self.eps:g}, depth={self.depth}, width={self.width}"


def block_times(blocks: int, t_from: float, t_to: float) -> Tensor:
    """Ends of `blocks` equal steps from t_from down to t_to: (blocks + 1,), float64.

    Raises:
        TypeError, ValueError: blocks is no int >= 1, or the times are not t_from > t_to >= 0.
    """
    check_size("blocks", blocks)
    if not 0 <= t_to < t_from:
        raise ValueError(f"t_from must lie above t_to >= 0; got {t_from} and {t_to}")
    return torch.linspace(t_from, t_to, blocks + 1, dtype=torch.float64)
