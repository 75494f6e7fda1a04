"""What a network's forward computes: a walk over its traced graph that admits affine maps, ReLU and ReQU alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import Node

_ROWS = 2  # points traced
_VIEWS = {
    "permute", "transpose", "t", "view", "reshape", "_unsafe_view", "slice", "select", "split", "getitem", "unsqueeze",
    "squeeze", "expand", "clone", "contiguous", "alias", "detach",
}  # fmt: skip
_SUMS = {"add", "sub", "neg", "cat", "sum"}
_PRODUCTS = {"mul", "mm", "bmm", "addmm", "baddbmm", "_sparse_addmm"}  # affine where one factor at most depends on x
_RELU = {"relu", "relu_"}


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        depth: activations on the longest way from input to output. width: most units at one depth. relu, requ: units
            of each kind. forbidden: operations on data that are neither affine nor ReLU nor ReQU, as ATen names them;
            empty for a ReLU/ReQU network.
    """

    depth: int
    width: int
    relu: int
    requ: int
    forbidden: tuple[str, ...]


@dataclass(frozen=True)
class _Data:
    """A node that depends on the input: activations so far, and whether all its entries come straight from ReLU."""

    depth: int
    rectified: bool


def audit_network(network: nn.Module, dim: int, *, dtype: torch.dtype = torch.float64) -> Audit:
    """Trace `network` down to ATen operations and sort them.

    Everything that depends on the input must be a view, a sum, a product with constants, ReLU, or the square of
    something that ReLU has just given out (ReQU). Two points are traced; a network may cut more of them into chunks.

    Args:
        network: maps (n, dim) to (n, d_out), on the CPU. dim: d. dtype: of the points.

    Raises:
        RuntimeError: forward reads a number out of the data, to branch on it for example.
    """
    from torch.fx.experimental.proxy_tensor import make_fx  # a second of imports that nothing else here needs

    graph = make_fx(network)(torch.zeros(_ROWS, dim, dtype=dtype)).graph
    data: dict[Node, _Data] = {}
    units: Counter[int] = Counter()  # by depth
    kinds: Counter[str] = Counter()
    forbidden: list[str] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            data[node] = _Data(0, False)
        inputs = [data[argument] for argument in node.all_input_nodes if argument in data]
        if node.op != "call_function" or not inputs:
            continue
        depth, name = max(one.depth for one in inputs), _name(node)
        rectified = all(one.rectified for one in inputs)
        if name in _RELU:
            size = node.meta["val"].numel() // _ROWS
            units[depth + 1] += size
            kinds["relu"] += size
            data[node] = _Data(depth + 1, True)
        elif _is_square(node, name) and rectified:
            kinds["requ"] += node.meta["val"].numel() // _ROWS
            data[node] = _Data(depth, False)
        else:
            if not _is_affine(node, name, data):
                forbidden.append(str(node.target))
            data[node] = _Data(depth, rectified and name in _VIEWS | {"cat"})
    return Audit(
        depth=max((one.depth for one in data.values()), default=0),
        width=max(units.values(), default=0),
        relu=kinds["relu"] - kinds["requ"],
        requ=kinds["requ"],
        forbidden=tuple(sorted(set(forbidden))),
    )


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def _is_square(node: Node, name: str) -> bool:
    return bool(name == "pow" and node.args[1] == 2) or (name == "mul" and node.args[0] is node.args[1])


def _is_affine(node: Node, name: str, data: dict[Node, _Data]) -> bool:
    if name in _VIEWS or name in _SUMS:
        return True
    if name == "div":
        return node.args[1] not in data
    factors = node.args[-2:] if name in _PRODUCTS else ()
    return len(factors) == 2 and sum(factor in data for factor in factors) <= 1
