"""Triton bodies against plain float64 formulas and the reference: interpreted on the CPU, or compiled (make gpu)."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pointwise import DEVICE, OPS, call, error, plain, poisoned, problem
from tolerances import pointwise

from flowfast import _triton, reference

DTYPES = (torch.float32, torch.float64)
SIZES = ((1, 1, 1), (3, 2, 2), (16, 8, 1), (17, 9, 63), (15, 7, 64), (33, 20, 65), (2, 129, 3), (5, 3, 130))

# The interpreter computes with NumPy, which warns where a GPU says inf or NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "empty", poisoned)
    yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ugly_sizes_against_plain_formulas(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    for per_row in (True, False):
        arguments = problem(*size, dtype, per_row=per_row)
        for op in OPS:
            got, exact = call(_triton, op, arguments), plain(op, arguments)
            assert got.dtype == dtype and got.shape == exact.shape and got.is_contiguous()
            steepness = (arguments["means"].norm(dim=1).max() / arguments["std"].min()).item()
            scale = exact.reshape(len(exact), -1).norm(dim=1) + 1
            assert error(got, exact, scale) <= 8 * torch.finfo(dtype).eps * (1 + steepness), (op, per_row)


@pytest.mark.parametrize("op", OPS)
def test_strided_inputs_equal_contiguous_ones(op: str) -> None:
    arguments = problem(9, 5, 6, torch.float32)
    expected = call(_triton, op, arguments)
    strided = {}
    for name, value in arguments.items():
        wide = torch.full((*(2 * size for size in value.shape),), math.nan, dtype=value.dtype, device=DEVICE)
        strided[name] = wide[tuple(slice(None, None, 2) for _ in value.shape)]
        strided[name].copy_(value)
    assert torch.equal(call(_triton, op, strided), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [1.0, 0.7310585786300049])
def test_low_noise_keeps_the_contract(dtype: torch.dtype, alpha: float) -> None:
    """At means, half-way between them, beside that and far out; std down to 1e-8, means around 0 and around 1e4."""
    generator = torch.Generator().manual_seed(1)
    # Without fused multiply-add the interpreter loses x - alpha m where it is far smaller than std.
    unfused = _triton.interpreting() and alpha != 1
    for (k, d), std, offset in [
        ((k, d), std, offset) for k, d in ((2, 1), (5, 8)) for std in (1e-8, 1e-4, 0.1, 10.0) for offset in (0.0, 1e4)
    ]:
        m = ((2 * torch.rand(k, d, generator=generator, dtype=torch.float64) - 1) * 5 + offset).to(dtype)
        centres = alpha * m.double()
        noise = torch.randn(3, d, generator=generator, dtype=torch.float64) * std
        middle = (centres[:1] + centres[-1:]) / 2
        across = torch.randn(1, d, generator=generator, dtype=torch.float64)
        axis = centres[:1] - centres[-1:]
        bisector = middle + across - (across @ axis.T) * axis / axis.square().sum()
        x = torch.cat([centres[:1] + noise[:1], middle, middle + noise[1:2], bisector, centres[:1] + 40 * noise[2:]])
        arguments = {
            "x": x.to(dtype).to(DEVICE),
            "v": torch.randn(x.shape, generator=generator).to(dtype).to(DEVICE),
            "means": m.to(DEVICE),
            "log_weights": torch.randn(k, generator=generator).log_softmax(0).to(dtype).to(DEVICE),
            "alpha": torch.tensor(alpha, dtype=torch.float64, device=DEVICE),
            "std": torch.tensor(std, dtype=torch.float64, device=DEVICE),
        }
        allowed = pointwise(dtype, float(centres.norm(dim=1).max()), std)
        wide = {name: value.double() for name, value in arguments.items()}
        gamma, trace = (call(reference, op, wide) for op in ("posterior_weights", "covariance_trace"))
        away = (wide["x"][:, None] - alpha * wide["means"]).square().sum(2)  # (n, k)
        curvature = (1 / std**2 + alpha**2 * trace / std**4) * wide["v"].norm(dim=1)
        for op in ("log_density", "score", "posterior_weights", "hessian_vector_product"):
            exact = call(reference, op, wide)
            scale = {
                "log_density": exact.abs() if exact.ndim == 1 else 1.0,
                "score": ((gamma * away).sum(1) + unfused * std**2).sqrt() / std**2,
                "posterior_weights": gamma.norm(dim=1),
                "hessian_vector_product": curvature,
            }[op]
            share = error(call(_triton, op, arguments), exact, scale) / allowed
            assert share <= 1, (op, k, d, std, offset)


def test_many_coordinates_are_taken_in_chunks() -> None:
    """Half-way between means at low noise, in more coordinates than are read at a time: sums run over all chunks."""
    generator = torch.Generator().manual_seed(4)
    means = torch.randn(3, 1100, generator=generator).double()
    x = (means[[0, 1, 2]] + means[[1, 2, 0]]) / 2
    arguments = {
        "x": x.float().to(DEVICE),
        "v": torch.randn(3, 1100, generator=generator).to(DEVICE),
        "means": means.float().to(DEVICE),
        "log_weights": torch.full((3,), -math.log(3), device=DEVICE),
        "alpha": torch.tensor(1.0, dtype=torch.float64, device=DEVICE),
        "std": torch.tensor(1e-3, dtype=torch.float64, device=DEVICE),
    }
    for op in ("posterior_weights", "score", "log_density", "hessian_vector_product"):
        exact = plain(op, arguments)
        off = error(call(_triton, op, arguments), exact, exact.reshape(3, -1).norm(dim=1))
        assert off <= 4 * torch.finfo(torch.float32).eps, op


def test_a_collapsed_posterior_has_no_spread() -> None:
    arguments = problem(40, 11, 5, torch.float32, per_row=False)
    arguments |= {"std": torch.tensor(1e-4, dtype=torch.float64, device=DEVICE)}
    arguments["x"] = (arguments["alpha"] * arguments["means"].double()).float().repeat(4, 1)[:40]
    assert torch.equal(call(_triton, "covariance_trace", arguments), torch.zeros(40, device=DEVICE))
    product = call(_triton, "hessian_vector_product", arguments)
    torch.testing.assert_close(product, -arguments["v"] * 1e8, rtol=1e-6, atol=0)


@pytest.mark.parametrize("op", OPS)
def test_rows_do_not_see_each_other(op: str) -> None:
    """A row alone gives the same bits as among others, far rows (which take the second sweep) included."""
    arguments = problem(21, 10, 7, torch.float32)
    arguments["x"][::4] *= 30
    arguments["x"][5, 2], arguments["x"][6] = math.nan, math.inf
    together = call(_triton, op, arguments)
    for row in (0, 1, 4, 7, 20):
        alone = {
            name: value[row : row + 1] if name in ("x", "v", "alpha", "std") else value
            for name, value in arguments.items()
        }
        assert torch.equal(call(_triton, op, alone)[0], together[row])
    finite = together.reshape(21, -1).isfinite().all(1)
    assert finite.logical_not().nonzero()[:, 0].tolist() == [5, 6]
    assert not together[5:7].isfinite().any()


@pytest.mark.parametrize("op", OPS)
def test_components_of_weight_zero_do_not_count(op: str) -> None:
    arguments = problem(6, 12, 3, torch.float64)
    keep = torch.tensor([2, 5, 6, 11], device=DEVICE)
    only = arguments | {"means": arguments["means"][keep], "log_weights": arguments["log_weights"][keep]}
    lightened = torch.full_like(arguments["log_weights"], -math.inf)
    lightened[keep] = arguments["log_weights"][keep]
    got, exact = call(_triton, op, arguments | {"log_weights": lightened}), call(_triton, op, only)
    if op == "posterior_weights":
        assert float(got.sum(1).sub(1).abs().max()) < 1e-12
        got = got[:, keep]
    torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_no_rows_give_no_rows(op: str) -> None:
    arguments = problem(0, 3, 2, torch.float32)
    assert call(_triton, op, arguments).shape == plain(op, arguments).shape


def test_adapter_says_what_it_can() -> None:
    assert _triton.available()
    assert all(_triton.supports(op) for op in (*OPS, "flow_fixed", "flow_adaptive", "diameter"))
    assert not _triton.supports("sample")


def test_adapter_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not _triton.available() and "CUDA" in _triton.missing_message()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not _triton.available() and "pip install" in _triton.missing_message()


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flowfast.kernels import posterior, products

wanted = "float32 d<=16 (score|posterior_mean)|float64 d<=4 hess"
chosen = [v for v in posterior.variants() if re.search(wanted, v.name)]
wanted = "(pieces|weights) .*d<=64( bf16x6)?$|products .*d<=64 bf16x6 means|finish .*d<=64 bf16x6 score"
chosen += [v for v in products.variants() if re.search(wanted, v.name)]
assert len(chosen) == 7, [v.name for v in chosen]
for i, variant in enumerate(chosen):
    names = variant.kernel.arg_names
    kinds = {name: variant.types.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in variant.constants.items()}
    options = {"num_warps": variant.launch.warps, "num_stages": variant.launch.stages}
    target = GPUTarget("cuda", (80, 90, 100)[i % 3], 32)
    kernel = triton.compile(ASTSource(variant.kernel, kinds, values), target=target, options=options)
    assert kernel.metadata.shared <= 163 * 1024 and kernel.asm["cubin"], variant.name
    assert ("mma.sync" in kernel.asm["ptx"]) == variant.products, variant.name
"""


def test_compiles_for_gpus_without_one(tmp_path: Path) -> None:
    """The interpreter accepts programs that the compiler refuses, so both dtypes also go through the compiler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
