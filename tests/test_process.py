"""OUProcess: schedules, marginals, storage."""

from __future__ import annotations

import math

import pytest
import torch

from flowfast import GaussianMixture, OUProcess

T = torch.tensor([0.0, 1e-9, 0.1, 0.5, 1.0], dtype=torch.float64)


def test_constant_beta_in_closed_form() -> None:
    process = OUProcess(5.0)
    torch.testing.assert_close(process.alpha(T), torch.exp(-5 * T))
    exact = torch.tensor(
        [math.sqrt(math.exp(-10 * t) * 1e-16 - math.expm1(-10 * t)) for t in T.tolist()], dtype=torch.float64
    )
    torch.testing.assert_close(process.std(T, 1e-8), exact, rtol=1e-15, atol=0)
    assert process.snr_root(0.0, 0.25) == 4 and process.beta(0.3) == 5


def test_callable_and_table_agree_with_the_closed_form() -> None:
    def linear(t: float) -> float:
        return 0.1 + 19.9 * t

    exact = torch.exp(-(0.1 * T + 19.9 * T**2 / 2))
    for process in (OUProcess(linear), OUProcess(([0.0, 0.3, 1.0], [linear(0.0), linear(0.3), linear(1.0)]))):
        torch.testing.assert_close(process.alpha(T), exact, rtol=1e-12, atol=0)
        torch.testing.assert_close(process.beta(T), 0.1 + 19.9 * T)
        assert float(process.alpha(0.5)) == pytest.approx(float(exact[3]), rel=1e-12)


def test_marginal_is_the_mixture_of_the_moved_components() -> None:
    mixture = GaussianMixture.random(3, 2, std=0.5)
    marginal = OUProcess(2.0).marginal(mixture, 0.25)
    torch.testing.assert_close(marginal.means, math.exp(-0.5) * mixture.means)
    assert float(marginal.std) == pytest.approx(math.sqrt(math.exp(-1) * 0.25 + 1 - math.exp(-1)), rel=1e-15)
    assert marginal.log_weights.equal(mixture.log_weights)
    same = OUProcess(2.0).marginal(mixture, 0.0)
    assert same.means.equal(mixture.means) and float(same.std) == pytest.approx(0.5, rel=1e-15)


def test_storage_round_trip() -> None:
    for process in (OUProcess(3.0), OUProcess(([0.0, 1.0], [1.0, 4.0]))):
        again = OUProcess.from_dict(process.to_dict())
        assert again.alpha(T).equal(process.alpha(T)) and again.to_dict() == process.to_dict()
    with pytest.raises(ValueError, match="beta is a callable"):
        OUProcess(lambda t: 1.0).to_dict()
