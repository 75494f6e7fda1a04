"""Triton bodies of the operations: tensors in, tensors out, the signatures of `reference`.

The only module that imports `flowfast.kernels`, and it does so on the first call: importing flowfast never imports
triton. Accuracy and ranges are stated once, in kernels/posterior.py
and kernels/flow.py.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

_OPS = frozenset(
    {
        "log_density",
        "score",
        "posterior_mean",
        "covariance_trace",
        "posterior_weights",
        "hessian_vector_product",
        "flow_fixed",
        "flow_adaptive",
        "diameter",
    }
)


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter (TRITON_INTERPRET=1), which serves CPU tensors, slowly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available() -> bool:
    """Whether the kernels can run here: triton is installed, and a CUDA device or the interpreter is there."""
    return importlib.util.find_spec("triton") is not None and (interpreting() or torch.cuda.is_available())


def missing_message() -> str:
    """One sentence that says what keeps the kernels from running, and the command that mends it."""
    if importlib.util.find_spec("triton") is None:
        return "backend 'triton' needs triton, which is not installed: pip install 'flowfast[gpu]'"
    return "backend 'triton' needs a CUDA device, and torch sees none: use backend='cpp' or backend='reference'"


def supports(op: str) -> bool:
    """Whether operation `op` has a Triton body in this module."""
    return op in _OPS


def log_density(x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor) -> Tensor:
    """Log-density of each row's mixture, (n,)."""
    return _posterior("log_density", x, means, log_weights, alpha, std)


def score(x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor) -> Tensor:
    """Gradient of the log-density, (n, d)."""
    return _posterior("score", x, means, log_weights, alpha, std)


def posterior_mean(x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor) -> Tensor:
    """Posterior average of the means, (n, d), not multiplied by alpha."""
    return _posterior("posterior_mean", x, means, log_weights, alpha, std)


def covariance_trace(x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor) -> Tensor:
    """Trace of the posterior covariance of the means, (n,), not multiplied by alpha^2."""
    return _posterior("covariance_trace", x, means, log_weights, alpha, std)


def posterior_weights(x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor) -> Tensor:
    """Posterior weight of every component at every point, (n, k)."""
    return _posterior("posterior_weights", x, means, log_weights, alpha, std)


def hessian_vector_product(
    x: Tensor, v: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor
) -> Tensor:
    """Hessian of the log-density times v, row by row, (n, d)."""
    from flowfast.kernels.hvp import hvp

    return hvp(x, v, means, log_weights, alpha, std)


def diameter(means: Tensor) -> float:
    """Largest distance between two rows of means (k, d), float32 or float64, contiguous; waits for the device."""
    from flowfast.kernels.diameter import diameter as largest_distance

    return largest_distance(means)


def normals(n: int, d: int, seed: int, first_row: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normals (n, d) of rows first_row, first_row + 1, ...; float32 or float64."""
    from flowfast.kernels.random import draw_normals

    return draw_normals(n, d, seed, first_row, dtype=dtype, device=device)


def flow_fixed(
    x: Tensor,
    means: Tensor,
    log_weights: Tensor,
    center: Tensor,
    ends: Tensor,
    h: Tensor,
    coefficients: Tensor,
    tableau: Tensor,
) -> tuple[Tensor, Tensor]:
    """Integrate m Runge-Kutta steps given by tables: end points (n, d) and status int8 (n,)."""
    from flowfast.kernels.flow import flow_fixed as run

    return run(x, means, log_weights, center, ends, h, coefficients, tableau)


def flow_adaptive(
    x: Tensor,
    means: Tensor,
    log_weights: Tensor,
    center: Tensor,
    ends: Tensor,
    tableau: Tensor,
    rtol: float,
    atol: float,
    max_steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integrate with step-size control per trajectory: end points (n, d), status int8, steps and evaluations int32."""
    from flowfast.kernels.flow import flow_adaptive as run

    return run(x, means, log_weights, center, ends, tableau, rtol, atol, max_steps)


def _posterior(output: str, x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor) -> Tensor:
    from flowfast.kernels.posterior import posterior

    return posterior(x, means, log_weights, alpha, std, outputs=(output,))[output]
