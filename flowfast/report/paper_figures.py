"""Figures of the paper's tables: heat maps of errors and curves, ours beside the published ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator

from flowfast.experiments.paper import CellResult, Summary
from flowfast.report.figures import COLORS, FAINT, INK, MARKERS, style, tick_powers
from flowfast.report.numbers import number, short

Array = np.ndarray[Any, Any]
Line: TypeAlias = Sequence[tuple[float | None, float | None]]
"""Mean and standard deviation of each point; None is a hole."""
COMPARED = (("published", FAINT, "o"), ("ours, as published", "#d55e00", "s"), ("ours, exact teacher", "#0072b2", "^"))


@dataclass(frozen=True)
class Panel:
    """One heat map: title and errors (rows, columns), NaN where there is a hole."""

    title: str
    values: Array


def heat_maps(panels: Sequence[Panel], down: tuple[str, Sequence[Any]], across: tuple[str, Sequence[Any]]) -> Figure:
    """Errors on one logarithmic colour scale, each written into its field; a hole stays hatched.

    Args:
        panels: side by side. down, across: name and values of the axes.
    """
    known = np.concatenate([panel.values[np.isfinite(panel.values)] for panel in panels])
    low, high = (np.log10(known.min()), np.log10(known.max())) if len(known) else (0.0, 1.0)
    with style():
        figure = Figure(figsize=(9.0, 1.2 + 0.42 * len(down[1])))
        drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, panel in zip(drawn, panels, strict=True):
            axes.grid(False)
            axes.set_title(panel.title)
            for (row, column), value in np.ndenumerate(panel.values):
                axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, lw=0, **_field(value, low, high)))
                if not np.isnan(value):
                    axes.text(column, row, _brief(value), ha="center", va="center", fontsize=8, color=INK)
            axes.set(xlim=(-0.5, len(across[1]) - 0.5), ylim=(len(down[1]) - 0.5, -0.5))
            axes.set_xticks(range(len(across[1])), [_tick(value) for value in across[1]])
            axes.set_yticks(range(len(down[1])), [_tick(value) for value in down[1]])
            axes.set_xlabel(across[0])
            axes.tick_params(length=0)
        drawn[0].set_ylabel(down[0])
    return figure


def table_heat_maps(summary: Summary, table: int) -> Figure:
    """Tables 1 to 3: published errors beside ours; in Table 3 under both teachers, and the teacher's own error."""
    found = list(summary.cells(table))
    (down, rows), (across, columns) = found[0][1]["exact"].table.axes
    shape = len(rows), len(columns)

    def panel(title: str, values: list[float | None]) -> Panel:
        return Panel(title, np.array([math.nan if v is None else v for v in values], float).reshape(shape))

    published = panel("published", [each["exact"].published["error"].mean for _, each in found])
    exact = [each["exact"].mean() for _, each in found]
    if table != 3:
        return heat_maps([published, panel("ours", exact)], (down, rows), (across, columns))
    own = [_first(each["paper"].mean("teacher_error"), each["exact"].mean("teacher_error")) for _, each in found]
    panels = [
        published,
        panel("ours, as published", [each["paper"].mean() for _, each in found]),
        panel("ours, exact teacher", exact),
    ]
    if any(value is not None for value in own):
        panels.append(panel("teacher's own error", own))
    return heat_maps(panels, (down, rows), (across, columns))


def depth_curves(summary: Summary) -> Figure:
    """Table 4: error against the number of blocks."""
    found = list(summary.cells(4))
    blocks = [cell["blocks"] for cell, _ in found]
    told = [each["paper"].published["error"] for _, each in found]
    lines: list[Line] = [
        [(one.mean, one.std) for one in told],
        [(each["paper"].mean(), each["paper"].std()) for _, each in found],
        [(each["exact"].mean(), each["exact"].std()) for _, each in found],
    ]
    with style():
        figure = Figure(figsize=(9.0, 3.3))
        axes = figure.subplots()
        for (label, color, marker), line in zip(COMPARED, lines, strict=True):
            _curve(axes, blocks, line, label=label, color=color, marker=marker)
        _log_log(axes, blocks)
        axes.set_xlabel("transformer blocks")
        axes.set_ylabel("relative squared error")
        axes.legend()
    return figure


def grid_curves(summary: Summary) -> Figure:
    """Table 5: composed error and -log p_0 against the number of segments, published ones in dashes."""
    found = [(cell, _any(each)) for cell, each in summary.cells(5)]
    with style():
        figure = Figure(figsize=(9.0, 3.6))
        panels = figure.subplots(1, 2)
        for kind in dict.fromkeys(cell["grid"] for cell, _ in found):
            rows = [(cell["segments"], one) for cell, one in found if cell["grid"] == kind]
            counts = [n for n, _ in rows]
            for axes, metric in zip(panels, ("error", "negative_log_density"), strict=True):
                look = {"color": COLORS[kind], "marker": MARKERS[kind]}
                _curve(axes, counts, [(one.mean(metric), one.std(metric)) for _, one in rows], label=kind, **look)
                told = [(n, one.published[metric]) for n, one in rows if metric in one.published]
                if told:
                    line: Line = [(one.mean, one.std) for _, one in told]
                    _curve(axes, [n for n, _ in told], line, ls=(0, (2, 2)), mfc="white", **look)
        for axes, name in zip(
            panels, ("composed relative squared error", "−log p₀ of generated points, nats"), strict=True
        ):
            _log_log(axes, counts)
            axes.set_xlabel("segments")
            axes.set_ylabel(name)
        panels[1].set_yscale("linear")
        if panels[0].get_legend_handles_labels()[0]:
            panels[0].legend(title="grid; dashed: published")
    return figure


def segment_figure(summary: Summary) -> Figure:
    """Table 5: each segment's error against its exponent, one panel per number of segments."""
    found = [(cell, _any(each)) for cell, each in summary.cells(5) if cell["segments"] > 1]
    counts = list(dict.fromkeys(cell["segments"] for cell, _ in found))
    with style():
        figure = Figure(figsize=(9.0, 3.2))
        panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
        for axes, n in zip(panels, counts, strict=True):
            axes.set_title(f"{n} segments")
            for cell, one in found:
                errors, exponents = one.each("segments"), one.each("exponents")
                if cell["segments"] == n and errors and exponents:
                    kind = cell["grid"]
                    axes.plot(exponents, errors, ls="none", ms=4, color=COLORS[kind], marker=MARKERS[kind], label=kind)
            axes.set(xscale="log", yscale="log")
            axes.set_xlabel("exponent of the segment")
            tick_powers(axes, "xy")
        panels[0].set_ylabel("relative squared error of the segment")
        if panels[0].get_legend_handles_labels()[0]:
            panels[0].legend(fontsize=8)
    return figure


def _curve(axes: Any, x: Sequence[int], line: Line, **look: Any) -> None:
    """A line with bars of one standard deviation; holes are left out."""
    known = [(n, mean, std or 0.0) for n, (mean, std) in zip(x, line, strict=True) if mean is not None]
    if known:
        at, means, stds = zip(*known, strict=True)
        axes.errorbar(at, means, yerr=stds, elinewidth=0.8, **look)


def _log_log(axes: Any, counts: Sequence[int]) -> None:
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    tick_powers(axes, "y")


def _any(each: Any) -> CellResult:
    """The exact teacher's result, or the published one's where only that was asked for."""
    found: CellResult = each["exact"] if each["exact"].wanted else each["paper"]
    return found


def _first(value: float | None, other: float | None) -> float | None:
    return other if value is None else value


def _field(value: float, low: float, high: float) -> dict[str, Any]:
    """Fill of a field by the logarithm of its value between two others; half of the map, so that ink stays legible."""
    if math.isnan(value):
        return {"fc": "none", "hatch": "////", "ec": "#d5d9de"}
    share = (math.log10(value) - low) / max(high - low, 1e-9)
    return {"fc": colormaps["YlOrRd"](0.05 + 0.5 * share)}


def _brief(value: float) -> str:
    """Two digits in the space of a field: 0.0040, 2.5e-05, 3.8e+08."""
    return number(value, 2) if 1e-3 <= value < 1e4 else f"{value:.1e}"


def _tick(value: Any) -> str:
    return short(value) if isinstance(value, float) else str(value)
