"""Tasks on a Ray cluster (extra `cluster`): short texts go out and come back, and nothing else travels.

Nothing is asked of the network beyond the cluster: no dashboard, no usage statistics.
"""

from __future__ import annotations

import collections
import importlib
import importlib.util
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

TRIES = 3  # of a task whose process or machine dies
_ANSWER = 10.0  # seconds for a cluster's machine to take a connection; Ray itself would wait for minutes
_AHEAD = 2  # tasks that wait in the cluster, per task that it can run


@dataclass(frozen=True)
class Answer:
    """What became of one task.

    Args:
        index: of its request. text: what it returned; None when it was lost TRIES times. lost: how, the last time.
    """

    index: int
    text: str | None
    lost: str = ""


def check_installed() -> None:
    """Raise ValueError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError("engine 'ray' needs Ray, which is not installed: pip install 'flowfast[cluster]'")


@contextmanager
def connected(address: str | None = None) -> Iterator[Any]:
    """The ray module, connected; a connection that was there before is used and kept.

    Args:
        address: of a cluster, for example "auto" or "10.0.0.1:6379"; None is what RAY_ADDRESS says, and without it a
            Ray of this call's own, on this machine alone.

    Raises:
        ValueError: Ray is not installed, or no cluster answers at this address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads it when it starts
    check_installed()
    ray = importlib.import_module("ray")
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS")
    _check_answers(address or "local")
    quiet = {"log_to_driver": False, "configure_logging": False}
    try:
        with _own_signals():
            if address:
                ray.init(address=address, **quiet)
            else:
                ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
    except (ConnectionError, ValueError) as error:
        raise _unanswered(address, error) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise ValueError where nobody listens at "host:port" or "ray://host:port"; Ray looks for other addresses."""
    host, found, port = address.removeprefix("ray://").rpartition(":")
    if not (found and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise _unanswered(address, error) from error


def _unanswered(address: str | None, error: Exception) -> ValueError:
    return ValueError(f"engine 'ray': no cluster answers at {address!r} ({error}): start one, or name another")


def run_tasks(
    ray: Any, work: Callable[[str], str], requests: Iterable[str], *, gpus: int = 0
) -> Iterator[Answer]:  # fmt: skip
    """Call `work` with every request, on one core or one GPU of the cluster each; answers come as tasks end.

    Args:
        ray: from `connected`. work: of an importable module; it may be called again for a request that was lost.
        requests: texts, read as they are needed. gpus: 1 where the work needs one.

    Raises:
        ValueError: the cluster has no GPU where one is needed. RuntimeError: `work` raised.
    """
    kind = "GPU" if gpus else "CPU"
    if not ray.cluster_resources().get(kind):
        raise ValueError(f"the Ray cluster has no {kind}: add a machine that has one")
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(work)  # tries are counted here
    fresh, again = enumerate(requests), collections.deque[tuple[int, str]]()
    running, tries = dict[Any, tuple[int, str]](), collections.Counter[int]()
    try:
        while True:
            most = _AHEAD * max(1, int(ray.cluster_resources().get(kind, 0)))
            while len(running) < most and (found := again.popleft() if again else next(fresh, None)):
                running[task.remote(found[1])] = found
            if not running:
                return
            for done in ray.wait(list(running), timeout=1.0)[0]:
                index, request = running.pop(done)
                answer = _result(ray, done, index)
                tries[index] += answer.text is None
                if answer.text is None and tries[index] < TRIES:
                    again.append((index, request))
                else:
                    yield answer
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _result(ray: Any, reference: Any, index: int) -> Answer:
    try:
        return Answer(index, ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        raise RuntimeError(f"a task of the cluster failed: {error.cause!r}") from error
    except ray.exceptions.RayError as error:
        return Answer(index, None, str(error).partition("\n")[0])


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's way of ending: Ray puts one of its own in its place when it starts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, kept)
