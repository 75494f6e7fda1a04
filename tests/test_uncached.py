"""Files written past the page cache: the same bytes by whichever way they go."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
from pathlib import Path

import pytest

from flowfast.dataset.uncached import new_uncached_file

LARGE = 1 << 20
PIECES = [100, LARGE, 4 * LARGE, 2 * LARGE + 4_096, LARGE + 1, 7, 3 * LARGE]  # from the second on where no block begins


def memory() -> memoryview:
    """Bytes that differ, from where a page begins."""
    held = mmap.mmap(-1, sum(PIECES))
    held[:] = os.urandom(len(held))
    return memoryview(held)


def write(path: Path, content: memoryview, pieces: list[int]) -> None:
    with new_uncached_file(path) as stream:
        begin = 0
        for size in pieces:
            assert stream.write(content[begin : begin + size]) == size
            begin += size
        assert stream.tell() == begin


@pytest.mark.parametrize("pieces", [PIECES, PIECES[1:], [sum(PIECES)]])
def test_the_bytes_arrive(tmp_path: Path, pieces: list[int]) -> None:
    content = memory()
    write(tmp_path / "file", content, pieces)
    assert (tmp_path / "file").read_bytes() == content[: sum(pieces)]


@pytest.mark.parametrize("refusal", ["when asked for", "when written"])
def test_a_file_system_that_refuses_gets_them_as_usual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    content, set_flags, asked = memory(), fcntl.fcntl, []

    def refuse(file: int, command: int, flags: int = 0) -> int:
        directly = command == fcntl.F_SETFL and flags & os.O_DIRECT
        if directly:
            asked.append(flags)
        if directly and refusal == "when asked for":
            raise OSError(errno.EINVAL, "no such flag here")
        return set_flags(file, command, flags)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    # at an address where no block begins a direct write is invalid
    skew = 1 if refusal == "when written" else 0
    write(tmp_path / "file", content[skew:], PIECES[1:])
    assert (tmp_path / "file").read_bytes() == content[skew : skew + sum(PIECES[1:])]
    assert len(asked) == 1  # it is not asked again


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        new_uncached_file(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_what_the_system_refuses_is_told(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * LARGE, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path / "file", memory(), [3 * LARGE])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
