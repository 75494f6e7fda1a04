"""The paper's five tables, and the cells of Table 5 that it left out, as grids of settings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

from flowfast.experiments.paper.settings import Settings, Teacher, Variant

Cell: TypeAlias = Mapping[str, Any]
"""Place in a table: axis names to values, in the table's order."""

FIELDS = {
    "sigma0": "std",
    "t": "time",
    "width": "width",
    "B": "weight_bound",
    "blocks": "depth",
    "grid": "grid",
    "segments": "segments",
}
AS_PUBLISHED = Variant()
TEACHERS: tuple[Teacher, ...] = ("exact", "paper")


@dataclass(frozen=True)
class Table:
    """One table.

    Args:
        number: as published. title: what it shows.
        axes: name and values of what is swept, outermost first; FIELDS says which setting a name means.
        base: the settings that all cells share.
    """

    number: int
    title: str
    axes: tuple[tuple[str, tuple[Any, ...]], ...]
    base: Settings

    def names(self) -> tuple[str, ...]:
        """Names of the axes."""
        return tuple(name for name, _ in self.axes)

    def cells(self) -> list[Cell]:
        """Every cell, the last axis running fastest."""
        names = self.names()
        values = itertools.product(*(values for _, values in self.axes))
        return [MappingProxyType(dict(zip(names, each, strict=True))) for each in values]

    def teachers(self) -> tuple[Teacher, ...]:
        """The teachers that differ in this table: both, or for a closed form the exact one alone."""
        return TEACHERS if self.base.target == "flow" else ("exact",)

    def settings(self, cell: Cell, teacher: Teacher = "exact", variant: Variant = AS_PUBLISHED) -> Settings:
        """What is trained in `cell` under `teacher`; a closed form knows one teacher only."""
        named = {FIELDS[name]: value for name, value in cell.items()}
        settings = replace(self.base, precision=variant.precision, **named)
        if settings.student != "mlp":
            settings = replace(settings, student=variant.student)
        # The same cut by another name is the same run: one segment on any grid; at std = 1, where s_t = 1 always and
        # the signed exponent is the paper's, the signed and the balanced grid.
        if settings.segments == 1:
            settings = replace(settings, grid="uniform")
        elif settings.grid == "signed" and settings.std == 1:
            settings = replace(settings, grid="balanced")
        if settings.target == "flow":
            settings = replace(settings, teacher=teacher)
        return settings.scaled(variant.scale)


_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
_SCORE = Settings(target="score", std=0.1, own_means=True)
_BETA = _SCORE.beta

_LISTED = (
    Table(1, "score approximation against sigma0", (("sigma0", (0.01, 0.1, 1.0)), ("t", _TIMES)), _SCORE),
    Table(2, "score approximation against width", (("width", (128, 256, 512, 1024, 2048)), ("t", _TIMES)), _SCORE),
    Table(
        3,
        "Lipschitz mismatch: one step over [0, ln 2 / (2 beta)] with bounded weights",
        (("sigma0", (0.1, 0.01, 0.001, 0.0001)), ("B", (0.001, 0.01, 0.1, 0.25))),
        Settings(time=math.log(2) / (2 * _BETA), teacher_steps=10),
    ),
    Table(
        4,
        "transformers over [0, 1] against depth, sigma0 = 0.001",
        (("blocks", (1, 2, 4, 8, 16)),),
        Settings(std=0.001, student="transformer", width=128, activation="relu"),
    ),
    Table(
        5,
        "composed one-step students over [0, 1] on time grids, sigma0 = 1",
        (("grid", ("uniform", "balanced", "signed", "measured")), ("segments", (1, 2, 4, 8, 16))),
        Settings(activation="relu", steps=100_000),
    ),
)
TABLES: Mapping[int, Table] = {table.number: table for table in _LISTED}


def table(number: int) -> Table:
    """The table of this number.

    Raises:
        ValueError: there is none.
    """
    if number not in TABLES:
        raise ValueError(f"tables must be some of {', '.join(map(str, TABLES))}; got {number}")
    return TABLES[number]


def name_of(cell: Cell) -> str:
    """`sigma0=1, t=0.9`: a cell as it is written in --only."""
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in cell.items()
    )
