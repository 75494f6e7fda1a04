"""What surrounds the products of kernels/two_pass.py: elementwise kernels, one program per row of points or of means.

Rows are numbered i = 0 .. R - 1 inside a block of points, columns inside a chunk of K components. A logit is
`log w + gain (dot - alpha |m'|^2 / 2)` with x' = x - alpha c, m' = m - c, gain = alpha / std^2: it is formed in float64
from products of any precision, and it is the true one plus |x'|^2 / 2 std^2, the same for all components.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

HALF_LOG_2_PI = tl.constexpr(0.5 * math.log(2 * math.pi))
MINUS_INF = tl.constexpr(float("-inf"))


@triton.jit
def _piece(rest, ROUND: tl.constexpr):
    """The leading piece of float32 numbers: their bfloat16 part, or all of them."""
    if ROUND:
        rest = rest.to(tl.bfloat16).to(tl.float32)
    return rest


@triton.jit(do_not_specialize=["count", "rows", "d", "padded"])
def split_kernel(
    source_ptr, stride_n, stride_d, rows_ptr, count, center_ptr, shift_ptr, stride_shift,
    wide_ptr, tall_ptr, square_ptr, rows, d, padded,
    GATHER: tl.constexpr, CENTER: tl.constexpr, SHIFT: tl.constexpr, PIECES: tl.constexpr, ROUND: tl.constexpr,
    REVERSED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row i of source minus shift times center (shift 1 unless SHIFT), cut into pieces; rows from `count` on are zero.

    wide: (rows, PIECES padded), pieces beside each other, largest first unless REVERSED. tall: (PIECES rows, padded),
    pieces below each other, only if there are several. square: (rows,) squared norm of the sum of the pieces.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = i < count
    row = i
    if GATHER:
        row = tl.load(rows_ptr + i, mask=there, other=0)
    shift = tl.full((BLOCK_N,), 1.0, tl.float64)
    if SHIFT:
        shift = tl.load(shift_ptr + row * stride_shift, mask=there, other=0.0)
    square = tl.zeros((BLOCK_N,), tl.float64)
    for start in range(0, padded, BLOCK_D):
        offs = start + tl.arange(0, BLOCK_D).to(tl.int64)
        mask = there[:, None] & (offs < d)[None, :]
        source_ptrs = source_ptr + row[:, None] * stride_n + offs[None, :] * stride_d
        value = tl.load(source_ptrs, mask=mask, other=0.0).to(tl.float64)
        if CENTER:
            center = tl.load(center_ptr + offs, mask=offs < d, other=0.0)
            value = tl.where(mask, value - shift[:, None] * center[None, :], 0.0)
        rest = value.to(wide_ptr.dtype.element_ty)
        if ROUND:
            rest = value.to(tl.float32)
        square += tl.sum(rest.to(tl.float64) * rest.to(tl.float64), axis=1)
        mask = (i < rows)[:, None] & (offs < padded)[None, :]
        for part in tl.static_range(PIECES):
            piece = _piece(rest, ROUND)
            rest = rest - piece
            place = PIECES - 1 - part if REVERSED else part
            out = piece.to(wide_ptr.dtype.element_ty)
            tl.store(wide_ptr + (i * PIECES + place)[:, None] * padded + offs[None, :], out, mask=mask)
            if PIECES > 1 and not REVERSED:
                tl.store(tall_ptr + (part * rows + i)[:, None] * padded + offs[None, :], out, mask=mask)
    tl.store(square_ptr + i, square, mask=i < rows)


@triton.jit
def dots(dots_ptr, row, rows, offs, K, buffers):
    """Sum of the partial products (buffers, rows, K) of one row, float64."""
    total = tl.load(dots_ptr + row * K + offs, mask=offs < K, other=0.0).to(tl.float64)
    for buffer in range(1, buffers):
        total += tl.load(dots_ptr + (buffer * rows + row) * K + offs, mask=offs < K, other=0.0).to(tl.float64)
    return total


@triton.jit
def tile_logits(dots_ptr, row, rows, offs, buffers, log_weights_ptr, stride_w, square_ptr, count, gain, half, K):
    """Logits, scaled products and norms |m'| of one tile of a chunk; logit -inf past the last component."""
    there = offs < count
    log_w = tl.load(log_weights_ptr + offs * stride_w, mask=there, other=MINUS_INF).to(tl.float64)
    square = tl.load(square_ptr + offs, mask=there, other=0.0)
    scaled = gain * dots(dots_ptr, row, rows, offs, K, buffers)
    return log_w + (scaled - half * square), scaled, square


@triton.jit
def _store_pieces(out_ptr, row, offs, value, K, PIECES: tl.constexpr, ROUND: tl.constexpr):
    """Cut a tile of one row of (rows, PIECES K) into pieces, smallest first; returns what the pieces add up to."""
    total = tl.zeros_like(value)
    rest = value
    for part in tl.static_range(PIECES):
        piece = _piece(rest, ROUND)
        rest = rest - piece
        total += piece
        out = piece.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (row * PIECES + PIECES - 1 - part) * K + offs, out, mask=offs < K)
    return total


@triton.jit(do_not_specialize=["live", "stride_weights", "count", "rows", "buffers"])
def softmax_kernel(
    dots_ptr, log_weights_ptr, stride_w, square_ptr, rows_ptr, live, alpha_ptr, stride_a, std_ptr, stride_s,
    p_ptr, top_ptr, total_ptr, spread_ptr, along_ptr, scale_ptr, weights_ptr, stride_weights, chunk_top_ptr,
    count, rows, buffers, K,
    PRODUCT: tl.constexpr, WEIGHTS: tl.constexpr, PIECES: tl.constexpr, ROUND: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: exp(logit - running maximum) of row i < rows against one chunk, cut into pieces, and its sums.

    p: (rows, PIECES K), twice as many rows if PRODUCT, the second half multiplied by m' . direction. State, float64:
    top, the running maximum; total, the sum of p; spread, of p |m'|^2; along, of p m' . direction. scale: what older
    sums are multiplied by. weights: row by row, p relative to chunk_top (rows,). Rows from `live` on are padding.
    """
    i = tl.program_id(0).to(tl.int64)
    there = i < live
    row = tl.load(rows_ptr + i, mask=there, other=0)
    alpha = tl.load(alpha_ptr + row * stride_a)
    std = tl.load(std_ptr + row * stride_s)
    gain = alpha / (std * std)
    half = 0.5 * alpha * gain
    before = tl.load(top_ptr + i)
    dots_rows = rows * 2 if PRODUCT else rows
    top = before
    for start in range(0, count, BLOCK_K):
        offs = start + tl.arange(0, BLOCK_K)
        logits, _, _ = tile_logits(
            dots_ptr, i, dots_rows, offs, buffers, log_weights_ptr, stride_w, square_ptr, count, gain, half, K
        )
        top = tl.maximum(top, tl.max(logits, axis=0))
    shift = tl.where(top == MINUS_INF, 0.0, top)  # nothing seen yet: exp(-inf - 0) = 0
    old = tl.exp(before - shift)
    total = tl.zeros((), tl.float64)
    spread = tl.zeros((), tl.float64)
    along = tl.zeros((), tl.float64)
    for start in range(0, K, BLOCK_K):
        offs = start + tl.arange(0, BLOCK_K)
        logits, _, square = tile_logits(
            dots_ptr, i, dots_rows, offs, buffers, log_weights_ptr, stride_w, square_ptr, count, gain, half, K
        )
        p = tl.exp((logits - shift).to(dots_ptr.dtype.element_ty))
        p = _store_pieces(p_ptr, i, offs, p, K, PIECES, ROUND)
        total += tl.sum(p.to(tl.float64), axis=0)
        spread += tl.sum(p.to(tl.float64) * square, axis=0)
        if PRODUCT:
            pull = p * dots(dots_ptr, rows + i, dots_rows, offs, K, buffers).to(p.dtype)
            pull = _store_pieces(p_ptr, rows + i, offs, pull, K, PIECES, ROUND)
            along += tl.sum(pull.to(tl.float64), axis=0)
        if WEIGHTS:
            out = p.to(weights_ptr.dtype.element_ty)
            tl.store(weights_ptr + row * stride_weights + offs, out, mask=there & (offs < count))
    tl.store(top_ptr + i, top)
    tl.store(scale_ptr + i, old)
    tl.store(total_ptr + i, tl.load(total_ptr + i) * old + total)
    tl.store(spread_ptr + i, tl.load(spread_ptr + i) * old + spread)
    if PRODUCT:
        tl.store(along_ptr + i, tl.load(along_ptr + i) * old + along)
    if WEIGHTS:
        tl.store(chunk_top_ptr + i, shift)


@triton.jit(do_not_specialize=["rows", "padded", "buffers"])
def merge_kernel(acc_ptr, parts_ptr, scale_ptr, rows, padded, buffers, BLOCK_D: tl.constexpr):
    """acc = scale acc + sum of parts: acc (rows or 2 rows, padded), parts (buffers, like acc), scale (rows,)."""
    i = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    mask = offs < padded
    acc = tl.load(acc_ptr + i * padded + offs, mask=mask, other=0.0).to(tl.float64)
    acc *= tl.load(scale_ptr + i % rows)
    for buffer in range(0, buffers):
        part_ptrs = parts_ptr + (buffer * tl.num_programs(0) + i) * padded + offs
        acc += tl.load(part_ptrs, mask=mask, other=0.0).to(tl.float64)
    tl.store(acc_ptr + i * padded + offs, acc.to(acc_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "k", "d", "padded"])
def finish_kernel(
    x_ptr, stride_xn, stride_xd, direction_ptr, stride_vn, stride_vd, center_ptr, rows_ptr,
    alpha_ptr, stride_a, std_ptr, stride_s, acc_ptr, top_ptr, total_ptr, spread_ptr, along_ptr, chunk_top_ptr,
    log_density_ptr, score_ptr, mean_ptr, trace_ptr, weights_ptr, product_ptr, rows, k, d, padded, K,
    LOG_DENSITY: tl.constexpr, SCORE: tl.constexpr, MEAN: tl.constexpr, TRACE: tl.constexpr, WEIGHTS: tl.constexpr,
    PRODUCT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the outputs of row i from its sums; weights are brought from their chunk's maximum to the row's."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + i)
    alpha = tl.load(alpha_ptr + row * stride_a)
    std = tl.load(std_ptr + row * stride_s)
    top = tl.load(top_ptr + i)
    total = tl.load(total_ptr + i)
    total = tl.where(total > 0, total, float("nan"))  # of rows with no finite logit
    along = tl.load(along_ptr + i) / total
    gain = alpha / (std * std)
    x_square = tl.zeros((BLOCK_D,), tl.float64)
    mean_square = tl.zeros((BLOCK_D,), tl.float64)
    for start in range(0, d, BLOCK_D):
        offs = start + tl.arange(0, BLOCK_D).to(tl.int64)
        mask = offs < d
        x = tl.load(x_ptr + row * stride_xn + offs * stride_xd, mask=mask, other=0.0).to(tl.float64)
        center = tl.load(center_ptr + offs, mask=mask, other=0.0)
        away = x - alpha * center
        mean = tl.load(acc_ptr + i * padded + offs, mask=mask, other=0.0).to(tl.float64) / total
        x_square += away * away
        mean_square += mean * mean
        if SCORE:
            value = (alpha * mean - away) / (std * std)
            tl.store(score_ptr + row * d + offs, value.to(score_ptr.dtype.element_ty), mask=mask)
        if MEAN:
            tl.store(mean_ptr + row * d + offs, (center + mean).to(mean_ptr.dtype.element_ty), mask=mask)
        if PRODUCT:
            v_ptrs = direction_ptr + row * stride_vn + offs * stride_vd
            v = tl.load(v_ptrs, mask=mask, other=0.0).to(tl.float64)
            pull = tl.load(acc_ptr + (rows + i) * padded + offs, mask=mask, other=0.0).to(tl.float64) / total
            value = gain * gain * (pull - along * mean) - v / (std * std)
            tl.store(product_ptr + row * d + offs, value.to(product_ptr.dtype.element_ty), mask=mask)
    if LOG_DENSITY:
        value = top + tl.log(total) - tl.sum(x_square, axis=0) * 0.5 / (std * std) - d * (tl.log(std) + HALF_LOG_2_PI)
        tl.store(log_density_ptr + row, value.to(log_density_ptr.dtype.element_ty))
    if TRACE:
        value = tl.load(spread_ptr + i) / total - tl.sum(mean_square, axis=0)
        tl.store(trace_ptr + row, value.to(trace_ptr.dtype.element_ty))
    if WEIGHTS:
        for start in range(0, k, BLOCK_K):
            offs = start + tl.arange(0, BLOCK_K).to(tl.int64)
            chunk_top = tl.load(chunk_top_ptr + (offs // K) * rows + i, mask=offs < k, other=MINUS_INF)
            p = tl.load(weights_ptr + row * k + offs, mask=offs < k, other=0.0)
            gamma = p.to(tl.float64) * (tl.exp(chunk_top - top) / total)
            tl.store(weights_ptr + row * k + offs, gamma.to(weights_ptr.dtype.element_ty), mask=offs < k)
