"""Theorem 2: the calculator's figures, measured Lipschitz constants beside their bounds, the table of both."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import Tensor, nn

from flowfast import (
    MLP,
    FlowStudent,
    GaussianMixture,
    OUProcess,
    ResidualFlowMap,
    TransformerFlowMap,
    cli,
    cumulative_stability,
    flow_amplification,
    lipschitz_constant,
    lipschitz_mismatch,
    log_lipschitz_bound,
    signed_stability,
    stability_profile,
)
from flowfast.perturbation import MOST_STEPS
from flowfast.students.flow_student import SegmentTable
from flowfast.theory.lipschitz import RTOL, tail_flow
from flowfast.theory.tail_students import tail_students

PROCESS = OUProcess(5.0)
SCHEDULES = {"constant": PROCESS, "linear": OUProcess(([0.0, 1.0], [0.1, 10.0]))}
PAPER = GaussianMixture.random(20, 64)
LOOSE = 1e-6  # rtol of the searches over many mixtures; ten thousand steps of it are a hundredth in the exponent


def _pair(distance: float, std: float) -> GaussianMixture:
    return GaussianMixture(torch.tensor([[distance / 2, 0.0], [-distance / 2, 0.0]], dtype=torch.float64), std)


@st.composite
def flows(draw: st.DrawFn) -> tuple[GaussianMixture, float, float, torch.Generator]:
    """A mixture (k <= 12, d <= 8, any noise) and two times, the later one first."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    k, d = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    means = torch.randn(k, d, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0.1, 1.0, 5.0]))
    weights = torch.rand(k, generator=generator, dtype=torch.float64) + 0.01
    mixture = GaussianMixture(means, 10.0 ** draw(st.floats(-3, 0.5)), draw(st.sampled_from([None, weights])))
    early, late = sorted(draw(st.tuples(st.just(0.0) | st.floats(0.0, 0.5), st.floats(0.01, 1.0))))
    return mixture, late, early, generator


@settings(max_examples=100, deadline=None, derandomize=True)
@given(flow=flows())
def test_amplification_never_exceeds_the_signed_bound_nor_that_the_papers(
    flow: tuple[GaussianMixture, float, float, torch.Generator],
) -> None:
    mixture, late, early, generator = flow
    marginal, means = PROCESS.marginal(mixture, late), PROCESS.marginal(mixture, late).means
    x = marginal.sample(6, generator=generator)
    if mixture.diameter() < 6 * mixture.std:  # on a boundary the number of steps grows with the exponent
        x = torch.cat([x, (means[:1] + means) / 2, means.mean(0, keepdim=True)])
    measured = flow_amplification(x, mixture, PROCESS, late, early, log=True, rtol=LOOSE)
    signed = signed_stability(mixture, PROCESS, late) - signed_stability(mixture, PROCESS, early)
    paper = cumulative_stability(mixture, PROCESS, late) - cumulative_stability(mixture, PROCESS, early)
    rounding = 1e-14 * float(cumulative_stability(mixture, PROCESS, late))
    assert float(measured.max()) <= float(signed) + LOOSE * MOST_STEPS + rounding  # every step may err by rtol
    assert float(signed) <= float(paper) + rounding


@settings(max_examples=20, deadline=None, derandomize=True)
@given(flow=flows())
def test_towards_noise_nothing_expands_in_y(flow: tuple[GaussianMixture, float, float, torch.Generator]) -> None:
    mixture, late, early, generator = flow
    x = PROCESS.marginal(mixture, early).sample(6, generator=generator)
    back = flow_amplification(x, mixture, PROCESS, early, late, log=True, rtol=LOOSE)
    shrink = float(PROCESS.std(late, mixture.std).log() - PROCESS.std(early, mixture.std).log())
    assert float(back.max()) <= shrink + LOOSE * MOST_STEPS


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sigma0", [2.0, 1.0, 0.1, 1e-3])
def test_exponents_are_integrals_over_the_tail_window(sigma0: float, schedule: str) -> None:
    mixture, process = GaussianMixture(PAPER.means.double(), sigma0), SCHEDULES[schedule]
    found = lipschitz_mismatch(mixture, process, 5, 512, 0.1)
    assert float(process.alpha(found.window)) ** 2 == pytest.approx(0.5, rel=1e-12)

    def rate_per_log_time(u: float) -> float:
        return float(stability_profile(mixture, process, math.exp(u))) * math.exp(u)

    cuts = [math.log(found.window) + 2 * i for i in range(-20, 1)]
    total = sum(quad(rate_per_log_time, *ends, epsrel=1e-10)[0] for ends in zip(cuts, cuts[1:], strict=False))
    assert found.exponent == pytest.approx(total, rel=1e-8)
    assert found.exponent == pytest.approx(float(cumulative_stability(mixture, process, found.window)), rel=1e-12)
    assert found.signed == pytest.approx(float(signed_stability(mixture, process, found.window)), rel=1e-12)
    if sigma0 <= 1:
        assert found.lower_bound is not None and found.lower_bound <= found.spread * (1 + 1e-15)
    else:
        assert found.lower_bound is None


@pytest.mark.parametrize("bound", [0.1, 0.01])
def test_thresholds_are_where_exponent_and_budget_meet(bound: float) -> None:
    found = lipschitz_mismatch(GaussianMixture(PAPER.means.double(), 0.1), PROCESS, 5, 512, bound)
    assert found.budget == pytest.approx(5 * math.log(512 * bound), rel=1e-14) and found.unfavourable
    for name in ("threshold", "exact_threshold"):
        mixture = GaussianMixture(PAPER.means.double(), getattr(found, name))
        there = lipschitz_mismatch(mixture, PROCESS, 5, 512, bound)
        term = there.spread if name == "exact_threshold" else (there.diameter / there.sigma0) ** 2 / 16
        assert term == pytest.approx(there.budget, rel=1e-12)
    tame = lipschitz_mismatch(GaussianMixture(0.1 * PAPER.means.double(), 1.0), PROCESS, 5, 512, bound)
    assert not tame.unfavourable and tame.exact_threshold < 1


def test_a_network_that_must_contract_is_always_unfavourable() -> None:
    found = lipschitz_mismatch(GaussianMixture(PAPER.means, 1.0), PROCESS, 5, 512, 0.001)
    assert found.budget < 0 and found.threshold == found.exact_threshold == math.inf and found.unfavourable


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth must be at least 1"),
        ({"width": 0}, "width must be at least 1"),
        ({"bound": 0.0}, "bound must be positive"),
        ({"bound": math.nan}, "bound must be positive"),
        ({"constant": -1.0}, "constant must be positive"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lipschitz_mismatch(PAPER, PROCESS, **{"depth": 5, "width": 512, "bound": 0.1, **arguments})  # type: ignore[arg-type]


def test_a_schedule_that_ends_too_early_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha\\^2 fall to 1/2"):
        lipschitz_mismatch(PAPER, OUProcess(([0.0, 1.0], [0.1, 0.1])), 5, 512, 0.1)


def _network(dim: int, out: int, activation: str = "relu", *, width: int = 16, seed: int = 0) -> MLP:
    generator = torch.Generator().manual_seed(seed)
    return MLP(dim, out, width=width, depth=3, activation=activation, generator=generator).double()  # type: ignore[arg-type]


def _students() -> dict[str, Callable[[Tensor], Tensor]]:
    generator = torch.Generator().manual_seed(3)
    flow = FlowStudent(6, SegmentTable((0.01, 0.5, 2.0), (1.0, 0.9, 0.5)), width=16, depth=2, dtype=torch.float64)
    return {
        "relu": _network(6, 6),
        "relu-requ": _network(6, 4, "relu-requ"),
        "segment": lambda x: flow.segment(1, x),
        "composed": flow,
        "residual": ResidualFlowMap(6, blocks=2, width=16, generator=generator).double(),
        "transformer": TransformerFlowMap(6, blocks=1, width=8, heads=2, generator=generator).double(),
    }


@pytest.mark.parametrize("name", _students())
def test_local_constants_are_norms_of_the_jacobian(name: str) -> None:
    student = _students()[name]
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    jacobian = [torch.autograd.functional.jacobian(lambda row: student(row[None])[0], row) for row in x]
    values = torch.linalg.svdvals(torch.stack(jacobian))  # type: ignore[arg-type]
    found = lipschitz_constant(student, x, iterations=200)
    left = 6 * 1e4 * (values[:, 1] / values[:, 0]) ** 400  # of six directions, unless the first is hit at below 1 %
    assert (found <= values[:, 0] * (1 + 1e-12)).all()
    assert (found >= values[:, 0] * (1 - 1e-9 - left)).all() and float(left.median()) <= 1e-3
    assert lipschitz_constant(student, x[:0]).shape == (0,)


def test_points_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(TypeError, match="x must be a float32 or float64 tensor"):
        lipschitz_constant(_network(6, 6), torch.zeros(6, dtype=torch.float64))
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        lipschitz_constant(_network(6, 6), torch.zeros(2, 6, dtype=torch.float64), iterations=0)
    with pytest.raises(ValueError, match="student must answer"):
        lipschitz_constant(lambda x: x.sum(0, keepdim=True), torch.zeros(2, 6))


def test_the_layers_product_bounds_every_local_constant() -> None:
    x = torch.randn(500, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for seed in range(5):
        network = _network(6, 6, seed=seed)
        assert log_lipschitz_bound(network) >= math.log(float(lipschitz_constant(network, x).max()))
        squares = _network(6, 6, "relu-requ", seed=seed)
        for layer in squares.layers:
            nn.init.uniform_(layer.bias, -1, 1, generator=torch.Generator().manual_seed(seed))
        radius = float(x.norm(dim=1).max())
        reached = float(lipschitz_constant(squares, x).max())
        assert log_lipschitz_bound(squares, radius=radius) >= math.log(reached)
    with pytest.raises(ValueError, match="radius is needed"):
        log_lipschitz_bound(squares)
    with pytest.raises(TypeError, match="student must be an MLP"):
        log_lipschitz_bound(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_the_budget_is_reached_by_equal_weights_and_no_others() -> None:
    """Equal weights of size B and positive inputs: every matrix has norm W B, and no ReLU is idle."""
    network = _network(16, 16)
    budget = lipschitz_mismatch(PAPER, PROCESS, 4, 16, 0.25).budget
    for layer in network.layers:
        nn.init.constant_(layer.weight, 0.25)
    assert log_lipschitz_bound(network) == pytest.approx(budget, rel=1e-12)
    there = lipschitz_constant(network, torch.ones(1, 16, dtype=torch.float64))
    assert math.log(float(there)) == pytest.approx(budget, rel=1e-12)
    for layer in network.layers:
        nn.init.uniform_(layer.weight, -0.25, 0.25, generator=torch.Generator().manual_seed(0))
    assert log_lipschitz_bound(network) < budget


def test_the_tail_of_a_single_gaussian_and_of_a_pair() -> None:
    alone = tail_flow(GaussianMixture(torch.zeros(1, 2), 0.1), PROCESS, 0.07, points=10)
    shrink = math.log(0.1) - math.log(float(PROCESS.std(0.07, 0.1)))
    assert alone.mean == pytest.approx(shrink) and alone.largest == pytest.approx(shrink) and alone.between is None
    mixture = _pair(0.6, 0.1)
    both = tail_flow(mixture, PROCESS, 0.07, points=100)
    bound = float(signed_stability(mixture, PROCESS, 0.07))
    assert both.between == pytest.approx(bound, rel=1e-6) and shrink < both.mean < both.largest <= bound


def test_students_of_the_tail_stay_within_bound_and_budget() -> None:
    mixtures = [GaussianMixture(PAPER.means[:3, :4], std) for std in (0.5, 0.1)]
    window = lipschitz_mismatch(mixtures[0], PROCESS, 3, 16, 0.2).window
    found = tail_students(mixtures, PROCESS, window, bound=0.2, steps=30, width=16, depth=2, batch=32, points=50)
    assert len(found) == 2 and found[0] != found[1]
    for student in found:
        assert 0 < student.error < 2 and student.entry <= float(torch.tensor(0.2))
        assert student.mean <= student.largest <= student.layers <= 3 * math.log(16 * 0.2)
    again = tail_students(mixtures[:1], PROCESS, window, bound=0.2, steps=30, width=16, depth=2, batch=32, points=50)
    assert again == found[:1]


def test_the_command_prints_what_the_library_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    means = PAPER.means[:4, :5] / 4
    np.save(tmp_path / "means.npy", means.numpy())
    call = f"theory lipschitz --means {tmp_path}/means.npy --stds 1 0.2 --n 20 --width 16 --depth 2 --train 2 --seed 4"
    assert cli.main([*call.split(), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert [row["sigma0"] for row in numbers["rows"]] == pytest.approx([1, 0.2])
    for row in numbers["rows"]:
        mixture = GaussianMixture(means, row["sigma0"])
        expected = lipschitz_mismatch(mixture, PROCESS, 3, 16, 0.1)
        for name in ("exponent", "signed", "lower_bound", "budget", "threshold", "exact_threshold", "unfavourable"):
            assert row[name] == getattr(expected, name)
        assert row["flow"] == asdict(tail_flow(mixture, PROCESS, expected.window, points=20, seed=4))
        assert max(row["flow"]["largest"], row["flow"]["between"]) <= row["signed"] + RTOL * MOST_STEPS
        whole = tail_flow(mixture, PROCESS, 1.0, points=20, seed=4)
        bounds = [float(bound(mixture, PROCESS, 1.0)) for bound in (signed_stability, cumulative_stability)]
        assert row["whole"] == {**asdict(whole), "signed": bounds[0], "exponent": bounds[1]}
        assert row["student"]["largest"] <= row["student"]["layers"] <= row["budget"]
    assert cli.main(call.split()) == 0
    shown = capsys.readouterr().out
    assert "sigma*" in shown and "signed bound" in shown and "student" in shown


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--stds 0.1 0", "--stds must be positive"),
        ("--n 0", "--n must be at least 1"),
        ("--train -1", "--train must be at least 0"),
        ("--bound nan", "--bound must be positive"),
        ("--depth -1", "--depth must be at least 1"),
        ("--horizon 0", "--horizon must be positive"),
        ("--beta 0", "--beta must be positive"),
        ("--means missing.npy", "--means file missing.npy does not exist"),
    ],
)
def test_wrong_calls_are_one_sentence(wrong: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["theory", "lipschitz", *wrong.split()]) == 2
    assert message in capsys.readouterr().err
