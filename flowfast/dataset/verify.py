"""Verifying a teacher set: every file against its receipt, every receipt against the plan; and repairing it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowfast.dataset.receipts import sweep, write_manifest
from flowfast.dataset.repair import repair_shards
from flowfast.dataset.scan import Finding, Progress, Scan
from flowfast.dataset.shard_files import open_folder
from flowfast.dataset.store import refusals


@dataclass(frozen=True)
class Verification:
    """What `verify_dataset` found.

    Args:
        folder: of the set. plan: its digest. shards, rows: of the plan. bytes: of the shards that were read.
        findings: what is wrong now. repaired: what was, before this call. notes: why something was not repaired.
    """

    folder: Path
    plan: str
    shards: int
    rows: int
    bytes: int
    findings: tuple[Finding, ...]
    repaired: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the set is complete and every file is as it was written."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "folder": str(self.folder), "ok": self.ok}


def verify_dataset(
    path: str | Path,
    *,
    repair: bool = False,
    rebuild: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Read every file of a set and compare it with its receipt, the receipts with the plan.

    Args:
        path: folder of the set.
        repair: make bad and missing shards again (the same bytes), and remove unfinished files.
        rebuild: write manifest.json anew from the receipts, where the set is complete.
        workers: threads that hash; None takes all cores.
        progress: called with (shards done, shards).

    Returns:
        What was found, and what was repaired. Nothing of the set is changed unless `repair` or `rebuild`.

    Raises:
        ValueError: no set there, or a plan that is damaged; with `repair`, a plan that no file of the set knows.
        StorageError: an OSError; a file cannot be written.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1; got {workers}")
    store, plan = open_folder(path)
    scan = Scan(store, plan, workers or len(os.sched_getaffinity(0)))
    bad = scan.shards(progress)
    before = [*bad.values(), *scan.others(complete=not bad)]
    after = before
    notes: tuple[str, ...] = ()
    if (repair and before) or (rebuild and not bad):
        if repair:
            notes = repair_shards(store, plan, scan.mixture, bad)
            bad = scan.shards(only=bad)
        with refusals(store):
            if repair:
                sweep(store, complete=not bad)
            if not bad:
                write_manifest(store, plan)
        after = [*bad.values(), *scan.others(complete=not bad)]
    return Verification(
        Path(store.location),
        plan.digest(),
        plan.n_shards,
        plan.rows,
        scan.bytes,
        findings=tuple(after),
        repaired=tuple(finding for finding in before if finding not in after),
        notes=notes,
    )
