"""What a folder of results is asked to hold: requests, the runs they need, and the folder's mark."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from flowfast.experiments.folder import MARK as JOB_MARK
from flowfast.experiments.folder import FolderError, held, not_writable
from flowfast.experiments.paper import filters, tables
from flowfast.experiments.paper.settings import Precision, Run, Student, Teacher, Variant
from flowfast.experiments.paper.tables import AS_PUBLISHED, Cell, Table
from flowfast.rank import Rank
from flowfast.storage import differences, is_part, read_json, write_json

MARK = "reproduce.json"
FORMAT = {"experiment": "published tables", "format": 1}
NOTE_LOCK = ".reproduce.lock"
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
STUDENTS: tuple[Student, ...] = ("transformer", "residual")


@dataclass(frozen=True)
class Request:
    """Which runs are wanted.

    Args:
        tables: numbers, each once. seeds: runs per cell, with seeds 0 to seeds - 1.
        teachers: "exact", "paper" or both.
        only: filters such as "sigma0=1, t=0.9"; a cell that agrees with one of them is run. Empty: all cells.
        variant: scale, precision and the student of Table 4.

    Raises:
        ValueError: a value outside these.
    """

    tables: tuple[int, ...] = (1, 2, 3, 4, 5)
    seeds: int = 1
    teachers: tuple[Teacher, ...] = ("exact",)
    only: tuple[str, ...] = ()
    variant: Variant = AS_PUBLISHED

    def __post_init__(self) -> None:
        """Refuse values outside the documented ranges."""
        if not self.tables or len(set(self.tables)) < len(self.tables):
            raise ValueError(f"tables must name at least one table, each once; got {list(self.tables)}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1; got {self.seeds}")
        unknown = [name for name in self.teachers if name not in tables.TEACHERS]
        if unknown or not self.teachers or len(set(self.teachers)) < len(self.teachers):
            raise ValueError(f"teacher must be exact, paper or both; got {' '.join(self.teachers) or 'none'}")
        variant = self.variant
        if not 0 < variant.scale <= 1:
            raise ValueError(f"scale must be above 0 and at most 1; got {variant.scale}")
        for name, value, known in (
            ("precision", variant.precision, PRECISIONS),
            ("student", variant.student, STUDENTS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
        wanted = [tables.table(number) for number in self.tables]
        chosen = [filters.parse(text, wanted) for text in self.only]
        for text, one in zip(self.only, chosen, strict=True):
            if not any(filters.chosen(table, [one]) for table in wanted):
                raise ValueError(f"only={text!r} names no cell: no table of {list(self.tables)} has all these axes")

    def cells(self) -> Iterator[tuple[Table, Cell, Teacher]]:
        """Every cell that is wanted, with every teacher that is wanted and differs there."""
        wanted = [tables.table(number) for number in self.tables]
        only = [filters.parse(text, wanted) for text in self.only]
        for table in wanted:
            # A closed form has one teacher, which serves whichever was asked for.
            teachers = [name for name in table.teachers() if name in self.teachers] or list(table.teachers())
            for cell in filters.chosen(table, only):
                for teacher in teachers:
                    yield table, cell, teacher

    def runs(self) -> list[Run]:
        """Every run that is wanted, once, in the tables' order."""
        found: dict[str, Run] = {}
        for table, cell, teacher in self.cells():
            for seed in range(self.seeds):
                run = Run(table.settings(cell, teacher, self.variant), seed)
                found.setdefault(run.digest(), run)
        return list(found.values())


def is_reproduction(folder: str | Path) -> bool:
    """Whether `folder` is marked as a folder of results of the tables."""
    return (Path(folder) / MARK).is_file()


def read_mark(folder: Path) -> tuple[Variant, tuple[Request, ...]]:
    """How the folder's runs are run, and all requests that were made there.

    Raises:
        ValueError: no such folder, or a mark of another version.
    """
    if not is_reproduction(folder):
        raise ValueError(f"{folder} holds no results of flowfast reproduce: pass the --out folder of such a call")
    mark = read_json(folder / MARK, "mark of the tables")
    if {name: mark.get(name) for name in FORMAT} != FORMAT:
        raise ValueError(f"{folder / MARK} is of another version of flowfast: choose another folder")
    try:
        variant = Variant(**mark["variant"])
        return variant, tuple(_request(each, variant) for each in mark["requests"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / MARK} was not written by this version of flowfast: {error}") from error


def _request(stored: Mapping[str, Any], variant: Variant) -> Request:
    values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in stored.items()}
    return Request(**values, variant=variant)


@contextmanager
def claim(folder: Path, request: Request, rank: Rank) -> Iterator[None]:
    """Hold this rank's place in `folder` while the block runs, and note the request there.

    Tables, seeds, teachers and cells may be added by further calls; the variant may not change.

    Raises:
        FolderError: the folder belongs to something else or to another variant, holds other files, is in use by
            this rank, or cannot be written.
    """
    try:
        check(folder, request)
    except OSError as error:
        raise not_writable(folder, error) from error
    with held(folder, "reproduce.lock" if rank.world == 1 else f"reproduce-{rank.rank}.lock"):
        _note(folder, request)
        yield


def check(folder: Path, request: Request) -> None:
    """Raise FolderError when `folder` belongs to something else than to results of this request's kind."""
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"{folder} is a file, not a folder: choose another one")
    if is_reproduction(folder):
        mark = read_json(folder / MARK, "mark of the tables")
        differing = differences({n: v for n, v in mark.items() if n != "requests"}, _identity(request)).replace(
            "variant.", ""
        )
        if differing:
            raise FolderError(f"{folder} belongs to another experiment ({differing}): choose another folder")
    elif (folder / JOB_MARK).is_file():
        raise FolderError(f"{folder} belongs to another experiment (a flowfast job): choose another folder")
    elif folder.is_dir() and any(not _own(entry) for entry in folder.iterdir()):
        raise FolderError(f"{folder} is not empty and holds no results of the tables: choose a new or empty folder")


def _own(entry: Path) -> bool:
    return entry.match("*reproduce*.lock") or is_part(entry)


def _identity(request: Request) -> dict[str, Any]:
    return {**FORMAT, "variant": asdict(request.variant)}


def _note(folder: Path, request: Request) -> None:
    """Add the request to the mark; processes of several ranks do so one after another."""
    with (folder / NOTE_LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = read_json(folder / MARK, "mark of the tables")["requests"] if is_reproduction(folder) else []
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(request).items()}
        del plain["variant"]
        if plain not in known:
            write_json(folder / MARK, {**_identity(request), "requests": [*known, plain]})
