"""Pointwise operations as torch citizens: shapes, dtypes, gradients, compile, vmap; agreement with the reference."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import BACKENDS
from torch import Tensor

import flowfast
from flowfast import GaussianMixture, OUProcess, operators

POINTWISE = ("log_density", "score", "posterior_mean", "posterior_weights", "covariance_trace")
PROCESS = OUProcess(5.0)


def _mixture(k: int = 6, d: int = 5, dtype: torch.dtype = torch.float64, std: float = 0.7) -> GaussianMixture:
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(k, d, generator=generator, dtype=torch.float64)
    return GaussianMixture(means.to(dtype), std, torch.rand(k, generator=generator, dtype=torch.float64) + 0.2)


def _points(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_shapes_dtypes_and_layouts(backend: str, dtype: torch.dtype) -> None:
    mixture = _mixture(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    x = _points(3, 4, 5, dtype=dtype)
    for name in POINTWISE:
        op = getattr(flowfast, name)
        out = op(x, mixture, backend=backend)
        tail = {"score": (5,), "posterior_mean": (5,), "posterior_weights": (6,)}.get(name, ())
        assert out.shape == (3, 4, *tail) and out.dtype == dtype
        one_by_one = torch.stack([op(row, mixture, backend=backend) for row in x.reshape(-1, 5)])
        torch.testing.assert_close(out.reshape(one_by_one.shape), one_by_one)
        strided = x.transpose(0, 1).contiguous().transpose(0, 1)
        assert op(strided, mixture, backend=backend).equal(out)
        assert op(x[:0], mixture, backend=backend).shape == (0, 4, *tail)
        single = op(x.to(torch.float64 if dtype == torch.float64 else torch.float32), mixture, backend=backend)
        assert single.to(dtype).equal(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("k", "d"), [(1, 1), (2, 3), (20, 64), (129, 17), (300, 2)])
def test_cpp_agrees_with_the_reference(k: int, d: int, dtype: torch.dtype) -> None:
    mixture = _mixture(k, d, dtype)
    exact = GaussianMixture(mixture.means.double(), mixture.std, mixture.weights.double())
    exact.log_weights = mixture.log_weights
    t = torch.linspace(0, 1, 67, dtype=torch.float64)
    x = _points(67, d, dtype=dtype)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    for name in (*POINTWISE, "denoise", "velocity"):
        extra = (PROCESS, t) if name in ("denoise", "velocity") else ()
        fast = getattr(flowfast, name)(x, mixture, *extra, backend="cpp").double()
        slow = getattr(flowfast, name)(x.double(), exact, *extra, backend="reference")
        scale = slow.abs().max()
        assert float((fast - slow).abs().max()) <= tolerance * float(scale), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_rows_stay_alone(backend: str) -> None:
    mixture, x = _mixture(), _points(37, 5)
    bad = x.clone()
    bad[3, 2], bad[20, 0] = float("nan"), float("inf")
    good = torch.ones(37, dtype=torch.bool)
    good[[3, 20]] = False
    for name in POINTWISE:
        clean, mixed = (getattr(flowfast, name)(points, mixture, backend=backend) for points in (x, bad))
        assert mixed[good].equal(clean[good])
        assert not torch.isfinite(mixed[~good]).reshape(2, -1).all(1).any(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_denoise_and_velocity_with_a_time_per_row(backend: str) -> None:
    mixture, x = _mixture(), _points(9, 5)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    for name in ("denoise", "velocity"):
        op = getattr(flowfast, name)
        rows = torch.stack([op(x[i], mixture, PROCESS, float(t[i]), backend=backend) for i in range(9)])
        torch.testing.assert_close(op(x, mixture, PROCESS, t, backend=backend), rows, rtol=1e-12, atol=1e-12)
    v = flowfast.velocity(x, mixture, PROCESS, 0.3, backend=backend)
    s = flowfast.score(x, PROCESS.marginal(mixture, 0.3), backend=backend)
    torch.testing.assert_close(v, -5 * (x + s))
    alpha, std = PROCESS.alpha(0.3), PROCESS.std(0.3, mixture.std)
    tweedie = (x + (1 - alpha**2) * s) / alpha
    assert float(std) ** 2 > float(1 - alpha**2)
    torch.testing.assert_close(flowfast.denoise(x, mixture, PROCESS, 0.3, backend=backend), tweedie)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_every_order_reach_x(backend: str) -> None:
    mixture = _mixture(4, 3)
    x, v = _points(3, 3).requires_grad_(), _points(3, 3).flip(0).clone().requires_grad_()
    for name in ("log_density", "score", "posterior_mean", "posterior_weights"):
        op = getattr(flowfast, name)
        torch.autograd.gradcheck(lambda x, op=op: op(x, mixture, backend=backend), (x,))
        torch.autograd.gradgradcheck(lambda x, op=op: op(x, mixture, backend=backend), (x,))
    product = lambda x, v: flowfast.hessian_vector_product(x, v, mixture, backend=backend)  # noqa: E731
    torch.autograd.gradcheck(product, (x, v))
    torch.autograd.gradgradcheck(product, (x, v))
    trace = lambda x: flowfast.covariance_trace(x, mixture, backend=backend)  # noqa: E731
    torch.autograd.gradcheck(trace, (x,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_reach_the_mixture(backend: str) -> None:
    x = _points(4, 3)
    base = _mixture(3, 3)
    means, std = base.means.clone().requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    weights = base.weights.clone().requires_grad_()
    for name in ("log_density", "score", "posterior_weights"):

        def run(means: Tensor, std: Tensor, weights: Tensor, name: str = name) -> Tensor:
            out: Tensor = getattr(flowfast, name)(x, GaussianMixture(means, std, weights), backend=backend)
            return out

        torch.autograd.gradcheck(run, (means, std, weights))


@pytest.mark.parametrize("name", list(operators.OPERATORS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_pass_opcheck(name: str, dtype: torch.dtype) -> None:
    mixture = _mixture(dtype=dtype)
    for shape in ((), (7,)):
        scales = torch.full(shape, 0.9, dtype=torch.float64), torch.full(shape, 0.6, dtype=torch.float64)
        x = _points(7, 5, dtype=dtype).requires_grad_(name != "covariance_trace")
        arguments = [x, mixture.means, mixture.log_weights.to(dtype), *scales]
        if name == "hessian_vector_product":
            arguments.insert(1, _points(7, 5, dtype=dtype).flip(0).clone())
        torch.library.opcheck(operators.OPERATORS[name], arguments)


def test_operators_refuse_silent_gradients() -> None:
    mixture = _mixture()
    means = mixture.means.clone().requires_grad_()
    one = torch.ones((), dtype=torch.float64)
    out = operators.OPERATORS["score"](_points(2, 5), means, mixture.log_weights, one, one)
    with pytest.raises(ValueError, match="carry gradients to points only"):
        out.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_go_to_out(backend: str, dtype: torch.dtype) -> None:
    mixture = _mixture(dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for shape in ((3, 4), (7,), (), (0,)):
        x = _points(*shape, 5, dtype=dtype)
        exact = flowfast.posterior_weights(x, mixture, backend=backend)
        out = torch.full_like(exact, float("nan"))
        address, version = out.data_ptr(), out._version
        assert flowfast.posterior_weights(x, mixture, out=out, backend=backend) is out
        assert out.equal(exact) and out.data_ptr() == address and out._version > version


@pytest.mark.parametrize("backend", BACKENDS)
def test_out_may_overlap_what_is_read(backend: str) -> None:
    mixture, memory = _mixture(k=5), _points(901, 5)
    x, out = memory[:900], memory[1:]
    exact = flowfast.posterior_weights(x.clone(), mixture, backend=backend)
    assert flowfast.posterior_weights(x, mixture, out=out, backend=backend).equal(exact)


def test_out_is_written_without_another_result(monkeypatch: pytest.MonkeyPatch) -> None:
    mixture, x = _mixture(), _points(8, 5)
    out, exact = x.new_empty(8, 6), flowfast.posterior_weights(x, mixture)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *_: pytest.fail("a fresh result was allocated"))
    assert flowfast.posterior_weights(x, mixture, out=out).equal(exact)


def test_out_is_refused_unless_it_fits() -> None:
    mixture, x = _mixture(), _points(8, 5)
    weights = functools.partial(flowfast.posterior_weights, x, mixture)
    good = x.new_empty(8, 6)
    for wrong in (good[:7], good.float(), good.to("meta"), x.new_empty(6, 8).T, x.new_empty(8, 12)[:, ::2], [1.0]):
        with pytest.raises(ValueError, match="out must be"):
            weights(out=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out takes no gradient"):
        weights(out=good.clone().requires_grad_())
    points, std = x.clone().requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    for arguments in ((points, mixture), (x, GaussianMixture(mixture.means, std))):
        with pytest.raises(ValueError, match="out takes no gradient"):
            flowfast.posterior_weights(*arguments, out=good)
        with torch.no_grad():
            assert flowfast.posterior_weights(*arguments, out=good).equal(flowfast.posterior_weights(*arguments))


def test_out_within_a_compiled_function() -> None:
    mixture, x = _mixture(), _points(8, 5)
    out = x.new_empty(8, 6)
    torch._dynamo.reset()
    compiled = torch.compile(flowfast.posterior_weights, fullgraph=True, backend="aot_eager")
    compiled(x, mixture, out=out)
    assert out.equal(flowfast.posterior_weights(x, mixture))


def test_compile_and_vmap() -> None:
    mixture, x = _mixture(), _points(8, 5)

    def work(x: Tensor) -> Tensor:
        return flowfast.score(x, mixture) * 2 + flowfast.velocity(x, mixture, PROCESS, 0.5)

    torch._dynamo.reset()
    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), work(x))
    mapped = torch.func.vmap(lambda row: flowfast.score(row, mixture))(x)
    torch.testing.assert_close(mapped, flowfast.score(x, mixture))
    times = torch.linspace(0.1, 1, 8, dtype=torch.float64)
    mapped = torch.func.vmap(lambda row, t: flowfast.velocity(row, mixture, PROCESS, t))(x, times)
    torch.testing.assert_close(mapped, flowfast.velocity(x, mixture, PROCESS, times))
    hessian = torch.func.vmap(torch.func.hessian(lambda row: flowfast.log_density(row, mixture, backend="reference")))(
        x
    )
    columns = [flowfast.hessian_vector_product(x, e.expand_as(x).contiguous(), mixture) for e in torch.eye(5).double()]
    torch.testing.assert_close(hessian, torch.stack(columns, -1))
