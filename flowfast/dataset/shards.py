"""Shards: what their rows are, and the safetensors files that hold them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

import torch
from torch import Tensor

from flowfast import philox
from flowfast.dataset.plan import DTYPES, VERSION, Plan
from flowfast.flow import flow_map
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.sampling import sample_rows

SHARDS = "shards"
ALIGNMENT = 64  # of the first tensor within the file, bytes
_CODES = {torch.float32: "F32", torch.float64: "F64", torch.int32: "I32"}
_PIECE = 1 << 22  # bytes hashed and written at a time, so that they are hashed and copied from a cache
_FIRST_CHUNK, _MOST_CHUNK = 1_024, 32_768  # rows of one call of the teacher
_CHUNK_WORK = 2**30  # rows k d of one call at most: it is done within seconds, and Ctrl-C is heard


def shard_name(shard: int) -> str:
    """File of one shard, relative to the set's folder."""
    return f"{SHARDS}/shard-{shard:08d}.safetensors"


def row_bytes(plan: Plan, dim: int) -> int:
    """Bytes of one row: both points, and the segment or two times."""
    return 2 * dim * DTYPES[plan.dtype].itemsize + (4 if plan.times is not None else 16)


def make_rows(
    plan: Plan,
    mixture: GaussianMixture,
    shard: int,
    tick: Callable[[int], None] | None = None,
    *,
    points: Tensor | None = None,
) -> dict[str, Tensor]:
    """The tensors of one shard, in the file's order, a pure function of plan and number.

    Args:
        plan: of the set. mixture: the plan's, in its dtype. shard: number, 0 to n_shards - 1.
        tick: called with the number of rows that the teacher has just finished.
        points: (2, rows or more, d), of the plan's dtype, on the CPU: memory for x_from and x_to, to be used again.

    Returns:
        x_from and x_to (rows, d); segment (rows,) int32 for a grid, t (rows, 2) float64 for random times. On the CPU.

    Raises:
        RuntimeError: a trajectory failed.
    """
    process = OUProcess.from_dict(plan.process)
    n, dim, dtype = plan.rows_of(shard), mixture.dim, DTYPES[plan.dtype]
    x_from, x_to = (torch.empty(2, n, dim, dtype=dtype) if points is None else points)[:, :n]
    t, segment = _times(plan, plan.first_row(shard), n)
    for rows in _chunks(n, mixture.n_components * dim):
        t_from, t_to = t[rows].unbind(1)
        first, backend = plan.first_row(shard) + rows.start, plan.kernel.backend
        x = sample_rows(mixture, plan.seed, first, len(t_from), process=process, t=t_from, backend=backend)
        x_from[rows] = x
        x_to[rows] = flow_map(x, mixture, process, t_from, t_to, backend=backend)
        if tick is not None:
            tick(rows.stop - rows.start)
    tensors = {"x_from": x_from, "x_to": x_to} | ({"t": t} if segment is None else {"segment": segment})
    return in_file_order(tensors)


def in_file_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The widest first, as the official writer does it: every tensor is then aligned to its own numbers."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))


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


def _times(plan: Plan, first_row: int, n: int) -> tuple[Tensor, Tensor | None]:
    """Times from and to of every row (n, 2), and its segment (n,) where the plan has a grid."""
    if plan.times is not None:
        segment = torch.arange(first_row, first_row + n) % plan.n_segments
        grid = torch.tensor(plan.times, dtype=torch.float64)
        return torch.stack([grid[segment], grid[segment + 1]], 1), segment.to(torch.int32)
    if plan.random_times is None:
        raise ValueError("plan: neither times nor random_times")
    law, u = plan.random_times, philox.uniform_pairs(plan.seed, torch.arange(first_row, first_row + n))
    t_from = law.t_from[0] + u[:, 0] * (law.t_from[1] - law.t_from[0])
    t_to = law.t_to[0] + u[:, 1] * (t_from.clamp(max=law.t_to[1]) - law.t_to[0])
    return torch.stack([t_from, t_to], 1), None


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


def write_shard(stream: BinaryIO, plan: Plan, shard: int, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write the file to `stream` piece by piece; its size in bytes and its SHA-256."""
    said, size = hashlib.sha256(), 0
    for whole in (encode_header(plan, shard, tensors), *(tensor.numpy() for tensor in tensors.values())):
        view = memoryview(whole).cast("B")  # type: ignore[arg-type]
        for first in range(0, len(view), _PIECE):
            piece = view[first : first + _PIECE]
            said.update(piece)
            stream.write(piece)
            size += len(piece)
    return size, said.hexdigest()
