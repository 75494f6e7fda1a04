"""The thread pool beside its hosts: DataLoader workers, torch's thread count, CPUs that are not ours, other threads.

Each case runs in a process of its own, under a time limit: a hang is a failure. FLOWFAST_LONG=1 starts DataLoader
workers 100 times per start method instead of a few.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import flowfast
from flowfast import GaussianMixture, OUProcess, _cpp
from flowfast.tableaux import DORMAND_PRINCE

LONG = os.environ.get("FLOWFAST_LONG") == "1"
ROUNDS = {"fork": 100, "forkserver": 100, "spawn": 100} if LONG else {"fork": 3, "forkserver": 2, "spawn": 1}
PROCESS = OUProcess(5.0)


def work(seed: int = 0) -> bytes:
    """A score and a flow through the public functions."""
    mixture = GaussianMixture.random(200, 16, std=0.5)
    x = torch.randn(700, 16, generator=torch.Generator().manual_seed(seed))
    score = flowfast.score(x, mixture)
    flow = flowfast.flow_map(x, mixture, PROCESS, 1.0, 0.5, steps=3)
    return score.numpy().tobytes() + flow.numpy().tobytes()


def pooled(seed: int = 0) -> bytes:
    """The same kernels on two threads of ours, with no operation of torch that would use several of its own."""
    g = torch.Generator().manual_seed(seed)
    x, means, log_weights = (
        torch.randn(700, 16, generator=g),
        torch.randn(200, 16, generator=g),
        torch.full((200,), -5.3),
    )
    one, center = torch.ones((), dtype=torch.float64), torch.zeros(16)
    ends = torch.tensor([0.01, 1.0, 1.0, 0.5], dtype=torch.float64)
    torch.set_num_threads(2)
    score = _cpp.score(x, means, log_weights, one, one)
    flow = _cpp.flow_adaptive(x, means, log_weights, center, ends, DORMAND_PRINCE, 1e-3, 1e-4, 100)[0]
    return score.numpy().tobytes() + flow.numpy().tobytes()


class Rows(torch.utils.data.Dataset[bytes]):
    """What a worker computes: first with its one thread of torch, then with two of ours.

    Two threads of torch would hang in a forked worker by themselves.
    """

    def __len__(self) -> int:
        return 4

    def __getitem__(self, seed: int) -> bytes:
        torch.set_num_threads(1)
        return work(seed) + pooled(seed)


def collate(rows: list[bytes]) -> list[bytes]:
    return rows


def feed(method: str, rounds: int) -> None:
    """DataLoader workers of one start method, the parent's pool warm before, between and after."""
    torch.set_num_threads(2)
    want = [work(seed) + pooled(seed) for seed in range(4)]
    for _ in range(rounds):
        loader = torch.utils.data.DataLoader(
            Rows(), batch_size=1, num_workers=2, multiprocessing_context=method, collate_fn=collate, timeout=60
        )
        assert [row for batch in loader for row in batch] == want
        assert work(0) + pooled(0) == want[0]


def every_operation() -> list[torch.Tensor]:
    """All outputs for one input that is worth several threads."""
    mixture = GaussianMixture.random(129, 33, std=0.5)
    x = torch.randn(700, 33, generator=torch.Generator().manual_seed(0))
    names = ("log_density", "score", "posterior_mean", "posterior_weights", "covariance_trace")
    out = [getattr(flowfast, name)(x, mixture) for name in names]
    out.append(flowfast.hessian_vector_product(x, x.flip(0), mixture))
    out += [flowfast.flow_map(x, mixture, PROCESS, 1.0, 0.0, steps=steps) for steps in (5, None)]
    return [*out, torch.tensor(mixture.diameter())]


def same_bits() -> None:
    """1, 2, 3 and 8 threads."""
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(every_operation())
    for result in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], result, strict=True))


def call(threads: int) -> int:
    """Threads that a large call adds to this process; the tensors are too small for torch to start its own."""
    one = torch.ones((), dtype=torch.float64)
    x, means, log_weights = torch.ones(1000, 16), torch.ones(400, 16), torch.full((400,), -6.0)
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    _cpp.score(x, means, log_weights, one, one)
    return len(os.listdir("/proc/self/task")) - before


def count_threads() -> None:
    """One thread asked for: none is started. Many: no more than the CPUs allowed, also when that number shrinks."""
    allowed = len(os.sched_getaffinity(0))
    assert call(1) == 0
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    assert call(8) == 0
    if allowed > 1:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
        assert call(2) == 1
        assert call(64) <= len(os.sched_getaffinity(0)) - 2
    start = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - start < 0.02, "idle threads use the CPU"


def exit_after_fork() -> None:
    """A forked child works with threads of its own and exits the ordinary way, which joins them and no others."""
    want = pooled()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
    assert pooled() == want
    if child != 0:
        assert os.waitpid(child, 0)[1] == 0


def call_at_once() -> None:
    """Four Python threads, each with its own input."""
    torch.set_num_threads(2)
    want = [work(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as callers:
        for _ in range(5):
            assert list(callers.map(work, range(4))) == want


def alone(code: str, seconds: int = 100) -> None:
    """Run code with this module as `t` in a fresh process."""
    root = Path(__file__).parent.parent
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", f"import test_threads as t; {code}"],
        env=os.environ | {"PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(3600 if LONG else 120)
@pytest.mark.parametrize("method", ROUNDS)
def test_data_loader_workers(method: str) -> None:
    alone(f"t.feed('{method}', {ROUNDS[method]})", 3600 if LONG else 100)


@pytest.mark.parametrize("case", ["same_bits", "call_at_once"])
def test_bits(case: str) -> None:
    alone(f"t.{case}()")


def test_a_forked_child_exits() -> None:
    alone("t.exit_after_fork()")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads are counted in /proc")
def test_threads_never_exceed_what_is_asked_and_allowed() -> None:
    alone("t.count_threads()")
