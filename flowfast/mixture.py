"""The isotropic Gaussian mixture: the one value that every operation of flowfast takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowfast import backends

if TYPE_CHECKING:
    import numpy as np
    from torch.distributions import MixtureSameFamily

ArrayLike = Any


class GaussianMixture:
    """`sum_k w_k N(means_k, std^2 I)` with one standard deviation for all components.

    Args:
        means: (k, d), floating, finite; a tensor (kept as it is, gradients included) or anything torch.as_tensor takes.
        std: positive number, or 0-dim tensor; same unit as the means.
        weights: (k,), non-negative with positive sum (normalised here); None means uniform. A component of weight 0
            contributes nothing.

    Raises:
        TypeError: means or weights are not floating numbers.
        ValueError: wrong shape, NaN or infinity, std not positive, weights negative or all zero.
    """

    def __init__(self, means: ArrayLike, std: float | Tensor, weights: ArrayLike | None = None) -> None:
        self.means = _as_floats("means", means)  # (k, d)
        if self.means.ndim != 2 or 0 in self.means.shape:
            raise ValueError(f"means must have shape (k, d) with k, d >= 1; got {tuple(self.means.shape)}")
        if not bool(torch.isfinite(torch.stack(torch.aminmax(self.means))).all()):  # NaN comes through both
            row = int((~torch.isfinite(self.means)).any(1).nonzero()[0, 0])
            raise ValueError(f"means must be finite; row {row} holds NaN or infinity: remove or repair it")
        self.std = _as_std(std)  # ()
        self.log_weights = _as_log_weights(weights, self.means)  # (k,) float64
        self._diameters: dict[str, float] = {}  # by backend; found on first use
        self._casts: dict[torch.dtype, Tensor] = {}  # of log_weights

    @classmethod
    def _of(cls, means: Tensor, std: Tensor, log_weights: Tensor) -> GaussianMixture:
        """Build from parts already valid: no data-dependent check, so that it can be traced and compiled."""
        mixture = cls.__new__(cls)
        mixture.means, mixture.std, mixture.log_weights = means, std, log_weights
        mixture._diameters, mixture._casts = {}, {}
        return mixture

    @classmethod
    def random(cls, k: int, d: int, *, half_width: float = 5.0, std: float = 1.0, seed: int = 0) -> GaussianMixture:
        """The mixture of the paper's experiments: k means uniform in [-half_width, half_width]^d, float32.

        Args:
            k: components. d: dimension. half_width: of the cube. std: of each component.
            seed: of the means; the same seed gives the same means as the paper's experiments.

        Source: arXiv 2606.03820, section 6; seed 0 with k=20, d=64 has diameter 40.9973.
        """
        if k < 1 or d < 1:
            raise ValueError(f"k and d must be at least 1; got k={k}, d={d}")
        uniform = torch.rand(k, d, generator=torch.Generator().manual_seed(seed))
        return cls((2 * uniform - 1) * half_width, std)

    @classmethod
    def from_samples(cls, x: ArrayLike, std: float) -> GaussianMixture:
        """Treat a data set as a mixture: every row of x (n, d) is a component of weight 1/n."""
        return cls(x, std)

    @classmethod
    def from_sklearn(cls, model: Any) -> GaussianMixture:
        """Take over a fitted `sklearn.mixture.GaussianMixture` with covariance_type="spherical" and equal variances.

        Raises:
            ValueError: another covariance type, or variances that differ by more than one part in a million.
        """
        kind = getattr(model, "covariance_type", None)
        if kind != "spherical" or not hasattr(model, "means_"):
            raise ValueError(f"model must be fitted with covariance_type='spherical'; got {kind!r}")
        variances = torch.as_tensor(model.covariances_)
        if float(variances.max()) > float(variances.min()) * (1 + 1e-6):
            raise ValueError("model must have one variance for all components: fit with equal spherical covariances")
        return cls(model.means_, math.sqrt(float(variances.mean())), model.weights_)

    @classmethod
    def from_torch(cls, dist: MixtureSameFamily) -> GaussianMixture:
        """Take over a torch MixtureSameFamily of Independent(Normal(loc (k, d), scale), 1) with one common scale.

        Raises:
            TypeError: another family. ValueError: scales that differ.
        """
        normal = getattr(getattr(dist, "component_distribution", None), "base_dist", None)
        if not isinstance(normal, torch.distributions.Normal):
            raise TypeError(f"dist must be MixtureSameFamily(Categorical, Independent(Normal, 1)); got {type(dist)}")
        scale = normal.scale
        if float(scale.max()) > float(scale.min()) * (1 + 1e-6):
            raise ValueError("dist must have one scale for all components and coordinates")
        return cls(normal.loc, scale.reshape(-1)[0], dist.mixture_distribution.probs)

    def to_torch(self) -> MixtureSameFamily:
        """The same distribution as `torch.distributions.MixtureSameFamily`."""
        d = torch.distributions
        normal = d.Normal(self.means, self.std.to(self.means).expand_as(self.means), validate_args=False)
        return d.MixtureSameFamily(d.Categorical(probs=self.weights), d.Independent(normal, 1))

    @classmethod
    def load(cls, path: str | Path, *, std: float | None = None) -> GaussianMixture:
        """Read a mixture from a file.

        Args:
            path: .npy or .csv (means only: std is needed), .npz or .safetensors (means; std, weights or log_weights if
                present).
            std: standard deviation, overrides the file's.

        Raises:
            ValueError: unreadable or unknown file, no std anywhere, or contents that are no mixture.
        """
        from flowfast import mixture_files

        arrays = mixture_files.read(Path(path))
        std = std if std is not None else arrays.get("std")
        if std is None:
            raise ValueError(f"std is needed: {path} holds no 'std', pass std=")
        logs = torch.as_tensor(arrays["log_weights"]) if "log_weights" in arrays else None
        mixture = cls(arrays["means"], float(std), arrays.get("weights") if logs is None else logs.exp())
        if logs is not None and abs(float(logs.logsumexp(0))) < 1e-12:  # as `save` wrote them, kept to the bit
            mixture.log_weights = logs.double()
        return mixture

    def save(self, path: str | Path) -> None:
        """Write means, std and log_weights as .safetensors (or .npz) at `path`; `load` reads back the same bits."""
        from flowfast import mixture_files

        parts = {"means": self.means, "std": self.std, "log_weights": self.log_weights}
        mixture_files.write(Path(path), {name: tensor.detach() for name, tensor in parts.items()})

    @property
    def weights(self) -> Tensor:
        """Component probabilities (k,), summing to one, in the means' dtype."""
        return self.log_weights.exp().to(self.means.dtype)

    def log_weights_in(self, dtype: torch.dtype) -> Tensor:
        """log_weights (k,) cast to `dtype`; the cast is kept if it serves everywhere.

        That is, unless it requires grad, was made while compiling, in inference mode or within torch.func, is of a
        subclass (fake), or on a GPU, where another stream could read it before it is written, or a CUDA graph own it.
        """
        if torch.compiler.is_compiling():
            return self.log_weights.to(dtype)
        kept = self._casts.get(dtype)
        if kept is not None:
            return kept
        cast = self.log_weights.to(dtype)
        if type(cast) is not Tensor or cast.requires_grad or cast.is_inference() or not cast.is_cpu:
            return cast
        if torch._C._functorch.is_functorch_wrapped_tensor(cast):
            return cast
        self._casts[dtype] = cast
        return cast

    @property
    def n_components(self) -> int:
        """Number k of components."""
        return self.means.shape[0]

    @property
    def dim(self) -> int:
        """Dimension d of the space."""
        return self.means.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the means."""
        return self.means.dtype

    @property
    def device(self) -> torch.device:
        """Where the means live."""
        return self.means.device

    def to(self, *args: Any, **kwargs: Any) -> GaussianMixture:
        """The same mixture with its means moved or cast by `Tensor.to`; std and log_weights stay float64."""
        means = self.means.to(*args, **kwargs)
        return self._of(means, self.std, self.log_weights.to(means.device))

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw n points (n, d) of the means' dtype and device.

        Args:
            n: number of points, >= 0.
            generator: source of randomness on the means' device; None draws a fresh seed from the operating system
                (the global generator is never touched).
        """
        if n < 0:
            raise ValueError(f"n must be at least 0; got {n}")
        if generator is None:
            generator = torch.Generator(self.device)
            generator.seed()
        if n == 0:
            return self.means.new_empty(0, self.dim)
        component = torch.multinomial(self.weights.detach(), n, replacement=True, generator=generator)  # (n,)
        noise = torch.randn(n, self.dim, generator=generator, dtype=self.dtype, device=self.device)
        return self.means[component] + self.std.to(noise) * noise

    def diameter(self, *, backend: str = "auto") -> float:
        """Largest distance between two means, `max_ij |means_i - means_j|` (components of weight 0 included)."""
        name = backends.choose(backend, self.device)
        if name not in self._diameters or self.means.requires_grad:
            means = self.means.detach().to(torch.float64 if self.dtype == torch.float64 else torch.float32)
            self._diameters[name] = float(
                backends.serve(name, means.device, "diameter").diameter(means.resolve_neg().contiguous())
            )
        return self._diameters[name]

    def __repr__(self) -> str:
        """Shape, std, dtype and device; not the numbers."""
        std, dtype = float(self.std), str(self.dtype).removeprefix("torch.")
        return f"GaussianMixture(k={self.n_components}, d={self.dim}, std={std:g}, {dtype}, {self.device})"


def _as_floats(name: str, value: ArrayLike) -> Tensor:
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be an array of floating numbers; got {type(value).__name__}") from error
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating numbers; got {tensor.dtype}: convert with .float() or .astype(float)")
    return tensor


def _as_std(std: float | Tensor | np.floating[Any]) -> Tensor:
    if isinstance(std, Tensor):
        if std.ndim != 0 or not std.is_floating_point():
            raise ValueError(
                f"std must be a number or a 0-dim floating tensor; got shape {tuple(std.shape)}, {std.dtype}"
            )
        tensor = std
    else:
        try:
            tensor = torch.tensor(float(std), dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"std must be a positive number; got {type(std).__name__}") from error
    value = float(tensor.detach())
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"std must be positive and finite; got {value}")
    return tensor


def _as_log_weights(weights: ArrayLike | None, means: Tensor) -> Tensor:
    k = means.shape[0]
    if weights is None:
        return torch.full((k,), 1 / k, dtype=torch.float64, device=means.device).log()
    values = _as_floats("weights", weights).to(means.device, torch.float64)
    if values.shape != (k,):
        raise ValueError(f"weights must have shape ({k},), one per mean; got {tuple(values.shape)}")
    plain = values.detach()
    total = float(plain.sum())
    if not math.isfinite(total) or bool((plain < 0).any()) or total <= 0:
        raise ValueError("weights must be finite, non-negative and have a positive sum")
    if values.requires_grad or abs(total - 1) > 4 * k * torch.finfo(torch.float64).eps:
        values = values / values.sum()  # weights that sum to one keep their bits, so that a file reads back the same
    live = plain > 0
    return torch.where(live, values, 1.0).log().masked_fill(~live, -math.inf)
