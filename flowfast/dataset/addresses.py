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
    scheme, found, path = str(address).partition("://")
    if not found or scheme in ("file", "local"):
        return LocalStore(path if found else address)
    return RemoteStore(str(address))
