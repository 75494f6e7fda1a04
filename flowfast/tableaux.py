"""Explicit Runge-Kutta methods as numbers: all that the integrators know of a method.

A tableau is a float64 tensor (S + 3, S): S rows of the strictly lower triangular A, then the nodes, the weights b and
the error weights b - bhat (zero where a method has no embedded partner).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _tableau(a: list[list[float]], nodes: list[float], b: list[float], error: list[float] | None = None) -> Tensor:
    stages = len(b)
    rows = [row + [0.0] * (stages - len(row)) for row in a]
    return torch.tensor([*rows, nodes, b, error or [0.0] * stages], dtype=torch.float64)


RK4 = _tableau(
    a=[[], [1 / 2], [0, 1 / 2], [0, 0, 1]],
    nodes=[0, 1 / 2, 1 / 2, 1],
    b=[1 / 6, 1 / 3, 1 / 3, 1 / 6],
)
"""The classical method of order 4 (Kutta 1901)."""

DORMAND_PRINCE = _tableau(
    a=[
        [],
        [1 / 5],
        [3 / 40, 9 / 40],
        [44 / 45, -56 / 15, 32 / 9],
        [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
        [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
        [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
    ],
    nodes=[0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1],
    b=[35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0],
    error=[71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40],
)
"""The embedded pair of order 5(4) whose last stage is the next step's first (Dormand & Prince 1980)."""
