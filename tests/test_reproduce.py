"""The paper's tables: every published cell is there, runs are found again by content, a kill changes no number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_tables
import torch
from tiny_tables import KILLED

from flowfast import OUProcess, time_grid
from flowfast.experiments import FolderError
from flowfast.experiments.paper import TABLES, Progress, Request, Summary, reproduce, summarise
from flowfast.experiments.paper.evaluation import Ratio
from flowfast.experiments.paper.groups import grouped, share
from flowfast.experiments.paper.plan import Rank
from flowfast.experiments.paper.published import published, stored
from flowfast.experiments.paper.records import read
from flowfast.experiments.paper.settings import Run, Settings, Variant
from flowfast.experiments.paper.sources import sources_of
from flowfast.metrics import relative_mse
from flowfast.teacher_pairs import PairSource

REAL = dict(TABLES)  # as they are before the fixture below puts tiny ones in their place
tiny_tables_are_used = tiny_tables.tiny_tables
ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
FEW = Request(tables=(3,), seeds=2, only=("sigma0=0.1, B=0.1",))


def _metrics(folder: Path) -> dict[str, Any]:
    return {name: record.metrics for name, record in read(folder).items()}


def _chunks(source: PairSource) -> list[tuple[torch.Tensor, ...]]:
    """The 2,100 evaluation points of a source: x and y, each in two chunks."""
    return list(zip(source.draw(2_048, "evaluation", 0), source.draw(52, "evaluation", 1), strict=True))


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_published_cell_is_a_cell_and_the_other_way_round() -> None:
    for number, table in REAL.items():
        rows = stored()["tables"][str(number)]["rows"]
        told = [published(table, cell) for cell in table.cells()]
        assert sum(bool(one) for one in told) == len(rows)
        assert {one["error"].mean for one in told if one} == {row["mean"] for row in rows}
    left_out = [dict(cell) for cell in REAL[5].cells() if not published(REAL[5], cell)]
    assert all(cell["segments"] < 4 or cell["grid"] in ("signed", "measured") for cell in left_out)
    assert len(left_out) == 14


def test_cells_have_the_settings_of_the_protocol() -> None:
    """Spot checks against PROTOCOL's table; mean_seed 0 gives the diameter it names."""
    common = {"batch_size": 1_024, "learning_rate": 2e-4, "clip_norm": 1.0, "weight_decay": 0.0}
    common |= {"evaluation_rows": 50_000, "dim": 64, "components": 20, "beta": 5.0, "half_width": 5.0}
    wanted: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
        (1, {"sigma0": 1.0, "t": 0.9}, {"std": 1.0, "time": 0.9, "width": 512, "steps": 20_000, "own_means": True}),
        (2, {"width": 128, "t": 0.5}, {"std": 0.1, "width": 128, "activation": "relu-requ", "target": "score"}),
        (3, {"sigma0": 0.001, "B": 0.01}, {"std": 0.001, "weight_bound": 0.01, "teacher_steps": 10, "steps": 20_000}),
        (4, {"blocks": 8}, {"student": "transformer", "depth": 8, "width": 128, "std": 0.001, "teacher_steps": 100}),
        (5, {"grid": "balanced", "segments": 8}, {"activation": "relu", "steps": 100_000, "std": 1.0, "width": 512}),
    ]
    for number, cell, fields in wanted:
        settings = asdict(REAL[number].settings(cell, "paper"))
        assert {name: settings[name] for name in common | fields} == common | fields
    assert REAL[3].base.time == pytest.approx(0.0693147, rel=1e-5)
    assert REAL[5].settings({"grid": "balanced", "segments": 8}).steps_per_segment() == 12_500
    assert REAL[3].base.mixture(7).diameter() == pytest.approx(40.9973, abs=1e-4)
    assert REAL[1].base.mixture(7).diameter() != REAL[1].base.mixture(8).diameter()


def test_the_papers_teacher_takes_the_steps_of_the_protocol() -> None:
    def steps(number: int, cell: dict[str, Any], *, evaluation: bool = False) -> list[int]:
        sources = sources_of(Run(REAL[number].settings(cell, "paper"), 0), CPU, evaluation=evaluation)
        return [source.target.steps for source in sources]  # type: ignore[union-attr, misc]

    assert steps(3, {"sigma0": 0.1, "B": 0.1}) == [10] and steps(4, {"blocks": 1}) == [100]
    assert steps(5, {"grid": "uniform", "segments": 4}) == [25] * 4
    assert steps(5, {"grid": "uniform", "segments": 8}, evaluation=True) == [20] * 8
    assert min(steps(5, {"grid": "balanced", "segments": 16})) == 5


def test_requests_name_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, table in REAL.items():
        monkeypatch.setitem(TABLES, number, table)  # type: ignore[arg-type]
    whole = Request(tables=(1, 2, 3, 4, 5), seeds=10, teachers=("exact", "paper"))
    runs = whole.runs()
    assert len(runs) == len({run.digest() for run in runs})
    # Tables 1 and 2 share sigma0 = 0.1 at width 512; one segment is the same run on all four grids; signed is balanced.
    assert len(runs) == 10 * (15 + 25 - 5 + 2 * 16 + 2 * 5 + 2 * (1 + 3 * 4))
    assert len(Request(tables=(1, 2), only=("sigma0=1, t=0.9", "width=128")).runs()) == 6
    assert len(Request(tables=(1,), teachers=("paper",)).runs()) == 15, "a closed form has one teacher"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"tables": (6,)}, "tables must be some of 1, 2, 3, 4, 5; got 6"), ({"tables": ()}, "tables must name"),
        ({"tables": (1, 1)}, "each once"), ({"seeds": 0}, "seeds must be at least 1; got 0"),
        ({"teachers": ("best",)}, "teacher must be exact, paper or both; got best"),
        ({"variant": Variant(scale=0.0)}, "scale must be above 0"), ({"variant": Variant(scale=2.0)}, "scale must be"),
        ({"variant": Variant(precision="int8")}, "precision must be one of"),
        ({"variant": Variant(student="mlp")}, "student must be one of"),
        ({"only": ("sigma0",)}, "only must be name=value"),
        ({"only": ("sigma=1",)}, "only must name some of"), ({"only": ("t=0.2",)}, "only has no cell with t=0.2"),
        ({"only": ("t=0.5, B=0.1",)}, "names no cell"),
    ],
)  # fmt: skip
def test_requests_refuse_wrong_values_by_name(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Request(**values)


def test_at_std_one_the_signed_grid_is_the_balanced_one() -> None:
    mixture, process = REAL[5].base.mixture(0), OUProcess(5.0)
    grids = [time_grid(mixture, process, 8, kind=kind) for kind in ("signed", "balanced")]
    assert torch.equal(*grids)
    cells = [{"grid": kind, "segments": 8} for kind in ("signed", "balanced", "measured")]
    signed, balanced, measured = (REAL[5].settings(cell) for cell in cells)
    assert signed == balanced != measured
    assert replace(REAL[5], base=replace(REAL[5].base, std=0.5)).settings(cells[0]).grid == "signed"


def test_groups_hold_runs_of_equal_shape_within_the_limit() -> None:
    runs = Request(tables=(1, 3, 5), seeds=3).runs()
    groups = grouped(runs, torch.device("cuda"), most=20)
    assert sorted(run.digest() for group in groups for run in group.runs) == sorted(run.digest() for run in runs)
    for group in groups:
        assert group.size() <= 20 and len({run.settings.steps_per_segment() for run in group.runs}) == 1
    assert max(len(group.runs) for group in groups) == 20, "cells of a table go together"
    assert all(len(group.runs) == 1 for group in grouped(runs, CPU))
    assert len({group.digest() for group in groups}) == len(groups)


def test_processes_get_shares_of_equal_cost() -> None:
    """The costliest transformer has half of Table 4's cost: it goes alone to one of two processes."""
    groups = grouped([Run(REAL[4].settings(cell), 0) for cell in REAL[4].cells()], CPU)
    shares = [share(groups, rank, 2) for rank in range(2)]
    assert [[group.runs[0].settings.depth for group in one] for one in shares] == [[16], [1, 2, 4, 8]]
    many = grouped(Request(seeds=3).runs(), CPU)
    shares = [share(many, rank, 7) for rank in range(7)]
    assert sorted(group.digest() for one in shares for group in one) == sorted(group.digest() for group in many)


@pytest.mark.parametrize("student", ["transformer", "residual"])
def test_tables_with_blocks_train_either_student(student: Any, tmp_path: Path) -> None:
    request = Request(tables=(4,), only=("blocks=2",), variant=Variant(student=student))
    found = reproduce(request, tmp_path).results[4, (2,), "exact"]
    assert found.complete and found.records[0].settings["student"] == student
    assert 0 < found.records[0].metrics["error"] < 2


def test_a_run_is_evaluated_as_the_protocol_says(tmp_path: Path) -> None:
    """An identity student's errors by hand, from the same sources."""
    from flowfast import flow_map
    from flowfast.experiments.paper.evaluation import evaluate

    settings = TABLES[5].settings({"grid": "uniform", "segments": 2}, "exact")
    run = Run(replace(settings, evaluation_rows=2_100), 3)  # more than one chunk
    metrics = evaluate(run, [torch.nn.Identity()] * 2, CPU)
    source = sources_of(run, CPU)[1]
    x, y = (torch.cat(parts) for parts in _chunks(source))
    assert metrics["segments"][1] == pytest.approx(relative_mse(x, y), rel=1e-12)
    assert torch.equal(y, flow_map(x, source.mixture, source.process, 0.5, 0.0))
    assert metrics["worst_segment"] == max(metrics["segments"]) and metrics["times"] == [1.0, 0.5, 0.0]
    assert metrics["error"] == metrics["exact_error"] and metrics["teacher_error"] < 1e-6
    assert len(metrics["exponents"]) == 2 and metrics["exponents"][1] > metrics["exponents"][0] > 0
    ratio = Ratio()
    ratio.add(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]]))
    assert ratio.value() == 13 / 4


def test_teachers_differ_where_the_published_one_has_left_the_flow(tmp_path: Path) -> None:
    request = Request(tables=(3,), teachers=("exact", "paper"), only=("sigma0=0.001, B=0.25",))
    found = reproduce(request, tmp_path).results
    exact, paper = (found[3, (0.001, 0.25), name] for name in ("exact", "paper"))
    assert exact.mean("exact_error") == exact.mean("error") and paper.mean("exact_error") != paper.mean("error")
    assert exact.mean("teacher_error") == paper.mean("teacher_error")
    error = paper.mean("teacher_error")
    assert error is not None and error > 1


def test_weights_stay_within_the_bound(tmp_path: Path) -> None:
    from flowfast.experiments.paper.training import Training

    runs = [Run(replace(TABLES[3].settings({"sigma0": 0.1, "B": bound}), steps=300), 0) for bound in (0.1, 0.25)]
    for run in runs:
        training = Training(grouped([run], CPU)[0], tmp_path, CPU)
        training.run(lambda done, total, loss: None, every=9.0)
        (student,) = training.students(run)
        largest = max(
            float(weight.detach().abs().max()) for name, weight in student.named_parameters() if "weight" in name
        )
        bound = torch.tensor(run.settings.weight_bound)
        assert largest <= float(bound) and training.seconds(run) > 0
        training.forget()
    assert not any((tmp_path / "unfinished").iterdir())


def test_a_second_call_runs_nothing_and_more_seeds_add_to_it(tmp_path: Path) -> None:
    first = reproduce(FEW, tmp_path)
    before, events = (tmp_path / "runs.jsonl").read_bytes(), list[Progress]()
    again = reproduce(FEW, tmp_path, listener=events.append)
    assert not events and again.results == first.results and (tmp_path / "runs.jsonl").read_bytes() == before
    more = reproduce(replace(FEW, seeds=3, tables=(3, 5), only=(*FEW.only, "segments=1")), tmp_path)
    assert (tmp_path / "runs.jsonl").read_bytes().startswith(before) and more.missing() == 0
    assert len(more.results[3, (0.1, 0.1), "exact"].records) == 3 and len(more.records) == 6
    assert more.results[5, ("signed", 1), "exact"].mean() == more.results[5, ("uniform", 1), "exact"].mean()


def test_a_missing_run_is_a_hole_and_never_a_mean_over_fewer(tmp_path: Path) -> None:
    def cell(summary: Summary) -> Any:
        return summary.results[3, (0.1, 0.1), "exact"]

    whole = cell(reproduce(FEW, tmp_path))
    assert whole.complete and whole.mean() is not None and whole.std() is not None
    assert whole.difference() == pytest.approx((whole.mean() - 2.4876097e-05) / 6.84055241e-06)
    lines = (tmp_path / "runs.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_bytes(lines[0])
    hole = cell(summarise(tmp_path))
    assert (hole.wanted, len(hole.records), hole.complete) == (2, 1, False) and summarise(tmp_path).missing() == 1
    assert hole.mean() is None and hole.std() is None and hole.difference() is None and hole.each("times") is None
    (tmp_path / "runs.jsonl").write_bytes(lines[0] + lines[1][:40])  # a write that was cut off
    assert cell(summarise(tmp_path)).mean() is None
    reproduce(FEW, tmp_path)
    assert _metrics(tmp_path) == {json.loads(line)["digest"]: json.loads(line)["metrics"] for line in lines}
    assert (tmp_path / "runs.jsonl").read_bytes().count(b"\n") == 2


def test_a_rehearsal_is_smaller_and_says_so() -> None:
    settings = REAL[5].settings({"grid": "balanced", "segments": 8}, variant=Variant(scale=0.02))
    assert (settings.steps, settings.batch_size, settings.evaluation_rows) == (2_000, 20, 1_000)
    assert REAL[5].settings({"grid": "balanced", "segments": 16}, variant=Variant(scale=1e-4)).steps_per_segment() == 20
    assert Settings().scaled(1.0) == Settings()


@pytest.mark.parametrize("damage", ["not json", '{"digest": "x"}', "settings", "seed"])
def test_a_corrupt_line_is_named_and_nothing_is_overwritten(damage: str, tmp_path: Path) -> None:
    reproduce(FEW, tmp_path)
    path = tmp_path / "runs.jsonl"
    lines = path.read_text().splitlines()
    line = json.loads(lines[1])
    if damage == "settings":
        line["settings"]["steps"] += 1
    line["seed"] += damage == "seed"
    lines[1] = damage if damage[0] in "n{" else json.dumps(line)
    path.write_text("\n".join(lines) + "\n")
    before = _files(tmp_path)
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 2 is (no result|damaged)"):
        reproduce(FEW, tmp_path)
    assert _files(tmp_path) == before


def test_folders_of_other_experiments_are_refused_and_stay_as_they_are(tmp_path: Path) -> None:
    job, full, done = tmp_path / "job", tmp_path / "full", tmp_path / "done"
    for folder, name in ((job, "job.json"), (full, "thesis.tex")):
        folder.mkdir()
        (folder / name).write_text("{}")
    reproduce(FEW, done)
    (tmp_path / "file").write_text("")
    cases: list[tuple[Path, Request, str]] = [
        (job, FEW, "belongs to another experiment"), (full, FEW, "is not empty"), (tmp_path / "file", FEW, "is a file"),
        (tmp_path / "file" / "below", FEW, "cannot be written"),
        (done, replace(FEW, variant=Variant(scale=0.5)), "another experiment .scale is 1.0 there, 0.5 here"),
        (done, replace(FEW, variant=Variant(precision="bf16")), "precision is"),
    ]  # fmt: skip
    before = {folder: _files(folder) for folder in (job, full, done)}
    for folder, request, reason in cases:
        with pytest.raises(FolderError, match=reason):
            reproduce(request, folder)
    assert {folder: _files(folder) for folder in before} == before
    with pytest.raises(ValueError, match="holds no results of flowfast reproduce"):
        summarise(job)


def test_devices_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode of CUDA"):
        reproduce(replace(FEW, variant=Variant(precision="tf32")), tmp_path / "a")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="finds no CUDA device"):
            reproduce(FEW, tmp_path / "a", device="cuda")
    assert not (tmp_path / "a").exists()


def test_ranks_divide_the_runs_and_share_the_folder(tmp_path: Path) -> None:
    alone = reproduce(FEW, tmp_path / "alone")
    halves = [reproduce(FEW, tmp_path / "shared", rank=Rank(rank, 2)) for rank in range(2)]
    assert [half.missing() for half in halves] == [1, 0]
    assert {path.name for path in (tmp_path / "shared").glob("*.jsonl")} == {"runs-0.jsonl", "runs-1.jsonl"}
    assert _metrics(tmp_path / "shared") == {name: record.metrics for name, record in alone.records.items()}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Rank()), ({"RANK": "2", "WORLD_SIZE": "4"}, Rank(2, 4)),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"}, Rank(2, 3)),
    ],
)  # fmt: skip
def test_ranks_come_from_torchrun_or_slurm(environment: dict[str, str], expected: Rank) -> None:
    assert Rank.from_environment(environment) == expected


@pytest.mark.parametrize(
    "environment", [{"RANK": "1"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}]
)
def test_ranks_that_do_not_fit_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="RANK and WORLD_SIZE must be whole numbers that fit"):
        Rank.from_environment(environment)


def test_a_diverging_run_stays_a_hole_and_the_others_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flowfast.experiments.paper import training

    plain = training.student_of

    def wild(run: Run, segment: int) -> torch.nn.Module:
        student = plain(run, segment)
        if run.seed == 0:
            next(student.parameters()).data.fill_(float("nan"))
        return student

    monkeypatch.setattr(training, "student_of", wild)
    with pytest.raises(
        RuntimeError, match="1 runs diverged and stay holes, first: Table 3: sigma0=0.1, B=0.1.* seed 0"
    ):
        reproduce(FEW, tmp_path)
    assert [record.seed for record in read(tmp_path).values()] == [1]


def test_a_kill_after_the_last_result_leaves_nothing_behind(tmp_path: Path) -> None:
    reproduce(FEW, tmp_path)
    group = grouped(FEW.runs(), CPU)[0]
    place = tmp_path / "unfinished"
    left = [place / f"{group.digest()}{end}" for end in (".safetensors", ".json")]
    left.append(place / f".{group.digest()}.safetensors.part")
    for file in left:
        file.touch()
    reproduce(FEW, tmp_path)
    assert not any(place.iterdir())


def test_killed_at_ten_random_moments_the_results_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(ROOT / "tests" / "tiny_tables.py"),
        str(tmp_path / "killed"),
        "10",
        "1",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5, "most attempts were killed at work"
    assert len(_metrics(tmp_path / "whole")) == len(KILLED.runs())
    assert _metrics(tmp_path / "killed") == _metrics(tmp_path / "whole")
    assert not any((tmp_path / "killed" / "unfinished").iterdir())
