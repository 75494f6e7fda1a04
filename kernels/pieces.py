"""Numbers as sums of bf16 pieces, which tensor cores multiply exactly and add in float32.

Three pieces of 8 bits hold a float32: |a - a_0 - a_1 - a_2| <= 2^-26 |a|. Six products of pieces (0.0, 0.1, 1.0, 1.1,
0.2, 2.0) leave out at most 2^-23 |a b|; the three of the first two pieces (0.0, 0.1, 1.0) at most 2^-15 |a b|, and
about an eighth of it as a rule. bench/split_model.py measures both.

    pieces  (3, rows, BLOCK_D)  bf16; rows and columns beyond the data are zero
    sizes   (5, rows)           float32: |y|, (sum y^4)^(1/4), |x|, |y|^2 / 2 and alpha / std of every row

The interpreter multiplies bf16 wrongly and truncates where it should round: there pieces are float32 numbers that have
been rounded to 8 bits (EMULATE).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def round_piece(value, EMULATE: tl.constexpr):
    """The nearest number of 8 bits to every float32 value, in the dtype of pieces."""
    if EMULATE:
        wide = value * 65537.0  # 2^16 + 1 (Veltkamp): the upper 8 of 24 bits
        return wide - (wide - value)
    return value.to(tl.bfloat16)


@triton.jit
def three_pieces(value, EMULATE: tl.constexpr):
    """Float32 values as three pieces."""
    high = round_piece(value, EMULATE)
    rest = value - high.to(tl.float32)
    mid = round_piece(rest, EMULATE)
    return high, mid, round_piece(rest - mid.to(tl.float32), EMULATE)


@triton.jit
def product(a0, a1, a2, b0, b1, b2, total, TERMS: tl.constexpr):
    """total + a @ b of matrices in pieces, (m, n) float32; the small products are added first."""
    if TERMS == 6:
        total = tl.dot(a2, b0, total)
        total = tl.dot(a0, b2, total)
        total = tl.dot(a1, b1, total)
    total = tl.dot(a1, b0, total)
    total = tl.dot(a0, b1, total)
    return tl.dot(a0, b0, total)


@triton.jit(do_not_specialize=["n", "rows", "d"])
def pieces_kernel(
    x_ptr, stride_xn, stride_xd, center_ptr, alpha_ptr, stride_a, std_ptr, stride_s, pieces_ptr, sizes_ptr, n, rows, d,
    EMULATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: pieces and sizes of BLOCK_N rows of y = (x - alpha center) / std, formed in float64."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    there = offs_n < n
    mask = there[:, None] & (offs_d < d)[None, :]
    x_ptrs = x_ptr + offs_n[:, None] * stride_xn + offs_d[None, :].to(tl.int64) * stride_xd
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float64)
    center = tl.load(center_ptr + offs_d, mask=offs_d < d, other=0.0).to(tl.float64)
    alpha = tl.load(alpha_ptr + offs_n * stride_a, mask=there, other=0.0)
    std = tl.load(std_ptr + offs_n * stride_s, mask=there, other=1.0)
    y = tl.where(mask, (x - alpha[:, None] * center[None, :]) / std[:, None], 0.0)
    square = y * y
    size_ptrs = sizes_ptr + offs_n
    inside = offs_n < rows
    half = 0.5 * tl.sum(square, axis=1)
    tl.store(size_ptrs, tl.sqrt(2 * half).to(tl.float32), mask=inside)
    fourth = tl.sqrt(tl.sqrt(tl.sum(square * square, axis=1)))
    tl.store(size_ptrs + rows, fourth.to(tl.float32), mask=inside)
    tl.store(size_ptrs + 2 * rows, tl.sqrt(tl.sum(x * x, axis=1)).to(tl.float32), mask=inside)
    tl.store(size_ptrs + 3 * rows, half.to(tl.float32), mask=inside)
    tl.store(size_ptrs + 4 * rows, (alpha / std).to(tl.float32), mask=inside)
    rest = y
    plane = rows.to(tl.int64) * BLOCK_D
    piece_ptrs = pieces_ptr + offs_n[:, None] * BLOCK_D + offs_d[None, :]
    for i in tl.static_range(3):
        piece = round_piece(rest.to(tl.float32), EMULATE)
        rest -= piece.to(tl.float64)
        tl.store(piece_ptrs + i * plane, piece, mask=inside[:, None])


def pieces(
    x: Tensor, center: Tensor, alpha: Tensor, std: Tensor, *, rows: int, block_d: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pieces (3, rows, block_d) and sizes (5, rows) of (x - alpha center) / std; zero beyond the n rows of x.

    Args:
        x: (n, d) float32, any strides, n <= rows, d <= block_d, a power of two. center: (d,) float32, contiguous.
        alpha, std: () or (n,) float64.
    """
    (n, d), emulate = x.shape, not x.is_cuda
    made = torch.empty((3, rows, block_d), dtype=torch.float32 if emulate else torch.bfloat16, device=x.device)
    sizes = torch.empty((5, rows), dtype=torch.float32, device=x.device)
    block_n = max(1, (16384 if emulate else 1024) // block_d)
    pieces_kernel[(triton.cdiv(rows, block_n),)](
        x, x.stride(0), x.stride(1), center,
        alpha, alpha.stride(0) if alpha.ndim else 0, std, std.stride(0) if std.ndim else 0,
        made, sizes, n, rows, d, emulate, block_n, block_d, num_warps=4,
    )  # fmt: skip
    return made, sizes


class Components:
    """What a call needs of a mixture: pieces of the centred means, log-weights in base 2, and bounds; padded."""

    def __init__(self, means: Tensor, log_weights: Tensor, block_k: int, block_d: int) -> None:
        k, self.block_d = means.shape[0], block_d
        self.means, self.raw_log_weights = means, log_weights
        self.rows = triton.cdiv(k, block_k) * block_k
        self.center = means.mean(0, dtype=torch.float64).to(means.dtype)  # (d,)
        one = torch.ones((), dtype=torch.float64, device=means.device)
        self.pieces, sizes = pieces(means, self.center, one, one, rows=self.rows, block_d=self.block_d)
        self.half = sizes[3]
        below = log_weights - log_weights.max()
        self.log_weights = torch.full((self.rows,), -math.inf, dtype=torch.float32, device=means.device)
        self.log_weights[:k] = below * math.log2(math.e)
        span = torch.where(below == -math.inf, 0.0, -below).max()
        self.limits = torch.cat(
            [sizes[:3].amax(1), span[None]]
        )  # largest |m - c|, its 4-norm, |m|; span of log-weights
