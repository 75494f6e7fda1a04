"""The integrators: a tile of trajectories through fixed steps of a table, or with step-size control per trajectory.

They see numbers only (tables, tableaux) and the forms of flow_forms.py. No operation mixes rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .flow_forms import LOG2E, R_FROM, R_TO, end, enter, leave, moved, slope

SUCCESS, MAX_STEPS, NON_FINITE, STEP_UNDERFLOW = (tl.constexpr(i) for i in range(4))  # status of a trajectory
SAFETY, SHRINK, GROW = tl.constexpr(0.9), tl.constexpr(0.2), tl.constexpr(10.0)  # of the step-size controller

_PLAIN = ["seed", "first_row", "n", "k", "d"]


@triton.jit
def _combine(TABLEAU: tl.constexpr, ROW: tl.constexpr, slopes, COUNT: tl.constexpr):
    """sum_j TABLEAU[ROW, j] slopes_j over the first COUNT slopes, zero coefficients left out."""
    total = tl.zeros(slopes[0].shape, slopes[0].dtype)
    for j in tl.static_range(COUNT):
        if TABLEAU[ROW][j] != 0:
            total += TABLEAU[ROW][j] * slopes[j]
    return total


@triton.jit(do_not_specialize=[*_PLAIN, "max_steps"])
def flow_adaptive_kernel(
    x_ptr, stride_xn, stride_xd, out_ptr, means_ptr, means_low_ptr, gram_ptr, gram_low_ptr, half_norms_ptr,
    log_weights_ptr, center_ptr, ends_ptr, reach_ptr, rtol, atol, opening, max_steps,
    status_ptr, steps_ptr, evaluations_ptr, seed, first_row, n, k, d,
    TABLEAU: tl.constexpr, STAGES: tl.constexpr, REUSE: tl.constexpr, SPAN: tl.constexpr, PER_ROW: tl.constexpr,
    DRAW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N trajectories, each with its own step size, until the last one has ended."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    begin = tl.program_id(0).to(tl.int64) * BLOCK_N
    offs_n = begin + tl.arange(0, BLOCK_N)
    n_mask = offs_n < n
    rows = (x_ptr, stride_xn, stride_xd, seed, first_row)
    mixture = (means_ptr, means_low_ptr, gram_ptr, gram_low_ptr, half_norms_ptr, log_weights_ptr)
    z, size2 = enter(
        rows, begin, n, d, ends_ptr, center_ptr, mixture, SPAN, PER_ROW, DRAW, DTYPE, BLOCK_N, BLOCK_K, BLOCK_D
    )
    c = tl.zeros(z.shape, DTYPE)
    r_from = end(ends_ptr, R_FROM, begin, n, PER_ROW, BLOCK_N)
    r_to = end(ends_ptr, R_TO, begin, n, PER_ROW, BLOCK_N)
    span = r_to - r_from
    sound = (size2 - size2 == 0) & (span - span == 0)
    running = n_mask & sound & (span != 0)
    status = tl.where(sound, SUCCESS, NON_FINITE)
    count = tl.zeros((BLOCK_N,), tl.int32)
    rejected = tl.zeros((BLOCK_N,), tl.int1)
    r, target = r_from.to(DTYPE), r_to.to(DTYPE)
    whole = tl.abs(span)
    length = tl.minimum(whole, tl.maximum(tl.load(reach_ptr), r_from) * opening)
    h = tl.where(span < 0, -length, length).to(DTYPE)
    first = slope(z, r[:, None] * LOG2E, r[:, None], mixture, k, SPAN, BLOCK_K, BLOCK_D)
    while tl.max(running.to(tl.int32), axis=0) > 0:
        left = target - r
        last = tl.abs(h) >= tl.abs(left)
        step = tl.where(running, tl.where(last, left, h), 0.0)
        r_next = tl.where(running & last, target, r + step)
        if not REUSE:
            first = slope(z, r[:, None] * LOG2E, r[:, None], mixture, k, SPAN, BLOCK_K, BLOCK_D)
        slopes = (first,)
        for j in tl.static_range(1, STAGES - REUSE):
            r_j = r + TABLEAU[STAGES][j] * step
            if TABLEAU[STAGES][j] == 1:
                r_j = r_next
            point = moved(z, step[:, None] * _combine(TABLEAU, j, slopes, j), mixture, SPAN, BLOCK_K)
            slopes = slopes + (  # type: ignore[assignment]
                slope(point, r_j[:, None] * LOG2E, r_j[:, None], mixture, k, SPAN, BLOCK_K, BLOCK_D),
            )
        w = step[:, None] * _combine(TABLEAU, STAGES + 1, slopes, STAGES - REUSE)
        e = _combine(TABLEAU, STAGES + 2, slopes, STAGES - REUSE)  # now, so that the slopes need not be kept any longer
        new = moved(z, w, mixture, SPAN, BLOCK_K)
        newest = first
        if REUSE:
            newest = slope(new, r_next[:, None] * LOG2E, r_next[:, None], mixture, k, SPAN, BLOCK_K, BLOCK_D)
            e += TABLEAU[STAGES + 2][STAGES - 1] * newest
        e = step[:, None] * e
        if SPAN:  # |sum_k w_k means_k|^2 and products with it, through the Gram matrix
            size2_new = size2 + tl.sum(w * (z + new), axis=1)
            size2_new = tl.where(size2_new < 0, 0.0, size2_new)
            error2 = tl.sum(e * moved(tl.zeros(e.shape, DTYPE), e, mixture, SPAN, BLOCK_K), axis=1)
        else:
            size2_new = tl.sum(new * new, axis=1)
            error2 = tl.sum(e * e, axis=1)
        bound = atol + rtol * tl.sqrt(tl.maximum(size2, size2_new) / d.to(DTYPE))
        error = tl.where(error2 <= 0, 0.0, tl.sqrt(error2 / d.to(DTYPE)) / bound)
        broken = running & ((size2_new - size2_new != 0) | (error - error != 0))
        accepted = running & (error <= 1) & (broken == 0)
        held = tl.minimum(tl.maximum(error, 1e-30), 1e30)
        factor = tl.minimum(tl.maximum(tl.exp2(-0.2 * tl.log2(held)) * SAFETY, SHRINK), GROW)
        factor = tl.where(rejected, tl.minimum(factor, 1.0), factor)
        rejected = accepted == 0
        count += running.to(tl.int32)
        h = tl.where(running, step * factor, h)
        r = tl.where(accepted, r_next, r)
        size2 = tl.where(accepted, size2_new, size2)
        z = tl.where(accepted[:, None], new, z)
        if SPAN:
            c += tl.where(accepted[:, None], w, 0.0)
        if REUSE:
            first = tl.where(accepted[:, None], newest, first)
        away = tl.abs(target - r)
        arrived = accepted & (away == 0)
        EPS: tl.constexpr = 2.0**-52 if DTYPE == tl.float64 else 2.0**-23
        stuck = (tl.abs(h) < 4 * EPS * tl.abs(r)) & (tl.abs(h) < away)
        reason = tl.where(arrived, SUCCESS, tl.where(stuck, STEP_UNDERFLOW, MAX_STEPS))
        reason = tl.where(broken, NON_FINITE, reason)
        finished = running & (arrived | stuck | broken | (count >= max_steps))
        status = tl.where(finished, reason, status)
        running = running & (finished == 0)
    leaving = c if SPAN else z
    leave(
        leaving, status == NON_FINITE, rows, begin, n, d, ends_ptr, center_ptr, mixture, out_ptr,
        SPAN, PER_ROW, DRAW, DTYPE, BLOCK_N, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    tl.store(status_ptr + offs_n, status.to(tl.int8), mask=n_mask)
    tl.store(steps_ptr + offs_n, count, mask=n_mask)
    evaluations = tl.where(count > 0, count * (STAGES - REUSE) + REUSE, 0)
    tl.store(evaluations_ptr + offs_n, evaluations.to(tl.int32), mask=n_mask)


@triton.jit(do_not_specialize=[*_PLAIN, "steps"])
def flow_fixed_kernel(
    x_ptr, stride_xn, stride_xd, out_ptr, means_ptr, means_low_ptr, gram_ptr, gram_low_ptr, half_norms_ptr,
    log_weights_ptr, center_ptr, ends_ptr, table_ptr, steps, status_ptr, seed, first_row,
    n, k, d,
    STAGES: tl.constexpr, SPAN: tl.constexpr, PER_ROW: tl.constexpr,
    DRAW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N trajectories through `steps` steps of the table (m, S + 1, S + 3), see step_table."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    begin = tl.program_id(0).to(tl.int64) * BLOCK_N
    offs_n = begin + tl.arange(0, BLOCK_N)
    n_mask = offs_n < n
    rows = (x_ptr, stride_xn, stride_xd, seed, first_row)
    mixture = (means_ptr, means_low_ptr, gram_ptr, gram_low_ptr, half_norms_ptr, log_weights_ptr)
    z, size2 = enter(
        rows, begin, n, d, ends_ptr, center_ptr, mixture, SPAN, PER_ROW, DRAW, DTYPE, BLOCK_N, BLOCK_K, BLOCK_D
    )
    c = tl.zeros(z.shape, DTYPE)
    row = table_ptr
    for _ in range(steps):
        slopes = (slope(z, tl.load(row + 1), tl.load(row + 2), mixture, k, SPAN, BLOCK_K, BLOCK_D),)
        for j in tl.static_range(1, STAGES + 1):
            row += STAGES + 3
            rho = tl.load(row)
            w = tl.load(row + 3) * slopes[0]
            for i in tl.static_range(1, j):
                w += tl.load(row + 3 + i) * slopes[i]
            point = moved(z + rho * z, w, mixture, SPAN, BLOCK_K)
            if j < STAGES:
                slopes = slopes + (  # type: ignore[assignment]
                    slope(point, tl.load(row + 1), tl.load(row + 2), mixture, k, SPAN, BLOCK_K, BLOCK_D),
                )
            else:
                z = point
                c += rho * c + w
        row += STAGES + 3
    leaving = c if SPAN else z
    dead = tl.zeros((BLOCK_N,), tl.int1)
    finite = leave(
        leaving, dead, rows, begin, n, d, ends_ptr, center_ptr, mixture, out_ptr,
        SPAN, PER_ROW, DRAW, DTYPE, BLOCK_N, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    tl.store(status_ptr + offs_n, tl.where(finite, SUCCESS, NON_FINITE).to(tl.int8), mask=n_mask)
