"""Exact Gaussian-mixture scores and probability flows, and few-step students distilled from them."""

from flowfast.dataset import TeacherDataset, generate_dataset
from flowfast.distill import Evaluation, Recipe, distill, evaluate
from flowfast.flow import FlowSolution, flow_map, solve_flow
from flowfast.grids import time_grid
from flowfast.metrics import relative_mse
from flowfast.mixture import GaussianMixture
from flowfast.ops import (
    covariance_trace,
    denoise,
    hessian_norm_bound,
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
from flowfast.students import MLP, FlowStudent

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "Evaluation",
    "FlowSolution",
    "FlowStudent",
    "GaussianMixture",
    "OUProcess",
    "Recipe",
    "StabilityRegimes",
    "TeacherDataset",
    "covariance_trace",
    "cumulative_stability",
    "denoise",
    "distill",
    "evaluate",
    "flow_map",
    "generate_dataset",
    "hessian_norm_bound",
    "hessian_vector_product",
    "log_density",
    "posterior_mean",
    "posterior_weights",
    "relative_mse",
    "score",
    "signed_stability",
    "solve_flow",
    "stability_profile",
    "stability_regimes",
    "time_grid",
    "velocity",
]
