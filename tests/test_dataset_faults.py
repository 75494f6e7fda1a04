"""Teacher sets on disks and stores that fail: a typed error, nothing half-written, and resume ends with the same bytes.

Every fault is one of the C library's calls, or of a remote store's, failing at a place that the test chooses.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Outcome, Rule, Stage, digests, stage, stopped, until

from flowfast.dataset.store import is_part


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def one(place: Path) -> Iterator[Stage]:
    with stage(place) as made:
        yield made


@pytest.fixture(scope="module")
def calls(one: Stage, place: Path) -> list[tuple[str, str]]:
    """Every call of an uninterrupted run that changes a file; the run is in the folder "whole"."""
    path = place / "whole"
    done = one.run(path, Rule("any", f"{path}/"))
    assert done.code == 0, done.error
    return done.calls


@pytest.fixture(scope="module")
def whole(calls: list[tuple[str, str]], place: Path) -> dict[str, str]:
    """The files of that run."""
    assert calls
    return digests(place / "whole")


def _count(calls: list[tuple[str, str]], kind: str) -> int:
    return sum(one == kind for one, _ in calls)


def _check_failed_then_resumed(one: Stage, path: Path, whole: dict[str, str], failed: Outcome, reason: str) -> None:
    """A run that met a fault raised StorageError with the reason, left only whole files, and the next call finishes."""
    assert failed.code == 1 and failed.error.startswith("StorageError: ") and reason in failed.error, failed
    assert digests(path).items() <= whole.items(), "whole files alone are left"
    assert one.run(path).code == 0
    assert digests(path) == whole


def test_every_file_is_seen_by_the_faults(calls: list[tuple[str, str]], whole: dict[str, str], place: Path) -> None:
    """The tests below are worth nothing if files are written by calls that the faults do not know."""
    names = {f"{place}/whole/{name}" for name in whole}
    assert {path for kind, path in calls if kind in ("rename", "link")} == names and len(names) >= 8
    assert _count(calls, "open") == _count(calls, "file sync") == len(names) <= _count(calls, "write")


def test_a_receipt_is_begun_when_its_shard_is_durable(calls: list[tuple[str, str]], place: Path) -> None:
    """Written, synced, renamed, folder synced: the order in which a power failure cannot leave a receipt alone."""
    folders = {name: ("folder sync", f"{place}/whole/{name}") for name in ("shards", "receipts")}
    for shard in range(3):
        for folder, suffix in (("shards", "safetensors"), ("receipts", "json")):
            final = f"{place}/whole/{folder}/shard-{shard:08d}.{suffix}"
            mine = [
                at for at, (_, path) in enumerate(calls) if path == final or f".shard-{shard:08d}.{suffix}." in path
            ]
            kinds = [calls[at][0] for at in mine]
            assert kinds == ["open", *["write"] * (len(kinds) - 3), "file sync", "rename"] and len(kinds) >= 4
            assert calls[mine[-1] + 1] == folders[folder]
            if folder == "shards":
                durable = mine[-1] + 1
            else:
                assert mine[0] > durable


@pytest.mark.parametrize("lasting", [True, False], ids=["lasting", "once"])
def test_no_space_at_every_write(
    one: Stage, whole: dict[str, str], tmp_path: Path, calls: list[tuple[str, str]], lasting: bool
) -> None:
    for nth in range(1, _count(calls, "write") + 1):
        path = tmp_path / str(nth)
        rule = Rule("write", f"{path}/", nth, "fail from here" if lasting else "fail", errno.ENOSPC)
        failed = one.run(path, rule)
        _check_failed_then_resumed(one, path, whole, failed, "No space left on device")


@pytest.mark.parametrize("kind", ["open", "file sync", "folder sync", "rename", "make folder"])
def test_a_device_that_fails_at_every_call(
    one: Stage, whole: dict[str, str], tmp_path: Path, calls: list[tuple[str, str]], kind: str
) -> None:
    assert _count(calls, kind) > 0
    for nth in range(1, _count(calls, kind) + 1):
        path = tmp_path / str(nth)
        failed = one.run(path, Rule(kind, f"{path}/", nth, "fail", errno.EIO))
        _check_failed_then_resumed(one, path, whole, failed, "Input/output error")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["write", "file sync"])
def test_a_fault_in_a_worker_process(one: Stage, whole: dict[str, str], tmp_path: Path, kind: str) -> None:
    rule = Rule(kind, "shard-00000001", 1, "fail from here", errno.ENOSPC)
    failed = one.run(tmp_path / "set", workers=2, start="forkserver", workers_rule=rule)
    _check_failed_then_resumed(one, tmp_path / "set", whole, failed, "No space left on device")


def test_short_writes_are_gone_on_with(
    one: Stage, whole: dict[str, str], tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    for nth in range(1, _count(calls, "write") + 1):
        path = tmp_path / str(nth)
        done = one.run(path, Rule("write", f"{path}/", nth, "half"))
        assert done.code == 0 and _count(done.calls, "write") == _count(calls, "write") + 1
        assert digests(path) == whole


def test_reading_that_fails_at_every_call(one: Stage, whole: dict[str, str], tmp_path: Path) -> None:
    """The next call on a set that lacks its last receipt says what it cannot read, before it opens the finished set."""
    receipt, path = "receipts/shard-00000002.json", tmp_path / "set"
    assert one.run(path).code == 0
    (path / receipt).unlink()
    reads = [call for call in one.run(path, Rule("open to read", f"{path}/")).calls if "/shards/" not in call[1]]
    assert {"plan.json", "mixture.safetensors", "shard-00000000.json"} <= {Path(file).name for _, file in reads}
    for nth in range(1, len(reads) + 1):
        (path / receipt).unlink()
        done = one.run(path, Rule("open to read", f"{path}/", nth, "fail", errno.EIO))
        assert done.code == 1 and done.error.startswith("StorageError: "), (reads[nth - 1], done.error)
        assert "Input/output error" in done.error
        assert one.run(path).code == 0
        assert digests(path) == whole


def test_a_file_system_without_links(one: Stage, whole: dict[str, str], tmp_path: Path) -> None:
    done = one.run(tmp_path / "set", Rule("link", f"{tmp_path}/set/", 1, "fail", errno.EPERM))
    assert done.code == 0 and _count(done.calls, "link") == 1
    assert digests(tmp_path / "set") == whole


def test_another_plan_is_refused_before_any_call_that_changes_a_file(one: Stage, tmp_path: Path) -> None:
    path = tmp_path / "set"
    assert one.run(path, rows=8).code == 0
    before = digests(path)
    for change, says in (({"seed": 8}, "seed is 7 there, 8 here"), ({"rows_per_shard": 3}, "rows_per_shard is 4")):
        refused = one.run(path, Rule("any", f"{path}"), rows=8, **change)
        assert refused.code == 1 and refused.error.startswith("ValueError: ") and says in refused.error
        assert refused.calls == []
    assert digests(path) == before


def test_a_full_file_system(tmp_path: Path) -> None:
    """A real one: a tmpfs in a mount namespace of its own, filled while a run on it stands still."""
    inside = tmp_path / "disk"
    inside.mkdir()
    unshare = [shutil.which("unshare") or "unshare", "-Urm", "sh", "-c"]
    mounted = 'mount -t tmpfs -o size=4m none "$0"'
    if subprocess.run([*unshare, mounted, inside], capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs in a namespace of one's own")
    with stage(tmp_path, [*unshare, f'{mounted} && exec "$@"', str(inside)]) as one:
        outside = Path(f"/proc/{one.pid}/root{inside}")  # the same folder, seen from this namespace
        assert one.run(tmp_path / "whole", rows=80).code == 0
        run = one.start(inside / "set", Rule("write", "/shards/.shard-00000007", 1, "stop"), rows=80)
        until(lambda: stopped(run), "the run to stop")
        with (outside / "hog").open("wb", buffering=0) as hog, pytest.raises(OSError, match="No space left"):
            while True:
                hog.write(b"x" * 4096)
        os.kill(run, signal.SIGCONT)
        failed = one.wait(run)
        assert failed.code == 1 and failed.error.startswith("StorageError: ") and "No space left" in failed.error
        left = digests(outside / "set")
        assert not any(map(is_part, left)) and sum(name.startswith("shards/") for name in left) == 7
        assert left.items() <= digests(tmp_path / "whole").items()
        refused = one.run(inside / "set", Rule("any", f"{inside}/set"), rows=80)
        assert refused.code == 1 and "free some space" in refused.error and refused.calls == []
        (outside / "hog").unlink()
        assert one.run(inside / "set", rows=80).code == 0
        assert digests(outside / "set") == digests(tmp_path / "whole")
