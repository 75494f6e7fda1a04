"""Shards: what their rows are, and the safetensors files that hold them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from flowfast import philox
from flowfast.dataset.plan import DTYPES, VERSION, Plan
from flowfast.flow import flow_between, grid_ends
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.sampling import draw_rows

SHARDS = "shards"
ALIGNMENT = 64  # of the first tensor within the file, bytes
_CODES = {torch.float32: "F32", torch.float64: "F64", torch.int32: "I32"}
_PIECE = 1 << 22  # bytes hashed and written at a time, so that they are hashed and copied from a cache
_FIRST_CHUNK, _MOST_CHUNK = 1_024, 32_768  # rows of one call of the teacher
_CHUNK_WORK = 2**29  # rows k d of one call at most: it is done within seconds, and Ctrl-C is heard


@dataclass(frozen=True)
class Shard:
    """A shard's file as it lies in memory.

    Args:
        content: the file's bytes.
        tensors: x_from and x_to (rows, d); segment (rows,) int32 for a grid, t (rows, 2) float64 for random times. They
            are views of content.
    """

    content: memoryview
    tensors: Mapping[str, Tensor]


def shard_name(shard: int) -> str:
    """File of one shard, relative to the set's folder."""
    return f"{SHARDS}/shard-{shard:08d}.safetensors"


def row_bytes(plan: Plan, dim: int) -> int:
    """Bytes of one row: both points, and the segment or two times."""
    return 2 * dim * DTYPES[plan.dtype].itemsize + (4 if plan.times is not None else 16)


def shard_layout(plan: Plan, dim: int, shard: int) -> dict[str, Tensor]:
    """The tensors of a shard's file without their numbers, in its order: the widest first, as in official files.

    Every tensor is then aligned to its own numbers.
    """
    n, dtype = plan.rows_of(shard), DTYPES[plan.dtype]
    tensors = {name: torch.empty(n, dim, dtype=dtype, device="meta") for name in ("x_from", "x_to")}
    if plan.times is None:
        tensors["t"] = torch.empty(n, 2, dtype=torch.float64, device="meta")
    else:
        tensors["segment"] = torch.empty(n, dtype=torch.int32, device="meta")
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))


def shard_memory(plan: Plan, dim: int) -> mmap.mmap:
    """Memory for any shard of the plan, where a page begins: files on a disk can be written from there directly."""
    layout = shard_layout(plan, dim, 0)
    header = encode_header(plan, plan.n_shards - 1, layout)  # none is longer
    memory = mmap.mmap(-1, len(header) + sum(tensor.nbytes for tensor in layout.values()))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def make_shard(
    plan: Plan,
    mixture: GaussianMixture,
    shard: int,
    tick: Callable[[int], None] | None = None,
    *,
    memory: mmap.mmap | None = None,
) -> Shard:
    """One shard, a pure function of plan and number, on the CPU.

    Args:
        plan: of the set. mixture: the plan's, in its dtype. shard: number, 0 to n_shards - 1.
        tick: called with the number of rows that the teacher has just finished.
        memory: from `shard_memory`, to be used again: a shard that was made there before is overwritten.

    Raises:
        RuntimeError: a trajectory failed.
    """
    made = _empty_shard(plan, mixture.dim, shard, memory)
    x_from, x_to = made.tensors["x_from"], made.tensors["x_to"]
    first, n, backend = plan.first_row(shard), plan.rows_of(shard), plan.kernel.backend
    columns = _Columns(plan, mixture, made.tensors)
    for rows in _chunks(n, mixture.n_components * mixture.dim):
        ends, alpha = columns.of(rows)
        starts, finish = (x_from[rows], x_to[rows]) if mixture.device.type == "cpu" else (None, None)
        count = rows.stop - rows.start
        x = draw_rows(mixture, plan.seed, first + rows.start, count, alpha, ends[1], out=starts, backend=backend)
        y = flow_between(x, mixture, ends, out=finish, backend=backend)
        if starts is None:
            x_from[rows], x_to[rows] = x, y
        if tick is not None:
            tick(count)
    return made


def _empty_shard(plan: Plan, dim: int, shard: int, memory: mmap.mmap | None) -> Shard:
    """A shard with its header, its segments or times, and points yet to be made."""
    memory = shard_memory(plan, dim) if memory is None else memory
    layout = shard_layout(plan, dim, shard)
    header = encode_header(plan, shard, layout)
    memory[: len(header)] = header
    tensors, end = {}, len(header)
    for name, like in layout.items():
        flat = torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=end)
        tensors[name], end = flat.view(like.shape), end + like.nbytes
    row = torch.arange(plan.first_row(shard), plan.first_row(shard) + plan.rows_of(shard))
    if plan.times is not None:
        tensors["segment"].copy_(row % plan.n_segments)
    elif plan.random_times is not None:
        law, u = plan.random_times, philox.uniform_pairs(plan.seed, row)
        t_from, t_to = tensors["t"].unbind(1)
        t_from.copy_(law.t_from[0] + u[:, 0] * (law.t_from[1] - law.t_from[0]))
        t_to.copy_(law.t_to[0] + u[:, 1] * (t_from.clamp(max=law.t_to[1]) - law.t_to[0]))
    else:
        raise ValueError("plan: neither times nor random_times")
    return Shard(memoryview(memory)[:end], tensors)


class _Columns:
    """What a teacher must know of the times of rows: on a grid, once per segment."""

    def __init__(self, plan: Plan, mixture: GaussianMixture, tensors: Mapping[str, Tensor]) -> None:
        self._mixture, self._tensors, self._process = mixture, tensors, OUProcess.from_dict(plan.process)
        self._grid: Tensor | None = None
        if plan.times is not None:
            times = torch.tensor(plan.times, dtype=torch.float64)
            self._grid = self._table(times[:-1], times[1:])

    def of(self, rows: slice) -> tuple[Tensor, Tensor]:
        """`grid_ends` (4, n) and signal factors (n,) of rows, on the mixture's device."""
        if self._grid is not None:
            table = self._grid.index_select(1, self._tensors["segment"][rows].to(self._grid.device))
        else:
            table = self._table(*self._tensors["t"][rows].unbind(1))
        return table[:4], table[4]

    def _table(self, t_from: Tensor, t_to: Tensor) -> Tensor:
        ends = grid_ends(self._mixture, self._process, t_from, t_to)
        return torch.cat([ends, self._process.alpha(t_from).to(ends)[None]])


def _chunks(n: int, numbers: int) -> Iterator[slice]:
    """Cut n rows: pieces short at first, so that signs of life come soon. No row depends on the cuts.

    Args:
        n: rows. numbers: k d of the mixture.
    """
    most = min(_MOST_CHUNK, max(16, _CHUNK_WORK // numbers))
    first, rows = 0, min(_FIRST_CHUNK, most)
    while first < n:
        yield slice(first, min(n, first + rows))
        first, rows = first + rows, min(2 * rows, most)


def encode_header(plan: Plan, shard: int, tensors: Mapping[str, Tensor]) -> bytes:
    """Everything before the data of a shard's file: the header's length, 8 bytes, and the JSON header with blanks.

    Source: the layout documented at https://huggingface.co/docs/safetensors.
    """
    about = {"plan": plan.digest(), "shard": shard, "version": VERSION}
    header: dict[str, object] = {"__metadata__": {"flowfast": json.dumps(about, sort_keys=True)}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def write_shard(stream: BinaryIO, content: memoryview) -> str:
    """Write a shard's bytes to `stream` piece by piece; their SHA-256."""
    said = hashlib.sha256()
    for first in range(0, len(content), _PIECE):
        piece = content[first : first + _PIECE]
        said.update(piece)
        stream.write(piece)
    return said.hexdigest()
