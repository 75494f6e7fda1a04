"""The feed-forward network of the paper's experiments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from flowfast.students.linear import Linear

Activation = Literal["relu", "relu-requ"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)


class MLP(nn.Module):
    """`depth` hidden layers of `width`, then a linear layer; Xavier-uniform weights, zero biases, float32.

    Args:
        dim_in: numbers in.
        dim_out: numbers out.
        width: units of each hidden layer, >= 1.
        depth: hidden layers, >= 1.
        activation: "relu", or "relu-requ", which alternates ReLU, ReQU (the square of ReLU), ReLU, ...
        generator: source of the weights, on the CPU; None draws a fresh seed from the operating system (the global
            generator is never touched).

    Raises:
        TypeError, ValueError: a size that is no int >= 1, or an unknown activation.

    Source: arXiv 2606.03820, section 6.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        *,
        width: int = 512,
        depth: int = 4,
        activation: Activation = "relu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("dim_in", dim_in), ("dim_out", dim_out), ("width", width), ("depth", depth)):
            check_size(name, size)
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        sizes = [dim_in, *[width] * depth, dim_out]
        self.layers = nn.ModuleList(xavier_linear(a, b, generator) for a, b in zip(sizes[:-1], sizes[1:], strict=True))
        self.config: dict[str, Any] = {
            "dim_in": dim_in, "dim_out": dim_out, "width": width, "depth": depth, "activation": activation
        }  # fmt: skip
        self._squared = [activation == "relu-requ" and layer % 2 == 1 for layer in range(depth)]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., dim_in) to (..., dim_out)."""
        *hidden, last = self.layers
        for layer, squared in zip(hidden, self._squared, strict=True):
            x = torch.relu_(layer(x))
            if squared:
                x = x * x
        out: Tensor = last(x)
        return out

    def stacked(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Networks of this structure side by side, as batched products.

        Args:
            weights: by the names of `named_parameters`, each with a leading dimension m. x: (m, b, dim_in).

        Returns:
            (m, b, dim_out), row i what network i answers to its own points.
        """
        for i in range(len(self.layers)):
            x = stacked_linear(weights, f"layers.{i}", x)
            if i < len(self._squared):
                x = torch.relu_(x)
                if self._squared[i]:
                    x = x * x
        return x


def check_size(name: str, size: int) -> None:
    """Raise unless `size` is an int of at least 1."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name} must be an int; got {type(size).__name__}")
    if size < 1:
        raise ValueError(f"{name} must be at least 1; got {size}")


def xavier_linear(dim_in: int, dim_out: int, generator: torch.Generator) -> Linear:
    """A linear layer, float32 on the CPU: Xavier-uniform weights from `generator`, zero biases."""
    layer = Linear(dim_in, dim_out, device="meta")  # elsewhere it would draw from the global generator
    layer.to_empty(device="cpu")
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def stacked_linear(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """The linear layers called `name` of m networks: x (m, b, dim_in) to (m, b, dim_out)."""
    return torch.baddbmm(weights[f"{name}.bias"].unsqueeze(1), x, weights[f"{name}.weight"].mT)
