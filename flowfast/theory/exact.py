"""Exact modules of ReLU and ReQU units: what Theorem 1 puts its network together from.

Each adds hidden layers to a blueprint. `carried` are units that take no part and go on beside the others: they are not
negative, so one ReLU unit each hands them on unchanged; every function returns them as units of the new latest layer.
Source: arXiv 2606.03820, section 4 and appendix A.
"""

from __future__ import annotations

import math

from flowfast.theory.channels import Blueprint, Channels, joined


def maximum(plan: Blueprint, z: Channels, carried: Channels) -> tuple[Channels, Channels]:
    """Largest of the channels z, by a tree of `max(a, b) = b + ReLU(a - b)`: ceil(log2 len(z)) layers.

    Of every pair b goes on as ReLU(b) - ReLU(-b), two units.

    Returns:
        The maximum, one channel, and the carried units.
    """
    while len(z) > 1:
        half = len(z) // 2
        first, rest = z[:half], z[half:]  # an odd one out goes on with the rest
        carried, plus, minus, over = plan.hidden([carried, rest, -rest, first - rest[:half]])
        rest = plus - minus
        z = joined([rest[:half] + over, rest[half:]])
    return z, carried


def exponential(
    plan: Blueprint, z: Channels, most: float, squarings: int, carried: Channels
) -> tuple[Channels, Channels]:
    """`exp(z - most)` for channels z of [0, most], in 2 + squarings layers; needs 2^squarings >= most.

    The Taylor polynomial of degree 4 at w = (z - most) / 2^squarings, a number of [-1, 0], is raised to the power
    2^squarings by repeated squaring. With g = 1 + w >= 0 it is exactly `((g^2 + 3)^2 + 8 g) / 24`: two ReQU units.
    Every intermediate number is positive, so squares keep their relative accuracy and one unit each is enough.

    Returns:
        The exponentials, too large by 16^-squarings at the most (see `exponential_squarings`), and the carried units.
    """
    scale = 2.0**-squarings
    g = z * scale + (1 - most * scale)
    carried, g, square = plan.hidden([carried, g], [g])
    carried, g, fourth = plan.hidden([carried, g], [square + 3.0])
    power = (fourth + g * 8.0) * (1 / 24)
    for _ in range(squarings):
        carried, power = plan.hidden([carried], [power])
    return power, carried


def exponential_squarings(most: float, error: float) -> int:
    """Squarings with which `exponential` is within `error` on [0, most]: 2^m >= max(most, 4) and 16^-m <= error.

    With u = most - z and m squarings, Taylor's remainder makes each factor too large by a relative u^5 e^(u / 2^m) /
    (120 * 32^m) at the most, hence the power by at most e^-u (e^q - 1) <= q e^(q - u), q = u^5 e^(u / 2^m) /
    (120 * 16^m). Where 2^m >= max(u, 4), q <= e u / 120 and the whole is below 0.6 * 16^-m.
    """
    return max(2, math.ceil(math.log2(most)), math.ceil(math.log(1 / error, 16)))


def product(plan: Blueprint, a: Channels, b: Channels, carried: Channels) -> tuple[Channels, Channels]:
    """Products a_i b_i of channels that are not negative, one layer: `((a + b)^2 - (a - b)^2) / 4`, three ReQU units.

    Rounding is that of the larger factor's square: factors of like size lose nothing.
    """
    carried, both, over, under = plan.hidden([carried], [a + b, a - b, b - a])
    return (both - over - under) * 0.25, carried


def reciprocal(plan: Blueprint, a: Channels, most: float, steps: int, carried: Channels) -> tuple[Channels, Channels]:
    """`sqrt(most) / a` for a channel a of [1, most], most >= 2, in 1 + steps layers.

    Newton's iteration y <- y (2 - a y) with its residual e = 1 - a y beside it: y <- y (1 + e), e <- e^2. A product and
    a square side by side take one layer instead of two. The start is the linear function of a whose residual is
    Chebyshev's polynomial of degree 2, within `start_residual` on all of [1, most]. In units of 1 / sqrt(most), y lies
    in [1 / sqrt(most), sqrt(most)], and its products are well balanced.

    Returns:
        The reciprocal, with relative error start_residual^(2^steps) at the most, and the carried units.
    """
    far, top = (most + 1) / (most - 1), start_residual(most)
    tau = a * (-2 / (most - 1)) + far  # [-1, 1]
    start = (tau + far) * (4 * top / (most - 1) * math.sqrt(most))  # (1 - residual) / a
    carried, y, plus, minus = plan.hidden([carried, start], [tau, -tau])
    residual = (plus + minus) * (2 * top) - top  # of either sign, from the next step on positive
    for step in range(steps):
        factor = residual + 1.0
        signs = [] if step == steps - 1 else [residual, -residual] if step == 0 else [residual]
        carried, both, over, under, *squares = plan.hidden([carried], [y + factor, y - factor, factor - y, *signs])
        y = (both - over - under) * 0.25
        residual = squares[0] + squares[1] if len(squares) == 2 else squares[0] if squares else residual
    return y, carried


def start_residual(most: float) -> float:
    """Largest |1 - a y| of the start of `reciprocal` on [1, most]: 1 / T_2((most + 1) / (most - 1))."""
    return 1 / (2 * ((most + 1) / (most - 1)) ** 2 - 1)


def reciprocal_steps(most: float, error: float) -> int:
    """Newton steps after which the relative error of `reciprocal` is at most `error` < 1."""
    return max(0, math.ceil(math.log2(math.log(error) / math.log(start_residual(most)))))
