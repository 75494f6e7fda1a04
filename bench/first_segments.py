"""`python -m bench.first_segments`: Table 5 at full protocol, but only the segment at the noise end of each grid.

Students of segments are trained apart from each other, so that the first one is the one of the whole run, for a part of
the work. Its error on fresh points of its own start is set beside the published error of the worst segment. One
process, one thread. Appends a line per grid to `bench/results/first-segments-cpu.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from flowfast import Ensemble, TeacherPairs
from flowfast.experiments.machine import machine, versions
from flowfast.experiments.paper import TABLES
from flowfast.experiments.paper.evaluation import Ratio
from flowfast.experiments.paper.published import published
from flowfast.experiments.paper.settings import Run
from flowfast.experiments.paper.sources import sources_of, times_of
from flowfast.experiments.paper.training import student_of

ROWS = 5_000  # evaluation points at once


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.first_segments", description=__doc__)
    parser.add_argument("--segments", type=int, nargs="+", default=[4, 8, 16], choices=[4, 8, 16])
    parser.add_argument("--grid", default="balanced", choices=["uniform", "balanced"])
    parser.add_argument("--teacher", default="paper", choices=["paper", "exact"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("bench/results/first-segments-cpu.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for segments in options.segments:
        cell = {"grid": options.grid, "segments": segments}
        line = first_segment(Run(TABLES[5].settings(cell, options.teacher), options.seed))
        there = published(TABLES[5], cell)["worst_segment"]
        found = {
            **cell,
            "teacher": options.teacher,
            "seed": options.seed,
            **line,
            "published_worst_segment": {"mean": there.mean, "std": there.std},
            "standard_deviations": there.differs(line["error"]),
            "machine": machine(),
            "versions": versions(),
        }
        with options.out.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(f"{cell}: {line['error']:.4g}, published {there.mean:.4g} +- {there.std:.2g}", flush=True)


def first_segment(run: Run) -> dict[str, Any]:
    """The error of a run's first student, and what it took."""
    cpu, settings = torch.device("cpu"), run.settings
    ensemble = Ensemble(
        [student_of(run, 0)],
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
    )
    pairs, begin = TeacherPairs(sources_of(run, cpu)[:1], settings.batch_size), time.process_time()
    for step in range(settings.steps_per_segment()):
        ensemble.step(*pairs(step))
    seconds, error, student = time.process_time() - begin, Ratio(), ensemble.member(0)
    source = sources_of(run, cpu, evaluation=True)[0]
    with torch.inference_mode():
        for chunk in range(settings.evaluation_rows // ROWS):
            x, y = source.draw(ROWS, "evaluation", chunk)
            error.add(student(x), y)
    return {
        "times": times_of(run)[:2],
        "steps": settings.steps_per_segment(),
        "processor_seconds": seconds,
        "error": error.value(),
    }


if __name__ == "__main__":
    main()
