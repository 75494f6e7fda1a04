"""The students' linear layer: oneDNN's products where they serve, torch's own everywhere else, one result."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from flowfast.students import linear as module
from flowfast.students.linear import Linear, linear

ROWS, IN, OUT = 96, 320, 288  # large enough to be handed on, every other row too
EPS = torch.finfo(torch.float32).eps


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def handed_on(monkeypatch):
    """The products that went to oneDNN, counted."""
    if module._product is None or not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    seen, product = [], module._times
    monkeypatch.setattr(module, "_times", lambda *args: (seen.append(args[0].shape), product(*args))[1])
    return seen


def rounding(x, weight, bias=0.0):
    """What float32 may lose in `x weight^T + bias`, sums in any order: the a priori bound on every entry."""
    size = x.detach().double().abs() @ weight.detach().double().abs().mT + torch.as_tensor(bias).double().abs()
    return EPS * (x.shape[-1] + 1) / 2 * size


@pytest.mark.parametrize("shape", [(ROWS,), (3, 40)], ids=str)
def test_values_and_gradients_are_those_of_torch_in_float64(handed_on, shape):
    x, weight, bias = numbers(*shape, IN), numbers(OUT, IN, seed=1), numbers(OUT, seed=2)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out, right, grad = linear(*inputs), F.linear(*exact), numbers(*shape, OUT, seed=3)
    assert out.dtype == torch.float32 and out.shape == right.shape
    assert bool(((out - right).abs() <= rounding(x, weight, bias.detach())).all())
    out.backward(grad)
    right.backward(grad.double())
    assert len(handed_on) == 3  # there and twice back
    rows, back = x.detach().reshape(-1, IN), grad.reshape(-1, OUT)
    allowed = (
        rounding(grad, weight.mT),
        rounding(back.mT, rows.mT),
        rounding(torch.ones(1, len(back)), back.mT).squeeze(0),
    )
    for one, other, bound in zip(inputs, exact, allowed, strict=True):
        assert bool(((one.grad - other.grad).abs() <= bound).all())


def test_gradients_have_gradients(handed_on):
    x, weight = numbers(ROWS, IN).requires_grad_(), numbers(OUT, IN, seed=1).requires_grad_()
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]

    def second(product, x, weight):
        (inner,) = torch.autograd.grad(product(x, weight).square().sum() / 1e3, x, create_graph=True)
        return torch.autograd.grad(inner.square().sum() / 1e6, weight)[0]

    found, right = second(linear, x, weight), second(F.linear, *exact)
    assert handed_on
    assert float((found - right).norm() / right.norm()) <= EPS * (IN + OUT + ROWS)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: linear(x.double(), w.double()),
        lambda x, w: linear(x[0], w),
        lambda x, w: linear(x[:2], w),
        lambda x, w: torch.func.vmap(lambda row: linear(row[None], w))(x),
        lambda x, w: torch.func.jvp(lambda x: linear(x, w), (x,), (x,))[1],
        lambda x, w: torch.func.jacrev(lambda x: linear(x, w).sum(0))(x),
    ],
    ids=["float64", "vector", "small", "vmap", "jvp", "jacrev"],
)
def test_everything_else_is_left_to_torch(handed_on, call):
    call(numbers(ROWS, IN), numbers(OUT, IN, seed=1))
    assert not handed_on


def test_autocast_and_the_compiler_see_a_plain_layer(handed_on):
    layer, x = Linear(IN, OUT), numbers(ROWS, IN)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert not handed_on
    layer(x)
    assert handed_on


def test_strided_rows_and_weights(handed_on):
    x, weight = numbers(IN, ROWS).mT, numbers(IN, OUT, seed=1).mT
    for rows, columns in ((x, weight), (x[::2], weight.flip(0))):
        exact = rows.double() @ columns.double().mT
        assert bool(((linear(rows, columns) - exact).abs() <= rounding(rows, columns)).all())
    assert len(handed_on) == 2
