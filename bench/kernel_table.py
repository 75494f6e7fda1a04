"""`python -m bench.kernel_table`: compile every shipped Triton configuration, without a GPU, and write docs/kernels.md.

What the page tells already of a configuration that has not changed is kept.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
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
        allowed: of them, see `Variant.spills`. mma: kinds of tensor-core instructions; "wgmma (A in registers)" is the
        one that ptxas 12.8 may miscompile.
        failure: why there is none of that, else "".
    """

    variant: str
    chip: int
    warps: int
    products: bool
    registers: int = 0
    shared: int = 0
    spilled: int = 0
    allowed: int = 0
    mma: tuple[str, ...] = ()
    seconds: float = 0.0
    failure: str = ""


@functools.cache
def shipped() -> list[Any]:
    """Every `Variant` that a module of kernels/ ships, by module and in its order; once, where two tell of the same."""
    names = sorted(module.name for module in pkgutil.iter_modules(kernels.__path__))
    modules = [importlib.import_module(f"flowfast.kernels.{name}") for name in names]
    found: list[Any] = []
    for module in modules:
        found += [variant for variant in getattr(module, "variants", list)() if variant not in found]
    return found


def kernel_name(variant: Any) -> str:
    """Module and function: several modules may have a kernel of one name."""
    return f"{variant.kernel.fn.__module__}.{variant.kernel.fn.__name__}"


def jobs() -> list[tuple[int, int]]:
    """Numbers of variants and chips, for a look that takes a minute: two variants of each kernel, chips in turn."""
    of_kernel: dict[str, list[int]] = {}
    for i, variant in enumerate(shipped()):
        of_kernel.setdefault(kernel_name(variant), []).append(i)
    chips = itertools.cycle(CHIPS)
    wanted = [(i, next(chips)) for numbers in of_kernel.values() for i in (numbers[0], numbers[-1])]
    return [(i, chip if chip in shipped()[i].chips else shipped()[i].chips[-1]) for i, chip in wanted]


def digest(variant: Any) -> str:
    """What a variant is compiled from, in ten digits: texts, types, constants and options."""
    parts = (sorted(variant.types.items()), sorted(variant.constants.items()), *variant.launch[1:], variant.chips)
    text = compiled_text(Path(inspect.getfile(variant.kernel.fn)))
    return hashlib.sha256(f"{variant.kernel.fn.__name__} {parts} {text}".encode()).hexdigest()[:10]


@functools.cache
def compiled_text(module: Path) -> str:
    """The kernels of a module and the constants that they may use, and those of the modules that it imports."""
    text = module.read_text()
    parts, imported = [], []
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            imported += [module.with_name(f"{name}.py") for name in names]
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(one) for one in node.decorator_list):
            parts.append(ast.get_source_segment(text, node) or "")
        if isinstance(node, ast.Assign | ast.AnnAssign):
            parts.append(ast.get_source_segment(text, node) or "")
    return "\n".join([*parts, *map(compiled_text, imported)])


def compiled(job: tuple[int, int]) -> Compiled:
    """Compile one variant for one chip."""
    variant, chip = shipped()[job[0]], job[1]
    start = time.perf_counter()
    about = {"variant": variant.name, "chip": chip, "warps": variant.launch.warps, "products": variant.products}
    about |= {"allowed": variant.spills}
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


def compile_all(wanted: list[tuple[int, int]], workers: int = 2) -> list[Compiled]:
    """All that is wanted, in its order."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        return list(pool.map(compiled, wanted))


def faults(one: Compiled) -> list[str]:
    """What is wrong with a configuration, nothing if it may be shipped."""
    if one.failure:
        return [one.failure]
    used = -(-one.registers // 8) * 8 * 32 * one.warps  # handed out by eights
    checks = {
        f"{one.shared} bytes of shared memory, sm_{one.chip} has {CHIPS[one.chip]}": one.shared > CHIPS[one.chip],
        f"{used} registers, sm_{one.chip} has {REGISTERS}": used > REGISTERS,
        f"{one.spilled} bytes spilled": one.spilled > one.allowed,
        "no tensor-core instruction": one.products and not one.mma,
        f"{', '.join(one.mma)} where none is wanted": bool(one.mma) and not one.products,
        f"{UNSAFE}, which ptxas 12.8 may miscompile": UNSAFE in one.mma,
    }
    return [text for text, wrong in checks.items() if wrong]


def page(rows: Mapping[str, str]) -> str:
    """docs/kernels.md, given the lines of all configurations by name."""
    limits = ", ".join(f"{size >> 10} KB on sm_{chip}" for chip, size in CHIPS.items())
    lines = [
        "# What the Triton kernels compile to",
        "",
        "Written by `python -m bench.kernel_table`, without a GPU: every launch configuration that is shipped, as",
        f"{versions()} compile it.",
        "Registers of a thread, shared memory of a program, kind of tensor-core instruction. Whatever is wrong would",
        f"stand in bold: spills beyond those that are known, more shared memory than there is ({limits}),",
        "other instructions than meant. A dash: not launched on that chip. The key stands for all that a configuration",
        "is compiled from: a test compares.",
        "",
        f"| configuration | key | warps | {' | '.join(f'sm_{chip}' for chip in CHIPS)} |",
        f"|---|---|---|{'---|' * len(CHIPS)}",
        *rows.values(),
    ]
    return "\n".join(lines) + "\n"


def kept() -> dict[str, str]:
    """Lines of the page by configuration, unless other compilers made it."""
    text = PAGE.read_text() if PAGE.exists() else ""
    lines = [line for line in text.splitlines() if line.startswith("| ")] if versions() in text else []
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


def line(variant: Any, found: list[Compiled]) -> str:
    """The line of one configuration, compiled for every chip."""
    by_chip = {one.chip: cell(one) for one in found}
    cells = [variant.name, f"`{digest(variant)}`", str(variant.launch.warps), *(by_chip.get(c, "-") for c in CHIPS)]
    return f"| {' | '.join(cells)} |"


def cell(one: Compiled) -> str:
    """One configuration on one chip; what is wrong with it in bold."""
    if one.failure:
        return "**does not compile**"
    wrong = [f"**{fault}**" for fault in faults(one)]
    known = [f"{one.spilled} bytes spilled"] if 0 < one.spilled <= one.allowed else []
    return ", ".join([f"{one.registers} reg", f"{one.shared / 1024:.1f} KB", *one.mma, *known, *wrong])


@functools.cache
def versions() -> str:
    """Versions of Triton and of the ptxas that it brings, with the chips that each serves."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    chips: dict[str, list[str]] = {}
    for chip in CHIPS:
        chips.setdefault(get_ptxas(chip).version, []).append(f"sm_{chip}")
    assemblers = (f"ptxas {version} for {' and '.join(names)}" for version, names in chips.items())
    return ", ".join((f"Triton {triton.__version__}", *assemblers))


def main() -> int:
    """Compile, write, list what is wrong; exit code 1 if anything is."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernel_table", description=__doc__)
    parser.add_argument("--quick", type=Path, metavar="JSON", help="compile few, and write the numbers there")
    parser.add_argument("--all", action="store_true", help="also what the page has already, unchanged")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    options = parser.parse_args()
    if interpreting():
        sys.exit("kernels are interpreted here (TRITON_INTERPRET=1), not compiled: unset it")
    if options.quick:
        found = compile_all(jobs(), options.workers)
        options.quick.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    else:
        found = renew({} if options.all else kept(), options.workers)
    wrong = [f"{one.variant}, sm_{one.chip}: {fault}" for one in found for fault in faults(one)]
    print(*wrong, f"{len(found)} compiled, {len(wrong)} faults", sep="\n")
    return 1 if wrong else 0


def renew(old: Mapping[str, str], workers: int) -> list[Compiled]:
    """Write the page, and compile for it what its old lines do not tell, or tell to be wrong."""
    rows = {}
    for variant in shipped():
        before = old.get(variant.name, "")
        rows[variant.name] = before if f"`{digest(variant)}`" in before and "**" not in before else ""
    wanted = [(i, chip) for i, variant in enumerate(shipped()) if not rows[variant.name] for chip in variant.chips]
    found = compile_all(wanted, workers)
    for variant in shipped():
        rows[variant.name] = rows[variant.name] or line(variant, [one for one in found if one.variant == variant.name])
    PAGE.write_text(page(rows))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
