"""Looks after an installation: what is here, what `auto` would use, and whether it computes what it should."""

from __future__ import annotations

import importlib.util
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowfast import _cpp, _triton, backends, ops
from flowfast.distillation import Recipe, distill, evaluate
from flowfast.experiments.machine import PACKAGES, machine, versions
from flowfast.flow import flow_map
from flowfast.grids import time_grid
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.stability import cumulative_stability, stability_profile
from flowfast.students import FlowStudent


@dataclass(frozen=True)
class Check:
    """One check of the self-test.

    Args:
        name: what was asked. ok: the verdict. detail: what was found, in a few words. seconds: it took.
    """

    name: str
    ok: bool
    detail: str
    seconds: float


def facts() -> dict[str, dict[str, Any]]:
    """Versions, machine, what is built and what `backend="auto"` would use, as plain values."""
    cuda = torch.cuda.is_available()
    return {
        "versions": versions((*PACKAGES, "triton", "tyro", "rich")),
        "machine": {**machine(), "gpu": torch.cuda.get_device_name(0) if cuda else "none that torch can see"},
        "built": {
            "C++ kernels": f"yes, {', '.join(_cpp.isas())}" if _cpp.available() else _cpp.missing_message(),
            "Triton kernels": "yes" if _triton.available() else _triton.missing_message(),
            "report": "yes" if _installed("matplotlib", "jinja2") else "no: pip install 'flowfast[report]'",
            "digits": "yes" if _installed("sklearn") else "no: pip install 'flowfast[data]'",
        },
        "auto": {
            "auto on the CPU": _auto(torch.device("cpu")),
            "auto on the GPU": _auto(torch.device("cuda")) if cuda else "no GPU",
        },
    }


def _installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in modules)


def _auto(device: torch.device) -> str:
    try:
        return backends.choose("auto", device)
    except ValueError as error:
        return str(error)


def self_test() -> list[Check]:
    """Run every check of this machine; seconds in all. A check that raises counts as failed."""
    checks: list[tuple[str, Callable[[], tuple[bool, str]]]] = [("C++ kernels are built", _cpp_is_built)]
    served = [("reference", torch.device("cpu"))]
    served += [("cpp", torch.device("cpu"))] if _cpp.available() else []
    served += [("triton", torch.device("cuda"))] if torch.cuda.is_available() and _triton.available() else []
    for name, device in served:
        checks.append((f"score against its formula, {name}", partial(_score, name, device)))
        if name != "triton" or _triton.supports("flow_adaptive"):
            checks.append((f"flow of one Gaussian, {name}", partial(_gaussian, name, device)))
            checks.append((f"flow there and back, {name}", partial(_return, name, device)))
    if _cpp.available():
        checks.append(("same bits on one thread and on all", _threads))
    checks += [("stability against quadrature", _stability), ("a small student learns and is kept", _student)]
    return [_carry_out(name, check) for name, check in checks]


def _carry_out(name: str, check: Callable[[], tuple[bool, str]]) -> Check:
    start = time.perf_counter()
    try:
        ok, detail = check()
    except Exception as error:
        ok, detail = False, f"{type(error).__name__}: {error}"
    return Check(name, ok, detail, time.perf_counter() - start)


def _cpp_is_built() -> tuple[bool, str]:
    return _cpp.available(), f"instruction set {_cpp.isa()}" if _cpp.available() else _cpp.missing_message()


def _problem(device: torch.device, n: int = 256, d: int = 64) -> tuple[GaussianMixture, Tensor]:
    mixture = GaussianMixture.random(20, d, std=0.3, seed=0).to(device, torch.float64)
    return mixture, mixture.sample(n, generator=torch.Generator(device).manual_seed(1))


def _score(backend: str, device: torch.device) -> tuple[bool, str]:
    mixture, x = _problem(device)
    std = float(mixture.std)
    differences = mixture.means - x[:, None]  # (n, k, d)
    gamma = torch.softmax(mixture.log_weights - differences.square().sum(-1) / (2 * std**2), -1)
    expected = (gamma[:, None] @ differences)[:, 0] / std**2
    return _verdict(_relative(ops.score(x, mixture, backend=backend), expected), 1e-10)


def _gaussian(backend: str, device: torch.device) -> tuple[bool, str]:
    mixture = GaussianMixture(torch.full((1, 8), 3.0, dtype=torch.float64, device=device), 0.01)
    process = OUProcess()
    x = torch.randn(64, 8, generator=torch.Generator(device).manual_seed(2), dtype=torch.float64, device=device)
    std = [float(process.std(t, 0.01)) for t in (1.0, 0.0)]
    expected = mixture.means + (x - float(process.alpha(1.0)) * mixture.means) * std[1] / std[0]
    return _verdict(_relative(flow_map(x, mixture, process, 1.0, 0.0, backend=backend), expected), 1e-10)


def _return(backend: str, device: torch.device) -> tuple[bool, str]:
    mixture, x = _problem(device, 32, 8)
    noise = flow_map(x, mixture, OUProcess(), 0.0, 1.0, backend=backend)
    return _verdict(_relative(flow_map(noise, mixture, OUProcess(), 1.0, 0.0, backend=backend), x), 1e-6)


def _threads() -> tuple[bool, str]:
    mixture, x = _problem(torch.device("cpu"), 1_000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ops.score(x, mixture, backend="cpp")
        torch.set_num_threads(max(2, threads))
        together = ops.score(x, mixture, backend="cpp")
    finally:
        torch.set_num_threads(threads)
    return torch.equal(alone, together), f"1 and {max(2, threads)} threads"


def _stability() -> tuple[bool, str]:
    from scipy.integrate import quad

    mixture, process = GaussianMixture.random(20, 64, std=0.1, seed=0), OUProcess()
    closed = float(cumulative_stability(mixture, process, 1.0))

    def rate(u: float) -> float:  # over log t, where it is smooth
        return float(stability_profile(mixture, process, math.exp(u))) * math.exp(u)

    found = quad(rate, math.log(1e-14), 0.0, epsabs=0, epsrel=1e-11, limit=200)[0]
    return _verdict(abs(found / closed - 1), 1e-8)


def _student() -> tuple[bool, str]:
    mixture, process = GaussianMixture.random(5, 4, half_width=1.0, std=0.3, seed=0), OUProcess()
    times = time_grid(mixture, process, 2)
    student = distill(mixture, process, times, recipe=Recipe(steps=60, batch_size=64, width=32, depth=2))
    x = process.marginal(mixture, 1.0).sample(256, generator=torch.Generator().manual_seed(3))
    path = [x]
    for t_from, t_to in zip(times.tolist(), times.tolist()[1:], strict=False):
        path.append(flow_map(path[-1], mixture, process, t_from, t_to))
    error = evaluate(student, torch.stack(path)).composed
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        student.save(Path(folder) / "student")
        same = torch.equal(FlowStudent.load(Path(folder) / "student")(x), student(x))
    return (
        error < 0.9 and same,
        f"relative squared error {error:.2g}{'' if same else ', but it is not read back alike'}",
    )


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _verdict(error: float, most: float) -> tuple[bool, str]:
    return error <= most, f"relative error {error:.1e}, at most {most:g} wanted"
