"""Dot products far more accurate than float64, by matrix products of split operands.

Each operand is cut into slices of so few bits that every product of two slices is summed without rounding; the sums
are then added as an unevaluated pair high + low. The idea is Ozaki's (Numerical Algorithms 59, 2012); the pair
arithmetic is Dekker's and Knuth's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SLICES = 4  # of at least 20 bits each (d <= 8192): relative error below 2^-78 of |x| |y|


class Pair(NamedTuple):
    """The unevaluated sum `high + low`, |low| at most half a unit in the last place of high."""

    high: Tensor
    low: Tensor

    def value(self) -> Tensor:
        """The sum, rounded."""
        return self.high + self.low

    def minus(self, other: Pair) -> Pair:
        """The difference of two pairs."""
        high, low = _two_sum(self.high, -other.high)
        return Pair(*_two_sum(high, low + (self.low - other.low)))

    def minus_column(self, column: Tensor) -> Pair:
        """Subtract from every row (n, k) its entry at `column` (n,)."""
        index = column[:, None]
        return self.minus(Pair(self.high.gather(1, index), self.low.gather(1, index)))


def split_dot(x: Tensor, y: Tensor, *, diagonal: bool = False) -> Pair:
    """Dot products of the rows of x (n, d) and of y (k, d), float64: (n, k); with `diagonal`, of equal rows: (n,)."""
    bits = (53 - math.ceil(math.log2(max(2, x.shape[1])))) // 2
    total: Pair | None = None
    slices_x, slices_y = _slices(x, bits), _slices(y, bits)
    for order in range(SLICES):
        for i in range(order + 1):
            a, b = slices_x[i], slices_y[order - i]
            part = (a * b).sum(1) if diagonal else a @ b.T
            if total is None:
                total = Pair(part, torch.zeros_like(part))
            else:
                high, low = _two_sum(total.high, part)
                total = Pair(high, total.low + low)
    if total is None:
        raise ValueError("split_dot needs at least one slice")
    return Pair(*_two_sum(total.high, total.low))


def split_distance(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances between the rows of x (n, d) and of y (k, d), float64: (n, k), also for near-equal rows."""
    ends = [split_dot(points, points, diagonal=True) for points in (x, y)]
    square = Pair(*(part[:, None] for part in ends[0])).minus(Pair(*(-part for part in ends[1])))
    cross = split_dot(x, y)
    return square.minus(Pair(2 * cross.high, 2 * cross.low)).value().clamp(min=0)


def product(pair: Pair, factor: Tensor) -> Pair:
    """A pair times a plain float64 tensor."""
    high = pair.high * factor
    low = _product_error(pair.high, factor, high) + pair.low * factor
    return Pair(*_two_sum(high, low))


def _slices(x: Tensor, bits: int) -> list[Tensor]:
    """Cut x (n, d) into SLICES summands of `bits` bits below the largest entry of each row."""
    largest = x.abs().amax(1, keepdim=True)
    unit = torch.exp2(torch.ceil(torch.log2(largest.where(largest > 0, 1.0))))  # power of two >= largest
    slices = []
    for _ in range(SLICES):
        unit = unit * 2.0**-bits
        anchor = 0.75 * 2.0**53 * unit  # adding and subtracting it rounds to a multiple of unit
        piece = (x + anchor) - anchor
        slices.append(piece)
        x = x - piece
    return slices


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _product_error(a: Tensor, b: Tensor, rounded: Tensor) -> Tensor:
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    return ((a_high * b_high - rounded) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(a: Tensor) -> tuple[Tensor, Tensor]:
    big = a * 134217729.0  # 2^27 + 1
    high = big - (big - a)
    return high, a - high
