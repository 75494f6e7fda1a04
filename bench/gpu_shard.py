"""A pytest plugin that runs one part of the tests, `FLOWFAST_SHARD=2/16` the third of 16.

Every variant of a kernel is compiled at its first call, for seconds on one core, so that tests go through as many
programs as the machine has cores for.
"""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep every so-manieth test, so that neighbours, which take alike, are spread."""
    which, count = map(int, os.environ.get("FLOWFAST_SHARD", "0/1").split("/"))
    kept, dropped = items[which::count], [item for i, item in enumerate(items) if i % count != which]
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept
