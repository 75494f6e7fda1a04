"""Students of the flow's last stretch with bounded weights, and the Lipschitz constants that they end up with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flowfast.ensemble import Ensemble
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.seeds import generator_for
from flowfast.students import MLP
from flowfast.students.mlp import check_size
from flowfast.teacher_pairs import PairSource, SegmentTarget, TeacherPairs, relative_errors
from flowfast.theory.lipschitz import linear_layers, lipschitz_constant, log_lipschitz_bound


@dataclass(frozen=True)
class TailStudent:
    """A trained student of the window [0, t]; natural logarithms of Lipschitz constants.

    Attributes:
        error: relative squared error on fresh points. mean: logarithm of the mean local constant over x ~ p_t.
        largest: the largest of them. layers: product of the layers' spectral norms. entry: largest size of an entry.
    """

    error: float
    mean: float
    largest: float
    layers: float
    entry: float


def tail_students(
    mixtures: Sequence[GaussianMixture], process: OUProcess, t: float, *, bound: float, steps: int,
    width: int = 512, depth: int = 4, batch: int = 256, points: int = 1000, seed: int = 0,
) -> list[TailStudent]:  # fmt: skip
    """Train a plain ReLU `MLP` per mixture on the exact flow from t to 0, and measure it.

    Args:
        mixtures: laws of the data, on one device. process: forward process. t: > 0.
        bound: > 0; after every step the entries of the weight matrices are clamped to [-bound, bound].
        steps: of AdamW, >= 1, as `Ensemble` takes them by default. batch: fresh pairs per step.
        width, depth: of the networks, see `MLP`. points: of p_t, for errors and constants. seed: of everything random.

    Raises:
        TypeError, ValueError: an argument out of range.

    Source: arXiv 2606.03820, Table 3 (there with ReLU and ReQU in turn, which have no Lipschitz constant).
    """
    check_size("steps", steps)
    check_size("points", points)
    laws = [mixture.to(torch.float32) for mixture in mixtures]
    sources = [PairSource(law, process, SegmentTarget(t, 0.0), ("tail student", seed, i)) for i, law in enumerate(laws)]
    networks = [
        MLP(law.dim, law.dim, width=width, depth=depth, generator=generator_for(seed, "tail student", i))
        for i, law in enumerate(laws)
    ]
    ensemble = Ensemble([network.to(laws[0].device) for network in networks], weight_bound=bound)
    pairs = TeacherPairs(sources, batch)
    for step in range(steps):
        ensemble.step(*pairs(step))
    errors = relative_errors(ensemble, sources, n=points).tolist()
    found = []
    for i, (source, error) in enumerate(zip(sources, errors, strict=True)):
        member = ensemble.member(i)
        if not isinstance(member, MLP):
            raise TypeError(f"member {i} must be an MLP; got {type(member).__name__}")
        norms = lipschitz_constant(member, source.draw(points, "constants")[0]).double()
        entry = max(float(layer.weight.detach().abs().max()) for layer in linear_layers(member))
        mean, largest = math.log(float(norms.mean())), math.log(float(norms.max()))
        found.append(TailStudent(error, mean, largest, log_lipschitz_bound(member), entry))
    return found
