"""Every operation against float64 on a GPU: a job of `make gpu`, one per shape, and one for flows and the diameter.

`python -m bench.gpu_accuracy d=64 --device cuda --part rows.json`; with `--device cpu` the kernels are interpreted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import flowfast
from bench import gpu_problems as problems
from bench.gpu_jobs import Part, Row
from bench.gpu_problems import AbsentError, finite

ASKED = 1e-5  # float32: the worst row, at every sigma0
ROUNDED = 3 * 2.0**-8  # bfloat16: three roundings, as many as a velocity has
FLOOR, FACTOR = 1e-10, 64  # float64: the contract of flowfast/ops.py
FLOW = (5e-6, 1e-4, 5e-2)  # median, 99.9 % quantile and worst end point of the contract of flowfast/flow.py
FLOWS = {
    "k=20 d=2": (512, 20, 2),
    "k=20 d=64": (512, 20, 64),
    "k=300 d=64": (256, 300, 64),
    "k=40 d=200": (256, 40, 200),
}
DIAMETERS = {"k=5000 d=3": (5_000, 3), "k=2000 d=512": (2_000, 512)}
TINY_FLOWS = {"k=3 d=2": (4, 3, 2)}
TINY_DIAMETERS = {"k=9 d=3": (9, 3)}
REST = "flows"  # the job beside those of the shapes


def names(*, tiny: bool) -> list[str]:
    """The jobs."""
    return [*(problems.TINY if tiny else problems.SHAPES), REST]


def pointwise(shape: str, modes: Sequence[str], *, device: str, tiny: bool, part: Part) -> None:
    """A row of errors for every sigma0, kind of points, operation and mode."""
    size = (problems.TINY if tiny else problems.SHAPES)[shape]
    for sigma0 in problems.SIGMAS[:: 3 if tiny else 1]:
        for points in problems.POINTS:
            for mode in modes:
                s = problems.setting(*size, sigma0, points=points, device=device, dtype=problems.MODES[mode])
                scales, allowed = problems.scales(s.double()), allowance(s, mode)
                for operation, compute in problems.OPERATIONS.items():
                    exact = compute(problems.given(operation, s).double(), "reference")
                    found = _compared(operation, s, exact, scales[operation], mode)
                    named = {"operation": operation, "shape": shape, "sigma0": sigma0, "points": points, "mode": mode}
                    part.add(**named, **judged(found, allowed))


def allowance(s: problems.Setting, mode: str) -> float:
    """The worst error of a row that a mode may have."""
    if mode == "float64":
        steep = float(s.mixture.means.norm(dim=1).max() / s.mixture.std)
        return max(FLOOR, FACTOR * torch.finfo(torch.float64).eps * (1 + steep))
    return ROUNDED if mode == "bfloat16" else ASKED


def _compared(operation: str, inputs: problems.Setting, exact: Tensor, scale: Tensor | None, mode: str) -> Row:
    try:
        with problems.precision(mode), problems.offered():
            got = problems.OPERATIONS[operation](problems.given(operation, inputs), "triton")
    except AbsentError as absent:
        return {"absent": str(absent)}
    errors = problems.row_errors(got, exact, scale)
    return {"median": finite(float(errors.median())), "worst": finite(float(errors.max()))}


def judged(row: Row, allowed: float) -> Row:
    """Say whether the worst error is within what is allowed; what is absent is neither right nor wrong."""
    if "absent" in row:
        return row
    return {**row, "allowed": allowed, "ok": row["worst"] is not None and row["worst"] <= allowed}


def flows(*, device: str, tiny: bool, part: Part) -> None:
    """Default flows at every sigma0, the paper's method at sigma0 = 1, and diameters."""
    process = flowfast.OUProcess(problems.BETA)
    for shape, (n, k, d) in (TINY_FLOWS if tiny else FLOWS).items():
        x = torch.randn(n, d, generator=torch.Generator().manual_seed(1)).to(device)
        for sigma0 in problems.SIGMAS[:: 3 if tiny else 1]:
            mixture = flowfast.GaussianMixture.random(k, d, std=sigma0).to(device)
            exact = flowfast.flow_map(
                x.double(), mixture, process, 1.0, 0.0, rtol=1e-8 if tiny else 1e-12, atol=1e-13, backend="reference"
            )
            named = {"shape": shape, "sigma0": sigma0, "points": "noise", "mode": "highest"}
            part.add(operation="flow", **named, **_flow(x, mixture, exact, None))
        steps = 5 if tiny else 100
        mixture = flowfast.GaussianMixture.random(k, d).to(device)
        exact = flowfast.flow_map(
            x.double(), mixture, process, 1.0, 0.0, method="paper", steps=steps, backend="reference"
        )
        named = {"shape": shape, "sigma0": 1.0, "points": "noise", "mode": "highest"}
        part.add(operation="flow, paper's steps", **named, **_flow(x, mixture, exact, steps))
    for shape, (k, d) in (TINY_DIAMETERS if tiny else DIAMETERS).items():
        means = flowfast.GaussianMixture.random(k, d).means.to(device)
        mixture = flowfast.GaussianMixture(means, 1.0)
        named = {"operation": "diameter", "shape": shape, "sigma0": 1.0, "points": "means", "mode": "highest"}
        try:
            with problems.offered():
                got = mixture.diameter(backend="triton")
        except AbsentError as absent:
            part.add(**named, absent=str(absent))
            continue
        exact_diameter = mixture.diameter(backend="reference")
        error = finite(abs(got - exact_diameter) / exact_diameter)
        part.add(**named, **judged({"median": error, "worst": error}, 1e-6))


def _flow(x: Tensor, mixture: flowfast.GaussianMixture, exact: Tensor, steps: int | None) -> Row:
    """Errors of the end points, and whether their median, 99.9 % quantile and worst are within the contract."""
    process = flowfast.OUProcess(problems.BETA)
    try:
        with problems.offered():
            solution = flowfast.solve_flow(
                x, mixture, process, 1.0, 0.0, method="snr" if steps is None else "paper", steps=steps, backend="triton"
            )
    except AbsentError as absent:
        return {"absent": str(absent)}
    errors = problems.row_errors(solution.x, exact, None).sort().values
    at = (len(errors) // 2, int(0.999 * (len(errors) - 1)), len(errors) - 1)
    seen = [float(errors[i]) for i in at]
    ok = all(error <= most for error, most in zip(seen, FLOW, strict=True)) and not bool(solution.status.any())
    found = dict(zip(("median", "most", "worst"), map(finite, seen), strict=True))
    return {**found, "allowed": FLOW[2], "ok": ok, "failed": int((solution.status != 0).sum())}


def main(arguments: Sequence[str] | None = None) -> int:
    """One job: exit code 1 when a row is outside what is allowed."""
    options = parse(arguments)
    part, begin = Part(options.part), time.perf_counter()
    with torch.no_grad():
        if options.job == REST:
            flows(device=options.device, tiny=options.tiny, part=part)
        else:
            pointwise(options.job, options.mode, device=options.device, tiny=options.tiny, part=part)
    wrong = [row for row in part.rows if row.get("ok") is False]
    print(f"{options.job}: {len(part.rows)} rows, {len(wrong)} wrong, {time.perf_counter() - begin:.1f} s")
    for row in wrong:
        print(row)
    return 1 if wrong else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_accuracy", description=__doc__)
    parser.add_argument("job", choices=[*problems.SHAPES, *problems.TINY, REST])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for the interpreter")
    parser.add_argument("--mode", nargs="+", choices=[*problems.MODES], default=[*problems.MODES], help="only these")
    parser.add_argument("--part", type=Path, help="file of the rows")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
