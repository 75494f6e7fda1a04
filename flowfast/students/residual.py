"""Residual compositions: explicit Euler steps of a learnt velocity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowfast.students.mlp import MLP, check_size


class ResidualFlowMap(nn.Module):
    """`blocks` residual blocks `x + h v(x)` with the fixed step h = 1 / blocks, each v a ReLU `MLP`; float32.

    Args:
        dim: d.
        blocks: residual blocks, >= 1.
        width, depth: of each v, see `MLP`.
        shared: one v for all blocks, with the block's time 1 - k / blocks (noise is 1) as one more input; else block k
            has a v of its own.
        generator: source of the weights, on the CPU; None draws a fresh seed from the operating system.

    Raises:
        TypeError, ValueError: a size that is no int >= 1.

    Source: arXiv 2606.03820, Definition 1.
    """

    def __init__(
        self,
        dim: int,
        *,
        blocks: int,
        width: int = 128,
        depth: int = 2,
        shared: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_size("dim", dim)
        check_size("blocks", blocks)
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        self.config: dict[str, Any] = {
            "dim": dim, "blocks": blocks, "width": width, "depth": depth, "shared": shared
        }  # fmt: skip
        self.blocks, self.shared = blocks, shared
        self.velocities = nn.ModuleList(
            MLP(dim + shared, dim, width=width, depth=depth, generator=generator)
            for _ in range(1 if shared else blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Carry points (..., d): like x."""
        for k in range(self.blocks):
            if self.shared:
                time = x.new_full((*x.shape[:-1], 1), 1 - k / self.blocks)
                velocity: Tensor = self.velocities[0](torch.cat([x, time], -1))
            else:
                velocity = self.velocities[k](x)
            x = x + velocity / self.blocks
        return x
