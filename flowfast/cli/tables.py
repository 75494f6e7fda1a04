"""What the command line shows: progress on stderr, tables on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from flowfast.report.numbers import number, percent, seconds, short

if TYPE_CHECKING:
    from flowfast.doctor import Check
    from flowfast.experiments import Event, JobResult
    from flowfast.experiments.settings import Listener

LINE_EVERY = 15.0  # seconds between progress lines where there is no terminal to draw a bar on


def console() -> Console:
    """A console on stdout, wide enough for every table when the output goes to a file."""
    out = Console(file=sys.stdout, highlight=False)
    return out if out.is_terminal else Console(file=sys.stdout, highlight=False, width=120)


def of_numbers(title: str, heads: Iterable[str], rows: Iterable[Iterable[str]], *, caption: str | None = None) -> Table:
    """A table whose columns all hold numbers, aligned on the right."""
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


@contextmanager
def watch() -> Iterator[Listener]:
    """A listener that shows a job's progress on stderr: bars on a terminal, a line now and then elsewhere."""
    err = Console(stderr=True, highlight=False)
    if not err.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("{task.fields[label]:<30}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err) as progress:
        tasks: dict[str, TaskID] = {}

        def listen(event: Event) -> None:
            label = _label(event)
            if label not in tasks:
                tasks[label] = progress.add_task("", total=event.total, label=label, note="")
            progress.update(tasks[label], completed=event.done, note=_note(event))

        yield listen


class _Lines:
    def __init__(self) -> None:
        self._label, self._last = "", 0.0

    def __call__(self, event: Event) -> None:
        now, label = time.monotonic(), _label(event)
        if label != self._label or now - self._last > LINE_EVERY:
            self._label, self._last = label, now
            note = _note(event)
            line = f"{label}: {event.done:,} of {event.total:,}{', ' + note if note else ''}"
            print(line, file=sys.stderr, flush=True)


def _label(event: Event) -> str:
    return f"{event.stage}, {event.grid} grid" if event.grid else event.stage


def _note(event: Event) -> str:
    return "" if event.loss is None else f"loss {number(event.loss)}"


def results(result: JobResult) -> Table:
    """Errors and costs of a finished job, a row per grid."""
    settings, points = result.settings, result.settings["evaluation_rows"]
    table = Table(title=f"{escape(settings['name'])}, segments: {settings['segments']}", title_justify="left")
    table.add_column("grid")
    for head in ("composed error", "worst segment", "same component", "evaluations", "per 1,000 samples", "training"):
        table.add_column(head, justify="right")
    teacher = result.teacher
    table.add_row(
        "exact flow", "0", "0", percent(1.0), number(teacher.evaluations), seconds(1000 * teacher.seconds / points), "",
        style="dim",
    )  # fmt: skip
    for grid in result.grids:
        table.add_row(
            grid.kind,
            number(grid.composed),
            number(max(grid.segments)),
            percent(grid.same_component),
            str(settings["segments"]),
            seconds(1000 * grid.student_seconds / points),
            seconds(grid.training_seconds),
            style="bold" if grid is result.best() else None,
        )
    return table


def stability(numbers: Mapping[str, Any]) -> list[Table]:
    """Regimes and grids of a mixture."""
    regimes = Table(title=f"Regimes; A(T) = {number(numbers['total_stability'])}", title_justify="left")
    for head in ("regime", "from t", "to t"):
        regimes.add_column(head, justify="left" if head == "regime" else "right")
    for low, high, name in numbers["regimes"]["intervals"]:
        regimes.add_row(name, short(low), short(high))
    for name in ("t_shrink", "t_mix"):
        at = numbers["regimes"][name]
        regimes.add_row(f"{name} (crossover)", "does not occur" if at is None else number(at), "", style="dim")
    grids = Table(title="Grids, from noise to data", title_justify="left")
    for head in ("grid", "times t", "exponent of each segment"):
        grids.add_column(head)
    for grid in numbers["grids"]:
        grids.add_row(grid["kind"], ", ".join(map(short, grid["times"])), ", ".join(map(short, grid["exponents"])))
    return [regimes, grids]


def findings(facts: Mapping[str, Mapping[str, Any]], checks: Sequence[Check]) -> list[Table]:
    """What the doctor found."""
    plain = Table(title="What is here", title_justify="left", show_header=False)
    plain.add_column("what")
    plain.add_column("value")
    for group in facts.values():
        for name, value in group.items():
            plain.add_row(name.replace("_", " "), escape(str(value)))
        plain.add_section()
    tests = Table(title="Self-test", title_justify="left")
    for head in ("check", "verdict", "what was found", "time"):
        tests.add_column(head, justify="right" if head == "time" else "left")
    for check in checks:
        verdict = "[green]ok[/]" if check.ok else "[bold red]failed[/]"
        tests.add_row(check.name, verdict, escape(check.detail), f"{check.seconds:.2f} s")
    return [plain, tests]


def comparison(found: Mapping[str, Any]) -> Table:
    """Two benchmark runs; contenders whose ranges between quartiles do not overlap stand out."""
    table = Table(title="Medians, before and after", title_justify="left")
    for head in ("case", "contender", "before ms", "after ms", "after / before"):
        table.add_column(head, justify="left" if head in ("case", "contender") else "right")
    for row in found["rows"]:
        style = None if not row["apart"] else "green" if row["ratio"] < 1 else "red"
        moved = f"{row['ratio']:.2f}" + ("" if not row["apart"] else " faster" if row["ratio"] < 1 else " slower")
        times = (f"{1e3 * row[when]:.3g}" for when in ("before", "after"))
        table.add_row(escape(row["case"]), escape(row["contender"]), *times, moved, style=style)
    notes = [f"not the same in both: {', '.join(found['differs'])}"] if found["differs"] else []
    notes += [
        f"in {when} alone: {'; '.join(found['only_' + when])}" for when in ("before", "after") if found["only_" + when]
    ]
    table.caption, table.caption_justify = escape("\n".join(notes)) or None, "left"
    return table
