"""What each command does, once its options are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from flowfast import backends, doctor
from flowfast.cli import tables
from flowfast.cli.compare import compare
from flowfast.cli.options import (
    Bench,
    Command,
    Digits,
    Distill,
    Doctor,
    JobOptions,
    Report,
    Reproduce,
    Sample,
    Stability,
    UsageError,
)
from flowfast.cli.theory_options import Theory
from flowfast.distillation import Recipe
from flowfast.experiments import (
    FolderError,
    JobResult,
    JobSettings,
    digits_mixture,
    digits_settings,
    run_job,
    sample_job,
)
from flowfast.experiments.figure_arrays import profile_arrays
from flowfast.experiments.paper import is_reproduction
from flowfast.grids import KINDS, GridKind, time_grid
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.report import write_report
from flowfast.report.numbers import seconds
from flowfast.report.paper import write_tables_report
from flowfast.stability import cumulative_stability, stability_regimes
from flowfast.storage import write_bytes

# Names the library uses for what an option sets.
OPTIONS = {
    name: name for name in ("segments", "rows", "steps", "width", "std", "horizon", "beta", "seed", "backend", "n")
}
OPTIONS |= {"grids": "grid", "grid": "grid", "kind": "grid", "means": "means", "weights": "means"}
OPTIONS |= {name: name for name in ("t", "eps", "blocks")} | {"t_from": "t-to"}
OPTIONS |= {"image_shape": "image-shape", "evaluation_rows": "evaluation-rows"}

PICTURES = (".png", ".svg", ".pdf")


def run(command: Command) -> int:
    """Carry out one command and return its exit code.

    Raises:
        UsageError: an argument that cannot be used; anything else raised is a run that failed.
    """
    match command:
        case Digits():
            with _arguments("--std"):
                mixture = digits_mixture(command.std)
            return _job(command, mixture, digits_settings(), command.out)
        case Distill():
            mixture = _mixture(command.means, command.std)
            settings = JobSettings(name=command.means.stem)
            with _arguments("--image-shape"):
                settings = replace(settings, image_shape=command.image_shape)
                settings.check_dim(mixture.dim)
            return _job(command, mixture, settings, command.out)
        case Reproduce():
            return _reproduce(command)
        case Sample():
            return _sample(command)
        case Stability():
            return _stability(command)
        case Report():
            return _report(command)
        case Doctor():
            return _doctor(command)
        case Bench():
            return _bench(command)
        case Theory():
            from flowfast.cli import theory

            with _arguments("--means"):
                return theory.run(command)


@contextmanager
def _arguments(option: str) -> Iterator[None]:
    """Turn the library's refusals in the block into one sentence about an argument, `option` unless it names one."""
    try:
        yield
    except (ValueError, TypeError) as error:
        first, _, rest = str(error).partition(" ")
        named = OPTIONS.get(first)
        raise UsageError(f"--{named} {rest}" if named else f"{option}: {error}") from error


def _mixture(means: Path, std: float | None) -> GaussianMixture:
    with _arguments("--means"):
        mixture = GaussianMixture.load(means, std=std)
        if str(mixture.dtype) not in ("torch.float32", "torch.float64"):
            raise ValueError(f"means must be float32 or float64; got {mixture.dtype}")
        return mixture


def _job(command: JobOptions, mixture: GaussianMixture, settings: JobSettings, out: Path) -> int:
    given = {name: getattr(command, name) for name in ("steps", "width") if getattr(command, name) is not None}
    with _arguments("--grid"):
        settings = replace(
            settings,
            segments=command.segments,
            grids=cast(tuple[GridKind, ...], command.grid),  # checked by the settings themselves
            rows=command.rows,
            evaluation_rows=command.evaluation_rows,
            pictures=max(1, min(settings.pictures, command.evaluation_rows)),
            horizon=command.horizon,
            seed=command.seed,
            recipe=replace(Recipe(), **given),
        )
        process = OUProcess(command.beta)
    with _arguments("--backend"):
        backends.choose(command.backend, mixture.device)
    try:
        with tables.watch() as listener:
            result = run_job(mixture, process, settings, out, listener=listener, backend=command.backend)
    except FolderError as error:
        raise UsageError(f"--out: {error}") from error
    report = write_report(out)
    if command.json:
        _print_json({**result.to_dict(), "seconds": result.seconds(), "folder": str(out), "report": str(report)})
    else:
        console = tables.console()
        console.print(tables.results(result))
        console.print(f"{seconds(result.seconds())} for all stages; report:", style="dim")
        print(report)
    return 0


def _sample(command: Sample) -> int:
    out = command.out
    if out is not None and out.suffix != ".npy":
        raise UsageError(f"--out must end in .npy; got {out}")
    with _arguments("FOLDER"):
        points, kind = sample_job(command.folder, command.n, grid=command.grid, seed=command.seed)
    out = out or command.folder / f"samples-{kind}-n{command.n}-seed{command.seed}.npy"
    _write(out, _npy(points.numpy()), "--out")
    if command.json:
        _print_json({"file": str(out), "grid": kind, "shape": list(points.shape), "seed": command.seed})
    else:
        print(f"{command.n} samples of dimension {points.shape[1]} from the {kind} student, seed {command.seed}:")
        print(out)
    return 0


def _stability(command: Stability) -> int:
    mixture = _mixture(command.means, command.std)
    plot = None if command.plot is None else (*command.plot, Path("stability.png"))[0]
    if command.plot is not None and len(command.plot) > 1:
        raise UsageError(f"--plot takes one file; got {len(command.plot)}")
    if plot is not None and plot.suffix not in PICTURES:
        raise UsageError(f"--plot must end in one of {', '.join(PICTURES)}; got {plot}")
    with _arguments("--grid"):
        if command.segments < 1:
            raise ValueError(f"segments must be at least 1; got {command.segments}")
        process = OUProcess(command.beta)
        numbers = _stability_numbers(mixture, process, command)
    if plot is not None:
        _write(plot, _drawing(mixture, process, numbers, plot.suffix[1:]), "--plot")
        numbers["plot"] = str(plot)
    if command.json:
        _print_json(numbers)
    else:
        console = tables.console()
        for table in tables.stability(numbers):
            console.print(table)
        if plot is not None:
            print(plot)
    return 0


def _stability_numbers(mixture: GaussianMixture, process: OUProcess, command: Stability) -> dict[str, Any]:
    unknown = [kind for kind in command.grid if kind not in KINDS]
    if unknown:
        raise ValueError(f"grid must be some of {', '.join(KINDS)}; got {', '.join(unknown)}")
    regimes = stability_regimes(mixture, process, horizon=command.horizon)
    grids = []
    for kind in KINDS:
        if kind in command.grid:
            times = time_grid(mixture, process, command.segments, kind=kind, horizon=command.horizon)
            exponents = -cumulative_stability(mixture, process, times).diff()
            grids.append({"kind": kind, "times": times.tolist(), "exponents": exponents.tolist()})
    return {
        "components": mixture.n_components,
        "dim": mixture.dim,
        "std": float(mixture.std),
        "diameter": mixture.diameter(),
        "horizon": command.horizon,
        "total_stability": float(cumulative_stability(mixture, process, command.horizon)),
        "regimes": {"t_shrink": regimes.t_shrink, "t_mix": regimes.t_mix, "intervals": regimes.intervals},
        "grids": grids,
    }


def _drawing(mixture: GaussianMixture, process: OUProcess, numbers: Mapping[str, Any], kind: str) -> bytes:
    try:
        from flowfast.report import figures
    except ModuleNotFoundError as error:
        raise UsageError("--plot needs matplotlib: pip install 'flowfast[report]'") from error
    arrays = {name: x.numpy() for name, x in profile_arrays(mixture, process, numbers["horizon"]).items()}
    return figures.to_file(figures.profile(arrays, numbers["regimes"]), kind)


def _reproduce(command: Reproduce) -> int:
    from flowfast.cli import reproduce

    done = reproduce.run(command)
    if command.json:
        _print_json(done)
    elif done["report"] is not None:
        print(done["report"])
    return 0


def _report(command: Report) -> int:
    if is_reproduction(command.folder):
        with _arguments("FOLDER"):
            path = write_tables_report(command.folder)
    else:
        with _arguments("FOLDER"):
            JobResult.load(command.folder)
        path = write_report(command.folder)
    _print_json({"report": str(path)}) if command.json else print(path)
    return 0


def _doctor(command: Doctor) -> int:
    facts, checks = doctor.facts(), doctor.self_test()
    if command.json:
        _print_json({**facts, "checks": [asdict(check) for check in checks]})
    else:
        for table in tables.findings(facts, checks):
            tables.console().print(table)
    return 0 if all(check.ok for check in checks) else 1


def _bench(command: Bench) -> int:
    with _arguments("FILE"):
        found = compare(command.before, command.after)
    if command.json:
        _print_json(found)
    else:
        tables.console().print(tables.comparison(found))
    return 0


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    import io

    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _write(path: Path, content: bytes, option: str) -> None:
    try:
        write_bytes(path, content)
    except OSError as error:
        raise UsageError(f"{option}: {path} cannot be written ({error.strerror})") from error


def _print_json(value: Mapping[str, Any]) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))
