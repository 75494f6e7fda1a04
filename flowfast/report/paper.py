"""The report on the paper's tables: one self-contained page and a CSV file, the same bytes from the same results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowfast.experiments.paper import TABLES, Summary, summarise
from flowfast.experiments.paper.published import stored
from flowfast.report import REPORT, environment
from flowfast.report.paper_rows import csv_text, main_grid, segment_grid
from flowfast.report.paper_text import findings
from flowfast.storage import write_bytes

TEMPLATE = "paper.html.j2"
CSV = "tables.csv"
LABELS = {
    1: "heat maps of Table 1, published and ours",
    2: "heat maps of Table 2, published and ours",
    3: "heat maps of Table 3, published and ours under both teachers",
    4: "error against the number of transformer blocks",
    5: "composed error and negative log-density against the number of segments",
}
CAPTIONS = {
    1: "Darker is larger, on one logarithmic scale; hatched fields are holes.",
    2: "Darker is larger, on one logarithmic scale; hatched fields are holes.",
    3: "Darker is larger, on one logarithmic scale; hatched fields are holes.",
    4: "Bars are one standard deviation over the seeds.",
    5: "Solid: ours; dashed with open markers: published. Bars are one standard deviation over the seeds.",
}


def write_tables_report(folder: str | Path) -> Path:
    """Draw the report of the results in `folder`.

    Args:
        folder: of `reproduce`; finished or not: what is missing shows as a hole.

    Returns:
        Path of the page, `folder`/report.html; the figures of every cell stand in `folder`/tables.csv.

    Raises:
        ValueError: no results there, or a damaged line. ModuleNotFoundError: matplotlib or jinja2 is missing.
    """
    summary = summarise(folder)
    page = environment().get_template(TEMPLATE).render(**_content(summary))
    path = summary.folder / REPORT
    write_bytes(summary.folder / CSV, csv_text(summary).encode())
    write_bytes(path, page.encode())
    return path


def _content(summary: Summary) -> dict[str, Any]:
    records = [summary.records[name] for name in sorted(summary.records)]
    return {
        "summary": summary,
        "finished": summary.finished(),
        "wanted": len(summary.wanted),
        "seconds": sum(sum(record.seconds.values()) for record in records),
        "published": stored(),
        "csv": CSV,
        "sections": [_section(summary, number) for number in summary.tables],
        "machines": _distinct([{**record.machine, "teacher": record.backend} for record in records]),
        "versions": _distinct([dict(record.versions) for record in records]),
    }


def _section(summary: Summary, number: int) -> dict[str, Any]:
    grids = [main_grid(summary, number)]
    if number == 5 and (segments := segment_grid(summary)) is not None:
        grids.append(segments)
    return {
        "number": number,
        "title": TABLES[number].title,
        "findings": findings(summary, number) if number in (3, 4) else [],
        "grids": grids,
        "figures": _figures(summary, number),
        "caption": CAPTIONS[number],
    }


def _figures(summary: Summary, number: int) -> list[str]:
    try:
        from flowfast.report import figures, paper_figures
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a report needs jinja2 and matplotlib: pip install 'flowfast[report]'") from error
    if number <= 3:
        drawn = [paper_figures.table_heat_maps(summary, number)]
    elif number == 4:
        drawn = [paper_figures.depth_curves(summary)]
    else:
        drawn = [paper_figures.grid_curves(summary), paper_figures.segment_figure(summary)]
    return [figures.to_svg(figure, f"table{number}-{i}", LABELS[number]) for i, figure in enumerate(drawn)]


def _distinct(described: list[dict[str, Any]]) -> list[list[tuple[str, str]]]:
    """Different descriptions, each once, as names and values."""
    found = dict.fromkeys(
        tuple((name.replace("_", " "), str(value)) for name, value in one.items()) for one in described
    )
    return [list(one) for one in sorted(found)]
