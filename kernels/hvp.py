"""Hessian-vector product of the log-density (Eq. 4): an output of the posterior pass, so its contract is that one's."""

from __future__ import annotations

from torch import Tensor

from .posterior import posterior


def hvp(x: Tensor, v: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor) -> Tensor:
    """alpha^2 C(x) v / std^4 - v / std^2, (n, d), with C the posterior covariance of the means; never forms C.

    Args:
        x, v: (n, d). means: (k, d). log_weights: (k,). alpha, std: () or (n,), float64.
    """
    outputs = posterior(x, means, log_weights, alpha, std, outputs=("hessian_vector_product",), direction=v)
    return outputs["hessian_vector_product"]
