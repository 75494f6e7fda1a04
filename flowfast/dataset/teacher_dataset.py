"""Reading a teacher set."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowfast.dataset.batches import Batches, Pairs
from flowfast.dataset.identity import read_mixture
from flowfast.dataset.plan import DTYPES
from flowfast.dataset.receipts import listed_receipts
from flowfast.dataset.shard_files import map_shard, open_folder, read_into_cache
from flowfast.dataset.shards import shard_name
from flowfast.process import OUProcess

_MOST_MAPPED = 4_096  # shards mapped at a time; a process may hold some 65,000 maps


class TeacherDataset(Dataset[Pairs]):
    """Exact teacher pairs that `generate_dataset` stored, mapped into memory: only rows that are asked for are read.

    `len` is the number of rows. Row i is (x_from (d,), x_to (d,), where): x_from is a draw of the marginal at the
    row's first time and x_to where the exact flow carries it; `where` is the segment i mod m () int32 of a time grid,
    or (t_from, t_to) (2,) float64 of a set with random times.

    Shards are mapped when they are first needed. Their sizes and headers are checked then, their contents by
    `verify_dataset`. Nothing outside the folder is read. Worker processes of a loader map the files themselves.

    Args:
        path: the folder, of this machine.

    Raises:
        ValueError: no set there, or one that is incomplete or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.store, self.plan = open_folder(path)
        self.folder = Path(self.store.location)
        there = set(listed_receipts(self.store, self.plan))
        if len(there) < self.plan.n_shards:
            first = next(shard for shard in range(self.plan.n_shards) if shard not in there)
            raise ValueError(
                f"teacher set: {self.folder} is incomplete, {self.plan.n_shards - len(there)} of {self.plan.n_shards} "
                f"shards are missing, first {first}: call generate_dataset again, it goes on there"
            )
        self.mixture = read_mixture(self.store, self.plan)
        self.process = OUProcess.from_dict(self.plan.process)
        self._shard = lru_cache(_MOST_MAPPED)(partial(map_shard, self.store, self.plan, self.dim))

    @property
    def dim(self) -> int:
        """Dimension d."""
        return self.mixture.dim

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the points."""
        return DTYPES[self.plan.dtype]

    @property
    def times(self) -> Tensor | None:
        """The time grid (m + 1,) float64, noise first; None where times are random."""
        return None if self.plan.times is None else torch.tensor(self.plan.times, dtype=torch.float64)

    @property
    def n_segments(self) -> int:
        """Number m of segments of the time grid; 0 where times are random."""
        return self.plan.n_segments

    @property
    def pairs_per_segment(self) -> int:
        """Pairs that every segment has at the least; 0 where times are random."""
        return self.plan.rows // self.n_segments if self.n_segments else 0

    def __len__(self) -> int:
        """Number of rows."""
        return self.plan.rows

    def __getitem__(self, row: int) -> Pairs:
        """One row; see the class."""
        if isinstance(row, bool) or not isinstance(row, int):
            raise TypeError(f"row must be an int; got {type(row).__name__}: pairs(rows) takes several")
        if not -len(self) <= row < len(self):
            raise IndexError(f"row must be from 0 to {len(self) - 1}; got {row}")
        x_from, x_to, where = self.pairs(torch.tensor([row % len(self)]))
        return x_from[0], x_to[0], where[0]

    def __getitems__(self, rows: list[int]) -> list[Pairs]:
        """Several rows at once, for loaders with a sampler of their own."""
        return list(zip(*(column.unbind() for column in self.pairs(torch.tensor(rows))), strict=True))

    def pairs(self, rows: Tensor) -> Pairs:
        """Several rows.

        Args:
            rows: (n,) int64, in any order, with repetitions.

        Returns:
            x_from (n, d), x_to (n, d), and segment (n,) int32 or t (n, 2) float64; copies.

        Raises:
            TypeError, ValueError: no such rows, or a shard that is damaged.
        """
        _check("rows", rows, len(self))
        n, last = len(rows), "segment" if self.n_segments else "t"
        points = {name: torch.empty(n, self.dim, dtype=self.dtype) for name in ("x_from", "x_to")}
        found = {**points, last: torch.empty(n, dtype=torch.int32) if self.n_segments else torch.empty(n, 2).double()}
        shard = rows // self.plan.rows_per_shard
        order = shard.argsort()
        place = (rows - shard * self.plan.rows_per_shard)[order]
        numbers, counts = shard[order].unique_consecutive(return_counts=True)
        begin = 0
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            here = slice(begin, begin + count)
            begin += count
            for name, stored in self.shard(number).items():
                torch.index_select(stored, 0, place[here], out=found[name][here])
        back = torch.empty_like(order)
        back[order] = torch.arange(n)
        x_from, x_to, where = (found[name].index_select(0, back) for name in ("x_from", "x_to", last))
        return x_from, x_to, where

    def shard(self, number: int) -> dict[str, Tensor]:
        """The tensors of one shard, mapped: x_from, x_to (rows, d), and segment (rows,) or t (rows, 2). Do not write.

        Raises:
            ValueError: it is damaged.
        """
        return self._shard(number)

    def read_ahead(self, number: int) -> None:
        """Bring the file of one shard into memory, in order, so that its rows need not be fetched one by one.

        Nothing happens where that cannot be done: `shard` tells what is wrong.
        """
        read_into_cache(self.store, shard_name(number))

    def pair(self, segment: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher pairs of one segment of a time grid.

        Args:
            segment: 0 (starts at noise) to m - 1.
            index: (n,) int64, which of the segment's pairs, from 0 to pairs_per_segment - 1: row index * m + segment.

        Returns:
            Points at the segment's start and end, each (n, d).

        Raises:
            TypeError, ValueError: no such segment or pairs, or times are random.
        """
        if not self.n_segments:
            raise ValueError(f"segment: {self.folder} has random times and no segments: take pairs(rows)")
        if isinstance(segment, bool) or not isinstance(segment, int) or not 0 <= segment < self.n_segments:
            raise ValueError(f"segment must be from 0 to {self.n_segments - 1}; got {segment!r}")
        _check("index", index, -(-(len(self) - segment) // self.n_segments))
        return self.pairs(index * self.n_segments + segment)[:2]

    def batches(
        self, batch_size: int, *, seed: int = 0, epoch: int = 0, rank: int | None = None, world: int | None = None
    ) -> Batches:
        """One epoch in shuffled batches, an iterable of what `pairs` returns.

        Args:
            batch_size: rows per batch, >= 1. seed, epoch: >= 0; they decide the order.
            rank, world: which process this is, of how many that divide the epoch; None, and only together, asks
                torch.distributed where a process group is up, and is 0 of 1 elsewhere.

        Returns:
            An iterable data set. For workers: `DataLoader(batches, batch_size=None, num_workers=...)`, the same
            batches in the same order with any number of them.

        Raises:
            TypeError, ValueError: an argument out of range, or fewer rows than one batch per rank.
        """
        return Batches(
            self.plan, self.pairs, self.read_ahead, batch_size, seed=seed, epoch=epoch, rank=rank, world=world
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to worker processes as a path; the maps are opened there."""
        return TeacherDataset, (self.folder,)


def _check(name: str, numbers: Tensor, most: int) -> None:
    if not isinstance(numbers, Tensor) or numbers.dtype != torch.int64 or numbers.ndim != 1:
        raise TypeError(f"{name} must be an int64 tensor of shape (n,); got {numbers!r:.60}")
    if len(numbers) and not (int(numbers.min()) >= 0 and int(numbers.max()) < most):
        raise ValueError(f"{name} must be from 0 to {most - 1}; got {int(numbers.min())} to {int(numbers.max())}")
