"""The compiled flows as torch operators of the namespace `flowfast`, so that graphs and transforms can hold them.

Signatures are those of `reference.flow_fixed` and `reference.flow_adaptive`. They have no derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowfast import _cpp, backends, operators

Outputs = tuple[Tensor, ...]


def _rows(x: Tensor, *dtypes: torch.dtype) -> Outputs:
    """What a flow returns: end points like x (n, d), and a number per row for each dtype."""
    points = torch.empty_like(x, memory_format=torch.contiguous_format)
    return points, *(x.new_empty(x.shape[0], dtype=dtype) for dtype in dtypes)


def _define(name: str, arguments: str, *dtypes: torch.dtype) -> Callable[..., Outputs]:
    tensors = "Tensor x, Tensor means, Tensor log_weights, Tensor center, Tensor ends, "
    schema = f"({tensors}{arguments}) -> ({', '.join(['Tensor'] * (1 + len(dtypes)))})"

    def run(backend: str) -> Callable[..., Outputs]:
        def body(x: Tensor, means: Tensor, log_weights: Tensor, center: Tensor, *rest: Any) -> Outputs:
            module = backends.serve(backend, x.device, name)
            dense = (tensor.contiguous() for tensor in (x, means, log_weights, center))
            with backends.full_precision(x.device):
                return getattr(module, name)(*dense, *rest)  # type: ignore[no-any-return]

        return body

    op = torch.library.custom_op(f"flowfast::{name}", run("cpp"), mutates_args=(), device_types="cpu", schema=schema)
    op.register_kernel("cuda")(run("triton"))
    op.register_fake(lambda x, *rest: _rows(x, *dtypes))
    return op


OPERATORS = {
    "flow_fixed": _define("flow_fixed", "Tensor h, Tensor coefficients, Tensor tableau", torch.int8),
    "flow_adaptive": _define(
        "flow_adaptive",
        "Tensor tableau, float rtol, float atol, int max_steps",
        *(torch.int8, torch.int32, torch.int32),
    ),
}


def call(op: str, backend: str, *arguments: Any, out: Tensor | None = None) -> Outputs:
    """Run flow `op` in `backend`: the C++ body directly where nothing could tell, the operator otherwise.

    The reference, and Triton interpreted on CPU tensors, have no operator. End points may be written to `out`
    (contiguous, like x), or are another tensor: the caller looks.
    """
    x = arguments[0]
    plain = [argument for argument in arguments if isinstance(argument, Tensor)]
    if backend == "cpp" and operators.unseen(plain):
        body = getattr(_cpp, op)
        if operators.fit_for_result(out, plain):
            return body(*arguments, out=out)  # type: ignore[no-any-return]
        return body(*arguments)  # type: ignore[no-any-return]
    if backend == "cpp" or (backend == "triton" and x.is_cuda):
        return OPERATORS[op](*arguments)
    with backends.full_precision(x.device):
        return getattr(backends.serve(backend, x.device, op), op)(*arguments)  # type: ignore[no-any-return]
