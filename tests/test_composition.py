"""Residual compositions: they are Euler steps of constructive networks, and their error is that of Theorem 3."""

from __future__ import annotations

import json
import math
from functools import cache

import pytest
import torch
from torch import Tensor

from flowfast import ConstructiveScoreNet, GaussianMixture, OUProcess, ResidualComposition, audit_network, cli, score
from flowfast.theory.composition_measure import (
    CompositionRow,
    Window,
    composition_rows,
    euler,
    learned_rows,
)
from flowfast.theory.measure import rate

PROCESS = OUProcess(5.0)


def _mixture() -> GaussianMixture:
    return GaussianMixture.random(3, 2, std=0.5, half_width=2.0, seed=1)


@cache
def _window() -> Window:
    """Points that are still noise at the end: no trajectory is near a decision, where Euler's error is not smooth."""
    return Window.of(_mixture(), PROCESS, 1.0, 0.4, n=400, seed=0)


@cache
def _rows() -> list[CompositionRow]:
    return composition_rows(_window(), (8, 16, 32, 64), (1e-2, 1e-6))


def test_blocks_are_euler_steps_of_score_networks() -> None:
    mixture, times = _mixture(), [0.8, 0.5, 0.2]
    net = ResidualComposition(mixture, PROCESS, 2, 0.05, t_from=0.8, t_to=0.2)
    scores = [ConstructiveScoreNet(mixture, PROCESS, t, 0.05) for t in times[:2]]
    x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    by_hand = x
    for k, s in enumerate(scores):
        h = times[k + 1] - times[k]
        by_hand = by_hand + h * -5.0 * (by_hand + s(by_hand))
    assert net.times.tolist() == pytest.approx(times, abs=1e-15)
    assert torch.allclose(net(x), by_hand, rtol=1e-12, atol=1e-12)
    assert torch.allclose(euler(x, scores, PROCESS, net.times), by_hand, rtol=1e-12, atol=1e-12)
    assert net.depth == sum(s.depth for s in scores) and net.width == max(s.width for s in scores)


def test_it_is_one_relu_requ_network() -> None:
    net = ResidualComposition(_mixture(), PROCESS, 3, 0.1, t_to=0.3)
    found = audit_network(net, 2)
    assert found.forbidden == () and (found.depth, found.width) == (net.depth, net.width)
    assert net.float()(torch.zeros(5, 2)).dtype == torch.float32


def test_small_eps_is_the_exact_score() -> None:
    window, mixture = _window(), _window().mixture
    net = ResidualComposition(mixture, PROCESS, 16, 1e-10, t_to=0.4)

    def exact(t: float) -> Tensor | object:
        marginal = PROCESS.marginal(mixture, t)
        return lambda x: score(x, marginal, backend="reference")

    end = euler(window.x, [exact(t) for t in net.times[:-1].tolist()], PROCESS, net.times)  # type: ignore[misc]
    # 16 scores within 1e-10 of a norm below 2, times beta h, grown by exp of the exponent at the most
    assert float((net(window.x) - end).norm(dim=1).max()) <= 16 * 1e-10 * 2 * 5 * 0.6 / 16 * math.exp(
        window.bound.exponent
    )


def test_error_falls_like_one_over_n_until_eps_takes_over() -> None:
    rows = {(row.eps, row.blocks): row for row in _rows()}
    counts = (16, 32, 64)
    # the next term of Euler's error, of order 1 / N^2, is some 1 / N of the first: a tenth of the rate at N = 16
    assert rate(counts, [rows[1e-6, count].error for count in counts]) == pytest.approx(1, abs=0.1)
    assert rate(counts, [rows[1e-6, count].median for count in counts]) == pytest.approx(1, abs=0.1)
    window = Window.of(GaussianMixture.random(20, 64, std=1.0, seed=0), PROCESS, 1.0, 0.5, n=100)
    rows = {(row.eps, row.blocks): row for row in composition_rows(window, (16, 32), (0.5, 1e-6))}
    assert rate((16, 32), [rows[1e-6, count].error for count in (16, 32)]) == pytest.approx(1, abs=0.1)
    assert rate((16, 32), [rows[0.5, count].error for count in (16, 32)]) < 0.5, "eps has taken over"
    assert rows[0.5, 32].error > 2 * rows[1e-6, 32].error


def test_the_bound_holds() -> None:
    window = _window()
    for row in _rows():
        assert math.log10(row.error) <= row.log10_bound
        direct = math.exp(window.bound.exponent) * (window.bound.drift / row.blocks + window.bound.scores * row.eps)
        assert row.log10_bound == pytest.approx(math.log10(direct), rel=1e-12)
    assert (window.bound.exponent, window.bound.drift > 0, window.bound.scores > 0) == (
        pytest.approx(float(_exponent())), True, True
    )  # fmt: skip


def _exponent() -> Tensor:
    """The integral of L from 0.4 to 1 by the trapezoid rule, whose error is below 1e-7 of it here."""
    from flowfast import stability_profile

    t = torch.linspace(0.4, 1.0, 4001, dtype=torch.float64)
    return torch.trapezoid(stability_profile(_mixture(), PROCESS, t), t)


def test_the_size_of_a_row_is_the_networks() -> None:
    row = _rows()[0]
    net = ResidualComposition(_window().mixture, PROCESS, row.blocks, row.eps, t_to=0.4)
    assert (row.depth, row.nonzero) == (net.depth, net.parameter_count.nonzero)
    off = net(_window().x) - _window().y
    assert row.error == pytest.approx(float(off.norm() / _window().y.norm()), rel=1e-12)


def test_learned_blocks_learn_and_come_out_the_same_again() -> None:
    short = learned_rows(_window(), (4,), steps=1)
    longer = learned_rows(_window(), (4,), steps=60)
    assert longer == learned_rows(_window(), (4,), steps=60)
    for before, after in zip(short, longer, strict=True):
        assert before.target == after.target and after.score_error < before.score_error and after.error < before.error
    assert longer != learned_rows(_window(), (4,), steps=60, seed=1)


def test_wrong_arguments_are_named() -> None:
    for blocks, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="blocks must be"):
            ResidualComposition(_mixture(), PROCESS, blocks, 0.1)  # type: ignore[arg-type]
    for t_from, t_to in ((0.2, 0.2), (0.5, -0.1), (math.nan, 0.0)):
        with pytest.raises(ValueError, match="t_from must lie above t_to"):
            ResidualComposition(_mixture(), PROCESS, 2, 0.1, t_from=t_from, t_to=t_to)
    with pytest.raises(ValueError, match="n must be at least 1"):
        Window.of(_mixture(), PROCESS, 1.0, 0.0, n=0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        learned_rows(_window(), (2,), steps=0)


def test_the_command_prints_tables_or_numbers(capsys: pytest.CaptureFixture[str], tmp_path: object) -> None:
    path = f"{tmp_path}/mixture.npz"
    _mixture().save(path)
    call = f"theory composition --means {path} --t-to 0.4 --blocks 8 16 --eps 1e-2 1e-6 --n 400 --steps 2 "
    assert cli.main((call + "--learned-blocks 2 --json").split()) == 0
    (window,) = json.loads(capsys.readouterr().out)["windows"]
    expected = {(row.blocks, row.eps): row.error for row in _rows()}
    for row in window["rows"]:
        assert row["error"] == pytest.approx(expected[row["blocks"], row["eps"]], rel=1e-9)
    finest = [row["error"] for row in window["rows"] if row["eps"] == 1e-6]
    assert window["rates"]["error"] == pytest.approx(math.log2(finest[0] / finest[1]))
    assert cli.main((call + "--learned-blocks 2").split()) == 0
    shown = capsys.readouterr().out
    assert "Theorem 3" in shown and "posterior mean" in shown and "bound: exp(" in shown
