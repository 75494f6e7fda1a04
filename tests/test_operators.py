"""The direct way to the C++ bodies is taken where nothing can tell it from the operator, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import flowfast
from flowfast import GaussianMixture, _cpp, _triton, operators


def _mixture() -> GaussianMixture:
    return GaussianMixture.random(6, 5, std=0.7)


def _points() -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1))


class Subclass(torch.Tensor):
    """A tensor that wants to be told of every operation."""


class DispatchLog(TorchDispatchMode):
    """Names of the operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class FunctionLog(TorchFunctionMode):
    """Names of the functions called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def directly(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Operations whose operator was passed by, in order."""
    calls: list[str] = []

    class Counted:
        def __getattr__(self, op: str) -> Callable[..., Tensor]:
            calls.append(op)
            body: Callable[..., Tensor] = getattr(_cpp, op)
            return body

    monkeypatch.setattr(operators, "_cpp", Counted())
    yield calls


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_plain_calls_go_directly(mode: type[AbstractContextManager[None]], directly: list[str]) -> None:
    mixture, x = _mixture(), _points()
    names = [name for name in operators.OPERATORS if name != "hessian_vector_product"]
    with mode():
        results = [getattr(flowfast, name)(x, mixture) for name in names]
        results.append(flowfast.hessian_vector_product(x, x, mixture))
    assert directly == [*names, "hessian_vector_product"]
    one, std = torch.ones((), dtype=torch.float64), mixture.std
    tensors = [mixture.means, mixture.log_weights_in(x.dtype), one, std]
    for name, result in zip(directly, results, strict=True):
        points = [x, x] if name == "hessian_vector_product" else [x]
        assert operators.OPERATORS[name](*points, *tensors).equal(result)
        assert not result.requires_grad


def test_needed_gradients_go_through_the_operator(directly: list[str]) -> None:
    mixture, x = _mixture(), _points().requires_grad_()
    assert flowfast.score(x, mixture).requires_grad
    v = _points().requires_grad_()
    assert flowfast.hessian_vector_product(x.detach(), v, mixture).requires_grad
    assert directly == []
    with torch.no_grad():
        assert not flowfast.score(x, mixture).requires_grad
    assert directly == ["score"]


@pytest.mark.skipif(not _triton.interpreting(), reason="on a GPU Triton's results carry gradients")
def test_the_interpreter_loses_no_gradient_in_silence() -> None:
    mixture, x = _mixture(), _points()
    exact = flowfast.score(x, mixture, backend="triton")
    leaf = x.clone().requires_grad_()
    with pytest.raises(ValueError, match="interpreter carries no gradient"):
        flowfast.score(leaf, mixture, backend="triton")
    with torch.no_grad():
        assert flowfast.score(leaf, mixture, backend="triton").equal(exact)


def test_graphs_hold_the_operator() -> None:
    mixture, x = _mixture(), _points()

    def work(x: Tensor) -> Tensor:
        return flowfast.score(x, mixture)

    target = torch.ops.flowfast.score.default
    exact = work(x)
    traced = make_fx(work)(x)
    exported = torch.export.export(Module(work), (x,), strict=False).module()
    for graph in (traced, exported):
        assert any(node.target == target for node in graph.graph.nodes)  # type: ignore[union-attr]
        assert graph(x).equal(exact)
    seen: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    assert torch.compile(work, fullgraph=True, backend=backend)(x).equal(exact)
    assert any("flowfast.score" in name for name in seen)


class Module(torch.nn.Module):
    """A function as a module, which torch.export asks for."""

    def __init__(self, work: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.work = work

    def forward(self, x: Tensor) -> Tensor:
        """Call the function."""
        return self.work(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_traces_hold_the_operator() -> None:
    mixture, x = _mixture(), _points()
    exact = flowfast.score(x, mixture)
    traced = torch.jit.trace(lambda x: flowfast.score(x, mixture), x)
    assert "flowfast::score" in str(traced.graph) and traced(x).equal(exact)


def test_modes_and_profilers_see_the_operator(directly: list[str]) -> None:
    mixture, x = _mixture(), _points()
    exact = flowfast.score(x, mixture)
    assert directly.pop() == "score"
    for log in (DispatchLog(), FunctionLog()):
        with log:
            assert flowfast.score(x, mixture).equal(exact)
        assert any("flowfast.score" in name for name in log.names)
    with torch.profiler.profile() as profile:
        flowfast.score(x, mixture)
    assert any(event.name == "flowfast::score" for event in profile.events())
    assert directly == []


def test_fake_tensors_stay_fake_and_leave_no_trace() -> None:
    mixture, x = _mixture(), _points()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = flowfast.score(mode.from_tensor(x), mixture)
    assert isinstance(fake, FakeTensor) and fake.shape == x.shape
    assert type(flowfast.score(x, mixture)) is Tensor


def test_subclasses_stay_subclasses() -> None:
    mixture, x = _mixture(), _points()
    exact = flowfast.score(x, mixture)
    other = GaussianMixture(mixture.means.as_subclass(Subclass), 0.7)
    for out in (flowfast.score(x.as_subclass(Subclass), mixture), flowfast.score(x, other)):
        assert type(out) is Subclass and out.as_subclass(Tensor).equal(exact)


def test_lazy_negation_and_strides_are_resolved() -> None:
    mixture, x = _mixture(), _points()
    negative = GaussianMixture(torch._neg_view(mixture.means), 0.7)
    strided = x.T.contiguous().T
    for name in ("score", "posterior_weights"):
        op = getattr(flowfast, name)
        assert op(torch._neg_view(x), mixture).equal(op(-x, mixture))
        assert op(x, negative).equal(op(x, GaussianMixture(-mixture.means, 0.7)))
        assert op(strided, mixture).equal(op(x, mixture))
    assert negative.diameter() == mixture.diameter()
    process = flowfast.OUProcess(5.0)
    for steps in (None, 3):
        ends = [
            flowfast.flow_map(points, mixture, process, 1.0, 0.5, steps=steps) for points in (torch._neg_view(x), -x)
        ]
        assert ends[0].equal(ends[1])


def test_tensors_without_plain_memory_are_refused() -> None:
    mixture, x = _mixture(), _points()
    for other in (x.to_sparse(), x.to_mkldnn()):
        with pytest.raises(NotImplementedError, match="flowfast::score"):
            flowfast.score(other, mixture)
    parts = (mixture.means, mixture.log_weights_in(x.dtype), torch.ones((), dtype=torch.float64), mixture.std)
    with pytest.raises(ValueError, match="x: got a lazily negated tensor"):
        _cpp.score(torch._neg_view(x), *parts)
    with pytest.raises(ValueError, match="x: got a wrapper without memory"):
        _cpp.score(torch._to_functional_tensor(x), *parts)


def test_transforms_reach_every_order(directly: list[str]) -> None:
    mixture, x, v = _mixture(), _points().double(), _points().double().flip(0)
    mixture = mixture.to(torch.float64)

    def density(row: Tensor) -> Tensor:
        return flowfast.log_density(row, mixture)

    def score(row: Tensor) -> Tensor:
        return flowfast.score(row, mixture)

    exact, product = flowfast.score(x, mixture), flowfast.hessian_vector_product(x, v, mixture)
    directly.clear()
    vmap, grad, jvp, vjp = torch.func.vmap, torch.func.grad, torch.func.jvp, torch.func.vjp
    torch.testing.assert_close(vmap(score)(x), exact)
    torch.testing.assert_close(vmap(grad(density))(x), exact)
    torch.testing.assert_close(torch.func.functionalize(score)(x), exact)
    torch.testing.assert_close(vjp(score, x)[1](v)[0], product)
    assert directly == []
    out, tangent = jvp(score, (x,), (v,))
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(tangent, product)
    with forward_ad.dual_level():
        out, tangent = forward_ad.unpack_dual(score(forward_ad.make_dual(x, v)))
        torch.testing.assert_close(tangent, product)
    jacobian = vmap(torch.func.jacfwd(score))(x)
    torch.testing.assert_close((jacobian @ v[..., None])[..., 0], product)


def test_first_call_in_inference_mode_leaves_gradients_alone() -> None:
    mixture, x = _mixture(), _points()
    with torch.inference_mode():
        exact = flowfast.score(x, mixture)
    points = x.clone().requires_grad_()
    flowfast.log_density(points, mixture).sum().backward()
    torch.testing.assert_close(points.grad, exact)
