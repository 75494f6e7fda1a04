"""Students trained together: nobody notices the others, and files bring a training back to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flowfast.ensemble import Ensemble
from flowfast.students import MLP, FlowStudent, ResidualFlowMap, SegmentTable, TransformerFlowMap

DIM, BATCH, STEPS = 6, 48, 8
KINDS = {
    "relu": lambda g: MLP(DIM, DIM, width=16, depth=3, generator=g),
    "relu-requ": lambda g: MLP(DIM, DIM, width=16, depth=3, activation="relu-requ", generator=g),
    "residual": lambda g: ResidualFlowMap(DIM, blocks=3, width=8, generator=g),
    "residual, shared": lambda g: ResidualFlowMap(DIM, blocks=3, width=8, shared=True, generator=g),
    "transformer": lambda g: TransformerFlowMap(DIM, blocks=2, width=8, heads=2, generator=g),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def students(kind="relu", seeds=(0, 1, 2)):
    return [KINDS[kind](generator(seed)) for seed in seeds]


def data(step, seeds=(0, 1, 2)):
    """A batch per member from its own stream, the targets far enough away that gradients are clipped."""
    x = torch.stack([torch.randn(BATCH, DIM, generator=generator(1000 * step + seed)) for seed in seeds])
    return x, 20 * x.sin() + x.flip(-1)


def trained(ensemble, seeds=(0, 1, 2), steps=range(STEPS)):
    for step in steps:
        losses = ensemble.step(*data(step, seeds))
    return losses


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def plainly(student, seed, *, steps=STEPS, clip=1.0, bound=None, decay=0.0):
    """The protocol as torch spells it, for one student."""
    optimiser = torch.optim.AdamW(student.parameters(), lr=2e-4, weight_decay=decay)
    norms = []
    for step in range(steps):
        x, y = (side[0] for side in data(step, (seed,)))
        optimiser.zero_grad()
        (student(x) - y).square().mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(student.parameters(), clip)))
        optimiser.step()
        if bound is not None:
            with torch.no_grad():
                for layer in student.layers:
                    layer.weight.clamp_(-bound, bound)
    return norms


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_members_are_as_torch_trains_them_alone(kind, together):
    ensemble, alone = Ensemble(students(kind), together=together), students(kind)
    trained(ensemble, steps=range(20))
    x, _ = data(99)
    out = ensemble.predict(x)
    for i, student in enumerate(alone):
        before = student(x[i]).detach()
        norms = plainly(student, i, steps=20)
        assert max(norms) > 1  # the clip is at work
        moved = (student(x[i]).detach() - before).norm()
        # AdamW makes full steps of gradients that are nothing but rounding (a transformer's key biases): outputs agree
        assert float((out[i] - student(x[i]).detach()).norm() / moved) < 1e-4
        if kind != "transformer":
            for ours, theirs in zip(ensemble.member(i).parameters(), student.parameters(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_does_not_notice_the_others(kind):
    """To the bit on the CPU, whoever they are and wherever it stands, even beside one whose weights are ruined."""
    ensemble, alone = Ensemble(students(kind)), Ensemble(students(kind, (1,)))
    trained(ensemble)
    losses = trained(alone, (1,))
    ruined = students(kind, (5, 1))
    with torch.no_grad():
        for weight in ruined[0].parameters():
            weight.fill_(math.nan)
    other = Ensemble(ruined)
    assert torch.equal(trained(other, (5, 1))[1:], losses)
    assert same_bits(ensemble.member(1), alone.member(0)) and same_bits(other.member(1), alone.member(0))
    assert not same_bits(ensemble.member(1), ensemble.member(0))


@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bits(kind):
    """Members at work at the same time, and a member alone where there are more threads than members."""
    one, many, alone = Ensemble(students(kind)), Ensemble(students(kind)), Ensemble(students(kind, (2,)))
    x, _ = data(99)
    losses, out = trained(one), one.predict(x)
    torch.set_num_threads(2)
    assert torch.equal(trained(many), losses) and torch.equal(many.predict(x), out)
    trained(alone, (2,))
    assert torch.get_num_threads() == 2  # as it was
    assert all(same_bits(one.member(i), many.member(i)) for i in range(3))
    assert same_bits(one.member(2), alone.member(0))


def test_more_threads_per_member_agree_to_rounding():
    one, more = Ensemble(students()), Ensemble(students(), threads=2)
    losses = trained(one, steps=range(1))
    torch.set_num_threads(2)
    torch.testing.assert_close(trained(more, steps=range(1)), losses, rtol=1e-5, atol=0)


def test_an_error_in_a_thread_is_raised_and_leaves_the_number_of_threads():
    torch.set_num_threads(2)
    with pytest.raises(ValueError, match="y must have the shape of the students' answers"):
        Ensemble(students()).step(X, Y[..., :1])
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("kind", ["relu", "residual", "transformer"])
def test_a_ruined_member_leaves_its_stack_alone(kind):
    seeds, ruined = (0, 1, 2), students(kind)
    with torch.no_grad():
        next(ruined[2].parameters()).fill_(math.nan)
    whole, harmed = Ensemble(students(kind), together=3), Ensemble(ruined, together=3)
    trained(whole, seeds)
    losses = trained(harmed, seeds)
    assert losses.isfinite().tolist() == [True, True, False]
    assert all(same_bits(whole.member(i), harmed.member(i)) for i in (0, 1))


def test_losses_are_those_before_the_step():
    ensemble, alone = Ensemble(students()), students()
    x, y = data(0)
    expected = [(student(x[i]) - y[i]).square().mean().detach() for i, student in enumerate(alone)]
    torch.testing.assert_close(ensemble.step(x, y), torch.stack(expected), rtol=1e-6, atol=0)
    assert bool((ensemble.step(x, y) < torch.stack(expected)).all())
    assert ensemble.done == 2


@pytest.mark.parametrize("together", [1, 2, 3])
def test_each_member_has_its_own_bound(together):
    bounds = (0.01, 0.05, math.inf)
    ensemble, alone = Ensemble(students(), weight_bound=bounds, together=together), students()
    trained(ensemble)
    for i, bound in enumerate(bounds):
        plainly(alone[i], i, bound=bound)
        for ours, theirs in zip(ensemble.member(i).layers, alone[i].layers, strict=True):
            torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=1e-6)
            torch.testing.assert_close(ours.bias, theirs.bias, rtol=0, atol=1e-6)
    tops = [max(float(layer.weight.detach().abs().max()) for layer in ensemble.member(i).layers) for i in range(3)]
    assert tops[:2] == pytest.approx(bounds[:2]) and tops[2] > 0.3


def test_biases_are_bound_on_request():
    free, bound = (Ensemble(students(), weight_bound=1e-4, bound_biases=flag) for flag in (False, True))
    tops = []
    for ensemble in (free, bound):
        trained(ensemble)
        tops.append(max(float(layer.bias.detach().abs().max()) for layer in ensemble.member(0).layers))
    assert tops[1] == pytest.approx(1e-4) and tops[0] > 1e-3


def test_clip_and_decay_are_passed_on():
    ensemble, alone = Ensemble(students(seeds=(1,)), clip_norm=0.1, weight_decay=10.0), students(seeds=(1,))[0]
    trained(ensemble, (1,))
    plainly(alone, 1, clip=0.1, decay=10.0)
    for ours, theirs in zip(ensemble.member(0).parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert not same_bits(ensemble.member(0), _after(Ensemble(students(seeds=(1,)))))


def _after(ensemble):
    trained(ensemble, (1,))
    return ensemble.member(0)


def test_learning_rate_may_change_between_steps():
    ensemble, start = Ensemble(students()), students()
    ensemble.learning_rate = 0.0
    trained(ensemble)
    assert all(same_bits(ensemble.member(i), start[i]) for i in range(3))


def test_double_precision_and_buffers():
    table = SegmentTable(r=(0.1, 1.0), s=(1.0, 0.5))
    made = [FlowStudent(DIM, table, width=8, depth=1, center=[0.1 * i] * DIM, seed=i) for i in range(2)]
    ensemble = Ensemble([student.double() for student in made], together=2)
    x = torch.randn(2, BATCH, DIM, generator=generator(0), dtype=torch.float64)
    expected = torch.stack([student(x[i]) for i, student in enumerate(made)])
    torch.testing.assert_close(ensemble.predict(x), expected.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(ensemble.member(1).center, made[1].center)
    assert ensemble.step(x, x.sin()).dtype == torch.float64


def test_half_products_keep_full_weights():
    full, half = Ensemble(students()), Ensemble(students(), precision="bf16")
    x, y = data(0)
    assert half.step(x, y).dtype == torch.float32 and half.member(0).layers[0].weight.dtype == torch.float32
    full.step(x, y)
    a, b = full.predict(x), half.predict(x)
    assert b.dtype == torch.float32 and 1e-4 < float((a - b).norm() / a.norm()) < 0.02  # bfloat16 has 8 bits


def test_the_loss_is_compiled_on_request(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function: lambda *given: calls.append(1) or function(*given))
    plain, compiled = Ensemble(students()), Ensemble(students(), compile=True, together=3)
    assert torch.equal(trained(plain), trained(compiled)) and len(calls) == STEPS


class _Doubled(MLP):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_keeps_its_own_forward():
    student = _Doubled(DIM, DIM, width=4, generator=generator(0))
    x, _ = data(0)
    out = Ensemble([student] * 3, together=3).predict(x)
    torch.testing.assert_close(out[2], student(x[2]).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["relu-requ", "transformer"])
def test_a_training_that_was_stopped_ends_with_the_same_bits(tmp_path, kind):
    whole, first = Ensemble(students(kind)), Ensemble(students(kind))
    trained(whole)
    trained(first, steps=range(3))
    first.write(tmp_path / "state", {"seed": 3})
    again = Ensemble(students(kind, (7, 8, 9)))  # whatever they started from
    again.read(tmp_path / "state", {"seed": 3})
    assert again.done == 3
    trained(again, steps=range(3, STEPS))
    assert all(same_bits(whole.member(i), again.member(i)) for i in range(3))


def test_files_do_not_depend_on_how_members_are_stacked(tmp_path):
    for name, together in (("one", 1), ("two", 2), ("all", 3)):
        ensemble = Ensemble(students(), together=together)
        if name == "one":
            trained(ensemble)
        else:
            ensemble.read(tmp_path / "one", {})
        ensemble.write(tmp_path / name, {})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == (tmp_path / "all").read_bytes()
    assert load_file(tmp_path / "one")["student.layers.0.weight"].shape == (3, 16, DIM)


def test_foreign_and_damaged_files_change_nothing(tmp_path):
    path = tmp_path / "state"
    ensemble, fresh = Ensemble(students()), Ensemble(students())
    trained(ensemble)
    ensemble.write(path, {"seed": 3, "t": 0.5})
    whole = path.read_bytes()
    for harm, says, settings in (
        (whole[:-8], "damaged or no safetensors", {"seed": 3, "t": 0.5}),
        (whole.replace(b"flowfast ensemble", b"flowfast_ensemble"), "no ensemble of this version", {}),
        (whole, "seed is 3 there, 4 here", {"seed": 4, "t": 0.5}),
        (None, "does not exist", {}),
    ):
        path.unlink() if harm is None else path.write_bytes(harm)
        with pytest.raises(ValueError, match=says):
            fresh.read(path, settings)
    Ensemble(students("relu-requ", (0, 1))).write(path, {})
    with pytest.raises(ValueError, match="holds other students"):
        fresh.read(path, {})
    assert fresh.done == 0 and all(same_bits(fresh.member(i), s) for i, s in enumerate(students()))


def test_members_and_arguments_are_copies():
    given = students()
    before = [weight.clone() for weight in given[0].parameters()]
    ensemble = Ensemble(given)
    trained(ensemble)
    assert all(torch.equal(a, b) for a, b in zip(before, given[0].parameters(), strict=True))
    member = ensemble.member(0)
    with torch.no_grad():
        next(member.parameters()).zero_()
    assert not same_bits(member, ensemble.member(0)) and not member.training


X, Y = data(0)


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda: Ensemble([]), TypeError, "students must be one or more modules"),
        (lambda: Ensemble([3]), TypeError, r"students must be one or more modules; got \['int'\]"),
        (lambda: Ensemble([nn.ReLU()]), ValueError, "students must have parameters"),
        (lambda: Ensemble([*students(), *students("relu-requ")]), ValueError, "3 differs from 0"),
        (lambda: Ensemble([*students(), MLP(DIM, DIM, width=8)]), ValueError, "3 differs from 0"),
        (lambda: Ensemble([students()[0], students()[1].double()]), ValueError, "1 differs from 0"),
        (lambda: Ensemble(students(), learning_rate=0.0), ValueError, "learning_rate must be finite and above 0"),
        (lambda: Ensemble(students(), weight_decay=-1.0), ValueError, "weight_decay must be finite and at least 0"),
        (lambda: Ensemble(students(), clip_norm=math.nan), ValueError, "clip_norm must be finite and above 0"),
        (
            lambda: Ensemble(students(), weight_bound=0.0),
            ValueError,
            "weight_bound must be None, a number above 0 or 3",
        ),
        (lambda: Ensemble(students(), weight_bound=[1.0, 2.0]), ValueError, "a number above 0 or 3 of them"),
        (lambda: Ensemble(students(), weight_bound="b"), TypeError, "weight_bound must be None, a number or 3"),
        (lambda: Ensemble(students(), precision="fp8"), ValueError, "precision must be one of float32, tf32, bf16"),
        (lambda: Ensemble(students(), precision="tf32"), ValueError, "'tf32' is a mode of CUDA"),
        (lambda: Ensemble(students(), threads=0), ValueError, "threads must be at least 1"),
        (lambda: Ensemble(students(), together=0), ValueError, "together must be at least 1"),
        (lambda: Ensemble(students()).step(X[:2], Y[:2]), ValueError, r"shapes \(3, b, d_in\)"),
        (lambda: Ensemble(students()).step(X, Y[:, :9]), ValueError, r"got \(3, 48, 6\) and \(3, 9, 6\)"),
        (
            lambda: Ensemble(students()).step(X, Y[..., :1]),
            ValueError,
            r"y must have .* \(1, 48, 6\); got \(1, 48, 1\)",
        ),
        (lambda: Ensemble(students()).predict(X[0]), ValueError, r"shape \(3, n, d_in\); got \(48, 6\)"),
        (lambda: Ensemble(students()).member(3), ValueError, "from 0 to 2; got 3"),
    ],
)
def test_wrong_calls(call, kind, says):
    with pytest.raises(kind, match=says):
        call()
