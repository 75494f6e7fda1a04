"""What the flow kernels read, made from tensors once per call: packed means, Gram matrix, ends, table of steps."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG2E = math.log2(math.e)


class Mixture(NamedTuple):
    """The components, padded to whole tiles: zeros for missing numbers, -inf for the log-weight of missing components.

    float32 matrices come in two pieces of 11 and at most 12 bits, high + low; of float64 both are the same tensor.

    Attributes:
        means, means_low: (D / BLOCK_D, K, BLOCK_D), a panel of columns after the other.
        gram, gram_low: (K, K) in the span form, of which the full form reads nothing.
        half_norms: (K,), |means|^2 / 2. log_weights: (K,), in units of ln 2.
    """

    means: Tensor
    means_low: Tensor
    gram: Tensor
    gram_low: Tensor
    half_norms: Tensor
    log_weights: Tensor


def prepare_mixture(means: Tensor, log_weights: Tensor, block_k: int, block_d: int, *, span: bool) -> Mixture:
    """Pack means (k, d) and log_weights (k,) for tiles of block_k components and block_d coordinates."""
    (k, d), dtype = means.shape, means.dtype
    rows, columns = -(-k // block_k) * block_k, -(-d // block_d) * block_d
    padded = means.new_zeros(rows, columns)
    padded[:k, :d] = means
    high, low = _pieces(padded.reshape(rows, -1, block_d).transpose(0, 1).contiguous())
    gram, gram_low = _pieces(padded.double() @ padded.double().T, dtype) if span else (high, low)
    half_norms = torch.linalg.vector_norm(padded, dim=1, dtype=torch.float64).square() / 2
    prior = log_weights.new_full((rows,), -math.inf)
    prior[:k] = log_weights * LOG2E
    return Mixture(high, low, gram, gram_low, half_norms.to(dtype), prior)


def _pieces(a: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    dtype = a.dtype if dtype is None else dtype
    if dtype == torch.float64:
        return a, a
    bits = a.float().view(torch.int32)
    high = ((bits + 0x1000) & -0x2000).view(torch.float32)  # rounded to 11 bits, as TF32 has them
    return high, (a - high).float()


def prepare_ends(ends: Tensor, phi: float, *, span: bool, drawn: bool) -> Tensor:
    """Rows R_FROM .. SHIFT of kernels/flow_forms.py, float64 (7,) or (7, n), from r_from, s_from, r_to, s_to.

    With drawn starts x = s_from times normals, and it is the normals that the kernel multiplies.
    """
    r_from, s_from, r_to, s_to = ends.double()
    keep = phi * s_to / s_from if span else torch.zeros_like(s_to)
    shift = s_to * r_to - keep * s_from * r_from
    alpha, rate = r_from * s_from, 1 / s_from
    if drawn:
        alpha, rate, keep = r_from, torch.ones_like(rate), keep * s_from
    return torch.stack([r_from, r_to, alpha, rate, keep, s_to, shift])


def prepare_center(center: Tensor, block_d: int) -> Tensor:
    """center (d,) as float64, padded with zeros to whole tiles."""
    padded = torch.zeros(-(-len(center) // block_d) * block_d, dtype=torch.float64, device=center.device)
    padded[: len(center)] = center
    return padded


def step_table(h: Tensor, coefficients: Tensor, tableau: Tensor) -> tuple[Tensor, float]:
    """The linear part a z of the field folded into the steps, in float64 on the CPU.

    z_j = (1 + rho_j) z + sum_l f_jl g_l, where g_l is mubar(c_l z_l, r_l): row j < S of a step holds rho_j, then gain
    r_j c_j / ln 2 and ratio r_j / c_j of its logits, then f_j.; row S is the step itself.

    Returns:
        The table (m, S + 1, S + 3), and phi, the product of all 1 + rho_S.
    """
    stages, steps = tableau.shape[1], len(h)
    h, coefficients, tableau = h.double().cpu(), coefficients.double().cpu(), tableau.double().cpu()
    table = torch.zeros(steps, stages + 1, stages + 3, dtype=torch.float64)
    a, b, c, r = coefficients.unbind(2)  # (m, S) each
    for j in range(stages + 1):
        butcher = tableau[j if j < stages else stages + 1]
        for i in range(min(j, stages)):
            weight = h * butcher[i]  # (m,)
            table[:, j, 0] += weight * a[:, i] * (1 + table[:, i, 0])
            table[:, j, 3:] += (weight * a[:, i])[:, None] * table[:, i, 3:]
            table[:, j, 3 + i] += weight * b[:, i]
    table[:, :stages, 1] = r * c * LOG2E
    table[:, :stages, 2] = r / c
    return table, float((1 + table[:, stages, 0]).prod())
