"""The composition study: what is trained, what predicts it, and that the document says what the stored lines say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from bench import composition_report
from flowfast import GaussianMixture, OUProcess, covariance_trace, posterior_weights, signed_stability
from flowfast.cli import main
from flowfast.experiments.composition.analysis import (
    Found,
    grid_ratios,
    rank_correlations,
    read_ingredients,
    read_runs,
    repeatability,
    spearman,
)
from flowfast.experiments.composition.curves import curves, largest_eigenvalue
from flowfast.experiments.composition.grids import times_of
from flowfast.experiments.composition.ingredients import name_of, run_ingredients
from flowfast.experiments.composition.lines import read
from flowfast.experiments.composition.phases import counts, phases
from flowfast.experiments.composition.predictors import AMPLIFICATIONS, DIFFICULTIES, SINGLES, predictions
from flowfast.experiments.composition.runner import run_study
from flowfast.experiments.composition.settings import Problem, Run
from flowfast.experiments.composition.studies import grid_study, phase_study
from flowfast.experiments.composition.training import Group, errors, grouped, student_of, train

PROBLEM = Problem(0.5, 3, 4)
TINY = Run(PROBLEM, "uniform", 2, "preconditioned", 16, batch_size=8, width=8, depth=1, points=64)
RUNS = [
    replace(TINY, grid=grid, student=student, seed=seed)
    for grid in ("uniform", "log-r", "random-0", "random-1", "measured")
    for student in ("preconditioned", "plain", "shared")
    for seed in (0, 1)
]


pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_document_shows_what_the_stored_lines_say() -> None:
    runs = read_runs(composition_report.GRID_FILE)
    known = read_ingredients(composition_report.INGREDIENT_FILE)
    found = phases(read_runs(composition_report.PHASE_FILE))
    within = composition_report.correlations(runs, known, lambda f: (f.run.problem, f.run.segments, f.run.seed))
    overall = composition_report.correlations(runs, known, lambda f: f.run.student)
    text = composition_report.DOCUMENT.read_text()
    for name, lines in composition_report.tables(runs, within, overall, found).items():
        assert composition_report.placed(text, name, lines) == text, f"python -m bench.composition_report ({name})"


def test_stored_runs_are_those_of_the_studies() -> None:
    for path, study in ((composition_report.GRID_FILE, grid_study()), (composition_report.PHASE_FILE, phase_study())):
        lines = [line for line in read(path) if "run" in line]
        assert {line["digest"] for line in lines} <= {run.digest() for run in study}
        for line in lines:
            assert Run.from_dict(line["run"]).digest() == line["digest"]
            assert len(line["local"]) == line["run"]["segments"] == len(line["times"]) - 1


def test_a_study_from_training_to_correlations(tmp_path: Path) -> None:
    """Every line is found again, and a stopped study ends with the lines of one that was never stopped."""
    whole, stopped, known = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl", tmp_path / "known.jsonl"
    run_study(RUNS, whole)
    run_study(RUNS[:12], stopped)
    stopped.write_bytes(stopped.read_bytes()[:-20])  # a write that was killed
    run_study(RUNS, stopped)
    again = stopped.read_bytes()
    run_study(RUNS, stopped)
    assert stopped.read_bytes() == again  # nothing is done twice
    once, twice = ({found.run: found for found in read_runs(path)} for path in (whole, stopped))
    assert set(once) == set(twice) == set(RUNS)
    for run, found in once.items():
        # other company changes the order of float32 sums: 1e-7 a product, through 16 steps of AdamW
        assert twice[run].error == pytest.approx(found.error, rel=1e-3)
    run_ingredients(RUNS, known)
    ingredients = read_ingredients(known)
    assert set(ingredients) == {name_of(PROBLEM, found.times) for found in once.values()}
    plain = [found for found in once.values() if found.run.student == "plain"]
    rho = rank_correlations(plain, ingredients, within=lambda found: found.run.seed)
    assert set(rho) == set(SINGLES) | {f"{a}*{b}" for a in DIFFICULTIES for b in AMPLIFICATIONS}
    assert all(-1 <= one.low <= one.value <= one.high <= 1 and one.groups == 2 for one in rho.values())
    again = repeatability(plain)
    assert again is not None and -1 <= again.value <= 1
    assert repeatability([found for found in plain if found.run.seed == 0]) is None
    with pytest.raises(ValueError, match="line 1 is damaged"):
        whole.write_text("{\n")
        run_study(RUNS, whole)


def test_every_budget_is_the_same() -> None:
    """Pairs seen in all do not depend on n or on the student; runs train together only where their shapes agree."""
    runs = [replace(TINY, segments=n, student=student) for n in (1, 2, 4, 8) for student in ("plain", "shared")]
    for run in runs:
        networks = 1 if run.shared else run.segments
        assert networks * run.updates() * run.rows() * (run.segments if run.shared else 1) == 16 * 8
    groups = grouped([*runs, replace(runs[0], grid="log-r", student="preconditioned")])
    assert sorted(len(group.runs) for group in groups) == [1, 1, 1, 1, 1, 1, 1, 2]
    with pytest.raises(ValueError, match="steps must be a multiple of segments=3"):
        replace(TINY, segments=3)
    with pytest.raises(ValueError, match="student must be one of"):
        replace(TINY, student="best")  # type: ignore[arg-type]


@pytest.mark.parametrize("student", ["plain", "preconditioned", "shared"])
def test_pairs_of_a_network_are_what_the_losses_compare(student: str) -> None:
    module = student_of(replace(TINY, student=student))  # type: ignore[arg-type]
    x_from, x_to = torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    losses = module.losses(x_from, x_to)
    for i in range(2):
        inputs, outputs = module.network_pair(i, x_from[i], x_to[i])
        network = module.networks[0 if student == "shared" else i]
        torch.testing.assert_close((network(inputs) - outputs).square().mean(), losses[i])


def test_training_learns() -> None:
    run = replace(TINY, steps=400, width=32)
    (student,) = train(Group((run,)))
    trained, fresh = errors(run, student), errors(run, student_of(run))
    assert trained["error"] < 0.5 * fresh["error"] and len(trained["local"]) == 2


def test_grids_decrease_and_are_reproducible() -> None:
    for grid in ("uniform", "measured", "log-r", "random-0", "random-1"):
        times = times_of(PROBLEM, grid, 5)
        assert times[0] == 1 and times[-1] == 0 and all(a > b for a, b in zip(times, times[1:], strict=False))
    assert times_of(PROBLEM, "random-0", 5) != times_of(PROBLEM, "random-2", 5)
    r = PROBLEM.process().snr_root(torch.tensor(times_of(PROBLEM, "log-r", 5)).double(), PROBLEM.std).log()
    torch.testing.assert_close(r.diff(), r.diff()[:1].expand(5))
    with pytest.raises(ValueError, match="grid must be one of"):
        times_of(PROBLEM, "random-x", 5)


def test_a_single_component_is_only_rescaled() -> None:
    """The flow of a single Gaussian is linear: every amplification is s_0 / s_t, and nothing is decided."""
    mixture, process = GaussianMixture(torch.zeros(1, 4, dtype=torch.float64), 0.3), OUProcess(5.0)
    found = curves(mixture, process, nodes=5, points=64, norm_points=8)
    # log s_0 / s_t with s^2 = 1 / (r^2 + (1 - sigma0^2) ...): from r = alpha / s alone, s^2 = 1 / (1 + r^2 (1 - s0^2))
    for i, log_r in enumerate(found.log_r):
        s = (1 + math.exp(2 * log_r) * (1 - 0.3**2)) ** -0.5
        for values in (found.direction, found.norm, found.finite):
            assert values[i] == pytest.approx(math.log(0.3 / s), abs=1e-6)  # RTOL of the derivative
    assert found.exact == found.trace == (0.0,) * 5


def test_largest_eigenvalue_is_that_of_the_covariance() -> None:
    for k, d in ((3, 5), (6, 2)):
        mixture = GaussianMixture.random(k, d, half_width=1.0, seed=k).to(torch.float64)
        x = mixture.sample(50, generator=torch.Generator().manual_seed(0))
        weights = posterior_weights(x, mixture)
        apart = mixture.means - (weights @ mixture.means)[:, None]
        covariance = torch.einsum("nk,nki,nkj->nij", weights, apart, apart)
        expected = torch.linalg.eigvalsh(covariance)[:, -1]
        torch.testing.assert_close(largest_eigenvalue(x, mixture), expected)
        assert bool((expected <= covariance_trace(x, mixture) * (1 + 1e-12)).all())


def test_rank_correlation_is_spearmans() -> None:
    generator = torch.Generator().manual_seed(0)
    table, wrong = torch.rand(9, 3, generator=generator).numpy(), torch.rand(9, generator=generator).numpy()
    table[3, 0] = table[4, 0]  # a tie
    table[:, 2] = 1.0
    expected = [spearmanr(table[:, i], wrong).statistic for i in (0, 1)]
    assert spearman(table, wrong).tolist() == pytest.approx([*expected, 0.0], abs=1e-12)


def test_predictions_sum_over_segments() -> None:
    names = ("paper", "signed", "trace", "exact", "norm_here", "spread", "change", "affine")
    found = {name: [2.0, 3.0] for name in names} | {"affine_composed": 0.5}
    found |= {f"to_data_{name}": [0.5, 0.0] for name in AMPLIFICATIONS if name != "one"}
    values = predictions(found, "plain", [0.1, 0.2])
    assert values["worst_exact"] == 3 and values["undivided"] == -0.5
    assert values["one*one"] == pytest.approx(math.log(2))
    assert values["affine*finite"] == pytest.approx(math.log(2 * math.e + 3))
    assert values["norm_here*paper"] == pytest.approx(math.log(math.e + 2))
    assert values["local*one"] == pytest.approx(math.log(0.3))
    huge = found | {"to_data_paper": [1e5, 0.0]}
    assert values["one*paper"] < predictions(huge, "plain", [0.1, 0.2])["one*paper"] == pytest.approx(2e5)


def test_verdicts_need_more_than_one_lucky_seed() -> None:
    def cell(problem: Problem, segments: int, wrong: tuple[float, ...]) -> list[Found]:
        first = replace(TINY, segments=segments, steps=16, problem=problem)
        return [
            Found(replace(first, problem=replace(problem, seed=seed), seed=seed), (1.0, 0.0), error, (error,))
            for seed, error in enumerate(wrong)
        ]

    alone, other = (0.4, 0.41, 0.42), replace(PROBLEM, std=0.1)
    runs = cell(PROBLEM, 1, alone) + cell(PROBLEM, 2, (0.2, 0.205, 0.21)) + cell(PROBLEM, 4, (0.8, 0.82, 0.84))
    runs += cell(other, 1, alone) + cell(other, 2, (0.1, 0.41, 1.0)) + cell(other, 4, (0.1,))  # one seed says nothing
    found = phases(runs)
    assert [(one.segments, one.verdict) for one in found] == [(2, "helps"), (4, "hurts"), (2, "open")]
    assert found[0].log_ratio == pytest.approx(-math.log(2)) and found[0].spread == pytest.approx(0, abs=1e-12)
    assert counts(found)["preconditioned", 16, 2] == {"helps": 1, "open": 1, "hurts": 0}
    ratios = grid_ratios([replace(one, run=replace(one.run, grid="uniform")) for one in runs], ["uniform"])
    assert ratios["uniform"].value == 1


def test_theory_stability_stays_below_the_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GaussianMixture.random(3, 4, std=0.4, seed=1).save(tmp_path / "mixture.npz")
    small = ["--means", str(tmp_path / "mixture.npz"), "--segments", "3", "--n", "32", "--nodes", "5"]
    assert main(["theory", "stability", *small, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [grid["kind"] for grid in said["grids"]] == ["uniform", "balanced", "measured"]
    mixture = GaussianMixture.load(tmp_path / "mixture.npz")
    for grid in said["grids"]:
        bound = -signed_stability(mixture, OUProcess(5.0), torch.tensor(grid["times"]).double()).diff()
        assert grid["signed"] == pytest.approx(bound.tolist()) and len(bound) == 3
        assert all(math.log(a) <= b + 1e-5 for a, b in zip(grid["norm_here"], grid["signed"], strict=True))
    assert main(["theory", "stability", *small]) == 0
    assert "measured grid" in capsys.readouterr().out
    assert main(["theory", "stability", *small, "--segments", "0"]) == 2
    assert "segments must be at least 1" in capsys.readouterr().err


def test_a_document_without_marks_is_refused() -> None:
    assert composition_report.placed("<!-- a -->\nold\n<!-- end of a -->", "a", ["new"]).splitlines()[1] == "new"
    with pytest.raises(ValueError, match="marks"):
        composition_report.placed("text", "a", [])
