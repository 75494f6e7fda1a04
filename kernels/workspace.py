"""Sizes of what kernels/two_pass.py allocates beside its outputs, and the forms in which numbers enter its products."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

BUDGET = 384 << 20  # bytes of the buffers of one block of rows and one chunk of components
ROWS = 2048  # most rows of a block
LIST = 32  # most components that the screen leaves to a row
TERMS = 1024  # see Form; the error of the screen is not that of its sums, which may be as long as they like

Buffers = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Form(NamedTuple):
    """How numbers enter a matrix product.

    Attributes:
        pieces: that a number is cut into. store: their dtype. sums: dtype of the product.
        rounded: pieces are bfloat16 numbers, whatever their dtype (on the CPU they are kept as float32).
        terms: that a product adds up in its own precision; what it gives is added in float64.
    """

    pieces: int
    store: torch.dtype
    sums: torch.dtype
    rounded: bool
    terms: int


def form(precision: str, device: torch.device) -> Form:
    """Form of "bf16x1" (the screen), of one of PRECISIONS or of "float64"."""
    if precision == "float64":
        return Form(1, torch.float64, torch.float64, False, TERMS)
    if precision == "ieee":
        backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
        if backend.matmul.fp32_precision in ("none", "ieee"):
            return Form(1, torch.float32, torch.float32, False, TERMS)
    pieces = {"bf16x1": 1, "bf16x3": 2, "bf16x6": 3, "ieee": 3}[precision]
    store = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Form(pieces, store, torch.float32, True, 1 << 30 if precision == "bf16x1" else TERMS)


class Plan(NamedTuple):
    """Sizes of one way through the data: rows of a block, components of a chunk, coordinates with their padding."""

    rows: int
    chunk: int
    padded: int
    chunks: int
    buffers: Buffers


def plan(n: int, k: int, d: int, kind: Form, *, screen: bool, product: bool = False, weights: bool = False) -> Plan:
    """Largest block and chunk whose buffers stay within BUDGET, and the buffers' shapes and dtypes."""
    padded = triton.cdiv(d, 8) * 8  # rows of 16 bytes, as matrix products want them

    def sizes(rows: int, chunk: int) -> Buffers:
        points, pieces, f64 = rows * (2 if product else 1), kind.pieces, torch.float64
        found: Buffers = {
            "x": ((points, pieces * padded), kind.store),
            "m": ((chunk, pieces * padded), kind.store),
            "dots": ((triton.cdiv(padded, kind.terms) + pieces - 1, points, chunk), kind.sums),
            "x_square": ((points,), f64),
            "m_square": ((chunk,), f64),
            "state": ((5, rows), f64),
        }
        if screen:
            lists: Buffers = {"number": ((2, rows, LIST), torch.int32), "upper": ((2, rows, LIST), f64)}
            return found | lists | {"kept": ((rows,), torch.int32), "logits": ((rows, LIST), f64)}
        return found | {
            "tall": ((pieces * chunk if pieces > 1 else 0, padded), kind.store),
            "p": ((points, pieces * chunk), kind.store),
            "parts": ((triton.cdiv(chunk, kind.terms) + pieces - 1, points, padded), kind.sums),
            "acc": ((points, padded), kind.sums),
        }

    rows = min(n, ROWS)
    while rows > 1 and _bytes(sizes(rows, 16)) > BUDGET // 2:
        rows = triton.cdiv(rows, 2)
    lengths = range(64, min(8192, triton.cdiv(k, 64) * 64) + 1, 64)
    fitting = bisect.bisect_right(lengths, BUDGET, key=lambda chunk: _bytes(sizes(rows, chunk)))
    chunk = lengths[fitting - 1] if fitting else 16
    chunks = triton.cdiv(k, chunk)
    tops: Buffers = {} if screen else {"chunk_top": ((chunks if weights else 1, rows), torch.float64)}  # small
    return Plan(rows, chunk, padded, chunks, sizes(rows, chunk) | tops)


def _bytes(buffers: Buffers) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in buffers.values())


def workspace(
    n: int, k: int, d: int, dtype: torch.dtype, *,
    outputs: Sequence[str], precision: str = "bf16x6", device: torch.device | str = "cuda",
) -> int:  # fmt: skip
    """Bytes that a call allocates at once beside its outputs; cuBLAS adds its own workspace of up to 32 MiB.

    Rows that take the differences are gathered block by block in the place of a stage's buffers.
    """
    device = torch.device(device)
    options = {"product": "hessian_vector_product" in outputs, "weights": "posterior_weights" in outputs}
    kinds = {form("float64", device), form(precision if dtype == torch.float32 else "float64", device)}
    stages = [plan(n, k, d, form("bf16x1", device), screen=True)]
    stages += [plan(n, k, d, kind, screen=False, **options) for kind in kinds]
    small = 8 * d + 33 * n + 64 * min(n, ROWS)  # center; way, order and its sort; expressions over one block
    return max(_bytes(stage.buffers) for stage in stages) + small
