"""Pointwise operations on a mixture: density, posterior, score. Each is one fused pass over the components.

Every function takes x of shape (..., d), float32 or float64 (bfloat16 and float16 are computed in float32), and gives
back x's dtype and device. Accuracy against float64, per row and norm-wise: error <= max(1e-10, 64 eps (1 + |m|/std)),
eps that of the dtype computed in, for any x, also half-way between means, and for any std down to 1e-8; see
tests/tolerances.py. Gradients reach x through the compiled kernels; for those of the mixture's own means, weights and
std, for forward mode and for torch.func's derivatives the reference computes instead (slower, memory n k).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowfast import operators, reference
from flowfast.backends import choose
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess, Times

_ONE = torch.ones((), dtype=torch.float64)  # alpha of a mixture that is taken as it is


def posterior_weights(
    x: Tensor, mixture: GaussianMixture, *, out: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Posterior probabilities of the components given x, also called responsibilities.

    Args:
        x: points (..., d). mixture: of k components in dimension d. backend: "auto", "cpp", "triton" or "reference".
        out: receives the result and is returned: (..., k), contiguous, of x's dtype and device, without gradient. In a
            loop this spares fresh memory, a good part of the time where the result is large.

    Returns:
        (..., k), non-negative, rows sum to one; `softmax_k(log w_k - |x - m_k|^2 / (2 std^2))`.

    Raises:
        TypeError, ValueError: x is no floating tensor, has another last dimension or device, or the backend is missing;
            out is not as above, or given where a gradient is wanted.

    Source: arXiv 2606.03820, Proposition 1.
    """
    if out is not None:
        check_points(x, mixture)
        check_out(out, (*x.shape[:-1], mixture.n_components), x, mixture)
    return _pointwise("posterior_weights", x, mixture, backend, out=out)


def log_density(x: Tensor, mixture: GaussianMixture, *, backend: str = "auto") -> Tensor:
    """Log-density of the mixture at x (nats): (...,). Arguments and errors as in `posterior_weights`."""
    return _pointwise("log_density", x, mixture, backend)


def score(x: Tensor, mixture: GaussianMixture, *, backend: str = "auto") -> Tensor:
    """Gradient of the log-density, `(posterior_mean(x) - x) / std^2`: (..., d).

    Arguments and errors as in `posterior_weights`. Differentiable twice and more in x.
    Source: arXiv 2606.03820, Proposition 1.
    """
    return _pointwise("score", x, mixture, backend)


def posterior_mean(x: Tensor, mixture: GaussianMixture, *, backend: str = "auto") -> Tensor:
    """Posterior average of the component means, `sum_k gamma_k(x) means_k`: (..., d).

    Arguments and errors as in `posterior_weights`. For the expected data point given a noisy one see `denoise`.
    """
    return _pointwise("posterior_mean", x, mixture, backend)


def hessian_vector_product(x: Tensor, v: Tensor, mixture: GaussianMixture, *, backend: str = "auto") -> Tensor:
    """Hessian of the log-density at x times v, without forming the Hessian: (..., d).

    Args:
        x: points (..., d). v: vectors of x's shape, dtype and device. mixture, backend: as in `posterior_weights`.

    Source: arXiv 2606.03820, Proposition 1: `H = Cov_gamma(m) / std^4 - I / std^2`.
    """
    check_points(x, mixture)
    if not isinstance(v, Tensor) or v.shape != x.shape or v.dtype != x.dtype or v.device != x.device:
        got = f"{tuple(v.shape)} {v.dtype} {v.device}" if isinstance(v, Tensor) else type(v).__name__
        raise ValueError(f"v must match x in shape, dtype and device, {tuple(x.shape)} {x.dtype} {x.device}; got {got}")
    return _pointwise("hessian_vector_product", x, mixture, backend, v)


def covariance_trace(x: Tensor, mixture: GaussianMixture, *, backend: str = "auto") -> Tensor:
    """Trace of the posterior covariance of the means, `sum_k gamma_k |m_k|^2 - |mbar|^2`: (...,).

    Arguments and errors as in `posterior_weights`. Bounds its largest eigenvalue from above (docs/math.md Eq. 5). Its
    gradient is computed by the reference.
    """
    return _pointwise("covariance_trace", x, mixture, backend)


def denoise(x: Tensor, mixture: GaussianMixture, process: OUProcess, t: Times, *, backend: str = "auto") -> Tensor:
    """Expected data point given the noisy one, `E[X_0 | X_t = x]`: (..., d).

    Args:
        x: points (..., d) at time t. mixture: the law of the data. process: the forward process.
        t: time >= 0 (0 is data), a number or a tensor that broadcasts with x's leading dimensions.

    Raises:
        ValueError: t negative or of another shape, and as in `posterior_weights`.
    """
    alpha, std = _at(x, mixture, process, t)
    average = _pointwise("posterior_mean", x, mixture, backend, alpha=alpha, std=std)
    gain = alpha * mixture.std.to(alpha) ** 2 / std**2  # of a component's own Gaussian conditioning
    gain, alpha = _like(gain, x), _like(alpha, x)
    return average + gain * (x - alpha * average)


def marginal_score(
    x: Tensor, mixture: GaussianMixture, process: OUProcess, t: Times, *, backend: str = "auto"
) -> Tensor:
    """Score of p_t at x, the mixture's own at t = 0: (..., d). Arguments as in `denoise`."""
    alpha, std = _at(x, mixture, process, t)
    return _pointwise("score", x, mixture, backend, alpha=alpha, std=std)


def velocity(x: Tensor, mixture: GaussianMixture, process: OUProcess, t: Times, *, backend: str = "auto") -> Tensor:
    """Right-hand side of the probability-flow ODE, `-beta(t) (x + score of p_t at x)`: (..., d).

    Arguments as in `denoise`. Source: arXiv 2606.03820, section 3.2.
    """
    slope = marginal_score(x, mixture, process, t, backend=backend)
    return -_like(process.beta(t).to(x.device), x) * (x + slope)


def _pointwise(
    op: str, x: Tensor, mixture: GaussianMixture, backend: str, v: Tensor | None = None,
    alpha: Tensor | None = None, std: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    rows = check_points(x, mixture)
    dtype = working_dtype(x.dtype)
    rows = rows if rows.dtype == dtype else rows.to(dtype)
    if alpha is None or std is None:
        alpha = _ONE if x.is_cpu else torch.ones((), dtype=torch.float64, device=x.device)
        std = scale(mixture.std, x.device)
    else:
        alpha, std = _flat(alpha, x), _flat(std, x)
    means, log_weights = mixture.means, mixture.log_weights_in(dtype)
    tensors = [rows, means if means.dtype == dtype else means.to(dtype), log_weights, alpha, std]
    if v is not None:
        tensors.insert(1, v.reshape(rows.shape).to(dtype))
    name = choose(backend, x.device)
    # the mixture's or the times' own gradients
    own = means.requires_grad or log_weights.requires_grad or alpha.requires_grad or std.requires_grad
    beyond = op == "covariance_trace" and x.requires_grad
    if name == "reference" or own or beyond or operators.need_reference(tensors):
        result: Tensor = getattr(reference, op)(*tensors)
    elif out is None or out.dtype != dtype:
        result = operators.call(op, name, tensors)
    else:
        out_rows = out.view(rows.shape[0], out.shape[-1])
        result = operators.call(op, name, tensors, out_rows)
        if result is out_rows:
            return out
    result = result if x.ndim == 2 else result.reshape(x.shape[:-1] + result.shape[1:])
    if out is not None:
        return out.copy_(result)
    return result if result.dtype == x.dtype else result.to(x.dtype)


def check_points(x: Tensor, mixture: GaussianMixture) -> Tensor:
    """The points as rows (n, d), after the checks that every operation makes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch tensor; got {type(x).__name__}: convert with torch.as_tensor")
    if not isinstance(mixture, GaussianMixture):
        raise TypeError(f"mixture must be a GaussianMixture; got {type(mixture).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating; got {x.dtype}: convert with .float()")
    if x.ndim == 0 or x.shape[-1] != mixture.dim:
        raise ValueError(f"x must have shape (..., {mixture.dim}), as the mixture's means; got {tuple(x.shape)}")
    if x.device != mixture.device:
        raise ValueError(f"x is on {x.device}, the mixture on {mixture.device}: move one, e.g. mixture.to(x.device)")
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    return rows.resolve_neg()  # kernels read the memory, where a lazy negation is not done yet


def check_out(out: Tensor, shape: tuple[int, ...], x: Tensor, mixture: GaussianMixture) -> None:
    """Refuse a tensor that cannot take a result of this shape as it is, or that would lose a gradient."""
    expected = f"contiguous {shape} {x.dtype} {x.device}"
    if not isinstance(out, Tensor):
        raise ValueError(f"out must be a tensor, {expected}; got {type(out).__name__}")
    if out.shape != shape or out.dtype != x.dtype or out.device != x.device or not out.is_contiguous():
        layout = "contiguous" if out.is_contiguous() else "strided"
        raise ValueError(f"out must be {expected}; got {layout} {tuple(out.shape)} {out.dtype} {out.device}")
    own = any(tensor.requires_grad for tensor in (x, mixture.means, mixture.log_weights, mixture.std))
    if out.requires_grad or (own and torch.is_grad_enabled()):
        raise ValueError("out takes no gradient: call under torch.no_grad() with an out of its own, or leave it out")


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that points of `dtype` are computed in: their own, or float32 for 16-bit points."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _at(x: Tensor, mixture: GaussianMixture, process: OUProcess, t: Times) -> tuple[Tensor, Tensor]:
    """Signal factor and standard deviation at time t, float64 on x's device."""
    check_points(x, mixture)
    alpha, std = process.alpha(t), process.std(t, mixture.std)
    check_times("t", alpha, x)
    return scale(alpha, x.device), scale(std, x.device)


def scale(value: Tensor, device: torch.device) -> Tensor:
    """A number () or one per row, as float64 on `device`.

    A plain number of the CPU is written by a kernel: a copy would wait, and could not be captured in a CUDA graph.
    """
    if value.device == device:
        return value if value.dtype == torch.float64 else value.double()
    if value.ndim == 0 and value.is_cpu and operators.unseen([value]):
        return torch.full((), value.item(), dtype=torch.float64, device=device)
    return value.to(device, torch.float64)


def check_times(name: str, value: Tensor, x: Tensor) -> None:
    """Refuse a time (or what was made of it) that is neither a number nor one per point of x (..., d)."""
    if value.ndim == 0:
        return
    try:
        fits = torch.broadcast_shapes(value.shape, x.shape[:-1]) == x.shape[:-1]
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must be a number or broadcast to {tuple(x.shape[:-1])}; got {tuple(value.shape)}")


def _flat(value: Tensor, x: Tensor) -> Tensor:
    return value if value.ndim == 0 else value.expand(x.shape[:-1]).reshape(-1)


def _like(value: Tensor, x: Tensor) -> Tensor:
    """A per-point number as something that multiplies x."""
    return value.to(x.dtype) if value.ndim == 0 else value.expand(x.shape[:-1])[..., None].to(x.dtype)
