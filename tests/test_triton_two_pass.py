"""The posterior pass for d > 256 against the reference in float64: interpreted on the CPU, or compiled (make gpu)."""

from __future__ import annotations

import itertools
import math
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tolerances import pointwise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowfast import reference
from flowfast.kernels import stages, workspace
from flowfast.kernels.outputs import OUTPUTS
from flowfast.kernels.two_pass import two_pass, variants

DEVICE = os.environ.get("FLOWFAST_TEST_DEVICE", "cpu")
SMALL = 1 << (17 if DEVICE == "cuda" else 18)  # bytes, for two chunks of the screen at k = 300
STDS = (20.0, 10.0, 1.0, 0.1, 1e-4, 1e-8)
POISON = {torch.int32: -7, torch.int64: -7, torch.int8: 77}

# The interpreter computes with NumPy, which warns where a GPU says inf or NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Problem = dict[str, Tensor]  # arguments of `two_pass` in order, v is its direction


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill fresh memory with NaN or nonsense, so that an element that no kernel writes is seen."""
    monkeypatch.setattr(
        torch, "empty", lambda *size, **options: torch.full(*size, POISON.get(options["dtype"], math.nan), **options)
    )
    yield


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ways that rows take, in order."""
    taken: list[int] = []
    choose: Callable[..., Tensor] = stages._ways

    def spy(*arguments: Any) -> Tensor:
        way = choose(*arguments)
        taken.extend(way.tolist())
        return way

    monkeypatch.setattr(stages, "_ways", spy)
    return taken


def _problem(
    n: int, k: int, d: int, dtype: torch.dtype, *, stds: tuple[float, ...] = STDS, offset: float = 0.0, seed: int = 0
) -> Problem:
    """Rows drawn from their mixtures, and every third half-way between two centres; row i has std stds[i % len]."""
    generator = torch.Generator().manual_seed(seed)
    means = ((2 * torch.rand(k, d, generator=generator, dtype=torch.float64) - 1) * 5 + offset).to(dtype)
    std = torch.tensor(list(itertools.islice(itertools.cycle(stds), n)), dtype=torch.float64)
    alpha = 0.3 + 0.7 * torch.rand(n, generator=generator, dtype=torch.float64)
    one, other = (torch.randint(k, (n,), generator=generator) for _ in range(2))
    noise = torch.randn(n, d, generator=generator, dtype=torch.float64) * std[:, None]
    between = (torch.arange(n) % 3 == 2)[:, None]
    centre = torch.where(between, (means[one].double() + means[other].double()) / 2, means[one].double())
    return {
        "x": (alpha[:, None] * centre + torch.where(between, 0.0, noise)).to(dtype).to(DEVICE),
        "means": means.to(DEVICE),
        "log_weights": torch.randn(k, generator=generator).log_softmax(0).to(dtype).to(DEVICE),
        "alpha": alpha.to(DEVICE),
        "std": std.to(DEVICE),
        "v": torch.randn(n, d, generator=generator).to(dtype).to(DEVICE),
    }


def _run(problem: Problem, *, outputs: tuple[str, ...] = OUTPUTS, **options: Any) -> dict[str, Tensor]:
    *arguments, v = problem.values()
    return two_pass(*arguments, outputs=outputs, direction=v, **options)


def _plain(problem: Problem) -> dict[str, Tensor]:
    x, means, log_weights, alpha, std, v = (value.double() for value in problem.values())
    rest = (means, log_weights, alpha, std)
    exact = {name: getattr(reference, name)(x, *rest) for name in OUTPUTS if name != "hessian_vector_product"}
    return exact | {"hessian_vector_product": reference.hessian_vector_product(x, v, *rest)}


def _shares(got: dict[str, Tensor], problem: Problem) -> dict[str, Tensor]:
    """Error of every row and output, norm-wise, as a share of the contract."""
    x, means, _, alpha, std, v = (value.double() for value in problem.values())
    exact = _plain(problem)
    alpha, std = alpha.expand(len(x)), std.expand(len(x))
    weights, trace = exact["posterior_weights"], exact["covariance_trace"]
    away = (x[:, None] - alpha[:, None, None] * means).square().sum(2)  # (n, k)
    largest = means.norm(dim=1).max()
    scales = {
        "log_density": exact["log_density"].abs(),
        "score": (weights * away).sum(1).sqrt() / std**2,
        "posterior_mean": exact["posterior_mean"].norm(dim=1),
        "covariance_trace": trace + (weights @ (means - means.mean(0)).square().sum(1)),
        "posterior_weights": weights.norm(dim=1),
        "hessian_vector_product": (1 / std**2 + alpha**2 * trace / std**4) * v.norm(dim=1),
    }
    shares = {}
    for name, values in got.items():
        assert values.dtype == problem["x"].dtype and values.shape == exact[name].shape and values.is_contiguous()
        error = (values.double() - exact[name]).reshape(len(x), -1).norm(dim=1)
        allowed = [pointwise(values.dtype, float(a * largest), float(s)) for a, s in zip(alpha, std, strict=True)]
        share = error / (scales[name] * torch.tensor(allowed, dtype=torch.float64, device=DEVICE))
        shares[name] = torch.where(error == 0, 0.0, share).nan_to_num(nan=math.inf)
    return shares


def _assert_contract(got: dict[str, Tensor], problem: Problem, most: float = 1.0) -> None:
    for name, share in _shares(got, problem).items():
        assert float(share.max()) <= most, (name, share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_every_noise_keeps_the_contract(dtype: torch.dtype, offset: float, ways: list[int]) -> None:
    problem = _problem(12, 97, 257, dtype, offset=offset)
    _assert_contract(_run(problem), problem)
    assert stages.SETTLED in ways and stages.PRODUCTS in ways


@pytest.mark.parametrize("size", [(1, 1, 257), (3, 2, 264), (2, 131, 300), (9, 33, 259)], ids=str)
def test_ugly_sizes(size: tuple[int, int, int]) -> None:
    problem = _problem(*size, torch.float32, stds=(20.0, 0.5))
    for refine in (True, False) if size[1] > 2 else (True,):
        rough = dict(problem)
        if not refine:  # products alone serve noise that is not small
            rough["std"] = torch.tensor(20.0, dtype=torch.float64, device=DEVICE)
        _assert_contract(_run(rough, refine=refine), rough)


@pytest.mark.parametrize("precision, most", [("bf16x3", 64.0), ("bf16x6", 1.0), ("ieee", 1.0)])
def test_precisions_of_products(precision: str, most: float) -> None:
    problem = _problem(4, 70, 257, torch.float32, stds=(20.0, 30.0))
    got = _run(problem, precision=precision, refine=False)
    _assert_contract(got, problem, most)
    if precision == "bf16x3":  # its two pieces are not float32
        assert float(_shares(got, problem)["covariance_trace"].max()) > 1e-3


def test_settings_decide_what_ieee_means() -> None:
    device = torch.device(DEVICE)
    settings = torch.backends.cuda.matmul if DEVICE == "cuda" else torch.backends.mkldnn.matmul
    assert not workspace.form("ieee", device).rounded
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "tf32"
        assert workspace.form("ieee", device) == workspace.form("bf16x6", device)
    finally:
        settings.fp32_precision = before


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="tf32.*bf16x6"):
        _run(_problem(1, 2, 257, torch.float32), precision="tf32")


@pytest.mark.parametrize("kind", ["random", "aligned"])
def test_the_bound_of_the_screen_holds(kind: str) -> None:
    """Also where all roundings go the same way, which is as bad as it gets."""
    generator = torch.Generator().manual_seed(2)
    x, m = torch.randn(2, 40, 512, generator=generator).unbind()
    if kind == "aligned":
        x, m = (torch.full_like(x, 1 + 2.0**-8 - 2.0**-20) for _ in range(2))
    screen = workspace.form("bf16x1", torch.device(DEVICE))
    out = torch.full((1, 40, 40), math.nan, device=DEVICE)
    stages._dots(x.bfloat16().to(DEVICE, screen.store), m.bfloat16().to(DEVICE, screen.store), out, 512, screen)
    error = (out[0].cpu().double() - x.double() @ m.double().T).abs()
    bound = stages.screen_error(512) * x.double().norm(dim=1)[:, None] * m.double().norm(dim=1)
    assert bool((error <= bound).all())
    if kind == "aligned":
        assert bool((error >= bound * 0.9).all())


@pytest.mark.parametrize("precision", ["bf16x3", "bf16x6", "ieee"])
@pytest.mark.parametrize("kind", ["noise", "aligned"])
def test_products_are_as_good_as_expected(precision: str, kind: str) -> None:
    """The estimate that chooses a row's way, against the worst of 16 x 400 products."""
    d, generator = 2500, torch.Generator().manual_seed(3)
    how = workspace.form(precision, torch.device(DEVICE))
    m = torch.rand(400, d, generator=generator) - 0.5
    x = torch.randn(16, d, generator=generator) if kind == "noise" else m[:16]
    rest = [x, m]
    cut: list[list[Tensor]] = [[], []]
    for _ in range(how.pieces):
        for i in (0, 1):
            cut[i].append(rest[i].bfloat16().float() if how.rounded else rest[i])
            rest[i] = rest[i] - cut[i][-1]
    wide = (torch.cat(pieces, 1).to(DEVICE, how.store) for pieces in (cut[0][::-1], cut[1]))
    out = torch.full((3 + how.pieces - 1, 16, 400), math.nan, device=DEVICE)
    stages._dots(*wide, out, d, how)
    exact = x.double() @ m.double().T
    error = (out.double().sum(0).cpu() - exact).abs().max()
    lengths = x.double().norm(dim=1).max() * m.double().norm(dim=1).max()
    assert 0 < error <= stages.expected_error(how, d, exact.abs().max(), lengths)


def test_more_candidates_than_the_list_holds(ways: list[int]) -> None:
    """Forty means in one place: no list of 32 holds them; products serve as long as they are precise enough."""
    problem = _problem(3, 60, 257, torch.float32, stds=(20.0, 0.1, 1e-8))
    problem["means"][:40] = problem["means"][0]
    problem["x"][:] = problem["alpha"][:, None].float() * problem["means"][0]
    problem["x"] += 0.5 * problem["std"][:, None].float() * problem["v"]
    _assert_contract(_run(problem), problem)
    assert ways == [stages.PRODUCTS, stages.WIDE_PRODUCTS, stages.DIFFERENCES]


def test_components_lost_early_do_not_matter_when_a_later_one_leads(
    monkeypatch: pytest.MonkeyPatch, ways: list[int]
) -> None:
    """The first chunk overflows the list; the last component is the one."""
    monkeypatch.setattr(workspace, "BUDGET", SMALL)
    lost = []
    choose = stages._ways
    monkeypatch.setattr(stages, "_ways", lambda *args: (lost.append(args[6].clone()), choose(*args))[1])
    problem = _problem(3, 300, 257, torch.float32, stds=(0.1,))
    assert workspace.plan(3, 300, 257, workspace.form("bf16x1", torch.device(DEVICE)), screen=True).chunks > 1
    problem["means"][:40] = problem["means"][-1] + 1
    problem["x"] = problem["alpha"][:, None].float() * problem["means"][-1]
    _assert_contract(_run(problem), problem)
    assert set(ways) == {stages.SETTLED} and bool(lost[0].isfinite().all())


def test_chunks_and_blocks_give_what_one_gives(monkeypatch: pytest.MonkeyPatch, ways: list[int]) -> None:
    problem = _problem(5, 300, 257, torch.float32, stds=(20.0, 0.1))
    whole = _run(problem)
    monkeypatch.setattr(workspace, "BUDGET", SMALL)
    monkeypatch.setattr(workspace, "ROWS", 3)
    for name in ("bf16x1", "bf16x6"):
        sizes = workspace.plan(5, 300, 257, workspace.form(name, torch.device(DEVICE)), screen=name == "bf16x1")
        assert sizes.rows <= 3 and sizes.chunks > 1
    pieces = _run(problem)
    _assert_contract(pieces, problem)
    settled = torch.tensor(ways[:5]) == stages.SETTLED
    assert ways[:5] == ways[5:] and 0 < int(settled.sum()) < 5
    for name, values in pieces.items():
        assert torch.equal(values[settled], whole[name][settled]), name


def test_a_collapsed_posterior_has_no_spread() -> None:
    problem = _problem(5, 40, 300, torch.float32, stds=(1e-4,))
    problem["x"] = (problem["alpha"][:, None] * problem["means"][:5].double()).float()
    got = _run(problem)
    assert torch.equal(got["covariance_trace"], torch.zeros(5, device=DEVICE))
    assert torch.equal(got["posterior_mean"], problem["means"][:5])
    torch.testing.assert_close(got["hessian_vector_product"], -problem["v"] * 1e8, rtol=1e-6, atol=0)
    away = problem["x"].double() - problem["alpha"][:, None] * problem["means"][:5].double()
    torch.testing.assert_close(got["score"].double(), -away / 1e-8, rtol=1e-6, atol=0)


def test_strided_inputs_equal_contiguous_ones() -> None:
    problem = _problem(4, 45, 258, torch.float32, stds=(20.0, 0.1))
    strided = {}
    for name, value in problem.items():
        wide = torch.full([2 * size for size in value.shape], math.nan, dtype=value.dtype, device=DEVICE)
        strided[name] = wide[tuple(slice(None, None, 2) for _ in value.shape)]
        strided[name].copy_(value)
    expected = _run(problem)
    for name, values in _run(strided).items():
        assert torch.equal(values, expected[name]), name


def test_rows_do_not_see_each_other() -> None:
    """Among other rows of the same number, and beside some that are not finite, a row gives the same bits."""
    problem = _problem(9, 40, 257, torch.float32, stds=(20.0, 0.1, 10.0))
    others = problem | {"x": problem["x"].clone()}
    keep = [0, 1, 2, 6]
    others["x"][3], others["x"][4] = 0.0, others["x"][4] * 50
    others["x"][5, 2], others["x"][7, 256], others["x"][8] = math.nan, -math.inf, math.inf
    expected = _run(problem)
    for name, values in _run(others).items():
        assert torch.equal(values[keep], expected[name][keep]), name
        finite = values.reshape(9, -1).isfinite().all(1)
        assert finite.tolist() == [True] * 5 + [False, True, False, False], name
        assert not values[[5, 7, 8]].isfinite().any()


def test_components_of_weight_zero_do_not_count() -> None:
    problem = _problem(4, 80, 257, torch.float64, stds=(20.0, 0.1))
    keep = torch.arange(0, 80, 2, device=DEVICE)
    only = problem | {"means": problem["means"][keep], "log_weights": problem["log_weights"][keep]}
    lightened = torch.full_like(problem["log_weights"], -math.inf)
    lightened[keep] = problem["log_weights"][keep]
    got, exact = _run(problem | {"log_weights": lightened}), _run(only)
    assert not got["posterior_weights"][:, 1::2].any()
    got["posterior_weights"] = got["posterior_weights"][:, keep]
    for name, values in got.items():
        torch.testing.assert_close(values, exact[name], rtol=1e-10, atol=1e-10)


def test_variants_name_every_argument() -> None:
    shipped = variants()
    assert len({variant.name for variant in shipped}) == len(shipped) > 40
    for variant in shipped:
        assert {*variant.types, *variant.constants} == set(variant.kernel.arg_names), variant.name
        assert not {*variant.types} & {*variant.constants}, variant.name


def test_no_rows_give_no_rows() -> None:
    got = _run(_problem(0, 3, 257, torch.float32))
    assert {name: tuple(values.shape) for name, values in got.items()}["score"] == (0, 257)


@pytest.mark.parametrize("refine", [True, False])
def test_the_host_waits_once_or_never(refine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "nonzero", "cpu"):
        method = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda *a, method=method, name=name, **kw: (waits.append(name), method(*a, **kw))[1]
        )
    # launching is out of the count: the interpreter reads tensors as it likes
    for module, names in {
        stages: ("split_kernel", "screen_kernel", "candidate_kernel", "refine_kernel", "softmax_kernel",
                 "merge_kernel", "finish_kernel"),
    }.items():  # fmt: skip
        for name in names:
            kernel = getattr(module, name)
            monkeypatch.setattr(module, name, _Uncounted(kernel, waits))
    _run(_problem(3, 40, 257, torch.float32, stds=(20.0, 0.1)), refine=refine)
    assert waits == ["tolist"] * refine


class _Uncounted:
    """A kernel whose launches leave a list as it was."""

    def __init__(self, kernel: Any, waits: list[str]) -> None:
        self.kernel, self.waits = kernel, waits

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            before = len(self.waits)
            self.kernel[grid](*arguments, **options)
            del self.waits[before:]

        return launch


class _Memory(TorchDispatchMode):
    """Bytes of the tensors that are alive and were not there before, at most."""

    def __init__(self, there: list[Tensor]) -> None:
        super().__init__()
        self.there = {tensor.untyped_storage().data_ptr() for tensor in there}
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.there and storage.data_ptr() not in self.live:
                    self.live[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(tensor, self.live.pop, storage.data_ptr(), None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


@pytest.mark.parametrize("outputs", [("score",), OUTPUTS], ids=["score", "all"])
def test_workspace_is_what_it_says(outputs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "BUDGET", 1 << 21)
    problem = _problem(5, 300, 400, torch.float32, stds=(20.0, 10.0, 0.1))
    with _Memory(list(problem.values())) as memory:
        got = _run(problem, outputs=outputs)
    said = workspace.workspace(5, 300, 400, torch.float32, outputs=outputs, device=DEVICE)
    used = memory.peak - sum(values.nbytes for values in got.values())
    assert 0.5 * said < used <= said < 1.1 * workspace.BUDGET


@pytest.mark.parametrize("d", [257, 3072, 196_608])
def test_workspace_stays_within_512_mebibytes(d: int) -> None:
    for n, k, dtype in itertools.product((1, 1024, 10**6), (1, 50_000, 10**6), (torch.float32, torch.float64)):
        for precision, outputs in itertools.product(("bf16x3", "bf16x6", "ieee"), (("score",), OUTPUTS)):
            used = workspace.workspace(n, k, d, dtype, outputs=outputs, precision=precision)
            assert used <= (512 - 32) << 20, (n, k, precision, outputs)
