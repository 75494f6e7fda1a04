"""Results as JSON lines, found again by content: the first says on what they were made, each other is one run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowfast.experiments.machine import machine, versions

PACKAGES = ("flowfast", "torch", "numpy", "scipy")


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add one line, on the disk when the call returns; what a killed write left at the end is cut off first."""
    content = path.read_bytes() if path.exists() else b""
    with path.open("ab") as stream:
        if content and not content.endswith(b"\n"):
            os.ftruncate(stream.fileno(), content.rfind(b"\n") + 1)
        stream.write((json.dumps(rounded(line), allow_nan=False, separators=(",", ":")) + "\n").encode())
        stream.flush()
        os.fsync(stream.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole line, in order; none when there is no file.

    Raises:
        ValueError: a line that is no JSON object; file and line are named.
    """
    found = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1] if path.exists() else [], start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is damaged ({error}): remove it") from error
        if not isinstance(line, dict):
            raise ValueError(f"{path}, line {number} must be a JSON object: remove it")
        found.append(line)
    return found


def rounded(value: Any) -> Any:
    """Plain values with numbers of six digits: more would only fill the file."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list | tuple) else value


def about() -> dict[str, Any]:
    """The first line: on what the others were made."""
    return {"about": {"machine": machine(), "versions": versions(PACKAGES)}}
