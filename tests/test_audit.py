"""The audit of a network's forward: what is not affine, ReLU or ReQU is caught, wherever it hides."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flowfast import ConstructiveScoreNet, GaussianMixture, OUProcess, audit_network
from flowfast.students import MLP

PROCESS = OUProcess(5.0)


class _After(nn.Module):
    def __init__(self, network: nn.Module, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.operation = network, operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(self.network(x))


PLANTED: list[tuple[Callable[[Tensor], Tensor], str]] = [
    (torch.exp, "exp"),
    (lambda y: y.softmax(1), "softmax"),
    (lambda y: 1 / (1 + torch.relu(y)), "reciprocal"),
    (lambda y: y / (1 + torch.relu(y)), "div"),
    (lambda y: y * y, "mul"),
    (lambda y: y.square(), "pow"),
    (lambda y: torch.relu(y) ** 3, "pow"),
    (lambda y: torch.relu(y).square().square(), "pow"),
    (lambda y: torch.relu(y) * y, "mul"),
    (lambda y: y @ y.T, "mm"),
    (lambda y: y.clamp(min=-3), "clamp"),
    (lambda y: torch.relu(y).exp_(), "exp_"),
]


@pytest.mark.parametrize(("operation", "name"), PLANTED, ids=[f"{i}-{name}" for i, (_, name) in enumerate(PLANTED)])
def test_a_planted_operation_is_caught(operation: Callable[[Tensor], Tensor], name: str) -> None:
    net = ConstructiveScoreNet(GaussianMixture.random(3, 2), PROCESS, 0.3, 0.1)
    assert audit_network(net, 2).forbidden == ()
    assert any(name in found for found in audit_network(_After(net, operation), 2).forbidden)


def test_what_is_affine_relu_or_requ_passes() -> None:
    net = ConstructiveScoreNet(GaussianMixture.random(3, 2), PROCESS, 0.3, 0.1)
    more = _After(net, lambda y: 2 * torch.relu(y - 1).square() / 3 + y)
    plain, found = audit_network(net, 2), audit_network(more, 2)
    assert found.forbidden == () and found.depth == plain.depth + 1 and found.requ == plain.requ + 2
    student = MLP(3, 2, width=8, depth=4, activation="relu-requ", generator=torch.Generator().manual_seed(0))
    found = audit_network(student, 3, dtype=torch.float32)
    assert (found.depth, found.width, found.relu, found.requ, found.forbidden) == (4, 8, 16, 16, ())
    with pytest.raises(RuntimeError, match="data-dependent"):
        audit_network(_After(net, lambda y: y if y.sum() > 0 else -y), 2)
