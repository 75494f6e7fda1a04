"""Results as JSON lines: one line per finished run, found again by content, never by the name of its file.

A line holds digest, settings, seed, metrics, seconds, versions, backend and machine. Metrics are plain numbers and
lists of numbers; `evaluation.py` says which.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flowfast.experiments.paper.settings import digest

PATTERN = "runs*.jsonl"


@dataclass(frozen=True)
class Record:
    """One finished run.

    Args:
        digest: of settings and seed. settings, seed: what ran.
        metrics: what was found. seconds: of training (this run's share of its group's) and evaluation, all attempts.
        versions: of what it ran on. backend: teacher's backend and device. machine: as `machine()` says.
    """

    digest: str
    settings: Mapping[str, Any]
    seed: int
    metrics: Mapping[str, Any]
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    backend: str
    machine: Mapping[str, Any]


def file_of(folder: Path, rank: int, world: int) -> Path:
    """Where the process of this rank appends."""
    return folder / ("runs.jsonl" if world == 1 else f"runs-{rank}.jsonl")


def append(path: Path, record: Record) -> None:
    """Add one line, on the disk when the call returns; an unfinished last line of a killed write is cut off first."""
    line = (json.dumps(asdict(record), allow_nan=False) + "\n").encode()
    with path.open("ab") as stream:
        _cut_unfinished(path, stream.fileno())
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())


def read(folder: Path) -> dict[str, Record]:
    """All finished runs in `folder` by digest, whichever process wrote them.

    Raises:
        ValueError: a line that is no record, or whose settings are not those of its digest; file and line are named.
    """
    records: dict[str, Record] = {}
    for path in sorted(folder.glob(PATTERN)):
        for number, line in enumerate(_finished_lines(path), start=1):
            record = _parse(line, f"{path}, line {number}")
            records.setdefault(record.digest, record)
    return records


def _finished_lines(path: Path) -> list[bytes]:
    """Lines that end; what a kill left after the last of them is a run that has to be repeated."""
    return path.read_bytes().split(b"\n")[:-1]


def _parse(line: bytes, where: str) -> Record:
    try:
        record = Record(**json.loads(line))
        found = digest({"settings": record.settings, "seed": record.seed})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where} is no result of flowfast reproduce ({error}): mend or remove this line") from error
    if found != record.digest:
        raise ValueError(f"{where} is damaged: its settings are not those it was written with; remove this line")
    return record


def _cut_unfinished(path: Path, handle: int) -> None:
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        os.ftruncate(handle, content.rfind(b"\n") + 1)
