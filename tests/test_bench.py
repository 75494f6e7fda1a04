"""The benchmark itself: who runs is right, who cannot is named, and red tests silence a speed."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import __main__ as program
from bench import cases, gate, memory, own, peers, results, timing
from flowfast import _cpp

EAGER = ("torch, scripts", "torch, lean", "torch SDPA", "numpy", "scikit-learn")
REUSED = ("torch, lean, output reused", "numpy, output reused")
RATES = {"fma_float32": 1e11, "exp_float32": 1e9, "copy_bytes": 1e6, "read_bytes": 2e6, "fill_bytes": 4e6}


def _small(name: str, operation: str, std: float = 1.0) -> cases.Case:
    """Few points and components, contenders that compile nothing."""
    made = cases.case(name, operation, 16, 5, 4, std)
    few = {key: who for key, who in made.contenders.items() if who.ours or key in EAGER + REUSED}
    return replace(made, problem=replace(made.problem, steps=100), contenders=few)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is skipped or cut short because the machine is busy."""
    for limit in ("LONGEST", "ONCE", "SLOW"):
        monkeypatch.setattr(timing, limit, float("inf"))


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("operation", ["score", "weights", "flow", "diameter"])
def test_contenders_agree_with_float64(operation: str) -> None:
    with torch.inference_mode():
        found = timing.measure(_small("small", operation), seconds=0.0)
    assert {"flowfast", "torch, scripts", "torch, lean", "numpy"} <= set(found.timings)
    for name, one in found.timings.items():
        assert one.error_median < 1e-4 and one.turns == timing.FEWEST_TURNS, name
        assert one.fastest <= one.lower <= one.median <= one.upper
    assert not operation == "weights" or {"flowfast, output reused", *REUSED} <= set(found.timings)


@pytest.mark.usefixtures("patient")
def test_everybody_is_listed() -> None:
    def missing(problem: peers.Problem) -> peers.Run:
        raise ModuleNotFoundError("no such peer", name="peer")

    def broken(problem: peers.Problem) -> peers.Run:
        raise FloatingPointError("fell over")

    case = _small("small", "score")
    extra = {"gone": cases.Contender(missing), "broken": cases.Contender(broken)}
    case = replace(case, contenders={**case.contenders, **extra})
    found = timing.measure(case, seconds=0.0)
    assert set(found.timings) | set(found.absent) == set(case.contenders)
    assert found.absent["gone"] == "not installed (peer)"
    assert found.absent["broken"] == "failed: FloatingPointError: fell over"
    assert found.absent["torch, lean, output reused"] == "offers weights"
    ours = replace(case, contenders={"flowfast": cases.Contender(broken, ours=True)})
    with pytest.raises(FloatingPointError):
        timing.measure(ours, seconds=0.0)


def test_quartiles_stay_within_what_was_seen() -> None:
    median, lower, upper, fastest, turns = timing.summary([0.1, 0.4])
    assert fastest == 0.1 and 0.1 < lower < median == 0.25 < upper < 0.4 and turns == 2


def test_the_extension_alone_gives_the_score() -> None:
    case = cases.named("one point")
    alone = case.contenders["flowfast, binding"].build(case.problem)
    assert timing.row_errors(alone(), case.exact())[-1] < 1e-5


@pytest.mark.usefixtures("patient")
def test_turns_alternate_and_begin_with_untimed_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(timing, "SETTLE", 1e-9)
    turns = {name: partial(timing.turn, partial(calls.append, name)) for name in "AB"}
    taken = timing.take_turns(turns, seconds=0.0)
    assert calls == ["A", "A", "B", "B"] * timing.FEWEST_TURNS
    assert [len(taken[name]) for name in "AB"] == [timing.FEWEST_TURNS] * 2
    monkeypatch.setattr(timing, "SLOW", 0.0)  # every call is slow: none is made without being timed
    calls.clear()
    timing.take_turns(turns, seconds=0.0)
    assert calls == ["A", "B"] * timing.FEWEST_TURNS
    monkeypatch.setattr(timing, "ONCE", 0.0)
    assert all(len(taken) == 1 for taken in timing.take_turns(turns, seconds=0.0).values())


def test_long_calls_are_made_once() -> None:
    calls: list[int] = []

    def build(problem: peers.Problem) -> peers.Run:
        def run() -> torch.Tensor:
            calls.append(len(problem.x))
            return problem.x

        return run

    case = replace(_small("small", "score"), contenders={"slow": cases.Contender(build, ours=True)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "ONCE", 0.0)
        found = timing.measure(case, seconds=0.0)
    assert calls == [16] and found.timings["slow"].turns == 1


def test_what_does_not_fit_memory_is_refused() -> None:
    problem = replace(_small("small", "score").problem, x=torch.empty(1, 4).expand(2**40, 4))
    with pytest.raises(peers.NotOffered, match="this machine has"):
        peers.scripts(problem)


def test_memory_of_a_call_is_seen() -> None:
    size = 200 * 2**20
    script = f"from bench import memory; print(memory.extra_of(lambda: len(b'x' * int('{size}'))))"
    run = subprocess.run([sys.executable, "-c", script], cwd=gate.ROOT, capture_output=True, text=True, check=True)
    assert abs(int(run.stdout) - size) < 2**21, "the peak (the kernel counts pages in batches), though nothing is left"


def test_memory_of_a_contender_is_measured_in_a_process_of_its_own(capsys: Any) -> None:
    found = memory.extra("S1", ["flowfast", "nobody"], quick=True)
    assert list(found) == ["flowfast"] and 0 <= found["flowfast"] < 64 * 2**20
    assert "memory of nobody in S1 is not known" in capsys.readouterr().err


def test_floors_count_arithmetic_and_memory() -> None:
    case = _small("small", "weights")  # reads 16 x 4 points and 5 x 4 means, writes 16 x 5 weights
    arithmetic, memory_floor = results.floors(case, RATES)
    assert arithmetic == pytest.approx(2 * 16 * 5 * 4 / 1e11 + 16 * 5 / 1e9)
    assert memory_floor == pytest.approx(4 * 80 / 1e6 + 4 * (84 - 80) / 2e6)
    found = results.as_json(case, timing.Measured({"flowfast": _one(1.0, 0.0)}, {}), RATES, {"flowfast": 3 * 2**20})
    assert found["contenders"]["flowfast"]["share_of_floor"] == pytest.approx(memory_floor), "the larger of the two"
    assert "extra MiB" in _printed(results.table(found))


def test_reused_outputs_are_compared_with_reused_outputs() -> None:
    times = {"flowfast": 0.4, "flowfast, output reused": 0.1, "numpy": 0.8, "torch, lean, output reused": 0.2}
    measured = timing.Measured({name: _one(seconds, 0.0) for name, seconds in times.items()}, {})
    found = results.as_json(_small("small", "weights"), measured, RATES)
    fresh, reused = (found["contenders"][name] for name in ("flowfast", "flowfast, output reused"))
    assert fresh["best_peer"] == "numpy" and fresh["ratio_to_best_peer"] == pytest.approx(2)
    assert fresh["best_of_all"] == "torch, lean, output reused" and fresh["ratio_to_best_of_all"] == pytest.approx(0.5)
    assert reused["ratio_to_best_peer"] == reused["ratio_to_best_of_all"] == pytest.approx(2)
    assert "x best of all" in _printed(results.table(found))


def test_growth_takes_the_copy_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "POINTS", 160)
    monkeypatch.setattr(own, "DIMENSIONS", (16, 64))
    with torch.inference_mode():
        found = own.growth(seconds=0.0, quick=True)
    rows = found["contenders"]
    assert {"d=16, copy", "d=16, flowfast", "d=64, flowfast, adaptive"} <= set(rows)
    net = {d: rows[f"d={d}, flowfast"]["median"] - rows[f"d={d}, copy"]["median"] for d in (16, 64)}
    assert rows["d=64, flowfast"]["ratio"] == pytest.approx(net[64] / net[16])
    assert rows["d=64, flowfast"]["beyond_copy"] == pytest.approx(net[64] / 10)
    net = {d: rows[f"d={d}, flowfast"]["median"] - rows[f"d={d}, new copy"]["median"] for d in (16, 64)}
    assert rows["d=64, flowfast"]["ratio_new"] == pytest.approx(net[64] / net[16])
    assert "d=64, flowfast, adaptive" in _printed(own.table(found)) and json.dumps(found, allow_nan=False)


@pytest.mark.usefixtures("patient")
def test_every_instruction_set_takes_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "TIMED", ("S1",))
    found = own.instruction_sets(seconds=0.0, quick=True)
    rows, sets = found["contenders"], _cpp.isas()
    assert list(rows) == [f"S1, {isa}" for isa in sets] and rows[f"S1, {sets[0]}"]["ratio"] == 1
    assert all(row["turns"] == timing.FEWEST_TURNS for row in rows.values())
    assert f"S1, {sets[-1]}" in _printed(own.table(found))
    monkeypatch.setattr(_cpp, "isas", lambda: ("no such set",))
    with pytest.raises(RuntimeError, match="ended while timing S1"):
        own.instruction_sets(seconds=0.0, quick=True)


def test_slow_peers_are_skipped_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LONGEST", 0.0)
    found = timing.measure(_small("small", "score"), seconds=0.0)
    assert list(found.timings) == ["flowfast"] and found.absent["numpy"].startswith("skipped: above")


def _one(median: float, error: float) -> timing.Timing:
    return timing.Timing(median, median, median, median, 3, error, error, error)


def _printed(table: Any) -> str:
    screen = Console(width=200, record=True, file=io.StringIO())
    screen.print(table)
    return screen.export_text()


def test_results_compare_like_with_like() -> None:
    case = _small("small", "flow")
    case = replace(case, contenders={**case.contenders, "other": cases.Contender(peers.lean, method="any")})
    times = {
        "flowfast": _one(0.1, 1e-6), "flowfast, adaptive": _one(0.01, 1e-6), "torch, lean": _one(0.5, 1e-6),
        "numpy": _one(0.3, 1e-3), "other": _one(0.2, float("inf")),
    }  # fmt: skip
    found = results.as_json(case, timing.Measured(times, {"JAX": "not installed (jax)"}), RATES)
    rows = found["contenders"]
    assert rows["flowfast"]["best_peer"] == "numpy" and rows["flowfast"]["ratio_to_best_peer"] == pytest.approx(3)
    assert rows["flowfast, adaptive"]["best_peer"] == "torch, lean", "the only peer that is accurate enough"
    assert rows["flowfast"]["share_of_ceiling"] == pytest.approx(case.flops / 1e11 / 0.1)
    assert rows["flowfast, adaptive"]["share_of_ceiling"] is None, "it does other operations than those counted"
    assert rows["other"]["error_worst"] is None and json.dumps(found, allow_nan=False)
    text = _printed(results.table(found))
    assert "JAX: not installed (jax)" in text and "not finite" in text


def test_red_tests_silence_the_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(gate, "red", lambda operations, reuse: set(operations))
    monkeypatch.setattr(program, "ceilings", lambda threads: {str(count): RATES for count in threads})
    monkeypatch.setattr("sys.argv", ["bench", "--quick", "--case", "S1", "--out", str(tmp_path)])
    assert program.main() == 1
    assert "not timed, the tests of score are red" in " ".join(capsys.readouterr().out.split())
    (written,) = tmp_path.glob("*-cpu.json")
    assert json.loads(written.read_text())["cases"] == {}


def test_a_green_run_is_reused_only_for_the_same_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Done:
        returncode, stdout = 0, ""

    def run(command: list[str], **_: object) -> Done:
        calls.append(command[-1])
        return Done()

    monkeypatch.setattr(gate, "STORE", tmp_path / "green.json")
    monkeypatch.setattr(gate.subprocess, "run", run)
    assert gate.red({"flow"}) == set() and gate.red({"flow"}, reuse=True) == set() and len(calls) == 1
    monkeypatch.setattr(gate, "fingerprint", lambda: "another")
    assert gate.red({"flow"}, reuse=True) == set() and len(calls) == 2
    Done.returncode = 1
    assert gate.red({"flow", "score"}) == {"flow", "score"}


def test_names_lead_to_cases() -> None:
    everything = [*cases.names(), *own.NAMES]
    assert {operation for name in everything for operation in gate.operations(name)} == set(gate.TESTS)
    assert set(memory.CASES) | set(own.TIMED) <= set(cases.names())
    for files in gate.TESTS.values():
        assert all((gate.ROOT / file).exists() for file in files)
