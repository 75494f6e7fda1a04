"""The two files of a stored student: student.safetensors and student.json, tied together by a digest."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from flowfast.storage import read_json, write_bytes, write_json

FORMAT = "flowfast student"
VERSION = 1
WEIGHTS, CONFIG = "student.safetensors", "student.json"


def write(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write a student; a kill between the two files leaves a pair that `read` refuses.

    Raises:
        ValueError: folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder must be a folder; {folder} is a file: choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
    write_bytes(folder / WEIGHTS, content)
    about = {
        "format": FORMAT,
        "version": VERSION,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "weights_sha256": hashlib.sha256(content).hexdigest(),
        "config": dict(config),
    }
    write_json(folder / CONFIG, about)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of a stored student.

    Raises:
        ValueError: files missing, foreign, damaged or not of one student.
    """
    if not folder.is_dir():
        raise ValueError(f"student: {folder} is no folder: give the folder that holds {CONFIG} and {WEIGHTS}")
    about = read_json(folder / CONFIG, "student")
    if about.get("format") != FORMAT:
        raise ValueError(f"student: format in {folder / CONFIG} must be {FORMAT!r}; got {about.get('format')!r}")
    if about.get("version") != VERSION:
        raise ValueError(
            f"student: version in {folder / CONFIG} must be {VERSION}; got {about.get('version')!r}: "
            "read it with the version of flowfast that wrote it"
        )
    if not isinstance(about.get("config"), dict):
        raise ValueError(f"student: config in {folder / CONFIG} is missing")
    try:
        content = (folder / WEIGHTS).read_bytes()
        weights = load(content)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"student: {folder / WEIGHTS} is missing or damaged ({error})") from error
    if hashlib.sha256(content).hexdigest() != about.get("weights_sha256"):
        raise ValueError(
            f"student: weights_sha256 in {CONFIG} does not match {WEIGHTS} in {folder}: "
            "the files are damaged or of two students, save it again"
        )
    return about["config"], weights
