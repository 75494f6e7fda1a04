"""Reading a teacher set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowfast.dataset.plan import DTYPES, Plan, read_mixture, shard_path
from flowfast.process import OUProcess
from flowfast.storage import read_tensors


class TeacherDataset:
    """Exact trajectories that `generate_dataset` stored, mapped into memory: only rows that are asked for are read.

    `len` is the number of trajectories; indexing with a number gives one trajectory (m + 1, d), so that it serves as a
    torch data set too.

    Args:
        path: the folder.

    Raises:
        ValueError: no set there, or one that is incomplete or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        if not self.folder.is_dir():
            raise ValueError(f"teacher set: {self.folder} is no folder: give the folder that generate_dataset wrote")
        self.plan = Plan.read(self.folder)
        missing = [i for i in range(self.plan.n_shards) if not shard_path(self.folder, i).exists()]
        if missing:
            raise ValueError(
                f"teacher set: {self.folder} is incomplete, {len(missing)} of {self.plan.n_shards} shards are missing, "
                f"first {shard_path(self.folder, missing[0]).name}: call generate_dataset again, it goes on there"
            )
        self.mixture = read_mixture(self.folder, self.plan)
        self.process = OUProcess.from_dict(self.plan.process)
        self.times = torch.tensor(self.plan.times, dtype=torch.float64)
        self._shards = [open_shard(self.folder, self.plan, i) for i in range(self.plan.n_shards)]  # each (m+1, rows, d)

    @property
    def dim(self) -> int:
        """Dimension d."""
        return self.mixture.dim

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the trajectories."""
        return DTYPES[self.plan.dtype]

    @property
    def n_segments(self) -> int:
        """Number m of segments of the time grid."""
        return self.plan.n_segments

    def __len__(self) -> int:
        """Number of trajectories."""
        return self.plan.rows

    def __getitem__(self, row: int) -> Tensor:
        """One trajectory (m + 1, d), noise first."""
        if isinstance(row, bool) or not isinstance(row, int):
            raise TypeError(f"row must be an int; got {type(row).__name__}: path(rows) takes several")
        if not -len(self) <= row < len(self):
            raise IndexError(f"row must be from 0 to {len(self) - 1}; got {row}")
        shard, place = divmod(row % len(self), self.plan.rows_per_shard)
        return self._shards[shard][:, place].clone()

    def pair(self, segment: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher pairs of one segment.

        Args:
            segment: 0 (starts at noise) to m - 1.
            rows: (n,) int64, trajectories in any order.

        Returns:
            States at the segment's start and end, each (n, d).

        Raises:
            TypeError, ValueError: no such segment or rows.
        """
        if isinstance(segment, bool) or not isinstance(segment, int) or not 0 <= segment < self.n_segments:
            raise ValueError(f"segment must be from 0 to {self.n_segments - 1}; got {segment!r}")
        self._check(rows)
        return self._states(segment, rows), self._states(segment + 1, rows)

    def path(self, rows: Tensor | None = None) -> Tensor:
        """Whole trajectories (m + 1, n, d), noise first: those of `rows` (n,) int64, or all."""
        if rows is None:
            return torch.cat(self._shards, 1)
        self._check(rows)
        return torch.stack([self._states(i, rows) for i in range(self.n_segments + 1)])

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to worker processes as a path; the maps are opened there."""
        return TeacherDataset, (self.folder,)

    def _states(self, time: int, rows: Tensor) -> Tensor:
        if len(self._shards) == 1:
            return self._shards[0][time].index_select(0, rows)
        out = torch.empty(len(rows), self.dim, dtype=self.dtype)
        shard = rows // self.plan.rows_per_shard
        for i in sorted(set(shard.tolist())):
            here = (shard == i).nonzero().flatten()
            out[here] = self._shards[i][time].index_select(0, rows[here] - i * self.plan.rows_per_shard)
        return out

    def _check(self, rows: Tensor) -> None:
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.ndim != 1:
            raise TypeError(f"rows must be an int64 tensor of shape (n,); got {rows!r:.60}")
        if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < len(self)):
            raise ValueError(f"rows must be from 0 to {len(self) - 1}; got {int(rows.min())} to {int(rows.max())}")


def open_shard(folder: Path, plan: Plan, shard: int) -> Tensor:
    """Map one shard (m + 1, rows, d).

    Raises:
        ValueError: it is damaged, or of another set.
    """
    path = shard_path(folder, shard)
    try:
        tensors, about = read_tensors(path, "teacher set")
    except ValueError as error:
        raise ValueError(f"{error}: delete it and call generate_dataset again") from error
    x = tensors.get("x")
    if about.get("plan") != plan.digest() or about.get("shard") != shard or x is None:
        raise ValueError(f"teacher set: {path} belongs to another set: delete it and call generate_dataset again")
    if x.ndim != 3 or x.shape[:2] != (plan.n_segments + 1, plan.rows_of(shard)) or x.dtype != DTYPES[plan.dtype]:
        raise ValueError(f"teacher set: {path} holds {tuple(x.shape)} {x.dtype}: delete it and generate the set again")
    return x
