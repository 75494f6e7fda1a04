"""The ways of kernels/two_pass.py through the data, each a loop over blocks of rows and chunks of components."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .chunks import finish_kernel, merge_kernel, softmax_kernel, split_kernel
from .differences import differences
from .launch import Launch
from .outputs import OUTPUTS
from .screen import candidate_kernel, refine_kernel, screen_kernel
from .workspace import LIST, Form, Plan, form, plan

SETTLED, PRODUCTS, WIDE_PRODUCTS, DIFFERENCES = range(4)  # ways of a row


class Job(NamedTuple):
    """Arguments of `two_pass`, alpha and std expanded to (n,), center (d,) float64, and its launch configuration."""

    x: Tensor
    direction: Tensor
    means: Tensor
    log_weights: Tensor
    alpha: Tensor
    std: Tensor
    out: dict[str, Tensor]
    center: Tensor
    config: Launch

    @property
    def flags(self) -> list[bool]:
        """Which of OUTPUTS are asked for."""
        return [name in self.out for name in OUTPUTS]

    def outputs(self, first: int = 0) -> list[Tensor]:
        """All OUTPUTS from row `first` on, x in the place of those not asked for."""
        return [self.out[name][first:] if name in self.out else self.x for name in OUTPUTS]


def screen_rows(job: Job, kind: Form) -> Tensor:
    """Outputs of all rows that the screen settles; the way of every row, int8 (n,), see SETTLED and below."""
    (n, d), k = job.x.shape, job.means.shape[0]
    screen = form("bf16x1", job.x.device)
    sizes = plan(n, k, d, screen, screen=True)
    room = _allocate(sizes, job.x.device)
    way = torch.empty((n,), dtype=torch.int8, device=job.x.device)
    error = screen_error(d)
    lowest, lost, size, reach, bound = room["state"]
    for first in range(0, n, sizes.rows):
        rows = min(sizes.rows, n - first)
        x, alpha, std = (tensor[first : first + rows] for tensor in (job.x, job.alpha, job.std))
        _split(job, x, None, rows, alpha, room["x"], room["x"], room["x_square"], sizes.padded, screen, reverse=True)
        room["state"].zero_()
        room["state"][:2].fill_(float("-inf"))
        room["kept"].zero_()
        for number, start in enumerate(range(0, k, sizes.chunk)):
            count = min(sizes.chunk, k - start)
            _split_means(job, start, count, room["m"], room["m"], room["m_square"], sizes.padded, screen)
            _dots(room["x"], room["m"], room["dots"], sizes.padded, screen)
            log_weights, old, new = job.log_weights[start:], number % 2, 1 - number % 2
            screen_kernel[(rows,)](
                room["dots"], log_weights, log_weights.stride(0), room["m_square"],
                alpha, alpha.stride(0), std, std.stride(0), room["x_square"],
                lowest, lost, size, reach, bound, room["kept"],
                room["number"][old], room["upper"][old], room["number"][new], room["upper"][new],
                start, count, sizes.rows, len(room["dots"]), k, error, sizes.chunk,
                LIST, job.config.blocks["SCREEN_K"], num_warps=job.config.warps,
            )  # fmt: skip
        _refine(job, x, alpha, std, first, room["number"][new], room["upper"][new], room, lost, bound)
        state = (state[:rows] for state in (room["x_square"], *room["state"]))
        way[first : first + rows] = _ways(job, kind, alpha, std, *state)
    return way


def screen_error(d: int) -> float:
    """|x1 . m1 - x' . m'| <= screen_error(d) |x'| |m'|: two roundings to 8 bits, and sums of d terms that truncate."""
    return 2.0**-7 + 2.0**-14 + d * 2.0**-22


def expected_error(kind: Form, d: int, size: Tensor, lengths: Tensor) -> Tensor:
    """Three standard deviations of the error of a logit from products, about; of `size`, and |x'| |m'| of `lengths`."""
    # A tensor core adds 16 products at once, everything else one after the other.
    steps = min(d, kind.terms) / (16 if kind.store == torch.bfloat16 else 1)
    error = torch.finfo(kind.sums).eps / 2 * math.sqrt(steps) * size
    if kind.pieces == 2:
        error = error + 2.0**-14 * lengths / math.sqrt(d)  # what two pieces leave out
    return error


def _refine(
    job: Job, x: Tensor, alpha: Tensor, std: Tensor, first: int, number: Tensor, upper: Tensor,
    room: dict[str, Tensor], lost: Tensor, bound: Tensor,
) -> None:  # fmt: skip
    blocks, warps = job.config.blocks, job.config.warps
    candidate_d, refine_d = blocks["CANDIDATE_D"], blocks["REFINE_D"]
    d, means, w, v = x.shape[1], job.means, job.log_weights, job.direction[first:]
    lists = (number, upper, room["kept"], bound, lost, room["logits"])
    candidate_kernel[(len(x),)](
        x, x.stride(0), x.stride(1), means, means.stride(0), means.stride(1), w, w.stride(0),
        alpha, alpha.stride(0), std, std.stride(0), *lists, d,
        LIST, candidate_d, num_warps=warps,
    )  # fmt: skip
    refine_kernel[(len(x),)](
        x, x.stride(0), x.stride(1), v, v.stride(0), v.stride(1), means, means.stride(0), means.stride(1),
        w, w.stride(0), alpha, alpha.stride(0), std, std.stride(0), *lists,
        *job.outputs(first), means.shape[0], d, *job.flags, LIST, refine_d, num_warps=warps,
    )  # fmt: skip


def _ways(
    job: Job, kind: Form, alpha: Tensor, std: Tensor, x_square: Tensor, lowest: Tensor, lost: Tensor, size: Tensor,
    reach: Tensor, bound: Tensor,
) -> Tensor:  # fmt: skip
    """The way of every row of a block, int8; rows that are not finite take the differences, which keep them so."""
    ratio, d = alpha * reach / std, job.x.shape[1]  # |alpha m'| / std of the longest mean
    floor = 0.5e-10 if job.x.dtype == torch.float64 else 0.0
    # half of the contract, and at low noise, where that allows anything, no more than suits float32
    tolerance = (32 * torch.finfo(job.x.dtype).eps * (1 + ratio)).clamp(floor, 2.0**-15)
    way = torch.full_like(lost, DIFFERENCES)
    for name, products in ((WIDE_PRODUCTS, form("float64", job.x.device)), (PRODUCTS, kind)):
        error = expected_error(products, d, size, ratio * x_square.sqrt() / std)
        # sums of squares of means cancel in covariances
        error = torch.maximum(error, torch.finfo(products.sums).eps / 2 * (1 + ratio) ** 2)
        allowed = tolerance * (64 if products.pieces == 2 else 1)
        way = torch.where(error <= allowed, name, way)  # false for NaN
    return torch.where(lost < bound, SETTLED, way).to(torch.int8)


def sweep_rows(job: Job, rows: Tensor, kind: Form) -> None:
    """Outputs of `rows` (int64) from matrix products; blocks have the same size for any number of rows."""
    (n, d), k = job.x.shape, job.means.shape[0]
    product, weights = "hessian_vector_product" in job.out, job.out.get("posterior_weights")
    sizes = plan(n, k, d, kind, screen=False, product=product, weights=weights is not None)
    if len(rows) == 0:
        return
    room = _allocate(sizes, job.x.device)
    state, padded, chunk = room["state"], sizes.padded, sizes.chunk
    top, total, spread, along, scale = state
    blocks, warps = job.config.blocks, job.config.warps
    block_k = blocks["PRODUCT_K" if product else "BLOCK_K"]
    tall = room["tall"] if kind.pieces > 1 else room["m"]
    for first in range(0, len(rows), sizes.rows):
        part = rows[first : first + sizes.rows]
        ends = [(job.x, job.alpha, slice(None, sizes.rows)), (job.direction, None, slice(sizes.rows, None))]
        for source, shift, place in ends[: 2 if product else 1]:
            x, square = room["x"][place], room["x_square"][place]
            _split(job, source, part, len(part), shift, x, x, square, padded, kind, reverse=True)
        state.zero_()
        top.fill_(float("-inf"))
        room["acc"].zero_()
        for number, start in enumerate(range(0, k, chunk)):
            count = min(chunk, k - start)
            _split_means(job, start, count, room["m"], tall, room["m_square"], padded, kind)
            _dots(room["x"], room["m"], room["dots"], padded, kind)
            log_weights = job.log_weights[start:]
            softmax_kernel[(sizes.rows,)](
                room["dots"], log_weights, log_weights.stride(0), room["m_square"], part, len(part),
                job.alpha, job.alpha.stride(0), job.std, job.std.stride(0),
                room["p"], top, total, spread, along, scale,
                job.x if weights is None else weights[:, start:], k,
                room["chunk_top"][0 if weights is None else number],
                count, sizes.rows, len(room["dots"]), chunk,
                product, weights is not None, kind.pieces, kind.rounded, block_k, num_warps=warps,
            )  # fmt: skip
            _averages(room["p"], tall, room["parts"], chunk, kind)
            acc, block_d = room["acc"], blocks["BLOCK_D"]
            merge_kernel[(len(acc), -(-padded // block_d))](
                acc, room["parts"], scale, sizes.rows, padded, len(room["parts"]), block_d, num_warps=warps
            )
        x, v = job.x, job.direction
        finish_kernel[(len(part),)](
            x, x.stride(0), x.stride(1), v, v.stride(0), v.stride(1), job.center, part,
            job.alpha, job.alpha.stride(0), job.std, job.std.stride(0),
            room["acc"], top, total, spread, along, room["chunk_top"],
            *job.outputs(), sizes.rows, k, d, padded, chunk,
            *job.flags, blocks["BLOCK_K"], blocks["BLOCK_D"], num_warps=warps,
        )  # fmt: skip


def difference_rows(job: Job, rows: Tensor) -> None:
    """Outputs of `rows` (int64) from kernels/differences.py, some rows at a time."""
    widest = job.means.shape[0] if "posterior_weights" in job.out else 0
    for part in rows.split(max(1, (4 << 20) // max(job.x.shape[1], widest))):
        found = differences(
            job.x[part], job.means, job.log_weights, job.alpha[part], job.std[part],
            outputs=list(job.out), direction=job.direction[part],
        )  # fmt: skip
        for name, values in found.items():
            job.out[name].index_copy_(0, part, values)


def _allocate(sizes: Plan, device: torch.device) -> dict[str, Tensor]:
    return {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in sizes.buffers.items()}


def _split_means(
    job: Job, start: int, count: int, wide: Tensor, tall: Tensor, square: Tensor, padded: int, kind: Form
) -> None:  # fmt: skip
    chunk = job.means[start : start + count]
    _split(job, chunk, None, count, None, wide, tall, square, padded, kind, center=True)


def _split(
    job: Job, source: Tensor, rows: Tensor | None, count: int, shift: Tensor | None, wide: Tensor, tall: Tensor,
    square: Tensor, padded: int, kind: Form, *, center: bool = False, reverse: bool = False,
) -> None:  # fmt: skip
    """Pieces of `source - shift center` (`source - center` if `center`, else `source`); see `split_kernel`."""
    rows_tile, tile = job.config.blocks["SPLIT_N"], job.config.blocks["SPLIT_D"]
    split_kernel[(-(-len(wide) // rows_tile),)](
        source, source.stride(0), source.stride(1), square if rows is None else rows, count,
        job.center, square if shift is None else shift, 0 if shift is None else shift.stride(0),
        wide, tall, square, len(wide), source.shape[1], padded,
        rows is not None, center or shift is not None, shift is not None, kind.pieces, kind.rounded, reverse,
        rows_tile, tile, num_warps=job.config.warps,
    )  # fmt: skip


def _dots(x: Tensor, m: Tensor, out: Tensor, padded: int, kind: Form) -> None:
    """Products x' . m' into out (buffers, rows, chunk), to be added up: [x_p .. x_1] against [m_1 .. m_p].

    The last j pieces of x against the first j of m give the sum of all products of j-th order.
    """
    pieces, buffer = kind.pieces, 0
    last = (pieces - 1) * padded
    for start in range(0, padded, kind.terms):
        stop = min(start + kind.terms, padded)
        _product(x[:, last + start : last + stop], m[:, start:stop].T, out[buffer])
        buffer += 1
    for j in range(2, pieces + 1):
        _product(x[:, (pieces - j) * padded :], m[:, : j * padded].T, out[buffer])
        buffer += 1


def _averages(p: Tensor, tall: Tensor, out: Tensor, chunk: int, kind: Form) -> None:
    """Products P @ M into out (buffers, rows, padded), as in `_dots`: [p_p .. p_1] against m_1 above .. above m_p."""
    pieces, buffer = kind.pieces, 0
    last = (pieces - 1) * chunk
    for start in range(0, chunk, kind.terms):
        stop = min(start + kind.terms, chunk)
        _product(p[:, last + start : last + stop], tall[start:stop], out[buffer])
        buffer += 1
    for j in range(2, pieces + 1):
        _product(p[:, (pieces - j) * chunk :], tall[: j * chunk], out[buffer])
        buffer += 1


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)  # CUDA only: bfloat16 with float32 sums
