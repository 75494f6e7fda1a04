"""What is timed beside peers: scores, posterior weights, flows and diameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor

import flowfast
from bench import peers, peers_compiled
from bench.peers import Problem, Run
from flowfast import _cpp

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
            reuses: writes into an output that it was given, where the others pay for fresh memory at every call.
    """

    build: Build
    ours: bool = False
    method: Method = "same"
    compiles: bool = False
    reuses: bool = False


@dataclass(frozen=True)
class Case:
    """One computation with several contenders, ours first.

    Attributes:
        exact: its result in float64, of the first rows at least. flops, exps: nominal count of one call.
        read, written: bytes of the arguments and of the result.
    """

    name: str
    title: str
    problem: Problem
    contenders: Mapping[str, Contender]
    exact: Callable[[], Tensor]
    flops: float
    exps: float
    read: float
    written: float


PEERS: Mapping[str, Contender] = {
    "torch, scripts": Contender(peers.scripts),
    "torch, lean": Contender(peers.lean),
    "torch, lean, output reused": Contender(peers.lean_reused, reuses=True),
    "torch.compile": Contender(peers_compiled.torch_compile, compiles=True),
    "torch SDPA": Contender(peers.sdpa),
    "numpy": Contender(peers.numpy),
    "numpy, output reused": Contender(peers.numpy_reused, reuses=True),
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
    "one point": ("score", 1, 20, 64),
}
LOW_NOISE = ("T1", "T2")  # also at sigma0 = 1e-3
TINY = 16  # rows, components and dimensions at most, for a first call that only loads libraries


def names() -> list[str]:
    """Names of all cases that have peers."""
    return [*SIZES, *(f"{name} sigma0=0.001" for name in LOW_NOISE), *(f"{name} float64" for name in SIZES)]


def named(name: str, *, quick: bool = False, tiny: bool = False) -> Case:
    """A case by its name; `quick` takes fewer points, `tiny` hardly any of anything."""
    operation, n, k, d = SIZES[base(name)]
    std = 1e-3 if name.endswith("=0.001") else 1.0
    if quick:
        n, k = max(n // 16, 1), min(k, 2_000)
    if tiny:
        n, k, d = min(n, TINY), min(k, TINY), min(d, TINY)
    dtype = torch.float64 if name.endswith("float64") else torch.float32
    return case(name, operation, n, k, d, std, dtype=dtype)


def base(name: str) -> str:
    """The case that `name` is a variant of."""
    return name.removesuffix(" float64").removesuffix(" sigma0=0.001")


def case(name: str, operation: str, n: int, k: int, d: int, std: float, *, dtype: torch.dtype = torch.float32) -> Case:
    """One case: components drawn at random, or the digits; points drawn from the law that is evaluated."""
    if name.startswith("digits"):
        from flowfast.experiments import digits_mixture

        data, std = digits_mixture().to(dtype=dtype), 0.15
    else:
        data = flowfast.GaussianMixture.random(k, d, std=std).to(dtype)
    k, process = data.n_components, flowfast.OUProcess(BETA)
    law = process.marginal(data, 1.0 if operation == "flow" else TIME)
    x = law.sample(n, generator=torch.Generator().manual_seed(1))
    here = data if operation in ("flow", "diameter") else law
    problem = Problem(operation, x, here.means, float(here.std), BETA, STEPS)
    sizes = f"k={k:,} d={d}" if operation == "diameter" else f"n={n:,} k={k:,} d={d} sigma0={std:g}"
    title = f"{name}: {operation} {sizes} {str(dtype)[6:]}"
    pairs, products = float(n * k), {"score": 4, "weights": 2, "flow": 4, "diameter": 0}[operation]
    calls = 4 * STEPS if operation == "flow" else 1
    flops = float(k) * k * d if operation == "diameter" else calls * products * pairs * d
    contenders = {**ours(name, operation, here, process), **PEERS}
    if operation == "flow":
        contenders |= SOLVERS
    exps = 0.0 if operation == "diameter" else calls * pairs
    points = 0 if operation == "diameter" else n * d
    written = n * k if operation == "weights" else points
    work = (flops, exps, float(x.element_size() * (points + k * d)), float(x.element_size() * written))
    return Case(name, title, problem, contenders, partial(exact, problem, process), *work)


def ours(
    name: str, operation: str, mixture: flowfast.GaussianMixture, process: flowfast.OUProcess
) -> dict[str, Contender]:
    """flowfast through its public functions; for one point also the compiled function alone."""
    if operation == "flow":

        def flow(problem: Problem, **how: Any) -> Run:
            own = flowfast.GaussianMixture(mixture.means, problem.std)
            return lambda: flowfast.flow_map(problem.x, own, process, 1.0, 0.0, **how)

        return {
            "flowfast": Contender(partial(flow, method="paper", steps=STEPS), ours=True),
            "flowfast, adaptive": Contender(flow, ours=True, method="any"),
            "flowfast, rtol 3e-8": Contender(partial(flow, rtol=3e-8, atol=3e-9), ours=True, method="any"),
        }
    if operation == "diameter":
        # a mixture remembers its diameter, so that every turn takes a fresh one
        return {"flowfast": Contender(lambda p: lambda: flowfast.GaussianMixture(p.means, 1.0).diameter(), ours=True)}
    if operation == "score":
        found = {"flowfast": Contender(lambda problem: lambda: flowfast.score(problem.x, mixture), ours=True)}
        if base(name) == "one point":
            found["flowfast, binding"] = Contender(partial(binding, mixture=mixture), ours=True)
        return found

    def reused(problem: Problem) -> Run:
        out = problem.x.new_empty(len(problem.x), mixture.n_components)
        return lambda: flowfast.posterior_weights(problem.x, mixture, out=out)

    return {
        "flowfast": Contender(lambda problem: lambda: flowfast.posterior_weights(problem.x, mixture), ours=True),
        "flowfast, output reused": Contender(reused, ours=True, reuses=True),
    }


def binding(problem: Problem, mixture: flowfast.GaussianMixture) -> Run:
    """The extension's own function, called with the arguments that `flowfast.score` gets to it: addresses and sizes."""
    alpha, std = torch.ones((), dtype=torch.float64), mixture.std.double()
    tensors = (problem.x, mixture.means, mixture.log_weights_in(problem.x.dtype), alpha, std)
    passed: list[Any] = []
    with mock.patch.object(_cpp, "_function", lambda *_: lambda *arguments: passed.extend(arguments)):
        held = (_cpp.score(*tensors), *tensors)  # addresses keep nothing alive
    function = _cpp._function("posterior", problem.x.dtype)

    def run() -> Tensor:
        function(*passed)
        return held[0]

    return run


def exact(problem: Problem, process: flowfast.OUProcess) -> Tensor:
    """The result in float64; for pointwise operations on large mixtures the first rows of it."""
    x, means = problem.x.double(), problem.means.double()
    if problem.operation == "diameter":
        return torch.tensor([[peers.lean(Problem("diameter", x, means, 1.0))()]], dtype=torch.float64)
    if problem.operation == "flow":
        mixture = flowfast.GaussianMixture(means, problem.std)
        return flowfast.flow_map(x, mixture, process, 1.0, 0.0, rtol=1e-12, atol=1e-13)
    rows, away = [], torch.empty_like(means)  # row by row, differences in one buffer: S4 has 1.2 GB of them per row
    for point in x[: max(8, math.floor(1e9 / means.numel()))]:
        torch.sub(means, point, out=away)
        weights = torch.softmax(away.square_().sum(1) / (-2 * problem.std**2), 0)
        rows.append(weights if problem.operation == "weights" else (weights @ means - point) / problem.std**2)
    return torch.stack(rows)
