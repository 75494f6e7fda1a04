"""Networks of one structure side by side, and the optimiser step that they share without mixing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from flowfast.students import MLP, TransformerFlowMap

Losses = Callable[[nn.Module, Mapping[str, Tensor], Tensor, Tensor], Tensor]
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Stack:
    """m members as one batched model: a tensor (m, ...) for each of a student's own, and one optimiser.

    Args:
        students: m >= 1 of one shape, copied. losses: `mean_squared_errors`, compiled or not.
        clamp: bounds of parameters by name, shaped to broadcast with the stacked ones.
        clip_norm, weight_decay: see `Ensemble`.
    """

    def __init__(
        self,
        students: Sequence[nn.Module],
        clamp: Mapping[str, Tensor],
        losses: Losses,
        clip_norm: float,
        weight_decay: float,
    ) -> None:
        self._students = copy.deepcopy(students[0]).to("meta").eval()  # structure only
        self._losses, self._clip_norm = losses, clip_norm
        self._clamp = clamp
        with torch.no_grad():
            parts = [dict(student.named_parameters()) for student in students]
            self._weights = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
            held = [dict(student.named_buffers()) for student in students]
            self._buffers = {name: torch.stack([part[name] for part in held]) for name in held[0]}
        for weight in self._weights.values():
            weight.requires_grad_()
        self._optimiser = torch.optim.AdamW(list(self._weights.values()), weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Answers (m, n, d_out) to x (m, n, d_in), without gradient."""
        return _forward(self._students, self._weights | self._buffers, x)

    def step(self, x: Tensor, y: Tensor, learning_rate: float) -> Tensor:
        """One optimiser step; returns the losses (m,) before it."""
        self._optimiser.zero_grad(set_to_none=True)
        losses = self._losses(self._students, self._weights | self._buffers, x, y)
        losses.sum().backward()  # a member's gradient is that of its own loss
        self._clip()
        self._optimiser.param_groups[0]["lr"] = learning_rate
        self._optimiser.step()
        with torch.no_grad():
            for name, bound in self._clamp.items():
                self._weights[name].clamp_(-bound, bound)
        return losses.detach()

    def _clip(self) -> None:
        """Scale each member's gradient as clip_grad_norm_ does alone."""
        gradients = [weight.grad for weight in self._weights.values() if weight.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])  # (tensors, m)
        scale = (self._clip_norm / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)  # (m,)
        for gradient in gradients:
            gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))

    def member(self, i: int) -> nn.Module:
        """Copy of member i."""
        module = copy.deepcopy(self._students).to_empty(device=next(iter(self._weights.values())).device)
        tensors = self._weights | self._buffers
        with torch.no_grad():
            for name, value in [*module.named_parameters(), *module.named_buffers()]:
                value.copy_(tensors[name][i])
        return module

    def state(self) -> dict[str, Tensor]:
        """Weights, buffers and moments, (m, ...) each, by name."""
        tensors = {f"student.{name}": value.detach() for name, value in (self._weights | self._buffers).items()}
        for name, weight in self._weights.items():
            state = self._optimiser.state[weight]
            tensors |= {f"{moment}.{name}": state.get(moment, torch.zeros_like(weight)) for moment in _MOMENTS}
        return tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], done: int) -> None:
        """Take over what `state` gave after `done` steps."""
        for name, value in (self._weights | self._buffers).items():
            value.copy_(tensors[f"student.{name}"])
        for name, weight in self._weights.items():
            state = self._optimiser.state[weight]
            state["step"] = torch.tensor(float(done), device=weight.device)
            for moment in _MOMENTS:
                state[moment] = torch.empty_like(weight).copy_(tensors[f"{moment}.{name}"])


def mean_squared_errors(students: nn.Module, tensors: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Each member's mean squared error over all entries.

    Args:
        students: the members' structure. tensors: theirs, (m, ...) each, by name. x: (m, b, d_in). y: (m, b, d_out).

    Returns:
        (m,), differentiable.
    """
    out = _forward(students, tensors, x)
    if out.shape != y.shape:  # broadcasting would hide it
        raise ValueError(f"y must have the shape of the students' answers, {tuple(out.shape)}; got {tuple(y.shape)}")
    return (out - y).square().mean((1, 2))


def _forward(students: nn.Module, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """A structure with stacked tensors (m, ...), applied to x (m, b, d_in)."""
    if len(x) == 1:  # kernels that know no batches are faster
        one = {name: value.squeeze(0) for name, value in tensors.items()}
        out: Tensor = functional_call(students, one, (x.squeeze(0),))
        return out.unsqueeze(0)
    if type(students) is MLP or type(students) is TransformerFlowMap:  # a subclass may have a forward of its own
        return students.stacked(tensors, x)
    mapped: Tensor = vmap(lambda member, points: functional_call(students, member, (points,)))(dict(tensors), x)
    return mapped
