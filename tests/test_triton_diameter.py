"""The Triton diameter against distances by differences in float64: interpreted on the CPU, or compiled (make gpu)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from flowfast import GaussianMixture, _triton
from flowfast.kernels import diameter as kernels
from flowfast.kernels import launch

DEVICE = os.environ.get("FLOWFAST_TEST_DEVICE", "cpu")
DTYPES = (torch.float32, torch.float64)
WIDE = 2**-53  # unit roundoff of float64

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill fresh memory with NaN, so that an element that no kernel writes is seen."""
    monkeypatch.setattr(torch, "empty", lambda *size, **options: torch.full(*size, math.nan, **options))
    yield


def _make(kind: str, k: int, d: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(k, d, generator=generator, dtype=torch.float64)
    sign = 1 - 2 * (torch.arange(k) % 2)[:, None]
    means = {
        "normal": noise,
        "offset": 1e4 + 0.01 * noise,
        "sphere": noise / noise.norm(dim=1, keepdim=True),
        "clustered": sign * torch.ones(d) + 1e-6 * noise,  # half of all pairs are that far apart but for 1e-6
        "simplex": torch.eye(k, d, dtype=torch.float64),  # every pair is
        "equal": torch.ones(k, d, dtype=torch.float64),
        "tiny": 1e-30 * noise,
        "subnormal": (1e-42 if dtype == torch.float32 else 1e-310) * noise,
        "large": (1e29 if dtype == torch.float32 else 1e299) * noise,
        "lonely": torch.cat([1e3 * noise[:1], 1e-3 * noise[1:]]),
    }[kind]
    return means.to(dtype).to(DEVICE)


def _distance(means: Tensor) -> float:
    wide = means.double().cpu()
    unit = 2.0 ** math.frexp(float(wide.abs().max()))[1]  # so that squares stay in range
    return unit * max(float(((wide - row) / unit).square().sum(1).max()) for row in wide) ** 0.5


KINDS = ("normal", "offset", "sphere", "clustered", "simplex", "equal", "tiny", "subnormal", "large", "lonely")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (63, 2), (64, 16), (65, 17), (131, 11)], ids=str)
def test_ugly_sizes(size: tuple[int, int], dtype: torch.dtype) -> None:
    for kind in ("normal", "offset"):
        means = _make(kind, *size, dtype)
        assert _triton.diameter(means) == pytest.approx(_distance(means), rel=(size[1] + 8) * WIDE, abs=0), kind


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_of_sets(kind: str, dtype: torch.dtype) -> None:
    means = _make(kind, 67, 11, dtype)
    assert _triton.diameter(means) == pytest.approx(_distance(means), rel=19 * WIDE, abs=0)


@pytest.mark.parametrize("place", [0, 31, 32, 63, 64, 127, 128, 190])
def test_every_pair_of_tiles_is_seen(place: int) -> None:
    """Two lonely rows, wherever they stand."""
    for other in (0, 65):
        means = _make("normal", 192, 3, torch.float32)
        means[place, 0], means[other, 0] = 50.0, -50.0
        assert _triton.diameter(means) == pytest.approx(_distance(means), rel=1e-15), other


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_screen_brackets_every_group(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """lower <= exact <= upper, the exact values those of the second kernel, told to leave nothing out."""
    seen = {}

    def keep(name: str) -> object:
        kernel = getattr(kernels, f"{name}_kernel")

        class Kept:
            def __getitem__(self, grid: tuple[int, int]) -> object:
                def run(*arguments: object, **options: object) -> None:
                    if name == "recompute":
                        arguments = (*arguments[:2], arguments[2] * 0, *arguments[3:])  # best
                        seen["upper"], seen["exact"] = arguments[3:5]
                    else:
                        seen["lower"] = arguments[3]
                    kernel[grid](*arguments, **options)

                return run

        return Kept()

    for name in ("screen", "recompute"):
        monkeypatch.setattr(kernels, f"{name}_kernel", keep(name))
    means = _make(kind, 67, 34, dtype)
    _triton.diameter(means)
    lower, upper, exact = (seen[name].double() for name in ("lower", "upper", "exact"))
    assert exact.isfinite().all() and (lower <= exact).all() and (exact <= upper).all()
    if kind == "normal":
        assert ((upper - lower) / exact).max() < 1e-3  # and it is worth something


def test_result_does_not_depend_on_the_launch() -> None:
    means = _make("normal", 70, 17, torch.float32)
    expected = _triton.diameter(means)
    for blocks in ({"BLOCK_I": 16, "BLOCK_J": 16, "BLOCK_D": 16}, {"BLOCK_I": 32, "BLOCK_J": 128, "BLOCK_D": 32}):
        with launch.override("diameter", launch.Launch(blocks, 4, 1)):
            assert _triton.diameter(means) == expected


@pytest.mark.parametrize("k", [5, 100_000, 2_000_000])
def test_memory_is_what_the_module_says(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        def __getitem__(self, grid: tuple[int, int]) -> object:
            return lambda *arguments, **options: None

    taken = []

    def empty(*size: object, **options: object) -> Tensor:
        taken.append(torch.zeros(*size, **options))
        return taken[-1]

    monkeypatch.setattr(torch, "empty", empty)
    for name in ("screen", "recompute"):
        monkeypatch.setattr(kernels, f"{name}_kernel", Nothing())
    _triton.diameter(torch.zeros(k, 1, device=DEVICE))
    assert 0 < sum(array.nbytes for array in taken) <= 16 * (16_384 + k / 32 + 2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_diameter(value: float) -> None:
    means = _make("normal", 70, 5, torch.float32)
    means[66, 3] = value
    assert math.isnan(_triton.diameter(means))


def test_mixture_dispatches_to_it() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        means = _make("normal", 40, 6, dtype)
        strided = torch.stack([means, means], dim=2)[:, :, 0]
        mixture = GaussianMixture(strided, 1.0)
        assert mixture.diameter(backend="triton") == pytest.approx(_distance(means), rel=1e-14)
