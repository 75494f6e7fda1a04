"""A job's folder: claimed by one job and one process at a time, its clocks counting every attempt."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowfast.storage import differences, is_part, read_json, write_json

FORMAT = 1
MARK = "job.json"
MIXTURE = "mixture.safetensors"
LOCK = "run.lock"


class FolderError(ValueError):
    """The folder cannot serve this job: another job's, in use, not empty, or not writable."""


@contextmanager
def held(folder: Path, name: str) -> Iterator[None]:
    """Make `folder` if need be, and keep its lock file `name` from other processes while the block runs.

    Raises:
        FolderError: another process has the lock, or the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / name).open("a")
    except OSError as error:
        raise not_writable(folder, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderError(f"{folder} is in use by another flowfast process: wait for it or stop it") from error
        yield


def not_writable(folder: Path, error: OSError) -> FolderError:
    """What to raise where the system refused `folder`."""
    return FolderError(f"{folder} cannot be written ({error.strerror}): choose another folder")


@contextmanager
def claim(folder: Path, identity: Mapping[str, Any]) -> Iterator[None]:
    """Hold `folder` for the job with this identity while the block runs.

    Args:
        folder: created when it does not exist.
        identity: nested plain values; a folder marked with others belongs to another job.

    Raises:
        FolderError: the folder is another job's (differing fields are named), holds other files, is in use, or
            cannot be made or written.
    """
    wanted = {"format": FORMAT, **identity}
    mark = folder / MARK
    try:
        if folder.exists() and not folder.is_dir():
            raise FolderError(f"{folder} is a file, not a folder: choose another one")
        if mark.is_file():
            differing = differences(read_json(mark, "mark of a job"), wanted).replace("settings.", "")
            if differing:
                raise FolderError(f"{folder} belongs to another job ({differing}): choose another folder")
        elif folder.is_dir() and any(e.name != LOCK and not is_part(e) for e in folder.iterdir()):
            raise FolderError(f"{folder} is not empty and holds no flowfast job: choose a new or empty folder")
    except OSError as error:
        raise not_writable(folder, error) from error
    with held(folder, LOCK):
        if not mark.is_file():
            write_json(mark, wanted)
        yield


class Clock:
    """Seconds spent on a stage, kept in a file so that a killed and resumed stage counts all its attempts."""

    def __init__(self, path: Path, *, every: float = 1.0) -> None:
        """Go on from the seconds in `path`; `tick` writes at most once per `every` seconds."""
        self._path, self._every = path, every
        self._before = float(read_json(path, "clock")["seconds"]) if path.is_file() else 0.0
        self._start = self._written = time.perf_counter()

    def seconds(self) -> float:
        """Seconds so far, earlier attempts included."""
        return self._before + time.perf_counter() - self._start

    def tick(self) -> None:
        """Note the time that has passed."""
        now = time.perf_counter()
        if now - self._written >= self._every:
            self._written = now
            write_json(self._path, {"seconds": self.seconds()})
