"""Receipts: a small file per finished shard that says what its file must hold; and what is left to do by them."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from flowfast.dataset.plan import Plan
from flowfast.dataset.shards import SHARDS, shard_name
from flowfast.dataset.store import Store, is_part, new_file, refusals
from flowfast.dataset.strict_json import check_names, dump_object, parse_object

RECEIPTS = "receipts"
MANIFEST = "manifest.json"
MOST_RECEIPT_BYTES = 4096
FOLDERS = ("", SHARDS, RECEIPTS)


@dataclass(frozen=True)
class Receipt:
    """What the file of one shard holds.

    Args:
        shard: its number. rows: in it. bytes: its size. sha256: of the file. plan: the plan's digest.
    """

    shard: int
    rows: int
    bytes: int
    sha256: str
    plan: str

    def dump(self) -> builtins.bytes:
        """Contents of the receipt's file."""
        return dump_object(asdict(self))

    @classmethod
    def parse(cls, content: builtins.bytes, plan: Plan, shard: int) -> Receipt:
        """The receipt of `shard` under `plan`.

        Raises:
            ValueError: it is damaged, or of another shard or plan.
        """
        where = receipt_name(shard)
        stored = parse_object(content, where)
        expected = {"shard": shard, "rows": plan.rows_of(shard), "plan": plan.digest()}
        check_names(stored, (*expected, "bytes", "sha256"), where)
        for name, value in expected.items():
            if type(stored[name]) is not type(value) or stored[name] != value:
                raise ValueError(f"{where}: {name} must be {value!r}; got {_brief(stored[name])}")
        size, sha = stored["bytes"], stored["sha256"]
        if type(size) is not int or not 0 < size < 2**62:
            raise ValueError(f"{where}: bytes must be a file's size; got {_brief(size)}")
        if not (isinstance(sha, str) and len(sha) == 64 and set(sha) <= set("0123456789abcdef")):
            raise ValueError(f"{where}: sha256 must be 64 hexadecimal digits; got {_brief(sha)}")
        return cls(**stored)


def receipt_name(shard: int) -> str:
    """File of one receipt, relative to the set's folder."""
    return f"{RECEIPTS}/shard-{shard:08d}.json"


def read_receipt(store: Store, plan: Plan, shard: int) -> Receipt | None:
    """The receipt of a shard whose file is there with the receipt's size; None where either is missing or damaged.

    That file's contents are not read: `verify_dataset` does.
    """
    try:
        receipt = Receipt.parse(store.read_bytes(receipt_name(shard), MOST_RECEIPT_BYTES), plan, shard)
    except (FileNotFoundError, ValueError):
        return None
    return receipt if store.size(shard_name(shard)) == receipt.bytes else None


def missing_shards(store: Store, plan: Plan) -> bytearray:
    """A byte per shard: 1 where it is still to be made, 0 where a receipt stands."""
    missing = bytearray(b"\1") * plan.n_shards
    for shard in listed_receipts(store, plan):
        missing[shard] = read_receipt(store, plan, shard) is None
    return missing


def listed_receipts(store: Store, plan: Plan) -> Iterator[int]:
    """Numbers of the plan's shards for which there is a receipt, true or not, in any order."""
    for name in store.list(RECEIPTS):
        digits = name.removeprefix(f"{RECEIPTS}/shard-").removesuffix(".json")
        if digits.isascii() and digits.isdigit() and len(digits) < 12:
            shard = int(digits)
            if shard < plan.n_shards and name == receipt_name(shard):
                yield shard


def manifest_lines(store: Store, plan: Plan) -> Iterator[bytes]:
    """Contents of manifest.json, one line per shard.

    Raises:
        ValueError: a receipt is missing.
    """
    yield f'{{"plan": "{plan.digest()}", "shards": ['.encode()
    for shard in range(plan.n_shards):
        receipt = read_receipt(store, plan, shard)
        if receipt is None:
            raise ValueError(f"teacher set: {store.location} is incomplete, {receipt_name(shard)} does not stand")
        yield f'{"," * (shard > 0)}\n[{shard}, {receipt.rows}, {receipt.bytes}, "{receipt.sha256}"]'.encode()
    yield b"\n]}\n"


def write_manifest(store: Store, plan: Plan) -> None:
    """Write manifest.json: a cache of the receipts of a complete set, which nothing trusts.

    Raises:
        ValueError: a receipt is missing.
    """
    with new_file(store, MANIFEST) as stream:
        for line in manifest_lines(store, plan):
            stream.write(line)


def sweep(store: Store, *, complete: bool) -> None:
    """Remove unfinished files whose writer is gone; all of them when the set is complete."""
    with refusals(store):
        for folder in FOLDERS:
            for name in list(store.list(folder)):
                if is_part(name) and (complete or store.is_abandoned(name)):
                    store.remove(name)


def _brief(value: Any) -> str:
    said = "a huge whole number" if isinstance(value, int) and value.bit_length() > 200 else repr(value)
    return said if len(said) <= 80 else f"{said[:77]}..."
