"""The job: teacher pairs on disk, a student per grid, its errors and costs; killed and called again it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowfast import backends
from flowfast.dataset import TeacherDataset
from flowfast.dataset.plan import mixture_digest
from flowfast.experiments import stages
from flowfast.experiments.figure_arrays import figure_arrays
from flowfast.experiments.folder import MIXTURE, claim
from flowfast.experiments.machine import machine, versions
from flowfast.experiments.result import NUMBERS, JobResult
from flowfast.experiments.settings import JobSettings, Listener, ignore
from flowfast.experiments.stages import Work
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.stability import cumulative_stability, stability_regimes


def run_job(
    mixture: GaussianMixture,
    process: OUProcess,
    settings: JobSettings,
    out: str | Path,
    *,
    data: TeacherDataset | None = None,
    listener: Listener | None = None,
    backend: str = "auto",
) -> JobResult:
    """Distil `mixture` on every grid of `settings` into the folder `out`, or go on where an earlier call stopped.

    Args:
        mixture: the data's law, float32 or float64, on the CPU.
        process: with a constant or tabulated schedule.
        settings: sizes, grids, seed and training recipe.
        out: the job's folder; a finished stage in it is never repeated.
        data: stored teacher pairs of this mixture and process on a grid that ends at t = 0, named by settings.data.
        listener: called with an Event now and then.
        backend: of the teacher.

    Returns:
        The result as `JobResult.load(out)` reads it.

    Raises:
        ValueError: settings that do not fit the mixture, a mixture elsewhere, or a backend that is not built.
        FolderError: a ValueError too: `out` is another job's, in use, not empty or not writable.
        RuntimeError: the teacher failed on some trajectory, or a student's training diverged.
        OSError: the disk is full or was taken away.
    """
    settings.check_dim(mixture.dim)
    if mixture.device.type != "cpu":
        raise ValueError(f"mixture must be on the CPU; it is on {mixture.device}: move it with .to('cpu')")
    backends.choose(backend, mixture.device)
    _check_data(data, settings)
    folder = Path(out)
    work = Work(mixture, process, settings, folder, listener or ignore, backend, data)
    with claim(folder, identity(mixture, process, settings, backend)):
        if not (folder / NUMBERS).is_file():
            mixture.save(folder / MIXTURE)
            _finish(work)
    return JobResult.load(folder)


def _check_data(data: TeacherDataset | None, settings: JobSettings) -> None:
    if (None if data is None else data.plan.digest()) != settings.data:
        raise ValueError(f"data must be the teacher set that settings.data names, {settings.data}")
    if data is None:
        return
    if data.plan.times is None or data.plan.times[-1] != 0:
        raise ValueError(f"data: {data.folder} must have a time grid that ends at t = 0: generate one")
    for name, value in (("segments", data.n_segments), ("horizon", data.plan.times[0])):
        if getattr(settings, name) != value:
            raise ValueError(f"{name} must be that of the teacher set, {value}; got {getattr(settings, name)}")


def identity(
    mixture: GaussianMixture, process: OUProcess, settings: JobSettings, backend: str = "auto"
) -> dict[str, Any]:
    """The fields that make a job this job: a folder that was started with others is refused."""
    return {
        "mixture": {**describe(mixture), "digest": mixture_digest(mixture)},
        "process": process.to_dict(),
        "settings": settings.to_dict(),
        "backend": backend,
    }


def describe(mixture: GaussianMixture) -> dict[str, Any]:
    """Size of a mixture as plain values."""
    return {
        "components": mixture.n_components,
        "dim": mixture.dim,
        "std": float(mixture.std),
        "dtype": str(mixture.dtype).removeprefix("torch."),
        "means_low": float(mixture.means.min()),
        "means_high": float(mixture.means.max()),
    }


def _finish(work: Work) -> None:
    mixture, process, settings = work.mixture, work.process, work.settings
    teacher = stages.teacher(work)
    grids = tuple(stages.grid(work, kind) for kind in settings.grids)
    regimes = stability_regimes(mixture, process, horizon=settings.horizon)
    result = JobResult(
        folder=work.folder,
        settings=settings.to_dict(),
        process=process.to_dict(),
        mixture={**describe(mixture), "diameter": mixture.diameter(backend=work.backend)},
        versions=versions(),
        machine=machine(),
        regimes={"t_shrink": regimes.t_shrink, "t_mix": regimes.t_mix, "intervals": regimes.intervals},
        total_stability=float(cumulative_stability(mixture, process, settings.horizon)),
        teacher=teacher,
        grids=grids,
    )
    result.save(figure_arrays(work))
