"""The job: what it measures, that it goes on after a kill, that a folder belongs to one job."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_job import IMAGES, MIXTURE, PROCESS, SETTINGS, finished

from flowfast import GaussianMixture, TeacherDataset, flow_map, posterior_weights
from flowfast.distillation import Recipe
from flowfast.experiments import (
    Event,
    FolderError,
    JobResult,
    JobSettings,
    digits_mixture,
    digits_settings,
    run_job,
    sample_job,
)
from flowfast.experiments.figure_arrays import principal_axes, profile_times
from flowfast.experiments.folder import Clock, claim
from flowfast.experiments.settings import STORED
from flowfast.metrics import relative_mse
from flowfast.storage import read_tensors
from flowfast.students import FlowStudent

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
TIMED = {"seconds", "data_seconds", "training_seconds", "evaluation_seconds", "teacher_seconds", "student_seconds"}


def _untimed(result: JobResult) -> dict[str, object]:
    def strip(value: object) -> object:
        if isinstance(value, dict):
            return {name: strip(item) for name, item in value.items() if name not in TIMED}
        return [strip(item) for item in value] if isinstance(value, list | tuple) else value

    return strip(result.to_dict())  # type: ignore[return-value]


def test_errors_are_those_of_the_student_on_the_stored_points() -> None:
    result = finished()
    stored, _ = read_tensors(result.folder / "teacher.safetensors", "points")
    exact = flow_map(stored["noise"], MIXTURE, PROCESS, 1.0, 0.0)
    assert torch.equal(exact, stored["data"])
    for grid in result.grids:
        student = FlowStudent.load(result.folder / "grids" / grid.kind / "student")
        with torch.inference_mode():
            found = student(stored["noise"])
        # The path goes from grid time to grid time, the direct flow in one piece: equal to the flow's own tolerance.
        assert relative_mse(found, exact) == pytest.approx(grid.composed, rel=1e-3)
        labels = [posterior_weights(x, MIXTURE).argmax(-1) for x in (found, exact)]
        assert grid.same_component == pytest.approx(float((labels[0] == labels[1]).double().mean()), abs=0.03)
        assert grid.along[-1] == grid.composed and grid.along[0] == pytest.approx(grid.segments[0])


def test_numbers_fit_together() -> None:
    result = finished()
    assert [grid.kind for grid in result.grids] == ["balanced", "measured"]
    assert result.best().composed == min(grid.composed for grid in result.grids)
    balanced = result.grid("balanced")
    assert balanced.times[0] == 1.0 and balanced.times[-1] == 0.0
    assert balanced.exponents[0] == pytest.approx(balanced.exponents[1], rel=1e-8)
    for grid in result.grids:
        assert sum(grid.exponents) == pytest.approx(result.total_stability)
        assert grid.snr_roots[-1] == pytest.approx(1 / 0.2)
        assert 0 < grid.composed < 1 and all(count > 0 for count in grid.teacher_evaluations)
        assert min(grid.data_seconds, grid.training_seconds, grid.teacher_seconds, grid.student_seconds) > 0
        assert list(grid.quantiles) == sorted(grid.quantiles)
    assert result.teacher.evaluations_max >= result.teacher.evaluations > 0
    assert json.loads((result.folder / "results.json").read_text())["settings"]["name"] == "tiny"


def test_result_is_rebuilt_from_the_folder_alone(tmp_path: Path) -> None:
    result = finished()
    shutil.copytree(result.folder, tmp_path / "moved")
    moved = JobResult.load(tmp_path / "moved")
    assert replace(moved, folder=result.folder) == JobResult.load(result.folder)
    assert _untimed(moved) == _untimed(result)


def test_figure_arrays_have_the_documented_shapes() -> None:
    arrays = finished().arrays()
    assert arrays["profile_t"].shape == arrays["profile"].shape and bool((arrays["profile_t"].diff() > 0).all())
    assert arrays["measured_t"][-1] == arrays["profile_t"][-1] == 1.0
    worst = np.interp(arrays["measured_t"], arrays["profile_t"], arrays["profile"])
    assert (arrays["measured"].numpy() <= 1.01 * worst).all()
    assert arrays["teacher"].shape == arrays["student_balanced"].shape == (48, 2)
    images = finished(IMAGES).arrays()
    assert images["teacher"].shape == images["student_uniform"].shape == (6, 4)


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(tmp_path: Path) -> None:
    again = run_job(MIXTURE, PROCESS, SETTINGS, tmp_path / "again")
    assert _untimed(again) == _untimed(finished())
    other = run_job(MIXTURE, PROCESS, replace(SETTINGS, seed=1, grids=("balanced",)), tmp_path / "other")
    assert other.grid("balanced").composed != again.grid("balanced").composed


def test_a_job_on_a_stored_set_is_the_job_that_stored_it(tmp_path: Path) -> None:
    data = TeacherDataset(finished().folder / "grids" / "measured" / "teacher")
    settings = replace(SETTINGS, grids=(STORED,), data=data.plan.digest())
    result = run_job(MIXTURE, PROCESS, settings, tmp_path / "job", data=data)
    there, here = (asdict(job.grid(kind)) for job, kind in ((finished(), "measured"), (result, STORED)))
    assert {n: v for n, v in there.items() if n not in {*TIMED, "kind"}} == {
        n: v for n, v in here.items() if n not in {*TIMED, "kind"}
    }
    assert sample_job(tmp_path / "job", 3, grid=STORED)[1] == STORED


def test_a_stored_set_must_be_the_one_that_the_settings_name(tmp_path: Path) -> None:
    data = TeacherDataset(finished().folder / "grids" / "measured" / "teacher")
    stored = replace(SETTINGS, grids=(STORED,), data=data.plan.digest())
    for settings, given, says in (
        (SETTINGS, data, "data must be the teacher set that settings.data names, None"),
        (stored, None, "data must be the teacher set that settings.data names"),
        (replace(stored, segments=3), data, "segments must be that of the teacher set, 2; got 3"),
        (replace(stored, horizon=2.0), data, "horizon must be that of the teacher set, 1.0; got 2.0"),
    ):
        with pytest.raises(ValueError, match=says):
            run_job(MIXTURE, PROCESS, settings, tmp_path / "job", data=given)
    with pytest.raises(ValueError, match=r"grids must be \('stored',\) with data, and only then"):
        replace(SETTINGS, data="0" * 32)
    assert not (tmp_path / "job").exists()


def test_a_finished_job_is_not_repeated_and_global_randomness_is_untouched(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before, events = torch.get_rng_state(), list[Event]()
    run_job(MIXTURE, PROCESS, IMAGES, tmp_path / "job", listener=events.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert {event.stage for event in events} == {"exact flow", "teacher data", "training", "evaluation"}
    assert all(0 <= event.done <= event.total for event in events)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "job").rglob("*") if path.is_file()}
    events.clear()
    run_job(MIXTURE, PROCESS, IMAGES, tmp_path / "job", listener=events.append)
    assert not events
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "job").rglob("*") if p.is_file()} == written


@pytest.mark.parametrize("stage", ["teacher data", "training", "evaluation"])
def test_a_job_stopped_in_any_stage_goes_on_to_the_same_numbers(stage: str, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(event: Event) -> None:
        if event.stage == stage and event.grid == "measured" and event.done >= event.total // 2:
            raise Stop

    with pytest.raises(Stop):
        run_job(MIXTURE, PROCESS, SETTINGS, tmp_path, listener=stop)
    with pytest.raises(ValueError, match="unfinished job"):
        JobResult.load(tmp_path)
    events = list[Event]()
    result = run_job(MIXTURE, PROCESS, SETTINGS, tmp_path, listener=events.append)
    assert _untimed(result) == _untimed(finished())
    assert all(event.grid == "measured" for event in events), "the first grid is not repeated"


def test_a_killed_process_is_gone_on_with(tmp_path: Path) -> None:
    """kill -9 in the middle of a training; the next call ends with the bits of a job that was never stopped."""
    code = (
        "import os, signal, sys\n"
        "from tiny_job import MIXTURE, PROCESS, SETTINGS\n"
        "from flowfast.experiments import run_job\n"
        "def kill(event):\n"
        "    if event.stage == 'training' and event.grid == 'balanced' and event.done > 30:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "run_job(MIXTURE, PROCESS, SETTINGS, sys.argv[1], listener=kill)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "grids" / "balanced" / "checkpoint.safetensors").is_file()
    assert _untimed(run_job(MIXTURE, PROCESS, SETTINGS, tmp_path)) == _untimed(finished())


def test_another_jobs_folder_is_refused_with_the_differing_fields(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    shutil.copytree(finished().folder, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = replace(SETTINGS, segments=3, recipe=replace(SETTINGS.recipe, steps=61))
    with pytest.raises(FolderError, match=r"recipe\.steps is 60 there, 61 here; segments is 2 there, 3 here"):
        run_job(MIXTURE, PROCESS, other, folder)
    with pytest.raises(FolderError, match="mixture.digest"):
        run_job(GaussianMixture(MIXTURE.means * 1.5, 0.2), PROCESS, SETTINGS, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_folders_that_cannot_serve_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    for place, reason in (("full", "is not empty"), ("file", "is a file"), ("file/below", "cannot be written")):
        with pytest.raises(FolderError, match=reason):
            run_job(MIXTURE, PROCESS, SETTINGS, tmp_path / place)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    with claim(tmp_path / "used", {"a": 1}), pytest.raises(FolderError, match="is in use"):  # noqa: SIM117
        with claim(tmp_path / "used", {"a": 1}):
            pass


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("segments", 0), ("rows", 0), ("evaluation_rows", 0), ("pictures", 0), ("pictures", 5_000), ("seed", -1),
        ("horizon", 0.0), ("horizon", float("nan")), ("grids", ()), ("grids", ("square",)),
        ("grids", ("uniform", "uniform")),
    ],
)  # fmt: skip
def test_settings_refuse_wrong_values_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field} must"):
        replace(JobSettings(), **{field: value})  # type: ignore[arg-type]


def test_image_shape_must_fit() -> None:
    with pytest.raises(ValueError, match="image_shape 3 x 3 must hold as many pixels"):
        run_job(MIXTURE, PROCESS, replace(SETTINGS, image_shape=(3, 3)), "nowhere")
    assert not Path("nowhere").exists()


def test_a_diverging_training_is_a_failed_run_that_names_the_remedy(tmp_path: Path) -> None:
    wild = replace(SETTINGS, recipe=Recipe(steps=40, width=8, depth=2, learning_rate=1e30, clip_norm=1e30))
    with pytest.raises(RuntimeError, match="lower .*learning"):
        run_job(MIXTURE, PROCESS, wild, tmp_path)


def test_samples_come_from_the_student_named() -> None:
    result = finished()
    points, kind = sample_job(result.folder, 10, grid="balanced", seed=5)
    again, _ = sample_job(result.folder, 10, grid="balanced", seed=5)
    other, best = sample_job(result.folder, 10, seed=6)
    assert kind == "balanced" and best == result.best().kind
    assert points.shape == (10, 4) and torch.equal(points, again) and not torch.equal(points, other)
    # A student's law is close to the mixture's: within its range, around its mean.
    many, _ = sample_job(result.folder, 4_000)
    assert float((many.mean(0) - MIXTURE.means.mean(0)).abs().max()) < 0.15


def test_digits_are_the_main_job() -> None:
    mixture, settings = digits_mixture(), digits_settings()
    assert (mixture.n_components, mixture.dim, mixture.dtype) == (1_797, 64, torch.float32)
    assert float(mixture.means.min()) == -1.0 and float(mixture.means.max()) == 1.0
    assert float(mixture.std) == 0.15 and settings.image_shape == (8, 8)
    assert settings.grids == ("uniform", "balanced", "measured") and settings.segments == 4


def test_principal_axes_are_those_of_the_points() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, generator=generator) * torch.tensor([0.1, 5.0, 1.0]) + 7
    axes, origin, explained = principal_axes(x)
    assert float(axes[0, 1]) > 0.99 and float(axes[1, 2].abs()) > 0.99
    assert torch.allclose(origin, x.double().mean(0)) and float(explained[0]) > 0.9
    flat, _, shares = principal_axes(x[:, :1])
    assert flat.tolist() == [[1.0], [0.0]] and shares.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("std", [1e-6, 0.15, 1.0, 3.0])
def test_the_profile_starts_where_the_datas_own_std_rules(std: float) -> None:
    t = profile_times(GaussianMixture(MIXTURE.means, std), PROCESS, 2.0)
    assert t[-1] == 2.0 and bool((t.diff() > 0).all())
    assert float(PROCESS.std(t[0], std)) == pytest.approx(std, rel=0.03)


def test_a_clock_counts_all_attempts(tmp_path: Path) -> None:
    first = Clock(tmp_path / "clock.json", every=0.0)
    time.sleep(0.02)
    first.tick()
    assert Clock(tmp_path / "clock.json").seconds() >= 0.02
