"""Killed, interrupted, divided or doubled: a teacher set ends with the bytes of a run that nothing disturbed.

FLOWFAST_LONG=1 kills at 200 random moments instead of 20.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import Rule, Stage, digests, session, stage, stopped, until

from flowfast import GaussianMixture
from flowfast.dataset.store import is_part

SHARDS = 10
SET: dict[str, Any] = {"rows": 38, "rows_per_shard": 4}  # 10 shards, the last one shorter
PART, SHARD = ".shard-{:08d}.safetensors.", "/shards/shard-{:08d}.safetensors"
RECEIPT_PART, RECEIPT = ".shard-{:08d}.json.", "/receipts/shard-{:08d}.json"
POINTS = {  # kind of call, path, what happens there, whether the shard's receipt stands afterwards
    "after temporary file open": ("open", PART, "die after", False),
    "mid-write": ("write", PART, "half then die", False),
    "before fsync": ("file sync", PART, "die before", False),
    "before rename": ("rename", SHARD, "die before", False),
    "after rename": ("rename", SHARD, "die after", False),
    "before receipt": ("open", RECEIPT_PART, "die before", False),
    "after receipt": ("rename", RECEIPT, "die after", True),
}
KILLS = 200 if os.environ.get("FLOWFAST_LONG") else 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def one(place: Path) -> Iterator[Stage]:
    with stage(place) as made:
        yield made


@pytest.fixture(scope="module")
def whole(one: Stage, place: Path) -> dict[str, str]:
    """The files of an uninterrupted run."""
    assert one.run(place / "whole", **SET).code == 0
    found = digests(place / "whole")
    assert sum(name.startswith("shards/") for name in found) == SHARDS
    return found


def _receipts(path: Path) -> int:
    return len(list(path.glob("receipts/shard-*")))


def _resume(one: Stage, path: Path, **call: Any) -> int:
    """The next call, which must end well; the shards that it made."""
    done = one.run(path, Rule("rename", f"{path}/shards/"), **SET, **call)
    assert done.code == 0, done.error
    return len(done.calls)


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point_of_every_shard(one: Stage, tmp_path: Path, whole: dict[str, str], point: str) -> None:
    kind, where, action, stands = POINTS[point]
    for shard in range(SHARDS):
        path = tmp_path / str(shard)
        killed = one.run(path, Rule(kind, where.format(shard), 1, action), **SET)
        assert killed.code == -signal.SIGKILL
        assert _receipts(path) == shard + stands
        assert _resume(one, path) == SHARDS - shard - stands, "what stands is not made again"
        assert digests(path) == whole


@pytest.mark.parametrize("scheme", ["", "disk://"], ids=["local", "remote"])
def test_killed_before_every_call_that_changes_a_file(one: Stage, tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "whole"
    calls = one.run(f"{scheme}{path}", Rule("any", f"{path}/")).calls
    assert len(calls) >= 25
    for nth in range(1, len(calls) + 1):
        path = tmp_path / str(nth)
        assert one.run(f"{scheme}{path}", Rule("any", f"{path}/", nth, "die before")).code == -signal.SIGKILL
        assert one.run(f"{scheme}{path}").code == 0
        assert digests(path) == digests(tmp_path / "whole"), calls[nth - 1]


@pytest.mark.timeout(1200)
def test_killed_at_random_moments(one: Stage, tmp_path: Path, whole: dict[str, str]) -> None:
    """Runs without helpers: each folder meets four kills, or fewer when a run was faster, and is then completed."""
    chance, killed, folders = random.Random(1), 0, 0
    start = time.monotonic()
    one.run(tmp_path / "timed", **SET)
    needed = time.monotonic() - start
    while killed < KILLS * 3 // 5:
        path, folders = tmp_path / str(folders), folders + 1
        for _ in range(4):
            run = one.start(path, **SET, hands=2)
            time.sleep(chance.uniform(0.0, needed))
            os.kill(run, signal.SIGKILL)
            killed += one.wait(run).code == -signal.SIGKILL
        _resume(one, path)
        assert digests(path) == whole
    assert folders <= KILLS, "most runs were killed before their end"


def _workers(run: int) -> list[int]:
    """Processes that make shards for a run that starts them through a fork server."""
    return [pid for pid, each in session(run).items() if pid != run and each.parent not in (run, os.getpid())]


@pytest.mark.timeout(3600)
def test_workers_killed_at_random_moments(one: Stage, tmp_path: Path) -> None:
    """The run goes on without them, to the same bytes."""
    many = {"rows": 598, "rows_per_shard": 4}
    assert one.run(tmp_path / "whole", **many).code == 0
    chance, killed, folders = random.Random(2), 0, 0
    while killed < KILLS // 4:
        path, folders = tmp_path / str(folders), folders + 1
        run = one.start(path, **many, workers=2, start="forkserver")
        while run in session(run) and killed < KILLS // 4:
            seen = _receipts(path)
            until(lambda run=run, path=path, seen=seen: _receipts(path) > seen or run not in session(run), "a shard")
            time.sleep(chance.expovariate(50.0))
            for pid in _workers(run)[:1]:
                os.kill(pid, signal.SIGKILL)
                killed += 1
        done = one.wait(run)
        assert done.code == 0, done.error
        assert digests(path) == digests(tmp_path / "whole")


@pytest.mark.timeout(600)
def test_a_shard_that_kills_its_workers_is_set_aside(one: Stage, tmp_path: Path, whole: dict[str, str]) -> None:
    path, deadly = tmp_path / "set", Rule("rename", SHARD.format(3), 1, "die before")
    done = one.run(path, **SET, workers=2, start="forkserver", workers_rule=deadly)
    assert done.code == 1
    assert done.error == (
        "ShardsFailed: 1 shards could not be made, first shard 3: its worker process ended with code -9, 3 times\n"
    )
    assert digests(path).items() <= whole.items() and _receipts(path) == SHARDS - 1
    assert _resume(one, path) == 1
    assert digests(path) == whole


@pytest.mark.timeout(3600)
def test_coordinators_killed_at_random_moments(one: Stage, tmp_path: Path) -> None:
    """Their workers end with them, and the next call goes on from what they made."""
    many = {"rows": 598, "rows_per_shard": 4}
    assert one.run(tmp_path / "whole", **many).code == 0
    chance = random.Random(3)
    for turn in range(KILLS * 3 // 20):
        path, least = tmp_path / str(turn), chance.randrange(1, 120)
        run = one.start(path, **many, workers=2, start="forkserver")
        until(lambda path=path, least=least: _receipts(path) >= least, f"{least} shards")
        os.kill(run, signal.SIGKILL)
        assert one.wait(run).code == -signal.SIGKILL
        until(lambda run=run: not session(run), "its workers to end")
        assert one.run(path, **many).code == 0
        assert digests(path) == digests(tmp_path / "whole")


@pytest.mark.parametrize("call", [{"workers": 2}, {"workers": 3}, {"workers": 8}, {"threads": 2}], ids=str)
@pytest.mark.timeout(600)
def test_workers_and_threads_do_not_matter(
    one: Stage, tmp_path: Path, whole: dict[str, str], call: dict[str, Any]
) -> None:
    start = "spawn" if call == {"workers": 2} else "forkserver"  # the real one is slower by an import for each worker
    done = one.run(tmp_path / "set", **SET, **call, start=start)
    assert done.code == 0, done.error
    assert digests(tmp_path / "set") == whole


@pytest.mark.timeout(600)
def test_workers_on_a_remote_store(one: Stage, tmp_path: Path, whole: dict[str, str]) -> None:
    done = one.run(f"disk://{tmp_path}/set", **SET, workers=2, start="forkserver")
    assert done.code == 0, done.error
    assert digests(tmp_path / "set") == whole


def test_divided_by_rank_and_resumed_by_others(one: Stage, tmp_path: Path, whole: dict[str, str]) -> None:
    """Three processes, one of them killed, and two that divide what is left."""
    path = tmp_path / "set"
    runs = [one.start(path, **SET, rank=[rank, 3]) for rank in range(2)]
    dying = one.start(path, Rule("rename", RECEIPT.format(5), 1, "die before"), **SET, rank=[2, 3])
    assert [one.wait(run).code for run in (*runs, dying)] == [0, 0, -signal.SIGKILL]
    assert 6 <= _receipts(path) < SHARDS and not (path / "manifest.json").exists()
    runs = [one.start(path, **SET, rank=[rank, 2]) for rank in range(2)]
    assert [one.wait(run).code for run in runs] == [0, 0]
    assert digests(path) == whole


def test_several_runs_on_one_folder_at_once(one: Stage, tmp_path: Path, whole: dict[str, str]) -> None:
    for turn in range(5):
        path = tmp_path / str(turn)
        runs = [one.start(path, **SET, hands=2) for _ in range(3)]
        assert [one.wait(run).error for run in runs] == ["", "", ""]
        assert digests(path) == whole


def test_a_run_that_sleeps_while_another_completes_the_set(one: Stage, tmp_path: Path) -> None:
    """Stopped before each of its calls in turn: neither run fails, whatever the other one takes away."""
    path = tmp_path / "whole"
    calls = one.run(path, Rule("any", f"{path}/")).calls
    for nth in range(1, len(calls) + 1):
        path = tmp_path / str(nth)
        sleeper = one.start(path, Rule("any", f"{path}/", nth, "stop"))
        until(lambda run=sleeper: stopped(run), "the run to stop")
        other = one.run(path)
        os.kill(sleeper, signal.SIGCONT)
        slept = one.wait(sleeper)
        assert (other.code, slept.code) == (0, 0), (calls[nth - 1], other.error, slept.error)
        assert digests(path) == digests(tmp_path / "whole"), calls[nth - 1]


@pytest.fixture(scope="module")
def endless(place: Path) -> list[str]:
    """A command that takes minutes, without its --out."""
    GaussianMixture.random(3, 4, half_width=1.0, std=0.2, seed=1).save(place / "mixture.safetensors")
    command = f"generate --means {place}/mixture.safetensors --segments 2 --rows 20000000 --rows-per-shard 1000"
    return command.split()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
@pytest.mark.timeout(600)
def test_signals_stop_the_command_and_the_next_call_goes_on(
    one: Stage, tmp_path: Path, endless: list[str], number: int, code: int, workers: int
) -> None:
    path, stood = tmp_path / "set", dict[str, str]()
    for _ in range(2):
        made = _receipts(path)
        run = one.start(path, command=[*endless, "--out", str(path), "--workers", str(workers)], start="forkserver")
        until(lambda made=made: _receipts(path) > made, "a shard")
        os.killpg(run, number) if number == signal.SIGINT else os.kill(run, number)  # Ctrl-C reaches all processes
        until(lambda run=run: not session(run), "the end", seconds=30)
        ended = one.wait(run)
        assert ended.code == code and "Traceback" not in ended.error, ended.error
        assert ended.error.splitlines()[-1].startswith("flowfast: stopped; finished")
        left = digests(path)
        assert not any(map(is_part, left)) and stood.items() <= left.items() and len(left) > len(stood)
        for name in (name for name in left if name.startswith("receipts/")):
            receipt = json.loads((path / name).read_bytes())
            assert left[f"shards/shard-{receipt['shard']:08d}.safetensors"] == receipt["sha256"]
        stood = left


@pytest.mark.timeout(600)
def test_ctrl_c_while_workers_start_is_quiet(one: Stage, tmp_path: Path, endless: list[str]) -> None:
    command = [*endless, "--out", str(tmp_path / "set"), "--workers", "3"]
    run = one.start(tmp_path, command=command)
    until(lambda: len(session(run)) >= 4, "workers")
    os.killpg(run, signal.SIGINT)
    until(lambda: not session(run), "the end", seconds=30)
    ended = one.wait(run)
    assert ended.code == 130 and "Traceback" not in ended.error, ended.error
