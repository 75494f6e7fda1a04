"""The C++ bodies against formulas written out here in extended precision: every operation, dtype and ugly size."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowfast import _core, _cpp

Tensor = torch.Tensor
DTYPES = (torch.float32, torch.float64)
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}
SHAPES = [(1, 1), (2, 2), (7, 1), (20, 64), (20, 63), (129, 65), (7, 64), (2, 65), (129, 2), (1, 64)]
# (alpha, std): wide, deciding, collapsed, the contract's hardest corner of ordinary sizes
MARGINALS = [(1.0, 1.0), (0.15, 0.99), (0.9, 0.1), (0.5, 1e-3)]
RK4 = torch.tensor(
    [[0, 0, 0, 0], [0.5, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 1, 0], [0, 0.5, 0.5, 1],
     [1 / 6, 1 / 3, 1 / 3, 1 / 6], [0, 0, 0, 0]], dtype=torch.float64,
)  # fmt: skip
# Bogacki & Shampine (1989), order 3(2), last stage reused; and Heun-Euler 2(1), which reuses nothing
PAIRS = {
    "reused": torch.tensor(
        [[0, 0, 0, 0], [0.5, 0, 0, 0], [0, 0.75, 0, 0], [2 / 9, 1 / 3, 4 / 9, 0], [0, 0.5, 0.75, 1],
         [2 / 9, 1 / 3, 4 / 9, 0], [-5 / 72, 1 / 12, 1 / 9, -1 / 8]], dtype=torch.float64),
    "plain": torch.tensor([[0, 0], [1, 0], [0, 1], [0.5, 0.5], [-0.5, 0.5]], dtype=torch.float64),
}  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an element nobody wrote is seen; small sizes are fastest on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def make(k: int, d: int, dtype: torch.dtype, offset: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    means = torch.rand(k, d, generator=g, dtype=torch.float64) * 10 - 5 + offset
    log_weights = torch.log_softmax(torch.randn(k, generator=g, dtype=torch.float64), 0)
    if k > 3:
        log_weights[2] = -math.inf
    return means.to(dtype), log_weights.to(dtype)


def points(means: Tensor, n: int, alpha: Tensor, std: Tensor, seed: int = 1) -> Tensor:
    """Samples of the marginal, every third one half-way between two means."""
    g = torch.Generator().manual_seed(seed)
    k, d = means.shape
    pairs = torch.randint(k, (2, n), generator=g)
    pairs[1] = torch.where(torch.arange(n) % 3 == 0, pairs[1], pairs[0])
    noise = std.reshape(-1, 1) * torch.randn(n, d, generator=g, dtype=torch.float64)
    noise[::3] = 0
    return (alpha.reshape(-1, 1) * means.double()[pairs].mean(0) + noise).to(means.dtype)


def truth(x: Tensor, v: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor) -> dict[str, Any]:
    """The formulas of the mathematics page in long double, by differences."""
    x_, v_, m, lw = (t.double().numpy().astype(np.longdouble) for t in (x, v, means, log_weights))
    a, s = (t.numpy().astype(np.longdouble).reshape(-1, 1) for t in (alpha, std))
    logits = lw - ((x_[:, None] - a[..., None] * m[None]) ** 2).sum(-1) / (2 * s * s)
    top = logits.max(1, keepdims=True)
    weights = np.exp(logits - top)
    total = weights.sum(1, keepdims=True)
    weights /= total
    mean = weights @ m
    gaps = m[None] - mean[:, None]
    trace = (weights * (gaps**2).sum(-1)).sum(1)
    along = (gaps * v_[:, None]).sum(-1)
    return {
        "posterior_weights": weights,
        "log_density": (top + np.log(total))[:, 0] - x.shape[1] / 2 * np.log(2 * np.longdouble(np.pi) * s[:, 0] ** 2),
        "posterior_mean": mean,
        "score": (a * mean - x_) / s**2,
        "covariance_trace": trace,
        "hessian_vector_product": a**2 / s**4 * ((weights * along)[..., None] * gaps).sum(1) - v_ / s**2,
        "score_unit": np.sqrt((weights * ((x_[:, None] - a[..., None] * m) ** 2).sum(-1)).sum(1)) / s[:, 0] ** 2,
        "hessian_unit": (1 / s[:, 0] ** 2 + a[:, 0] ** 2 * trace / s[:, 0] ** 4) * np.sqrt((v_**2).sum(1)),
    }


def bodies(x: Tensor, v: Tensor, *mixture: Tensor) -> dict[str, Tensor]:
    names = ("log_density", "score", "posterior_mean", "covariance_trace", "posterior_weights")
    out = {name: getattr(_cpp, name)(x, *mixture) for name in names}
    return out | {"hessian_vector_product": _cpp.hessian_vector_product(x, v, *mixture)}


def check_pointwise(dtype: torch.dtype, k: int, d: int, alpha: Tensor, std: Tensor, n: int, far: float = 0.0) -> None:
    means, log_weights = make(k, d, dtype, far)
    x = points(means, n, alpha, std)
    v = torch.randn(n, d, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    got, want = bodies(x, v, means, log_weights, alpha, std), truth(x, v, means, log_weights, alpha, std)
    longest = means.double().norm(dim=1).max()
    limit = np.maximum(1e-10, 64 * EPS[dtype] * (1 + (alpha * longest / std).numpy())) * np.ones(n)
    spread = np.sqrt((((means - means.mean(0)).double()) ** 2).sum(1).max().item()) + EPS[dtype] * longest.item()
    noise = np.finfo(np.longdouble).eps * longest.item() / (std**2).numpy()  # of the truth itself
    units = {
        "posterior_weights": 1.0,
        "log_density": np.maximum(1, np.abs(want["log_density"])),
        "posterior_mean": spread + EPS[dtype] * longest.item(),
        "score": want["score_unit"] + noise / limit,
        "covariance_trace": want["covariance_trace"] + (std / alpha).numpy() ** 2,
        "hessian_vector_product": want["hessian_unit"],
    }
    for name, out in got.items():
        error = np.abs(out.double().numpy() - want[name])
        error = np.sqrt((error**2).sum(1)) if error.ndim == 2 else error
        worst = (error / units[name] / limit).max()
        assert worst <= 1, f"{name} {dtype} k={k} d={d} alpha={alpha} std={std}: {worst} of the contract"


def scalars(alpha: float, std: float) -> tuple[Tensor, Tensor]:
    return torch.tensor(alpha, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)


def per_row(n: int) -> tuple[Tensor, Tensor]:
    alpha = torch.linspace(0.02, 1, n, dtype=torch.float64)
    return alpha, (1 - 0.99 * alpha**2).sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "d"), SHAPES)
def test_pointwise_operations_keep_the_contract(dtype: torch.dtype, k: int, d: int) -> None:
    for alpha, std in MARGINALS:
        check_pointwise(dtype, k, d, *scalars(alpha, std), n=40)
    check_pointwise(dtype, k, d, *per_row(50), n=50)
    check_pointwise(dtype, k, d, *scalars(0.3, 0.95), n=40, far=1e4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    width = _core.block_float32() if dtype == torch.float32 else _core.block_float64()
    means, log_weights = make(20, 63, dtype)
    n = 3 * width + 2
    alpha, std = per_row(n)
    x, v = points(means, n, alpha, std), points(means, n, alpha, std, seed=5)
    whole = bodies(x, v, means, log_weights, alpha, std)
    for size in (0, 1, 3, width // 2 + 1, width - 1, width, width + 1, n):
        part = bodies(x[:size], v[:size], means, log_weights, alpha[:size].contiguous(), std[:size].contiguous())
        for name, out in part.items():
            assert out.equal(whole[name][:size]), (name, size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_give_the_same_bits(dtype: torch.dtype) -> None:
    means, log_weights = make(129, 64, dtype)
    alpha, std = per_row(700)
    x = points(means, 700, alpha, std)
    ends = torch.tensor([0.01, 1.0, 10.0, 0.1], dtype=torch.float64)
    center = torch.zeros(64, dtype=torch.float64)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        flow = _cpp.flow_adaptive(x, means, log_weights, center, ends, PAIRS["reused"], 1e-3, 1e-4, 1000)
        diameter = torch.tensor(_cpp.diameter(means))
        results.append([*bodies(x, x, means, log_weights, alpha, std).values(), *flow, diameter])
    for result in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_outputs_past_the_caches_have_the_same_bits(dtype: torch.dtype) -> None:
    """Several threads write more than 4 MiB past the caches, one does not; 33 is no multiple of a register."""
    means, log_weights = make(20, 64, dtype)
    alpha, std = scalars(0.15, 0.99)
    x = points(means, 20_033, alpha, std)
    torch.set_num_threads(2)
    several = bodies(x, x, means, log_weights, alpha, std)
    torch.set_num_threads(1)
    for name, out in bodies(x, x, means, log_weights, alpha, std).items():
        assert out.equal(several[name]), name


def test_a_mixture_too_large_to_be_packed_at_once() -> None:
    """Above 48 MiB the panels are packed by each worker, and several blocks of points share one."""
    g = torch.Generator().manual_seed(3)
    k, d, n = 13_200, 960, 100
    means = torch.randn(k, d, generator=g) + 3
    log_weights = torch.full((k,), -math.log(k))
    alpha, std = scalars(0.15, 0.99)
    x = 0.15 * (means[:n] + means[n : 2 * n]) / 2 + 0.99 * torch.randn(n, d, generator=g)
    wide = [t.double() for t in (x, means, log_weights)]
    limit = 64 * EPS[torch.float32] * (1 + 0.15 * means.double().norm(dim=1).max().item() / 0.99)
    torch.set_num_threads(2)
    score, weights = (getattr(_cpp, name)(x, means, log_weights, alpha, std) for name in ("score", "posterior_weights"))
    logits = 0.15 / 0.99**2 * (wide[0] @ wide[1].T - 0.15 / 2 * (wide[1] ** 2).sum(1))
    exact = torch.softmax(logits, 1)
    assert (weights - exact).norm(dim=1).max() <= limit
    want = (0.15 * exact @ wide[1] - wide[0]) / 0.99**2
    assert ((score - want).norm(dim=1) / want.norm(dim=1)).max() <= limit
    torch.set_num_threads(1)
    assert score.equal(_cpp.score(x, means, log_weights, alpha, std))
    assert abs(_cpp.diameter(means[:2000]) - torch.pdist(wide[1][:2000]).max()) <= 1e-4


def test_half_way_between_two_means_at_std_1e_8() -> None:
    means, log_weights = make(20, 64, torch.float64)
    log_weights = torch.full_like(log_weights, -math.log(20))
    alpha, std = scalars(0.7, 1e-8)
    x = 0.7 * (means[::2] + means[1::2]) / 2
    weights = _cpp.posterior_weights(x, means, log_weights, alpha, std)
    score = _cpp.score(x, means, log_weights, alpha, std)
    longest = means.norm(dim=1).max().item()
    limit = 64 * EPS[torch.float64] * (1 + 0.7 * longest / 1e-8)
    a, s2 = Fraction(0.7), Fraction(1e-8) ** 2
    for i in range(10):
        near = [2 * i, 2 * i + 1]
        squares = [
            sum((Fraction(p) - a * Fraction(q)) ** 2 for p, q in zip(x[i].tolist(), means[k].tolist(), strict=True))
            for k in near
        ]
        first = 1 / (1 + math.exp(max(-700, min(700, float((squares[0] - squares[1]) / (2 * s2))))))
        assert abs(weights[i, near[0]].item() - first) <= limit
        assert weights[i].sum().item() == pytest.approx(1, abs=1e-14)
        mean = first * means[near[0]] + (1 - first) * means[near[1]]
        unit = math.sqrt(first * float(squares[0]) + (1 - first) * float(squares[1])) / 1e-16
        assert ((0.7 * mean - x[i]) / 1e-16 - score[i]).norm().item() <= limit * unit


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_collapsed_posterior_has_exactly_no_covariance(dtype: torch.dtype) -> None:
    means, log_weights = make(20, 64, dtype)
    alpha, std = scalars(1.0, 0.01)
    x, v = means[3:9].clone(), torch.ones(6, 64, dtype=dtype)
    assert (_cpp.covariance_trace(x, means, log_weights, alpha, std) == 0).all()
    assert (_cpp.score(x, means, log_weights, alpha, std) == 0).all()
    product = _cpp.hessian_vector_product(x, v, means, log_weights, alpha, std)
    assert product.equal(torch.full_like(v, -1 / 0.01**2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_rows_stay_alone(dtype: torch.dtype) -> None:
    means, log_weights = make(20, 7, dtype)
    alpha, std = scalars(0.15, 0.99)
    x = points(means, 50, alpha, std)
    clean = bodies(x, x, means, log_weights, alpha, std)
    broken = x.clone()
    broken[7, 3], broken[20, 0], broken[49] = math.nan, math.inf, -math.inf
    good = torch.isfinite(broken).all(1)
    for name, out in bodies(broken, x, means, log_weights, alpha, std).items():
        assert out[good].equal(clean[name][good]), name
        assert not torch.isfinite(out[~good]).any(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_powers_of_two(dtype: torch.dtype) -> None:
    lowest = -125.0 if dtype == torch.float32 else -1021.0
    x = torch.linspace(lowest, 0, 100_001, dtype=dtype)
    exp2 = getattr(_core, f"exp2_{str(dtype).removeprefix('torch.')}")
    out = torch.empty_like(x)
    exp2(x.data_ptr(), out.data_ptr(), len(x))
    exact = np.exp2(x.numpy().astype(np.longdouble))
    ulp = np.spacing(exact.astype(out.numpy().dtype)).astype(np.longdouble)
    assert (np.abs(out.numpy() - exact) / ulp).max() <= 1.5
    special = torch.tensor([0.0, -0.0, -1.0, lowest * 1.01, -1e30, -math.inf, math.nan], dtype=dtype)
    out = torch.empty_like(special)
    exp2(special.data_ptr(), out.data_ptr(), len(special))
    assert out[:6].tolist() == [1, 1, 0.5, 0, 0, 0] and out[6].isnan()


def average(y: Tensor, r: float, means: Tensor, log_weights: Tensor) -> Tensor:
    return torch.softmax(log_weights + r * y @ means.T - r * r * (means**2).sum(1) / 2, 1) @ means


def check_flow_fixed(dtype: torch.dtype, k: int, d: int) -> None:
    means, log_weights = make(k, d, dtype, seed=3)
    center = torch.linspace(-1, 1, d, dtype=torch.float64) if d > 1 else torch.ones(1, dtype=torch.float64)
    ends = torch.tensor([0.1, 0.9, 0.8, 0.7], dtype=torch.float64)
    g = torch.Generator().manual_seed(4)
    h = 0.1 + 0.05 * torch.rand(6, generator=g, dtype=torch.float64)
    coefficients = torch.rand(6, 4, 4, generator=g, dtype=torch.float64) - torch.tensor([0.5, 0, 0, 0])
    coefficients[..., 3] *= 0.2
    x = torch.randn(37, d, generator=g, dtype=torch.float64).to(dtype)
    z = (x.double() - 0.1 * 0.9 * center) / 0.9
    for i in range(6):
        slopes: list[Tensor] = []
        for j in range(4):
            a, b, c, r = coefficients[i, j].tolist()
            y = z + h[i] * sum((RK4[j, q] * slopes[q] for q in range(j)), torch.zeros_like(z))
            slopes.append(a * y + b * average(c * y, r, means.double(), log_weights.double()))
        z = z + h[i] * sum((RK4[5, q] * slopes[q] for q in range(4)), torch.zeros_like(z))
    want = 0.7 * z + 0.8 * 0.7 * center
    limit = 2000 * EPS[dtype] * want.norm(dim=1).max()
    for form in ("span", "full", "automatic"):
        out, status = _cpp.flow_fixed(x, means, log_weights, center.to(dtype), ends, h, coefficients, RK4, form=form)
        assert (out.double() - want).norm(dim=1).max() <= limit and not status.any(), (form, k, d)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "d"), [(1, 1), (2, 65), (7, 2), (20, 64), (129, 63), (129, 65)])
def test_flow_fixed(dtype: torch.dtype, k: int, d: int) -> None:
    check_flow_fixed(dtype, k, d)


def adaptive(y: Tensor, means: Tensor, log_weights: Tensor, r: float, to: float, pair: Tensor, rtol: float, atol: float,
             first: float) -> tuple[Tensor, int]:  # fmt: skip
    """One trajectory, one state of shape (1, d), as the contract has it."""
    stages, h, calm, steps = pair.shape[1], first, True, 0
    rows = pair.tolist()
    while r != to:
        last = abs(h) >= abs(to - r)
        h = to - r if last else h
        slopes: list[Tensor] = []
        for j in range(stages):
            z = y + h * sum((rows[j][q] * slopes[q] for q in range(j)), torch.zeros_like(y))
            slopes.append(average(z, r + h * rows[stages][j], means, log_weights))
        new = y + h * sum((b * f for b, f in zip(rows[-2], slopes, strict=True)), torch.zeros_like(y))
        error = h * sum((e * f for e, f in zip(rows[-1], slopes, strict=True)), torch.zeros_like(y))
        size = max(y.square().mean().sqrt().item(), new.square().mean().sqrt().item())
        ratio = error.square().mean().sqrt().item() / (atol + rtol * size)
        factor = 10 if ratio == 0 else min(10, max(0.2, 0.9 * ratio**-0.2))
        steps += 1
        if ratio <= 1:
            y, r = new, to if last else r + h
            h, calm = h * (factor if calm else min(1, factor)), True
        else:
            h, calm = h * factor, False
    return y, steps


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("form", ["span", "full"])
@pytest.mark.parametrize(("start", "end"), [(0.01, 3.0), (3.0, 0.01)])
def test_flow_adaptive_step_by_step(pair: str, form: str, start: float, end: float) -> None:
    means, log_weights = make(7, 5, torch.float64, seed=6)
    center, rtol, atol = torch.ones(5, dtype=torch.float64), 1e-5, 1e-6
    means = means - means.mean(0)
    ends = torch.tensor([start, 0.9, end, 0.3], dtype=torch.float64)
    x = torch.randn(25, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * (1 + start * 3)
    out, status, steps, evaluations = _cpp.flow_adaptive(
        x, means, log_weights, center, ends, PAIRS[pair], rtol, atol, 100_000, form=form
    )
    scale = max(1 / means.norm(dim=1).max().item(), start) * 0.5 * rtol**0.2
    first = math.copysign(min(abs(end - start), scale), end - start)
    for i in range(25):
        y = (x[i : i + 1] - start * 0.9 * center) / 0.9
        y, count = adaptive(y, means, log_weights, start, end, PAIRS[pair], rtol, atol, first)
        assert (out[i] - (0.3 * y[0] + end * 0.3 * center)).abs().max() <= 1e-8
        assert steps[i] == count and status[i] == 0
    if pair == "reused":
        assert evaluations.equal(3 * steps + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["span", "full"])
def test_flow_adaptive_rows_are_independent_and_failures_are_reported(dtype: torch.dtype, form: str) -> None:
    means, log_weights = make(20, 12, dtype)
    n = 150
    ends = torch.stack([torch.linspace(0.01, 0.5, n), torch.ones(n), torch.linspace(0.5, 9, n), torch.full((n,), 0.1)])
    ends = ends.double()
    ends[2, 5] = ends[0, 5]
    x = torch.randn(n, 12, generator=torch.Generator().manual_seed(8), dtype=torch.float64).to(dtype)
    x[9, 3] = math.nan
    center = torch.zeros(12, dtype=dtype)

    def run(rows: slice, max_steps: int = 10_000) -> tuple[Tensor, ...]:
        part = ends[:, rows].contiguous()
        return _cpp.flow_adaptive(
            x[rows].contiguous(), means, log_weights, center, part, PAIRS["reused"], 1e-4, 1e-5, max_steps, form=form
        )

    out, status, steps, evaluations = run(slice(0, n))
    assert status[9] == 2 and out[9].isnan().all() and (status[torch.arange(n) != 9] == 0).all()
    assert steps[5] == 0 and evaluations[5] == 0 and torch.allclose(out[5], x[5] * 0.1, rtol=1e-6)
    assert torch.isfinite(out[torch.arange(n) != 9]).all()
    for rows in (slice(3, 4), slice(0, 33), slice(70, 150)):
        assert all(a.equal(b[rows]) for a, b in zip(run(rows)[1:], (status, steps, evaluations), strict=True))
        assert run(rows)[0].nan_to_num().equal(out[rows].nan_to_num())
    late = run(slice(0, n), 3)
    assert (late[2] <= 3).all() and (late[1][steps > 3] == 1).all() and torch.isfinite(late[0][20:]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "d"), [(20, 64), (129, 63), (2, 65)])
def test_span_and_full_form_agree(dtype: torch.dtype, k: int, d: int) -> None:
    means, log_weights = make(k, d, dtype)
    ends = torch.tensor([0.0067, 1.0, 10.0, 0.1], dtype=torch.float64)
    x = torch.randn(100, d, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
    center = torch.zeros(d, dtype=dtype)
    tight = (1e-5, 1e-6) if dtype == torch.float32 else (1e-8, 1e-9)
    span, full = (
        _cpp.flow_adaptive(x, means, log_weights, center, ends, PAIRS["reused"], *tight, 10_000, form=form)[0]
        for form in ("span", "full")
    )
    gap = (span - full).norm(dim=1) / full.norm(dim=1)
    assert gap.median() <= (1e-4 if dtype == torch.float32 else 1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "d"), [(1, 3), (2, 1), (33, 2), (129, 65), (300, 7)])
def test_diameter(dtype: torch.dtype, k: int, d: int) -> None:
    for offset in (0.0, 1e4):
        means, _ = make(k, d, dtype, offset)
        gaps = means.double()[:, None] - means.double()[None]
        want = (gaps**2).sum(-1).max().sqrt().item()
        assert abs(_cpp.diameter(means) - want) <= 4 * EPS[dtype] * want


def check_everything() -> None:
    """What a forced instruction set has to pass; run by the test below in a process of its own."""
    torch.set_num_threads(1)
    for dtype in DTYPES:
        for k, d in [(1, 1), (20, 64), (129, 65)]:
            for alpha, std in MARGINALS:
                check_pointwise(dtype, k, d, *scalars(alpha, std), n=17)
            check_flow_fixed(dtype, k, d)
    test_half_way_between_two_means_at_std_1e_8()
    test_flow_adaptive_step_by_step("reused", "span", 0.01, 3.0)
    test_flow_adaptive_step_by_step("reused", "full", 3.0, 0.01)
    for dtype in DTYPES:
        test_powers_of_two(dtype)
        test_non_finite_rows_stay_alone(dtype)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path} | environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_forced_instruction_set(isa: str) -> None:
    if isa not in _cpp.isas() or isa == _cpp.isa():
        pytest.skip(f"{isa} is not on this CPU, or is what every other test uses")
    done = python(f"import test_cpp as t; t.check_everything(); assert t._cpp.isa() == '{isa}'", FLOWFAST_ISA=isa)
    assert done.returncode == 0, done.stderr


def test_unknown_instruction_set_is_refused() -> None:
    done = python("from flowfast import _cpp; _cpp.isa()", FLOWFAST_ISA="sse9")
    assert done.returncode != 0 and "FLOWFAST_ISA" in done.stderr and "sse9" in done.stderr and "generic" in done.stderr


FORKS = """
import os, signal, torch
from flowfast import _cpp
torch.manual_seed(0)
m, x = torch.randn(200, 64), torch.randn(2000, 64)
one = torch.ones((), dtype=torch.float64)
w = torch.full((200,), -5.3)
# bytes: torch's own parallel operations do not survive a fork
run = lambda: _cpp.score(x, m, w, one, one).numpy().tobytes()
torch.set_num_threads(3)
want = run()
for _ in range(5):
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        os._exit(0 if run() == want else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert run() == want
"""


def test_pool_survives_fork() -> None:
    done = python(FORKS)
    assert done.returncode == 0, done.stderr


def test_wrong_tensors_are_refused_with_the_argument_named() -> None:
    means, log_weights = make(7, 5, torch.float64)
    alpha, std = scalars(1, 1)
    x = torch.zeros(3, 5, dtype=torch.float64)
    with pytest.raises(TypeError, match="means: got dtype"):
        _cpp.score(x, means.float(), log_weights, alpha, std)
    with pytest.raises(ValueError, match="means: got shape"):
        _cpp.score(x[:, :4].contiguous(), means, log_weights, alpha, std)
    with pytest.raises(ValueError, match="std: got shape"):
        _cpp.score(x, means, log_weights, alpha, std.expand(4).contiguous())
    with pytest.raises(ValueError, match="contiguous"):
        _cpp.score(torch.zeros(5, 3, dtype=torch.float64).T, means, log_weights, alpha, std)
    with pytest.raises(TypeError, match="float32 or float64"):
        _cpp.diameter(means.half())
    with pytest.raises(ValueError, match="log_weights"):
        _cpp.score(x, means, torch.full((7,), -math.inf, dtype=torch.float64), alpha, std)
