"""Teacher sets: what they hold, resuming, refusing."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flowfast import GaussianMixture, OUProcess
from flowfast.dataset import TeacherDataset, generate_dataset
from flowfast.flow import flow_map

TESTS = Path(__file__).parent
TIMES = (1.0, 0.3, 0.0)
PROCESS = OUProcess(5.0)


def mixture(std: float = 0.5) -> GaussianMixture:
    plain = GaussianMixture.random(3, 2, std=std, seed=0)
    return GaussianMixture(plain.means, std, [0.2, 0.5, 0.3])  # weights whose logs do not survive exp and log


def generate(path, *, rows=10, **more):
    settings = {"rows_per_shard": 4, "backend": "reference", "seed": 7} | more
    return generate_dataset(mixture(), PROCESS, TIMES, rows, path, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trajectories_are_the_flow_of_noise(tmp_path, dtype):
    data = generate(tmp_path, rows=400, rows_per_shard=300, dtype=dtype)
    path = data.path()
    assert (path.shape, path.dtype, len(data), data.dim, data.n_segments) == ((3, 400, 2), dtype, 400, 2, 2)
    exact = mixture().to(torch.float64)
    for i in range(2):
        end = flow_map(path[i].double(), exact, PROCESS, TIMES[i], TIMES[i + 1], backend="reference")
        error = (path[i + 1].double() - end).norm(dim=1) / end.norm(dim=1).clamp(min=1)
        assert float(error.median()) < (1e-5 if dtype == torch.float32 else 1e-9)
    marginal = PROCESS.marginal(exact, 1.0)
    assert float((path[0].double().mean(0) - marginal.weights @ marginal.means).abs().max()) < 0.2
    assert path[0].double().std(0).tolist() == pytest.approx([float(marginal.std)] * 2, rel=0.15)
    assert len(path[0].unique(dim=0)) == 400  # every shard has a stream of its own


def test_reading_by_pair_path_and_row(tmp_path):
    data = generate(tmp_path)
    path = data.path()
    rows = torch.tensor([9, 0, 4, 4, 3])
    x_from, x_to = data.pair(1, rows)
    assert torch.equal(x_from, path[1, rows])
    assert torch.equal(x_to, path[2, rows])
    assert torch.equal(data.path(rows), path[:, rows])
    assert torch.equal(data[5], path[:, 5])
    assert torch.equal(data[-1], path[:, 9])
    assert data.pair(0, rows[:0])[0].shape == (0, 2)
    assert data.times.tolist() == list(TIMES)
    assert data.process.to_dict() == PROCESS.to_dict()
    for name in ("means", "std", "log_weights"):
        assert torch.equal(getattr(data.mixture, name), getattr(mixture(), name))
    assert torch.equal(copy.copy(data).path(), path)
    assert len(list(torch.utils.data.DataLoader(data, batch_size=5))) == 2
    before = data[5].clone()
    data[5].zero_()  # what is handed out is a copy
    assert torch.equal(data[5], before)


def test_a_shard_is_a_function_of_plan_and_number(tmp_path):
    state = torch.get_rng_state()
    seen = []
    generate(tmp_path / "a", progress=lambda done, rows: seen.append((done, rows)))
    assert seen == [(0, 10), (4, 10), (8, 10), (10, 10)]
    whole = contents(tmp_path / "a")
    assert sorted(whole) == ["mixture.safetensors", "plan.json"] + [f"shard-{i:05d}.safetensors" for i in range(3)]
    (tmp_path / "a" / "shard-00001.safetensors").unlink()
    seen.clear()
    generate(tmp_path / "a", progress=lambda done, rows: seen.append((done, rows)))
    assert seen == [(6, 10), (10, 10)]  # only the missing one was made
    assert contents(tmp_path / "a") == whole
    generate(tmp_path / "b")
    assert contents(tmp_path / "b") == whole
    assert generate(tmp_path / "c", seed=8).path().ne(TeacherDataset(tmp_path / "b").path()).any()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("writes", range(6))
def test_a_write_that_fails_leaves_a_set_that_goes_on(tmp_path, monkeypatch, writes):
    generate(tmp_path / "whole")
    replace, done = os.replace, []

    def fails_later(a, b):
        if len(done) == writes:
            raise KeyboardInterrupt
        done.append(b)
        replace(a, b)

    if writes < 5:  # plan, mixture, three shards
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", fails_later)
            generate(tmp_path / "set")
        with pytest.raises(ValueError, match="teacher set"):
            TeacherDataset(tmp_path / "set")
    generate(tmp_path / "set")
    assert {n: c for n, c in contents(tmp_path / "set").items() if n[0] != "."} == contents(tmp_path / "whole")


SCRIPT = """
import sys, time
import test_dataset
def slow(done, rows):
    print(done, flush=True)
    time.sleep(0.05)
test_dataset.generate(sys.argv[1], rows=160, progress=slow)
"""


def test_killed_and_called_again(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "set")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if int(line) >= 12:
                process.send_signal(signal.SIGKILL)
                break
    assert process.wait() == -signal.SIGKILL
    stood = len(list((tmp_path / "set").glob("shard-*")))
    assert 3 <= stood < 40
    with pytest.raises(ValueError, match=f"incomplete, {40 - stood} of 40 shards are missing"):
        TeacherDataset(tmp_path / "set")
    seen = []
    generate(tmp_path / "set", rows=160, progress=lambda done, rows: seen.append(done))
    assert seen[0] == 4 * stood
    generate(tmp_path / "whole", rows=160)
    assert {n: c for n, c in contents(tmp_path / "set").items() if n[0] != "."} == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": 12}, "rows is 10 there, 12 here"),
        ({"seed": 8}, "seed is 7 there, 8 here"),
        ({"rows_per_shard": 5}, "rows_per_shard is 4 there, 5 here"),
        ({"dtype": torch.float64}, 'dtype is "float32" there, "float64" here; mixture is'),
    ],
)
def test_another_plan_is_refused_before_any_write(tmp_path, change, says):
    generate(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=says):
        generate(tmp_path, **change)
    with pytest.raises(ValueError, match="process.beta is 5.0 there, 4.0 here; times is"):
        generate_dataset(
            mixture(), OUProcess(4.0), (1.0, 0.0), 10, tmp_path, rows_per_shard=4, seed=7, backend="reference"
        )
    with pytest.raises(ValueError, match="mixture is .* there"):
        generate_dataset(mixture(0.6), PROCESS, TIMES, 10, tmp_path, rows_per_shard=4, seed=7, backend="reference")
    assert contents(tmp_path) == before


def test_foreign_places_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no teacher set"):
        generate(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        generate(tmp_path / "notes.txt")
    assert os.listdir(tmp_path) == ["notes.txt"]
    with pytest.raises(ValueError, match="is no folder"):
        TeacherDataset(tmp_path / "nothing")
    with pytest.raises(ValueError, match="plan.json does not exist"):
        TeacherDataset(tmp_path)


def _cut(folder):
    path = folder / "shard-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _plan(folder, **fields):
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**plan, **fields}))


def _borrow(folder):
    generate(folder.parent / "other", seed=8)
    (folder / "shard-00001.safetensors").write_bytes((folder.parent / "other" / "shard-00001.safetensors").read_bytes())


def _misplace(folder):
    (folder / "shard-00001.safetensors").write_bytes((folder / "shard-00000.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda f: (f / "shard-00001.safetensors").unlink(), "1 of 3 shards are missing, first shard-00001"),
        (_cut, "shard-00002.safetensors is damaged"),
        (lambda f: (f / "shard-00000.safetensors").write_bytes(b""), "shard-00000.safetensors is damaged"),
        (lambda f: save_file({"x": torch.ones(3, 4, 2)}, f / "shard-00000.safetensors"), "not written by flowfast"),
        (_borrow, "shard-00001.safetensors belongs to another set"),
        (_misplace, "shard-00001.safetensors belongs to another set"),
        (lambda f: (f / "plan.json").write_text("{"), "plan.json cannot be read as JSON"),
        (lambda f: _plan(f, version=9), "no plan of version 1"),
        (lambda f: _plan(f, rows="many"), "plan.json is damaged"),
        (lambda f: _plan(f, times=[0.0, 1.0]), "plan.json is damaged .times must decrease"),
        (lambda f: _plan(f, extra=1), "plan.json is damaged"),
        (lambda f: (f / "mixture.safetensors").unlink(), "mixture.safetensors is not the mixture of the plan"),
        (lambda f: _plan(f, mixture="0"), "mixture.safetensors is not the mixture of the plan"),
    ],
)
def test_damaged_sets_are_refused(tmp_path, harm, says):
    generate(tmp_path / "set")
    harm(tmp_path / "set")
    with pytest.raises(ValueError, match=says):
        TeacherDataset(tmp_path / "set")


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda p: generate(p, rows=0), ValueError, "rows must be at least 1; got 0"),
        (lambda p: generate(p, rows=2.5), TypeError, "rows must be an int; got float"),
        (lambda p: generate(p, rows_per_shard=0), ValueError, "rows_per_shard must be at least 1"),
        (lambda p: generate(p, dtype=torch.bfloat16), TypeError, "dtype must be torch.float32 or torch.float64"),
        (lambda p: generate(p, seed=-1), ValueError, "seed must be at least 0"),
        (lambda p: generate(p, backend="fast"), ValueError, "backend must be one of"),
        (lambda p: generate_dataset(mixture(), PROCESS, (0.0, 1.0), 4, p), ValueError, "times must decrease"),
        (lambda p: generate_dataset(mixture(), PROCESS, (1.0,), 4, p), ValueError, "at least two"),
        (lambda p: generate_dataset(mixture(), PROCESS, "ab", 4, p), TypeError, "times must be numbers"),
        (
            lambda p: generate_dataset(mixture(), OUProcess(lambda t: 5.0), TIMES, 4, p),
            ValueError,
            "beta is a callable",
        ),
    ],
)
def test_wrong_calls_write_nothing(tmp_path, call, kind, says):
    with pytest.raises(kind, match=says):
        call(tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda d: d.pair(2, torch.tensor([0])), ValueError, "segment must be from 0 to 1; got 2"),
        (lambda d: d.pair(0, torch.tensor([10])), ValueError, "rows must be from 0 to 9; got 10 to 10"),
        (lambda d: d.pair(0, torch.tensor([-1])), ValueError, "rows must be from 0 to 9; got -1"),
        (lambda d: d.pair(0, [1, 2]), TypeError, "rows must be an int64 tensor"),
        (lambda d: d.path(torch.tensor([0.5])), TypeError, "rows must be an int64 tensor"),
        (lambda d: d[10], IndexError, "row must be from 0 to 9; got 10"),
        (lambda d: d["a"], TypeError, "row must be an int"),
    ],
)
def test_wrong_reads(tmp_path, call, kind, says):
    data = generate(tmp_path)
    with pytest.raises(kind, match=says):
        call(data)
