"""A transformer over the coordinates of a point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowfast.students.mlp import check_size, stacked_linear, xavier_linear

_POSITION_STD = 0.02  # of the positions' initial values
_EXPANSION = 4  # feed-forward width over width


class TransformerFlowMap(nn.Module):
    """Points of d coordinates as d scalar tokens, through pre-norm transformer blocks; float32, no dropout.

    A token is embedded linearly, a learnt position is added (normal, std 0.02); each block adds self-attention and a
    GELU feed-forward of four times the width; a norm and a linear layer give one number per token. Linear layers:
    Xavier-uniform weights, zero biases.

    Args:
        dim: d, tokens.
        blocks: transformer blocks, >= 1.
        width: numbers per token, a multiple of heads. heads: of the attention, >= 1.
        generator: source of the weights, on the CPU; None draws a fresh seed from the operating system.

    Raises:
        TypeError, ValueError: a size that is no int >= 1, or a width that heads do not divide.

    Source: arXiv 2606.03820, section 6 (Table 4).
    """

    def __init__(
        self, dim: int, *, blocks: int, width: int = 128, heads: int = 4, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("blocks", blocks), ("width", width), ("heads", heads)):
            check_size(name, size)
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, {heads}; got {width}")
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        self.dim, self.heads = dim, heads
        self.config: dict[str, Any] = {"dim": dim, "blocks": blocks, "width": width, "heads": heads}
        self.embed = xavier_linear(1, width, generator)
        self.positions = nn.Parameter(torch.empty(dim, width).normal_(std=_POSITION_STD, generator=generator))
        self.blocks = nn.ModuleList(_block(width, generator) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = xavier_linear(width, 1, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Map points (..., d) to (..., d)."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape (..., {self.dim}); got {tuple(x.shape)}")
        alone = {name: weight.unsqueeze(0) for name, weight in self.named_parameters()}
        return self.stacked(alone, x.reshape(1, -1, self.dim)).reshape(x.shape)

    def stacked(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Networks of this structure side by side, as batched products.

        Args:
            weights: by the names of `named_parameters`, each with a leading dimension m. x: (m, b, d).

        Returns:
            (m, b, d), row i what network i answers to its own points.
        """
        m, b, d = x.shape
        tokens = stacked_linear(weights, "embed", x.reshape(m, b * d, 1))  # (m, b d, width)
        tokens = (tokens.unflatten(1, (b, d)) + weights["positions"].unsqueeze(1)).flatten(1, 2)
        for i in range(len(self.blocks)):
            block = f"blocks.{i}."
            inner = _norm(weights, block + "attention_norm", tokens)
            inner = self._attend(stacked_linear(weights, block + "queries_keys_values", inner), d)
            tokens = tokens + stacked_linear(weights, block + "attention_out", inner)
            inner = _norm(weights, block + "feed_forward_norm", tokens)
            inner = functional.gelu(stacked_linear(weights, block + "expand", inner))
            tokens = tokens + stacked_linear(weights, block + "contract", inner)
        return stacked_linear(weights, "head", _norm(weights, "norm", tokens)).view(m, b, d)

    def _attend(self, joint: Tensor, d: int) -> Tensor:
        """Attention among the d tokens of a point: queries, keys and values (m, b d, 3 width) to (m, b d, width)."""
        m, rows, triple = joint.shape
        shape = m * rows // d, d, 3, self.heads, triple // 3 // self.heads
        query, key, value = joint.view(shape).permute(2, 0, 3, 1, 4)  # (m b, heads, d, width / heads) each
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).reshape(m, rows, triple // 3)


def _norm(weights: Mapping[str, Tensor], name: str, tokens: Tensor) -> Tensor:
    """Layer norm of each network's own: tokens (m, rows, width) to the same."""
    scale, shift = weights[f"{name}.weight"].unsqueeze(1), weights[f"{name}.bias"].unsqueeze(1)
    return torch.addcmul(shift, functional.layer_norm(tokens, tokens.shape[-1:]), scale)


def _block(width: int, generator: torch.Generator) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "attention_norm": nn.LayerNorm(width),
            "queries_keys_values": xavier_linear(width, 3 * width, generator),
            "attention_out": xavier_linear(width, width, generator),
            "feed_forward_norm": nn.LayerNorm(width),
            "expand": xavier_linear(width, _EXPANSION * width, generator),
            "contract": xavier_linear(_EXPANSION * width, width, generator),
        }
    )
