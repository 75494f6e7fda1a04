"""The same cases for pytest-benchmark, ours alone, to compare a change with the run before it.

pytest bench --benchmark-enable --benchmark-autosave          before
pytest bench --benchmark-enable --benchmark-compare           after
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import LONG, cases, names


@pytest.mark.parametrize("name", [name for name in names() if name not in LONG])
def test_speed(benchmark: BenchmarkFixture, name: str) -> None:
    (case,) = cases("cpu", quick=True, chosen=(name,))
    benchmark(next(iter(case.contenders.values())).build(case.problem))
