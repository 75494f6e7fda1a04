"""Properties that hold for every mixture: symmetries of the pointwise operations, composition of the flow."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import BACKENDS
from torch import Tensor

import flowfast
from flowfast import GaussianMixture, OUProcess, flow_map, signed_stability

PROCESS = OUProcess(5.0)


@st.composite
def problems(draw: st.DrawFn) -> tuple[GaussianMixture, Tensor, torch.Generator]:
    """A mixture (k, d up to 12) at any noise, and points of it."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    k, d = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    means = torch.randn(k, d, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0.1, 1.0, 5.0]))
    weights = torch.rand(k, generator=generator, dtype=torch.float64) + 0.01
    mixture = GaussianMixture(means, 10.0 ** draw(st.floats(-4, 0.5)), weights)
    return mixture, mixture.sample(6, generator=generator), generator


def _close(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert float((a - b).norm()) <= tolerance * (1 + float(b.norm()))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems())
def test_symmetries(backend: str, problem: tuple[GaussianMixture, Tensor, torch.Generator]) -> None:
    """Reordering the components, turning the space and changing the unit of length change nothing else."""
    mixture, x, generator = problem
    score = flowfast.score(x, mixture, backend=backend)
    weights = flowfast.posterior_weights(x, mixture, backend=backend)
    assert (weights >= 0).all() and float((weights.sum(-1) - 1).abs().max()) <= 1e-14
    order = torch.randperm(mixture.n_components, generator=generator)
    shuffled = GaussianMixture(mixture.means[order], mixture.std, mixture.weights[order])
    _close(flowfast.posterior_weights(x, shuffled, backend=backend), weights[:, order], 1e-9)
    turn = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=generator, dtype=torch.float64))[0]
    turned = GaussianMixture(mixture.means @ turn, mixture.std, mixture.weights)
    rounding = 1e-13 * (1 + float((mixture.means.abs().max() / mixture.std) ** 2))  # of turning x and the means
    _close(flowfast.score(x @ turn, turned, backend=backend) * mixture.std, score @ turn * mixture.std, rounding)
    doubled = GaussianMixture(2 * mixture.means, 2 * mixture.std, mixture.weights)  # exact in binary
    assert flowfast.score(2 * x, doubled, backend=backend).equal(score / 2)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(problem=problems(), middle=st.floats(0.01, 0.99))
def test_the_flow_composes_and_obeys_its_bound(
    backend: str, problem: tuple[GaussianMixture, Tensor, torch.Generator], middle: float
) -> None:
    mixture, data, generator = problem
    x = PROCESS.marginal(mixture, 1.0).sample(4, generator=generator)
    whole = flow_map(x, mixture, PROCESS, 1.0, 0.0, backend=backend)
    halves = flow_map(
        flow_map(x, mixture, PROCESS, 1.0, middle, backend=backend), mixture, PROCESS, middle, 0.0, backend=backend
    )
    bound = float(signed_stability(mixture, PROCESS, 1.0))
    assert float((whole - halves).norm()) <= 1e-8 * math.exp(min(bound, 12.0)) * float(whole.norm())
    nudge = 1e-6 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    moved = flow_map(x + nudge, mixture, PROCESS, 1.0, 0.0, backend=backend)
    if bound < 12.0:
        most = math.exp(bound) * nudge.norm(dim=1) + 1e-8 * whole.norm(dim=1)
        assert ((moved - whole).norm(dim=1) <= most).all()
