"""Builds the one C++ extension: the kernels are compiled once per instruction set, each with its own flags."""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

# fp-contract=fast fuses multiply-adds; -ffast-math would lose NaN, infinities and the compensated sums.
FLAGS = "-std=c++17 -O3 -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast -fwrapv".split()
X86_64 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {"generic": []} | (
    {"avx2": ["-march=x86-64-v3"], "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"]} if X86_64 else {}
)
SOURCES = ["bindings", "dispatch", "engine", "pool"]


class BuildKernels(build_ext):
    """Compiles csrc in parallel, csrc/isa.cpp once per instruction set, and links everything into flowfast._core."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        """Compile every unit to an object of its own directory, then let the base class link."""
        headers = [str(path) for path in sorted(Path("csrc").glob("*.hpp"))]
        ext.depends = headers
        units = [(f"csrc/{name}.cpp", "common", FLAGS) for name in SOURCES]
        units += [
            ("csrc/isa.cpp", isa, [*FLAGS, *flags, f"-DFLOWFAST_ISA={isa}", "-Wno-attributes", "-Wno-psabi"])
            for isa, flags in ISA_FLAGS.items()
        ]

        def compile_unit(unit: tuple[str, str, list[str]]) -> list[str]:
            source, folder, flags = unit
            output = str(Path(self.build_temp) / folder)
            return self.compiler.compile(
                [source], output_dir=output, include_dirs=ext.include_dirs, extra_postargs=flags, depends=headers
            )

        with ThreadPoolExecutor() as threads:
            objects = [name for names in threads.map(compile_unit, units) for name in names]
        ext.extra_objects, ext.sources = objects, []
        super().build_extension(ext)


setup(
    ext_modules=[Pybind11Extension("flowfast._core", ["csrc/bindings.cpp"], extra_link_args=["-pthread"])],
    cmdclass={"build_ext": BuildKernels},
)
