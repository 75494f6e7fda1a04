"""Jobs of `make gpu`: programs that run side by side under one time limit, each keeping what it finds in a file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEPT = 3_000  # last characters of what a job printed
GRACE = 3.0  # seconds between asking a job to end and ending it

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A program.

    Attributes:
        name: unique within a step. command: as for subprocess. part: the file it keeps, JSON; None when it keeps none.
        environment: variables beside the parent's.
    """

    name: str
    command: Sequence[str]
    part: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


class Part:
    """What a job has found so far, rewritten at every row, so that a job that is stopped keeps what it has.

    Args:
        path: the file; None keeps the rows in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.rows = path, list[Row]()

    def add(self, **row: Any) -> Row:
        """Keep one row of plain values."""
        self.rows.append(row)
        if self.path is not None:
            replace_file(self.path, json.dumps(self.rows, allow_nan=False))
        return row


def replace_file(path: Path, text: str) -> None:
    """Write a file such that a reader sees the old or the new one, never a piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(text)
    os.replace(beside, path)


def rows_of(part: Path | None) -> list[Row]:
    """The rows that a job has kept; none when it has not begun to."""
    return json.loads(part.read_text()) if part is not None and part.exists() else []


def run_jobs(
    jobs: Sequence[Job], *, limit: float, width: int, folder: Path, watch: Callable[[dict[str, Row]], None]
) -> dict[str, Row]:
    """Run the jobs in their order, `width` at a time; end what still runs after `limit` seconds.

    Args:
        jobs: each with a name of its own. folder: for their output. watch: called every second or so with what is
            known of the jobs that have begun.

    Returns:
        Per job: state ("ok", "failed", "out of time"), returncode, seconds, rows, and the end of what a job that is
        not ok printed.
    """
    deadline, waiting = time.monotonic() + limit, list(jobs)
    running: dict[str, tuple[Job, subprocess.Popen[bytes], float]] = {}
    found: dict[str, Row] = {}
    looked = 0.0
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < width:
                job = waiting.pop(0)
                running[job.name] = (job, _start(job, folder), time.monotonic())
            time.sleep(0.05)
            for name, (job, process, begin) in list(running.items()):
                state = {None: "running", 0: "ok"}.get(process.poll(), "failed")
                if state != "running" or time.monotonic() - looked > 1:
                    found[name] = _known(job, folder, state, process.returncode, time.monotonic() - begin)
                if state != "running":
                    del running[name]
            if time.monotonic() - looked > 1:
                watch(found)
                looked = time.monotonic()
    finally:
        _end([process for _, process, _ in running.values()])
    for job, process, begin in running.values():
        found[job.name] = _known(job, folder, "out of time", process.returncode, time.monotonic() - begin)
    for job in waiting:
        found[job.name] = {"state": "out of time", "returncode": None, "seconds": 0.0, "rows": [], "output": ""}
    watch(found)
    return found


def _start(job: Job, folder: Path) -> subprocess.Popen[bytes]:
    """Begin a job in a process group of its own, so that it can be ended together with what it started."""
    with _log(job, folder).open("wb") as log:
        return subprocess.Popen(
            job.command, cwd=ROOT, env=os.environ | dict(job.environment), stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, process_group=0,
        )  # fmt: skip


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for wanted, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 10.0)):
        until = time.monotonic() + patience
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, wanted)
        for process in processes:
            try:
                process.wait(max(until - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                continue


def _known(job: Job, folder: Path, state: str, returncode: int | None, seconds: float) -> Row:
    output = "" if state == "ok" else _log(job, folder).read_text(errors="replace")[-KEPT:]
    known = {"state": state, "returncode": returncode, "seconds": round(seconds, 1), "output": output}
    return known | {"rows": rows_of(job.part)}


def _log(job: Job, folder: Path) -> Path:
    return folder / ("".join(c if c.isalnum() else "-" for c in job.name) + ".log")
