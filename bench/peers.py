"""What flowfast is timed against: the same functions in torch eager, as a script writes them and as an expert does.

All of them see a mixture through numbers alone: means (k, d), a constant beta, and noise levels computed per time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Score = Callable[[Tensor, Tensor, float], Tensor]  # (x (n, d), centres (k, d), std) -> (n, d), uniform weights


def scripted_score(x: Tensor, centres: Tensor, std: float) -> Tensor:
    """Every difference materialised, (n, k, d), as the paper's scripts do it."""
    away = centres[None, :, :] - x[:, None, :]
    weights = torch.softmax(-away.pow(2).sum(-1) / (2 * std**2), dim=1)
    return (weights[..., None] * away).sum(1) / std**2


def lean_score(x: Tensor, centres: Tensor, std: float) -> Tensor:
    """Two matrix products and a softmax; the square is expanded, which costs digits at low noise."""
    precision = 1 / std**2
    bias = -0.5 * precision * centres.square().sum(1)
    weights = torch.addmm(bias, x, centres.T, alpha=precision).softmax(1)
    return torch.addmm(x, weights, centres, beta=-precision, alpha=precision)


def uniform_rk4(score: Score, x: Tensor, means: Tensor, beta: float, std0: float, steps: int) -> Tensor:
    """The flow from t = 1 to t = 0 by classical Runge-Kutta steps uniform in t, the paper's teacher."""

    def velocity(x: Tensor, t: float) -> Tensor:
        alpha = math.exp(-beta * t)
        std = math.sqrt(alpha**2 * std0**2 + 1 - alpha**2)
        return -beta * (x + score(x, alpha * means, std))

    h = -1.0 / steps
    for i in range(steps):
        t = 1.0 + i * h
        f1 = velocity(x, t)
        f2 = velocity(x + h / 2 * f1, t + h / 2)
        f3 = velocity(x + h / 2 * f2, t + h / 2)
        f4 = velocity(x + h * f3, max(t + h, 0.0))
        x = x + h / 6 * (f1 + 2 * f2 + 2 * f3 + f4)
    return x
