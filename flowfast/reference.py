"""Plain-torch bodies of every operation: the definition that the C++ and Triton bodies are tested against.

Row i of x sees the mixture of centres `alpha_i means_k` and standard deviation `std_i`. All arithmetic is float64,
whatever the dtype of x. At low noise the logits are huge (|x - m|^2 / 2 s^2, up to 1e19) and only their differences
matter: they come from dot products of split operands (`split_dot`), exact to about 2^-80. Everything is
differentiable to any order in x, means, log_weights, alpha and std. Equations: docs/math.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from flowfast.split_dot import Pair, product, split_distance, split_dot

CHUNK = 1 << 21  # rows are taken in chunks of about this many (row, component) pairs

SUCCESS, MAX_STEPS, NON_FINITE, STEP_UNDERFLOW = range(4)  # status of a trajectory
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0  # of the step-size controller


def _rowwise(body: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Run `body` in float64 on chunks of rows, alpha and std as columns (n, 1); the result has x's dtype.

    A compiled function, which should serve any number of rows, takes all of them at once.
    """

    @wraps(body)
    def run(x: Tensor, *rest: Tensor) -> Tensor:
        *more, means, log_weights, alpha, std = (tensor.double() for tensor in rest)
        rows = [x.double(), *more, alpha.expand(len(x))[:, None], std.expand(len(x))[:, None]]
        if torch.compiler.is_compiling():
            return body(*rows[:-2], means, log_weights, *rows[-2:]).to(x.dtype)
        size = max(1, CHUNK // means.shape[0])
        parts = []
        for i in range(0, max(1, len(x)), size):
            *part, a, s = (row[i : i + size] for row in rows) if len(x) > size else rows
            parts.append(body(*part, means, log_weights, a, s))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(x.dtype)

    return run


@_rowwise
def log_density(x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor) -> Tensor:
    """Log-density of the mixture at each row (Eq. 2): (n,)."""
    logits, top = _logits(x, means, log_weights, alpha, std)
    far = (x - alpha * means[top]).square().sum(1, keepdim=True) / (2 * std**2)  # (n, 1)
    volume = x.shape[1] * (std.log() + 0.5 * math.log(2 * math.pi))  # (n, 1)
    return log_weights[top] + logits.logsumexp(1) - (far + volume)[:, 0]


@_rowwise
def score(x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor) -> Tensor:
    """Gradient of the log-density (Eq. 3): (n, d)."""
    _, offset, top = _average(x, means, log_weights, alpha, std)
    return (alpha * means[top] - x + alpha * offset) / std**2


@_rowwise
def posterior_mean(x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor) -> Tensor:
    """Posterior average of the means, `sum_k gamma_k means_k` (Eq. 2): (n, d)."""
    _, offset, top = _average(x, means, log_weights, alpha, std)
    return means[top] + offset


@_rowwise
def covariance_trace(x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor) -> Tensor:
    """Trace of the posterior covariance of the means (Eq. 4): (n,)."""
    others, offset, top = _average(x, means, log_weights, alpha, std)
    squares = means.square().sum(1)  # (k,)
    away = squares - 2 * means[top] @ means.T + squares[top][:, None]  # (n, k) |means_k - means_top|^2
    exact = split_distance(means.detach()[top], means.detach())
    return (others * (away + (exact - away).detach())).sum(1) - offset.square().sum(1)


@_rowwise
def posterior_weights(x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor) -> Tensor:
    """Posterior probabilities of the components, also called responsibilities (Eq. 2): (n, k)."""
    return _logits(x, means, log_weights, alpha, std)[0].softmax(1)


@_rowwise
def hessian_vector_product(
    x: Tensor, v: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor
) -> Tensor:
    """Hessian of the log-density times v (Eq. 4), the Hessian never formed: (n, d)."""
    logits, top = _logits(x, means, log_weights, alpha, std)
    weights = logits.softmax(1)
    along = v @ means.T  # (n, k)
    along = along - along.gather(1, top[:, None])
    pull = weights * (along - (weights * along).sum(1, keepdim=True))  # (n, k), sums to zero over k
    others = pull.masked_fill(_chosen(top, pull), 0.0)
    covariance = others @ means - others.sum(1, keepdim=True) * means[top]
    return covariance * (alpha / std**2) ** 2 - v / std**2


def diameter(means: Tensor) -> float:
    """Largest distance between two rows of means (k, d), panel by panel."""
    points, widest = means.double(), 0.0
    rows = max(1, CHUNK // len(points))
    for i in range(0, len(points), rows):
        panel = torch.cdist(points[i : i + rows], points[i:], compute_mode="donot_use_mm_for_euclid_dist")
        widest = max(widest, float(panel.max()))
    return widest


def _average(
    x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of all components but the leading one (n, k), `mubar - means[top]` (n, d), and top (n,).

    Leaving out the leading component keeps full relative accuracy when the posterior collapses onto it.
    """
    logits, top = _logits(x, means, log_weights, alpha, std)
    others = logits.softmax(1).masked_fill(_chosen(top, logits), 0.0)
    return others, others @ means - others.sum(1, keepdim=True) * means[top], top


def _chosen(top: Tensor, like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=top.device) == top[:, None]  # (n, k)


def _logits(x: Tensor, means: Tensor, log_weights: Tensor, alpha: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Logits relative to the leading component (n, k), and which one leads (n,)."""
    live = log_weights > -math.inf
    prior = log_weights.masked_fill(~live, 0.0)
    half = means.square().sum(1) / 2  # (k,)
    plain = prior + alpha * (x @ means.T - alpha * half) / std**2  # (n, k), up to a constant per row
    top = plain.masked_fill(~live, -math.inf).argmax(1)
    plain = plain - plain.gather(1, top[:, None])
    exact = _exact_logits(x.detach(), means.detach(), prior.detach(), alpha.detach(), std.detach(), top)
    # the value is exact's, the derivatives are those of the plain expression
    return (plain + (exact - plain).detach()).masked_fill(~live, -math.inf), top


def _exact_logits(x: Tensor, means: Tensor, prior: Tensor, alpha: Tensor, std: Tensor, top: Tensor) -> Tensor:
    """`prior + alpha (x.means - alpha |means|^2 / 2) / std^2` minus its leading entry, accurate to rounding."""
    cross = split_dot(x, means).minus_column(top)  # (n, k)
    squares = split_dot(means, means, diagonal=True)  # (k,)
    squares = Pair(squares.high.expand(len(x), -1), squares.low.expand(len(x), -1)).minus_column(top)
    shift = product(squares, alpha / 2)
    return prior - prior[top][:, None] + alpha * cross.minus(shift).value() / std**2


def flow_fixed(
    x: Tensor, means: Tensor, log_weights: Tensor, center: Tensor, ends: Tensor, h: Tensor,
    coefficients: Tensor, tableau: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run m steps of the explicit Runge-Kutta method `tableau` on `dz/du = a z + b mubar(c z, r)` (Eq. 6).

    Args:
        x: (n, d). means: (k, d), already centred by `center` (d,). log_weights: (k,).
        ends: (4,) or (4, n), r and s where the flow starts, r and s where it ends: z = (x - r s center) / s.
        h: (m,) steps. coefficients: (m, S, 4), a, b, c, r of every stage. tableau: (S + 3, S), see tableaux.py.

    Returns:
        End points (n, d), dtype of x, and status int8 (n,): SUCCESS or NON_FINITE.
    """
    average, stages = _averager(means, log_weights), tableau.shape[1]
    ends = ends.to(x.device)
    z = _enter(x, center, ends)
    for i in range(len(h)):
        rates: list[Tensor] = []
        for j in range(stages):
            a, b, c, r = coefficients[i, j]
            state = z + h[i] * _combine(tableau[j], rates, z)
            rates.append(a * state + b * average(c * state, r))
        z = z + h[i] * _combine(tableau[stages + 1], rates, z)
    out = _leave(z, center, ends).to(x.dtype)
    return out, torch.where(torch.isfinite(out).all(1), SUCCESS, NON_FINITE).to(torch.int8)


def flow_adaptive(
    x: Tensor, means: Tensor, log_weights: Tensor, center: Tensor, ends: Tensor, tableau: Tensor,
    rtol: float, atol: float, max_steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Integrate `dy/dr = mubar(y, r)` (Eq. 6) with one step size per trajectory.

    Args:
        x, means, log_weights, center, ends: as in `flow_fixed`. tableau: an embedded pair of order 5(4).
        rtol, atol: bounds on the root mean square over coordinates of one step's error in y = x / s.
        max_steps: attempted steps after which a trajectory is given up.

    Returns:
        x (n, d), status int8, attempted steps int32 and evaluations int32, each (n,).
    """
    average, stages = _averager(means, log_weights), tableau.shape[1]
    reuse = bool(tableau[stages - 1].equal(tableau[stages + 1]))  # the last stage is the next step's first
    r, target = (ends[row].reshape(-1, 1).expand(len(x), 1) for row in (0, 2))
    y = _enter(x, center, ends)
    running = (r != target) & torch.isfinite(y).all(1, keepdim=True)
    status = torch.where(torch.isfinite(y).all(1, keepdim=True), SUCCESS, NON_FINITE)
    steps, evaluations = torch.zeros_like(status), torch.zeros_like(status)
    h = _first_step(r, target, means, rtol)
    calm = torch.ones_like(running)  # no rejection just before
    first: Tensor | None = None
    while bool(running.any()):
        last = (target - r).abs() <= h.abs() * (1 + 1e-12)
        h = torch.where(last, target - r, h)
        first = average(y, r) if first is None or not reuse else first
        rates = [first]
        for j in range(1, stages):
            rates.append(average(y + h * _combine(tableau[j], rates, y), r + h * tableau[stages, j]))
        new = y + h * _combine(tableau[stages + 1], rates, y)
        error = _rms(h * _combine(tableau[stages + 2], rates, y)) / (atol + rtol * torch.maximum(_rms(y), _rms(new)))
        error = error.detach().nan_to_num(nan=math.inf)
        accept = running & (error <= 1)
        evaluations = evaluations + running * torch.where(steps == 0, stages, stages - reuse)
        steps = steps + running.int()
        first = torch.where(accept, rates[-1], first)
        y, r = torch.where(accept, new, y), torch.where(accept, torch.where(last, target, r + h), r)
        running = running & ~(accept & last)
        h, calm = _next_step(h, error, calm, accept), accept
        tiny = running & (h.abs() < 4 * torch.finfo(torch.float64).eps * r.abs())
        late = running & (steps >= max_steps)
        status = torch.where(tiny, STEP_UNDERFLOW, torch.where(late, MAX_STEPS, status))
        running = running & ~tiny & ~late
    out = _leave(y, center, ends).masked_fill(status == NON_FINITE, math.nan).to(x.dtype)
    return out, status[:, 0].to(torch.int8), steps[:, 0].int(), evaluations[:, 0].int()


def _first_step(r: Tensor, target: Tensor, means: Tensor, rtol: float) -> Tensor:
    radius = float(means.detach().double().square().sum(1).max().sqrt())
    span = target - r
    if radius == 0:  # all means coincide: the rate is constant
        return span
    return span.sign() * torch.minimum(span.abs(), r.clamp(min=1 / radius) * 0.5 * rtol**0.2)


def _next_step(h: Tensor, error: Tensor, calm: Tensor, accept: Tensor) -> Tensor:
    factor = (SAFETY * error.clamp(min=1e-30) ** -0.2).clamp(SHRINK, GROW)
    return h * torch.where(accept & ~calm, factor.clamp(max=1.0), factor)


def _averager(means: Tensor, log_weights: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The right-hand side `mubar(y, r)` of Eq. 6 for y (n, d), r scalar or (n, 1)."""
    means, prior = means.double(), log_weights.double()
    half = means.square().sum(1) / 2  # (k,)

    def average(y: Tensor, r: Tensor) -> Tensor:
        return (prior + r * (y @ means.T - r * half)).softmax(1) @ means

    return average


def _combine(row: Tensor, rates: list[Tensor], like: Tensor) -> Tensor:
    total = torch.zeros_like(like)
    for coefficient, rate in zip(row.tolist(), rates, strict=False):
        total = total + coefficient * rate
    return total


def _rms(y: Tensor) -> Tensor:
    return y.square().mean(1, keepdim=True).sqrt()


def _enter(x: Tensor, center: Tensor, ends: Tensor) -> Tensor:
    r, s = (ends[row].reshape(-1, 1) for row in (0, 1))
    return (x.double() - r * s * center.double()) / s


def _leave(z: Tensor, center: Tensor, ends: Tensor) -> Tensor:
    r, s = (ends[row].reshape(-1, 1) for row in (2, 3))
    return s * z + r * s * center.double()
