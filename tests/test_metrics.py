"""Error measures."""

from __future__ import annotations

import math

import pytest
import torch

from flowfast.metrics import relative_mse


def test_ratio_of_sums_not_mean_of_ratios():
    target = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    prediction = torch.tensor([[3.0, 5.0], [0.0, 3.0]])
    assert relative_mse(prediction, target) == (1 + 4) / 26
    assert relative_mse(target, target) == 0.0


def test_float32_is_summed_in_float64():
    target = torch.full((2_000_000,), 1.0)
    prediction = target + 2.0**-12  # the squares, 2^-24, vanish beside a float32 sum
    assert relative_mse(prediction, target) == pytest.approx(2.0**-24, rel=1e-12)
    exact = torch.full((3,), 1e-30)
    assert relative_mse(2 * exact, exact) == pytest.approx(1.0)  # the squares leave float32's range


def test_a_diverged_prediction_is_not_hidden():
    target = torch.ones(2, 2)
    assert math.isnan(relative_mse(torch.tensor([[1.0, math.nan], [1.0, 1.0]]), target))
    assert relative_mse(torch.tensor([[1.0, math.inf], [1.0, 1.0]]), target) == math.inf


@pytest.mark.parametrize(
    ("prediction", "target", "kind", "says"),
    [
        ([1.0], torch.ones(1), TypeError, "prediction must be a tensor"),
        (torch.ones(1), torch.ones(1, dtype=torch.int64), TypeError, "target must be a tensor of floating"),
        (torch.ones(2, 3), torch.ones(3, 2), ValueError, r"shape and device, \(3, 2\).*got \(2, 3\)"),
        (torch.ones(0, 3), torch.ones(0, 3), ValueError, "must not be empty"),
        (torch.ones(2), torch.zeros(2), ValueError, "zero everywhere"),
    ],
)
def test_wrong_calls(prediction, target, kind, says):
    with pytest.raises(kind, match=says):
        relative_mse(prediction, target)
