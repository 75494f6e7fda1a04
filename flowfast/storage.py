"""Files written whole or not at all: safetensors for numbers, JSON for settings. No pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` at `path` through a temporary file, so that a kill leaves the old file or the new one."""
    part = part_of(path)
    with part.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)


def part_of(path: Path) -> Path:
    """Name of the unfinished file that becomes `path`."""
    return path.with_name(f".{path.name}.part")


def is_part(path: Path) -> bool:
    """Whether `path` is the unfinished file of a write that was killed."""
    return path.name.startswith(".") and path.name.endswith(".part")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` as indented JSON."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`.

    Args:
        path: file. what: what the file is, for messages.

    Raises:
        ValueError: it is missing, unreadable, or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{what}: {path} does not exist")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{what}: {path} cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what}: {path} must hold a JSON object; it holds a {type(value).__name__}")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors as safetensors with `about`, plain values, as JSON in the file's own header.

    Args:
        path: file. tensors: by name; any device. about: what the numbers are; read back beside them.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(plain, metadata={"flowfast": json.dumps(about, allow_nan=False)}))


def read_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors mapped from the file at `path` (pages are read when they are used) and what `write_tensors` says of them.

    Args:
        path: file. what: what the file is, for messages.

    Raises:
        ValueError: it is missing, no safetensors file, or not written by flowfast.
    """
    if not path.is_file():
        raise ValueError(f"{what}: {path} does not exist or is no regular file")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("flowfast", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{what}: {path} is damaged or no safetensors file ({error})") from error
    if not isinstance(about, dict):
        raise ValueError(f"{what}: {path} was not written by flowfast")
    return tensors, about


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Name the fields in which two sets of plain settings differ: "steps is 10 there, 20 here; ...", or ""."""
    there, here = _flat(stored), _flat(json.loads(json.dumps(wanted)))
    names = [name for name in sorted(there | here) if there.get(name) != here.get(name)]
    said = [f"{name} is {_brief(there.get(name))} there, {_brief(here.get(name))} here" for name in names[:6]]
    return "; ".join(said + [f"and {len(names) - 6} more"] * (len(names) > 6))


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, dict) else {f"{prefix}{name}": item}
    return flat


def _brief(value: Any) -> str:
    said = json.dumps(value)
    return said if len(said) <= 40 else f"{said[:37]}..."
