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


def test_a_few_configurations_compile(tmp_path: Path) -> None:
    """Two variants of each kernel, each for one of the chips, in one process; all for all are what the page is for."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-m", "bench.kernel_table", "--quick", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr[-2000:]  # 1: faults, which are named below
    found = [
        Compiled(**(one | {"mma": tuple(one["mma"])})) for one in json.loads((tmp_path / "found.json").read_text())
    ]
    assert [f"{one.variant}, sm_{one.chip}: {fault}" for one in found for fault in kernel_table.faults(one)] == []
    kernel_of = {variant.name: kernel_table.kernel_name(variant) for variant in kernel_table.shipped()}
    assert {kernel_of[one.variant] for one in found} == set(kernel_of.values())
    assert {one.chip for one in found} == set(kernel_table.CHIPS) and all(one.registers for one in found)


def test_the_page_tells_of_every_configuration_as_it_is() -> None:
    """If this fails, `python -m bench.kernel_table` compiles what has changed, and writes the page anew."""
    variants = kernel_table.shipped()
    assert variants and len({variant.name for variant in variants}) == len(variants)
    lines = [line for line in kernel_table.PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    told = [tuple(line.removeprefix("| ").split(" | ")[:2]) for line in lines]
    assert told == [(variant.name, f"`{kernel_table.digest(variant)}`") for variant in variants]
    assert not any("**" in line for line in lines)


def test_a_key_stands_for_everything_that_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = kernel_table.shipped()[0]
    key = kernel_table.digest(variant)
    others = [
        variant._replace(constants={**variant.constants, "EXTRA": 1}),
        variant._replace(types={**variant.types, "extra": "i32"}),
        variant._replace(launch=variant.launch._replace(warps=32)),
    ]
    assert len({key, *map(kernel_table.digest, others)}) == 4
    assert kernel_table.digest(variant._replace(name="another")) == key
    monkeypatch.setattr(kernel_table, "compiled_text", lambda module: "another")
    assert kernel_table.digest(variant) != key


def test_what_is_compiled_is_kernels_and_constants(tmp_path: Path) -> None:
    """Of the module and of those that it imports; nothing of what only the host runs."""
    (tmp_path / "below.py").write_text("@triton.jit\ndef helper(a):\n    return a\n")
    (tmp_path / "top.py").write_text(
        "from .below import helper\nSIZE = 3\n@triton.jit(do_not_specialize=['k'])\ndef kernel(k):\n    helper(k)\n"
        "def host():\n    return 'not this'\n"
    )
    text = kernel_table.compiled_text(tmp_path / "top.py")
    assert all(part in text for part in ("SIZE = 3", "def kernel", "def helper")) and "not this" not in text


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
