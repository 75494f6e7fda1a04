"""C++ bodies of the operations: tensors in, tensors out, the signatures of `reference`.

The only module that imports the extension `flowfast._core`, on the first call. Tensors go by address (no copy), the
GIL is released, and at most `torch.get_num_threads()` threads work. Points x are (n, d), means (k, d), log_weights
(k,), all of one dtype (float32 or float64) and contiguous; alpha and std are float64 of shape () or (n,).

Accuracy, for every x: error <= max(1e-10, 64 eps (1 + |alpha m| / std)), relative to sqrt(E |x - m|^2) / std^2 for the
score, to (1 / std^2 + alpha^2 tr C / std^4) |v| for the Hessian-vector product, plain for weights, relative for the
log-density. Results are the same bits for any number of threads.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from types import ModuleType

_DTYPES = {torch.float32: "float32", torch.float64: "float64"}


def available() -> bool:
    """Whether the extension is built."""
    return "flowfast._core" in sys.modules or importlib.util.find_spec("flowfast._core") is not None


def missing_message() -> str:
    """One sentence that says what is missing and the command that builds it."""
    return "backend 'cpp' needs the extension flowfast._core, which is not built: run `pip install -e .` (needs g++)"


def isa() -> str:
    """Instruction set in use: "avx512", "avx2" or "generic"; the environment variable FLOWFAST_ISA forces one.

    Raises:
        ValueError: FLOWFAST_ISA names a set that this CPU or build does not have.
    """
    return str(_core().isa())


def isas() -> tuple[str, ...]:
    """Instruction sets this CPU and build support, best first."""
    return tuple(_core().isas())


@functools.cache
def _core() -> ModuleType:
    if not available():
        raise ValueError(missing_message())
    return importlib.import_module("flowfast._core")


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Any:
    if dtype not in _DTYPES:
        raise TypeError(f"x: got dtype {dtype}, the C++ kernels take float32 or float64: convert x first")
    return getattr(_core(), f"{name}_{_DTYPES[dtype]}")


def _address(name: str, tensor: Tensor, dtype: torch.dtype, *shapes: tuple[int, ...]) -> int:
    """Address of a CPU tensor, once it is what the kernels will read."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected {dtype}: convert it with .to({dtype})")
    if tensor.shape not in shapes:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {' or '.join(map(str, shapes))}")
    if not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: got a strided or {tensor.device} tensor, expected contiguous on the CPU: .contiguous()"
        )
    if tensor.is_neg():
        raise ValueError(f"{name}: got a lazily negated tensor, expected its values in memory: .resolve_neg()")
    address: int = tensor.data_ptr()
    if not address and tensor.numel():
        raise ValueError(f"{name}: got a wrapper without memory of its own, expected a plain tensor on the CPU")
    return address


def _mixture(means: Tensor, log_weights: Tensor, dtype: torch.dtype, d: int) -> tuple[int, int, int]:
    k = means.shape[0]
    if k == 0 or d == 0:
        raise ValueError(f"means: got shape {tuple(means.shape)}, expected at least one component and one dimension")
    return k, _address("means", means, dtype, (k, d)), _address("log_weights", log_weights, dtype, (k,))


def _posterior(
    name: str, out: Tensor, x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor,
    v: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Fill `out` with the operation `name` in one pass over the components."""
    n, d = x.shape
    dtype = x.dtype
    k, means_at, log_weights_at = _mixture(means, log_weights, dtype, d)
    _function("posterior", dtype)(
        getattr(_core().Output, name),
        out.data_ptr(),
        _address("x", x, dtype, (n, d)),
        0 if v is None else _address("v", v, dtype, (n, d)),
        means_at,
        log_weights_at,
        _address("alpha", alpha, torch.float64, (), (n,)),
        alpha.ndim == 1,
        _address("std", std, torch.float64, (), (n,)),
        std.ndim == 1,
        n,
        k,
        d,
        torch.get_num_threads(),
    )
    return out


def log_density(x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor) -> Tensor:
    """Log-density of each row's mixture, (n,)."""
    return _posterior("log_density", x.new_empty(x.shape[0]), x, means, log_weights, alpha, std)


def score(x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor) -> Tensor:
    """Gradient of the log-density, (n, d)."""
    return _posterior("score", torch.empty_like(x), x, means, log_weights, alpha, std)


def posterior_mean(x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor) -> Tensor:
    """Posterior average of the means, (n, d), not multiplied by alpha."""
    return _posterior("posterior_mean", torch.empty_like(x), x, means, log_weights, alpha, std)


def covariance_trace(x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor) -> Tensor:
    """Trace of the posterior covariance of the means, (n,), not multiplied by alpha^2."""
    return _posterior("covariance_trace", x.new_empty(x.shape[0]), x, means, log_weights, alpha, std)


def posterior_weights(
    x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor, out: Tensor | None = None
) -> Tensor:
    """Posterior weights (responsibilities) of the components, (n, k), written to `out` where it is given."""
    n, k = x.shape[0], means.shape[0]
    if out is None:
        out = x.new_empty(n, k)
    else:
        _address("out", out, x.dtype, (n, k))
    return _posterior("posterior_weights", out, x, means, log_weights, alpha, std)


def hessian_vector_product(
    x: Tensor, v: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor
) -> Tensor:
    """Hessian of the log-density times v (n, d), (n, d)."""
    return _posterior("hessian_vector_product", torch.empty_like(x), x, means, log_weights, alpha, std, v)


def flow_fixed(
    x: Tensor, means: Tensor, log_weights: Tensor, center: Tensor, ends: Tensor, h: Tensor, coefficients: Tensor,
    tableau: Tensor, *, form: Literal["automatic", "span", "full"] = "automatic", out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Integrate m Runge-Kutta steps given by tables.

    Args:
        x: points (n, d). means: centred means (k, d). log_weights: (k,). center: (d,).
        ends: float64 (4,) or (4, n): r_from, s_from, r_to, s_to. h: float64 (m,).
        coefficients: float64 (m, S, 4): a, b, c, r of every stage.
        tableau: float64 (S + 3, S): strictly lower A, nodes, weights, error weights.
        form: state in the span of the means, in full, or whichever is cheaper.
        out: receives the end points.

    Returns:
        End points (n, d) and status int8 (n,): 0 success, 2 non-finite.
    """
    n, d = x.shape
    stages, steps = tableau.shape[1], h.shape[0]
    center, ends, h, coefficients, tableau = _tables(center, ends, h, coefficients, tableau)
    k, means_at, log_weights_at = _mixture(means, log_weights, x.dtype, d)
    out, status = torch.empty_like(x) if out is None else out, torch.empty(n, dtype=torch.int8)
    _function("flow", x.dtype)(
        _address("x", x, x.dtype, (n, d)),
        _address("out", out, x.dtype, (n, d)),
        means_at,
        log_weights_at,
        _address("center", center, torch.float64, (d,)),
        _address("ends", ends, torch.float64, (4,), (4, n)),
        ends.ndim == 2,
        _address("tableau", tableau, torch.float64, (stages + 3, stages)),
        stages,
        steps,
        _address("h", h, torch.float64, (steps,)),
        _address("coefficients", coefficients, torch.float64, (steps, stages, 4)),
        *(0.0, 0.0, 0),  # tolerances and limit of step-size control
        status.data_ptr(),
        *(0, 0),  # attempts and evaluations are known
        n,
        k,
        d,
        getattr(_core().Form, form),
        torch.get_num_threads(),
    )
    return out, status


def flow_adaptive(
    x: Tensor, means: Tensor, log_weights: Tensor, center: Tensor, ends: Tensor, tableau: Tensor, rtol: float,
    atol: float, max_steps: int, *, form: Literal["automatic", "span", "full"] = "automatic",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Integrate dy/dr = mubar(y, r) with an embedded pair and one step size per trajectory.

    Args:
        x: points (n, d). means: centred means (k, d). log_weights: (k,). center: (d,).
        ends: float64 (4,) or (4, n): r_from, s_from, r_to, s_to. tableau: float64 (S + 3, S), as in flow_fixed.
        rtol, atol: tolerances on the root mean square of a step's error. max_steps: attempted steps per trajectory.
        form: state in the span of the means, in full, or whichever is cheaper.
        out: receives the end points.

    Returns:
        End points (n, d), status int8 (n,) (0 success, 1 max_steps, 2 non-finite, 3 step underflow), attempted steps
        and evaluations of mubar, int32 (n,).
    """
    n, d = x.shape
    stages = tableau.shape[1]
    center, ends, tableau = _tables(center, ends, tableau)
    k, means_at, log_weights_at = _mixture(means, log_weights, x.dtype, d)
    out = torch.empty_like(x) if out is None else out
    status = torch.empty(n, dtype=torch.int8)
    steps, evaluations = torch.empty(n, dtype=torch.int32), torch.empty(n, dtype=torch.int32)
    _function("flow", x.dtype)(
        _address("x", x, x.dtype, (n, d)),
        _address("out", out, x.dtype, (n, d)),
        means_at,
        log_weights_at,
        _address("center", center, torch.float64, (d,)),
        _address("ends", ends, torch.float64, (4,), (4, n)),
        ends.ndim == 2,
        _address("tableau", tableau, torch.float64, (stages + 3, stages)),
        stages,
        *(0, 0, 0),  # no fixed steps
        rtol,
        atol,
        max_steps,
        status.data_ptr(),
        steps.data_ptr(),
        evaluations.data_ptr(),
        n,
        k,
        d,
        getattr(_core().Form, form),
        torch.get_num_threads(),
    )
    return out, status, steps, evaluations


def _tables(*tables: Tensor) -> list[Tensor]:
    return [table.to(torch.float64).contiguous() for table in tables]


def diameter(means: Tensor) -> float:
    """Largest distance between two rows of means (k, d)."""
    k, d = means.shape
    address = _address("means", means, means.dtype, (k, d))
    return float(_function("diameter", means.dtype)(address, k, d, torch.get_num_threads()))


def sample(
    means: Tensor, cumulative: Tensor, alpha: Tensor, std: Tensor, seed: int, first_row: int, n: int,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rows (n, d) alpha_i mean_c + std_i z: component c and normals z are those of row first_row + i, see philox.py.

    Args:
        means: (k, d). cumulative: float64 (k,), sums of weights, the last one at least 1. seed, first_row: below 2^63.
        out: receives the rows.
    """
    k, d = means.shape
    out = means.new_empty(n, d) if out is None else out
    _function("sample", means.dtype)(
        _address("out", out, means.dtype, (n, d)),
        _address("means", means, means.dtype, (k, d)),
        _address("cumulative", cumulative, torch.float64, (k,)),
        *(_address("alpha", alpha, torch.float64, (), (n,)), alpha.ndim == 1),
        *(_address("std", std, torch.float64, (), (n,)), std.ndim == 1),
        *(seed, first_row, n, k, d, torch.get_num_threads()),
    )
    return out
