"""What is kept and shown of a run: numbers per case and contender, as plain values and as a table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from bench.cases import Case
from bench.timing import Measured, accurate


def as_json(case: Case, found: Measured, rates: dict[str, float] | None) -> dict[str, Any]:
    """One case as plain numbers.

    Each contender has its share of the FMA ceiling and the ratio of the best peer's median to its own. Who uses the
    case's own method is compared with peers of that method; who uses another, with peers of any method that are
    accurate enough.
    """
    dtype = str(case.problem.x.dtype)[6:]
    peers = {name: found.timings[name] for name in found.timings if not case.contenders[name].ours}
    same = {name: timing.median for name, timing in peers.items() if case.contenders[name].method == "same"}
    equal = {name: timing.median for name, timing in peers.items() if accurate(timing)}
    rows = {}
    for name, timing in found.timings.items():
        contender = case.contenders[name]
        row: dict[str, Any] = {key: finite(value) for key, value in asdict(timing).items()}
        row["method"], row["ours"] = contender.method, contender.ours
        row["share_of_ceiling"] = None
        if rates and contender.method == "same":
            row["share_of_ceiling"] = case.flops / rates[f"fma_{dtype}"] / timing.median
        row["accurate_enough"] = accurate(timing)
        field = same if contender.method == "same" else equal
        best = min(field, key=field.__getitem__, default=None)
        row["best_peer"] = best
        row["ratio_to_best_peer"] = None if best is None else field[best] / timing.median
        rows[name] = row
    floor = None
    if rates:
        floor = case.flops / rates[f"fma_{dtype}"] + case.exps / rates[f"exp_{dtype}"]
    return {"title": case.title, "floor_seconds": floor, "contenders": rows, "absent": found.absent}


def finite(value: float) -> float | None:
    """JSON has no infinity: None stands for a result that is not finite."""
    return value if value < float("inf") else None


def table(result: dict[str, Any]) -> Table:
    """One case of the JSON file; a ratio above 1 is faster than the best peer."""
    floor = result["floor_seconds"]
    title = result["title"] + (f"; floor {1e3 * floor:.3g} ms" if floor else "")
    shown = Table(title=title, title_justify="left")
    headings = ("", "median ms", "quartiles", "fastest", "turns", "ceiling", "x best peer", "error, median", "worst")
    for heading in headings:
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, row in result["contenders"].items():
        share, ratio = row["share_of_ceiling"], row["ratio_to_best_peer"]
        errors = (row["error_median"], row["error_worst"])
        shown.add_row(
            name,
            f"{1e3 * row['median']:.3g}",
            f"{1e3 * row['lower']:.3g}-{1e3 * row['upper']:.3g}",
            f"{1e3 * row['fastest']:.3g}",
            str(row["turns"]),
            "" if share is None else f"{share:.0%}",
            "" if ratio is None else f"{ratio:.2f}",
            *("not finite" if error is None else f"{error:.1e}" for error in errors),
            style="bold" if row["ours"] else None,
        )
    absent = "; ".join(f"{name}: {reason}" for name, reason in result["absent"].items())
    shown.caption, shown.caption_justify = (f"not timed: {absent}" if absent else None), "left"
    return shown
