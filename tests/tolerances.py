"""Accuracy that the package promises, per operation and dtype: the numbers of the docstrings, in one place."""

from __future__ import annotations

import torch

FLOOR = 1e-10  # no pointwise error has to be below this
FACTOR = 64  # of eps (1 + |m| / std)

ROUNDING = {torch.float32: torch.finfo(torch.float32).eps, torch.float64: torch.finfo(torch.float64).eps}


def pointwise(dtype: torch.dtype, largest_mean: float, std: float) -> float:
    """Norm-wise relative error allowed to score, log-density, weights and Hessian-vector product."""
    return max(FLOOR, FACTOR * ROUNDING[dtype] * (1 + largest_mean / std))


# relative error of a trajectory's end point under the default tolerances: median, 99.9 % quantile, worst
FLOW_FLOAT32 = (5e-6, 1e-4, 5e-2)
# share of trajectories within an error, float64, rtol = 1e-10
FLOW_FLOAT64 = (0.9999, 1e-7)
