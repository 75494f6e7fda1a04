"""Teacher sets: what their rows are, how they are written, resumed, divided and refused."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from flowfast import GaussianMixture, OUProcess
from flowfast.cli import estimate, main
from flowfast.dataset import TeacherDataset, engines, generate_dataset, shards
from flowfast.dataset.addresses import open_store
from flowfast.dataset.generate import ShardsFailed, carry_out, check_claim, make_plan
from flowfast.dataset.maker import Maker
from flowfast.dataset.plan import Plan, RandomTimes
from flowfast.dataset.receipts import Receipt, missing_shards, receipt_name, write_manifest
from flowfast.dataset.shards import make_shard, shard_name
from flowfast.dataset.store import LocalStore, StorageError, is_part
from flowfast.flow import flow_map
from flowfast.rank import Rank

TESTS = Path(__file__).parent
TIMES = (1.0, 0.3, 0.0)
PROCESS = OUProcess(5.0)
LAW = RandomTimes((0.2, 1.0), (0.1, 0.4))

forked = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # quick to start, and it keeps patches


def mixture(std: float = 0.5) -> GaussianMixture:
    plain = GaussianMixture.random(3, 2, std=std, seed=0)
    return GaussianMixture(plain.means, std, [0.2, 0.5, 0.3])  # weights whose logs do not survive exp and log


def plan(rows: int = 10, **more) -> Plan:
    settings = {"rows_per_shard": 4, "backend": "cpp", "seed": 7, "times": TIMES} | more
    return make_plan(mixture(), PROCESS, settings.pop("times"), rows, **settings)


def generate(path, *, rows=10, **more):
    settings = {"rows_per_shard": 4, "backend": "cpp", "seed": 7} | more
    return generate_dataset(mixture(), PROCESS, settings.pop("times", TIMES), rows, path, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors(folder: Path, shard: int) -> dict[str, torch.Tensor]:
    with safe_open(folder / shard_name(shard), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_are_flows_of_the_marginals(tmp_path, dtype):
    generate(tmp_path, rows=4_000, rows_per_shard=3_000, dtype=dtype, times=(1.0, 0.2, 0.0), backend="cpp")
    parts = [tensors(tmp_path, i) for i in range(2)]
    x_from, x_to, segment = (torch.cat([part[name] for part in parts]) for name in ("x_from", "x_to", "segment"))
    assert (x_from.dtype, x_to.dtype, segment.dtype) == (dtype, dtype, torch.int32)
    assert segment.tolist() == [i % 2 for i in range(4_000)]
    exact = mixture().to(torch.float64)
    for i, (t_from, t_to) in enumerate([(1.0, 0.2), (0.2, 0.0)]):
        here = segment == i
        end = flow_map(x_from[here].double(), exact, PROCESS, t_from, t_to)
        error = (x_to[here].double() - end).norm(dim=1) / end.norm(dim=1).clamp(min=1)
        assert float(error.median()) < (5e-6 if dtype == torch.float32 else 1e-9)  # what flow_map promises
        marginal = PROCESS.marginal(exact, t_from)
        mean = marginal.weights @ marginal.means
        spread = marginal.weights @ (marginal.means - mean).square() + marginal.std**2
        points = x_from[here].double()
        # six standard errors of a mean of 2,000, and of a variance whose kurtosis is at most 3
        assert bool(((points.mean(0) - mean).abs() < 6 * (spread / 2_000).sqrt()).all())
        assert bool(((points.var(0) - spread).abs() < 6 * spread * (2 / 2_000) ** 0.5).all())
    assert len(x_from.unique(dim=0)) == 4_000  # every row has numbers of its own


def test_random_times(tmp_path):
    data = generate(tmp_path, rows=600, rows_per_shard=400, times=LAW, backend="cpp")
    parts = [tensors(tmp_path, i) for i in range(2)]
    x_from, x_to, t = (torch.cat([part[name] for part in parts]) for name in ("x_from", "x_to", "t"))
    assert (t.shape, t.dtype, data.n_segments) == ((600, 2), torch.float64, 0)
    t_from, t_to = t.unbind(1)
    assert bool(((t_from >= 0.2) & (t_from < 1.0) & (t_to >= 0.1) & (t_to <= t_from.clamp(max=0.4))).all())
    assert float(t_from.min()) < 0.22 and float(t_from.max()) > 0.98 and float(t_to.max()) > 0.39
    assert len(t.unique()) == 1_200
    end = flow_map(x_from.double(), mixture().to(torch.float64), PROCESS, t_from, t_to)
    assert float(((x_to - end).norm(dim=1) / end.norm(dim=1).clamp(min=1)).median()) < 5e-6


def test_files_are_what_the_receipts_say(tmp_path):
    umask = os.umask(0o027)
    try:
        data = generate(tmp_path / "set")
    finally:
        os.umask(umask)
    folder, files = tmp_path / "set", contents(tmp_path / "set")
    assert set(files) == {"plan.json", "mixture.safetensors", "manifest.json"} | {
        name(i) for i in range(3) for name in (shard_name, receipt_name)
    }
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {0o640}
    manifest = json.loads(files["manifest.json"])
    for shard, rows in enumerate((4, 4, 2)):
        content = files[shard_name(shard)]
        expected = {"shard": shard, "rows": rows, "bytes": len(content), "plan": data.plan.digest()}
        expected["sha256"] = hashlib.sha256(content).hexdigest()
        assert json.loads(files[receipt_name(shard)]) == expected
        assert manifest["shards"][shard] == [shard, rows, len(content), expected["sha256"]]
        assert (8 + int.from_bytes(content[:8], "little")) % 64 == 0
        with safe_open(folder / shard_name(shard), framework="pt") as file:
            about = json.loads(file.metadata()["flowfast"])
        assert about == {"plan": data.plan.digest(), "shard": shard, "version": 2}
        made = make_shard(data.plan, data.mixture, shard).tensors
        assert {name: len(x) for name, x in made.items()} == {"x_from": rows, "x_to": rows, "segment": rows}
        assert all(torch.equal(made[name], x) for name, x in tensors(folder, shard).items())
    assert Plan.parse(files["plan.json"]) == data.plan
    for name in ("means", "std", "log_weights"):
        assert torch.equal(getattr(data.mixture, name), getattr(mixture(), name))


@pytest.mark.parametrize("times", [TIMES, LAW])
def test_rows_do_not_depend_on_shards_or_chunks(tmp_path, monkeypatch, times):
    settings = {"rows": 2_500, "backend": "cpp", "times": times}
    monkeypatch.setattr(shards, "_FIRST_CHUNK", 7)
    generate(tmp_path / "a", rows_per_shard=2_500, **settings)
    monkeypatch.undo()
    generate(tmp_path / "b", rows_per_shard=999, **settings)
    whole = tensors(tmp_path / "a", 0)
    parts = [tensors(tmp_path / "b", i) for i in range(3)]
    assert all(torch.equal(torch.cat([part[name] for part in parts]), x) for name, x in whole.items())


def test_rows_of_the_gpu_kernels_are_those_of_the_cpu(tmp_path):
    pytest.importorskip("triton")
    device = os.environ.get("FLOWFAST_TEST_DEVICE", "cpu")  # without a GPU Triton's interpreter computes
    there = mixture().to(device)
    settings = {"rows_per_shard": 3, "seed": 7, "backend": "triton"}
    data = generate_dataset(there, PROCESS, TIMES, 4, tmp_path / "triton", **settings)
    assert "Triton" in data.plan.kernel.device
    generate(tmp_path / "cpp", rows=4, rows_per_shard=3)
    for shard in range(2):
        ours, theirs = tensors(tmp_path / "triton", shard), tensors(tmp_path / "cpp", shard)
        assert torch.equal(ours["segment"], theirs["segment"])
        size = theirs["x_from"].abs() + mixture().means.abs().max()  # of std z and of alpha m, at the most
        # each: the 8 eps of its normal that sample_rows promises, and six roundings to half an eps
        assert bool(((ours["x_from"] - theirs["x_from"]).abs() <= 2 * 11 * torch.finfo(torch.float32).eps * size).all())
        t_from, t_to = (torch.tensor(TIMES, dtype=torch.float64)[ours["segment"].long() + i] for i in (0, 1))
        end = flow_map(ours["x_from"].double(), mixture().to(torch.float64), PROCESS, t_from, t_to)
        error = (ours["x_to"] - end).norm(dim=1) / end.norm(dim=1).clamp(min=1)
        assert float(error.median()) < 5e-6  # what flow_map promises


def test_what_stands_is_kept(tmp_path):
    state = torch.get_rng_state()
    seen = []
    generate(tmp_path / "a", progress=lambda done, rows: seen.append((done, rows)))
    assert seen == [(0, 10), (4, 10), (8, 10), (10, 10)]
    whole = contents(tmp_path / "a")
    for harm in (
        lambda: (tmp_path / "a" / shard_name(1)).unlink(),
        lambda: (tmp_path / "a" / receipt_name(1)).unlink(),
        lambda: (tmp_path / "a" / shard_name(1)).write_bytes(b"short"),
        lambda: (tmp_path / "a" / receipt_name(1)).write_text("{"),
        lambda: (tmp_path / "a" / receipt_name(1)).write_bytes(whole[receipt_name(0)]),
    ):
        harm()
        assert list(missing_shards(open_store(tmp_path / "a"), plan())) == [0, 1, 0]
        seen.clear()
        generate(tmp_path / "a", progress=lambda done, rows: seen.append((done, rows)))
        assert seen == [(6, 10), (10, 10)]  # only the missing one was made
        assert contents(tmp_path / "a") == whole
    generate(tmp_path / "b")
    assert contents(tmp_path / "b") == whole
    generate(tmp_path / "c", seed=8)
    assert not set(contents(tmp_path / "c").values()) & {whole[shard_name(i)] for i in range(3)}
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError(errno.EIO, "Input/output error")])
def test_a_commit_that_fails_leaves_a_set_that_goes_on(tmp_path, monkeypatch, kind):
    generate(tmp_path / "whole")
    commit = LocalStore.commit
    for commits in range(9):  # plan, mixture, a shard and its receipt three times, manifest
        left = iter(range(commits))

        def fails_later(self, part, name, *, replace=True, left=left):
            if next(left, None) is None:
                raise kind
            commit(self, part, name, replace=replace)

        folder = tmp_path / f"set-{commits}"
        with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, StorageError)):
            patch.setattr(LocalStore, "commit", fails_later)
            generate(folder)
        assert len(contents(folder)) == commits  # nothing unfinished is left
        generate(folder)
        assert contents(folder) == contents(tmp_path / "whole")


def test_unfinished_files_of_the_dead_are_swept(tmp_path):
    generate(tmp_path)
    whole, store = contents(tmp_path), LocalStore(tmp_path)
    mine, stream = store.open_temporary(shard_name(0))
    stream.close()
    assert not store.is_abandoned(mine)
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    dead, elsewhere = mine.replace(f"-{os.getpid()}-", f"-{done.pid}-"), f"shards/.x.{'0' * 12}-{done.pid}-ab.part"
    for name in (dead, elsewhere, f".plan.json.{'0' * 12}-1-ab.part"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / receipt_name(2)).unlink()
    assert store.is_abandoned(dead) and not store.is_abandoned(elsewhere)
    carry_out(plan(), mixture(), store, rank=Rank(1, 2))  # shard 2 is another's: the set stays incomplete
    assert sorted(name for name in contents(tmp_path) if is_part(name)) == sorted(
        [mine, elsewhere, f".plan.json.{'0' * 12}-1-ab.part"]
    )
    generate(tmp_path)
    assert contents(tmp_path) == whole


def test_a_shard_that_someone_else_finished_is_not_made_again(tmp_path, monkeypatch):
    whole = contents(Path(generate(tmp_path).folder))
    monkeypatch.setattr("flowfast.dataset.maker.make_shard", lambda *arguments, **more: 1 / 0)
    seen = []
    assert Maker(open_store(tmp_path)).make(2, seen.append).rows == 2
    assert seen == [2]  # its rows count as made
    assert contents(tmp_path) == whole


SCRIPT = """
import sys, time
import test_dataset
def slow(done, rows):
    print(done, flush=True)
    time.sleep(0.05)
test_dataset.generate(sys.argv[1], rows=160, progress=slow)
"""


def test_a_folder_that_someone_claims_at_the_same_moment(tmp_path, monkeypatch):
    """The plan appears between two looks: the folder is the set's, and not one with foreign files."""
    generate(tmp_path)
    store, answers = LocalStore(tmp_path), [None]
    size = store.size
    monkeypatch.setattr(store, "size", lambda name: answers.pop() if answers else size(name))
    assert check_claim(store, plan()) and not answers


def test_killed_and_called_again(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "set")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if int(line) >= 16:
                process.send_signal(signal.SIGKILL)
                break
    assert process.wait() == -signal.SIGKILL
    stood = len(list((tmp_path / "set" / "receipts").glob("shard-*")))
    assert 2 <= stood < 40  # four shards are computed; two hands may still hold two of them
    with pytest.raises(ValueError, match=f"incomplete, {40 - stood} of 40 shards are missing"):
        TeacherDataset(tmp_path / "set")
    seen = []
    generate(tmp_path / "set", rows=160, progress=lambda done, rows: seen.append(done))
    assert seen[0] == 4 * stood
    generate(tmp_path / "whole", rows=160)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


@pytest.mark.parametrize("workers", [1, 2])
@forked
def test_shards_that_fail_are_named_and_all_others_made(tmp_path, monkeypatch, workers):
    generate(tmp_path / "whole")
    compute = Maker.compute

    def fails(self, shard, tick=None):
        if shard == 1:
            raise RuntimeError("a trajectory failed")
        return compute(self, shard, tick)

    with monkeypatch.context() as patch, pytest.raises(ShardsFailed, match="shard 1: a trajectory failed") as raised:
        patch.setattr(engines, "_START", "fork")
        patch.setattr(Maker, "compute", fails)
        generate(tmp_path / "set", workers=workers)
    assert [each.shard for each in raised.value.shards] == [1]
    assert list(missing_shards(open_store(tmp_path / "set"), plan())) == [0, 1, 0]
    generate(tmp_path / "set")
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


@forked
def test_a_worker_that_dies_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "_START", "fork")
    generate(tmp_path / "whole", rows=40)
    deaths, seen = 2, []

    def kill(done, rows):
        nonlocal deaths
        seen.append(done)
        if deaths and done > 8:
            deaths -= 1
            multiprocessing.active_children()[0].kill()

    generate(tmp_path / "set", rows=40, workers=2, progress=kill)
    assert deaths == 0 and seen[-1] == 40
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


@forked
def test_a_shard_whose_workers_die_is_set_aside(tmp_path, monkeypatch):
    make, tries = Maker.make, tmp_path / "tries"

    def dies(self, shard, tick=None):
        if shard == 1:
            with tries.open("a") as file:
                file.write("x")
            os._exit(7)
        return make(self, shard, tick)

    with monkeypatch.context() as patch, pytest.raises(ShardsFailed, match="shard 1: .* ended with code 7, 3 times"):
        patch.setattr(engines, "_START", "fork")
        patch.setattr(Maker, "make", dies)
        generate(tmp_path / "set", workers=2)
    assert tries.read_text() == "xxx"
    assert list(missing_shards(open_store(tmp_path / "set"), plan())) == [0, 1, 0]
    generate(tmp_path / "set")


@forked
def test_workers_that_do_not_start_are_no_endless_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "_START", "fork")
    monkeypatch.setattr(Maker, "__init__", lambda self, store: os._exit(9))
    with pytest.raises(RuntimeError, match="do not start: its worker process ended with code 9"):
        generate(tmp_path, workers=2)
    monkeypatch.setattr(Maker, "__init__", lambda self, store: 1 / 0)
    with pytest.raises(RuntimeError, match="a worker process failed: ZeroDivisionError"):
        generate(tmp_path, workers=2)
    assert not multiprocessing.active_children()


def test_ranks_divide_the_shards(tmp_path):
    generate(tmp_path / "whole")
    outcomes = []
    for rank in (2, 0, 1):
        seen = []
        store, share = open_store(tmp_path / "set"), Rank(rank, 3)
        outcomes.append(carry_out(plan(), mixture(), store, rank=share, progress=lambda *at, to=seen: to.append(at)))
        assert seen == ([(0, 2), (2, 2)] if rank == 2 else [(0, 4), (4, 4)])
        assert (tmp_path / "set" / "manifest.json").exists() == (rank == 1)  # whoever comes last writes it
    assert [(each.made, each.missing) for each in outcomes] == [(1, 2), (1, 1), (1, 0)]
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_short_space_is_refused_before_any_write(tmp_path, monkeypatch):
    monkeypatch.setattr(LocalStore, "free_bytes", lambda self: 2**20)
    with pytest.raises(StorageError, match="has 1,048,576 bytes left, and 3 missing shards need 1,063,"):
        generate(tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": 12}, "rows is 10 there, 12 here"),
        ({"seed": 8}, "seed is 7 there, 8 here"),
        ({"rows_per_shard": 5}, "rows_per_shard is 4 there, 5 here"),
        ({"dtype": torch.float64}, 'dtype is "float32" there, "float64" here; mixture is'),
        ({"times": LAW}, "random_times.law is null there, .* times is"),
        ({"backend": "reference"}, 'kernel.backend is "cpp" there, "reference" here; kernel.device is'),
    ],
)
def test_another_plan_is_refused_before_any_write(tmp_path, change, says):
    generate(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=says):
        generate(tmp_path, **change)
    with pytest.raises(ValueError, match="process.beta is 5.0 there, 4.0 here; times is"):
        generate_dataset(mixture(), OUProcess(4.0), (1.0, 0.0), 10, tmp_path, rows_per_shard=4, seed=7, backend="cpp")
    with pytest.raises(ValueError, match="mixture is .* there"):
        generate_dataset(mixture(0.6), PROCESS, TIMES, 10, tmp_path, rows_per_shard=4, seed=7, backend="cpp")
    assert contents(tmp_path) == before


def test_another_kernel_does_not_go_on(tmp_path):
    generate(tmp_path)
    foreign = replace(plan(), kernel=replace(plan().kernel, version="0.0.1"))
    (tmp_path / "plan.json").write_bytes(foreign.dump())
    with pytest.raises(ValueError, match='kernel.version is "0.0.1" there'):
        Maker(open_store(tmp_path))


def test_foreign_places_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no teacher set"):
        generate(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        generate(tmp_path / "notes.txt")
    (tmp_path / "deep" / "folder").mkdir(parents=True)
    with pytest.raises(ValueError, match="is not empty and holds no teacher set"):
        generate(tmp_path / "deep")
    assert sorted(contents(tmp_path)) == ["notes.txt"]


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda p: generate(p, rows=0), ValueError, "rows must be a whole number from 1 to"),
        (lambda p: generate(p, rows=2.5), TypeError, "rows must be an int; got float"),
        (lambda p: generate(p, rows=2**41), ValueError, "rows must be a whole number"),
        (lambda p: generate(p, rows=2**40, rows_per_shard=1), ValueError, "rows_per_shard must leave at most"),
        (lambda p: generate(p, rows_per_shard=0), ValueError, "rows_per_shard must be a whole number from 1"),
        (lambda p: generate(p, dtype=torch.bfloat16), TypeError, "dtype must be torch.float32 or torch.float64"),
        (lambda p: generate(p, seed=-1), ValueError, "seed must be at least 0"),
        (lambda p: generate(p, seed=2**63), ValueError, "seed must be a whole number from 0"),
        (lambda p: generate(p, backend="fast"), ValueError, "backend must be one of"),
        (lambda p: generate(p, workers=0), ValueError, "workers must be a whole number, at least 1; got 0"),
        (lambda p: generate(p, engine="steam"), ValueError, "engine must be one of local, ray"),
        (lambda p: generate(p, times=(0.0, 1.0)), ValueError, "times must decrease"),
        (lambda p: generate(p, times=(1.0,)), ValueError, "at least two"),
        (lambda p: generate(p, times="ab"), TypeError, "times must be numbers"),
        (lambda p: generate_dataset(mixture(), OUProcess(lambda t: 5.0), TIMES, 4, p), ValueError, "is a callable"),
        (
            lambda p: generate_dataset(mixture(), OUProcess(([0.0, 0.5], [1.0, 1.0])), TIMES, 4, p),
            ValueError,
            "t must not pass the table's last time",
        ),
    ],
)
def test_wrong_calls_write_nothing(tmp_path, call, kind, says):
    with pytest.raises(kind, match=says):
        call(tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("t_from", "t_to", "law", "says"),
    [
        ((1.0, 0.5), (0.0, 1.0), "decreasing", "t_from must be two times, low <= high"),
        ((0.1, 0.5), (0.2, 1.0), "decreasing", "t_to must begin below t_from"),
        ((0.1, 0.5), (0.0, float("nan")), "decreasing", "t_to must be two times"),
        ((0.1, 0.5), (0.0, 1.0), "increasing", "law must be 'decreasing'"),
    ],
)
def test_wrong_laws_of_times(t_from, t_to, law, says):
    with pytest.raises(ValueError, match=says):
        RandomTimes(t_from, t_to, law)


def test_a_plan_reads_back_to_the_field():
    for stored in (plan(), plan(times=LAW), plan(dtype=torch.float64)):
        assert Plan.parse(stored.dump()) == stored
        assert Plan.parse(stored.dump()).digest() == stored.digest()
    table = make_plan(mixture(), OUProcess(([0.0, 1.0], [1.0, 9.0])), TIMES, 3, backend="reference")
    assert Plan.parse(table.dump()) == table
    assert len({each.digest() for each in (plan(), plan(times=LAW), plan(seed=8), plan(rows=11), table)}) == 5
    assert make_plan(GaussianMixture.random(2, 64), PROCESS, TIMES, 10**9).rows_per_shard == 254_200
    assert make_plan(GaussianMixture.random(2, 2), PROCESS, TIMES, 10**9).rows_per_shard == 262_144


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("version", 1, "no plan of version 2"),
        ("version", 2.0, "no plan of version 2"),
        ("rows", 10.0, "rows must be a whole number"),
        ("rows", True, "rows must be a whole number"),
        ("times", [1.0, 0.5, 0], "times must be a list of finite numbers"),
        ("times", None, "exactly one of them"),
        ("extra", 1, "unknown 'extra'"),
        ("kernel", {"backend": "cpp"}, "kernel must hold backend, device, version"),
        ("kernel", {"backend": "x", "device": "y", "version": "z"}, "kernel.backend must be one of"),
        ("random_times", {"t_from": [0.5, 1.0], "t_to": [0.0], "law": "decreasing"}, "t_to must be two times"),
        ("process", {"beta": "fast"}, "process.beta must be a number"),
        ("mixture", "../../etc/passwd", "mixture must be 32 hexadecimal digits"),
    ],
)
def test_a_damaged_plan_is_refused(field, value, says):
    with pytest.raises(ValueError, match=says):
        Plan.parse(json.dumps(json.loads(plan().dump()) | {field: value}).encode())


def test_a_billion_rows_are_planned_in_little_memory(tmp_path):
    tracemalloc.start()
    try:
        large = make_plan(mixture(), PROCESS, TIMES, 10**9, backend="reference")
        assert large.n_shards == 3_815
        store = LocalStore(tmp_path)
        for folder in ("shards", "receipts"):
            (tmp_path / folder).mkdir()
        for shard in range(large.n_shards):
            receipt = Receipt(shard, large.rows_of(shard), 2**22, "0" * 64, large.digest())
            (tmp_path / receipt_name(shard)).write_bytes(receipt.dump())
            with (tmp_path / shard_name(shard)).open("wb") as file:
                file.truncate(2**22)  # a hole: nothing is stored
        assert not any(missing_shards(store, large))
        write_manifest(store, large)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200 * 2**20
    assert len(json.loads((tmp_path / "manifest.json").read_bytes())["shards"]) == 3_815


def test_the_command(tmp_path, capsys):
    mixture().save(tmp_path / "means.npz")
    out = tmp_path / "set"
    call = ["generate", "--means", str(tmp_path / "means.npz"), "--out", str(out), "--rows", "3_000"]
    call += ["--rows-per-shard", "1_000", "--segments", "3", "--grid", "balanced", "--workers", "1"]
    assert main([*call, "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["rows"], said["shards"], said["missing"], said["bytes"]) == (3_000, 3, 3, 3_000 * 20)
    parts = said["parts"]
    assert said["minutes"] == pytest.approx(max(parts["computing"] + parts["hashing"], parts["writing"]))
    assert min(parts.values()) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["means.npz"]
    assert main(call) == 0
    shown = capsys.readouterr()
    assert "3 of 3 shards made, 0 missing" in shown.out and "3,000 of 3,000 rows" in shown.err
    assert main([*call, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["made"] == 0
    assert main([*call, "--seed", "1"]) == 2
    assert "--out " in (said := capsys.readouterr().err) and "seed is 0 there, 1 here" in said
    assert main([*call[:-2], "--workers", "0"]) == 2
    assert "--workers must be" in capsys.readouterr().err
    assert main([*call, "--random-times", "--out", str(tmp_path / "random"), "--dtype", "float64"]) == 0
    assert TeacherDataset(tmp_path / "random").dtype == torch.float64


@pytest.mark.parametrize(
    ("costs", "workers", "minutes", "limit"),
    [
        ((6.0, 3.0, 4.0), 1, 7.5, "computing"),  # on two threads
        ((6.0, 3.0, 4.0), 2, 4.5, "computing"),
        ((1.0, 3.0, 1.5), 2, 2.0, "hashing"),
        ((2.0, 2.0, 8.0), 2, 8.0, "writing"),
        ((6.0, 3.0, None), 2, 4.5, "computing"),
    ],
)
def test_a_dry_run_says_which_part_limits(tmp_path, monkeypatch, costs, workers, minutes, limit):
    """costs: minutes of computing (for one worker), hashing (on one core) and writing 1,000 rows of 20 bytes."""
    computing, hashing, writing = (None if cost is None else 60 * cost / 1_000 for cost in costs)
    monkeypatch.setattr(estimate, "cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(estimate, "_compute", lambda *_: computing)
    monkeypatch.setattr(estimate, "_hash", lambda: hashing / 20)
    monkeypatch.setattr(estimate, "_write", lambda store: None if writing is None else writing / 20)
    store, asked = open_store(tmp_path / "set"), plan(1_000, rows_per_shard=100)
    found = estimate.estimate(store, asked, mixture(), workers)
    assert (found["minutes"], found["limit"], found["missing"]) == (pytest.approx(minutes), limit, 10)
    assert found["parts"]["writing"] == costs[2]
    said = estimate.sentence({**found, "rows": 1_000, "shards": 10, "bytes": 20_000})
    assert f"limited by {limit} (computing" in said and ("writing unknown" in said) == (writing is None)


def test_writing_is_tried_beside_the_folder_and_leaves_nothing(tmp_path, monkeypatch):
    def place_of(address):
        with monkeypatch.context() as patch:
            seen = []
            patch.setattr(tempfile, "TemporaryFile", lambda dir, **more: seen.append(dir) or made(dir=dir, **more))
            assert estimate._write(open_store(address)) > 0
        return seen

    made = tempfile.TemporaryFile
    monkeypatch.setattr(estimate, "_WRITING", (0.0, 2**22, 2**22))
    assert place_of(tmp_path / "new" / "set") == [tmp_path]
    (tmp_path / "set").mkdir()
    assert place_of(tmp_path / "set") == [tmp_path]
    assert [path.name for path in tmp_path.rglob("*")] == ["set"]
    assert estimate._write(open_store("/proc/flowfast/set")) is None, "nothing can be written there"
    assert estimate._write(open_store("memory://flowfast")) is None


def test_the_command_starts_processes_of_its_own(tmp_path):
    mixture().save(tmp_path / "means.npz")
    call = [sys.executable, "-m", "flowfast", "generate", "--means", str(tmp_path / "means.npz"), "--rows", "40"]
    call += ["--rows-per-shard", "10", "--out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    subprocess.run([*call, str(tmp_path / "many"), "--workers", "2"], check=True, env=environment)
    assert main([*call[3:], str(tmp_path / "one"), "--workers", "1"]) == 0
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
