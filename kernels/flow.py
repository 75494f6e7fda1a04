"""Whole trajectories of the probability flow on chip: dz/du = a z + b mubar(c z, r), from tables of numbers (Eq. 6).

    x            (n, d)             float32 or float64, any strides
    means        (k, d)             like x, centred by `center` (d,); log_weights (k,), -inf = there is no component
    ends         (4,) or (4, n)     float64: r_from, s_from, r_to, s_to; z = x / s_from - r_from center
    h            (m,), coefficients (m, S, 4): a, b, c, r of every stage; tableau (S + 3, S), see flowfast/tableaux.py
    draw         (seed, first_row)  x is not read: row i starts at s_from times the normals of row first_row + i

One program carries BLOCK_N trajectories through all their steps. `form` says how: in the span of the means (state of k
numbers), in full (state of d numbers, means streamed), or, where neither fits on chip, one posterior pass per
evaluation from the host. Adaptive steps have a size, a status and a count of their own per row; a tile loops until
its last row has ended. No row depends on its neighbours or on the launch. Extra memory: the packed mixture, twice the
means; from the host S + 8 arrays of a chunk of rows instead, and x where it is drawn.

Accuracy: that of flow_map's contract, tests/tolerances.py. Logits and states have the dtype of x; starts and ends are
formed in float64. Range: |x| / s below 1e18 in float32. A row of x that is not finite gives NaN and status 2, one that
outgrows the range while it is integrated too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from . import flow_host
from .flow_prepare import prepare_center, prepare_ends, prepare_mixture, step_table
from .flow_steps import flow_adaptive_kernel, flow_fixed_kernel
from .launch import Launch, Variant, gpu_name, launch, rows
from .random import draw_normals

Draw = tuple[int, int]

# The tableau for which `variants` are compiled, flowfast.tableaux.DORMAND_PRINCE: registers depend on it.
_WEIGHTS = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0)
COMPILED = (
    (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    (1 / 5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    (3 / 40, 9 / 40, 0.0, 0.0, 0.0, 0.0, 0.0),
    (44 / 45, -56 / 15, 32 / 9, 0.0, 0.0, 0.0, 0.0),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0.0, 0.0, 0.0),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0.0, 0.0),
    _WEIGHTS,
    (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    _WEIGHTS,
    (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)

# What is launched in practice, by name: whether ends are given per row, and whether starts are drawn.
STARTS = (
    ("fixed", False, False), ("adaptive", False, False), ("adaptive, ends per row", True, False),
    ("adaptive, drawn", False, True),
)  # fmt: skip

DRAWN_SPILLS = 16  # bytes of a thread at most that are spilled where starts are drawn


def form(k: int, d: int, dtype: torch.dtype, device: torch.device | None = None) -> str:
    """How k components in d dimensions are integrated: "span", "full", or "host" where no state fits on chip.

    float64 goes through the host from compute capability 10.0 on: Triton has no tensor-core product for it there, and
    without one the state does not fit.
    """
    if dtype == torch.float64 and device is not None and device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (10, 0):
            return "host"
    span, full = k <= _most("flow_span", dtype), d <= _most("flow_full", dtype)
    if span and full:  # products of k x k against two of k x d, in whole tiles
        return "span" if max(16, triton.next_power_of_2(k)) <= max(16, triton.next_power_of_2(d)) else "full"
    return "span" if span else "full" if full else "host"


def _most(table: str, dtype: torch.dtype) -> int:
    """Largest size on chip: of d, or of k in the span form, in whose table `most_d` counts components."""
    most: int = max(row["most_d"] for row in rows(table) if row["gpu"] == "*" and row["dtype"] == str(dtype)[6:])
    return most


def _launch(how: str, k: int, d: int, dtype: torch.dtype, gpu: str) -> Launch:
    return launch(f"flow_{how}", dtype, k if how == "span" else d, gpu)


def flow_fixed(
    x: Tensor, means: Tensor, log_weights: Tensor, center: Tensor, ends: Tensor, h: Tensor, coefficients: Tensor,
    tableau: Tensor, *, draw: Draw | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run m steps of the tables: end points (n, d), contiguous, and status int8 (n,), 0 success or 2 not finite.

    Raises:
        ValueError: draw together with ends per row.
    """
    (n, d), k = x.shape, means.shape[0]
    out, status = _empty(x, (n, d), x.dtype), _empty(x, (n,), torch.int8)
    how = form(k, d, x.dtype, x.device)
    if how == "host":
        start = _starts(x, ends, draw)
        return flow_host.flow_fixed(start, means, log_weights, center, ends, h, coefficients, tableau, out, status)
    table, phi = step_table(h, coefficients, tableau)
    setting = _launch(how, k, d, x.dtype, gpu_name(x.device))
    shared = _shared(x, means, log_weights, center, ends, phi, draw, how, setting)
    if n:
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            flow_fixed_kernel[(triton.cdiv(n, setting.blocks["BLOCK_N"]),)](
                **shared, out_ptr=out, table_ptr=table.to(x), steps=len(h), status_ptr=status, n=n, k=k, d=d,
                STAGES=tableau.shape[1], num_warps=setting.warps, num_stages=setting.stages,
            )  # fmt: skip
    return out, status


def flow_adaptive(
    x: Tensor, means: Tensor, log_weights: Tensor, center: Tensor, ends: Tensor, tableau: Tensor, rtol: float,
    atol: float, max_steps: int, *, draw: Draw | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Integrate dz/dr = mubar(z, r) with an embedded pair of order 5(4) and one step size per trajectory.

    Returns:
        End points (n, d), status int8 (n,): 0 success, 1 max_steps, 2 not finite, 3 step below rounding; attempted
        steps and evaluations of mubar, int32 (n,).

    Raises:
        ValueError: draw together with ends per row.
    """
    (n, d), k = x.shape, means.shape[0]
    out, status = _empty(x, (n, d), x.dtype), _empty(x, (n,), torch.int8)
    steps, evaluations = _empty(x, (n,), torch.int32), _empty(x, (n,), torch.int32)
    how = form(k, d, x.dtype, x.device)
    radius = torch.linalg.vector_norm(means, dim=1, dtype=torch.float64).max()
    if how == "host":
        return flow_host.flow_adaptive(
            _starts(x, ends, draw), means, log_weights, center, ends, tableau, rtol, atol, max_steps, 1 / radius,
            out, status, steps, evaluations,
        )  # fmt: skip
    setting = _launch(how, k, d, x.dtype, gpu_name(x.device))
    shared = _shared(x, means, log_weights, center, ends, 1.0, draw, how, setting)
    if n:
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            flow_adaptive_kernel[(triton.cdiv(n, setting.blocks["BLOCK_N"]),)](
                **shared, out_ptr=out, reach_ptr=1 / radius, rtol=rtol, atol=atol, opening=0.5 * rtol**0.2,
                max_steps=max_steps, status_ptr=status, steps_ptr=steps, evaluations_ptr=evaluations, n=n, k=k, d=d,
                **_tableau(tableau), num_warps=setting.warps, num_stages=setting.stages,
            )  # fmt: skip
    return out, status, steps, evaluations


def _empty(like: Tensor, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device=like.device)


def _starts(x: Tensor, ends: Tensor, draw: Draw | None) -> Tensor:
    """Starting points for the host."""
    if draw is None:
        return x
    _check_draw(ends)
    return draw_normals(x.shape[0], x.shape[1], draw[0], draw[1], dtype=x.dtype, device=x.device) * ends[1].to(x)


def _check_draw(ends: Tensor) -> None:
    if ends.ndim != 1:
        raise ValueError(f"ends: got shape {tuple(ends.shape)} with drawn starts, expected (4,): give x or one time")


def _shared(
    x: Tensor, means: Tensor, log_weights: Tensor, center: Tensor, ends: Tensor, phi: float, draw: Draw | None,
    how: str, setting: Launch,
) -> dict[str, Any]:  # fmt: skip
    """Arguments that both kernels have."""
    if draw is not None:
        _check_draw(ends)
    span, blocks = how == "span", setting.blocks
    mixture = prepare_mixture(means, log_weights, blocks["BLOCK_K"], blocks["BLOCK_D"], span=span)
    seed, first_row = draw or (0, 0)
    return {
        **{f"{name}_ptr": value for name, value in mixture._asdict().items()},
        "x_ptr": x, "stride_xn": x.stride(0), "stride_xd": x.stride(1),
        "center_ptr": prepare_center(center, blocks["BLOCK_D"]),
        "ends_ptr": prepare_ends(ends.to(x.device), phi, span=span, drawn=draw is not None),
        "seed": seed, "first_row": first_row,
        **_flags(span=span, per_row=ends.ndim == 2, draw=draw is not None, blocks=blocks),
    }  # fmt: skip


def _flags(*, span: bool, per_row: bool, draw: bool, blocks: Mapping[str, int]) -> dict[str, Any]:
    return {"SPAN": span, "PER_ROW": per_row, "DRAW": draw, **blocks}


def _tableau(tableau: Tensor) -> dict[str, Any]:
    """The tableau as compile-time numbers: its zeros cost nothing and its numbers no registers."""
    stages = tableau.shape[1]
    reuse = bool(tableau[stages - 1].equal(tableau[stages + 1]))  # the last stage is the next step's first
    return {"TABLEAU": tuple(tuple(row) for row in tableau.tolist()), "STAGES": stages, "REUSE": int(reuse)}


def variants() -> list[Variant]:
    """Every row of the tables as it is launched, with strides and sizes as little specialised as they can be.

    Fixed steps have the 4 stages of the classical method, step-size control the pair of Dormand and Prince.
    """
    found = []
    for how in ("span", "full"):
        for row in rows(f"flow_{how}"):
            setting = Launch(row["blocks"], row["warps"], row["stages"])
            name = f"flow {how} <= {row['most_d']} {row['dtype']} {row['gpu']}"
            for kind, per_row, draw in STARTS:
                adaptive = kind != "fixed"
                kernel = flow_adaptive_kernel if adaptive else flow_fixed_kernel
                constants = _flags(span=how == "span", per_row=per_row, draw=draw, blocks=setting.blocks)
                constants |= {"TABLEAU": COMPILED, "STAGES": 7, "REUSE": 1} if adaptive else {"STAGES": 4}
                types = {arg: _type(arg, row["dtype"]) for arg in kernel.arg_names if arg not in constants}
                chips = (80, 90) if row["dtype"] == "float64" else (80, 90, 100)
                spills = DRAWN_SPILLS if draw else 0
                found.append(Variant(f"{name} {kind}", kernel, types, constants, setting, True, chips, spills))
    return found


def _type(argument: str, dtype: str) -> str:
    exact = {
        "center_ptr": "*fp64", "ends_ptr": "*fp64", "reach_ptr": "*fp64", "status_ptr": "*i8", "steps_ptr": "*i32",
        "evaluations_ptr": "*i32", "rtol": "fp32", "atol": "fp32", "opening": "fp32", "seed": "i64", "first_row": "i64",
    }  # fmt: skip
    if argument in exact:
        return exact[argument]
    return ("*fp32" if dtype == "float32" else "*fp64") if argument.endswith("_ptr") else "i32"
