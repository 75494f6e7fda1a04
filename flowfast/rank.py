"""One process's share of work that several divide without talking to each other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rank:
    """Which process this is, of how many that divide the runs among themselves without talking to each other."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        """Refuse a rank outside 0 to world - 1."""
        if not (self.world >= 1 and 0 <= self.rank < self.world):
            raise ValueError(f"rank must be between 0 and {self.world - 1} of {self.world}; got {self.rank}")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Rank:
        """The share that torchrun (RANK, WORLD_SIZE) or a SLURM array gives this process; everything without them.

        Raises:
            ValueError: values that are no numbers or do not fit, or RANK without WORLD_SIZE.
        """
        for rank, world, first in (
            ("RANK", "WORLD_SIZE", ""),
            ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
        ):
            if rank in environment or world in environment:
                try:
                    start = int(environment.get(first, "0"))
                    return cls(int(environment[rank]) - start, int(environment[world]))
                except (KeyError, ValueError) as error:
                    raise ValueError(
                        f"environment: {rank} and {world} must be whole numbers that fit ({error}): set or unset both"
                    ) from error
        return cls()
