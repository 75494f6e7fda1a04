"""The probability flow of a mixture: from one time to another, noise to data or back.

The flow is integrated in `y = x / s` against `r = alpha / s`, where it reads `dy/dr = mubar(y, r)` and has no
stiffness left (docs/math.md Eq. 6). Integrators see only numbers: the table of a method and the ends of each row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flowfast import backends, flow_operators, operators, reference
from flowfast.mixture import GaussianMixture
from flowfast.ops import check_out, check_points, check_times, working_dtype
from flowfast.process import OUProcess, Times
from flowfast.tableaux import DORMAND_PRINCE, RK4

Method = Literal["snr", "paper"]

PAPER_STEPS = 100  # of the paper's teacher over [0, 1]
MOST_STEPS = 10_000  # attempted per trajectory before it is given up

TOLERANCES = {torch.float32: (1e-7, 1e-8), torch.float64: (1e-10, 1e-12)}
"""Default (rtol, atol) per dtype; the accuracy they buy stands in `flow_map`'s docstring."""

_REASONS = {
    reference.MAX_STEPS: f"needed more than {MOST_STEPS} steps: loosen rtol or atol",
    reference.NON_FINITE: "was not finite",
    reference.STEP_UNDERFLOW: "needed steps below rounding: loosen rtol or atol, or use float64",
}


@dataclass(frozen=True)
class FlowSolution:
    """Where the flow took each point, and at what cost.

    Attributes:
        x: end points, shape, dtype and device of the starting points; rows that failed hold NaN or the state reached.
        status: int8, shape of x without its last dimension; 0 success, 1 too many steps, 2 start not finite, 3 step
            size below rounding.
        steps: int32, attempted steps per trajectory. evaluations: int32, evaluations of the posterior mean.
        backend: "cpp", "triton" or "reference".
    """

    x: Tensor
    status: Tensor
    steps: Tensor
    evaluations: Tensor
    backend: str


def flow_map(
    x: Tensor, mixture: GaussianMixture, process: OUProcess, t_from: Times, t_to: Times, *,
    method: Method = "snr", steps: int | None = None, rtol: float | None = None, atol: float | None = None,
    out: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Carry points of time t_from along the probability flow to time t_to: shape, dtype and device of x.

    Args:
        x: (..., d), float32 or float64 (bfloat16 and float16 are computed in float32).
        mixture: law of the data (t = 0). process: forward process.
        t_from, t_to: times >= 0, either direction; numbers, or tensors that broadcast with x's leading dimensions.
        method: "snr" integrates `dy/dr = mubar` (exact for a single component; fine at any std): with step-size
            control per trajectory, or with `steps` classical Runge-Kutta steps uniform in log r. "paper" is the
            published teacher, classical Runge-Kutta with `steps` (default 100) steps uniform in t; it leaves the
            flow when std is small, and is there to reproduce published numbers.
        steps: fixed number of steps, >= 1; None means step-size control (method "snr").
        rtol, atol: bounds on one step's error in y, root mean square over coordinates. Default 1e-7, 1e-8 in float32
            (median relative error of the end points below 5e-6, mostly float32's own rounding) and 1e-10, 1e-12 in
            float64 (below 1e-9).
        out: receives the end points and is returned: contiguous, of x's shape, dtype and device, without gradient.
        backend: "auto", "cpp", "triton" or "reference"; only the reference carries gradients (with fixed steps to x,
            means and weights; without, also to std and the times).

    Returns:
        End points. A row of x that is not finite gives a row that is not finite.

    Raises:
        TypeError, ValueError: arguments of another kind or range, a backend that is missing.
        RuntimeError: a trajectory failed; the message names how many, the first's index and the reason. A function
            compiled by torch.compile cannot raise on values: there a failed trajectory ends in NaN.

    Source: arXiv 2606.03820, section 3.2 (flow, method "paper"); docs/math.md Eq. 6-7 (method "snr").
    """
    return _arrived(
        solve_flow(
            x,
            mixture,
            process,
            t_from,
            t_to,
            method=method,
            steps=steps,
            rtol=rtol,
            atol=atol,
            out=out,
            backend=backend,
        )
    )


def _arrived(solution: FlowSolution) -> Tensor:
    """The end points, unless a trajectory failed."""
    failed = (solution.status != reference.SUCCESS) & (solution.status != reference.NON_FINITE)
    if torch.compiler.is_compiling():
        return solution.x.masked_fill(failed[..., None], float("nan"))
    if bool(failed.any()):
        index = failed.nonzero()[0].tolist()
        reason = _REASONS[int(solution.status[tuple(index)])]
        raise RuntimeError(
            f"{int(failed.sum())} of {failed.numel()} trajectories failed; the one at index {index} {reason} "
            f"(solve_flow returns every trajectory's status)"
        )
    return solution.x


def solve_flow(
    x: Tensor, mixture: GaussianMixture, process: OUProcess, t_from: Times, t_to: Times, *,
    method: Method = "snr", steps: int | None = None, rtol: float | None = None, atol: float | None = None,
    out: Tensor | None = None, backend: str = "auto",
) -> FlowSolution:  # fmt: skip
    """The same as `flow_map`, with status, steps and evaluations per trajectory; a failed one raises nothing."""
    rows = check_points(x, mixture)
    if out is not None:
        check_out(out, tuple(x.shape), x, mixture)
    if method not in ("snr", "paper"):
        raise ValueError(f"method must be 'snr' or 'paper'; got {method!r}")
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps must be a whole number, at least 1, or None; got {steps!r}")
    name = backends.choose(backend, x.device)
    schedule = (mixture.std, t_from, t_to)
    if name != "reference" and operators.differentiated(x, mixture.means, mixture.log_weights, *schedule):
        raise ValueError(
            "the compiled flow carries no gradient: pass backend='reference', or detach x, the mixture and the times"
        )
    dtype = working_dtype(x.dtype)
    fixed = steps is not None or method == "paper"
    if fixed and torch.compiler.is_compiling():
        raise ValueError(
            "the table of fixed steps is made of numbers, which torch.compile cannot hold: leave out steps (and method "
            "'paper'), or call the flow outside the compiled function"
        )
    if fixed and operators.differentiated(*schedule):
        raise ValueError(
            "fixed steps carry gradients to x, means and weights only: leave out steps, or detach std and the times"
        )
    if fixed and (rtol is not None or atol is not None):
        raise ValueError("rtol and atol have no effect on fixed steps: leave out steps, or the tolerances")
    if fixed:
        ends, h, coefficients = (_paper_table if method == "paper" else _snr_table)(
            mixture, process, t_from, t_to, steps or PAPER_STEPS
        )
        tables = (ends.to(x.device), h, coefficients, RK4)
        return _solve("flow_fixed", name, x, rows, mixture, tables, out, shifted=method != "paper")
    limits = (DORMAND_PRINCE, *_tolerances(dtype, rtol, atol), MOST_STEPS)
    return _solve("flow_adaptive", name, x, rows, mixture, (_ends(x, mixture, process, t_from, t_to), *limits), out)


def flow_between(
    x: Tensor, mixture: GaussianMixture, ends: Tensor, *, out: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """`flow_map` of rows whose `grid_ends` are known, at the default tolerances: for many rows of few segments.

    Args:
        x: (n, d). ends: float64 (4, n), a column of `grid_ends` per row.
        mixture, out, backend: as in `flow_map`.
    """
    rows, name = check_points(x, mixture), backends.choose(backend, x.device)
    if out is not None:
        check_out(out, tuple(x.shape), x, mixture)
    limits = (DORMAND_PRINCE, *_tolerances(working_dtype(x.dtype), None, None), MOST_STEPS)
    return _arrived(_solve("flow_adaptive", name, x, rows, mixture, (ends, *limits), out))


def grid_ends(mixture: GaussianMixture, process: OUProcess, t_from: Tensor, t_to: Tensor) -> Tensor:
    """r and s where m segments begin and where they end: float64 (4, m), on the mixture's device."""
    scales = [(process.alpha(t), process.std(t, mixture.std)) for t in (t_from, t_to)]
    return torch.stack([row.to(mixture.device) for alpha, std in scales for row in (alpha / std, std)])


def _solve(
    op: str, backend: str, x: Tensor, rows: Tensor, mixture: GaussianMixture, tables: tuple[Any, ...],
    out: Tensor | None, *, shifted: bool = True,
) -> FlowSolution:  # fmt: skip
    """Run a flow of `flow_operators` on rows (n, d), the points x, of which `tables` are the remaining arguments."""
    dtype, shape = working_dtype(x.dtype), x.shape[:-1]
    start, log_weights = rows.to(dtype).contiguous(), mixture.log_weights.to(dtype).contiguous()
    center, means = _centred(mixture, dtype, off=not shifted)
    into = None if out is None or out.dtype != dtype else out.view(rows.shape)
    found, status, *counts = flow_operators.call(op, backend, start, means, log_weights, center, *tables, out=into)
    if counts:
        attempts, evaluations = counts
    else:  # fixed steps
        steps, stages = len(tables[1]), RK4.shape[1]
        attempts, evaluations = (
            torch.full_like(status, number, dtype=torch.int32) for number in (steps, steps * stages)
        )
    if out is None:
        out = found.reshape(x.shape).to(x.dtype)
    elif found is not into:
        out.copy_(found.reshape(x.shape))
    return FlowSolution(out, status.reshape(shape), attempts.reshape(shape), evaluations.reshape(shape), backend)


def _centred(mixture: GaussianMixture, dtype: torch.dtype, *, off: bool) -> tuple[Tensor, Tensor]:
    """A centre (d,) and the means (k, d) around it: the flow commutes with the shift, rounding does not."""
    means = mixture.means.double()
    center = torch.zeros_like(means[0]) if off else means.mean(0).to(dtype).double()
    return center.to(dtype).contiguous(), (means - center).to(dtype).contiguous()


def _tolerances(dtype: torch.dtype, rtol: float | None, atol: float | None) -> tuple[float, float]:
    default = TOLERANCES[dtype]
    rtol, atol = (default[0] if rtol is None else rtol), (default[1] if atol is None else atol)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not (isinstance(value, int | float) and 0 <= value < float("inf")):
            raise ValueError(f"{name} must be a finite number, at least 0; got {value!r}")
    if rtol == 0:
        raise ValueError("rtol must be positive: the state's size is not known beforehand")
    return float(rtol), float(atol)


def _ends(x: Tensor, mixture: GaussianMixture, process: OUProcess, t_from: Times, t_to: Times) -> Tensor:
    """r and s at both ends: (4,), or (4, n) when a time is given per row."""
    columns = []
    for name, t in (("t_from", t_from), ("t_to", t_to)):
        std = process.std(t, mixture.std)
        check_times(name, std, x)
        columns += [process.alpha(t).to(x.device) / std.to(x.device), std.to(x.device)]
    if all(column.ndim == 0 for column in columns):
        return torch.stack(columns)
    return torch.stack([column.expand(x.shape[:-1]).reshape(-1) for column in columns])


def _snr_table(
    mixture: GaussianMixture, process: OUProcess, t_from: Times, t_to: Times, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Runge-Kutta in r with steps uniform in log r: `dy/dr = mubar(y, r)`, so a = 0, b = c = 1."""
    times = _one_time("t_from", t_from), _one_time("t_to", t_to)
    (r_from, s_from), (r_to, s_to) = (_numbers(mixture, process, t) for t in times)
    r = torch.logspace(0, 1, steps + 1, base=r_to / r_from, dtype=torch.float64) * r_from
    r[-1] = r_to
    h = r.diff()
    at = r[:-1, None] + h[:, None] * RK4[RK4.shape[1]]  # (m, S)
    one = torch.ones_like(at)
    ends = torch.tensor([r_from, s_from, r_to, s_to], dtype=torch.float64)
    return ends, h, torch.stack([0 * one, one, one, at], -1)


def _paper_table(
    mixture: GaussianMixture, process: OUProcess, t_from: Times, t_to: Times, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Runge-Kutta uniform in t: `dx/dt = -beta ((1 - 1/s^2) x + (alpha / s^2) mubar(x / s, r))`."""
    start, end = _one_time("t_from", t_from), _one_time("t_to", t_to)
    h = torch.full((steps,), (end - start) / steps, dtype=torch.float64)
    t = start + (torch.arange(steps, dtype=torch.float64)[:, None] + RK4[RK4.shape[1]]) * h[:, None]  # (m, S)
    t = t.clamp(min(start, end), max(start, end))  # rounding must not step outside the schedule
    beta, alpha, s = process.beta(t), process.alpha(t), process.std(t, float(mixture.std.detach()))
    ends = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    return ends, h, torch.stack([-beta * (1 - s**-2), -beta * alpha / s**2, 1 / s, alpha / s], -1)


def _one_time(name: str, t: Times) -> float:
    if isinstance(t, Tensor) and t.numel() != 1:
        raise ValueError(f"{name} must be one number with fixed steps; got shape {tuple(t.shape)}: leave out steps")
    return float(t)


def _numbers(mixture: GaussianMixture, process: OUProcess, t: float) -> tuple[float, float]:
    sigma0 = float(mixture.std.detach())
    return float(process.snr_root(t, sigma0)), float(process.std(t, sigma0))
