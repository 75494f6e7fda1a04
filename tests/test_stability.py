"""Stability profile, its closed-form integrals, regimes, and the grids built on them."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad

from flowfast import (
    GaussianMixture,
    OUProcess,
    cumulative_stability,
    signed_stability,
    stability_profile,
    stability_regimes,
    time_grid,
)
from flowfast.grids import KINDS, paper_grid
from flowfast.stability import quadrature_stability

MEANS = GaussianMixture.random(20, 64).means.double()
SCHEDULES = {"constant": OUProcess(5.0), "linear": OUProcess(([0.0, 1.0], [0.1, 10.0]))}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sigma0", [1.0, 0.1, 0.01])
def test_cumulative_stability_is_the_integral_of_the_profile(sigma0: float, schedule: str) -> None:
    mixture, process = GaussianMixture(MEANS, sigma0), SCHEDULES[schedule]

    def rate_per_log_time(u: float) -> float:  # t = e^u spreads the steep beginning out
        return float(stability_profile(mixture, process, math.exp(u))) * math.exp(u)

    for t in (0.05, 1.0):
        cuts = [math.log(t) + k for k in range(-40, 1)]
        total = sum(
            quad(rate_per_log_time, *ends, epsrel=1e-12, epsabs=0)[0] for ends in zip(cuts, cuts[1:], strict=False)
        )
        assert float(cumulative_stability(mixture, process, t)) == pytest.approx(total, rel=1e-9)


def test_signed_exponent_is_sharper_by_the_squared_scale() -> None:
    mixture, process = GaussianMixture(MEANS, 0.1), SCHEDULES["constant"]
    gap = cumulative_stability(mixture, process, 1.0) - signed_stability(mixture, process, 1.0)
    assert float(gap) == pytest.approx(2 * math.log(float(process.std(1.0, 0.1)) / 0.1), rel=1e-9)


def test_papers_quadrature_goes_wrong_where_math_says() -> None:
    process = SCHEDULES["constant"]
    for sigma0, low, high in ((1.0, 0.0, 1e-6), (0.1, 1e-3, 3e-3), (0.01, 4.0, 4.3)):
        mixture = GaussianMixture(MEANS, sigma0)
        exact = float(cumulative_stability(mixture, process, 1.0))
        assert low <= abs(float(quadrature_stability(mixture, process)[1][-1]) / exact - 1) <= high


def test_regimes_cross_where_the_terms_are_equal() -> None:
    mixture, process = GaussianMixture(MEANS, 0.1), SCHEDULES["constant"]
    regimes = stability_regimes(mixture, process, kappa=2.0)
    assert regimes.t_shrink is not None and regimes.t_mix is not None
    assert float(process.std(regimes.t_shrink, 0.1)) ** -2 == pytest.approx(2.0, rel=1e-10)
    alpha, std = float(process.alpha(regimes.t_mix)), float(process.std(regimes.t_mix, 0.1))
    assert (alpha * mixture.diameter()) ** 2 / (4 * std**4) == pytest.approx(std**-2, rel=1e-10)
    assert [name for *_, name in regimes.intervals] == ["mixture", "noise"]
    assert regimes.intervals[0][0] == 0 and regimes.intervals[-1][1] == 1
    single = stability_regimes(GaussianMixture(MEANS[:1], 0.1), process)
    assert single.t_mix is None and [name for *_, name in single.intervals] == ["variance", "noise"]
    wide = stability_regimes(GaussianMixture(MEANS[:1], 1.0), process)
    assert wide.t_shrink is None and [name for *_, name in wide.intervals] == ["noise"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigma0", [1.0, 0.1, 1e-3])
def test_grids_decrease_between_exact_ends(kind: str, sigma0: float) -> None:
    for n in (1, 4, 7):
        times = time_grid(GaussianMixture(MEANS, sigma0), SCHEDULES["linear"], n, kind=kind, horizon=0.9)  # type: ignore[arg-type]
        assert times.shape == (n + 1,) and times.dtype == torch.float64
        assert times[0] == 0.9 and times[-1] == 0 and (times.diff() < 0).all()


@pytest.mark.parametrize(("kind", "exponent"), [("balanced", cumulative_stability), ("signed", signed_stability)])
@pytest.mark.parametrize("sigma0", [1.0, 0.1, 0.01])
def test_balanced_segments_have_equal_exponents(kind: str, exponent: object, sigma0: float) -> None:
    mixture, process = GaussianMixture(MEANS, sigma0), SCHEDULES["constant"]
    times = time_grid(mixture, process, 8, kind=kind)  # type: ignore[arg-type]
    shares = -exponent(mixture, process, times).diff()  # type: ignore[operator]
    torch.testing.assert_close(shares, shares.mean().expand(8), rtol=1e-10, atol=0)


def test_papers_grid_agrees_where_its_quadrature_is_right() -> None:
    mixture, process = GaussianMixture(MEANS, 1.0), SCHEDULES["constant"]
    torch.testing.assert_close(
        paper_grid(mixture, process, 8), time_grid(mixture, process, 8, kind="balanced"), rtol=0, atol=1e-6
    )


def test_measured_grid_cuts_the_window_of_decision() -> None:
    """On the paper's mixture the posterior decides between t = 0.38 and 0.76; the balanced grid has no point there."""
    mixture, process = GaussianMixture(MEANS, 1.0), SCHEDULES["constant"]

    def inside(kind: str) -> int:
        times = time_grid(mixture, process, 4, kind=kind)  # type: ignore[arg-type]
        return int(((times > 0.38) & (times < 0.76)).sum())

    assert inside("measured") >= 2 and inside("balanced") == 0


def test_grids_of_a_flow_that_nowhere_expands_are_uniform() -> None:
    still = GaussianMixture(torch.zeros(1, 3), 1.0)
    uniform = time_grid(still, SCHEDULES["constant"], 4)
    for kind in KINDS:
        assert time_grid(still, SCHEDULES["constant"], 4, kind=kind).equal(uniform)


def test_signed_grid_ignores_times_after_the_last_expansion() -> None:
    narrow = GaussianMixture(torch.tensor([[0.0], [0.5]], dtype=torch.float64), 0.1)
    times = time_grid(narrow, SCHEDULES["constant"], 4, kind="signed")
    rate = signed_stability(narrow, SCHEDULES["constant"], times)
    assert (times.diff() < 0).all() and float(rate[1]) > 0
