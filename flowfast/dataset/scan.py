"""What is wrong with the files of a teacher set, as far as their receipts and the plan can tell."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from flowfast.dataset.identity import read_mixture
from flowfast.dataset.plan import MIXTURE, Plan
from flowfast.dataset.receipts import (
    FOLDERS,
    MANIFEST,
    MOST_RECEIPT_BYTES,
    RECEIPTS,
    Receipt,
    manifest_lines,
    receipt_name,
)
from flowfast.dataset.shard_files import header_says, shard_header
from flowfast.dataset.shards import SHARDS, shard_name
from flowfast.dataset.store import LocalStore, is_part
from flowfast.mixture import GaussianMixture

Progress = Callable[[int, int], None]
Found = dict[range, "Finding"]  # by numbers of shards

_PIECE = 1 << 20  # bytes hashed at a time
_QUEUE = 256  # shards given to the threads at a time


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with one file.

    Args:
        path: of the file, within the folder. what: size, plan, shard, sha256 or header of a shard's file; missing,
            unreadable, receipt, mixture, manifest, unfinished (left by a process that was killed), unexpected.
        expected: what it must be. actual: what it is.
    """

    path: str
    what: str
    expected: str
    actual: str

    def __str__(self) -> str:
        """One sentence."""
        return f"{self.path}: {self.what}: expected {self.expected}; found {self.actual}"


class Scan:
    """One pass over the files of a set.

    Args:
        store, plan: of the set. workers: threads that hash.
    """

    def __init__(self, store: LocalStore, plan: Plan, workers: int) -> None:
        self.store, self.plan, self.workers, self.bytes = store, plan, workers, 0
        self.folder = Path(store.location)
        self.mixture: GaussianMixture | None
        try:
            self.mixture = read_mixture(store, plan)
        except ValueError:
            self.mixture = None

    def shards(self, progress: Progress | None = None, *, only: Iterable[range] | None = None) -> Found:
        """What is wrong with shards, by their numbers: a finding each at most, one for a run of shards not made.

        Args:
            progress: see `verify_dataset`. only: numbers of the shards that are read; None takes all.
        """
        found: Found = {}
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for run, there in self._runs([range(self.plan.n_shards)] if only is None else only):
                    if not there:
                        said = f"shards {run[0]} to {run[-1]} with their receipts"
                        found[run] = Finding(shard_name(run[0]), "missing", said, "neither: not made yet, or lost")
                    for part in (run[i : i + _QUEUE] for i in range(0, len(run) if there else 0, _QUEUE)):
                        for shard, (finding, size) in zip(part, pool.map(self.check, part), strict=True):
                            self.bytes += size
                            if finding is not None:
                                found[range(shard, shard + 1)] = finding
                            if progress is not None:
                                progress(shard + 1, self.plan.n_shards)
            finally:
                pool.shutdown(cancel_futures=True)  # Ctrl-C waits for the files being read, not for all
        return found

    def _runs(self, parts: Iterable[range]) -> Iterator[tuple[range, bool]]:
        """Runs of shards that all have a file or a receipt, and of shards that have neither."""
        there = bytearray(self.plan.n_shards)
        for folder in (SHARDS, RECEIPTS):
            for name in self._entries(folder):
                if (shard := self._number(name)) is not None:
                    there[shard] = 1
        for part in parts:
            first = part.start
            while first < part.stop:
                other = there.find(b"\0" if there[first] else b"\1", first, part.stop)
                last = part.stop if other < 0 else other
                yield range(first, last), bool(there[first])
                first = last

    def others(self, *, complete: bool) -> Iterator[Finding]:
        """What is wrong with all other files. complete: whether every shard stands, so that nobody is writing."""
        if self.mixture is None:
            yield Finding(MIXTURE, "mixture", f"the plan's, digest {self.plan.mixture}", "another, damaged or missing")
        for folder in FOLDERS:
            for name in sorted(self._entries(folder)):
                if is_part(name):
                    if complete or self.store.is_abandoned(name):
                        yield Finding(
                            _printable(name), "unfinished", "no temporary file", "left by a process that has ended"
                        )
                elif folder and self._number(name) is None:
                    yield Finding(
                        _printable(name),
                        "unexpected",
                        f"a file of one of {self.plan.n_shards} shards",
                        "something else",
                    )
        if complete and not self.manifest_agrees():
            yield Finding(MANIFEST, "manifest", "the receipts' numbers", "missing or different: rebuild it")

    def manifest_agrees(self) -> bool:
        """Whether manifest.json repeats the receipts of a complete set."""
        if self.store.size(MANIFEST) is None:
            return False
        with (self.folder / MANIFEST).open("rb") as stream:
            return all(stream.read(len(line)) == line for line in manifest_lines(self.store, self.plan)) and (
                not stream.read(1)
            )

    def _entries(self, folder: str) -> Iterator[str]:
        if (self.folder / folder).is_dir():
            with os.scandir(self.folder / folder) as entries:
                yield from (f"{folder}/{entry.name}" if folder else entry.name for entry in entries)

    def _number(self, name: str) -> int | None:
        """Of the shard whose file or receipt is called so; None for any other name."""
        digits = name.partition("shard-")[2].partition(".")[0]
        if not (digits.isascii() and digits.isdigit() and len(digits) < 12 and int(digits) < self.plan.n_shards):
            return None
        return int(digits) if name in (shard_name(int(digits)), receipt_name(int(digits))) else None

    def check(self, shard: int) -> tuple[Finding | None, int]:
        """What is wrong with one shard or its receipt, and how many bytes were read."""
        name, size = shard_name(shard), self.store.size(shard_name(shard))
        dim = None if self.mixture is None else self.mixture.dim
        receipt = read_receipt_or_finding(self.store, self.plan, shard)
        if isinstance(receipt, Finding):
            return receipt, 0
        if size is None:
            said = f"a regular file of {receipt.bytes} bytes with SHA-256 {receipt.sha256}"
            return Finding(name, "missing", said, "none"), 0
        try:
            with (self.folder / name).open("rb", buffering=0) as stream:
                return examine(stream, size, self.plan, dim, receipt), size
        except OSError as error:
            return Finding(name, "unreadable", f"SHA-256 {receipt.sha256}", str(error)), 0


def read_receipt_or_finding(store: LocalStore, plan: Plan, shard: int) -> Receipt | Finding:
    """A shard's receipt, or what is wrong with it."""
    name = receipt_name(shard)
    said = f"the receipt of shard {shard} of plan {plan.digest()}"
    try:
        return Receipt.parse(store.read_bytes(name, MOST_RECEIPT_BYTES), plan, shard)
    except FileNotFoundError:
        return Finding(name, "missing", said, "none")
    except ValueError as error:
        return Finding(name, "receipt", said, str(error))
    except OSError as error:
        return Finding(name, "unreadable", said, str(error))


def examine(stream: BinaryIO, size: int, plan: Plan, dim: int | None, receipt: Receipt) -> Finding | None:
    """Compare the file of one shard with its receipt and plan.

    Args:
        stream: at the file's begin; readinto may give less than asked. size: of the file.
        dim: d; None, where the mixture is lost, leaves the header to the hash. receipt: of the shard.

    Returns:
        The difference that says most; None where there is none.
    """
    found = Finding(shard_name(receipt.shard), "size", f"{receipt.bytes} bytes", f"{size} bytes")
    header, expected = (b"", receipt.bytes) if dim is None else shard_header(plan, dim, receipt.shard)
    if expected != receipt.bytes:
        wanted = f"{expected} bytes for {receipt.rows} rows of dimension {dim}"
        return replace(found, path=receipt_name(receipt.shard), what="receipt", expected=wanted, actual=found.expected)
    if size != receipt.bytes:
        return found
    said, head, view = hashlib.sha256(), bytearray(), memoryview(bytearray(_PIECE))
    while count := stream.readinto(view):  # type: ignore[attr-defined]
        said.update(view[:count])
        if len(head) < len(header):
            head += view[: min(count, len(header) - len(head))]
    if head != header:
        about = header_says(bytes(head))
        for what, right in (("plan", plan.digest()), ("shard", receipt.shard)):
            if about.get(what, right) != right:
                return replace(found, what=what, expected=str(right), actual=f"{about[what]!s:.80}")
    if said.hexdigest() != receipt.sha256:
        return replace(found, what="sha256", expected=receipt.sha256, actual=said.hexdigest())
    if head != header:
        sums = [hashlib.sha256(part).hexdigest() for part in (header, head)]
        return replace(found, what="header", expected=sums[0], actual=sums[1])
    return None


def _printable(name: str) -> str:
    """A file's name as it can be printed, whatever its bytes."""
    return os.fsencode(name).decode(errors="backslashreplace")
