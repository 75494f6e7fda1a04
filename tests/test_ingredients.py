"""The benchmark's own training loops: with the ingredient taken out, each of them is `distill`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import ingredients
from flowfast import GaussianMixture, OUProcess, Recipe, distill, evaluate, flow_map
from flowfast.training import Trainer

GRID = (1.0, 0.4, 0.15, 0.0)
TASK = ingredients.Task(
    GaussianMixture.random(5, 4, std=0.5, seed=3).to(dtype=torch.float64),
    OUProcess(5.0),
    GRID,
    Recipe.fresh(steps=6, batch_size=8, width=16, depth=2, allocation="equal"),
    seed=1,
)
ALONE = replace(TASK, recipe=replace(TASK.recipe, shared=False))
STILL = replace(ALONE, recipe=replace(ALONE.recipe, learning_rate=1e-300))  # weights move by 1e-299


def weights_of(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in module.parameters()])


def distilled(task: ingredients.Task) -> torch.Tensor:
    return weights_of(distill(task.mixture, task.process, task.grid, recipe=task.recipe, seed=task.seed))


def test_an_average_of_the_last_step_alone_is_distill(monkeypatch):
    monkeypatch.setattr(ingredients, "AVERAGED", 0.0)
    assert torch.equal(weights_of(ingredients.averaged(TASK)), distilled(TASK))


def test_the_average_is_exponential_over_its_share_of_the_steps(monkeypatch):
    monkeypatch.setattr(ingredients, "AVERAGED", 0.5)  # of 6 steps: decay 2/3
    student, pairs = TASK.student(), TASK.pairs()
    trainer, mean = Trainer(student, TASK.recipe), None
    for step in range(TASK.recipe.steps):
        trainer.step(*pairs(step))
        now = weights_of(student)
        mean = now if mean is None else 2 / 3 * mean + now / 3
    # float64 rounding of six sums of numbers below 1
    torch.testing.assert_close(weights_of(ingredients.averaged(TASK)), mean, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backwards", [False, True])
def test_cold_networks_one_by_one_are_distill(backwards):
    student = ingredients.one_by_one(ALONE, backwards=backwards, warm=False)
    assert torch.equal(weights_of(student), distilled(ALONE))


@pytest.mark.parametrize(("backwards", "origin"), [(False, 0), (True, 2)])
def test_warm_networks_begin_where_their_neighbour_ended(backwards, origin):
    origin_weights = weights_of(STILL.student().networks[origin])
    for network in ingredients.one_by_one(STILL, backwards=backwards).networks:
        torch.testing.assert_close(weights_of(network), origin_weights, rtol=0, atol=1e-290)
    trained = ingredients.one_by_one(ALONE, backwards=backwards)
    cold = distill(ALONE.mixture, ALONE.process, GRID, recipe=ALONE.recipe, seed=ALONE.seed)
    same = [torch.equal(*map(weights_of, pair)) for pair in zip(trained.networks, cold.networks, strict=True)]
    assert same == [i == origin for i in range(3)]


def test_no_tuned_steps_are_distill(monkeypatch):
    monkeypatch.setattr(ingredients, "TUNED", 0.0)
    assert torch.equal(weights_of(ingredients.end_to_end(TASK)), distilled(TASK))


@pytest.mark.parametrize("beside", [False, True])
def test_the_composed_error_alone_trains_a_composition(monkeypatch, beside):
    monkeypatch.setattr(ingredients, "TUNED", 1.0)
    task = replace(TASK, recipe=replace(TASK.recipe, steps=200))
    path = [task.process.marginal(task.mixture, 1.0).sample(500, generator=torch.Generator().manual_seed(7))]
    for t_from, t_to in zip(GRID, GRID[1:], strict=False):
        path.append(flow_map(path[-1], task.mixture, task.process, t_from, t_to))
    before, after = (
        evaluate(student, torch.stack(path)).composed
        for student in (task.student(), ingredients.end_to_end(task, beside=beside))
    )
    assert after < before / 2
