"""`flowfast reproduce` and `flowfast report` on its folder: one sentence for every wrong call, nothing overwritten."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import tiny_tables

from flowfast import cli
from flowfast.cli import jobs
from flowfast.cli.jobs import run_jobs
from flowfast.cli.options import UsageError
from flowfast.experiments.paper.records import read

ROOT = Path(__file__).parents[1]
tiny_tables_are_used = tiny_tables.tiny_tables
ONE = ["--tables", "3", "--only", "sigma0=0.1, B=0.1"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory without a rank, with folders that hold other things."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "FLOWFAST_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    for folder, name in (("full", "thesis.tex"), ("job", "job.json")):
        Path(folder).mkdir()
        (Path(folder) / name).write_text("{}")
    Path("file").write_text("")
    return tmp_path


def _call(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


WRONG = [
    (["--tables", "6"], "--tables must be some of 1, 2, 3, 4, 5; got 6"),
    (["--tables", "one"], "--tables"),
    (["--seeds", "0"], "--seeds must be at least 1; got 0"),
    (["--teacher", "best"], "--teacher must be exact, paper or both; got best"),
    (["--scale", "0"], "--scale must be above 0"),
    (["--scale", "1.5"], "--scale must be above 0 and at most 1"),
    (["--only", "sigma=1"], "--only must name some of sigma0, t, width"),
    (["--only", "t=0.2"], "--only has no cell with t=0.2: choose of 0.1, 0.3"),
    (["--device", "abacus"], "device must be cpu or cuda; got 'abacus'"),
    (["--precision", "int8"], "--precision must be one of float32"),
    (["--precision", "tf32"], "mode of CUDA"),
    (["--student", "mlp"], "--student must be one of transformer, residual"),
    (["--jobs", "0"], "--jobs must be at least 1"),
    (["--members", "0"], "--members must be at least 1"),
    (["--engine", "spark"], "--engine"),
    (["--address", "auto"], "--address is of a Ray cluster: add --engine ray"),
    (["--out", "full"], "--out: full is not empty"),
    (["--out", "file"], "--out: file is a file"),
    (["--out", "job"], "--out: job belongs to another experiment"),
]


@pytest.mark.parametrize(("arguments", "sentence"), WRONG, ids=[" ".join(call) for call, _ in WRONG])
def test_a_wrong_call_gets_one_sentence(
    arguments: list[str], sentence: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.rglob("*"))
    code, out, err = _call(["reproduce", "--out", "new", *arguments], capsys)
    assert code == 2 and out == ""
    assert err.startswith("flowfast: ") and err.count("\n") == 1 and re.search(sentence, err), err
    assert sorted(place.rglob("*")) == before, "nothing was written"


def test_a_rank_without_a_world_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    code, _, err = _call(["reproduce", "--out", "new"], capsys)
    assert code == 2 and "RANK and WORLD_SIZE" in err and not Path("new").exists()


def test_from_the_call_to_the_report_and_once_more(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["reproduce", *ONE, "--teacher", "exact", "paper", "--seeds", "2", "--jobs", "1", "--out", "mine"]
    code, out, err = _call(call, capsys)
    assert code == 0 and out.splitlines()[-1] == "mine/report.html"
    assert "Table 3" in out and "4 of 4 runs" in err and "paper teacher, seed 1" in err
    stored = (Path("mine/runs.jsonl").read_bytes(), Path("mine/report.html").read_bytes())
    code, out, err = _call([*call, "--json"], capsys)
    assert code == 0 and err == "" and json.loads(out) == {
        "folder": "mine", "report": "mine/report.html", "finished": 4, "missing": 0,
    }  # fmt: skip
    Path("mine/report.html").unlink()
    assert _call(["report", "mine"], capsys) == (0, "mine/report.html\n", "")
    assert (Path("mine/runs.jsonl").read_bytes(), Path("mine/report.html").read_bytes()) == stored


def test_a_corrupt_line_stops_every_command_and_stays(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["reproduce", *ONE, "--jobs", "1", "--out", "mine"]
    _call(call, capsys)
    Path("mine/runs.jsonl").write_text("{}\n")
    before = {path: path.read_bytes() for path in Path("mine").rglob("*") if path.is_file()}
    for again in (call, [*call, "--seeds", "2"], ["report", "mine"]):
        code, out, err = _call(again, capsys)
        assert code == 2 and out == "" and "runs.jsonl, line 1 is no result of flowfast reproduce" in err
    assert {path: path.read_bytes() for path in Path("mine").rglob("*") if path.is_file()} == before


def test_two_processes_share_a_call(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The real Table 3, cut to twenty steps a run."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run_jobs(["reproduce", *ONE, "--seeds", "2", "--scale", "1e-4", "--jobs", "1", "--json", "--out", "mine"], 2)
    said = capfd.readouterr()
    assert said.out == "" and {line[:3] for line in said.err.splitlines()} == {"[0]", "[1]"}
    assert sorted(path.name for path in Path("mine").glob("runs*")) == ["runs-0.jsonl", "runs-1.jsonl"]
    assert sorted(record.seed for record in read(Path("mine")).values()) == [0, 1]


def test_a_process_that_refuses_is_the_calls_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; print('working', file=sys.stderr); print('flowfast: {}', file=sys.stderr); sys.exit({})"
    for code, kind in ((2, UsageError), (1, RuntimeError)):
        monkeypatch.setattr(jobs, "_COMMAND", [sys.executable, "-c", script.format("no such luck", code)])
        with pytest.raises(kind, match="^no such luck$"):
            run_jobs([], 2)


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _call(["reproduce", "--help"], capsys)
    assert code == 0 and err == "" and all(f"--{name}" in out for name in ("tables", "seeds", "only", "scale", "json"))
