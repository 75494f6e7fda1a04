"""Choosing cells: `--only "sigma0=1, t=0.9"`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flowfast.experiments.paper.tables import Cell, Table


def parse(text: str, tables: Sequence[Table]) -> dict[str, Any]:
    """Read `name=value` pairs separated by commas.

    Args:
        text: what the user wrote. tables: those that were asked for.

    Returns:
        Value by axis name, as the tables have it.

    Raises:
        ValueError: no pair, an axis that no table has, or a value that is on no table's axis.
    """
    wanted: dict[str, Any] = {}
    for pair in text.split(","):
        name, equals, said = (part.strip() for part in pair.partition("="))
        if not equals:
            raise ValueError(f"only must be name=value pairs separated by commas; got {pair.strip()!r}")
        known = {axis: None for table in tables for axis in table.names()}
        if name not in known:
            raise ValueError(f"only must name some of {', '.join(known)}; got {name!r}")
        values = list(dict.fromkeys(v for table in tables for axis, vs in table.axes if axis == name for v in vs))
        found = [value for value in values if _means(said, value)]
        if not found:
            raise ValueError(f"only has no cell with {name}={said}: choose of {', '.join(map(str, values))}")
        wanted[name] = found[0]
    return wanted


def chosen(table: Table, only: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """Cells of `table` that agree with one of the filters in all axes that it names; all when there is no filter."""
    cells = table.cells()
    if not only:
        return cells
    return [cell for cell in cells if any(all(cell.get(n) == v for n, v in wanted.items()) for wanted in only)]


def _means(said: str, value: Any) -> bool:
    if isinstance(value, str):
        return said == value
    try:
        return float(said) == float(value)
    except ValueError:
        return False
