"""Reading a teacher set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from flowfast.dataset.identity import read_mixture
from flowfast.dataset.maker import read_plan
from flowfast.dataset.plan import DTYPES
from flowfast.dataset.receipts import missing_shards
from flowfast.dataset.shards import shard_name
from flowfast.dataset.store import open_store
from flowfast.process import OUProcess


class TeacherDataset:
    """Exact teacher pairs that `generate_dataset` stored, mapped into memory: only rows that are asked for are read.

    Args:
        path: the folder.

    Raises:
        ValueError: no set there, or one that is incomplete or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        store = open_store(path)
        self.plan = read_plan(store)
        missing = missing_shards(store, self.plan)
        if any(missing):
            raise ValueError(
                f"teacher set: {self.folder} is incomplete, {missing.count(1)} of {self.plan.n_shards} shards are "
                f"missing, first {missing.index(1)}: call generate_dataset again, it goes on there"
            )
        self.mixture = read_mixture(store, self.plan)
        self.process = OUProcess.from_dict(self.plan.process)
        self._shards: list[dict[str, Tensor]] = []
        for shard in range(self.plan.n_shards):
            with safe_open(self.folder / shard_name(shard), framework="pt") as file:
                self._shards.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118

    @property
    def dim(self) -> int:
        """Dimension d."""
        return self.mixture.dim

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the points."""
        return DTYPES[self.plan.dtype]

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

    def pairs(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (n,) int64: x_from (n, d), x_to (n, d), and segment (n,) int32 or t (n, 2) float64."""
        where = "segment" if self.n_segments else "t"
        found = []
        for row in rows.tolist():
            shard, place = divmod(row, self.plan.rows_per_shard)
            found.append([self._shards[shard][name][place] for name in ("x_from", "x_to", where)])
        x_from, x_to, other = (torch.stack(list(column)) for column in zip(*found, strict=True))
        return x_from, x_to, other

    def pair(self, segment: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher pairs of one segment: rows index * m + segment, each (n, d)."""
        x_from, x_to, _ = self.pairs(index * self.n_segments + segment)
        return x_from, x_to

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to worker processes as a path; the maps are opened there."""
        return TeacherDataset, (self.folder,)
