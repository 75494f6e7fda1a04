"""Where a teacher set's files live: the few operations that shards and receipts need, and the local file system."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from flowfast.dataset.uncached import new_uncached_file

Part = tuple[str, BinaryIO]  # name of an unfinished file, and the stream that fills it


class StorageError(OSError):
    """Files cannot be written or read: no space, no permission, a device that fails. What is finished stays."""


@contextlib.contextmanager
def refusals(store: Store) -> Iterator[None]:
    """Turn what the system says of a write in the block into a StorageError that says where and what to do."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        said = error.strerror or str(error)
        raised = StorageError(f"{store.location} cannot be written ({said}): mend it, and the same call goes on")
        raised.errno = error.errno
        raise raised from error


class Store(Protocol):
    """File operations on one folder. Names are relative, with "/" between folder and file."""

    location: str
    """The folder, as text; what messages name and what worker processes open."""

    def open_temporary(self, name: str) -> Part:
        """A new unfinished file, not visible as `name` until `commit`; `is_part` knows its name."""

    def commit(self, part: Part, name: str, *, replace: bool = True) -> None:
        """Make an unfinished file durable as `name`, whole or not at all. FileExistsError where it must not replace."""

    def discard(self, part: Part) -> None:
        """Close and remove an unfinished file; nothing is raised."""

    def read_bytes(self, name: str, most: int) -> bytes:
        """Contents of a regular file. FileNotFoundError, ValueError above `most` bytes, else StorageError."""

    def size(self, name: str) -> int | None:
        """Bytes of a regular file; None where there is none."""

    def list(self, folder: str) -> Iterator[str]:
        """Names of everything in "", "shards" or "receipts", unfinished files included, in any order."""

    def remove(self, name: str) -> None:
        """Remove a file that may be gone already."""

    def is_abandoned(self, part: str) -> bool:
        """Whether the process that wrote the unfinished file is known to be gone."""

    def free_bytes(self) -> int | None:
        """Space that is left; None where that is not known."""


class LocalStore:
    """A folder of the local file system: fsync before and after every rename, permissions by the umask."""

    def __init__(self, folder: str | Path) -> None:
        self.location = os.fspath(folder)
        self._root = Path(folder)

    def open_temporary(self, name: str) -> Part:
        """See `Store`."""
        path = self._root / name
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            _sync_folder(path.parent.parent)
        part = part_name(name)
        return part, new_uncached_file(self._root / part)

    def commit(self, part: Part, name: str, *, replace: bool = True) -> None:
        """See `Store`."""
        temporary, stream = self._root / part[0], part[1]
        stream.flush()
        os.fsync(stream.fileno())
        stream.close()
        if replace:
            os.replace(temporary, self._root / name)
        else:
            _link(temporary, self._root / name)
            temporary.unlink(missing_ok=True)
        _sync_folder((self._root / name).parent)

    def discard(self, part: Part) -> None:
        """See `Store`."""
        with contextlib.suppress(OSError):
            part[1].close()  # writes what is buffered, which may fail again
        with contextlib.suppress(OSError):
            (self._root / part[0]).unlink()

    def read_bytes(self, name: str, most: int) -> bytes:
        """See `Store`."""
        size = self.size(name)
        if size is None:
            raise FileNotFoundError(f"{self._root / name} does not exist or is no regular file")
        if size > most:
            raise ValueError(f"{self._root / name} must hold at most {most} bytes; it holds {size}: restore it")
        try:
            with (self._root / name).open("rb") as stream:
                return stream.read(size)  # read(most) would set aside that much memory
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"{self._root / name} cannot be read ({error.strerror}): mend it") from error

    def size(self, name: str) -> int | None:
        """See `Store`."""
        try:
            path = self._path(name)
            return path.lstat().st_size if path.is_file() and not path.is_symlink() else None
        except (OSError, ValueError):
            return None

    def list(self, folder: str) -> Iterator[str]:
        """See `Store`."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder(folder)) as entries:
            for entry in entries:
                yield f"{folder}/{entry.name}" if folder else entry.name

    def remove(self, name: str) -> None:
        """See `Store`."""
        (self._root / name).unlink(missing_ok=True)

    def is_abandoned(self, part: str) -> bool:
        """See `Store`."""
        return is_abandoned(part)

    def free_bytes(self) -> int | None:
        """See `Store`."""
        place = self._root
        while not place.exists() and place != place.parent:
            place = place.parent
        return shutil.disk_usage(place).free

    def _path(self, name: str) -> Path:
        folder, _, last = name.rpartition("/")
        return self._folder(folder) / last

    def _folder(self, folder: str) -> Path:
        path = self._root / folder
        if folder and path.is_symlink():
            raise StorageError(f"{path} is a link: the folders of a teacher set must be its own")
        return path


def part_name(name: str) -> str:
    """A new name beside `name` for its unfinished file; it says which process of which machine writes it."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}.{last}.{_scope()}-{os.getpid()}-{secrets.token_hex(4)}.part"


def is_abandoned(part: str) -> bool:
    """Whether the unfinished file `part` is of a process of this machine that has ended."""
    scope, _, rest = part.split(".")[-2].partition("-")
    pid = rest.partition("-")[0]
    return scope == _scope() and pid.isdigit() and not os.path.exists(f"/proc/{pid}")


def is_part(name: str) -> bool:
    """Whether `name` is that of an unfinished file."""
    last = name.rpartition("/")[2]
    return last.startswith(".") and last.endswith(".part")


@contextlib.contextmanager
def new_file(store: Store, name: str, *, replace: bool = True) -> Iterator[BinaryIO]:
    """The stream of a file that stands after the block, whole, or not at all where the block or the store fails.

    Of several processes at one set, whoever completes it first sweeps away what the others have not finished. Theirs
    was to be the same file, which stands then: that is no failure.
    """
    part = store.open_temporary(name)
    try:
        yield part[1]
        store.commit(part, name, replace=replace)
    except BaseException as error:
        store.discard(part)
        if not isinstance(error, FileNotFoundError) or store.size(name) is None:
            raise
        if not replace:
            raise FileExistsError(f"{store.location}/{name} exists") from error


def write_file(store: Store, name: str, content: bytes, *, replace: bool = True) -> None:
    """Write a small file, whole or not at all."""
    with new_file(store, name, replace=replace) as stream:
        stream.write(content)


@functools.cache
def _scope() -> str:
    """Names where process numbers are unique: this boot of this host, in this namespace of process numbers."""
    said = [socket.gethostname()]
    with contextlib.suppress(OSError):
        said += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("|".join(said).encode()).hexdigest()[:12]


def _link(temporary: Path, path: Path) -> None:
    """A rename that fails where the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if path.exists():
            raise FileExistsError(f"{path} exists") from None
        os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
