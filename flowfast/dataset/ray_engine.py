"""Making the missing shards of a set on a Ray cluster: numbers go out, receipts come back.

The cluster is the one at RAY_ADDRESS, or a Ray on this machine alone. The set must lie where all its machines see it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from flowfast import cluster
from flowfast.dataset.addresses import open_store
from flowfast.dataset.engines import SetAside, Tell
from flowfast.dataset.maker import Maker, read_plan
from flowfast.dataset.receipts import sweep
from flowfast.dataset.store import StorageError, Store


def run_ray(store: Store, shards: Sequence[int], tell: Tell) -> list[SetAside]:
    """Make shards in tasks of one core, or one GPU where the plan's kernel needs it.

    Returns:
        Shards that failed, or whose processes or machines died three times; all others are made.

    Raises:
        ValueError: Ray is not installed, or has no such core. StorageError: files cannot be written. RuntimeError: a
            machine cannot go on with the plan.
    """
    plan, failed = read_plan(store), []
    location = store.location if "://" in store.location else str(Path(store.location).absolute())
    requests = (json.dumps({"location": location, "shard": shard}) for shard in shards)
    gpus = int(plan.kernel.backend == "triton")
    try:
        with cluster.connected() as ray:
            for answer in cluster.run_tasks(ray, _make, requests, gpus=gpus):
                shard = shards[answer.index]
                if answer.text is None:
                    failed.append(SetAside(shard, f"{answer.lost}, {cluster.TRIES} times"))
                    continue
                said = json.loads(answer.text)
                if "storage" in said:
                    raise StorageError(said["storage"])
                if "failed" in said:
                    failed.append(SetAside(shard, said["failed"]))
                else:
                    tell(said["rows"])
    finally:
        sweep(store, complete=False)
    return failed


def _make(request: str) -> str:
    """A task: one shard."""
    wanted = json.loads(request)
    try:
        receipt = _maker(wanted["location"]).make(wanted["shard"])
    except StorageError as error:
        return json.dumps({"storage": str(error)})
    except RuntimeError as error:
        return json.dumps({"failed": str(error)})
    return json.dumps({"rows": receipt.rows})


@functools.lru_cache(maxsize=1)
def _maker(location: str) -> Maker:
    """Kept by a process of the cluster from task to task."""
    torch.set_num_threads(1)
    return Maker(open_store(location))
