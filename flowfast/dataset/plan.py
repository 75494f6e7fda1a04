"""What a teacher set is: the plan in its folder. A shard is a pure function of the plan and its number."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from flowfast.dataset.strict_json import check_names, dump_object, parse_object
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess

FORMAT = "flowfast teacher set"
VERSION = 2
PLAN, MIXTURE = "plan.json", "mixture.safetensors"
DTYPES = {"float32": torch.float32, "float64": torch.float64}
MOST_PLAN_BYTES = 256 * 1024
MOST_ROWS, MOST_SHARDS, MOST_SEED = 2**40, 2**24, 2**63 - 1
BACKENDS = ("cpp", "triton", "reference")


@dataclass(frozen=True)
class Kernel:
    """What computed the numbers: with another one their last bits may differ.

    Args:
        backend: "cpp", "triton" or "reference". device: instruction set, GPU and Triton version, or torch version.
        version: of flowfast.
    """

    backend: str
    device: str
    version: str

    def __post_init__(self) -> None:
        """Refuse what no kernel is called."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) or not 0 < len(value) <= 200:
                raise ValueError(f"kernel.{field.name} must be a short text; got {_brief(value)}")
        if self.backend not in BACKENDS:
            raise ValueError(f"kernel.backend must be one of {', '.join(BACKENDS)}; got {self.backend!r}")


@dataclass(frozen=True)
class RandomTimes:
    """A law of pairs of times, a pair per row: t_from uniform, and t_to uniform below it.

    Args:
        t_from: lowest and highest t_from. t_to: lowest and highest t_to, cut at the row's t_from.
        law: "decreasing", the one law there is.
    """

    t_from: tuple[float, float]
    t_to: tuple[float, float]
    law: str = "decreasing"

    def __post_init__(self) -> None:
        """Refuse ranges that are empty, or that leave some t_from without a t_to."""
        for name in ("t_from", "t_to"):
            ends = getattr(self, name)
            if not (isinstance(ends, tuple) and len(ends) == 2 and all(map(_is_time, ends)) and ends[0] <= ends[1]):
                raise ValueError(f"random_times.{name} must be two times, low <= high; got {_brief(ends)}")
        if self.t_to[0] > self.t_from[0]:
            raise ValueError(f"random_times.t_to must begin below t_from; got {self.t_to} and {self.t_from}")
        if self.law != "decreasing":
            raise ValueError(f"random_times.law must be 'decreasing'; got {_brief(self.law)}")


@dataclass(frozen=True)
class Plan:
    """Everything that decides the numbers of a teacher set.

    Args:
        mixture: digest of means, std and weights. process: OUProcess.to_dict().
        times: the grid, noise first; row i belongs to segment i mod m. None where times are random.
        random_times: their law; None where there is a grid.
        rows: teacher pairs. rows_per_shard: of every shard but the last. seed: of the starting points.
        dtype: "float32" or "float64". kernel: what computes.

    Raises:
        ValueError: a value of another type or range.
    """

    mixture: str
    process: dict[str, Any]
    times: tuple[float, ...] | None
    random_times: RandomTimes | None
    rows: int
    rows_per_shard: int
    seed: int
    dtype: str
    kernel: Kernel

    def __post_init__(self) -> None:
        """Refuse what no generator would plan."""
        if not _is_hex(self.mixture, 32):
            raise ValueError(f"mixture must be 32 hexadecimal digits; got {_brief(self.mixture)}")
        for name, least, most in (("rows", 1, MOST_ROWS), ("rows_per_shard", 1, MOST_ROWS), ("seed", 0, MOST_SEED)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(f"{name} must be a whole number from {least} to {most}; got {_brief(value)}")
        if self.n_shards > MOST_SHARDS:
            raise ValueError(f"rows_per_shard must leave at most {MOST_SHARDS} shards; got {self.n_shards}: raise it")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be float32 or float64; got {_brief(self.dtype)}")
        if (self.times is None) == (self.random_times is None):
            raise ValueError("times and random_times: exactly one of them must be given")
        if self.times is not None and grid_times(self.times) != self.times:
            raise ValueError(f"times must be floats; got {_brief(self.times)}")
        _check_process(self.process, self.horizon)

    @property
    def horizon(self) -> float:
        """Latest time of any row."""
        return self.times[0] if self.times is not None else self.random_times.t_from[1]  # type: ignore[union-attr]

    @property
    def n_segments(self) -> int:
        """Number m of segments; 0 where times are random."""
        return 0 if self.times is None else len(self.times) - 1

    @property
    def n_shards(self) -> int:
        """Number of shard files."""
        return -(-self.rows // self.rows_per_shard)

    def first_row(self, shard: int) -> int:
        """The first row of one shard."""
        return shard * self.rows_per_shard

    def rows_of(self, shard: int) -> int:
        """Rows in one shard."""
        return min(self.rows_per_shard, self.rows - self.first_row(shard))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in plan.json."""
        return {"format": FORMAT, "version": VERSION, **json.loads(json.dumps(asdict(self), allow_nan=False))}

    def digest(self) -> str:
        """Short name of the plan, which every shard and receipt carries: 32 hexadecimal digits."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]

    def dump(self) -> bytes:
        """Contents of plan.json."""
        return dump_object(self.to_dict())

    @classmethod
    def parse(cls, content: bytes, where: str = PLAN) -> Plan:
        """The plan that `dump` wrote; `where` names it in messages.

        Raises:
            ValueError: not a plan of this version, to the last field.
        """
        stored = parse_object(content, f"teacher set: {where}")
        version = stored.pop("version", None)
        if stored.pop("format", None) != FORMAT or type(version) is not int or version != VERSION:
            raise ValueError(f"teacher set: {where} is no plan of version {VERSION}: generate the set anew elsewhere")
        try:
            check_names(stored, (field.name for field in fields(cls)), "a plan")
            if stored["times"] is not None:
                stored["times"] = _floats(stored["times"], "times")
            stored["kernel"] = Kernel(**_values(stored["kernel"], Kernel, "kernel"))
            if stored["random_times"] is not None:
                law = _values(stored["random_times"], RandomTimes, "random_times")
                ends: dict[str, Any] = {name: _floats(law[name], f"random_times.{name}") for name in ("t_from", "t_to")}
                stored["random_times"] = RandomTimes(**{**law, **ends})
            return cls(**stored)
        except (TypeError, ValueError) as error:
            raise ValueError(f"teacher set: {where} is damaged ({error}): restore it") from error


def _values(value: Any, kind: type[Kernel | RandomTimes], name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object; got {_brief(value)}")
    check_names(value, (field.name for field in fields(kind)), name)
    return value


def _floats(value: Any, name: str) -> tuple[float, ...]:
    if not isinstance(value, list) or not all(map(_is_time, value)):
        raise ValueError(f"{name} must be a list of finite numbers >= 0 with a decimal point; got {_brief(value)}")
    return tuple(value)


def _is_time(value: Any) -> bool:
    return type(value) is float and math.isfinite(value) and value >= 0


def _is_hex(value: Any, digits: int) -> bool:
    return isinstance(value, str) and len(value) == digits and set(value) <= set("0123456789abcdef")


def _check_process(stored: Any, horizon: float) -> None:
    if not isinstance(stored, dict) or set(stored) != {"beta"}:
        raise ValueError(f"process must be an object with beta; got {_brief(stored)}")
    beta = stored["beta"]
    table = isinstance(beta, list) and len(beta) == 2
    columns = beta if table else [[beta]]
    if not all(isinstance(column, list) and all(map(_is_time, column)) for column in columns):
        raise ValueError(f"process.beta must be a number, or two lists of numbers; got {_brief(beta)}")
    OUProcess.from_dict(stored).alpha(horizon)


def _brief(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 200:
        return "a huge whole number"
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:57]}..."


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
        raise ValueError(f"times must be at least two finite numbers >= 0; got {_brief(values)}")
    if any(a <= b for a, b in zip(values, values[1:], strict=False)):
        raise ValueError(f"times must decrease from noise to data; got {_brief(values)}: see time_grid")
    return values


def mixture_digest(mixture: GaussianMixture) -> str:
    """Name of a mixture by its numbers: means and weights in their dtype, and std."""
    std = float(mixture.std.detach())
    said = hashlib.sha256(repr((str(mixture.dtype), tuple(mixture.means.shape), std)).encode())
    for tensor in (mixture.means, mixture.log_weights):
        said.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return said.hexdigest()[:32]
