"""A step's rows between the segments of a shared network: the division, its pairs, resuming, where it does nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowfast import GaussianMixture, OUProcess, Recipe, distill, flow_map, relative_mse
from flowfast.dataset import generate_dataset
from flowfast.distillation import Progress, new_student
from flowfast.seeds import generator_for
from flowfast.step_pairs import fresh_pairs, steps_together, stored_pairs
from flowfast.storage import read_tensors
from flowfast.students import FlowStudent
from flowfast.training import Trainer, allocate

TIMES = (1.0, 0.6, 0.3, 0.0)
PROCESS = OUProcess(5.0)
MIXTURE = GaussianMixture.random(3, 2, std=0.5, seed=0)
RECIPE = Recipe(steps=40, batch_size=16, width=16, depth=2, allocation="by-loss")
EQUAL = replace(RECIPE, allocation="equal")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    return generate_dataset(MIXTURE, PROCESS, TIMES, 300, folder, rows_per_shard=64, backend="reference")


def train(recipe: Recipe = RECIPE, times=TIMES, **more) -> FlowStudent:
    return distill(MIXTURE, PROCESS, times, recipe=recipe, seed=5, backend="reference", **more)


def weights_of(student: FlowStudent) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in student.parameters()])


def same(one: FlowStudent, other: FlowStudent) -> bool:
    return torch.equal(weights_of(one), weights_of(other))


@pytest.mark.parametrize(
    ("losses", "batch", "rows"),
    [
        ([1.0, 1.0, 1.0], 32, [32, 32, 32]),
        ([0.0, 0.0, 5.0], 32, [4, 4, 88]),  # an eighth of 32 for those that have nothing left to learn
        ([1.0, 3.0], 16, [2 + 7, 2 + 21]),
        ([3.0, 1.0, 3.0], 9, [1 + 11, 1 + 3, 1 + 10]),  # 24 in sevenths; the first of the largest takes the remainder
        ([1e-9, 1.0], 2, [1, 3]),
        ([0.1, 0.9], 1, [1, 1]),
        ([1e-320, 3e-320], 16, [9, 23]),
        ([7.0], 16, [16]),
    ],
)
def test_rows_follow_the_losses(losses, batch, rows):
    assert allocate(losses, batch) == rows


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.7e308])
def test_losses_that_are_no_measure_divide_equally(bad):
    assert allocate([0.1, bad, bad], 16) == [16, 16, 16]  # 1.7e308 twice is infinite
    assert allocate([0.0, 0.0], 16) == [16, 16]


@pytest.mark.parametrize("m", [2, 7, 64])
@pytest.mark.parametrize("batch", [1, 13, 1_024])
def test_no_row_is_lost_and_no_segment_starves(m, batch):
    losses = (torch.rand(m, generator=torch.Generator().manual_seed(batch)) ** 8).tolist()
    rows = allocate(losses, batch)
    assert sum(rows) == m * batch
    assert min(rows) >= max(1, batch // 8)
    assert rows == allocate(losses, batch)
    ordered = [n for _, n in sorted(zip(losses, rows, strict=True))]
    assert ordered == sorted(ordered)


@pytest.mark.parametrize("fresh", [True, False])
def test_a_training_divides_by_its_recent_losses_and_keeps_the_division_for_a_block(monkeypatch, stored, fresh):
    counts, losses, original = [], [], FlowStudent.losses

    def seen(student, x_from, x_to):
        found = original(student, x_from, x_to)
        counts.append([len(x) for x in x_from])
        losses.append(found.detach().double())
        return found

    monkeypatch.setattr(FlowStudent, "losses", seen)
    train(data=None if fresh else stored)
    recent, expected = torch.ones(3, dtype=torch.float64), []
    for step, loss in enumerate(losses):
        if step % 16 == 0:
            rows = allocate(recent.tolist(), 16)
        expected.append(rows)
        recent = recent + (loss - recent) / 10
    assert counts == expected
    assert counts[0] == [16, 16, 16] and len({tuple(rows) for rows in counts}) == 3  # three blocks, three divisions


def test_blocks_are_those_of_the_teacher_and_at_most_sixteen_steps():
    assert [steps_together(replace(RECIPE, batch_size=b), 3) for b in (1, 256, 1_024, 9_999)] == [16, 16, 4, 1]
    assert steps_together(replace(RECIPE, steps=5), 3) == 5
    for recipe, m in ((EQUAL, 3), (RECIPE, 1), (replace(RECIPE, shared=False), 3)):  # nothing to divide
        assert steps_together(replace(recipe, steps=1_000), m) == 256


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(("times", "shared"), [((1.0, 0.0), True), (TIMES, False)])
def test_one_segment_or_a_network_each_know_no_allocation(stored, tmp_path, fresh, times, shared):
    data = None if fresh else stored
    if len(times) == 2 and not fresh:
        data = generate_dataset(MIXTURE, PROCESS, times, 100, tmp_path, backend="reference")
    recipe = replace(RECIPE, shared=shared)
    assert same(train(recipe, times, data=data), train(replace(recipe, allocation="equal"), times, data=data))


def test_equal_rows_are_one_draw_for_all_segments(stored):
    student = new_student(MIXTURE, PROCESS, TIMES, EQUAL, 5)
    trainer = Trainer(student, EQUAL)
    for step in range(40):
        rows = torch.randint(100, (3, 16), generator=generator_for(5, "rows", step))
        x_from, x_to = (torch.stack(side) for side in zip(*map(stored.pair, range(3), rows), strict=True))
        trainer.step(x_from, x_to)
    assert same(train(EQUAL, data=stored), student)
    assert not same(train(RECIPE, data=stored), student)


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("stop", [17, 25, 33])
def test_interrupted_within_a_block_it_ends_with_the_same_bits(tmp_path, stored, stop, fresh):
    file, data = tmp_path / "state", None if fresh else stored

    def interrupt(now: Progress) -> None:
        if now.step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=file, checkpoint_every=4, progress=interrupt, data=data)
    tensors, about = read_tensors(file, "checkpoint")
    rows = tensors["rows"].tolist()
    assert about["step"] == stop // 4 * 4
    assert about["step"] % 16 == 0 or rows != allocate(tensors["recent"].tolist(), 16)  # only the file knows them
    assert same(train(checkpoint=file, checkpoint_every=4, data=data), train(data=data))


@pytest.mark.parametrize("fresh", [True, False])
def test_pairs_of_any_division_follow_the_flow(stored, fresh):
    """And those of a step depend on nothing but seed, step and rows."""

    def source():
        if fresh:
            return fresh_pairs(MIXTURE, PROCESS, TIMES, RECIPE, 5, "reference")
        return stored_pairs(stored, 5, torch.device("cpu"))

    pairs, rows, starts = source(), (3, 40, 5), [[], [], []]
    for step in range(32):
        x_from, x_to = pairs(step, rows)
        assert [tuple(x.shape) for x in x_from] == [tuple(x.shape) for x in x_to] == [(n, 2) for n in rows]
        for i in range(3):
            end = flow_map(x_from[i], MIXTURE, PROCESS, TIMES[i], TIMES[i + 1], backend="reference")
            assert relative_mse(x_to[i], end) < 1e-9  # the reference's tolerance, and float32
            starts[i].append(x_from[i])
    distinct = [len(torch.cat(points).unique(dim=0)) for points in starts]
    assert distinct == [96, 1_280, 160] if fresh else max(distinct) <= 100
    again = source()(21, rows)
    for one, other in zip(pairs(21, rows), again, strict=True):
        assert all(map(torch.equal, one, other))
    first = pairs(21, (40, 3, 5))[0]  # another division is another draw, in the same block too
    assert [len(x) for x in first] == [40, 3, 5]


def test_losses_of_segments_of_any_length_count_alike():
    student = new_student(MIXTURE, PROCESS, TIMES, RECIPE, 5)
    x_from, x_to = fresh_pairs(MIXTURE, PROCESS, TIMES, RECIPE, 5, "reference")(0, (3, 40, 5))
    found = student.losses(x_from, x_to)
    for i in range(3):
        inputs, outputs = student.network_pair(i, x_from[i], x_to[i])
        alone = (student.networks[0](inputs) - outputs).square().mean()
        # products of other shapes and sums in another order: a few units of float32's 1.2e-7
        torch.testing.assert_close(found[i], alone, rtol=2e-6, atol=0)
    with pytest.raises(ValueError, match="zip"):
        student.losses(x_from[:2], x_to[:2])


class Numbers(TorchDispatchMode):
    """Counts the times that a tensor's value is asked for."""

    asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.asked += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_asks_for_no_number():
    """On a GPU every such question waits for the device."""
    trainer = Trainer(new_student(MIXTURE, PROCESS, TIMES, RECIPE, 5), RECIPE)
    x_from, x_to = fresh_pairs(MIXTURE, PROCESS, TIMES, RECIPE, 5, "reference")(0, (3, 40, 5))
    with Numbers() as numbers:
        loss = trainer.step(x_from, x_to)
        assert numbers.asked == 0
        loss.item()
        assert numbers.asked == 1


def test_a_hard_segment_gains_from_more_rows():
    """The composed error of three seeds, against that of equal rows (measured: 0.067 and 0.079; every seed gains)."""
    mixture, times = GaussianMixture.random(5, 4, std=1.0, seed=0), (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.0)
    path = [PROCESS.marginal(mixture, 1.0).sample(2_000, generator=torch.Generator().manual_seed(7))]
    for t_from, t_to in zip(times, times[1:], strict=False):  # next to nothing happens before the last segment
        path.append(flow_map(path[-1], mixture, PROCESS, t_from, t_to))
    errors = {"by-loss": 0.0, "equal": 0.0}
    for seed in range(3):
        for allocation in errors:
            recipe = Recipe.fresh(steps=300, batch_size=8, width=32, depth=2, allocation=allocation)
            student = distill(mixture, PROCESS, times, recipe=recipe, seed=seed)
            errors[allocation] += relative_mse(student(path[0]), path[-1])
    assert errors["by-loss"] < errors["equal"]
