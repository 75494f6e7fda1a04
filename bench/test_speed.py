"""The same cases for pytest-benchmark, ours alone, to compare a change with the run before it.

pytest bench --benchmark-enable --benchmark-autosave          before
pytest bench --benchmark-enable --benchmark-compare           after
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import Case, cases


@pytest.mark.parametrize("case", cases("cpu", quick=True), ids=lambda case: case.name)
def test_speed(benchmark: BenchmarkFixture, case: Case) -> None:
    benchmark(next(iter(case.contenders.values())))
