"""Making one shard of a set: what every engine's workers do, in whichever process or machine."""

from __future__ import annotations

import mmap
from collections.abc import Callable

from flowfast.dataset.identity import check_kernel, device_of, read_mixture
from flowfast.dataset.plan import MOST_PLAN_BYTES, PLAN, Plan
from flowfast.dataset.receipts import Receipt, read_receipt, receipt_name
from flowfast.dataset.shards import make_shard, shard_memory, shard_name, write_shard
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
        self._memories: list[mmap.mmap] = []  # new memory for every shard would be a third of the time of making it

    def make(self, shard: int, tick: Callable[[int], None] | None = None) -> Receipt:
        """Make one shard, durably, and then its receipt; one that someone else has finished meanwhile is taken.

        Args:
            shard: its number. tick: called with the number of rows just computed.

        Raises:
            RuntimeError: a trajectory failed. StorageError: a file cannot be written; nothing of it is left.
        """
        return self.compute(shard, tick)()

    def compute(self, shard: int, tick: Callable[[int], None] | None = None) -> Callable[[], Receipt]:
        """The first half of `make`: rows in memory. What it returns, called once, on any thread, is the second half."""
        store, plan = self.store, self.plan
        found = read_receipt(store, plan, shard)
        if found is not None:
            if tick is not None:
                tick(found.rows)
            return lambda: found
        memory = self._memories.pop() if self._memories else shard_memory(plan, self.mixture.dim)
        content = make_shard(plan, self.mixture, shard, tick, memory=memory).content

        def keep() -> Receipt:
            receipt = read_receipt(store, plan, shard) or _keep(store, plan, shard, content)
            self._memories.append(memory)
            return receipt

        return keep


def _keep(store: Store, plan: Plan, shard: int, content: memoryview) -> Receipt:
    """Store a shard and its receipt."""
    with refusals(store):
        with new_file(store, shard_name(shard)) as stream:
            sha256 = write_shard(stream, content)
        receipt = Receipt(shard, plan.rows_of(shard), len(content), sha256, plan.digest())
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
