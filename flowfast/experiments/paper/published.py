"""The figures that the paper's authors released, cell by cell; `published_tables.json` names their source."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from flowfast.experiments.paper.tables import Cell, Table

_GRIDS = {"stability": "balanced"}  # the paper's name for the grid


@dataclass(frozen=True)
class Figure:
    """A mean and its sample standard deviation over the published seeds."""

    mean: float
    std: float

    def differs(self, value: float) -> float:
        """How far `value` lies above the mean, in standard deviations."""
        return (value - self.mean) / self.std


@cache
def stored() -> Mapping[str, Any]:
    """The file as it is."""
    read: dict[str, Any] = json.loads(
        (files("flowfast.experiments.paper") / "published_tables.json").read_text("utf-8")
    )
    return read


def published(table: Table, cell: Cell) -> dict[str, Figure]:
    """The published figures of a cell by name of metric; empty where the paper left it out.

    Names: "error", and in Table 5 also "negative_log_density" and "worst_segment".
    """
    for row in stored()["tables"][str(table.number)]["rows"]:
        if all(_GRIDS.get(row[name], row[name]) == value for name, value in cell.items()):
            found = {"error": Figure(row["mean"], row["std"])}
            for name, prefix in (("negative_log_density", "nll0"), ("worst_segment", "worst_segment")):
                if f"{prefix}_mean" in row:
                    found[name] = Figure(row[f"{prefix}_mean"], row[f"{prefix}_std"])
            return found
    return {}
