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
    """Sum over the last axis of (BLOCK_N, BLOCK_K, BLOCK_D) numbers high + low, as accurate as twice the precision.

    The interpreter runs custom reductions element by element: it adds halves instead (EMULATE), which compiled would
    take a change of layout, and registers, at every step.
    """
    if EMULATE:
        for i in tl.static_range(LOG_D):
            h0, h1 = tl.split(tl.reshape(high, (BLOCK_N, BLOCK_K, BLOCK_D >> (i + 1), 2)))
            l0, l1 = tl.split(tl.reshape(low, (BLOCK_N, BLOCK_K, BLOCK_D >> (i + 1), 2)))
            high, low = _add_pairs(h0, l0, h1, l1)
        return tl.reshape(high + low, (BLOCK_N, BLOCK_K))
    high, low = tl.reduce((high, low), 2, _add_pairs)
    return high + low


@triton.jit
def row_logits(
    x, m, log_w, lead_m, lead_w, alpha, std,
    REFINE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    LOG_D: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Logits of a tile of means (n, k), relative to the leading component when REFINE, and x - alpha m (n, k, d)."""
    x = x[:, None, :]
    m = m[None, :, :]
    if REFINE:
        scale = tl.broadcast_to(alpha[:, None, None], (BLOCK_N, BLOCK_K, BLOCK_D))
        product, product_error = two_product(scale, m)
        away = (x - product) - product_error
        gap, gap_error = two_sum(lead_m[:, None, :], -m)
        pair, pair_error = two_sum(lead_m[:, None, :], m)
        product, product_error = two_product(scale, pair)
        middle, middle_error = two_sum(2 * x, -product)
        middle_error = middle_error - product_error - scale * pair_error
        high, low = two_product(gap, middle)
        low = low + gap * middle_error + gap_error * middle
        farther = sum_pairs(high, low, BLOCK_N, BLOCK_K, BLOCK_D, LOG_D, EMULATE) / std[:, None]
        logits = (log_w[None, :] - lead_w[:, None]) - farther * (0.5 * alpha / std)[:, None]
    else:
        near = alpha.to(x.dtype)
        rest = (alpha - near).to(x.dtype)
        away = tl.fma(-rest[:, None, None], m, tl.fma(-near[:, None, None], m, x))
        logits = log_w[None, :] - tl.sum(away * away, axis=2) * (0.5 / (std * std)).to(x.dtype)[:, None]
    return logits, away


@triton.jit
def squares(x, lead_m, alpha, std, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """|x - alpha m|^2 / 2 std^2 of the leading component, coordinate by coordinate (n, d)."""
    product, product_error = two_product(tl.broadcast_to(alpha[:, None], (BLOCK_N, BLOCK_D)), lead_m)
    away = ((x - product) - product_error) / std[:, None]
    return 0.5 * away * away
