"""The same cases for pytest-benchmark, ours alone, to compare a change with the run before it.

pytest bench --benchmark-enable --benchmark-autosave          before
pytest bench --benchmark-enable --benchmark-compare           after
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import named, names


@pytest.mark.parametrize("name", names())
def test_speed(benchmark: BenchmarkFixture, name: str) -> None:
    case = named(name, quick=True)
    benchmark(next(iter(case.contenders.values())).build(case.problem))
