"""What is timed: scores, posterior weights, flows and diameters, each contender beside the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

import flowfast
from bench import peers, peers_compiled
from bench.peers import Problem, Run

BETA = 5.0
TIME = 0.3  # of the score
STEPS = 100  # of the paper's teacher

Method = Literal["same", "any"]
Build = Callable[[Problem], Run]


@dataclass(frozen=True)
class Contender:
    """Somebody who computes a case.

    Attributes:
        build: makes the function to time. ours: flowfast's own. method: "same" as the case prescribes, "any" other
            that reaches the result. compiles: its warm-up costs more than its call, so it is not tried on fewer rows.
    """

    build: Build
    ours: bool = False
    method: Method = "same"
    compiles: bool = False


@dataclass(frozen=True)
class Case:
    """One computation with several contenders, ours first.

    Attributes:
        exact: its result in float64, of the first rows at least. flops, exps: nominal count of one call.
    """

    name: str
    title: str
    problem: Problem
    contenders: Mapping[str, Contender]
    exact: Callable[[], Tensor]
    flops: float
    exps: float


PEERS: Mapping[str, Contender] = {
    "torch, scripts": Contender(peers.scripts),
    "torch, lean": Contender(peers.lean),
    "torch, lean, output reused": Contender(peers.lean_reused),
    "torch.compile": Contender(peers_compiled.torch_compile, compiles=True),
    "torch SDPA": Contender(peers.sdpa),
    "numpy": Contender(peers.numpy),
    "scikit-learn": Contender(peers.scikit_learn),
    "JAX": Contender(peers_compiled.jax, compiles=True),
    "KeOps": Contender(peers_compiled.keops),
}
SOLVERS: Mapping[str, Contender] = {
    "diffrax": Contender(peers_compiled.diffrax_rk4, compiles=True),
    "torchdiffeq": Contender(peers.torchdiffeq_rk4),
    "diffrax Dopri5": Contender(peers_compiled.diffrax_dopri5, method="any", compiles=True),
    "torchdiffeq Dopri5": Contender(peers.torchdiffeq_dopri5, method="any"),
    "torchode Dopri5": Contender(peers.torchode_dopri5, method="any"),
}
EAGER = ("torch, scripts", "torch, lean")  # what the GPU cases are timed against

SIZES: Mapping[str, tuple[str, int, int, int]] = {
    "S1": ("score", 1_024, 20, 64),
    "S2": ("score", 65_536, 20, 64),
    "S3": ("score", 4_096, 1_000, 64),
    "S4": ("score", 256, 50_000, 3_072),
    "S5": ("weights", 65_536, 1_000, 16),
    "T1": ("flow", 1_024, 20, 64),
    "T2": ("flow", 65_536, 20, 64),
    "H1": ("diameter", 1, 20_000, 512),
    "digits score": ("score", 4_096, 1_797, 64),
    "digits flow": ("flow", 256, 1_797, 64),
}
LOW_NOISE = ("T1", "T2")  # also at sigma0 = 1e-3
LONG = ("S4 float64", "T2 float64")  # minutes each: only when asked for by name


def names() -> list[str]:
    """Names of all CPU cases."""
    return [*SIZES, *(f"{name} sigma0=0.001" for name in LOW_NOISE), *(f"{name} float64" for name in SIZES)]


def cases(device: str, *, quick: bool = False, chosen: tuple[str, ...] = ()) -> Iterator[Case]:
    """The `chosen` cases on `device` ("cpu" or "cuda"), or all but the longest; `quick` takes fewer points."""
    if device == "cuda":
        for name, std in (("S1", 1.0), ("S2", 1.0), ("S3", 0.01)):
            operation, n, k, d = SIZES[name]
            yield case(name, operation, n // 16 if quick else n, 20 if name == "S3" else k, d, std, device=device)
        return
    for name in chosen or [name for name in names() if name not in LONG]:
        base = name.removesuffix(" float64").removesuffix(" sigma0=0.001")
        operation, n, k, d = SIZES[base]
        if quick:
            n, k = max(n // 16, 1), min(k, 2_000)
        dtype = torch.float64 if name.endswith("float64") else torch.float32
        yield case(name, operation, n, k, d, 1e-3 if name.endswith("=0.001") else 1.0, dtype=dtype)


def case(
    name: str, operation: str, n: int, k: int, d: int, std: float, *, dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:  # fmt: skip
    """One case: components drawn at random, or the digits; points drawn from the law that is evaluated."""
    if name.startswith("digits"):
        from flowfast.experiments import digits_mixture

        data, std = digits_mixture().to(dtype=dtype), 0.15
    else:
        data = flowfast.GaussianMixture.random(k, d, std=std).to(device, dtype)
    k, process = data.n_components, flowfast.OUProcess(BETA)
    law = process.marginal(data, 1.0 if operation == "flow" else TIME)
    x = law.sample(n, generator=torch.Generator(device).manual_seed(1))
    here = data if operation in ("flow", "diameter") else law
    problem = Problem(operation, x, here.means, float(here.std), BETA, STEPS)
    sizes = f"k={k:,} d={d}" if operation == "diameter" else f"n={n:,} k={k:,} d={d} sigma0={std:g}"
    title = f"{name}: {operation} {sizes} {str(dtype)[6:]}"
    pairs, products = float(n * k), {"score": 4, "weights": 2, "flow": 4, "diameter": 0}[operation]
    calls = 4 * STEPS if operation == "flow" else 1
    flops = float(k) * k * d if operation == "diameter" else calls * products * pairs * d
    rivals = EAGER if device == "cuda" else tuple(PEERS)
    contenders = {**ours(operation, here, process), **{name: PEERS[name] for name in rivals}}
    if operation == "flow":
        contenders |= SOLVERS
    exps = 0.0 if operation == "diameter" else calls * pairs
    return Case(name, title, problem, contenders, partial(exact, problem, here, process), flops, exps)


def ours(operation: str, mixture: flowfast.GaussianMixture, process: flowfast.OUProcess) -> dict[str, Contender]:
    """flowfast through its public functions."""
    if operation == "flow":

        def flow(problem: Problem, **how: Any) -> Run:
            own = flowfast.GaussianMixture(mixture.means, problem.std)
            return lambda: flowfast.flow_map(problem.x, own, process, 1.0, 0.0, **how)

        return {
            "flowfast": Contender(partial(flow, method="paper", steps=STEPS), ours=True),
            "flowfast, adaptive": Contender(flow, ours=True, method="any"),
        }
    if operation == "diameter":
        # a mixture remembers its diameter, so that every turn takes a fresh one
        return {"flowfast": Contender(lambda p: lambda: flowfast.GaussianMixture(p.means, 1.0).diameter(), ours=True)}
    function = flowfast.score if operation == "score" else flowfast.posterior_weights
    return {"flowfast": Contender(lambda problem: lambda: function(problem.x, mixture), ours=True)}


def exact(problem: Problem, mixture: flowfast.GaussianMixture, process: flowfast.OUProcess) -> Tensor:
    """The result in float64; for pointwise operations on large mixtures the first rows of it."""
    means = problem.means.double()
    if problem.operation == "diameter":
        return torch.tensor([[peers.lean(Problem("diameter", problem.x, means, 1.0))()]], dtype=torch.float64)
    wide = flowfast.GaussianMixture(means, problem.std)
    if problem.operation == "flow":
        return flowfast.flow_map(problem.x.double(), wide, process, 1.0, 0.0, rtol=1e-10)
    rows = max(8, min(len(problem.x), math.floor(2e9 / means.numel())))
    function = flowfast.score if problem.operation == "score" else flowfast.posterior_weights
    return function(problem.x[:rows].double(), wide, backend="reference")
