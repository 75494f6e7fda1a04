"""Time grids for few-step students: where to cut the flow so that no segment is harder than another."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from flowfast import ops
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.stability import cumulative_stability, quadrature_stability, signed_stability, time_of_log_alpha

GridKind = Literal["uniform", "balanced", "signed", "measured"]
KINDS: tuple[GridKind, ...] = ("uniform", "balanced", "signed", "measured")

_NODES = 128  # of the measured profile, uniform in log r, where it is smooth
_POINTS = 512  # samples of p_t per node


def time_grid(
    mixture: GaussianMixture, process: OUProcess, n: int, *, kind: GridKind = "uniform", horizon: float = 1.0
) -> Tensor:
    """Cut [0, horizon] into n segments.

    Args:
        mixture: law of the data. process: forward process. n: number of segments, >= 1. horizon: T > 0.
        kind: "uniform" in t; "balanced", equal shares of the paper's cumulative stability A; "signed", of its sharper
            signed form; "measured", of the exponent in y = x / s with the worst case D^2/4 replaced by the mixture's
            own mean of lambda_max(C) under p_t (bounded by tr C, sampled with a fixed seed): the change of scale,
            which every student can make exactly, is left out, and the points gather where the posterior decides.

    Returns:
        (n + 1,) float64, decreasing from horizon (noise) to 0 (data); both ends exact.

    Raises:
        ValueError: unknown kind, n < 1, horizon not positive.

    Source: arXiv 2606.03820, section 5.3 (uniform, balanced); docs/math.md Eq. 8-9 (closed forms).
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n must be a number of segments, at least 1; got {n!r}")
    if not 0 < horizon < float("inf"):
        raise ValueError(f"horizon must be positive and finite; got {horizon}")
    shares = 1 - torch.arange(1, n, dtype=torch.float64) / n
    if kind == "measured":
        inner = _measured_times(mixture, process, shares, horizon)
    elif kind == "uniform":
        inner = horizon * shares
    else:
        cumulative = cumulative_stability if kind == "balanced" else signed_stability
        last = horizon if kind == "balanced" else min(horizon, _last_expansion(mixture, process))
        inner = _invert(lambda t: float(cumulative(mixture, process, t)), shares, last)
    if inner is None:  # nothing expands anywhere: no segment is harder than another
        inner = horizon * shares
    return torch.cat([inner.new_tensor([horizon]), inner, inner.new_zeros(1)])


def paper_grid(mixture: GaussianMixture, process: OUProcess, n: int, *, horizon: float = 1.0) -> Tensor:
    """The balanced grid as the paper computes it, by quadrature and linear interpolation. For reproduction only."""
    import numpy as np

    t, cumulative = quadrature_stability(mixture, process, horizon=horizon)
    shares = cumulative[-1] * (1 - torch.arange(n + 1, dtype=torch.float64) / n)
    times = torch.from_numpy(np.interp(shares.numpy(), cumulative.numpy(), t.numpy()))
    times[0], times[-1] = horizon, 0.0
    return times


def measured_spread(
    mixture: GaussianMixture, process: OUProcess, t: Tensor, *, points: int = _POINTS, seed: int = 0
) -> Tensor:
    """Mean over p_t of `min(tr C, D_t^2 / 4)`, which bounds lambda_max of the posterior covariance C: (m,) for t (m,).

    Args:
        mixture, process: as in `time_grid`. t: (m,) times. points: samples per time. seed: of the samples, which are
            common to all times.
    """
    exact = mixture.to(torch.float64)
    generator = torch.Generator(exact.device).manual_seed(seed)
    start = exact.sample(points, generator=generator)
    noise = torch.randn(start.shape, generator=generator, dtype=start.dtype, device=start.device)
    widest = mixture.diameter() ** 2 / 4
    spreads = []
    for time in t:
        alpha = float(process.alpha(time))
        x = alpha * start + (1 - alpha**2) ** 0.5 * noise
        trace = ops.covariance_trace(x, process.marginal(exact, time))
        spreads.append(trace.clamp(max=alpha**2 * widest).mean())
    return torch.stack(spreads).cpu()


def _measured_times(mixture: GaussianMixture, process: OUProcess, shares: Tensor, horizon: float) -> Tensor | None:
    """Invert the measured cumulative stability, tabulated on nodes uniform in log r and interpolated linearly there."""
    import numpy as np

    sigma0 = float(mixture.std.detach())
    last = process.snr_root(horizon, sigma0).log()
    log_r = torch.linspace(-math.log(sigma0), float(last), _NODES, dtype=torch.float64)  # from data to noise
    log_alpha = -torch.log1p(((-2 * log_r).exp() - sigma0**2).clamp(min=0)) / 2
    t = (
        torch.tensor([time_of_log_alpha(process, value) or 0.0 for value in log_alpha.tolist()])
        .double()
        .clamp(max=horizon)
    )
    t[-1] = horizon
    std = process.std(t, sigma0)
    rate = measured_spread(mixture, process, t) / std**2  # of the exponent in y, per unit of log r (Eq. 8)
    pieces = (rate[1:] + rate[:-1]) / 2 * -log_r.diff()
    cumulative = torch.cat([rate.new_zeros(1), pieces.cumsum(0)])
    if not float(cumulative[-1]) > 0:
        return None
    at = torch.from_numpy(np.interp((shares * cumulative[-1]).numpy(), cumulative.numpy(), log_r.numpy()))
    back = [time_of_log_alpha(process, -math.log1p(math.exp(-2 * value) - sigma0**2) / 2) for value in at.tolist()]
    return torch.tensor(back, dtype=torch.float64)


def _last_expansion(mixture: GaussianMixture, process: OUProcess) -> float:
    """The time after which the signed exponent falls, `D_0^2 / 4 = (1 - sigma0^2) s_t^2`; infinite if it never does."""
    sigma0, widest = float(mixture.std.detach()), mixture.diameter() ** 2 / 4
    if sigma0 >= 1 or widest >= 1 - sigma0**2:
        return math.inf
    alpha_squared = (1 - widest / (1 - sigma0**2)) / (1 - sigma0**2)
    return 0.0 if alpha_squared >= 1 else time_of_log_alpha(process, math.log(alpha_squared) / 2) or math.inf


def _invert(cumulative: Callable[[float], float], shares: Tensor, last: float) -> Tensor | None:
    """Times at which an increasing function has the given shares (decreasing) of its value at `last`."""
    from scipy.optimize import brentq

    total = cumulative(last)
    if not total > 0:
        return None
    inner, high = [], last
    for level in (shares * total).tolist():
        high = float(brentq(lambda t, level=level: cumulative(t) - level, 0.0, high, xtol=1e-300, rtol=1e-15))
        inner.append(high)
    return torch.tensor(inner, dtype=torch.float64)
