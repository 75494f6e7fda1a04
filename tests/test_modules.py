"""The score as a module: values, state, casts, training, and the company of torch's own tools."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import flowfast
from flowfast import GaussianMixture, MixtureScore, OUProcess

DEVICE = os.environ.get("FLOWFAST_TEST_DEVICE", "cpu")
PROCESS = OUProcess(5.0)
STATE = ["means", "std", "log_weights"]


def _mixture(seed: int = 0, dtype: torch.dtype = torch.float64, std: float = 0.7) -> GaussianMixture:
    generator = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return GaussianMixture(means.to(DEVICE, dtype), std, torch.rand(6, generator=generator) + 0.2)


def _points(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(n, 5, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


@pytest.mark.parametrize("trainable", [False, True])
def test_it_gives_the_scores(trainable: bool) -> None:
    mixture, x = _mixture(), _points(8)
    module = MixtureScore(mixture, PROCESS, trainable=trainable)
    torch.testing.assert_close(module(x), flowfast.score(x, mixture))
    torch.testing.assert_close(module(x, 0.0), flowfast.score(x, mixture))
    torch.testing.assert_close(module(x, 0.3), flowfast.score(x, PROCESS.marginal(mixture, 0.3)))
    t = torch.linspace(0, 1, 8, device=DEVICE)
    rows = torch.stack([module(row, time) for row, time in zip(x, t.tolist(), strict=True)])
    torch.testing.assert_close(module(x, t), rows)
    torch.testing.assert_close(module(x.reshape(2, 4, 5), t.reshape(2, 4)), rows.reshape(2, 4, 5))
    assert module(x.bfloat16()).dtype == torch.bfloat16
    names = [name for name, _ in (module.named_parameters() if trainable else module.named_buffers())]
    assert names == STATE and list(module.state_dict()) == STATE


def test_wrong_arguments() -> None:
    mixture, x = _mixture(), _points(2)
    with pytest.raises(TypeError, match="mixture must be a GaussianMixture; got Tensor"):
        MixtureScore(mixture.means)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="process must be an OUProcess or None; got float"):
        MixtureScore(mixture, 5.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend must be one of"):
        MixtureScore(mixture, backend="gpu")
    with pytest.raises(ValueError, match="t needs a process"):
        MixtureScore(mixture)(x, 0.3)
    with pytest.raises(ValueError, match="t must be a number or broadcast"):
        MixtureScore(mixture, PROCESS)(x, torch.zeros(3))


def test_the_state_round_trips_without_pickle(tmp_path: Path) -> None:
    mixture, x = _mixture(), _points(8)
    module = MixtureScore(mixture)
    save_file(module.state_dict(), tmp_path / "score.safetensors")
    for state in (load_file(tmp_path / "score.safetensors"), module.state_dict()):
        for trainable in (False, True):
            start = _mixture(seed=3)
            before = flowfast.score(x, start)
            other = MixtureScore(start, trainable=trainable)
            other(x)  # whatever a call keeps must not outlive the old state
            other.load_state_dict(state)
            torch.testing.assert_close(other(x), module(x))
            assert flowfast.score(x, start).equal(before)  # the mixture that it came from is its own


def test_casts_leave_std_and_weights_alone() -> None:
    mixture, x = _mixture(dtype=torch.float32, std=0.1), _points(8, torch.float32)
    for trainable in (False, True):
        module = MixtureScore(mixture, PROCESS, trainable=trainable)
        exact = module(x)
        exact.sum().backward() if trainable else None
        half = copy.deepcopy(module).half()
        assert [tensor.dtype for tensor in half.state_dict().values()] == [torch.float16, torch.float64, torch.float64]
        assert half.std.item() == 0.1
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in half.parameters())
        torch.testing.assert_close(copy.deepcopy(module).double()(x), exact)
        away = copy.deepcopy(module).to("meta", torch.float16)
        assert all(tensor.device.type == "meta" for tensor in away.state_dict().values())
        assert away.to_empty(device=DEVICE).means.dtype == torch.float16
        assert copy.deepcopy(module)(x).equal(exact)


def test_autocast_changes_nothing() -> None:
    module, x = MixtureScore(_mixture(dtype=torch.float32), PROCESS), _points(8, torch.float32)
    exact = module(x, 0.2)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert module(x, 0.2).equal(exact)
        assert module(x.bfloat16(), 0.2).equal(module(x.bfloat16().float(), 0.2).bfloat16())


def test_every_part_of_the_mixture_can_be_trained() -> None:
    module, x, t = MixtureScore(_mixture(), PROCESS, trainable=True), _points(3), torch.tensor([0.0, 0.1, 0.4])

    def work(x: Tensor, *state: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(module, dict(zip(STATE, state, strict=True)), (x, t.to(DEVICE)))
        return out

    state = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]
    torch.autograd.gradcheck(work, (x.requires_grad_(), *state))
    shifted = {"log_weights": module.log_weights.detach() + 1}  # need not stay normalised
    torch.testing.assert_close(torch.func.functional_call(module, shifted, (x,)), module(x))


def test_score_matching_finds_the_mixture() -> None:
    """Denoising score matching from means that are off, with the usual loop: an optimiser, a loss, backward."""
    target = GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 1.0]], device=DEVICE), 0.5, [0.7, 0.3])
    generator = torch.Generator(DEVICE).manual_seed(0)
    exact = MixtureScore(target, PROCESS)
    start = GaussianMixture(target.means + 0.5, 0.7)
    student = MixtureScore(start, PROCESS, trainable=True)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    first = last = float("inf")
    for step in range(150):
        t = torch.rand(64, generator=generator, device=DEVICE)
        noise = torch.randn(64, 2, generator=generator, device=DEVICE)
        alpha = PROCESS.alpha(t).float()[:, None]
        x = alpha * target.sample(64, generator=generator) + (1 - alpha**2).sqrt() * noise
        loss = (student(x, t) - exact(x, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item() if step == 0 else first), loss.item()
    assert last < first / 100
    torch.testing.assert_close(student.mixture.means, target.means, atol=0.1, rtol=0)
    torch.testing.assert_close(student.mixture.weights, target.weights, atol=0.05, rtol=0)
    assert abs(student.std.item() - 0.5) < 0.05


def test_export() -> None:
    module, n = MixtureScore(_mixture(), PROCESS), torch.export.Dim("n", min=2)
    example = (_points(7), torch.rand(7, device=DEVICE))
    program = torch.export.export(module, example, dynamic_shapes=({0: n}, {0: n}), strict=False)
    x, t = _points(12), torch.linspace(0, 1, 12, device=DEVICE)
    assert program.module()(x, t).equal(module(x, t))
    assert list(program.state_dict) == STATE


def test_ensembles_and_derivatives() -> None:
    """`torch.func`: several mixtures at once, derivatives in x and in the state."""
    modules, x = [MixtureScore(_mixture(seed), PROCESS) for seed in range(3)], _points(4)
    _, buffers = torch.func.stack_module_state(modules)

    def work(state: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(modules[0], state, (x, 0.2))
        return out

    each = torch.stack([module(x, 0.2) for module in modules])
    torch.testing.assert_close(torch.func.vmap(work, in_dims=(0, None))(buffers, x), each)
    jacobian = torch.func.vmap(torch.func.jacrev(modules[0]))(x)
    torch.testing.assert_close(jacobian.diagonal(dim1=1, dim2=2).sum(1), flowfast.divergence(x, modules[0].mixture))
    state = dict(modules[0].named_buffers())
    slope = torch.func.grad(lambda state: work(state, x).square().sum())(state)
    tangent = {name: torch.ones_like(value) for name, value in state.items()}
    along = torch.func.jvp(lambda state: work(state, x).square().sum(), (state,), (tangent,))[1]
    torch.testing.assert_close(along, sum(value.sum() for value in slope.values()))
