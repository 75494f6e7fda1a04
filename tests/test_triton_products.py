"""The posterior pass on tensor cores: interpreted with float32 numbers for bf16 pieces, or compiled (make gpu)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from pointwise import DEVICE, OPS, Arguments, call, error, plain, poisoned, problem
from tolerances import pointwise
from torch import Tensor

from flowfast import _triton, reference

SIZES = ((1, 64, 33, True), (33, 65, 64, False), (5, 129, 65, True), (2, 64, 256, False))  # n, k, d, alpha per row

# The interpreter computes with NumPy, which warns where a GPU says inf or NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _fresh_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "empty", poisoned)
    yield


def _products(op: str, arguments: Arguments, terms: int) -> tuple[Tensor, Tensor]:
    """An output of the products alone, (n, ...), and which rows they vouch for."""
    from flowfast.kernels.outputs import allocate
    from flowfast.kernels.products import products

    rest = dict(arguments)
    out = allocate(rest["x"], len(rest["means"]), [op])
    flags = products(direction=rest.pop("v"), outputs=out, terms=terms, **rest)
    return out[op], flags == 0


def _shares(op: str, got: Tensor, arguments: Arguments, exact: Tensor) -> Tensor:
    """Every row's error as a share of what tests/tolerances.py allows, (n,), in the scales of csrc/posterior.hpp."""
    wide = {name: value.double() for name, value in arguments.items()}
    x, m, alpha, std = (wide[name] for name in ("x", "means", "alpha", "std"))
    alpha, std = alpha.expand(len(x)), std.expand(len(x))
    gamma, trace = (call(reference, name, wide) for name in ("posterior_weights", "covariance_trace"))
    away = (x[:, None] - alpha[:, None, None] * m).square().sum(2)  # (n, k)
    rounding = torch.finfo(torch.float64).eps * m.norm(dim=1).max()  # of the reference itself
    spread = (gamma * away).sum(1).sqrt() + rounding
    scale = {
        "log_density": exact.abs().clamp(min=1) if exact.ndim == 1 else 1.0,
        "score": spread / std**2,
        "posterior_mean": spread / alpha + exact.reshape(len(x), -1).norm(dim=1),
        "covariance_trace": (std / alpha) ** 2 + trace,
        "posterior_weights": gamma.norm(dim=1),
        "hessian_vector_product": (1 / std**2 + alpha**2 * trace / std**4) * wide["v"].norm(dim=1),
    }[op]
    steepness = alpha * m.norm(dim=1).max() / std
    allowed = torch.tensor([pointwise(torch.float32, float(value), 1.0) for value in steepness])
    off = (got.double() - exact).reshape(len(x), -1).norm(dim=1) / scale / allowed.to(got.device)
    return off.nan_to_num(nan=math.inf)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ugly_sizes_keep_the_contract(size: tuple[int, int, int, bool]) -> None:
    """Six products keep the contract in every row, three 16 times its width where they vouch for the row."""
    n, k, d, per_row = size
    arguments = problem(n, k, d, torch.float32, per_row=per_row)
    for op in OPS:
        exact = plain(op, arguments)
        got = call(_triton, op, arguments)
        assert got.dtype == torch.float32 and got.shape == exact.shape and got.is_contiguous()
        assert float(_shares(op, got, arguments, exact).max()) <= 1, op
        for terms, width in ((6, 1), (3, 16)):
            alone, sure = _products(op, arguments, terms)
            assert not sure.any() or float(_shares(op, alone, arguments, exact)[sure].max()) <= width, (op, terms)


def test_points_of_the_mixture_need_no_second_way() -> None:
    """Noise at which several components compete for a point: products are sure of nearly every row."""
    arguments = problem(64, 200, 64, torch.float32, per_row=False)
    arguments["means"] /= 2
    for terms in (3, 6):
        for op in OPS:
            _, sure = _products(op, arguments, terms)
            assert float(sure.float().mean()) > 0.9, (op, terms)


@pytest.mark.parametrize(("std", "offset"), [(1e-8, 0.0), (1e-4, 1e4), (1e-2, 0.0), (0.3, 0.0)])
def test_low_noise_keeps_the_contract(std: float, offset: float) -> None:
    """At means, half-way between them, beside that and far out."""
    arguments = _between(std, offset)
    wide = {name: value.double() for name, value in arguments.items()}
    for op in OPS:
        exact = call(reference, op, wide)
        assert float(_shares(op, call(_triton, op, arguments), arguments, exact).max()) <= 1, op
        for terms, width in ((6, 1), (3, 16)):
            alone, sure = _products(op, arguments, terms)
            assert float(_shares(op, alone, arguments, exact)[sure].max()) <= width, (op, terms)
            assert sure[:4].all() or std > 1e-2, op  # collapsed, wherever the point lies
            assert not sure[4:8].any() or std > 1e-2 or offset, op


def _between(std: float, offset: float) -> Arguments:
    """Twelve points: near means, half-way between two of them (up to rounding), far out; k = 70, d = 40."""
    generator = torch.Generator().manual_seed(1)
    means = ((2 * torch.rand(70, 40, generator=generator, dtype=torch.float64) - 1) * 5 + offset).float()
    m = means.double()
    noise = torch.randn(4, 40, generator=generator, dtype=torch.float64) * std
    x = torch.cat([m[:4] + noise, (m[:4] + m[4:8]) / 2, m[:4] + 40 * noise])
    return {
        "x": x.float().to(DEVICE),
        "v": torch.randn(x.shape, generator=generator).to(DEVICE),
        "means": means.to(DEVICE),
        "log_weights": torch.randn(70, generator=generator).log_softmax(0).to(DEVICE),
        "alpha": torch.tensor(1.0, dtype=torch.float64, device=DEVICE),
        "std": torch.tensor(std, dtype=torch.float64, device=DEVICE),
    }


@pytest.mark.parametrize("terms", [3, 6])
def test_a_collapsed_posterior_is_exact(terms: int) -> None:
    """One component has all the weight: no spread, and the score is (alpha m - x) / std^2 to the last bit or so."""
    arguments = problem(40, 90, 50, torch.float32, per_row=False)
    arguments |= {"std": torch.tensor(1e-3, dtype=torch.float64, device=DEVICE)}
    nearest = arguments["means"][:40].double()
    arguments["x"] = (arguments["alpha"] * nearest).float() * (1 + 1e-4)
    got = {op: _products(op, arguments, terms) for op in OPS}
    assert all(sure.all() for _, sure in got.values())
    assert torch.equal(got["covariance_trace"][0], torch.zeros(40, device=DEVICE))
    assert torch.equal(got["posterior_mean"][0], arguments["means"][:40])
    exact = (arguments["alpha"] * nearest - arguments["x"].double()) * 1e6
    torch.testing.assert_close(got["score"][0], exact.float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(got["hessian_vector_product"][0], -arguments["v"] * 1e6, rtol=2e-7, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_rows_do_not_see_each_other(op: str) -> None:
    """A row gives the same bits whatever the others are, non-finite ones and ones that are done twice included."""
    arguments = problem(37, 70, 40, torch.float32)
    arguments["x"][5, 2], arguments["x"][6] = math.nan, math.inf
    together = call(_triton, op, arguments)
    others = problem(37, 70, 40, torch.float32, seed=1) | {
        name: arguments[name].clone() for name in ("means", "log_weights")
    }
    others["x"][::2] *= 30
    for row in (0, 1, 4, 31, 36):
        for name in ("x", "v", "alpha", "std"):
            others[name][row] = arguments[name][row]
    alone = call(_triton, op, others)
    assert all(torch.equal(alone[row], together[row]) for row in (0, 1, 4, 31, 36))
    finite = together.reshape(37, -1).isfinite()
    assert finite.all(1).logical_not().nonzero()[:, 0].tolist() == [5, 6] and not finite[5:7].any()


@pytest.mark.parametrize("op", OPS)
def test_strided_inputs_equal_contiguous_ones(op: str) -> None:
    arguments = problem(9, 66, 35, torch.float32)
    expected = call(_triton, op, arguments)
    strided = {}
    for name, value in arguments.items():
        wide = torch.full([2 * size for size in value.shape], math.nan, dtype=value.dtype, device=DEVICE)
        strided[name] = wide[tuple(slice(None, None, 2) for _ in value.shape)]
        strided[name].copy_(value)
    assert torch.equal(call(_triton, op, strided), expected)


@pytest.mark.parametrize("op", OPS)
def test_components_of_weight_zero_do_not_count(op: str) -> None:
    """A first tile of means that do not exist, and one that does not exist beside others."""
    arguments = problem(6, 200, 34, torch.float32)
    keep = torch.tensor([90, 100, 101, 199], device=DEVICE)
    lightened = torch.full_like(arguments["log_weights"], -math.inf)
    lightened[keep] = arguments["log_weights"][keep]
    arguments |= {"log_weights": lightened}
    got, exact = call(_triton, op, arguments), plain(op, arguments)
    assert float(_shares(op, got, arguments, exact).max()) <= 1
    if op == "posterior_weights":
        got[:, keep] = 0
        assert not got.any()


def test_few_points_share_out_the_components() -> None:
    """Groups of components are joined: leaders in every group, groups in which nothing has weight."""
    from flowfast.kernels.products import split

    arguments = problem(7, 1500, 33, torch.float32)
    assert split(1, 1536, 64) == (3, 512)
    arguments["log_weights"][512:1024] = -math.inf
    for op in ("log_density", "posterior_weights", "posterior_mean"):
        exact = plain(op, arguments)
        assert float(_shares(op, call(_triton, op, arguments), arguments, exact).max()) <= 1, op


def test_components_are_shared_out_evenly_and_completely() -> None:
    from flowfast.kernels.products import PROGRAMS, split

    for tiles, blocks in ((1, 1), (1, 8), (1, 17), (3, 1000), (40, 800), (600, 800), (7, 10**6)):
        groups, share = split(tiles, blocks * 64, 64)
        assert share % 64 == 0 and (groups - 1) * share < blocks * 64 <= groups * share
        assert groups == 1 or groups * tiles <= PROGRAMS and share >= 8 * 64


def test_slices_of_rows_keep_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    from flowfast.kernels import products

    arguments = problem(9, 70, 40, torch.float32)  # slices of 4, 4 and 1
    monkeypatch.setattr(products, "SLICE", 4 * (24 * 64 + 64))
    for op in OPS:
        exact = plain(op, arguments)
        assert float(_shares(op, call(_triton, op, arguments), arguments, exact).max()) <= 1, op


def test_precision_follows_torch() -> None:
    from flowfast.kernels.posterior import posterior, preferred_precision

    arguments = problem(8, 64, 64, torch.float32)
    arguments.pop("v")
    named = {
        name: posterior(**arguments, outputs=["posterior_mean"], precision=name)["posterior_mean"]
        for name in ("bf16x3", "bf16x6")
    }
    assert not torch.equal(*named.values())
    before = torch.get_float32_matmul_precision()
    try:
        for setting, name in (("highest", "bf16x6"), ("high", "bf16x3"), ("medium", "bf16x3")):
            torch.set_float32_matmul_precision(setting)
            assert preferred_precision() == name
            assert torch.equal(call(_triton, "posterior_mean", arguments), named[name])
    finally:
        torch.set_float32_matmul_precision(before)


def test_only_flagged_rows_are_done_again() -> None:
    from flowfast.kernels.posterior import differences

    arguments = problem(50, 5, 40, torch.float32)
    inputs = {name: value for name, value in arguments.items() if name != "v"}
    into = {"score": torch.full((50, 40), 7.0, device=DEVICE)}
    flags = torch.zeros(50, dtype=torch.int8, device=DEVICE)
    flags[[3, 49]] = 1
    differences(**inputs, outputs=["score"], into=into, flags=flags)
    done = (into["score"] != 7).all(1).nonzero()[:, 0].tolist()
    assert done == [3, 49] and (into["score"][:3] == 7).all()
    assert error(into["score"][[3, 49]], plain("score", arguments)[[3, 49]]) < 1e-4


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((9, 64, 33), "products"),
        ((9, 1 << 17, 256), "products"),
        ((9, 1 << 18, 256), "differences"),  # pieces of the means would take more than 256 MiB
        ((9, 63, 64), "differences"),
        ((9, 1000, 32), "differences"),
        ((0, 1000, 64), "differences"),
    ],
)
def test_path_is_chosen_by_sizes(size: tuple[int, int, int], expected: str) -> None:
    from flowfast.kernels.posterior import path

    assert path(*size, torch.float32) == expected
    assert path(*size, torch.float64) == "differences"


def test_a_dimension_beyond_the_tables_is_refused() -> None:
    arguments = problem(1, 2, 5000, torch.float32)
    with pytest.raises(ValueError, match="5000.*backend='cpp'"):
        call(_triton, "score", arguments)
