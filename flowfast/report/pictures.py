"""Rows of small grey images as one PNG each, inside the page."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
WIDTH = 1_300  # pixels a row aims at, more than a page shows, so that edges stay sharp


def row(x: Array, shape: tuple[int, int], low: float, high: float, *, dark: bool) -> str:
    """A data URI of one row of images.

    Args:
        x: (p, height * width), grey values. shape: (height, width). low, high: values of the two ends of the scale.
        dark: show high values dark.
    """
    from PIL import Image

    height, width = shape
    grey = np.clip((x - low) / max(high - low, 1e-30), 0, 1).reshape(-1, height, width)
    pixels = np.round(255 * (1 - grey if dark else grey)).astype(np.uint8)
    scale = max(1, WIDTH // (len(x) * (width + 1)))
    gap = np.full((height * scale, scale), 255, np.uint8)
    big = pixels.repeat(scale, 1).repeat(scale, 2)
    strip = np.concatenate([part for image in big for part in (image, gap)][:-1], 1)
    stream = io.BytesIO()
    Image.fromarray(strip).save(stream, "PNG", optimize=False)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
