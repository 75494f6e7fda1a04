"""What a teacher set is: the plan in its folder. A shard is a pure function of the plan and its number."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowfast.mixture import GaussianMixture
from flowfast.storage import read_json, write_json

FORMAT = "flowfast teacher set"
VERSION = 1
PLAN, MIXTURE = "plan.json", "mixture.safetensors"
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Plan:
    """Everything that decides the numbers of a teacher set.

    Attributes:
        mixture: digest of means, std and weights. process: OUProcess.to_dict(). times: the grid, noise first.
        rows: trajectories. rows_per_shard: of every shard but the last. seed: of the starting points.
        dtype: "float32" or "float64". backend: "cpp", "triton" or "reference".
    """

    mixture: str
    process: dict[str, Any]
    times: tuple[float, ...]
    rows: int
    rows_per_shard: int
    seed: int
    dtype: str
    backend: str

    @property
    def n_segments(self) -> int:
        """Number m of segments."""
        return len(self.times) - 1

    @property
    def n_shards(self) -> int:
        """Number of shard files."""
        return -(-self.rows // self.rows_per_shard)

    def rows_of(self, shard: int) -> int:
        """Trajectories in one shard."""
        return min(self.rows_per_shard, self.rows - shard * self.rows_per_shard)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in plan.json."""
        return {"format": FORMAT, "version": VERSION, **asdict(self), "times": list(self.times)}

    def digest(self) -> str:
        """Short name of the plan, which every shard carries."""
        return hashlib.sha256(repr(sorted(self.to_dict().items())).encode()).hexdigest()[:32]

    def write(self, folder: Path) -> None:
        """Write plan.json."""
        write_json(folder / PLAN, self.to_dict())

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """The plan in `folder`.

        Raises:
            ValueError: no plan, or not one of this version.
        """
        stored = read_json(folder / PLAN, "teacher set")
        if (stored.pop("format", None), stored.pop("version", None)) != (FORMAT, VERSION):
            raise ValueError(f"teacher set: {folder / PLAN} is no plan of version {VERSION}: generate the set again")
        try:
            plan = cls(**{**stored, "times": grid_times(stored.get("times", ()))})
            if not (plan.rows >= 1 and plan.rows_per_shard >= 1 and plan.dtype in DTYPES):
                raise ValueError("rows, rows_per_shard or dtype out of range")
        except (TypeError, ValueError) as error:
            raise ValueError(f"teacher set: {folder / PLAN} is damaged ({error})") from error
        return plan


def shard_path(folder: Path, shard: int) -> Path:
    """File of one shard."""
    return folder / f"shard-{shard:05d}.safetensors"


def grid_times(times: Tensor | Sequence[float]) -> tuple[float, ...]:
    """A time grid as numbers, noise first.

    Raises:
        TypeError, ValueError: not at least two finite times >= 0 in decreasing order.
    """
    try:
        values = tuple(float(time) for time in times)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"times must be numbers, a sequence or a tensor (m + 1,); got {type(times).__name__}"
        ) from error
    if len(values) < 2 or not all(time >= 0 and math.isfinite(time) for time in values):
        raise ValueError(f"times must be at least two finite numbers >= 0; got {values}")
    if any(a <= b for a, b in zip(values, values[1:], strict=False)):
        raise ValueError(f"times must decrease from noise to data; got {values}: see time_grid")
    return values


def read_mixture(folder: Path, plan: Plan) -> GaussianMixture:
    """The plan's mixture, to the same bits.

    Raises:
        ValueError: it is missing, damaged, or not the plan's.
    """
    try:
        mixture = GaussianMixture.load(folder / MIXTURE)
        fits = mixture_digest(mixture) == plan.mixture
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"teacher set: {folder / MIXTURE} is not the mixture of the plan: generate the set again")
    return mixture


def mixture_digest(mixture: GaussianMixture) -> str:
    """Name of a mixture by its numbers: means and weights in their dtype, and std."""
    std = float(mixture.std.detach())
    said = hashlib.sha256(repr((str(mixture.dtype), tuple(mixture.means.shape), std)).encode())
    for tensor in (mixture.means, mixture.log_weights):
        said.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return said.hexdigest()[:32]
