"""Records gathered into cells: a mean stands only where every requested seed has finished."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowfast.experiments.paper.plan import Request, read_mark
from flowfast.experiments.paper.published import Figure, published
from flowfast.experiments.paper.records import Record, read
from flowfast.experiments.paper.settings import Run, Teacher, Variant
from flowfast.experiments.paper.tables import TABLES, Cell, Table


@dataclass(frozen=True)
class CellResult:
    """One cell under one teacher.

    Args:
        table, cell, teacher: where it stands.
        wanted: seeds that were asked for; 0 when this cell never was. records: of those that have finished, by seed.
        published: the paper's figures by name of metric. comparable: False in a rehearsal.
    """

    table: Table
    cell: Cell
    teacher: Teacher
    wanted: int
    records: tuple[Record, ...]
    published: Mapping[str, Figure]
    comparable: bool = True

    @property
    def complete(self) -> bool:
        """Whether every seed that was asked for has finished."""
        return 0 < self.wanted == len(self.records)

    def values(self, metric: str) -> list[float]:
        """A metric's value for each seed; none when the cell is not complete or has no such metric."""
        if not self.complete or any(metric not in record.metrics for record in self.records):
            return []
        return [float(record.metrics[metric]) for record in self.records]

    def mean(self, metric: str = "error") -> float | None:
        """Mean over all requested seeds; None is a hole."""
        values = self.values(metric)
        return statistics.fmean(values) if values else None

    def std(self, metric: str = "error") -> float | None:
        """Sample standard deviation; None for fewer than two seeds, or a hole."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else None

    def difference(self, metric: str = "error") -> float | None:
        """Our mean minus the published one, in published standard deviations; None without both, or in a rehearsal."""
        mean = self.mean(metric)
        if mean is None or metric not in self.published or not self.comparable:
            return None
        return self.published[metric].differs(mean)

    def each(self, metric: str) -> list[float] | None:
        """Mean over the seeds of a metric that is a list, entry by entry; None is a hole."""
        if not self.complete or any(metric not in record.metrics for record in self.records):
            return None
        lists = [record.metrics[metric] for record in self.records]
        return [statistics.fmean(entries) for entries in zip(*lists, strict=True)]


@dataclass(frozen=True)
class Summary:
    """Everything a folder of results says.

    Args:
        folder: where. variant: how its runs were run. tables: numbers that were asked for, in order.
        results: by table number, cell (as a tuple of values) and teacher.
        wanted: digests of all runs that were asked for. records: all finished runs, by digest.
    """

    folder: Path
    variant: Variant
    tables: tuple[int, ...]
    results: Mapping[tuple[int, tuple[Any, ...], Teacher], CellResult]
    wanted: frozenset[str]
    records: Mapping[str, Record]

    def cells(self, number: int) -> Iterator[tuple[Cell, dict[Teacher, CellResult]]]:
        """Every cell of a table with what is there under each of its teachers, asked for or not."""
        table = TABLES[number]
        for cell in table.cells():
            yield cell, {name: self.results[number, tuple(cell.values()), name] for name in table.teachers()}

    def finished(self) -> int:
        """Runs that were asked for and have finished; one that serves two tables counts once."""
        return len(self.wanted & set(self.records))

    def missing(self) -> int:
        """Runs that were asked for and have not finished."""
        return len(self.wanted) - self.finished()


def summarise(folder: str | Path) -> Summary:
    """Read what stands in `folder`.

    Raises:
        ValueError: no such folder, or a damaged line; the message names it.
    """
    folder = Path(folder)
    variant, requests = read_mark(folder)
    return gather(folder, variant, requests, read(folder))


def gather(folder: Path, variant: Variant, requests: tuple[Request, ...], records: Mapping[str, Record]) -> Summary:
    """Sort records into the cells that the requests name."""
    wanted: dict[tuple[int, tuple[Any, ...], Teacher], int] = {}
    for request in requests:
        for table, cell, teacher in request.cells():
            key = table.number, tuple(cell.values()), teacher
            wanted[key] = max(wanted.get(key, 0), request.seeds)
    numbers = tuple(number for number in TABLES if any(key[0] == number for key in wanted))
    results = {}
    for number in numbers:
        table = TABLES[number]
        for cell in table.cells():
            for teacher in table.teachers():
                key = number, tuple(cell.values()), teacher
                settings = table.settings(cell, teacher, variant)
                digests = [Run(settings, seed).digest() for seed in range(wanted.get(key, 0))]
                results[key] = CellResult(
                    table=table,
                    cell=cell,
                    teacher=teacher,
                    wanted=wanted.get(key, 0),
                    records=tuple(records[name] for name in digests if name in records),
                    published=published(table, cell),
                    comparable=variant.scale == 1,
                )
    everything = frozenset(run.digest() for request in requests for run in request.runs())
    return Summary(folder, variant, numbers, results, everything, records)
