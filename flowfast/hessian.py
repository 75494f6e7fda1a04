"""What the Hessian of the log-density amounts to: its trace, and bounds on its norm. Products with it are in `ops`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flowfast import backends, operators
from flowfast.mixture import GaussianMixture
from flowfast.ops import check_points, covariance_trace, hessian_vector_product, scale, working_dtype

BoundKind = Literal["trace", "global", "exact"]


def divergence(x: Tensor, mixture: GaussianMixture, *, backend: str = "auto") -> Tensor:
    """Divergence of the score, that is the trace of the Hessian of the log-density, `tr C / std^4 - d / std^2`: (...,).

    Args:
        x: points (..., d). mixture, backend: as in `posterior_weights`.

    Returns:
        x's dtype and device, one fused pass and no estimator; error as in `flowfast.ops`, relative to
        `tr C / std^4 + d / std^2`. Gradients reach x and the mixture through the reference (slower, memory n k).

    Raises:
        TypeError, ValueError: as in `posterior_weights`.

    Source: arXiv 2606.03820, Proposition 1 (Hessian); docs/math.md Eq. 4.
    """
    check_points(x, mixture)
    precision = scale(mixture.std, x.device) ** -2
    return (_trace(x, mixture, backend) * precision**2 - x.shape[-1] * precision).to(x.dtype)


def hessian_norm_bound(
    x: Tensor, mixture: GaussianMixture, *, kind: BoundKind = "trace", backend: str = "auto"
) -> Tensor:
    """Upper bound on the spectral norm of the Hessian of the log-density at x: (...,).

    Args:
        x: points (..., d). mixture, backend: as in `posterior_weights`.
        kind: "global" from the diameter alone, "trace" from the posterior covariance's trace (one pass), "exact" the
            norm itself by Lanczos iteration on Hessian-vector products (float64; exact for d <= 64 or k <= 64; not
            within torch.compile).

    Gradients reach x (kind "trace") and std, through the reference.

    Raises:
        ValueError: unknown kind, a gradient wanted that does not exist (of the diameter with respect to means; any of
            kind "exact"), and as in `posterior_weights`.

    Source: arXiv 2606.03820, Proposition 2 (global); trace: lambda_max(C) <= min(tr C, D^2 / 4), docs/math.md Eq. 5.
    """
    if kind not in ("trace", "global", "exact"):
        raise ValueError(f"kind must be 'trace', 'global' or 'exact'; got {kind!r}")
    rows = check_points(x, mixture)
    lost = (mixture.means,) if kind != "exact" else (x, mixture.means, mixture.log_weights, mixture.std)
    if operators.differentiated(*lost):
        raise ValueError(
            f"kind {kind!r} carries no gradient to {'means' if kind != 'exact' else 'x or the mixture'}: detach what "
            "requires grad, or call under torch.no_grad()"
        )
    if kind == "exact":
        return _lanczos_norm(rows, mixture, backend).reshape(x.shape[:-1]).to(x.dtype)
    # rounding must not take the bound below the norm it bounds
    slack = 1 + 64 * torch.finfo(working_dtype(x.dtype)).eps
    precision = scale(mixture.std, x.device) ** -2
    widest = slack * _diameter(mixture, backend) ** 2 / 4
    largest = torch.ones(x.shape[:-1], dtype=torch.float64, device=x.device) * widest
    if kind == "trace":
        largest = torch.minimum(largest, slack * _trace(x, mixture, backend))
    return (slack * torch.maximum(precision, largest * precision**2 - precision)).to(x.dtype)


def _trace(x: Tensor, mixture: GaussianMixture, backend: str) -> Tensor:
    """Trace of the posterior covariance in float64, not yet rounded to 16 bits."""
    return covariance_trace(x.to(working_dtype(x.dtype)), mixture, backend=backend).double()


def _diameter(mixture: GaussianMixture, backend: str) -> float | Tensor:
    """The mixture's diameter: a number that it keeps, or found anew in every call of a compiled function."""
    if torch.compiler.is_compiling():
        name = backends.choose(backend, mixture.device)
        found: Tensor = operators.diameter(mixture.means.detach().to(working_dtype(mixture.dtype)), name)
        return found
    with backends.full_precision(mixture.device):
        return mixture.diameter(backend=backend)


def _lanczos_norm(rows: Tensor, mixture: GaussianMixture, backend: str, most: int = 64) -> Tensor:
    """Spectral norm of the Hessian at each row (n,), by Lanczos with full reorthogonalisation, float64."""
    x, exact = rows.detach().double(), mixture.to(torch.float64)
    steps = min(x.shape[1], most)
    generator = torch.Generator(x.device).manual_seed(0)
    draws = torch.randn(steps, *x.shape, generator=generator, dtype=torch.float64, device=x.device)
    basis = [draws[0] / draws[0].norm(dim=1, keepdim=True)]
    images = [hessian_vector_product(x, basis[0], exact, backend=backend)]
    for draw in draws[1:]:
        following = _orthogonal(images[-1], basis)
        spent = following.norm(dim=1, keepdim=True) <= 1e-8 * images[-1].norm(dim=1, keepdim=True)
        following = _orthogonal(torch.where(spent, draw, following), basis)  # a spent Krylov space is entered anew
        basis.append(following / following.norm(dim=1, keepdim=True))
        images.append(hessian_vector_product(x, basis[-1], exact, backend=backend))
    vectors, products = torch.stack(basis, 1), torch.stack(images, 1)  # (n, steps, d)
    projected = vectors @ products.mT
    norm: Tensor = torch.linalg.eigvalsh((projected + projected.mT) / 2).abs().amax(1)
    return norm


def _orthogonal(vector: Tensor, basis: list[Tensor]) -> Tensor:
    for _ in range(2):
        for direction in basis:
            vector = vector - (vector * direction).sum(1, keepdim=True) * direction
    return vector
