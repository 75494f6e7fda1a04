"""What each command does, once its options are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from flowfast import doctor
from flowfast.cli import distill, tables, verify
from flowfast.cli.arguments import arguments, print_json, read_mixture
from flowfast.cli.compare import compare
from flowfast.cli.options import (
    Bench,
    Command,
    Digits,
    Distill,
    Doctor,
    Export,
    Generate,
    Report,
    Reproduce,
    Sample,
    Stability,
    UsageError,
    Verify,
)
from flowfast.experiments import (
    JobResult,
    sample_job,
)
from flowfast.experiments.figure_arrays import profile_arrays
from flowfast.experiments.paper import is_reproduction
from flowfast.grids import KINDS, time_grid
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.report import write_report
from flowfast.report.paper import write_tables_report
from flowfast.stability import cumulative_stability, stability_regimes
from flowfast.storage import write_bytes

PICTURES = (".png", ".svg", ".pdf")


def run(command: Command) -> int:
    """Carry out one command and return its exit code.

    Raises:
        UsageError: an argument that cannot be used; anything else raised is a run that failed.
    """
    match command:
        case Digits():
            return distill.digits(command)
        case Distill():
            return distill.distill(command)
        case Reproduce():
            return _reproduce(command)
        case Generate():
            return _generate(command)
        case Verify():
            return verify.verify(command)
        case Export():
            return verify.export(command)
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


def _sample(command: Sample) -> int:
    out = command.out
    if out is not None and out.suffix != ".npy":
        raise UsageError(f"--out must end in .npy; got {out}")
    with arguments("FOLDER"):
        points, kind = sample_job(command.folder, command.n, grid=command.grid, seed=command.seed)
    out = out or command.folder / f"samples-{kind}-n{command.n}-seed{command.seed}.npy"
    _write(out, _npy(points.numpy()), "--out")
    if command.json:
        print_json({"file": str(out), "grid": kind, "shape": list(points.shape), "seed": command.seed})
    else:
        print(f"{command.n} samples of dimension {points.shape[1]} from the {kind} student, seed {command.seed}:")
        print(out)
    return 0


def _stability(command: Stability) -> int:
    mixture = read_mixture(command.means, command.std)
    plot = None if command.plot is None else (*command.plot, Path("stability.png"))[0]
    if command.plot is not None and len(command.plot) > 1:
        raise UsageError(f"--plot takes one file; got {len(command.plot)}")
    if plot is not None and plot.suffix not in PICTURES:
        raise UsageError(f"--plot must end in one of {', '.join(PICTURES)}; got {plot}")
    with arguments("--grid"):
        if command.segments < 1:
            raise ValueError(f"segments must be at least 1; got {command.segments}")
        process = OUProcess(command.beta)
        numbers = _stability_numbers(mixture, process, command)
    if plot is not None:
        _write(plot, _drawing(mixture, process, numbers, plot.suffix[1:]), "--plot")
        numbers["plot"] = str(plot)
    if command.json:
        print_json(numbers)
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
        print_json(done)
    elif done["report"] is not None:
        print(done["report"])
    return 0


def _generate(command: Generate) -> int:
    from flowfast.cli import generate

    mixture = read_mixture(command.means, command.std)
    with arguments("--out"):
        done = generate.run(command, generate.planned(command, mixture), mixture)
    if command.json:
        print_json(done)
    return 0


def _report(command: Report) -> int:
    if is_reproduction(command.folder):
        with arguments("FOLDER"):
            path = write_tables_report(command.folder)
    else:
        with arguments("FOLDER"):
            JobResult.load(command.folder)
        path = write_report(command.folder)
    print_json({"report": str(path)}) if command.json else print(path)
    return 0


def _doctor(command: Doctor) -> int:
    facts, checks = doctor.facts(), doctor.self_test()
    if command.json:
        print_json({**facts, "checks": [asdict(check) for check in checks]})
    else:
        for table in tables.findings(facts, checks):
            tables.console().print(table)
    return 0 if all(check.ok for check in checks) else 1


def _bench(command: Bench) -> int:
    with arguments("FILE"):
        found = compare(command.before, command.after)
    if command.json:
        print_json(found)
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
