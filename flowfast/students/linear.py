"""A linear layer whose float32 products run in oneDNN on the CPU.

torch hands float32 products on the CPU to MKL, which on processors of other makers leaves half of their width unused;
oneDNN, which torch carries too, does not (`python -m bench.ensemble` times both). Everything else is torch's own layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

_LEAST = 1 << 22  # multiply-adds below which calling oneDNN costs more than it spares
_product = getattr(getattr(torch.ops, "mkldnn", None), "_linear_pointwise", None)
_top_transform = getattr(torch._C._functorch, "peek_interpreter_stack", None)


class Linear(nn.Linear):
    """`nn.Linear`, by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x weight^T + bias`, as `torch.nn.functional.linear`: x (..., d_in), weight (d_out, d_in), bias (d_out,)."""
    if not _serves(x, weight):
        return F.linear(x, weight, bias)
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled():
        out: Tensor = _Linear.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    else:
        out = _times(rows, weight, bias)
    return out if x.ndim == 2 else out.view(*x.shape[:-1], len(weight))


class _Linear(torch.autograd.Function):
    """The product on rows x (n, d_in); its derivative is made of such products, so that it has derivatives itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _times(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            linear(grad, weight.mT) if to_x else None,
            linear(grad.mT, x.mT) if to_weight else None,
            grad.sum(0) if to_bias else None,
        )


def _times(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = _product(x, weight, bias, "none", [], "")  # type: ignore[misc]
    return out


def _serves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN takes this product, and nothing is at work that has to see torch's own."""
    return (
        _product is not None
        and type(x) is Tensor
        and x.is_cpu
        and weight.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and x.ndim >= 2
        and x.numel() * len(weight) >= _LEAST
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and _top_transform is not None
        and _top_transform() is None
        and forward_ad._current_level < 0
        and not torch._C._len_torch_dispatch_stack()
    )
