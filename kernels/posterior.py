"""The posterior pass: everything pointwise about a mixture, in one streaming softmax over its components (Eq. 2-4).

    x            (n, d)      float32 or float64, any strides
    direction    (n, d)      like x, for the Hessian-vector product only
    means        (k, d)      row i of x sees the centres alpha_i * means
    log_weights  (k,)        normalised, -inf = the component does not exist
    alpha, std   () or (n,)  float64

Outputs: log_density (n,), score (n, d), posterior_mean (n, d), covariance_trace (n,), posterior_weights (n, k; a second
sweep), hessian_vector_product (n, d). path() chooses how logits are formed:

  * "differences" (kernels/differences.py): x - alpha m itself; nothing but the outputs is allocated.
  * "products" (kernels/products.py), float32 and 32 < d <= 256: centred products on tensor cores, with a bound on every
    row's error; the rows that exceed it are done once more by differences, without asking the host. `precision` says
    how exact products are: "bf16x6" like float32, "bf16x3" faster. It follows torch.get_float32_matmul_precision():
    "highest", torch's default, is bf16x6, "high" and "medium" are bf16x3.
  * "two_pass" (kernels/two_pass.py), d > 256: matrix products of chunks, after a screen that often makes them needless.
    The host waits once for the screen; a CUDA graph under capture has products for every row instead.

Range: 1e-8 <= std; |x| and |alpha m| below 1e15 in float32, 1e150 in float64. Max error, norm-wise and relative to
what csrc/posterior.hpp names: max(1e-10, 64 eps (1 + |alpha m| / std)), see tests/test_triton.py; with bf16x3
1024 eps (1 + |alpha m| / std), where about 1e-5 is typical. The bound that products rest on is probabilistic
(kernels/finish.py). A non-finite row of x gives a non-finite row of outputs, and no row depends on its neighbours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .differences import differences
from .differences import variants as variants
from .outputs import OUTPUTS as OUTPUTS
from .outputs import allocate
from .products import products
from .two_pass import two_pass

Path = Literal["differences", "products", "two_pass"]
Precision = Literal["bf16x3", "bf16x6"]


def path(n: int, k: int, d: int, dtype: torch.dtype) -> Path:
    """How the logits of n points and k components in dimension d are formed."""
    if n == 0 or k < 64:  # few components are less than a tile or two
        return "differences"
    if d > 256:
        return "two_pass"
    if dtype != torch.float32 or d <= 32:
        return "differences"
    pieces = 6 * k << (d - 1).bit_length()  # bytes
    return "products" if pieces <= 1 << 28 else "differences"


def posterior(
    x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor, *,
    outputs: Sequence[str], direction: Tensor | None = None, precision: Precision | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the outputs asked for, by name, freshly allocated and contiguous.

    Args:
        x: (n, d). means: (k, d). log_weights: (k,). alpha, std: () or (n,), float64. Contract above.
        outputs: names out of OUTPUTS.
        direction: (n, d), required by "hessian_vector_product".
        precision: of products; None = what torch is set to.
    """
    (n, d), k = x.shape, means.shape[0]
    way, precision = path(n, k, d, x.dtype), precision or preferred_precision()
    if way == "differences":
        return differences(x, means, log_weights, alpha, std, outputs=outputs, direction=direction)
    if way == "two_pass":
        refine = not (x.is_cuda and torch.cuda.is_current_stream_capturing())
        return two_pass(
            x, means, log_weights, alpha, std, outputs=outputs, direction=direction, precision=precision, refine=refine
        )
    terms = 6 if precision == "bf16x6" else 3
    out = allocate(x, k, outputs)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        flags = products(x, means, log_weights, alpha, std, outputs=out, direction=direction, terms=terms)
    return differences(
        x, means, log_weights, alpha, std, outputs=outputs, direction=direction, into=out, flags=flags
    )  # fmt: skip


def preferred_precision() -> Precision:
    """The precision of products that goes with torch's setting for float32 matrix products."""
    try:
        highest = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by torch's newer names, per backend
        highest = torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "bf16x6" if highest else "bf16x3"
