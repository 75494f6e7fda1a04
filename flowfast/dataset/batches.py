"""Shuffled batches of a teacher set, divided among ranks and loader workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from flowfast.dataset.plan import Plan
from flowfast.seeds import generator_for

Pairs = tuple[Tensor, Tensor, Tensor]  # x_from, x_to, and segment or t

WINDOW = 8  # shards that are shuffled together: a batch touches few files, so it costs few calls and few page faults


class Batches(IterableDataset[Pairs]):
    """One epoch of a teacher set in shuffled batches; made by `TeacherDataset.batches`.

    The sequence of batches is a pure function of plan, batch size, seed and epoch. Rank r of w takes batches r, r + w,
    r + 2 w, ...: every rank equally many, in an order that does not depend on the number of loader workers. What is
    left over (less than w batches) is dropped. Give it to `DataLoader(..., batch_size=None, num_workers=...)`, or
    iterate.

    Shards come in shuffled order and rows are shuffled across windows of 8 shards. Rows of a teacher set are
    independent draws, so this is as good as shuffling the whole set. Each process shuffles every window, some 20 ns a
    row.

    While rows of one window are taken from random places, a thread brings the next one's files into memory in order:
    random reads of a disk are a hundred times slower. Loader workers divide the files.

    Args:
        plan: of the set. pairs: what reads rows (n,) int64 of it. read_ahead: what brings a shard's file into memory.
        The others: see `TeacherDataset.batches`.
    """

    def __init__(
        self,
        plan: Plan,
        pairs: Callable[[Tensor], Pairs],
        read_ahead: Callable[[int], None],
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        rank: int | None,
        world: int | None,
    ) -> None:
        """See `TeacherDataset.batches`."""
        if (rank is None) != (world is None):
            raise ValueError(f"rank and world must be given together; got rank={rank}, world={world}")
        if rank is None or world is None:
            rank, world = _process()
        given = {"batch_size": batch_size, "seed": seed, "epoch": epoch, "world": world, "rank": rank}
        for name, value in given.items():
            least = 1 if name in ("batch_size", "world") else 0
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int; got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        if rank >= world:
            raise ValueError(f"rank must be from 0 to world - 1 = {world - 1}; got {rank}")
        if plan.rows < batch_size * world:
            raise ValueError(f"batch_size must leave every rank a batch of the {plan.rows} rows; got {batch_size}")
        self._plan, self._pairs, self._read_ahead = plan, pairs, read_ahead
        self._batch, self._seed, self._epoch, self._rank, self._world = batch_size, seed, epoch, rank, world

    def __len__(self) -> int:
        """Batches of this rank, of all its workers together."""
        return self._plan.rows // self._batch // self._world

    def __iter__(self) -> Iterator[Pairs]:
        """The batches of this rank, in a loader's worker those of the worker."""
        worker, workers = _worker()
        order, entered = self._order(), -1
        reader = ThreadPoolExecutor(1)
        try:
            for rows in self._rows(order):
                for window in range(entered + 1, order.current + 2):  # this one, and the next
                    for shard in order.shards(window)[worker::workers]:
                        reader.submit(self._read_ahead, shard)
                    entered = window
                yield self._pairs(rows)
        finally:
            reader.shutdown(wait=False, cancel_futures=True)

    def rows(self) -> Iterator[Tensor]:
        """Numbers (batch_size,) int64 of the rows of each batch that `__iter__` gives."""
        return self._rows(self._order())

    def _order(self) -> _Order:
        return _Order(self._plan.rows, self._plan.rows_per_shard, self._seed, self._epoch)

    def _rows(self, order: _Order) -> Iterator[Tensor]:
        worker, workers = _worker()
        for batch in range(self._rank + worker * self._world, len(self) * self._world, workers * self._world):
            yield order.rows(batch * self._batch, (batch + 1) * self._batch)


class _Order:
    """A permutation of the rows of a set, window by window."""

    def __init__(self, rows: int, rows_per_shard: int, seed: int, epoch: int) -> None:
        self._rows, self._per_shard, self._seed, self._epoch = rows, rows_per_shard, seed, epoch
        n_shards = -(-rows // rows_per_shard)
        self._shards = torch.randperm(n_shards, generator=generator_for(seed, "shards", epoch))
        self._last = int((self._shards == n_shards - 1).nonzero())  # place of the one shard that may be shorter
        self._short = n_shards * rows_per_shard - rows  # rows that it lacks
        self._window = lru_cache(maxsize=2)(self._shuffled)  # a batch may lie across two
        self.current = -1
        """Number of the last window that rows were asked of."""

    def shards(self, window: int) -> list[int]:
        """Numbers of the shards of a window; none behind the last one."""
        return self._shards[window * WINDOW : (window + 1) * WINDOW].tolist()

    def rows(self, begin: int, end: int) -> Tensor:
        """Rows at the places begin to end - 1."""
        parts, window = [], begin // (WINDOW * self._per_shard)
        while begin < end:
            if begin >= self._begin(window + 1):
                window += 1
            else:
                first = self._begin(window)
                part = self._window(window)[begin - first : end - first]
                parts.append(part)
                begin += len(part)
        self.current = window
        return torch.cat(parts)

    def _begin(self, window: int) -> int:
        """Place of a window's first row."""
        shards = window * WINDOW
        return min(shards * self._per_shard - (self._short if self._last < shards else 0), self._rows)

    def _shuffled(self, window: int) -> Tensor:
        firsts = [shard * self._per_shard for shard in self.shards(window)]
        rows = torch.cat([torch.arange(first, min(first + self._per_shard, self._rows)) for first in firsts])
        generator = generator_for(self._seed, "window", self._epoch, window)
        return rows[torch.randperm(len(rows), generator=generator)]


def _worker() -> tuple[int, int]:
    """Number of this loader's worker and how many there are; 0 of 1 without workers."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


def _process() -> tuple[int, int]:
    """Rank and world size of torch's process group; 0 of 1 without one."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
