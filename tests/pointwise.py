"""Problems, plain formulas and errors that the tests of Triton's pointwise kernels share."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

DEVICE = os.environ.get("FLOWFAST_TEST_DEVICE", "cpu")
OPS = ("log_density", "score", "posterior_mean", "covariance_trace", "posterior_weights", "hessian_vector_product")

Arguments = dict[str, Tensor]  # of a body, in order; v is for the Hessian-vector product only


def problem(n: int, k: int, d: int, dtype: torch.dtype, *, per_row: bool = True, seed: int = 0) -> Arguments:
    """Points drawn from the mixtures that their rows see, with noise of order one."""
    generator = torch.Generator().manual_seed(seed)
    means = ((2 * torch.rand(k, d, generator=generator) - 1) * 2).to(dtype)  # (k, d)
    shape = (n,) if per_row else ()
    alpha = 0.3 + 0.7 * torch.rand(shape, generator=generator, dtype=torch.float64)
    std = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
    chosen = means[torch.randint(k, (n,), generator=generator)].double()
    return {
        "x": (alpha.expand(n)[:, None] * chosen + std.expand(n)[:, None] * noise).to(dtype).to(DEVICE),
        "v": torch.randn(n, d, generator=generator).to(dtype).to(DEVICE),
        "means": means.to(DEVICE),
        "log_weights": torch.randn(k, generator=generator).log_softmax(0).to(dtype).to(DEVICE),
        "alpha": alpha.to(DEVICE),
        "std": std.to(DEVICE),
    }


def call(module: object, op: str, arguments: Arguments) -> Tensor:
    rest = [value for name, value in arguments.items() if name != "v" or op == "hessian_vector_product"]
    result: Tensor = getattr(module, op)(*rest)
    return result


def plain(op: str, arguments: Arguments) -> Tensor:
    """The textbook formula in float64, centres and all."""
    x, v, m, log_w, alpha, std = (arguments[name].double() for name in arguments)
    alpha, std = alpha.expand(len(x))[:, None], std.expand(len(x))[:, None]
    away = x[:, None] - alpha[:, :, None] * m  # (n, k, d)
    logits = log_w - away.square().sum(2) / (2 * std**2)
    gamma = logits.softmax(1)
    mean = gamma @ m
    around = m - mean[:, None]  # (n, k, d)
    if op == "log_density":
        return logits.logsumexp(1) - x.shape[1] * (std[:, 0].log() + 0.5 * math.log(2 * math.pi))
    if op == "score":
        return -torch.einsum("nk,nkd->nd", gamma, away) / std**2
    if op == "covariance_trace":
        return (gamma * around.square().sum(2)).sum(1)
    if op == "hessian_vector_product":
        pull = torch.einsum("nk,nke,ne,nkd->nd", gamma, around, v, around)
        return (alpha / std**2) ** 2 * pull - v / std**2
    return {"posterior_mean": mean, "posterior_weights": gamma}[op]


def error(got: Tensor, exact: Tensor, scale: Tensor | float = 1.0) -> float:
    difference = (got.double() - exact.double()).reshape(len(got), -1).norm(dim=1)
    relative = torch.where(difference == 0, 0.0, difference / scale)
    return float(relative.nan_to_num(nan=math.inf).max())


def poisoned(*size: object, **options: object) -> Tensor:
    """In place of torch.empty: fresh memory full of NaN, so that an element that no kernel writes is seen."""
    floating = options.get("dtype", torch.float32) in (torch.float32, torch.float64, torch.bfloat16)
    return torch.full(*size, math.nan if floating else 1, **options)  # type: ignore[call-overload,no-any-return]
