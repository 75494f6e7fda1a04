"""Random numbers that depend on a seed, a row and a coordinate alone: Philox4x32-10 and the Box-Muller transform.

The definition, in plain torch, of what csrc/normals.hpp and kernels/random.py compute. The 64-bit key is the seed; the
counter of 128 bits is (row mod 2^32, row / 2^32, j / 4, what), and its block has four words of 32 bits:

    what = 0    four normals, of coordinates j, j + 1, j + 2, j + 3 with j a multiple of 4: words 0 and 1 make the first
                two, words 2 and 3 the others, sqrt(-2 log((w + 1/2) / 2^32)) times cosine and sine of 2 pi w' / 2^32
    what = 1    a uniform number with 52 bits, for j = 0: the high bits of words 0 and 1
    what = 2    two of them, for j = 0, from words 0 and 1 and from words 2 and 3: the times of a teacher set's row

Normals reach 6.7. Source: Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3 (2011).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)


def words(seed: int, rows: Tensor, quarters: Tensor, what: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words, int64 in [0, 2^32), of the shape to which rows and quarters (int64) broadcast.

    Args:
        seed: in [0, 2^64). rows: of 64 bits. quarters: j / 4, below 2^32. what: 0 for normals, 1 for a uniform number.
    """
    c0, c2 = torch.broadcast_tensors(rows & _WORD, quarters)
    c1, c3 = (rows >> 32 & _WORD).expand_as(c0), torch.full_like(c0, what)
    keys = [seed & _WORD, seed >> 32]
    for _ in range(10):
        one, two = c0 * _FACTORS[0], c2 * _FACTORS[1]  # of 64 bits: the sign is one of them
        c0, c1 = (two >> 32 & _WORD) ^ c1 ^ keys[0], two & _WORD
        c2, c3 = (one >> 32 & _WORD) ^ c3 ^ keys[1], one & _WORD
        keys = [(key + step) & _WORD for key, step in zip(keys, _STEPS, strict=True)]
    return c0, c1, c2, c3


def uniforms(seed: int, rows: Tensor) -> Tensor:
    """One number of [0, 1) per row, float64, a multiple of 2^-52."""
    first, second, _, _ = words(seed, rows, torch.zeros_like(rows), 1)
    return _fraction(first, second)


def uniform_pairs(seed: int, rows: Tensor) -> Tensor:
    """Two numbers of [0, 1) per row, (n, 2) float64, multiples of 2^-52, unrelated to `uniforms`."""
    first, second, third, fourth = words(seed, rows, torch.zeros_like(rows), 2)
    return torch.stack([_fraction(first, second), _fraction(third, fourth)], -1)


def _fraction(high: Tensor, low: Tensor) -> Tensor:
    return (high << 20 | low >> 12).double() * 2.0**-52


def normals(seed: int, rows: Tensor, d: int) -> Tensor:
    """Normals of coordinates 0, ..., d - 1 of the rows (n,): (n, d), float64, relative error <= 8 eps."""
    quarters = torch.arange(-(-d // 4), device=rows.device)
    four = words(seed, rows[:, None], quarters, 0)
    pairs = [normal_pair(four[i], four[i + 1]) for i in (0, 2)]
    return torch.stack([*pairs[0], *pairs[1]], -1).flatten(1)[:, :d]


def normal_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent normals, float64, from two words."""
    radius = (-2 * ((first.double() + 0.5) * 2.0**-32).log()).sqrt()
    quarter = (second + 2**29) >> 30  # the nearest axis, from which the angle is taken: small ones stay exact
    angle = (second - (quarter << 30)).double() * (math.pi * 2.0**-31)
    cosine, sine = angle.cos(), angle.sin()
    turned, opposite = quarter & 1 != 0, quarter & 2 != 0
    across, up = torch.where(turned, -sine, cosine), torch.where(turned, cosine, sine)
    sign = torch.where(opposite, -radius, radius)
    return sign * across, sign * up
