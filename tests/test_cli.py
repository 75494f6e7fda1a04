"""The command line: what it prints where, its exit codes, and one sentence for every wrong call."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_job import SETTINGS, finished

from flowfast import cli, doctor
from flowfast.experiments import JobResult

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
SMALL = "--rows 64 --evaluation-rows 32 --steps 20 --width 8 --segments 2 --grid balanced measured".split()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with means, good and bad, and with folders that hold other things."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLOWFAST_TRACEBACK", raising=False)
    means = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    np.save("means.npy", means)
    np.savez("mixture.npz", means=means, std=np.float64(0.2))
    np.save("hole.npy", np.where(np.arange(4) == 2, np.nan, means))
    np.save("flat.npy", means[0])
    np.save("whole.npy", np.ones((3, 2), int))
    np.save("half.npy", means.astype(np.float16))
    np.savez("other.npz", centres=means)
    Path("text.npy").write_text("not an array")
    Path("means.xls").write_text("")
    Path("file").write_text("")
    Path("full").mkdir()
    Path("full/thesis.tex").write_text("years of work")
    shutil.copytree(finished().folder, "job")
    shutil.copytree(finished().folder, "lame")
    shutil.rmtree("lame/grids")
    Path("begun").mkdir()
    shutil.copy("job/job.json", "begun")
    return tmp_path


def _call(arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(arguments.split())
    said = capsys.readouterr()
    return code, said.out, said.err


WRONG = [
    ("distill --means missing.npy --std 0.1 --out new", r"--means file missing\.npy does not exist"),
    ("distill --means text.npy --std 0.1 --out new", r"--means file text\.npy cannot be read"),
    ("distill --means means.xls --std 0.1 --out new", r"--means file means\.xls must end in one of \.npy"),
    ("distill --means other.npz --std 0.1 --out new", "--means file other.npz must hold an array named 'means'"),
    ("distill --means flat.npy --std 0.1 --out new", r"--means must have shape \(k, d\)"),
    ("distill --means hole.npy --std 0.1 --out new", "--means must be finite; row 0"),
    ("distill --means whole.npy --std 0.1 --out new", "--means must be floating"),
    ("distill --means half.npy --std 0.1 --out new", "--means must be float32 or float64"),
    ("distill --means means.npy --out new", "--std is needed"),
    ("distill --means means.npy --std 0 --out new", "--std must be positive"),
    ("distill --means means.npy --std -1 --out new", "--std must be positive"),
    ("distill --means means.npy --std nan --out new", "--std must be positive"),
    ("distill --means means.npy --std wide --out new", "--std.*'wide'"),
    ("distill --means means.npy --std 0.1 --out new --grid square", "--grid must name some of uniform.*square"),
    ("distill --means means.npy --std 0.1 --out new --grid uniform uniform", "--grid must name each kind once"),
    ("distill --means means.npy --std 0.1 --out new --segments 0", "--segments must be at least 1; got 0"),
    ("distill --means means.npy --std 0.1 --out new --rows 0", "--rows must be at least 1"),
    ("distill --means means.npy --std 0.1 --out new --steps 0", "--steps must be at least 1"),
    ("distill --means means.npy --std 0.1 --out new --width 0", "--width must be at least 1"),
    ("distill --means means.npy --std 0.1 --out new --seed -1", "--seed must be at least 0"),
    ("distill --means means.npy --std 0.1 --out new --beta 0", "--beta must be positive"),
    ("distill --means means.npy --std 0.1 --out new --horizon -1", "--horizon must be positive"),
    ("distill --means means.npy --std 0.1 --out new --backend gpu", "--backend must be one of auto"),
    ("distill --means means.npy --std 0.1 --out new --image-shape 3 3", "--image-shape 3 x 3 must hold"),
    ("distill --means means.npy --std 0.1 --out full", "--out.*full is not empty"),
    ("distill --means means.npy --std 0.1 --out file", "--out.*file is a file"),
    ("distill --means means.npy --std 0.1 --out file/new", "--out.*cannot be written"),
    ("distill --means means.npy --std 0.1 --out /proc/flowfast", "--out.*cannot be written"),
    ("distill --means means.npy --std 0.1 --out job", "--out.*belongs to another job.*std is 0.2.*there, 0.1 here"),
    ("distill --means means.npy --std 0.1", "--out"),
    ("distill --out new", "--means or --data must be given"),
    ("distill --data job/grids/balanced/teacher --rows 9 --out new", "--rows cannot be given with --data"),
    ("distill --data job/grids/balanced/teacher --means means.npy --out new", "--means cannot be given with --data"),
    ("distill --data job/grids/balanced/teacher --image-shape 3 3 --out new", "--image-shape 3 x 3 must hold"),
    ("distill --data full --out new", "--data: teacher set: full/plan.json does not exist"),
    ("verify nowhere", "FOLDER: teacher set: nowhere is no folder"),
    ("export full", "FOLDER: teacher set: full/plan.json does not exist"),
    ("export job/grids/balanced/teacher --format csv", "'csv' for argument '--format'"),
    ("digits --std 0 --out new", "--std must be positive"),
    ("sample job --n 0", "--n must be at least 1; got 0"),
    ("sample job --n many", "--n.*'many'"),
    ("sample job --grid uniform", "--grid must be one that job has, balanced, measured; got 'uniform'"),
    ("sample job --seed -1", "--seed must be at least 0"),
    ("sample job --out samples.txt", "--out must end in .npy"),
    ("sample job --out file/samples.npy", "--out.*cannot be written"),
    ("sample full", "FOLDER: full holds no flowfast job"),
    ("sample begun", "FOLDER: begun holds an unfinished job"),
    ("sample lame", "FOLDER: .*student"),
    ("sample", "FOLDER"),
    ("stability --means hole.npy --std 0.1", "--means must be finite"),
    ("stability --means means.npy --std 0", "--std must be positive"),
    ("stability --means means.npy --std 0.1 --segments 0", "--segments must be at least 1"),
    ("stability --means means.npy --std 0.1 --grid square", "--grid must be some of"),
    ("stability --means means.npy --std 0.1 --horizon 0", "--horizon must be positive"),
    ("stability --means means.npy --std 0.1 --plot a.png b.png", "--plot takes one file"),
    ("stability --means means.npy --std 0.1 --plot a.bmp", "--plot must end in one of"),
    ("stability --means means.npy --std 0.1 --plot file/a.png", "--plot.*cannot be written"),
    ("report nowhere", "FOLDER: nowhere holds no flowfast job"),
    ("report begun", "FOLDER: begun holds an unfinished job"),
    ("bench compare missing.json file", r"FILE: missing\.json cannot be read \(No such file"),
    ("bench compare text.npy file", r"FILE: text\.npy cannot be read \(it is no JSON\)"),
    ("bench compare job/job.json file", r"FILE: job/job\.json is no benchmark result"),
    ("bench draw a.json b.json", "draw"),
    ("bench compare a.json", "AFTER"),
    ("paint", "paint"),
    ("doctor --fast", "--fast"),
]


@pytest.mark.parametrize(("arguments", "sentence"), WRONG, ids=[call for call, _ in WRONG])
def test_a_wrong_call_gets_one_sentence(
    arguments: str, sentence: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    code, out, err = _call(arguments, capsys)
    assert code == 2 and out == ""
    assert err.startswith("flowfast: ") and err.count("\n") == 1, "one line"
    assert re.search(sentence, err) and "Traceback" not in err
    assert sorted(place.rglob("*")) == before, "nothing was written"


def test_distill_from_means_to_report_and_once_more(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = " ".join(["distill --means means.npy --std 0.2 --out runs/mine", *SMALL])
    code, out, err = _call(call, capsys)
    assert code == 0 and out.splitlines()[-1] == "runs/mine/report.html"
    assert "balanced" in out and "training, measured grid" in err
    page = Path("runs/mine/report.html").read_bytes()
    code, out, err = _call(call, capsys)
    assert code == 0 and err == "" and out.splitlines()[-1] == "runs/mine/report.html"
    assert Path("runs/mine/report.html").read_bytes() == page


def test_distill_from_a_stored_set(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = "distill --data job/grids/measured/teacher --evaluation-rows 32 --steps 20 --width 8 --out runs/stored"
    code, out, err = _call(call, capsys)
    assert code == 0 and out.splitlines()[-1] == "runs/stored/report.html"
    assert "training, stored grid" in err and "teacher data" not in err
    assert not Path("runs/stored/grids/stored/teacher").exists()  # the set is read where it is
    assert "of the teacher set that the student learned from" in Path("runs/stored/report.html").read_text()
    other = call.replace("measured", "balanced")
    code, out, err = _call(other, capsys)
    assert code == 2 and "belongs to another job" in err and "data is" in err


def test_json_is_all_there_is_on_stdout(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _call(" ".join(["distill --means mixture.npz --out mine --json", *SMALL]), capsys)
    said = json.loads(out)
    assert code == 0 and said["mixture"]["std"] == 0.2 and said["report"] == "mine/report.html"
    assert [grid["kind"] for grid in said["grids"]] == ["balanced", "measured"]
    for call in ("sample job --n 3 --json", "stability --means mixture.npz --json", "report job --json"):
        code, out, err = _call(call, capsys)
        assert code == 0 and err == "" and json.loads(out)


def test_sample_writes_what_it_says(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _call("sample job --n 7 --grid measured --seed 3 --out mine.npy", capsys)
    assert code == 0 and out.splitlines()[-1] == "mine.npy" and np.load("mine.npy").shape == (7, 4)
    code, out, _ = _call("sample job --n 7 --grid measured --seed 3", capsys)
    assert np.array_equal(np.load(out.splitlines()[-1]), np.load("mine.npy"))
    code, out, _ = _call("sample job", capsys)
    best = JobResult.load("job").best().kind
    assert out.splitlines()[-1] == f"job/samples-{best}-n64-seed0.npy" and np.load(out.splitlines()[-1]).shape == (
        64,
        4,
    )


def test_stability_shows_regimes_grids_and_draws(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _call("stability --means means.npy --std 0.1 --plot", capsys)
    assert code == 0 and out.splitlines()[-1] == "stability.png"
    assert Path("stability.png").read_bytes().startswith(b"\x89PNG")
    assert all(word in out for word in ("t_shrink", "t_mix", "balanced", "measured", "A(T)"))
    code, out, _ = _call("stability --means means.npy --std 0.1 --plot mine.svg --json --segments 3", capsys)
    said = json.loads(out)
    assert b"<svg" in Path("mine.svg").read_bytes() and said["plot"] == "mine.svg"
    for grid in said["grids"]:
        assert sum(grid["exponents"]) == pytest.approx(said["total_stability"]) and len(grid["times"]) == 4


def test_report_gives_the_same_bytes_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _call("report job", capsys)
    first = Path("job/report.html").read_bytes()
    Path("job/report.html").unlink()
    assert _call("report job", capsys) == (0, "job/report.html\n", "")
    assert code == 0 and Path("job/report.html").read_bytes() == first


def test_doctor_finds_this_machine_well_and_says_when_it_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.perf_counter()
    code, out, _ = _call("doctor --json", capsys)
    said = json.loads(out)
    assert code == 0 and all(check["ok"] for check in said["checks"]) and len(said["checks"]) >= 6
    assert time.perf_counter() - start < 30  # ten seconds on a machine that does nothing else
    broken = doctor.Check("score", False, "off by [one]", 0.1)
    monkeypatch.setattr(doctor, "self_test", lambda: [broken])
    code, out, _ = _call("doctor", capsys)
    assert code == 1 and "failed" in out and "off by [one]" in out


def test_a_check_that_raises_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode() -> tuple[bool, str]:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(doctor, "_stability", explode)
    found = {check.name: check for check in doctor.self_test()}
    assert found["stability against quadrature"].detail == "RuntimeError: no such luck"
    assert [name for name, check in found.items() if not check.ok] == ["stability against quadrature"]


def test_bench_compare_shows_what_moved(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def result(median: float, **contenders: float) -> dict[str, object]:
        rows = {
            name: {"median": x, "lower": 0.9 * x, "upper": 1.1 * x}
            for name, x in {"flowfast": median, **contenders}.items()
        }
        return {"processor": "p", "threads": 2, "cases": {"S1": {"contenders": rows}}}

    Path("a.json").write_text(json.dumps(result(1e-3, numpy=2e-3, JAX=1.0)))
    Path("b.json").write_text(json.dumps(result(5e-4, numpy=2.1e-3) | {"threads": 1}))
    code, out, err = _call("bench compare a.json b.json", capsys)
    assert code == 0 and err == "" and "0.50 faster" in out and "1.05 " in out and "slower" not in out
    assert "not the same in both: threads" in out and "in before alone: S1, JAX" in out
    code, out, _ = _call("bench compare a.json b.json --json", capsys)
    rows = {row["contender"]: row for row in json.loads(out)["rows"]}
    assert code == 0 and rows["flowfast"]["ratio"] == 0.5 and rows["flowfast"]["apart"] and not rows["numpy"]["apart"]


def _fail(error: BaseException) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (RuntimeError("training diverged"), 1, "flowfast: training diverged\n"),
        (OSError(28, "No space left on device"), 1, "flowfast: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "flowfast: stopped; finished stages are kept: the same call goes on\n"),
        (KeyError("x"), 1, "flowfast: KeyError: 'x' (a bug: FLOWFAST_TRACEBACK=1 shows where)\n"),
    ],
)
def test_failed_and_stopped_runs(
    error: BaseException,
    code: int,
    sentence: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from flowfast.cli import distill

    monkeypatch.setattr(distill, "run_job", _fail(error))
    assert _call("distill --means means.npy --std 0.1 --out new", capsys) == (code, "", sentence)


def test_ctrl_c_stops_a_real_process_and_the_next_call_goes_on(place: Path) -> None:
    command = [sys.executable, "-m", "flowfast", "distill", "--means", "means.npy", "--std", "0.2", "--out", "mine"]
    command += [*SMALL, "--steps", "120"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    ) as run:
        assert run.stderr is not None
        for line in run.stderr:
            if line.startswith("training, balanced grid"):
                break
        run.send_signal(signal.SIGINT)
        out, err = run.communicate()
    assert run.returncode == 130 and out == "" and err.splitlines()[-1].startswith("flowfast: stopped")
    assert "Traceback" not in err and not Path("mine/results.json").exists()
    assert cli.main([*command[3:]]) == 0 and JobResult.load("mine").settings["recipe"]["steps"] == 120


def test_help_lists_commands_without_importing_anything_heavy() -> None:
    """What makes `flowfast --help` slow is torch; without it the answer comes in a fraction of a second."""
    code = (
        "import sys; from flowfast import cli; assert cli.main(['--help']) == 0\n"
        "print(sorted({'torch', 'matplotlib', 'scipy', 'sklearn', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(
        name in done.stdout
        for name in ("digits", "distill", "verify", "export", "sample", "stability", "doctor", "report", "bench")
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("digits", "distill", "verify", "export", "sample", "stability", "doctor", "report", "bench"):
        code, out, err = _call(f"{command} --help", capsys)
        assert code == 0 and "--json" in out and err == ""


def test_tiny_settings_are_the_job_folders(place: Path) -> None:
    assert JobResult.load("job").settings["segments"] == SETTINGS.segments
