"""The tuner of launch configurations: what it may choose, what it writes, and the whole path without a GPU."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import trials, tune
from bench.trials import Dropped, Machine, Trial
from flowfast.kernels import launch
from flowfast.kernels.launch import Launch

ROW = {"gpu": "*", "dtype": "float32", "most_d": 64, "blocks": {"BLOCK_A": 32}, "warps": 4, "stages": 2}
CPU = Machine("rehearsal", torch.device("cpu"), Path("nowhere"))
SHARED = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1,%f2}, %rd1, %rd2, %p1, 1, 1, 0, 0;"
REGISTERS = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1,%f2}, {%r1,%r2}, %rd2, %p1, 1, 1, 0;"

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(os.environ.get("FLOWFAST_TEST_DEVICE", "cpu") != "cpu", reason="rehearses on the CPU"),
]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tuner sets is gone after the test."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", "nowhere")


def test_rehearsal_goes_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--rehearse", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for kernel in tune.tables():
        table = json.loads((tmp_path / f"{kernel}.json").read_text())
        shipped = launch.rows(kernel)
        mine, rest = table[: -len(shipped)], table[-len(shipped) :]
        assert rest == shipped and {row["gpu"] for row in mine} == {"rehearsal"}
        assert len(mine) == sum(row["gpu"] == "*" for row in shipped)
        assert f"{kernel}, " in said and "2 tried" in said


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert "GPU" in capsys.readouterr().out


def test_a_rehearsal_never_writes_what_is_shipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--rehearse"]) == 2
    assert "--out" in capsys.readouterr().out


def _climbed(monkeypatch: pytest.MonkeyPatch, cost: Any, machine: Machine) -> dict[str, Any] | None:
    monkeypatch.setitem(tune.SPACES, "kernel", {"BLOCK_A": (16, 32, 64, 128)})
    monkeypatch.setattr(tune, "seconds", lambda kernel, candidate, trials, machine: cost(candidate))
    return tune.climbed("kernel", ROW, [], machine)


def test_it_climbs_to_the_best(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One number at a time, past a wall of candidates that are dropped, and not beyond what is declared."""

    def cost(one: Launch) -> float:
        if one.stages == 3:
            raise Dropped("spills")
        return 128 / one.blocks["BLOCK_A"] + abs(one.warps - 8) + one.stages

    machine = Machine("some GPU", torch.device("cuda"), Path("nowhere"))
    best = _climbed(monkeypatch, cost, machine)
    assert best == ROW | {"blocks": {"BLOCK_A": 128}, "warps": 8, "stages": 1}
    assert "dropped: spills" in capsys.readouterr().out


def test_what_is_hardly_faster_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine("some GPU", torch.device("cuda"), Path("nowhere"))
    assert _climbed(monkeypatch, lambda one: 1.0 + 0.001 * one.warps, machine) == ROW


def test_a_faulty_fallback_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def cost(one: Launch) -> float:
        raise Dropped("spills")

    assert _climbed(monkeypatch, cost, CPU) is None
    assert "faulty: spills" in capsys.readouterr().out


def test_candidates_that_miss_the_reference_are_dropped() -> None:
    exact = torch.ones(2, 3, dtype=torch.float64)
    for error, dropped in ((1e-6, False), (1e-4, True), (math.nan, True)):
        got = exact.float()
        got[1, 0] += error
        trial = Trial(lambda got=got: got, exact, ROW)
        if dropped:
            with pytest.raises(Dropped, match="reference"):
                trials.seconds("kernel", Launch({}, 4, 1), [trial], CPU)
        else:
            assert trials.seconds("kernel", Launch({}, 4, 1), [trial], CPU) > 0


def test_candidates_that_do_not_run_are_dropped() -> None:
    def run() -> torch.Tensor:
        raise MemoryError("out of shared memory")

    with pytest.raises(Dropped, match="MemoryError"):
        trials.seconds("kernel", Launch({}, 4, 1), [Trial(run, torch.ones(1, 1), ROW)], CPU)


def test_unsafe_candidates_are_dropped_for_good(tmp_path: Path) -> None:
    """The second time nothing is compiled, yet the candidate is no better."""
    ones = torch.ones(1, 1, dtype=torch.float64)
    machine = Machine("rehearsal", torch.device("cpu"), tmp_path)

    def run(text: str) -> Trial:
        return Trial(lambda: (tmp_path / "kernel.ptx").write_text(text) and ones, ones, ROW)

    assert trials.seconds("kernel", Launch({}, 2, 1), [run(SHARED)], machine) > 0
    (tmp_path / "kernel.ptx").unlink()
    for _ in range(2):
        with pytest.raises(Dropped, match="A in registers"):
            trials.seconds("kernel", Launch({}, 4, 1), [run(REGISTERS)], machine)
    assert trials.seconds("kernel", Launch({}, 2, 1), [run(SHARED)], machine) > 0


def test_rows_of_this_gpu_are_replaced() -> None:
    old, other, new = ({**ROW, "gpu": gpu, "warps": w} for gpu, w in (("mine", 1), ("other", 2), ("mine", 8)))
    assert tune.merged([old, other, ROW], [new]) == [new, other, ROW]
    assert tune.merged([other, ROW], []) == [other, ROW]


def test_every_table_has_workloads_and_a_space() -> None:
    for kernel in tune.tables():
        assert trials.WORKLOADS[trials.family(kernel, trials.WORKLOADS)]
        space = tune.SPACES[trials.family(kernel, tune.SPACES)]
        assert all(set(space) <= set(row["blocks"]) for row in launch.rows(kernel))
    assert trials.family("flow_span", ("flow", "flow_span", "span")) == "flow_span"
    assert trials.family("flow_full", ("flow", "flow_span", "span")) == "flow"
    with pytest.raises(ValueError, match="does not know"):
        trials.family("unheard of", trials.WORKLOADS)


def test_an_override_ends_with_its_block() -> None:
    shipped = launch.launch("diameter", torch.float32, 5, "")
    candidate = Launch({"BLOCK_I": 16, "BLOCK_J": 16, "BLOCK_D": 16}, 2, 1)
    with pytest.raises(RuntimeError), launch.override("diameter", candidate) as asked:
        assert launch.launch("diameter", torch.float64, 7, "some GPU") == candidate
        with launch.override("other", candidate), launch.override("diameter", None) as inner:
            assert launch.launch("diameter", torch.float32, 5, "") == shipped
        assert inner == [(torch.float32, 5)]
        raise RuntimeError
    assert asked == [(torch.float64, 7)]
    assert launch.launch("diameter", torch.float32, 5, "") == shipped


def test_rows_are_searched_in_their_order() -> None:
    table = [{**ROW, "gpu": "mine", "most_d": 16}, {**ROW, "most_d": 16, "warps": 1}, {**ROW, "warps": 2}]
    found = [launch.row_for(table, torch.float32, d, gpu) for d, gpu in ((16, "mine"), (16, ""), (17, "mine"))]
    assert found == table
    assert launch.row_for(table, torch.float32, 65, "mine") is None
    assert launch.row_for(table, torch.float64, 1, "mine") is None
    with pytest.raises(LookupError, match="bfloat16, d = 5 on the interpreter"):
        launch.launch("diameter", torch.bfloat16, 5, "")
