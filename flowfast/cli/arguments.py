"""What commands share: refusals that name an option, mixtures from files, results as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowfast.cli.options import UsageError
from flowfast.mixture import GaussianMixture

# Names the library uses for what an option sets.
OPTIONS = {
    name: name for name in ("segments", "rows", "steps", "width", "std", "horizon", "beta", "seed", "backend", "n")
}
OPTIONS |= {"grids": "grid", "grid": "grid", "kind": "grid", "means": "means", "weights": "means"}
OPTIONS |= {"path": "out", "workers": "workers", "dtype": "dtype", "rows_per_shard": "rows-per-shard"}
OPTIONS |= {name: name for name in ("engine", "t", "eps", "blocks")} | {"t_from": "t-to"}
OPTIONS |= {"image_shape": "image-shape", "evaluation_rows": "evaluation-rows"}


@contextmanager
def arguments(option: str) -> Iterator[None]:
    """Turn the library's refusals in the block into one sentence about an argument, `option` unless it names one."""
    try:
        yield
    except (ValueError, TypeError) as error:
        first, _, rest = str(error).partition(" ")
        named = OPTIONS.get(first)
        raise UsageError(f"--{named} {rest}" if named else f"{option}: {error}") from error


def read_mixture(means: Path, std: float | None) -> GaussianMixture:
    """The mixture of --means and --std; UsageError where there is none."""
    with arguments("--means"):
        mixture = GaussianMixture.load(means, std=std)
        if str(mixture.dtype) not in ("torch.float32", "torch.float64"):
            raise ValueError(f"means must be float32 or float64; got {mixture.dtype}")
        return mixture


def print_json(value: Mapping[str, Any]) -> None:
    """Print plain values on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False))
