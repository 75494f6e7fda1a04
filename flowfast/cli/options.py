"""Commands and options as frozen dataclasses, from which tyro makes the command line. Nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg, subcommand

from flowfast.cli.theory_options import Theory

Grids = Annotated[tuple[str, ...], arg(metavar="KIND [KIND ...]")]
ImageShape = Annotated[tuple[int, int] | None, arg(metavar="HEIGHT WIDTH")]
Tables = Annotated[tuple[int, ...], arg(metavar="NUMBER [NUMBER ...]")]
Teachers = Annotated[tuple[str, ...], arg(metavar="TEACHER [TEACHER]")]
Filters = Annotated[tuple[str, ...], arg(metavar="FILTER [FILTER ...]")]
Folder = Positional[Annotated[Path, arg(metavar="FOLDER")]]
SetFolder = Positional[Annotated[str, arg(metavar="FOLDER")]]  # text: a Path would spoil the address of a remote store
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
    """Teacher pairs stored per segment of a grid."""
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
class Distill(JobOptions):
    """Distil students from a mixture of your own, with a report. Stopped and called again, it goes on."""

    means: Path | None = None
    """Means (k, d) as .npy or .csv, or a mixture as .npz or .safetensors (means, std, weights)."""
    std: float | None = None
    """Standard deviation of every component; none takes the file's."""
    data: str | None = None
    """Teacher set made by `flowfast generate`, in place of --means: its mixture, process, time grid and pairs."""
    image_shape: ImageShape = None
    """Show samples as grey images of this shape."""


@dataclass(frozen=True, kw_only=True)
class Reproduce:
    """Run the published tables again. Stopped and called again, it goes on; further calls may add tables and seeds."""

    out: Path = Path("runs/tables")
    """Folder of results."""
    tables: Tables = (1, 2, 3, 4, 5)
    """Which tables."""
    seeds: int = 1
    """Runs per cell; the published tables have 10."""
    teacher: Teachers = ("exact",)
    """Teacher of Tables 3 to 5: exact, paper, or both."""
    scale: float = 1.0
    """Share of the published optimiser steps, batch and evaluation points; below 1 a rehearsal."""
    only: Filters = ()
    """Only cells that agree with one of these, such as "sigma0=1, t=0.9"."""
    device: str = "cpu"
    """Where to train: cpu or cuda."""
    precision: str = "float32"
    """Of the training steps: float32, tf32 or bf16."""
    student: str = "transformer"
    """Student of Table 4: transformer or residual."""
    members: int | None = None
    """Students trained together at most; none chooses by device."""
    jobs: int | None = None
    """Processes on this machine; none is one per core on the CPU, with one thread each, and one on a GPU."""
    engine: Literal["local", "ray"] = "local"
    """Who works: this machine, or a Ray cluster. RANK and WORLD_SIZE, or a SLURM array, divide runs without either."""
    address: str | None = None
    """Of the Ray cluster, such as auto; none takes RAY_ADDRESS, or starts Ray on this machine alone."""
    json: bool = False
    """Print what was done as JSON on stdout, and nothing else there."""


@dataclass(frozen=True, kw_only=True)
class Generate(MixtureFile):
    """Store exact teacher pairs of a mixture of your own. Stopped and called again, it goes on."""

    out: str
    """Folder of the set, or an address that fsspec knows: s3://bucket/set, sftp://host/set, ..."""
    rows: int
    """Teacher pairs in all; row i belongs to segment i modulo segments."""
    segments: int = 4
    """Segments of the time grid."""
    grid: Literal["uniform", "balanced", "signed", "measured"] = "measured"
    """Time grid."""
    random_times: bool = False
    """A pair of times of its own for every row, t_from uniform up to the horizon and t_to below it; no grid."""
    beta: float = 5.0
    """Constant rate of the forward process, per unit of time."""
    horizon: float = 1.0
    """Time at which the noise starts."""
    seed: int = 0
    """Seed of the starting points."""
    dtype: Literal["float32", "float64"] | None = None
    """Of the numbers; none takes the means'."""
    rows_per_shard: int | None = None
    """Pairs per file; none takes 262144, or what 128 MiB hold."""
    backend: str = "auto"
    """Teacher's backend: auto, cpp, triton, reference."""
    engine: Literal["local", "ray"] = "local"
    """Who computes: this machine, or the Ray cluster at RAY_ADDRESS. RANK or a SLURM array divides the shards, too."""
    workers: int | None = None
    """Processes of one thread each; 1 computes in this one on all threads. None chooses."""
    dry_run: bool = False
    """Say what would be stored, how long it would take, and what decides that; store nothing."""
    json: bool = False
    """Print what was done as JSON on stdout, and nothing else there."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Read a teacher set and compare every file with its receipt. Exit code 1 when something is wrong."""

    folder: SetFolder
    """Folder of the set."""
    repair: bool = False
    """Make bad and missing shards again, the same bytes, and remove unfinished files."""
    rebuild: bool = False
    """Write manifest.json anew from the receipts."""
    json: bool = False
    """Print the findings as JSON on stdout."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a teacher set in a format that other programs read."""

    folder: SetFolder
    """Folder of the set."""
    format: Literal["parquet", "npy"] = "parquet"
    """One Parquet file (needs pyarrow), or a folder of .npy arrays."""
    out: Path | None = None
    """File or folder to write; none takes the set's name with .parquet or -npy."""
    json: bool = False
    """Print what was written as JSON on stdout."""


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
    """Draw a report again from stored results: the same bytes."""

    folder: Folder
    """Folder of a finished job, or of results of `flowfast reproduce`."""
    json: bool = False
    """Print the report's path as JSON on stdout."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Show what moved between two benchmark files (`make bench` in the source tree writes them)."""

    action: Positional[Literal["compare"]]
    """What to do: compare."""
    before: Positional[Annotated[Path, arg(metavar="BEFORE")]]
    """Results of the earlier run, .json."""
    after: Positional[Annotated[Path, arg(metavar="AFTER")]]
    """Results of the later run, .json."""
    json: bool = False
    """Print the comparison as JSON on stdout."""


Command = (
    Annotated[Digits, subcommand("digits")]
    | Annotated[Distill, subcommand("distill")]
    | Annotated[Reproduce, subcommand("reproduce")]
    | Annotated[Generate, subcommand("generate")]
    | Annotated[Verify, subcommand("verify")]
    | Annotated[Export, subcommand("export")]
    | Annotated[Sample, subcommand("sample")]
    | Annotated[Stability, subcommand("stability")]
    | Annotated[Doctor, subcommand("doctor")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Theory, subcommand("theory")]
)
