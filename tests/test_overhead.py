"""The benchmark of a call's overhead runs, and every way that it times leads to the same score."""

from __future__ import annotations

import torch

from bench import overhead


def test_every_way_is_measured() -> None:
    rows = overhead.measure(2, 2, rounds=2, calls=1)
    assert list(rows) == list(overhead.contenders(2, 2))
    assert all(0 < row["fastest"] <= row["upper"] for row in rows.values())


def test_the_ways_lead_to_one_score() -> None:
    ways = overhead.contenders(20, 64)
    exact = ways["score, reference"]()
    for name in ("body in C++", "score", "MixtureScore", "operator", "score, x requires grad"):
        torch.testing.assert_close(ways[name](), exact)
