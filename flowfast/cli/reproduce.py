"""`flowfast reproduce`: the paper's tables, run again, with progress on stderr and what was found on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table as Box

from flowfast.cli.jobs import cores, run_jobs
from flowfast.cli.options import Reproduce, UsageError
from flowfast.experiments import FolderError
from flowfast.experiments.paper import TABLES, Progress, Request, Summary, pending, reproduce, summarise
from flowfast.experiments.paper.settings import Precision, Student, Teacher, Variant
from flowfast.rank import Rank
from flowfast.report.numbers import number
from flowfast.report.paper import write_tables_report
from flowfast.report.paper_rows import main_grid

NAMED = (
    "tables",
    "seeds",
    "teacher",
    "scale",
    "only",
    "precision",
    "student",
)  # errors that begin with an option's name
LINE_EVERY = 15.0  # seconds between progress lines where there is no terminal to draw bars on


def run(command: Reproduce) -> dict[str, Any]:
    """Carry out the command.

    Returns:
        Plain values for --json: folder, report (None on all ranks but the first), runs finished and missing.

    Raises:
        UsageError: an argument that cannot be used. RuntimeError: a run diverged.
    """
    try:
        request = Request(
            tables=command.tables,
            seeds=command.seeds,
            teachers=cast(tuple[Teacher, ...], command.teacher),  # checked by the request itself
            only=command.only,
            variant=Variant(command.scale, cast(Precision, command.precision), cast(Student, command.student)),
        )
        rank = Rank.from_environment()
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise UsageError(f"--{name} {rest}" if name in NAMED else str(error)) from error
    for name in ("members", "jobs"):
        value = getattr(command, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1; got {value}")
    if command.address is not None and command.engine != "ray":
        raise UsageError("--address is of a Ray cluster: add --engine ray")
    try:
        summary = _work(command, request, rank)
    except FolderError as error:
        raise UsageError(f"--out: {error}") from error
    except ValueError as error:  # a damaged line, or a device that is not there
        raise UsageError(str(error)) from error
    report = write_tables_report(command.out) if rank.rank == 0 else None
    if not command.json:
        show(summary)
    return {
        "folder": str(command.out),
        "report": None if report is None else str(report),
        "finished": summary.finished(),
        "missing": summary.missing(),
    }


def _work(command: Reproduce, request: Request, rank: Rank) -> Summary:
    if command.engine == "ray":
        with _watch() as listener:
            return reproduce(
                request, command.out, device=command.device, rank=rank, listener=listener, most=command.members,
                engine="ray", address=command.address,
            )  # fmt: skip
    left = pending(request, command.out, device=command.device, most=command.members)
    one = rank.world > 1 or command.device != "cpu"
    jobs = min(left, command.jobs or (1 if one else cores()))
    if jobs > 1 and rank.world == 1:
        run_jobs(_arguments(command), jobs)
        return summarise(command.out)
    with _watch() as listener:
        return reproduce(
            request, command.out, device=command.device, rank=rank, listener=listener, most=command.members
        )


def _arguments(command: Reproduce) -> list[str]:
    """The call of one process among several."""
    given = ["reproduce", "--json", "--jobs", "1", "--out", str(command.out), "--seeds", str(command.seeds)]
    given += ["--scale", repr(command.scale), "--device", command.device, "--precision", command.precision]
    given += ["--student", command.student]
    given += ["--tables", *map(str, command.tables), "--teacher", *command.teacher]
    given += ["--only", *command.only] if command.only else []
    return given + (["--members", str(command.members)] if command.members is not None else [])


def show(summary: Summary) -> None:
    """Print every table that was asked for."""
    console = Console(file=sys.stdout, highlight=False)
    wide = console if console.is_terminal else Console(file=sys.stdout, highlight=False, width=160)
    for table in summary.tables:
        grid = main_grid(summary, table)
        box = Box(title=f"Table {table}: {escape(TABLES[table].title)}", title_justify="left")
        for head in grid.heads:
            box.add_column(head, justify="right")
        for row in grid.rows:
            box.add_row(*map(escape, row))
        wide.print(box)
    if summary.variant.scale < 1:
        wide.print("A rehearsal: errors are not comparable with the published ones.", style="dim")


@contextmanager
def _watch() -> Iterator[Callable[[Progress], None]]:
    err = Console(stderr=True, highlight=False)
    if not err.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("{task.fields[label]}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    with Bars(*columns, console=err) as bars:
        whole, part = (bars.add_task("", total=None, label=name, note="") for name in ("runs", "starting"))
        latest = ""

        def listen(event: Progress) -> None:
            nonlocal latest
            if event.label + event.stage != latest:  # the time that is left is estimated anew
                latest = event.label + event.stage
                bars.reset(part, total=event.total)
            bars.update(whole, completed=event.runs_done, total=event.runs)
            bars.update(part, completed=event.done, label=event.stage, note=f"{event.label}{_loss(event)}")

        yield listen


class _Lines:
    def __init__(self) -> None:
        self._label, self._last = "", 0.0

    def __call__(self, event: Progress) -> None:
        now, label = time.monotonic(), event.label
        if label != self._label or now - self._last > LINE_EVERY or event.runs_done == event.runs:
            self._label, self._last = label, now
            of = f"{event.stage} {event.done:,} of {event.total:,}{_loss(event)}"
            print(f"{event.runs_done} of {event.runs} runs; {label}: {of}", file=sys.stderr, flush=True)


def _loss(event: Progress) -> str:
    return "" if event.loss is None else f", loss {number(event.loss)}"
