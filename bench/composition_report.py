"""`python -m bench.composition_report`: figures and tables of docs/grids.md, from the stored lines alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import numpy as np
from matplotlib import pyplot

from flowfast.experiments.composition.analysis import (
    Found,
    Interval,
    grid_ratios,
    rank_correlations,
    read_ingredients,
    read_runs,
    repeatability,
)
from flowfast.experiments.composition.phases import Phase, counts, phases
from flowfast.experiments.composition.predictors import AFTER_TRAINING, AMPLIFICATIONS, DIFFICULTIES, SINGLES
from flowfast.experiments.composition.settings import STUDENTS, Student
from flowfast.experiments.composition.studies import BUDGETS, GRIDS, PHASE_GRIDS, SEGMENTS
from flowfast.report.figures import STYLE

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
GRID_FILE, INGREDIENT_FILE, PHASE_FILE = (
    RESULTS / f"{name}-study-cpu.jsonl" for name in ("grids", "ingredients", "phases")
)
DOCUMENT = ROOT / "docs" / "grids.md"
NAMED = tuple(grid for grid in GRIDS if not grid.startswith("random"))
FACTORS = (1, 2, 5, 10, 20)  # on the axis of plain students
Numbers = dict[Student, dict[str, Interval]]


def main() -> None:
    """Draw the figures and write the tables into docs/grids.md."""
    runs, known, found = read_runs(GRID_FILE), read_ingredients(INGREDIENT_FILE), phases(read_runs(PHASE_FILE))
    within = correlations(runs, known, lambda f: (f.run.problem, f.run.segments, f.run.seed))
    overall = correlations(runs, known, lambda f: f.run.student)
    document = DOCUMENT.read_text()
    for name, lines in tables(runs, within, overall, found).items():
        document = placed(document, name, lines)
    DOCUMENT.write_text(document)
    with pyplot.rc_context(STYLE):
        draw_predictors(within, DOCUMENT.with_name("grids-predictors.png"))
        draw_phases(found, DOCUMENT.with_name("grids-phases.png"))


def correlations(
    runs: Sequence[Found], known: Mapping[str, Mapping[str, Any]], within: Callable[[Found], Any]
) -> Numbers:
    """Rank correlations of every predictor, for each kind of student that was trained."""
    return {
        student: rank_correlations(chosen, known, within=within)
        for student in STUDENTS
        if (chosen := [one for one in runs if one.run.student == student and one.run.segments > 1])
    }


def tables(runs: Sequence[Found], within: Numbers, overall: Numbers, found: Sequence[Phase]) -> dict[str, list[str]]:
    """Markdown tables by name."""
    return {
        "predictors": predictor_table(runs, within, overall),
        "grids": grid_table(runs),
        "phases": phase_table(found),
    }


def predictor_table(runs: Sequence[Found], within: Numbers, overall: Numbers) -> list[str]:
    """Single numbers, the best pairs of each student, the measured local errors, and what a second seed repeats."""
    students = list(within)
    names = list(SINGLES)
    for student in students:
        pairs = [name for name in within[student] if "*" in name and name.split("*")[0] not in AFTER_TRAINING]
        names += [max(pairs, key=lambda name: within[student][name].value)]
    names += ["one*paper", "one*finite", "affine*one", "local*one", "local*finite"]
    lines = _head(["predictor", *students, *(f"{student}, overall" for student in students)])
    for name in dict.fromkeys(names):
        cells = [_interval(within[student][name]) for student in students]
        cells += [f"{overall[student][name].value:.2f}" for student in students]
        lines.append(_row([label(name), *cells]))
    again = []
    for student in students:
        found = repeatability([one for one in runs if one.run.student == student])
        again.append("" if found is None else _interval(found))
    lines.append(_row(["a second training seed", *again, *[""] * len(students)]))
    return lines


def label(name: str) -> str:
    """A predictor in words."""
    if name in SINGLES:
        return SINGLES[name]
    difficulty, amplification = name.split("*")
    if amplification == "one":
        return f"sum of: {DIFFICULTIES[difficulty]}"
    first = "" if difficulty == "one" else f"{DIFFICULTIES[difficulty]} x "
    return f"sum of: {first}(amplification to the data: {AMPLIFICATIONS[amplification]})^2"


def grid_table(runs: Sequence[Found]) -> list[str]:
    """Composed error over that of the uniform grid."""
    lines = _head(["student", "n", *NAMED])
    for student in STUDENTS:
        for segments in SEGMENTS[1:]:
            chosen = [one for one in runs if one.run.student == student and one.run.segments == segments]
            if chosen:
                ratios = grid_ratios(chosen, NAMED)
                lines.append(_row([student, str(segments), *(_interval(ratios[grid]) for grid in NAMED)]))
    return lines


def phase_table(found: Sequence[Phase]) -> list[str]:
    """How many of the problems say what, by student, budget and n."""
    lines = _head(["student", "steps in all", *(f"n = {n}" for n in SEGMENTS[1:])])
    said = counts(found)
    for student in PHASE_GRIDS:
        for steps in BUDGETS:
            cells = [said.get((student, steps, n)) for n in SEGMENTS[1:]]
            words = ["" if one is None else f"{one['helps']} / {one['open']} / {one['hurts']}" for one in cells]
            lines.append(_row([student, f"{steps:,}", *words]))
    return lines


def placed(document: str, name: str, lines: Sequence[str]) -> str:
    """The document with these lines between the marks of this name.

    Raises:
        ValueError: no such marks.
    """
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    if not pattern.search(document):
        raise ValueError(f"document must have the marks <!-- {name} --> and <!-- end of {name} -->")
    return pattern.sub(lambda match: f"{match[1]}{chr(10).join(lines)}\n{match[2]}", document)


def draw_predictors(within: Numbers, path: Path) -> None:
    """Rank correlation of every pair of difficulty and amplification: a panel per student."""
    figure, axes = pyplot.subplots(1, len(within), figsize=(4.0 + 2.6 * len(within), 4.2), sharey=True, squeeze=False)
    for axis, (student, known) in zip(axes[0], within.items(), strict=True):
        values = np.array([[known[f"{a}*{b}"].value for b in AMPLIFICATIONS] for a in DIFFICULTIES])
        axis.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        axis.set(title=student, xticks=range(len(AMPLIFICATIONS)), yticks=range(len(DIFFICULTIES)))
        axis.set_xticklabels(list(AMPLIFICATIONS.values()), rotation=45, ha="right", fontsize=8)
        axis.set_yticklabels(list(DIFFICULTIES.values()), fontsize=8)
        axis.grid(False)
        for (row, column), value in np.ndenumerate(values):
            color = "white" if abs(value) > 0.65 else "black"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    figure.suptitle("rank correlation of sum(difficulty x amplification^2) with the composed error", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def draw_phases(found: Sequence[Phase], path: Path) -> None:
    """Error with n segments over that with one: a panel per student and budget, a line per problem."""
    colors, marks, dashes = {1.0: "#0072b2", 0.3: "#d55e00", 0.1: "#009e73"}, {3: "o", 20: "s"}, {8: "--", 64: "-"}
    figure, axes = pyplot.subplots(
        len(PHASE_GRIDS), len(BUDGETS), figsize=(10, 6), sharex=True, sharey="row", squeeze=False
    )  # fmt: skip
    for axis, (student, steps) in zip(axes.flat, [(a, b) for a in PHASE_GRIDS for b in BUDGETS], strict=True):
        here = [one for one in found if (one.student, one.steps) == (student, steps)]
        for place, problem in enumerate(dict.fromkeys(one.problem for one in here)):
            mine = sorted((one for one in here if one.problem == problem), key=lambda one: one.segments)
            shift = 1 + 0.012 * (place - 6)  # error bars side by side
            ratios = np.exp([one.log_ratio for one in mine])
            bars = ratios * np.expm1([one.spread for one in mine])
            axis.errorbar(
                [one.segments * shift for one in mine], ratios, bars,
                color=colors[problem.std], marker=marks[problem.components], linestyle=dashes[problem.dim],
                linewidth=1, markersize=4, label=f"std {problem.std}, k {problem.components}, d {problem.dim}",
            )  # fmt: skip
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=f"{student}, {steps:,} steps in all", xscale="log", xticks=SEGMENTS[1:])
        axis.set_xticklabels([str(n) for n in SEGMENTS[1:]])
        if student == "plain":
            axis.set(yscale="log", yticks=FACTORS, yticklabels=[str(factor) for factor in FACTORS])
        axis.minorticks_off()
    figure.supxlabel("segments n", fontsize=10)
    figure.supylabel("composed error, n segments over one", fontsize=10)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _head(names: Sequence[str]) -> list[str]:
    return [_row(names), "|" + "---|" * len(names)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _interval(one: Interval) -> str:
    return f"{one.value:.2f} ({one.low:.2f} to {one.high:.2f})"


if __name__ == "__main__":
    main()
