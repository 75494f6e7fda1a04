"""`python -m bench`: run every case, print a table, write `<out>/<machine>-<device>.json`."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.cases import cases
from bench.timing import Timing, as_json, measure
from flowfast.experiments.machine import machine, versions


def main() -> None:
    """Parse the options, run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the JSON file")
    parser.add_argument("--seconds", type=float, default=6.0, help="of turns per case")
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the points, to see that it runs")
    options = parser.parse_args()
    console, results = Console(width=100), {}
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        console.print(f"this machine is busy (load {load:.1f} on {cores} cores): do not quote these figures")
    with torch.inference_mode():
        for case in cases(options.device, quick=options.quick):
            timings = measure(case, seconds=options.seconds)
            results[case.name] = as_json(timings)
            console.print(table(case.name, timings))
    name = processor(options.device)
    report = {"processor": name, "cores": cores, "load_at_start": load, **machine(), "versions": versions()}
    report["cases"] = results
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}-{options.device}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"written: {path}", highlight=False)


def table(name: str, timings: dict[str, Timing]) -> Table:
    """One case as a table; ratios are to the first row."""
    result = Table(title=name, title_justify="left")
    for heading in ("", "median ms", "fastest", "ratio", "of fastest", "error, median", "error, worst"):
        result.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    first = next(iter(timings.values()))
    for contender, timing in timings.items():
        result.add_row(
            contender,
            f"{1e3 * timing.median:.3g}",
            f"{1e3 * timing.fastest:.3g}",
            f"{timing.median / first.median:.2f}",
            f"{timing.fastest / first.fastest:.2f}",
            f"{timing.error_median:.1e}",
            f"{timing.error_worst:.1e}",
        )
    return result


def processor(device: str) -> str:
    """What the numbers were taken on: the GPU's or the CPU's model."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1) if found else "cpu"


if __name__ == "__main__":
    main()
