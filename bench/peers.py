"""Peers that run eagerly: torch as scripts and as experts write it, SDPA, numpy, scikit-learn, torchdiffeq, torchode.

A peer takes a `Problem` and gives a function without arguments that computes it; whatever is not part of the
computation (imports, copies into its own arrays) happens before. A peer raises `NotOffered` for what it cannot do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Run = Callable[[], Any]  # gives an array of its own kind
Score = Callable[[Any, Any, float], Any]  # (x (n, d), centres (k, d), std) -> (n, d), uniform weights

PANEL = 2_048  # rows of a panel of the distance matrix


class NotOffered(Exception):
    """The library has no such operation, or refuses these arrays; the message says which."""


@dataclass(frozen=True)
class Problem:
    """Numbers of one computation: uniform weights, constant beta.

    Attributes:
        operation: "score", "weights" (posterior), "flow" (t = 1 to 0) or "diameter" (of the means).
        x: (n, d). means: (k, d), x's dtype. std: of the components, for a flow at t = 0. beta, steps: of a flow.
    """

    operation: str
    x: Tensor
    means: Tensor
    std: float
    beta: float = 5.0
    steps: int = 100


def noise_at(problem: Problem, t: float) -> tuple[float, float]:
    """Signal factor alpha and standard deviation of the components at time t."""
    alpha = math.exp(-problem.beta * t)
    return alpha, math.sqrt(alpha**2 * problem.std**2 + 1 - alpha**2)


def uniform_rk4(problem: Problem, score: Score, x: Any, means: Any) -> Any:
    """The flow by classical Runge-Kutta steps uniform in t, the paper's teacher, on arrays of any library."""

    def velocity(x: Any, t: float) -> Any:
        alpha, std = noise_at(problem, t)
        return -problem.beta * (x + score(x, alpha * means, std))

    h = -1.0 / problem.steps
    for i in range(problem.steps):
        t = 1.0 + i * h
        f1 = velocity(x, t)
        f2 = velocity(x + h / 2 * f1, t + h / 2)
        f3 = velocity(x + h / 2 * f2, t + h / 2)
        f4 = velocity(x + h * f3, max(t + h, 0.0))
        x = x + h / 6 * (f1 + 2 * f2 + 2 * f3 + f4)
    return x


def scripts(problem: Problem) -> Run:
    """Every difference materialised, (n, k, d), as the paper's scripts do it."""

    if problem.operation != "diameter":
        differences = len(problem.x) * problem.means.numel() * problem.x.element_size()
        needs_memory(2 * differences)  # themselves, and their squares or weighted ones

    def weights(x: Tensor, centres: Tensor, std: float) -> tuple[Tensor, Tensor]:
        away = centres[None, :, :] - x[:, None, :]
        return torch.softmax(-away.pow(2).sum(-1) / (2 * std**2), dim=1), away

    def score(x: Tensor, centres: Tensor, std: float) -> Tensor:
        gamma, away = weights(x, centres, std)
        return (gamma[..., None] * away).sum(1) / std**2

    runs: dict[str, Run] = {
        "score": lambda: score(problem.x, problem.means, problem.std),
        "weights": lambda: weights(problem.x, problem.means, problem.std)[0],
        "flow": lambda: uniform_rk4(problem, score, problem.x, problem.means),
        "diameter": lambda: torch.cdist(problem.means, problem.means).max(),
    }
    return runs[problem.operation]


def lean_weights(x: Tensor, centres: Tensor, std: float, out: Tensor | None = None) -> Tensor:
    """Posterior weights by one product and a softmax; the square is expanded, which costs digits at low noise."""
    bias = -0.5 / std**2 * torch.linalg.vector_norm(centres, dim=1).square()  # without a temporary of their size
    logits = torch.addmm(bias, x, centres.T, alpha=1 / std**2, out=out)
    return torch.softmax(logits, 1, out=logits if out is not None else None)


def lean_score(x: Tensor, centres: Tensor, std: float) -> Tensor:
    """Two matrix products and a softmax."""
    return torch.addmm(x, lean_weights(x, centres, std), centres, beta=-1 / std**2, alpha=1 / std**2)


def _panels(means: Any, largest: Callable[[Any], float], transposed: Any) -> float:
    """Diameter over the triangle of the matrix of squared distances, panel by panel."""
    squares, found = (means * means).sum(1), 0.0
    for start in range(0, len(means), PANEL):
        rows = slice(start, start + PANEL)
        square = -2 * (means[rows] @ transposed[:, start:])
        square += squares[rows, None]
        square += squares[None, start:]
        found = max(found, largest(square))
    return math.sqrt(found)


def lean(problem: Problem) -> Run:
    """addmm, softmax, addmm."""
    x, means, std = problem.x, problem.means, problem.std
    runs: dict[str, Run] = {
        "score": lambda: lean_score(x, means, std),
        "weights": lambda: lean_weights(x, means, std),
        "flow": lambda: uniform_rk4(problem, lean_score, x, means),
        "diameter": lambda: _panels(means, lambda square: float(square.max()), means.T),
    }
    return runs[problem.operation]


def lean_reused(problem: Problem) -> Run:
    """Lean posterior weights into an output that is allocated once."""
    only(problem, "weights")
    out = problem.x.new_empty(len(problem.x), len(problem.means))
    return lambda: lean_weights(problem.x, problem.means, problem.std, out)


def sdpa(problem: Problem) -> Run:
    """torch's fused attention: points are queries, means are keys and values, half squared norms are the mask."""
    only(problem, "score")
    x, means, precision = problem.x, problem.means, 1 / problem.std**2

    def run() -> Tensor:
        mask = (-0.5 * precision * torch.linalg.vector_norm(means, dim=1).square()).expand(1, 1, len(x), -1)
        mean = torch.nn.functional.scaled_dot_product_attention(
            x[None, None], means[None, None], means[None, None], attn_mask=mask, scale=precision
        )
        return (mean[0, 0] - x) * precision

    return run


def numpy_weights(x: Any, centres: Any, std: float, out: Any = None) -> Any:
    """Posterior weights in numpy, every step in place."""
    few = len(x) < len(centres)  # the smaller factor is scaled
    logits = np.matmul(x / std**2 if few else x, (centres if few else centres / std**2).T, out=out)
    logits -= np.einsum("kd,kd->k", centres, centres) / (2 * std**2)
    logits -= logits.max(1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(1, keepdims=True)
    return logits


def numpy(problem: Problem) -> Run:
    """The lean form in numpy."""
    x, means, std = problem.x.numpy(), problem.means.numpy(), problem.std

    def score(x: Any, centres: Any, std: float) -> Any:
        return (numpy_weights(x, centres, std) @ centres - x) / std**2

    runs: dict[str, Run] = {
        "score": lambda: score(x, means, std),
        "weights": lambda: numpy_weights(x, means, std),
        "flow": lambda: uniform_rk4(problem, score, x, means),
        "diameter": lambda: _panels(means, lambda square: float(square.max()), means.T),
    }
    return runs[problem.operation]


def numpy_reused(problem: Problem) -> Run:
    """Posterior weights in numpy into an output that is allocated once."""
    only(problem, "weights")
    x, means = problem.x.numpy(), problem.means.numpy()
    out = np.empty((len(x), len(means)), x.dtype)
    return lambda: numpy_weights(x, means, problem.std, out)


def scikit_learn(problem: Problem) -> Run:
    """predict_proba of a mixture with one spherical covariance; pairwise_distances_chunked for the diameter."""
    from sklearn.metrics import pairwise_distances_chunked
    from sklearn.mixture import GaussianMixture

    only(problem, "score", "weights", "diameter")
    x, means, std = problem.x.numpy(), problem.means.numpy(), problem.std
    if problem.operation == "diameter":
        return lambda: max(float(panel.max()) for panel in pairwise_distances_chunked(means))
    k = len(means)
    model = GaussianMixture(k, covariance_type="spherical")
    model.weights_, model.means_ = np.full(k, 1 / k, x.dtype), means
    model.covariances_ = np.full(k, std**2, x.dtype)
    model.precisions_cholesky_ = np.full(k, 1 / std, x.dtype)
    if problem.operation == "weights":
        return lambda: model.predict_proba(x)
    return lambda: (model.predict_proba(x) @ means - x) / std**2


def torchdiffeq_rk4(problem: Problem) -> Run:
    """The same number of fixed fourth-order steps over the lean score."""
    from torchdiffeq import odeint

    only(problem, "flow")
    times = torch.tensor([1.0, 0.0], dtype=problem.x.dtype)
    options = {"step_size": 1.0 / problem.steps}
    return lambda: odeint(_velocity(problem), problem.x, times, method="rk4", options=options)[-1]


def torchdiffeq_dopri5(problem: Problem) -> Run:
    """Dormand-Prince over the lean score, one step size for all points."""
    from torchdiffeq import odeint

    only(problem, "flow")
    times = torch.tensor([1.0, 0.0], dtype=problem.x.dtype)
    return lambda: odeint(_velocity(problem), problem.x, times, method="dopri5", rtol=1e-5, atol=1e-6)[-1]


def torchode_dopri5(problem: Problem) -> Run:
    """Dormand-Prince with a step size per point over the lean score in per-point times."""
    import torchode

    only(problem, "flow")
    means, squares = problem.means, problem.means.square().sum(1)

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        alpha = torch.exp(-problem.beta * t)[:, None]
        variance = alpha**2 * problem.std**2 + 1 - alpha**2
        gamma = ((alpha * (x @ means.T) - 0.5 * alpha**2 * squares) / variance).softmax(1)
        return -problem.beta * (x + (alpha * (gamma @ means) - x) / variance)

    term = torchode.ODETerm(velocity)
    controller = torchode.IntegralController(atol=1e-6, rtol=1e-5, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), controller)
    start = torch.ones(len(problem.x), dtype=problem.x.dtype)
    begin = torchode.InitialValueProblem(y0=problem.x, t_start=start, t_end=torch.zeros_like(start))
    return lambda: solver.solve(begin).ys[:, -1]


def _velocity(problem: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    def velocity(t: Tensor, x: Tensor) -> Tensor:
        alpha, std = noise_at(problem, max(float(t), 0.0))
        return -problem.beta * (x + lean_score(x, alpha * problem.means, std))

    return velocity


def only(problem: Problem, *operations: str) -> None:
    """Refuse every operation but these."""
    if problem.operation not in operations:
        raise NotOffered(f"offers {', '.join(operations)}")


def needs_memory(size: float) -> None:
    """Refuse what needs more bytes than the machine has to give."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    if found and size > 1024 * int(found.group(1)):
        raise NotOffered(f"needs {size / 2**30:.0f} GiB, this machine has {int(found.group(1)) / 2**20:.0f} to give")
