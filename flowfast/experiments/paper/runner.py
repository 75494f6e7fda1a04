"""The runner: every group that a request still needs is trained, evaluated and stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from flowfast import backends, cluster
from flowfast.experiments.paper import records, tables
from flowfast.experiments.paper.groups import Group, grouped, share
from flowfast.experiments.paper.plan import Request, check, claim
from flowfast.experiments.paper.records import Record
from flowfast.experiments.paper.settings import Run
from flowfast.experiments.paper.summary import Summary, summarise
from flowfast.experiments.paper.training import forget
from flowfast.experiments.paper.work import Hole, Task, carry_out, on_cluster
from flowfast.rank import Rank

ENGINES = ("local", "ray")
CHECKPOINT_EVERY = 60.0  # seconds; a kill costs at most these, and the evaluation in progress


@dataclass(frozen=True)
class Progress:
    """One sign of life.

    Args:
        stage: "training" or "evaluation". label: which runs. done, total: optimiser steps, or runs evaluated, of the
            group. runs_done, runs: of this process's share. loss: mean over the group's students, while training.
    """

    stage: str
    label: str
    done: int
    total: int
    runs_done: int
    runs: int
    loss: float | None = None


Listener = Callable[[Progress], None]


def reproduce(
    request: Request,
    out: str | Path,
    *,
    device: str | torch.device = "cpu",
    rank: Rank | None = None,
    listener: Listener | None = None,
    most: int | None = None,
    checkpoint_every: float = CHECKPOINT_EVERY,
    engine: str = "local",
    address: str | None = None,
) -> Summary:
    """Run what `request` asks for and `out` does not hold yet; stopped and called again, it goes on.

    Training goes on from a checkpoint of the group; its numbers are those of a training that was never stopped. An
    evaluation that was stopped is done again.

    Args:
        request: tables, seeds, teachers, scale, cells.
        out: folder of results; made when it does not exist, extended when it holds results of the same scale.
        device: of training, teacher and evaluation.
        rank: this process's share of the groups; None takes all of them.
        listener: called now and then.
        most: students trained together at most; None chooses by device.
        checkpoint_every: seconds.
        engine: "local", or "ray": groups are tasks of a cluster whose machines all see `out`, and records come back.
        address: of that cluster, see `flowfast.cluster.connected`.

    Returns:
        What the folder says now, runs of other processes included.

    Raises:
        ValueError: a device or backend that is not there, or a damaged line of results.
        FolderError: a ValueError too: `out` belongs to something else, is in use or cannot be written.
        RuntimeError: some run diverged, or was lost with its machine again and again; all others are stored.
    """
    folder, rank = Path(out), rank or Rank()
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
    if engine == "ray":
        cluster.check_installed()
    if engine == "ray" and rank.world > 1:
        raise ValueError("engine 'ray' divides the runs itself: unset RANK and WORLD_SIZE, or the SLURM array's")
    place = _place(request, device, here=engine == "local")
    runs = request.runs()
    stored = records.read(folder)
    needed = engine == "ray" and any(run.digest() not in stored for run in runs)
    # A damaged line, or a cluster that does not answer, is refused before anything is written.
    with cluster.connected(address) if needed else nullcontext(), claim(folder, request, rank):
        finished = set(records.read(folder))
        # Groups are formed of all runs, finished or not: a group that is gone on with is the group that was stopped.
        groups = share(grouped(runs, place, most), rank.rank, rank.world)
        work = _Work(folder, place, rank, listener, checkpoint_every, names_of(request))
        work.count(groups, finished)
        if engine == "ray":
            work.finish_on_cluster(groups, finished, address)
        else:
            for group in groups:
                work.finish(group, finished)
    if work.holes:
        raise RuntimeError(f"{len(work.holes)} runs stay holes, first: {work.holes[0]}")
    return summarise(folder)


def pending(request: Request, out: str | Path, *, device: str | torch.device = "cpu", most: int | None = None) -> int:
    """Groups of runs that `reproduce` with the same arguments would still train; nothing is written.

    Raises:
        ValueError: as `reproduce`.
    """
    folder = Path(out)
    check(folder, request)
    finished = set(records.read(folder))
    groups = grouped(request.runs(), _place(request, device), most)
    return sum(any(run.digest() not in finished for run in group.runs) for group in groups)


def _place(request: Request, device: str | torch.device, *, here: bool = True) -> torch.device:
    """The device, which must be there where the work is done `here`."""
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu or cuda; got {device!r}") from error
    if here and place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that is there; got {device}, and torch finds no CUDA device")
    if here:
        backends.choose("auto", place)
    if request.variant.precision == "tf32" and place.type != "cuda":
        raise ValueError(f"precision 'tf32' is a mode of CUDA; the device is {device}: use float32")
    return place


def names_of(request: Request) -> dict[str, str]:
    """What each run is called, by digest: the first cell that it serves, and its seed."""
    found: dict[str, str] = {}
    for table, cell, teacher in request.cells():
        settings = table.settings(cell, teacher, request.variant)
        known = f", {teacher} teacher" if len(table.teachers()) > 1 else ""
        for seed in range(request.seeds):
            said = f"Table {table.number}: {tables.name_of(cell)}{known}, seed {seed}"
            found.setdefault(Run(settings, seed).digest(), said)
    return found


@dataclass
class _Work:
    folder: Path
    device: torch.device
    rank: Rank
    listener: Listener | None
    checkpoint_every: float
    names: dict[str, str]

    def __post_init__(self) -> None:
        self.holes: list[str] = []
        self.runs = self.done = 0

    def count(self, groups: Sequence[Group], finished: set[str]) -> None:
        digests = [run.digest() for group in groups for run in group.runs]
        self.runs, self.done = len(digests), sum(name in finished for name in digests)

    def finish(self, group: Group, finished: set[str]) -> None:
        missing = [run for run in group.runs if run.digest() not in finished]
        if not missing:
            forget(self.folder, group)  # a kill may have come between the last result and this
            return
        label = self.label(missing)

        def tell(stage: str, done: int, total: int, loss: float | None) -> None:
            self._tell(stage, label, done, total, loss)

        for found in carry_out(group, missing, self.folder, self.device, tell=tell, every=self.checkpoint_every):
            self.keep(found)
        self._tell("evaluation", label, len(missing), len(missing))
        forget(self.folder, group)

    def finish_on_cluster(self, groups: Sequence[Group], finished: set[str], address: str | None) -> None:
        left = [group for group in groups if any(run.digest() not in finished for run in group.runs)]
        left.sort(key=lambda group: -group.cost())  # the longest first, so that nobody waits for it at the end
        tasks = [Task(group, tuple(run for run in group.runs if run.digest() not in finished)) for group in left]
        for task, results in on_cluster(tasks, self.folder, self.device, self.checkpoint_every, address):
            for found in results:
                self.keep(found)
            self._tell("evaluation", self.label(task.missing), len(task.missing), len(task.missing))
            if not any(isinstance(found, Hole) and found.lost for found in results):
                forget(self.folder, task.group)

    def label(self, missing: Sequence[Run]) -> str:
        return self.names[missing[0].digest()] + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")

    def keep(self, found: Record | Hole) -> None:
        if isinstance(found, Hole):
            self.holes.append(f"{self.names[found.digest]} ({found.reason})")
        else:
            records.append(records.file_of(self.folder, self.rank.rank, self.rank.world), found)
            self.done += 1

    def _tell(self, stage: str, label: str, done: int, total: int, loss: float | None = None) -> None:
        if self.listener is not None:
            self.listener(Progress(stage, label, done, total, self.done, self.runs, loss))
