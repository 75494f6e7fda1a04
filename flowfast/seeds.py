"""Streams of random numbers named by what they are for, so that any part of a long job can be made alone."""

from __future__ import annotations

import hashlib

import torch


def generator_for(*name: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose stream is a pure function of `name`, for example (seed, "shard", 3).

    A job that draws its step, shard or layer from a stream of its own needs no saved generator state to be resumed,
    and its parts do not depend on the order in which they are made.

    Args:
        name: numbers and words; the streams of two names that differ are unrelated.
        device: where the generator draws.

    Returns:
        A fresh generator; the global one is not touched.
    """
    digest = hashlib.sha256("/".join(repr(part) for part in name).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def as_seed(seed: int) -> int:
    """`seed` when it is a non-negative int.

    Raises:
        TypeError: it is no int. ValueError: it is negative.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int; got {type(seed).__name__}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0; got {seed}")
    return seed
