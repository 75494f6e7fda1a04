"""How fast nearby trajectories of the probability flow may part: the paper's stability profile and its integrals.

All results are float64, in closed form through `r = alpha / s` (docs/math.md Eq. 8), for any schedule; the paper's
quadrature stands in `quadrature_stability`, for reproduction only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess, Times

NOISE, VARIANCE, MIXTURE = "noise", "variance", "mixture"


def stability_profile(mixture: GaussianMixture, process: OUProcess, t: Times) -> Tensor:
    """Spatial Lipschitz bound of the flow's velocity, `L(t) = beta (|1 - 1/s^2| + D_t^2 / (4 s^4))`: shape of t.

    Args:
        mixture: law of the data. process: forward process. t: times >= 0 (0 is data), a number or a tensor.

    Source: arXiv 2606.03820, section 3.2.
    """
    contraction, spread = profile_terms(mixture, process, t)
    return contraction + spread


def profile_terms(mixture: GaussianMixture, process: OUProcess, t: Times) -> tuple[Tensor, Tensor]:
    """The two terms of the stability profile: `beta |1 - 1/s^2|` and `beta D_t^2 / (4 s^4)`, each of t's shape."""
    precision = process.std(t, _sigma0(mixture)) ** -2
    spread = (process.alpha(t) * mixture.diameter() * precision) ** 2 / 4
    return process.beta(t) * (1 - precision).abs(), process.beta(t) * spread


def cumulative_stability(mixture: GaussianMixture, process: OUProcess, t: Times) -> Tensor:
    """`A(t) = int_0^t L`, in closed form `|ln(s_t / s_0)| + (D_0^2 / 8)(r_0^2 - r_t^2)`: shape of t.

    Arguments as in `stability_profile`. `exp(A(t) - A(u))` bounds the Lipschitz constant of the flow from t to u < t.
    Source: arXiv 2606.03820, section 5.3; the closed form is docs/math.md Eq. 8.
    """
    scale, spread = _exponents(mixture, process, t)
    return scale.abs() + spread


def signed_stability(mixture: GaussianMixture, process: OUProcess, t: Times) -> Tensor:
    """The sharper exponent `ln(s_0 / s_t) + (D_0^2 / 8)(r_0^2 - r_t^2)`, without the absolute value: shape of t.

    `exp` of its increase from u to t bounds the Lipschitz constant of the flow from t to u < t (docs/math.md Eq. 9).
    """
    scale, spread = _exponents(mixture, process, t)
    return spread - scale


def _exponents(mixture: GaussianMixture, process: OUProcess, t: Times) -> tuple[Tensor, Tensor]:
    """`ln(s_t / s_0)` and `(D_0^2 / 8)(r_0^2 - r_t^2)`, without cancellation near t = 0."""
    sigma0 = _sigma0(mixture)
    growth = -torch.expm1(2 * process.log_alpha(t))  # 1 - alpha^2
    std = process.std(t, sigma0)
    lost = growth / (sigma0 * std) ** 2  # r_0^2 - r_t^2
    scale = torch.log1p(growth * (1 / sigma0**2 - 1)) / 2
    return scale, mixture.diameter() ** 2 / 8 * lost


def _sigma0(mixture: GaussianMixture) -> float:
    return float(mixture.std.detach())


@dataclass(frozen=True)
class StabilityRegimes:
    """Which term rules the stability profile, and when.

    Attributes:
        t_shrink: time at which `1/s_t^2 = kappa`; None if the variance never falls that low (sigma0^2 >= 1/kappa).
        t_mix: time at which `D_t^2 / (4 s^4) = 1/s^2`; None if the spread never rules (D_0 <= 2 sigma0).
        intervals: (t_low, t_high, regime) from 0 to the horizon; regime is "mixture" (the spread of the means rules),
            "variance" (1/s^2 rules and exceeds kappa) or "noise" (neither: L is of the order of beta).
    """

    t_shrink: float | None
    t_mix: float | None
    intervals: tuple[tuple[float, float, str], ...]


def stability_regimes(
    mixture: GaussianMixture, process: OUProcess, *, horizon: float = 1.0, kappa: float = 2.0
) -> StabilityRegimes:
    """Divide [0, horizon] by the term that rules the stability profile.

    Args:
        mixture, process: as in `stability_profile`. horizon: last time, > 0. kappa: > 1, what counts as small variance.

    Raises:
        ValueError: kappa <= 1 or horizon <= 0.

    Source: arXiv 2606.03820, section 5.1 (constant beta); here for any schedule, through `int_0^t beta`.
    """
    if not kappa > 1:
        raise ValueError(f"kappa must exceed 1; got {kappa}")
    _check_horizon(horizon)
    sigma0, diameter = _sigma0(mixture), mixture.diameter()
    t_shrink = t_mix = None
    if sigma0**2 < 1 / kappa:
        t_shrink = time_of_log_alpha(process, -math.log((1 - sigma0**2) / (1 - 1 / kappa)) / 2)
    if diameter > 2 * sigma0:
        t_mix = time_of_log_alpha(process, -math.log(diameter**2 / 4 + 1 - sigma0**2) / 2)
    cuts = sorted({0.0, horizon, *(t for t in (t_shrink, t_mix) if t is not None and 0 < t < horizon)})
    intervals: list[tuple[float, float, str]] = []
    for low, high in zip(cuts, cuts[1:], strict=False):
        middle = (low + high) / 2
        spread_rules = t_mix is not None and middle < t_mix
        small = t_shrink is not None and middle < t_shrink
        regime = MIXTURE if spread_rules else VARIANCE if small else NOISE
        if intervals and intervals[-1][2] == regime:
            intervals[-1] = (intervals[-1][0], high, regime)
        else:
            intervals.append((low, high, regime))
    return StabilityRegimes(t_shrink, t_mix, tuple(intervals))


def time_of_log_alpha(process: OUProcess, value: float, *, most: float = 1e6) -> float | None:
    """The time at which `log alpha` has fallen to `value` <= 0; None if the schedule does not get there by `most`."""
    from scipy.optimize import brentq

    if value >= 0:
        return 0.0
    high = 1.0
    while True:
        try:
            reached = float(process.log_alpha(high)) <= value
        except ValueError:  # past the end of a table
            return None
        if reached:
            return float(brentq(lambda t: float(process.log_alpha(t)) - value, 0.0, high, xtol=1e-15, rtol=1e-14))
        if high >= most:
            return None
        high *= 2


def quadrature_stability(
    mixture: GaussianMixture, process: OUProcess, *, horizon: float = 1.0, points: int = 10_001
) -> tuple[Tensor, Tensor]:
    """The paper's Algorithm 1 as its authors run it: A by the trapezoid rule on a uniform grid. For reproduction only.

    Returns:
        times and A, each (points,), increasing. At sigma0 = 0.01 the total is too large by a factor of five.
    """
    t = torch.linspace(0, horizon, points, dtype=torch.float64)
    rate = stability_profile(mixture, process, t)
    pieces = (rate[1:] + rate[:-1]) / 2 * t.diff()
    return t, torch.cat([t.new_zeros(1), pieces.cumsum(0)])


def _check_horizon(horizon: float) -> None:
    if not (horizon > 0 and math.isfinite(horizon)):
        raise ValueError(f"horizon must be positive and finite; got {horizon}")
