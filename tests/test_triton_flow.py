"""Triton flows against the reference, drawn starts against given ones: interpreted, or compiled (make gpu)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tolerances import FLOW_FLOAT32
from torch import Tensor

from flowfast import GaussianMixture, OUProcess, _triton, reference, solve_flow
from flowfast.kernels import flow as kernels
from flowfast.kernels.flow_prepare import prepare_mixture
from flowfast.kernels.random import draw_normals
from flowfast.tableaux import DORMAND_PRINCE, RK4

DEVICE = os.environ.get("FLOWFAST_TEST_DEVICE", "cpu")
DTYPES = (torch.float32, torch.float64)
# Relative error of a row that takes the reference's steps, median and worst. In float32 a trajectory that starts close
# to a boundary between components enlarges rounding, as the package's contract has it.
WITHIN = {torch.float32: FLOW_FLOAT32[:2], torch.float64: (1e-11, 1e-11)}
PROCESS = OUProcess(5.0)
LOOSE = (1e-2, 1e-3)  # tolerances that cost few steps: the comparison is with the reference at the same ones

# In the span of the means and in full; one row, whole tiles, one row more, primes.
SPAN = ((1, 1, 1), (3, 2, 5), (17, 3, 64), (16, 17, 64), (2, 5, 130))
FULL = ((17, 17, 5), (5, 70, 1), (2, 40, 32))
LARGE = ((2, 33, 64), (2, 70, 64), (1, 65, 66))  # for few steps: the interpreter takes long over the host's passes

# The interpreter computes with NumPy, which warns where a GPU says inf or NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Arguments = dict[str, Any]  # x, means, log_weights, center, ends


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill fresh memory with NaN or -77, so that an element that no kernel writes is seen."""

    def full(*size: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        value = math.nan if dtype is None or dtype.is_floating_point else -77
        return torch.full(*size, value, dtype=dtype, **options)

    monkeypatch.setattr(torch, "empty", full)
    yield


def _ends(std: float, t_from: Tensor | float, t_to: Tensor | float) -> Tensor:
    columns = [f(t, std) for t in (t_from, t_to) for f in (PROCESS.snr_root, PROCESS.std)]
    return torch.stack([torch.as_tensor(column, dtype=torch.float64) for column in columns])


def _problem(
    n: int, k: int, d: int, dtype: torch.dtype, *, std: float = 0.3, per_row: bool = False, seed: int = 0
) -> Arguments:
    """Noise at t = 1 to be carried to t = 0, or between times of its own in both directions."""
    generator = torch.Generator().manual_seed(seed)
    means = (2 * torch.rand(k, d, generator=generator) - 1) * 2
    t_from: Tensor | float = 1.0
    t_to: Tensor | float = 0.0
    if per_row:
        t_from = 0.02 + torch.rand(n, generator=generator, dtype=torch.float64)
        t_to = torch.rand(n, generator=generator, dtype=torch.float64) * 0.5
        t_to[::3] = t_from[::3]
    return {
        "x": torch.randn(n, d, generator=generator).to(dtype).to(DEVICE),
        "means": means.to(dtype).to(DEVICE),
        "log_weights": torch.randn(k, generator=generator).log_softmax(0).to(dtype).to(DEVICE),
        "center": torch.randn(d, generator=generator).to(dtype).to(DEVICE),
        "ends": _ends(std, t_from, t_to).to(DEVICE),
    }


def _table(steps: int, paper: bool, std: float = 0.3) -> tuple[Tensor, Tensor]:
    """h and coefficients of RK4 uniform in log r from t = 1 to t = 0, or of the paper's field uniform in t."""
    if not paper:
        r = torch.logspace(math.log10(PROCESS.snr_root(1.0, std)), -math.log10(std), steps + 1, dtype=torch.float64)
        at = r[:-1, None] + r.diff()[:, None] * RK4[4]
        one = torch.ones_like(at)
        return r.diff(), torch.stack([0 * one, one, one, at], -1)
    h = torch.full((steps,), -1 / steps, dtype=torch.float64)
    t = (1 + (torch.arange(steps, dtype=torch.float64)[:, None] + RK4[4]) * h[:, None]).clamp(min=0)
    beta, alpha, s = PROCESS.beta(t), PROCESS.alpha(t), PROCESS.std(t, std)
    return h, torch.stack([-beta * (1 - s**-2), -beta * alpha / s**2, 1 / s, alpha / s], -1)


def _error(got: Tensor, exact: Tensor) -> Tensor:
    """Relative error of every row; a row that is NaN in both has none."""
    both = got.isnan().all(1) & exact.isnan().all(1)
    error = (got.double() - exact.double()).norm(dim=1) / exact.double().norm(dim=1)
    return torch.where(both, 0.0, error.nan_to_num(nan=math.inf))


def _close(got: Tensor, exact: Tensor) -> bool:
    error, (median, most) = _error(got, exact), WITHIN[got.dtype]
    return float(error.median()) <= median and float(error.max()) <= most


def _agree(arguments: Arguments, tolerances: tuple[float, float] = LOOSE, max_steps: int = 1000) -> tuple[Tensor, ...]:
    """Adaptive steps agree with the reference: end points, status and cost, trajectory by trajectory."""
    dtype = arguments["x"].dtype
    got = _triton.flow_adaptive(
        **arguments, tableau=DORMAND_PRINCE, rtol=tolerances[0], atol=tolerances[1], max_steps=max_steps
    )
    exact = reference.flow_adaptive(
        **arguments, tableau=DORMAND_PRINCE, rtol=tolerances[0], atol=tolerances[1], max_steps=max_steps
    )
    assert got[0].dtype == dtype and got[0].is_contiguous()
    for mine, theirs in zip(got, exact, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
    assert got[1].equal(exact[1])
    same = got[2] == exact[2]  # rounding may decide whether a step is accepted
    assert int(same.sum()) >= 0.75 * len(same) and int((got[2] - exact[2]).abs().max()) <= 2
    assert got[3][same].equal(exact[3][same])
    assert _close(got[0][same], exact[0][same])
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SPAN + FULL, ids=str)
def test_adaptive_steps_agree_with_the_reference(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    _agree(_problem(*size, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(17, 5, 9), (17, 17, 3)], ids=str)
def test_ends_per_row_in_both_directions(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    arguments = _problem(*size, dtype, per_row=True)
    x, status, steps, evaluations = _agree(arguments)
    assert (status == 0).all() and (steps[::3] == 0).all() and (evaluations[::3] == 0).all()
    if kernels.form(size[1], size[2], dtype) == "span":  # the state is what was added to the start: nothing
        assert x[::3].equal(arguments["x"][::3])
    else:
        assert float(_error(x[::3], arguments["x"][::3]).max()) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("paper", [False, True], ids=["snr", "paper"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", (*SPAN[1::2], *FULL[::2], *LARGE), ids=str)
def test_fixed_steps_agree_with_the_reference(size: tuple[int, int, int], dtype: torch.dtype, paper: bool) -> None:
    arguments = _problem(*size, dtype)
    if paper:
        arguments |= {"center": torch.zeros_like(arguments["center"]), "ends": torch.tensor([0.0, 1, 0, 1]).double()}
    h, coefficients = _table(1 if size in LARGE else 5, paper)
    got, exact = (
        body.flow_fixed(**arguments, h=h, coefficients=coefficients, tableau=RK4) for body in (_triton, reference)
    )
    assert got[0].dtype == dtype and got[0].is_contiguous() and got[1].equal(exact[1])
    assert _close(got[0], exact[0])


def test_every_form_is_tested() -> None:
    for dtype in DTYPES:
        assert {kernels.form(k, d, dtype) for _, k, d in SPAN} == {"span"}
        assert {kernels.form(k, d, dtype) for _, k, d in FULL} == {"full"}
        assert "host" in {kernels.form(k, d, dtype) for _, k, d in LARGE}
    assert kernels.form(33, 64, torch.float32) == "span" and kernels.form(1797, 64, torch.float32) == "full"


def test_all_forms_are_the_same_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _problem(5, 7, 11, torch.float64, per_row=True)
    arguments["x"][3, 4] = math.nan
    span = _agree(arguments)
    for form in ("full", "host"):
        monkeypatch.setattr(kernels, "form", lambda *_, form=form: form)
        other = _agree(arguments)
        assert _close(other[0], span[0]) and other[2].equal(span[2])


@pytest.mark.parametrize("form", ["span", "full"])
def test_components_of_weight_zero_do_not_count(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "form", lambda *_: form)
    arguments = _problem(3, 40 if form == "full" else 12, 6, torch.float64)
    lightened = torch.full_like(arguments["log_weights"], -math.inf)
    keep = torch.tensor([2, 5, 6, 11])  # none of the last tiles
    lightened[keep] = arguments["log_weights"][keep]
    only = arguments | {"means": arguments["means"][keep], "log_weights": arguments["log_weights"][keep]}
    h, coefficients = _table(4, False)
    tables = {"h": h, "coefficients": coefficients, "tableau": RK4}
    got = _triton.flow_fixed(**(arguments | {"log_weights": lightened}), **tables)[0]
    assert _close(got, _triton.flow_fixed(**only, **tables)[0])


@pytest.mark.parametrize("std", [1e-3, 1e-8])
def test_low_noise_agrees_with_the_reference(std: float) -> None:
    """The posterior collapses on the way, and the logits end as large as 1 / std^2."""
    arguments = _problem(3, 3, 5, torch.float32, std=std)
    _agree(arguments)
    wide = {name: value.double() for name, value in arguments.items()}
    fine = _triton.flow_adaptive(**arguments, tableau=DORMAND_PRINCE, rtol=1e-4, atol=1e-5, max_steps=1000)
    exact = reference.flow_adaptive(**wide, tableau=DORMAND_PRINCE, rtol=1e-12, atol=1e-13, max_steps=1000)
    assert float(_error(fine[0], exact[0]).max()) <= FLOW_FLOAT32[1]


def test_default_accuracy_on_the_papers_mixture() -> None:
    means = GaussianMixture.random(20, 64, seed=0).means
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    one, two = (GaussianMixture(means.to(dtype).to(DEVICE), 0.1) for dtype in DTYPES)
    got = solve_flow(x, one, PROCESS, 1.0, 0.0, backend="triton")
    exact = solve_flow(x.double(), two, PROCESS, 1.0, 0.0, rtol=1e-12, atol=1e-13, backend="reference")
    error = _error(got.x, exact.x)
    assert got.backend == "triton" and (got.status == 0).all() and (got.evaluations == 6 * got.steps + 1).all()
    assert float(error.median()) <= FLOW_FLOAT32[0] and float(error.max()) <= FLOW_FLOAT32[2]


@pytest.mark.parametrize("k", [3, 20])
def test_strided_points_and_leading_dimensions(k: int) -> None:
    """Through the public function: transposed points, times per row; span form for k = 3, full form for k = 20."""
    mixture = GaussianMixture(GaussianMixture.random(k, 6, half_width=2.0).means.to(DEVICE), 0.5)
    x = torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(1)).to(DEVICE).permute(2, 1, 0)
    t_from = torch.tensor([[0.9], [0.2]], dtype=torch.float64)
    keywords: list[dict[str, Any]] = [{"steps": 3, "t_from": 1.0}, {"rtol": 0.01, "atol": 1e-3, "t_from": t_from}]
    for arguments in (*keywords, {"steps": 3, "method": "paper", "t_from": 1.0}):
        got, exact = (
            solve_flow(x, mixture, PROCESS, t_to=0.2, backend=backend, **arguments)
            for backend in ("triton", "reference")
        )
        assert got.x.shape == x.shape and got.steps.equal(exact.steps) and got.status.equal(exact.status)
        assert _close(got.x.reshape(-1, 6), exact.x.reshape(-1, 6))
    direct = _problem(4, k, 6, torch.float32)
    wide = torch.full((8, 18), math.nan, device=DEVICE)[::2, ::3].copy_(direct["x"])
    one, two = (
        _triton.flow_adaptive(**(direct | {"x": start}), tableau=DORMAND_PRINCE, rtol=0.01, atol=0.01, max_steps=2)
        for start in (wide, direct["x"])
    )
    assert one[0].equal(two[0]) and one[2].equal(two[2])


@pytest.mark.parametrize(
    ("size", "dtype"),
    [((36, 5, 9), torch.float32), ((20, 5, 9), torch.float64), ((20, 17, 3), torch.float64)],
    ids=["span-float32", "span-float64", "full-float64"],
)
def test_rows_do_not_see_each_other(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """A row alone gives the same bits as among others, some of which are not finite."""
    tile = size[0] - 4  # of the launch tables: the last rows begin a tile
    arguments = _problem(*size, dtype, per_row=True)
    arguments["x"][5, 2], arguments["x"][6] = math.nan, math.inf
    together = _agree(arguments)
    assert (together[1] == 2).nonzero()[:, 0].tolist() == [5, 6] and (together[2][5:7] == 0).all()
    assert together[0][5:7].isnan().all() and together[0].isnan().any(1).sum() == 2
    # The interpreter's float32 products are NumPy's, which round the rows of a tile differently: same place, same bits.
    anywhere = dtype == torch.float64 or not _triton.interpreting()
    for rows in (slice(0, 2), slice(tile, tile + 2), *([slice(7, 15), slice(19, 20)] if anywhere else [])):
        part = arguments | {"x": arguments["x"][rows], "ends": arguments["ends"][:, rows]}
        alone = _triton.flow_adaptive(**part, tableau=DORMAND_PRINCE, rtol=LOOSE[0], atol=LOOSE[1], max_steps=1000)
        assert all(mine.equal(ours[rows]) for mine, ours in zip(alone, together, strict=True))
    h, coefficients = _table(2, False)
    arguments["ends"] = _ends(0.3, 1.0, 0.0).to(DEVICE)
    tables = {"h": h, "coefficients": coefficients, "tableau": RK4}
    whole, status = _triton.flow_fixed(**arguments, **tables)
    assert status.nonzero()[:, 0].tolist() == [5, 6] and (status[5:7] == 2).all() and whole[5:7].isnan().all()
    assert _triton.flow_fixed(**(arguments | {"x": arguments["x"][tile:]}), **tables)[0].equal(whole[tile:])


@pytest.mark.parametrize("size", [(4, 5, 9), (4, 17, 3)], ids=["span", "full"])
def test_failed_trajectories_have_a_status(size: tuple[int, int, int]) -> None:
    """Too few steps, and a tolerance that no step meets; a failed row keeps the state it has reached."""
    x, status, steps, _ = _agree(_problem(*size, torch.float64), max_steps=3)
    assert (status == 1).all() and (steps == 3).all() and x.isfinite().all()
    arguments = _problem(*size, torch.float32)
    status = _triton.flow_adaptive(**arguments, tableau=DORMAND_PRINCE, rtol=1e-37, atol=0.0, max_steps=9)[1]
    assert (status == 3).all()


def test_no_rows_give_no_rows() -> None:
    arguments = _problem(0, 3, 2, torch.float32)
    h, coefficients = _table(2, False)
    adaptive = _triton.flow_adaptive(**arguments, tableau=DORMAND_PRINCE, rtol=1e-3, atol=1e-3, max_steps=9)
    fixed = _triton.flow_fixed(**arguments, h=h, coefficients=coefficients, tableau=RK4)
    assert adaptive[0].shape == fixed[0].shape == (0, 2) and all(len(part) == 0 for part in adaptive + fixed)


def test_means_that_coincide_take_one_step() -> None:
    """The rate is constant; with the means at the centre it is zero, and no length is there to begin with."""
    arguments = _problem(3, 4, 2, torch.float64)
    arguments["means"] = torch.zeros_like(arguments["means"])
    assert (_agree(arguments)[2] == 1).all()


@pytest.mark.parametrize("form", ["span", "full", "host"])
def test_drawn_starts(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "form", lambda *_: form)
    n, d = 3 if form == "host" else 19, 10
    arguments = _problem(n, 3, d, torch.float64)
    s_from = float(arguments["ends"][1])
    tables = {"tableau": DORMAND_PRINCE, "rtol": 0.1, "atol": 0.01, "max_steps": 2}
    unread = arguments["x"].new_full((1, 1), math.nan).expand(n, d)
    got = kernels.flow_adaptive(**(arguments | {"x": unread}), **tables, draw=(11, 5))
    arguments["x"] = s_from * draw_normals(n, d, 11, 5, dtype=torch.float64, device=torch.device(DEVICE))
    exact = _triton.flow_adaptive(**arguments, **tables)
    assert got[2].equal(exact[2]) and _close(got[0], exact[0])
    part = kernels.flow_adaptive(**(arguments | {"x": unread[:1]}), **tables, draw=(11, 6))
    assert part[0].equal(got[0][1:2])
    h, coefficients = _table(1, False)
    fixed = {"h": h, "coefficients": coefficients, "tableau": RK4}
    got = kernels.flow_fixed(**(arguments | {"x": unread}), **fixed, draw=(11, 5))
    assert _close(got[0], _triton.flow_fixed(**arguments, **fixed)[0])
    with pytest.raises(ValueError, match=rf"ends: got shape \(4, {n}\)"):
        many = arguments["ends"][:, None].expand(4, n)
        kernels.flow_fixed(**(arguments | {"x": unread, "ends": many}), **fixed, draw=(11, 5))


def test_pieces_carry_float32_products() -> None:
    """Three products of TF32 pieces, whose low bits the hardware drops, lose at most a few 2^-22 of |a| . |b|."""
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(40, 64, generator=generator) * 10 ** torch.linspace(-3, 3, 64) for _ in range(2))
    pieces = [prepare_mixture(m, torch.zeros(40), 8, 64, span=True) for m in (a, b)]
    (a_high, a_low), (b_high, b_low) = ((p.means[0], p.means_low[0]) for p in pieces)
    assert (a_high + a_low).equal(a) and not (a_high.view(torch.int32) & 0x1FFF).any()

    def kept(piece: Tensor) -> Tensor:
        return (piece.view(torch.int32) & -0x2000).view(torch.float32).double()

    got = kept(a_low) @ kept(b_high).T + kept(a_high) @ kept(b_low).T + kept(a_high) @ kept(b_high).T
    error = (got - a.double() @ b.double().T).abs() / (a.double().abs() @ b.double().abs().T)
    assert float(error.max()) <= 2**-21
    gram = pieces[0].gram.double() + pieces[0].gram_low
    assert float((gram - a.double() @ a.double().T).abs().max() / gram.abs().max()) <= 2**-23


def test_variants_name_every_configuration() -> None:
    assert torch.tensor(kernels.COMPILED, dtype=torch.float64).equal(DORMAND_PRINCE)
    found = kernels.variants()
    assert len({variant.name for variant in found}) == len(found)
    for variant in found:
        assert set(variant.kernel.arg_names) == set(variant.types) | set(variant.constants) and variant.products
        assert variant.launch.blocks["BLOCK_N"] < 64  # mma.sync, not WGMMA
