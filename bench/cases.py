"""What is timed: score and flow on the paper's mixture (k=20, d=64, beta=5), each contender beside the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import flowfast
from bench import peers

BETA = 5.0
TIME = 0.3  # of the score
STEPS = 100  # of the paper's teacher


@dataclass(frozen=True)
class Case:
    """One computation with several contenders, ours first, and its exact result in float64."""

    name: str
    contenders: Mapping[str, Callable[[], Tensor]]
    exact: Tensor


def cases(device: str, *, quick: bool = False) -> Iterator[Case]:
    """Every case that can run on `device` ("cpu" or "cuda"); `quick` takes a sixteenth of the points."""
    for n in (1_024, 65_536):
        yield score_case(n // 16 if quick else n, 1.0, device)
    yield score_case(256 if quick else 4_096, 0.01, device)
    if device == "cpu":
        yield flow_case(64 if quick else 1_024, 1.0)
        yield flow_case(64 if quick else 1_024, 0.01)


def score_case(n: int, std: float, device: str) -> Case:
    """Score of p_t at points drawn from p_t, float32."""
    mixture = flowfast.OUProcess(BETA).marginal(flowfast.GaussianMixture.random(20, 64, std=std).to(device), TIME)
    x = mixture.sample(n, generator=torch.Generator(device).manual_seed(1))
    exact = flowfast.score(x.double(), mixture.to(dtype=torch.float64), backend="reference")
    noise = float(mixture.std)
    contenders = {
        "flowfast": partial(flowfast.score, x, mixture),
        "torch, lean": partial(peers.lean_score, x, mixture.means, noise),
        "torch, scripts": partial(peers.scripted_score, x, mixture.means, noise),
    }
    return Case(f"score n={n:,} k=20 d=64 sigma0={std:g}", contenders, exact)


def flow_case(n: int, std: float) -> Case:
    """Flow from t = 1 to t = 0: ours exact and by the paper's method, against that method in torch; float32."""
    mixture, process = flowfast.GaussianMixture.random(20, 64, std=std), flowfast.OUProcess(BETA)
    x = process.marginal(mixture, 1.0).sample(n, generator=torch.Generator().manual_seed(1))
    exact = flowfast.flow_map(x.double(), mixture.to(dtype=torch.float64), process, 1.0, 0.0, rtol=1e-10)
    means = mixture.means
    contenders = {
        "flowfast, exact": partial(flowfast.flow_map, x, mixture, process, 1.0, 0.0),
        "flowfast, paper": partial(flowfast.flow_map, x, mixture, process, 1.0, 0.0, method="paper", steps=STEPS),
        "torch, lean": partial(peers.uniform_rk4, peers.lean_score, x, means, BETA, std, STEPS),
        "torch, scripts": partial(peers.uniform_rk4, peers.scripted_score, x, means, BETA, std, STEPS),
    }
    return Case(f"flow 1 -> 0 n={n:,} k=20 d=64 sigma0={std:g}", contenders, exact)
