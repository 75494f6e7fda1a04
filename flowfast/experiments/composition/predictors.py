"""Predictions of a student's composed error from the ingredients of its grid, up to their order.

Most have one form, `sum over segments of difficulty x (amplification from the segment's end to the data)^2`, with every
candidate for the one and the other; their logarithm is taken, as bounds reach exp(1e5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from flowfast.experiments.composition.settings import Student

DIFFICULTIES = {
    "one": "1",
    "paper": "exponent of the paper's bound",
    "signed": "exponent of the signed bound",
    "trace": "measured exponent, by trace",
    "exact": "measured exponent, lambda_max",
    "norm_here": "mean norm of D Phi over the segment, less 1",
    "answer": "variance of what the network answers",
    "affine": "error of the best affine map",
    "local": "(the trained student's own local error)",
}
AMPLIFICATIONS = {
    "one": "1",
    "paper": "paper's bound",
    "signed": "signed bound",
    "exact": "measured exponent",
    "direction": "random direction",
    "norm": "mean norm of D Phi",
    "finite": "finite perturbation",
}
SINGLES = {
    "worst_paper": "largest exponent of the paper's bound",
    "worst_signed": "largest exponent of the signed bound",
    "worst_trace": "largest measured exponent, by trace",
    "worst_exact": "largest measured exponent, lambda_max",
    "worst_norm_here": "largest mean norm of D Phi over a segment",
    "worst_affine": "largest error of the best affine map of a segment",
    "undivided": "composed error of the best affine maps, negated",
}
AFTER_TRAINING = ("local",)  # what is no prediction, but shows how far the form itself carries
LEAST = 1e-30  # of a difficulty: its logarithm is taken


def predictions(found: Mapping[str, Any], student: Student, local: Sequence[float]) -> dict[str, float]:
    """Every predictor's value; only their order over grids means anything.

    Args:
        found: as `ingredients` gives it. student: its kind decides what a network answers.
        local: measured error of each segment of the trained student.

    Returns:
        By name: those of SINGLES, and "difficulty*amplification" for all pairs.
    """
    values = {
        f"worst_{name}": max(found[name]) for name in ("paper", "signed", "trace", "exact", "norm_here", "affine")
    }
    # A composition of affine maps is affine, so it does worse than one map by what the grid divides among segments.
    values["undivided"] = -found["affine_composed"]
    for difficulty, amplification in product(DIFFICULTIES, AMPLIFICATIONS):
        terms = zip(
            _difficulty(found, difficulty, student, local), _to_data(found, amplification, len(local)), strict=True
        )
        values[f"{difficulty}*{amplification}"] = _log_sum([math.log(max(a, LEAST)) + 2 * b for a, b in terms])
    return values


def _difficulty(found: Mapping[str, Any], name: str, student: Student, local: Sequence[float]) -> Sequence[float]:
    if name == "local":
        return local
    if name == "one":
        return [1.0] * len(local)
    if name == "answer":
        name = "spread" if student == "plain" else "change"
    values: Sequence[float] = found[name]
    return [value - 1 for value in values] if name == "norm_here" else values


def _to_data(found: Mapping[str, Any], name: str, segments: int) -> Sequence[float]:
    """Logarithms of the amplification from each segment's end."""
    values: Sequence[float] = [0.0] * segments if name == "one" else found[f"to_data_{name}"]
    return values


def _log_sum(logs: Sequence[float]) -> float:
    top = max(logs)
    return top + math.log(sum(math.exp(value - top) for value in logs))
