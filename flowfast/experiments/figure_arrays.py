"""Arrays behind the report's figures, computed once so that a report is drawn from stored numbers only."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowfast.experiments import stages
from flowfast.experiments.stages import Work
from flowfast.grids import measured_spread
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess
from flowfast.stability import profile_terms, stability_profile

SCATTER_POINTS = 300
PRINCIPAL_POINTS = 2_048
LEVELS = 201
PROFILE_POINTS = 400
MEASURED_POINTS = 80


def figure_arrays(work: Work) -> dict[str, Tensor]:
    """The arrays described at `JobResult.arrays`."""
    arrays = profile_arrays(work.mixture, work.process, work.settings.horizon)
    arrays["error_levels"] = torch.linspace(0, 1, LEVELS, dtype=torch.float64)
    outputs = {"teacher": stages.teacher_points(work)["data"]}
    for kind in work.settings.grids:
        stored = stages.student_points(work, kind)
        outputs[f"student_{kind}"] = stored["student"]
        arrays[f"errors_{kind}"] = torch.quantile(stored["errors"].double(), arrays["error_levels"])
    if work.settings.image_shape is not None:
        return arrays | {name: x[: work.settings.pictures] for name, x in outputs.items()}
    axes, origin, explained = principal_axes(outputs["teacher"])
    for name, x in outputs.items():
        arrays[name] = (x[:SCATTER_POINTS].double() - origin) @ axes.T
    return arrays | {"explained": explained}


def profile_arrays(mixture: GaussianMixture, process: OUProcess, horizon: float) -> dict[str, Tensor]:
    """The stability profile for a figure.

    Returns:
        profile_t, profile (q,): L(t). measured_t, measured (p,): the same with the worst case D^2/4 replaced by the
        mixture's own mean trace of the posterior covariance, as the measured grid has it.
    """
    t = profile_times(mixture, process, horizon)
    sparse = t[torch.linspace(0, len(t) - 1, MEASURED_POINTS).round().long()]
    contraction, _ = profile_terms(mixture, process, sparse)
    spread = measured_spread(mixture, process, sparse, points=256)
    measured = contraction + process.beta(sparse) * spread / process.std(sparse, mixture.std) ** 4
    return {
        "profile_t": t,
        "profile": stability_profile(mixture, process, t),
        "measured_t": sparse,
        "measured": measured,
    }


def profile_times(mixture: GaussianMixture, process: OUProcess, horizon: float, n: int = PROFILE_POINTS) -> Tensor:
    """Times (n,) for a curve on a logarithmic axis: from where the data's own std still rules up to the horizon."""
    t = horizon * torch.logspace(-15, 0, 3001, dtype=torch.float64)
    t[-1] = horizon
    sigma0 = float(mixture.std.detach())
    early = process.std(t, sigma0) <= 1.02 * sigma0
    first = float(t[early][-1]) if sigma0 < 0.9 and bool(early.any()) else 1e-3 * horizon
    times = torch.logspace(math.log10(first), math.log10(horizon), n, dtype=torch.float64)
    times[-1] = horizon
    return times


def principal_axes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first two principal axes of the points x (n, d).

    Returns:
        axes (2, d), the second zero when there is none; origin (d,), the mean; explained (2,), shares of the variance.
    """
    x = x[:PRINCIPAL_POINTS].double()
    origin = x.mean(0)
    _, sizes, rows = torch.linalg.svd(x - origin, full_matrices=False)
    found = min(2, len(rows))
    rows = rows[:found]
    signs = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()  # a sign that does not hang on the SVD's
    axes, explained = x.new_zeros(2, x.shape[1]), x.new_zeros(2)
    axes[:found] = rows * signs
    explained[:found] = sizes[:found].square() / sizes.square().sum().clamp_min(1e-300)
    return axes, origin, explained
