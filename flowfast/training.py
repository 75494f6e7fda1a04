"""The optimisation of a student as a pure function of its pairs: recipe, learning rate, step, state on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from flowfast.storage import differences, read_tensors, write_tensors
from flowfast.students import FlowStudent
from flowfast.students.flow_student import Pieces
from flowfast.students.mlp import ACTIVATIONS, Activation, check_size

Schedule = Literal["one-cycle", "linear", "constant"]
_SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
Optimiser = Literal["adamw", "muon"]
_OPTIMISERS: tuple[Optimiser, ...] = get_args(Optimiser)
Allocation = Literal["by-loss", "equal"]
_ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)
_RISE, _START, _END = 0.3, 1 / 25, 1 / 25e4  # of the one-cycle schedule: share of steps, first and last rate over peak
_WARM_UP = 0.05  # of the linear schedule: share of steps
_RECENT = 0.1  # weight of a step's losses in their running mean
_LEAST = 8  # a segment never gets less than an eighth of its equal part of the rows
_FORMAT = {"format": "flowfast training", "version": 1}
_MOMENTS: Mapping[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}


@dataclass(frozen=True)
class Recipe:
    """How a student is built and trained.

    Args:
        steps: optimiser steps, >= 1.
        batch_size: pairs per segment and step, >= 1; by-loss allocation keeps to it on average over the segments.
        width, depth, activation: of the network, see `MLP`.
        preconditioned, shared: see `FlowStudent`.
        reduced: a preconditioned student works in the span of the means' differences, where the flow moves, and leaves
            the directions across it alone.
        allocation: of a step's pairs to the segments of a shared network. "by-loss" gives them in proportion to the
            segments' recent losses, "equal" the same number to each; either way all segments count alike in the loss.
            By loss is for fresh pairs; of a stored set it repeats the hard rows. A network per segment gets equal ones.
        optimiser: "adamw", or "muon": Muon for the matrices between hidden layers, AdamW for the rest. Muon learns more
            per step and takes more time for it: 15 products of a matrix by itself, in bfloat16 inside.
        learning_rate: peak of the learning rate, > 0. Muon's updates are scaled to the size of AdamW's.
        schedule: "one-cycle" rises to the peak over 30 % of the steps and falls to nothing, both as a cosine (torch's
            OneCycleLR); "linear" rises to it over 5 % and falls to zero, both in a straight line; "constant" stays.
        clip_norm: bound on the gradient norm of each network, > 0.
        weight_decay: >= 0; it decays the weights by learning_rate * weight_decay per step.

    Raises:
        TypeError, ValueError: a value of another kind or range, by name.
    """

    steps: int = 2_000
    batch_size: int = 64
    width: int = 512
    depth: int = 4
    activation: Activation = "relu"
    preconditioned: bool = True
    shared: bool = True
    reduced: bool = True
    allocation: Allocation = "equal"
    optimiser: Optimiser = "adamw"
    learning_rate: float = 4e-3
    schedule: Schedule = "linear"
    clip_norm: float = 1.0
    weight_decay: float = 0.1

    @classmethod
    def fresh(cls, **changes: Any) -> Recipe:
        """The recipe for pairs that are made anew for every step; the default one is for a stored set.

        Args:
            changes: fields that are to differ.
        """
        settings = {
            "steps": 10_000,
            "batch_size": 1_024,
            "allocation": "by-loss",
            "learning_rate": 8e-3,
            "weight_decay": 0.0,
        }
        return cls(**{**settings, **changes})

    def __post_init__(self) -> None:
        """Refuse values of another kind or range."""
        for name in ("steps", "batch_size", "width", "depth"):
            check_size(name, getattr(self, name))
        for name in ("preconditioned", "shared", "reduced"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False; got {getattr(self, name)!r}")
        choices: tuple[tuple[str, tuple[str, ...]], ...] = (
            ("activation", ACTIVATIONS),
            ("allocation", _ALLOCATIONS),
            ("schedule", _SCHEDULES),
            ("optimiser", _OPTIMISERS),
        )
        for name, known in choices:
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        for name, least in (("learning_rate", "above 0"), ("clip_norm", "above 0"), ("weight_decay", "at least 0")):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number; got {value!r}")
            if not math.isfinite(value) or value < 0 or (value == 0 and least == "above 0"):
                raise ValueError(f"{name} must be finite and {least}; got {value}")

    def allocates(self, segments: int) -> bool:
        """Whether segments get different numbers of pairs."""
        return self.allocation == "by-loss" and self.shared and segments > 1

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of optimiser step `step`, 0 to steps - 1."""
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "linear":
            rise = max(1, round(_WARM_UP * self.steps))
            return self.learning_rate * min((step + 1) / rise, (self.steps - step) / (self.steps - rise + 1))
        top, last = _RISE * self.steps - 1, self.steps - 1
        low, climbed = (_START, step / top) if step <= top else (_END, (last - step) / (last - top))
        return self.learning_rate * (low + (1 - low) * (1 - math.cos(math.pi * climbed)) / 2)


def allocate(losses: Sequence[float], batch: int) -> list[int]:
    """Divide `batch` rows per segment, on average, between m segments in proportion to their losses.

    Args:
        losses: m numbers >= 0. All zero, or one that is not finite: the division is equal.
        batch: >= 1.

    Returns:
        m numbers of rows, m * batch together, each at least 1 and batch // 8. What rounding leaves goes to the largest.
    """
    total = sum(losses)
    if not 0 < total < math.inf:  # or it is not a number
        return [batch] * len(losses)
    least = max(1, batch // _LEAST)
    spare = (batch - least) * len(losses)
    rows = [least + int(spare * (loss / total)) for loss in losses]
    rows[max(range(len(rows)), key=losses.__getitem__)] += len(losses) * batch - sum(rows)
    return rows


class Trainer:
    """A student under its optimisers, with a gradient clip per network, so that separate networks stay separate.

    Args:
        student: trained in place.
        recipe: its settings.

    Attributes:
        done: steps taken.
        rows: how many pairs every segment is to get, constant between calls of `allocate_rows`.
    """

    def __init__(self, student: FlowStudent, recipe: Recipe) -> None:
        self.student, self.recipe, self.done = student, recipe, 0
        self.rows = [recipe.batch_size] * student.n_segments
        self._recent = torch.ones(student.n_segments, dtype=torch.float64, device=student.center.device)
        self._weights = [list(network.parameters()) for network in student.networks]
        self._optimisers = [one for network in student.networks for one in _optimisers(network, recipe)]

    def allocate_rows(self) -> None:
        """Divide the rows of the steps to come by the losses of the last ones: the only wait for the device."""
        if self.recipe.allocates(self.student.n_segments):
            self.rows = allocate(self._recent.tolist(), self.recipe.batch_size)

    def step(self, x_from: Pieces, x_to: Pieces) -> Tensor:
        """Take one optimiser step on pairs, (b, d) of each segment; returns the loss before it, mean over segments."""
        losses = self.student.losses(x_from, x_to)  # (m,)
        self.descend(losses.mean() if self.student.shared else losses.sum())
        if self.recipe.allocates(self.student.n_segments):
            self._recent.lerp_(losses.detach().double(), _RECENT)
        return losses.detach().mean()

    def descend(self, loss: Tensor) -> None:
        """Take one optimiser step down the gradient of `loss` (0-dim)."""
        rate = self.recipe.learning_rate_at(self.done)
        for optimiser in self._optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for weights in self._weights:
            nn.utils.clip_grad_norm_(weights, self.recipe.clip_norm, foreach=True)
        for optimiser in self._optimisers:
            optimiser.param_groups[0]["lr"] = rate
            optimiser.step()
        self.done += 1

    def write(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Leave everything that later steps depend on in one file: weights, optimisers' moments, rows, losses, step."""
        tensors = {f"student.{name}": value for name, value in self.student.state_dict().items()}
        tensors |= {"rows": torch.tensor(self.rows), "recent": self._recent}
        for name, weight, state, moments in self._states():
            tensors |= {f"{moment}.{name}": state.get(moment, torch.zeros_like(weight)) for moment in moments}
        write_tensors(path, tensors, {**_FORMAT, "step": self.done, "settings": dict(settings)})

    def read(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Go on from `path`.

        Raises:
            ValueError: no checkpoint, a damaged one, or one of other settings (the fields are named).
        """
        tensors, about = read_tensors(path, "checkpoint")
        if {name: about.get(name) for name in _FORMAT} != _FORMAT or not isinstance(about.get("settings"), dict):
            raise ValueError(f"checkpoint: {path} is no training state of this version: choose another file")
        differing = differences(about["settings"], settings)
        if differing:
            raise ValueError(f"checkpoint: {path} is of another training ({differing}): choose another file")
        try:
            self._restore(tensors, int(about["step"]))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"checkpoint: {path} is damaged ({error}): delete it to start again") from error

    def _restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        prefix = "student."
        weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        self.student.load_state_dict(weights)
        for name, weight, state, moments in self._states():
            state["step"] = torch.tensor(float(step), device=weight.device)
            for moment in moments:
                state[moment] = torch.empty_like(weight).copy_(tensors[f"{moment}.{name}"])
        self.rows = tensors["rows"].tolist()
        self._recent.copy_(tensors["recent"])
        self.done = step

    def _states(self) -> list[tuple[str, Tensor, dict[str, Tensor], tuple[str, ...]]]:
        """Name, weight, optimiser state and the names of its moments, of every parameter."""
        names = {id(weight): name for name, weight in self.student.named_parameters()}
        return [
            (names[id(weight)], weight.detach(), optimiser.state[weight], _MOMENTS[type(optimiser)])
            for optimiser in self._optimisers
            for weight in optimiser.param_groups[0]["params"]
        ]


def _optimisers(network: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW for all weights of an `MLP`, or for those that Muon does not take."""
    weights = dict(network.named_parameters())
    rate, decay = recipe.learning_rate, recipe.weight_decay
    found: list[torch.optim.Optimizer] = []
    hidden = [f"layers.{i}.weight" for i in range(1, recipe.depth)] if recipe.optimiser == "muon" else []
    if hidden:
        matrices = [weights.pop(name) for name in hidden]
        found.append(torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return [*found, torch.optim.AdamW(weights.values(), lr=rate, weight_decay=decay, fused=True)]
