"""`make gpu`: proof and benchmark on a GPU, in under ten minutes; with `--device cpu` a rehearsal at tiny sizes.

Build, tests, accuracy, hazards, compute-sanitizer, benchmark. Every step is a set of programs with a time limit: one
that fails, hangs or crashes loses its own results only. The report is rewritten every second or so.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from bench import gpu_cases, gpu_measure, gpu_report, gpu_steps
from bench.gpu_jobs import Job, Row, replace_file, run_jobs
from flowfast.experiments.machine import PACKAGES, machine, versions

NO_COMPILER = "no C++ compiler: what needs the extension is red"
NOTHING_SELECTED = 5  # pytest's exit code
PEERS = ("triton", "jax", "jaxlib", "diffrax", "torchdiffeq", "pykeops")


class Run:
    """One run of `make gpu`: the report, and how its steps come about.

    Attributes:
        setup: where steps run. out: folder of the results. rows: what each step found. report: as written.
    """

    def __init__(self, device: str, out: Path, scratch: Path) -> None:
        self.setup, self.out = gpu_steps.Setup(device, scratch), out
        self.begin, self.console = time.perf_counter(), Console(width=170, highlight=False)
        self.rows: dict[str, list[Row]] = {"accuracy": [], "hazards": [], "benchmark": []}
        self.report: dict[str, Any] = {"rehearsal": self.setup.rehearsal, "device": name_of(device), **machine()}
        self.report["cuda"] = torch.version.cuda
        self.report["versions"] = versions(tuple(dict.fromkeys((*PACKAGES, *PEERS))))
        self.report |= {"how": gpu_measure.HOW, "budget": gpu_steps.budget(), "steps": {}}

    def step(self, name: str) -> None:
        """Run one step and keep what it found."""
        begin = time.perf_counter()
        step: Row = {"state": "running", "seconds": 0.0, "limit": self.setup.limit(name), "summary": ""}
        step |= {"jobs": {}, "wrong": []}
        self.report["steps"][name] = step
        try:
            {"benchmark": self._benchmark, "sanitizer": self._sanitizer}.get(name, partial(self._together, name))(step)
        except Exception as error:  # the other steps go on
            step["wrong"].append(f"{type(error).__name__}: {error}")
        step["seconds"] = round(time.perf_counter() - begin, 1)
        late = [job for job, one in step["jobs"].items() if one["state"] == "out of time"]
        step["wrong"] += [f"{job}: out of time" for job in late]
        if step["state"] == "running":
            step["state"] = "failed" if step["wrong"] else "ok"
        self.write()
        self.console.print(f"{name}: {step['state']} after {step['seconds']:.0f} s. {step['summary']}")
        for line in step["wrong"][:20]:
            self.console.print(f"    {line}", markup=False)

    def _together(self, name: str, step: Row) -> None:
        """Build, tests, accuracy or hazards: all jobs side by side, each judged by its exit code and its rows."""
        jobs: list[Job] = getattr(gpu_steps, name)(self.setup)
        if not jobs:
            built = gpu_steps.built()
            step |= {"state": "ok", "summary": "built before"} if built else {"state": "absent", "summary": NO_COMPILER}
            return
        found = run_jobs(
            jobs, limit=self.setup.limit(name), width=1 if self.setup.rehearsal else gpu_steps.WIDTH,
            folder=self.setup.scratch,
            watch=partial(self._keep, name, step),
        )  # fmt: skip
        self._keep(name, step, found)
        for job, one in found.items():
            if name == "tests":
                one |= gpu_steps.tests_of(gpu_steps.junit(self.setup, job))
                step["wrong"] += [f"{job}: {test}" for test in one.get("wrong", ())]
            step["wrong"] += [" ".join(map(str, row.values())) for row in one.pop("rows") if row.get("ok") is False]
            empty = name == "tests" and self.setup.rehearsal and one["returncode"] == NOTHING_SELECTED
            if one["state"] == "failed" and not empty:
                step["wrong"].append(f"{job}: exit code {one['returncode']}")
        step["jobs"] = found
        step["summary"] = _counts(self.rows.get(name, []))
        if name == "tests":
            counts = {key: sum(one.get(key, 0) for one in found.values()) for key in ("passed", "failed", "skipped")}
            step["summary"] = ", ".join(f"{count} {key}" for key, count in counts.items())

    def _benchmark(self, step: Row) -> None:
        """The cases one after another; when their program dies, those after the one it died in go on in another."""
        end, left = time.monotonic() + self.setup.limit("benchmark"), [w.name for w in gpu_cases.WORKLOADS]
        for attempt in range(len(left)):
            total, before = end - time.monotonic(), list(self.rows["benchmark"])
            job = gpu_steps.benchmark(self.setup, attempt, left, total, foreign=attempt == 0)
            watch = partial(self._append, before)
            one = run_jobs([job], limit=total, width=1, folder=self.setup.scratch, watch=watch)[job.name]
            step["jobs"][job.name] = one
            done = [row for row in one.pop("rows") if "contenders" in row]
            left = left[len(done) :]
            if one["state"] != "failed" or not left:
                break
            if not done or done[-1]["complete"] or attempt:  # else a peer with a runtime of its own was to blame
                step["wrong"].append(f"{left[0]}: its program ended with exit code {one['returncode']}")
                left = left[1:]
        step["wrong"] += [f"{row['case']}: {who}: {row['absent'][who]}" for row in self.cases for who in row["failed"]]
        step["wrong"] += [f"{name}: not reached" for name in left]
        step["summary"] = f"{len(self.cases)} of {len(gpu_cases.WORKLOADS)} cases"

    def _sanitizer(self, step: Row) -> None:
        """compute-sanitizer on small calls of every kernel, and on a planted mistake that it must find."""
        tool = gpu_steps.sanitizer()
        usable = tool is not None and not self.setup.rehearsal
        jobs = gpu_steps.sanitized(self.setup, tool) if tool is not None and usable else gpu_steps.plain(self.setup)
        limit = self.setup.limit("sanitizer")
        found = run_jobs(jobs, limit=limit, width=len(jobs), folder=self.setup.scratch, watch=lambda _: None)
        step["jobs"] = _without_rows(found)
        states = {name: one["state"] for name, one in found.items() if name != "planted"}
        step["summary"] = ", ".join(f"{name} {state}" for name, state in states.items())
        failed = [name for name, state in states.items() if state == "failed"]
        if usable and found["planted"]["returncode"] != gpu_steps.FOUND:
            step |= {"state": "absent", "summary": "compute-sanitizer does not find a planted mistake here"}
            return
        step["wrong"] = [f"{name}: exit code {found[name]['returncode']}" for name in failed]
        if usable:
            step["jobs"]["planted"]["state"] = "ok"
        elif not failed:
            reason = "needs a GPU" if self.setup.rehearsal else "compute-sanitizer is not on this machine"
            step |= {"state": "absent", "summary": f"{reason}; {step['summary']}"}

    @property
    def cases(self) -> list[Row]:
        """Rows of the benchmark that are cases."""
        return [row for row in self.rows["benchmark"] if "contenders" in row]

    def _append(self, before: list[Row], found: dict[str, Row]) -> None:
        self.rows["benchmark"] = before + [row for one in found.values() for row in one.get("rows", ())]
        self.write()

    def _keep(self, name: str, step: Row, found: dict[str, Row]) -> None:
        if name in self.rows:
            self.rows[name] = [row for one in found.values() for row in one.get("rows", ())]
        step["jobs"] = _without_rows(found)
        self.write()

    def write(self) -> None:
        """The report as JSON, all rows as CSV."""
        cases = self.cases
        rates = [row["ceilings"] for row in self.rows["benchmark"] if "ceilings" in row]
        self.report |= {
            "seconds": round(time.perf_counter() - self.begin, 1),
            "ceilings": rates[0] if rates else None,
            "accuracy": gpu_report.accuracy(self.rows["accuracy"]),
            "hazards": [row for row in self.rows["hazards"] if row.get("ok") is False],
            "aims": gpu_report.verdicts(cases, self.rows["accuracy"], rehearsal=self.setup.rehearsal),
            "beyond_memory": gpu_report.memory(cases),
            "cases": cases,
        }
        stem = re.sub("[^a-z0-9]+", "-", self.report["device"].lower()).strip("-") + f"-{self.setup.device}"
        self.path = self.out / f"{stem}.json"
        replace_file(self.path, json.dumps(self.report, indent=1, allow_nan=False) + "\n")
        for kind, columns, rows in (
            ("accuracy", gpu_report.ACCURACY, self.rows["accuracy"]),
            ("cases", gpu_report.CASES, gpu_report.contenders(cases)),
            ("aims", gpu_report.AIMS, self.report["aims"]),
        ):
            replace_file(self.out / f"{stem}-{kind}.csv", gpu_report.as_csv(columns, rows))


def name_of(device: str) -> str:
    """The GPU's model, or "interpreter"."""
    return torch.cuda.get_device_name() if device == "cuda" else "interpreter"


def _without_rows(found: dict[str, Row]) -> dict[str, Row]:
    return {name: {key: value for key, value in one.items() if key != "rows"} for name, one in found.items()}


def _counts(rows: Sequence[Row]) -> str:
    wrong, absent = sum(row.get("ok") is False for row in rows), sum("absent" in row for row in rows)
    return f"{len(rows)} rows, {wrong} wrong, {absent} absent" if rows else ""


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """All steps, or those asked for; exit code 1 when anything is wrong, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the results on a GPU")
    parser.add_argument(
        "--only", nargs="+", choices=gpu_steps.LIMITS, default=list(gpu_steps.LIMITS), help="these steps"
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU; make gpu GPU_DEVICE=cpu rehearses the same steps without one", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="flowfast-gpu-parts-") as scratch:
        out = Path(tempfile.mkdtemp(prefix="flowfast-gpu-rehearsal-")) if options.device == "cpu" else options.out
        run = Run(options.device, out, Path(scratch))
        for name in options.only:
            run.step(name)
    for table in gpu_report.tables(run.report, run.cases):
        run.console.print(table)
    wrong = [name for name, step in run.report["steps"].items() if step["state"] == "failed"]
    beyond = run.report["beyond_memory"]
    for row in beyond:
        run.console.print(f"more memory than promised: {row}", markup=False)
    run.console.print(f"{run.report['seconds']:.0f} s; wrong: {', '.join(wrong) or 'nothing'}")
    run.console.print(str(run.path), soft_wrap=True)
    return 1 if wrong or beyond else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)  # so that programs under way are ended too
    sys.exit(main())
