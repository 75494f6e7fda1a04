"""Opening the shards of a set that nobody vouches for: from within its folder alone, and only as the plan says."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowfast.dataset.addresses import local_folder
from flowfast.dataset.maker import read_plan
from flowfast.dataset.plan import Plan
from flowfast.dataset.receipts import MOST_RECEIPT_BYTES, RECEIPTS, Receipt, receipt_name
from flowfast.dataset.shards import SHARDS, encode_header, shard_layout, shard_name
from flowfast.dataset.store import LocalStore
from flowfast.dataset.strict_json import parse_object

MOST_HEADER_BYTES = 4_096


def open_folder(path: str | Path) -> tuple[LocalStore, Plan]:
    """The files of a set, and its plan.

    Raises:
        ValueError: no folder of this machine, no plan in it, a plan that is damaged, or sub-folders that are links.
    """
    folder = local_folder(path)
    if not folder.is_dir():
        raise ValueError(f"teacher set: {folder} is no folder: give the folder that generate_dataset wrote")
    for name in (SHARDS, RECEIPTS):
        if (folder / name).is_symlink():
            raise ValueError(f"teacher set: {folder / name} is a link: only folders of the set itself are read")
    store = LocalStore(folder)
    return store, read_plan(store)


def shard_header(plan: Plan, dim: int, shard: int) -> tuple[bytes, int]:
    """What a shard's file must begin with, and how many bytes it must hold in all."""
    layout = shard_layout(plan, dim, shard)
    header = encode_header(plan, shard, layout)
    return header, len(header) + sum(tensor.nbytes for tensor in layout.values())


def map_shard(store: LocalStore, plan: Plan, dim: int, shard: int) -> dict[str, Tensor]:
    """Map one shard: x_from, x_to (rows, d), and segment (rows,), or t (rows, 2) where times are random.

    Its size and its whole header are compared with what they must be; its numbers are not read.

    Raises:
        ValueError: it is missing, damaged, or of another set.
    """
    path = Path(store.location) / shard_name(shard)
    try:
        receipt = Receipt.parse(store.read_bytes(receipt_name(shard), MOST_RECEIPT_BYTES), plan, shard)
        header, expected = shard_header(plan, dim, shard)
        size = store.size(shard_name(shard))
        if not size == expected == receipt.bytes:
            raise ValueError(f"it must hold {expected} bytes, as its receipt says too; it holds {size or 'none'}")
        with path.open("rb") as stream:
            if stream.read(len(header)) != header:
                raise ValueError("its header is damaged or of another shard or set")
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in shard_layout(plan, dim, shard)}
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"teacher set: {path} cannot be used ({error}): flowfast verify --repair") from error


def header_says(head: bytes) -> dict[str, Any]:
    """What a shard's file says of itself (plan, shard, version), by its first bytes; {} where they cannot be read."""
    try:
        size = int.from_bytes(head[:8], "little")
        metadata = parse_object(head[8 : 8 + size], "header").get("__metadata__")
        return parse_object(str(metadata["flowfast"]).encode(), "header") if isinstance(metadata, dict) else {}
    except (KeyError, ValueError):
        return {}


def head_of(store: LocalStore, shard: int) -> bytes:
    """The first bytes of a shard's file, header and more; none where there is no such file."""
    if store.size(shard_name(shard)) is None:
        return b""
    with (Path(store.location) / shard_name(shard)).open("rb") as stream:
        return stream.read(MOST_HEADER_BYTES)


def read_into_cache(store: LocalStore, name: str) -> None:
    """Make the system read a file from its begin to its end; nothing where it is no regular file, or will not."""
    if store.size(name) is None:
        return
    with contextlib.suppress(OSError), (Path(store.location) / name).open("rb") as file, open(os.devnull, "wb") as sink:
        place = 0
        while sent := os.sendfile(sink.fileno(), file.fileno(), place, 1 << 22):  # no byte is copied
            place += sent


def file_sha256(store: LocalStore, name: str) -> str | None:
    """SHA-256 of a file; None where there is no regular one, or it cannot be read."""
    if store.size(name) is None:
        return None
    try:
        with (Path(store.location) / name).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return None
