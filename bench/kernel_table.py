"""`python -m bench.kernel_table`: compile every shipped Triton configuration, without a GPU, and write docs/kernels.md.

With --json the same goes there as plain numbers, for tests/test_triton_compile.py.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowfast import kernels
from flowfast._triton import interpreting

CHIPS = {
    80: 163 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}  # compute capability x 10: bytes of shared memory of a program
REGISTERS = 65_536  # of a multiprocessor, and so of a program, on each of them
MMA = re.compile(r"(mma)\.sync|(wgmma)\.mma_async\S+\s*\{[^}]*\},\s*(\{?)|(tcgen05)\.mma")
UNSAFE = "wgmma (A in registers)"
RESOURCES = re.compile(r"Function \w+:\s+REG:(\d+) STACK:(\d+)")
PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"


@dataclass(frozen=True)
class Compiled:
    """What one variant became on one chip.

    Attributes:
        registers: of a thread. shared: bytes of a program. spilled: bytes of a thread's stack, where spills go.
        mma: kinds of tensor-core instructions; "wgmma (A in registers)" is the one that ptxas 12.8 may miscompile.
        failure: why there is none of that, else "".
    """

    variant: str
    chip: int
    warps: int
    products: bool
    registers: int = 0
    shared: int = 0
    spilled: int = 0
    mma: tuple[str, ...] = ()
    seconds: float = 0.0
    failure: str = ""


@functools.cache
def shipped() -> list[Any]:
    """Every `Variant` that a module of kernels/ ships, by module and in its order."""
    names = sorted(module.name for module in pkgutil.iter_modules(kernels.__path__))
    modules = [importlib.import_module(f"flowfast.kernels.{name}") for name in names]
    return [variant for module in modules if hasattr(module, "variants") for variant in module.variants()]


def jobs(*, quick: bool) -> list[tuple[int, int]]:
    """Numbers of variants, and the chips they are compiled for.

    Quick: all for sm_90; for the other chips the first and the last variant of each kernel.
    """
    variants = shipped()
    of_kernel: dict[str, list[int]] = {}
    for i, variant in enumerate(variants):
        of_kernel.setdefault(variant.kernel.__name__, []).append(i)
    ends = {i for numbers in of_kernel.values() for i in (numbers[0], numbers[-1])}
    return [(i, chip) for i in range(len(variants)) for chip in CHIPS if not quick or chip == 90 or i in ends]


def compiled(job: tuple[int, int]) -> Compiled:
    """Compile one variant for one chip."""
    variant, chip = shipped()[job[0]], job[1]
    start = time.perf_counter()
    about = {"variant": variant.name, "chip": chip, "warps": variant.launch.warps, "products": variant.products}
    try:
        found = resources(variant, chip)
    except Exception as error:  # whatever stops a compiler is the result
        found = {"failure": f"{type(error).__name__}: {str(error)[-500:]}"}
    return Compiled(**about, **found, seconds=round(time.perf_counter() - start, 2))


def resources(variant: Any, chip: int) -> dict[str, Any]:
    """Registers, shared memory, spills and tensor-core instructions of a variant.

    Pointers are taken to be multiples of 16 bytes, as those of whole tensors are; of integers nothing is known but of
    those of type "i32:16", multiples of 16, for which Triton compiles anew where a kernel lets it.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    types = {name: variant.types.get(name, "constexpr") for name in names}
    missing = [name for name in names if types[name] == "constexpr" and name not in variant.constants]
    if missing:
        raise ValueError(f"{variant.name} says nothing of {', '.join(missing)}: add them to types or constants")
    even = [name for name in names if types[name].startswith("*") or types[name].endswith(":16")]
    types = {name: kind.removesuffix(":16") for name, kind in types.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(variant.kernel, types, dict(variant.constants), aligned)
    options = {"num_warps": variant.launch.warps, "num_stages": variant.launch.stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    registers, stack = usage(kernel.asm["cubin"])
    kinds = instructions(kernel.asm["ptx"])
    return {"registers": registers, "shared": kernel.metadata.shared, "spilled": stack, "mma": kinds}


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = RESOURCES.findall(said)
    if len(found) != 1:
        raise ValueError(f"cuobjdump was expected to tell of one kernel; it said {said!r}")
    return int(found[0][0]), int(found[0][1])


def instructions(ptx: str) -> tuple[str, ...]:
    """Kinds of tensor-core instructions, sorted: mma.sync, tcgen05, wgmma, wgmma (A in registers)."""
    kinds = set()
    for sync, wgmma, brace, tcgen05 in MMA.findall(ptx):
        kinds.add("mma.sync" if sync else tcgen05 or (UNSAFE if brace else wgmma))
    return tuple(sorted(kinds))


def compile_all(*, quick: bool, workers: int = 2) -> list[Compiled]:
    """All of `jobs`, in their order."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(compiled, jobs(quick=quick)))


def faults(one: Compiled) -> list[str]:
    """What is wrong with a configuration, nothing if it may be shipped."""
    if one.failure:
        return [one.failure]
    used = -(-one.registers // 8) * 8 * 32 * one.warps  # handed out by eights
    checks = {
        f"{one.shared} bytes of shared memory, sm_{one.chip} has {CHIPS[one.chip]}": one.shared > CHIPS[one.chip],
        f"{used} registers, sm_{one.chip} has {REGISTERS}": used > REGISTERS,
        f"{one.spilled} bytes spilled": one.spilled > 0,
        "no tensor-core instruction": one.products and not one.mma,
        f"{', '.join(one.mma)} where none is wanted": bool(one.mma) and not one.products,
        f"{UNSAFE}, which ptxas 12.8 may miscompile": UNSAFE in one.mma,
    }
    return [text for text, wrong in checks.items() if wrong]


def page(found: list[Compiled]) -> str:
    """docs/kernels.md."""
    import triton

    limits = ", ".join(f"{size >> 10} KB on sm_{chip}" for chip, size in CHIPS.items())
    lines = [
        "# What the Triton kernels compile to",
        "",
        "Written by `python -m bench.kernel_table`, without a GPU: every launch configuration that is shipped, as",
        f"Triton {triton.__version__} compiles it, with {assemblers()}. Registers of a thread,",
        f"shared memory of a program (at most {limits}), kind of",
        "tensor-core instruction; bytes spilled where there are any.",
        "",
        f"| configuration | warps | {' | '.join(f'sm_{chip}' for chip in CHIPS)} |",
        f"|---|---|{'---|' * len(CHIPS)}",
    ]
    for name, group in itertools.groupby(found, key=lambda one: one.variant):
        row = list(group)
        lines.append(f"| {name} | {row[0].warps} | {' | '.join(map(cell, row))} |")
    return "\n".join(lines) + "\n"


def cell(one: Compiled) -> str:
    """One configuration on one chip."""
    if one.failure:
        return "does not compile"
    spilled = [f"**{one.spilled} B spilled**"] if one.spilled else []
    return ", ".join([f"{one.registers} reg", f"{one.shared / 1024:.1f} KB", *one.mma, *spilled])


def assemblers() -> str:
    """Versions of the bundled ptxas, and the chips that each serves."""
    from triton.backends.nvidia.compiler import get_ptxas

    chips: dict[str, list[str]] = {}
    for chip in CHIPS:
        chips.setdefault(get_ptxas(chip).version, []).append(f"sm_{chip}")
    return ", ".join(f"ptxas {version} for {' and '.join(names)}" for version, names in chips.items())


def main() -> int:
    """Compile, write, list what is wrong; exit code 1 if anything is."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_table", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the numbers there, and leave docs/kernels.md alone")
    parser.add_argument("--quick", action="store_true", help="sm_90, and two variants of each kernel for other chips")
    options = parser.parse_args()
    if interpreting():
        sys.exit("kernels are interpreted here (TRITON_INTERPRET=1), not compiled: unset it")
    if options.quick and not options.json:
        sys.exit("docs/kernels.md names every configuration: --quick goes with --json only")
    found = compile_all(quick=options.quick)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    else:
        PAGE.write_text(page(found))
    wrong = [f"{one.variant}, sm_{one.chip}: {text}" for one in found for text in faults(one)]
    print(*wrong, f"{len(found)} compiled, {len(wrong)} faults", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
