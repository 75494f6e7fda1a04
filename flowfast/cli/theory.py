"""`flowfast theory`: a function that measures and one that makes tables of it, for each topic."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from rich.table import Table

from flowfast.cli import tables, theory_stability
from flowfast.cli.theory_options import Composition, PredictStability, ScoreNet, Theory

Numbers = Mapping[str, Any]


def _score_net(options: ScoreNet) -> Numbers:
    raise RuntimeError("score-net is not there yet")


def _score_net_tables(numbers: Numbers) -> list[Table]:
    return []


def _composition(options: Composition) -> Numbers:
    raise RuntimeError("composition is not there yet")


def _composition_tables(numbers: Numbers) -> list[Table]:
    return []


# Options of a topic: what measures it (plain numbers, as --json prints them), and what shows these as tables.
TOPICS: dict[type, tuple[Callable[[Any], Numbers], Callable[[Numbers], list[Table]]]] = {
    ScoreNet: (_score_net, _score_net_tables),
    Composition: (_composition, _composition_tables),
    PredictStability: (theory_stability.measure, theory_stability.show),
}


def run(command: Theory) -> int:
    """Measure the topic, print its tables or its numbers as JSON, and return the exit code."""
    measure, show = TOPICS[type(command.topic)]
    numbers = measure(command.topic)
    if command.topic.json:
        print(json.dumps(numbers, indent=2, allow_nan=False))
    else:
        for table in show(numbers):
            tables.console().print(table)
    return 0
