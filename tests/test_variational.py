"""The flow's derivative: against differences of the flow, automatic differentiation, closed forms, and its bound."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowfast import (
    GaussianMixture,
    OUProcess,
    flow_amplification,
    flow_jacobian_product,
    flow_map,
    perturbation,
    signed_stability,
    variational,
)

PROCESS = OUProcess(5.0)
LINEAR = OUProcess(([0.0, 1.0], [0.1, 10.0]))
HALF, ALL = 1e-9, 1e-8  # error relative to |D Phi|: promised for half of the points, kept at all of these few


def _mixture(k: int, d: int, std: float) -> GaussianMixture:
    weights = torch.arange(1, k + 1, dtype=torch.float64)
    return GaussianMixture(GaussianMixture.random(k, d, half_width=2.0).means.double(), std, weights)


def _points(mixture: GaussianMixture, t: float, n: int, process: OUProcess = PROCESS) -> tuple[Tensor, Tensor]:
    """Points of time t, and unit vectors."""
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(n, mixture.dim, dtype=torch.float64, generator=generator)
    return process.marginal(mixture, t).sample(n, generator=generator), v / v.norm(dim=1, keepdim=True)


def _matrix(x: Tensor, mixture: GaussianMixture, t_from: float, t_to: float, *, transposed: bool = False) -> Tensor:
    """The whole derivative (n, d, d), a product with every unit vector, rows times columns at once."""
    n, d = x.shape
    points = x.repeat_interleave(d, 0)
    columns = flow_jacobian_product(
        points, torch.eye(d, dtype=x.dtype).repeat(n, 1), mixture, PROCESS, t_from, t_to, transposed=transposed
    )
    return columns.reshape(n, d, d).mT


@pytest.mark.parametrize(("k", "d", "std"), [(3, 2, 0.5), (4, 8, 0.1), (9, 3, 1.0)])
@pytest.mark.parametrize(("t_from", "t_to"), [(1.0, 0.0), (0.0, 0.4)])
def test_products_agree_with_differences_of_the_flow(k: int, d: int, std: float, t_from: float, t_to: float) -> None:
    mixture = _mixture(k, d, std)
    x, v = _points(mixture, t_from, 4)

    def away(e: float) -> Tensor:
        return flow_map(x + e * v, mixture, PROCESS, t_from, t_to, rtol=1e-13, atol=1e-15, backend="reference")

    h = 1e-4 * min(1.0, std if t_from == 0 else 1.0)  # central differences of order 4: error h^4, rounding 1e-13 / h
    differences = (8 * (away(h) - away(-h)) - (away(2 * h) - away(-2 * h))) / (12 * h)
    ours = flow_jacobian_product(x, v, mixture, PROCESS, t_from, t_to)
    error = (ours - differences).norm(dim=1) / flow_amplification(x, mixture, PROCESS, t_from, t_to)
    assert float(error.max()) <= 1e-7 and float(error.median()) <= HALF


@pytest.mark.parametrize(("k", "d"), [(3, 5), (6, 4)])
def test_the_whole_derivative_agrees_with_jacfwd_through_the_reference(k: int, d: int) -> None:
    mixture = _mixture(k, d, 0.3)
    x, _ = _points(mixture, 1.0, 3)

    def flow(shift: Tensor) -> Tensor:
        return flow_map(x + shift, mixture, PROCESS, 1.0, 0.0, rtol=1e-11, atol=1e-13, backend="reference")

    exact = torch.func.jacfwd(flow)(torch.zeros(d, dtype=torch.float64))  # (n, d, d)
    ours = _matrix(x, mixture, 1.0, 0.0)
    norm = torch.linalg.matrix_norm(exact, 2)
    assert float((torch.linalg.matrix_norm(ours - exact, 2) / norm).max()) <= ALL
    turned = _matrix(x, mixture, 1.0, 0.0, transposed=True)
    assert float((torch.linalg.matrix_norm(turned - exact.mT, 2) / norm).max()) <= ALL
    torch.testing.assert_close(flow_amplification(x, mixture, PROCESS, 1.0, 0.0), norm, rtol=ALL, atol=0)


@pytest.mark.parametrize("process", [PROCESS, LINEAR], ids=["constant", "linear"])
def test_a_single_gaussian_only_changes_scale(process: OUProcess) -> None:
    mixture = GaussianMixture(torch.full((1, 3), 7.0, dtype=torch.float64), 1e-3)
    x, v = _points(mixture, 1.0, 4, process)
    gain = 1e-3 / process.std(1.0, 1e-3)
    torch.testing.assert_close(flow_jacobian_product(x, v, mixture, process, 1.0, 0.0), gain * v, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        flow_amplification(x, mixture, process, 1.0, 0.0, log=True), gain.log().expand(4), rtol=1e-14, atol=0
    )


def test_errors_are_a_multiple_of_rtol() -> None:
    mixture = GaussianMixture(GaussianMixture.random(20, 64).means.double(), 0.1)
    x, v = _points(mixture, 1.0, 100)
    norm = flow_amplification(x, mixture, PROCESS, 1.0, 0.0, rtol=1e-11)
    exact = flow_jacobian_product(x, v, mixture, PROCESS, 1.0, 0.0, rtol=1e-11)
    for rtol in (1e-6, 1e-8):
        coarse = flow_amplification(x, mixture, PROCESS, 1.0, 0.0, rtol=rtol) / norm - 1
        moved = flow_jacobian_product(x, v, mixture, PROCESS, 1.0, 0.0, rtol=rtol) - exact
        for error in (coarse.abs(), moved.norm(dim=1) / norm):
            assert float(error.median()) <= 10 * rtol and float(error.quantile(0.99)) <= 1000 * rtol


def test_two_components_half_way_reach_the_signed_bound() -> None:
    """There the posterior stays (1/2, 1/2) and the covariance D^2/4: Eq. 9 holds with equality."""
    mixture = GaussianMixture(torch.tensor([[0.8, 0.0], [-0.8, 0.0]], dtype=torch.float64), 0.1)
    x = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    for t in (0.1, 1.0):
        bound = signed_stability(mixture, PROCESS, t)
        ours = flow_amplification(x, mixture, PROCESS, t, 0.0, log=True)
        assert float(ours) == pytest.approx(float(bound), rel=1e-9) and float(bound) > 15


def test_no_time_is_the_identity_and_back_again_undoes() -> None:
    mixture = _mixture(5, 3, 0.3)
    x, v = _points(mixture, 0.7, 6)
    assert flow_jacobian_product(x, v, mixture, PROCESS, 0.7, 0.7).allclose(v, rtol=1e-15, atol=1e-15)
    assert flow_amplification(x, mixture, PROCESS, 0.7, 0.7).allclose(torch.ones(6, dtype=torch.float64), rtol=1e-14)
    data = flow_map(x, mixture, PROCESS, 0.7, 0.0, rtol=1e-12)
    there = flow_jacobian_product(x, v, mixture, PROCESS, 0.7, 0.0)
    back = flow_jacobian_product(data, there, mixture, PROCESS, 0.0, 0.7)
    condition = flow_amplification(x, mixture, PROCESS, 0.7, 0.0) * flow_amplification(data, mixture, PROCESS, 0.0, 0.7)
    assert float(((back - v).norm(dim=1) / condition).max()) <= ALL


def test_the_iterated_norm_is_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = _mixture(8, 6, 0.5)
    x, _ = _points(mixture, 1.0, 4)
    exact = flow_amplification(x, mixture, PROCESS, 1.0, 0.0)
    monkeypatch.setattr(variational, "EXACT", 5)
    monkeypatch.setattr(variational, "BLOCK", 2)
    found = flow_amplification(x, mixture, PROCESS, 1.0, 0.0)
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=0)


def test_each_row_has_its_own_times_and_result(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = _mixture(5, 3, 0.3)
    x, v = _points(mixture, 0.5, 6)
    x, v = x.reshape(2, 3, 3), v.reshape(2, 3, 3)
    t_from, t_to = torch.tensor([[0.8], [0.3]]), torch.tensor([0.0, 0.1, 0.6])
    product = flow_jacobian_product(x, v, mixture, PROCESS, t_from, t_to)
    norm = flow_amplification(x, mixture, PROCESS, t_from, t_to)
    monkeypatch.setattr(perturbation, "CHUNK", 1)  # a chunk of one row, in all three places
    monkeypatch.setattr(variational, "CHUNK", 1)
    assert flow_jacobian_product(x, v, mixture, PROCESS, t_from, t_to).allclose(product, rtol=1e-12)
    assert norm.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = flow_amplification(x[i, j], mixture, PROCESS, float(t_from[i]), float(t_to[j]))
            assert float(alone) == pytest.approx(float(norm[i, j]), rel=1e-12)


def test_bad_rows_stay_alone_and_types_follow() -> None:
    mixture = _mixture(5, 3, 0.3)
    x, v = _points(mixture, 1.0, 3)
    x[1, 0], v[2, 1] = math.nan, math.inf
    product = flow_jacobian_product(x.float(), v.float(), mixture, PROCESS, 1.0, 0.0)
    assert product.dtype == torch.float32 and torch.isfinite(product).all(1).tolist() == [True, False, False]
    norm = flow_amplification(x.float(), mixture, PROCESS, 1.0, 0.0)
    assert norm.dtype == torch.float64 and torch.isfinite(norm).tolist() == [True, False, True]
    assert flow_amplification(x[:0], mixture, PROCESS, 1.0, 0.0).shape == (0,)
    assert flow_jacobian_product(x[:0], v[:0], mixture, PROCESS, 1.0, 0.0).shape == (0, 3)


def test_arguments_that_cannot_be_used_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = _mixture(5, 3, 0.3)
    x, v = _points(mixture, 1.0, 3)
    with pytest.raises(ValueError, match="v must match x"):
        flow_jacobian_product(x, v[:2], mixture, PROCESS, 1.0, 0.0)
    with pytest.raises(ValueError, match="rtol must lie between"):
        flow_amplification(x, mixture, PROCESS, 1.0, 0.0, rtol=0.0)
    with pytest.raises(ValueError, match="t_to must be a number or broadcast"):
        flow_amplification(x, mixture, PROCESS, 1.0, torch.zeros(2))
    edge = GaussianMixture(torch.tensor([[50.0], [-50.0]], dtype=torch.float64), 0.01)
    on_it = torch.zeros(1, 1, dtype=torch.float64)
    monkeypatch.setattr(perturbation, "MOST_STEPS", 50)
    with pytest.raises(RuntimeError, match="1 of 1 trajectories failed; that of row 0"):
        flow_amplification(on_it, edge, PROCESS, 1.0, 0.0)
