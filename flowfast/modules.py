"""The exact score as a `torch.nn.Module`, for training code that expects one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flowfast import ops
from flowfast.backends import choose
from flowfast.mixture import GaussianMixture
from flowfast.process import OUProcess, Times


class MixtureScore(nn.Module):
    """Score of a mixture, or of its marginal at time t: `forward(x, t=None)`, both as in `flowfast.score`.

    Args:
        mixture: law of the data; its tensors are copied.
        process: forward process, needed for `t`. It is no part of the state: give it to the constructor again.
        trainable: make means, std and log_weights parameters. Gradients reach them through the reference (slower,
            memory n k). log_weights are normalised in use; std is taken as it is and has to stay positive.
        backend: "auto", "cpp", "triton" or "reference".

    Attributes:
        means: (k, d). std: (), float64. log_weights: (k,), float64. Buffers, or parameters when trainable.

    `.to`, `.half()` and their like move all three and cast the means only: a mixture's std and weights are float64
    everywhere. The state dictionary holds these three tensors and nothing else, under the same names in either mode.

    Raises:
        TypeError: mixture or process of another kind. ValueError: a backend unknown or unable to serve the mixture.
    """

    means: Tensor
    std: Tensor
    log_weights: Tensor

    def __init__(
        self,
        mixture: GaussianMixture,
        process: OUProcess | None = None,
        *,
        trainable: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(mixture, GaussianMixture):
            raise TypeError(f"mixture must be a GaussianMixture; got {type(mixture).__name__}")
        if process is not None and not isinstance(process, OUProcess):
            raise TypeError(f"process must be an OUProcess or None; got {type(process).__name__}")
        choose(backend, mixture.device)
        self.process, self.trainable, self.backend = process, trainable, backend
        std = mixture.std.to(mixture.device, torch.float64)
        for name, tensor in (("means", mixture.means), ("std", std), ("log_weights", mixture.log_weights)):
            own = tensor.detach().clone()
            if trainable:
                self.register_parameter(name, nn.Parameter(own))
            else:
                self.register_buffer(name, own)

    @property
    def mixture(self) -> GaussianMixture:
        """The mixture as it is now; it shares the module's tensors and carries their gradients."""
        log_weights = self.log_weights.log_softmax(0) if self.trainable else self.log_weights
        return GaussianMixture._of(self.means, self.std, log_weights)

    def forward(self, x: Tensor, t: Times | None = None) -> Tensor:
        """Score of the mixture at x, or of its marginal at time t.

        Args:
            x: points (..., d), float32 or float64 (bfloat16 and float16 are computed in float32, autocast or not).
            t: time >= 0, a number or a tensor that broadcasts with x's leading dimensions; None takes the mixture as it
                is, which is its marginal at t = 0.

        Returns:
            Shape, dtype and device of x.

        Raises:
            TypeError, ValueError: as `flowfast.score` and `flowfast.velocity`; t without a process.
        """
        if t is None:
            return ops.score(x, self.mixture, backend=self.backend)
        if self.process is None:
            raise ValueError("t needs a process: MixtureScore(mixture, OUProcess(beta)), or leave t out")
        return ops.marginal_score(x, self.mixture, self.process, t, backend=self.backend)

    def extra_repr(self) -> str:
        """Sizes and mode."""
        k, d = self.means.shape
        return f"k={k}, d={d}, process={self.process!r}, trainable={self.trainable}, backend={self.backend!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MixtureScore:
        """Move every tensor, cast the means only: casting std would change the score where noise is low."""
        exact = [tensor for own in (self.std, self.log_weights) for tensor in (own, own.grad) if tensor is not None]

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype != tensor.dtype and any(tensor is other for other in exact):
                return tensor.to(result.device)
            return result

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self
