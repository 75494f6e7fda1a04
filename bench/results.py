"""What is kept and shown of a run: numbers per case and contender, as plain values and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench.cases import Case
from bench.timing import Measured, accurate


def as_json(
    case: Case, found: Measured, rates: Mapping[str, float] | None, extra_memory: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """One case as plain numbers.

    Each contender has its share of the FMA ceiling, its share of the larger of the two floors, and the ratio of the
    best peer's median to its own. Who uses the case's own method is compared with peers of that method, who uses
    another with peers of any method that are accurate enough; who writes into an output that it was given with peers
    that do, who allocates with peers that do. `ratio_to_best_of_all` leaves this last distinction out.
    """
    arithmetic, memory = floors(case, rates) if rates else (None, None)
    fma = case.flops / rates[f"fma_{_dtype(case)}"] if rates else None
    rows = {}
    for name, timing in found.timings.items():
        contender = case.contenders[name]
        row: dict[str, Any] = {key: finite(value) for key, value in asdict(timing).items()}
        row |= {"method": contender.method, "ours": contender.ours, "reuses": contender.reuses}
        row |= {"share_of_ceiling": None, "share_of_floor": None}
        if fma is not None and arithmetic is not None and memory is not None and contender.method == "same":
            row["share_of_ceiling"] = fma / timing.median
            row["share_of_floor"] = max(arithmetic, memory) / timing.median
        row["accurate_enough"] = accurate(timing)
        row["extra_memory"] = (extra_memory or {}).get(name)
        rivals = _rivals(case, found, contender.method)
        alike = {peer: median for peer, median in rivals.items() if case.contenders[peer].reuses == contender.reuses}
        for key, field in (("best_peer", alike), ("best_of_all", rivals)):
            best = min(field, key=field.__getitem__, default=None)
            row[key] = best
            row[f"ratio_to_{key}"] = None if best is None else field[best] / timing.median
        rows[name] = row
    floor = {"floor_arithmetic_seconds": arithmetic, "floor_memory_seconds": memory}
    return {"title": case.title, **floor, "contenders": rows, "absent": found.absent}


def floors(case: Case, rates: Mapping[str, float]) -> tuple[float, float]:
    """Seconds that the arithmetic and the memory traffic of a case take at the machine's ceilings.

    Memory: arguments are read once, the result is written once, into pages that the process has already, nothing of
    either in a cache. A case whose arrays fit the caches can be faster than that.
    """
    arithmetic = case.flops / rates[f"fma_{_dtype(case)}"] + case.exps / rates[f"exp_{_dtype(case)}"]
    copied = min(case.read, case.written)
    memory = copied / rates["copy_bytes"]
    memory += (case.read - copied) / rates["read_bytes"] + (case.written - copied) / rates["fill_bytes"]
    return arithmetic, memory


def _dtype(case: Case) -> str:
    return str(case.problem.x.dtype)[6:]


def _rivals(case: Case, found: Measured, method: str) -> dict[str, float]:
    """Medians of the peers of the same method, or of those of any method that are accurate enough."""
    peers = {name: timing for name, timing in found.timings.items() if not case.contenders[name].ours}
    if method == "same":
        return {name: timing.median for name, timing in peers.items() if case.contenders[name].method == "same"}
    return {name: timing.median for name, timing in peers.items() if accurate(timing)}


def finite(value: float) -> float | None:
    """JSON has no infinity: None stands for a result that is not finite."""
    return value if value < float("inf") else None


def table(result: dict[str, Any]) -> Table:
    """One case of the JSON file; a ratio above 1 is faster than the best peer."""
    rows = result["contenders"]
    arithmetic, memory = result["floor_arithmetic_seconds"], result["floor_memory_seconds"]
    title = result["title"]
    if arithmetic is not None:
        title += f"; floors: arithmetic {ms(arithmetic)} ms, memory {ms(memory)} ms"
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    some_reuse = any(row["reuses"] for row in rows.values())
    some_memory = any(row["extra_memory"] is not None for row in rows.values())
    headings = ["", "median ms", "quartiles", "fastest", "turns", "of FMA", "of floor", "x best peer"]
    headings += ["x best of all"] * some_reuse + ["error, median", "worst"] + ["extra MiB"] * some_memory
    for heading in headings:
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, row in rows.items():
        cells = [
            name,
            ms(row["median"]),
            f"{ms(row['lower'])}-{ms(row['upper'])}",
            ms(row["fastest"]),
            str(row["turns"]),
        ]
        cells += ["" if row[key] is None else f"{row[key]:.0%}" for key in ("share_of_ceiling", "share_of_floor")]
        ratios = ("ratio_to_best_peer", "ratio_to_best_of_all")[: 1 + some_reuse]
        cells += ["" if row[key] is None else f"{row[key]:.2f}" for key in ratios]
        errors = (row["error_median"], row["error_worst"])
        cells += ["not finite" if error is None else f"{error:.1e}" for error in errors]
        if some_memory:
            cells.append("" if row["extra_memory"] is None else f"{row['extra_memory'] / 2**20:.0f}")
        shown.add_row(*cells, style="bold" if row["ours"] else None)
    shown.caption, shown.caption_justify = absent(result), "left"
    return shown


def ms(seconds: float) -> str:
    """Milliseconds, three digits."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 1_000 else f"{value:.3g}"


def absent(result: dict[str, Any]) -> str | None:
    """Who was not timed, and why."""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in result["absent"].items())
    return f"not timed: {reasons}" if reasons else None
