"""Remote file systems for tests: faulty:// fails at the n-th call that changes it, disk:// is shared by processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem


class FaultyMemory(MemoryFileSystem):  # type: ignore[misc]
    """Addresses faulty://...; it counts calls that change files, and fails at number `fail_at` (from 1) and after it.

    Upload is not atomic here: half of the data of the write that fails stay behind.
    """

    protocol = "faulty"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    seen, fail_at, lasting = 0, 0, True

    @classmethod
    def _strip_protocol(cls, path: str) -> Any:
        return super()._strip_protocol(path.removeprefix("faulty://"))

    @classmethod
    def count(cls) -> bool:
        """Count a call; whether it fails."""
        cls.seen += 1
        return bool(cls.fail_at) and (cls.seen == cls.fail_at or (cls.lasting and cls.seen > cls.fail_at))

    def _change(self) -> None:
        if self.count():
            raise ConnectionResetError("the store went away")

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        if mode == "rb":
            return super()._open(path, mode, **more)
        self._change()
        file = FaultyFile(self, self._strip_protocol(path))
        file.commit()
        return file

    def cp_file(self, path1: str, path2: str, **more: Any) -> None:
        self._change()
        super().cp_file(path1, path2, **more)

    def _rm(self, path: str) -> None:
        self._change()
        super()._rm(path)


class FaultyFile(MemoryFile):  # type: ignore[misc]
    """A file whose writes fail half-way."""

    def write(self, data: Any) -> int:
        if self.fs.count():
            super().write(bytes(data)[: len(data) // 2])
            raise ConnectionResetError("the store went away")
        return int(super().write(data))


class Disk(LocalFileSystem):  # type: ignore[misc]
    """Addresses disk:///folder: local files under a name that flowfast does not know as local."""

    protocol = "disk"

    @classmethod
    def _strip_protocol(cls, path: str) -> Any:
        return super()._strip_protocol(path.removeprefix("disk://"))


fsspec.register_implementation("disk", Disk, clobber=True)
fsspec.register_implementation("faulty", FaultyMemory, clobber=True)


@contextmanager
def faulty_memory() -> Iterator[type[FaultyMemory]]:
    """An empty faulty:// file system while the block runs."""
    FaultyMemory.store.clear()
    FaultyMemory.pseudo_dirs[:] = [""]
    FaultyMemory.seen = FaultyMemory.fail_at = 0
    FaultyMemory.lasting = True
    yield FaultyMemory
    FaultyMemory.store.clear()
