"""The steps of `make gpu` as programs: what each runs, with which environment, and for how long at most."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import gpu_accuracy, gpu_hazards, gpu_measure
from bench.gpu_jobs import ROOT, Job, Row
from bench.gpu_problems import MODES

LIMITS = {"build": 45, "tests": 120, "accuracy": 60, "hazards": 45, "sanitizer": 70, "benchmark": 230}  # seconds
WIDTH = 16  # programs at a time on a GPU, where they are not timed: each compiles kernels on a core of its own
OVERHEAD = 20  # seconds beside the steps: imports, ending what is late
TESTS = tuple(  # beside the Triton ones: operators use torch's private functions, which another torch may not have
    f"tests/test_{name}.py" for name in ("operators", "transforms", "compile", "modules", "ops")
)
TOOLS = ("memcheck", "racecheck", "initcheck")
SEPARATE = [["highest", "bfloat16"], ["high"], ["float64"]]  # modes with kernels of their own
FOUND = 9  # exit code of compute-sanitizer when it has found something


@dataclass(frozen=True)
class Setup:
    """Where steps run.

    Attributes:
        device: "cuda", or "cpu" for a rehearsal: kernels interpreted, tiny sizes. scratch: folder of the parts.
    """

    device: str
    scratch: Path

    @property
    def rehearsal(self) -> bool:
        """Whether kernels are interpreted."""
        return self.device == "cpu"

    def limit(self, step: str) -> int:
        """Seconds of a step; four times as many in a rehearsal."""
        return LIMITS[step] * (4 if self.rehearsal else 1)

    def environment(self) -> dict[str, str]:
        """Variables of every program."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        found = {"PYTHONPATH": path, "FLOWFAST_TEST_DEVICE": self.device, "PYTHONUNBUFFERED": "1"}
        return found | ({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if self.rehearsal else {})

    def job(
        self, name: str, module: str, arguments: Sequence[str], part: Path | None,
        environment: Mapping[str, str] | None = None,
    ) -> Job:  # fmt: skip
        """A module of this folder as a program."""
        command = [sys.executable, "-m", module, *arguments, "--device", self.device, *["--tiny"] * self.rehearsal]
        command += ["--part", str(part)] if part else []
        return Job(name, command, part, self.environment() | dict(environment or {}))


def build(setup: Setup) -> list[Job]:
    """The extension, where it is older than its sources or missing, and where there is a compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    command = (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
    return [Job("extension", command)] if compiler and not built() else []


def built() -> bool:
    """Whether the extension is there for this Python and newer than its sources."""
    extension = ROOT / "flowfast" / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [ROOT / "setup.py", *(ROOT / "csrc").iterdir()]
    return extension.exists() and extension.stat().st_mtime > max(path.stat().st_mtime for path in sources)


def tests(setup: Setup) -> list[Job]:
    """The tests in parts; the rehearsal runs a few, since `make test` runs all of them."""
    files = [*sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_triton*.py")), *TESTS]
    command = [sys.executable, "-m", "pytest", "-v", "-W", "default", "-p", "no:cacheprovider", "-p", "no:torchtyping"]
    command += [
        "-p",
        "bench.gpu_shard",
        "--continue-on-collection-errors",
        *(["-k", "rows"] if setup.rehearsal else []),
    ]
    count, jobs = 1 if setup.rehearsal else WIDTH, []
    for i in range(count):
        name, environment = f"part {i + 1} of {count}", setup.environment() | {"FLOWFAST_SHARD": f"{i}/{count}"}
        jobs.append(Job(name, (*command, f"--junitxml={junit(setup, name)}", *files), None, environment))
    return jobs


def junit(setup: Setup, job: str) -> Path:
    """Where pytest writes what it found in a part of the tests."""
    return setup.scratch / f"{job}.xml"


def tests_of(path: Path) -> Row:
    """Counts of a JUnit file and the names of the tests that failed; nothing when pytest did not come to write it."""
    if not path.exists():
        return {}
    found: Row = {"passed": 0, "failed": 0, "skipped": 0, "wrong": []}
    for test in ElementTree.parse(path).getroot().iter("testcase"):
        kinds = {child.tag for child in test}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[kind] += 1
        found["wrong"] += [test.get("name")] * (kind == "failed")
    return found


def accuracy(setup: Setup) -> list[Job]:
    """A program per shape and mode, since each compiles its kernels, and one for flows and the diameter."""
    names = [name for name in gpu_accuracy.names(tiny=setup.rehearsal) if name != gpu_accuracy.REST]
    modes = [[*MODES]] if setup.rehearsal else SEPARATE
    asked = [(gpu_accuracy.REST, [*MODES]), *((name, some) for name in reversed(names) for some in modes)]
    jobs = []
    for name, some in asked:
        job = f"{name} {some[0]}"
        arguments, part = [name, "--mode", *some], setup.scratch / f"accuracy {job}.json"
        jobs.append(setup.job(job, "bench.gpu_accuracy", arguments, part))
    return jobs


def hazards(setup: Setup) -> list[Job]:
    """A program per shape."""
    names = gpu_hazards.names(tiny=setup.rehearsal)
    return [setup.job(name, "bench.gpu_hazards", [name], setup.scratch / f"hazards-{name}.json") for name in names]


def sanitizer() -> str | None:
    """Where compute-sanitizer is."""
    places = os.pathsep.join((os.environ.get("PATH", ""), "/usr/local/cuda/bin"))
    return shutil.which("compute-sanitizer", path=places)


def sanitized(setup: Setup, tool: str) -> list[Job]:
    """Small calls of every kernel under each check, and a planted mistake that must be found."""
    environment = setup.environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that every tensor's end is known
    jobs = []
    for check in (*TOOLS, "planted"):
        command = [tool, "--tool", "memcheck" if check == "planted" else check, "--error-exitcode", str(FOUND)]
        command += ["--report-api-errors", "no", "--print-limit", "10", sys.executable, "-m"]
        command += ["bench.gpu_planted"] if check == "planted" else ["bench.gpu_hazards", "small", "--device", "cuda"]
        jobs.append(Job(check, command, None, environment))
    return jobs


def plain(setup: Setup) -> list[Job]:
    """The same small calls without a checker."""
    return [setup.job("plain", "bench.gpu_hazards", [gpu_hazards.SANITIZE], None)]


def benchmark(setup: Setup, attempt: int, cases: Sequence[str], seconds: float, *, foreign: bool) -> Job:
    """The cases, in a program that begins nothing new after `seconds`; `foreign` are JAX, KeOps and diffrax."""
    options = ["--total", f"{seconds - 10:.0f}", *["--no-foreign"] * (not foreign), "--case", *cases]
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if setup.rehearsal:
        environment["TORCH_COMPILE_DISABLE"] = "1"  # compiling takes minutes here and says nothing of a GPU
    part = setup.scratch / f"benchmark-{attempt}.json"
    return setup.job(f"benchmark {attempt}", gpu_measure.__name__, options, part, environment)


def budget() -> int:
    """Seconds that a run on a GPU takes at most: the limits of all steps, and what is beside them."""
    return sum(LIMITS.values()) + OVERHEAD
