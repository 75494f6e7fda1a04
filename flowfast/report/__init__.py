"""The report: one self-contained HTML page drawn from a finished job's folder, the same bytes every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flowfast.experiments.result import JobResult
from flowfast.report import numbers
from flowfast.storage import write_bytes

REPORT = "report.html"
MEANINGS = {
    "uniform": "equal steps of time",
    "balanced": "equal parts of the stability exponent A(T), as published",
    "signed": "equal parts of its sharper, signed form",
    "measured": "equal parts of A(T) with the measured spread in place of the worst case",
    "stored": "of the teacher set that the student learned from",
}
LABELS = {
    "profile": "stability profile against time",
    "grids": "times of each grid",
    "segments": "relative squared error per segment and along the composition",
    "shares": "share of samples within a distance of the exact flow's",
    "scatter": "samples of the exact flow and of each student",
}
TEMPLATE = "report.html.j2"


def write_report(folder: str | Path) -> Path:
    """Draw the report of the finished job in `folder`.

    Args:
        folder: of `run_job`.

    Returns:
        Path of the page, `folder`/report.html. The same stored results give the same bytes.

    Raises:
        ValueError: no finished job there. ModuleNotFoundError: matplotlib or jinja2 is missing.
    """
    result = JobResult.load(folder)
    page = environment().get_template(TEMPLATE).render(**_content(result))
    path = result.folder / REPORT
    write_bytes(path, page.encode())
    return path


def environment() -> Any:
    """Jinja's environment for the pages of this package: strict, escaping, with the filters for numbers."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a report needs jinja2 and matplotlib: pip install 'flowfast[report]'") from error
    environment = Environment(
        loader=PackageLoader("flowfast.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for name in ("number", "short", "seconds", "percent"):
        environment.filters[name] = getattr(numbers, name)
    return environment


def _content(result: JobResult) -> dict[str, Any]:
    arrays = {name: tensor.numpy() for name, tensor in result.arrays().items()}
    return {
        "result": result,
        "best": result.best(),
        "teacher": result.teacher,
        "grids": result.grids,
        "figures": _figures(result, arrays),
        "pictures": _pictures(result, arrays),
        "points": result.settings["evaluation_rows"],
        "meanings": MEANINGS,
        "settings": _table(result),
    }


def _figures(result: JobResult, arrays: dict[str, np.ndarray[Any, Any]]) -> dict[str, str]:
    try:
        from flowfast.report import figures
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a report needs jinja2 and matplotlib: pip install 'flowfast[report]'") from error
    errors = {grid.kind: arrays[f"errors_{grid.kind}"] for grid in result.grids}
    drawn = {
        "profile": figures.profile(arrays, result.regimes),
        "grids": figures.grid_points(result.grids),
        "segments": figures.segment_errors(result.grids),
        "shares": figures.error_shares(arrays["error_levels"], errors),
    }
    if result.settings["image_shape"] is None:
        students = {grid.kind: arrays[f"student_{grid.kind}"] for grid in result.grids}
        drawn["scatter"] = figures.scatter(arrays["teacher"], students, arrays["explained"])
    return {name: figures.to_svg(figure, name, LABELS[name]) for name, figure in drawn.items()}


def _pictures(result: JobResult, arrays: dict[str, np.ndarray[Any, Any]]) -> list[tuple[str, str]]:
    """Label and data URI of each row of images; none for points that are no images."""
    if result.settings["image_shape"] is None:
        return []
    from flowfast.report import pictures

    height, width = result.settings["image_shape"]
    low, high = result.mixture["means_low"], result.mixture["means_high"]
    # Mostly low values are ink on an empty ground: shown dark on light, as on paper.
    dark = float(np.median(arrays["teacher"])) < (low + high) / 2
    rows = [("exact flow", "teacher"), *((grid.kind, f"student_{grid.kind}") for grid in result.grids)]
    return [(label, pictures.row(arrays[name], (height, width), low, high, dark=dark)) for label, name in rows]


def _table(result: JobResult) -> list[tuple[str, list[tuple[str, str]]]]:
    """Settings, machine and versions as titled lists of names and values."""
    plain = {name: value for name, value in result.settings.items() if name != "recipe"}
    groups = [
        ("Mixture and process", {**result.mixture, **result.process}),
        ("Job", plain),
        ("Training of each student", result.settings["recipe"]),
        ("Machine", {**result.machine, "teacher_backend": result.teacher.backend}),
        ("Versions", result.versions),
    ]
    return [(title, [(name.replace("_", " "), _plain(v)) for name, v in group.items()]) for title, group in groups]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return str(value)
