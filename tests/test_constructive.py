"""Constructive networks: exact modules, error, size, and that nothing but ReLU and ReQU is at work."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowfast import ConstructiveScoreNet, GaussianMixture, OUProcess, audit_network, cli, reference
from flowfast.theory import exact
from flowfast.theory.channels import Blueprint, Channels
from flowfast.theory.measure import linear_law, power_law
from flowfast.theory.network import ReluNetwork
from flowfast.theory.score_net import checked_marginal, score_norm_bound

PROCESS = OUProcess(5.0)
ACCURACIES = [10.0**-digits for digits in range(1, 11)]
ROUNDING = 1e-10  # of float64 here: 2^-53 times logits up to 1e3, and times 2^11 squarings


def _paper(std: float) -> GaussianMixture:
    return GaussianMixture.random(20, 64, std=std, seed=0)


def _reference_score(marginal: GaussianMixture, x: Tensor) -> Tensor:
    one = torch.ones((), dtype=torch.float64)
    return reference.score(x, marginal.means, marginal.log_weights, one, marginal.std)


def _built(width: int, body: Callable[[Blueprint, Channels], Channels]) -> ReluNetwork:
    """A network around one exact module, whose input comes as channels that may be negative."""
    plan = Blueprint(width)
    x = plan.inputs()
    plus, minus = plan.hidden([x, -x])
    return ReluNetwork(width, plan.output(body(plan, plus - minus)))


def _points(n: int, width: int, low: float, high: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return low + (high - low) * torch.rand(n, width, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 20])
def test_maximum_tree(width: int) -> None:
    net = _built(width, lambda plan, z: exact.maximum(plan, z, z[:0])[0])
    x = _points(200, width, -300.0, 100.0)
    assert net.depth == 1 + math.ceil(math.log2(width))
    # max(a, b) = b + ReLU(a - b) is rounded at every level of the tree
    assert torch.allclose(net(x)[:, 0], x.amax(1), rtol=0, atol=net.depth * 2**-52 * 400)


@pytest.mark.parametrize(("most", "error"), [(1.0, 0.3), (6.0, 1e-2), (17.0, 1e-5), (29.3, 1e-12), (40.0, 1e-15)])
def test_exponential(most: float, error: float) -> None:
    squarings = exact.exponential_squarings(most, error)
    assert 2**squarings >= most and 16.0**-squarings <= error
    net = _built(1, lambda plan, z: exact.exponential(plan, z, most, squarings, z[:0])[0])
    z = torch.linspace(0, most, 4001, dtype=torch.float64)[:, None]
    off = net(z) - (z - most).exp()
    assert net.depth == 3 + squarings
    rounding = 8 * 2.0 ** (squarings - 53)  # some eight roundings, whose relative errors every squaring doubles
    assert float(off.min()) >= -rounding and float(off.max()) <= 0.6 * 16.0**-squarings + rounding
    assert float(net(z).min()) > 0


def test_product() -> None:
    net = _built(6, lambda plan, z: exact.product(plan, z[:3], z[3:], z[:0])[0])
    x = _points(500, 6, 0.0, 2.0)
    assert net.depth == 2
    assert torch.allclose(net(x), x[:, :3] * x[:, 3:], rtol=0, atol=2**-52 * 16)  # of the square (2 + 2)^2


@pytest.mark.parametrize("most", [2, 3, 20, 1797])
@pytest.mark.parametrize("error", [1e-2, 1e-6, 1e-14])
def test_reciprocal(most: int, error: float) -> None:
    steps = exact.reciprocal_steps(most, error)
    net = _built(1, lambda plan, a: exact.reciprocal(plan, a, most, steps, a[:0])[0])
    a = torch.linspace(1, most, 3001, dtype=torch.float64)[:, None]
    off = a * net(a) / math.sqrt(most) - 1
    # residuals of the start are rounded at 2^-53 and weigh 1 / (a y_0) <= 1 / (1 - start_residual)
    rounding = 16 * 2**-53 * (steps + 1) / (1 - exact.start_residual(most)) * math.sqrt(most)
    assert net.depth == 2 + steps
    assert float(off.abs().max()) <= error + rounding
    shorter = exact.start_residual(most) ** (2 ** (steps - 1))
    assert shorter > error, "one step less would not do"


@pytest.mark.parametrize("std", [1.0, 0.1])
@pytest.mark.parametrize("t", [0.1, 0.5])
def test_error_falls_with_eps_on_the_papers_mixture(std: float, t: float) -> None:
    mixture = _paper(std)
    marginal = checked_marginal(mixture, PROCESS, t)
    x = marginal.sample(1500, generator=torch.Generator().manual_seed(3))
    y = _reference_score(marginal, x)
    errors, depths = [], []
    for eps in ACCURACIES:
        net = ConstructiveScoreNet(mixture, PROCESS, t, eps)
        errors.append(float((net(x) - y).norm() / y.norm()))
        depths.append(net.depth)
    assert all(error <= eps for error, eps in zip(errors, ACCURACIES, strict=True)), "as promised"
    assert errors[-1] <= 1e-8
    assert errors[0] / errors[-1] >= 1e6, "over six orders of magnitude at the least"
    # what bounds it falls by ten, the error itself at least does not grow from one eps to the next but one
    assert all(later < earlier for earlier, later in zip(errors, errors[2:], strict=False))
    law = linear_law(ACCURACIES, depths)
    assert all(depth <= law(eps) + 1e-9 for depth, eps in zip(depths, ACCURACIES, strict=True))
    assert 0 < law.factor < 0.5, "a quarter for squarings, and doubly logarithmic steps of the reciprocal"


@pytest.mark.parametrize("seed", range(12))
def test_the_bound_holds_at_every_point(seed: int) -> None:
    """Not on average alone: at points of the mixture, between its means and far away."""
    rng = np.random.default_rng(seed)
    k, d, std = int(rng.integers(1, 9)), int(rng.integers(1, 5)), float(rng.uniform(0.1, 2))
    weights = rng.dirichlet(np.ones(k)) * (rng.random(k) > 0.2)
    mixture = GaussianMixture(rng.uniform(-3, 3, (k, d)), std, weights if weights.sum() else None)
    t, eps = float(rng.choice([0.0, 0.02, 0.3, 1.0])), float(10 ** rng.uniform(-6, -0.1))
    marginal = checked_marginal(mixture, PROCESS, t)
    generator = torch.Generator().manual_seed(seed)
    x = marginal.sample(300, generator=generator)
    middle = (marginal.means[:, None] + marginal.means[None]).reshape(-1, d) / 2
    x = torch.cat([x, middle, 5 * x, 100 * x])
    net = ConstructiveScoreNet(mixture, PROCESS, t, eps)
    off = (net(x) - _reference_score(marginal, x)).norm(dim=1)
    rounding = ROUNDING * (1 + x.norm(dim=1)) / float(marginal.std) ** 2
    assert bool((off <= eps * score_norm_bound(marginal) + rounding).all())


def test_score_norm_bound_is_one() -> None:
    for std in (0.1, 1.0):
        marginal = checked_marginal(_paper(std), PROCESS, 0.1)
        x = marginal.sample(1000, generator=torch.Generator().manual_seed(0))
        norm = float(_reference_score(marginal, x).square().sum(1).mean().sqrt())
        assert score_norm_bound(marginal) <= norm
    single = GaussianMixture(torch.zeros(1, 3, dtype=torch.float64), 2.0)  # with equality: E|x / 4|^2 = 12 / 16
    assert score_norm_bound(single) == pytest.approx(math.sqrt(0.75), rel=1e-12)


def _walked(net: nn.Module) -> tuple[float, int]:
    """Largest weight and number of weights that are not zero, from the buffers alone."""
    numbers = [value for name, value in net.named_buffers() if not name.endswith("indices")]
    return max(float(value.abs().max()) for value in numbers), sum(int((value != 0).sum()) for value in numbers)


def test_every_number_of_the_table_comes_from_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    """The table of `flowfast theory score-net`, number by number, from the traced graph and from the buffers."""
    call = ["theory", "score-net", "--std", "0.1", "--t", "0.5", "--n", "400", "--seed", "7", "--json", "--eps"]
    assert cli.main([*call, "1e-1", "1e-3", "1e-6", "1e-10"]) == 0
    said = json.loads(capsys.readouterr().out)
    mixture = _paper(0.1)
    marginal = checked_marginal(mixture, PROCESS, 0.5)
    x = marginal.sample(5000, generator=torch.Generator().manual_seed(1))  # other points than the command's
    y = _reference_score(marginal, x)
    (one,) = said["times"]
    assert (said["components"], said["dim"], said["std"], one["t"]) == (20, 64, 0.1, 0.5)
    for row in one["rows"]:
        net = ConstructiveScoreNet(mixture, PROCESS, 0.5, row["eps"])
        found = audit_network(net, 64)
        assert found.forbidden == ()
        assert (row["depth"], row["width"]) == (found.depth, found.width)
        assert (row["largest_weight"], row["nonzero"]) == _walked(net)
        shapes = [layer.shape for layer in net.modules() if hasattr(layer, "shape")]
        assert row["total"] == sum(rows * (columns + 1) for rows, columns in shapes)
        assert sum(rows for rows, _ in shapes) == found.relu + found.requ + 64
        # two samples of a squared error whose points vary by a factor of some hundred: they agree within a factor
        again = float((net(x) - y).norm() / y.norm())
        assert again / 4 <= row["error"] <= 4 * again
    accuracies = [row["eps"] for row in one["rows"]]
    for name in ("depth", "nonzero"):
        law, values = one["laws"][name], [row[name] for row in one["rows"]]
        logs = -np.log2(accuracies)
        assert law["factor"] == pytest.approx(np.polyfit(logs, values, 1)[0], rel=5e-3) and law["power"] == 1
        offset = max(np.array(values) - law["factor"] * logs)
        assert offset - 1e-9 <= law["offset"] <= offset * 1.001 + 1e-9, "rounded up to four digits"
    assert one["laws"]["width"] == {"factor": 188.0, "power": 0.0, "offset": 0.0}, "the same for every eps"


def test_power_law() -> None:
    values = [3 * math.log2(1 / eps) ** 2 for eps in ACCURACIES]
    law = power_law(ACCURACIES, values)
    assert law.power == pytest.approx(2) and law(1e-4) == pytest.approx(3 * math.log2(1e4) ** 2)
    assert linear_law([0.1], [7.0])(0.1) == pytest.approx(7, rel=1e-12)


def test_float32() -> None:
    mixture = _paper(0.1)
    marginal = checked_marginal(mixture, PROCESS, 0.1)
    x = marginal.sample(1000, generator=torch.Generator().manual_seed(4))
    y = _reference_score(marginal, x)
    net = ConstructiveScoreNet(mixture, PROCESS, 0.1, 1e-4).float()
    out = net(x.float())
    # rounding, 2^-24 of logits near 100, stays below eps
    assert out.dtype == torch.float32 and float((out.double() - y).norm() / y.norm()) <= 1e-4


def test_rows_do_not_depend_on_company() -> None:
    net = ConstructiveScoreNet(GaussianMixture.random(4, 3), PROCESS, 0.2, 1e-3)
    x = _points(2500, 3, -5.0, 5.0)
    out = net(x)
    assert torch.equal(net(x.reshape(5, 500, 3)), out.reshape(5, 500, 3)) and net(x[:0]).shape == (0, 3)
    assert torch.equal(net(x[7]), out[7]) and torch.equal(net(x[1000:1100]), out[1000:1100])
    hole = x.clone()
    hole[3, 1] = math.nan
    assert bool(net(hole)[3].isnan().any()) and torch.equal(net(hole)[4:], out[4:])


def test_gradients_are_those_of_the_score() -> None:
    mixture = GaussianMixture(GaussianMixture.random(4, 3).means.double() / 4, 1.0)
    net = ConstructiveScoreNet(mixture, PROCESS, 0.2, 1e-8)
    marginal = checked_marginal(mixture, PROCESS, 0.2)
    x = marginal.sample(20, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (found,) = torch.autograd.grad(net(x).square().sum(), x)
    (exact_one,) = torch.autograd.grad(_reference_score(marginal, x).square().sum(), x)
    assert torch.allclose(found, exact_one, rtol=1e-5, atol=1e-5)  # no logit is clipped here; eps bounds values only


def test_wrong_arguments_are_named() -> None:
    mixture = GaussianMixture.random(3, 2)
    for eps in (0.0, 1.0, -1e-3, math.nan):
        with pytest.raises(ValueError, match="eps must lie between 0 and 1"):
            ConstructiveScoreNet(mixture, PROCESS, 0.1, eps)
    with pytest.raises(ValueError, match="t must be finite"):
        ConstructiveScoreNet(mixture, PROCESS, -0.1, 0.1)
    with pytest.raises(TypeError, match="mixture must be a GaussianMixture; got Tensor"):
        ConstructiveScoreNet(mixture.means, PROCESS, 0.1, 0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="process must be an OUProcess; got float"):
        ConstructiveScoreNet(mixture, 5.0, 0.1, 0.1)  # type: ignore[arg-type]
    net = ConstructiveScoreNet(mixture, PROCESS, 0.1, 0.1)
    with pytest.raises(TypeError, match="float64, as the network is; got torch.float32"):
        net(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"last dimension 2; got shape \(4, 3\)"):
        net(torch.zeros(4, 3, dtype=torch.float64))


WRONG = [
    ("theory", "score-net"),
    ("theory score-net --eps 2", "--eps must lie between 0 and 1; got 2"),
    ("theory score-net --t -1", "--t must be finite"),
    ("theory score-net --n 0", "--n must be at least 1"),
    ("theory score-net --std 0", "--std must be positive"),
    ("theory score-net --means missing.npy --std 1", "--means.*missing.npy does not exist"),
    ("theory composition --blocks 0", "--blocks must be at least 1"),
    ("theory composition --t-to 1", "--t-to must lie"),
]


@pytest.mark.parametrize(("arguments", "sentence"), WRONG, ids=[call for call, _ in WRONG])
def test_a_wrong_call_gets_one_sentence(arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments.split()) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("flowfast: ") and said.err.count("\n") == 1
    assert re.search(sentence, said.err), said.err
