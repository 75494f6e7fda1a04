"""Ways of training a student that are no settings of `Recipe`, for `python -m bench.recipes` to measure.

Each is a short loop made of the parts of `distill`: the same initial weights and, `rows_by_loss` aside, the same pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flowfast import FlowStudent, GaussianMixture, OUProcess, Recipe, flow_map
from flowfast.distillation import Pairs, fresh_pairs, new_student
from flowfast.seeds import generator_for
from flowfast.training import Trainer

AVERAGED = 0.05  # mean age of the weights in their average, share of the steps
TUNED = 0.3  # share of the steps on the composed error
LEAST = 1 / 32  # of a step's rows go to every segment, whatever its loss
TOGETHER = 16  # steps whose pairs are made by one call of the teacher, and whose rows are divided alike
RECENT = 0.1  # weight of a step's losses in their running mean


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

    def pairs(self) -> Pairs:
        """The teacher's pairs of every step."""
        return fresh_pairs(self.mixture, self.process, self.grid, self.recipe, self.seed)


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


def rows_by_loss(task: Task, *, alike: bool = False) -> FlowStudent:
    """A shared network, a step's rows divided between its segments in proportion to their recent losses.

    alike: all rows count alike, so that the loss, too, turns to the hard segments; else all segments do.
    """
    student, m = task.student(), len(task.grid) - 1
    trainer, total = Trainer(student, task.recipe), m * task.recipe.batch_size
    recent = torch.ones(m, dtype=torch.float64)
    for step in range(task.recipe.steps):
        block, turn = divmod(step, TOGETHER)
        if turn == 0:
            rows = shares(recent, total)
            made = [
                [student.network_pair(i, *pair) for pair in zip(x.split(n), y.split(n), strict=True)]
                for i, (n, (x, y)) in enumerate(zip(rows, _made(task, block, rows), strict=True))
            ]
        inputs, targets = zip(*(segment[turn] for segment in made), strict=True)
        out = student.networks[0](torch.cat(inputs)).split(rows)
        losses = torch.stack([(got - asked).square().mean() for got, asked in zip(out, targets, strict=True)])
        weights = losses.new_tensor([n / total if alike else 1 / m for n in rows])
        trainer.descend(weights @ losses)
        recent.lerp_(losses.detach().double(), RECENT)
    return student.eval()


def shares(losses: Tensor, total: int) -> list[int]:
    """`total` rows in proportion to the losses (m,), but at least LEAST of them, and one, for each."""
    least = max(1, int(LEAST * total))
    spare = total - least * len(losses)
    rows = [least + int(spare * share) for share in (losses / losses.sum()).tolist()]
    rows[int(losses.argmax())] += total - sum(rows)
    return rows


def _made(task: Task, block: int, rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of every segment for TOGETHER steps, from the stream of `distill`."""
    generator, found = generator_for(task.seed, "pairs", block), []
    for i, n in enumerate(rows):
        start = task.process.marginal(task.mixture, task.grid[i]).sample(TOGETHER * n, generator=generator)
        found.append((start, flow_map(start, task.mixture, task.process, task.grid[i], task.grid[i + 1])))
    return found


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
    "rows by loss": rows_by_loss,
    "rows by loss, alike": partial(rows_by_loss, alike=True),
    "one by one": one_by_one,
    "one by one, backwards": partial(one_by_one, backwards=True),
    "end to end": end_to_end,
    "end to end, beside": partial(end_to_end, beside=True),
}
