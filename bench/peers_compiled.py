"""Peers that compile first: torch.compile, JAX, diffrax, KeOps. Their compilation belongs to the warm-up."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.peers import Problem, Run, lean_score, lean_weights, noise_at, only, uniform_rk4


def _schedule(problem: Problem) -> np.ndarray[Any, Any]:
    """(alpha, 1 / std^2) at the start, the middle and the end of every step: (steps, 3, 2)."""
    h = 1.0 / problem.steps
    rows = [[noise_at(problem, max(1 - (i + part) * h, 0.0)) for part in (0, 0.5, 1)] for i in range(problem.steps)]
    table = np.array(rows)
    table[..., 1] **= -2
    return table.astype(str(problem.x.dtype)[6:])


def _step(velocity: Any, x: Any, row: Any, h: float) -> Any:
    f1 = velocity(x, row[0])
    f2 = velocity(x + h / 2 * f1, row[1])
    f3 = velocity(x + h / 2 * f2, row[1])
    f4 = velocity(x + h * f3, row[2])
    return x + h / 6 * (f1 + 2 * f2 + 2 * f3 + f4)


def torch_compile(problem: Problem) -> Run:
    """The lean form through torch.compile; for a flow one whole Runge-Kutta step."""
    only(problem, "score", "weights", "flow")
    torch._dynamo.reset()
    x, means, std = problem.x, problem.means, problem.std
    if problem.operation != "flow":
        compiled = torch.compile(lean_score if problem.operation == "score" else lean_weights, dynamic=False)
        return lambda: compiled(x, means, std)
    table, h = torch.from_numpy(_schedule(problem)).to(x.device), -1.0 / problem.steps
    squares = means.square().sum(1)

    def velocity(x: Tensor, row: Tensor) -> Tensor:
        alpha, precision = row[0], row[1]
        gamma = (precision * (alpha * (x @ means.T) - 0.5 * alpha**2 * squares)).softmax(1)
        return -problem.beta * (x + precision * (alpha * (gamma @ means) - x))

    step = torch.compile(lambda x, row: _step(velocity, x, row, h), dynamic=False)

    def run() -> Tensor:
        y = x
        for row in table:
            y = step(y, row)
        return y

    return run


def _jax(problem: Problem) -> tuple[Any, Any]:
    import jax

    jax.config.update("jax_platforms", "cuda" if problem.x.is_cuda else "cpu")
    jax.config.update("jax_default_matmul_precision", "highest")  # products of float32 in float32, on a GPU too
    jax.config.update("jax_enable_x64", True)  # arrays keep the dtype they come with
    return jax, jax.numpy


def _jax_weights(jax: Any, x: Any, centres: Any, precision: Any) -> Any:
    return jax.nn.softmax(precision * (x @ centres.T - 0.5 * (centres**2).sum(1)), axis=1)


def jax(problem: Problem) -> Run:
    """The lean form under jax.jit; a flow is one compiled loop."""
    jax, jnp = _jax(problem)
    x, means = jnp.asarray(problem.x.cpu().numpy()), jnp.asarray(problem.means.cpu().numpy())
    precision = x.dtype.type(problem.std**-2) if problem.std else 0.0

    def score(x: Any, means: Any, precision: Any) -> Any:
        return precision * (_jax_weights(jax, x, means, precision) @ means - x)

    def flow(x: Any, means: Any, table: Any) -> Any:
        def velocity(x: Any, row: Any) -> Any:
            return -problem.beta * (x + score(x, row[0] * means, row[1]))

        h = -1.0 / problem.steps
        return jax.lax.scan(lambda x, row: (_step(velocity, x, row, h), None), x, table)[0]

    def diameter(means: Any) -> Any:
        squares, panel = (means**2).sum(1), 1_000
        if len(means) % panel:
            panel = len(means)

        def largest(rows: Any) -> Any:
            return (squares - 2 * rows @ means.T + (rows**2).sum(1)[:, None]).max()

        return jnp.sqrt(jax.lax.map(largest, means.reshape(-1, panel, means.shape[1])).max())

    table = jnp.asarray(_schedule(problem)) if problem.operation == "flow" else None
    function, arguments = {
        "score": (score, (x, means, precision)),
        "weights": (lambda *given: _jax_weights(jax, *given), (x, means, precision)),
        "flow": (flow, (x, means, table)),
        "diameter": (diameter, (means,)),
    }[problem.operation]
    compiled = jax.jit(function)
    return lambda: compiled(*arguments).block_until_ready()


def _diffrax(problem: Problem, controller: Any, solver: Any, dt0: float | None) -> Run:
    import diffrax

    jax, jnp = _jax(problem)
    x, means = jnp.asarray(problem.x.cpu().numpy()), jnp.asarray(problem.means.cpu().numpy())

    def velocity(t: Any, x: Any, means: Any) -> Any:
        alpha = jnp.exp(-problem.beta * t).astype(x.dtype)
        precision = 1 / (alpha**2 * problem.std**2 + 1 - alpha**2)
        centres = alpha * means
        return -problem.beta * (x + precision * (_jax_weights(jax, x, centres, precision) @ centres - x))

    def solve(x: Any, means: Any) -> Any:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(velocity), solver, x.dtype.type(1), x.dtype.type(0), dt0, x, means,
            stepsize_controller=controller, max_steps=100_000,
        ).ys[-1]  # fmt: skip

    compiled = jax.jit(solve)
    return lambda: compiled(x, means).block_until_ready()


def diffrax_dopri5(problem: Problem) -> Run:
    """Dormand-Prince, one step size for all points."""
    import diffrax

    only(problem, "flow")
    return _diffrax(problem, diffrax.PIDController(rtol=1e-5, atol=1e-6), diffrax.Dopri5(), None)


def diffrax_rk4(problem: Problem) -> Run:
    """Classical Runge-Kutta as a table of diffrax's own kind, the same number of fixed steps."""
    import diffrax

    class RungeKutta(diffrax.AbstractERK):  # type: ignore[misc]
        tableau = diffrax.ButcherTableau(
            a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
            b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
            b_error=np.zeros(4),
            c=np.array([0.5, 0.5, 1.0]),
        )
        interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

        def order(self, terms: Any) -> int:
            return 4

    only(problem, "flow")
    return _diffrax(problem, diffrax.ConstantStepSize(), RungeKutta(), -1.0 / problem.steps)


def keops(problem: Problem) -> Run:
    """Symbolic matrices of KeOps, reduced without being stored."""
    import pykeops
    from pykeops.torch import LazyTensor

    pykeops.set_verbose(False)
    only(problem, "score", "flow", "diameter")

    def score(x: Tensor, centres: Tensor, std: float) -> Any:
        points, others = LazyTensor(x[:, None, :]), LazyTensor(centres[None, :, :].contiguous())
        logits = -((points - others) ** 2).sum(-1) / (2 * std**2)
        return (logits.sumsoftmaxweight(others, axis=1) - x) / std**2

    def diameter(means: Tensor) -> Any:
        one, other = LazyTensor(means[:, None, :]), LazyTensor(means[None, :, :])
        return ((one - other) ** 2).sum(-1).max(1).max().sqrt()

    runs: dict[str, Run] = {
        "score": lambda: score(problem.x, problem.means, problem.std),
        "flow": lambda: uniform_rk4(problem, score, problem.x, problem.means),
        "diameter": lambda: diameter(problem.means),
    }
    return runs[problem.operation]
