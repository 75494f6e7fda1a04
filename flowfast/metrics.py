"""Error measures."""

from __future__ import annotations

from torch import Tensor


def relative_mse(prediction: Tensor, target: Tensor) -> float:
    """Relative squared error `sum |f - y|^2 / sum |y|^2`: a ratio of sums, not a mean of ratios.

    Args:
        prediction: f, any shape, floating.
        target: y, the same shape and device, floating; not all zero.

    Returns:
        The ratio, accumulated in float64; NaN or infinite when an entry is.

    Raises:
        TypeError: not tensors of floating numbers.
        ValueError: shapes or devices that differ, nothing to compare, or a target that is zero everywhere.

    Source: arXiv 2606.03820, section 6 (the measure of all its tables).
    """
    for name, value in (("prediction", prediction), ("target", target)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a tensor of floating numbers; got {_kind(value)}")
    if prediction.shape != target.shape or prediction.device != target.device:
        raise ValueError(
            f"prediction must have target's shape and device, {tuple(target.shape)} on {target.device}; "
            f"got {tuple(prediction.shape)} on {prediction.device}"
        )
    if target.numel() == 0:
        raise ValueError("target must not be empty: the error of no points is undefined")
    exact = target.detach().double()
    norm = float(exact.square().sum())
    if norm == 0:
        raise ValueError("target must not be zero everywhere: the relative error is undefined")
    return float((prediction.detach().double() - exact).square().sum()) / norm


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
