"""torch.compile over the operations: whole graphs, any number of points from one compilation, forward and backward."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import flowfast
from flowfast import GaussianMixture, MixtureScore, OUProcess

DEVICE = os.environ.get("FLOWFAST_TEST_DEVICE", "cpu")
PROCESS = OUProcess(5.0)
Work = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    """Every compilation starts from nothing, and a second one of the same function is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def _mixture(dtype: torch.dtype = torch.float64) -> GaussianMixture:
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return GaussianMixture(means.to(DEVICE, dtype), 0.7, torch.rand(6, generator=generator) + 0.2)


def _points(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return 2 * torch.randn(n, 5, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def _compiled(work: Work, backend: str = "aot_eager", *, dynamic: bool = True) -> Work:
    return torch.compile(work, fullgraph=True, dynamic=dynamic, backend=backend)


def _gradient(work: Work, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = work(x)
    return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]


def _works(mixture: GaussianMixture) -> dict[str, Work]:
    module = MixtureScore(mixture, PROCESS)
    return {
        "log_density": lambda x: flowfast.log_density(x, mixture),
        "score": lambda x: flowfast.score(x, mixture),
        "posterior_mean": lambda x: flowfast.posterior_mean(x, mixture),
        "posterior_weights": lambda x: flowfast.posterior_weights(x, mixture),
        "hessian_vector_product": lambda x: flowfast.hessian_vector_product(x, x.flip(0), mixture),
        "denoise": lambda x: flowfast.denoise(x, mixture, PROCESS, 0.3),
        "velocity": lambda x: flowfast.velocity(x, mixture, PROCESS, x.detach()[:, 0].abs()),
        "marginal": lambda x: flowfast.score(x, PROCESS.marginal(mixture, 0.3)),
        "strided and batched": lambda x: flowfast.score(x.T.contiguous().T[None].expand(2, -1, -1), mixture),
        "module": lambda x: module(x, 0.2),
    }


@pytest.mark.parametrize("name", list(_works(_mixture())))
def test_one_graph_serves_any_number_of_points(name: str) -> None:
    work = _works(_mixture())[name]
    compiled = _compiled(_works(_mixture())[name])  # on a mixture that no call has seen
    for n in (7, 3, 64):
        for got, exact in zip(_gradient(compiled, _points(n)), _gradient(work, _points(n)), strict=True):
            assert got.equal(exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_within_and_around_a_graph(dtype: torch.dtype) -> None:
    mixture = _mixture(torch.float32)

    def around(x: Tensor) -> Tensor:
        return flowfast.score(x, mixture)

    def within(x: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return flowfast.score(x, mixture)

    x = _points(9, dtype)
    exact = _gradient(around, x)
    for work in (around, within):
        compiled = _compiled(work)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=work is around):
            got = _gradient(compiled, x)
        assert got[0].dtype == dtype and got[0].equal(exact[0]) and got[1].equal(exact[1])


def test_operations_of_the_hessian() -> None:
    mixture, fresh = _mixture(), _mixture()

    def bounds(x: Tensor, mixture: GaussianMixture) -> Tensor:
        kinds = [flowfast.hessian_norm_bound(x, mixture, kind=kind) for kind in ("trace", "global")]
        return torch.stack([*kinds, flowfast.divergence(x, mixture)])

    compiled = _compiled(lambda x: bounds(x, fresh))
    for n in (7, 3, 64):
        torch.testing.assert_close(compiled(_points(n)), bounds(_points(n), mixture))


def test_trainable_modules() -> None:
    """Their graph is the reference's, which takes any number of points too."""
    modules = [MixtureScore(_mixture(), trainable=True) for _ in range(2)]
    compiled = _compiled(modules[1])
    for n in (7, 3):
        for module, work in zip(modules, (modules[0], compiled), strict=True):
            module.zero_grad()
            work(_points(n)).square().sum().backward()
        for eager, graph in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
            torch.testing.assert_close(graph.grad, eager.grad)


def test_flows() -> None:
    mixture, fresh = _mixture(), _mixture()

    def work(x: Tensor, mixture: GaussianMixture) -> Tensor:
        ends = flowfast.flow_map(x, mixture, PROCESS, 1.0, 0.0)
        solution = flowfast.solve_flow(x, mixture, PROCESS, 0.5, x[:, 0].abs())
        return torch.cat([ends, solution.x, solution.steps[:, None], solution.evaluations[:, None]], 1)

    compiled = _compiled(lambda x: work(x, fresh))
    for n in (11, 3, 64):
        assert compiled(_points(n)).equal(work(_points(n), mixture))
    bad = _points(11)
    bad[2, 0] = float("nan")
    assert compiled(bad)[:, :5].isnan().all(1).nonzero().tolist() == [[2]]
    forward = _compiled(
        lambda x: torch.func.jvp(lambda x: flowfast.flow_map(x, mixture, PROCESS, 1.0, 0.0), (x,), (x,))
    )
    with pytest.raises(Exception, match="carries no gradient"):
        forward(_points(3))
    with pytest.raises(Exception, match="leave out steps"):
        _compiled(lambda x: flowfast.flow_map(x, mixture, PROCESS, 1.0, 0.0, steps=3))(_points(3))


def test_a_failed_trajectory_ends_in_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph cannot raise on values, as the call outside does."""
    monkeypatch.setattr(flowfast.flow, "MOST_STEPS", 2)
    mixture, x = _mixture(), _points(11)
    with pytest.raises(RuntimeError, match="trajectories failed"):
        flowfast.flow_map(x, mixture, PROCESS, 1.0, 0.0)
    failed = flowfast.solve_flow(x, mixture, PROCESS, 1.0, 0.0).status != 0
    got = _compiled(lambda x: flowfast.flow_map(x, mixture, PROCESS, 1.0, 0.0))(x)
    assert failed.any() and got.isnan().all(1).equal(failed)


def test_transforms_within_a_graph() -> None:
    """torch's own rules for jvp and vmap fix the number of points, so these compile once per shape."""
    mixture, fresh, x = _mixture(), _mixture(), _points(4)
    f = torch.func

    def transformed(x: Tensor, mixture: GaussianMixture) -> tuple[Tensor, ...]:
        def density(x: Tensor) -> Tensor:
            return flowfast.log_density(x, mixture)

        def score(x: Tensor) -> Tensor:
            return flowfast.score(x, mixture)

        gradient = f.grad(lambda x: density(x).sum())(x)
        value, along = f.jvp(score, (x,), (x.flip(0),))
        return gradient, value, along, f.vmap(score)(x)

    got = _compiled(lambda x: transformed(x, fresh), "eager", dynamic=False)(x)  # type: ignore[arg-type, return-value]
    score, product = flowfast.score(x, mixture), flowfast.hessian_vector_product(x, x.flip(0), mixture)
    for out, exact in zip(got, (score, score, product, score), strict=True):
        torch.testing.assert_close(out, exact)
    torch.testing.assert_close(transformed(x, mixture), tuple(got))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own
def test_the_default_compiler() -> None:
    mixture, fresh = _mixture(), _mixture()

    def loss(x: Tensor, mixture: GaussianMixture) -> Tensor:
        return (flowfast.score(x, mixture) * torch.tanh(x)).sum(1)

    compiled = _compiled(lambda x: loss(x, fresh), "inductor")
    for n in (7, 64):
        got, exact = (_gradient(work, _points(n)) for work in (compiled, lambda x: loss(x, mixture)))
        torch.testing.assert_close(got, exact)
