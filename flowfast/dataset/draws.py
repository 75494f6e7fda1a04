"""Starting points and times of a set's rows: Philox4x32-10 keyed by the seed, its counter the row.

Row i's numbers come from the counters (i mod 2^32, i / 2^32, j, stream): stream 0 holds the normals, j / 4 in the
third word as in kernels/random.py; stream 1 the component, stream 2 the times, both with j = 0.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flowfast.mixture import GaussianMixture

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_NORMALS, _COMPONENT, _TIMES = 0, 1, 2


def draw_starts(mixture: GaussianMixture, seed: int, first_row: int, alpha: Tensor, std: Tensor) -> Tensor:
    """Points of rows first_row, first_row + 1, ..., each from a marginal of its own.

    Args:
        mixture: law of the data. seed: of the set. alpha, std: (n,) float64, the rows' marginals.

    Returns:
        (n, d) of the mixture's dtype and device: alpha_i means[component_i] + std_i normals_i.
    """
    rows = np.arange(first_row, first_row + len(alpha), dtype=np.uint64)
    means = mixture.means.detach()
    component = _components(mixture, seed, rows).to(means.device)
    noise = _normals(seed, rows, mixture.dim).to(means)
    alpha, std = (column.to(means)[:, None] for column in (alpha, std))
    return alpha * means[component] + std * noise


def draw_uniforms(seed: int, first_row: int, n: int) -> Tensor:
    """Two numbers in [0, 1) per row, (n, 2) float64."""
    w0, w1, w2, w3 = _words(seed, np.arange(first_row, first_row + n, dtype=np.uint64), 0, _TIMES)
    return torch.from_numpy(np.stack([_fraction(w0, w1), _fraction(w2, w3)], 1))


def _components(mixture: GaussianMixture, seed: int, rows: np.ndarray) -> Tensor:
    w0, w1, _, _ = _words(seed, rows, 0, _COMPONENT)
    cumulative = np.cumsum(mixture.log_weights.detach().cpu().double().exp().numpy())
    last = int(np.flatnonzero(np.diff(cumulative, prepend=0.0))[-1])  # rounding must not reach a component of weight 0
    found = np.searchsorted(cumulative, _fraction(w0, w1) * cumulative[-1], side="right")
    return torch.from_numpy(np.minimum(found, last))


def _normals(seed: int, rows: np.ndarray, d: int) -> Tensor:
    quarters = np.arange(-(-d // 4), dtype=np.uint64)
    w0, w1, w2, w3 = _words(seed, rows[:, None], quarters[None, :], _NORMALS)
    four = np.stack([*_pair(w0, w1), *_pair(w2, w3)], -1)  # (n, d / 4, 4)
    return torch.from_numpy(four.reshape(len(rows), -1)[:, :d])


def _pair(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    radius = np.sqrt(-2 * np.log((first + 0.5) * 2.0**-32))
    angle = second * (2 * np.pi * 2.0**-32)
    return radius * np.cos(angle), radius * np.sin(angle)


def _fraction(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    fraction: np.ndarray = ((high << _HALF | low) >> np.uint64(11)) * 2.0**-53
    return fraction


def _words(seed: int, rows: np.ndarray, third: np.ndarray | int, stream: int) -> tuple[np.ndarray, ...]:
    """Philox4x32-10 (Salmon et al. 2011): four blocks of 32-bit words, held in uint64."""
    rows, third = np.broadcast_arrays(rows, np.uint64(third))
    c0, c1, c2, c3 = rows & _LOW, rows >> _HALF, third, np.full_like(third, stream)
    keys = seed & 0xFFFFFFFF, seed >> 32
    for turn in range(10):
        k0, k1 = (np.uint64((key + turn * step) & 0xFFFFFFFF) for key, step in zip(keys, _KEY_STEPS, strict=True))
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
    return c0, c1, c2, c3
