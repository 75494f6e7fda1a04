"""What a job ran on: versions and machine, without names of hosts or paths."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from flowfast import _cpp

PACKAGES = ("flowfast", "torch", "numpy", "scipy", "safetensors", "scikit-learn", "matplotlib", "jinja2")


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Python's and each package's version; a word for one that is missing, or for flowfast run from its source tree."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source tree" if package == "flowfast" else "not installed"
    return found


def machine() -> dict[str, Any]:
    """Architecture, the C++ kernels' instruction set (None when they are not built) and the number of threads."""
    return {
        "architecture": platform.machine(),
        "instruction_set": _cpp.isa() if _cpp.available() else None,
        "threads": torch.get_num_threads(),
    }
