"""Counter-based draws: published answers, laws, and the same bits however rows are divided."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import mpmath
import pytest
import torch
from torch import Tensor

from flowfast import GaussianMixture, OUProcess, _cpp, philox, sample_rows

DTYPES = (torch.float32, torch.float64)
PROCESS = OUProcess(5.0)
RELATIVE = 8  # eps that a normal may be off, relative to itself
FAR = 2**33 + 5  # a row whose number needs both words


def standard(d: int, dtype: torch.dtype) -> GaussianMixture:
    """One component at zero: its draws are the normals themselves."""
    return GaussianMixture(torch.zeros(1, d, dtype=dtype), 1.0)


def uneven(dtype: torch.dtype, d: int = 5) -> GaussianMixture:
    """Components of weight zero first, last and between the others."""
    means = GaussianMixture.random(7, d, seed=1).means.to(dtype)
    return GaussianMixture(means, 0.1, [0.0, 1.0, 3.0, 0.0, 2.0, 2.0, 0.0])


@pytest.mark.parametrize(
    ("row", "quarter", "what", "seed", "block"),
    [
        (0, 0, 0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (-1, 0xFFFFFFFF, 0xFFFFFFFF, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (0x85A308D3243F6A88 - 2**64, 0x13198A2E, 0x03707344, 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_published_answers(row: int, quarter: int, what: int, seed: int, block: str) -> None:
    """kat_vectors of the Random123 library (Salmon et al. 2011): counter and key of zeros, of ones, of digits of pi."""
    words = philox.words(seed, torch.tensor(row), torch.tensor(quarter), what)
    assert " ".join(f"{int(word):08x}" for word in words) == block


def test_the_reference_turns_words_into_normals_exactly() -> None:
    """Against 40 digits, at the ends of the range, next to the axes and where the logarithm vanishes."""
    edges = [0, 1, 2, 2**29 - 1, 2**29, 2**30 - 1, 2**30, 2**30 + 1, 2**31, 3 * 2**30 + 1, 2**32 - 2, 2**32 - 1]
    for first in edges:
        for second in edges:
            pair = philox.normal_pair(torch.tensor(first), torch.tensor(second))
            with mpmath.workdps(40):
                radius = mpmath.sqrt(-2 * mpmath.log((mpmath.mpf(first) + 0.5) / 2**32))
                exact = [radius * f(mpmath.mpf(second) / 2**31) for f in (mpmath.cospi, mpmath.sinpi)]
            for got, want in zip(pair, exact, strict=True):
                assert abs(float(got) - want) <= RELATIVE * 2.0**-52 * abs(want), (first, second)


def allowed(exact: Tensor, alpha: Tensor | float, dtype: torch.dtype) -> Tensor:
    """Error of draws, means within 5.

    alpha m: rounded twice; std z: the normal's error and two roundings; their sum: one more of each.
    """
    return (1.5 * 5 * alpha + (RELATIVE + 1.5) * (exact.abs() + 5 * alpha)) * torch.finfo(dtype).eps


def check_against_the_reference() -> None:
    """Called again under every instruction set."""
    for dtype in DTYPES:
        eps = torch.finfo(dtype).eps
        for n, d, first_row in ((100_000, 3, FAR), (500, 133, 2**32 - 7)):
            exact = sample_rows(standard(d, torch.float64), 2**62 + 3, first_row, n, backend="reference")
            z = sample_rows(standard(d, dtype), 2**62 + 3, first_row, n, backend="cpp")
            assert float(((z.double() - exact) / exact).abs().max()) <= RELATIVE * eps
        for t in (0.0, 0.3, torch.linspace(0, 1, 999)):
            x = sample_rows(uneven(dtype), 1, 7, 999, process=PROCESS, t=t, backend="cpp")
            wide = uneven(dtype).to(torch.float64)
            exact = sample_rows(wide, 1, 7, 999, process=PROCESS, t=t, backend="reference")
            alpha = PROCESS.alpha(t).reshape(-1, 1)
            assert bool(((x.double() - exact).abs() <= allowed(exact, alpha, dtype)).all())


def test_the_kernels_draw_what_the_reference_draws() -> None:
    check_against_the_reference()


@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_other_instruction_sets(isa: str) -> None:
    if isa not in _cpp.isas() or isa == _cpp.isa():
        pytest.skip(f"{isa} is not on this CPU, or is what every other test uses")
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    code = f"import test_sampling as t; t.check_against_the_reference(); assert t._cpp.isa() == '{isa}'"
    environment = os.environ | {"PYTHONPATH": path, "FLOWFAST_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 2, 5, 64, 131])
def test_rows_do_not_depend_on_how_they_are_divided(d: int, dtype: torch.dtype) -> None:
    mixture, t = uneven(dtype, d), torch.linspace(0, 1, 101)
    whole = sample_rows(mixture, 3, FAR, 101, process=PROCESS, t=t)
    begin = 0
    for size in (1, 2, 7, 8, 15, 16, 17, 33, 0, 2):
        part = sample_rows(mixture, 3, FAR + begin, size, process=PROCESS, t=t[begin : begin + size])
        assert part.equal(whole[begin : begin + size]), size
        begin += size
    alone = sample_rows(mixture, 3, FAR + 50, 1, process=PROCESS, t=float(t[50]))
    assert begin == 101 and alone.equal(whole[50:51])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_give_the_same_bits(dtype: torch.dtype) -> None:
    mixture, threads, drawn = uneven(dtype, 65), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            drawn.append(sample_rows(mixture, 0, 0, 4_001))  # 13 Mflop: enough for all of them
    finally:
        torch.set_num_threads(threads)
    assert drawn[1].equal(drawn[0]) and drawn[2].equal(drawn[0])


def test_normals_have_their_law() -> None:
    """At a fixed seed: Kolmogorov-Smirnov, moments and correlations within five standard deviations."""
    from scipy.stats import kstest

    z = sample_rows(standard(8, torch.float64), 11, 0, 50_000)
    assert kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    total = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - moment) <= 5 * math.sqrt(variance / total), power
    for other in (z.roll(1, 0), z.roll(1, 1), sample_rows(standard(8, torch.float64), 12, 0, 50_000)):
        for f in (torch.clone, torch.square):
            a, b = ((f(x) - f(x).mean()) / f(x).std() for x in (z, other))
            assert abs(float((a * b).mean())) <= 5 / math.sqrt(total)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_components_come_as_often_as_they_weigh(backend: str) -> None:
    mixture = uneven(torch.float64)
    n = 40_000
    x = sample_rows(mixture, 2, 0, n, backend=backend)
    counts = torch.bincount(torch.cdist(x, mixture.means).argmin(1), minlength=7)  # std 0.1: never in doubt
    expected = n * mixture.weights
    assert bool((counts[mixture.weights == 0] == 0).all())
    assert bool(((counts - expected).abs() <= 5 * (expected * (1 - mixture.weights)).sqrt()).all())


def test_a_component_of_all_the_weight_is_always_taken() -> None:
    for k in (1, 2, 3, 64, 65):
        for only in {0, k // 2, k - 1}:
            weights = torch.zeros(k, dtype=torch.float64)
            weights[only] = 1
            mixture = GaussianMixture(torch.arange(k, dtype=torch.float64)[:, None], 1e-6, weights)
            assert bool((sample_rows(mixture, 0, 0, 200).round() == only).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_draws_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the kernels are compiled here, for tensors on a GPU")
    mixture = uneven(dtype, 37)
    got = sample_rows(mixture, 9, FAR, 40, process=PROCESS, t=0.2, backend="triton")
    exact = sample_rows(mixture.to(torch.float64), 9, FAR, 40, process=PROCESS, t=0.2, backend="reference")
    assert bool(((got.double() - exact).abs() <= allowed(exact, float(PROCESS.alpha(0.2)), dtype)).all())


def test_sixteen_bits_are_drawn_in_float32() -> None:
    mixture = uneven(torch.float32)
    half = GaussianMixture(mixture.means.bfloat16(), 0.1, mixture.weights)
    drawn = sample_rows(half, 0, 0, 10)
    assert drawn.dtype == torch.bfloat16 and drawn.equal(sample_rows(half.to(torch.float32), 0, 0, 10).bfloat16())
    assert sample_rows(mixture, 0, 0, 0).shape == (0, 5)


def test_bad_arguments_are_named() -> None:
    mixture = uneven(torch.float32)
    with pytest.raises(ValueError, match=r"seed must be at least 0 and below 2\^63; got 9223372036854775808"):
        sample_rows(mixture, 2**63, 0, 1)
    with pytest.raises(TypeError, match="first_row must be an int; got float"):
        sample_rows(mixture, 0, 1.0, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n must be at least 0"):
        sample_rows(mixture, 0, 0, -1)
    with pytest.raises(ValueError, match=r"first_row \+ n"):
        sample_rows(mixture, 0, 2**63 - 1, 2)
    with pytest.raises(ValueError, match="pass process="):
        sample_rows(mixture, 0, 0, 1, t=0.5)
    with pytest.raises(ValueError, match=r"t must be a number or of shape \(2,\)"):
        sample_rows(mixture, 0, 0, 2, process=PROCESS, t=Tensor([0.1, 0.2, 0.3]))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
def test_draws_go_to_out(backend: str, dtype: torch.dtype) -> None:
    mixture = uneven(torch.float64).to(dtype)
    drawn = sample_rows(mixture, 3, 5, 40, process=PROCESS, t=0.2, backend=backend)
    out = torch.full_like(drawn, math.nan)
    assert sample_rows(mixture, 3, 5, 40, process=PROCESS, t=0.2, out=out, backend=backend) is out and out.equal(drawn)
    for wrong in (out[:39].clone(), out.to(torch.float16), out.T.contiguous().T):
        with pytest.raises(ValueError, match="out must be"):
            sample_rows(mixture, 3, 5, 40, out=wrong, backend=backend)
