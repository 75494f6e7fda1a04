"""Two forms of the flow dz/du = a z + b mubar(c z, r) on a tile of trajectories; the integrators know neither.

    full: the state is z (BLOCK_N, BLOCK_D), a slope is mubar (BLOCK_N, BLOCK_D).
    span: a slope is gamma (BLOCK_N, BLOCK_K); with z = phi z_0 + sum_k c_k means_k the state is the pair of
          z . means_k and c_k, each (BLOCK_N, BLOCK_K), and an evaluation is a product with the Gram matrix.

Products run on tensor cores. A float32 number is two TF32 pieces of 11 bits, and a product is three of pieces: what is
left out is below 2^-22, and the interpreter computes the same pieces. Tiles are so small (BLOCK_N < 64 or fewer than
four warps) that the compiler takes mma.sync, never WGMMA with operands in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .random import normals

LOG2E = tl.constexpr(1.4426950408889634)
MINUS_INF = tl.constexpr(float("-inf"))

# Rows of `ends` as the kernels have it, (7,) or (7, n): z = (x - ALPHA center) RATE at the start, and at the end
# x = KEEP x_0 + STD (z - phi z_0) + SHIFT center, where KEEP = 0 in the full form.
R_FROM, R_TO, ALPHA, RATE, KEEP, STD, SHIFT = (tl.constexpr(i) for i in range(7))


@triton.jit
def pieces(a):
    """a = high + low, high of 11 bits (float32)."""
    bits = a.to(tl.int32, bitcast=True)
    high = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, a - high


@triton.jit
def product(a, b, b_low, acc):
    """acc + a @ b, where b comes in pieces b + b_low if it is float32."""
    if a.dtype == tl.float64:
        return tl.dot(a, b, acc, out_dtype=tl.float64)
    else:
        high, low = pieces(a)
        acc = tl.dot(low, b, acc, input_precision="tf32")
        acc = tl.dot(high, b_low, acc, input_precision="tf32")
        return tl.dot(high, b, acc, input_precision="tf32")


@triton.jit
def tile(high_ptr, low_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A packed tile (ROWS, COLUMNS) in pieces; of float64 both pieces are the number itself, read once."""
    offsets = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    high = tl.load(tl.multiple_of(high_ptr + offsets, (4, 16)))  # rows are multiples of 16 bytes: wide loads
    low = high
    if high.dtype == tl.float32:
        low = tl.load(tl.multiple_of(low_ptr + offsets, (4, 16)))
    return high, low


@triton.jit
def end(ends_ptr, WHICH: tl.constexpr, begin, n, PER_ROW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row WHICH of `ends` for the rows of a tile, float64 (BLOCK_N,)."""
    if PER_ROW:
        offs_n = tl.arange(0, BLOCK_N)
        return tl.load(ends_ptr + WHICH * n.to(tl.int64) + begin + offs_n, mask=offs_n < n - begin, other=0.0)
    else:
        return tl.load(ends_ptr + WHICH) + tl.zeros((BLOCK_N,), tl.float64)


@triton.jit
def start(
    rows, begin, n, first, d,
    DRAW: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Points x (BLOCK_N, BLOCK_D) as float64, coordinates from `first` on: read, or normals of their own."""
    x_ptr, stride_xn, stride_xd, seed, first_row = rows
    offs_n = begin + tl.arange(0, BLOCK_N)
    offs_d = first + tl.arange(0, BLOCK_D).to(tl.int64)
    if DRAW:
        x = normals(seed, first_row + offs_n, offs_d, DTYPE)
    else:
        mask = (offs_n < n)[:, None] & (offs_d < d)[None, :]
        x = tl.load(x_ptr + offs_n[:, None] * stride_xn + offs_d[None, :] * stride_xd, mask=mask, other=0.0)
    return x.to(tl.float64)


@triton.jit
def enter(
    rows, begin, n, d, ends_ptr, center_ptr, mixture,
    SPAN: tl.constexpr, PER_ROW: tl.constexpr, DRAW: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The state of z = x / s_from - r_from center, and |z|^2 (BLOCK_N,)."""
    means_ptr, means_low_ptr, gram_ptr, gram_low_ptr, half_norms_ptr, log_weights_ptr = mixture
    alpha = end(ends_ptr, ALPHA, begin, n, PER_ROW, BLOCK_N)
    rate = end(ends_ptr, RATE, begin, n, PER_ROW, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    state = tl.zeros((BLOCK_N, BLOCK_K if SPAN else BLOCK_D), DTYPE)
    size2 = tl.zeros((BLOCK_N,), DTYPE)
    for first in range(0, d, BLOCK_D):
        x = start(rows, begin, n, first, d, DRAW, DTYPE, BLOCK_N, BLOCK_D)
        center = tl.load(center_ptr + first + offs_d)
        z = ((x - alpha[:, None] * center[None, :]) * rate[:, None]).to(DTYPE)
        z = tl.where((offs_d < d - first)[None, :], z, 0.0)  # numbers are drawn beyond the last coordinate too
        size2 += tl.sum(z * z, axis=1)
        if SPAN:
            m, m_low = tile(means_ptr, means_low_ptr, BLOCK_K, BLOCK_D)
            means_ptr += BLOCK_K * BLOCK_D
            means_low_ptr += BLOCK_K * BLOCK_D
            state = product(z, tl.trans(m), tl.trans(m_low), state)
        else:
            state = z
    return state, size2


@triton.jit
def moved(state, step, mixture, SPAN: tl.constexpr, BLOCK_K: tl.constexpr):
    """The state z + step, for a step that is a sum of slopes."""
    if SPAN:
        g, g_low = tile(mixture[2], mixture[3], BLOCK_K, BLOCK_K)
        return product(step, g, g_low, state)
    else:
        return state + step


@triton.jit
def slope(state, gain, ratio, mixture, k, SPAN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """mubar or its weights gamma for logits gain (z . means - ratio |means|^2 / 2) + prior in units of ln 2."""
    means_ptr, means_low_ptr, gram_ptr, gram_low_ptr, half_norms_ptr, log_weights_ptr = mixture
    offs_k = tl.arange(0, BLOCK_K)
    if SPAN:
        half_norms = tl.load(half_norms_ptr + offs_k)
        logits = gain * (state - ratio * half_norms[None, :]) + tl.load(log_weights_ptr + offs_k)[None, :]
        p = tl.exp2(logits - tl.max(logits, axis=1)[:, None])
        return p * (1.0 / tl.sum(p, axis=1))[:, None]
    else:
        m_i = tl.full((state.shape[0],), MINUS_INF, state.dtype)
        l_i = tl.zeros((state.shape[0],), state.dtype)
        acc = tl.zeros(state.shape, state.dtype)
        for first in range(0, k, BLOCK_K):
            m, m_low = tile(means_ptr, means_low_ptr, BLOCK_K, BLOCK_D)
            means_ptr += BLOCK_K * BLOCK_D
            means_low_ptr += BLOCK_K * BLOCK_D
            half_norms = tl.load(half_norms_ptr + first + offs_k)
            prior = tl.load(log_weights_ptr + first + offs_k)
            dots = tl.zeros((state.shape[0], BLOCK_K), state.dtype)
            dots = product(state, tl.trans(m), tl.trans(m_low), dots)
            logits = gain * (dots - ratio * half_norms[None, :]) + prior[None, :]
            m_new = tl.maximum(m_i, tl.max(logits, axis=1))
            shift = tl.where(m_new == MINUS_INF, 0.0, m_new)  # nothing seen yet: exp2(-inf - 0) = 0
            p = tl.exp2(logits - shift[:, None])
            old = tl.exp2(m_i - shift)
            l_i = l_i * old + tl.sum(p, axis=1)
            acc = product(p, m, m_low, acc * old[:, None])
            m_i = m_new
        return acc * (1.0 / l_i)[:, None]


@triton.jit
def leave(
    leaving, dead, rows, begin, n, d, ends_ptr, center_ptr, mixture, out_ptr,
    SPAN: tl.constexpr, PER_ROW: tl.constexpr, DRAW: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store s_to (z + r_to center), or NaN where dead; z is `leaving`, or phi z_0 + leaving @ means in the span form.

    Returns:
        Whether every number of a row is finite.
    """
    means_ptr, means_low_ptr, gram_ptr, gram_low_ptr, half_norms_ptr, log_weights_ptr = mixture
    finite = tl.full((BLOCK_N,), 1, tl.int1)
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    for first in range(0, d, BLOCK_D):
        center = tl.load(center_ptr + first + offs_d)
        value = end(ends_ptr, SHIFT, begin, n, PER_ROW, BLOCK_N)[:, None] * center[None, :]
        z = leaving
        if SPAN:
            m, m_low = tile(means_ptr, means_low_ptr, BLOCK_K, BLOCK_D)
            means_ptr += BLOCK_K * BLOCK_D
            means_low_ptr += BLOCK_K * BLOCK_D
            z = product(leaving, m, m_low, tl.zeros((BLOCK_N, BLOCK_D), DTYPE))
            x = start(rows, begin, n, first, d, DRAW, DTYPE, BLOCK_N, BLOCK_D)
            value += end(ends_ptr, KEEP, begin, n, PER_ROW, BLOCK_N)[:, None] * x
        value += end(ends_ptr, STD, begin, n, PER_ROW, BLOCK_N)[:, None] * z.to(tl.float64)
        value = tl.where(dead[:, None], float("nan"), value).to(DTYPE)
        there = (offs_d < d - first)[None, :]
        finite = finite & (tl.min(tl.where((value - value == 0) | (there == 0), 1, 0), axis=1) > 0)
        to_ptr = out_ptr + begin * d + first
        mask = (offs_n < n - begin)[:, None] & there
        tl.store(to_ptr + offs_n[:, None] * d + offs_d[None, :], value, mask=mask)
    return finite
