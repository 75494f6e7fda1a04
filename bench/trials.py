"""What the tuner measures: calls that launch a kernel, their time, and whether a configuration may be shipped."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flowfast
from bench.kernel_table import UNSAFE, instructions, usage
from flowfast.backends import body
from flowfast.kernels import launch
from flowfast.kernels.launch import Launch

CALLS = 20  # timed ones of a candidate
ACCURACY = {torch.float32: 1e-5, torch.float64: 1e-10}  # norm-wise relative error against the reference in float64
CHECKED = 64  # rows that are compared
STEPS = 20  # of a flow
TINY = (4, 70, 260)  # points, components and dimensions of a rehearsal, at most
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Workload:
    """A call that launches the kernel: "score", "flow" or "diameter" of n points, k components, d dimensions."""

    operation: str
    n: int
    k: int
    d: int


WORKLOADS: Mapping[str, tuple[Workload, ...]] = {
    "diameter": (Workload("diameter", 1, 50_000, 3), Workload("diameter", 1, 20_000, 512)),
    "posterior": (Workload("score", 1_000_000, 1_000, 3), Workload("score", 100_000, 10_000, 16)),
    "products": (Workload("score", 65_536, 1_797, 64), Workload("score", 16_384, 16_384, 128)),
    "two_pass": (Workload("score", 1_024, 50_000, 3_072),),
    "flow_span": (Workload("flow", 50_000, 20, 64),),
    "flow_full": (Workload("flow", 65_536, 20, 2),),
}


@dataclass(frozen=True)
class Machine:
    """Where is measured, on the CPU in a rehearsal; the folder that Triton compiles into; what was found unsafe."""

    gpu: str
    device: torch.device
    cache: Path
    unsafe: dict[tuple[Any, ...], str] = field(default_factory=dict)  # why, by kernel and numbers

    @property
    def rehearsal(self) -> bool:
        """Whether nothing is compiled, and times mean nothing."""
        return self.device.type == "cpu"


@dataclass(frozen=True)
class Trial:
    """One workload, ready: run() gives a result whose rows are compared with `exact`; row: the fallback it needs."""

    run: Run
    exact: Tensor
    row: Mapping[str, Any]


class Dropped(Exception):
    """A candidate that may not be shipped, and why."""


def family(kernel: str, known: Collection[str]) -> str:
    """The longest of the known names that the name of a table begins with."""
    names = [name for name in known if kernel.startswith(name)]
    if not names:
        raise ValueError(f"kernel {kernel!r} has a table that the tuner does not know: add it to WORKLOADS and SPACES")
    return max(names, key=len)


def fallback(kernel: str) -> list[dict[str, Any]]:
    """The rows for any GPU."""
    return [row for row in launch.rows(kernel) if row["gpu"] == "*"]


def prepared(kernel: str, workload: Workload, machine: Machine) -> Iterator[Trial]:
    """The workload in both dtypes, where it launches `kernel`."""
    if machine.rehearsal:
        n, k, d = (min(size, most) for size, most in zip((workload.n, workload.k, workload.d), TINY, strict=True))
        workload = replace(workload, n=n, k=k, d=d)
    for dtype in ACCURACY:
        run, exact = calls(workload, dtype, machine.device)
        with launch.override(kernel, None) as asked:
            run()
        if not asked:
            print(f"{kernel}: {workload} in {dtype} does not launch it")
            continue
        row = launch.row_for(fallback(kernel), *max(asked, key=lambda one: one[1]), "*")
        if row is not None:
            yield Trial(run, exact(), row)


def calls(workload: Workload, dtype: torch.dtype, device: torch.device) -> tuple[Run, Run]:
    """The workload on the kernels, and its first rows by the reference in float64."""
    mixture, process = flowfast.GaussianMixture.random(workload.k, workload.d).to(device, dtype), flowfast.OUProcess()
    law = process.marginal(mixture, 1.0 if workload.operation == "flow" else 0.1)
    x = law.sample(workload.n, generator=torch.Generator(device).manual_seed(1))

    def run(x: Tensor, dtype: torch.dtype, backend: str) -> Run:
        if workload.operation == "score":
            return partial(flowfast.score, x, law.to(dtype), backend=backend)
        if workload.operation == "flow":
            options: dict[str, Any] = {"method": "paper", "steps": STEPS, "backend": backend}
            return partial(flowfast.flow_map, x, mixture.to(dtype), process, 1.0, 0.0, **options)
        # Not the mixture's own method: a mixture keeps what it has found.
        return lambda: torch.tensor([[body(backend).diameter(mixture.means)]])

    return run(x, dtype, "triton"), run(x[:CHECKED].double(), torch.float64, "reference")


def seconds(kernel: str, candidate: Launch, trials: list[Trial], machine: Machine) -> float:
    """Geometric mean over the trials of the median time of a call.

    Raises:
        Dropped: the candidate fails, spills, would be miscompiled or misses the reference.
    """
    key = (kernel, *candidate.blocks.values(), candidate.warps, candidate.stages)
    if key in machine.unsafe:  # nothing is compiled a second time, so files would not tell
        raise Dropped(machine.unsafe[key])
    logs = []
    for trial in trials:
        known = set(machine.cache.rglob("*"))
        with launch.override(kernel, candidate):
            try:
                got = trial.run()
            except Exception as error:  # whatever stops a compiler or a launch is a reason
                raise Dropped(type(error).__name__) from error
            reason = unsafe(set(machine.cache.rglob("*")) - known)
            if reason:
                machine.unsafe[key] = reason
                raise Dropped(reason)
            check_result(got, trial)
            logs.append(math.log(median_time(trial.run, rehearsal=machine.rehearsal)))
    return math.exp(statistics.fmean(logs))


def unsafe(files: set[Path]) -> str | None:
    """Whether some of the files that Triton's cache has got spill, or hold what ptxas may miscompile."""
    for path in files:
        if path.suffix == ".cubin" and usage(path.read_bytes())[1]:
            return "spills"
        if path.suffix == ".ptx" and UNSAFE in instructions(path.read_text()):
            return UNSAFE
    return None


def check_result(got: Tensor, trial: Trial) -> None:
    """Drop what is not as accurate as ACCURACY asks."""
    exact = trial.exact
    error = (got[: len(exact)].to(exact) - exact).norm(dim=1) / exact.norm(dim=1)
    dtype = torch.float64 if trial.row["dtype"] == "float64" else torch.float32
    if not bool((error <= ACCURACY[dtype]).all()):
        raise Dropped("misses the reference")


def median_time(run: Run, *, rehearsal: bool) -> float:
    """Median seconds of CALLS calls by CUDA events, after some to warm up; of one by the clock in a rehearsal."""
    if rehearsal:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    for _ in range(3):
        run()
    taken = []
    for _ in range(CALLS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        taken.append(1e-3 * begin.elapsed_time(end))
    return float(statistics.median(taken))
