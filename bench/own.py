"""flowfast beside itself: how a flow grows with the dimension, and what each instruction set gives.

`python -m bench.own CASE ...` is a child that times cases with the instruction set that FLOWFAST_ISA names: for each
case read from standard input it makes a turn and prints its seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

import flowfast
from bench import cases
from bench.results import ms
from bench.timing import summary, take_turns, turn
from flowfast import _cpp

GROWTH, SETS = "growth", "instruction sets"
NAMES = (GROWTH, SETS)
OPERATIONS = {GROWTH: ("flow",), SETS: ("score", "weights", "flow")}

COMPONENTS, POINTS = 20, 16_384
DIMENSIONS = (16, 64, 256, 1_024, 4_096)
COPIES = {"copy": "ratio", "new copy": "ratio_new"}  # what a flow is compared with, and the name of the ratio
TIMED = ("S2", "S3", "S5", "T1")  # with each instruction set
ROOT = Path(__file__).parents[1]


def measure(name: str, *, seconds: float, quick: bool = False) -> dict[str, Any]:
    """One of NAMES as plain numbers, laid out as a case with peers."""
    return growth(seconds=seconds, quick=quick) if name == GROWTH else instruction_sets(seconds=seconds, quick=quick)


def growth(*, seconds: float, quick: bool = False) -> dict[str, Any]:
    """Flow time per trajectory beyond a copy of x; its ratio to that in the fewest dimensions.

    Two copies to compare with: into memory in use (the stricter one) and, as a flow does, into new memory.
    """
    n = POINTS // 16 if quick else POINTS
    turns: dict[str, Callable[[], float]] = {}
    for d in DIMENSIONS:
        mixture, process = flowfast.GaussianMixture.random(COMPONENTS, d), flowfast.OUProcess(cases.BETA)
        x = process.marginal(mixture, 1.0).sample(n, generator=torch.Generator().manual_seed(1))
        flow = partial(flowfast.flow_map, x, mixture, process, 1.0, 0.0)
        turns[f"d={d}, copy"] = partial(turn, partial(x.clone().copy_, x))
        turns[f"d={d}, new copy"] = partial(turn, x.clone)
        turns[f"d={d}, flowfast"] = partial(turn, partial(flow, method="paper", steps=cases.STEPS))
        turns[f"d={d}, flowfast, adaptive"] = partial(turn, flow)
    rows = {name: _row(taken) for name, taken in take_turns(turns, seconds).items()}

    def beyond(size: str, who: str, copy: str) -> float:
        return float(rows[f"{size}, {who}"]["median"] - rows[f"{size}, {copy}"]["median"]) / n

    for name, row in rows.items():
        size, _, who = name.partition(", ")
        if who not in COPIES:
            row["beyond_copy"] = beyond(size, who, "copy")
            for copy, ratio in COPIES.items():
                row[ratio] = beyond(size, who, copy) / beyond(f"d={DIMENSIONS[0]}", who, copy)
    title = f"{GROWTH}: flow n={n:,} k={COMPONENTS} sigma0=1 float32, beyond a copy of x"
    return {"title": title, "contenders": rows, "absent": {}}


def instruction_sets(*, seconds: float, quick: bool = False) -> dict[str, Any]:
    """Cases with each instruction set forced, and the speed as a part of that of the best set."""
    sets = _cpp.isas()
    with _children(sets, quick) as children:
        turns = {f"{case}, {isa}": partial(_ask, children[isa], case) for case in TIMED for isa in sets}
        rows = {name: _row(taken) for name, taken in take_turns(turns, seconds).items()}
    for name, row in rows.items():
        row["ratio"] = rows[f"{name.partition(', ')[0]}, {sets[0]}"]["median"] / row["median"]
    return {"title": f"{SETS}: speed relative to {sets[0]}", "contenders": rows, "absent": {}}


@contextmanager
def _children(sets: tuple[str, ...], quick: bool) -> Iterator[Mapping[str, subprocess.Popen[str]]]:
    """A process per instruction set that times TIMED when asked."""
    command = [sys.executable, "-m", "bench.own", *["--quick"] * quick, *TIMED]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    children = {isa: subprocess.Popen(command, env=os.environ | {"FLOWFAST_ISA": isa}, **pipes) for isa in sets}
    try:
        yield children
    finally:
        for child in children.values():
            child.communicate()  # the end of its input is the end of the child


def _ask(child: subprocess.Popen[str], case: str) -> float:
    """Seconds of the child's turn."""
    if child.stdin is None or child.stdout is None:
        raise RuntimeError("a child needs pipes")
    child.stdin.write(case + "\n")
    child.stdin.flush()
    answer = child.stdout.readline()
    if not answer:
        raise RuntimeError(f"the process that times an instruction set ended while timing {case}")
    return float(answer)


def _row(taken: list[float]) -> dict[str, Any]:
    return dict(zip(("median", "lower", "upper", "fastest", "turns"), summary(taken), strict=True))


def table(result: dict[str, Any]) -> Table:
    """Medians with their quartiles, and the ratios of `growth` or `instruction_sets`."""
    shown = Table(title=result["title"], title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    rows = result["contenders"]
    beyond = any("beyond_copy" in row for row in rows.values())
    ratios = list(COPIES.values()) if beyond else ["ratio"]
    more = ("us per trajectory beyond copy", "ratio", "beyond new copy") if beyond else ("ratio",)
    for heading in ("", "median ms", "quartiles", "turns", *more):
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, row in rows.items():
        cells = [name, ms(row["median"]), f"{ms(row['lower'])}-{ms(row['upper'])}", str(row["turns"])]
        if beyond:
            cells.append(f"{1e6 * row['beyond_copy']:.3g}" if "beyond_copy" in row else "")
        shown.add_row(*cells, *(f"{row[ratio]:.2f}" if ratio in row else "" for ratio in ratios))
    return shown


def main() -> None:
    """The child: a turn of a case for each line of input, into an existing output where there is the choice."""
    parser = argparse.ArgumentParser(prog="python -m bench.own", description=__doc__)
    parser.add_argument("case", nargs="+", choices=cases.names())
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the points")
    options = parser.parse_args()
    with torch.inference_mode():
        made = [cases.named(name, quick=options.quick) for name in options.case]
        fixed = "flowfast, output reused"  # fresh pages cost every instruction set the same
        who = {case.name: case.contenders.get(fixed, case.contenders["flowfast"]) for case in made}
        runs = {case.name: who[case.name].build(case.problem) for case in made}
        for line in sys.stdin:
            print(turn(runs[line.strip()]), flush=True)


if __name__ == "__main__":
    main()
