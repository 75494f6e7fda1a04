"""Ways of training a student that are no settings of `Recipe`, for `python -m bench.recipes` to measure.

Each is a short loop made of the parts of `distill`: the same initial weights and the same pairs, equal rows for every
segment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flowfast import FlowStudent, GaussianMixture, OUProcess, Recipe
from flowfast.distillation import new_student
from flowfast.step_pairs import fresh_pairs
from flowfast.training import Trainer

AVERAGED = 0.05  # mean age of the weights in their average, share of the steps
TUNED = 0.3  # share of the steps on the composed error


@dataclass(frozen=True)
class Task:
    """What `distill` would be called with: the law, the time grid (noise first), the recipe, the seed."""

    mixture: GaussianMixture
    process: OUProcess
    grid: tuple[float, ...]
    recipe: Recipe
    seed: int

    def student(self) -> FlowStudent:
        """The untrained student."""
        return new_student(self.mixture, self.process, self.grid, self.recipe, self.seed)

    def pairs(self) -> Callable[[int], tuple[list[Tensor], list[Tensor]]]:
        """The teacher's pairs of every step: x_from and x_to, (batch_size, d) for each segment."""
        pairs = fresh_pairs(self.mixture, self.process, self.grid, self.recipe, self.seed)
        rows = [self.recipe.batch_size] * (len(self.grid) - 1)
        return lambda step: pairs(step, rows)


def averaged(task: Task) -> FlowStudent:
    """An exponential moving average of the weights of all steps is the student."""
    student, pairs, steps = task.student(), task.pairs(), task.recipe.steps
    trainer = Trainer(student, task.recipe)
    decay = 1 - 1 / max(1.0, AVERAGED * steps)
    mean = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for step in range(steps):
        trainer.step(*pairs(step))
        mean.update_parameters(student)
    student.load_state_dict(mean.module.state_dict())
    return student.eval()


def one_by_one(task: Task, *, backwards: bool = False, warm: bool = True) -> FlowStudent:
    """A network per segment, from noise to data or backwards, each beginning with the weights of the one before."""
    student, pairs = task.student(), task.pairs()
    order = list(range(student.n_segments))[:: -1 if backwards else 1]
    for turn, i in enumerate(order):
        if warm and turn:
            student.networks[i].load_state_dict(student.networks[order[turn - 1]].state_dict())
        alone = replace(task, grid=task.grid[i : i + 2]).student()
        alone.networks = nn.ModuleList([student.networks[i]])  # trained in place
        trainer = Trainer(alone, task.recipe)
        for step in range(task.recipe.steps):
            x_from, x_to = pairs(step)
            trainer.step(x_from[i : i + 1], x_to[i : i + 1])
    return student.eval()


def end_to_end(task: Task, *, beside: bool = False) -> FlowStudent:
    """A shared network whose last steps go down the composed relative squared error, on the first segment's points.

    A point passes all segments, so that a step takes as many evaluations of the network as before. The optimiser begins
    anew, as these gradients are of another size. beside: the segments' losses are added, at their own cost.
    """
    student, pairs, steps = task.student(), task.pairs(), task.recipe.steps
    whole = replace(task, grid=(task.grid[0], task.grid[-1])).pairs()
    first, tuned = Trainer(student, task.recipe), Trainer(student, task.recipe)
    tuned.done = steps - round(TUNED * steps)  # the rate falls on
    for step in range(tuned.done):
        first.step(*pairs(step))
    for step in range(tuned.done, steps):
        (start,), (end,) = whole(step)
        loss = (student(start) - end).square().sum() / end.square().sum()
        tuned.descend(loss + student.losses(*pairs(step)).mean() if beside else loss)
    return student.eval()


LOOPS: Mapping[str, Callable[[Task], FlowStudent]] = {
    "averaged": averaged,
    "one by one": one_by_one,
    "one by one, backwards": partial(one_by_one, backwards=True),
    "end to end": end_to_end,
    "end to end, beside": partial(end_to_end, beside=True),
}
