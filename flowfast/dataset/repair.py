"""Making bad shards again. A shard is a pure function of the plan and its number, so that the bytes are the same."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from flowfast.dataset.identity import check_kernel, device_of
from flowfast.dataset.plan import Plan
from flowfast.dataset.receipts import MOST_RECEIPT_BYTES, Receipt, receipt_name
from flowfast.dataset.shard_files import file_sha256, head_of, header_says
from flowfast.dataset.shards import make_shard, shard_name, write_shard
from flowfast.dataset.store import LocalStore, refusals, write_file
from flowfast.mixture import GaussianMixture


def repair_shards(
    store: LocalStore, plan: Plan, mixture: GaussianMixture | None, bad: Iterable[range]
) -> tuple[str, ...]:
    """Make shards and their receipts again.

    Nothing is replaced but by bytes that are vouched for: by the shard's receipt, by the file that is there (then the
    receipt is written again), or, where the receipt is lost, by the kernel of this machine being the plan's.

    Args:
        store, plan, mixture: of the set; None is a mixture that is lost. bad: numbers of the shards.

    Returns:
        Why something was left as it is, a sentence each; () when everything was repaired.

    Raises:
        ValueError: no file of the set was made by this plan. StorageError: a file cannot be written.
    """
    shards = [shard for run in bad for shard in run]
    if not shards:
        return ()
    if mixture is None:
        return ("shards are made from the mixture: restore mixture.safetensors first, it cannot be made again",)
    if len(shards) == plan.n_shards and not _is_known(store, plan, shards):
        raise ValueError(
            f"teacher set: no shard or receipt in {store.location} is of plan {plan.digest()}: plan.json itself seems "
            "to be damaged, restore it"
        )
    notes, same = [], True
    try:
        check_kernel(plan)
    except ValueError as error:
        notes, same = [f"{error}; a shard made here replaces one only where the receipt's SHA-256 agrees"], False
    device = device_of(plan)
    if device.type == "cuda" and not torch.cuda.is_available():
        return (*notes, "shards cannot be made here: there is no GPU")
    mixture = mixture.to(device)
    for shard in shards:
        try:
            with refusals(store):
                said = _repair(store, plan, mixture, shard, same)
        except (RuntimeError, ValueError) as error:  # a trajectory failed, or the plan's backend is not built here
            said = f"shard {shard} cannot be made here: {error}"
        notes += [said] if said else []
    return tuple(notes)


def _repair(store: LocalStore, plan: Plan, mixture: GaussianMixture, shard: int, same: bool) -> str | None:
    """Make one shard again; why not, where its bytes are not vouched for."""
    name = shard_name(shard)
    content = make_shard(plan, mixture, shard).content
    part = store.open_temporary(name)
    try:
        size, sha256 = len(content), write_shard(part[1], content)
        receipt = _receipt(store, plan, shard)
        receipt = receipt if receipt and receipt.bytes == size else None
        vouched = receipt is None and same
        if not vouched and sha256 not in (receipt and receipt.sha256, file_sha256(store, name)):
            store.discard(part)
            told = "it has no receipt" if receipt is None else f"its receipt says {receipt.sha256}"
            return f"shard {shard}: made again, it has SHA-256 {sha256}, and {told}: nothing was replaced"
        store.commit(part, name)
    except BaseException:
        store.discard(part)
        raise
    write_file(store, receipt_name(shard), Receipt(shard, plan.rows_of(shard), size, sha256, plan.digest()).dump())
    return None


def _receipt(store: LocalStore, plan: Plan, shard: int) -> Receipt | None:
    """The shard's receipt; None where it is missing or damaged."""
    try:
        return Receipt.parse(store.read_bytes(receipt_name(shard), MOST_RECEIPT_BYTES), plan, shard)
    except (OSError, ValueError):
        return None


def _is_known(store: LocalStore, plan: Plan, shards: Iterable[int]) -> bool:
    """Whether some receipt or header is of this plan, or there are no files at all."""
    files = False
    for shard in shards:
        head, receipt = head_of(store, shard), store.size(receipt_name(shard))
        files = files or bool(head) or receipt is not None
        if header_says(head).get("plan") == plan.digest():
            return True
        if receipt is not None and _receipt(store, plan, shard) is not None:
            return True
    return not files
