"""Feed-forward networks of affine layers, ReLU and ReQU with sparse weights, and what can be read off them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

CHUNK = 1024  # points at a time: a layer's units then stay in the processor's cache


class Parameters(NamedTuple):
    """Entries of all weight matrices and biases: those that are not zero, and all places there are."""

    nonzero: int
    total: int


class Affine(nn.Module):
    """`W h + b` for points in columns, W sparse; both are buffers, since they are built and not trained.

    Args:
        weight: (out, in). bias: (out,).
    """

    indices: Tensor
    values: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        sparse = weight.to_sparse().coalesce()
        self.shape = tuple(weight.shape)
        self.register_buffer("indices", sparse.indices())  # (2, nnz)
        self.register_buffer("values", sparse.values())  # (nnz,)
        self.register_buffer("bias", bias[:, None].clone())  # (out, 1)

    def forward(self, h: Tensor) -> Tensor:
        """Map (in, n) to (out, n)."""
        weight = torch.sparse_coo_tensor(
            self.indices, self.values, self.shape, is_coalesced=True, check_invariants=False
        )
        out: Tensor = torch.sparse.mm(weight, h) + self.bias
        return out


class HiddenLayer(nn.Module):
    """An affine map, then ReLU on its first `relu` rows and ReQU, the square of ReLU, on the others."""

    def __init__(self, affine: Affine, relu: int) -> None:
        super().__init__()
        self.affine, self.relu = affine, relu

    def forward(self, h: Tensor) -> Tensor:
        """Map units (in, n) to units (out, n)."""
        h = torch.relu(self.affine(h))
        if self.relu == len(h):
            return h
        return torch.cat([h[: self.relu], h[self.relu :].square()])


class ReluNetwork(nn.Module):
    """A feed-forward network of layers `HiddenLayer` and `Affine`.

    Its size is read off the layers, not off formulas. `audit` confirms that nothing else happens in forward.

    Args:
        dim: numbers in. layers: in order.
    """

    def __init__(self, dim: int, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.dim = dim
        self.layers = nn.ModuleList(layers)

    @property
    def depth(self) -> int:
        """Hidden layers, which is the number of activations on the way from input to output."""
        return len(self._hidden())

    @property
    def width(self) -> int:
        """Units of the widest hidden layer."""
        return max((layer.affine.shape[0] for layer in self._hidden()), default=0)

    @property
    def largest_weight(self) -> float:
        """Largest absolute value among weights and biases."""
        return max(float(part.abs().max()) for affine in self._affine() for part in _parts(affine))

    @property
    def parameter_count(self) -> Parameters:
        """Number of weights and biases: not zero, and in all."""
        nonzero = sum(int(part.count_nonzero()) for affine in self._affine() for part in _parts(affine))
        return Parameters(nonzero, sum(rows * (columns + 1) for rows, columns in (a.shape for a in self._affine())))

    def forward(self, x: Tensor) -> Tensor:
        """Map points (..., dim), of the network's dtype and device, to (..., d_out).

        Raises:
            TypeError: another dtype. ValueError: another last dimension.
        """
        bias = next(self._affine()).bias
        if not isinstance(x, Tensor) or x.dtype != bias.dtype:
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a tensor of {bias.dtype}, as the network is; got {found}: cast one of them")
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have last dimension {self.dim}; got shape {tuple(x.shape)}")
        parts = [self._columns(rows.T) for rows in x.reshape(-1, self.dim).split(CHUNK)]
        out = parts[0].T if len(parts) == 1 else torch.cat(parts, 1).T
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def _columns(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h)
        return h

    def _hidden(self) -> list[HiddenLayer]:
        return [layer for layer in self.layers if isinstance(layer, HiddenLayer)]

    def _affine(self) -> Iterator[Affine]:
        return (module for module in self.modules() if isinstance(module, Affine))


def _parts(affine: Affine) -> tuple[Tensor, Tensor]:
    return affine.values, affine.bias
