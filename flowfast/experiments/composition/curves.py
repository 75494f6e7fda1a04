"""What a problem's flow does to perturbations, tabulated on nodes uniform in log r."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowfast.flow import flow_map
from flowfast.grids import measured_spread
from flowfast.mixture import GaussianMixture
from flowfast.ops import posterior_weights
from flowfast.process import OUProcess
from flowfast.seeds import generator_for
from flowfast.stability import time_of_log_alpha
from flowfast.variational import flow_amplification, flow_jacobian_product

NODES = 65
POINTS = 512  # samples of p_t per node
NORM_POINTS = 128  # of them for the operator norm, which takes the whole derivative
FINITE = 0.1  # size of a finite perturbation over that of the points, root mean square
RTOL = 1e-6  # of derivatives along the flow: far below the sampling error of a mean over POINTS


@dataclass(frozen=True)
class Curves:
    """Functions of the time t, each tabulated on (m,) nodes from noise to data.

    Attributes:
        log_r: nodes. trace, exact: `int r E[c] dr` from noise to the node, under p_t, with c = min(tr C, D^2 / 4) for
            the means' own posterior covariance C, and c = lambda_max(C): the exponent in y = x / s (Eq. 8).
        direction, norm, finite: logarithm of the amplification from the node's time to t = 0, under p_t: root mean
            square of a random direction, `sqrt(E |D Phi|_F^2 / d)`; mean operator norm, `E |D Phi|`; and root mean
            square of a normal perturbation that is no longer small, FINITE of the points' own size.
    """

    log_r: tuple[float, ...]
    trace: tuple[float, ...]
    exact: tuple[float, ...]
    direction: tuple[float, ...]
    norm: tuple[float, ...]
    finite: tuple[float, ...]

    def at(self, name: str, log_r: Sequence[float]) -> list[float]:
        """One of the functions at these log r, interpolated linearly."""
        found: list[float] = np.interp(np.asarray(log_r), self.log_r, getattr(self, name)).tolist()
        return found


def curves(
    mixture: GaussianMixture,
    process: OUProcess,
    *,
    horizon: float = 1.0,
    nodes: int = NODES,
    points: int = POINTS,
    norm_points: int = NORM_POINTS,
) -> Curves:
    """Measure a flow from t = horizon to the data; deterministic.

    Args:
        mixture: law of the data. process: forward process. horizon: > 0. nodes: of the tables.
        points: samples of p_t per node; norm_points: of them for the operator norm.
    """
    exact, sigma0 = mixture.to(torch.float64), float(mixture.std.detach())
    low, high = log_r_of(mixture, process, (horizon, 0.0))
    log_r = torch.linspace(low, high, nodes, dtype=torch.float64)
    times = torch.tensor([horizon, *(time_of_log_r(mixture, process, r) for r in log_r[1:-1].tolist()), 0.0]).double()
    start, noise = _common(exact, points)
    rates: dict[str, list[float]] = {"exact": []}
    logs: dict[str, list[float]] = {"direction": [], "norm": [], "finite": []}
    for time in times.tolist():
        alpha = float(process.alpha(time))
        x = alpha * start + (1 - alpha**2) ** 0.5 * noise
        marginal = process.marginal(exact, time)
        rates["exact"].append(float(largest_eigenvalue(x, marginal).mean() / marginal.std**2))
        for name, value in _amplifications(x, exact, process, time, norm_points).items():
            logs[name].append(value)
    rates["trace"] = (measured_spread(exact, process, times, points=points) / process.std(times, sigma0) ** 2).tolist()
    sums = {name: _integral(values, log_r) for name, values in rates.items()}
    found = {name: tuple(values) for name, values in {**sums, **logs}.items()}
    return Curves(log_r=tuple(log_r.tolist()), **found)


def log_r_of(mixture: GaussianMixture, process: OUProcess, times: Sequence[float]) -> list[float]:
    """Logarithm of alpha / s at each time."""
    found = process.snr_root(torch.tensor(times, dtype=torch.float64), float(mixture.std.detach())).log()
    values: list[float] = found.tolist()
    return values


def time_of_log_r(mixture: GaussianMixture, process: OUProcess, log_r: float) -> float:
    """The time at which alpha / s is exp(log_r); 0 where that lies beyond the data.

    Raises:
        ValueError: the schedule never gets there.
    """
    # r^2 = alpha^2 / (alpha^2 std^2 + 1 - alpha^2)
    left = max(0.0, math.exp(-2 * log_r) - float(mixture.std.detach()) ** 2)
    time = time_of_log_alpha(process, -math.log1p(left) / 2)
    if time is None:
        raise ValueError(f"log_r must be reached by the schedule; got {log_r}")
    return time


def largest_eigenvalue(x: Tensor, mixture: GaussianMixture) -> Tensor:
    """lambda_max of the posterior covariance of the mixture's means at each row of x (n, d): (n,), float64."""
    weights = posterior_weights(x.double(), mixture)  # (n, k)
    means = mixture.means.double()
    apart = (means - (weights @ means)[:, None]) * weights[..., None].sqrt()  # (n, k, d)
    products = apart @ apart.mT if means.shape[0] < means.shape[1] else apart.mT @ apart
    largest: Tensor = torch.linalg.eigvalsh(products)[:, -1].clamp(min=0)
    return largest


def _amplifications(
    x: Tensor, mixture: GaussianMixture, process: OUProcess, time: float, norm_points: int
) -> dict[str, float]:
    """Logarithms of the three amplifications from `time` to the data."""
    if time == 0:
        return {"direction": 0.0, "norm": 0.0, "finite": 0.0}
    generator = generator_for("composition", "directions")
    v = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    moved = flow_jacobian_product(x, v, mixture, process, time, 0.0, rtol=RTOL)
    norms = flow_amplification(x[:norm_points], mixture, process, time, 0.0, rtol=RTOL)
    size = FINITE * x.square().mean().sqrt()
    apart = flow_map(x + size * v, mixture, process, time, 0.0) - flow_map(x, mixture, process, time, 0.0)
    return {
        "direction": _log_ratio(moved, v),
        "norm": math.log(float(norms.mean())),
        "finite": _log_ratio(apart, size * v),
    }


def _log_ratio(moved: Tensor, v: Tensor) -> float:
    return math.log(float(moved.square().sum() / v.square().sum())) / 2


def _integral(rates: Sequence[float], log_r: Tensor) -> list[float]:
    """`int rate d log r` from the first node, by the trapezoid rule."""
    rate = torch.tensor(rates, dtype=torch.float64)
    pieces = (rate[1:] + rate[:-1]) / 2 * log_r.diff()
    found: list[float] = torch.cat([rate.new_zeros(1), pieces.cumsum(0)]).tolist()
    return found


def _common(mixture: GaussianMixture, points: int) -> tuple[Tensor, Tensor]:
    """Samples of the data and of noise that are common to all times."""
    generator = generator_for("composition", "curves")
    start = mixture.sample(points, generator=generator)
    return start, torch.randn(start.shape, generator=generator, dtype=start.dtype)
