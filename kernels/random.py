"""Normal numbers that depend on a seed, a row and a coordinate alone: Philox4x32-10 and the Box-Muller transform.

Number j of row i comes from the 128-bit counter (i mod 2^32, i / 2^32, j / 4, 0) under the 64-bit key `seed`, whatever
the tile, the launch or the GPU. Its four words make four normals: words 0 and 1 the first two, 2 and 3 the others.
Uniform numbers have 32 bits, so that normals reach 6.7; each is off by at most 8 eps of itself. flowfast/philox.py and
csrc/normals.hpp say the same for the CPU: one changes with the others.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N, BLOCK_D = 16, 32  # of draw_normals

STEP = tl.constexpr(2.0**-32)
TURN = tl.constexpr(6.283185307179586 * 2.0**-32)
LN2 = tl.constexpr(0.6931471805599453)
ROOT = tl.constexpr(0x3F3504F3)  # bits of sqrt(1/2) in float32


@triton.jit
def words(seed, row, quarter):
    """Four blocks of uint32, of the shape to which row (int64) and quarter = j / 4 broadcast."""
    row, quarter = tl.broadcast(row.to(tl.int64), quarter.to(tl.int64))
    low = row.to(tl.uint32)
    return tl.philox(seed, low, (row >> 32).to(tl.uint32), quarter.to(tl.uint32), low * 0)


@triton.jit
def unit_circle(word, DTYPE: tl.constexpr):
    """Cosine and sine of 2 pi word / 2^32, by Taylor's series within a quarter turn around the nearest axis."""
    quarter = (word + 0x20000000) >> 30  # wraps around with the angle
    angle = (word - (quarter << 30)).to(tl.int32, bitcast=True).to(DTYPE) * TURN
    square = angle * angle
    cosine = tl.full(word.shape, 1.0, DTYPE)
    sine = tl.full(word.shape, 1.0, DTYPE)
    TERMS: tl.constexpr = 9 if DTYPE == tl.float64 else 5
    for i in tl.static_range(TERMS):
        cosine = 1.0 - square * cosine * (1.0 / (2 * (TERMS - i) * (2 * (TERMS - i) - 1)))
        sine = 1.0 - square * sine * (1.0 / (2 * (TERMS - i) * (2 * (TERMS - i) + 1)))
    sine *= angle
    turned = (quarter & 1) != 0
    across = tl.where(turned, -sine, cosine)
    up = tl.where(turned, cosine, sine)
    opposite = (quarter & 2) != 0
    return tl.where(opposite, -across, across), tl.where(opposite, -up, up)


@triton.jit
def radius(word, DTYPE: tl.constexpr):
    """sqrt(-2 log u) for u = (word + 1/2) / 2^32, also where u is close to 1, for which float32 is too coarse.

    With u = 2^e m, sqrt(1/2) <= m < sqrt(2), and s = (m - 1) / (m + 1), log m is a series in s. Where e = 0, m - 1 is
    formed from the words that are left: -(2^32 - word - 1/2) / 2^32.
    """
    if DTYPE == tl.float64:
        return tl.sqrt(-2.0 * tl.log((word.to(DTYPE) + 0.5) * STEP))
    else:
        bits = (word.to(DTYPE) + 0.5).to(tl.int32, bitcast=True) - ROOT
        exponent = (bits >> 23) - 32
        above = ((bits & 0x7FFFFF) + ROOT).to(DTYPE, bitcast=True) - 1.0
        above = tl.where(exponent == 0, ((word ^ 0xFFFFFFFF).to(DTYPE) + 0.5) * -STEP, above)
        s = above / (above + 2.0)
        square = s * s
        series = tl.full(word.shape, 2.0 / 9, DTYPE)
        for i in tl.static_range(4):
            series = series * square + 2.0 / (7 - 2 * i)
        return tl.sqrt(-2.0 * (exponent.to(DTYPE) * LN2 + s * series))


@triton.jit
def normal_pair(first, second, DTYPE: tl.constexpr):
    """Two independent normals from two words."""
    length = radius(first, DTYPE)
    across, up = unit_circle(second, DTYPE)
    return length * across, length * up


@triton.jit
def normals(seed, rows, offs_d, DTYPE: tl.constexpr):
    """Normals (BLOCK_N, BLOCK_D) of rows (BLOCK_N,) and coordinates offs_d: consecutive, the first a multiple of 4."""
    quarters = (tl.min(offs_d, axis=0) // 4 + tl.arange(0, offs_d.shape[0] // 4))[None, :]
    w0, w1, w2, w3 = words(seed, rows[:, None], quarters)
    n0, n1 = normal_pair(w0, w1, DTYPE)
    n2, n3 = normal_pair(w2, w3, DTYPE)
    four = tl.join(tl.join(n0, n2), tl.join(n1, n3))  # (BLOCK_N, BLOCK_D / 4, 2, 2)
    return tl.reshape(four, (rows.shape[0], offs_d.shape[0]))


@triton.jit(do_not_specialize=["seed", "first_row", "n", "d"])
def normals_kernel(out_ptr, seed, first_row, n, d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: a tile of normals, from a first coordinate that is a multiple of 4."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK_N
    offs_n = begin + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    value = normals(seed, first_row + offs_n, offs_d, out_ptr.dtype.element_ty)
    mask = (offs_n < n)[:, None] & (offs_d < d)[None, :]
    tl.store(out_ptr + offs_n[:, None] * d + offs_d[None, :], value, mask=mask)


def draw_normals(n: int, d: int, seed: int, first_row: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normals (n, d) of rows first_row, first_row + 1, ...; float32 or float64, the same for any split into calls."""
    out = torch.empty((n, d), dtype=dtype, device=device)
    if n and d:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            grid = (triton.cdiv(n, BLOCK_N), triton.cdiv(d, BLOCK_D))
            normals_kernel[grid](out, seed, first_row, n, d, BLOCK_N, BLOCK_D)
    return out
