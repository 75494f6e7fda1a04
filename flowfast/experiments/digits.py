"""The main job: handwritten digits as an empirical mixture, one component per image."""

from __future__ import annotations

import numpy as np

from flowfast.experiments.settings import JobSettings
from flowfast.mixture import GaussianMixture


def digits_mixture(std: float = 0.15) -> GaussianMixture:
    """scikit-learn's bundled digits, 1,797 images of 8 x 8 pixels scaled to [-1, 1], as components of equal weight.

    Args:
        std: standard deviation of each component, in the unit of the scaled pixels.

    Returns:
        A float32 mixture with k = 1,797 and d = 64.

    Raises:
        ModuleNotFoundError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("digits need scikit-learn: pip install 'flowfast[data]'") from error
    pixels = load_digits().data  # (k, d), 0..16
    return GaussianMixture.from_samples((pixels / 8 - 1).astype(np.float32), std)


def digits_settings() -> JobSettings:
    """The main job's settings: 4 segments on the uniform, the balanced and the measured grid."""
    return JobSettings(name="Handwritten digits", image_shape=(8, 8))
