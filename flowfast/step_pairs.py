"""The teacher's pairs of one optimiser step, made anew or drawn from a stored set."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowfast.dataset import TeacherDataset
from flowfast.flow import flow_map
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.seeds import generator_for
from flowfast.training import Recipe

_FRESH_ROWS = 4_096  # pairs per segment that one call of the teacher makes, enough to keep all cores busy
_ALIKE = 16  # steps, at most, between two allocations by loss: about the memory of the losses' running mean

Pairs = Callable[[int, Sequence[int]], tuple[list[Tensor], list[Tensor]]]
"""Of a step, and of the rows b that each segment is to get: x_from and x_to, (b, d) for each."""


def steps_together(recipe: Recipe, segments: int) -> int:
    """How many steps get their pairs from one call of the teacher, and the same rows per segment."""
    most = min(recipe.steps, _ALIKE) if recipe.allocates(segments) else recipe.steps
    return min(most, max(1, _FRESH_ROWS // recipe.batch_size))


def stored_pairs(data: TeacherDataset, seed: int, device: torch.device) -> Pairs:
    """Rows drawn with replacement, others for every segment: a segment then sees more starting points per step."""

    def pairs(step: int, rows: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        drawn = torch.randint(data.pairs_per_segment, (sum(rows),), generator=generator_for(seed, "rows", step))
        both = [data.pair(i, chosen) for i, chosen in enumerate(drawn.split(list(rows)))]
        return [x_from.to(device) for x_from, _ in both], [x_to.to(device) for _, x_to in both]

    return pairs


def fresh_pairs(
    mixture: GaussianMixture,
    process: OUProcess,
    grid: tuple[float, ...],
    recipe: Recipe,
    seed: int,
    backend: str = "auto",
) -> Pairs:
    """Pairs from the closed-form marginals, made for several steps at once: those that `distill` makes by itself."""
    together = steps_together(recipe, len(grid) - 1)
    marginals = [process.marginal(mixture, t) for t in grid[:-1]]
    made: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}

    def make(block: int, rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        generator = generator_for(seed, "pairs", block, device=mixture.device)
        starts = [
            marginal.sample(together * n, generator=generator) for n, marginal in zip(rows, marginals, strict=True)
        ]
        return [
            (x, flow_map(x, mixture, process, t_from, t_to, backend=backend))  # each (together * b, d)
            for x, t_from, t_to in zip(starts, grid[:-1], grid[1:], strict=True)
        ]

    def pairs(step: int, rows: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        block, part = divmod(step, together)
        if (block, *rows) not in made:
            made.clear()
            made[block, *rows] = make(block, rows)
        here = [slice(part * n, (part + 1) * n) for n in rows]
        found = made[block, *rows]
        return (
            [x_from[place] for place, (x_from, _) in zip(here, found, strict=True)],
            [x_to[place] for place, (_, x_to) in zip(here, found, strict=True)],
        )

    return pairs
