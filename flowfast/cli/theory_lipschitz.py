"""`flowfast theory lipschitz`: bounds on Lipschitz constants beside the constants themselves, for falling sigma0."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table

from flowfast.cli import tables
from flowfast.cli.options import UsageError
from flowfast.cli.theory_options import Lipschitz
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.report.numbers import number, short
from flowfast.stability import cumulative_stability, signed_stability
from flowfast.theory.lipschitz import tail_flow
from flowfast.theory.mismatch import lipschitz_mismatch
from flowfast.theory.tail_students import tail_students

Numbers = Mapping[str, Any]

NOTE = (
    "Natural logarithms of Lipschitz constants. Flow: |D Phi(x)| at points of p_Delta, and half-way between two means, "
    "where double precision cannot follow it beyond about e^40."
)


def measure(options: Lipschitz) -> Numbers:
    """The numbers of the table, a row per sigma0.

    Raises:
        UsageError, ValueError: an option out of range, or means that cannot be used.
    """
    _check(options)
    process = OUProcess(options.beta)
    if options.means is None:
        means = GaussianMixture.random(20, 64, seed=0)
    else:
        means = GaussianMixture.load(options.means, std=1.0)
    mixtures = [GaussianMixture(means.means, std, means.log_weights.exp()) for std in options.stds]
    layers, width = options.depth + 1, max(options.width, means.dim)
    rows: list[dict[str, Any]] = []
    for mixture in mixtures:
        bounds = lipschitz_mismatch(mixture, process, layers, width, options.bound)
        flow = tail_flow(mixture, process, bounds.window, points=options.n, seed=options.seed)
        whole = tail_flow(mixture, process, options.horizon, points=options.n, seed=options.seed)
        told = {name: _finite(value) for name, value in asdict(bounds).items()}
        rows.append(
            {
                **told,
                "unfavourable": bounds.unfavourable,
                "flow": asdict(flow),
                "whole": {
                    **asdict(whole),
                    "signed": float(signed_stability(mixture, process, options.horizon)),
                    "exponent": float(cumulative_stability(mixture, process, options.horizon)),
                },
                "student": None,
            }
        )
    if options.train:
        students = tail_students(
            mixtures, process, rows[0]["window"], bound=options.bound, steps=options.train, width=options.width,
            depth=options.depth, points=options.n, seed=options.seed,
        )  # fmt: skip
        for row, student in zip(rows, students, strict=True):
            row["student"] = {name: _finite(value) for name, value in asdict(student).items()}
    return {
        "components": means.n_components,
        "dim": means.dim,
        "hidden_layers": options.depth,
        "width": width,
        "bound": options.bound,
        "steps": options.train,
        "points": options.n,
        "horizon": options.horizon,
        "rows": rows,
    }


def show(numbers: Numbers) -> list[Table]:
    """The flow, its last stretch and the whole of it; networks, their budgets and the trained students."""
    rows = numbers["rows"]
    title = f"Window [0, {number(rows[0]['window'])}], D = {number(rows[0]['diameter'])}, {numbers['points']:,} points"
    shown = {"flow: mean": "mean", "largest": "largest", "between means": "between", "signed bound": "signed"}
    shown |= {"paper's bound": "exponent", "its lower bound": "lower_bound"}
    cells = (_cells(row, row | row["flow"], shown.values()) for row in rows)
    flow = tables.of_numbers(title, ("sigma0", *shown), cells, caption=NOTE)
    title = f"The whole flow, from t = {short(numbers['horizon'])}"
    shown = {"flow: mean": "mean", "largest": "largest", "signed bound": "signed", "paper's bound": "exponent"}
    whole = tables.of_numbers(title, ("sigma0", *shown), (_cells(row, row["whole"], shown.values()) for row in rows))
    return [flow, whole, _networks(numbers)]


def _networks(numbers: Numbers) -> Table:
    first = numbers["rows"][0]
    title = (
        f"Networks of {numbers['hidden_layers']} hidden layers, width {numbers['width']}, weights within "
        f"{short(numbers['bound'])}: budget {_cell(first['budget'])}, sigma* = {_cell(first['threshold'])} "
        f"(exact exponent: {_cell(first['exact_threshold'])})"
    )
    heads = ("sigma0", "paper's bound", "budget", "unfavourable")
    trained = ("layers' product", "student: mean", "largest", "relative sq. error") if numbers["steps"] else ()
    rows = []
    for row in numbers["rows"]:
        verdict = "yes" if row["unfavourable"] else "no"
        cells = [short(row["sigma0"]), _cell(row["exponent"]), _cell(row["budget"]), verdict]
        if row["student"] is not None:
            cells += [_cell(row["student"][name]) for name in ("layers", "mean", "largest", "error")]
        rows.append(cells)
    return tables.of_numbers(title, (*heads, *trained), rows)


def _check(options: Lipschitz) -> None:
    for name, least in (("depth", 1), ("width", 1), ("n", 1), ("train", 0), ("seed", 0)):
        if getattr(options, name) < least:
            raise UsageError(f"--{name} must be at least {least}; got {getattr(options, name)}")
    if not 0 < options.bound < math.inf:
        raise UsageError(f"--bound must be positive and finite; got {options.bound}")
    if not 0 < options.horizon < math.inf:
        raise UsageError(f"--horizon must be positive and finite; got {options.horizon}")
    for std in options.stds:
        if not 0 < std < math.inf:
            raise UsageError(f"--stds must be positive and finite; got {std}")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cells(row: Numbers, numbers: Numbers, names: Iterable[str]) -> list[str]:
    return [short(row["sigma0"]), *(_cell(numbers[name]) for name in names)]


def _cell(value: float | None) -> str:
    return "none" if value is None else number(round(value, 9))  # a logarithm that is rounding alone is 0
