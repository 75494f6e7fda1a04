"""`flowfast theory stability`: what the bounds promise of each segment of a grid, and what its flow really does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, cast

import torch
from rich.table import Table

from flowfast.cli import tables
from flowfast.cli.theory_options import PredictStability
from flowfast.experiments.composition.curves import curves
from flowfast.experiments.composition.ingredients import ingredients
from flowfast.flow import flow_map
from flowfast.grids import GridKind, time_grid
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.report.numbers import short
from flowfast.seeds import generator_for

COLUMNS = {
    "paper": "paper's bound: exponent",
    "signed": "signed",
    "trace": "measured, trace",
    "exact": "measured, λ_max",
    "norm_here": "E|DΦ|",
    "affine": "affine map's error",
    "finite": "amplified to the data",
}


def measure(mixture: GaussianMixture, options: PredictStability) -> list[dict[str, Any]]:
    """Every segment of the chosen grids: exponents, measured amplification, error of the best affine map."""
    process = OUProcess(options.beta)
    for name in ("segments", "n", "nodes"):
        least = 2 if name == "nodes" else 1
        if getattr(options, name) < least:
            raise ValueError(f"{name} must be at least {least}; got {getattr(options, name)}")
    norms = min(options.n, 128)
    known = curves(mixture, process, nodes=options.nodes, points=options.n, norm_points=norms)
    noise = process.marginal(mixture, 1.0).sample(
        max(4 * mixture.dim, options.n), generator=generator_for(options.seed, "theory stability")
    )
    grids = []
    for kind in options.grid:
        times = time_grid(mixture, process, options.segments, kind=cast(GridKind, kind)).tolist()
        path = [noise]
        for t_from, t_to in zip(times[:-1], times[1:], strict=True):
            path.append(flow_map(path[-1], mixture, process, t_from, t_to))
        found = ingredients(mixture, process, times, known, torch.stack(path))
        found["finite"] = [math.exp(value) for value in found.pop("to_data_finite")]
        grids.append({"kind": kind, "times": times, **{name: found[name] for name in COLUMNS}})
    return grids


def show(numbers: Mapping[str, Any]) -> list[Table]:
    """A table per grid, a row per segment, from noise to data."""
    return [
        tables.of_numbers(
            f"{grid['kind']} grid: k = {numbers['components']}, d = {numbers['dim']}, std = {short(numbers['std'])}; "
            f"{numbers['points']:,} points",
            ("from t", "to t", *COLUMNS.values()),
            (
                (*(f"{t:.4f}" for t in ends), *(f"{grid[name][i]:.3g}" for name in COLUMNS))
                for i, ends in enumerate(pairwise(grid["times"]))
            ),
        )
        for grid in numbers["grids"]
    ]
