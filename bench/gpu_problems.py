"""What the GPU checks compute: shapes for every path of the kernels, mixtures, points, operations and their scales."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import flowfast

SHAPES = {  # points, components, dimension: small, medium and large dimensions take different kernels
    "d=3": (4_096, 1_000, 3),
    "d=16": (4_096, 2_000, 16),
    "d=64": (2_048, 1_024, 64),
    "d=128": (1_024, 1_024, 128),
    "d=256": (512, 2_048, 256),
    "d=3072": (128, 5_000, 3_072),
}
TINY = {"d=3": (5, 7, 3), "d=64": (3, 4, 64), "d=300": (2, 3, 300)}  # for the interpreter
SIGMAS = (1.0, 0.1, 1e-2, 1e-4, 1e-6)
MODES = {  # by torch.set_float32_matmul_precision or by the dtype of the points
    "highest": torch.float32,
    "high": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
}
POINTS = ("drawn", "half-way")
BETA = 5.0

Operation = Callable[["Setting", str], Tensor]


class AbsentError(Exception):
    """There is no such kernel yet; the message is the package's own."""


@dataclass(frozen=True)
class Setting:
    """A mixture and points (n, d), with vectors v (n, d) for the Hessian and a time for every row."""

    mixture: flowfast.GaussianMixture
    x: Tensor
    v: Tensor
    times: Tensor

    def double(self) -> Setting:
        """The same numbers in float64."""
        return Setting(self.mixture.to(torch.float64), self.x.double(), self.v.double(), self.times)


OPERATIONS: dict[str, Operation] = {
    "log_density": lambda s, backend: flowfast.log_density(s.x, s.mixture, backend=backend),
    "score": lambda s, backend: flowfast.score(s.x, s.mixture, backend=backend),
    "posterior_mean": lambda s, backend: flowfast.posterior_mean(s.x, s.mixture, backend=backend),
    "posterior_weights": lambda s, backend: flowfast.posterior_weights(s.x, s.mixture, backend=backend),
    "covariance_trace": lambda s, backend: flowfast.covariance_trace(s.x, s.mixture, backend=backend),
    "hessian_vector_product": lambda s, backend: flowfast.hessian_vector_product(s.x, s.v, s.mixture, backend=backend),
    "score at times": lambda s, backend: _score_at(s, backend),
}


def _score_at(s: Setting, backend: str) -> Tensor:
    """The score as the velocity holds it, every row at a time of its own: (n, d), float64."""
    velocity = flowfast.velocity(s.x, s.mixture, flowfast.OUProcess(BETA), s.times, backend=backend)
    return -velocity.double() / BETA - s.x.double()


def setting(
    n: int, k: int, d: int, sigma0: float, *, points: str = "drawn", device: str, dtype: torch.dtype = torch.float32
) -> Setting:
    """A mixture of k means uniform in [-5, 5]^d and n points.

    Args:
        points: "drawn" from the mixture, or "half-way" between two means, every second one with noise added.
        sigma0: standard deviation of the components. dtype: of the points; the mixture's is float32 below that.
    """
    generator = torch.Generator().manual_seed(1)
    wide = torch.promote_types(dtype, torch.float32)
    mixture = flowfast.GaussianMixture.random(k, d, std=sigma0).to(wide)
    first, second = (mixture.means[torch.randint(k, (n,), generator=generator)].double() for _ in range(2))
    noise = sigma0 * torch.randn(n, d, generator=generator, dtype=torch.float64)
    if points == "half-way":
        noise[::2] = 0
        first = (first + second) / 2
    v = torch.randn(n, d, generator=generator, dtype=torch.float64)
    times = 0.5 * torch.rand(n, generator=generator, dtype=torch.float64)
    x = (first + noise).to(device, dtype)
    return Setting(mixture.to(device), x, v.to(device, dtype), times.to(device))


def noisy(s: Setting) -> Setting:
    """The same with points drawn from the law of every row's own time."""
    generator = torch.Generator().manual_seed(2)
    process = flowfast.OUProcess(BETA)
    noise = torch.randn(s.x.shape, generator=generator, dtype=torch.float64).to(s.x.device)
    alpha = process.alpha(s.times)[:, None]
    x = alpha * s.x.double() + (1 - alpha**2).sqrt() * noise
    return Setting(s.mixture, x.to(s.x.dtype), s.v, s.times)


def given(operation: str, s: Setting) -> Setting:
    """The points that this operation is evaluated at."""
    return noisy(s) if operation == "score at times" else s


def scales(s: Setting) -> dict[str, Tensor | None]:
    """What errors are relative to, row by row (n,), from a setting in float64; None is the size of the result itself.

    A score is a sum of pulls towards the centres, its scale their root mean square; that of the Hessian-vector product
    is (1 / std^2 + tr C / std^4) |v|; a mean's is the root mean square of what it averages (docs/math.md). A score at
    times comes out of a velocity, x + score: its scale is |x| and sqrt(d) / std, the root mean square for such points.
    """
    std = float(s.mixture.std)
    noise = flowfast.OUProcess(BETA).std(s.times, s.mixture.std)
    trace = flowfast.covariance_trace(s.x, s.mixture, backend="reference")
    score = flowfast.score(s.x, s.mixture, backend="reference")
    mean = flowfast.posterior_mean(s.x, s.mixture, backend="reference")
    return {
        "log_density": None,
        "score": (score.square().sum(1) + trace / std**4).sqrt(),
        "posterior_mean": (mean.square().sum(1) + trace).sqrt(),
        "posterior_weights": None,
        "covariance_trace": trace + std**2,
        "hessian_vector_product": (1 / std**2 + trace / std**4) * s.v.norm(dim=1),
        "score at times": s.mixture.dim**0.5 / noise + noisy(s).x.norm(dim=1),
    }


def row_errors(got: Tensor, exact: Tensor, scale: Tensor | None) -> Tensor:
    """Error of every row (n,) relative to its scale, in float64; infinite where something is not finite."""
    exact = exact.double().reshape(len(exact), -1)
    away = (got.double().reshape(exact.shape) - exact).norm(dim=1)
    relative = torch.where(away == 0, 0.0, away / (exact.norm(dim=1) if scale is None else scale))
    return relative.nan_to_num(nan=float("inf"))


def finite(value: float) -> float | None:
    """JSON has no infinity: None stands for an error that is not finite."""
    return value if abs(value) < float("inf") else None


@contextlib.contextmanager
def precision(mode: str) -> Iterator[None]:
    """torch's setting for products of float32 matrices while this lasts; a dtype leaves the default."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(mode if mode == "high" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def offered() -> Iterator[None]:
    """Turn the package's refusal for want of a kernel into `AbsentError`."""
    try:
        yield
    except ValueError as error:
        if "no Triton kernel" in str(error):
            raise AbsentError(str(error)) from error
        raise
