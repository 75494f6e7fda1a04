"""Extra peak memory of one call, each contender in a process of its own.

`python -m bench.memory CASE CONTENDER` prints bytes: the largest resident set during the first call on the case's
arrays, beyond that before it. Libraries are loaded by a call on a tiny problem; what is compiled for the sizes of the
case counts, and so does the result.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from bench import cases
from bench.peers import Run

CASES = ("S4", "H1")  # where the paper's scripts and some peers need gigabytes
LONGEST = 120.0  # seconds of a process
ROOT = Path(__file__).parents[1]


def extra(case: str, contenders: Iterable[str], *, quick: bool = False) -> dict[str, int]:
    """Bytes for each contender of a case whose process ended well, in time."""
    found = {}
    for contender in contenders:
        command = [sys.executable, "-m", "bench.memory", case, contender, *["--quick"] * quick]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=LONGEST)
            found[contender] = int(done.stdout.split()[-1])
        except (subprocess.SubprocessError, ValueError, IndexError) as error:
            print(f"memory of {contender} in {case} is not known: {error}", file=sys.stderr)
    return found


def extra_of(run: Run) -> int:
    """Bytes by which the resident set rises during a call."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # pages that are free already would hide what the call takes
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
    result = run()
    peak = _status("VmHWM")
    del result
    return max(peak - before, 0)


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}")
    return 1024 * int(found.group(1))


def main() -> None:
    """One contender of one case."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("case", choices=cases.names())
    parser.add_argument("contender")
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the points")
    options = parser.parse_args()
    with torch.inference_mode():
        tiny = cases.named(options.case, tiny=True)
        tiny.contenders[options.contender].build(tiny.problem)()
        case = cases.named(options.case, quick=options.quick)
        print(extra_of(case.contenders[options.contender].build(case.problem)))


if __name__ == "__main__":
    main()
