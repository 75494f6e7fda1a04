"""The machine's ceilings, measured in the run they are quoted in by a small C++ program compiled on the spot."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("ceilings.cpp")
BUILD = Path(__file__).parents[1] / "build" / "bench"


def ceilings(threads: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Rates per number of threads: FMA in flop/s and exp in values/s per dtype, bytes per second of memory.

    Raises:
        RuntimeError: no compiler, or the program does not compile.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    program = BUILD / "ceilings"
    flags = ["-O3", "-march=native", "-std=c++17", "-pthread"]
    try:
        subprocess.run([os.environ.get("CXX", "c++"), *flags, str(SOURCE), "-o", str(program)], check=True)
        return {str(count): json.loads(subprocess.check_output([str(program), str(count)])) for count in threads}
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"ceilings cannot be measured: {error}") from error
