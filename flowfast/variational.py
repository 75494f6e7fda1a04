"""The derivative of the flow map: what becomes of a small perturbation of a point.

With y = x / s the derivative is `s_to / s_from` times a matrix that acts only in the span of the centred means
(docs/math.md Eq. 6): `perturbation` integrates it together with the trajectory. Plain torch, float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowfast.mixture import GaussianMixture
from flowfast.ops import check_points, check_times
from flowfast.perturbation import CHUNK, MOST_STEPS, Propagated, Span, propagate, span_of
from flowfast.process import OUProcess, Times

RTOL = 1e-10  # default bound on one step's relative error, that of the flow in float64
EXACT = 128  # coordinates up to which the whole matrix is integrated; beyond, its norm is found by iteration
BLOCK, ROUNDS, SETTLED = 8, 60, 1e-9  # of that iteration: vectors, most rounds, relative change that ends it


def flow_jacobian_product(
    x: Tensor, v: Tensor, mixture: GaussianMixture, process: OUProcess, t_from: Times, t_to: Times, *,
    transposed: bool = False, rtol: float = RTOL,
) -> Tensor:  # fmt: skip
    """Derivative of the flow map at x times v, `D Phi(x) v`: shape, dtype and device of x.

    Args:
        x: (..., d), points of time t_from, floating; computed in float64 whatever the dtype.
        v: vectors of x's shape, dtype and device.
        mixture: law of the data (t = 0). process: forward process.
        t_from, t_to: times >= 0, either direction; numbers, or tensors that broadcast with x's leading dimensions.
        transposed: `D Phi(x)^T v` instead (the derivative is a product of symmetric matrices, not symmetric itself).
        rtol: bound on one step's error, > 0: of the trajectory as in `flow_map`, of the perturbation relative to its
            own norm. Half of the results come to within 10 rtol of the truth, 99 % to within 1,000 rtol, relative to
            |D Phi| |v| (the paper's mixture); where |D Phi| is large its own derivative is larger still.

    Returns:
        A row of x or v that is not finite gives a row that is not finite. Carries no gradient.

    Raises:
        TypeError, ValueError: arguments of another kind or range.
        RuntimeError: a trajectory needed too many steps or steps below rounding; the message names the first.

    Source: docs/math.md Eq. 6; arXiv 2606.03820, Proposition 1 (the covariance).
    """
    rows = _check(x, mixture, rtol)
    if not isinstance(v, Tensor) or v.shape != x.shape or v.dtype != x.dtype or v.device != x.device:
        got = f"{tuple(v.shape)} {v.dtype} {v.device}" if isinstance(v, Tensor) else type(v).__name__
        raise ValueError(f"v must match x in shape, dtype and device, {tuple(x.shape)} {x.dtype} {x.device}; got {got}")
    span, ends = span_of(mixture), _ends(x, mixture, process, t_from, t_to)
    vectors = v.detach().reshape(rows.shape).double()
    inside = span.project(vectors)
    start = span.enter(rows, ends)
    finite = torch.isfinite(rows).all(1) & torch.isfinite(vectors).all(1)
    moved = torch.full_like(inside, math.nan)
    part = propagate(start[finite], inside[finite, None], span, ends[:, finite], rtol, transposed)
    moved[finite] = part.vectors[:, 0] * part.log_scale.exp()[:, None]
    _refuse_failures(part.vectors[:, 0].sum(1), finite)
    gain = (ends[3] / ends[1])[:, None]
    out = gain * (span.lift(moved) + vectors - span.lift(inside))
    return out.reshape(x.shape).to(x.dtype)


def flow_amplification(
    x: Tensor, mixture: GaussianMixture, process: OUProcess, t_from: Times, t_to: Times, *,
    log: bool = False, rtol: float = RTOL,
) -> Tensor:  # fmt: skip
    """By how much the flow from t_from to t_to can magnify a small perturbation of x, `|D Phi(x)|`: (...,), float64.

    Args:
        x, mixture, process, t_from, t_to, rtol: as in `flow_jacobian_product`.
        log: the natural logarithm instead, which does not overflow.

    Returns:
        The operator norm at each point. Up to min(k, d) = 128 the whole derivative is integrated and its norm is exact
        (to the same share of rtol, relative); beyond, a block power iteration on products with the derivative and
        its transpose approaches the norm from below. Rows of x that are not finite give NaN. Carries no gradient.

    Raises:
        TypeError, ValueError, RuntimeError: as in `flow_jacobian_product`.

    Source: docs/math.md Eq. 6 and 9 (its bound).
    """
    rows = _check(x, mixture, rtol)
    span, ends = span_of(mixture), _ends(x, mixture, process, t_from, t_to)
    finite = torch.isfinite(rows).all(1)
    start = span.enter(rows, ends)[finite]
    find = _exact_norm if span.size <= EXACT else _iterated_norm
    inside = find(start, span, ends[:, finite], rtol)
    _refuse_failures(inside, finite)
    if span.basis is not None and span.size < mixture.dim:  # across the span nothing happens
        inside = inside.clamp(min=0)
    norm = torch.full_like(ends[0], math.nan)
    norm[finite] = inside + (ends[3] / ends[1]).log()[finite]
    norm = norm.reshape(x.shape[:-1])
    return norm if log else norm.exp()


def _exact_norm(start: Tensor, span: Span, ends: Tensor, rtol: float) -> Tensor:
    """Logarithm of the largest singular value within the span, from all q columns of the derivative: (n,)."""
    norm, rows = torch.empty_like(ends[0]), max(1, CHUNK // span.size**2)
    for i in range(0, len(start), rows):
        part = slice(i, i + rows)
        identity = torch.eye(span.size, dtype=start.dtype, device=start.device).expand(len(start[part]), -1, -1)
        end = propagate(start[part], identity, span, ends[:, part], rtol)
        norm[part] = _log_norm(end)
    return norm


def _iterated_norm(start: Tensor, span: Span, ends: Tensor, rtol: float) -> Tensor:
    """The same by block power iteration, from below: products with the derivative, then with its transpose."""
    generator = torch.Generator(start.device).manual_seed(0)
    shape = (len(start), span.size, BLOCK)
    block = torch.randn(shape, generator=generator, dtype=start.dtype, device=start.device)
    block = torch.linalg.qr(block).Q.mT  # (n, m, q), orthonormal rows
    norm = torch.full_like(ends[0], -math.inf)
    for _ in range(ROUNDS if len(start) else 0):
        forward = propagate(start, block, span, ends, rtol)
        found = _log_norm(forward)
        settled = (found - norm).abs() <= SETTLED
        norm = torch.maximum(norm, found)
        if bool(settled.all()):
            break
        back = propagate(start, forward.vectors, span, ends, rtol, transposed=True)
        block = torch.linalg.qr(back.vectors.mT).Q.mT
    return norm


def _log_norm(end: Propagated) -> Tensor:
    """Logarithm of the spectral norm of each row's vectors, NaN where they are: (n,)."""
    failed = end.vectors.isnan().any(2).any(1)
    norm: Tensor = torch.linalg.matrix_norm(end.vectors.masked_fill(failed[:, None, None], 0.0), 2)
    return torch.where(failed, math.nan, norm.log() + end.log_scale)


def _ends(x: Tensor, mixture: GaussianMixture, process: OUProcess, t_from: Times, t_to: Times) -> Tensor:
    """r and s where the flow starts, r and s where it ends: (4, n), float64 on x's device."""
    columns = []
    for name, t in (("t_from", t_from), ("t_to", t_to)):
        std = process.std(t, float(mixture.std.detach())).to(x.device)
        check_times(name, std, x)
        columns += [process.alpha(t).to(x.device) / std, std]
    return torch.stack([column.detach().expand(x.shape[:-1]).reshape(-1) for column in columns])


def _check(x: Tensor, mixture: GaussianMixture, rtol: float) -> Tensor:
    if not (isinstance(rtol, int | float) and 0 < rtol < 1):
        raise ValueError(f"rtol must lie between 0 and 1; got {rtol!r}")
    return check_points(x, mixture).detach().double()


def _refuse_failures(found: Tensor, rows: Tensor) -> None:
    """Raise if a number of `found` is not one; `rows` (n,) says which rows of x they belong to."""
    failed = rows.nonzero()[:, 0][found.isnan()]
    if len(failed):
        raise RuntimeError(
            f"{len(failed)} of {len(rows)} trajectories failed; that of row {int(failed[0])} needed more than "
            f"{MOST_STEPS} steps, or steps below rounding: loosen rtol, or leave out points on a boundary between "
            "components, where perturbations grow without bound"
        )
