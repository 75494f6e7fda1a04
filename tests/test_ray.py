"""Ray engines on a cluster of three simulated machines, of which one is killed while it works."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster_tasks import fragile
from tiny_tables import KILLED, tiny_tables  # noqa: F401  (a fixture)

from flowfast import GaussianMixture, OUProcess, cli, cluster, generate_dataset, time_grid
from flowfast.cluster import Answer
from flowfast.dataset.generate import ShardsFailed
from flowfast.experiments.paper import reproduce
from flowfast.experiments.paper.records import read
from flowfast.rank import Rank

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray (extra cluster) is not installed")
pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore::ResourceWarning")]

MACHINE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
MIXTURE, PROCESS = GaussianMixture.random(5, 8, std=0.1, seed=0), OUProcess(5.0)
TIMES = time_grid(MIXTURE, PROCESS, 4)


class Machines:
    """Three machines on this one; `kill_one` while something works on them."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster: Any = Cluster(initialize_head=True, head_node_args=MACHINE | {"include_dashboard": False})
        self.others = [self.cluster.add_node(**MACHINE) for _ in range(2)]
        self.address: str = self.cluster.address

    def kill_one(self) -> None:
        """Kill a machine with everything that runs on it."""
        self.cluster.remove_node(self.others.pop(), allow_graceful=False)

    def at_first(self, finished: Callable[..., bool]) -> Callable[..., None]:
        """A listener that kills a machine when it hears for the first time that something is finished."""
        alive = len(self.others)

        def listen(*event: Any) -> None:
            if finished(*event) and len(self.others) == alive:
                self.kill_one()

        return listen


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """A cluster at RAY_ADDRESS whose processes find this folder's modules."""
    with pytest.MonkeyPatch.context() as patch:
        here = Path(__file__).parent
        paths = [str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        found = Machines()
        patch.setenv("RAY_ADDRESS", found.address)
        yield found
        found.cluster.shutdown()


def shards(folder: Path) -> dict[str, str]:
    """SHA-256 of every shard."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*-0*.safetensors"))
    }


@needs_ray
def test_a_task_that_dies_is_tried_again_and_set_aside_in_the_end(machines: Machines, tmp_path: Path) -> None:
    requests = ["a", f"first {tmp_path / 'once'}", "die", "b"]
    before = signal.getsignal(signal.SIGTERM)
    with cluster.connected() as ray:
        assert signal.getsignal(signal.SIGTERM) == before  # the command line's own, which exits with 143
        answers = {answer.index: answer for answer in cluster.run_tasks(ray, fragile, requests)}
        assert {index: answer.text for index, answer in answers.items()} == {
            0: "A", 1: requests[1].upper(), 2: None, 3: "B"
        }  # fmt: skip
        assert answers[2].lost
        with pytest.raises(RuntimeError, match=r"a task of the cluster failed: ZeroDivisionError\('asked for'\)"):
            list(cluster.run_tasks(ray, fragile, ["raise"]))
        with pytest.raises(ValueError, match="has no GPU"):
            list(cluster.run_tasks(ray, fragile, ["a"], gpus=1))
    assert not ray.is_initialized() and signal.getsignal(signal.SIGTERM) == before


@needs_ray
def test_teacher_sets_have_the_same_bits_when_a_machine_dies(machines: Machines, tmp_path: Path) -> None:
    def make(name: str, **options: Any) -> None:
        generate_dataset(MIXTURE, PROCESS, TIMES, 12_000, tmp_path / name, rows_per_shard=1_000, **options)

    make("local")
    make("ray", engine="ray", progress=machines.at_first(lambda done, rows: 0 < done < rows))
    assert len(machines.others) == 1 and len(shards(tmp_path / "local")) == 12
    assert shards(tmp_path / "ray") == shards(tmp_path / "local")
    assert not list((tmp_path / "ray").rglob("*.part"))


@needs_ray
def test_tables_have_the_same_results_when_a_machine_dies(machines: Machines, tmp_path: Path) -> None:
    machines.others.append(machines.cluster.add_node(**MACHINE))
    request = replace(KILLED, seeds=4)
    reproduce(request, tmp_path / "local")
    reproduce(
        request, tmp_path / "ray", engine="ray", address=machines.address, checkpoint_every=0.02,
        listener=machines.at_first(lambda event: 0 < event.runs_done < event.runs),
    )  # fmt: skip
    assert len(machines.others) < 2
    local, ray = (read(tmp_path / name) for name in ("local", "ray"))
    assert len(local) == 8 and ray.keys() == local.keys()
    assert all(ray[name].metrics == local[name].metrics for name in local)
    assert not any((tmp_path / "ray" / "unfinished").iterdir())


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that does every task here but the second one, which is lost again and again."""

    def run_tasks(ray: None, work: Callable[[str], str], requests: Iterable[str], *, gpus: int = 0) -> Iterator[Answer]:
        for index, request in enumerate(requests):
            yield Answer(index, None, "node died") if index == 1 else Answer(index, work(request))

    monkeypatch.setattr(cluster, "check_installed", lambda: None)
    monkeypatch.setattr(cluster, "connected", lambda address=None: nullcontext())
    monkeypatch.setattr(cluster, "run_tasks", run_tasks)


@pytest.mark.usefixtures("losing")
def test_a_lost_shard_is_named_and_all_others_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(ShardsFailed, match="first shard 1: node died, 3 times") as caught:
            generate_dataset(MIXTURE, PROCESS, TIMES, 4_000, "set", rows_per_shard=1_000, engine="ray")
    finally:
        torch.set_num_threads(threads)
    assert [each.shard for each in caught.value.shards] == [1] and len(shards(tmp_path / "set")) == 3
    assert len(generate_dataset(MIXTURE, PROCESS, TIMES, 4_000, "set", rows_per_shard=1_000)) == 4_000


@pytest.mark.usefixtures("losing")
def test_a_lost_run_stays_a_hole_until_the_next_call(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"1 runs stay holes, first: Table .*, seed . \(node died, 3 times\)"):
        reproduce(KILLED, tmp_path, engine="ray")
    assert len(read(tmp_path)) == 3
    reproduce(KILLED, tmp_path)
    assert len(read(tmp_path)) == 4
    with pytest.raises(ValueError, match="unset RANK"):
        reproduce(KILLED, tmp_path, engine="ray", rank=Rank(0, 2))
    with pytest.raises(ValueError, match="engine must be one of local, ray"):
        reproduce(KILLED, tmp_path, engine="spark")


def test_what_is_missing_is_said_with_the_command_that_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for call in (
        lambda: generate_dataset(MIXTURE, PROCESS, TIMES, 10, tmp_path / "set", engine="ray"),
        lambda: reproduce(KILLED, tmp_path / "tables", engine="ray"),
    ):
        with pytest.raises(ValueError, match=r"pip install 'flowfast\[cluster\]'"):
            call()
    assert not list(tmp_path.iterdir()), "nothing was written"


@needs_ray
def test_a_cluster_that_does_not_answer_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"  # nobody listens there any more
    monkeypatch.setenv("RAY_ADDRESS", address)
    said = f"engine 'ray': no cluster answers at '{address}' .*: start one, or name another"
    (out := tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=said):
        generate_dataset(MIXTURE, PROCESS, TIMES, 10, out / "set", engine="ray")
    for named in (address, f"ray://{address}", None):
        with pytest.raises(ValueError, match=said.replace("'127", "'(ray://)?127")):
            reproduce(KILLED, out / "tables", engine="ray", address=named)
    MIXTURE.save(tmp_path / "mixture.safetensors")
    call = f"generate --means {tmp_path}/mixture.safetensors --rows 10 --out {out}/set --engine ray"
    assert cli.main(call.split()) == 2
    assert f"--engine 'ray': no cluster answers at '{address}'" in capsys.readouterr().err
    assert not list(out.iterdir()), "nothing was written"
    monkeypatch.delenv("RAY_ADDRESS")
    generate_dataset(MIXTURE, PROCESS, TIMES, 10, out / "set")
    monkeypatch.setenv("RAY_ADDRESS", address)
    generate_dataset(MIXTURE, PROCESS, TIMES, 10, out / "set", engine="ray")  # complete: no cluster is asked
