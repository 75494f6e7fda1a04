"""The forward Ornstein-Uhlenbeck process `dX = -beta(t) X dt + sqrt(2 beta(t)) dW` as numbers: alpha, std, SNR root.

Time runs from t = 0 (data) to t = T (noise). Every quantity is float64, whatever the dtype of the points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowfast.mixture import GaussianMixture

Times = float | Tensor
Schedule = float | Callable[[float], float] | tuple[Sequence[float], Sequence[float]]


class OUProcess:
    """Variance-preserving diffusion with schedule beta(t) >= 0.

    Args:
        beta: a positive number (constant schedule); a pair (times, values) interpolated linearly, times increasing
            from 0; or a callable of a float time. A callable is integrated by adaptive quadrature to 1e-12.

    Raises:
        TypeError, ValueError: another kind of schedule, or negative or non-finite values.

    Source: arXiv 2606.03820, section 3.1.
    """

    def __init__(self, beta: Schedule = 5.0) -> None:
        self._table: tuple[Tensor, Tensor, Tensor] | None = None  # times, beta, integral of beta; each (m,)
        self._rate: Callable[[float], float] | None = None
        self._constant: float | None = None
        if callable(beta):
            self._rate = beta
        elif isinstance(beta, tuple):
            self._table = _table(beta)
        else:
            try:
                self._constant = float(beta)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"beta must be a number, a callable or (times, values); got {type(beta).__name__}"
                ) from error
            if not (self._constant > 0 and math.isfinite(self._constant)):
                raise ValueError(f"beta must be positive and finite; got {self._constant}")

    def beta(self, t: Times) -> Tensor:
        """Rate beta(t), float64, the shape of t."""
        t = self._times(t)
        if self._constant is not None:
            return torch.full_like(t, self._constant)
        if self._table is not None:
            times, values, _ = (column.to(t.device) for column in self._table)
            i = (torch.searchsorted(times, t, right=True) - 1).clamp(0, len(times) - 2)
            slope = (values[i + 1] - values[i]) / (times[i + 1] - times[i])
            return values[i] + slope * (t - times[i])
        return self._pointwise(self._rate_at, t)

    def log_alpha(self, t: Times) -> Tensor:
        """`-int_0^t beta`, float64, the shape of t."""
        t = self._times(t)
        if self._constant is not None:
            return -self._constant * t
        if self._table is not None:
            times, values, integral = (column.to(t.device) for column in self._table)
            i = (torch.searchsorted(times, t, right=True) - 1).clamp(0, len(times) - 2)
            return -(integral[i] + (t - times[i]) * (values[i] + self.beta(t)) / 2)
        return -self._pointwise(self._integral_to, t)

    def alpha(self, t: Times) -> Tensor:
        """Signal factor `alpha_t = exp(-int_0^t beta)`, float64, the shape of t."""
        return self.log_alpha(t).exp()

    def std(self, t: Times, sigma0: float | Tensor) -> Tensor:
        """Standard deviation `s_t` of a component that has sigma0 at t = 0: `s^2 = alpha^2 sigma0^2 + 1 - alpha^2`."""
        twice = 2 * self.log_alpha(t)
        if isinstance(sigma0, Tensor):  # numbers of the CPU and a GPU go together, and nobody waits for a copy
            sigma0 = sigma0.double() if sigma0.is_cpu or twice.ndim == 0 else sigma0.to(twice)
        return (twice.exp() * sigma0**2 - torch.expm1(twice)).sqrt()

    def snr_root(self, t: Times, sigma0: float | Tensor) -> Tensor:
        """`r_t = alpha_t / s_t`, the square root of the signal-to-noise ratio; decreasing in t from 1/sigma0."""
        return self.alpha(t) / self.std(t, sigma0)

    def marginal(self, mixture: GaussianMixture, t: Times) -> GaussianMixture:
        """The law of X_t, again a mixture: means `alpha_t means`, standard deviation `s_t`, the same weights.

        Args:
            mixture: the law of X_0.
            t: one time >= 0. For a time per row use `velocity` or `denoise`, which take t of shape (n,).
        """
        t = self._times(t)
        if t.ndim != 0:
            raise ValueError(f"t must be one time; got shape {tuple(t.shape)}: velocity and denoise take one per row")
        means = self.alpha(t).to(mixture.means) * mixture.means
        return GaussianMixture._of(means, self.std(t.to(mixture.std.device), mixture.std), mixture.log_weights)

    def to_dict(self) -> dict[str, Any]:
        """Constant or tabulated schedule as plain numbers, for JSON; `from_dict` reads it back.

        Raises:
            ValueError: a callable schedule, which no file can hold: tabulate it as (times, values).
        """
        if self._constant is not None:
            return {"beta": self._constant}
        if self._table is not None:
            return {"beta": [self._table[0].tolist(), self._table[1].tolist()]}
        raise ValueError("beta is a callable and cannot be stored: pass a table (times, values) instead")

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> OUProcess:
        """Rebuild a process from `to_dict`'s numbers."""
        beta = stored["beta"]
        return cls((beta[0], beta[1]) if isinstance(beta, list) else beta)

    def __repr__(self) -> str:
        """The schedule in a word."""
        if self._constant is not None:
            return f"OUProcess(beta={self._constant:g})"
        return "OUProcess(beta=table)" if self._table is not None else f"OUProcess(beta={self._rate!r})"

    def _times(self, t: Times) -> Tensor:
        t = t.double() if isinstance(t, Tensor) else torch.tensor(_number("t", t), dtype=torch.float64)
        if torch.compiler.is_compiling() or not t.numel() or (t.is_cuda and torch.cuda.is_current_stream_capturing()):
            return t
        try:
            low, high = float(t.detach().min()), float(t.detach().max())
        except RuntimeError:  # inside torch.func.vmap values are not known
            return t
        if not (low >= 0 and math.isfinite(high)):
            raise ValueError(f"t must be finite and at least 0 (t = 0 is data); got values from {low} to {high}")
        if self._table is not None and high > float(self._table[0][-1]):
            raise ValueError(f"t must not pass the table's last time {float(self._table[0][-1])}; got {high}")
        return t

    def _pointwise(self, of: Callable[[float], float], t: Tensor) -> Tensor:
        unique, where = t.detach().cpu().unique(return_inverse=True)
        values = torch.tensor([of(float(u)) for u in unique], dtype=torch.float64)
        return values[where].reshape(t.shape).to(t.device)

    def _rate_at(self, t: float) -> float:
        if self._rate is None:
            raise ValueError("this process has no callable schedule")
        value = float(self._rate(t))
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"beta(t) must be finite and not negative; beta({t}) = {value}")
        return value

    def _integral_to(self, t: float) -> float:
        from scipy.integrate import quad

        return float(quad(self._rate_at, 0.0, t, epsabs=1e-12, epsrel=1e-12, limit=500)[0])


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number or a tensor; got {type(value).__name__}") from error


def _table(beta: tuple[Sequence[float], Sequence[float]]) -> tuple[Tensor, Tensor, Tensor]:
    if len(beta) != 2:
        raise ValueError(f"beta as a table must be (times, values); got {len(beta)} entries")
    times, values = (torch.as_tensor(column, dtype=torch.float64) for column in beta)
    if times.ndim != 1 or times.shape != values.shape or len(times) < 2:
        raise ValueError(
            f"beta table needs times and values of one length >= 2; got {tuple(times.shape)}, {tuple(values.shape)}"
        )
    if float(times[0]) != 0 or not bool((times.diff() > 0).all()):
        raise ValueError("beta table needs times that start at 0 and increase")
    if not bool(((values >= 0) & torch.isfinite(values)).all()):
        raise ValueError("beta table needs finite values that are not negative")
    steps = times.diff() * (values[1:] + values[:-1]) / 2
    return times, values, torch.cat([times.new_zeros(1), steps.cumsum(0)])
