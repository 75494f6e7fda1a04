"""Exporting a teacher set: one Parquet file, or plain arrays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from flowfast.dataset.scan import Scan
from flowfast.dataset.teacher_dataset import TeacherDataset
from flowfast.storage import part_of

Format = Literal["parquet", "npy"]
Progress = Callable[[int, int], None]

ROWS = 65_536  # of a row group, and read at a time


def export_dataset(
    path: str | Path, format: Format = "parquet", *, out: str | Path | None = None, progress: Progress | None = None
) -> Path:
    """Write the rows of a complete set, in their order, in a format that other programs read.

    Columns: x_from and x_to, lists of d numbers, and segment, or t_from and t_to where times are random. As "npy" they
    are arrays in files of a folder: x_from.npy and x_to.npy (rows, d), and segment.npy (rows,) or t.npy (rows, 2).
    Every shard is verified before it is read. One shard at a time is in memory.

    Args:
        path: folder of the set. format: "parquet", which needs pyarrow, or "npy".
        out: file or, for "npy", folder to write; none may be there. None is the set's name with .parquet or -npy.
        progress: called with (rows written, rows).

    Returns:
        Where it was written.

    Raises:
        ValueError: no complete set, a shard that is damaged, an unknown format, or `out` exists.
        ModuleNotFoundError: pyarrow is missing.
    """
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}; got {format!r}")
    data = TeacherDataset(path)
    folder = data.folder.resolve()
    suffix = ".parquet" if format == "parquet" else "-npy"
    place = folder.with_name(f"{folder.name}{suffix}") if out is None else Path(out)
    if place.exists():
        raise ValueError(f"out: {place} exists: choose another name, or remove it")
    if format == "parquet":
        _parquet(data, place, progress)
    else:
        _npy(data, place, progress)
    return place


def _pieces(data: TeacherDataset, progress: Progress | None) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """First row and tensors of up to ROWS rows at a time, from shards that agree with their receipts."""
    scan = Scan(data.store, data.plan, workers=1)
    for shard in range(data.plan.n_shards):
        finding, _ = scan.check(shard)
        if finding is not None:
            raise ValueError(f"teacher set: {finding}: flowfast verify --repair")
        first, n = data.plan.first_row(shard), data.plan.rows_of(shard)
        for begin in range(0, n, ROWS):
            end = min(begin + ROWS, n)
            yield first + begin, {name: tensor[begin:end] for name, tensor in data.shard(shard).items()}
            if progress is not None:
                progress(first + end, data.plan.rows)


def _parquet(data: TeacherDataset, place: Path, progress: Progress | None) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("format 'parquet' needs pyarrow: pip install 'flowfast[export]'") from error
    number = pa.float32() if data.plan.dtype == "float32" else pa.float64()
    point = pa.list_(number, data.dim)
    where = [("segment", pa.int32())] if data.n_segments else [("t_from", pa.float64()), ("t_to", pa.float64())]
    schema = pa.schema(
        [("x_from", point), ("x_to", point), *where], metadata={"flowfast": json.dumps(data.plan.to_dict())}
    )

    def columns(tensors: dict[str, Tensor]) -> Iterator[Any]:
        for name in ("x_from", "x_to"):
            yield pa.FixedSizeListArray.from_arrays(pa.array(tensors[name].numpy().reshape(-1)), data.dim)
        last = [tensors["segment"]] if data.n_segments else tensors["t"].unbind(1)
        yield from (pa.array(column.numpy()) for column in last)

    part = part_of(place)
    try:
        with pq.ParquetWriter(part, schema) as writer:
            for _, tensors in _pieces(data, progress):
                writer.write_table(pa.Table.from_arrays(list(columns(tensors)), schema=schema), row_group_size=ROWS)
        part.replace(place)
    finally:
        part.unlink(missing_ok=True)


def _npy(data: TeacherDataset, place: Path, progress: Progress | None) -> None:
    part, arrays = part_of(place), {}
    try:
        part.mkdir(parents=True, exist_ok=True)
        for first, tensors in _pieces(data, progress):
            for name, tensor in tensors.items():
                values = tensor.numpy()
                if name not in arrays:
                    shape, file = (data.plan.rows, *values.shape[1:]), part / f"{name}.npy"
                    arrays[name] = np.lib.format.open_memmap(file, mode="w+", dtype=values.dtype, shape=shape)
                arrays[name][first : first + len(values)] = values
        for array in arrays.values():
            array.flush()
        part.rename(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)
