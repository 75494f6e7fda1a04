"""Draws of a mixture that depend on a seed and a row number alone, however the rows are divided into calls."""

from __future__ import annotations

import torch
from torch import Tensor

from flowfast import _cpp, _triton, backends, philox
from flowfast.mixture import GaussianMixture
from flowfast.ops import check_out
from flowfast.process import OUProcess, Times
from flowfast.seeds import as_seed

_LIMIT = 2**63  # of seeds and rows


def sample_rows(
    mixture: GaussianMixture, seed: int, first_row: int, n: int, *, process: OUProcess | None = None, t: Times = 0.0,
    out: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Rows first_row, ..., first_row + n - 1 of an endless table of draws: (n, d), of the means' dtype and device.

    A row is a pure function of (mixture, seed, row, t). On one backend and instruction set it has the same bits in any
    call on any number of threads. CPU and GPU draw from the same counters (flowfast/philox.py) and choose the same
    components, and each normal is off by at most 8 eps of itself on either.

    Args:
        mixture: law of the draws, or of X_0 where `process` is given.
        seed: of the table, 0 <= seed < 2^63. first_row: >= 0. n: number of rows, >= 0.
        process: draws of X_t instead of X_0. t: one time >= 0, or one per row (n,); components and normals do not
            depend on it.
        out: receives the draws and is returned: contiguous (n, d), of the means' dtype and device, without gradient.
        backend: "auto", "cpp", "triton" or "reference".

    Raises:
        TypeError, ValueError: an argument outside these ranges, or a backend that is missing.
    """
    for name, value in (("seed", as_seed(seed)), ("first_row", first_row), ("n", n)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int; got {type(value).__name__}")
        if not 0 <= value < _LIMIT:
            raise ValueError(f"{name} must be at least 0 and below 2^63; got {value}")
    if first_row + n >= _LIMIT:
        raise ValueError(f"first_row + n must be below 2^63; got {first_row} + {n}")
    if out is not None:
        check_out(out, (n, mixture.dim), mixture.means, mixture)
    return draw_rows(mixture, seed, first_row, n, *_scales(mixture, process, t, n), out=out, backend=backend)


def draw_rows(
    mixture: GaussianMixture, seed: int, first_row: int, n: int, alpha: Tensor, std: Tensor, *,
    out: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """`sample_rows` where the factor alpha of the means and the standard deviation are known, unchecked.

    Args:
        alpha, std: float64 () or (n,), contiguous, on the mixture's device. Else as in `sample_rows`.
    """
    means = mixture.means.detach().resolve_neg()
    means = means.to(means.dtype if means.dtype in (torch.float32, torch.float64) else torch.float32).contiguous()
    name = backends.choose(backend, mixture.device)
    cumulative = _cumulative(mixture)
    if name == "cpp":
        into = out if out is not None and out.dtype == means.dtype else None
        drawn = _cpp.sample(means, cumulative, alpha, std, seed, first_row, n, out=into)
        return _kept(drawn, out, mixture.dtype)
    rows = torch.arange(first_row, first_row + n, device=means.device)
    chosen = torch.searchsorted(cumulative, philox.uniforms(seed, rows), right=True)
    if name == "triton":
        z = _triton.normals(n, mixture.dim, seed, first_row, dtype=means.dtype, device=means.device)
    else:
        z, means = philox.normals(seed, rows, mixture.dim), means.double()
    alpha, std = (scale.to(z).reshape(-1, 1) for scale in (alpha, std))
    return _kept(alpha * means[chosen] + std * z, out, mixture.dtype)


def _kept(drawn: Tensor, out: Tensor | None, dtype: torch.dtype) -> Tensor:
    return drawn.to(dtype) if out is None else out if drawn is out else out.copy_(drawn)


def _scales(mixture: GaussianMixture, process: OUProcess | None, t: Times, n: int) -> tuple[Tensor, Tensor]:
    """Factor of the means and standard deviation, float64 () or (n,), contiguous, on the mixture's device."""
    if process is None:
        if isinstance(t, Tensor) or t != 0:
            raise ValueError("t is a time of a process; got one without it: pass process=")
        alpha, std = torch.ones((), dtype=torch.float64), mixture.std
    else:
        alpha, std = process.alpha(t), process.std(t, mixture.std)
    if alpha.shape not in ((), (n,)):
        raise ValueError(f"t must be a number or of shape ({n},), one time per row; got {tuple(alpha.shape)}")
    alpha, std = (scale.detach().to(mixture.device, torch.float64).contiguous() for scale in (alpha, std))
    return alpha, std


def _cumulative(mixture: GaussianMixture) -> Tensor:
    """Sums of the weights (k,), float64: exactly one from the last component with a weight on."""
    log_weights = mixture.log_weights.detach()
    last = int((log_weights > -torch.inf).nonzero()[-1])
    cumulative = log_weights.exp().cumsum(0).clamp(max=1)
    cumulative[last:] = 1
    return cumulative.contiguous()
