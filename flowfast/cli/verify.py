"""`flowfast verify` and `flowfast export`: teacher sets on disk, with progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flowfast.cli.options import Export, UsageError, Verify
from flowfast.dataset import TeacherDataset, Verification, export_dataset, verify_dataset
from flowfast.dataset.shard_files import open_folder

SHOWN = 50  # findings; --json has all


def verify(command: Verify) -> int:
    """Verify a set; exit code 1 where something is wrong.

    Raises:
        UsageError: no set in the folder, or a plan that is damaged.
    """
    try:
        with _bar("shards") as progress:
            found = verify_dataset(command.folder, repair=command.repair, rebuild=command.rebuild, progress=progress)
    except ValueError as error:
        raise UsageError(f"FOLDER: {error}") from error
    if command.json:
        print(json.dumps(found.to_dict(), indent=2))
        return 0 if found.ok else 1
    for said, findings in (("repaired ", found.repaired), ("", found.findings)):
        for finding in findings[:SHOWN]:
            print(f"{said}{finding}")
        if len(findings) > SHOWN:
            print(f"... and {len(findings) - SHOWN} more: --json lists all")
    for line in (*found.notes, _sentence(found)):
        print(line)
    return 0 if found.ok else 1


def export(command: Export) -> int:
    """Export a set and print where it was written.

    Raises:
        UsageError: no complete set in the folder, or a place that is taken.
    """
    try:
        open_folder(command.folder)
    except ValueError as error:
        raise UsageError(f"FOLDER: {error}") from error
    try:
        with _bar("rows") as progress:
            place = export_dataset(command.folder, command.format, out=command.out, progress=progress)
    except ValueError as error:
        name = "--out" if str(error).startswith("out: ") else "FOLDER"
        raise UsageError(f"{name}: {str(error).removeprefix('out: ')}") from error
    if command.json:
        rows = len(TeacherDataset(command.folder))
        print(json.dumps({"folder": str(command.folder), "out": str(place), "format": command.format, "rows": rows}))
    else:
        print(place)
    return 0


def _sentence(found: Verification) -> str:
    if found.ok:
        return f"{found.folder}: {found.rows:,} rows in {found.shards:,} shards as they were written"
    n = len(found.findings)
    return (
        f"{found.folder}: {n} thing{'s are' if n > 1 else ' is'} wrong; --repair makes shards again, to the same bytes"
    )


@contextmanager
def _bar(unit: str) -> Iterator[Callable[[int, int], None] | None]:
    """Progress on stderr where it is a terminal."""
    err = Console(stderr=True, highlight=False)
    if not err.is_terminal:
        yield None
        return
    with Progress(
        TextColumn(unit), BarColumn(bar_width=32), MofNCompleteColumn(), TimeRemainingColumn(), console=err
    ) as bars:
        task = bars.add_task("", total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
