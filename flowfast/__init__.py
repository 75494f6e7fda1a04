"""Exact Gaussian-mixture scores and probability flows, and few-step students distilled from them."""

from flowfast.flow import FlowSolution, flow_map, solve_flow
from flowfast.grids import time_grid
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

__version__ = "0.1.0"
