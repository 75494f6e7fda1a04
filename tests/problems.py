"""Problems with known answers: mixtures and points that stress rounding, and their 50-digit solutions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mpmath
import torch
from torch import Tensor

from flowfast import GaussianMixture

BACKENDS = ("reference", "cpp")


@dataclass(frozen=True)
class Case:
    """A mixture and points (n, d) of one dtype, with vectors v (n, d) for the Hessian."""

    name: str
    mixture: GaussianMixture
    x: Tensor
    v: Tensor


@dataclass(frozen=True)
class Truth:
    """One row's exact values, in mpmath numbers."""

    log_density: mpmath.mpf
    weights: list[mpmath.mpf]
    score: list[mpmath.mpf]
    hvp: list[mpmath.mpf]
    spread: mpmath.mpf  # sqrt(E |x - m|^2) / std^2, the scale of the score's error
    curvature: mpmath.mpf  # (1/std^2 + tr C / std^4) |v|, the scale of the Hessian-vector product's error


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """Mixtures from k = d = 1 up, std from 1e-8 to 10, points near means, half-way and far, means off the origin."""
    generator = torch.Generator().manual_seed(7)
    for k, d in ((1, 1), (2, 1), (3, 2), (5, 8)):
        for std in (1e-8, 1e-5, 1e-3, 0.1, 1.0, 10.0):
            for offset in (0.0, 1e4):
                means = (2 * torch.rand(k, d, generator=generator, dtype=torch.float64) - 1) * 5 + offset
                weights = torch.rand(k, generator=generator, dtype=torch.float64) + 0.1
                mixture = GaussianMixture(means.to(dtype), std, weights)
                exact = mixture.means.double()
                noise = torch.randn(2, d, generator=generator, dtype=torch.float64)
                x = torch.cat(
                    [
                        exact[:1] + std * noise[:1],
                        (exact[:1] + exact[-1:]) / 2,  # exactly half-way, up to rounding
                        (exact[:1] + exact[-1:]) / 2 + std * noise[1:],
                        exact.mean(0, keepdim=True) + 30 * std,
                    ]
                ).to(dtype)
                v = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)
                yield Case(f"k={k} d={d} std={std:g} offset={offset:g}", mixture, x, v)


def solve(case: Case, row: int) -> Truth:
    """The exact values at one row, for the numbers exactly as they are stored."""
    with mpmath.workdps(50):
        m = [[mpmath.mpf(value) for value in mean] for mean in case.mixture.means.tolist()]
        log_w = [mpmath.mpf(value) for value in case.mixture.log_weights.tolist()]
        x, v = ([mpmath.mpf(value) for value in vector[row].tolist()] for vector in (case.x, case.v))
        s2 = mpmath.mpf(float(case.mixture.std)) ** 2
        far = [mpmath.fsum((a - b) ** 2 for a, b in zip(x, mean, strict=True)) for mean in m]
        logits = [w - f / (2 * s2) for w, f in zip(log_w, far, strict=True)]
        top = max(logits)
        total = mpmath.fsum(mpmath.exp(value - top) for value in logits)
        weights = [mpmath.exp(value - top) / total for value in logits]
        mean = _average(weights, m)
        along = [mpmath.fdot(component, v) for component in m]
        mean_along = mpmath.fdot(weights, along)
        cv = _average([w * (a - mean_along) for w, a in zip(weights, along, strict=True)], m)
        trace = mpmath.fdot(weights, [mpmath.fsum((a - b) ** 2 for a, b in zip(c, mean, strict=True)) for c in m])
        return Truth(
            log_density=top + mpmath.log(total) - len(x) * mpmath.log(2 * mpmath.pi * s2) / 2,
            weights=weights,
            score=[(a - b) / s2 for a, b in zip(mean, x, strict=True)],
            hvp=[c / s2**2 - a / s2 for c, a in zip(cv, v, strict=True)],
            spread=mpmath.sqrt(mpmath.fdot(weights, far)) / s2,
            curvature=(1 / s2 + trace / s2**2) * mpmath.sqrt(mpmath.fdot(v, v)),
        )


def distance(got: list[float], exact: list[mpmath.mpf]) -> float:
    """Euclidean distance between what came out and the truth."""
    with mpmath.workdps(50):
        return float(mpmath.sqrt(mpmath.fsum((mpmath.mpf(a) - b) ** 2 for a, b in zip(got, exact, strict=True))))


def _average(weights: list[mpmath.mpf], m: list[list[mpmath.mpf]]) -> list[mpmath.mpf]:
    return [mpmath.fdot(weights, column) for column in zip(*m, strict=True)]
