"""The posterior pass by differences x - alpha m: any dimension up to 4,096, float32 and float64, at every noise.

Arguments, outputs and ranges are those of kernels/posterior.py. Two ways to form a logit, chosen row by row from
q = |x - alpha m|^2 / 2 std^2 of the leading component:
  * q <= d/2 + 4 sqrt(d) + 8 (a point drawn from the mixture, at any noise): differences in the dtype of x,
    |error of a logit| <= (log2 d + 6) u q with u the unit roundoff;
  * farther out, above all between components at low noise, where logits reach 1e18 and only their differences count:
    logits relative to the leading component in twice float64's precision, as products
    alpha (m_a - m_k) . (2x - alpha (m_a + m_k)) / 2 std^2, |error| <= 1e-15 (1 + |relative logit|).
Sums are kept as means and spreads around means, so that a collapsed posterior has covariance exactly zero.
Beyond d = 2,048 there are more numbers than registers for some outputs, the Hessian-vector product above all: SPILLS.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .accurate import difference, farther, two_sum
from .launch import Launch, Variant, gpu_name, launch, rows
from .outputs import FLAGS, OUTPUTS, allocate

HALF_LOG_2_PI = tl.constexpr(0.5 * math.log(2 * math.pi))
MINUS_INF = tl.constexpr(float("-inf"))
CHUNK = tl.constexpr(1024)  # coordinates of a doubled-precision logit that are read at a time
LOG_CHUNK = tl.constexpr(10)
SPILLS = 256  # bytes of a thread at most that are spilled beyond d = 2,048


@triton.jit
def _tile(
    start, k, x, x_ptrs, stride_xd, n_mask, lead, lead_m, alpha, std, offs_d, d,
    means_ptr, stride_mk, stride_md, log_weights_ptr, stride_w,
    REFINE: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    LOG_D: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Components from `start` on: numbers, means (k, d), logits (n, k) and, without REFINE, x - alpha m.

    Log-weights are -inf past the last component. With REFINE logits are relative to the component `lead`, and formed by
    chunks of coordinates where there are many, read again for want of registers.
    """
    offs_k = start + tl.arange(0, BLOCK_K).to(tl.int64)
    there = offs_k < k
    m_ptrs = means_ptr + offs_k[:, None] * stride_mk
    m = tl.load(m_ptrs + offs_d[None, :] * stride_md, mask=there[:, None] & (offs_d < d)[None, :], other=0.0).to(DTYPE)
    log_w = tl.load(log_weights_ptr + offs_k * stride_w, mask=there, other=MINUS_INF).to(DTYPE)
    away = m
    if REFINE:
        lead_w = tl.load(log_weights_ptr + lead * stride_w).to(DTYPE)
        if BLOCK_D > CHUNK:
            high = tl.zeros((BLOCK_N, BLOCK_K), DTYPE)
            low = tl.zeros((BLOCK_N, BLOCK_K), DTYPE)
            lead_ptrs = means_ptr + lead[:, None] * stride_mk
            for first in range(0, BLOCK_D, CHUNK):
                columns = first + tl.arange(0, CHUNK)[None, :]
                inside = columns < d
                x_part = tl.load(x_ptrs + columns * stride_xd, mask=n_mask[:, None] & inside, other=0.0)
                m_part = tl.load(m_ptrs + columns * stride_md, mask=there[:, None] & inside, other=0.0)
                lead_part = tl.load(lead_ptrs + columns * stride_md, mask=inside, other=0.0)
                more, less = farther(
                    x_part.to(DTYPE), m_part.to(DTYPE), lead_part.to(DTYPE), alpha,
                    BLOCK_N, BLOCK_K, CHUNK, LOG_CHUNK, EMULATE,
                )  # fmt: skip
                high, error = two_sum(high, more)
                low += less + error
        else:
            high, low = farther(x, m, lead_m, alpha, BLOCK_N, BLOCK_K, BLOCK_D, LOG_D, EMULATE)
        logits = (log_w[None, :] - lead_w[:, None]) - ((high + low) / std[:, None]) * (0.5 * alpha / std)[:, None]
    else:
        near = alpha.to(DTYPE)
        rest = (alpha - near).to(DTYPE)
        away = tl.fma(-near[:, None, None], m[None, :, :], x[:, None, :])
        away = tl.fma(-rest[:, None, None], m[None, :, :], away)
        logits = log_w[None, :] - tl.sum(away * away, axis=2) * (0.5 / (std * std)).to(DTYPE)[:, None]
    return offs_k, m, logits, away


@triton.jit
def _sweep(
    x, x_ptrs, stride_xd, direction, lead, offs_n, n_mask, offs_d, alpha, std, k, d,
    means_ptr, stride_mk, stride_md, log_weights_ptr, stride_w,
    log_density_ptr, score_ptr, mean_ptr, trace_ptr, weights_ptr, product_ptr,
    LOG_DENSITY: tl.constexpr, SCORE: tl.constexpr, MEAN: tl.constexpr, TRACE: tl.constexpr, WEIGHTS: tl.constexpr,
    PRODUCT: tl.constexpr, REFINE: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, LOG_D: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Stream over all components and store the rows in n_mask; without REFINE, those of them that are not far out.

    Returns the leading component of every row, and which rows are too far out for plain differences.
    """
    x = x.to(DTYPE)
    direction = direction.to(DTYPE)
    m_i = tl.full((BLOCK_N,), MINUS_INF, DTYPE)
    l_i = tl.zeros((BLOCK_N,), DTYPE)
    acc = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)  # sum of p (x - alpha m)
    mean = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)  # of the components seen so far
    spread = tl.zeros((BLOCK_N,), DTYPE)  # sum of p |m - mean|^2
    pull = tl.zeros((BLOCK_N, BLOCK_D), DTYPE)  # sum of p (m - mean) ((m - mean) . direction)
    lead_a = lead  # of an earlier sweep, if there was one
    lead_m = tl.load(
        means_ptr + lead[:, None] * stride_mk + offs_d[None, :] * stride_md, mask=(offs_d < d)[None, :], other=0.0
    ).to(DTYPE)
    for start in range(0, k, BLOCK_K):
        offs_k, m, logits, away = _tile(
            start, k, x, x_ptrs, stride_xd, n_mask, lead_a, lead_m, alpha, std, offs_d, d,
            means_ptr, stride_mk, stride_md, log_weights_ptr, stride_w,
            REFINE, DTYPE, BLOCK_N, BLOCK_K, BLOCK_D, LOG_D, EMULATE,
        )  # fmt: skip
        top, place = tl.max(logits, axis=1, return_indices=True)
        lead = tl.where(top > m_i, start + place.to(tl.int64), lead)
        m_new = tl.maximum(m_i, top)
        shift = tl.where(m_new == MINUS_INF, 0.0, m_new)  # nothing seen yet: exp(-inf - 0) = 0
        p = tl.exp(logits - shift[:, None])
        old = tl.exp(m_i - shift)
        l_tile = tl.sum(p, axis=1)
        l_new = l_i * old + l_tile
        if SCORE and not REFINE:
            acc = acc * old[:, None] + tl.sum(p[:, :, None] * away, axis=1)
        if MEAN or TRACE or PRODUCT or (SCORE and REFINE):
            # The tile has a mean and spreads of its own; two groups are joined as in the parallel form of variance.
            if BLOCK_K == 1:
                tile_mean = tl.broadcast_to(m, (BLOCK_N, BLOCK_D))
            else:
                # An fma, as the compiler turns sums of plain products into products of matrices in TensorFloat-32.
                parts = tl.fma(p[:, :, None], m[None, :, :], tl.zeros((BLOCK_N, BLOCK_K, BLOCK_D), DTYPE))
                tile_mean = tl.sum(parts, axis=1) / tl.where(l_tile > 0, l_tile, 1.0)[:, None]
                around = m[None, :, :] - tile_mean[:, None, :]
            share = l_tile / tl.where(l_new > 0, l_new, 1.0)
            between = tile_mean - mean
            joint = l_i * old * share
            if TRACE:
                spread = spread * old + joint * tl.sum(between * between, axis=1)
                if BLOCK_K > 1:
                    spread += tl.sum(p * tl.sum(around * around, axis=2), axis=1)
            if PRODUCT:
                pull = pull * old[:, None] + (joint * tl.sum(between * direction, axis=1))[:, None] * between
                if BLOCK_K > 1:
                    along = p * tl.sum(around * direction[:, None, :], axis=2)
                    pull += tl.sum(along[:, :, None] * around, axis=1)
            mean = mean * (1 - share)[:, None] + tile_mean * share[:, None]
        l_i = l_new
        m_i = m_new
    top_w = tl.load(log_weights_ptr + lead * stride_w).to(DTYPE)
    near = top_w - m_i <= 0.5 * d + 4 * tl.sqrt(d.to(tl.float32)) + 8  # false for NaN
    if not REFINE:
        n_mask = n_mask & near
    nd_mask = n_mask[:, None] & (offs_d < d)[None, :]
    offs_nd = offs_n[:, None] * d + offs_d[None, :]
    dead = tl.where(l_i > 0, 0.0, float("nan")).to(DTYPE)  # of rows with no finite logit
    total = l_i + dead
    if LOG_DENSITY:
        value = (m_i + tl.log(l_i)).to(tl.float64) - d * (tl.log(std) + HALF_LOG_2_PI)
        if REFINE:
            lead_w = tl.load(log_weights_ptr + lead_a * stride_w).to(DTYPE)
            away = difference(x, lead_m, alpha, BLOCK_N, BLOCK_D) / std[:, None]
            value += lead_w - 0.5 * tl.sum(away * away, axis=1)
        tl.store(log_density_ptr + offs_n, value.to(log_density_ptr.dtype.element_ty), mask=n_mask)
    if SCORE:
        if REFINE:  # far from every centre: the mean's own rounding is small beside the distance
            value = -difference(x, mean + dead[:, None], alpha, BLOCK_N, BLOCK_D) / (std * std)[:, None]
        else:
            value = -(acc / total[:, None]).to(tl.float64) / (std * std)[:, None]
        tl.store(score_ptr + offs_nd, value.to(score_ptr.dtype.element_ty), mask=nd_mask)
    if MEAN:
        value = mean + dead[:, None]
        tl.store(mean_ptr + offs_nd, value.to(mean_ptr.dtype.element_ty), mask=nd_mask)
    if TRACE:
        tl.store(trace_ptr + offs_n, (spread / total).to(trace_ptr.dtype.element_ty), mask=n_mask)
    if PRODUCT:
        gain = alpha / (std * std)
        value = (pull / total[:, None]).to(tl.float64) * (gain * gain)[:, None]
        value -= direction.to(tl.float64) / (std * std)[:, None]
        tl.store(product_ptr + offs_nd, value.to(product_ptr.dtype.element_ty), mask=nd_mask)
    if WEIGHTS:
        for start in range(0, k, BLOCK_K):
            offs_k, m, logits, away = _tile(
                start, k, x, x_ptrs, stride_xd, n_mask, lead_a, lead_m, alpha, std, offs_d, d,
                means_ptr, stride_mk, stride_md, log_weights_ptr, stride_w,
                REFINE, DTYPE, BLOCK_N, BLOCK_K, BLOCK_D, LOG_D, EMULATE,
            )  # fmt: skip
            gamma = tl.exp(logits - m_i[:, None]) / total[:, None]
            offs_nk = offs_n[:, None] * k + offs_k[None, :]
            nk_mask = n_mask[:, None] & (offs_k < k)[None, :]
            tl.store(weights_ptr + offs_nk, gamma.to(weights_ptr.dtype.element_ty), mask=nk_mask)
    return lead, near


@triton.jit(do_not_specialize=["n", "k", "d"])
def differences_kernel(
    x_ptr, stride_xn, stride_xd, direction_ptr, stride_vn, stride_vd,
    means_ptr, stride_mk, stride_md, log_weights_ptr, stride_w, alpha_ptr, stride_a, std_ptr, stride_s,
    log_density_ptr, score_ptr, mean_ptr, trace_ptr, weights_ptr, product_ptr, flags_ptr, n, k, d,
    LOG_DENSITY: tl.constexpr, SCORE: tl.constexpr, MEAN: tl.constexpr, TRACE: tl.constexpr, WEIGHTS: tl.constexpr,
    PRODUCT: tl.constexpr, FLAGGED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, LOG_D: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows of x against all components, and once more for those rows that need it.

    FLAGGED: only rows with a non-zero flag are done, and a program without any ends at once.
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    n_mask = offs_n < n
    if FLAGGED:
        n_mask = n_mask & (tl.load(flags_ptr + offs_n, mask=n_mask, other=0) != 0)
        if tl.max(n_mask.to(tl.int32), axis=0) == 0:
            return
    nd_mask = n_mask[:, None] & (offs_d < d)[None, :]
    x_ptrs = x_ptr + offs_n[:, None] * stride_xn
    x = tl.load(x_ptrs + offs_d[None, :] * stride_xd, mask=nd_mask, other=0.0)
    direction = x
    if PRODUCT:
        v_ptrs = direction_ptr + offs_n[:, None] * stride_vn + offs_d[None, :] * stride_vd
        direction = tl.load(v_ptrs, mask=nd_mask, other=0.0)
    alpha = tl.load(alpha_ptr + offs_n * stride_a, mask=n_mask, other=0.0)
    std = tl.load(std_ptr + offs_n * stride_s, mask=n_mask, other=1.0)
    lead, near = _sweep(
        x, x_ptrs, stride_xd, direction, tl.zeros((BLOCK_N,), tl.int64), offs_n, n_mask, offs_d, alpha, std, k, d,
        means_ptr, stride_mk, stride_md, log_weights_ptr, stride_w,
        log_density_ptr, score_ptr, mean_ptr, trace_ptr, weights_ptr, product_ptr,
        LOG_DENSITY, SCORE, MEAN, TRACE, WEIGHTS, PRODUCT, False, x.dtype, BLOCK_N, BLOCK_K, BLOCK_D, LOG_D, EMULATE,
    )  # fmt: skip
    far = n_mask & (near == 0)
    if tl.max(far.to(tl.int32), axis=0) > 0:
        _sweep(
            x, x_ptrs, stride_xd, direction, lead, offs_n, far, offs_d, alpha, std, k, d,
            means_ptr, stride_mk, stride_md, log_weights_ptr, stride_w,
            log_density_ptr, score_ptr, mean_ptr, trace_ptr, weights_ptr, product_ptr,
            LOG_DENSITY, SCORE, MEAN, TRACE, WEIGHTS, PRODUCT, True, tl.float64,
            BLOCK_N, BLOCK_K, BLOCK_D, LOG_D, EMULATE,
        )  # fmt: skip


def differences(
    x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor, *,
    outputs: Sequence[str], direction: Tensor | None = None,
    into: dict[str, Tensor] | None = None, flags: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The outputs asked for, one launch each: several at once need more registers than there are.

    Args:
        x, means, log_weights, alpha, std, outputs, direction: as in kernels/posterior.py.
        into: contiguous outputs to write to. flags: (n,) int8, rows to do; the others are left as they are.

    Raises:
        ValueError: d is beyond every launch configuration.
    """
    (n, d), k = x.shape, means.shape[0]
    out = allocate(x, k, outputs) if into is None else into
    if n == 0:
        return out
    try:
        blocks, warps, _ = launch("posterior", x.dtype, d, gpu_name(x.device))
    except LookupError as error:
        raise ValueError(f"{error}: use backend='cpp' or backend='reference'") from None
    direction = x if direction is None else direction
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        for wanted in outputs:
            differences_kernel[(triton.cdiv(n, blocks["BLOCK_N"]),)](
                x, x.stride(0), x.stride(1), direction, direction.stride(0), direction.stride(1),
                means, means.stride(0), means.stride(1), log_weights, log_weights.stride(0),
                alpha, alpha.stride(0) if alpha.ndim else 0, std, std.stride(0) if std.ndim else 0,
                *(out[name] if name == wanted else x for name in OUTPUTS), x if flags is None else flags, n, k, d,
                *(name == wanted for name in OUTPUTS), flags is not None, **blocks,
                LOG_D=blocks["BLOCK_D"].bit_length() - 1, EMULATE=not x.is_cuda, num_warps=warps,
            )  # fmt: skip
    return out


def variants() -> list[Variant]:
    """Every configuration that is shipped: rows of the table, each output, and flagged rows where those occur."""
    found = []
    for row in rows("posterior"):
        if row["gpu"] == "":
            continue
        kind = {"float32": "*fp32", "float64": "*fp64"}[row["dtype"]]
        types = {name: kind if name.endswith("_ptr") else "i32" for name in differences_kernel.arg_names}
        types |= {"alpha_ptr": "*fp64", "std_ptr": "*fp64", "flags_ptr": "*i8"}
        flagged = (False, True) if row["dtype"] == "float32" and 32 < row["most_d"] <= 256 else (False,)
        for marked, (i, output) in itertools.product(flagged, enumerate(OUTPUTS)):
            constants: dict[str, Any] = {name: i == j for j, name in enumerate(FLAGS)} | row["blocks"]
            constants |= {"FLAGGED": marked, "LOG_D": row["blocks"]["BLOCK_D"].bit_length() - 1, "EMULATE": False}
            name = f"differences {row['gpu']} {row['dtype']} d<={row['most_d']} {output}" + " flagged" * marked
            kinds = {name: value for name, value in types.items() if name not in constants}
            setting = Launch(row["blocks"], row["warps"], row["stages"])
            known = SPILLS if row["most_d"] > 2_048 else 0
            found.append(Variant(name, differences_kernel, kinds, constants, setting, spills=known))
    return found
