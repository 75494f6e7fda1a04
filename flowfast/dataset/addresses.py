"""What an address names: a folder of this machine, or a store that fsspec reaches."""

from __future__ import annotations

from pathlib import Path

from flowfast.dataset.remote_store import RemoteStore
from flowfast.dataset.store import LocalStore, Store


def open_store(address: str | Path) -> Store:
    """The store at `address`: a folder, or what fsspec knows, such as "s3://bucket/set".

    Raises:
        ValueError, ModuleNotFoundError: see `RemoteStore`.
    """
    folder = _folder(address)
    return RemoteStore(str(address)) if folder is None else LocalStore(folder)


def local_folder(address: str | Path) -> Path:
    """The folder that `address` names, for what reads a set.

    Raises:
        ValueError: it is on a remote store; the message has the command that copies it.
    """
    folder = _folder(address)
    if folder is None:
        place = str(address).rstrip("/").rpartition("/")[2]
        code = f"import fsspec; f, p = fsspec.url_to_fs({address!r}); f.get(p + '/', '{place}/', recursive=True)"
        raise ValueError(f'teacher set: {address} is not on this machine: copy it and read {place}: python -c "{code}"')
    return Path(folder)


def _folder(address: str | Path) -> str | Path | None:
    """The folder of this machine; None for any other address."""
    scheme, found, path = str(address).partition("://")
    if not found:
        return address
    return path if scheme in ("file", "local") else None
