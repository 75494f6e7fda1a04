"""Pointwise operations against 50-digit arithmetic: the accuracy contract of flowfast/ops.py."""

from __future__ import annotations

import mpmath
import pytest
import torch
from problems import BACKENDS, Case, Truth, cases, distance, solve
from tolerances import pointwise

import flowfast

DTYPES = (torch.float32, torch.float64)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def solved(request: pytest.FixtureRequest) -> list[tuple[Case, list[Truth]]]:
    """Every case of one dtype with the truth of every row."""
    return [(case, [solve(case, row) for row in range(len(case.x))]) for case in cases(request.param)]


def _errors(case: Case, truths: list[Truth], backend: str) -> dict[str, list[float]]:
    """Relative error of every operation at every row, norm-wise, in the scale that docs/math.md states."""
    mixture = case.mixture
    out = {
        "log_density": flowfast.log_density(case.x, mixture, backend=backend)[:, None],
        "weights": flowfast.posterior_weights(case.x, mixture, backend=backend),
        "score": flowfast.score(case.x, mixture, backend=backend),
        "hvp": flowfast.hessian_vector_product(case.x, case.v, mixture, backend=backend),
    }
    errors: dict[str, list[float]] = {name: [] for name in out}
    for row, truth in enumerate(truths):
        exact = {
            "log_density": ([truth.log_density], abs(truth.log_density)),
            "weights": (truth.weights, mpmath.sqrt(mpmath.fdot(truth.weights, truth.weights))),
            "score": (truth.score, truth.spread),
            "hvp": (truth.hvp, truth.curvature),
        }
        for name, (values, scale) in exact.items():
            error = distance(out[name][row].tolist(), values)
            errors[name].append(float(error / scale) if scale else float("inf") * error if error else 0.0)
    return errors


@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_fifty_digits(solved: list[tuple[Case, list[Truth]]], backend: str) -> None:
    worst: dict[str, tuple[float, str]] = {}
    for case, truths in solved:
        largest = float(case.mixture.means.double().norm(dim=1).max())
        allowed = pointwise(case.x.dtype, largest, float(case.mixture.std))
        for name, errors in _errors(case, truths, backend).items():
            share = max(errors) / allowed
            assert share == share, (name, case.name)
            worst[name] = max(worst.get(name, (0.0, "")), (share, case.name))
    assert all(share <= 1 for share, _ in worst.values()), worst


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_way_weights_follow_the_last_bit(backend: str) -> None:
    """One ulp to the left or right of the middle decides at std = 1e-8; plain float64 logits are off by hundreds."""
    mixture = flowfast.GaussianMixture(torch.tensor([[-3.0], [3.0 + 2**-40]], dtype=torch.float64), 1e-8)
    middle = torch.tensor([[2**-41]], dtype=torch.float64)  # exactly half-way
    ulp = 2.0**-60
    weights = flowfast.posterior_weights(torch.cat([middle - ulp, middle, middle + ulp]), mixture, backend=backend)
    tilt = 6.0 * ulp / 1e-16  # logit difference per ulp: (m_2 - m_1) ulp / std^2
    expected = torch.sigmoid(torch.tensor([-tilt, 0.0, tilt], dtype=torch.float64))
    torch.testing.assert_close(weights[:, 1], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hessian_norm_bound_is_never_below_the_norm(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    points = 0
    for k, d, std in ((2, 1, 1.0), (5, 3, 0.5), (20, 16, 2.0), (7, 4, 0.05), (4, 3, 1e-3)):
        means = torch.randn(k, d, generator=generator, dtype=torch.float64) * 3
        means[-1] = means[0] + 1e-3  # near-duplicates: tr C must not lose its digits
        mixture = flowfast.GaussianMixture(means, std)
        middle = (means[torch.randint(k, (100,), generator=generator)] + means[0]) / 2
        x = torch.cat([mixture.sample(100, generator=generator), middle])
        weights = flowfast.posterior_weights(x, mixture, backend="reference")
        away = means - means[weights.argmax(1)][:, None]  # (n, k, d), exact differences where it matters
        away = away - (weights[..., None] * away).sum(1, keepdim=True)
        covariance = torch.einsum("nk,nki,nkj->nij", weights, away, away)
        norm = torch.linalg.eigvalsh(covariance / std**4 - torch.eye(d).double() / std**2).abs().amax(1)
        bounds = [flowfast.hessian_norm_bound(x, mixture, kind=kind, backend=backend) for kind in ("trace", "global")]
        exact = flowfast.hessian_norm_bound(x, mixture, kind="exact", backend=backend)
        assert (bounds[0] >= norm).all() and (bounds[1] >= bounds[0]).all()
        torch.testing.assert_close(exact, norm, rtol=1e-9, atol=0)
        single = flowfast.hessian_norm_bound(x.float(), mixture.to(torch.float32), backend=backend)
        assert torch.isfinite(single).all()
        points += len(x)
    assert points == 1000
