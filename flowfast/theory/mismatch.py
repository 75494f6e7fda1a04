"""Theorem 2 as a calculator: the exponent of the flow's last stretch against what a bounded network can follow."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.stability import time_of_log_alpha
from flowfast.students.mlp import check_size


@dataclass(frozen=True)
class LipschitzMismatch:
    """The flow over the tail window [0, Delta] and a network, both as natural logarithms of Lipschitz constants.

    Every figure is an upper bound of one, none a measurement: that the flow's exceeds the network's says that the
    theory promises nothing for one step, not that one step must fail. `flowfast theory lipschitz` measures both.

    Attributes:
        sigma0: standard deviation of a component. diameter: D_0, largest distance between two means.
        window: Delta, the time at which alpha^2 = 1/2; ln 2 / (2 beta) for constant beta.
        spread: part of the exponent that the spread of the means causes, exactly `D_0^2 / (8 sigma0^2 (1 + sigma0^2))`.
        exponent: the paper's `int_0^Delta L`, exactly spread + |ln(s_Delta / s_0)|.
        signed: the sharper bound spread - ln(s_Delta / s_0) (docs/math.md Eq. 9).
        lower_bound: the paper's bound on `exponent` from below, `D_0^2 / (16 sigma0^2)`; None where it does not hold,
            sigma0 > 1.
        budget: `depth ln(constant * width * bound)`, above any network's within the bound; may be negative.
        threshold: sigma*, below which lower_bound exceeds the budget; infinite where the budget is not positive.
        exact_threshold: the same with spread in place of its lower bound.
    """

    sigma0: float
    diameter: float
    window: float
    spread: float
    exponent: float
    signed: float
    lower_bound: float | None
    budget: float
    threshold: float
    exact_threshold: float

    @property
    def unfavourable(self) -> bool:
        """Whether one step is structurally unfavourable: the flow's exponent exceeds the network's budget."""
        return self.exponent > self.budget


def lipschitz_mismatch(
    mixture: GaussianMixture, process: OUProcess, depth: int, width: int, bound: float, *, constant: float = 1.0
) -> LipschitzMismatch:
    """Compare the flow over the tail window with the networks whose weights are bounded.

    Args:
        mixture: law of the data. process: forward process.
        depth: layers of weights, >= 1; an `MLP` of h hidden layers has h + 1.
        width: largest number of units of a layer, input and output included, >= 1.
        bound: B > 0, on the size of every entry of the weight matrices; biases do not matter.
        constant: the activation's c > 0. A matrix of at most W by W entries within B has spectral norm <= W B, so c is
            the steepest slope of the activation: 1 for ReLU, 1.13 for GELU. ReQU has none, as its slope is 2 max(x, 0):
            2 R serves for points at which no activation's input exceeds R >= 1/2, and for no others.

    Raises:
        TypeError, ValueError: an argument outside these ranges, or a schedule whose alpha^2 never falls to 1/2.

    Source: arXiv 2606.03820, Theorem 2; the exact exponents follow from docs/math.md Eq. 8-9.
    """
    check_size("depth", depth)
    check_size("width", width)
    for name, value in (("bound", bound), ("constant", constant)):
        if not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ValueError(f"{name} must be positive and finite; got {value!r}")
    window = time_of_log_alpha(process, -math.log(2) / 2)
    if window is None:
        raise ValueError("process must let alpha^2 fall to 1/2: its schedule ends too early, or beta vanishes")
    sigma0, diameter = float(mixture.std.detach()), mixture.diameter()
    spread = (diameter / sigma0) ** 2 / (8 * (1 + sigma0**2))
    growth = math.log1p((sigma0**-2 - 1) / 2) / 2  # ln(s_Delta / s_0), as s_Delta^2 = (1 + sigma0^2) / 2
    budget = depth * (math.log(constant) + math.log(width) + math.log(bound))
    threshold = exact_threshold = math.inf
    if budget > 0:
        threshold = diameter / (4 * math.sqrt(budget))
        # 8 u (1 + u) = D_0^2 / budget for u = sigma^2, without cancellation
        exact_threshold = math.sqrt(diameter**2 / (4 * budget) / (1 + math.sqrt(1 + diameter**2 / (2 * budget))))
    return LipschitzMismatch(
        sigma0=sigma0,
        diameter=diameter,
        window=window,
        spread=spread,
        exponent=spread + abs(growth),
        signed=spread - growth,
        lower_bound=(diameter / sigma0) ** 2 / 16 if sigma0 <= 1 else None,
        budget=budget,
        threshold=threshold,
        exact_threshold=exact_threshold,
    )
