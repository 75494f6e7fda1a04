"""Teacher sets on stores that fsspec reaches: s3://, gs://, abfs://, sftp://, memory:// and others.

A file is uploaded under its temporary name, closed, and then moved. What that promises depends on the store:

- Object stores (S3, Google, Azure): an object appears whole or not at all, and stays once the upload is confirmed.
  Moving is a copy on the server followed by a removal; a death between the two leaves a temporary file, never half a
  file. A death during the upload may leave parts that only a lifecycle rule of the bucket removes.
- Stores with folders (SFTP, HDFS, SMB): moving is their rename. Whether data survive a power failure is theirs to say.
- `replace=False` asks and then moves: two processes that create the same name within one round trip may both succeed.

Nowhere does a receipt stand before its shard has been moved, and a shard without a receipt is made again.
"""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from flowfast.dataset.store import Part, StorageError, is_abandoned, part_name

MAGIC = frozenset("*?[]")  # patterns to fsspec


class RemoteStore:
    """The files under one fsspec address; see `flowfast.dataset.store.Store` for the operations.

    Args:
        address: such as "s3://bucket/set"; credentials come from where fsspec's own packages look for them.

    Raises:
        ValueError: no such kind of store, or an address with pattern characters.
        ModuleNotFoundError: the package for this kind of store is not installed; the message names it.
    """

    def __init__(self, address: str) -> None:
        import fsspec

        if MAGIC & set(address):
            raise ValueError(f"path must not hold any of * ? [ ]; got {address!r}: choose another name")
        try:
            files, root = fsspec.url_to_fs(address)
        except ImportError as error:
            raise ModuleNotFoundError(f"path {address} needs another package ({error})") from error
        except ValueError as error:
            raise ValueError(
                f"path {address!r} is no address that fsspec knows ({error}): choose another name"
            ) from error
        self.location = address
        self._files: Any = files
        self._root = root.rstrip("/")
        self._made: set[str] = set()

    def open_temporary(self, name: str) -> Part:
        """See `Store`."""
        part = part_name(name)
        with self.told(part):
            folder = posixpath.dirname(self._path(part))
            if folder not in self._made:
                self._files.makedirs(folder, exist_ok=True)
                self._made.add(folder)
            return part, cast(BinaryIO, _Upload(self, part, self._files.open(self._path(part), "wb")))

    def commit(self, part: Part, name: str, *, replace: bool = True) -> None:
        """See `Store`."""
        with self.told(name):
            part[1].close()  # the upload is confirmed here
            if not replace and self.size(name) is not None:
                raise FileExistsError(f"{self._path(name)} exists already")
            self._files.mv(self._path(part[0]), self._path(name))

    def discard(self, part: Part) -> None:
        """See `Store`."""
        with contextlib.suppress(Exception):  # of any kind: each store has its own
            part[1].close()
        with contextlib.suppress(Exception):
            self._files.rm_file(self._path(part[0]))

    def read_bytes(self, name: str, most: int) -> bytes:
        """See `Store`."""
        size = self.size(name)
        if size is None:
            raise FileNotFoundError(f"{self._path(name)} does not exist or is no file")
        if size > most:
            raise ValueError(f"{self._path(name)} must hold at most {most} bytes; it holds {size}: restore it")
        with self.told(name):
            return bytes(self._files.cat_file(self._path(name)))

    def size(self, name: str) -> int | None:
        """See `Store`."""
        with self.told(name):
            self._files.invalidate_cache()
            try:
                about = self._files.info(self._path(name))  # not exists(), which takes a failed connection for "no"
            except (FileNotFoundError, NotADirectoryError):
                return None
            return int(about["size"]) if about["type"] == "file" else None

    def list(self, folder: str) -> Iterator[str]:
        """See `Store`."""
        with self.told(folder):
            self._files.invalidate_cache()  # another machine may have added files
            try:
                entries = self._files.ls(f"{self._root}/{folder}".rstrip("/"), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return
        for entry in entries:
            last = posixpath.basename(entry["name"].rstrip("/"))
            if last:  # some stores keep an empty object for a folder
                yield posixpath.join(folder, last)

    def remove(self, name: str) -> None:
        """See `Store`."""
        with self.told(name), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def is_abandoned(self, part: str) -> bool:
        """See `Store`."""
        return is_abandoned(part)

    def free_bytes(self) -> None:
        """See `Store`."""

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def told(self, name: str) -> Iterator[None]:
        """Errors in the block, each store has kinds of its own, as StorageError."""
        try:
            yield
        except (StorageError, FileNotFoundError, FileExistsError):
            raise
        except Exception as error:
            raise StorageError(f"{self._path(name)}: {type(error).__name__}: {error}") from error


class _Upload:
    """The stream of an unfinished file: what shards and small files are written to."""

    def __init__(self, store: RemoteStore, name: str, stream: Any) -> None:
        self._store, self._name, self._stream = store, name, stream

    def write(self, data: Any) -> None:
        """Pass bytes on."""
        with self._store.told(self._name):
            self._stream.write(data)

    def close(self) -> None:
        """Finish the upload."""
        with self._store.told(self._name):
            self._stream.close()
