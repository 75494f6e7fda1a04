"""The diameter of a mixture, the largest distance between two means, without a (k, k) array: screen and recompute.

    means  (k, d)  float32 or float64, contiguous

The tiles of the symmetric (k, k) triangle are dealt to groups. A first kernel brackets the largest squared distance of
every group from centred products of bfloat16 pieces on tensor cores. A second one takes the groups whose bracket
reaches the highest lower end again, by differences in float64: the pair that is farthest apart is always among them.
Sets with very many pairs that far apart, as the corners of a simplex, are recomputed entirely, which is slow and right.

Relative error: (d + 3) 2^-53, for any offset of the means, and the same bits with any launch configuration. Range:
|means| below 1e30 in float32, 1e300 in float64. NaN when a mean is not finite. Memory: a few d numbers, and 16 bytes
a group: at most 16,384 and one for every 32 means.
"""

from __future__ import annotations

import contextlib
import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Variant, gpu_name, launch, rows

GROUPS = 1 << 14  # that are wanted: enough programs for a GPU, and little to recompute in each


@triton.jit
def _rows(start, k, BLOCK: tl.constexpr):
    """Numbers of the rows from `start` on; the last row again where there is none."""
    return tl.minimum(start + tl.arange(0, BLOCK), k - 1).to(tl.int64)


@triton.jit
def _tile(means_ptr, center_ptr, inverse, offs_row, offs_d, d):
    """Rows of centred means (rows, d) in units of the extent, in float32; zero beyond d."""
    there = offs_d < d
    m = tl.load(means_ptr + offs_row[:, None] * d + offs_d[None, :], mask=there[None, :], other=0.0)
    center = tl.load(center_ptr + offs_d, mask=there, other=0.0)
    return ((m - center[None, :]) * inverse).to(tl.float32)


@triton.jit
def _pieces(a, EMULATE: tl.constexpr):
    """a = high + low up to 2^-16 |a|, both bfloat16, or such numbers in float32 for the interpreter's dot product."""
    high = a.to(tl.bfloat16)
    low = (a - high.to(tl.float32)).to(tl.bfloat16)
    if EMULATE:
        return high.to(tl.float32), low.to(tl.float32)
    return high, low


@triton.jit(do_not_specialize=["k"])
def screen_kernel(
    means_ptr, center_ptr, inverse_ptr, lower_ptr, upper_ptr, k, d, slack,
    EMULATE: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Brackets of the largest |m_i - m_j|^2 / unit^2 of every group, float32: lower and upper (programs 0, programs 1).

    A tile of BLOCK_J rows meets the tiles that follow it, modulo their number, up to the opposite one: every unordered
    pair of tiles, and the same work for each. Program (i, g) has rows i of them, BLOCK_I at a time, and every second
    (third, ...) of the tiles that they meet. slack: error of a square in units of |m_i|^2 + |m_j|^2.
    """
    tiles = tl.cdiv(k, BLOCK_J)
    i = tl.program_id(0)
    offs_i = _rows(i * BLOCK_I, k, BLOCK_I)
    inverse = tl.load(inverse_ptr).to(means_ptr.dtype.element_ty)  # a power of two: scaling rounds nothing
    lower = float("-inf")
    upper = float("-inf")
    for step in range(tl.program_id(1), tiles // 2 + 1, tl.num_programs(1)):
        offs_j = _rows((i * BLOCK_I // BLOCK_J + step) % tiles * BLOCK_J, k, BLOCK_J)
        acc = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
        square_i = tl.zeros((BLOCK_I,), tl.float32)
        square_j = tl.zeros((BLOCK_J,), tl.float32)
        for start in range(0, d, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            a = _tile(means_ptr, center_ptr, inverse, offs_i, offs_d, d)
            b = _tile(means_ptr, center_ptr, inverse, offs_j, offs_d, d)
            square_i += tl.sum(a * a, axis=1)
            square_j += tl.sum(b * b, axis=1)
            a_high, a_low = _pieces(a, EMULATE)
            b_high, b_low = _pieces(b, EMULATE)
            b_high, b_low = tl.trans(b_high), tl.trans(b_low)
            # Tensor cores truncate when they add: a sum of their own for every block of coordinates bounds the loss.
            part = tl.dot(a_low, b_high, input_precision="ieee")
            part = tl.dot(a_high, b_low, part, input_precision="ieee")
            acc += tl.dot(a_high, b_high, part, input_precision="ieee")
        squares = square_i[:, None] + square_j[None, :]
        distances = squares - 2 * acc
        lower = tl.maximum(lower, tl.max(tl.max(distances - slack * squares, axis=1), axis=0))
        upper = tl.maximum(upper, tl.max(tl.max(distances + slack * squares, axis=1), axis=0))
    at = i * tl.num_programs(1) + tl.program_id(1)
    tl.store(lower_ptr + at, lower)
    tl.store(upper_ptr + at, upper)


@triton.jit(do_not_specialize=["k"])
def recompute_kernel(
    means_ptr, inverse_ptr, best_ptr, upper_ptr, exact_ptr, k, d, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):
    """Largest |m_i - m_j|^2 / unit^2 of every group whose upper end reaches best, by differences in float64; else 0."""
    tiles = tl.cdiv(k, BLOCK_J)
    i = tl.program_id(0)
    at = i * tl.num_programs(1) + tl.program_id(1)
    offs_i = _rows(i * BLOCK_I, k, BLOCK_I)
    inverse = tl.load(inverse_ptr)
    widest = tl.zeros((), tl.float64)
    if tl.load(upper_ptr + at) >= tl.load(best_ptr):
        for step in range(tl.program_id(1), tiles // 2 + 1, tl.num_programs(1)):
            offs_j = _rows((i * BLOCK_I // BLOCK_J + step) % tiles * BLOCK_J, k, BLOCK_J)
            acc = tl.zeros((BLOCK_I, BLOCK_J), tl.float64)
            for c in range(d):
                a = tl.load(means_ptr + offs_i * d + c).to(tl.float64)
                b = tl.load(means_ptr + offs_j * d + c).to(tl.float64)
                gap = (a[:, None] - b[None, :]) * inverse
                acc += gap * gap
            widest = tl.maximum(widest, tl.max(tl.max(acc, axis=1), axis=0))
    tl.store(exact_ptr + at, widest)


def slack(d: int, block_d: int) -> float:
    """Bound of the screen's error in a squared distance, in units of |m_i|^2 + |m_j|^2 of the centred means."""
    u = 2.0**-24
    left_out = 3 * 2.0**-16  # the product of both low pieces, and what is below them; the interpreter truncates pieces
    in_block = (3 * 2 + 1) * block_d * u  # sums of three products, each addition truncated, and of squares
    of_blocks = 2 * -(-d // block_d) * u
    return left_out + in_block + of_blocks + 16 * u  # centring and the last operations


def diameter(means: Tensor) -> float:
    """Largest distance between two rows of means (k, d); waits for the device."""
    k, d = means.shape
    chosen = launch("diameter", means.dtype, d, gpu_name(means.device))
    block_i, block_j, block_d = (chosen.blocks[name] for name in ("BLOCK_I", "BLOCK_J", "BLOCK_D"))
    tiles = triton.cdiv(k, block_j)
    programs = tiles * (block_j // block_i)
    grid = (programs, min(tiles // 2 + 1, triton.cdiv(GROUPS, programs)))
    center = means.mean(0)  # in the dtype of means: asked for another one, torch would copy all of them
    low, high = torch.aminmax(means, dim=0)
    extent = (high.double() - low.double()).amax().clamp(min=torch.finfo(means.dtype).tiny)
    unit = extent / torch.frexp(extent).mantissa  # the next power of two
    inverse = 1 / unit
    lower = torch.empty(grid, dtype=torch.float32, device=means.device)
    upper = torch.empty(grid, dtype=torch.float32, device=means.device)
    exact = torch.empty(grid, dtype=torch.float64, device=means.device)
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    with torch.cuda.device(means.device) if means.is_cuda else contextlib.nullcontext():
        screen_kernel[grid](
            means, center, inverse, lower, upper, k, d, slack(d, block_d), not means.is_cuda,
            block_i, block_j, block_d, **options,
        )  # fmt: skip
        recompute_kernel[grid](means, inverse, lower.amax(), upper, exact, k, d, block_i, block_j, **options)
    widest = exact.amax().sqrt() * unit
    # A maximum on a GPU passes NaN over.
    return float(torch.where(center.isfinite().all(), widest, torch.nan))


def variants() -> list[Variant]:
    """Both kernels for every row of the table, for any d and for multiples of 16, whose loads are wider."""
    found = []
    for row, size in itertools.product(rows("diameter"), ("i32", "i32:16")):
        chosen = Launch(row["blocks"], row["warps"], row["stages"])
        means = {"float32": "*fp32", "float64": "*fp64"}[row["dtype"]]
        both = {"means_ptr": means, "inverse_ptr": "*fp64", "upper_ptr": "*fp32", "k": "i32", "d": size}
        screen = both | {"center_ptr": means, "lower_ptr": "*fp32", "slack": "fp32"}
        recompute = both | {"best_ptr": "*fp32", "exact_ptr": "*fp64"}
        tiles = {name: chosen.blocks[name] for name in ("BLOCK_I", "BLOCK_J")}
        flags = {"EMULATE": False, **chosen.blocks}
        gpu = "any GPU" if row["gpu"] == "*" else row["gpu"]
        of = f"{row['dtype']}, {'16 divides d' if size == 'i32:16' else 'any d'}, {gpu}"
        found.append(Variant(f"diameter screen, {of}", screen_kernel, screen, flags, chosen, products=True))
        found.append(Variant(f"diameter recompute, {of}", recompute_kernel, recompute, tiles, chosen))
    return found
