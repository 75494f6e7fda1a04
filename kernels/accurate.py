"""Error-free transformations, arithmetic whose rounding error is computed too, for float64 operands; logits made of it.

Written without fused multiply-add, so that the interpreter, which has none, gives the same digits as a GPU; a compiler
that fuses some of the products changes nothing but the last bit of the error term.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def two_sum(a, b):
    """a + b = s + e exactly."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


@triton.jit
def _halves(a):
    c = a * 134217729.0  # 2^27 + 1: both parts have at most 26 bits, and products of parts are exact
    high = c - (c - a)
    return high, a - high


@triton.jit
def two_product(a, b):
    """a * b = p + e exactly, for |a|, |b| < 2^996."""
    p = a * b
    ah, al = _halves(a)
    bh, bl = _halves(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


@triton.jit
def _add_pairs(a_high, a_low, b_high, b_low):
    high, error = two_sum(a_high, b_high)
    return high, (a_low + b_low) + error


@triton.jit
def sum_pairs(
    high, low,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, LOG_D: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Sum over the last axis of (BLOCK_N, BLOCK_K, BLOCK_D) numbers high + low, again as high + low.

    The interpreter runs custom reductions element by element: it adds halves instead (EMULATE), which compiled would
    take a change of layout, and registers, at every step.
    """
    if EMULATE:
        for i in tl.static_range(LOG_D):
            h0, h1 = tl.split(tl.reshape(high, (BLOCK_N, BLOCK_K, BLOCK_D >> (i + 1), 2)))
            l0, l1 = tl.split(tl.reshape(low, (BLOCK_N, BLOCK_K, BLOCK_D >> (i + 1), 2)))
            high, low = _add_pairs(h0, l0, h1, l1)
        return tl.reshape(high, (BLOCK_N, BLOCK_K)), tl.reshape(low, (BLOCK_N, BLOCK_K))
    return tl.reduce((high, low), 2, _add_pairs)


@triton.jit
def farther(
    x, m, lead_m, alpha,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, LOG_D: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """|x - alpha m|^2 - |x - alpha m_a|^2 over alpha, (n, k), as high + low.

    It is the sum of (m_a - m) (2x - alpha (m_a + m)). x, lead_m (BLOCK_N, BLOCK_D), m (BLOCK_K, BLOCK_D) and alpha
    (BLOCK_N,) are float64.
    """
    scale = tl.broadcast_to(alpha[:, None, None], (BLOCK_N, BLOCK_K, BLOCK_D))
    gap, gap_error = two_sum(lead_m[:, None, :], -m[None, :, :])
    pair, pair_error = two_sum(lead_m[:, None, :], m[None, :, :])
    product, product_error = two_product(scale, pair)
    middle, middle_error = two_sum(2 * x[:, None, :], -product)
    middle_error = middle_error - product_error - scale * pair_error
    high, low = two_product(gap, middle)
    low = low + gap * middle_error + gap_error * middle
    return sum_pairs(high, low, BLOCK_N, BLOCK_K, BLOCK_D, LOG_D, EMULATE)


@triton.jit
def difference(x, m, alpha, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """x - alpha m, (BLOCK_N, BLOCK_D), float64; the product is not rounded."""
    product, error = two_product(tl.broadcast_to(alpha[:, None], (BLOCK_N, BLOCK_D)), m)
    return (x - product) - error
