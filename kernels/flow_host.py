"""The flow from the host, for states that do not fit on chip: torch for the steps, a posterior pass per evaluation.

mubar(z, r) is the posterior mean of the mixture of centres r means and standard deviation 1 at z. Controller and
contracts are those of the kernels; every attempted step asks once whether a trajectory still runs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .posterior import posterior

HOST_NUMBERS = 1 << 22  # rows are taken in chunks of about this many numbers

SUCCESS, MAX_STEPS, NON_FINITE, STEP_UNDERFLOW = range(4)  # status of a trajectory
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0  # of the step-size controller


def flow_fixed(
    x: Tensor, means: Tensor, log_weights: Tensor, center: Tensor, ends: Tensor, h: Tensor, coefficients: Tensor,
    tableau: Tensor, out: Tensor, status: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`flow_fixed` of kernels/flow.py into out (n, d) and status (n,)."""
    stages, numbers = tableau.shape[1], coefficients.tolist()
    for rows in _chunks(x):
        z = _enter(x[rows], center, _part(ends, rows))
        for size, stage in zip(h.tolist(), numbers, strict=True):
            slopes: list[Tensor] = []
            for j in range(stages):
                a, b, c, r = stage[j]
                point = z + size * _combine(tableau[j], slopes, z)
                at = torch.tensor(r, dtype=torch.float64, device=x.device)
                slopes.append(a * point + b * _average(c * point, means, log_weights, at))
            z = z + size * _combine(tableau[stages + 1], slopes, z)
        out[rows] = _leave(z, center, _part(ends, rows))
        status[rows] = torch.where(torch.isfinite(out[rows]).all(1), SUCCESS, NON_FINITE).to(torch.int8)
    return out, status


def flow_adaptive(
    x: Tensor, means: Tensor, log_weights: Tensor, center: Tensor, ends: Tensor, tableau: Tensor, rtol: float,
    atol: float, max_steps: int, reach: Tensor, out: Tensor, status: Tensor, steps: Tensor, evaluations: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`flow_adaptive` of kernels/flow.py into out (n, d) and the three (n,); reach is 1 / max |means|."""
    stages = tableau.shape[1]
    reuse = bool(tableau[stages - 1].equal(tableau[stages + 1]))  # the last stage is the next step's first
    for rows in _chunks(x):
        part = _part(ends, rows).double().to(x.device)
        z = _enter(x[rows], center, part)
        r, target = (part[i].expand(len(z)) for i in (0, 2))
        sound = torch.isfinite(z).all(1) & torch.isfinite(target - r)
        running = sound & (r != target)
        state = torch.where(sound, SUCCESS, NON_FINITE)
        count = torch.zeros_like(state)
        h = (target - r).sign() * torch.minimum((target - r).abs(), torch.maximum(reach, r) * (0.5 * rtol**0.2))
        rejected = torch.zeros_like(running)
        first = _average(z, means, log_weights, r)
        while bool(running.any()):
            last = h.abs() >= (target - r).abs()
            h = torch.where(last, target - r, h)
            size = h.to(z.dtype)[:, None]
            slopes = [first if reuse else _average(z, means, log_weights, r)]
            for j in range(1, stages):
                point = z + size * _combine(tableau[j], slopes, z)
                slopes.append(_average(point, means, log_weights, r + h * float(tableau[stages, j])))
            new = z + size * _combine(tableau[stages + 1], slopes, z)
            bound = atol + rtol * torch.maximum(_rms(z), _rms(new))
            error = _rms(size * _combine(tableau[stages + 2], slopes, z)) / bound
            broken = running & ~torch.isfinite(error + _rms(new))
            accepted = running & (error <= 1) & ~broken
            count += running
            factor = (SAFETY * error.clamp(1e-30, 1e30) ** -0.2).clamp(SHRINK, GROW)
            factor = torch.where(rejected, factor.clamp(max=1.0), factor)
            rejected = ~accepted
            z = torch.where(accepted[:, None], new, z)
            first = torch.where(accepted[:, None], slopes[-1], first)
            r = torch.where(accepted, torch.where(last, target, r + h), r)
            h = torch.where(running, h * factor, h)
            arrived = accepted & last
            stuck = h.abs() < 4 * torch.finfo(torch.float64).eps * r.abs()
            reason = torch.where(stuck, STEP_UNDERFLOW, MAX_STEPS).masked_fill(arrived, SUCCESS)
            reason = reason.masked_fill(broken, NON_FINITE)
            finished = running & (arrived | stuck | broken | (count >= max_steps))
            state = torch.where(finished, reason, state)
            running = running & ~finished
        out[rows] = _leave(z, center, part).masked_fill((state == NON_FINITE)[:, None], math.nan)
        status[rows], steps[rows] = state.to(torch.int8), count.int()
        evaluations[rows] = torch.where(count > 0, count * (stages - reuse) + reuse, 0).int()
    return out, status, steps, evaluations


def _chunks(x: Tensor) -> list[slice]:
    size = max(1, HOST_NUMBERS // x.shape[1])
    return [slice(i, i + size) for i in range(0, len(x), size)]


def _part(ends: Tensor, rows: slice) -> Tensor:
    return ends[:, rows] if ends.ndim == 2 else ends


def _average(z: Tensor, means: Tensor, log_weights: Tensor, r: Tensor) -> Tensor:
    one = torch.ones((), dtype=torch.float64, device=z.device)
    return posterior(z, means, log_weights, r, one, outputs=("posterior_mean",))["posterior_mean"]


def _combine(row: Tensor, slopes: list[Tensor], like: Tensor) -> Tensor:
    total = torch.zeros_like(like)
    for coefficient, slope in zip(row.tolist(), slopes, strict=False):
        if coefficient != 0:
            total += coefficient * slope
    return total


def _rms(z: Tensor) -> Tensor:
    return z.double().square().mean(1).sqrt()


def _enter(x: Tensor, center: Tensor, ends: Tensor) -> Tensor:
    r, s = (ends[row].to(x.device).reshape(-1, 1) for row in (0, 1))
    return ((x.double() - r * s * center.double()) / s).to(x.dtype)


def _leave(z: Tensor, center: Tensor, ends: Tensor) -> Tensor:
    r, s = (ends[row].to(z.device).reshape(-1, 1) for row in (2, 3))
    return (s * z.double() + r * s * center.double()).to(z.dtype)
