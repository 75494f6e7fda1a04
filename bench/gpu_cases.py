"""The workloads of the GPU benchmark: sizes, who computes them, and what flowfast is asked to reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import flowfast
from bench import gpu_peers, gpu_problems
from bench.peers import Problem, Run

BETA = 5.0
GUARANTEED = 512 * 2**20  # bytes of workspace beside the result that every path but the weights keeps to


@dataclass(frozen=True)
class Aim:
    """What a contender of ours is asked for.

    Attributes:
        times: against `peer`, at least so many times as fast at an equal or better error. milliseconds: at most.
        worst: its own worst error at most. by: the contender; peer: one of `gpu_peers`.
    """

    by: str = "flowfast"
    peer: str | None = None
    times: float | None = None
    milliseconds: float | None = None
    worst: float | None = None

    def words(self) -> str:
        """As the table shows it."""
        who = "" if self.by == "flowfast" else self.by.removeprefix("flowfast, ") + ": "
        if self.milliseconds is not None:
            return f"{who}<= {self.milliseconds:g} ms"
        error = "" if self.worst is None else f", error <= {self.worst:g}"
        return f"{who}>= {self.times:g}x {self.peer}{error}"


@dataclass(frozen=True)
class Workload:
    """One computation.

    Attributes:
        operation: "score" of the mixture's law at time t, or "flow" from noise to data. steps: of a fixed flow; None is
            the default flow, steps by step-size control. std: of the data's components.
    """

    name: str
    operation: Literal["score", "flow"]
    n: int
    k: int
    d: int
    aims: tuple[Aim, ...] = ()
    std: float = 1.0
    t: float = 0.3
    steps: int | None = None

    def tiny(self) -> Workload:
        """The same at a size for the interpreter; a dimension above 256 stays above it."""
        steps = None if self.steps is None else 5
        d = min(self.d, 64) if self.d <= 256 else 260
        return Workload(
            self.name, self.operation, min(self.n, 33), min(self.k, 24), d, self.aims, self.std, self.t, steps
        )


# Times t are such that the posterior is spread over many components, but at low noise.
WORKLOADS = (
    Workload("points d=3", "score", 1_000_000, 1_000, 3, (
        Aim(peer="torch eager", times=8), Aim(peer="KeOps", times=1.2), Aim(milliseconds=0.7),
    )),
    Workload("points d=16", "score", 100_000, 10_000, 16, (
        Aim(peer="torch eager", times=5, worst=1e-5), Aim(milliseconds=1.5),
    )),
    Workload("points d=128", "score", 16_384, 16_384, 128, (
        Aim(peer="torch eager", times=2), Aim(peer="torch SDPA", times=1.5),
        Aim("flowfast, high", peer="torch eager", times=4),
    ), t=0.6),
    Workload("images", "score", 1_024, 50_000, 3_072, (
        Aim(peer="torch eager", times=2.2), Aim("flowfast, high", peer="torch eager", times=4),
    ), t=1.0),
    Workload("images, low noise", "score", 1_024, 50_000, 3_072, (Aim(peer="torch eager", times=10),), std=0.01, t=0.0),
    Workload("paper's flow", "flow", 50_000, 20, 64, (
        Aim(peer="torch eager", times=15), Aim(peer="torch CUDA graph", times=5), Aim(milliseconds=3),
    ), steps=100),
    Workload("exact flow", "flow", 1_000_000, 20, 64, (Aim(milliseconds=10), Aim(peer="paper's scripts", times=100))),
    Workload("long flow d=2", "flow", 65_536, 20, 2, (Aim(milliseconds=3),), steps=1_000),
    Workload("digits", "score", 65_536, 1_797, 64, std=0.15),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A workload with its numbers on a device.

    Attributes:
        scale: of a row's error, (rows,); None is the size of the result's row. exact: the first rows in float64.
        flops: nominal, as the plain form counts them (of fixed steps), else None. moved: bytes of arguments and result.
        written: bytes of the result.
    """

    workload: Workload
    title: str
    problem: Problem
    contenders: Mapping[str, gpu_peers.Contender]
    exact: Tensor
    scale: Tensor | None
    flops: float | None
    moved: float
    written: float


def named(name: str, *, device: str, tiny: bool = False) -> Case:
    """A case by its workload's name, its exact result included."""
    (found,) = (workload for workload in WORKLOADS if workload.name == name)
    return case(found.tiny() if tiny else found, device=device)


def case(w: Workload, *, device: str) -> Case:
    """Means at random or the digits, points from the law that is evaluated, and the exact result of some of them."""
    data, origin = _data(w, device)
    process = flowfast.OUProcess(BETA)
    law = data if w.t == 0 else process.marginal(data, w.t)
    start = process.marginal(data, 1.0) if w.operation == "flow" else law
    x = start.sample(w.n, generator=torch.Generator(device).manual_seed(1))
    here = data if w.operation == "flow" else law
    k, d = here.means.shape
    problem = Problem(w.operation, x, here.means.contiguous(), float(here.std), BETA, w.steps or 100)
    rows = x[: max(16, min(2_048, 200_000_000 // (k * d)))]
    scale = None
    if w.operation == "score":
        exact = flowfast.score(rows.double(), here.to(torch.float64), backend="reference")
        inputs = gpu_problems.Setting(here, rows, rows, rows.new_zeros(len(rows)))
        scale = gpu_problems.scales(inputs.double())["score"]
    else:
        exact = flowfast.flow_map(
            rows.double(), here.to(torch.float64), process, 1.0, 0.0, rtol=1e-12, atol=1e-13, backend="reference"
        )
    evaluations = 1 if w.operation == "score" else 4 * problem.steps
    flops = None if w.operation == "flow" and w.steps is None else 4.0 * evaluations * w.n * k * d
    title = f"{w.name}: {w.operation} n={w.n:,} k={k:,} d={d} sigma0={w.std:g}"
    title += f" t={w.t:g}" if w.operation == "score" else f" {w.steps} RK4 steps" if w.steps else " default steps"
    written = float(x.numel() * x.element_size())
    return Case(
        w, title + origin, problem, {**ours(w, here, process), **gpu_peers.of(w.operation)}, exact, scale, flops,
        2 * written + here.means.numel() * x.element_size(), written,
    )  # fmt: skip


def _data(w: Workload, device: str) -> tuple[flowfast.GaussianMixture, str]:
    """The law of the data, and what to say of where it is from."""
    origin = ""
    if w.name == "digits" and w.k == 1_797:
        try:
            from flowfast.experiments import digits_mixture

            return digits_mixture(w.std).to(device), origin
        except ModuleNotFoundError:
            origin = " (stand-in: means at random, the digits need scikit-learn)"
    return flowfast.GaussianMixture.random(w.k, w.d, std=w.std).to(device), origin


def ours(w: Workload, mixture: flowfast.GaussianMixture, process: flowfast.OUProcess) -> dict[str, gpu_peers.Contender]:
    """flowfast's public functions, with torch's default precision of products and with the faster one."""
    contender = gpu_peers.Contender

    def score(problem: Problem) -> Run:
        return lambda: flowfast.score(problem.x, mixture, backend="triton")

    def flow(**how: Any) -> Callable[[Problem], Run]:
        return lambda p: lambda: flowfast.flow_map(p.x, mixture, process, 1.0, 0.0, backend="triton", **how)

    if w.operation == "score":
        return {"flowfast": contender(score, ours=True), "flowfast, high": contender(score, mode="high", ours=True)}
    if w.steps is None:
        return {"flowfast": contender(flow(), ours=True)}
    return {
        "flowfast": contender(flow(method="paper", steps=w.steps), ours=True),
        "flowfast, default steps": contender(flow(), ours=True),
    }
