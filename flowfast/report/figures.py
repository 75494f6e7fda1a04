"""The figures, as matplotlib objects and as SVG text for a page: same numbers in, same bytes out."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from flowfast.report.numbers import number, power_of_ten, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from flowfast.experiments import GridResult

Array = np.ndarray[Any, Any]

# Okabe and Ito's palette, told apart by colour-blind readers; the marker says the same a second time.
INK, FAINT = "#262b33", "#8a919c"
COLORS = {"uniform": "#0072b2", "balanced": "#d55e00", "measured": "#009e73", "signed": "#aa4499", "stored": "#5b6470"}
MARKERS = {"uniform": "o", "balanced": "s", "measured": "^", "signed": "D", "stored": "v"}
SHADES = {"variance": "#fbf0dc", "mixture": "#dceaf5", "noise": "#eceef1"}
REGIMES = {"variance": "variance shrinkage", "mixture": "mixture", "noise": "noise"}

STYLE: Any = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.7,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 6.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
}


@contextmanager
def style() -> Iterator[None]:
    """Draw with these settings, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def to_svg(figure: Figure, name: str, label: str) -> str:
    """SVG text of a figure for a page that holds several.

    Args:
        figure: what to draw. name: prefix of its ids. label: what it shows, for readers that do not see it.
    """
    stream = io.StringIO()
    with style():
        matplotlib.rcParams["svg.hashsalt"] = name
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    # Outside a file of its own, matplotlib's style element would rule the whole page.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    for size in ("width", "height"):  # the page scales it
        text = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def to_file(figure: Figure, kind: str) -> bytes:
    """A figure as the bytes of a "png", "svg" or "pdf" file."""
    stream = io.BytesIO()
    undated = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with style():
        matplotlib.rcParams["svg.hashsalt"] = "flowfast"
        figure.savefig(stream, format=kind, dpi=200, metadata=undated[kind])
    return stream.getvalue()


def profile(arrays: Mapping[str, Array], regimes: Mapping[str, Any]) -> Figure:
    """The stability profile L(t) on logarithmic axes, its regimes shaded and its crossover times marked.

    Args:
        arrays: profile_t, profile (q,), measured_t, measured (p,): times increasing and positive, L per unit of time.
        regimes: t_shrink and t_mix (None where absent) and intervals (low, high, name).
    """
    t, values, measured = arrays["profile_t"], arrays["profile"], arrays["measured"]
    lowest, highest = min(values.min(), measured.min()), max(values.max(), measured.max())
    with style():
        figure = Figure(figsize=(9.0, 3.7))
        axes = figure.subplots()
        axes.set(xscale="log", yscale="log", xlim=(t[0], t[-1]))
        axes.set_ylim(0.4 * lowest, 5 * highest)
        for low, high, name in regimes["intervals"]:
            low, high = max(low, t[0]), min(high, t[-1])
            if high > low:
                axes.axvspan(low, high, color=SHADES[name], lw=0, zorder=0)
                _label(axes, (low * high) ** 0.5, REGIMES[name], wide=np.log(high / low) / np.log(t[-1] / t[0]))
        axes.plot(t, values, color=INK, label="worst case, spread D²/4")
        axes.plot(arrays["measured_t"], measured, color=COLORS["measured"], ls=(0, (5, 1.5)), label="measured spread")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 0.08))
        for name in ("t_shrink", "t_mix"):
            at = regimes[name]
            if at is not None and t[0] < at < t[-1]:
                axes.axvline(at, color=FAINT, lw=0.9, ls=(0, (4, 3)))
                axes.annotate(
                    f"{name} = {number(at)}", (at, 0.45 * lowest), (-5, 0), textcoords="offset points",
                    ha="right", va="bottom", fontsize=9,
                )  # fmt: skip
        axes.set_xlabel("time t (data on the left, noise on the right)")
        axes.set_ylabel("L(t), per unit of time")
        tick_powers(axes, "xy")
    return figure


def grid_points(grids: Sequence[GridResult]) -> Figure:
    """Where each grid puts its points: on the time axis and on the axis of r, the square root of the SNR."""
    with style():
        figure = Figure(figsize=(9.0, 1.15 + 0.42 * len(grids)))
        left, right = figure.subplots(1, 2, sharey=True)
        for row, grid in enumerate(grids):
            look = _look(grid.kind)
            left.plot(grid.times, [row] * len(grid.times), **look)
            right.plot(grid.snr_roots, [row] * len(grid.times), **look)
        left.set_yticks(range(len(grids)), [grid.kind for grid in grids])
        left.set_ylim(len(grids) - 0.5, -0.5)
        span = max(grids[0].times)
        left.set_xlim(-0.02 * span, 1.02 * span)
        left.set_xlabel("time t (0 is data)")
        high, low = max(grids[0].snr_roots), min(grids[0].snr_roots)
        room = (high / low) ** 0.02
        right.set(xscale="log", xlim=(high * room, low / room))
        right.set_xlabel("square root of the signal-to-noise ratio, r (large is data)")
        tick_powers(right, "x")
        for axes in (left, right):
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
    return figure


def segment_errors(grids: Sequence[GridResult]) -> Figure:
    """Relative squared error of each segment alone, and of the composition after each segment."""
    with style():
        figure = Figure(figsize=(9.0, 3.5))
        panels = figure.subplots(1, 2, sharey=True)
        segments = range(1, len(grids[0].segments) + 1)
        for grid in grids:
            for axes, errors in zip(panels, (grid.segments, grid.along), strict=True):
                # An exact student has error 0, which a logarithmic axis cannot show: it is left out.
                axes.plot(segments, [error if error > 0 else np.nan for error in errors], **_look(grid.kind))
        panels[0].set_title("each segment from the teacher's points")
        panels[1].set_title("the composition, after each segment")
        panels[0].set_ylabel("relative squared error")
        for axes in panels:
            axes.set(yscale="log")
            axes.set_xlabel("segment (noise first, data last)")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
            axes.set_xlim(0.7, len(segments) + 0.3)
            tick_powers(axes, "y")
        panels[1].legend([grid.kind for grid in grids], title="grid", loc="best")
    return figure


def error_shares(levels: Array, errors: Mapping[str, Array]) -> Figure:
    """Share of samples that end within a given distance of the teacher's end point.

    Args:
        levels: (q,), shares. errors: per grid (q,), the distance that this share of samples does not exceed.
    """
    with style():
        figure = Figure(figsize=(9.0, 3.3))
        axes = figure.subplots()
        for kind, distances in errors.items():
            axes.plot(distances, 100 * levels, color=COLORS[kind], label=kind, ls=_dashes(kind))
        every = np.concatenate(list(errors.values()))
        high = max(float(every.max()), 1e-9)
        axes.set(xscale="log", ylim=(0, 100), xlim=(min(max(float(every.min()), 1e-4 * high), high / 15), 1.1 * high))
        axes.set_xlabel("distance from the teacher's end point, in units of the samples' root mean square norm")
        axes.set_ylabel("samples within it, per cent")
        axes.grid(True, axis="both")
        tick_powers(axes, "x")
        axes.legend(title="grid", loc="upper left")
    return figure


def scatter(teacher: Array, students: Mapping[str, Array], explained: Array) -> Figure:
    """Samples on the mixture's first two principal axes, a panel per student beside the teacher's points.

    Args:
        teacher: (p, 2). students: per grid (p, 2), from the same noise. explained: (2,), shares of the variance.
    """
    line = explained[1] == 0.0  # one dimension: the student's end point against the teacher's
    with style():
        columns = min(3, len(students))
        rows = -(-len(students) // columns)
        figure = Figure(figsize=(9.0, 0.5 + 2.9 * rows))
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, (kind, points) in zip(panels, students.items(), strict=False):
            if line:
                axes.axline((0, 0), slope=1, color=FAINT, lw=0.9)
                axes.plot(teacher[:, 0], points[:, 0], ".", color=COLORS[kind], ms=4)
            else:
                axes.plot(*np.stack([teacher, points], 1).T, color="#c9ced6", lw=0.6, zorder=1)
                axes.plot(*teacher.T, "o", mfc="none", mec=FAINT, ms=4, mew=0.8)
                axes.plot(*points.T, ".", color=COLORS[kind], ms=4)
            axes.set_title(kind, color=COLORS[kind])
            axes.set_xlabel("teacher's x" if line else f"first axis ({100 * explained[0]:.0f} % of the variance)")
        panels[0].set_ylabel("student's x" if line else f"second axis ({100 * explained[1]:.0f} %)")
        for axes in panels[len(students) :]:
            axes.set_visible(False)
    return figure


def _look(kind: str) -> dict[str, Any]:
    return {"color": COLORS[kind], "marker": MARKERS[kind], "ls": _dashes(kind), "mec": "white", "mew": 0.8}


def _dashes(kind: str) -> Any:
    dashes = {"balanced": (0, (5, 1.5)), "uniform": (0, (1.2, 1.2)), "signed": (0, (6, 1.5, 1, 1.5))}
    return dashes.get(kind, "-")


def _label(axes: Axes, x: float, text: str, *, wide: float) -> None:
    """Write a regime's name at the top of its band; upright where the band is narrow."""
    axes.text(
        x, 0.97, text, transform=axes.get_xaxis_transform(), ha="center", va="top", fontsize=9,
        color="#5b626d", rotation=0 if wide > 0.16 else 90,
    )  # fmt: skip


def tick_powers(axes: Axes, which: str) -> None:
    """Tick labels of logarithmic axes as plain text, which a page can set in its own font."""
    for axis in ([axes.xaxis] if "x" in which else []) + ([axes.yaxis] if "y" in which else []):
        axis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
        low, high = sorted(axis.get_view_interval())
        if high / max(low, 1e-300) < 30:  # no two powers of ten in view: name some steps between them
            axis.set_minor_formatter(FuncFormatter(lambda value, _: _between(value)))
        else:
            axis.set_minor_formatter(NullFormatter())


def _between(value: float) -> str:
    lead = value / 10 ** np.floor(np.log10(value))
    return short(value) if round(lead) in (2, 5) else ""
