"""Every shipped Triton configuration, compiled for chips that are not here: no spills, no more than the chip has.

The interpreter accepts programs that the compiler refuses, and says nothing of registers and shared memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import kernel_table
from bench.kernel_table import Compiled

ROOT = Path(__file__).parents[1]
GOOD = Compiled("good", 80, warps=4, products=True, registers=96, shared=40_000, mma=("mma.sync",))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Compiled]:
    """All variants for sm_90, and for the other chips the first and the last of each kernel, in one process."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, "-m", "bench.kernel_table", "--quick", "--json", str(folder / "found.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr[-2000:]  # 1: faults, which the test below names
    return [Compiled(**(one | {"mma": tuple(one["mma"])})) for one in json.loads((folder / "found.json").read_text())]


def test_every_configuration_fits_its_chips(found: list[Compiled]) -> None:
    assert [f"{one.variant}, sm_{one.chip}: {fault}" for one in found for fault in kernel_table.faults(one)] == []


def test_every_configuration_is_compiled(found: list[Compiled]) -> None:
    names = [variant.name for variant in kernel_table.shipped()]
    assert names and len(set(names)) == len(names)
    assert [one.variant for one in found if one.chip == 90] == names
    kernels = {variant.kernel.__name__ for variant in kernel_table.shipped()}
    for chip in (80, 100):
        seen = {one.variant for one in found if one.chip == chip}
        assert {v.kernel.__name__ for v in kernel_table.shipped() if v.name in seen} == kernels


def test_the_page_names_every_configuration() -> None:
    """`python -m bench.kernel_table` writes it anew."""
    lines = kernel_table.PAGE.read_text().splitlines()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    assert rows[1:] == [variant.name for variant in kernel_table.shipped()]
    assert not any("spilled**" in line or "does not compile" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"shared": 163 * 1024 + 1}, "shared memory"),
        ({"spilled": 8}, "8 bytes spilled"),
        ({"registers": 255, "warps": 16}, "registers"),
        ({"mma": ()}, "no tensor-core instruction"),
        ({"products": False}, "where none is wanted"),
        ({"mma": ("wgmma (A in registers)",)}, "miscompile"),
        ({"failure": "CompilationError"}, "CompilationError"),
    ],
)
def test_faults_are_found(change: dict[str, object], fault: str) -> None:
    assert kernel_table.faults(GOOD) == []
    faults = kernel_table.faults(replace(GOOD, **change))
    assert len(faults) == 1 and fault in faults[0]


def test_instructions_are_told_apart() -> None:
    synchronous = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};"
    shared = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1,%f2}, %rd1, %rd2, %p1, 1, 1, 0, 0;"
    registers = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1,%f2}, {%r1,%r2}, %rd2, %p1, 1, 1, 0;"
    blackwell = "tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r3, %p1;"
    assert kernel_table.instructions(synchronous) == ("mma.sync",)
    assert kernel_table.instructions(shared) == ("wgmma",)
    assert kernel_table.instructions(registers) == ("wgmma (A in registers)",)
    assert kernel_table.instructions(blackwell) == ("tcgen05",)
    assert kernel_table.instructions("fma.rn.f32 %f1, %f2, %f3, %f4;") == ()
