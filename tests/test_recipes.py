"""The benchmark of recipes: equal budgets, lines that are not made twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import recipes
from bench.ingredients import LOOPS
from flowfast import Recipe


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("segments", [1, 2, 4, 8])
def test_every_student_gets_the_same_number_of_pairs(segments, shared):
    recipe = recipes.sized(recipes.Trial(Recipe(shared=shared), segments), 10_000)
    updates = recipe.steps * (1 if shared else segments)  # each of them with its own loss and optimiser step
    pairs = recipe.batch_size * (segments if shared else 1)
    assert (updates, pairs) == (10_000, 1_024)


def test_the_papers_student_is_as_published():
    trial = recipes.TRIALS["paper"]["n = 4"]
    kept = (trial.segments, trial.grid, trial.recipe.preconditioned, trial.recipe.shared, trial.recipe.activation)
    assert kept == (4, "balanced", False, False, "relu")
    rates = {trial.recipe.learning_rate_at(step) for step in (0, 1_000, 1_999)}
    assert (rates, trial.recipe.weight_decay, trial.recipe.clip_norm) == ({2e-4}, 0.0, 1.0)
    assert (trial.recipe.width, trial.recipe.depth) == (512, 4)


def test_a_run_stands_in_the_file_once(tmp_path, monkeypatch, capsys):
    small = replace(Recipe.fresh(), width=8, depth=1)
    trials = {"n = 1": recipes.Trial(small), "n = 2": recipes.Trial(small, 2)}
    monkeypatch.setattr(recipes, "TRIALS", {"best": trials})
    monkeypatch.setattr(recipes, "PAIRS", 8)
    monkeypatch.setattr(recipes, "POINTS", 200)
    file = tmp_path / "new" / "recipes.jsonl"
    call = ["recipes", "best", "--steps", "4", "--out", str(file)]
    monkeypatch.setattr("sys.argv", [*call, "--only", "n = 2"])
    recipes.main()
    monkeypatch.setattr("sys.argv", call)
    recipes.main()
    recipes.main()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["name"] for row in rows] == ["n = 2", "n = 1"]
    assert [len(row["each"]) for row in rows] == [2, 1]
    assert all(0 < row["composed"] < 10 and row["composed"] == row["along"][-1] for row in rows)
    assert rows[0]["recipe"]["batch_size"] == 4 and rows[0]["seconds"] >= 0
    again = recipes.run(trials["n = 2"], 4, 0)
    assert again["composed"] == rows[0]["composed"]  # a seed gives one set of bits
    assert capsys.readouterr().out.count("best, n = ") == 2
    monkeypatch.setattr("sys.argv", [*call, "--table"])
    recipes.main()
    assert f"| 2 | the recipe | uniform | 4 | 0 | {again['composed']:.4f} |" in capsys.readouterr().out


def test_a_loop_stands_in_its_line(tmp_path, monkeypatch, capsys):
    small = replace(Recipe.fresh(), width=8, depth=1)
    trials = {"n = 2": recipes.Trial(small, 2), "n = 2, averaged": recipes.Trial(small, 2, loop="averaged")}
    monkeypatch.setattr(recipes, "TRIALS", {"ingredients": trials})
    monkeypatch.setattr(recipes, "PAIRS", 8)
    monkeypatch.setattr(recipes, "POINTS", 200)
    monkeypatch.setattr("bench.ingredients.AVERAGED", 0.5)  # of 4 steps, so that an average differs from the last
    call = ["recipes", "--steps", "4", "--out", str(tmp_path / "recipes.jsonl")]
    for seed in ("0", "1"):
        for _ in range(2):
            monkeypatch.setattr("sys.argv", [*call, "ingredients", "--seed", seed])
            recipes.main()
    rows = recipes.rows_of(tmp_path / "recipes.jsonl")
    assert [row.get("loop") for row in rows] == [None, "averaged"] * 2
    assert len({row["composed"] for row in rows}) == 4
    (plain, plain_1), (mean, mean_1) = ([row["composed"] for row in rows if row["name"] == name] for name in trials)
    ratio = (mean + mean_1) / (plain + plain_1)
    lines = [
        (plain, f"| n = 2 | 4 | {plain:.4f} | {plain_1:.4f} |  |  |"),
        (mean, f"| n = 2, averaged | 4 | {mean:.4f} | {mean_1:.4f} | {ratio:.2f} | n = 2 |"),
    ]
    assert recipes.tables(rows).splitlines()[-2:] == [line for _, line in sorted(lines)]


def test_every_line_has_one_to_be_compared_with():
    names = set(recipes.TRIALS["ingredients"])
    assert {*recipes.AGAINST, *recipes.AGAINST.values(), "none", "n = 4"} <= names


@pytest.mark.parametrize("group", recipes.TRIALS)
def test_every_set_is_in_the_tables(group):
    name, trial = next(iter(recipes.TRIALS[group].items()))
    row = recipes.settings_of(group, name, trial, 7_654_321, 0) | {"composed": 0.123, "seconds": 3.0}
    assert [line for line in recipes.tables([row]).splitlines() if "7,654,321" in line and "0.123" in line]


def test_every_loop_has_its_line():
    assert {trial.loop for trial in recipes.TRIALS["ingredients"].values()} - {None} == set(LOOPS)


def test_the_page_shows_what_stands_in_the_file():
    root = Path(__file__).parents[1]
    rows = recipes.rows_of(root / "bench" / "results" / "recipes-cpu.jsonl")
    assert rows and recipes.tables(rows) in (root / "docs" / "students.md").read_text()
