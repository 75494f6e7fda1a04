"""One group of runs from its training to its records, on this machine or as a task of a cluster."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from flowfast import backends, cluster
from flowfast.experiments.machine import machine, versions
from flowfast.experiments.paper.evaluation import Diverged, evaluate
from flowfast.experiments.paper.groups import Group
from flowfast.experiments.paper.records import Record
from flowfast.experiments.paper.settings import Run, Settings
from flowfast.experiments.paper.training import Training

PACKAGES = ("flowfast", "torch", "numpy", "scipy", "safetensors")

Tell = Callable[[str, int, int, float | None], None]  # stage, done, total, loss


@dataclass(frozen=True)
class Task:
    """A group, and those of its runs that have no record yet."""

    group: Group
    missing: tuple[Run, ...]


@dataclass(frozen=True)
class Hole:
    """A run that gave no record: it diverged, or was `lost` with its machine, so that trying again makes sense."""

    digest: str
    reason: str
    lost: bool = False


def carry_out(
    group: Group, missing: Sequence[Run], folder: Path, device: torch.device, *, tell: Tell, every: float
) -> Iterator[Record | Hole]:  # fmt: skip
    """Train a group, or go on from its checkpoint, and evaluate the missing runs; the checkpoint stays.

    Args:
        group: trained together, whichever of its runs are missing. folder: of checkpoints. device: of everything.
        tell: called now and then. every: seconds between checkpoints.
    """
    backend = f"{backends.choose('auto', device)} on {device.type}"
    training = Training(group, folder, device)
    training.run(lambda done, total, loss: tell("training", done, total, loss), every=every)
    for index, run in enumerate(missing):
        tell("evaluation", index, len(missing), None)
        start = time.perf_counter()
        try:
            metrics = evaluate(run, training.students(run), device)
        except Diverged as error:
            yield Hole(run.digest(), str(error))
            continue
        yield Record(
            **run.identity(),
            digest=run.digest(),
            metrics=metrics,
            seconds={"training": training.seconds(run), "evaluation": time.perf_counter() - start},
            versions=versions(PACKAGES),
            backend=backend,
            machine=machine(),
        )


def on_cluster(
    tasks: Sequence[Task], folder: Path, device: torch.device, every: float, address: str | None
) -> Iterator[tuple[Task, list[Record | Hole]]]:
    """Carry out tasks on a Ray cluster, one core or one GPU each; what they found comes as they end.

    Args:
        folder: one that all machines see: checkpoints lie there, so that a task goes on where a dead machine left it.

    Raises:
        ValueError, RuntimeError: see `flowfast.cluster`.
    """
    if not tasks:
        return
    about = {"folder": str(folder.absolute()), "device": str(device), "every": every}
    requests = [json.dumps({**about, **_plain(task)}) for task in tasks]
    with cluster.connected(address) as ray:
        for answer in cluster.run_tasks(ray, _serve, requests, gpus=int(device.type == "cuda")):
            task = tasks[answer.index]
            if answer.text is None:
                yield task, [Hole(run.digest(), f"{answer.lost}, {cluster.TRIES} times", True) for run in task.missing]
            else:
                said = json.loads(answer.text)
                yield task, [Record(**each) if "metrics" in each else Hole(**each) for each in said]


def _plain(task: Task) -> dict[str, object]:
    names = [run.digest() for run in task.missing]
    return {"runs": [run.identity() for run in task.group.runs], "missing": names}


def _serve(request: str) -> str:
    """A task of the cluster: plain values in, what was found out."""
    wanted = json.loads(request)
    runs = tuple(Run(Settings(**each["settings"]), each["seed"]) for each in wanted["runs"])
    missing = [run for run in runs if run.digest() in wanted["missing"]]
    device, folder = torch.device(wanted["device"]), Path(wanted["folder"])
    torch.set_num_threads(1)
    found = carry_out(Group(runs), missing, folder, device, tell=lambda *_: None, every=wanted["every"])
    return json.dumps([asdict(each) for each in found], allow_nan=False)
