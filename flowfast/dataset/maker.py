"""Making one shard of a set: what every engine's workers do, in whichever process or machine."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flowfast.dataset.identity import check_kernel, device_of, read_mixture
from flowfast.dataset.plan import DTYPES, MOST_PLAN_BYTES, PLAN, Plan
from flowfast.dataset.receipts import Receipt, read_receipt, receipt_name
from flowfast.dataset.shards import make_rows, shard_name, write_shard
from flowfast.dataset.store import Store, new_file, refusals, write_file


class Maker:
    """Makes shards of the set that a store holds; plan and mixture are read once.

    Args:
        store: of a folder with a plan and its mixture.

    Raises:
        ValueError: no set there, or one that this machine's kernel would continue with other bits.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.plan = store, read_plan(store)
        check_kernel(self.plan)
        self.mixture = read_mixture(store, self.plan).to(device_of(self.plan))
        # New memory for every shard would be a third of the time of making its rows.
        self._points = torch.empty(2, self.plan.rows_of(0), self.mixture.dim, dtype=DTYPES[self.plan.dtype])

    def make(self, shard: int, tick: Callable[[int], None] | None = None) -> Receipt:
        """Make one shard, durably, and then its receipt; one that someone else has finished meanwhile is taken.

        Args:
            shard: its number. tick: called with the number of rows just computed.

        Raises:
            RuntimeError: a trajectory failed. StorageError: a file cannot be written; nothing of it is left.
        """
        store, plan = self.store, self.plan
        found = read_receipt(store, plan, shard)
        if found is not None:
            if tick is not None:
                tick(found.rows)
            return found
        tensors = make_rows(plan, self.mixture, shard, tick, points=self._points)
        found = read_receipt(store, plan, shard)
        if found is not None:
            return found
        with refusals(store):
            with new_file(store, shard_name(shard)) as stream:
                size, sha256 = write_shard(stream, plan, shard, tensors)
            receipt = Receipt(shard, plan.rows_of(shard), size, sha256, plan.digest())
            write_file(store, receipt_name(shard), receipt.dump())
        return receipt


def read_plan(store: Store) -> Plan:
    """The plan of the set in a store.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        content = store.read_bytes(PLAN, MOST_PLAN_BYTES)
    except FileNotFoundError as error:
        raise ValueError(f"teacher set: {store.location}/{PLAN} does not exist: generate the set first") from error
    return Plan.parse(content, f"{store.location}/{PLAN}")
