"""Launch configurations: looked up in a table, never searched for at run time.

`launches/<kernel>.json` holds a list of rows; the first that fits is taken, so rows for one GPU stand before the
fallback of gpu "*". `python -m bench.tune` measures and writes rows.

    {"gpu": "NVIDIA H200", "dtype": "float32", "most_d": 64, "blocks": {"BLOCK_N": 64}, "warps": 4, "stages": 2}
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

TABLES = Path(__file__).with_name("launches")


class Launch(NamedTuple):
    """What a kernel is compiled for: sizes of its tiles by name, warps of a program, stages of its loads."""

    blocks: Mapping[str, int]
    warps: int
    stages: int


class Variant(NamedTuple):
    """One configuration that is shipped, as the ahead-of-time compiler wants it; see tests/test_triton_compile.py.

    Attributes:
        name: unique, for tests and the table in docs/kernels.md.
        kernel: the `triton.jit` function. types: of every argument that is not in `constants`, as "*fp32", "i32", or
            "i32:16" for a multiple of 16.
        constants: of the `tl.constexpr` arguments. launch: of the table. products: whether it must use tensor cores.
        chips: compute capabilities x 10 that it is launched on. spills: bytes of a thread that are known and accepted.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    launch: Launch
    products: bool = False
    chips: tuple[int, ...] = (80, 90, 100)
    spills: int = 0


class _Trial(NamedTuple):
    candidate: Launch | None
    asked: list[tuple[torch.dtype, int]]


_trials: ContextVar[Mapping[str, _Trial]] = ContextVar("_trials", default=MappingProxyType({}))


def launch(kernel: str, dtype: torch.dtype, d: int, gpu: str) -> Launch:
    """The row of `kernel` for this dtype, dimension and GPU ("" where it is interpreted), or what `override` says.

    Raises:
        LookupError: no row fits, not even the fallback.
    """
    trial = _trials.get().get(kernel)
    if trial:
        trial.asked.append((dtype, d))
        if trial.candidate:
            return trial.candidate
    return _looked_up(kernel, dtype, d, gpu)


@contextlib.contextmanager
def override(kernel: str, candidate: Launch | None) -> Iterator[list[tuple[torch.dtype, int]]]:
    """Inside, in this thread, `launch` answers with `candidate` for `kernel`; None leaves the answer to the table.

    Yields:
        What `launch` is asked for `kernel` inside, (dtype, d) call by call.
    """
    trial = _Trial(candidate, [])
    token = _trials.set({**_trials.get(), kernel: trial})
    try:
        yield trial.asked
    finally:
        _trials.reset(token)


@functools.cache
def _looked_up(kernel: str, dtype: torch.dtype, d: int, gpu: str) -> Launch:
    row = row_for(rows(kernel), dtype, d, gpu)
    if row is None:
        raise LookupError(f"{kernel} has no launch configuration for {dtype}, d = {d} on {gpu or 'the interpreter'}")
    return Launch(row["blocks"], row["warps"], row["stages"])


def row_for(table: list[dict[str, Any]], dtype: torch.dtype, d: int, gpu: str) -> dict[str, Any] | None:
    """The first row that fits, None if there is none."""
    fitting = (row for row in table if row["dtype"] == str(dtype)[6:] and d <= row["most_d"])
    return next((row for row in fitting if row["gpu"] in (gpu, "*")), None)


@functools.cache
def rows(kernel: str) -> list[dict[str, Any]]:
    """The table of `kernel`, in the order in which it is searched."""
    table: list[dict[str, Any]] = json.loads((TABLES / f"{kernel}.json").read_text())
    return table


def gpu_name(device: torch.device) -> str:
    """Name of the GPU, as the tables have it; "" for the CPU, where kernels are interpreted."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""
