"""Several processes of one call on this machine, each with its share of the runs and of the cores."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO

from flowfast.cli.options import UsageError

_COMMAND = [sys.executable, "-m", "flowfast"]
# A training step frees and takes again megabytes; left alone, glibc returns them to the system in between, and a sixth
# of the step goes into page faults (docs/notes.md).
_KEPT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(arguments: Sequence[str], jobs: int) -> None:
    """Run `flowfast *arguments` in `jobs` processes that divide the work by RANK and WORLD_SIZE; show their progress.

    Raises:
        UsageError: a process refused its arguments. RuntimeError: one failed; the others went on to their end.
    """
    threads = str(max(1, cores() // jobs))
    running = []
    for rank in range(jobs):
        own = {"RANK": str(rank), "WORLD_SIZE": str(jobs), "OMP_NUM_THREADS": threads}
        environment = _KEPT | os.environ | own
        command = [*_COMMAND, *arguments]
        running.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
    last = [""] * jobs
    readers = [
        threading.Thread(target=_forward, args=(process.stderr, rank, last)) for rank, process in enumerate(running)
    ]
    for reader in readers:
        reader.start()
    try:
        codes = [process.wait() for process in running]
    except BaseException:  # Ctrl-C among others: the processes share the terminal's, but not everyone's
        for process in running:
            process.terminate()
        raise
    finally:
        for process, reader in zip(running, readers, strict=True):
            process.wait()
            reader.join()
    for code, said in zip(codes, last, strict=True):
        if code:
            message = said.removeprefix("flowfast: ") or f"a process ended with code {code}"
            raise UsageError(message) if code == 2 else RuntimeError(message)


def _forward(stream: IO[str] | None, rank: int, last: list[str]) -> None:
    """Pass on the lines of one process; the last one is kept and, when it is a complaint, left to the caller."""
    if stream is None:
        return
    with stream:
        for line in stream:
            last[rank] = line.rstrip("\n")
            if not line.startswith("flowfast: "):
                print(f"[{rank}] {last[rank]}", file=sys.stderr, flush=True)
