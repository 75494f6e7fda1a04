"""Generating a teacher set: planned first, then shard by shard, by whoever is there."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flowfast import cluster
from flowfast.dataset.addresses import open_store
from flowfast.dataset.engines import SetAside, Tell, run_here, run_pool
from flowfast.dataset.identity import kernel_here, read_mixture, write_mixture
from flowfast.dataset.maker import read_plan
from flowfast.dataset.plan import DTYPES, MIXTURE, PLAN, Plan, RandomTimes, grid_times, mixture_digest
from flowfast.dataset.receipts import MANIFEST, missing_shards, sweep, write_manifest
from flowfast.dataset.shards import row_bytes
from flowfast.dataset.store import LocalStore, StorageError, Store, is_part, refusals, write_file
from flowfast.dataset.teacher_dataset import TeacherDataset
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.rank import Rank
from flowfast.seeds import as_seed
from flowfast.storage import differences, dtype_name

Progress = Callable[[int, int], None]

MOST_ROWS_PER_SHARD, SHARD_BYTES = 262_144, 2**27  # of a shard whose size is not asked for
ENGINES = ("local", "ray")


class ShardsFailed(RuntimeError):
    """Some shards could not be made; all others stand. `shards` says which, and why."""

    def __init__(self, shards: Sequence[SetAside]) -> None:
        first = shards[0]
        super().__init__(f"{len(shards)} shards could not be made, first shard {first.shard}: {first.reason}")
        self.shards = tuple(shards)


@dataclass(frozen=True)
class Outcome:
    """What a folder holds after a call.

    Args:
        made: shards that this call's share lacked and that now stand. missing: shards of the set that do not stand.
    """

    made: int
    missing: int


def generate_dataset(
    mixture: GaussianMixture,
    process: OUProcess,
    times: Tensor | Sequence[float] | RandomTimes,
    rows: int,
    path: str | Path,
    *,
    seed: int = 0,
    rows_per_shard: int | None = None,
    dtype: torch.dtype | None = None,
    workers: int = 1,
    engine: str = "local",
    progress: Progress | None = None,
    backend: str = "auto",
) -> TeacherDataset:
    """Store exact teacher pairs: starting points from the closed-form marginals, and where the flow takes them.

    A killed call goes on where it stopped: shards that stand are kept, and the whole set is the same bits, whoever
    made it. Several calls may work on one folder at once.

    Args:
        mixture: law of the data. process: forward process with a constant or tabulated beta.
        times: (m + 1,) decreasing, noise first: row i is a pair of segment i mod m. Or a law of random pairs of times.
        rows: pairs in all, >= 1.
        path: folder, new or empty or holding a part of this very set.
        seed: of the starting points, 0 to 2^63 - 1.
        rows_per_shard: pairs per file, >= 1; None takes 262,144, or what 128 MiB hold where that is less.
        dtype: of the numbers, torch.float32 or torch.float64; None is the mixture's.
        workers: 1 computes here with torch's threads; more start that many processes of one thread each (the calling
            script then needs `if __name__ == "__main__":`, as for all of multiprocessing's).
        engine: "local", or "ray" for a cluster.
        progress: called with (rows made, rows) at the start and now and then.
        backend: of the teacher, see `flow_map`.

    Returns:
        The complete set, opened.

    Raises:
        TypeError, ValueError: an argument outside these ranges; a folder that holds another set (the differing fields
            are named) or other files; nothing has been written then.
        StorageError: an OSError; too little space, or files that cannot be written.
        ShardsFailed: a RuntimeError; trajectories failed, or a shard's workers died three times.
    """
    plan = make_plan(mixture, process, times, rows, rows_per_shard, seed=seed, dtype=dtype, backend=backend)
    store = open_store(path)
    if not isinstance(store, LocalStore):
        raise ValueError(
            f"path must be a local folder, for the complete set is opened here; got {path}: `flowfast generate --out` "
            "stores sets elsewhere"
        )
    carry_out(plan, mixture, store, workers=workers, engine=engine, progress=progress)
    return TeacherDataset(store.location)


def make_plan(
    mixture: GaussianMixture,
    process: OUProcess,
    times: Tensor | Sequence[float] | RandomTimes,
    rows: int,
    rows_per_shard: int | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Plan:
    """The plan of a set; arguments as in `generate_dataset`.

    Raises:
        TypeError, ValueError: an argument outside its range.
    """
    dtype = mixture.dtype if dtype is None else dtype
    if dtype not in DTYPES.values():
        raise TypeError(f"dtype must be torch.float32 or torch.float64; got {dtype}")
    if rows_per_shard is None:
        per_row = 2 * mixture.dim * dtype.itemsize + 16
        rows_per_shard = min(MOST_ROWS_PER_SHARD, max(1, SHARD_BYTES // per_row))
    for name, size in (("rows", rows), ("rows_per_shard", rows_per_shard)):
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int; got {type(size).__name__}")
    random = times if isinstance(times, RandomTimes) else None
    return Plan(
        mixture=mixture_digest(mixture.to(dtype)),
        process=process.to_dict(),
        times=None if isinstance(times, RandomTimes) else grid_times(times),
        random_times=random,
        rows=rows,
        rows_per_shard=rows_per_shard,
        seed=as_seed(seed),
        dtype=dtype_name(dtype),
        kernel=kernel_here(backend, mixture.device),
    )


def carry_out(
    plan: Plan,
    mixture: GaussianMixture,
    store: Store,
    *,
    workers: int = 1,
    engine: str = "local",
    rank: Rank | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Make the shards that a folder lacks.

    Args:
        plan: of the set. mixture: the plan's, in any dtype. store: the folder.
        workers, engine, progress: as in `generate_dataset`.
        rank: this process's share, shards whose number is rank modulo world; None takes all.

    Raises:
        As `generate_dataset`.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"workers must be a whole number, at least 1; got {workers!r}")
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
    if engine == "ray":
        cluster.check_installed()
    rank = rank or Rank()
    missing = missing_shards(store, plan) if check_claim(store, plan) else bytearray(b"\1") * plan.n_shards
    check_space(store, plan, mixture.dim, missing.count(1))
    shards = array("L", (i for i in range(rank.rank, plan.n_shards, rank.world) if missing[i]))
    with cluster.connected() if engine == "ray" and shards else nullcontext():  # or refused before anything is written
        claim(store, plan, mixture.to(DTYPES[plan.dtype]))
        sweep(store, complete=False)
        whole = sum(plan.rows_of(i) for i in range(rank.rank, plan.n_shards, rank.world))
        tell = _counter(whole - sum(map(plan.rows_of, shards)), whole, progress)
        failed = _run(store, shards, workers, engine, tell)
    if failed:
        raise ShardsFailed(failed)
    left = missing_shards(store, plan).count(1)
    if not left:
        with refusals(store):
            if shards or store.size(MANIFEST) is None:
                write_manifest(store, plan)
            sweep(store, complete=True)
    return Outcome(made=len(shards), missing=left)


def _run(store: Store, shards: Sequence[int], workers: int, engine: str, tell: Tell) -> list[SetAside]:
    if not shards:
        return []
    if engine == "ray":
        from flowfast.dataset.ray_engine import run_ray

        return run_ray(store, shards, tell)
    if workers == 1:
        return run_here(store, shards, tell)
    return run_pool(store, shards, workers, tell)


def _counter(done: int, whole: int, progress: Progress | None) -> Tell:
    def tell(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, whole)

    tell(0)
    return tell


def check_claim(store: Store, plan: Plan) -> bool:
    """Whether a folder is this plan's already; nothing is written.

    Raises:
        ValueError: it holds another set or other files. StorageError: it cannot be read.
    """
    with refusals(store):
        if store.size(PLAN) is None:
            try:
                foreign = [name for name in store.list("") if not is_part(name)]
            except NotADirectoryError as error:
                raise ValueError(f"path must be a folder; {store.location} is a file: choose another name") from error
            if not foreign:
                return False
            if store.size(PLAN) is None:  # otherwise someone has just claimed it
                raise ValueError(f"path {store.location} is not empty and holds no teacher set: choose another folder")
        differing = differences(read_plan(store).to_dict(), plan.to_dict())
        if differing:
            raise ValueError(f"path {store.location} holds another teacher set ({differing}): choose another folder")
        return True


def claim(store: Store, plan: Plan, mixture: GaussianMixture) -> None:
    """Make a folder this plan's, mixture included, or refuse before anything is written.

    Raises:
        ValueError: it holds another set or other files. StorageError: it cannot be written.
    """
    with refusals(store):
        if not check_claim(store, plan):
            try:
                write_file(store, PLAN, plan.dump(), replace=False)
            except FileExistsError:  # someone else was faster: is it the same plan?
                check_claim(store, plan)
        if store.size(MIXTURE) is None:
            write_mixture(store, mixture)
    read_mixture(store, plan)


def check_space(store: Store, plan: Plan, dim: int, shards: int) -> None:
    """Raise StorageError when `shards` full shards, and a mebibyte for the rest, do not fit."""
    rows = min(shards * plan.rows_per_shard, plan.rows)
    free, needed = store.free_bytes(), rows * row_bytes(plan, dim) + shards * 5_000 + 2**20
    if shards and free is not None and free < needed:
        raise StorageError(
            f"{store.location} has {free:,} bytes left, and {shards} missing shards need {needed:,}: free some space, "
            "store fewer rows, or choose another disk"
        )
