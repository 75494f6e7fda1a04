"""The posterior pass for d > 256: products of chunks of components as matrix products, streaming softmax in between.

Arguments and outputs are those of kernels/posterior.py. A row takes the first of four ways that a bound allows:
  * screen: logits from one product of leading bfloat16 pieces, wrong by at most 2^-7 |x'| |m'| alpha / std^2 and a few
    roundings, exclude all components but at most 32; these are formed anew by differences (kernels/screen.py). Excluded
    mass <= 2^-24, also after a factor |m - m_top|^2 alpha^2 / std^2.
  * products of `precision`, and P @ M after the softmax, if the error to expect of a logit is within half the contract
    and below 2^-15.
  * float64 products, by the same criterion (the first of the products when x is float64).
  * differences: kernels/differences.py, slow at large d, which has to be at most 4,096.
The screen's bound is rigorous. The error expected of products is a statistical one, three standard deviations of sums
of TERMS terms rounded to nearest, from the largest logit of a component that matters.

x' = x - alpha c and m' = m - c, c near the mean of the means; 8 bits of each piece, three pieces of float32 are exact.
"bf16x6" adds the six largest of their products, "bf16x3" three of two pieces (64 times the contract's error), "ieee" is
float32 with TF32 off, or "bf16x6" where the caller's settings have TF32 on. Error of covariance_trace from products:
relative to E|m'|^2, not to itself.

With refine=False all rows take the products: nothing waits for the GPU then (CUDA graphs can capture it), and low noise
costs accuracy. With refine the host waits once, when the screen of all rows is through. For the same n no row depends
on the others, as far as the matrix product treats rows alike wherever they stand. Workspace: `workspace`, <= 512 MiB.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .chunks import finish_kernel, merge_kernel, softmax_kernel, split_kernel
from .launch import Launch, Variant, gpu_name, launch, rows
from .outputs import allocate
from .screen import candidate_kernel, refine_kernel, screen_kernel
from .stages import Job, difference_rows, screen_rows, sweep_rows
from .workspace import LIST, Form, form

PRECISIONS = ("bf16x3", "bf16x6", "ieee")
CENTERS = 256  # means that the center is the mean of


def two_pass(
    x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor, *,
    outputs: Sequence[str], direction: Tensor | None = None, precision: str = "bf16x6", refine: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """Run the pass once and return the outputs asked for, by name, freshly allocated and contiguous.

    Args:
        x: (n, d). means: (k, d). log_weights: (k,). alpha, std: () or (n,), float64. Contract above.
        outputs: names out of OUTPUTS.
        direction: (n, d), required by "hessian_vector_product".
        precision: of the products for float32, out of PRECISIONS; float64 has float64 products.
        refine: False: products for all rows, whatever their error.

    Raises:
        ValueError: unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    (n, d), k = x.shape, means.shape[0]
    out = allocate(x, k, outputs)
    if n == 0:
        return out
    job = Job(
        x, x if direction is None else direction, means.detach(), log_weights, alpha.expand(n), std.expand(n), out,
        torch.mean(means.detach()[:: triton.cdiv(k, CENTERS)], 0, dtype=torch.float64),
        launch("two_pass", x.dtype, d, gpu_name(x.device)),
    )  # fmt: skip
    kind, wide = form(precision, x.device), form("float64", x.device)
    kind = wide if x.dtype == torch.float64 else kind
    with _on(x.device):
        if not refine:
            sweep_rows(job, torch.arange(n, device=x.device), kind)
            return out
        if "posterior_weights" in out:
            out["posterior_weights"].zero_()  # the screen writes what is not zero
        way = screen_rows(job, kind)
        order = way.argsort(stable=True)
        counts = (way[:, None] == torch.arange(4, device=x.device)).sum(0).tolist()  # the host waits here
        _, first, second, last = order.split(counts)
        sweep_rows(job, first, kind)
        sweep_rows(job, second, wide)
        difference_rows(job, last)
    return out


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Launch on `device`, without autocast, which would round the operands of products, and without gradients."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            yield


def variants() -> list[Variant]:
    """Every kernel of the pass as it is launched on a GPU, those that form outputs for the score and for all."""
    found = []
    for row in rows("two_pass"):
        if row["gpu"] == "":  # of the interpreter
            continue
        for name, kernel, kind, constants in _launches(row["dtype"], row["blocks"]):
            types = {argument: _type(argument, row["dtype"], kind) for argument in kernel.arg_names}
            types = {argument: type_ for argument, type_ in types.items() if argument not in constants}
            config = Launch(row["blocks"], row["warps"], row["stages"])
            found.append(Variant(f"two_pass {row['gpu']} {row['dtype']} {name}", kernel, types, constants, config))
    return found


def _launches(dtype: str, blocks: Mapping[str, int]) -> Iterator[tuple[str, Any, Form, dict[str, Any]]]:
    """Name, kernel, form of the products and constants of every launch."""
    tile_k, tile_d = {"BLOCK_K": blocks["BLOCK_K"]}, {"BLOCK_D": blocks["BLOCK_D"]}
    split = {"BLOCK_N": blocks["SPLIT_N"], "BLOCK_D": blocks["SPLIT_D"]}
    names = ("LOG_DENSITY", "SCORE", "MEAN", "TRACE", "WEIGHTS", "PRODUCT")  # in the order of OUTPUTS
    outputs = {"score": dict.fromkeys(names, False) | {"SCORE": True}, "all": dict.fromkeys(names, True)}
    for name in ("bf16x1", *(PRECISIONS if dtype == "float32" else ()), "float64"):
        kind = form(name, torch.device("cuda"))
        pieces = {"PIECES": kind.pieces, "ROUND": kind.rounded}
        points = {"GATHER": name != "bf16x1", "CENTER": True, "SHIFT": True, "REVERSED": True}
        means = {"GATHER": False, "CENTER": True, "SHIFT": False, "REVERSED": False}
        yield f"split points {name}", split_kernel, kind, points | pieces | split
        yield f"split means {name}", split_kernel, kind, means | pieces | split
        if name == "bf16x1":
            yield "screen", screen_kernel, kind, {"LIST": LIST, "BLOCK_K": blocks["SCREEN_K"]}
            yield "candidate", candidate_kernel, kind, {"LIST": LIST, "BLOCK_D": blocks["CANDIDATE_D"]}
            for label, flags in outputs.items():
                yield f"refine {label}", refine_kernel, kind, flags | {"LIST": LIST, "BLOCK_D": blocks["REFINE_D"]}
            continue
        for product, weights in itertools.product((False, True), repeat=2):
            tile = {"BLOCK_K": blocks["PRODUCT_K" if product else "BLOCK_K"]}
            label = f"softmax {name}{' product' * product}{' weights' * weights}"
            yield label, softmax_kernel, kind, pieces | tile | {"PRODUCT": product, "WEIGHTS": weights}
        if name in ("bf16x6", "float64"):  # these two know the sums' dtype alone
            yield f"merge {name}", merge_kernel, kind, tile_d
            for label, flags in outputs.items():
                yield f"finish {name} {label}", finish_kernel, kind, flags | tile_k | tile_d


def _type(argument: str, dtype: str, kind: Form) -> str:
    """Type of a kernel's argument, as the compiler names it."""
    name, pointer = argument.removesuffix("_ptr"), argument.endswith("_ptr")
    short = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}
    groups = {
        "*i32": ("number", "old", "new", "kept"),
        "*i64": ("rows",),
        short[kind.store]: ("wide", "tall", "p"),
        short[kind.sums]: ("dots", "parts", "acc"),
        "*fp" + dtype[-2:]: (
            "x", "direction", "means", "log_weights", "source", "log_density", "score", "mean", "trace", "weights",
            "product",
        ),
    }  # fmt: skip
    if not pointer:
        return "fp32" if name == "error" else "i32"
    return next((kind for kind, names in groups.items() if name in names), "*fp64")
