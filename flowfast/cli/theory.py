"""`flowfast theory`: a function that measures and one that makes tables of it, for each topic."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from rich.table import Table

from flowfast.cli import tables, theory_lipschitz, theory_stability
from flowfast.cli.theory_options import Composition, Lipschitz, PaperMixture, PredictStability, ScoreNet, Theory
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.report.numbers import SUPERSCRIPTS, number, short
from flowfast.theory.composition_measure import Window, composition_rows, learned_rows
from flowfast.theory.measure import linear_law, power_law, rate, score_net_rows

Numbers = Mapping[str, Any]


def mixture_of(options: PaperMixture) -> GaussianMixture:
    """The mixture that the options name."""
    if options.means is not None:
        return GaussianMixture.load(options.means, std=options.std)
    return GaussianMixture.random(20, 64, std=1.0 if options.std is None else options.std, seed=0)


def about(mixture: GaussianMixture, options: PaperMixture) -> dict[str, Any]:
    """What all topics say of their mixture and process."""
    return {
        "components": mixture.n_components,
        "dim": mixture.dim,
        "std": float(mixture.std),
        "beta": options.beta,
        "seed": options.seed,
    }


def _score_net(options: ScoreNet) -> Numbers:
    mixture, process = mixture_of(options), OUProcess(options.beta)
    _check_lists(t=options.t, eps=options.eps)
    times = []
    for t in options.t:
        rows = score_net_rows(mixture, process, t, options.eps, n=options.n, seed=options.seed)
        laws = {
            "depth": linear_law(options.eps, [row.depth for row in rows]),
            "nonzero": linear_law(options.eps, [row.nonzero for row in rows]),
            "width": power_law(options.eps, [row.width for row in rows]),
        }
        times.append(
            {"t": t, "rows": [asdict(row) for row in rows], "laws": {name: asdict(law) for name, law in laws.items()}}
        )
    return {**about(mixture, options), "points": options.n, "times": times}


def _score_net_tables(numbers: Numbers) -> list[Table]:
    found = []
    for one in numbers["times"]:
        table = tables.of_numbers(
            f"Theorem 1: {_place(numbers)}, t = {short(one['t'])}; {numbers['points']:,} fresh points",
            ("eps", "relative L² error", "depth", "width", "largest weight", "weights ≠ 0", "weights in all"),
            [
                (short(row["eps"]), number(row["error"]), str(row["depth"]), str(row["width"]),
                 number(row["largest_weight"]), f"{row['nonzero']:,}", f"{row['total']:,}")
                for row in one["rows"]
            ],
        )  # fmt: skip
        depth, nonzero, width = (one["laws"][name] for name in ("depth", "nonzero", "width"))
        table.caption = (
            f"depth ≤ {number(depth['factor'])} log₂(1/eps) + {number(depth['offset'], 4)}\n"
            f"weights ≠ 0: ≤ {number(nonzero['factor'])} log₂(1/eps) + {number(nonzero['offset'], 4)}\n"
            f"width ≤ {number(width['factor'])} log₂(1/eps)^{short(width['power'])}"
        )
        found.append(table)
    return found


def _composition(options: Composition) -> Numbers:
    mixture, process = mixture_of(options), OUProcess(options.beta)
    _check_lists(t_to=options.t_to, blocks=options.blocks, eps=options.eps)
    windows = []
    for t_to in options.t_to:
        window = Window.of(mixture, process, 1.0, t_to, n=options.n, seed=options.seed)
        rows = composition_rows(window, options.blocks, options.eps)
        finest = [row for row in rows if row.eps == min(options.eps)]
        rates = {name: rate(options.blocks, [getattr(row, name) for row in finest]) for name in ("error", "median")}
        learned = learned_rows(window, options.learned_blocks, steps=options.steps, seed=options.seed)
        windows.append(
            {"t_from": window.t_from, "t_to": t_to, "bound": asdict(window.bound), "rates": rates}
            | {"rows": [asdict(row) for row in rows], "learned": [asdict(row) for row in learned]}
        )
    return {**about(mixture, options), "points": options.n, "steps": options.steps, "windows": windows}


def _composition_tables(numbers: Numbers) -> list[Table]:
    found = []
    for one in numbers["windows"]:
        place = f"{_place(numbers)}, t from {short(one['t_from'])} to {short(one['t_to'])}"
        built = tables.of_numbers(
            f"Theorem 3: {place}; {numbers['points']:,} fresh points",
            ("blocks N", "eps", "relative L² error", "median", "bound", "depth", "weights ≠ 0"),
            [
                (str(row["blocks"]), short(row["eps"]), number(row["error"]), number(row["median"]),
                 _power(row["log10_bound"]), f"{row['depth']:,}", f"{row['nonzero']:,}")
                for row in one["rows"]
            ],
        )  # fmt: skip
        bound, rates = one["bound"], one["rates"]
        built.caption = (
            f"bound: exp({number(bound['exponent'])}) ({number(bound['drift'])} / N + {number(bound['scores'])} eps)\n"
            f"at the smallest eps the error falls like N^−{number(rates['error'])}, the median like "
            f"N^−{number(rates['median'])}"
        )
        learned = tables.of_numbers(
            f"The same with learned blocks, {numbers['steps']:,} steps each",
            ("blocks N", "learned", "error of the scores", "relative L² error", "median"),
            [
                (str(row["blocks"]), row["target"], *(number(row[name]) for name in ("score_error", "error", "median")))
                for row in one["learned"]
            ],
        )
        found += [built, learned] if one["learned"] else [built]
    return found


def _check_lists(**lists: tuple[Any, ...]) -> None:
    for name, values in lists.items():
        if not values:
            raise ValueError(f"{name} must hold one number at least")


def _place(numbers: Numbers) -> str:
    return f"k = {numbers['components']}, d = {numbers['dim']}, std = {short(numbers['std'])}"


def _power(log10: float) -> str:
    """A number given by its decimal logarithm, however large."""
    return number(10**log10) if abs(log10) < 6 else f"10{str(round(log10)).translate(SUPERSCRIPTS)}"


def _stability(options: PredictStability) -> Numbers:
    mixture = mixture_of(options)
    return {**about(mixture, options), "points": options.n, "grids": theory_stability.measure(mixture, options)}


# Options of a topic: what measures it (plain numbers, as --json prints them), and what shows these as tables.
TOPICS: dict[type, tuple[Callable[[Any], Numbers], Callable[[Numbers], list[Table]]]] = {
    ScoreNet: (_score_net, _score_net_tables),
    Composition: (_composition, _composition_tables),
    Lipschitz: (theory_lipschitz.measure, theory_lipschitz.show),
    PredictStability: (_stability, theory_stability.show),
}


def run(command: Theory) -> int:
    """Measure the topic, print its tables or its numbers as JSON, and return the exit code."""
    measure, show = TOPICS[type(command.topic)]
    numbers = measure(command.topic)
    if command.topic.json:
        print(json.dumps(numbers, indent=2, allow_nan=False))
    else:
        for table in show(numbers):
            tables.console().print(table)
    return 0
