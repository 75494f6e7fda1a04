"""Trajectories of the flow together with perturbations of them, integrated with a step size per trajectory.

In y = x / s a perturbation follows `d(dy)/dr = r Cov_gamma(means) dy`, the derivative of docs/math.md Eq. 6. Both stay
in an orthonormal basis of the centred means' span: q = min(k, d) coordinates whatever d is. Plain torch, float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flowfast.mixture import GaussianMixture
from flowfast.reference import GROW, SAFETY, SHRINK
from flowfast.tableaux import DORMAND_PRINCE

ATOL = 1e-12  # bound on one step's error in y beside the relative one, that of the flow in float64
MOST_STEPS = 10_000  # attempted per trajectory before it is given up, as in the flow

CHUNK = 1 << 22  # rows are taken in chunks of about this many numbers


@dataclass(frozen=True)
class Span:
    """A mixture in q orthonormal coordinates of its centred means.

    Attributes:
        means: (k, q). prior: log-weights (k,). center: (d,). basis: (d, q), None where q = d and nothing is rotated.
    """

    means: Tensor
    prior: Tensor
    center: Tensor
    basis: Tensor | None

    @property
    def size(self) -> int:
        """The number q of coordinates."""
        return self.means.shape[1]

    def project(self, rows: Tensor) -> Tensor:
        """Coordinates (n, q) of rows (n, d)."""
        return rows if self.basis is None else rows @ self.basis

    def lift(self, rows: Tensor) -> Tensor:
        """Rows (n, d) of coordinates (n, q)."""
        return rows if self.basis is None else rows @ self.basis.T

    def enter(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Points x (n, d) of the time whose r and s are ends[0], ends[1], as y = x / s around the centre: (n, q)."""
        r, s = ends[0][:, None], ends[1][:, None]
        return self.project((rows - r * s * self.center) / s)


def span_of(mixture: GaussianMixture) -> Span:
    """The mixture around the mean of its means, float64; a centre in common moves no perturbation."""
    means = mixture.means.detach().double()
    center = means.mean(0)
    means, prior = means - center, mixture.log_weights.detach().double()
    if len(means) >= mixture.dim:
        return Span(means, prior, center, None)
    basis, corner = torch.linalg.qr(means.T)
    return Span(corner.T.contiguous(), prior, center, basis)


@dataclass(frozen=True)
class Propagated:
    """Where trajectories and vectors ended.

    Attributes:
        points: (n, q). vectors: (n, m, q) of Frobenius norm 1 (or 0), to be multiplied by exp(log_scale), (n,).
    """

    points: Tensor
    vectors: Tensor
    log_scale: Tensor


def propagate(
    start: Tensor, vectors: Tensor, span: Span, ends: Tensor, rtol: float, transposed: bool = False
) -> Propagated:
    """Carry vectors along trajectories of the flow by its derivative, or by the derivative's transpose.

    Args:
        start: (n, q), points y. vectors: (n, m, q), m >= 0. span: the mixture.
        ends: (4, n), r and s where the flow starts, r and s where it ends.
        rtol: bound on one step's error relative to the trajectory's and to the perturbations' norm.
        transposed: C is symmetric, so the transpose of `d(dy) = r C dy dr` is the same equation run backwards with the
            other sign; the vectors then belong to the end of the trajectory and come out at its start.

    Returns:
        Points at the end (the start, if transposed) and vectors; NaN for a trajectory that failed.
    """
    r_from, r_to = ends[0], ends[2]
    if transposed:
        start = propagate(start, vectors[:, :0], span, ends, rtol).points
        r_from, r_to = r_to, r_from
    sign = -1.0 if transposed else 1.0
    size = max(1, CHUNK // ((1 + vectors.shape[1]) * max(span.means.shape)))
    state, log_scale = torch.cat([start[:, None], vectors], 1), torch.zeros_like(r_from)
    for i in range(0, len(start), size):
        rows = slice(i, i + size)
        state[rows], log_scale[rows] = _integrate(state[rows], r_from[rows], r_to[rows], span, sign, rtol)
    return Propagated(state[:, 0], state[:, 1:], log_scale)


def _integrate(state: Tensor, r: Tensor, target: Tensor, span: Span, sign: float, rtol: float) -> tuple[Tensor, Tensor]:
    """Trajectories (row 0 of every (1 + m, q)) with perturbations (the other rows), a step size per trajectory.

    Perturbations are kept at Frobenius norm 1; the logarithms of what was divided out are the second result (n,). A
    trajectory that needs too many steps, or steps below rounding, ends in NaN.
    """
    done_state, done_log = torch.empty_like(state), torch.empty_like(r)
    index, log_scale = torch.arange(len(state), device=state.device), torch.zeros_like(r)
    state, log_scale = _normalise(state, log_scale)
    h, calm, steps = _first_step(r, target, span, rtol), torch.ones_like(r, dtype=torch.bool), 0
    first = _rate(state, r, span, sign)
    while len(index):
        last = (target - r).abs() <= h.abs() * (1 + 1e-12)
        h = torch.where(last, target - r, h)
        new, rates = _step(state, r, h, first, span, sign)
        error = _error(state, new, _combined(DORMAND_PRINCE[-1], rates, h), rtol)
        accept = error <= 1
        state, r = torch.where(accept[:, None, None], new, state), torch.where(accept, r + h, r)
        first = torch.where(accept[:, None, None], rates[-1], first)
        before = log_scale
        state, log_scale = _normalise(state, log_scale)
        first[:, 1:] *= (before - log_scale).exp()[:, None, None]
        factor = (SAFETY * error.clamp(min=1e-30) ** -0.2).clamp(SHRINK, GROW)
        h, calm, steps = h * torch.where(accept & ~calm, factor.clamp(max=1.0), factor), accept, steps + 1
        done = accept & last
        lost = ~done & ((h.abs() < 4 * torch.finfo(torch.float64).eps * r.abs()) | (steps >= MOST_STEPS))
        state, done = torch.where(lost[:, None, None], math.nan, state), done | lost
        if bool(done.any()):
            done_state[index[done]], done_log[index[done]] = state[done], log_scale[done]
            index, state, log_scale, first, r, target, h, calm = (
                tensor[~done] for tensor in (index, state, log_scale, first, r, target, h, calm)
            )
    return done_state, done_log


def _step(state: Tensor, r: Tensor, h: Tensor, first: Tensor, span: Span, sign: float) -> tuple[Tensor, list[Tensor]]:
    """One attempted step: the new state, and the rates of all stages (the last is the next step's first)."""
    stages, rates, new = DORMAND_PRINCE.shape[1], [first], state
    for j in range(1, stages):
        new = state + _combined(DORMAND_PRINCE[j], rates, h)
        rates.append(_rate(new, r + h * DORMAND_PRINCE[stages, j], span, sign))
    return new, rates


def _rate(state: Tensor, r: Tensor, span: Span, sign: float) -> Tensor:
    """`mubar` for the trajectory, `sign r C` times each perturbation: like state (n, 1 + m, q)."""
    along = state @ span.means.T  # (n, 1 + m, k)
    r = r[:, None]
    half = span.means.square().sum(1) / 2  # (k,)
    weights = (span.prior + r * (along[:, 0] - r * half)).softmax(1)[:, None]  # (n, 1, k)
    change = along[:, 1:] - along[:, 1:] @ weights.mT
    return torch.cat([weights, sign * r[:, None] * weights * change], 1) @ span.means


def _combined(row: Tensor, rates: list[Tensor], h: Tensor) -> Tensor:
    terms = [coefficient * rate for coefficient, rate in zip(row.tolist(), rates, strict=False) if coefficient]
    return h[:, None, None] * torch.stack(terms).sum(0)


def _error(state: Tensor, new: Tensor, error: Tensor, rtol: float) -> Tensor:
    """Largest ratio of a step's error to its bound, infinite where a number is not finite: (n,)."""
    root = state.shape[2] ** 0.5

    def norm(rows: Tensor) -> Tensor:
        size: Tensor = torch.linalg.vector_norm(rows.flatten(1), dim=1)
        return size

    bound = ATOL * root + rtol * torch.maximum(norm(state[:, 0]), norm(new[:, 0]))
    trajectory = norm(error[:, 0]) / bound
    size = torch.maximum(norm(state[:, 1:]), norm(new[:, 1:]))
    perturbation = norm(error[:, 1:]) / (rtol * size).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.maximum(trajectory, perturbation).nan_to_num(nan=math.inf)


def _normalise(state: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    norm = state[:, 1:].flatten(1).norm(dim=1)
    norm = torch.where(norm > 0, norm, torch.ones_like(norm))
    return torch.cat([state[:, :1], state[:, 1:] / norm[:, None, None]], 1), log_scale + norm.log()


def _first_step(r: Tensor, target: Tensor, span: Span, rtol: float) -> Tensor:
    radius = float(span.means.square().sum(1).max().sqrt())
    away = target - r
    if radius == 0:  # all means coincide: the rate is constant
        return away
    return away.sign() * torch.minimum(away.abs(), r.clamp(min=1 / radius) * 0.5 * rtol**0.2)
