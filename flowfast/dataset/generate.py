"""Writing a teacher set, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowfast import backends
from flowfast.dataset.plan import DTYPES, MIXTURE, PLAN, Plan, grid_times, mixture_digest, shard_path
from flowfast.dataset.teacher_dataset import TeacherDataset, open_shard
from flowfast.flow import flow_map
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.seeds import as_seed, generator_for
from flowfast.storage import differences, dtype_name, is_part, read_json, write_tensors


def generate_dataset(
    mixture: GaussianMixture,
    process: OUProcess,
    times: Tensor | Sequence[float],
    rows: int,
    path: str | Path,
    *,
    seed: int = 0,
    rows_per_shard: int = 4_096,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
    backend: str = "auto",
) -> TeacherDataset:
    """Store exact trajectories: starting points x ~ p_T and where the flow is at every time of a grid.

    A killed call goes on where it stopped: shards that stand are kept, and the whole set is the same bits.

    Args:
        mixture: law of the data. process: forward process with a constant or tabulated beta.
        times: (m + 1,) decreasing, noise first.
        rows: trajectories, >= 1.
        path: folder, new or empty or holding a part of this very set.
        seed: of the starting points, >= 0.
        rows_per_shard: trajectories per file, >= 1; also the size of one call of the teacher.
        dtype: of the numbers, torch.float32 or torch.float64; None is the mixture's.
        progress: called with (rows that stand, rows) at the start and after each shard.
        backend: of the teacher, see `flow_map`.

    Returns:
        The complete set, opened.

    Raises:
        TypeError, ValueError: an argument outside these ranges; a folder that holds another set (the differing fields
            are named) or other files; nothing has been written then.
        RuntimeError: a trajectory failed.
    """
    plan = _plan(mixture, process, times, rows, rows_per_shard, seed, dtype, backend)
    mixture = mixture.to(DTYPES[plan.dtype])
    folder = Path(path)
    _claim(folder, plan)
    if not (folder / MIXTURE).is_file():
        mixture.save(folder / MIXTURE)
    missing = [shard for shard in range(plan.n_shards) if not _stands(folder, plan, shard)]
    done = plan.rows - sum(plan.rows_of(shard) for shard in missing)
    if progress is not None:
        progress(done, plan.rows)
    for shard in missing:
        x = torch.stack(list(_trajectories(plan, shard, mixture, process)))  # (m + 1, rows, d)
        write_tensors(shard_path(folder, shard), {"x": x}, {"plan": plan.digest(), "shard": shard})
        done += plan.rows_of(shard)
        if progress is not None:
            progress(done, plan.rows)
    return TeacherDataset(folder)


def _plan(
    mixture: GaussianMixture,
    process: OUProcess,
    times: Tensor | Sequence[float],
    rows: int,
    rows_per_shard: int,
    seed: int,
    dtype: torch.dtype | None,
    backend: str,
) -> Plan:
    for name, size in (("rows", rows), ("rows_per_shard", rows_per_shard)):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int; got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1; got {size}")
    dtype = mixture.dtype if dtype is None else dtype
    if dtype not in DTYPES.values():
        raise TypeError(f"dtype must be torch.float32 or torch.float64; got {dtype}")
    return Plan(
        mixture=mixture_digest(mixture.to(dtype)),
        process=process.to_dict(),
        times=grid_times(times),
        rows=rows,
        rows_per_shard=rows_per_shard,
        seed=as_seed(seed),
        dtype=dtype_name(dtype),
        backend=backends.choose(backend, mixture.device),
    )


def _claim(folder: Path, plan: Plan) -> None:
    """Make the folder this plan's, or refuse before anything is written."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"path must be a folder; {folder} is a file: choose another name")
    if (folder / PLAN).is_file():
        differing = differences(read_json(folder / PLAN, "teacher set"), plan.to_dict())
        if differing:
            raise ValueError(f"path: {folder} holds another teacher set ({differing}): choose another folder")
        return
    if folder.is_dir() and any(not is_part(entry) for entry in folder.iterdir()):
        raise ValueError(f"path: {folder} is not empty and holds no teacher set: choose a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    plan.write(folder)


def _stands(folder: Path, plan: Plan, shard: int) -> bool:
    if not shard_path(folder, shard).exists():
        return False
    open_shard(folder, plan, shard)
    return True


def _trajectories(plan: Plan, shard: int, mixture: GaussianMixture, process: OUProcess) -> Iterator[Tensor]:
    """The states (rows, d) of one shard at the times of the grid."""
    generator = generator_for(plan.seed, "shard", shard, device=mixture.device)
    x = process.marginal(mixture, plan.times[0]).sample(plan.rows_of(shard), generator=generator)
    yield x
    for t_from, t_to in zip(plan.times, plan.times[1:], strict=False):
        x = flow_map(x, mixture, process, t_from, t_to, backend=plan.backend)
        yield x
