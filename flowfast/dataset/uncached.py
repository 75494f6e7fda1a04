"""New files whose large writes go past the page cache: a set is larger than it, and need not push others' files out."""

from __future__ import annotations

import errno
import fcntl
import io
import os
from pathlib import Path
from typing import Any, BinaryIO, cast

_DIRECT = getattr(os, "O_DIRECT", 0)  # 0 where the system has nothing of the kind
_LARGE, _BLOCK = 1 << 20, 4_096  # bytes: from this size on, in multiples of this


def new_uncached_file(path: Path) -> BinaryIO:
    """Create the file at `path`; FileExistsError where there is one.

    Writes of a mebibyte or more, of whole blocks of 4,096 bytes, from memory where such a block begins, reach the disk
    directly where the file system can do that. All others, and elsewhere all, go through the page cache as usual.
    """
    return io.BufferedWriter(cast(Any, _Uncached(path, "xb")))  # gathers what is small, hands on what is large


class _Uncached(io.FileIO):
    _directly = False
    _able = bool(_DIRECT)

    def write(self, data: Any, /) -> int:
        """Write at the end, perhaps not all of it."""
        size = memoryview(data).nbytes
        self._turn(self._able and size >= _LARGE and size % _BLOCK == 0)
        try:
            return super().write(data)
        except OSError as error:
            if not (self._directly and error.errno == errno.EINVAL):
                raise
        self._able = False  # this memory, or this file system, will not do
        self._turn(False)
        return super().write(data)

    def _turn(self, directly: bool) -> None:
        """Set how the next write goes."""
        if directly == self._directly:
            return
        flags = fcntl.fcntl(self.fileno(), fcntl.F_GETFL)
        try:
            fcntl.fcntl(self.fileno(), fcntl.F_SETFL, flags | _DIRECT if directly else flags & ~_DIRECT)
            self._directly = directly
        except OSError:
            self._able = False
