"""The benchmark itself: who runs is right, who cannot is named, and red tests silence a speed."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import __main__ as program
from bench import cases, gate, peers, results, timing

EAGER = ("torch, scripts", "torch, lean", "torch, lean, output reused", "torch SDPA", "numpy", "scikit-learn")
RATES = {"fma_float32": 1e11, "exp_float32": 1e9}


def _small(name: str, operation: str, std: float = 1.0) -> cases.Case:
    """Few points and components, contenders that compile nothing."""
    made = cases.case(name, operation, 16, 5, 4, std)
    few = {key: who for key, who in made.contenders.items() if who.ours or key in EAGER}
    return replace(made, problem=replace(made.problem, steps=100), contenders=few)


@pytest.mark.parametrize("operation", ["score", "weights", "flow", "diameter"])
def test_contenders_agree_with_float64(operation: str) -> None:
    with torch.inference_mode():
        found = timing.measure(_small("small", operation), seconds=0.0)
    assert {"flowfast", "torch, scripts", "torch, lean", "numpy"} <= set(found.timings)
    for name, one in found.timings.items():
        assert one.error_median < 1e-4 and one.turns == 1, name
        assert one.fastest <= one.lower <= one.median <= one.upper


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
    found = timing._timing([0.1, 0.4], (0.0, 0.0, 0.0))
    assert found.fastest == 0.1 and 0.1 < found.lower < found.median == 0.25 < found.upper < 0.4


def test_slow_peers_are_skipped_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LONGEST", 0.0)
    found = timing.measure(_small("small", "score"), seconds=0.0)
    assert list(found.timings) == ["flowfast"] and found.absent["numpy"].startswith("skipped: above")


def test_results_compare_like_with_like() -> None:
    def one(median: float, error: float) -> timing.Timing:
        return timing.Timing(median, median, median, median, 3, error, error, error)

    case = _small("small", "flow")
    case = replace(case, contenders={**case.contenders, "other": cases.Contender(peers.lean, method="any")})
    times = {
        "flowfast": one(0.1, 1e-6), "flowfast, adaptive": one(0.01, 1e-6), "torch, lean": one(0.5, 1e-6),
        "numpy": one(0.3, 1e-3), "other": one(0.2, float("inf")),
    }  # fmt: skip
    found = results.as_json(case, timing.Measured(times, {"JAX": "not installed (jax)"}), RATES)
    rows = found["contenders"]
    assert rows["flowfast"]["best_peer"] == "numpy" and rows["flowfast"]["ratio_to_best_peer"] == pytest.approx(3)
    assert rows["flowfast, adaptive"]["best_peer"] == "torch, lean", "the only peer that is accurate enough"
    assert rows["flowfast"]["share_of_ceiling"] == pytest.approx(case.flops / 1e11 / 0.1)
    assert rows["flowfast, adaptive"]["share_of_ceiling"] is None, "it does other operations than those counted"
    assert rows["other"]["error_worst"] is None and json.dumps(found, allow_nan=False)
    screen = Console(width=200, record=True, file=io.StringIO())
    screen.print(results.table(found))
    text = screen.export_text()
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
    assert set(cases.LONG) <= set(cases.names())
    assert {gate.operation(name) for name in cases.names()} == set(gate.TESTS)
    for files in gate.TESTS.values():
        assert all((gate.ROOT / file).exists() for file in files)
