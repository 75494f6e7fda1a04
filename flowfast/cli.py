"""The command line: commands and options as frozen dataclasses, errors as one sentence.

Nothing heavy is imported before a command runs, so that `flowfast --help` answers at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg, subcommand

Grids = Annotated[tuple[str, ...], arg(metavar="KIND [KIND ...]")]
ImageShape = Annotated[tuple[int, int] | None, arg(metavar="HEIGHT WIDTH")]
Folder = Positional[Annotated[Path, arg(metavar="FOLDER")]]
Plot = Annotated[tuple[Path, ...] | None, arg(metavar="[FILE]")]


class UsageError(Exception):
    """A call that cannot be carried out as it stands; the message names the argument."""


@dataclass(frozen=True, kw_only=True)
class MixtureFile:
    """A mixture of the user's own."""

    means: Path
    """Means (k, d) as .npy or .csv, or a mixture as .npz or .safetensors (means, std, weights)."""
    std: float | None = None
    """Standard deviation of every component; none takes the file's."""


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What every distillation takes."""

    out: Path
    """Folder of the job."""
    segments: int = 4
    """Steps of a student, which are the segments of the grid."""
    grid: Grids = ("uniform", "balanced", "measured")
    """Grids to distil on: uniform, balanced, signed, measured."""
    rows: int = 24_576
    """Teacher trajectories stored per grid."""
    evaluation_rows: int = 2_048
    """Fresh starting points on which errors are measured."""
    steps: int | None = None
    """Optimiser steps per student; none takes the recipe's."""
    width: int | None = None
    """Width of a student's layers; none takes the recipe's."""
    beta: float = 5.0
    """Constant rate of the forward process, per unit of time."""
    horizon: float = 1.0
    """Time at which the noise starts."""
    seed: int = 0
    """Seed of everything random."""
    backend: str = "auto"
    """Teacher's backend: auto, cpp, triton, reference."""
    json: bool = False
    """Print the results as JSON on stdout, and nothing else there."""


@dataclass(frozen=True, kw_only=True)
class Digits(JobOptions):
    """The main job: handwritten digits, students on three grids, a report. Stopped and called again, it goes on."""

    out: Path = Path("runs/digits")
    """Folder of the job."""
    std: float = 0.15
    """Standard deviation around each image, whose pixels run from -1 to 1."""


@dataclass(frozen=True, kw_only=True)
class Distill(JobOptions, MixtureFile):
    """Distil students from a mixture of your own, with a report. Stopped and called again, it goes on."""

    image_shape: ImageShape = None
    """Show samples as grey images of this shape."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw samples from a distilled student."""

    folder: Folder
    """Folder of a finished job."""
    n: int = 64
    """Number of samples."""
    grid: str | None = None
    """Whose student; none takes the one with the smallest error."""
    seed: int = 0
    """Seed of the noise."""
    out: Path | None = None
    """File to write, .npy; none puts it into the job's folder."""
    json: bool = False
    """Print what was written as JSON on stdout."""


@dataclass(frozen=True, kw_only=True)
class Stability(MixtureFile):
    """Show how hard a mixture's flow is: stability profile, regimes, crossover times and grids."""

    segments: int = 4
    """Segments of the grids."""
    grid: Grids = ("uniform", "balanced", "signed", "measured")
    """Grids to compare."""
    beta: float = 5.0
    """Constant rate of the forward process, per unit of time."""
    horizon: float = 1.0
    """Time at which the noise starts."""
    plot: Plot = None
    """Draw the profile into FILE, .png, .svg or .pdf; stability.png when FILE is left out."""
    json: bool = False
    """Print the numbers as JSON on stdout, and nothing else there."""


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say what is built, what would be used, and test it in ten seconds. Exit code 1 when a check fails."""

    json: bool = False
    """Print the findings as JSON on stdout."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Draw the report of a finished job again from its stored results: the same bytes."""

    folder: Folder
    """Folder of a finished job."""
    json: bool = False
    """Print the report's path as JSON on stdout."""


Command = (
    Annotated[Digits, subcommand("digits")]
    | Annotated[Distill, subcommand("distill")]
    | Annotated[Sample, subcommand("sample")]
    | Annotated[Stability, subcommand("stability")]
    | Annotated[Doctor, subcommand("doctor")]
    | Annotated[Report, subcommand("report")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; None takes the process's.

    Returns:
        Exit code: 0 done, 1 the run failed, 2 the call was wrong, 130 stopped by Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments == ["--version"]:
            from importlib.metadata import version

            print(f"flowfast {version('flowfast')}")
            return 0
        command = _parse(arguments)
        if command is None:
            return 0
        # Read when torch is loaded, just below. Threads that spin while they wait slow a training tenfold as soon as
        # another program wants the same cores; threads that sleep cost a tenth of the speed at most.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from flowfast import cli_commands

        return cli_commands.run(command)
    except UsageError as error:
        return _complain(str(error), 2)
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        return _complain("stopped; finished stages are kept: the same call goes on", 130)
    except Exception as error:
        if os.environ.get("FLOWFAST_TRACEBACK"):
            raise
        known = isinstance(error, RuntimeError | OSError | ValueError | ModuleNotFoundError)
        hint = "" if known else " (a bug: FLOWFAST_TRACEBACK=1 shows where)"
        return _complain(f"{'' if known else type(error).__name__ + ': '}{error}{hint}", 1)


def _complain(message: str, code: int) -> int:
    print(f"flowfast: {' '.join(message.split())}", file=sys.stderr)
    return code


def _parse(arguments: Sequence[str]) -> Command | None:
    """The command that the arguments spell; None when they asked for help, which tyro has printed."""
    screen = io.StringIO()
    try:
        with contextlib.redirect_stderr(screen):
            return tyro.cli(
                Command,
                prog="flowfast",
                description="Exact Gaussian-mixture flows, and few-step students distilled from them.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            return None
        raise UsageError(_first_sentence(screen.getvalue())) from stop


def _first_sentence(box: str) -> str:
    """What went wrong, out of the box that tyro draws around it: a title, a rule, the sentence, a rule, hints."""
    lines = [line.strip(" │|") for line in box.splitlines()[1:]]
    ruled = [not line or line.startswith(("─", "-----", "╰", "+--")) for line in lines]
    first = ruled.index(False) if False in ruled else 0
    last = ruled.index(True, first) if True in ruled[first:] else len(lines)
    return f"{' '.join(' '.join(lines[first:last]).split()).rstrip('.')}; flowfast --help lists commands and options"
