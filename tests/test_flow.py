"""flow_map and solve_flow: accuracy, convergence, the published failure, failing rows, cost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import BACKENDS
from scipy.integrate import solve_ivp
from tolerances import FLOW_FLOAT32, FLOW_FLOAT64
from torch import Tensor
from torch.autograd import forward_ad

import flowfast
from flowfast import GaussianMixture, OUProcess, flow_map, solve_flow
from flowfast.flow import flow_between, grid_ends
from flowfast.tableaux import DORMAND_PRINCE, RK4

PROCESS = OUProcess(5.0)
DELTA = math.log(2) / 10  # alpha^2 = 1/2
PAPER = GaussianMixture.random(20, 64, seed=0)


def _paper(sigma0: float, dtype: torch.dtype = torch.float64) -> GaussianMixture:
    return GaussianMixture(PAPER.means.to(dtype), sigma0)


def _start(mixture: GaussianMixture, t: float, n: int, seed: int = 0) -> Tensor:
    return PROCESS.marginal(mixture, t).sample(n, generator=torch.Generator().manual_seed(seed))


def _error(x: Tensor, exact: Tensor) -> Tensor:
    """Relative error of every row."""
    return (x.double() - exact).norm(dim=-1) / exact.norm(dim=-1)


def _squared(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).square().sum() / exact.square().sum())


def _dop853(x: Tensor, mixture: GaussianMixture, t_from: float, t_to: float) -> Tensor:
    """The probability flow in t as the paper writes it, by SciPy, in plain float64 formulas of its own."""
    means, sigma0 = mixture.means.numpy(), float(mixture.std)

    def velocity(t: float, x: object) -> object:
        alpha = math.exp(-5 * t)
        s2 = alpha**2 * sigma0**2 - math.expm1(-10 * t)
        away = alpha * means - x  # (k, d)
        logits = -(away**2).sum(1) / (2 * s2)
        gamma = torch.softmax(torch.from_numpy(logits), 0).numpy()
        return -5 * (x + gamma @ away / s2)

    rows = [
        solve_ivp(velocity, (t_from, t_to), row.numpy(), method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1] for row in x
    ]
    return torch.stack([torch.from_numpy(row) for row in rows])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("t_from", "sigma0", "published_above"),
    [(DELTA, 0.1, 0.0), (DELTA, 0.01, 1.0), (DELTA, 1e-3, 1e3), (DELTA, 1e-4, 1e7), (1.0, 1e-3, 1e3), (1.0, 1.0, 0.0)],
)
def test_exact_teacher_agrees_with_dop853_and_the_papers_fails(
    backend: str, t_from: float, sigma0: float, published_above: float
) -> None:
    mixture = _paper(sigma0)
    x = _start(mixture, t_from, 12)
    exact = _dop853(x, mixture, t_from, 0.0)
    ours = flow_map(x, mixture, PROCESS, t_from, 0.0, backend=backend)
    assert _squared(ours, exact) <= 1e-8 and float(_error(ours, exact).max()) <= 1e-8
    steps = 10 if t_from == DELTA else 100
    paper = flow_map(x, mixture, PROCESS, t_from, 0.0, method="paper", steps=steps, backend=backend)
    assert _squared(paper, exact) >= published_above
    if not published_above:
        assert _squared(paper, exact) <= 1e-4
    if t_from == DELTA:
        fixed = flow_map(x, mixture, PROCESS, t_from, 0.0, steps=10, backend=backend)
        assert _squared(fixed, exact) <= 1e-20


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("method", "counts"), [("snr", (100, 200, 400)), ("paper", (100, 200, 400))])
def test_fixed_steps_converge_with_order_four(backend: str, method: str, counts: tuple[int, ...]) -> None:
    mixture = GaussianMixture(0.15 * PAPER.means[:, :8].double(), 1.0)
    x = _start(mixture, 1.0, 64)
    exact = flow_map(x, mixture, PROCESS, 1.0, 0.0, rtol=1e-13, atol=1e-14, backend="reference")
    errors = [
        _squared(flow_map(x, mixture, PROCESS, 1.0, 0.0, method=method, steps=m, backend=backend), exact) ** 0.5  # type: ignore[arg-type]
        for m in counts
    ]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert all(abs(order - 4) <= 0.15 for order in orders), (orders, errors)


@pytest.mark.parametrize("sigma0", [1.0, 0.1, 1e-3])
def test_default_accuracy_on_the_papers_mixture(sigma0: float) -> None:
    mixture = _paper(sigma0)
    x = _start(mixture, 1.0, 65_536).float()
    exact = flow_map(x.double(), mixture, PROCESS, 1.0, 0.0, rtol=1e-13, atol=1e-15)
    error = _error(flow_map(x, _paper(sigma0, torch.float32), PROCESS, 1.0, 0.0), exact)
    median, most, worst = FLOW_FLOAT32
    assert float(error.median()) <= median
    assert float(error.quantile(0.999)) <= most
    assert float(error.max()) <= worst
    share, within = FLOW_FLOAT64
    error = _error(flow_map(x.double(), mixture, PROCESS, 1.0, 0.0, rtol=1e-10), exact)
    assert float((error <= within).double().mean()) >= share


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sigma0", [1.0, 0.1, 1e-3])
def test_forward_then_backward_returns(backend: str, sigma0: float) -> None:
    mixture = _paper(sigma0)
    x = _start(mixture, 1.0, 64)
    data = flow_map(x, mixture, PROCESS, 1.0, 0.0, backend=backend)
    assert float(_error(flow_map(data, mixture, PROCESS, 0.0, 1.0, backend=backend), x).max()) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_single_component_is_exact_in_one_step(backend: str) -> None:
    mixture = GaussianMixture(torch.full((1, 3), 7.0, dtype=torch.float64), 1e-3)
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = solve_flow(x, mixture, PROCESS, 1.0, 0.0, backend=backend)
    alpha, std = PROCESS.alpha(1.0), PROCESS.std(1.0, 1e-3)
    torch.testing.assert_close(solution.x, 7 + 1e-3 * (x - 7 * alpha) / std, rtol=1e-14, atol=0)
    assert (solution.steps <= 1).all() and (solution.status == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_offset_means_move_with_the_flow(backend: str) -> None:
    mixture = _paper(0.1)
    shifted = GaussianMixture(mixture.means + 1e4, 0.1)
    x = _start(mixture, 1.0, 16)
    moved = flow_map(x + 1e4 * PROCESS.alpha(1.0), shifted, PROCESS, 1.0, 0.0, backend=backend)
    expected = flow_map(x, mixture, PROCESS, 1.0, 0.0, backend=backend)
    torch.testing.assert_close(moved - 1e4, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_times_per_row_and_leading_dimensions(backend: str) -> None:
    mixture = _paper(0.1)
    x = _start(mixture, 0.8, 6).reshape(2, 3, 64)
    t_from = torch.tensor([[0.8, 0.5, 0.3], [0.2, 0.9, 0.1]], dtype=torch.float64)
    t_to = torch.tensor([0.0, 0.6, 0.3], dtype=torch.float64)
    solution = solve_flow(x, mixture, PROCESS, t_from, t_to, backend=backend)
    assert solution.x.shape == x.shape and solution.status.shape == solution.steps.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = flow_map(x[i, j], mixture, PROCESS, float(t_from[i, j]), float(t_to[j]), backend=backend)
            torch.testing.assert_close(solution.x[i, j], alone, rtol=1e-12, atol=1e-12)
    assert solution.steps[0, 2] == 0 and float(_error(solution.x[0, 2], x[0, 2])) <= 1e-15
    assert flow_map(x[:0], mixture, PROCESS, 1.0, 0.0, backend=backend).shape == (0, 3, 64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [20, 300])
def test_a_trajectory_does_not_depend_on_its_neighbours(backend: str, k: int) -> None:
    mixture = GaussianMixture.random(k, 64, std=0.5)
    x = _start(mixture, 1.0, 40)
    bad = x.clone()
    bad[7] = float("nan")
    whole = solve_flow(bad, mixture, PROCESS, 1.0, 0.0, backend=backend)
    assert whole.status[7] == 2 and torch.isnan(whole.x[7]).all() and int((whole.status != 0).sum()) == 1
    part = solve_flow(x[20:31], mixture, PROCESS, 1.0, 0.0, backend=backend)
    if backend == "cpp":  # the reference's matrix products may round by batch size
        assert part.x.equal(whole.x[20:31]) and part.steps.equal(whole.steps[20:31])
    else:
        torch.testing.assert_close(part.x, whole.x[20:31], rtol=1e-5, atol=1e-5)
    assert torch.isnan(flow_map(bad, mixture, PROCESS, 1.0, 0.0, backend=backend)[7]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_failed_trajectory_is_named_and_leaves_the_others(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = _paper(1.0)
    x = _start(mixture, 1.0, 16)
    steps = solve_flow(x, mixture, PROCESS, 1.0, 0.0, backend=backend).steps
    most = int(steps.max()) - 1
    slow = (steps > most).nonzero()[0].item()
    monkeypatch.setattr(flowfast.flow, "MOST_STEPS", most)
    solution = solve_flow(x, mixture, PROCESS, 1.0, 0.0, backend=backend)
    assert solution.status[slow] == 1 and int((solution.status == 0).sum()) == int((steps <= most).sum())
    with pytest.raises(RuntimeError, match=rf"the one at index \[{slow}\] needed more than"):
        flow_map(x, mixture, PROCESS, 1.0, 0.0, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cost_is_reported_and_does_not_grow_at_low_noise(backend: str) -> None:
    means: dict[float, float] = {}
    for sigma0 in (1.0, 1e-3):
        mixture = _paper(sigma0, torch.float32)
        solution = solve_flow(_start(mixture, 1.0, 256), mixture, PROCESS, 1.0, 0.0, backend=backend)
        assert (solution.evaluations == 6 * solution.steps + 1).all() and solution.backend == backend
        means[sigma0] = float(solution.evaluations.double().mean())
    assert means[1e-3] <= 1.5 * means[1.0]
    fixed = solve_flow(_start(mixture, 1.0, 3), mixture, PROCESS, 1.0, 0.0, steps=7, backend=backend)
    assert fixed.steps.tolist() == [7] * 3 and fixed.evaluations.tolist() == [28] * 3


def test_cpp_agrees_with_the_reference_step_for_step() -> None:
    for k, std in ((20, 0.1), (200, 0.5)):
        mixture = GaussianMixture(GaussianMixture.random(k, 64).means.double(), std)
        x = _start(mixture, 1.0, 24)
        for keywords in ({}, {"steps": 20}, {"method": "paper", "steps": 50}):
            fast, slow = (solve_flow(x, mixture, PROCESS, 0.7, 0.1, backend=b, **keywords) for b in BACKENDS)  # type: ignore[arg-type]
            assert float(_error(fast.x, slow.x).max()) <= 1e-8
            assert (fast.steps - slow.steps).abs().max() <= 1


def test_reference_flow_carries_gradients() -> None:
    mixture = _paper(0.5)
    x = _start(mixture, 1.0, 2).requires_grad_()
    out = flow_map(x, mixture, PROCESS, 0.6, 0.2, steps=40, backend="reference")
    (grad,) = torch.autograd.grad(out[0, 0], x)
    shift = torch.zeros_like(x)
    shift[0, 3] = 1e-6
    plus, minus = (flow_map(x.detach() + s * shift, mixture, PROCESS, 0.6, 0.2, steps=40)[0, 0] for s in (1, -1))
    assert float(grad[0, 3]) == pytest.approx(float(plus - minus) / 2e-6, rel=1e-5, abs=1e-9)
    assert (grad[1] == 0).all()


def test_flows_lose_no_gradient_in_silence() -> None:
    """The reference carries it, or the call is refused: whatever it is with respect to, and in forward mode too."""
    mixture, x = _paper(0.5), _start(_paper(0.5), 1.0, 2)
    wanted = {
        "means": lambda leaf: flow_map(x, GaussianMixture(leaf, 0.5), PROCESS, 1.0, 0.8, **options),
        "weights": lambda leaf: flow_map(x, GaussianMixture(mixture.means, 0.5, leaf), PROCESS, 1.0, 0.8, **options),
        "std": lambda leaf: flow_map(x, GaussianMixture(mixture.means, leaf), PROCESS, 1.0, 0.8, **options),
        "t": lambda leaf: flow_map(x, mixture, PROCESS, 1.0, leaf, **options),
        "x": lambda leaf: flow_map(leaf, mixture, PROCESS, 1.0, 0.8, **options),
    }
    start = {"means": mixture.means, "weights": mixture.weights, "std": mixture.std, "t": torch.tensor(0.8), "x": x}
    options: dict[str, Any]
    for options in ({}, {"steps": 3}, {"backend": "reference"}, {"backend": "reference", "steps": 3}):
        for name, work in wanted.items():
            leaf = start[name].double().clone().requires_grad_()
            if options.get("backend") == "reference" and ("steps" not in options or name not in ("std", "t")):
                (grad,) = torch.autograd.grad(work(leaf).square().sum(), leaf)
                assert torch.isfinite(grad).all() and (grad != 0).any()
                continue
            with pytest.raises(ValueError, match="carr(y|ies) (no )?gradient"):
                work(leaf)
            with torch.no_grad():
                assert not work(leaf).requires_grad
    options = {}
    with forward_ad.dual_level(), pytest.raises(ValueError, match="carries no gradient"):
        wanted["x"](forward_ad.make_dual(x, x))
    for transform in (torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())):
        with pytest.raises((ValueError, RuntimeError), match="carries no gradient|[Vv]map|[Bb]atching"):
            transform(wanted["x"])(x)
    inner = lambda y: torch.func.grad(lambda scale: (wanted["x"](y) * scale).sum())(torch.ones(1).double()[0])  # noqa: E731
    for work in (wanted["x"], inner):  # inner: what the inner transform does not follow, the outer does
        with pytest.raises(ValueError, match="carries no gradient"):
            torch.func.jvp(work, (x,), (x,))
    assert torch.func.grad(lambda y: (y * wanted["x"](x)).sum())(x).equal(wanted["x"](x))  # a target is no part of it


def test_tableaux_satisfy_their_order_conditions() -> None:
    for tableau, order in ((RK4, 4), (DORMAND_PRINCE, 5)):
        stages = tableau.shape[1]
        a, nodes, b, error = tableau[:stages], tableau[stages], tableau[stages + 1], tableau[stages + 2]
        torch.testing.assert_close(a.sum(1), nodes, rtol=0, atol=1e-14)
        for power in range(order):
            assert float((b * nodes**power).sum()) == pytest.approx(1 / (power + 1), abs=1e-14)
        assert float(b @ a @ nodes) == pytest.approx(1 / 6, abs=1e-14)
        assert float(b @ (nodes * (a @ nodes))) == pytest.approx(1 / 8, abs=1e-14)
        assert float(b @ a @ nodes**2) == pytest.approx(1 / 12, abs=1e-14)
        assert float(b @ a @ a @ nodes) == pytest.approx(1 / 24, abs=1e-14)
        assert float(error.sum()) == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [None, 3])
def test_end_points_go_to_out(backend: str, dtype: torch.dtype, steps: int | None) -> None:
    mixture = _paper(1.0, torch.float32)
    for shape in ((2, 3), (), (0,)):
        x = _start(mixture, 0.5, math.prod(shape)).to(dtype).reshape(*shape, 64)
        exact = flow_map(x, mixture, PROCESS, 0.5, 0.4, steps=steps, backend=backend)
        out = torch.full_like(exact, float("nan"))
        version = out._version
        assert flow_map(x, mixture, PROCESS, 0.5, 0.4, steps=steps, out=out, backend=backend) is out
        assert out.equal(exact) and out._version > version
        assert flow_map(x, mixture, PROCESS, 0.5, 0.4, steps=steps, out=x, backend=backend) is x and x.equal(exact)


def test_out_that_does_not_fit_is_refused() -> None:
    mixture = _paper(1.0)
    x = _start(mixture, 0.5, 4)
    for wrong in (x[:3].clone(), x.float(), x.T.contiguous().T):
        with pytest.raises(ValueError, match="out must be"):
            flow_map(x, mixture, PROCESS, 0.5, 0.4, out=wrong)


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_ends_are_the_flow_of_their_times(backend: str) -> None:
    mixture, times = _paper(0.1), torch.tensor([1.0, 0.4, 0.1, 0.0], dtype=torch.float64)
    segment = torch.tensor([2, 0, 1, 0, 2])
    x = torch.cat([_start(mixture, float(times[i]), 1, seed=int(i)) for i in segment])
    ends = grid_ends(mixture, PROCESS, times[:-1], times[1:])[:, segment]
    exact = flow_map(x, mixture, PROCESS, times[segment], times[segment + 1], backend=backend)
    assert flow_between(x, mixture, ends, backend=backend).equal(exact)
    out = torch.empty_like(x)
    assert flow_between(x, mixture, ends, out=out, backend=backend) is out and out.equal(exact)
