"""What can be known of a grid before any student is trained: numbers per segment, of which predictors are made."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowfast.experiments.composition.curves import Curves, curves, log_r_of
from flowfast.experiments.composition.grids import times_of
from flowfast.experiments.composition.lines import about, append, read
from flowfast.experiments.composition.settings import Problem, Run
from flowfast.experiments.composition.training import path_of
from flowfast.experiments.paper.settings import digest
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.stability import cumulative_stability, signed_stability
from flowfast.variational import flow_amplification

POINTS = 4_096  # of the exact flow, on which affine maps are fitted and composed
NORM_POINTS = 128  # on which the derivative over each segment is taken
RTOL = 1e-6


def ingredients(
    mixture: GaussianMixture, process: OUProcess, times: Sequence[float], known: Curves, path: Tensor
) -> dict[str, Any]:
    """Numbers per segment, from noise to data, as lists of n.

    Args:
        mixture: law of the data. process: forward process. times: (n + 1,), from noise to data. known: their curves.
        path: points of the exact flow at these times, (n + 1, points, d).

    Returns:
        paper, signed: exponents of the two bounds, Eq. 8 and 9. trace, exact: the measured exponents in y = x / s.
        norm_here: E |D Phi| over the segment, operator norm.
        to_data_paper, to_data_signed, to_data_exact, to_data_direction, to_data_norm, to_data_finite: logarithm of
        the amplification from the segment's end to the data: the two bounds, the measured exponent (with the change of
        scale), and the three of `Curves`.
        spread, change: variance of what the network has to answer, carried to x: of the end points for a plain
        student, of the average of the means for a preconditioned one.
        affine: mean squared error of the best affine map of the segment. spread, change and affine are in units of
        the data's mean square.
        affine_composed: relative squared error of the composition of the best affine maps, one number.
    """
    mixture, grid = mixture.to(torch.float64), torch.tensor(times, dtype=torch.float64)
    log_r, std = log_r_of(mixture, process, times), process.std(grid, float(mixture.std.detach()))
    ends = log_r[1:]
    found: dict[str, Any] = {}
    for name, cumulative in (("paper", cumulative_stability), ("signed", signed_stability)):
        values = cumulative(mixture, process, grid)
        found |= {name: (-values.diff()).tolist(), f"to_data_{name}": values[1:].tolist()}
    for name in ("trace", "exact"):
        found[name] = torch.tensor(known.at(name, log_r)).diff().tolist()
    left = torch.tensor(known.at("exact", [log_r[-1], *ends]), dtype=torch.float64)
    found["to_data_exact"] = (left[0] - left[1:] + (std[-1] / std[1:]).log()).tolist()
    for name in ("direction", "norm", "finite"):
        found[f"to_data_{name}"] = known.at(name, ends)
    found["norm_here"] = [
        float(flow_amplification(path[i, :NORM_POINTS], mixture, process, times[i], times[i + 1], rtol=RTOL).mean())
        for i in range(len(times) - 1)
    ]
    return found | _fitted(path, std.tolist())


def _fitted(path: Tensor, std: Sequence[float]) -> dict[str, Any]:
    """Variances and affine maps of the segments of an exact path (n + 1, points, d)."""
    exact = path.double()
    norm = exact[-1].square().sum(1).mean()
    spread, change, affine, here = [], [], [], exact[0]
    for i, (x, y) in enumerate(zip(exact[:-1], exact[1:], strict=True)):
        spread.append(float(_variance(y) / norm))
        # the step of x = s y: an average of the means, times r_to - r_from and the scale at the end
        change.append(float(_variance(y - std[i + 1] / std[i] * x) / norm))
        design = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        fit = torch.linalg.lstsq(design, y).solution
        unbiased = len(x) - design.shape[1]  # degrees of freedom that the fit leaves
        affine.append(float((y - design @ fit).square().sum() / unbiased / norm))
        here = torch.cat([here, torch.ones_like(here[:, :1])], 1) @ fit
    composed = float((here - exact[-1]).square().sum(1).mean() / norm)
    return {"spread": spread, "change": change, "affine": affine, "affine_composed": composed}


def _variance(x: Tensor) -> Tensor:
    return (x - x.mean(0)).square().sum(1).mean()


def run_ingredients(runs: Sequence[Run], path: str | Path) -> None:
    """Add the ingredients of every grid of these runs that `path` does not hold yet, a line each.

    Raises:
        ValueError: a damaged line.
    """
    path = Path(path)
    finished = {line["digest"] for line in read(path) if "digest" in line}
    if not path.exists():
        append(path, about())
    for problem, grid, segments in dict.fromkeys((run.problem, run.grid, run.segments) for run in runs):
        times = times_of(problem, grid, segments)
        name = name_of(problem, times)
        if name not in finished:
            exact = path_of(problem, times, POINTS)
            found = ingredients(problem.mixture(), problem.process(), times, _curves(problem), exact)
            append(path, {"digest": name, "times": times, **found})
            finished.add(name)


@lru_cache(maxsize=64)
def _curves(problem: Problem) -> Curves:
    return curves(problem.mixture(), problem.process())


def name_of(problem: Problem, times: Sequence[float]) -> str:
    """Digest of a problem and its grid, to six digits."""
    return digest([problem.std, problem.components, problem.dim, problem.seed, *(f"{t:.6g}" for t in times)])
