"""Which of the three bodies of an operation runs: C++, Triton or the plain-torch reference.

`_cpp`, `_triton` and `reference` hold functions of the same names and signatures. This module picks the one that
serves a device and a request, and refuses with the command that mends it: nothing falls back in silence.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch

from flowfast import _cpp, _triton, reference

BACKENDS = ("auto", "cpp", "triton", "reference")
_NATURAL = {"cpu": "cpp", "cuda": "triton"}

for _answer in (_cpp.available, _triton.available, _triton.interpreting):
    # A compiler asks once, while it traces: torch.compiler.assume_constant_result, which would load the compiler here.
    _answer._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(backend: str, device: torch.device) -> str:
    """Name the backend that serves `device` when the caller asks for `backend`.

    Args:
        backend: "auto" (Triton on CUDA, C++ on CPU), "cpp", "triton" or "reference".
        device: where the points live.

    Returns:
        "cpp", "triton" or "reference".

    Raises:
        ValueError: unknown backend, one that cannot serve the device, or one that is not built.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "reference":
        return "reference"
    kind = device.type  # a new string at every reading
    if backend == "auto":
        if kind not in _NATURAL:
            raise ValueError(f"no compiled backend serves device {kind!r}: pass backend='reference'")
        backend = _NATURAL[kind]
    if backend == "cpp":
        if kind != "cpu":
            raise ValueError(f"backend 'cpp' works on CPU tensors, x is on {device}: move x or use backend='auto'")
        if not _cpp.available():
            raise ValueError(_cpp.missing_message())
        return "cpp"
    if kind != "cuda" and not _triton.interpreting():
        raise ValueError(f"backend 'triton' works on CUDA tensors, x is on {device}: move x or use backend='auto'")
    if not _triton.available():
        raise ValueError(_triton.missing_message())
    return "triton"


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off where it is on: torch's products within a body keep the dtype that they are given."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def body(name: str) -> ModuleType:
    """The module that holds the bodies of backend `name` ("cpp", "triton" or "reference")."""
    modules: dict[str, ModuleType] = {"cpp": _cpp, "triton": _triton, "reference": reference}
    return modules[name]


def serve(backend: str, device: torch.device, op: str) -> ModuleType:
    """The module whose function `op` serves this request; raises like `choose`, and when the kernel does not exist."""
    name = choose(backend, device)
    module = body(name)
    if name == "triton" and not _triton.supports(op):
        raise ValueError(f"{op} has no Triton kernel yet: pass backend='reference' for tensors on {device}")
    return module
