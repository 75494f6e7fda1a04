"""`make gpu` as far as it goes without a GPU: its steps, limits and verdicts, and a part of its rehearsal."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import flowfast
from bench import (
    gpu,
    gpu_accuracy,
    gpu_cases,
    gpu_hazards,
    gpu_jobs,
    gpu_measure,
    gpu_peers,
    gpu_problems,
    gpu_report,
    gpu_shard,
    gpu_steps,
    peers,
)  # fmt: skip
from bench.gpu_jobs import Job
from bench.peers import NotOffered, Problem

# The interpreter computes with NumPy, which warns where a GPU says inf or NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

KEEP = "from pathlib import Path; from bench.gpu_jobs import Part; part = Part(Path({part!r})); "
RATES = {"copy_bytes": 1e9, "bf16": 1e12, "float32": 1e11}


def _job(name: str, script: str, part: Path | None = None) -> Job:
    return Job(name, (sys.executable, "-c", KEEP.format(part=str(part)) + script if part else script), part)


def _run(jobs: list[Job], folder: Path, limit: float = 20.0) -> dict[str, Any]:
    return gpu_jobs.run_jobs(jobs, limit=limit, width=4, folder=folder, watch=lambda found: None)


def test_all_limits_together_stay_under_ten_minutes() -> None:
    assert gpu_steps.budget() == sum(gpu_steps.LIMITS.values()) + gpu_steps.OVERHEAD < 600
    assert gpu_measure.FIRST <= 60


def test_a_job_that_fails_or_hangs_keeps_what_it_has(tmp_path: Path) -> None:
    child = tmp_path / "child"
    hang = f"""
part.add(i=1)
import subprocess, sys, time
subprocess.Popen([sys.executable, '-c', "import time; time.sleep(6); open({str(child)!r}, 'w')"])
time.sleep(60)
"""
    jobs = [
        _job("good", "part.add(i=1); part.add(i=2)", tmp_path / "good.json"),
        _job("bad", "part.add(i=1); raise SystemExit('no luck')", tmp_path / "bad.json"),
        _job("hung", hang, tmp_path / "hung.json"),
        _job("silent", "pass"),
        _job("fifth", "pass"),
    ]
    begin = time.monotonic()
    found = _run(jobs, tmp_path, limit=4.0)
    assert {name: one["state"] for name, one in found.items()} == {
        "good": "ok", "bad": "failed", "hung": "out of time", "silent": "ok", "fifth": "ok",
    }  # fmt: skip
    assert found["good"]["rows"] == [{"i": 1}, {"i": 2}] and found["good"]["output"] == ""
    assert found["bad"]["rows"] == found["hung"]["rows"] == [{"i": 1}]
    assert found["bad"]["returncode"] == 1 and "no luck" in found["bad"]["output"]
    time.sleep(max(0.0, 6.5 - (time.monotonic() - begin)))
    assert not child.exists(), "what a job started ends with it"


def test_jobs_that_do_not_begin_in_time_are_named(tmp_path: Path) -> None:
    jobs = [_job(str(i), "import time; time.sleep(30)") for i in range(2)]
    found = gpu_jobs.run_jobs(jobs, limit=0.3, width=1, folder=tmp_path, watch=lambda found: None)
    assert [one["state"] for one in found.values()] == ["out of time"] * 2 and found["1"]["seconds"] == 0


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu.Run:
    """A run on a GPU that is not there."""
    monkeypatch.setattr(gpu, "name_of", lambda device: "NVIDIA H200")
    (tmp_path / "scratch").mkdir()
    return gpu.Run("cuda", tmp_path / "out", tmp_path / "scratch")


def test_a_benchmark_whose_program_dies_goes_on_after_the_case(run: gpu.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def benchmark(setup: gpu_steps.Setup, attempt: int, cases: list[str], seconds: float, *, foreign: bool) -> Job:
        """Dies in a peer's library after two cases, and in the next one's first round."""
        asked.append(list(cases))
        assert foreign == (attempt == 0)
        script = "part.add(ceilings={});"
        for name in (cases[:2], cases[:1], cases)[attempt]:
            row = {"case": name, "title": name, "contenders": {}, "absent": {}, "failed": [], "written": 1.0}
            script += f"part.add(**{row!r}, complete={attempt > 0});"
        script += "import os; os._exit(3)" if attempt < 2 else ""
        return _job(f"benchmark {attempt}", script, setup.scratch / f"{attempt}.json")

    monkeypatch.setattr(gpu_steps, "benchmark", benchmark)
    run.step("benchmark")
    names, step = [w.name for w in gpu_cases.WORKLOADS], run.report["steps"]["benchmark"]
    assert asked == [names, names[2:], names[4:]] and [row["case"] for row in run.cases] == names[:3] + names[4:]
    assert step["state"] == "failed" and step["wrong"] == [f"{names[3]}: its program ended with exit code 3"]
    written = json.loads((run.out / "nvidia-h200-cuda.json").read_text())
    assert len(written["cases"]) == len(names) - 1 and written["rehearsal"] is False
    assert sorted(path.name for path in run.out.iterdir()) == [
        "nvidia-h200-cuda-accuracy.csv", "nvidia-h200-cuda-aims.csv", "nvidia-h200-cuda-cases.csv",
        "nvidia-h200-cuda.json",
    ]  # fmt: skip


@pytest.mark.parametrize(("planted", "racecheck", "state"), [(9, 0, "ok"), (9, 9, "failed"), (1, 9, "absent")])
def test_the_checker_must_find_the_planted_mistake(
    run: gpu.Run, monkeypatch: pytest.MonkeyPatch, planted: int, racecheck: int, state: str
) -> None:
    tool = run.setup.scratch / "compute-sanitizer"
    tool.write_text(
        f'#!/bin/sh\ncase "$*" in *gpu_planted*) exit {planted};; *racecheck*) exit {racecheck};; esac\nexit 0\n'
    )
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_steps, "sanitizer", lambda: str(tool))
    run.step("sanitizer")
    step = run.report["steps"]["sanitizer"]
    assert step["state"] == state and step["wrong"] == (["racecheck: exit code 9"] if state == "failed" else [])


def test_wrong_rows_and_red_tests_fail_their_steps(run: gpu.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"operation": "score", "shape": "d=3", "sigma0": 1.0, "points": "drawn", "mode": "highest", "median": 1e-7}
    good, bad = (
        {**row, "worst": 1e-7, "allowed": 1e-5, "ok": True},
        {**row, "worst": None, "allowed": 1e-5, "ok": False},
    )

    def accuracy(setup: gpu_steps.Setup) -> list[Job]:
        return [
            _job("d=3", f"part.add(**{good!r}); part.add(**{bad!r}); raise SystemExit(1)", setup.scratch / "a.json")
        ]

    def tests(setup: gpu_steps.Setup) -> list[Job]:
        suite = "<testsuite><testcase name='a'/><testcase name='b'><failure/></testcase><testcase name='c'><skipped/>"
        suite += "</testcase></testsuite>"
        path = gpu_steps.junit(setup, "part 1 of 1")
        return [_job("part 1 of 1", f"open({str(path)!r}, 'w').write({suite!r}); raise SystemExit(1)")]

    monkeypatch.setattr(gpu_steps, "accuracy", accuracy)
    monkeypatch.setattr(gpu_steps, "tests", tests)
    run.step("accuracy")
    run.step("tests")
    steps = run.report["steps"]
    assert steps["accuracy"]["state"] == "failed" and steps["accuracy"]["summary"] == "2 rows, 1 wrong, 0 absent"
    assert run.report["accuracy"][0]["worst"] == {"1": None} and run.report["accuracy"][0]["wrong"] == 1
    assert steps["tests"]["summary"] == "1 passed, 1 failed, 1 skipped"
    assert steps["tests"]["wrong"] == ["part 1 of 1: b", "part 1 of 1: exit code 1"]
    table = list(csv.DictReader(io.StringIO((run.out / "nvidia-h200-cuda-accuracy.csv").read_text())))
    assert [one["ok"] for one in table] == ["True", "False"] and table[1]["worst"] == ""


def test_a_rehearsal_stays_out_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gpu_steps, "hazards", lambda setup: [_job("d=3", "raise SystemExit(5)")])
    assert gpu.main(["--device", "cpu", "--only", "hazards", "--out", str(tmp_path / "results")]) == 1
    path = Path(capsys.readouterr().out.split()[-1])
    report = json.loads(path.read_text())
    assert path.parent.parent == tmp_path and report["rehearsal"] is True and not (tmp_path / "results").exists()
    assert all(row["met"] is None for row in report["aims"]) and report["steps"]["hazards"]["state"] == "failed"


def test_without_a_gpu_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2 and "GPU_DEVICE=cpu" in capsys.readouterr().err


def test_shards_share_the_tests_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    config = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: None))
    for i in range(3):
        monkeypatch.setenv("FLOWFAST_SHARD", f"{i}/3")
        items: Any = list(range(10))
        gpu_shard.pytest_collection_modifyitems(config, items)  # type: ignore[arg-type]
        seen += items
    assert sorted(seen) == list(range(10))


def test_every_job_of_every_step_can_be_parsed(tmp_path: Path) -> None:
    """The commands that a GPU machine would run name files and options that exist."""
    setup = gpu_steps.Setup("cuda", tmp_path)
    assert len(gpu_steps.accuracy(setup)) == len(gpu_problems.SHAPES) * len(gpu_steps.SEPARATE) + 1
    assert sorted(mode for some in gpu_steps.SEPARATE for mode in some) == sorted(gpu_problems.MODES)
    jobs = [
        *gpu_steps.accuracy(setup),
        *gpu_steps.hazards(setup),
        gpu_steps.benchmark(setup, 0, ["digits"], 9.0, foreign=False),
    ]
    modules = {"bench.gpu_accuracy": gpu_accuracy, "bench.gpu_hazards": gpu_hazards, "bench.gpu_measure": gpu_measure}
    for job in jobs:
        options = modules[job.command[2]].parse(job.command[3:])  # type: ignore[attr-defined]
        assert options.device == "cuda" and not options.tiny and options.part == job.part
        assert "TRITON_INTERPRET" not in job.environment
    assert len({job.part for job in jobs}) == len(jobs)
    for file in gpu_steps.tests(setup)[0].command[-len(gpu_steps.TESTS) :]:
        assert (gpu_jobs.ROOT / file).exists()
    assert all(job.environment["FLOWFAST_TEST_DEVICE"] == "cuda" for job in gpu_steps.tests(setup))


def test_aims_name_contenders_that_exist() -> None:
    for w in gpu_cases.WORKLOADS:
        case = gpu_cases.case(replace(w.tiny(), n=4, k=3, d=4), device="cpu")
        for aim in w.aims:
            assert case.contenders[aim.by].ours and aim.words()
            assert aim.peer is None or not case.contenders[aim.peer].ours
    assert [w.tiny().d for w in gpu_cases.WORKLOADS if w.d > 256] == [260, 260]


def _one(milliseconds: float, error: float, *, ours: bool = False) -> dict[str, Any]:
    errors = dict.fromkeys(("error_median", "error_most", "error_worst"), error)
    return {"median": 1e-3 * milliseconds, "ours": ours, "extra_memory": 2**30, **errors}


def test_verdicts_ask_for_speed_at_equal_error() -> None:
    (w,) = (w for w in gpu_cases.WORKLOADS if w.name == "points d=16")
    row: dict[str, Any] = {"case": w.name, "title": "", "absent": {"KeOps": "not installed"}, "written": 2.0**20}

    def met(ours: dict[str, Any], eager: dict[str, Any]) -> list[bool | None]:
        rows = gpu_report.verdicts([{**row, "contenders": {"flowfast": ours, "torch eager": eager}}], [])
        return [one["met"] for one in rows if one["case"] == w.name]

    assert met(_one(1.0, 1e-6, ours=True), _one(6.0, 1e-7)) == [True, True]
    assert met(_one(2.0, 1e-6, ours=True), _one(6.0, 1e-7)) == [False, False], "3x, and above 1.5 ms"
    assert met(_one(1.0, 1e-4, ours=True), _one(6.0, 1e-7)) == [False, True], "fast, but not as accurate"
    assert met(_one(1.0, 1e-4, ours=True), _one(6.0, 1e-3)) == [False, True], "above the error that is asked for"
    rows = gpu_report.verdicts([{**row, "contenders": {"torch eager": _one(6.0, 1e-7)}}], [])
    assert {one["met"] for one in rows} == {None} and all(one["reason"] for one in rows)
    quick = {"flowfast": _one(1, 1e-6, ours=True), "torch eager": _one(6, 1e-7), "rough": _one(0.1, 1e-2)}
    assert gpu_report.best_peer({"contenders": quick}, "flowfast") == "torch eager"
    assert [one["contender"] for one in gpu_report.memory([{**row, "contenders": quick}])] == ["flowfast"]
    assert gpu_report.contenders([{**row, "contenders": quick}])[-1]["absent"] == "not installed"


def test_verdicts_on_errors_and_memory() -> None:
    row: dict[str, Any] = {"case": "digits", "title": "", "absent": {}, "written": 2.0**20}
    errors = [{"mode": mode, "allowed": 1e-5, "worst": worst} for mode, worst in (("highest", 9e-6), ("high", 2e-5))]
    for extra, frugal in ((gpu_cases.GUARANTEED, True), (gpu_cases.GUARANTEED + 2**21, False)):
        case = {**row, "contenders": {"flowfast": _one(1.0, 1e-6, ours=True) | {"extra_memory": extra}}}
        assert [one["met"] for one in gpu_report.verdicts([case], errors)][-3:] == [True, False, frugal]
    broken = {"mode": "highest", "allowed": 1e-5, "worst": None}
    flow = {"mode": "high", "allowed": 5e-2, "worst": 1e-3}
    assert [one["met"] for one in gpu_report.verdicts([], [broken, flow])][-3:] == [False, None, None]


def test_contenders_are_measured_and_the_others_named() -> None:
    (w,) = (w for w in gpu_cases.WORKLOADS if w.name == "points d=3")
    case = gpu_cases.named(w.name, device="cpu", tiny=True)

    def missing(problem: Any) -> Any:
        raise NotOffered("needs a GPU")

    def broken(problem: Any) -> Any:
        raise FloatingPointError("fell over")

    def endless(problem: Any) -> Any:
        raise gpu_measure.OverdueError("above 60 s")

    few = {name: case.contenders[name] for name in ("flowfast", "torch eager", "torch SDPA", "paper's scripts")}
    extra = {"gone": missing, "ours, broken": broken, "slow": endless}
    few |= {name: gpu_peers.Contender(build, ours=name.startswith("ours")) for name, build in extra.items()}
    with torch.no_grad():
        row = gpu_measure.measure(
            replace(case, contenders=few), seconds=0.0, until=time.monotonic() + 100, rates=RATES
        )  # fmt: skip
        late = gpu_measure.measure(replace(case, contenders=few), seconds=0.0, until=0.0, rates=RATES)
    assert list(row["contenders"]) == ["flowfast", "torch eager", "torch SDPA", "paper's scripts"]
    for name, one in row["contenders"].items():
        assert one["error_worst"] < 2e-6 and one["lower"] <= one["median"] <= one["upper"], name
        assert one["share_of_bf16"] == pytest.approx(4 * 33 * 24 * 3 / one["median"] / 1e12)
    assert row["failed"] == ["ours, broken"] and row["absent"]["gone"] == "needs a GPU"
    assert row["absent"]["ours, broken"] == "failed: FloatingPointError: fell over" and "slow" in row["absent"]
    assert set(late["absent"].values()) == {"no time left in this run"} and not late["contenders"]
    report = {"accuracy": [], "aims": gpu_report.verdicts([row], []), "steps": {}}
    assert len(gpu_report.tables(report, [row])) == 4


def test_other_libraries_are_timed_in_a_round_of_their_own() -> None:
    case = gpu_cases.named("digits", device="cpu", tiny=True)
    eager = case.contenders["torch eager"]
    few = {"flowfast": replace(eager, ours=True), "torch eager": eager, "JAX": replace(eager, foreign=True)}
    case = replace(case, contenders={**few, "KeOps": gpu_peers.Contender(gpu_peers.captured, foreign=True)})
    asked: list[list[str]] = []

    def timed(part: gpu_cases.Case) -> dict[str, Any]:
        asked.append(list(part.contenders))
        return gpu_measure.measure(part, seconds=None, until=time.monotonic() + 100, rates=RATES)

    first = gpu_measure.first_round(case, timed)
    assert list(first["contenders"]) == ["flowfast", "torch eager"] and not first["complete"]
    assert set(first["absent"]) == {"JAX", "KeOps"}
    second = gpu_measure.second_round(case, timed, first)
    assert asked == [["flowfast", "torch eager"], ["flowfast", "JAX", "KeOps"]] and second["complete"]
    assert list(second["contenders"]) == [*few] and second["absent"] == {"KeOps": "needs a GPU"}
    assert second["contenders"]["flowfast"] == first["contenders"]["flowfast"]
    assert all(one["turns"] == 1 and one["median"] == one["first"] for one in second["contenders"].values())


def test_device_mix_ups_show_without_a_device() -> None:
    """Between elements the meta device refuses what CUDA refuses: an operand on the CPU that is more than a number."""
    s = gpu_problems.setting(8, 5, 4, 0.1, device="meta")
    with pytest.raises(RuntimeError):
        s.x * torch.ones(1, 4)
    scales = gpu_problems.scales(s.double())
    for name, compute in gpu_problems.OPERATIONS.items():
        exact = compute(gpu_problems.given(name, s).double(), "reference")
        assert gpu_problems.row_errors(exact.float(), exact, scales[name]).device.type == "meta"
    law = flowfast.OUProcess(5.0).marginal(s.mixture, 0.3)
    for operation in ("score", "flow"):
        problem = Problem(operation, s.x, law.means, float(law.std), steps=2)
        for build in (peers.lean, peers.scripts, gpu_peers.sdpa):
            if operation == "score" or build is not gpu_peers.sdpa:
                assert build(problem)().device.type == "meta"
    flow = flowfast.solve_flow(
        s.x, s.mixture, flowfast.OUProcess(5.0), 1.0, 0.0, method="paper", steps=2, backend="reference"
    )
    assert flow.x.device.type == flow.status.device.type == "meta"


def test_rows_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = gpu_cases.named("digits", device="cpu", tiny=True)
    eager = case.contenders["torch eager"].build
    whole = eager(case.problem)()
    monkeypatch.setattr(gpu_peers, "PART", 2 * 4 * 24 * 10)  # ten rows of logits and weights
    torch.testing.assert_close(eager(case.problem)(), whole)


def test_a_call_that_takes_too_long_is_interrupted() -> None:
    with pytest.raises(gpu_measure.OverdueError), gpu_measure.at_most(0.05):
        time.sleep(5)
    with pytest.raises(gpu_measure.OverdueError), gpu_measure.at_most(0.05):
        with contextlib.suppress(gpu_measure.OverdueError):
            time.sleep(5)
        time.sleep(5)
    with gpu_measure.at_most(5):
        pass


def test_ceilings_are_measured_in_their_own_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[tuple[torch.dtype, str]] = []
    multiply = torch.mm

    def seen(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        modes.append((a.dtype, torch.get_float32_matmul_precision()))
        return multiply(a, b)

    monkeypatch.setattr(torch, "mm", seen)
    rates = gpu_measure.ceilings("cpu")
    assert set(modes) == {(torch.bfloat16, "highest"), (torch.float32, "highest"), (torch.float32, "high")}
    assert set(rates) == {"copy_bytes", "bf16", "float32", "tf32"} and min(rates.values()) > 0


def test_rehearsed_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_problems, "SIGMAS", (1e-4,))
    part = tmp_path / "rows.json"
    small = ["--device", "cpu", "--tiny", "--part", str(part)]
    assert gpu_accuracy.main(["d=3", *small, "--mode", "highest"]) == 0
    rows = json.loads(part.read_text())
    assert len(rows) == len(gpu_problems.POINTS) * len(gpu_problems.OPERATIONS) and all(row["ok"] for row in rows)
    assert gpu_accuracy.main(["flows", *small]) == 0
    right = gpu_problems.OPERATIONS["score"]

    def slightly_wrong(s: gpu_problems.Setting, backend: str) -> torch.Tensor:
        return right(s, backend) * (1 + 2e-5 * (backend == "triton"))

    monkeypatch.setattr(gpu_problems, "OPERATIONS", {"score": slightly_wrong})
    assert gpu_accuracy.main(["d=3", *small, "--mode", "highest"]) == 1
    assert not any(row["ok"] for row in json.loads(part.read_text()))


def test_rehearsed_hazards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part, calls = tmp_path / "rows.json", iter(range(100))
    small = ["d=3", "--device", "cpu", "--tiny", "--part", str(part)]
    monkeypatch.setattr(gpu_hazards, "SIGMAS", (1.0,))
    assert gpu_hazards.main(small) == 0
    rows = json.loads(part.read_text())
    assert {row["absent"] for row in rows if row["check"] in ("CUDA graph", "other stream")} == {gpu_hazards.NEEDS_GPU}
    assert sum(row.get("ok", False) for row in rows) >= len(gpu_problems.OPERATIONS) * len(gpu_problems.MODES)
    assert gpu_hazards.repeats(lambda: torch.tensor([float(next(calls))]), 20) == "19 of 19 calls differ from the first"
    assert gpu_hazards.repeats(lambda: torch.tensor([float("nan")])) == "not finite"

    def refuse() -> str:
        raise ValueError("no such thing")

    assert gpu_hazards.checked(refuse) == {"ok": False, "detail": "ValueError: no such thing"}


def test_precision_is_put_back() -> None:
    before = torch.get_float32_matmul_precision()
    with gpu_problems.precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    assert "FLOWFAST_SHARD" not in os.environ
