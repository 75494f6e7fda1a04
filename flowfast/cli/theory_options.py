"""Options of `flowfast theory`, a dataclass per topic. Nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, arg, subcommand

Times = Annotated[tuple[float, ...], arg(metavar="TIME [TIME ...]")]
Accuracies = Annotated[tuple[float, ...], arg(metavar="EPS [EPS ...]")]
Counts = Annotated[tuple[int, ...], arg(metavar="NUMBER [NUMBER ...]")]


@dataclass(frozen=True, kw_only=True)
class PaperMixture:
    """The mixture of the paper's experiments, or one of the user's own."""

    means: Path | None = None
    """Means (k, d) as .npy or .csv, or a mixture as .npz or .safetensors; none takes the paper's, k = 20 and d = 64."""
    std: float | None = None
    """Standard deviation of every component; none takes the file's, or 1 for the paper's mixture."""
    beta: float = 5.0
    """Constant rate of the forward process, per unit of time."""
    seed: int = 0
    """Seed of everything random but the paper's means."""
    json: bool = False
    """Print the numbers as JSON on stdout, and nothing else there."""


@dataclass(frozen=True, kw_only=True)
class ScoreNet(PaperMixture):
    """Theorem 1: score networks that are built, not trained; their size and measured error for falling eps."""

    t: Times = (0.1, 0.5)
    """Times of the marginals, at least 0 (0 is data)."""
    eps: Accuracies = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10)
    """Accuracies asked for."""
    n: int = 10_000
    """Fresh points of the marginal on which errors are measured."""


@dataclass(frozen=True, kw_only=True)
class Composition(PaperMixture):
    """Theorem 3: residual compositions of such networks, built and learned; minutes of work with the defaults."""

    t_to: Times = (0.5, 0.0)
    """Times at which compositions end; they begin at 1, which is noise."""
    blocks: Counts = (4, 8, 16, 32, 64)
    """Numbers of blocks."""
    eps: Accuracies = (0.5, 0.1, 1e-6)
    """Accuracies of the score networks."""
    learned_blocks: Counts = (4, 8, 16)
    """Numbers of blocks that are trained instead of built."""
    steps: int = 500
    """Optimiser steps per trained block."""
    n: int = 1_000
    """Fresh points of noise on which errors are measured."""


@dataclass(frozen=True, kw_only=True)
class Lipschitz:
    """Theorem 2: Lipschitz constants of the flow's last stretch, and of networks, beside their bounds."""

    means: Path | None = None
    """Means (k, d) as .npy or .csv, or a mixture as .npz or .safetensors; none takes the paper's, k = 20 and d = 64."""
    stds: Annotated[tuple[float, ...], arg(metavar="STD [STD ...]")] = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001)
    """Standard deviations of the components, sigma0."""
    beta: float = 5.0
    """Constant rate of the forward process, per unit of time."""
    horizon: float = 1.0
    """Time at which the whole flow starts, from noise."""
    depth: int = 4
    """Hidden layers of the network."""
    width: int = 512
    """Units of each hidden layer."""
    bound: float = 0.1
    """Bound on the size of every entry of the network's weight matrices."""
    train: int = 0
    """Steps of training for a student per std, within the bound, whose constants are measured too; 0 trains none."""
    n: int = 1_000
    """Points at which constants are measured."""
    seed: int = 0
    """Seed of points and students."""
    json: bool = False
    """Print the numbers as JSON on stdout, and nothing else there."""


@dataclass(frozen=True, kw_only=True)
class PredictStability(PaperMixture):
    """Stability that predicts: exponents of both bounds, measured exponents and amplification of every segment."""

    segments: int = 4
    """Segments of the grids."""
    grid: Annotated[tuple[str, ...], arg(metavar="KIND [KIND ...]")] = ("uniform", "balanced", "measured")
    """Grids: uniform, balanced, signed, measured."""
    n: int = 512
    """Samples of each marginal."""
    nodes: int = 33
    """Times between noise and data at which amplification is measured; between them it is interpolated."""


TheoryTopic = (
    Annotated[ScoreNet, subcommand("score-net")]
    | Annotated[Composition, subcommand("composition")]
    | Annotated[Lipschitz, subcommand("lipschitz")]
    | Annotated[PredictStability, subcommand("stability")]
)


@dataclass(frozen=True, kw_only=True)
class Theory:
    """The theorems as measurements: what they promise beside what is found."""

    topic: OmitArgPrefixes[OmitSubcommandPrefixes[TheoryTopic]]
    """What to measure."""
