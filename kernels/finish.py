"""What products on tensor cores leave open: sums of the splits, the leading component exactly, and who is doubtful.

Every row gets a bound on the error of its logits, in units u = 2^-24, with rho = |alpha| R / std, R the largest
|m - c|, y = (x - alpha c) / std and q = |y|_4 |alpha| R_4 / std (|.|_4 the norm of fourth powers):

    reach = min(|y| rho, |top| + rho^2 / 2 + W + 4 q)               partial sums of y . m; W spans the log-weights
    error = (2 sqrt(BLOCK_D / 16) + 4) reach + 2 rho^2 + 16         six products
          + 256 q + 128 min(|y| rho, |top| + rho^2 / 2 + W)          three products

The first term is an addition of BLOCK_D / 16 truncated sums per product, the last what three products leave out. Both
are probabilistic: they take the coordinates' roundings as independent of one another (4 q is four standard deviations
of a sum with random signs), as csrc/posterior.hpp does; a worst-case bound would doubt nearly every row.

A row is decided if error <= A (1 + rho), A = 128 for six products and 2048 for three, and no output is a difference of
nearly equal numbers; it has collapsed if no component lies within 2 error u + ln k + 17.3 of the leading one, and then
it is that component's, to the last bit. Every other row, and every non-finite one, is marked in `flags`.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

HALF_LOG_2_PI = tl.constexpr(0.5 * math.log(2 * math.pi))
LN_2 = tl.constexpr(math.log(2))
MINUS_INF = tl.constexpr(float("-inf"))
UNIT = tl.constexpr(2.0**-24)


@triton.jit
def _join(top_ptr, acc_ptr, base, offs_n, offs_d, mask, rows, splits, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sum of p m over the splits, (BLOCK_N, BLOCK_D), with p relative to exp2(base)."""
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for split in range(splits):
        place = split * rows.to(tl.int64) + offs_n
        scale = tl.exp2(tl.load(top_ptr + place, mask=mask, other=0.0) - base)
        acc_ptrs = acc_ptr + place[:, None] * BLOCK_D + offs_d[None, :]
        acc += scale[:, None] * tl.load(acc_ptrs, mask=mask[:, None], other=0.0)
    return acc


@triton.jit(do_not_specialize=["n", "rows", "k", "d", "splits"])
def finish_kernel(
    x_ptr, stride_xn, stride_xd, direction_ptr, stride_vn, stride_vd, means_ptr, stride_mk, stride_md,
    log_weights_ptr, stride_w, center_ptr, alpha_ptr, stride_a, std_ptr, stride_s, sizes_ptr, limits_ptr,
    top_ptr, second_ptr, lead_ptr, sum_ptr, half_ptr, acc_ptr, pull_top_ptr, pull_ptr,
    log_density_ptr, score_ptr, mean_ptr, trace_ptr, product_ptr, softmax_ptr, flags_ptr, n, rows, k, d, splits,
    LOG_DENSITY: tl.constexpr, SCORE: tl.constexpr, MEAN: tl.constexpr, TRACE: tl.constexpr, WEIGHTS: tl.constexpr,
    PRODUCT: tl.constexpr, TERMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows, from the partial sums (splits, rows, ...) of products_kernel to outputs and flags."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask = offs_n < n
    inside = offs_d < d
    nd_mask = mask[:, None] & inside[None, :]
    m_i = tl.full((BLOCK_N,), MINUS_INF, tl.float32)
    second = tl.full((BLOCK_N,), MINUS_INF, tl.float32)
    lead = tl.zeros((BLOCK_N,), tl.int32)
    for split in range(splits):
        place = split * rows.to(tl.int64) + offs_n
        top = tl.load(top_ptr + place, mask=mask, other=0.0)
        below = tl.load(second_ptr + place, mask=mask, other=0.0)
        second = tl.maximum(tl.maximum(second, below), tl.minimum(m_i, top))
        lead = tl.where(top > m_i, tl.load(lead_ptr + place, mask=mask, other=0), lead)
        m_i = tl.maximum(m_i, top)
    base = tl.where(m_i == MINUS_INF, 0.0, m_i)
    l_i = tl.zeros((BLOCK_N,), tl.float32)
    half = tl.zeros((BLOCK_N,), tl.float32)  # sum of p |m|^2 / 2
    for split in range(splits):
        place = split * rows.to(tl.int64) + offs_n
        scale = tl.exp2(tl.load(top_ptr + place, mask=mask, other=0.0) - base)
        l_i += scale * tl.load(sum_ptr + place, mask=mask, other=0.0)
        if TRACE or PRODUCT:
            half += scale * tl.load(half_ptr + place, mask=mask, other=0.0)

    alpha = tl.load(alpha_ptr + offs_n * stride_a, mask=mask, other=0.0)
    std = tl.load(std_ptr + offs_n * stride_s, mask=mask, other=1.0)
    ratio = tl.abs(alpha / std)
    xi = tl.load(sizes_ptr + offs_n, mask=mask, other=0.0).to(tl.float64)
    radius = tl.load(limits_ptr).to(tl.float64)
    rho = ratio * radius
    fourth = tl.load(sizes_ptr + rows + offs_n, mask=mask, other=0.0).to(tl.float64)
    quartic = fourth * ratio * tl.load(limits_ptr + 1).to(tl.float64)
    room = 1 + ratio * tl.minimum(radius, tl.load(limits_ptr + 2).to(tl.float64))
    steps = 2 * (BLOCK_D / 16) ** 0.5 + 4
    total = tl.abs(m_i).to(tl.float64) * LN_2 + 0.5 * rho * rho + tl.load(limits_ptr + 3).to(tl.float64)
    error = steps * tl.minimum(xi * rho, total + 4 * quartic) + 2 * rho * rho + 16
    average = 12 + 0.125 * tl.sqrt(k.to(tl.float32))  # error of sum p m / sum p, in units of u R
    most = 128 * room
    if TERMS == 3:
        error += 256 * quartic + 128 * tl.minimum(xi * rho, total)
        average += 192
        most = 2048 * room
    gap = (m_i - second).to(tl.float64) * LN_2
    collapsed = gap > error * 2 * UNIT + tl.log(k.to(tl.float32)) + 17.3
    decided = error <= most

    lead_ptrs = means_ptr + lead[:, None].to(tl.int64) * stride_mk + offs_d[None, :].to(tl.int64) * stride_md
    lead_m = tl.load(lead_ptrs, mask=inside[None, :], other=0.0).to(tl.float64)
    x_ptrs = x_ptr + offs_n[:, None] * stride_xn + offs_d[None, :].to(tl.int64) * stride_xd
    x = tl.load(x_ptrs, mask=nd_mask, other=0.0).to(tl.float64)
    away = (x - alpha[:, None] * lead_m) / std[:, None]
    if SCORE or MEAN or TRACE or PRODUCT:
        acc = _join(top_ptr, acc_ptr, base, offs_n, offs_d, mask, rows, splits, BLOCK_N, BLOCK_D)
        center = tl.load(center_ptr + offs_d, mask=inside, other=0.0).to(tl.float64)
        mean = (acc / l_i[:, None]).to(tl.float64)
        rest = tl.where(collapsed[:, None], 0.0, mean - (lead_m - center[None, :]))
    if TRACE or PRODUCT:
        trace = 2 * (half / l_i).to(tl.float64) - tl.sum(mean * mean, axis=1)
        trace = tl.where(collapsed, 0.0, tl.maximum(trace, 0.0))
    offs_nd = offs_n[:, None] * d + offs_d[None, :]
    if LOG_DENSITY:
        log_w = tl.load(log_weights_ptr + lead.to(tl.int64) * stride_w).to(tl.float64)
        value = log_w + tl.log(l_i).to(tl.float64) - 0.5 * tl.sum(away * away, axis=1)
        value -= d * (tl.log(std) + HALF_LOG_2_PI)
        tl.store(log_density_ptr + offs_n, value.to(tl.float32), mask=mask)
    if SCORE:
        value = (alpha / std)[:, None] * rest - away
        size = tl.sqrt(tl.sum(value * value, axis=1))
        decided = decided & (average * rho <= most * size)
        tl.store(score_ptr + offs_nd, (value / std[:, None]).to(tl.float32), mask=nd_mask)
    if MEAN:
        tl.store(mean_ptr + offs_nd, (lead_m + rest).to(tl.float32), mask=nd_mask)
    if TRACE:
        decided = decided & (2 * average * rho * rho <= most * (1 + ratio * ratio * trace))
        tl.store(trace_ptr + offs_n, trace.to(tl.float32), mask=mask)
    if PRODUCT:
        pull = _join(pull_top_ptr, pull_ptr, base, offs_n, offs_d, mask, rows, splits, BLOCK_N, BLOCK_D)
        v_ptrs = direction_ptr + offs_n[:, None] * stride_vn + offs_d[None, :].to(tl.int64) * stride_vd
        v = tl.load(v_ptrs, mask=nd_mask, other=0.0).to(tl.float64)
        value = (pull / l_i[:, None]).to(tl.float64) - tl.sum(mean * v, axis=1)[:, None] * mean
        value = tl.where(collapsed[:, None], 0.0, value)
        gain = alpha / (std * std)
        value = value * (gain * gain)[:, None] - v / (std * std)[:, None]
        decided = decided & ((2 * average + steps) * rho * rho <= most * (1 + ratio * ratio * trace))
        tl.store(product_ptr + offs_nd, value.to(tl.float32), mask=nd_mask)
    if WEIGHTS:
        tl.store(softmax_ptr + offs_n, m_i, mask=mask)
        tl.store(softmax_ptr + rows + offs_n, l_i, mask=mask)
    # Written so that anything non-finite is doubtful; beyond 1e36 products of float32 could overflow.
    sure = (collapsed | decided) & (l_i > 0.5) & (xi < 1e36)
    sure = sure & ((xi + rho) * rho < 1e36) & ((xi + radius) * radius < 1e36)
    tl.store(flags_ptr + offs_n, (sure == 0).to(tl.int8), mask=mask)
