"""Names and shapes of what the posterior pass gives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

OUTPUTS = (
    "log_density",
    "score",
    "posterior_mean",
    "covariance_trace",
    "posterior_weights",
    "hessian_vector_product",
)
FLAGS = ("LOG_DENSITY", "SCORE", "MEAN", "TRACE", "WEIGHTS", "PRODUCT")  # of kernels, in the same order


def allocate(x: Tensor, k: int, outputs: Sequence[str]) -> dict[str, Tensor]:
    """Fresh contiguous outputs, by name, for x (n, d) and k components."""
    n, d = x.shape
    shapes = dict(zip(OUTPUTS, ((n,), (n, d), (n, d), (n,), (n, k), (n, d)), strict=True))
    return {name: torch.empty(shapes[name], dtype=x.dtype, device=x.device) for name in outputs}
