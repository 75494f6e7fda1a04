"""Feed-forward networks written down as formulas: channels are affine functions of the units of the latest layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowfast.theory.network import Affine, HiddenLayer


@dataclass(frozen=True)
class Channels:
    """c numbers that the next layer may use, each an affine function of the u units before it.

    Sums, differences and multiples of channels are channels of the same units: they cost no layer, because the next
    layer's weights take them up. Attributes: weight (c, u) and bias (c,), float64.
    """

    weight: Tensor
    bias: Tensor

    def __len__(self) -> int:
        """Number c of channels."""
        return len(self.bias)

    def __getitem__(self, rows: slice) -> Channels:
        """Some of the channels."""
        return Channels(self.weight[rows], self.bias[rows])

    def __add__(self, other: Channels | Tensor | float) -> Channels:
        """Sum with channels of the same units (one channel goes with any number), or with constants."""
        if isinstance(other, Channels):
            return Channels(self.weight + other.weight, self.bias + other.bias)
        return Channels(self.weight, self.bias + other)

    def __mul__(self, factor: float) -> Channels:
        """Multiple by a constant."""
        return Channels(self.weight * factor, self.bias * factor)

    def __neg__(self) -> Channels:
        """Opposite."""
        return self * -1.0

    def __sub__(self, other: Channels | Tensor | float) -> Channels:
        """Difference, as the sum."""
        return self + -other

    def mixed(self, matrix: Tensor) -> Channels:
        """Linear combinations of the channels by the rows of `matrix` (b, c)."""
        return Channels(matrix @ self.weight, matrix @ self.bias)


def joined(channels: Sequence[Channels]) -> Channels:
    """All channels in one list."""
    return Channels(torch.cat([c.weight for c in channels]), torch.cat([c.bias for c in channels]))


class Blueprint:
    """A network under construction, layer by layer.

    Args:
        dim: numbers in.

    Attributes:
        layers: what stands so far.
    """

    def __init__(self, dim: int) -> None:
        self.layers: list[nn.Module] = []
        self._units = dim

    def inputs(self) -> Channels:
        """The numbers in, as channels: only the first layer can use them."""
        return self._channels(self._units)

    def hidden(self, relu: Sequence[Channels], requ: Sequence[Channels] = ()) -> list[Channels]:
        """Add a hidden layer, a unit per channel.

        Args:
            relu: what goes through max(x, 0). requ: what goes through max(x, 0)^2.

        Returns:
            The units as channels, grouped as the arguments were, ReLU first.
        """
        groups = [*relu, *requ]
        into = joined(groups)
        self.layers.append(HiddenLayer(Affine(into.weight, into.bias), sum(map(len, relu))))
        self._units = len(into)
        units = self._channels(self._units)
        ends = torch.tensor([len(group) for group in groups]).cumsum(0).tolist()
        return [units[end - len(group) : end] for end, group in zip(ends, groups, strict=True)]

    def output(self, channels: Channels) -> list[nn.Module]:
        """Close with a linear layer; returns all layers."""
        return [*self.layers, Affine(channels.weight, channels.bias)]

    def _channels(self, units: int) -> Channels:
        return Channels(torch.eye(units, dtype=torch.float64), torch.zeros(units, dtype=torch.float64))
