"""The operations within autocast, torch.func and double backward, in every layout; FLOWFAST_TEST_DEVICE moves them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import flowfast
from flowfast import GaussianMixture, MixtureScore, OUProcess, backends, flow_operators, operators, reference
from flowfast.tableaux import DORMAND_PRINCE, RK4

DEVICE = os.environ.get("FLOWFAST_TEST_DEVICE", "cpu")
BACKENDS = ("auto", "reference")
PROCESS = OUProcess(5.0)
Operation = Callable[[Tensor, GaussianMixture, str], Tensor]


def _mixture(dtype: torch.dtype = torch.float64, std: float = 0.7) -> GaussianMixture:
    generator = torch.Generator().manual_seed(0)
    means = 2 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    weights = torch.rand(6, generator=generator, dtype=torch.float64) + 0.2
    return GaussianMixture(means.to(DEVICE, dtype), std, weights)


def _points(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(n, 5, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def _times(x: Tensor) -> Tensor:
    return x.detach()[..., 0].double().abs()


SMOOTH: dict[str, Operation] = {
    "log_density": lambda x, m, b: flowfast.log_density(x, m, backend=b),
    "score": lambda x, m, b: flowfast.score(x, m, backend=b),
    "posterior_mean": lambda x, m, b: flowfast.posterior_mean(x, m, backend=b),
    "posterior_weights": lambda x, m, b: flowfast.posterior_weights(x, m, backend=b),
    "covariance_trace": lambda x, m, b: flowfast.covariance_trace(x, m, backend=b),
    "divergence": lambda x, m, b: flowfast.divergence(x, m, backend=b),
    "hessian_vector_product": lambda x, m, b: flowfast.hessian_vector_product(x, x.flip(0), m, backend=b),
    "denoise": lambda x, m, b: flowfast.denoise(x, m, PROCESS, 0.3, backend=b),
    "velocity": lambda x, m, b: flowfast.velocity(x, m, PROCESS, _times(x), backend=b),
    "marginal": lambda x, m, b: flowfast.score(x, PROCESS.marginal(m, 0.3), backend=b),
    "module": lambda x, m, b: MixtureScore(m, PROCESS, backend=b)(x, 0.2),
}
BOUNDS: dict[str, Operation] = {
    kind: lambda x, m, b, kind=kind: flowfast.hessian_norm_bound(x, m, kind=kind, backend=b)  # type: ignore[misc]
    for kind in ("trace", "global", "exact")
}
FLOWS: dict[str, Operation] = {
    "flow": lambda x, m, b: flowfast.flow_map(x, m, PROCESS, 1.0, 0.0, backend=b),
    "flow of fixed steps": lambda x, m, b: flowfast.flow_map(x, m, PROCESS, 1.0, 0.0, steps=4, backend=b),
}


def _second(operation: Operation, x: Tensor, mixture: GaussianMixture, backend: str) -> Tensor:
    """A second derivative, by double backward."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(operation(x, mixture, backend).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return second


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    x = _points(7, dtype)
    for name, operation in (SMOOTH | BOUNDS | FLOWS).items():
        if name in FLOWS and DEVICE != "cpu" and backend == "auto":
            continue  # the GPU's flows have tests of their own
        own = torch.float64 if dtype == torch.float64 else torch.float32
        exact = operation(x, _mixture(own), backend)
        mixture = _mixture(own)  # with nothing kept from the first call
        with torch.autocast(DEVICE, torch.bfloat16):
            got = operation(x, mixture, backend)
        assert got.dtype == dtype and got.equal(exact), name
        if name in SMOOTH and dtype != torch.bfloat16:
            exact = _second(operation, x, mixture, backend)
            with torch.autocast(DEVICE, torch.bfloat16):
                assert _second(operation, x, mixture, backend).equal(exact), name


def test_autocast_is_off_within_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that call torch's products get the dtype that they ask for."""
    seen = []

    def score(x: Tensor, means: Tensor, *rest: Tensor) -> Tensor:
        seen.append((x @ means.T).dtype)
        return x.clone()

    monkeypatch.setattr(backends, "serve", lambda *request: SimpleNamespace(score=score))
    mixture, x = _mixture(torch.float32), _points(3, torch.float32)
    one = torch.ones((), dtype=torch.float64, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert (x @ mixture.means.T).dtype == torch.bfloat16
        operators.OPERATORS["score"](x, mixture.means, mixture.log_weights_in(torch.float32), one, one)
        assert torch.is_autocast_enabled(DEVICE)
    assert seen == [torch.float32]


def test_autocast_is_off_within_a_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def flow(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        seen.append((x @ x.T).dtype)
        zero = torch.zeros(len(x), dtype=torch.int32, device=DEVICE)
        return x.clone(), zero.to(torch.int8), zero, zero.clone()

    def fixed(*arguments: Tensor) -> tuple[Tensor, ...]:
        return flow(*arguments)[:2]

    monkeypatch.setattr(backends, "serve", lambda *request: SimpleNamespace(flow_adaptive=flow, flow_fixed=fixed))
    monkeypatch.setattr(operators, "unseen", lambda tensors: False)
    mixture, x = _mixture(torch.float32), _points(3, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        for steps in (None, 2):
            for backend in BACKENDS:
                flowfast.solve_flow(x, mixture, PROCESS, 1.0, 0.5, steps=steps, backend=backend)
    assert seen == [torch.float32] * 4


def _layouts(dense: Tensor) -> Iterator[Tensor]:
    """Tensors of dense's shape in unusual memory, and dense's values where the layout allows them."""
    yield dense
    yield dense.repeat_interleave(2, -1)[..., ::2]
    yield dense.T.contiguous().T if dense.ndim == 2 else dense
    yield dense[:1].expand(dense.shape) if dense.ndim else dense
    yield torch.complex(dense, -dense).conj().imag  # a lazy negation, strided


@pytest.mark.parametrize("name", list(operators.OPERATORS))
def test_operators_pass_opcheck_in_every_layout(name: str) -> None:
    """test_ops.py has contiguous tensors of both dtypes."""
    mixture = _mixture(torch.float32)
    scales = torch.full((7,), 0.9, dtype=torch.float64), torch.full((7,), 0.6, dtype=torch.float64)
    dense = [_points(7, torch.float32), mixture.means, mixture.log_weights.float(), *(s.to(DEVICE) for s in scales)]
    if name == "hessian_vector_product":
        dense.insert(1, dense[0].flip(0).clone())
    operator = operators.OPERATORS[name]
    for layout in list(zip(*(_layouts(tensor) for tensor in dense), strict=True))[1:]:
        arguments = list(layout)
        if name != "covariance_trace":
            arguments[0] = arguments[0].detach().requires_grad_()
        plain = [tensor.detach().resolve_neg().clone(memory_format=torch.contiguous_format) for tensor in layout]
        assert operator(*arguments).equal(operator(*plain))
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(operator, arguments)  # the laziest of them through all of it


@pytest.mark.skipif(DEVICE != "cpu", reason="flows on a GPU have tests of their own")
def test_flows_are_operators() -> None:
    mixture, x = _mixture(), _points(5)
    ends = torch.tensor([0.1, 1.0, 1.4, 0.7], dtype=torch.float64)
    start = [x, mixture.means, mixture.log_weights, torch.zeros_like(x[0]), ends]
    h, coefficients = torch.full((3,), 0.4, dtype=torch.float64), torch.rand(3, 4, 4, dtype=torch.float64)
    for name, rest in (("flow_fixed", [h, coefficients, RK4]), ("flow_adaptive", [DORMAND_PRINCE, 1e-6, 1e-8, 100])):
        for layout in zip(*(_layouts(tensor) for tensor in start[:4]), strict=True):
            arguments = [*layout, ends, *rest]
            plain = [tensor.resolve_neg().clone(memory_format=torch.contiguous_format) for tensor in layout]
            got, exact = flow_operators.OPERATORS[name](*arguments), getattr(reference, name)(*plain, ends, *rest)
            torch.testing.assert_close(tuple(got), tuple(exact), equal_nan=True)
            torch.library.opcheck(flow_operators.OPERATORS[name], arguments)


def test_diameter_is_an_operator() -> None:
    means = _mixture().means
    name = backends.choose("auto", means.device)
    torch.library.opcheck(operators.diameter, (means, name))
    exact = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist").max()
    torch.testing.assert_close(operators.diameter(means, name), exact)


@pytest.mark.parametrize("name", [name for name in SMOOTH if name not in ("marginal", "module")])
def test_derivatives_against_the_reference(name: str) -> None:
    """Backward, double backward and what torch.func makes of them, in float64; gradcheck is in test_ops.py."""
    mixture, x = _mixture(), _points(4)
    operation = SMOOTH[name]

    def fast(x: Tensor) -> Tensor:
        return operation(x, mixture, "auto")

    def plain(x: Tensor) -> Tensor:
        return operation(x, mixture, "reference")

    close = torch.testing.assert_close
    close(_second(operation, x, mixture, "auto"), _second(operation, x, mixture, "reference"))
    jacobian = torch.autograd.functional.jacobian(plain, x)
    close(torch.autograd.functional.jacobian(fast, x), jacobian)
    close(torch.func.jacrev(fast)(x), jacobian)
    close(torch.func.jacfwd(fast)(x), jacobian)
    tangent = x.flip(1)
    value, along = torch.func.jvp(fast, (x,), (tangent,))
    close(value, plain(x))
    close(along, (jacobian * tangent).sum((-1, -2)))
    pulled = torch.func.vjp(fast, x)[1](value)[0]
    close(pulled, torch.einsum("i,inj->nj", value.flatten(), jacobian.reshape(value.numel(), *x.shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_a_transform_does_not_follow_is_computed_by_kernels(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher's targets within somebody else's functional training step; the mixture's first call is there, too."""
    x, y = _points(4, dtype), _points(3, dtype)
    matrix = torch.eye(5, dtype=dtype, device=DEVICE)
    exact = [flowfast.score(x, _mixture(dtype)), flowfast.velocity(y, _mixture(dtype), PROCESS, 0.3)]
    mixture = _mixture(dtype)

    def loss(matrix: Tensor) -> Tensor:
        targets = flowfast.score(x.reshape(2, 2, 5), mixture), flowfast.velocity(y, mixture, PROCESS, 0.3)
        return (x @ matrix * targets[0].reshape(4, 5)).sum() + (y @ matrix * targets[1]).sum()

    slope = x.T @ exact[0] + y.T @ exact[1]
    with monkeypatch.context() as patch:
        patch.setattr(reference, "score", lambda *_: pytest.fail("the reference was called"))
        for gradient in (torch.func.grad(loss)(matrix), torch.func.jacrev(loss)(matrix)):
            torch.testing.assert_close(gradient, slope)
    if dtype == torch.float64:  # in forward mode the reference may compute, with other rounding
        torch.testing.assert_close(torch.func.jacfwd(loss)(matrix), slope)
    assert torch.func.hessian(loss)(matrix).eq(0).all()
    assert flowfast.score(x, mixture).equal(exact[0])  # nothing of a transform stayed with the mixture
    leaf = x.clone().requires_grad_()  # followed by plain autograd from outside
    torch.func.grad(lambda m: (flowfast.score(leaf, mixture) * m[0]).sum())(matrix)[0].sum().backward()
    torch.testing.assert_close(leaf.grad, flowfast.hessian_vector_product(x, torch.ones_like(x), mixture))


def test_nested_transforms_follow_the_outer_variable() -> None:
    mixture, x = _mixture(), _points(3)
    product = flowfast.hessian_vector_product(x, x, mixture)

    def inner(y: Tensor, scale: Tensor) -> Tensor:
        return (flowfast.score(y, mixture) * scale).sum()  # the inner transform follows scale alone

    one = torch.ones((), dtype=x.dtype, device=DEVICE)
    outer = lambda y: torch.func.grad(lambda scale: inner(y, scale))(one)  # noqa: E731
    jacobian = flowfast.hessian_vector_product(x, torch.ones_like(x), mixture)
    torch.testing.assert_close(torch.func.grad(outer)(x), jacobian)
    torch.testing.assert_close(torch.func.jvp(outer, (x,), (x,))[1], product.sum())
    through = lambda y: torch.func.jvp(lambda scale: inner(y, scale), (one,), (one,))[1]  # noqa: E731
    torch.testing.assert_close(torch.func.grad(through)(x), jacobian)
    torch.testing.assert_close(torch.func.jvp(through, (x,), (x,))[1], product.sum())
    rows = torch.func.vmap(torch.func.grad(lambda y: torch.func.grad(lambda s: inner(y, s))(one)))(x)
    torch.testing.assert_close(rows, jacobian)


def test_hessians_and_third_derivatives_compose() -> None:
    mixture, x = _mixture(), _points(4)

    def density(row: Tensor) -> Tensor:
        return flowfast.log_density(row, mixture)

    def score(row: Tensor) -> Tensor:
        return flowfast.score(row, mixture)

    vmap, f = torch.func.vmap, torch.func
    rows = [flowfast.hessian_vector_product(x, e.expand_as(x).contiguous(), mixture) for e in torch.eye(5).to(x)]
    hessian = torch.stack(rows, -1)  # (n, d, d)
    ways = (f.hessian(density), f.jacrev(f.grad(density)), f.jacrev(score), f.jacfwd(score))
    for way in ways:
        torch.testing.assert_close(vmap(way)(x), hessian)
    torch.testing.assert_close(hessian.diagonal(dim1=1, dim2=2).sum(1), flowfast.divergence(x, mixture))
    third = vmap(f.jacrev(f.hessian(density)))(x)  # (n, d, d, d)
    slope = vmap(f.grad(lambda row: flowfast.divergence(row, mixture)))(x)
    torch.testing.assert_close(torch.einsum("niij->nj", third), slope)


@pytest.mark.parametrize("backend", BACKENDS)
def test_divergence(backend: str) -> None:
    mixture, x = _mixture(), _points(12)
    jacobian = torch.autograd.functional.jacobian(lambda x: flowfast.score(x, mixture, backend="reference").sum(0), x)
    exact = jacobian.diagonal(dim1=0, dim2=2).sum(1)  # (n,)
    got = flowfast.divergence(x.reshape(3, 4, 5), mixture, backend=backend)
    torch.testing.assert_close(got, exact.reshape(3, 4))
    assert flowfast.divergence(x[:0], mixture, backend=backend).shape == (0,)
    single = flowfast.divergence(x.float(), mixture, backend=backend)
    torch.testing.assert_close(single, exact.float(), rtol=1e-5, atol=1e-4)
    half = flowfast.divergence(x.half(), mixture, backend=backend)
    wide = flowfast.divergence(x.half().float(), mixture, backend=backend)
    assert half.equal(wide.half())  # rounded once, at the end
    alone = GaussianMixture(mixture.means[:1], 1e-8)
    torch.testing.assert_close(flowfast.divergence(x, alone, backend=backend), torch.full_like(x[:, 0], -5e16))
    std = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    points, means = x[:3].clone().requires_grad_(), mixture.means.clone().requires_grad_()

    def work(x: Tensor, means: Tensor, std: Tensor) -> Tensor:
        return flowfast.divergence(x, GaussianMixture(means, std), backend=backend)

    torch.autograd.gradcheck(work, (points, means, std))
    torch.autograd.gradgradcheck(lambda x: work(x, mixture.means, mixture.std), (points,))


def test_norm_bounds_lose_no_gradient_in_silence() -> None:
    mixture, x = _mixture(std=2.0), _points(3).requires_grad_()
    torch.autograd.gradcheck(lambda x: flowfast.hessian_norm_bound(x, mixture), (x,))
    std = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    wide = lambda std: flowfast.hessian_norm_bound(x.detach(), GaussianMixture(mixture.means, std), kind="global")  # noqa: E731
    torch.autograd.gradcheck(wide, (std,))
    means = mixture.means.clone().requires_grad_()
    for points, own, kind in ((x, mixture, "exact"), (x.detach(), GaussianMixture(means, 2.0), "trace")):
        with pytest.raises(ValueError, match=f"kind '{kind}' carries no gradient"):
            flowfast.hessian_norm_bound(points, own, kind=kind)  # type: ignore[arg-type]
        with torch.no_grad():
            assert flowfast.hessian_norm_bound(points, own, kind=kind).shape == (3,)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_operations_at_a_time_are_differentiable_twice(backend: str) -> None:
    mixture, x = _mixture(), _points(2).requires_grad_()
    t = torch.tensor([0.1, 0.7], dtype=torch.float64, device=DEVICE, requires_grad=True)
    for name in ("denoise", "velocity"):
        op = getattr(flowfast, name)
        torch.autograd.gradcheck(lambda x, op=op: op(x, mixture, PROCESS, 0.4, backend=backend), (x,))
        torch.autograd.gradgradcheck(lambda x, op=op: op(x, mixture, PROCESS, 0.4, backend=backend), (x,))
        torch.autograd.gradcheck(lambda x, t, op=op: op(x, mixture, PROCESS, t, backend=backend), (x, t))


@pytest.mark.parametrize("t", [0.5, 1.0, 2.0])
def test_gradient_of_the_denoiser_keeps_its_digits(t: float) -> None:
    """It is `alpha C / std^2`, far smaller than the terms of the Hessian-vector product that it is made of."""
    mixture = _mixture(torch.float32, std=0.1)
    x = PROCESS.marginal(mixture, t).sample(50, generator=torch.Generator(DEVICE).manual_seed(0))
    gradients = []
    for points, backend in ((x, "auto"), (x.double(), "reference")):
        points = points.clone().requires_grad_()
        out = flowfast.denoise(points, mixture, PROCESS, t, backend=backend)
        gradients.append(torch.autograd.grad(out, points, x.flip(0).to(points.dtype))[0].double())
    error = (gradients[0] - gradients[1]).norm(dim=1) / gradients[1].norm(dim=1)
    assert float(error.max()) < 1e-5


@pytest.mark.parametrize("std", [1e-4, 1e-6, 1e-8])
def test_double_backward_at_low_noise_is_finite(std: float) -> None:
    """Where the posterior has collapsed the score is linear: its second derivative is zero, not NaN."""
    mixture = _mixture(torch.float32, std=std)
    x = (mixture.means[:3] + std).requires_grad_()
    (first,) = torch.autograd.grad(flowfast.score(x, mixture).sum(), x, create_graph=True)
    torch.testing.assert_close(first, torch.full_like(x, -(std**-2)))
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.equal(torch.zeros_like(x))
