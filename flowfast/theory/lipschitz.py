"""Lipschitz constants as they are: of networks at points, of networks by their layers, of the flow's last stretch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.seeds import generator_for
from flowfast.students import MLP
from flowfast.students.mlp import check_size
from flowfast.variational import flow_amplification

PAIRS, OF_MEANS = 200, 1000  # pairs, the furthest apart of the first means, between which the flow is measured
RTOL = 1e-6  # of the flow's amplification there: far below what a table shows


def lipschitz_constant(
    student: Callable[[Tensor], Tensor], x: Tensor, *, iterations: int = 50, seed: int = 0
) -> Tensor:
    """Local Lipschitz constant of a map at each point, the spectral norm of its Jacobian: (n,), dtype of x.

    Args:
        student: maps (n, d) to (n, d_out), each row by itself (a module in training mode with dropout does not), and
            can be differentiated by torch.func: any student, or `lambda x: student.segment(i, x)`.
        x: (n, d), float32 or float64.
        iterations: of the power iteration, >= 1, two passes each. The result approaches the norm from below; what is
            left shrinks with (second singular value / first)^(2 iterations).
        seed: of the first direction, >= 0.

    Raises:
        TypeError, ValueError: points of another shape or kind, an answer of another number of rows.
    """
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64) or x.ndim != 2:
        got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a float32 or float64 tensor (n, d); got {got}")
    check_size("iterations", iterations)
    x = x.detach()
    v = torch.randn(x.shape, generator=generator_for("lipschitz", seed), dtype=torch.float64).to(x)
    norm = x.new_zeros(len(x))
    with sdpa_kernel(SDPBackend.MATH):  # the other bodies of attention have no forward-mode derivative
        answer, pull, *_ = torch.func.vjp(student, x)
        if answer.ndim != 2 or len(answer) != len(x):
            raise ValueError(f"student must answer ({len(x)}, d_out) to {tuple(x.shape)}; got {tuple(answer.shape)}")
        for _ in range(iterations):
            image = torch.func.jvp(student, (x,), (_unit(v),))[1].detach()
            norm = torch.maximum(norm, torch.linalg.vector_norm(image, dim=1))
            v = pull(_unit(image))[0].detach()
    return norm


def log_lipschitz_bound(student: MLP, *, radius: float | None = None) -> float:
    """Natural logarithm of a bound on a network's Lipschitz constant, the product of its layers' spectral norms.

    Args:
        student: an `MLP`.
        radius: the bound need only hold for points with |x| <= radius, > 0. ReLU does not need it; "relu-requ", whose
            derivative 2 max(x, 0) grows without end, has no bound otherwise: the radius is followed through the layers.

    Raises:
        TypeError, ValueError: no `MLP`, a radius that is not positive, or one that is missing.
    """
    if not isinstance(student, MLP):
        raise TypeError(f"student must be an MLP, whose layers can be multiplied; got {type(student).__name__}")
    squared = [student.config["activation"] == "relu-requ" and i % 2 == 1 for i in range(len(student.layers))]
    squared[-1] = False
    if radius is None and any(squared):
        raise ValueError("radius is needed for 'relu-requ', which is Lipschitz on bounded sets only")
    if radius is not None and not 0 < radius < math.inf:
        raise ValueError(f"radius must be positive and finite; got {radius}")
    total, log_reach = 0.0, -math.inf if radius is None else math.log(radius)
    for layer, square in zip(linear_layers(student), squared, strict=True):
        norm = float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2))
        if norm == 0:
            return -math.inf
        total += math.log(norm)
        offset = float(torch.linalg.vector_norm(layer.bias.detach().double()))
        log_reach = float(torch.logaddexp(torch.tensor(log_reach + math.log(norm)), torch.tensor(offset).log()))
        if square:  # at inputs of size up to `reach` the slope is 2 reach, the answer's norm reach^2
            total, log_reach = total + math.log(2) + log_reach, 2 * log_reach
    return total


def linear_layers(student: MLP) -> list[nn.Linear]:
    """The layers of a network, first to last."""
    return [layer for layer in student.layers if isinstance(layer, nn.Linear)]


@dataclass(frozen=True)
class TailFlow:
    """What the flow over a window [0, t] does to perturbations; natural logarithms of |D Phi|.

    Attributes:
        mean: logarithm of the mean of |D Phi(x)| over x ~ p_t. largest: the largest of them. points: how many.
        between: the largest at points half-way between two means, where the flow is steepest; None for one component.
            Double precision leaves such a trajectory's boundary once |D Phi| nears 1e16, so it may be far too small.
    """

    mean: float
    largest: float
    points: int
    between: float | None


def tail_flow(mixture: GaussianMixture, process: OUProcess, t: float, *, points: int = 1000, seed: int = 0) -> TailFlow:
    """Measure the flow from time t to the data.

    Args:
        mixture: law of the data. process: forward process. t: > 0. points: of p_t, >= 1. seed: of the points, >= 0.

    Raises:
        TypeError, ValueError, RuntimeError: as in `flow_amplification`.
    """
    check_size("points", points)
    mixture = mixture.to(torch.float64)
    marginal = process.marginal(mixture, t)
    x = marginal.sample(points, generator=generator_for("tail", seed, device=mixture.device))
    norms = flow_amplification(x, mixture, process, t, 0.0, log=True, rtol=RTOL)
    between = None
    if mixture.n_components > 1:
        steep = flow_amplification(_half_way(marginal.means), mixture, process, t, 0.0, log=True, rtol=RTOL)
        between = float(steep.max())
    mean = float(norms.logsumexp(0)) - math.log(points)
    return TailFlow(mean, float(norms.max()), points, between)


def _half_way(means: Tensor) -> Tensor:
    """Points half-way between the pairs of means that are furthest apart: (at most PAIRS, d)."""
    means = means[:OF_MEANS]
    distances = torch.pdist(means)
    i, j = torch.triu_indices(len(means), len(means), 1, device=means.device)
    far = distances.topk(min(PAIRS, len(distances))).indices
    return (means[i[far]] + means[j[far]]) / 2


def _unit(v: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return v / norm.clamp(min=torch.finfo(v.dtype).tiny)
