"""`flowfast digits` and `flowfast distill`: jobs that train students, with progress on stderr."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from flowfast import backends
from flowfast.cli import tables
from flowfast.cli.arguments import arguments, print_json, read_mixture
from flowfast.cli.options import Digits, Distill, JobOptions, UsageError
from flowfast.dataset import TeacherDataset
from flowfast.distillation import Recipe
from flowfast.experiments import FolderError, JobSettings, digits_mixture, digits_settings, run_job
from flowfast.experiments.settings import STORED
from flowfast.grids import GridKind
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.report import write_report
from flowfast.report.numbers import seconds

# Options whose values a stored teacher set has already.
DECIDED = ("means", "std", "segments", "grid", "rows", "beta", "horizon")


def digits(command: Digits) -> int:
    """Run the main job and show its report's path."""
    with arguments("--std"):
        mixture = digits_mixture(command.std)
    with arguments("--beta"):
        process = OUProcess(command.beta)
    return _job(command, mixture, process, _settings(command, digits_settings()))


def distill(command: Distill) -> int:
    """Run a job on a mixture of the user's own, or on a teacher set, and show its report's path.

    Raises:
        UsageError: neither or both of them, or an argument that cannot be used.
    """
    if command.data is not None:
        return _distill_stored(command, command.data)
    if command.means is None:
        raise UsageError("--means or --data must be given: a mixture, or a teacher set")
    mixture = read_mixture(command.means, command.std)
    settings = _settings(command, JobSettings(name=command.means.stem))
    with arguments("--beta"):
        process = OUProcess(command.beta)
    return _job(command, mixture, process, _with_images(command, settings, mixture))


def _distill_stored(command: Distill, folder: str) -> int:
    for name in DECIDED:
        if getattr(command, name) != getattr(Distill(out=command.out), name):
            raise UsageError(f"--{name} cannot be given with --data: the teacher set decides it")
    with arguments("--data"):
        data = TeacherDataset(folder)
        if data.plan.times is None or not data.pairs_per_segment:
            raise ValueError(f"{folder} must have a time grid and a row per segment: generate such a set")
        settings = JobSettings(
            name=data.folder.resolve().name,
            segments=data.n_segments,
            grids=(STORED,),
            rows=data.pairs_per_segment,
            horizon=data.plan.times[0],
            data=data.plan.digest(),
        )
    settings = _trained(command, settings)
    return _job(command, data.mixture, data.process, _with_images(command, settings, data.mixture), data)


def _settings(command: JobOptions, settings: JobSettings) -> JobSettings:
    with arguments("--grid"):
        grids = cast(tuple[GridKind, ...], command.grid)  # checked by the settings themselves
        settings = replace(settings, segments=command.segments, grids=grids, rows=command.rows, horizon=command.horizon)
    return _trained(command, settings)


def _trained(command: JobOptions, settings: JobSettings) -> JobSettings:
    given = {name: getattr(command, name) for name in ("steps", "width") if getattr(command, name) is not None}
    with arguments("--steps"):
        return replace(
            settings,
            evaluation_rows=command.evaluation_rows,
            pictures=max(1, min(settings.pictures, command.evaluation_rows)),
            seed=command.seed,
            recipe=replace(Recipe(), **given),
        )


def _with_images(command: Distill, settings: JobSettings, mixture: GaussianMixture) -> JobSettings:
    with arguments("--image-shape"):
        settings = replace(settings, image_shape=command.image_shape)
        settings.check_dim(mixture.dim)
    return settings


def _job(
    command: JobOptions,
    mixture: GaussianMixture,
    process: OUProcess,
    settings: JobSettings,
    data: TeacherDataset | None = None,
) -> int:
    out = command.out
    with arguments("--backend"):
        backends.choose(command.backend, mixture.device)
    try:
        with tables.watch() as listener:
            result = run_job(mixture, process, settings, out, data=data, listener=listener, backend=command.backend)
    except FolderError as error:
        raise UsageError(f"--out: {error}") from error
    report = write_report(out)
    if command.json:
        print_json({**result.to_dict(), "seconds": result.seconds(), "folder": str(out), "report": str(report)})
    else:
        console = tables.console()
        console.print(tables.results(result))
        console.print(f"{seconds(result.seconds())} for all stages; report:", style="dim")
        print(report)
    return 0
