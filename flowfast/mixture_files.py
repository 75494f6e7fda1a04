"""Files that hold a mixture: .npy and .csv (means), .npz and .safetensors (means, std, log_weights). No pickle."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from flowfast.storage import write_bytes

KINDS = (".npy", ".npz", ".safetensors", ".csv")


def read(path: Path) -> dict[str, Any]:
    """Arrays "means" (always), "std", "weights" and "log_weights" (where present) of the file at `path`.

    Raises:
        ValueError: no such file, unknown kind, unreadable contents, or no means in it.
    """
    if path.suffix not in KINDS:
        raise ValueError(f"means file {path} must end in one of {', '.join(KINDS)}")
    if not path.is_file():
        raise ValueError(f"means file {path} does not exist or is no regular file")
    try:
        arrays = _READERS[path.suffix](path)
    except Exception as error:  # four libraries, each with exceptions of its own
        raise ValueError(f"means file {path} cannot be read as {path.suffix}: {error}") from error
    if "means" not in arrays:
        raise ValueError(f"means file {path} must hold an array named 'means'; it holds {sorted(arrays)}")
    return arrays


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write the tensors at `path` (.safetensors or .npz) by a temporary file and a rename.

    Raises:
        ValueError: another kind of file.
    """
    plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        content = save(plain)
    elif path.suffix == ".npz":
        stream = io.BytesIO()
        np.savez(stream, **{name: tensor.numpy() for name, tensor in plain.items()})  # type: ignore[arg-type]
        content = stream.getvalue()
    else:
        raise ValueError(f"path must end in .safetensors or .npz; got {path}")
    write_bytes(path, content)


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(path))


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _read_csv(path: Path) -> dict[str, Any]:
    return {"means": np.loadtxt(path, delimiter=",", ndmin=2)}


_READERS = {
    ".npy": lambda path: {"means": np.load(path, allow_pickle=False)},
    ".npz": _read_npz,
    ".csv": _read_csv,
    ".safetensors": _read_safetensors,
}
