"""The posterior pass on tensor cores, for 32 < d <= 256 and float32: numbers as pieces of bf16 (kernels/pieces.py).

With c the mean of the means, y = (x - alpha c) / std and r = alpha / std, logits are, up to a common term,

    log w_k + r y . (m_k - c) - r^2 |m_k - c|^2 / 2        (Eq. 6)

Both products, y . m and p @ m, are sums of `terms` products of pieces: 6 are as good as float32, 3 about 1e-5 off. Four
launches: pieces of the means, pieces of y, an online softmax over groups of components (where there are few points;
how many depends on n, k and d alone), and the join of the groups (kernels/finish.py). Posterior weights take one more,
the Hessian-vector product two. A row gives the same bits whatever the other rows are, for equal n, k and outputs.

Rows whose logits may be off by more than the contract are marked in `flags`: the caller does those by differences.
Workspace: at most 512 MiB, half of it for pieces of the means (path() in kernels/posterior.py), half for rows (SLICE).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .finish import finish_kernel
from .launch import Launch, Variant, gpu_name, launch, rows
from .outputs import FLAGS
from .pieces import Components, pieces, pieces_kernel, product, three_pieces

SLICE = 1 << 28  # bytes of workspace for the rows that are worked on at a time
FINISH = 1024  # numbers of a tile of finish_kernel, of 8 rows at most
PROGRAMS = 512  # wanted at least, by splitting the components

MINUS_INF = tl.constexpr(float("-inf"))
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(ptr, first, plane, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, TERMS: tl.constexpr):
    """Columns first ... first + BLOCK_C of ROWS rows in pieces; the third is not there where it is not used."""
    offs = tl.arange(0, ROWS)[:, None] * BLOCK_D + first + tl.arange(0, BLOCK_C)[None, :]
    high = tl.load(tl.multiple_of(ptr + offs, (16, 16)))
    mid = tl.load(tl.multiple_of(ptr + plane + offs, (16, 16)))
    low = mid
    if TERMS == 6:
        low = tl.load(tl.multiple_of(ptr + 2 * plane + offs, (16, 16)))
    return high, mid, low


@triton.jit
def _dots(
    y_ptr, y_plane, m_ptr, m_plane,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """y . m of two groups of rows, (BLOCK_N, BLOCK_K), by chunks of BLOCK_C coordinates."""
    dots = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in range(0, BLOCK_D, BLOCK_C):
        y0, y1, y2 = _load(y_ptr, first, y_plane, BLOCK_N, BLOCK_D, BLOCK_C, TERMS)
        m0, m1, m2 = _load(m_ptr, first, m_plane, BLOCK_K, BLOCK_D, BLOCK_C, TERMS)
        dots = product(y0, y1, y2, tl.trans(m0), tl.trans(m1), tl.trans(m2), dots, TERMS)
    return dots


@triton.jit
def _logits(dots, ratio, half, log_w):
    """log2 of weights (n, k), up to what all components share."""
    gain = ratio * LOG2_E
    return dots * gain[:, None] + (log_w[None, :] - (gain * ratio)[:, None] * half[None, :])


@triton.jit(do_not_specialize=["n", "k", "share"])
def products_kernel(
    y_ptr, ratio_ptr, v_ptr, m_ptr, half_ptr, log_weights_ptr,
    top_ptr, second_ptr, lead_ptr, sum_ptr, half_sum_ptr, acc_ptr, n, k, share, window,
    MEANS: tl.constexpr, ALONG: tl.constexpr, TERMS: tl.constexpr, EMULATE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows against `share` components, the online softmax's state to (splits, n) arrays.

    n and k are multiples of the tiles: rows beyond the data are zero, components there have log-weight -inf. MEANS:
    also sums of p m and of p |m|^2 / 2; ALONG: of p (m . v) m instead of p m. Log-weights and logits are in base 2.
    Tiles whose largest logit is below the running one by `window` have no weight: only their largest logit counts.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N
    split = tl.program_id(1)
    y_ptr += row * BLOCK_D
    v_ptr += row * BLOCK_D
    y_plane = n.to(tl.int64) * BLOCK_D
    m_plane = k.to(tl.int64) * BLOCK_D
    ratio = tl.load(ratio_ptr + row + tl.arange(0, BLOCK_N))
    m_i = tl.full((BLOCK_N,), MINUS_INF, tl.float32)
    second = tl.full((BLOCK_N,), MINUS_INF, tl.float32)
    lead = tl.zeros((BLOCK_N,), tl.int32)
    l_i = tl.zeros((BLOCK_N,), tl.float32)
    half_sum = tl.zeros((BLOCK_N,), tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    tile_ptr = m_ptr + (split * share).to(tl.int64) * BLOCK_D
    for start in range(split * share, min(split * share + share, k), BLOCK_K):
        half = tl.load(half_ptr + start + tl.arange(0, BLOCK_K))
        log_w = tl.load(log_weights_ptr + start + tl.arange(0, BLOCK_K))
        if BLOCK_C == BLOCK_D:  # one tile of means serves all products
            m0, m1, m2 = _load(tile_ptr, 0, m_plane, BLOCK_K, BLOCK_D, BLOCK_D, TERMS)
            y0, y1, y2 = _load(y_ptr, 0, y_plane, BLOCK_N, BLOCK_D, BLOCK_D, TERMS)
            zero = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            dots = product(y0, y1, y2, tl.trans(m0), tl.trans(m1), tl.trans(m2), zero, TERMS)
        else:
            dots = _dots(y_ptr, y_plane, tile_ptr, m_plane, BLOCK_N, BLOCK_K, BLOCK_D, BLOCK_C, TERMS)
        logits = _logits(dots, ratio, half, log_w)
        top, place = tl.max(logits, axis=1, return_indices=True)
        other = tl.max(tl.where(tl.arange(0, BLOCK_K)[None, :] == place[:, None], MINUS_INF, logits), axis=1)
        second = tl.maximum(tl.maximum(second, other), tl.minimum(m_i, top))
        lead = tl.where(top > m_i, start + place, lead)
        m_new = tl.maximum(m_i, top)
        if tl.max((top > m_i - window).to(tl.int32), axis=0) > 0:
            shift = tl.where(m_new == MINUS_INF, 0.0, m_new)  # nothing seen yet: exp(-inf - 0) = 0
            p = tl.exp2(logits - shift[:, None])
            old = tl.exp2(m_i - shift)
            l_i = l_i * old + tl.sum(p, axis=1)
            if MEANS:
                half_sum = half_sum * old + tl.sum(p * half[None, :], axis=1)
                if BLOCK_C != BLOCK_D:
                    m0, m1, m2 = _load(tile_ptr, 0, m_plane, BLOCK_K, BLOCK_D, BLOCK_D, TERMS)
                if ALONG:
                    p *= _dots(v_ptr, y_plane, tile_ptr, m_plane, BLOCK_N, BLOCK_K, BLOCK_D, BLOCK_C, TERMS)
                p0, p1, p2 = three_pieces(p, EMULATE)
                # Tiles are added in registers, rounded to nearest: accumulators of tensor cores truncate.
                acc = acc * old[:, None] + product(p0, p1, p2, m0, m1, m2, tl.zeros_like(acc), TERMS)
        m_i = m_new
        tile_ptr += BLOCK_K * BLOCK_D
    place = split.to(tl.int64) * n + row + tl.arange(0, BLOCK_N)
    tl.store(top_ptr + place, m_i)
    tl.store(second_ptr + place, second)
    tl.store(lead_ptr + place, lead)
    tl.store(sum_ptr + place, l_i)
    if MEANS:
        tl.store(half_sum_ptr + place, half_sum)
        tl.store(acc_ptr + place[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :], acc)


@triton.jit(do_not_specialize=["n", "k", "rows", "components"])
def weights_kernel(
    y_ptr, ratio_ptr, m_ptr, half_ptr, log_weights_ptr, softmax_ptr, weights_ptr, n, k, rows, components,
    TERMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the posterior weights (n, k) of one tile, from the top logit and the sum (2, rows) of every row."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N
    start = tl.program_id(1).to(tl.int64) * BLOCK_K
    offs_n = row + tl.arange(0, BLOCK_N)
    offs_k = start + tl.arange(0, BLOCK_K)
    y_plane = rows.to(tl.int64) * BLOCK_D
    m_plane = components.to(tl.int64) * BLOCK_D
    dots = _dots(
        y_ptr + row * BLOCK_D, y_plane, m_ptr + start * BLOCK_D, m_plane, BLOCK_N, BLOCK_K, BLOCK_D, BLOCK_C, TERMS
    )
    logits = _logits(dots, tl.load(ratio_ptr + offs_n), tl.load(half_ptr + offs_k), tl.load(log_weights_ptr + offs_k))
    there = offs_n < n
    m_i = tl.load(softmax_ptr + offs_n, mask=there, other=0.0)
    l_i = tl.load(softmax_ptr + rows + offs_n, mask=there, other=1.0)
    gamma = tl.exp2(logits - m_i[:, None]) / l_i[:, None]
    weights_ptrs = weights_ptr + offs_n[:, None] * k + offs_k[None, :]
    tl.store(weights_ptrs, gamma, mask=there[:, None] & (offs_k < k)[None, :])


def products(
    x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor, *,
    outputs: dict[str, Tensor], direction: Tensor | None, terms: int,
) -> Tensor:  # fmt: skip
    """Fill the outputs, by the names and shapes of kernels/posterior.py, and return flags (n,) int8 of doubtful rows.

    Args:
        x: (n, d) float32. means: (k, d). log_weights: (k,). alpha, std: () or (n,) float64. Any strides.
        outputs: contiguous, written in place. direction: (n, d), for the Hessian-vector product. terms: 3 or 6.
    """
    n, d = x.shape
    chosen = launch("products", x.dtype, d, gpu_name(x.device))
    flags = x.new_empty(n, dtype=torch.int8)
    components = Components(means, log_weights, chosen.blocks["BLOCK_K"], chosen.blocks["BLOCK_D"])
    most = max(1, SLICE // (24 * components.block_d + 64))
    for first in range(0, n, most):
        part = slice(first, first + most)
        _slice(
            x[part], components, alpha[part] if alpha.ndim else alpha, std[part] if std.ndim else std,
            outputs={name: value[part] for name, value in outputs.items()},
            direction=None if direction is None else direction[part], terms=terms, chosen=chosen, flags=flags[part],
        )  # fmt: skip
    return flags


def _slice(
    x: Tensor, c: Components, alpha: Tensor, std: Tensor, *,
    outputs: dict[str, Tensor], direction: Tensor | None, terms: int, chosen: Launch, flags: Tensor,
) -> None:  # fmt: skip
    """The launches for some rows."""
    (n, d), k, emulate = x.shape, c.means.shape[0], not x.is_cuda
    block = chosen.blocks
    rows = triton.cdiv(n, block["BLOCK_N"]) * block["BLOCK_N"]
    y, sizes = pieces(x, c.center, alpha, std, rows=rows, block_d=c.block_d)
    splits, share = split(rows // block["BLOCK_N"], c.rows, block["BLOCK_K"])
    scan = torch.empty((5, splits, rows), dtype=torch.float32, device=x.device)
    top, second, sums, half_sums, pull_top = scan
    lead = torch.empty((splits, rows), dtype=torch.int32, device=x.device)
    along = "hessian_vector_product" in outputs
    averages = not {"log_density", "posterior_weights"} >= set(outputs)
    acc = torch.empty((1 + along, splits, rows, c.block_d), dtype=torch.float32, device=x.device) if averages else scan
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    tiles = (rows // block["BLOCK_N"], splits)
    window = (math.log(k) + 17.3) * math.log2(math.e)
    products_kernel[tiles](
        y, sizes[4], y, c.pieces, c.half, c.log_weights, top, second, lead, sums, half_sums, acc[0],
        rows, c.rows, share, window, averages, False, terms, emulate, **block, **options,
    )  # fmt: skip
    v = x if direction is None else direction
    if along:
        zero = torch.zeros((), dtype=torch.float64, device=x.device)
        v_pieces, _ = pieces(v, c.center, zero, zero + 1, rows=rows, block_d=c.block_d)
        spare = torch.empty((3, splits, rows), dtype=torch.float32, device=x.device)
        products_kernel[tiles](
            y, sizes[4], v_pieces, c.pieces, c.half, c.log_weights,
            pull_top, spare[0], torch.empty_like(lead), spare[1], spare[2], acc[1],
            rows, c.rows, share, window, True, True, terms, emulate, **half_as_wide(block), **options,
        )  # fmt: skip
    names = ("log_density", "score", "posterior_mean", "covariance_trace", "hessian_vector_product")
    softmax = torch.empty((2, rows), dtype=torch.float32, device=x.device)
    block_n = max(1, 16384 // c.block_d) if emulate else min(8, FINISH // c.block_d)
    finish_kernel[(triton.cdiv(n, block_n),)](
        x, *x.stride(), v, *v.stride(), c.means, *c.means.stride(), c.raw_log_weights, *c.raw_log_weights.stride(),
        c.center, alpha, alpha.stride(0) if alpha.ndim else 0, std, std.stride(0) if std.ndim else 0,
        sizes, c.limits, top, second, lead, sums, half_sums, acc[0], pull_top, acc[-1],
        *(outputs.get(name, x) for name in names), softmax, flags, n, rows, k, d, splits,
        *(name in outputs for name in (*names[:4], "posterior_weights", names[4])), terms, block_n, c.block_d,
        num_warps=4,
    )  # fmt: skip
    if "posterior_weights" in outputs:
        weights_kernel[(rows // block["BLOCK_N"], c.rows // block["BLOCK_K"])](
            y, sizes[4], c.pieces, c.half, c.log_weights, softmax, outputs["posterior_weights"], n, k, rows, c.rows,
            terms, **block, **options,
        )  # fmt: skip


def half_as_wide(blocks: Mapping[str, int]) -> dict[str, int]:
    """Tiles for products with directions, which need registers for two products of logits' size."""
    return {**blocks, "BLOCK_K": blocks["BLOCK_K"] // 2}


def split(tiles: int, components: int, block_k: int) -> tuple[int, int]:
    """Groups of components for so many tiles of rows, and components of a group, a multiple of block_k.

    A group has at least 8 tiles of components; groups are only made where tiles of rows do not fill a GPU.
    """
    blocks = components // block_k
    groups = max(1, min(PROGRAMS // tiles, blocks // 8))
    share = -(-blocks // groups)
    return -(-blocks // share), share * block_k


def variants() -> list[Variant]:
    """Every configuration that is shipped: rows of the table, for each use that a call makes of the four kernels."""
    found = []
    special = {"alpha_ptr": "*fp64", "std_ptr": "*fp64", "lead_ptr": "*i32", "flags_ptr": "*i8", "window": "fp32"}

    def add(name: str, kernel: Any, constants: Mapping[str, Any], chosen: Launch, *, bf16: Sequence[str] = ()) -> None:
        types = {
            name: "*fp32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names if name not in constants
        }
        types |= {name: special[name] for name in types if name in special} | {name: "*bf16" for name in bf16}
        found.append(Variant(name, kernel, types, constants, chosen, kernel in (products_kernel, weights_kernel)))

    for row in rows("products"):
        title = f"{row['gpu']} {row['dtype']} d<={row['most_d']}"
        small = {"BLOCK_N": 1024 // row["blocks"]["BLOCK_D"], "BLOCK_D": row["blocks"]["BLOCK_D"]}
        rest = Launch(small, 4, 3)
        add(f"pieces {title}", pieces_kernel, {"EMULATE": False} | small, rest, bf16=["pieces_ptr"])
        for terms in (3, 6):
            chosen, constants = Launch(row["blocks"], row["warps"], row["stages"]), {"TERMS": terms} | row["blocks"]
            for use in ((False, False), (True, False), (True, True)):
                flags = dict(zip(("MEANS", "ALONG", "EMULATE"), (*use, False), strict=True))
                name = f"products {title} bf16x{terms} {('sums', 'means', 'along')[sum(use)]}"
                blocks = half_as_wide(row["blocks"]) if use[1] else row["blocks"]
                add(name, products_kernel, flags | constants | blocks, chosen, bf16=["y_ptr", "v_ptr", "m_ptr"])
            add(f"weights {title} bf16x{terms}", weights_kernel, constants, chosen, bf16=["y_ptr", "m_ptr"])
            for flag in FLAGS:
                last = small | {"BLOCK_N": min(8, FINISH // small["BLOCK_D"])}
                one = {name: name == flag for name in FLAGS} | {"TERMS": terms} | last
                add(f"finish {title} bf16x{terms} {flag.lower()}", finish_kernel, one, Launch(last, 4, 3))
    return found
