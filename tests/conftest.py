"""What must be settled before any test imports triton or torch."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Triton decides at its own import whether kernels are interpreted, so this stands before every other import.
# FLOWFAST_TEST_DEVICE=cuda (make gpu) runs the same tests compiled, on a GPU.
if os.environ.get("FLOWFAST_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

# Threads of torch that spin while they wait make a test minutes long where another program wants the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Let pyproject's `timeout` be known, and without effect, where pytest-timeout is not there."""
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds a test may take (needs pytest-timeout)")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread of torch: products this small only make threads wait for each other, for minutes on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
