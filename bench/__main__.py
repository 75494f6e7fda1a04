"""`python -m bench`: test, measure the ceilings, time the cases, print tables, write <out>/<machine>-cpu.json."""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import gate, memory, own
from bench.cases import named, names
from bench.ceilings import ceilings
from bench.results import as_json, table
from bench.timing import HOW, measure
from flowfast.experiments.machine import PACKAGES, machine, versions

PEERS = ("scikit-learn", "jax", "jaxlib", "diffrax", "torchdiffeq", "torchode", "pykeops")


def main() -> int:
    """Parse the options, run, print, write; exit code 1 when tests were red."""
    options = parse()
    console = Console(width=150, highlight=False)
    start, load, cores = time.perf_counter(), os.getloadavg()[0], os.cpu_count() or 1
    report: dict[str, Any] = {"processor": processor(), "cores": cores, **machine()}
    report["versions"] = versions(tuple(dict.fromkeys((*PACKAGES, *PEERS))))
    report |= {"load_before": load, "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "not set"), "how": HOW}
    report |= {"quick": options.quick, "seconds_per_contender": options.seconds}
    if load > cores / 2:
        console.print(f"this machine is busy (load {load:.1f} on {cores} cores): do not quote these figures")
    chosen = options.case or [*names(), *own.NAMES]
    red = gate.red({operation for name in chosen for operation in gate.operations(name)}, reuse=options.reuse_tests)
    threads = torch.get_num_threads()
    report["ceilings"] = ceilings(tuple(sorted({1, threads})))
    rates = report["ceilings"][str(threads)]
    for count, found in report["ceilings"].items():
        shown = ", ".join(f"{name} {1e-9 * x:.4g} G/s" for name, x in found.items())
        console.print(f"ceilings, {count} threads: {shown}")
    name = re.sub("[^a-z0-9]+", "-", report["processor"].lower()).strip("-")
    path = options.out / f"{name}-cpu.json"
    cases, complete = kept(path, report["versions"]) if options.case else ({}, False)
    report |= {"red": sorted(red), "complete": complete, "cases": cases}
    warnings.filterwarnings("ignore", module="torch|jax|torchode|pykeops|sklearn")
    for name in chosen:
        unsure = red & set(gate.operations(name))
        if unsure:
            console.print(f"{name}: not timed, the tests of {', '.join(sorted(unsure))} are red")
            continue
        with torch.inference_mode():
            result = timed(name, options, rates)
        report["cases"][name] = result
        console.print(own.table(result) if name in own.NAMES else table(result))
        write(path, report)  # a run that is stopped keeps what it has
        gc.collect()
    report |= {
        "complete": complete or not options.case,
        "load_after": os.getloadavg()[0],
        "seconds": round(time.perf_counter() - start),
    }
    write(path, report)
    console.print(f"written after {report['seconds']} s, load {report['load_after']:.1f}: {path}")
    return 1 if red else 0


def kept(path: Path, versions: dict[str, str]) -> tuple[dict[str, Any], bool]:
    """Cases that a file holds already and whether they were all, where the same versions measured them."""
    old = json.loads(path.read_text()) if path.exists() else {}
    return (old["cases"], old["complete"]) if old.get("versions") == versions else ({}, False)


def timed(name: str, options: argparse.Namespace, rates: dict[str, float]) -> dict[str, Any]:
    """One case, measured, as plain numbers."""
    begin = time.perf_counter()
    if name in own.NAMES:
        result = own.measure(name, seconds=options.seconds, quick=options.quick)
    else:
        case = named(name, quick=options.quick)
        found = measure(case, seconds=options.seconds)
        extra = memory.extra(name, found.timings, quick=options.quick) if name in memory.CASES else {}
        result = as_json(case, found, rates, extra)
    return result | {"seconds": round(time.perf_counter() - begin, 1)}


def write(path: Path, report: dict[str, Any]) -> None:
    """The results as JSON, the folder made when it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the JSON file")
    parser.add_argument("--seconds", type=float, default=1.0, help="of turns per contender of a case")
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the points, to see that it runs")
    parser.add_argument("--case", nargs="+", choices=[*names(), *own.NAMES], default=[], help="only these")
    parser.add_argument("--reuse-tests", action="store_true", help="trust a green run of the same sources and build")
    return parser.parse_args()


def processor() -> str:
    """What the numbers were taken on: the CPU's model."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1) if found else "cpu"


if __name__ == "__main__":
    raise SystemExit(main())
