"""`python -m bench.composition grids`: what the composition study's file of results does not hold yet.

`grids` trains students on many grids, `ingredients` measures what can be known of these grids before, `phases` asks
when composing helps; docs/grids.md shows what was found. Stopped and called again, each goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from flowfast.experiments.composition.ingredients import run_ingredients
from flowfast.experiments.composition.runner import run_study
from flowfast.experiments.composition.settings import Run
from flowfast.experiments.composition.studies import grid_study, phase_study

RESULTS = Path(__file__).parent / "results"
STUDIES: dict[str, Callable[[], list[Run]]] = {
    "grids": grid_study,
    "ingredients": grid_study,
    "phases": phase_study,
}


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(prog="python -m bench.composition", description=__doc__)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--out", type=Path, default=None, help="file of results")
    options = parser.parse_args()
    torch.set_num_threads(1)  # batched products of small networks are faster so
    console = Console()
    path = options.out or RESULTS / f"{options.study}-study-cpu.jsonl"
    runs = STUDIES[options.study]()
    if options.study == "ingredients":
        run_ingredients(runs, path)
    else:
        run_study(runs, path, tell=lambda done, total: console.print(f"{done} of {total} runs"))
    console.print(f"written: {path}", highlight=False)


if __name__ == "__main__":
    main()
