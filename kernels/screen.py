"""Screen-and-refine for kernels/two_pass.py: which components may matter to a row, and its outputs from those alone.

Products of the leading bfloat16 pieces give logits with a rigorous bound on their error; components that the bound
cannot exclude are listed, at most LIST of them per row, and their logits formed anew by differences, relative to one of
them, in twice float64's precision: |error| <= 1e-15 (1 + |relative logit|).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .accurate import two_product, two_sum
from .chunks import HALF_LOG_2_PI, MINUS_INF, tile_logits

SLACK = tl.constexpr(24.0)  # see `_threshold`


@triton.jit
def _threshold(lowest, square, std, k):
    """Logit below which all k components together stay under 2^-24, also after a factor (alpha |m - m_top| / std)^2.

    With B = |x - alpha m_top| / std <= sqrt(square / std^2 - 2 lowest), that factor is at most 4 B^2 + 4 gap for a
    component that is `gap` behind: exp(-gap) (4 B^2 + 4 gap) <= 2^-24 / k once gap >= log k + SLACK + log(1 + 4 B^2).
    """
    reach = tl.maximum(square / (std * std) - 2 * lowest, 0.0)
    return lowest - (tl.log(k.to(tl.float64)) + SLACK + tl.log(1 + 4 * reach))


@triton.jit
def _norm(square):
    """Square root in float32, as cheap as it gets and right to 2^-20: `screen_error` has room for that."""
    return tl.sqrt(square.to(tl.float32)).to(tl.float64)


@triton.jit(do_not_specialize=["first", "count", "rows", "buffers", "k"])
def screen_kernel(
    dots_ptr, log_weights_ptr, stride_w, square_ptr, alpha_ptr, stride_a, std_ptr, stride_s, x_square_ptr,
    lowest_ptr, lost_ptr, size_ptr, reach_ptr, bound_ptr, kept_ptr, old_ptr, old_upper_ptr, new_ptr, new_upper_ptr,
    first, count, rows, buffers, k, error, K,
    LIST: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: one row against one chunk of `count` components; a list of those that may still matter is kept.

    error: |logit - true logit| <= gain error |x'| |m'|. State of a row, float64 unless said: lowest, a lower bound on
    its largest logit; lost, the largest upper bound of a component that mattered when it found no room; size and
    reach, the largest |gain dot| of components that mattered and |m'|; bound, below which nothing matters; kept, int32
    entries of its list of components (rows, LIST) int32 and of their upper bounds.
    """
    row = tl.program_id(0).to(tl.int64)
    alpha = tl.load(alpha_ptr + row * stride_a)
    std = tl.load(std_ptr + row * stride_s)
    gain = alpha / (std * std)
    half = 0.5 * alpha * gain
    x_square = tl.load(x_square_ptr + row)
    scale = gain * error * tl.sqrt(x_square)
    lowest = tl.load(lowest_ptr + row)
    best = tl.full((BLOCK_K,), MINUS_INF, tl.float64)
    longest = tl.zeros((BLOCK_K,), tl.float64)
    for start in range(0, count, BLOCK_K):
        offs = start + tl.arange(0, BLOCK_K)
        logits, _, square = tile_logits(
            dots_ptr, row, rows, offs, buffers, log_weights_ptr, stride_w, square_ptr, count, gain, half, K
        )
        best = tl.maximum(best, logits - scale * _norm(square))
        longest = tl.maximum(longest, square)
    lowest = tl.maximum(lowest, tl.max(best, axis=0))
    bound = _threshold(lowest, x_square, std, k)
    tl.store(reach_ptr + row, tl.maximum(tl.load(reach_ptr + row), tl.sqrt(tl.max(longest, axis=0))))
    tl.store(lowest_ptr + row, lowest)
    tl.store(bound_ptr + row, bound)

    slots = tl.arange(0, LIST)
    kept = tl.load(kept_ptr + row)
    held = slots < kept
    number = tl.load(old_ptr + row * LIST + slots, mask=held, other=0)
    old_upper = tl.load(old_upper_ptr + row * LIST + slots, mask=held, other=MINUS_INF)
    held = held & (old_upper >= bound)
    old_place = tl.cumsum(held.to(tl.int32), axis=0) - 1
    tl.store(new_ptr + row * LIST + old_place, number, mask=held)
    tl.store(new_upper_ptr + row * LIST + old_place, old_upper, mask=held)
    kept = tl.sum(held.to(tl.int32), axis=0)
    lost = tl.full((), MINUS_INF, tl.float64)
    size = tl.zeros((), tl.float64)
    for start in range(0, count, BLOCK_K):
        offs = start + tl.arange(0, BLOCK_K)
        logits, scaled, square = tile_logits(
            dots_ptr, row, rows, offs, buffers, log_weights_ptr, stride_w, square_ptr, count, gain, half, K
        )
        upper = tl.where(logits > MINUS_INF, logits + scale * _norm(square), MINUS_INF)
        if tl.max(upper, axis=0) >= bound:  # seldom, at low noise
            matters = (upper >= bound) & (upper > MINUS_INF)
            place = kept + tl.cumsum(matters.to(tl.int32), axis=0) - 1
            room = matters & (place < LIST)
            tl.store(new_ptr + row * LIST + place, first + offs, mask=room)
            tl.store(new_upper_ptr + row * LIST + place, upper, mask=room)
            lost = tl.maximum(lost, tl.max(tl.where(matters & (place >= LIST), upper, MINUS_INF), axis=0))
            size = tl.maximum(size, tl.max(tl.where(matters, tl.abs(scaled), 0.0), axis=0))
            kept += tl.sum(matters.to(tl.int32), axis=0)
    tl.store(lost_ptr + row, tl.maximum(tl.load(lost_ptr + row), lost))
    tl.store(size_ptr + row, tl.maximum(tl.load(size_ptr + row), size))
    tl.store(kept_ptr + row, tl.minimum(kept, LIST))


@triton.jit
def _candidates(number_ptr, upper_ptr, kept_ptr, bound_ptr, lost_ptr, row, LIST: tl.constexpr):
    """List of row (LIST,), which of its entries count, and the entry of the largest bound; none if one got lost."""
    slots = tl.arange(0, LIST)
    bound = tl.load(bound_ptr + row)
    settled = tl.load(lost_ptr + row) < bound  # false for NaN
    held = slots < tl.where(settled, tl.load(kept_ptr + row), 0)
    number = tl.load(number_ptr + row * LIST + slots, mask=held, other=0).to(tl.int64)
    upper = tl.load(upper_ptr + row * LIST + slots, mask=held, other=MINUS_INF)
    held = held & (upper >= bound)
    _, lead = tl.max(tl.where(held, upper, MINUS_INF), axis=0, return_indices=True)
    return number, held, lead, settled


@triton.jit
def _join(high, low, other_high, other_low):
    high, error = two_sum(high, other_high)
    return high, (low + other_low) + error


@triton.jit(do_not_specialize=["d"])
def candidate_kernel(
    x_ptr, stride_xn, stride_xd, means_ptr, stride_mk, stride_md, log_weights_ptr, stride_w,
    alpha_ptr, stride_a, std_ptr, stride_s, number_ptr, upper_ptr, kept_ptr, bound_ptr, lost_ptr, logits_ptr, d,
    LIST: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the logits of a row's list relative to its leading entry, logits (rows, LIST) float64."""
    row = tl.program_id(0).to(tl.int64)
    number, held, lead, settled = _candidates(number_ptr, upper_ptr, kept_ptr, bound_ptr, lost_ptr, row, LIST)
    slots = tl.arange(0, LIST)
    alpha = tl.load(alpha_ptr + row * stride_a)
    std = tl.load(std_ptr + row * stride_s)
    first = tl.sum(tl.where(slots == lead, number, 0), axis=0)
    lead_w = tl.load(log_weights_ptr + first * stride_w).to(tl.float64)
    logits = tl.where(held & (slots == lead), 0.0, MINUS_INF).to(tl.float64)
    for slot in range(0, tl.where(settled, tl.load(kept_ptr + row), 0)):
        mine = tl.sum(tl.where(slots == slot, number, 0), axis=0)
        if mine != first:
            high = tl.zeros((BLOCK_D,), tl.float64)
            low = tl.zeros((BLOCK_D,), tl.float64)
            for start in range(0, d, BLOCK_D):
                offs = start + tl.arange(0, BLOCK_D).to(tl.int64)
                mask = offs < d
                x = tl.load(x_ptr + row * stride_xn + offs * stride_xd, mask=mask, other=0.0).to(tl.float64)
                lead_m = tl.load(means_ptr + first * stride_mk + offs * stride_md, mask=mask, other=0.0).to(tl.float64)
                m = tl.load(means_ptr + mine * stride_mk + offs * stride_md, mask=mask, other=0.0).to(tl.float64)
                # alpha (m_lead - m) . (2x - alpha (m_lead + m)), every sum and product with its error
                gap, gap_error = two_sum(lead_m, -m)
                pair, pair_error = two_sum(lead_m, m)
                product, product_error = two_product(alpha, pair)
                middle, middle_error = two_sum(2 * x, -product)
                middle_error = middle_error - product_error - alpha * pair_error
                term, term_error = two_product(gap, middle)
                high, error = two_sum(high, term)
                low += error + (term_error + gap * middle_error + gap_error * middle)
            high, low = tl.reduce((high, low), 0, _join)
            farther = (high + low) / std
            prior = tl.load(log_weights_ptr + mine * stride_w).to(tl.float64) - lead_w
            logits = tl.where(held & (slots == slot), prior - farther * (0.5 * alpha / std), logits)
    tl.store(logits_ptr + row * LIST + slots, logits)


@triton.jit(do_not_specialize=["k", "d"])
def refine_kernel(
    x_ptr, stride_xn, stride_xd, direction_ptr, stride_vn, stride_vd, means_ptr, stride_mk, stride_md,
    log_weights_ptr, stride_w, alpha_ptr, stride_a, std_ptr, stride_s,
    number_ptr, upper_ptr, kept_ptr, bound_ptr, lost_ptr, logits_ptr,
    log_density_ptr, score_ptr, mean_ptr, trace_ptr, weights_ptr, product_ptr, k, d,
    LOG_DENSITY: tl.constexpr, SCORE: tl.constexpr, MEAN: tl.constexpr, TRACE: tl.constexpr, WEIGHTS: tl.constexpr,
    PRODUCT: tl.constexpr, LIST: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the outputs of a row whose list holds all that matters, from that list, in float64.

    Sums are taken relative to the component of largest weight, at least 1 / LIST of the whole: differences of sums then
    lose at most that factor, and one component alone gives its own mean and no spread, exactly. Weights of other
    components are left as they are.
    """
    row = tl.program_id(0).to(tl.int64)
    number, held, _, settled = _candidates(number_ptr, upper_ptr, kept_ptr, bound_ptr, lost_ptr, row, LIST)
    if settled:
        slots = tl.arange(0, LIST)
        logits = tl.load(logits_ptr + row * LIST + slots)
        top, lead = tl.max(logits, axis=0, return_indices=True)
        p = tl.exp(logits - top)
        total = tl.sum(p, axis=0)
        gamma = p / total
        first = tl.sum(tl.where(slots == lead, number, 0), axis=0)
        alpha = tl.load(alpha_ptr + row * stride_a)
        std = tl.load(std_ptr + row * stride_s)
        squares = tl.zeros((BLOCK_D,), tl.float64)  # |x - alpha m_top|^2 / std^2
        spread = tl.zeros((BLOCK_D,), tl.float64)
        along = tl.zeros((LIST,), tl.float64)  # (m - m_top) . direction
        for start in range(0, d, BLOCK_D):
            offs = start + tl.arange(0, BLOCK_D).to(tl.int64)
            mask = offs < d
            x = tl.load(x_ptr + row * stride_xn + offs * stride_xd, mask=mask, other=0.0).to(tl.float64)
            lead_m = tl.load(means_ptr + first * stride_mk + offs * stride_md, mask=mask, other=0.0).to(tl.float64)
            m_ptrs = means_ptr + number[:, None] * stride_mk + offs[None, :] * stride_md
            m = tl.load(m_ptrs, mask=held[:, None] & mask[None, :], other=0.0).to(tl.float64)
            around = tl.where(held[:, None], m - lead_m[None, :], 0.0)
            offset = tl.sum(gamma[:, None] * around, axis=0)
            product, product_error = two_product(alpha, lead_m)
            away = (x - product) - product_error
            squares += (away / std) * (away / std)
            if SCORE:
                value = (alpha * offset - away) / (std * std)
                tl.store(score_ptr + row * d + offs, value.to(score_ptr.dtype.element_ty), mask=mask)
            if MEAN:
                tl.store(mean_ptr + row * d + offs, (lead_m + offset).to(mean_ptr.dtype.element_ty), mask=mask)
            if TRACE:
                spread += tl.sum(gamma[:, None] * around * around, axis=0) - offset * offset
            if PRODUCT:
                v_ptrs = direction_ptr + row * stride_vn + offs * stride_vd
                v = tl.load(v_ptrs, mask=mask, other=0.0).to(tl.float64)
                along += tl.sum(around * v[None, :], axis=1)
        if LOG_DENSITY:
            density = tl.load(log_weights_ptr + first * stride_w).to(tl.float64) + tl.log(total)
            density -= 0.5 * tl.sum(squares, axis=0) + d * (tl.log(std) + HALF_LOG_2_PI)
            tl.store(log_density_ptr + row, density.to(log_density_ptr.dtype.element_ty))
        if TRACE:
            tl.store(trace_ptr + row, tl.sum(spread, axis=0).to(trace_ptr.dtype.element_ty))
        if PRODUCT:
            gain = alpha / (std * std)
            pull = gamma * (along - tl.sum(gamma * along, axis=0))
            for start in range(0, d, BLOCK_D):
                offs = start + tl.arange(0, BLOCK_D).to(tl.int64)
                mask = offs < d
                lead_m = tl.load(means_ptr + first * stride_mk + offs * stride_md, mask=mask, other=0.0).to(tl.float64)
                m_ptrs = means_ptr + number[:, None] * stride_mk + offs[None, :] * stride_md
                m = tl.load(m_ptrs, mask=held[:, None] & mask[None, :], other=0.0).to(tl.float64)
                around = tl.where(held[:, None], m - lead_m[None, :], 0.0)
                v_ptrs = direction_ptr + row * stride_vn + offs * stride_vd
                v = tl.load(v_ptrs, mask=mask, other=0.0).to(tl.float64)
                value = gain * gain * tl.sum(pull[:, None] * around, axis=0) - v / (std * std)
                tl.store(product_ptr + row * d + offs, value.to(product_ptr.dtype.element_ty), mask=mask)
        if WEIGHTS:
            tl.store(weights_ptr + row * k + number, gamma.to(weights_ptr.dtype.element_ty), mask=held)
