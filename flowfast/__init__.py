"""Exact Gaussian-mixture scores and probability flows, and few-step students distilled from them.

The public names below are imported on first use, so that the command line can answer before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowfast.dataset import TeacherDataset, generate_dataset
    from flowfast.distillation import Evaluation, Recipe, distill, evaluate
    from flowfast.ensemble import Ensemble
    from flowfast.flow import FlowSolution, flow_map, solve_flow
    from flowfast.grids import time_grid
    from flowfast.hessian import divergence, hessian_norm_bound
    from flowfast.metrics import relative_mse
    from flowfast.mixture import GaussianMixture
    from flowfast.modules import MixtureScore
    from flowfast.ops import (
        covariance_trace,
        denoise,
        hessian_vector_product,
        log_density,
        posterior_mean,
        posterior_weights,
        score,
        velocity,
    )
    from flowfast.process import OUProcess
    from flowfast.stability import (
        StabilityRegimes,
        cumulative_stability,
        signed_stability,
        stability_profile,
        stability_regimes,
    )
    from flowfast.students import MLP, FlowStudent, ResidualFlowMap, TransformerFlowMap
    from flowfast.teacher_pairs import PairSource, ScoreTarget, SegmentTarget, TeacherPairs, relative_errors
    from flowfast.theory import ConstructiveScoreNet, ResidualComposition, audit_network
    from flowfast.theory.lipschitz import lipschitz_constant, log_lipschitz_bound
    from flowfast.theory.mismatch import LipschitzMismatch, lipschitz_mismatch
    from flowfast.variational import flow_amplification, flow_jacobian_product

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "ConstructiveScoreNet",
    "Ensemble",
    "Evaluation",
    "FlowSolution",
    "FlowStudent",
    "GaussianMixture",
    "LipschitzMismatch",
    "MixtureScore",
    "OUProcess",
    "PairSource",
    "Recipe",
    "ResidualComposition",
    "ResidualFlowMap",
    "ScoreTarget",
    "SegmentTarget",
    "StabilityRegimes",
    "TeacherDataset",
    "TeacherPairs",
    "TransformerFlowMap",
    "audit_network",
    "covariance_trace",
    "cumulative_stability",
    "denoise",
    "distill",
    "divergence",
    "evaluate",
    "flow_amplification",
    "flow_jacobian_product",
    "flow_map",
    "generate_dataset",
    "hessian_norm_bound",
    "hessian_vector_product",
    "lipschitz_constant",
    "lipschitz_mismatch",
    "log_density",
    "log_lipschitz_bound",
    "posterior_mean",
    "posterior_weights",
    "relative_errors",
    "relative_mse",
    "score",
    "signed_stability",
    "solve_flow",
    "stability_profile",
    "stability_regimes",
    "time_grid",
    "velocity",
]

_ROOMS = (
    "ops", "hessian", "modules", "flow", "mixture", "process", "stability", "grids", "students", "dataset",
    "distillation", "metrics", "ensemble", "teacher_pairs", "theory", "variational",
    "theory.mismatch", "theory.lipschitz",
)  # fmt: skip


def __getattr__(name: str) -> object:
    """Find a public name in the room that defines it."""
    if name in __all__:
        for room in _ROOMS:
            module = import_module(f"flowfast.{room}")
            if hasattr(module, name):
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module 'flowfast' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted([*globals(), *__all__])
