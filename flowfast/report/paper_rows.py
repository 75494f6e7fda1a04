"""The tables' rows as text for a page, and as plain values for a CSV file."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

from flowfast.experiments.paper import TABLES, CellResult, Summary
from flowfast.experiments.paper.published import Figure
from flowfast.report.numbers import number, short

HOLE = "–"
COLUMNS = (
    ["table", "sigma0", "t", "width", "B", "blocks", "grid", "segments", "teacher", "seeds_wanted", "seeds_finished"]
    + ["published_error", "published_error_std", "error", "error_std", "difference_in_published_std"]
    + ["exact_error", "teacher_error", "published_worst_segment", "published_worst_segment_std", "worst_segment"]
    + ["published_negative_log_density", "published_negative_log_density_std", "negative_log_density"]
    + ["teacher_negative_log_density", "training_seconds", "evaluation_seconds"]
)


@dataclass(frozen=True)
class Grid:
    """One table of the page: heads, rows of text (the first cell names the row) and a caption."""

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str


def main_grid(summary: Summary, table: int) -> Grid:
    """Every cell of a table, published figure and ours side by side."""
    if table in (1, 2):
        return _scores(summary, table)
    return _teachers(summary, table) if table in (3, 4) else _compositions(summary)


def _scores(summary: Summary, table: int) -> Grid:
    rows = []
    for cell, found in summary.cells(table):
        one = found["exact"]
        told = _published(one, "error"), _ours(one), _difference(one), _seeds(one)
        rows.append((*map(_value, cell.values()), *told))
    heads = (*TABLES[table].names(), "published", "ours", "difference", "seeds")
    return Grid(heads, tuple(rows), _CAPTION)


def _teachers(summary: Summary, table: int) -> Grid:
    rows = []
    for cell, found in summary.cells(table):
        paper, exact = found["paper"], found["exact"]
        own = _mean(paper, "teacher_error") if paper.complete else _mean(exact, "teacher_error")
        told = _published(paper, "error"), _ours(paper), _difference(paper), _ours(exact), own
        rows.append((*map(_value, cell.values()), *told, f"{_seeds(paper)}, {_seeds(exact)}"))
    heads = ("published", "ours, as published", "difference", "ours, exact teacher", "published teacher's own error")
    caption = (
        f"{_CAPTION} As published: trained and measured against the published teacher. Exact teacher: trained and "
        "measured against the exact flow. The published teacher's own error is its relative squared error against "
        "the exact flow on fresh points. Seeds: as published, exact."
    )
    return Grid((*TABLES[table].names(), *heads, "seeds"), tuple(rows), caption)


def _compositions(summary: Summary) -> Grid:
    rows = []
    for cell, found in summary.cells(5):
        for teacher, one in found.items():
            if teacher == "paper" and not one.wanted:
                continue
            rows.append(
                (
                    *map(_value, cell.values()),
                    teacher,
                    _published(one, "error"),
                    _ours(one),
                    _difference(one),
                    _published(one, "worst_segment"),
                    _ours(one, "worst_segment"),
                    _published(one, "negative_log_density", 4),
                    _ours(one, "negative_log_density", 4),
                    _seeds(one),
                )
            )
    heads = ("grid", "segments", "teacher", "published", "ours", "difference", "worst segment, published", "ours")
    caption = (
        f"{_CAPTION} The error is that of the composed students. One segment is the same student on every "
        "grid, and at sigma0 = 1 the signed grid is the balanced one. "
        "−log p₀ is the mean over the generated points, in nats."
    )
    return Grid((*heads, "−log p₀, published", "ours", "seeds"), tuple(rows), caption)


def segment_grid(summary: Summary) -> Grid | None:
    """Table 5's segments one by one: measured error beside the exponent that the paper explains it with."""
    rows = []
    for cell, found in summary.cells(5):
        one = found["exact"] if found["exact"].complete else found["paper"]
        errors, exponents, times = one.each("segments"), one.each("exponents"), one.each("times")
        if errors and exponents and times and len(errors) > 1:
            lists = (", ".join(map(short, values)) for values in (times, exponents, errors))
            rows.append((f"{cell['grid']}, {cell['segments']}", *lists))
    if not rows:
        return None
    caption = (
        "From noise (left) to data. Exponent: the integral of the stability profile L over the segment, by which the "
        "paper explains which segments are hard. Error: relative squared error of the segment's student alone, from "
        "points of the segment's own start."
    )
    return Grid(("grid", "times t", "exponent of each segment", "error of each segment"), tuple(rows), caption)


def csv_text(summary: Summary) -> str:
    """Every cell under every teacher as CSV, numbers in full; a hole is empty."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for table in summary.tables:
        for cell, found in summary.cells(table):
            for one in found.values():
                writer.writerow({"table": table, **cell, **_plain(one)})
    return stream.getvalue()


def _plain(one: CellResult) -> dict[str, Any]:
    row: dict[str, Any] = {
        "teacher": one.teacher if one.table.base.target == "flow" else "closed form",
        "seeds_wanted": one.wanted,
        "seeds_finished": len(one.records),
        "error": one.mean(),
        "error_std": one.std(),
        "difference_in_published_std": one.difference(),
    }
    for name in (
        "exact_error",
        "teacher_error",
        "worst_segment",
        "negative_log_density",
        "teacher_negative_log_density",
    ):
        row[name] = one.mean(name)
    for name, figure in one.published.items():
        row |= {f"published_{name}": figure.mean, f"published_{name}_std": figure.std}
    if one.complete:
        for name in ("training", "evaluation"):
            row[f"{name}_seconds"] = sum(record.seconds[name] for record in one.records)
    return row


_CAPTION = (
    "Relative squared error, mean ± sample standard deviation over the seeds. Difference: ours minus published, in "
    "published standard deviations (10 seeds); a rehearsal has none. A dash: left out, or not every seed asked for has "
    "finished."
)


def _value(value: Any) -> str:
    return short(value) if isinstance(value, float) else str(value)


def _published(one: CellResult, metric: str, digits: int = 3) -> str:
    figure: Figure | None = one.published.get(metric)
    return HOLE if figure is None else f"{number(figure.mean, digits)} ± {number(figure.std, 2)}"


def _ours(one: CellResult, metric: str = "error", digits: int = 3) -> str:
    mean, std = one.mean(metric), one.std(metric)
    if mean is None:
        return HOLE
    return number(mean, digits) if std is None else f"{number(mean, digits)} ± {number(std, 2)}"


def _mean(one: CellResult, metric: str) -> str:
    value = one.mean(metric)
    return HOLE if value is None else number(value)


def _difference(one: CellResult) -> str:
    value = one.difference()
    if value is None:
        return HOLE
    return f"{'−' if value < 0 else '+'}{number(abs(value), 2)}"


def _seeds(one: CellResult) -> str:
    if one.wanted == 0:
        return HOLE
    return str(one.wanted) if one.complete else f"{len(one.records)} of {one.wanted}"
